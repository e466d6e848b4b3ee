"""The classical diffusivity: its curve, presmoothing, an outside reference, its suggestions."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
import torch
from scipy import ndimage
from skimage import data

from napari_learned_diffusion.core.diffusivity.perona_malik import (
    FUNCTIONS,
    PeronaMalik,
    ellipticity,
    roughness,
)
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.core.operators import Stencil
from napari_learned_diffusion.core.presmoothing import presmooth
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import solve


@pytest.mark.parametrize(("function", "at_k"), [("rational", 0.5), ("exponential", np.exp(-1))])
def test_the_diffusivity_at_a_difference_of_k(function, at_k):
    v = torch.tensor([[0.0, 3.0]], dtype=torch.float64)[None, None]
    g = PeronaMalik(3.0, function).conductances(v, Stencil(), None, 0)
    assert g[0, 1, 0, 0].item() == pytest.approx(at_k)
    # over an edge of twice the length the same difference is half the gradient
    wide = Stencil(spacing=(1.0, 2.0))
    flatter = PeronaMalik(1.5, function).conductances(v, wide, None, 0)
    assert flatter[0, 1, 0, 0].item() == pytest.approx(at_k)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 2.0])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 2.5)])
def test_presmoothing_is_scipy_s_gaussian_filter(sigma, spacing):
    v = np.random.default_rng(0).normal(size=(5, 31))
    expected = ndimage.gaussian_filter(v, [sigma / h for h in spacing], mode="reflect")
    smoothed = presmooth(torch.from_numpy(v)[None, None], sigma, spacing)[0, 0].numpy()
    np.testing.assert_allclose(smoothed, expected, atol=1e-12)


def test_presmoothing_takes_nothing_from_masked_pixels():
    v = torch.ones(1, 1, 9, 9)
    v[..., 4:, :] = 1e6
    valid = (v == 1).float()
    smoothed = presmooth(v, 1.0, (1.0, 1.0), valid)
    torch.testing.assert_close(smoothed[..., :4, :], torch.ones(1, 1, 4, 9))


def test_the_linear_limit_is_what_simpleitk_computes():
    image = data.camera()[100:164, 200:264].astype(np.float32)
    ours = solve(
        torch.from_numpy(image)[None, None],
        PeronaMalik(1e6),
        noise=Gaussian(1.0),
        scheme=Explicit(0.1),
        iterations=20,
    ).u[0, 0]
    theirs = SimpleITK.GradientAnisotropicDiffusion(
        SimpleITK.GetImageFromArray(image),
        timeStep=0.1,
        conductanceParameter=1e6,
        numberOfIterations=20,
    )
    np.testing.assert_allclose(ours.numpy(), SimpleITK.GetArrayFromImage(theirs), atol=1e-2)


def test_edges_above_k_outlive_noise_below_it():
    rng = np.random.default_rng(2)
    clean = np.where(np.arange(64)[None] < 32, 0.0, 30.0) * np.ones((64, 1))
    image = torch.from_numpy(clean + rng.normal(0, 1, clean.shape))[None, None]
    u = (
        solve(
            image,
            PeronaMalik(2.0, "exponential"),
            noise=Gaussian(1.0),
            scheme=Explicit(0.2),
            iterations=100,
        )
        .u[0, 0]
        .numpy()
    )
    assert np.diff(u, axis=1)[:, 31].min() > 25
    assert u[:, :30].std() < 0.3


def test_roughness_is_zero_for_noise_and_grows_with_the_detail():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(2, 256, 256))
    assert roughness(noise) < 0.03
    camera = data.camera()[::2, ::2].astype(float)[None]
    levels = [roughness(camera / s + rng.normal(size=camera.shape)) for s in (50, 20, 8)]
    assert 0.03 < levels[0] < levels[1] < levels[2]


def test_roughness_leaves_out_constant_background_and_nan():
    rng = np.random.default_rng(4)
    v = rng.normal(size=(1, 128, 128)) * 1.5
    inside = roughness(v)
    framed = np.zeros((1, 400, 400))
    framed[:, 100:228, 100:228] = v
    assert roughness(framed) == pytest.approx(inside, rel=0.1)
    holed = v.copy()
    holed[:, 30:60] = np.nan
    assert roughness(holed) == pytest.approx(inside, rel=0.1)
    assert roughness(np.full((1, 4, 4), np.nan)) == 0
    assert roughness(np.ones((1, 1, 1))) == 0


def test_smoother_images_are_diffused_longer_and_more_cautiously():
    rng = np.random.default_rng(5)
    smooth = PeronaMalik.suggest(rng.normal(size=(1, 128, 128)))
    camera = data.camera()[::4, ::4].astype(float)[None] / 10
    rough = PeronaMalik.suggest(camera + rng.normal(size=camera.shape))
    assert smooth.stopping_time > 2 * rough.stopping_time
    assert smooth.contrast < rough.contrast
    assert smooth.iterations == round(smooth.stopping_time / smooth.tau)


@pytest.mark.parametrize(
    "arguments",
    [(0.0,), (-1.0,), (float("nan"),), (1.0, "cubic"), (1.0, "rational", -0.5)],
)
def test_parameters_out_of_range_are_refused(arguments):
    with pytest.raises(InvalidSettingError):
        PeronaMalik(*arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ellipticity_is_the_slope_of_the_flux(function):
    """b(s) = a(s) + 2 s a'(s) is the derivative of x a(x²)."""
    x, h = torch.linspace(0.1, 4, 50, dtype=torch.float64), 1e-5
    up, down = (t * FUNCTIONS[function](t**2) for t in (x + h, x - h))
    b = ellipticity(x**2, function)
    torch.testing.assert_close(b, (up - down) / (2 * h), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("function", "start"), [("rational", 1.0), ("exponential", 0.5)])
def test_backward_diffusion_begins_where_it_is_known_to(function, start):
    """At s = K² for the rational one, at K²/2 for the exponential one."""
    with torch.no_grad():
        b = ellipticity(torch.tensor([start - 0.01, start, start + 0.01]), function)
    assert b[0] > 0 > b[2]
    assert b[1].item() == pytest.approx(0, abs=1e-6)
