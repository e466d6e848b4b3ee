"""Each measure against its definition and against hand-made cases."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage
from scipy.ndimage import gaussian_filter

from napari_learned_diffusion.core import metrics
from napari_learned_diffusion.core.errors import (
    InvalidImageError,
    InvalidSettingError,
    MissingDependencyError,
)
from napari_learned_diffusion.core.metrics import (
    LPIPS_MIN_PIXELS,
    SSIM_MIN_PIXELS,
    affine_fit,
    anisotropic_share,
    anisotropy_threshold,
    autocorrelation,
    largest_autocorrelation,
    lpips,
    lpips_missing,
    psnr,
    ssim,
    white_noise_autocorrelation,
    zhu_milanfar_q,
)

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


# --- without a reference ----------------------------------------------------------------------


def edges(size: int = 128) -> Image:
    """Discs on a ramp: flat areas, edges of every direction, corners of none."""
    y, x = np.mgrid[:size, :size] - size / 2
    return 60 + 0.3 * x + 80 * (np.hypot(x, y) < size / 3) - 50 * (np.hypot(x + 9, y) < size / 6)


def literal_q(u: Image, significance: float = 0.001, size: int = 8) -> float:
    """Zhu and Milanfar's definition, patch by patch."""
    root = significance ** (1 / (size**2 - 1))
    tau = math.sqrt((1 - root) / (1 + root))
    total, count = 0.0, 0
    for top in range(0, u.shape[0] - size + 1, size):
        for left in range(0, u.shape[1] - size + 1, size):
            gy, gx = np.gradient(u[top : top + size, left : left + size])
            s1, s2 = np.linalg.svd(np.column_stack([gx.ravel(), gy.ravel()]), compute_uv=False)
            coherence = (s1 - s2) / (s1 + s2) if s1 > 0 else 0.0
            total += s1 * coherence if coherence > tau else 0.0
            count += 1
    return total / count


class TestThreshold:
    def test_by_hand(self) -> None:
        assert anisotropy_threshold(2, 0.6) == pytest.approx(0.5)  # sqrt(0.4 / 1.6)
        assert anisotropy_threshold(4, 0.008) == pytest.approx(math.sqrt(0.8 / 1.2))

    def test_stricter_and_smaller_patches_need_more(self) -> None:
        assert anisotropy_threshold(64, 0.0001) > anisotropy_threshold(64, 0.001)
        assert anisotropy_threshold(16, 0.001) > anisotropy_threshold(64, 0.001)

    def test_noise_passes_as_often_as_it_says(self) -> None:
        patches = np.random.default_rng(2).normal(size=(2000, 8, 8))
        passed = sum(zhu_milanfar_q(patch, significance=0.05) > 0 for patch in patches)
        assert 70 < passed < 130  # 100, give or take 10

    @pytest.mark.parametrize(
        ("pixels", "significance"), [(1, 0.1), (64, 0), (64, 1), (64, math.nan)]
    )
    def test_refuses(self, pixels: int, significance: float) -> None:
        with pytest.raises(InvalidSettingError):
            anisotropy_threshold(pixels, significance)


class TestQ:
    def test_of_a_patch_by_hand(self) -> None:
        """Gradients (0, 0), (0, a), (a, 0), (a, a): squared singular values 3 a² and a²."""
        corner = np.array([[0.0, 0.0], [0.0, 7.0]])
        root3 = math.sqrt(3)
        expected = 7 * root3 * (root3 - 1) / (root3 + 1)
        assert zhu_milanfar_q(corner, patch_size=2, significance=0.9) == pytest.approx(expected)
        assert zhu_milanfar_q(corner, patch_size=2) == 0  # R = 0.27 is below the threshold of 0.90

    def test_patches_without_structure_count_in_the_mean(self) -> None:
        ramp = np.zeros((8, 16))
        ramp[:, :8] = 3 * np.arange(8)
        assert zhu_milanfar_q(ramp) == pytest.approx(24 / 2)

    @pytest.mark.parametrize("significance", [0.001, 0.1])
    def test_is_the_literal_definition(self, significance: float) -> None:
        noisy = edges() + np.random.default_rng(3).normal(0, 10, (128, 128))
        assert zhu_milanfar_q(noisy, significance=significance) == pytest.approx(
            literal_q(noisy, significance)
        )

    def test_what_is_left_over_does_not_count(self) -> None:
        image = edges(64)
        wider = np.pad(image, ((0, 7), (0, 3)), constant_values=1e4)
        assert zhu_milanfar_q(wider) == zhu_milanfar_q(image)

    def test_noise_and_blur_lower_it(self) -> None:
        noise = np.random.default_rng(4).normal(size=(128, 128))
        noisy = [zhu_milanfar_q(edges() + s * noise) for s in (0, 25, 100)]
        blurred = [zhu_milanfar_q(gaussian_filter(edges(), s)) for s in (1, 2, 4)]
        assert noisy == sorted(noisy, reverse=True)
        assert blurred == sorted(blurred, reverse=True)

    @given(scale=st.floats(0.01, 100), shift=st.floats(-1e3, 1e3))
    def test_scales_with_the_image_and_forgets_the_brightness(
        self, scale: float, shift: float
    ) -> None:
        image = edges(64)
        assert zhu_milanfar_q(scale * image + shift) == pytest.approx(scale * zhu_milanfar_q(image))


