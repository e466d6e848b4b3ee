"""Noise estimated from images whose noise is known, with all that real stacks bring."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree

from napari_learned_diffusion.config import NOISE_CHOICES
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.noise import (
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.noise_estimation import (
    KINDS,
    NoiseEstimate,
    estimate_noise,
    sample_planes,
)

SIZE = 192


def smooth(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    field = ndimage.gaussian_filter(
        rng.normal(size=(size, size)), size / 12, mode="wrap", truncate=3
    )
    return 5 + 245 * (field - field.min()) / np.ptp(field)


def piecewise(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    cells = cKDTree(rng.uniform(0, size, (size**2 // 1500, 2)))
    nearest = cells.query(np.stack(np.mgrid[:size, :size], axis=-1).reshape(-1, 2))[1]
    levels = rng.uniform(5, 250, cells.n)
    return ndimage.gaussian_filter(levels[nearest].reshape(size, size), 0.6)


def textured(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Fine strong texture on half of the image's area, in patches."""
    grain = ndimage.gaussian_filter(rng.normal(size=(size, size)), 1.0)
    where = ndimage.gaussian_filter(rng.normal(size=(size, size)), 12) > 0
    return smooth(rng, size) + where * 30 * grain / grain.std()


TEXTURES = {"smooth": smooth, "piecewise": piecewise, "textured": textured}


def photons(clean: np.ndarray, gain: float, offset: float, rng: np.random.Generator) -> np.ndarray:
    counts = rng.poisson(np.maximum(clean, 0) / gain)
    return gain * counts + rng.normal(0, np.sqrt(offset), clean.shape)


def sigma_errors(found: NoiseModel, true: NoiseModel, clean: np.ndarray) -> np.ndarray:
    """Relative errors of sigma at the 10th, 50th and 90th percentile of the clean image."""
    at = np.quantile(clean, [0.1, 0.5, 0.9])
    return np.sqrt(found.variance(at) / true.variance(at)) - 1


def assert_close(found: NoiseEstimate, true: NoiseModel, clean: np.ndarray, within: float) -> None:
    errors = sigma_errors(found.model, true, clean)
    assert np.abs(errors).max() < within, (errors, found.message)


