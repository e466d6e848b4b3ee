"""Pixels that hold no intensity take no part, come back as they were, and are told of."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_learned_diffusion import denoise, diffusivity
from napari_learned_diffusion.config import DiffusionConfig, Gaussian, MapsConfig
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.jobs.denoise import denoise_stack, prepare
from napari_learned_diffusion.jobs.inspection import inspect_plane
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.recipe import as_python, as_shell

SIGMA = 12.0
Y, X = np.mgrid[:72, :80]
INSIDE = (Y - 36) ** 2 + (X - 40) ** 2 < 33**2
FILL = -3.4028234663852886e38
CLASSICAL = DiffusionConfig(model="perona-malik", noise=Gaussian(SIGMA), device="cpu")


def phantom(seed: int = 0, dtype: str = "f4") -> np.ndarray:
    clean = 100 + 60.0 * (X > 40)
    noisy = clean + np.random.default_rng(seed).normal(0, SIGMA, clean.shape)
    return noisy.astype(dtype)


@pytest.mark.parametrize("model", sorted(REGISTRY))
@pytest.mark.parametrize("outside", [FILL, 0.0, np.nan, -9999.0])
def test_what_lies_outside_comes_back_and_has_no_say_in_what_lies_inside(model, outside):
    noisy = np.where(INSIDE, phantom(), np.float32(outside))
    result = denoise(noisy, model=model, noise_sigma=SIGMA)
    np.testing.assert_array_equal(result[~INSIDE], noisy[~INSIDE])
    other = np.ma.masked_array(phantom(1), ~INSIDE)
    other.data[INSIDE] = noisy[INSIDE]
    masked = denoise(other, model=model, noise_sigma=SIGMA)
    np.testing.assert_allclose(result[INSIDE], masked.data[INSIDE], rtol=0, atol=1e-4)
    assert result[INSIDE].mean(dtype="f8") == pytest.approx(noisy[INSIDE].mean(dtype="f8"))
    assert np.ptp(result[INSIDE]) < np.ptp(noisy[INSIDE])


@settings(max_examples=15)
@given(
    seed=st.integers(0, 999),
    part=st.floats(0.0, 0.9),
    model=st.sampled_from(["perona-malik", "conductance-unet-s", "foe-splines", "unet"]),
    tau=st.floats(0.01, 20),
)
def test_guarantees_hold_for_the_pixels_that_take_part(seed, part, model, tau):
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 50, (24, 31))
    mask = rng.random(image.shape) < part
    result = denoise(
        np.ma.masked_array(image, mask), model=model, noise_sigma=20, tau=tau, iterations=3
    )
    inside = ~mask
    np.testing.assert_array_equal(result.data[mask], image[mask])
    assert result.data[inside].mean() == pytest.approx(image[inside].mean(), abs=1e-3)
    assert result.data[inside].min() >= image[inside].min()
    assert result.data[inside].max() <= image[inside].max()
    assert np.square(result.data[inside]).sum() <= np.square(image[inside]).sum() * (1 + 1e-6)


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4", "f8"])
def test_masked_arrays_keep_their_mask_and_what_lies_under_it(dtype):
    image = np.ma.masked_array(phantom(dtype=dtype)[None].repeat(2, 0), [X > 60, Y < 9])
    image.data[0, :, 70:] = 77
    image.set_fill_value(5)
    result = denoise(image, noise_sigma=SIGMA, model="perona-malik")
    assert isinstance(result, np.ma.MaskedArray)
    assert result.dtype == image.dtype
    assert result.fill_value == 5
    np.testing.assert_array_equal(result.mask, image.mask)
    np.testing.assert_array_equal(result.data[image.mask], image.data[image.mask])
    assert result.mean() == pytest.approx(image.mean(), rel=1e-3)
    assert np.isnan(diffusivity(image, noise_sigma=SIGMA)[image.mask]).all()


def test_the_noise_is_estimated_without_masked_pixels():
    image = np.ma.masked_array(phantom(), X > 50)
    image.data[:, 51:] += np.random.default_rng(3).normal(0, 100, (72, 29))
    found = prepare(image, DiffusionConfig(noise_kind="gaussian")).noise
    assert found.noise_sigma == pytest.approx(SIGMA, rel=0.15)
    assert denoise(image).mask.sum() == image.mask.sum()


def test_a_masked_array_where_nothing_is_masked_is_denoised_like_any_other():
    result = denoise(np.ma.masked_array(phantom()), noise_sigma=SIGMA)
    np.testing.assert_array_equal(result.data, denoise(phantom(), noise_sigma=SIGMA))


def test_lazy_masked_arrays_stay_masked():
    image = np.ma.masked_array(phantom()[None].repeat(3, 0), (X > 60)[None].repeat(3, 0))
    lazy = denoise(da.from_array(image, chunks=(1, 72, 80)), noise_sigma=SIGMA)
    result = lazy.compute()
    np.testing.assert_array_equal(np.ma.getmaskarray(result), image.mask)
    np.testing.assert_array_equal(result.data, denoise(image, noise_sigma=SIGMA).data)


def test_slices_that_are_all_missing_are_passed_through():
    stack = np.stack([np.full((72, 80), FILL, np.float32), phantom(), phantom(1) * 4])
    masked = np.ma.masked_array(stack, np.zeros(stack.shape, np.bool_))
    masked[0] = np.ma.masked
    for image in (stack, masked, da.from_array(stack, chunks=(1, 72, 80))):
        result = np.asarray(denoise(image, noise_scope="slice"))
        np.testing.assert_array_equal(result[0], stack[0])
        assert result[1].std() < stack[1].std()


def test_an_image_of_fill_values_only_is_refused():
    with pytest.raises(InvalidImageError, match="fill value"):
        denoise(np.full((9, 9), FILL, np.float32))
    with pytest.raises(InvalidImageError, match="masked"):
        denoise(np.ma.masked_all((9, 9)))


def test_the_noise_of_the_rest_is_estimated_where_much_is_missing():
    image = np.where(X < 60, np.float32(FILL), phantom())
    assert prepare(image, DiffusionConfig(noise_kind="gaussian")).noise.noise_sigma == (
        pytest.approx(SIGMA, rel=0.25)
    )


def test_the_report_tells_of_each_kind_with_number_and_value():
    image = phantom()
    image[:, :10] = FILL
    image[:, 70:] = 0
    image[0, 20:23] = np.nan
    image[5, 30] = 123.5
    done = run(denoise_stack(image, CLASSICAL.with_(missing=(123.5,))))
    messages = " ".join(done.report.messages)
    for words in ("720 pixels of the value -3.40282347e+38", "720 pixels in areas of exactly 0"):
        assert words in messages
    assert "3 NaN or infinite pixels" in messages
    assert "1 missing by declaration pixels" in messages
    assert done.report.masked_pixels == 720 + 720 + 3 + 1
    assert done.report.range_kept


def test_declared_values_hold_for_maps_and_inspection():
    image = phantom()
    image[20:30, 20:30] = 140.25
    config = CLASSICAL.with_(missing=140.25)
    done = run(denoise_stack(image, config, maps=MapsConfig(diffusivity=True)))
    assert np.isnan(done.diffusivity[20:30, 20:30]).all()
    found = run(inspect_plane(image, config))
    np.testing.assert_array_equal(found.denoised[-1][20:30, 20:30], 140.25)
    assert np.isnan(found.flux[-1]).sum() == 100
    np.testing.assert_allclose(found.denoised[-1], done.image, rtol=1e-5)


def test_missing_values_are_part_of_the_settings_in_python_and_not_in_the_shell():
    config = DiffusionConfig(missing=[-1, 0.5])
    assert config.missing == (-1.0, 0.5)
    assert "missing=(-1.0, 0.5)" in as_python(config)
    assert "missing" not in as_shell(config)
    assert config.also_missing((0.5, 3.0)).missing == (-1.0, 0.5, 3.0)
    with pytest.raises(InvalidSettingError, match="must be numbers"):
        DiffusionConfig(missing="none")


def test_where_nothing_flows_even_the_last_digit_stays():
    # Through the solver's numbers and back, zeros would become 3e-6.
    image = phantom()
    image[:, 60:] = 0.1
    result = denoise(image, noise_sigma=1e-3, iterations=1, model="conductance-unet-s")
    np.testing.assert_array_equal(result[:, 70:], image[:, 70:])
