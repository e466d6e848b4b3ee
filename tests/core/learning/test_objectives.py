"""What a fine-tuning minimises: noise that is drawn, recorruption, and Stein's estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from napari_learned_diffusion.core.learning.objectives import (
    RECORRUPTION,
    NoiseSource,
    as_batch,
    recorrupted,
    squared_error,
    sure,
)
from napari_learned_diffusion.core.noise import Correlated, Gaussian, PoissonGaussian, Rician
from napari_learned_diffusion.core.noise_measurement import checked_pixels
from napari_learned_diffusion.core.noise_spectrum import coloured, flat_spectrum

CPU = torch.device("cpu")


def neighbours(noise: np.ndarray) -> tuple[float, float]:
    """Correlation of vertical and of horizontal neighbours."""
    down = np.mean(noise[1:] * noise[:-1]) / noise.var()
    across = np.mean(noise[:, 1:] * noise[:, :-1]) / noise.var()
    return float(down), float(across)


@pytest.mark.parametrize(
    "model", [Gaussian(3.0), PoissonGaussian(2.0, 5.0), Rician(3.0), Correlated(3.0, 1.0)]
)
def test_noise_that_is_drawn_has_the_model_s_variance(model):
    clean = np.full((256, 256), 40.0)
    noise = NoiseSource(model).draw(clean, np.random.default_rng(0))
    assert noise.mean() == pytest.approx(0, abs=0.15)
    assert noise.var() == pytest.approx(float(model.variance(np.float64(40))), rel=0.05)


def test_correlated_noise_is_drawn_correlated():
    noise = NoiseSource(Correlated(3.0, 1.0)).draw(np.zeros((256, 256)), np.random.default_rng(0))
    assert neighbours(noise) == pytest.approx((np.exp(-0.25),) * 2, abs=0.03)


def test_the_measured_spectrum_keeps_the_direction_of_the_noise():
    rng = np.random.default_rng(1)
    planes = gaussian_filter(rng.normal(size=(8, 256, 256)), (0, 0.5, 1.2))
    pixels = checked_pixels(planes, None)
    found = flat_spectrum(pixels, pixels.sample())
    assert found is not None
    assert found.spectrum.mean() == pytest.approx(1)
    noise = coloured(rng.normal(size=(256, 256)), found.spectrum)
    assert noise.var() == pytest.approx(1, abs=0.1)
    expected = np.mean([neighbours(plane) for plane in planes], axis=0)
    assert neighbours(noise) == pytest.approx(expected, abs=0.08)
    drawn = NoiseSource(Gaussian(5.0), found.spectrum).add(np.full((128, 128), 7.0), rng)
    assert drawn.std() == pytest.approx(5, rel=0.1)


def test_both_halves_of_a_recorruption_have_independent_noise():
    rng = np.random.default_rng(2)
    clean = np.linspace(10, 90, 256 * 256).reshape(256, 256)
    model = PoissonGaussian(1.5, 4.0)
    noisy = model.add(clean, rng)
    first, second = recorrupted(noisy, clean, NoiseSource(model), rng)
    sigma = np.sqrt(model.variance(clean))
    a, b = (first - clean) / sigma, (second - clean) / sigma
    assert np.mean(a * b) == pytest.approx(0, abs=0.03)
    assert a.var() == pytest.approx(1 + RECORRUPTION**2, rel=0.03)
    amplified = model.amplified(1 + RECORRUPTION**2)
    assert amplified.variance(clean) == pytest.approx((1 + RECORRUPTION**2) * sigma**2)


@pytest.mark.parametrize("model", [Gaussian(3.0), PoissonGaussian(2.0), Rician(3.0, 1.0)])
def test_amplified_noise(model):
    u = np.array([1e3, 1e4])
    assert model.amplified(4.0).variance(u) == pytest.approx(4 * model.variance(u), rel=1e-4)
    assert Correlated(2.0, 1.5).amplified(4.0) == Correlated(4.0, 1.5)


@pytest.mark.parametrize("length", [0.0, 1.0])
def test_stein_s_estimate_is_the_error(length):
    """Of a linear filter, in one part of the image, with white and with correlated noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:192, :192]
    clean = 20 * np.sin(x / 9) + 10 * np.cos(y / 7)
    source = NoiseSource(Correlated(4.0, length))
    kernel = torch.ones(1, 1, 5, 5, dtype=torch.float64) / 25

    def smoothed(u: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(u.double(), kernel, padding=2)

    weight = np.zeros(clean.shape, np.bool_)
    weight[10:-10, 10:120] = True
    found, true = [], []
    for _ in range(4):
        noisy = source.add(clean, rng)
        probe = source.draw(clean, rng)
        batch = [as_batch([a], CPU) for a in (noisy, probe, np.full(clean.shape, 16.0), weight)]
        found.append(sure(smoothed, *batch)[0])
        u = smoothed(batch[0])
        true.append(float(squared_error(u, as_batch([clean], CPU), batch[3])))
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.1)
    # Noise of another variance changes the estimate by that part of it.
    value, of_noise = sure(smoothed, *batch)
    other = [batch[0], batch[1] * 1.1**0.5, batch[2] * 1.1, batch[3]]
    assert sure(smoothed, *other)[0] == pytest.approx(value + 0.1 * of_noise, rel=1e-4)


def test_errors_count_where_the_weight_is():
    u = torch.zeros(2, 1, 4, 4)
    target = torch.ones(2, 1, 4, 4)
    target[0, 0, 0] = 100
    weight = torch.ones(2, 1, 4, 4)
    weight[0, 0, 0] = 0
    assert squared_error(u, target, weight).tolist() == [1, 1]
    assert squared_error(u, target, torch.zeros(2, 1, 4, 4)).tolist() == [0, 0]