# ---------------------------------------------------------------- known noise is recovered


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("gain", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_photon_noise_is_recovered_within_15_percent(texture, gain, offset):
    rng = np.random.default_rng([3, int(gain), int(offset)])
    clean = TEXTURES[texture](rng)
    found = estimate_noise(photons(clean, gain, offset, rng))
    assert_close(found, PoissonGaussian(gain, offset), np.maximum(clean, 0), 0.15)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("noise_sigma", [5.0, 25.0, 75.0])
def test_gaussian_noise_is_recovered_and_chosen(texture, noise_sigma):
    rng = np.random.default_rng([4, int(noise_sigma)])
    clean = TEXTURES[texture](rng)
    found = estimate_noise(clean + rng.normal(0, noise_sigma, clean.shape))
    assert isinstance(found.model, Gaussian), found.message
    assert found.model.noise_sigma == pytest.approx(noise_sigma, rel=0.15)


def test_pure_noise_is_measured_without_bias():
    noise = np.random.default_rng(5).normal(1000, 7, (512, 512))
    found = estimate_noise(noise)
    assert found.model.noise_sigma == pytest.approx(7, rel=0.01)
    assert found.confidence > 0.9


def test_gain_and_offset_are_recovered_where_photons_are_many():
    rng = np.random.default_rng(6)
    found = estimate_noise(photons(smooth(rng, 384), 2.0, 40.0, rng))
    assert isinstance(found.model, PoissonGaussian)
    assert found.model.gain == pytest.approx(2.0, rel=0.05)
    assert found.model.offset == pytest.approx(40.0, abs=15)


def test_a_pedestal_gives_a_negative_offset():
    rng = np.random.default_rng(7)
    found = estimate_noise(photons(smooth(rng), 3.0, 9.0, rng) + 100)
    assert isinstance(found.model, PoissonGaussian)
    assert found.model.offset == pytest.approx(9 - 3 * 100, rel=0.15)


def test_gaussian_on_photon_noise_is_the_root_mean_square():
    rng = np.random.default_rng(8)
    clean = smooth(rng)
    found = estimate_noise(photons(clean, 5.0, 0.0, rng), "gaussian")
    assert isinstance(found.model, Gaussian)
    assert found.model.noise_sigma == pytest.approx(np.sqrt(5 * clean.mean()), rel=0.05)
    assert "grows" in found.message


def test_poisson_gaussian_can_be_asked_for_on_gaussian_noise():
    rng = np.random.default_rng(9)
    clean = smooth(rng)
    found = estimate_noise(clean + rng.normal(0, 10, clean.shape), "poisson-gaussian")
    assert isinstance(found.model, PoissonGaussian)
    assert_close(found, Gaussian(10.0), clean, 0.08)


def test_noise_that_falls_with_the_intensity_gives_a_valid_poisson_gaussian():
    rng = np.random.default_rng(10)
    clean = smooth(rng)
    found = estimate_noise(clean + rng.normal(size=clean.shape) * (20 - clean / 20))
    assert isinstance(found.model, Gaussian)
    asked = estimate_noise(
        clean + rng.normal(size=clean.shape) * (20 - clean / 20), "poisson-gaussian"
    )
    assert isinstance(asked.model, PoissonGaussian)
    assert asked.model.gain > 0
    assert np.isfinite(asked.model.stabilise(clean)).all()


def test_curve_lies_on_the_true_noise():
    rng = np.random.default_rng(11)
    curve = estimate_noise(photons(smooth(rng, 256), 4.0, 25.0, rng)).curve
    assert len(curve.intensity) == len(curve.noise_sigma) == len(curve.weight) > 8
    assert (np.diff(curve.intensity) > 0).all()
    assert (curve.weight > 0).all()
    np.testing.assert_allclose(curve.noise_sigma, np.sqrt(4 * curve.intensity + 25), rtol=0.2)


# ---------------------------------------------------------------- what real stacks bring


@pytest.mark.parametrize("background", [0.0, -1024.0])
@pytest.mark.parametrize("radius", [40, 70])
def test_an_exactly_constant_background_is_left_out(background, radius):
    rng = np.random.default_rng(12)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    head = x**2 + y**2 < radius**2
    image = np.where(head, 300 + smooth(rng) + rng.normal(0, 12, head.shape), background)
    found = estimate_noise(image)
    assert_close(found, Gaussian(12.0), np.full(3, 400.0), 0.12)
    assert "constant background" in found.message


def test_two_constant_paddings_around_a_noisy_field_are_no_phantom():
    rng = np.random.default_rng(13)
    image = np.full((SIZE, SIZE), -2000.0)
    image[30:-30, 30:-30] = -1024
    image[60:-60, 60:-60] = rng.normal(40, 15, (SIZE - 120, SIZE - 120))
    assert estimate_noise(image).model.noise_sigma == pytest.approx(15, rel=0.15)


def test_photon_counts_with_a_dark_background_are_not_free_of_noise():
    rng = np.random.default_rng(38)
    clean = np.maximum(smooth(rng) - 120, 0) / 4
    found = estimate_noise(rng.poisson(clean))
    bright = clean[clean > 3]
    assert_close(found, PoissonGaussian(1.0, 0.0), bright, 0.15)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_every_dtype(dtype):
    rng = np.random.default_rng(14)
    clean = 30 + 0.7 * smooth(rng)
    noisy = np.clip(clean + rng.normal(0, 6, clean.shape), 0, 255).astype(dtype)
    assert_close(estimate_noise(noisy), Gaussian(6.0), clean, 0.08)


def test_float16_and_bool_are_read():
    rng = np.random.default_rng(15)
    noisy = rng.normal(0, 1, (64, 64))
    found = estimate_noise(noisy.astype(np.float16))
    assert found.model.noise_sigma == pytest.approx(1, rel=0.1)
    assert estimate_noise(noisy > 0).model.noise_sigma == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("levels", [6, 12, 40])
def test_few_grey_levels(levels):
    rng = np.random.default_rng(16)
    clean = smooth(rng) / 255
    noisy = np.round((clean + rng.normal(0, 0.15, clean.shape)) * levels).astype(np.int16)
    # Rounding is noise too, of variance 1/12.
    expected = np.sqrt((0.15 * levels) ** 2 + 1 / 12)
    assert_close(estimate_noise(noisy), Gaussian(expected), clean * levels, 0.15)


def test_noise_finer_than_a_grey_level_is_said_so():
    rng = np.random.default_rng(17)
    noisy = np.round(10 * smooth(rng) / 255 + rng.normal(0, 0.3, (SIZE, SIZE))).astype(np.uint8)
    found = estimate_noise(noisy)
    assert found.model.noise_sigma == pytest.approx(np.sqrt(0.09 + 1 / 12), rel=0.3)
    assert "few grey levels" in found.message


@pytest.mark.parametrize("ends", [(40, 1e9), (-1e9, 200), (40, 200)])
def test_clipped_and_saturated_pixels_do_not_bias(ends):
    rng = np.random.default_rng(18)
    clean = smooth(rng, 256)
    found = estimate_noise(np.clip(clean + rng.normal(0, 20, clean.shape), *ends))
    assert_close(found, Gaussian(20.0), clean, 0.1)


def test_clipped_photon_noise_keeps_its_line():
    rng = np.random.default_rng(19)
    clean = smooth(rng, 256)
    found = estimate_noise(np.clip(photons(clean, 5.0, 200.0, rng), 20, 240))
    assert_close(found, PoissonGaussian(5.0, 200.0), clean, 0.12)


def test_an_image_that_is_clipped_nearly_everywhere_is_not_trusted():
    rng = np.random.default_rng(20)
    found = estimate_noise(np.clip(rng.normal(-5, 10, (128, 128)), 0, None))
    assert found.confidence < 0.4
    assert "end of the range" in found.message


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
def test_padding_that_is_not_finite_is_left_out(padding):
    rng = np.random.default_rng(21)
    image = np.full((SIZE, SIZE), padding)
    image[20:-40, 30:-10] = (smooth(rng) + rng.normal(0, 9, (SIZE, SIZE)))[20:-40, 30:-10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimate_noise(image)
    assert found.model.noise_sigma == pytest.approx(9, rel=0.1)


def test_scattered_nan_leave_smaller_blocks():
    rng = np.random.default_rng(22)
    image = rng.normal(50, 4, (96, 96))
    image[::7, ::7] = np.nan
    assert estimate_noise(image).model.noise_sigma == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("stacked", [False, True])
def test_only_the_mask_counts(stacked):
    rng = np.random.default_rng(23)
    image = rng.normal(0, 50, (2, SIZE, SIZE))
    image[:, :96] = rng.normal(0, 3, (2, 96, SIZE))
    mask = np.zeros(image.shape, dtype=bool)
    mask[:, :96] = True
    found = estimate_noise(image, mask=mask if stacked else mask[0])
    assert found.model.noise_sigma == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("value", [1e6, -1e6])
def test_hot_and_dead_pixels_do_not_count(value):
    rng = np.random.default_rng(24)
    clean = smooth(rng)
    image = clean + rng.normal(0, 8, clean.shape)
    image.flat[rng.choice(image.size, 40, replace=False)] = value
    assert_close(estimate_noise(image), Gaussian(8.0), clean, 0.12)


def test_texture_everywhere_lowers_the_confidence():
    rng = np.random.default_rng(25)
    texture = 40 * ndimage.gaussian_filter(rng.normal(size=(256, 256)), 1.0)
    found = estimate_noise(texture + rng.normal(0, 2, texture.shape))
    assert found.model.noise_sigma < 4
    assert found.confidence < 0.5
    assert "texture" in found.message


def test_correlated_noise_is_noted_and_counted_in():
    rng = np.random.default_rng(26)
    noise = ndimage.gaussian_filter(rng.normal(size=(256, 256)), 0.5)
    found = estimate_noise(100 + 10 * noise / noise.std())
    assert found.model.noise_sigma == pytest.approx(10, rel=0.25)
    assert "correlated" in found.message
    assert found.confidence < 0.8


def test_white_noise_is_not_called_correlated():
    rng = np.random.default_rng(27)
    for texture in TEXTURES.values():
        clean = texture(rng)
        found = estimate_noise(clean + rng.normal(0, 15, clean.shape))
        assert "is correlated" not in found.message


# ---------------------------------------------------------------- correlated noise


@pytest.mark.parametrize("texture", ["smooth", "piecewise"])
@pytest.mark.parametrize("correlation_length", [0.5, 0.8, 1.2])
@pytest.mark.parametrize("noise_sigma", [10.0, 30.0])
def test_correlated_noise_is_recovered_and_chosen(texture, correlation_length, noise_sigma):
    rng = np.random.default_rng([39, int(noise_sigma), int(10 * correlation_length)])
    true = Correlated(noise_sigma, correlation_length)
    found = estimate_noise(true.add(TEXTURES[texture](rng, 384), rng))
    assert isinstance(found.model, Correlated), found.message
    assert found.model.noise_sigma == pytest.approx(noise_sigma, rel=0.15)
    assert found.model.correlation_length == pytest.approx(correlation_length, rel=0.2)
    np.testing.assert_allclose(found.curve.noise_sigma, noise_sigma, rtol=0.35)


def test_noise_of_a_ct_kernel_is_measured_though_it_is_weak_at_low_frequencies():
    rng = np.random.default_rng(40)
    frequency = np.hypot(np.fft.fftfreq(384)[:, None], np.fft.rfftfreq(384))
    kernel = frequency * np.exp(-2 * (2.4 * frequency) ** 2)
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(384, 384))) * kernel, (384, 384))
    found = estimate_noise(smooth(rng, 384) + 20 * noise / noise.std())
    assert found.model.noise_sigma == pytest.approx(20, rel=0.1)


