"""The noise models: variance, stabilising, adding noise, change of units, metadata."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.noise import (
    NOISE_MODELS,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    noise_model_from_dict,
)

MODELS = [Gaussian(12.5), PoissonGaussian(2.0, 30.0), PoissonGaussian(0.4, -25.0)]
scales = st.floats(1e-3, 1e3)
shifts = st.floats(-1e3, 1e3)


def ids(model: NoiseModel) -> str:
    return model.describe()


def test_every_registered_model_is_tested():
    assert {type(m) for m in MODELS} == set(NOISE_MODELS.values())


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_add_has_the_stated_variance(model):
    clean = np.array([100.0, 400.0, 2000.0])[:, None] * np.ones(200_000)
    noise = model.add(clean, np.random.default_rng(0)) - clean
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=0.01 * noise.std())
    np.testing.assert_allclose(noise.var(axis=1), model.variance(clean[:, 0]), rtol=0.02)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, bool])
def test_add_gives_float64_and_leaves_the_image(dtype):
    clean = np.ones((4, 5), dtype=dtype)
    noisy = Gaussian(1.0).add(clean, np.random.default_rng(0))
    assert noisy.dtype == np.float64
    assert noisy.shape == clean.shape
    assert (clean == 1).all()


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_stabilised_noise_has_unit_variance(model):
    clean = np.array([200.0, 500.0, 3000.0])[:, None] * np.ones(100_000)
    stabilised = model.stabilise(model.add(clean, np.random.default_rng(1)))
    np.testing.assert_allclose(stabilised.std(axis=1), 1, rtol=0.03)


@pytest.mark.parametrize("photons", [4, 10, 100])
def test_stabilised_photon_counts_have_unit_variance(photons):
    counts = 7.0 * np.random.default_rng(2).poisson(photons, 200_000)
    assert PoissonGaussian(7.0, 0.0).stabilise(counts).std() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_stabilise_is_strictly_increasing_and_smooth(model):
    intensity = np.linspace(-500, 3000, 20_001)
    slope = np.diff(model.stabilise(intensity)) / np.diff(intensity)
    assert (slope > 0).all()
    # A kink or a jump would change the slope by much from one sample to the next.
    assert np.abs(np.diff(slope)).max() < 0.2 * slope.max()


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_stabilise_is_the_integral_of_one_over_sigma_where_photons_are_many(model):
    intensity = np.linspace(1000, 3000, 2001)
    slope = np.gradient(model.stabilise(intensity), intensity)
    expected = 1 / np.sqrt(model.variance(intensity))
    np.testing.assert_allclose(slope[1:-1], expected[1:-1], rtol=2e-3)


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_stabilise_gives_torch_tensors_for_torch_tensors(model):
    torch = pytest.importorskip("torch")
    values = np.linspace(-100, 500, 61)
    found = model.stabilise(torch.from_numpy(values))
    np.testing.assert_allclose(found.numpy(), model.stabilise(values), rtol=1e-12)
    found = model.variance(torch.from_numpy(values))
    np.testing.assert_allclose(found.numpy(), model.variance(values), rtol=1e-12)


@given(scale=scales, shift=shifts)
@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_change_of_units_commutes_with_variance_and_stabilise(model, scale, shift):
    intensity = np.linspace(100, 900, 9)
    changed = model.transformed(scale, shift)
    same = scale * intensity + shift
    tolerance = 1e-9 * (1 + abs(shift) / scale)
    np.testing.assert_allclose(
        changed.variance(same), scale**2 * model.variance(intensity), rtol=tolerance
    )
    # An offset of the stabilised intensities is immaterial (Gaussian has one, from the shift).
    np.testing.assert_allclose(
        np.diff(changed.stabilise(same)), np.diff(model.stabilise(intensity)), rtol=1e3 * tolerance
    )


def test_variance_is_never_negative():
    assert PoissonGaussian(2.0, -50.0).variance(np.array([0.0, 10.0, 25.0, 30.0])).tolist() == [
        0.0,
        0.0,
        0.0,
        10.0,
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Gaussian(-1.0),
        lambda: Gaussian(math.nan),
        lambda: Gaussian(math.inf),
        lambda: PoissonGaussian(0.0, 1.0),
        lambda: PoissonGaussian(-2.0, 1.0),
        lambda: PoissonGaussian(math.inf, 1.0),
        lambda: PoissonGaussian(1.0, math.nan),
    ],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(InvalidSettingError):
        wrong()


def test_only_gaussian_of_zero_is_zero():
    assert Gaussian(0.0).is_zero
    assert not Gaussian(1e-9).is_zero
    assert not PoissonGaussian(1e-9, 0.0).is_zero


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_metadata_round_trip(model):
    assert noise_model_from_dict(model.to_dict()) == model


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"key": "rayleigh"}, "gaussian"),
        ({}, "gaussian"),
        ({"key": "gaussian"}, "noise_sigma"),
        ({"key": "gaussian", "noise_sigma": 1.0, "gain": 2.0}, "noise_sigma"),
    ],
)
def test_wrong_metadata_is_refused_and_the_remedy_named(metadata, named):
    with pytest.raises(InvalidSettingError, match=named):
        noise_model_from_dict(metadata)


def test_descriptions_carry_the_unit():
    assert Gaussian(12.5).describe("HU") == "Gaussian, standard deviation 12.5 HU"
    assert PoissonGaussian(2.0, 30.0).describe("counts") == (
        "Poisson-Gaussian, gain 2 counts, offset 30 counts²"
    )
    assert not Gaussian(1.0).describe().endswith(" ")
