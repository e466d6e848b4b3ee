"""The command ``batch``: options, exit codes, what it prints, and being interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from napari_learned_diffusion import cli
from napari_learned_diffusion.files import Volume, read, write

QUICK = ("--model", "perona-malik", "--noise-sigma", "8", "--iterations", "2")
SUFFIXES = (".tif", ".mrc", ".nii.gz", ".ome.zarr", "")


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        cli.app, ["batch", *(str(argument) for argument in arguments)]
    )


def volume(seed: int = 0, shape: tuple[int, ...] = (2, 16, 20)) -> Volume:
    data: NDArray[np.int16] = np.random.default_rng(seed).normal(100, 8, shape).astype(np.int16)
    return Volume(data, "ZYX", (2.0, 1.0, 1.0), ("millimeter",) * 3, "scan")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Ten images of each of five formats, three of them broken."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for suffix in SUFFIXES:
        for number in range(10):
            path = folder / f"scan{number}{suffix}"
            write(path, volume(number), format=None if suffix else "dicom")
            if not suffix:
                path.rename(folder / f"scan{number}-ct")
    for name in ("scan3.tif", "scan4.nii.gz"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "scan5.mrc").write_bytes(b"no image" * 500)
    return folder


def test_fifty_files_of_which_three_are_broken(scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(scans, "--out", out, *QUICK)
    assert result.exit_code == 1
    assert "47 done, 0 skipped, 3 failed" in result.stdout
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed")]
    assert [line.split()[1] for line in failed] == ["scan3.tif", "scan4.nii.gz", "scan5.mrc"]
    assert "Traceback" not in result.stderr
    results = {p.name for p in out.iterdir()}
    broken = {"scan3.tif", "scan4.nii.gz", "scan5.mrc"}
    assert results == {p.name for p in scans.iterdir()} - broken | {"batch.json", "batch.jsonl"}
    for name in ("scan0.tif", "scan0.mrc", "scan0.nii.gz", "scan0.ome.zarr", "scan0-ct"):
        found = read(out / name)
        assert found.data.dtype == np.int16
        assert found.data.std() < 0.9 * volume().data.std()

    again = invoke(scans, "--out", out, *QUICK)
    assert again.exit_code == 1
    assert "0 done, 47 skipped, 3 failed" in again.stdout

    write(scans / "scan3.tif", volume(3), overwrite=True)
    retried = invoke(scans, "--out", out, "--retry-failed", *QUICK)
    assert retried.exit_code == 1
    assert "1 done, 47 skipped, 2 failed" in retried.stdout
    (summary,) = [
        line
        for line in map(json.loads, (out / "batch.jsonl").read_text().splitlines()[-1:])
        if line["event"] == "summary"
    ]
    assert (summary["done"], summary["failed"]) == (1, 2)


def test_options_reach_the_job(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", volume())
    write(tmp_path / "b.tif", volume(1))
    out = tmp_path / "out"
    arguments = (f"{tmp_path}/*.tif", "--out", out, "--format", "mrc", *QUICK)
    assert invoke(*arguments).exit_code == 0
    assert {p.name for p in out.glob("*.mrc")} == {"a.mrc", "b.mrc"}
    settings = json.loads((out / "batch.json").read_text())["files"]["a.tif"]["settings"]
    assert settings["iterations"] == 2
    assert settings["noise"]["noise_sigma"] == 8
    assert settings["format"] == "mrc"
    changed = (f"{tmp_path}/*.tif", "--out", out, "--format", "mrc", *QUICK[:-1], "3")
    assert "exists" in invoke(*changed).stderr
    assert invoke(*changed, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.tif"], "There is no file"),
        (["."], "holds no image"),
        (["a.tif", "--format", "png"], "no format 'png'"),
        (["a.tif", "--compression", "zip"], "isn't known"),
        (["a.tif", "--workers", "2", "--scheduler", "tcp://127.0.0.1:9"], "not both"),
        (["a.tif", "--tls-ca", "ca.pem"], "are for --scheduler tls://"),
        (["a.tif", "--scheduler", "tls://a:1", "--tls-ca", "ca.pem"], "go together"),
        (
            ["a.tif", "--scheduler", "tls://a:1", "--tls-ca", "ca.pem", "--tls-cert", "me.pem"],
            "There is no file ca.pem",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    folder = tmp_path / "scans"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if arguments != ["."]:
        write(folder / "a.tif", volume())
    result = invoke(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_clash_of_results_and_a_damaged_manifest_are_told(tmp_path: Path) -> None:
    for seed, name in enumerate("pq"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "[b]x[red].tif", volume(seed))
    out = tmp_path / "out"
    out.mkdir()
    (out / "batch.json").write_text("{")
    result = invoke(f"{tmp_path}/*/*.tif", "--out", out, *QUICK)
    assert result.exit_code == 1
    assert "0 done, 0 skipped, 2 failed" in result.stdout
    assert result.stderr.count("would both be written to") == 2
    assert result.stderr.count("failed  [b]x[red].tif") == 2
    assert f"Note: {out / 'batch.json'} isn't the manifest of a batch" in result.stderr
    assert {p.name for p in out.iterdir()} == {"batch.json", "batch.json.damaged", "batch.jsonl"}


HELD = """
import time
from napari_learned_diffusion.cli import main
from napari_learned_diffusion.jobs.batch_state import Scratch