def test_correlated_noise_can_be_asked_for_on_white_noise():
    rng = np.random.default_rng(41)
    found = estimate_noise(smooth(rng) + rng.normal(0, 12, (SIZE, SIZE)), "correlated")
    assert isinstance(found.model, Correlated)
    assert found.model.noise_sigma == pytest.approx(12, rel=0.1)
    assert found.model.correlation_length < 0.25
    assert "as asked for" in found.message


def test_correlated_noise_in_an_image_too_small_to_tell():
    found = estimate_noise(np.random.default_rng(42).normal(0, 10, (40, 40)), "correlated")
    assert isinstance(found.model, Correlated)
    assert found.model.noise_sigma == pytest.approx(10, rel=0.3)
    assert "too few" in found.message


def test_texture_that_looks_like_correlated_noise_but_ends_in_white_is_not_taken_for_it():
    rng = np.random.default_rng(43)
    grain = 15 * Correlated(1.0, 1.2).add(np.zeros((256, 256)), rng)
    found = estimate_noise(grain + rng.normal(0, 2, grain.shape))
    assert not isinstance(found.model, Correlated)


def test_correlated_noise_that_differs_between_air_and_tissue_is_not_called_the_same():
    rng = np.random.default_rng(44)
    y, x = np.mgrid[:256, :256] - 128
    body = np.hypot(x, y) < 70
    noise = Correlated(1.0, 0.6).add(np.zeros(body.shape), rng)
    found = estimate_noise(np.where(body, 1000, 0) + noise * np.where(body, 30, 10))
    assert not isinstance(found.model, Correlated)


