"""Inspecting a slice: its maps in every iteration, and where the diffusion might stop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from napari_learned_diffusion.config import (
    DiffusionConfig,
    Gaussian,
    MapsConfig,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
)
from napari_learned_diffusion.core.metrics import zhu_milanfar_q
from napari_learned_diffusion.jobs import inspection
from napari_learned_diffusion.jobs.denoise import denoise_plane
from napari_learned_diffusion.jobs.inspection import Inspection, inspect_plane
from napari_learned_diffusion.jobs.progress import run

SIGMA = 10.0
CLASSICAL = DiffusionConfig(
    model="perona-malik",
    noise=Gaussian(SIGMA),
    iterations=12,
    contrast=0.6,
    presmooth_sigma=0.5,
    tau=0.2,
    device="cpu",
)


def phantom(sigma: float = SIGMA) -> np.ndarray:
    """Tilted stripes, whose patches are oriented, with noise."""
    y, x = np.mgrid[:40, :48]
    stripes = 100 + 60 * ((x + y // 2) // 8 % 2)
    return stripes + np.random.default_rng(0).normal(0, sigma, stripes.shape)


@pytest.mark.parametrize("key", REGISTRY)
def test_the_last_iteration_is_what_denoising_gives(key):
    config = DiffusionConfig(model=key, noise=Gaussian(SIGMA), device="cpu")
    found = run(inspect_plane(phantom(), config))
    maps = MapsConfig(diffusivity=True)
    denoised = run(denoise_plane(phantom(), config, maps=maps))
    assert found.iterations == denoised.prepared.config.iterations
    np.testing.assert_allclose(found.denoised[0], phantom(), rtol=1e-5)
    np.testing.assert_allclose(found.denoised[-1], denoised.image, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.diffusivity[-1], denoised.diffusivity, rtol=1e-3, atol=1e-3)
    kept = found.iterations + 1
    assert found.denoised.shape == found.gradient.shape == (kept, 40, 48)
    assert found.diffusivity.shape == found.flux.shape == (kept - 1, 40, 48)
    for maps_of_iterations in (found.gradient, found.flux, found.diffusivity):
        assert np.isfinite(maps_of_iterations).all()
        assert maps_of_iterations.min() >= 0


def test_gradient_and_flux_are_those_of_the_image():
    found = run(inspect_plane(phantom(), CLASSICAL))
    for image, slopes in zip(found.denoised, found.gradient, strict=True):
        down, right = (np.diff(image, axis=axis) ** 2 for axis in (0, 1))
        down = (down[:-1] + down[1:])[:, 1:-1] / 2
        right = (right[:, :-1] + right[:, 1:])[1:-1] / 2
        expected = np.sqrt(down + right)
        np.testing.assert_allclose(slopes[1:-1, 1:-1], expected, rtol=1e-3, atol=1e-3)
    # This diffusivity is at most 1, so the flux is at most the gradient before the step.
    assert (found.flux <= found.gradient[:-1] * (1 + 1e-4) + 1e-4).all()


def test_the_edges_of_a_step_have_the_mean_that_is_shown():
    found = run(inspect_plane(phantom(), CLASSICAL))
    step = found.edges[3]
    assert step.offsets == ((1, 0), (0, 1))
    down, right = step.conductances.astype(float)
    mean = (down[4, 7] + down[5, 7] + right[5, 6] + right[5, 7]) / 4
    assert found.diffusivity[3, 5, 7] == pytest.approx(mean, abs=2e-3)


def test_q_and_residual_are_known_in_every_iteration():
    found = run(inspect_plane(phantom(), CLASSICAL))
    assert len(found.q) == len(found.residual_variance) == len(found.times) == 13
    np.testing.assert_allclose(found.times, 0.2 * np.arange(13))
    for image, q, variance in zip(found.denoised, found.q, found.residual_variance, strict=True):
        assert q == pytest.approx(zhu_milanfar_q(image), rel=1e-3)
        removed = np.mean((phantom() - image) ** 2) / SIGMA**2
        assert variance == pytest.approx(removed, rel=1e-3, abs=1e-6)
    assert found.best_by_q == np.argmax(found.q) > 0


@pytest.mark.parametrize(
    "noise", [PoissonGaussian(2.0, -100.0), Rician(SIGMA)], ids=lambda n: n.key
)
def test_the_residual_is_measured_in_stabilised_units(noise):
    found = run(inspect_plane(phantom(), CLASSICAL.with_(noise=noise)))
    v = [noise.stabilise(image.astype(float)) for image in found.denoised]
    expected = [np.mean((v[0] - u) ** 2) for u in v]
    np.testing.assert_allclose(found.residual_variance, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("variance", "expected"),
    [
        ((0.0, 0.5, 0.9, 1.3), 2),
        ((0.0, 0.5, 0.8, 1.1), 3),
        ((0.0, 1.0, 1.2, 1.3), 1),
        ((0.0, 0.3, 0.8, 0.9), None),
    ],
)
def test_the_discrepancy_principle_takes_the_nearest_to_1(variance, expected):
    found = run(inspect_plane(phantom(), CLASSICAL.with_(iterations=3)))
    found = dataclasses.replace(found, residual_variance=np.array(variance))
    assert found.best_by_discrepancy == expected


def test_long_runs_keep_only_some_of_the_maps_but_all_numbers():
    whole = run(inspect_plane(phantom(), CLASSICAL))
    room_for_four = 4 * 40 * 48 * (4 * 4 + 2 * 2)
    found = run(inspect_plane(phantom(), CLASSICAL, memory_budget=room_for_four))
    assert found.stride == 4
    np.testing.assert_array_equal(found.denoised, whole.denoised[::4])
    np.testing.assert_array_equal(found.gradient, whole.gradient[::4])
    np.testing.assert_array_equal(found.flux, whole.flux[3::4])
    np.testing.assert_array_equal(found.diffusivity, whole.diffusivity[3::4])
    np.testing.assert_array_equal(found.edges[1].conductances, whole.edges[7].conductances)
    np.testing.assert_array_equal(found.q, whole.q)
    np.testing.assert_array_equal(found.residual_variance, whole.residual_variance)


def test_pixels_that_are_no_numbers_take_no_part():
    plane = phantom()
    plane[10:14, 20:24] = np.nan
    plane[0, 0] = np.inf
    found = run(inspect_plane(plane, CLASSICAL))
    bad = ~np.isfinite(plane)
    assert np.isnan(found.denoised[-1][10:14, 20:24]).all()
    for shown in (found.gradient, found.diffusivity, found.flux):
        assert np.isnan(shown[:, bad]).all()
        assert np.isfinite(shown[:, ~bad]).all()
    assert np.isfinite(found.residual_variance).all()
    assert np.isfinite(found.q).all()


def test_a_slice_smaller_than_a_patch_has_no_q():
    found = run(inspect_plane(phantom()[:7, :20], CLASSICAL))
    assert np.isnan(found.q).all()
    assert found.best_by_q is None
    assert found.residual_variance[-1] > 0


@pytest.mark.parametrize("dtype", ["u1", ">i2", "f8"])
def test_units_come_back_as_they_were(dtype):
    found = run(inspect_plane(phantom().astype(dtype), CLASSICAL))
    assert found.denoised.dtype == np.float32
    np.testing.assert_allclose(found.denoised[0], phantom().astype(dtype), rtol=1e-5)


def test_what_cannot_be_inspected_is_refused_in_words():
    with pytest.raises(InvalidSettingError, match="nothing to inspect"):
        run(inspect_plane(phantom(), CLASSICAL.with_(iterations=0)))
    with pytest.raises(InvalidSettingError, match="nothing to inspect"):
        run(inspect_plane(phantom(), CLASSICAL.with_(noise=Gaussian(0.0))))
    with pytest.raises(InvalidImageError, match="too large"):
        run(inspect_plane(phantom(), CLASSICAL, memory_budget=1000))
    with pytest.raises(InvalidImageError, match="two dimensions"):
        run(inspect_plane(phantom()[None], CLASSICAL))
    with pytest.raises(LearnedDiffusionError):
        run(inspect_plane(np.full((9, 9), np.nan), CLASSICAL))


def test_running_out_of_memory_says_what_to_do(monkeypatch):
    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(inspection, "magnitude", fail)
    monkeypatch.setattr(inspection._Recorder, "_note", lambda *args: None)
    with pytest.raises(DeviceError, match="Inspect a part"):
        run(inspect_plane(phantom(), CLASSICAL))


def test_progress_counts_iterations_and_closing_cancels():
    reports = []
    assert isinstance(run(inspect_plane(phantom(), CLASSICAL), reports.append), Inspection)
    assert [r.done for r in reports] == [0, *range(1, 13)]
    job = inspect_plane(phantom(), CLASSICAL)
    for _ in range(3):
        next(job)
    job.close()
    assert next(job, None) is None
