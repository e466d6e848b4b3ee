"""Which pixels hold no intensity, and which only look as if they held none."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from napari_learned_diffusion.core.missing import missing_pixels, without_missing
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian, Rician
from napari_learned_diffusion.core.noise_estimation import estimate_noise

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:128, :128]
DISC = (Y - 64) ** 2 + (X - 64) ** 2 < 55**2


def noisy(sigma: float = 10.0, dtype: str = "f4") -> np.ndarray:
    """A bright object on a dark ground, everywhere noisy."""
    clean = 100 + 200.0 * ((Y - 64) ** 2 + (X - 64) ** 2 < 900)
    plane = clean + np.random.default_rng(1).normal(0, sigma, clean.shape)
    return (np.rint(plane) if np.dtype(dtype).kind in "iu" else plane).astype(dtype)


# --- fill values ---


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (-3.4028234663852886e38, "f4"),
        (3.4028234663852886e38, "f4"),
        (-3.4028234663852886e38, "f8"),
        (-1.7976931348623157e308, "f8"),
        (9.969209968386869e36, "f4"),
        (9.969209968386869e36, "f8"),
        (1e20, "f4"),
        (-1e30, "f4"),
        (-3.2e35, "f4"),
        (-1e6, "f4"),
        (-9999.0, "f4"),
        (-32768, "i2"),
        (-9999, "i4"),
        (-(2.0**31), "i4"),
        (-(2.0**63), "i8"),
    ],
)
@pytest.mark.parametrize("where", ["columns", "scattered"])
def test_fill_values_are_recognised_whether_they_lie_together_or_scattered(value, dtype, where):
    plane = noisy(dtype=dtype)
    filled = np.zeros(plane.shape, np.bool_)
    if where == "columns":
        filled[:, :20] = True
    else:
        filled.flat[RNG.choice(filled.size, 40, replace=False)] = True
    plane[filled] = value
    found = missing_pixels(plane)
    np.testing.assert_array_equal(found.mask, filled)
    assert list(found.fill_values.values()) == [filled.sum()]
    assert next(iter(found.fill_values)) == pytest.approx(value)


def test_mixtures_that_interpolation_makes_of_a_fill_value_go_with_it():
    plane = noisy()
    plane[:, :20] = -3.4e38
    plane[:, 20] = plane[:, 19] * 0.3 + plane[:, 21] * 0.7
    np.testing.assert_array_equal(missing_pixels(plane).mask, X < 21)


def test_two_fill_values_in_one_plane_are_both_recognised():
    plane = noisy()
    plane[:10], plane[-10:] = -9999, 1e20
    found = missing_pixels(plane)
    np.testing.assert_array_equal(found.mask, (Y < 10) | (Y >= 118))
    assert found.fill_values == {float(np.float32(1e20)): 1280, -9999.0: 1280}


def test_a_plane_that_is_nothing_but_a_fill_value_is_all_missing():
    assert missing_pixels(np.full((9, 9), -3.4028235e38, np.float32)).is_everything


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e16, 1e25, 1e160])
def test_images_of_any_unit_hold_no_fill_values(scale):
    image = noisy(dtype="f8") * scale
    assert missing_pixels(image).valid is None
    assert missing_pixels(np.where(DISC, image, 0)).valid is None


def test_pixels_of_very_different_size_are_all_data():
    decades = 10.0 ** RNG.uniform(-5, 20, (64, 64))
    assert missing_pixels(decades).valid is None


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
def test_hot_and_saturated_pixels_are_data(dtype):
    plane = noisy(dtype=dtype)
    plane.flat[RNG.choice(plane.size, 50, replace=False)] = 32767
    assert missing_pixels(plane, noise=Gaussian(10.0)).valid is None


def test_one_cosmic_ray_is_data():
    plane = noisy()
    plane[40, 40] = 1e9
    assert missing_pixels(plane).valid is None


def test_metal_and_air_of_a_ct_are_data():
    plane = noisy(20.0, "i2") - 1100  # air around -1000
    plane[DISC] += 1000
    plane[60:70, 60:70] = 3071  # as high as scanners go
    assert missing_pixels(plane, noise=Gaussian(20.0)).valid is None


def test_a_dead_pixel_below_all_others_is_data():
    plane = noisy()
    plane[3, 3] = -500
    assert missing_pixels(plane).valid is None


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i8", "f2", "f4", "f8", ">f4", ">i2"])
def test_every_type_of_ordinary_pixels_is_all_data(dtype):
    assert missing_pixels((noisy() / 2).astype(dtype), (-1.0,), Gaussian(5.0)).valid is None


# --- declared, masked, not finite ---


@pytest.mark.parametrize(
    ("dtype", "declared"),
    [("i2", -2000.0), ("u2", 65535.0), ("u1", 0.0), ("f4", 0.1), ("f8", np.nan), ("f4", 7)],
)
def test_declared_values_are_missing_wherever_they_are(dtype, declared):
    plane = (noisy() / 2).clip(1).astype(dtype)
    plane[5:7, 5] = declared
    found = missing_pixels(plane, (declared,))
    assert found.mask[5:7, 5].all()
    assert found.declared + found.not_finite >= 2
    assert found.fill_values == {}


def test_a_declared_value_that_the_type_cannot_hold_is_nowhere():
    assert missing_pixels(noisy(dtype="u2"), (-1.0, 0.5, 1e20)).valid is None


def test_masked_and_not_finite_pixels_are_counted_by_kind():
    plane = np.ma.masked_array(noisy(), Y < 2)
    plane.data[0, 0] = np.nan  # masked, too: counted once
    plane.data[9, :3] = np.nan, np.inf, -np.inf
    found = missing_pixels(plane)
    assert (found.masked, found.not_finite, found.declared) == (256, 3, 0)
    assert found.mask.sum() == 259


def test_planes_for_measuring_are_nan_where_pixels_are_missing():
    measured = without_missing(np.array([[1, 2], [-32768, 3]], np.int16), (-32768.0,))
    np.testing.assert_array_equal(measured, [[1, 2], [np.nan, 3]])
    whole = noisy(dtype="u2")
    np.testing.assert_array_equal(without_missing(whole), whole)


@pytest.mark.parametrize("value", [-3.4028234663852886e38, 1e20, -9999.0, np.nan])
def test_noise_is_estimated_without_what_is_missing(value):
    plane = noisy()
    expected = estimate_noise(plane[:, 24:], "gaussian").model.noise_sigma
    plane[:, :24] = value
    assert estimate_noise(plane, "gaussian").model.noise_sigma == pytest.approx(expected, rel=0.1)
    masked = np.ma.masked_array(noisy(), X < 24)
    masked.data[:, :24] *= RNG.normal(1, 3, (128, 24)).astype("f4")
    assert estimate_noise(masked, "gaussian").model.noise_sigma == pytest.approx(expected, rel=0.1)


# --- constant background ---


@pytest.mark.parametrize("value", [0.0, -1024.0, 100.0, 4095.0])
@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_the_outside_of_a_mask_is_background_whatever_its_value(value, dtype):
    plane = noisy(dtype=dtype)
    plane[~DISC] = value
    found = missing_pixels(plane, noise=Gaussian(10.0))
    outside = ~DISC | (found.mask & (plane == value))  # pixels that touch it may have its value
    np.testing.assert_array_equal(found.mask, outside)
    assert found.background == {value: found.mask.sum()}


@pytest.mark.parametrize("noise", [Gaussian(10.0), Rician(10.0), PoissonGaussian(0.5, 50.0)])
def test_it_is_told_by_every_noise_model_that_has_noise_there(noise):
    np.testing.assert_array_equal(
        missing_pixels(np.where(DISC, noisy(), 0), noise=noise).mask, ~DISC
    )


def test_stripes_at_the_border_are_background():
    plane = noisy()
    plane[:, :4] = plane[-6:] = 0
    assert missing_pixels(plane, noise=Gaussian(10.0)).mask.sum() == (~(X > 3) | (Y > 121)).sum()


def test_without_a_noise_model_no_background_is_looked_for():
    assert missing_pixels(np.where(DISC, noisy(), 0)).valid is None
    assert missing_pixels(np.where(DISC, noisy(), 0), noise=Gaussian(0.0)).valid is None


@pytest.mark.parametrize("sigma", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("name", ["camera", "moon", "coins", "text"])
def test_clipped_pixels_of_photographs_are_data(name, sigma):
    image = getattr(data, name)()
    clipped = (image * 1.4 - 50 + RNG.normal(0, sigma, image.shape)).clip(0, 255).astype("u1")
    assert missing_pixels(clipped, noise=Gaussian(sigma)).valid is None


@pytest.mark.parametrize("peak", [0.2, 1.0, 10.0])
def test_zeros_of_photon_images_are_data(peak):
    clean = data.camera()[::2, ::2] / 255 * peak * (data.camera()[::2, ::2] > 100)
    counts = RNG.poisson(clean).astype("u2")
    assert (counts == 0).mean() > 0.1
    assert missing_pixels(counts, noise=PoissonGaussian(1.0)).valid is None
    assert missing_pixels(counts.astype("f4"), noise=PoissonGaussian(1.0)).valid is None


def test_holes_of_a_mask_count_with_its_outside():
    hole = (Y - 64) ** 2 + (X - 64) ** 2 < 200
    plane = np.where(DISC & ~hole, noisy(), 0)
    np.testing.assert_array_equal(missing_pixels(plane, noise=Gaussian(10.0)).mask, ~DISC | hole)


def test_few_grey_levels_are_data():
    plane = np.rint(noisy(0.4) / 100).astype("u1")
    assert missing_pixels(plane, noise=Gaussian(0.4)).valid is None


def test_a_phantom_without_noise_is_data():
    clean = noisy(0.0)
    assert missing_pixels(clean, noise=Gaussian(15.0)).valid is None
    labels = np.kron(np.arange(64.0).reshape(8, 8), np.ones((16, 16)))
    assert missing_pixels(labels, noise=Gaussian(5.0)).valid is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (4, 4), (5, 5)])
def test_small_planes_have_no_background(shape):
    assert missing_pixels(np.zeros(shape), noise=Gaussian(1.0)).valid is None
