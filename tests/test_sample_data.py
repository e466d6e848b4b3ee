"""The samples are what they say: their noise, their units, their physics; and napari takes them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import pint
import pytest

from napari_learned_diffusion import sample_data
from napari_learned_diffusion.core.noise import PoissonGaussian, noise_model_from_dict
from napari_learned_diffusion.sample_data import Sample

MAKERS = ("low_dose_ct", "brain_mri", "cryo_em", "fluorescence")


@cache
def sample_of(name: str) -> Sample:
    """Each takes seconds to draw, and no test changes one."""
    make: Callable[[], Sample] = getattr(sample_data, name)
    return make()


@pytest.fixture(params=MAKERS)
def sample(request: pytest.FixtureRequest) -> Sample:
    return sample_of(request.param)


def test_shape_and_types(sample: Sample) -> None:
    assert sample.noisy.shape == sample.reference.shape == (16, 256, 256)
    assert sample.reference.dtype == np.float32
    assert np.isfinite(sample.noisy).all()
    assert np.isfinite(sample.reference).all()


def test_physical_size(sample: Sample) -> None:
    quantity = pint.UnitRegistry()
    for unit in sample.units:
        assert quantity(unit).check("[length]")
    assert all(size > 0 for size in sample.scale)
    assert sample.axis_labels == ("z", "y", "x")


def test_contrast_limits_show_most_of_the_reference(sample: Sample) -> None:
    low, high = sample.contrast_limits
    shown = (sample.reference >= low) & (sample.reference <= high)
    assert shown[sample.reference > sample.reference.min() * 0.95].mean() > 0.9


def test_slices_differ(sample: Sample) -> None:
    changes = np.abs(np.diff(sample.reference, axis=0)).max(axis=(1, 2))
    assert (changes > 0.2 * sample.reference.std()).all()


@pytest.mark.parametrize("name", ["cryo_em", "fluorescence"])
def test_stabilised_noise_has_standard_deviation_one(name: str) -> None:
    sample = sample_of(name)
    reference = sample.reference.astype(np.float64)
    difference = sample.noisy - reference
    deviation = difference / np.sqrt(sample.noise.variance(reference))
    assert np.mean(deviation) == pytest.approx(0, abs=0.01)
    assert np.std(deviation) == pytest.approx(1, abs=0.01)


def test_fluorescence_noise_grows_with_the_light() -> None:
    sample = sample_of("fluorescence")
    assert isinstance(sample.noise, PoissonGaussian)
    dark, bright = (
        np.std((sample.noisy - sample.reference)[mask])
        for mask in (sample.reference < 104, sample.reference > 160)
    )
    assert bright > 2 * dark


def test_mri_noise_is_rician() -> None:
    sample = sample_of("brain_mri")
    noise_sigma = 60.0
    air = sample.noisy[sample.reference == 0]
    # The magnitude of two Gaussian channels without signal is Rayleigh distributed.
    assert air.mean() == pytest.approx(noise_sigma * np.sqrt(np.pi / 2), rel=0.01)
    bright = sample.reference > 8 * noise_sigma
    assert np.std((sample.noisy - sample.reference)[bright]) == pytest.approx(noise_sigma, rel=0.02)


def test_ct_is_in_hounsfield_units() -> None:
    reference = sample_of("low_dose_ct").reference
    middle = reference[8]
    assert middle[8:28, 60:200].mean() == pytest.approx(-1000, abs=15)  # air above the patient
    assert np.median(middle[(middle > -950) & (middle < -600)]) == pytest.approx(-820, abs=30)
    assert np.median(middle[(middle > 0) & (middle < 100)]) == pytest.approx(50, abs=15)
    assert 500 < middle.max() < 1500  # bone


def test_ct_noise_is_strongest_inside_and_correlated() -> None:
    sample = sample_of("low_dose_ct")
    difference = sample.noisy - sample.reference
    heart, air = difference[:, 85:110, 125:150], difference[:, :20, :20]
    assert heart.std() > 2 * air.std()
    neighbours = np.corrcoef(heart[..., 1:].ravel(), heart[..., :-1].ravel())[0, 1]
    assert neighbours > 0.2


@pytest.mark.parametrize("name", ["brain_mri", "cryo_em", "fluorescence"])
def test_a_seed_gives_the_same_stack_again(name: str) -> None:
    make: Callable[[int], Sample] = getattr(sample_data, name)
    np.testing.assert_array_equal(make(0).noisy, sample_of(name).noisy)
    assert not np.array_equal(make(1).noisy, sample_of(name).noisy)


def test_ct_line_integral_of_a_disc() -> None:
    radius = 40.0
    disc = sample_data._Ellipse(12.0, -7.0, radius, radius)
    sinogram = sample_data._sinogram([(1000.0, (disc,))])
    # Whatever the angle, the longest ray crosses the diameter and all rays together the area.
    attenuation = sample_data.WATER_ATTENUATION
    np.testing.assert_allclose(sinogram.max(axis=1), 2 * radius * attenuation, rtol=2e-3)
    area = sinogram.sum(axis=1) * sample_data.CT_PIXEL
    np.testing.assert_allclose(area, np.pi * radius**2 * attenuation, rtol=2e-3)


@pytest.mark.parametrize("axes", [(30.0, 12.0), (20.0, 7.0), (4.5, 2.0)])
def test_ct_back_projection_recovers_an_ellipse(axes: tuple[float, float]) -> None:
    """Of each class of size: a ray of its own for every part, or only the rays that meet it."""
    ellipse = sample_data._Ellipse(20.0, -35.0, *axes, 0.4)
    (slice_,) = sample_data._back_project(sample_data._sinogram([(1000.0, (ellipse,))])[None])
    pixel = sample_data.CT_PIXEL
    mass = slice_.sum(dtype=np.float64) * pixel**2 / sample_data.WATER_ATTENUATION
    assert mass == pytest.approx(np.pi * axes[0] * axes[1], rel=0.03)
    row, column = np.unravel_index(slice_.argmax(), slice_.shape)
    x, y = (np.array([column, row]) - 127.5) * pixel
    assert ellipse.contains(x, y)


@pytest.mark.parametrize("name", MAKERS)
def test_napari_layer_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from napari.layers import Layer

    sample = sample_of(name)
    monkeypatch.setattr(sample_data, name, lambda: sample)
    ((data, keywords, layer_type),) = getattr(sample_data, f"open_{name}")()
    assert layer_type == "image"
    layer = Layer.create(data, keywords, layer_type)
    np.testing.assert_allclose(layer.scale, sample.scale)
    assert tuple(str(unit) for unit in layer.units) == sample.units
    assert tuple(layer.contrast_limits) == sample.contrast_limits
    assert noise_model_from_dict(layer.metadata["noise"]) == sample.noise
    np.testing.assert_array_equal(layer.metadata["reference"], sample.reference)
    assert layer.metadata["description"]
    assert layer.metadata["intensity_unit"] == sample.intensity_unit


def test_needs_neither_torch_nor_napari() -> None:
    code = (
        "import sys; import napari_learned_diffusion.sample_data as s; s.fluorescence();"
        "print(sorted({'torch', 'napari', 'qtpy', 'PyQt6', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
