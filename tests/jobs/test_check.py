"""Checking a result: what was taken away, and what is left."""

from __future__ import annotations

import json

import numpy as np
import pytest

from napari_learned_diffusion.config import DiffusionConfig, Gaussian, PoissonGaussian
from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.metrics import psnr, ssim, zhu_milanfar_q
from napari_learned_diffusion.jobs.check import Check, check_plane
from napari_learned_diffusion.jobs.denoise import denoise_plane
from napari_learned_diffusion.jobs.progress import run

SIGMA = 10.0
NOISE = Gaussian(SIGMA)


def clean() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    return 100 + 60.0 * ((x + y // 2) // 8 % 2)


def noisy() -> np.ndarray:
    return clean() + np.random.default_rng(0).normal(0, SIGMA, clean().shape)


def checked(before: np.ndarray, after: np.ndarray, *more: object) -> Check:
    return run(check_plane(before, after, *more))


def test_a_perfect_result_has_taken_away_white_noise():
    found = checked(noisy(), clean(), NOISE, clean())
    assert found.noise[0] == pytest.approx(SIGMA)
    assert found.noise[1] < 0.2 * SIGMA
    assert found.removed == pytest.approx(1, abs=0.1)
    assert found.is_white
    assert not found.has_structure
    assert found.q == (zhu_milanfar_q(noisy()), zhu_milanfar_q(clean()))
    assert found.psnr == (psnr(noisy(), clean(), data_range=60), np.inf)
    assert found.ssim == (ssim(noisy(), clean(), data_range=60), 1)
    assert found.mean_drift == pytest.approx(clean().mean() - noisy().mean())
    assert found.range_kept
    np.testing.assert_allclose(found.residual, noisy() - clean(), rtol=1e-5, atol=1e-4)


def test_a_blurred_result_has_taken_away_structure():
    rows = np.cumsum(np.pad(noisy(), ((0, 0), (8, 0)), mode="edge"), axis=1)
    blurred = (rows[:, 8:] - rows[:, :-8]) / 8
    found = checked(noisy(), blurred, NOISE)
    assert found.has_structure
    assert found.largest_autocorrelation > 10 * found.white_noise
    assert (found.psnr, found.ssim) == (None, None)


def test_of_our_own_result():
    config = DiffusionConfig(noise=NOISE, device="cpu")
    result = run(denoise_plane(noisy().astype(np.float32), config))
    found = checked(noisy().astype(np.float32), result.image, NOISE, clean())
    assert found.noise[0] == pytest.approx(result.report.noise_sigma)
    assert 0 < found.noise[1] < found.noise[0] / 2
    assert abs(found.mean_drift) < 1e-3
    assert found.range_kept
    assert found.psnr[1] > found.psnr[0] + 3
    assert found.ssim[1] > found.ssim[0]


def test_where_no_noise_model_is_given_it_is_estimated():
    assert checked(noisy(), clean()).noise[0] == pytest.approx(SIGMA, rel=0.3)


def test_the_residual_is_judged_in_stabilised_units():
    model = PoissonGaussian(2.0, 10.0)
    before = model.add(clean(), np.random.default_rng(1))
    found = checked(before, clean(), model)
    assert found.removed == pytest.approx(1, abs=0.15)


def test_nothing_taken_away_is_no_structure():
    found = checked(noisy(), noisy(), NOISE)
    assert found.removed == found.largest_autocorrelation == 0
    assert not found.has_structure


def test_pixels_that_are_no_numbers_take_no_part():
    before, after = noisy(), clean()
    before[3, 4] = np.nan
    after[5:8, 9] = np.inf
    found = checked(before, after, NOISE, clean())
    assert np.count_nonzero(np.isnan(found.residual)) == 4
    numbers = (*found.noise, *found.mean, *found.q, found.removed, found.largest_autocorrelation)
    assert np.isfinite(numbers).all()


def test_small_slices_and_integers():
    found = checked(noisy()[:7, :20].astype(np.uint8), clean()[:7, :20].astype(np.uint8), NOISE,
                    clean()[:7, :20])  # fmt: skip
    assert np.isnan(found.q).all()
    assert found.ssim is None
    assert found.psnr[1] > found.psnr[0]


def test_the_numbers_can_be_written():
    numbers = checked(noisy(), clean(), NOISE).to_dict()
    assert "residual" not in numbers
    assert json.loads(json.dumps(numbers))["range_kept"] is True


@pytest.mark.parametrize(
    ("after", "reference", "words"),
    [
        (clean()[:40], None, "same size"),
        (clean(), clean()[:40], "same size"),
        (np.full_like(clean(), np.nan), None, "no number in common"),
        (clean(), np.ones_like(clean()), "one value"),
    ],
)
def test_what_does_not_belong_together_is_refused(after, reference, words):
    with pytest.raises(InvalidImageError, match=words):
        checked(noisy(), after, NOISE, reference)