class TestAnisotropicShare:
    def test_is_that_of_the_whole_filter(self) -> None:
        """The filter taken apart into rows and columns is OpenCV's Sobel of 5 x 5."""
        noisy = edges() + np.random.default_rng(5).normal(0, 30, (128, 128))
        kernel = np.outer([1, 4, 6, 4, 1], [-1, -2, 0, 2, 1])
        gx, gy = (ndimage.correlate(noisy, k, mode="mirror") for k in (kernel, kernel.T))
        passed = []
        for top, left in np.ndindex(16, 16):
            part = np.s_[8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
            matrix = np.column_stack([gx[part].ravel(), gy[part].ravel()])
            s1, s2 = np.linalg.svd(matrix, compute_uv=False)
            passed.append((s1 - s2) / (s1 + s2) > anisotropy_threshold(64))
        assert anisotropic_share(noisy) == pytest.approx(100 * np.mean(passed))
        assert 10 < anisotropic_share(noisy) < 90

    def test_pure_noise_passes_seldom(self) -> None:
        noise = np.random.default_rng(6).normal(size=(512, 512))
        assert 5 < anisotropic_share(noise) < 11

    @given(scale=st.floats(0.01, 100), shift=st.floats(-1e3, 1e3))
    def test_scaling_changes_nothing(self, scale: float, shift: float) -> None:
        noisy = edges(64) + np.random.default_rng(7).normal(0, 20, (64, 64))
        assert anisotropic_share(scale * noisy + shift) == anisotropic_share(noisy)


@pytest.mark.parametrize("measure", [zhu_milanfar_q, anisotropic_share])
class TestWithoutReference:
    @pytest.mark.parametrize("value", [0, 0.1, -1e6])
    def test_a_constant_shows_nothing(self, measure: Callable[..., float], value: float) -> None:
        assert measure(np.full((24, 24), value)) == 0

    def test_rounding_is_no_structure(self, measure: Callable[..., float]) -> None:
        one = np.full((24, 24), 0.1)
        one[::2] = np.nextafter(0.1, 1)
        assert measure(one) == 0

    def test_turning_changes_nothing(self, measure: Callable[..., float]) -> None:
        noisy = edges(64) + np.random.default_rng(8).normal(0, 10, (64, 64))
        for turned in (noisy.T, np.rot90(noisy), noisy[::-1]):
            assert measure(turned) == pytest.approx(measure(noisy))

    def test_bytes_do_not_wrap_around(self, measure: Callable[..., float]) -> None:
        image = np.clip(edges(), 0, 255).astype(np.uint8)
        assert measure(image) == pytest.approx(measure(image.astype(float)))
        assert measure(image) > 0

    @pytest.mark.parametrize("shape", [(7, 40), (2, 16, 16), (64,), (0, 8)])
    def test_what_is_no_slice(self, measure: Callable[..., float], shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidImageError):
            measure(np.zeros(shape))

    def test_values_that_are_not_finite(self, measure: Callable[..., float]) -> None:
        with pytest.raises(InvalidImageError, match="NaN"):
            measure(np.full((16, 16), np.nan))

    @pytest.mark.parametrize("wrong", [{"patch_size": 1}, {"significance": 2.0}])
    def test_settings(self, measure: Callable[..., float], wrong: dict[str, float]) -> None:
        with pytest.raises(InvalidSettingError):
            measure(np.zeros((16, 16)), **wrong)


# --- LPIPS ------------------------------------------------------------------------------------


def no_module(name: str) -> None:
    return None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[torch.Tensor]]:
    """A package in the place of lpips that keeps what it is given: no figure comes of it."""
    given_to_it: list[torch.Tensor] = []

    class Network(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("alex", False)

        def forward(self, u: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            given_to_it[:] = [u, r]
            return (u - r).abs().mean().view(1, 1, 1, 1)

    package = ModuleType("lpips")
    package.LPIPS = Network  # type: ignore[attr-defined]
    weights = tmp_path / "alexnet.pth"
    weights.touch()
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(metrics, "find_spec", lambda name: package)
    monkeypatch.setattr(metrics, "_alexnet_weights", lambda: weights)
    metrics._lpips_network.cache_clear()
    yield given_to_it
    metrics._lpips_network.cache_clear()


class TestLpips:
    def test_without_the_package_it_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "find_spec", no_module)
        image = np.zeros((64, 64))
        with pytest.raises(MissingDependencyError, match=r"napari-learned-diffusion\[metrics\]"):
            lpips(image, image, data_range=255)

    def test_without_the_weights_it_says_how_to_get_them(
        self, stand_in: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(metrics, "_alexnet_weights", lambda: tmp_path / "missing.pth")
        assert "Download" in (lpips_missing() or "")
        with pytest.raises(MissingDependencyError, match=r"missing\.pth"):
            lpips(np.zeros((64, 64)), np.zeros((64, 64)), data_range=255)
        assert stand_in == []

    def test_hands_on_three_channels_from_minus_one_to_one(
        self, stand_in: list[torch.Tensor]
    ) -> None:
        assert lpips_missing() is None
        white, black = np.full((64, 65), 255, np.uint8), np.zeros((64, 65), np.uint8)
        assert lpips(white, black, data_range=255) == pytest.approx(2)
        assert [tuple(x.shape) for x in stand_in] == [(1, 3, 64, 65)] * 2
        assert [(x.min().item(), x.max().item()) for x in stand_in] == [(1, 1), (-1, -1)]

    def test_small_images(self) -> None:
        small = np.zeros((LPIPS_MIN_PIXELS - 1, 99))
        with pytest.raises(InvalidImageError, match="at least 64 x 64"):
            lpips(small, small, data_range=1)

    @pytest.mark.skipif(lpips_missing() is not None, reason="lpips or its weights are absent")
    def test_the_real_one(self, pair: tuple[Image, Image]) -> None:
        image, reference = (np.clip(np.tile(x, (2, 2)), 0, 255) for x in pair)
        assert lpips(reference, reference, data_range=255) == pytest.approx(0, abs=1e-6)
        assert lpips(image, reference, data_range=255) > 0.05


def test_the_examples_of_the_docstrings() -> None:
    assert doctest.testmod(metrics, extraglobs={"np": np}).failed == 0


def test_importing_it_imports_no_scikit_image() -> None:
    code = (
        "import sys; import napari_learned_diffusion.core.metrics; "
        "assert not {'skimage', 'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestAutocorrelation:
    def test_of_white_noise_is_as_small_as_predicted(self) -> None:
        expected = white_noise_autocorrelation(64 * 80)
        rng = np.random.default_rng(0)
        found = [
            largest_autocorrelation(autocorrelation(rng.normal(size=(64, 80)))) for _ in range(40)
        ]
        assert np.median(found) == pytest.approx(expected, rel=0.1)

    def test_of_smoothed_noise_is_that_of_the_filter(self) -> None:
        noise = np.random.default_rng(0).normal(size=(200, 201))
        found = autocorrelation((noise[:, 1:] + noise[:, :-1]) / 2, reach=2)
        np.testing.assert_allclose(found[2], [0, 0.5, 1, 0.5, 0], atol=0.03)
        np.testing.assert_array_equal(found, found[::-1, ::-1])

    def test_is_the_definition(self) -> None:
        r = np.random.default_rng(1).normal(size=(9, 8))
        r[2, 3] = np.nan
        centred = r - np.nanmean(r)
        found = autocorrelation(r, reach=3)
        for dy, dx in [(0, 1), (2, -3), (3, 3)]:
            pairs = [
                centred[y, x] * centred[y + dy, x + dx]
                for y in range(9 - dy)
                for x in range(max(0, -dx), 8 - max(0, dx))
            ]
            expected = np.nanmean(pairs) / np.nanmean(centred**2)
            assert found[3 + dy, 3 + dx] == pytest.approx(expected)

    def test_of_a_constant_is_nothing(self) -> None:
        found = autocorrelation(np.ones((8, 9)))
        assert largest_autocorrelation(found) == 0
        assert found[5, 5] == 1

    @pytest.mark.parametrize(
        ("residual", "reach", "error"),
        [
            (np.ones((5, 9)), 5, InvalidImageError),
            (np.ones(9), 1, InvalidImageError),
            (np.full((9, 9), np.nan), 1, InvalidImageError),
            (np.ones((9, 9)), 0, InvalidSettingError),
        ],
    )
    def test_refuses_what_it_cannot_do(self, residual: Any, reach: int, error: Any) -> None:
        with pytest.raises(error):
            autocorrelation(residual, reach=reach)
