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
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
    noise_model_from_dict,
)

MODELS = [
    Gaussian(12.5),
    PoissonGaussian(2.0, 30.0),
    PoissonGaussian(0.4, -25.0),
    Rician(12.5),
    Rician(10.0, pedestal=-40.0),
    Correlated(12.5, 0.8),
]
scales = st.floats(1e-3, 1e3)
shifts = st.floats(-1e3, 1e3)


def ids(model: NoiseModel) -> str:
    return model.describe()


def test_every_registered_model_is_tested():
    assert {type(m) for m in MODELS} == set(NOISE_MODELS.values())


@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_add_has_the_stated_variance(model):
    clean = np.array([100.0, 400.0, 2000.0])[:, None] * np.ones(200_000)
    noise = model.add(clean, np.random.default_rng(0)) - model.mean(clean)
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


@pytest.mark.parametrize("signal_to_noise", [0, 0.5, 1, 1.5, 2, 3, 5, 10, 30])
@pytest.mark.parametrize("pedestal", [0.0, -300.0])
def test_stabilised_magnitudes_have_unit_variance_with_and_without_signal(
    signal_to_noise, pedestal
):
    model = Rician(20.0, pedestal)
    clean = np.full(200_000, pedestal + 20.0 * signal_to_noise)
    noisy = model.add(clean, np.random.default_rng(3))
    assert noisy.min() >= pedestal
    assert model.stabilise(noisy).std() == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("signal_to_noise", [0, 0.3, 1, 2, 4, 20])
def test_mean_and_variance_of_magnitudes(signal_to_noise):
    stats = pytest.importorskip("scipy.stats")
    model = Rician(3.0, pedestal=50.0)
    expected = stats.rice(signal_to_noise, scale=3.0)
    signal = np.array([50 + 3.0 * signal_to_noise])
    assert model.mean(signal)[0] == pytest.approx(50 + expected.mean(), rel=1e-3)
    assert model.variance(signal)[0] == pytest.approx(expected.var(), rel=1e-3)


def test_magnitudes_have_no_signal_below_the_pedestal():
    model = Rician(2.0, pedestal=10.0)
    dark = np.array([-1e6, 0.0, 10.0])
    assert np.ptp(model.variance(dark)) == np.ptp(model.mean(dark)) == 0
    assert (np.diff(model.stabilise(dark)) > 0).all()


@pytest.mark.parametrize("correlation_length", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(512, 400), (3, 300, 301)])
def test_correlated_noise_has_the_level_and_the_correlation_stated(correlation_length, shape):
    model = Correlated(7.0, correlation_length)
    noise = model.add(np.zeros(shape), np.random.default_rng(4))
    assert noise.std() == pytest.approx(7, rel=0.02)
    for axis in (-1, -2):
        neighbours = np.mean(noise * np.roll(noise, 2, axis)) / noise.var()
        expected = np.exp(-1 / correlation_length**2) if correlation_length else 0
        assert neighbours == pytest.approx(expected, abs=0.03)
    if len(shape) == 3:
        assert abs(np.mean(noise[0] * noise[1])) < 0.05 * 49


@pytest.mark.parametrize("shape", [(), (1,), (50_000,), (1, 1), (1, 50_000)])
def test_correlated_noise_of_any_shape(shape):
    noise = Correlated(2.0, 1.0).add(np.zeros(shape), np.random.default_rng(5))
    assert noise.shape == shape
    assert noise.size < 100 or noise.std() == pytest.approx(2, rel=0.03)


@given(intensity=st.floats(-1e12, 1e12), step=st.floats(1e-3, 1e6))
@pytest.mark.parametrize("model", MODELS, ids=ids)
def test_stabilise_is_finite_and_increasing_at_all_intensities(model, intensity, step):
    step = max(step, 1e-9 * abs(intensity))
    low, high = model.stabilise(np.array([intensity, intensity + step]))
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high


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
        lambda: Rician(0.0),
        lambda: Rician(-1.0),
        lambda: Rician(math.nan),
        lambda: Rician(1.0, math.inf),
        lambda: Correlated(-1.0, 1.0),
        lambda: Correlated(1.0, -0.1),
        lambda: Correlated(1.0, math.inf),
    ],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(InvalidSettingError):
        wrong()


def test_only_a_level_of_zero_is_no_noise():
    assert Gaussian(0.0).is_zero
    assert not Gaussian(1e-9).is_zero
    assert not PoissonGaussian(1e-9, 0.0).is_zero
    assert not Rician(1e-9).is_zero
    assert Correlated(0.0).is_zero
    assert not Correlated(1e-9).is_zero


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
    assert Rician(3.0).describe("a.u.") == "Rician, noise level 3 a.u."
    assert Rician(3.0, 100.0).describe("counts") == (
        "Rician, noise level 3 counts, pedestal 100 counts"
    )
    assert Correlated(12.5, 0.8).describe("HU") == (
        "Correlated, standard deviation 12.5 HU, correlation length 0.8 px"
    )
    assert not Gaussian(1.0).describe().endswith(" ")
