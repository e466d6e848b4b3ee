"""Simulated acquisitions: the noise is what it is said to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from napari_learned_diffusion.core.learning.acquisitions import (
    LAGS,
    Acquisition,
    Camera,
    Interpolated,
    Kernel,
    Lines,
    Magnitude,
    Micrograph,
    Smoothed,
    Tomography,
    White,
    smooth_field,
)

SIZE = 96
ROW, COLUMN = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
BODY = np.where(ROW**2 + COLUMN**2 < 40**2, 0.0, -1000.0)
BODY[40:56, 20:36] = 500
GREY = 100.0 + 50 * (ROW > 0)
RISING = 1 + np.arange(SIZE) / SIZE + np.zeros((SIZE, 1))

KINDS: dict[str, tuple[Acquisition, np.ndarray]] = {
    "camera": (Camera(gain=2.0, read_noise=3.0, pedestal=10.0), GREY),
    "camera that multiplies electrons": (Camera(gain=2.0, multiplied=True), GREY),
    "camera with few grey levels": (Camera(gain=2.0, read_noise=3.0, grey_step=10.0), GREY),
    "white, with a level by place": (White(8 * RISING), GREY),
    "smoothed": (Smoothed(8.0, (0.5, 1.2)), GREY),
    "interpolated and rotated": (Interpolated(8.0, (1.5, 1.3), angle=30), GREY),
    "kernel of a CT": (Kernel(8.0, power=1.0, apodisation=1.0, cut=0.5), GREY),
    "lines along rows": (Lines(8.0, share=0.4), GREY),
    "lines along columns": (Lines(8.0, share=0.4, along="columns"), GREY),
    "micrograph": (Micrograph(8.0, share=0.3), GREY),
    "MRI": (Magnitude(8.0), GREY),
    "MRI, zero-filled ellipse": (Magnitude(8.0, (0.5, 0.7), elliptical=True), GREY * 3),
    "MRI, Hamming, partial Fourier": (Magnitude(8.0, window="hamming", partial=0.7), GREY * 3),
    "MRI, parallel": (Magnitude(8.0, g_factor=RISING), GREY),
    "MRI, real part": (Magnitude(8.0, window="fermi", real=True), GREY),
    "CT, ramp": (Tomography(1e5, "ramp", angles=180), BODY),
    "CT, Hann, small elements": (Tomography(1e5, "hann", element=0.7, angles=180), BODY),
    "CT, cosine, large elements": (Tomography(1e5, "cosine", element=1.4, angles=180), BODY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_level_and_autocorrelation_are_those_of_repeated_acquisitions(kind: str) -> None:
    acquisition, clean = KINDS[kind]
    rng = np.random.default_rng(0)
    repeats = [acquisition.acquire(clean, rng) for _ in range(24)]
    told = repeats[0]
    noise = np.stack([a.noisy for a in repeats])
    noise -= noise.mean(0)
    inside = np.s_[:, 24:-24, 24:-24]  # where a CT's rays all pass the body
    measured = np.sqrt(np.mean(noise[inside] ** 2) * 24 / 23)
    assert measured == pytest.approx(np.sqrt(np.mean(told.noise_sigma[inside[1:]] ** 2)), rel=0.03)
    unit = noise / noise.std(0)
    for (y, x), expected in zip(LAGS, told.autocorrelation, strict=True):
        shifted = np.roll(unit, (-y, -x), axis=(1, 2))
        assert np.mean((unit * shifted)[inside]) == pytest.approx(expected, abs=0.05), (y, x)


# The mean of magnitudes is above the signal; see the test of the background.
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("MRI") or "real" in k])
def test_the_mean_of_repeated_acquisitions_is_the_clean_image(kind: str) -> None:
    acquisition, clean = KINDS[kind]
    rng = np.random.default_rng(1)
    repeats = [acquisition.acquire(clean, rng) for _ in range(24)]
    error = np.mean([a.noisy - a.clean for a in repeats], axis=0)[24:-24, 24:-24]
    sigma = repeats[0].noise_sigma[24:-24, 24:-24]
    assert np.sqrt(np.mean((error / sigma) ** 2)) < 1.3 / np.sqrt(24)


def test_a_camera_without_light_shows_its_pedestal_and_read_out_noise() -> None:
    dark = Camera(gain=2.0, read_noise=3.0, pedestal=100.0).acquire(
        np.zeros((64, 64)), np.random.default_rng(0)
    )
    assert dark.noisy.mean() == pytest.approx(100, abs=0.3)
    assert dark.noise_sigma == pytest.approx(np.full((64, 64), 3.0))


def test_the_background_of_a_magnitude_image_is_rayleigh_noise() -> None:
    air = Magnitude(10.0).acquire(np.zeros((128, 128)), np.random.default_rng(0))
    assert air.noisy.mean() == pytest.approx(10 * np.sqrt(np.pi / 2), rel=0.01)
    assert air.noise_sigma == pytest.approx(np.full((128, 128), 10 * np.sqrt(2 - np.pi / 2)))


def test_zero_filled_k_space_is_empty_outside() -> None:
    noisy = Magnitude(8.0, (0.5, 0.5), real=True).acquire(GREY, np.random.default_rng(0)).noisy
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(noisy)))
    outside = spectrum.copy()
    outside[SIZE // 4 : -SIZE // 4 + 1, SIZE // 4 : -SIZE // 4 + 1] = 0
    assert outside.max() < 1e-9 * spectrum.max()


def test_a_ct_without_noise_shows_the_attenuation_of_the_object() -> None:
    water = np.where(ROW**2 + COLUMN**2 < 40**2, 0.0, -1000.0)
    shown = Tomography(1e5, "hann", angles=360).acquire(water, np.random.default_rng(0)).clean
    assert shown[36:60, 36:60].mean() == pytest.approx(0, abs=5)
    assert shown[:8, 40:56].mean() < -950


def test_fewer_photons_and_longer_paths_make_more_noise_in_a_ct() -> None:
    rng = np.random.default_rng(0)
    scanner = Tomography(1e5, "hann", angles=180)
    many, few = scanner.acquire(BODY, rng), replace(scanner, photons=1e4).acquire(BODY, rng)
    assert few.noise_sigma == pytest.approx(many.noise_sigma * np.sqrt(10), rel=1e-6)
    assert many.noise_sigma[48, 48] > 1.1 * many.noise_sigma[12, 48]


def test_a_smooth_field_has_mean_0_and_standard_deviation_1() -> None:
    field = smooth_field((80, 120), 30, np.random.default_rng(0))
    assert field.shape == (80, 120)
    assert field.mean() == pytest.approx(0, abs=1e-9)
    assert field.std() == pytest.approx(1)
    assert np.abs(np.diff(field, axis=1)).max() < 0.5