def test_slices_with_different_correlated_noise_are_noted():
    rng = np.random.default_rng(45)
    stack = Correlated(1.0, 0.8).add(np.zeros((4, 128, 128)), rng)
    assert not estimate_noise(stack).slices_differ
    assert estimate_noise(stack * np.array([1, 1, 3, 3])[:, None, None]).slices_differ


# ---------------------------------------------------------------- Rician noise


def head(rng: np.random.Generator, texture: str = "smooth", size: int = SIZE) -> np.ndarray:
    """An ellipse of tissue in the air, where there is no signal."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    return np.where(np.hypot(x / 0.42, y / 0.36) < 1, 60 + 0.75 * TEXTURES[texture](rng, size), 0)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("signal_to_noise", [3, 8, 30])
def test_rician_noise_is_recovered_and_chosen(texture, signal_to_noise):
    rng = np.random.default_rng([46, signal_to_noise])
    clean = head(rng, texture, 256)
    noise_sigma = float(np.median(clean[clean > 0])) / signal_to_noise
    found = estimate_noise(Rician(noise_sigma).add(clean, rng))
    assert isinstance(found.model, Rician), found.message
    assert found.model.noise_sigma == pytest.approx(noise_sigma, rel=0.1)
    assert found.model.pedestal == 0


def test_rician_noise_of_whole_numbers():
    rng = np.random.default_rng(47)
    found = estimate_noise(np.rint(Rician(4.0).add(head(rng), rng)).astype(np.uint16))
    assert isinstance(found.model, Rician)
    assert found.model.noise_sigma == pytest.approx(4, rel=0.1)


def test_rician_curve_lies_on_the_model():
    rng = np.random.default_rng(48)
    found = estimate_noise(Rician(15.0).add(head(rng, size=256), rng))
    air = found.curve.noise_sigma[0]
    assert air == pytest.approx(0.655 * 15, rel=0.1)
    assert 1 < found.curve.intensity[0] / 15 < 1.3  # 1.253 on average
    assert found.curve.noise_sigma[-1] == pytest.approx(15, rel=0.2)


@pytest.mark.parametrize("kind", ["signed", "gaussian in the air", "masked"])
def test_what_only_resembles_a_magnitude_image_is_not_called_rician(kind):
    rng = np.random.default_rng(49)
    clean = head(rng)
    noisy = clean + rng.normal(0, 8, clean.shape)
    image = {
        "signed": noisy,
        "gaussian in the air": noisy + 40,
        "masked": np.where(clean > 0, Rician(8.0).add(clean, rng), 0),
    }[kind]
    found = estimate_noise(image)
    assert not isinstance(found.model, Rician)
    asked = estimate_noise(image, "rician")
    assert isinstance(asked.model, Rician)
    assert "as asked for" in asked.message


def test_photon_counts_are_not_called_rician():
    rng = np.random.default_rng(50)
    for gain in (1.0, 5.0, 50.0):
        found = estimate_noise(gain * rng.poisson(head(rng) / gain))
        assert not isinstance(found.model, Rician)


# ---------------------------------------------------------------- stacks


def test_planes_of_a_stack_are_pooled():
    rng = np.random.default_rng(28)
    clean = np.stack([smooth(rng, 64) for _ in range(12)])
    noisy = photons(clean, 4.0, 30.0, rng)
    true = PoissonGaussian(4.0, 30.0)
    pooled = estimate_noise(noisy)
    assert_close(pooled, true, clean, 0.08)
    assert pooled.confidence > estimate_noise(noisy[0]).confidence


def test_empty_planes_of_a_stack_do_not_count():
    rng = np.random.default_rng(29)
    stack = np.zeros((5, 96, 96))
    stack[2:4] = rng.normal(200, 11, (2, 96, 96))
    stack[4] = np.nan
    assert estimate_noise(stack).model.noise_sigma == pytest.approx(11, rel=0.05)


def test_planes_with_different_noise_are_noted():
    rng = np.random.default_rng(30)
    stack = 100 + rng.normal(size=(4, 96, 96)) * np.array([5, 5, 20, 20])[:, None, None]
    found, alike = estimate_noise(stack), estimate_noise(stack[:2])
    assert found.slices_differ
    assert "slices differ in their noise" in found.message
    assert not alike.slices_differ
    assert "slices differ" not in alike.message


def test_planes_scaled_one_by_one_are_noted_however_dark_most_of_them_is():
    rng = np.random.default_rng(37)
    clean = np.stack([smooth(rng, 128) for _ in range(4)]) ** 2 / 250
    noisy = photons(clean, 3.0, 5.0, rng) * np.array([0.3, 1, 0.3, 1])[:, None, None]
    assert estimate_noise(noisy).slices_differ
    assert not estimate_noise(noisy[1::2]).slices_differ


@pytest.mark.parametrize(("n", "at_most"), [(1, 16), (5, 16), (16, 16), (17, 16), (1000, 7)])
def test_sampled_planes_are_spread(n, at_most):
    planes = sample_planes(n, at_most)
    assert len(planes) == min(n, at_most)
    assert planes.min() >= 0
    assert planes.max() < n
    assert (np.diff(planes) > 0).all()
    assert np.ptp(np.diff(np.concatenate([[-1], planes, [n]])[1:-1])) <= 1 if n > 2 else True
    assert planes.mean() == pytest.approx((n - 1) / 2, abs=1)


@pytest.mark.parametrize(("n", "at_most"), [(0, 16), (4, 0)])
def test_nothing_to_sample_is_refused(n, at_most):
    with pytest.raises(InvalidSettingError):
        sample_planes(n, at_most)


# ---------------------------------------------------------------- no noise, little data, none


def shaded(size: int = 96) -> np.ndarray:
    return np.add.outer(np.arange(size), 2 * np.arange(size)).astype(float)


def labels() -> np.ndarray:
    return np.kron(np.arange(36).reshape(6, 6), np.ones((24, 24)))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64)),
        np.full((3, 40, 40), 7, dtype=np.uint8),
        np.full((1, 1), 3.5),
        np.where(np.arange(4096).reshape(64, 64) == 7, np.nan, 5.0),
        shaded(),
        labels(),
        labels() > 17,
        ndimage.gaussian_filter(labels(), 0.8),
    ],
    ids=["zeros", "uint8", "1x1", "nan", "ramp", "labels", "binary", "phantom"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_gives_gaussian_of_zero(image, kind):
    found = estimate_noise(image, kind)
    assert found.model == Gaussian(0.0)
    assert "no noise" in found.message.lower()


def test_rounding_of_a_float_image_is_no_noise():
    y, x = np.mgrid[:96, :96] / 96
    image = (1e4 + np.sin(3 * y) * np.cos(2 * x)).astype(np.float32)
    assert estimate_noise(image).model.is_zero


@pytest.mark.parametrize(
    "shape", [(1, 2), (2, 1), (1, 40), (2, 2), (3, 3), (5, 4), (9, 9), (4, 3, 3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_small_images_give_a_guess_of_little_confidence(shape, kind):
    image = np.random.default_rng(31).normal(0, 10, shape)
    found = estimate_noise(image, kind)
    at_zero = float(np.sqrt(found.model.variance(np.zeros(1))[0]))
    assert 0 < at_zero < 60
    assert found.confidence < 0.6


@pytest.mark.parametrize("size", [16, 24, 32])
def test_small_images_are_about_right(size):
    levels = [
        estimate_noise(np.random.default_rng([32, k]).normal(0, 10, (size, size)), "gaussian")
        for k in range(16)
    ]
    mean = np.mean([found.model.noise_sigma for found in levels])
    assert mean == pytest.approx(10, rel=0.08)


def test_isolated_pixels_give_no_noise_and_no_confidence():
    image = np.full((9, 9), np.nan)
    image[::2, ::2] = np.arange(25).reshape(5, 5)
    found = estimate_noise(image)
    assert found.model.is_zero
    assert found.confidence == 0


@pytest.mark.parametrize("shape", [(8, 8), (2, 5, 5), (0, 4), (0, 8, 8)])
def test_no_finite_pixel_is_refused_with_a_remedy(shape):
    with pytest.raises(InvalidImageError, match="Choose another slice"):
        estimate_noise(np.full(shape, np.nan))


def test_an_empty_mask_is_refused():
    with pytest.raises(InvalidImageError, match="mask"):
        estimate_noise(np.ones((8, 8)), mask=np.zeros((8, 8), dtype=bool))


@pytest.mark.parametrize(
    ("planes", "mask"),
    [
        (np.ones((8, 8), dtype=complex), None),
        (np.array([["a", "b"], ["c", "d"]]), None),
        (np.ones(8), None),
        (np.ones((2, 2, 8, 8)), None),
        (np.ones((2, 8, 8)), np.ones((8, 7), dtype=bool)),
        (np.ones((2, 8, 8)), np.ones((1, 8, 8), dtype=bool)),
    ],
)
def test_wrong_arrays_are_refused(planes, mask):
    with pytest.raises(InvalidImageError):
        estimate_noise(planes, mask=mask)


def test_an_unknown_kind_is_refused_and_the_known_named():
    with pytest.raises(InvalidSettingError, match="poisson-gaussian"):
        estimate_noise(np.ones((8, 8)), "speckle")


def test_every_kind_that_can_be_chosen_can_be_estimated():
    assert KINDS == NOISE_CHOICES


def test_the_input_is_left_as_it_is():
    image = np.random.default_rng(33).normal(0, 1, (64, 64))
    image[:8] = np.nan
    before = image.copy()
    image.flags.writeable = False
    estimate_noise(image)
    np.testing.assert_array_equal(image, before)


def test_slices_of_any_memory_layout():
    image = np.random.default_rng(34).normal(0, 1, (3, 64, 80))
    expected = estimate_noise(image).model
    assert estimate_noise(np.asfortranarray(image)).model == expected
    assert estimate_noise(np.repeat(image, 2, axis=2)[:, :, ::2]).model == expected


# ---------------------------------------------------------------- change of units


@pytest.mark.parametrize("kind", ["auto", "gaussian", "poisson-gaussian", "correlated"])
@settings(max_examples=8, deadline=None)
@given(scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
def test_estimates_change_with_the_units(kind, scale, shift):
    rng = np.random.default_rng(35)
    image = photons(smooth(rng, 80), 6.0, 50.0, rng)
    shift *= scale  # a shift far beyond the range would only round the image
    expected = estimate_noise(image, kind)
    found = estimate_noise(scale * image + shift, kind)
    wanted = expected.model.transformed(scale, shift)
    at = scale * np.linspace(10, 250, 9) + shift
    assert type(found.model) is type(wanted)
    np.testing.assert_allclose(found.model.variance(at), wanted.variance(at), rtol=1e-6)
    np.testing.assert_allclose(
        found.curve.noise_sigma, scale * expected.curve.noise_sigma, rtol=1e-6
    )
    assert found.confidence == pytest.approx(expected.confidence, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1e6])
def test_rician_estimates_change_with_the_scale(scale):
    rng = np.random.default_rng(51)
    image = Rician(10.0).add(head(rng), rng)
    found, expected = estimate_noise(scale * image), estimate_noise(image)
    assert isinstance(found.model, Rician)
    assert isinstance(expected.model, Rician)
    assert found.model.noise_sigma == pytest.approx(scale * expected.model.noise_sigma, rel=1e-6)


@pytest.mark.parametrize("turn", [np.rot90, np.fliplr, np.transpose])
def test_estimates_hardly_change_when_the_image_is_turned(turn):
    rng = np.random.default_rng(36)
    image = photons(smooth(rng), 3.0, 20.0, rng)
    at = np.linspace(20, 240, 5)
    found, expected = (estimate_noise(i).model.variance(at) for i in (turn(image), image))
    np.testing.assert_allclose(found, expected, rtol=0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [1e6, 1e9, -1e9, 1e12])
def test_a_single_value_far_from_all_others_changes_nothing(dtype, value):
    image = np.random.default_rng(0).normal(100, 5, (96, 96)).astype(dtype)
    image[40, 50] = value
    assert estimate_noise(image).model.noise_sigma == pytest.approx(5, rel=0.1)
