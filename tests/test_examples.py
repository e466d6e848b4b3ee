"""The examples run, without a window and without a download, and write what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from napari_learned_diffusion.files import Volume, read, write

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: object) -> str:
    """What an example prints; a warning that it causes itself is an error."""
    process = subprocess.run(
        [sys.executable, "-Werror:::__main__", str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo as a module."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text("utf-8")
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(re.findall(r'"(\w+\.py)"', text))


def test_demo(tmp_path: Path) -> None:
    for library in ("matplotlib", "nibabel", "pydicom"):
        pytest.importorskip(library)
    out = tmp_path / "demo-output"
    text = run("demo.py", "--out", out, "--slices", 2)
    assert "make napari" in text
    for key in ("ct", "mri", "mri-noisier"):
        noisy, denoised = read(out / f"{key}.tif"), read(out / f"{key}-denoised.tif")
        assert denoised.data.dtype == noisy.data.dtype
        assert (denoised.axes, denoised.scale, denoised.units) == (
            noisy.axes,
            noisy.scale,
            noisy.units,
        )
        assert "millimeter" in noisy.units
        assert (out / f"{key}-residual.tif").exists()
        assert (out / f"{key}.png").stat().st_size > 10_000
    added = re.search(
        r"noise added *│ *([\d.]+) → ([\d.]+)", (out / "summary.txt").read_text("utf-8")
    )
    assert added is not None
    before, after = map(float, added.groups())
    assert after < 0.9 * before


def test_the_demo_measures_the_true_error(demo: ModuleType) -> None:
    rng = np.random.default_rng(0)
    truth = np.full((4, 200, 200), 500.0)
    repeat = truth + 30 * rng.normal(size=truth.shape)
    volume = Volume(truth, "ZYX", (1.0,) * 3, ("pixel",) * 3, "truth")
    case = demo.Case("key", "title", volume, repeat=repeat, noise_variance=900.0)
    assert case.error(truth + 10 * rng.normal(size=truth.shape)) == pytest.approx(10, rel=0.1)
    assert case.error(truth + 20) == pytest.approx(20, rel=0.1)
    assert abs(case.error(truth)) < 5


def test_denoise_script() -> None:
    text = run("denoise_script.py", "--no-gui", "--slices", 2)
    noisy, denoised = map(float, re.findall(r"error +([\d.]+) HU", text))
    assert denoised < 0.8 * noisy


def test_denoise_script_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    data = np.random.default_rng(0).normal(100, 10, (2, 32, 40)).astype(np.float32)
    write(path, Volume(data, "ZYX", (2.0, 1.0, 1.0), ("um",) * 3, "stack"))
    assert run("denoise_script.py", path, "--no-gui").count("mean 99.65") == 2


def test_compare_models(tmp_path: Path) -> None:
    text = run("compare_models.py", "--no-gui", "--models", "perona-malik", "conductance-unet-s")
    classical, learned = map(float, re.findall(r"error +([\d.]+)", text))
    assert learned < classical
    path = tmp_path / "stack.tif"
    data = np.random.default_rng(0).normal(100, 10, (2, 32, 40)).astype(np.float32)
    write(path, Volume(data, "ZYX", (2.0, 1.0, 1.0), ("um",) * 3, "stack"))
    text = run("compare_models.py", path, "--no-gui", "--models", "perona-malik")
    assert "noise: " in text
    assert "error" not in text


def test_estimate_noise() -> None:
    text = run("estimate_noise.py", "--slices", 2)
    assert text.count("Poisson-Gaussian, gain") >= 2
    assert text.count("error after denoising") == 2
