"""Windows for the noise network: reproducible, and what is told of them is true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from skimage.io import imsave

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.learning.acquisitions import LAGS, Interpolated
from napari_learned_diffusion.core.learning.noise_windows import (
    Object,
    Simulator,
    _mirrored,
    _transposed,
    read_objects,
)
from napari_learned_diffusion.core.noise_network import CELL, N_LAGS, WINDOW

OBJECTS = tuple(
    Object(np.kron(rng.uniform(20, 230, (12, 12)), np.ones((12, 12))).astype(np.float32), 0.5)
    for rng in (np.random.default_rng(seed) for seed in range(3))
)


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(OBJECTS, batch=8, seed=3, scans=4)


def test_the_network_answers_as_many_lags_as_there_are() -> None:
    assert len(LAGS) == N_LAGS


def test_windows_depend_on_seed_and_step_alone(simulator: Simulator) -> None:
    again = Simulator(OBJECTS, batch=8, seed=3, scans=4)
    other = Simulator(OBJECTS, batch=8, seed=4, scans=4)
    for mine, same in zip(simulator[5], again[5], strict=True):
        torch.testing.assert_close(mine, same, equal_nan=True)
    for others in (simulator[6], other[5]):
        assert not torch.equal(simulator[5].noisy.nan_to_num(), others.noisy.nan_to_num())


def test_shapes_and_weights(simulator: Simulator) -> None:
    windows = simulator[0]
    n = WINDOW // CELL
    assert windows.noisy.shape == (8, 1, WINDOW, WINDOW)
    assert windows.noise_sigma.shape == windows.weight.shape == (8, 1, n, n)
    assert windows.autocorrelation.shape == (8, len(LAGS))
    assert set(windows.weight.unique().tolist()) <= {0.0, 1.0}


def test_cells_that_are_mostly_missing_do_not_count(simulator: Simulator) -> None:
    seen = 0
    for step in range(12):
        windows = simulator[step]
        missing = windows.noisy.isnan().float()
        share = torch.nn.functional.avg_pool2d(missing, CELL)
        assert (windows.weight[share > 0.5] == 0).all()
        seen += int((share > 0.5).sum())
    assert seen > 0


def test_levels_are_told_in_the_unit_of_the_window(simulator: Simulator) -> None:
    """Where the noise is most of what is to be seen, it is about the window's deviation."""
    ratios = []
    for step in range(12):
        windows = simulator[step]
        for noisy, sigma, weight in zip(*windows[:3], strict=True):
            if weight.all() and not noisy.isnan().any():
                ratios.append(float(sigma.square().mean().sqrt() / noisy.std()))
    assert max(ratios) < 1.15
    assert np.quantile(ratios, 0.9) > 0.7


def test_mirrored_and_transposed_noise_has_mirrored_and_transposed_lags() -> None:
    blank = np.zeros((96, 96))
    rng = np.random.default_rng(0)
    given = Interpolated(1.0, (1.0, 2.2), angle=25).acquire(blank, rng).autocorrelation
    mirrored = Interpolated(1.0, (1.0, 2.2), angle=-25).acquire(blank, rng).autocorrelation
    transposed = Interpolated(1.0, (2.2, 1.0), angle=-25).acquire(blank, rng).autocorrelation
    assert np.abs(given - mirrored).max() > 0.1
    assert _mirrored(given) == pytest.approx(mirrored, abs=1e-4)
    assert _transposed(given) == pytest.approx(transposed, abs=1e-4)


def test_photographs_and_stacks_are_read(tmp_path: Path) -> None:
    photographs, volumes = tmp_path / "photographs", tmp_path / "volumes"
    photographs.mkdir(), volumes.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        imsave(photographs / f"{number}.png", rng.integers(0, 255, (100, 120), np.uint8))
    tifffile.imwrite(volumes / "v.tif", rng.integers(0, 4000, (12, 64, 70), np.uint16))
    objects = read_objects([photographs, volumes])
    assert {o.plane.shape for o in objects} == {(100, 120), (64, 70)}
    stack = [o for o in objects if o.plane.shape == (64, 70)]
    assert len(stack) == 2
    assert stack[0].plane.max() == pytest.approx(255, rel=0.02)
    assert stack[0].own_noise > 20


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidImageError, match="no image"):
        read_objects([tmp_path])
