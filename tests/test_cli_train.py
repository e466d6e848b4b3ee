"""The command ``train``: options reach the job, mistakes are told, processes share the work."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.io import imsave
from typer.main import get_command
from typer.testing import CliRunner, Result

from napari_learned_diffusion import cli, cli_train
from napari_learned_diffusion.config import TrainingConfig
from napari_learned_diffusion.core.diffusivity import learned_diffusivity_class
from napari_learned_diffusion.core.weights import read_model
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.train import train

CONFIG = TrainingConfig(steps=4, batch=4, patch=16, iterations=2, seed=5)
SMALL = {"experts": 4, "size": 3, "iterations": 2}
SETTINGS = ("--batch", 4, "--patch", 16, "--iterations", 2, "--seed", 5, "--device", "cpu")
SIZES = tuple(word for k, v in SMALL.items() for word in ("--architecture", f"{k}={v}"))
WEIGHTS, CARD, CHECKPOINT = (
    f"foe-splines{end}" for end in (".safetensors", ".json", ".checkpoint.safetensors")
)


def invoke(*arguments: object, **env: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"} | env).invoke(
        cli.app, ["train", *map(str, arguments)]
    )


def succeed(*arguments: object, **env: str) -> Result:
    result = invoke(*arguments, **env)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments: object) -> str:
    """The one sentence on stderr of a call that must fail, with nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ")
    return result.stderr


@pytest.fixture(autouse=True)
def _keep_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for its whole process, which other tests run in."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", torch.backends.mkldnn.enabled)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mosaics"
    path.mkdir()
    for seed in range(3):
        squares = np.random.default_rng(seed).integers(30, 220, (6, 6), dtype=np.uint8)
        imsave(path / f"{seed}.png", np.kron(squares, np.ones((8, 8), np.uint8)))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "trained"


def call(folder: Path, out: Path, steps: int = CONFIG.steps) -> tuple[Any, ...]:
    where = ("--model", "foe-splines", "--data", folder, "--out", out)
    return (*where, "--steps", steps, *SETTINGS, *SIZES)


def alone(folder: Path, out: Path) -> Path:
    """The weights of the same training by the job, in one process."""
    job = train(
        "foe-splines",
        (folder,),
        out,
        CONFIG,
        data_name="mosaics",
        architecture=SMALL,
        device="cpu",
    )
    return run(job).weights


