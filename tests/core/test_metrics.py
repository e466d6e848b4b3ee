"""PSNR, SSIM and the affine fit, against their definitions and against hand-made cases."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from napari_learned_diffusion.core import metrics
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.metrics import SSIM_MIN_PIXELS, affine_fit, psnr, ssim

Image = NDArray[np.float64]


@pytest.fixture
def pair() -> tuple[Image, Image]:
    rng = np.random.default_rng(0)
    reference = 127 + 100 * np.sin(np.arange(48)[:, None] / 7) * np.cos(np.arange(40) / 5)
    return reference + rng.normal(0, 20, reference.shape), reference


def literal_ssim(u: Image, r: Image, data_range: float) -> float:
    """Wang's formula, written out, over the pixels that the 11 x 11 window fits into."""

    def mean(x: Image) -> Image:
        radius = SSIM_MIN_PIXELS // 2
        smoothed = gaussian_filter(x, 1.5, radius=radius)
        return smoothed[radius:-radius, radius:-radius]

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mu, mr = mean(u), mean(r)
    vu, vr, vur = mean(u * u) - mu * mu, mean(r * r) - mr * mr, mean(u * r) - mu * mr
    similarity = (2 * mu * mr + c1) * (2 * vur + c2) / ((mu**2 + mr**2 + c1) * (vu + vr + c2))
    return float(similarity.mean())


def test_psnr_of_a_known_error() -> None:
    reference = np.zeros((8, 8))
    assert psnr(reference + 25.5, reference, data_range=255) == pytest.approx(20.0)


def test_psnr_of_noise_is_that_of_its_standard_deviation() -> None:
    """The input figures of the quality benchmark: 24.61, 20.17 and 14.15 dB."""
    noise = np.random.default_rng(1).normal(size=(512, 512))
    for noise_sigma, expected in ((15, 24.61), (25, 20.17), (50, 14.15)):
        assert psnr(100 + noise_sigma * noise, np.full_like(noise, 100), data_range=255) == (
            pytest.approx(expected, abs=0.03)
        )


def test_equal_images_are_perfect(pair: tuple[Image, Image]) -> None:
    _, reference = pair
    assert psnr(reference, reference, data_range=255) == math.inf
    assert ssim(reference, reference, data_range=255) == pytest.approx(1)


def test_ssim_is_wangs(pair: tuple[Image, Image]) -> None:
    image, reference = pair
    expected = literal_ssim(image, reference, 255)
    assert ssim(image, reference, data_range=255) == pytest.approx(expected, rel=1e-9)


def test_bytes_do_not_wrap_around() -> None:
    dark, bright = np.full((16, 16), 0, np.uint8), np.full((16, 16), 255, np.uint8)
    assert psnr(dark, bright, data_range=255) == pytest.approx(0)
    assert ssim(dark, bright, data_range=255) < 0.01
    assert affine_fit(dark, bright) == pytest.approx(255)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_scaling_both_and_the_range_changes_nothing(
    metric: Callable[..., float], pair: tuple[Image, Image]
) -> None:
    image, reference = pair
    expected = metric(image, reference, data_range=255)
    assert metric(image / 8, reference / 8, data_range=255 / 8) == pytest.approx(expected)


def test_the_range_is_required(pair: tuple[Image, Image]) -> None:
    for metric in (psnr, ssim):
        with pytest.raises(TypeError, match="data_range"):
            metric(*pair)  # type: ignore[call-arg]


@given(
    values=arrays(np.float64, (5, 7), elements=st.floats(-1e3, 1e3)),
    scale=st.floats(0.01, 100),
    shift=st.floats(-1e3, 1e3),
)
def test_the_fit_undoes_any_scale_and_shift(values: Image, scale: float, shift: float) -> None:
    assume(np.ptp(values) > 1e-3)
    fitted = affine_fit(scale * values + shift, values)
    np.testing.assert_allclose(fitted, values, atol=1e-5 * np.abs(values).max())


def test_the_fit_is_the_best_one(pair: tuple[Image, Image]) -> None:
    image, reference = pair
    fitted = affine_fit(image, reference)
    a, b = np.polyfit(image.ravel(), reference.ravel(), 1)
    np.testing.assert_allclose(fitted, a * image + b)
    assert psnr(fitted, reference, data_range=255) > psnr(image, reference, data_range=255)


def test_a_constant_image_becomes_the_mean_of_the_reference(pair: tuple[Image, Image]) -> None:
    _, reference = pair
    fitted = affine_fit(np.full_like(reference, 3), reference)
    np.testing.assert_allclose(fitted, reference.mean())


@pytest.mark.parametrize(
    "measure",
    [
        lambda u, r: psnr(u, r, data_range=1.0),
        lambda u, r: ssim(u, r, data_range=1.0),
        affine_fit,
    ],
    ids=["psnr", "ssim", "affine_fit"],
)
class TestBadInput:
    def test_shapes_that_differ(self, measure: Callable[..., object]) -> None:
        with pytest.raises(InvalidImageError, match=r"\(16, 16\) and \(16, 1\)"):
            measure(np.zeros((16, 16)), np.zeros((16, 1)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_pixels_that_are_not_finite(self, measure: Callable[..., object], bad: float) -> None:
        image = np.zeros((16, 16))
        image[3, 4] = bad
        with pytest.raises(InvalidImageError, match="The image has pixels that are NaN"):
            measure(image, np.zeros((16, 16)))
        with pytest.raises(InvalidImageError, match="The reference has pixels that are NaN"):
            measure(np.zeros((16, 16)), image)

    def test_no_pixels(self, measure: Callable[..., object]) -> None:
        with pytest.raises(InvalidImageError, match="no pixels"):
            measure(np.zeros((0, 16)), np.zeros((0, 16)))

    def test_complex_numbers(self, measure: Callable[..., object]) -> None:
        with pytest.raises(InvalidImageError, match="complex"):
            measure(np.zeros((16, 16), complex), np.zeros((16, 16)))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("data_range", [0, -1, math.nan, math.inf])
def test_a_range_that_is_none(metric: Callable[..., float], data_range: float) -> None:
    with pytest.raises(InvalidSettingError, match="data range"):
        metric(np.zeros((16, 16)), np.zeros((16, 16)), data_range=data_range)


@pytest.mark.parametrize("shape", [(10, 40), (3, 16, 16), (16,)])
def test_ssim_of_what_is_no_slice(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImageError, match="at least 11 x 11"):
        ssim(np.zeros(shape), np.zeros(shape), data_range=1)


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(metrics, extraglobs={"np": np}).failed == 0


def test_importing_it_imports_no_scikit_image() -> None:
    code = (
        "import sys; import napari_learned_diffusion.core.metrics; "
        "assert not {'skimage', 'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