def write(self, number, plane, write=Scratch.write):
    write(self, number, plane)
    if number == 2:
        print("held", flush=True)
        time.sleep(60)

Scratch.write = write
main()
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_goes_on(tmp_path: Path, stop: signal.Signals) -> None:
    write(tmp_path / "a.tif", volume(shape=(8, 16, 20)))
    command = ["batch", "a.tif", "--out", "out", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests may have been started in the background, where interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[stop]
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "a.tif").exists()
    program = "from napari_learned_diffusion.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out" / "batch.jsonl").read_text().splitlines()]
    assert [line["resumed"] for line in log if line["event"] == "begun"] == [0, 3]
    assert not (tmp_path / "out" / "a.tif.part").exists()


def test_workers_give_the_same_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    for number in range(2):
        write(tmp_path / f"{number}.tif", volume(number, (3, 32, 32)))
    program = (
        "from napari_learned_diffusion.cli import main\nif __name__ == '__main__':\n    main()"
    )
    (tmp_path / "run.py").write_text(program)
    options = ("--model", "unet", "--noise-sigma", "8")
    for out, workers in (("one", ()), ("two", ("--workers", "2"))):
        done = subprocess.run(
            [sys.executable, "run.py", "batch", "0.tif", "1.tif", "--out", out, *options, *workers],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert ("Dashboard: http" in done.stderr) == bool(workers)
    for number in range(2):
        one, two = (read(tmp_path / out / f"{number}.tif").data for out in ("one", "two"))
        np.testing.assert_array_equal(one, two)


EXAMPLES = """
import shlex, sys
from napari_learned_diffusion.cli import app
if __name__ == "__main__":
    for line in sys.stdin:
        app(shlex.split(line)[1:], standalone_mode=False)
"""


def test_the_examples_of_the_page_run(tmp_path: Path) -> None:
    """One each for a CT series, a tomogram and an OME-Zarr on two processes, as written."""
    pytest.importorskip("distributed")
    page = (Path(__file__).parents[1] / "docs" / "batch.md").read_text("utf-8")
    commands = []
    for title in ("A CT series", "A cryo-EM tomogram", "An OME-Zarr on several processes"):
        block = page.split(f"## {title}\n")[1].split("```sh\n")[1].split("```")[0]
        commands += [line for line in block.splitlines() if line.startswith("napari-learned")]
    assert len(commands) == 4
    image = volume(shape=(3, 48, 48))
    for name in ("patients/01/ct", "patients/02/ct"):
        (tmp_path / name).parent.mkdir(parents=True)
        write(tmp_path / name, image, format="dicom")
    (tmp_path / "tomograms").mkdir()
    for name in ("tomo_01.mrc", "tomograms/tomo_01.mrc", "tomograms/tomo_02.mrc"):
        write(tmp_path / name, image)
    write(tmp_path / "brain.ome.zarr", image)
    (tmp_path / "run.py").write_text(EXAMPLES)
    done = subprocess.run(
        [sys.executable, "run.py"],
        input="\n".join(commands),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Dashboard: http" in done.stderr
    for name in ("01/ct", "02/ct", "tomo_01.mrc", "tomo_02.mrc", "brain.ome.zarr"):
        assert read(tmp_path / "denoised" / name).data.std() < image.data.std()