def test_it_trains_as_the_job_does(folder: Path, out: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    result = succeed(*call(folder, out), "--every", 2)
    assert sorted(path.name for path in out.iterdir()) == [CARD, WEIGHTS]
    assert (out / WEIGHTS).read_bytes() == alone(folder, tmp_path / "job").read_bytes()
    card = json.loads((out / CARD).read_text("utf-8"))
    assert card["details"]["training"]["data"] == "mosaics"
    assert re.search(r"Model +foe-splines", result.stdout)
    assert re.search(r"Held out +[\d.]+ / [\d.]+ / [\d.]+ dB at noise 15 / 25 / 50", result.stdout)
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["step 2 of 4", "step 4 of 4"]
    assert re.search(r"loss \d\.\d{4}, [\d.]+ / [\d.]+ / [\d.]+ dB", lines[0])
    assert lines[2].startswith("Note: skipped broken.png")


def test_progress_is_drawn_on_a_terminal(folder: Path, out: Path) -> None:
    plain = succeed(*call(folder, out)).stderr
    drawn = succeed(*call(folder, out), "--overwrite", FORCE_COLOR="1", TERM="xterm").stderr
    assert "Training" not in plain
    assert "Training" in drawn
    assert "4/4" in drawn


def test_every_setting_reaches_the_job(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def watch(*arguments: Any, **named: Any) -> Any:
        seen.update(named, arguments=arguments, onednn=torch.backends.mkldnn.enabled)
        return train(*arguments, **named)

    monkeypatch.setattr("napari_learned_diffusion.jobs.train.train", watch)
    other = TrainingConfig(
        2, 2, 20, 3, 0.2, (4.0, 9.0), 0.5, 0.25, 0.125, 0.75, True, "muon", 1e-4, True, 8
    )
    options = []
    for field in fields(TrainingConfig):
        value = getattr(other, field.name)
        values = value if isinstance(value, tuple) else [] if value is True else [value]
        options += [cli_train.flag(field.name), *values]
    folders = ("--data", folder, "--data", folder)
    more = ("--data-name", "squares", "--every", 1, "--no-onednn", "--restart", "--device", "cpu")
    more += ("--workers", 0)
    succeed("-m", "foe-splines", *folders, "--out", out, *options, *more, *SIZES)
    assert seen["arguments"] == ("foe-splines", (folder, folder), out, other)
    assert (seen["data_name"], seen["architecture"], seen["device"]) == ("squares", SMALL, "cpu")
    assert (seen["every"], seen["resume"], seen["onednn"]) == (1, False, False)
    assert seen["workers"] == 0
    assert set(cli_train.OPTIONS) == {field.name for field in fields(TrainingConfig)}


def interrupted(folder: Path, out: Path) -> None:
    """Leave a checkpoint after the second of the steps."""
    job = train(
        "foe-splines",
        (folder,),
        out,
        CONFIG,
        data_name="mosaics",
        architecture=SMALL,
        device="cpu",
        every=2,
    )
    while next(job).done < 3:
        pass
    job.close()
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]


def test_a_stopped_run_goes_on(folder: Path, out: Path, tmp_path: Path) -> None:
    interrupted(folder, out)
    lines = succeed(*call(folder, out), "--every", 1).stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3 of 4", "step 4 of 4"]
    assert (out / WEIGHTS).read_bytes() == alone(folder, tmp_path / "job").read_bytes()


def test_other_settings_need_a_restart(folder: Path, out: Path) -> None:
    interrupted(folder, out)
    assert "of a run with steps 4" in fail(*call(folder, out, steps=2))
    lines = succeed(*call(folder, out, steps=2), "--restart").stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2 of 2"]
    assert not (out / CHECKPOINT).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_leaves_the_checkpoint(folder: Path, out: Path) -> None:
    command = [sys.executable, "-c", "from napari_learned_diffusion import cli; cli.main()"]
    arguments = ["train", *map(str, call(folder, out, steps=100_000)), "--every", "1"]
    with subprocess.Popen(
        [*command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore interrupts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 60
        while not (out / CHECKPOINT).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]


def test_the_manual_names_every_option() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "cli.md").read_text("utf-8")
    section = manual.split("## train")[1].split("\n## ")[0]
    command = get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    flags = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o != "--help"]
    assert {"--noise-range", "--restart", "--no-onednn"} <= set(flags)
    for name in flags:
        assert f"`{name}" in section, name


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--noise-range", 9, 5), "noise range"),
            (("--steps", 0), "steps must be at least 1"),
            (("--learning-rate", "nan"), "learning rate"),
            (("--tau", -1), "tau"),
            (("--seed", -1), "seed"),
            (("--architecture", "experts"), "a name and a whole number"),
            (("--architecture", "depth=3"), "no 'depth' to set; it has experts, size, iterations"),
            (("--architecture", "experts=0"), "experts must be at least 1"),
        ],
    )
    def test_settings(
        self, options: tuple[Any, ...], message: str, folder: Path, out: Path
    ) -> None:
        assert message in fail("-m", "foe-splines", "--data", folder, "--out", out, *options)
        assert not out.exists()

    @pytest.mark.parametrize("model", ["no-such-model", "perona-malik", "cncl"])
    def test_a_model_that_can_not_be_trained(self, model: str, folder: Path, out: Path) -> None:
        words = fail("--model", model, "--data", folder, "--out", out)
        assert f"no model {model!r} to train" in words
        trainable = words.split("There are: ")[1]
        assert "unet" in trainable
        assert model not in trainable

    def test_a_folder_without_images(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "no image to train on" in fail(*call(tmp_path / "empty", out))
        assert "There is no folder" in fail(*call(tmp_path / "nowhere", out))
        assert not out.exists()

    def test_images_smaller_than_a_patch(self, folder: Path, out: Path) -> None:
        words = fail("-m", "foe-splines", "--data", folder, "--out", out, "--patch", 64)
        assert "smaller than a patch of 64" in words

    def test_weights_that_are_there(self, folder: Path, out: Path) -> None:
        out.mkdir()
        (out / WEIGHTS).write_bytes(b"old")
        assert "add --overwrite" in fail(*call(folder, out))
        assert (out / WEIGHTS).read_bytes() == b"old"
        succeed(*call(folder, out), "--overwrite")
        read_model(out / WEIGHTS, learned_diffusivity_class("foe-splines"))

    def test_a_training_that_diverges(self, folder: Path, out: Path) -> None:
        where = ("--model", "unet", "--data", folder, "--out", out, "--architecture", "width=2")
        words = fail(*where, "--steps", 4, *SETTINGS, "--learning-rate", 1e30)
        assert "no number any more in step 2" in words
        assert "lower learning rate" in words
        assert list(out.iterdir()) == []

    def test_a_checkpoint_cut_short(self, folder: Path, out: Path) -> None:
        interrupted(folder, out)
        (out / CHECKPOINT).write_bytes((out / CHECKPOINT).read_bytes()[:100])
        assert "no intact safetensors" in fail(*call(folder, out))

    def test_what_is_missing_is_a_mistyped_command(self, folder: Path, out: Path) -> None:
        assert invoke("--data", folder, "--out", out).exit_code == 2
        assert invoke("-m", "unet", "--out", out).exit_code == 2
        assert invoke("-m", "unet", "--data", folder).exit_code == 2


# --- several processes ----------------------------------------------------------------------------

_WATCHED = """
import json, os, pathlib
from safetensors.torch import save_file
from napari_learned_diffusion import cli
from napari_learned_diffusion.core.learning import training
from napari_learned_diffusion.jobs import train as job

folder = pathlib.Path({folder!r}) / os.environ["RANK"]
folder.mkdir()
fit, iterate, patches = job.fit, training.iterate, []

def watched_fit(model, *arguments, **named):
    yield from fit(model, *arguments, **named)
    save_file(model.state_dict(), folder / "parameters")
    (folder / "patches").write_text(json.dumps(patches))

def watched_iterate(noisy, *arguments, **named):
    patches.append(noisy.sum(dim=(1, 2, 3)).tolist())
    return iterate(noisy, *arguments, **named)

job.fit, training.iterate = watched_fit, watched_iterate
cli.main()
"""


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # After "--" it doesn't take our options, such as --start, for its own.
    options = ["--standalone", "--nproc-per-node", "2", "--"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch connects no processes",
)
class TestTwoProcesses:
    def test_they_train_as_one_with_the_whole_batch(
        self, folder: Path, out: Path, tmp_path: Path
    ) -> None:
        script = tmp_path / "watched.py"
        script.write_text(_WATCHED.format(folder=str(tmp_path)))
        interrupted(folder, out)  # by one process; two go on
        shutil.copy(out / CHECKPOINT, tmp_path)
        done = torchrun(script, "train", *call(folder, out), "--every", 1)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Held out") == 1
        assert done.stderr.count("step 4 of 4") == 1
        assert sorted(path.name for path in out.iterdir()) == [CARD, WEIGHTS]

        first, second = (load_file(tmp_path / rank / "parameters") for rank in "01")
        expected = load_file(alone(folder, tmp_path / "job"))
        before = load_file(tmp_path / CHECKPOINT)
        for name, parameter in expected.items():
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            torch.testing.assert_close(first[name], parameter, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(before[f"model.{name}"], parameter, rtol=1e-4, atol=1e-6)

        seen = [json.loads((tmp_path / rank / "patches").read_text("utf-8")) for rank in "01"]
        for step in range(2):
            shares = [ranks_steps[step] for ranks_steps in seen]
            assert [len(share) for share in shares] == [2, 2]
            assert not set(shares[0]) & set(shares[1])

    def test_a_batch_that_can_not_be_shared_is_refused(
        self, folder: Path, out: Path, tmp_path: Path
    ) -> None:
        script = tmp_path / "plain.py"
        script.write_text("from napari_learned_diffusion import cli; cli.main()")
        start = alone(folder, tmp_path / "job")
        done = torchrun(script, "train", *call(folder, out), "--start", start, "--batch", 3)
        assert done.returncode != 0
        assert "2 processes can't share a batch of 3 equally" in done.stderr
