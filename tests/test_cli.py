"""The command line: options reach the job, files keep what they say, and mistakes are told."""

from __future__ import annotations

import json
import os
import re
import shlex
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
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from napari_learned_diffusion import cli
from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.errors import InvalidImageError, LearnedDiffusionError
from napari_learned_diffusion.core.noise import (
    NOISE_MODELS,
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.files import Volume, _lazy, read, write
from napari_learned_diffusion.jobs.prepare import Prepared
from napari_learned_diffusion.recipe import as_shell

SCALE, UNITS = (2.5, 0.4, 0.3), ("micrometer", "micrometer", "micrometer")
QUICK = ("--noise-sigma", "8", "--iterations", "2")
CLASSIC = (*QUICK, "--model", "perona-malik")


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        cli.app, [str(argument) for argument in arguments]
    )


def succeed(*arguments: object) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments: object) -> str:
    """The one sentence on stderr of a call that must fail, with nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def noisy_stack(shape: tuple[int, ...] = (3, 40, 48), dtype: Any = np.uint16) -> NDArray[Any]:
    rng = np.random.default_rng(1)
    steps = 60 + 80 * (np.indices(shape)[-1] > shape[-1] // 2)
    return np.rint(steps + 8 * rng.normal(size=shape)).clip(0, 250).astype(dtype)


def volume(data: NDArray[Any], **changes: Any) -> Volume:
    given = {"axes": "ZYX", "scale": SCALE, "units": UNITS, "name": "noisy"}
    return Volume(data, **given | changes)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "noisy.tif", volume(noisy_stack()))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "denoised.tif"


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestFiles:
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
    def test_type_axes_voxel_size_and_units_are_carried_over(
        self, dtype: Any, tmp_path: Path, target: Path
    ) -> None:
        source = write(tmp_path / "noisy.tif", volume(noisy_stack(dtype=dtype)))
        succeed("denoise", source, target, *QUICK)
        before, after = read(source), read(target)
        assert after.data.dtype == dtype
        assert after.data.shape == before.data.shape
        assert (after.axes, after.scale, after.units) == (before.axes, before.scale, before.units)
        assert after.data.std() < before.data.std()
        assert abs(after.data.mean() - before.data.mean()) < 0.05

    def test_a_single_plane(self, tmp_path: Path, target: Path) -> None:
        plane = volume(noisy_stack((40, 48)), axes="YX", scale=(0.4, 0.3), units=UNITS[:2])
        succeed("denoise", write(tmp_path / "plane.tif", plane), target, *QUICK)
        assert read(target).data.shape == (40, 48)

    def test_the_residual_is_what_was_removed(
        self, source: Path, target: Path, tmp_path: Path
    ) -> None:
        succeed("denoise", source, target, "--residual", tmp_path / "residual.tif", *QUICK)
        residual = read(tmp_path / "residual.tif")
        removed = read(source).data.astype(np.float32) - read(target).data
        np.testing.assert_array_equal(residual.data, removed)
        assert (residual.scale, residual.units) == (SCALE, UNITS)

    def test_the_diffusivity_is_that_of_the_command_diffusivity(
        self, source: Path, target: Path, tmp_path: Path
    ) -> None:
        succeed("denoise", source, target, "--diffusivity", tmp_path / "a.tif", *CLASSIC)
        succeed("diffusivity", source, tmp_path / "b.tif", *CLASSIC)
        a, b = read(tmp_path / "a.tif"), read(tmp_path / "b.tif")
        assert a.data.dtype == np.float32
        assert (a.axes, a.scale, a.units) == ("ZYX", SCALE, UNITS)
        np.testing.assert_array_equal(a.data, b.data)
        assert 0 <= a.data.min() < 0.6 < a.data.max() <= 1

    def test_the_diffusivity_of_slices_that_differ_in_their_noise(
        self, tmp_path: Path, target: Path
    ) -> None:
        stack = noisy_stack((3, 40, 48), np.float32)
        stack[1] = 100 + 3 * (stack[1] - 100)
        stack[2] = 7  # no noise, so no step is done
        source = write(tmp_path / "noisy.tif", volume(stack))
        slices = ("--noise-scope", "slice", "--noise", "gaussian")
        result = succeed("denoise", source, target, "--diffusivity", tmp_path / "a.tif", *slices)
        assert re.search("Noise +estimated for each slice", result.stdout)
        assert re.search("Iterations +chosen for each slice", result.stdout)
        succeed("diffusivity", source, tmp_path / "b.tif", *slices)
        a, b = read(tmp_path / "a.tif"), read(tmp_path / "b.tif")
        np.testing.assert_array_equal(a.data, b.data)
        assert np.isnan(b.data[2]).all()

    def test_orientation_and_anisotropy(self, source: Path, target: Path, tmp_path: Path) -> None:
        files = {name: tmp_path / f"{name}.tif" for name in ("orientation", "anisotropy")}
        options = [word for name, path in files.items() for word in (f"--{name}", path)]
        succeed("denoise", source, target, *CLASSIC, *options)
        degrees, anisotropy = (read(path) for path in files.values())
        for shown in (degrees, anisotropy):
            assert shown.data.dtype == np.float32
            assert (shown.axes, shown.scale, shown.units) == ("ZYX", SCALE, UNITS)
        assert set(np.unique(degrees.data[np.isfinite(degrees.data)])) == {0, 90}
        assert 0 <= anisotropy.data.min() < 0.3 < anisotropy.data.max() <= 1

    def test_maps_of_one_step(self, source: Path, target: Path, tmp_path: Path) -> None:
        a, b, c = (tmp_path / f"{name}.tif" for name in "abc")
        succeed("denoise", source, target, *CLASSIC, "--diffusivity", a, "--map-step", 1)
        succeed("diffusivity", source, b, *CLASSIC, "--map-step", 1)
        succeed("diffusivity", source, c, *CLASSIC)
        np.testing.assert_array_equal(read(a).data, read(b).data)
        assert not np.array_equal(read(a).data, read(c).data)

    def test_steps_that_have_no_maps(self, source: Path, target: Path, tmp_path: Path) -> None:
        to = tmp_path / "edges.tif"
        words = fail("denoise", source, target, *CLASSIC, "--diffusivity", to, "--map-step", 3)
        assert "only 2 iterations" in words
        assert "only 2 iterations" in fail("diffusivity", source, to, *CLASSIC, "--map-step", 3)
        assert "whole number from 1" in fail("diffusivity", source, to, "--map-step", 0)
        assert "--map-step goes with" in fail("denoise", source, target, "--map-step", 1)
        assert files_in(tmp_path) == {source.name}

    def test_pixels_that_are_no_numbers_come_back(self, tmp_path: Path, target: Path) -> None:
        stack = noisy_stack(dtype=np.float32)
        stack[0, 3, 4], stack[1, 5, 6] = np.nan, np.inf
        source = write(tmp_path / "holes.tif", volume(stack))
        result = succeed("denoise", source, target, "--residual", tmp_path / "residual.tif", *QUICK)
        after = read(target).data
        assert np.isnan(after[0, 3, 4])
        assert after[1, 5, 6] == np.inf
        assert np.isfinite(after).sum() == after.size - 2
        assert np.isfinite(read(tmp_path / "residual.tif").data).sum() == after.size - 2
        assert "Note: 2 NaN or infinite pixels" in result.stderr

    def test_compression(self, source: Path, target: Path, tmp_path: Path) -> None:
        succeed("denoise", source, target, *QUICK)
        succeed("denoise", source, tmp_path / "small.tif", *QUICK, "--compression", "deflate")
        assert (tmp_path / "small.tif").stat().st_size < target.stat().st_size
        np.testing.assert_array_equal(read(tmp_path / "small.tif").data, read(target).data)

    def test_series(self, tmp_path: Path, target: Path) -> None:
        from tifffile import TiffWriter

        source = tmp_path / "two.ome.tif"
        with TiffWriter(source, ome=True) as tif:
            tif.write(noisy_stack((64, 64)), metadata={"axes": "YX"})
            tif.write(noisy_stack((32, 40)), metadata={"axes": "YX"})
        succeed("denoise", source, target, *QUICK)
        assert read(target).data.shape == (64, 64)
        succeed("denoise", source, target, *QUICK, "--series", 1, "--overwrite")
        assert read(target).data.shape == (32, 40)

    def test_overwrite_replaces(self, source: Path, target: Path) -> None:
        target.write_bytes(b"old")
        succeed("denoise", source, target, *QUICK, "--overwrite")
        assert read(target).data.shape == (3, 40, 48)

    def test_the_tile_does_not_change_the_result(
        self, source: Path, target: Path, tmp_path: Path
    ) -> None:
        succeed("denoise", source, target, *QUICK)
        succeed("denoise", source, tmp_path / "tiled.tif", *QUICK, "--tile", 32)
        np.testing.assert_array_equal(read(tmp_path / "tiled.tif").data, read(target).data)


class TestLargeFiles:
    """Files that are opened lazily give the same as those that are read into memory."""

    @pytest.mark.parametrize("plane", ["YX", "ZX"])
    def test_the_same_as_in_memory(
        self, plane: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in ("memory", "lazy"):
            (tmp_path / folder).mkdir()
            if folder == "lazy":
                monkeypatch.setattr(_lazy, "LAZY_ABOVE", 0)
            to = tmp_path / folder
            kinds = ("residual", "diffusivity", "orientation")
            extras = [word for kind in kinds for word in (f"--{kind}", to / f"{kind}.tif")]
            succeed("denoise", source, to / "out.tif", *QUICK, *extras, "--plane", plane)
            succeed("diffusivity", source, to / "edges.tif", *QUICK, "--plane", plane)
        names = {"out.tif", "edges.tif", *(f"{kind}.tif" for kind in kinds)}
        assert files_in(tmp_path / "lazy") == names
        for name in names:
            expected = read(tmp_path / "memory" / name, lazy=False)
            found = read(tmp_path / "lazy" / name, lazy=False)
            np.testing.assert_array_equal(found.data, expected.data)
            assert (found.axes, found.scale, found.units) == ("ZYX", SCALE, UNITS)

    def test_too_little_space_is_told_beforehand(
        self, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_lazy, "LAZY_ABOVE", 0)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        assert "too little free space" in fail("denoise", source, target, *QUICK)
        assert files_in(target.parent) == {source.name}


class _RecordedError(LearnedDiffusionError):
    """Thrown in place of a job, so that nothing is computed."""


def settings_of(
    monkeypatch: pytest.MonkeyPatch, source: Path, *options: object
) -> tuple[DiffusionConfig, dict[str, Any]]:
    """What the job of ``denoise`` gets to see."""
    seen: list[Any] = []

    def prepare(stack: Any, config: DiffusionConfig, **_: Any) -> Prepared:
        return Prepared(config, None, config)

    def job(stack: Any, prepared: Prepared, **rest: Any) -> None:
        seen.append((prepared.requested, rest))
        raise _RecordedError("stop")

    monkeypatch.setattr("napari_learned_diffusion.jobs.denoise.prepare", prepare)
    monkeypatch.setattr("napari_learned_diffusion.jobs.denoise.denoise_stack", job)
    result = invoke("denoise", source, source.parent / "unwritten.tif", *options)
    assert "Error: stop" in result.stderr, result.output
    config, rest = seen[0]
    return config, rest


CONFIG_OPTIONS: list[tuple[tuple[object, ...], dict[str, object]]] = [
    (("--model", "perona-malik"), {"model": "perona-malik"}),
    (("-n", 4), {"iterations": 4}),
    (("--dtype", "float32"), {"dtype": "float32"}),
    (("--iterations", 0), {"iterations": 0}),
    (("--noise", "poisson-gaussian"), {"noise_kind": "poisson-gaussian"}),
    (("--noise", "gaussian"), {"noise_kind": "gaussian"}),
    (("--noise-scope", "slice"), {"noise_scope": "slice"}),
    (("-s", 2.5), {"noise": Gaussian(2.5)}),
    (
        ("--noise", "gaussian", "--noise-sigma", 2.5),
        {"noise": Gaussian(2.5), "noise_kind": "gaussian"},
    ),
    (("--gain", 4, "--offset", -375), {"noise": PoissonGaussian(4, -375)}),
    (("--gain", 4), {"noise": PoissonGaussian(4, 0)}),
    (("--noise", "rician"), {"noise_kind": "rician"}),
    (("--noise", "correlated"), {"noise_kind": "correlated"}),
    (
        ("--noise", "rician", "--noise-sigma", 2.5),
        {"noise": Rician(2.5), "noise_kind": "rician"},
    ),
    (
        ("--noise", "rician", "--noise-sigma", 2.5, "--pedestal", -100),
        {"noise": Rician(2.5, -100), "noise_kind": "rician"},
    ),
    (
        ("--noise", "correlated", "-s", 2.5),
        {"noise": Correlated(2.5), "noise_kind": "correlated"},
    ),
    (("-s", 2.5, "--correlation-length", 0.7), {"noise": Correlated(2.5, 0.7)}),
    (("-K", 0.7), {"contrast": 0.7}),
    (("--function", "exponential"), {"function": "exponential"}),
    (
        ("--scheme", "fed", "--stopping-time", 3.5),
        {"scheme": "fed", "stopping_time": 3.5},
    ),
    (("--tau", 0.125), {"tau": 0.125}),
    (("--presmooth-sigma", 0), {"presmooth_sigma": 0}),
    (("--device", "cpu"), {"device": "cpu"}),
    (("--precision", "float64"), {"precision": "float64"}),
]


def test_values_that_a_file_declares_missing_come_back_and_are_told(tmp_path: Path) -> None:
    data = noisy_stack()
    data[:, 9, 9:12] = 3
    source = write(tmp_path / "in.ome.zarr", volume(data, missing=(3.0,)))
    answer = succeed("denoise", source, tmp_path / "out.ome.zarr", "-s", 8)
    assert "9 missing by declaration pixels took no part" in " ".join(answer.output.split())
    result = read(tmp_path / "out.ome.zarr")
    np.testing.assert_array_equal(np.asarray(result.data)[:, 9, 9:12], 3)
    assert result.missing == (3.0,)


class TestOptions:
    def test_without_options_the_settings_are_the_defaults(
        self, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, rest = settings_of(monkeypatch, source)
        assert config == DiffusionConfig()
        assert rest["tiling"] == TilingConfig()
        assert rest["plane_axes"] == (1, 2)
        assert rest["spacing"] == (0.4, 0.3)

    @pytest.mark.parametrize(("options", "changed"), CONFIG_OPTIONS, ids=str)
    def test_an_option_reaches_the_job(
        self,
        options: tuple[object, ...],
        changed: dict[str, object],
        source: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        config, _ = settings_of(monkeypatch, source, *options)
        assert config == DiffusionConfig().with_(**changed)

    def test_every_setting_has_an_option_that_is_tested(self) -> None:
        tested = {name for _, changed in CONFIG_OPTIONS for name in changed}
        in_python_only = {"missing", "use_spacing"}  # the file declares the first
        assert tested == {field.name for field in fields(DiffusionConfig)} - in_python_only

    @pytest.mark.parametrize("changed", [changed for _, changed in CONFIG_OPTIONS], ids=str)
    def test_the_command_that_the_settings_are_copied_as_gives_them_back(
        self, changed: dict[str, object], source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = DiffusionConfig().with_(**changed)
        program, command, *words = shlex.split(as_shell(wanted, tiling=TilingConfig(tile=64)))
        assert (program, command) == ("napari-learned-diffusion", "denoise")
        options = [word for word in words if word.startswith("--")]
        config, rest = settings_of(monkeypatch, source, *options)
        # A noise model that is given needs no kind.
        kind = wanted.noise_kind if wanted.noise is None else config.noise_kind
        assert config == wanted.with_(noise_kind=kind)
        assert rest["tiling"].tile == 64

    def test_tile(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _, rest = settings_of(monkeypatch, source, "--tile", 64)
        assert rest["tiling"] == TilingConfig(tile=64)

    @pytest.mark.parametrize(
        ("plane", "axes", "spacing"),
        [("YX", (1, 2), (0.4, 0.3)), ("zx", (0, 2), (2.5, 0.3)), ("YZ", (1, 0), (0.4, 2.5))],
    )
    def test_plane(
        self,
        plane: str,
        axes: tuple[int, int],
        spacing: tuple[float, float],
        source: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        _, rest = settings_of(monkeypatch, source, "--plane", plane)
        assert rest["plane_axes"] == axes
        assert rest["spacing"] == spacing

    def test_the_planes_are_those_of_the_letters(self, tmp_path: Path, target: Path) -> None:
        stack = noisy_stack((36, 40, 3))
        source = write(tmp_path / "last.tif", volume(stack, axes="YXZ"))
        classical = ("--model", "perona-malik", *QUICK)
        succeed("denoise", source, target, *classical)
        upright = write(tmp_path / "first.tif", volume(np.moveaxis(stack, 2, 0)))
        succeed("denoise", upright, tmp_path / "b.tif", *classical)
        # The scale of either file is the same along its first axis, not along Y.
        a, b = read(target), read(tmp_path / "b.tif")
        assert a.axes == "YXZ"
        assert a.data.shape == (36, 40, 3)
        assert np.abs(np.moveaxis(a.data, 2, 0) - b.data.astype(float)).mean() < 3

    def test_units_that_cannot_be_compared_are_noted(self, tmp_path: Path, target: Path) -> None:
        frames = volume(noisy_stack(), axes="TYX", units=("second", *UNITS[1:]))
        source = write(tmp_path / "movie.tif", frames)
        result = succeed("denoise", source, target, *QUICK, "--plane", "TX")
        assert "Note: Rows are 2.5 second apart and columns 0.3 micrometer" in result.stderr

    def test_channels_that_share_an_estimate_are_noted(self, tmp_path: Path, target: Path) -> None:
        pixel = ("pixel", "pixel", "pixel")
        channels = volume(noisy_stack((2, 40, 48)), axes="CYX", scale=(1, 1, 1), units=pixel)
        source = write(tmp_path / "channels.tif", channels)
        assert "all 2 channels" in succeed("denoise", source, target, "-n", 1).stderr
        result = succeed("denoise", source, target, *QUICK, "--overwrite")
        assert "channels" not in result.stderr

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--offset", 2), "give both"),
            (("--gain", 2, "--offset", 3, "--noise-sigma", 1), "alone"),
            (("--gain", 2, "--offset", 3, "--noise", "gaussian"), "alone"),
            (("--noise-sigma", 2, "--noise", "poisson-gaussian"), "--gain and --offset"),
            (("--gain", 2, "--noise", "rician"), "--noise-sigma and --pedestal alone"),
            (("--correlation-length", 1, "--noise", "gaussian"), "--noise-sigma alone"),
            (("--correlation-length", 1), "goes with --noise-sigma"),
            (("--pedestal", 1), "goes with --noise-sigma"),
            (("--noise", "rician", "--noise-sigma", 0), "must be above 0"),
            (("--noise-sigma", 2, "--correlation-length", -1), "correlation length must be"),
            (("--gain", -1, "--offset", 3), "gain must be"),
            (("--noise-sigma", "nan"), "noise level must be"),
            (("--iterations", -1), "number of iterations"),
            (("--contrast", 0), "contrast parameter K"),
            (("--presmooth-sigma", -1), "Presmoothing"),
            (("--tile", 8), "at least 32"),
            (("--tau", 0.1, "--scheme", "fed"), "--stopping-time"),
            (("--stopping-time", 2), "--scheme fed"),
            (("--model", "magic"), "no model 'magic'"),
            (("--model", "unet", "-K", 1, "--scheme", "fed"), "has no --contrast, --scheme"),
            (("--plane", "YQ"), "axes, ZYX"),
            (("--plane", "YY"), "two different letters"),
            (("--series", 4), "no series 4"),
            (("--compression", "jpeg"), "deflate, lzw, zstd"),
        ],
        ids=str,
    )
    def test_settings_that_cannot_be_are_told(
        self, options: tuple[object, ...], words: str, source: Path, target: Path
    ) -> None:
        assert words in fail("denoise", source, target, *options)
        assert not target.exists()

    def test_a_typing_mistake_shows_the_usage(self, source: Path, target: Path) -> None:
        result = invoke("denoise", source, target, "--precision", "float16")
        assert result.exit_code == 2
        assert "float32" in result.stderr


class TestMistakes:
    def test_a_missing_file(self, target: Path) -> None:
        assert "There is no file" in fail("denoise", target.with_name("none.tif"), target)

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "is empty"), (b"neither TIFF nor anything", "isn't a readable")],
    )
    def test_a_file_of_another_kind(
        self, content: bytes, words: str, tmp_path: Path, target: Path
    ) -> None:
        (tmp_path / "bad.tif").write_bytes(content)
        assert words in fail("denoise", tmp_path / "bad.tif", target)

    def test_another_suffix(self, source: Path, target: Path) -> None:
        assert ".tif" in fail("denoise", source.rename(source.with_suffix(".xyz")), target)
        assert ".tif" in fail("denoise", source, target.with_suffix(".png"))

    @pytest.mark.parametrize("command", ["denoise", "diffusivity"])
    def test_a_truncated_file(self, command: str, source: Path, target: Path) -> None:
        source.write_bytes(source.read_bytes()[: -source.stat().st_size // 3])
        fail(command, source, target)
        assert files_in(target.parent) == {source.name}

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (noisy_stack((3, 40, 48)) > 90, "boolean"),
            (noisy_stack((3, 40, 48)).astype(np.complex64), "complex"),
        ],
        ids=["bool", "complex"],
    )
    def test_pixels_that_are_no_intensities(
        self, data: NDArray[Any], words: str, tmp_path: Path, target: Path
    ) -> None:
        source = write(tmp_path / "other.tif", volume(data))
        for command in ("denoise", "diffusivity"):
            assert words in fail(command, source, target)
        assert files_in(tmp_path) == {source.name}

    def test_colour(self, tmp_path: Path, target: Path) -> None:
        colour = volume(
            noisy_stack((40, 48, 3), np.uint8), axes="YXS", units=("pixel",) * 3, scale=(1, 1, 1)
        )
        source = write(tmp_path / "colour.tif", colour)
        for command in ("denoise", "diffusivity"):
            assert "is a colour image" in fail(command, source, target)
        assert "is a colour image" in fail("estimate-noise", source)

    def test_the_input_is_never_written(self, source: Path, tmp_path: Path) -> None:
        before = source.read_bytes()
        link = tmp_path / "link.tif"
        link.symlink_to(source)
        twin = tmp_path / "twin.tif"
        os.link(source, twin)
        for target in (source, link, twin, tmp_path / "." / "noisy.tif"):
            assert "the same file" in fail("denoise", source, target, "--overwrite")
        assert "the same file" in fail(
            "denoise", source, tmp_path / "out.tif", "--residual", source, "--overwrite"
        )
        assert source.read_bytes() == before

    def test_outputs_must_differ(self, source: Path, target: Path) -> None:
        words = "--residual and OUT are the same file"
        assert words in fail("denoise", source, target, "--residual", target)

    @pytest.mark.parametrize("option", ["--residual", "--diffusivity", "--orientation", None])
    def test_an_existing_output_stays(
        self, option: str | None, source: Path, tmp_path: Path
    ) -> None:
        old = tmp_path / "old.tif"
        old.write_bytes(b"old")
        extra = (tmp_path / "new.tif", option, old) if option else (old,)
        assert "add --overwrite" in fail("denoise", source, *extra)
        assert old.read_bytes() == b"old"
        assert files_in(tmp_path) == {"old.tif", source.name}

    def test_an_output_that_cannot_be_written_is_told_before_computing(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cli, "read", lambda *_, **__: pytest.fail("the input was read"))
        (tmp_path / "file").touch()
        (tmp_path / "folder.tif").mkdir()
        assert "can't be written" in fail("denoise", source, tmp_path / "none" / "out.tif")
        assert "can't be written" in fail("denoise", source, tmp_path / "file" / "out.tif")
        assert "is a folder" in fail("denoise", source, tmp_path / "folder.tif", "--overwrite")

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
    def test_a_folder_without_permission(self, source: Path, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "Permission denied" in fail("denoise", source, closed / "out.tif")

    def test_debug_shows_where_it_came_from(self, tmp_path: Path, target: Path) -> None:
        source = write(tmp_path / "mask.tif", volume(noisy_stack() > 90))
        assert isinstance(invoke("--debug", "denoise", source, target).exception, InvalidImageError)

    def test_an_error_on_the_way_leaves_what_was_there(
        self, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def break_off(*_: object, **__: object) -> None:
            raise LearnedDiffusionError("The lights went out.")

        target.write_bytes(b"old")
        monkeypatch.setattr("napari_learned_diffusion.jobs.plane_solver.iterate", break_off)
        words = fail("denoise", source, target, *QUICK, "--overwrite")
        assert "The lights went out." in words
        assert target.read_bytes() == b"old"
        assert files_in(target.parent) == {source.name, target.name}


class TestStopping:
    @pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
    @pytest.mark.parametrize(
        ("number", "code", "lazy"),
        [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)],
        ids=["interrupted", "terminated"],
    )
    def test_a_stopped_run_leaves_nothing(
        self, number: signal.Signals, code: int, lazy: bool, source: Path, target: Path
    ) -> None:
        # `started` appears once the diffusion itself is under way. A shell that runs the tests in
        # the background has them ignore interrupts; the command must not inherit that.
        started = target.with_name("started")
        script = (
            "import sys, pathlib\n"
            "from napari_learned_diffusion import cli\n"
            "from napari_learned_diffusion.files import _lazy\n"
            "from napari_learned_diffusion.jobs import plane_solver\n"
            f"_lazy.LAZY_ABOVE = {0 if lazy else 2**30}\n"
            "iterate = plane_solver.iterate\n"
            "def announced(*args, **kwargs):\n"
            f"    pathlib.Path({str(started)!r}).touch()\n"
            "    return iterate(*args, **kwargs)\n"
            "plane_solver.iterate = announced\n"
            "cli.main()\n"
        )
        options = ["--model", "perona-malik", "--noise-sigma", "8", "--iterations", "100000"]
        process = subprocess.Popen(
            [sys.executable, "-c", script, "denoise", str(source), str(target), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, number, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not started.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert out == ""
        assert "Traceback" not in err
        assert files_in(target.parent) == {source.name, started.name}


class TestReports:
    def test_summary(self, source: Path, target: Path) -> None:
        text = succeed("denoise", source, target, *QUICK, "--device", "cpu").stdout
        assert re.search(r"Model +conductance-unet-s", text)
        assert re.search(r"Noise +Gaussian, standard deviation 8 \(given\)", text)
        assert re.search(r"Iterations +2", text)
        assert re.search(r"Time +[\d.]+ s on CPU", text)
        assert re.search(r"Removed +[\d.]+ of 8 \(\d+% of the noise variance\)", text)
        assert re.search(r"Mean +moved by", text)
        assert re.search(r"Range +kept: ", text)

    def test_an_estimate_is_marked_as_one(self, source: Path, target: Path) -> None:
        text = succeed("denoise", source, target, "-n", 1).stdout
        assert re.search(r"\(estimated, confidence [01]\.\d\d\)", text)

    def test_without_noise_the_image_comes_back(self, source: Path, target: Path) -> None:
        edges = target.with_name("edges.tif")
        result = succeed("denoise", source, target, "-s", 0, "--diffusivity", edges)
        np.testing.assert_array_equal(read(target).data, read(source).data)
        assert "Note: The noise level is 0" in result.stderr
        assert "there is no diffusivity" in result.stderr
        assert not edges.exists()
        assert "there is no diffusivity" in fail("diffusivity", source, edges, "-s", 0)

    def test_fed_says_what_it_relaxes(self, source: Path, target: Path) -> None:
        result = succeed("denoise", source, target, "--scheme", "fed", "-s", 8)
        assert "Note: FED" in result.stderr

    def test_models(self) -> None:
        text = succeed("models").stdout
        for key in REGISTRY:
            assert key in text
        assert "the default" in text

    def test_version(self) -> None:
        from napari_learned_diffusion import __version__

        assert succeed("--version").stdout == f"napari-learned-diffusion {__version__}\n"


class TestEstimateNoise:
    @pytest.fixture
    def noise(self) -> NoiseModel:
        return Gaussian(5.0)

    @pytest.fixture
    def noisy(self, noise: NoiseModel, tmp_path: Path) -> Path:
        clean = np.broadcast_to(np.linspace(50, 150, 128), (2, 128, 128))
        data = noise.add(clean, np.random.default_rng(3)).astype(np.float32)
        return write(tmp_path / "ramp.tif", volume(data))

    def test_json(self, noisy: Path, noise: NoiseModel) -> None:
        answer = json.loads(
            succeed("estimate-noise", noisy, "--noise", "gaussian", "--json").stdout
        )
        assert answer["noise"]["key"] == noise.key
        assert answer["noise"]["noise_sigma"] == pytest.approx(5, rel=0.1)
        assert 0 <= answer["confidence"] <= 1
        assert len(answer["curve"]["intensity"]) == len(answer["curve"]["noise_sigma"])

    def test_the_options_it_shows_can_be_given(
        self, noisy: Path, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for kind in NOISE_MODELS:
            text = succeed("estimate-noise", noisy, "--noise", kind).stdout
            options = re.search(r"As options +(--.*\S)", text)
            assert options is not None, text
            config, _ = settings_of(monkeypatch, source, *options[1].split())
            assert config.noise is not None
            assert config.noise.describe() in text

    def test_planes(self, noisy: Path) -> None:
        succeed("estimate-noise", noisy, "--plane", "ZX")
        assert "axes, ZYX" in fail("estimate-noise", noisy, "--plane", "AB")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["denoise", "--help"], ["train", "--help"], ["models"], ["--version"]],
)
def test_help_imports_neither_torch_nor_qt(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from napari_learned_diffusion.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'napari', 'qtpy', 'PyQt6', 'numba', 'scipy', 'dask'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL
    )


def test_help_has_examples() -> None:
    text = succeed("denoise", "--help").stdout
    assert "denoise noisy.tif denoised.tif" in text
    for option in cli._OPTIONS.values():
        assert option.flags[0] in text


def test_the_manual_names_every_option() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "cli.md").read_text("utf-8")
    own = ("--residual", "--diffusivity", "--orientation", "--anisotropy", "--map-step")
    own += ("--compression", "--overwrite", "--json", "--debug")
    for flag in [*(flag for option in cli._OPTIONS.values() for flag in option.flags), *own]:
        assert f"`{flag}" in manual or f" {flag}" in manual, flag
