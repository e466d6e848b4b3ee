"""What the shell says: one truth about the noise, what was removed, and why it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from napari_learned_diffusion import __main__ as entry
from napari_learned_diffusion import cli
from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.noise import noise_model_from_dict
from napari_learned_diffusion.files import Volume, read, write
from napari_learned_diffusion.jobs.prepare import prepare

CLASSIC = ("--model", "perona-malik", "--iterations", "2")


def invoke(*arguments: object) -> Result:
    runner = CliRunner(env={"COLUMNS": "250", "TERM": "dumb"})
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def stack(*sigmas: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([100 + rng.normal(0, s, (96, 96)) for s in sigmas]).astype("f4")


def save(folder: Path, data: np.ndarray, name: str = "in.tif", axes: str = "ZYX") -> Path:
    unit = ("pixel",) * data.ndim
    return write(folder / name, Volume(data, axes, (1.0,) * data.ndim, unit, "in"))


class TestOneTruth:
    @pytest.mark.parametrize("options", [(), ("--noise", "correlated"), ("--noise-scope", "stack")])
    def test_estimate_noise_prints_what_denoise_uses(self, tmp_path: Path, options) -> None:
        source = save(tmp_path, stack(5, 5, 5))
        found = json.loads(invoke("estimate-noise", source, "--json", *options).stdout)
        assert found["scope"] == "stack"
        said = noise_model_from_dict(found["noise"]).describe()
        text = invoke("denoise", source, tmp_path / "out.tif", *CLASSIC, *options).stdout
        assert f"{said} (estimated, confidence {found['confidence']:.2f})" in text

    @pytest.mark.parametrize("data", [stack(2, 8, 2, 8), stack(5, 5)], ids=["differ", "asked"])
    def test_slices_with_models_of_their_own(self, tmp_path: Path, data) -> None:
        source = save(tmp_path, data)
        scope = () if len(data) == 4 else ("--noise-scope", "slice")
        found = json.loads(invoke("estimate-noise", source, "--json", *scope).stdout)
        assert (found["scope"], found["noise"]) == ("slice", None)
        for plane, own in zip(data, found["slices"], strict=True):
            assert own["noise"] == prepare(plane, DiffusionConfig()).noise.to_dict()
        text = invoke("estimate-noise", source, *scope).stdout
        assert "one for each slice" in text
        done = invoke("denoise", source, tmp_path / "out.tif", *CLASSIC, *scope)
        assert re.search(
            r"Noise +estimated for each slice: standard deviation [\d.]+ to", done.stdout
        )
        assert "as a whole" not in done.stdout

    def test_channels_share_a_model_or_not_and_only_that_is_said(self, tmp_path: Path) -> None:
        note = "One noise model was estimated for all"
        for data, scope, is_said in (
            (stack(5, 5, 5), "stack", True),
            (stack(2, 8, 20), "auto", False),
        ):
            source = save(tmp_path, data, f"{scope}.tif", "CYX")
            options = (*CLASSIC, "--noise-scope", scope)
            done = invoke("denoise", source, tmp_path / f"{scope} out.tif", *options)
            assert done.exit_code == 0
            assert (note in done.stderr) == is_said
            assert ("estimated for each slice" in done.stdout) != is_said

    def test_a_doubtful_estimate_that_is_not_used_is_not_warned_of(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        texture = np.stack([rng.normal(100, s, (8, 9)) for s in (2, 8, 20)]).astype("f4")
        source = save(tmp_path, texture)
        options = (*CLASSIC, "--noise-scope")
        whole = invoke("denoise", source, tmp_path / "a.tif", *options, "stack")
        each = invoke("denoise", source, tmp_path / "b.tif", *options, "slice")
        assert "The noise estimate is doubtful" in whole.stderr
        assert "The noise estimate is doubtful" not in each.stderr
        assert re.search(r"The noise estimate of \d of 3 slices is doubtful", each.stderr)


class TestRemoved:
    @pytest.mark.parametrize("empty", [(), (1,), (1, 3)])
    def test_empty_slices_are_left_out(self, tmp_path: Path, empty) -> None:
        data = stack(*[5] * 5)
        data[list(empty)] = 0
        done = invoke("denoise", save(tmp_path, data), tmp_path / "out.tif")
        found = re.search(r"Removed +([\d.]+) of ([\d.]+) \((\d+)% of the noise var", done.stdout)
        assert found is not None, done.output
        removed, noise, share = (float(number) for number in found.groups())
        full = [n for n in range(5) if n not in empty]
        taken = read(tmp_path / "out.tif").data[full] - data[full]
        assert removed == pytest.approx(np.sqrt(np.mean(taken**2)), rel=1e-3)
        assert noise == pytest.approx(5, rel=0.05)
        assert share == pytest.approx(100 * (removed / noise) ** 2, abs=1)

    def test_nothing_is_said_where_there_is_no_noise(self, tmp_path: Path) -> None:
        source = save(tmp_path, stack(0, 0))
        done = invoke("denoise", source, tmp_path / "out.tif")
        assert done.exit_code == 0
        assert "Removed" not in done.stdout


class TestSettings:
    @pytest.mark.parametrize("model", [(), ("--model", "conductance-unet-s")])
    @pytest.mark.parametrize("command", ["denoise", "diffusivity"])
    def test_too_many_iterations_are_refused_before_the_file_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command, model
    ) -> None:
        monkeypatch.setattr(cli, "_read", lambda *_: pytest.fail("The file was read."))
        source = save(tmp_path, stack(5))
        done = invoke(command, source, tmp_path / "out.tif", "--iterations", 60, *model)
        assert done.exit_code == 1
        assert "at most 5 iterations, not 60" in done.stderr
        assert "perona-malik" in done.stderr

    def test_the_examples_of_the_help_can_be_done(self, tmp_path: Path) -> None:
        source = save(tmp_path, stack(5))
        examples = re.findall(r"`denoise \S+ \S+ ?(.*?)`", str(cli.denoise.__doc__))
        assert len(examples) > 5
        for number, example in enumerate(examples):
            options = example.split()
            files = [str(tmp_path / f"{number} {w}") if w.endswith(".tif") else w for w in options]
            done = invoke("denoise", source, tmp_path / f"{number}.tif", *files)
            assert done.exit_code == 0, (example, done.output)

    def test_an_option_that_chooses_the_model_says_so(self, tmp_path: Path) -> None:
        source = save(tmp_path, stack(5))
        done = invoke("denoise", source, tmp_path / "a.tif", "--contrast", 1, "-n", 2)
        assert "--contrast is a setting of perona-malik, so that is the model" in done.stderr
        named = invoke("denoise", source, tmp_path / "b.tif", "--contrast", 1, *CLASSIC)
        assert "so that is the model" not in named.stderr

    def test_few_counts_are_float32_unless_the_type_is_to_stay(self, tmp_path: Path) -> None:
        counts = np.random.default_rng(0).poisson(0.3, (2, 96, 96)).astype("u1")
        source = save(tmp_path, counts)
        options = (*CLASSIC, "--gain", 1)
        done = invoke("denoise", source, tmp_path / "a.tif", *options)
        assert "so its type is float32" in done.stderr
        data = read(tmp_path / "a.tif").data
        assert data.dtype == np.float32
        assert data.mean() == pytest.approx(counts.mean(), rel=1e-4)
        done = invoke("denoise", source, tmp_path / "b.tif", *options, "--dtype", "same")
        assert "float32 keeps the fractions" in done.stderr
        assert read(tmp_path / "b.tif").data.dtype == np.uint8


@pytest.mark.parametrize("name", ["[red]a[/red].tif", "a[1].tif", "a[/].tif", "a  b.tif"])
def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.removesuffix(".tif").replace("/", "")
    folder.mkdir()
    target = folder / "out.tif"
    target.touch()
    done = invoke("denoise", save(tmp_path, stack(5)), target)
    assert done.exit_code == 1
    assert " ".join(str(target).split()) in done.stderr


def test_a_name_cannot_move_the_cursor_of_the_terminal(tmp_path: Path) -> None:
    done = invoke("denoise", tmp_path / "a\x1b[2Jb.tif", tmp_path / "out.tif")
    assert done.exit_code == 1
    assert "\x1b" not in done.stderr


def test_a_link_to_nothing_as_output_is_said_to_be_one(tmp_path: Path) -> None:
    link = tmp_path / "out.tif"
    link.symlink_to(tmp_path / "gone" / "there.tif")
    done = invoke("denoise", save(tmp_path, stack(5)), link)
    assert done.exit_code == 1
    assert "is a link to" in done.stderr
    assert link.is_symlink()


class TestInterrupted:
    @pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
    def test_while_importing_it_ends_quietly(self, tmp_path: Path) -> None:
        # Stands still in the midst of the imports, so that the signal comes just there.
        script = (
            "import sys, time\n"
            "class Slow:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'napari_learned_diffusion.cli':\n"
            "            print('importing', flush=True)\n"
            "            time.sleep(60)\n"
            "sys.meta_path.insert(0, Slow())\n"
            "from napari_learned_diffusion.__main__ import main\n"
            "main()\n"
        )
        command = [sys.executable, "-c", script, "denoise", "a.tif", "b.tif"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "")

    def test_what_a_library_makes_of_it_is_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = signal.getsignal(signal.SIGINT)

        def broken_import() -> None:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("half of a module") from None

        monkeypatch.setattr(cli, "main", broken_import)
        try:
            with pytest.raises(SystemExit) as end:
                entry.main()
        finally:
            signal.signal(signal.SIGINT, before)
        assert end.value.code == 130

    def test_other_errors_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = signal.getsignal(signal.SIGINT)

        def fail() -> None:
            raise ImportError("half of a module")

        monkeypatch.setattr(cli, "main", fail)
        try:
            with pytest.raises(ImportError, match="half"):
                entry.main()
        finally:
            signal.signal(signal.SIGINT, before)
