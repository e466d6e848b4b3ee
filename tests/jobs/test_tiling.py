"""Tiles cover the plane once, and their halos reach as far as asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.config import DiffusionConfig, Gaussian, MapsConfig, TilingConfig
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.jobs.denoise import denoise_stack
from napari_learned_diffusion.jobs.inspection import inspect_plane
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.tiling import SMALLEST_TILE, cut, largest_tile


@given(
    h=st.integers(1, 200),
    w=st.integers(1, 200),
    tile=st.integers(1, 90),
    halo=st.integers(0, 70),
    multiple=st.sampled_from([1, 4, 8]),
)
def test_tiles_cover_every_pixel_once_and_see_their_halo(h, w, tile, halo, multiple):
    plane = np.arange(h * w).reshape(h, w)
    covered = np.zeros((h, w), int)
    for part in cut((h, w), tile, halo, multiple):
        covered[part.target] += 1
        np.testing.assert_array_equal(plane[part.outer][part.inner], plane[part.target])
        for outer, target, size in zip(part.outer, part.target, (h, w), strict=True):
            assert target.stop - target.start <= max(tile, multiple)
            assert outer.start % multiple == 0
            assert max(0, target.start - halo) - outer.start in range(multiple)
            assert outer.stop - min(size, target.stop + halo) in range(multiple)
    assert (covered == 1).all()


def test_the_largest_tile_fits_the_budget():
    assert largest_tile((1000, 800), 10, 4, 10**9) == 1000
    tile = largest_tile((100_000, 100_000), 50, 16, 64 * 10**6)
    assert (tile + 100) ** 2 * 16 <= 64 * 10**6
    assert largest_tile((5000, 5000), 900, 16, 1000) == SMALLEST_TILE


@pytest.mark.parametrize("model", sorted(REGISTRY))
@pytest.mark.parametrize("backend_precision", ["float32", "float64"])
def test_tiled_equals_untiled(model, backend_precision):
    from napari_learned_diffusion import denoise, diffusivity

    rng = np.random.default_rng(0)
    image = np.kron(rng.uniform(0, 100, (7, 6)), np.ones((20, 21))) + rng.normal(0, 9, (140, 126))
    image[30:40, 50:70] = np.nan
    settings = {"model": model, "noise_sigma": 9, "precision": backend_precision, "iterations": 4}
    for call in (denoise, diffusivity):
        whole = call(image, **settings)
        # 3 × 3 tiles: one has neighbours on every side
        np.testing.assert_allclose(call(image, tile=50, **settings), whole, rtol=0, atol=1e-3)


def test_automatic_settings_are_those_of_the_whole_plane():
    # A tile must not choose its own noise level or contrast parameter.
    from napari_learned_diffusion import denoise

    rng = np.random.default_rng(1)
    image = np.concatenate([rng.normal(0, 3, (64, 128)), 50 * rng.normal(0, 1, (64, 128))])
    config = DiffusionConfig()
    np.testing.assert_allclose(
        denoise(image, model=config.model, tile=64), denoise(image), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (3, 1), (1, 50), (50, 1), (5, 7)])
@pytest.mark.parametrize("model", sorted(REGISTRY))
def test_planes_smaller_than_a_network_s_cell_are_denoised_with_maps(model, shape):
    image = np.random.default_rng(0).normal(50, 5, shape)
    config = DiffusionConfig(model=model, noise=Gaussian(4.0), device="cpu")
    maps = MapsConfig(diffusivity=True, orientation=True)
    done = run(denoise_stack(image, config, maps=maps, tiling=TilingConfig(tile=32)))
    assert done.image.shape == shape
    assert done.image.mean() == pytest.approx(image.mean(), rel=1e-5)
    assert done.report.range_kept
    assert done.diffusivity is not None
    assert np.isfinite(done.diffusivity).all()
    inspected = run(inspect_plane(image, config))
    np.testing.assert_allclose(inspected.denoised[-1], done.image, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 9), (4, 1, 2)])
@pytest.mark.parametrize("model", sorted(REGISTRY))
def test_planes_of_a_few_pixels_are_denoised_with_everything_automatic(model, shape):
    image = np.random.default_rng(1).normal(50, 5, shape).astype(np.float32)
    done = run(denoise_stack(image, DiffusionConfig(model=model, device="cpu")))
    assert done.image.min() >= image.min()
    assert done.image.max() <= image.max()
    assert done.image.mean() == pytest.approx(image.mean(), rel=1e-5)
