"""The module runs the package's own denoising, whatever program holds it."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from skimage.data import camera

from napari_learned_diffusion import (
    Correlated,
    DenoisingModule,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
    denoise,
)
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.diffusivity.k_automation import TAU, KAutomation
from napari_learned_diffusion.core.errors import (
    InvalidImageError,
    InvalidSettingError,
    UnknownModelError,
)
from napari_learned_diffusion.core.user_models import save_user_model
from napari_learned_diffusion.core.zoo import card, learned_model
from napari_learned_diffusion.jobs import zoo_module

LEARNED = [key for key in REGISTRY if key != "perona-malik"]
NOISE = Gaussian(25.0)
FACTS = {
    "summary": "Small.",
    "noise_range": [5.0, 75.0],
    "suggestion": {"iterations": 2, "tau": 0.2},
    "gain_dB": 0.0,
    "date": "2024-05-01",
    "version": "0.1.0",
}


def noisy(noise: NoiseModel) -> np.ndarray:
    clean = camera()[64:133, 176:246].astype(float)
    return noise.add(clean, np.random.default_rng(0)).astype(np.float32)


def module_of(key: str, noise: NoiseModel = NOISE, **settings) -> DenoisingModule:
    model = learned_model(key)
    module = DenoisingModule(
        model.key, noise.to_dict(), architecture=model.architecture, **settings
    )
    module.diffusivity.load_state_dict(model.state_dict())
    return module


def run(module: DenoisingModule, *planes: np.ndarray) -> np.ndarray:
    return module(torch.from_numpy(np.stack(planes)[:, None]))[:, 0].numpy()


def suggested(key: str) -> dict:
    if key == "k-automation":
        return {}
    suggestion = card(key).details["suggestion"]
    return {"iterations": suggestion["iterations"], "tau": suggestion["tau"]}


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize("key", LEARNED)
def test_it_gives_what_denoise_gives(key):
    plane = noisy(NOISE)
    found = run(module_of(key, **suggested(key)), plane)[0]
    assert_same(found, denoise(plane, key, noise=NOISE, device="cpu"))
    assert found.std() < plane.std()


@pytest.mark.parametrize(
    "noise", [PoissonGaussian(4.0, 30.0), Rician(20.0), Correlated(20.0, 0.7)], ids=lambda n: n.key
)
def test_every_noise_model_will_do(noise):
    plane = noisy(noise)
    settings = {"iterations": 3, "tau": 0.2}
    found = run(module_of("foe-splines", noise, **settings), plane)[0]
    assert_same(found, denoise(plane, "foe-splines", noise=noise, device="cpu", **settings))


def test_planes_of_a_batch_are_denoised_each_by_itself():
    planes = [noisy(NOISE), 1e6 + noisy(NOISE)[::-1], np.full((69, 70), 7, np.float32)]
    planes[0][3:6, 4] = np.nan
    module = module_of("foe-splines", iterations=2, tau=0.25)
    for found, plane in zip(run(module, *planes), planes, strict=True):
        expected = denoise(plane, "foe-splines", noise=NOISE, iterations=2, tau=0.25, device="cpu")
        np.testing.assert_array_equal(found, expected)
    nothing = np.full((16, 16), np.nan, np.float32)
    np.testing.assert_array_equal(run(module, nothing)[0], nothing)


@pytest.mark.parametrize(("noise", "tau"), [(Gaussian(25.0), TAU), (Gaussian(10.0), 0.2)])
def test_k_automation_chooses_as_the_package_does(noise, tau):
    """The network under strong noise, the classical law under a weak one."""
    plane = noisy(noise)
    assert KAutomation.suggest(noise.stabilise(plane.astype(float))[None]).tau == tau
    for settings in ({}, {"iterations": 5, "tau": 0.15}):
        expected = denoise(plane, "k-automation", noise=noise, device="cpu", **settings)
        assert_same(run(module_of("k-automation", noise, **settings), plane)[0], expected)


def test_the_network_of_ones_own_k_automation_has_its_way(user_models_folder):
    torch.manual_seed(0)
    save_user_model("k", KAutomation(), FACTS)
    noise = Gaussian(10.0)
    plane = noisy(noise)
    found = run(module_of("my/k", noise, fine_tuned=True), plane)[0]
    assert_same(found, denoise(plane, "my/k", noise=noise, device="cpu"))


def test_parameters_come_with_the_state():
    torch.manual_seed(0)
    own = Splines(experts=4, size=3, iterations=2)
    with torch.no_grad():
        own.log_steps -= 0.5
    arguments = {
        "model": "foe-splines",
        "noise": NOISE.to_dict(),
        "iterations": 2,
        "tau": 0.25,
        "architecture": own.architecture,
    }
    first, second = DenoisingModule(**arguments), DenoisingModule(**arguments)
    first.diffusivity.load_state_dict(own.state_dict())
    plane = noisy(NOISE)
    assert not np.array_equal(run(first, plane), run(second, plane))
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(run(first, plane), run(second, plane))


def test_training_mode_changes_nothing():
    module = module_of("foe-splines", iterations=1, tau=0.25).train()
    assert not module.training
    assert not module.diffusivity.training
    assert not module(torch.ones(1, 1, 16, 16)).requires_grad


@pytest.mark.parametrize("shape", [(16, 16), (1, 2, 16, 16), (0, 1, 16, 16), (1, 1, 0, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InvalidImageError, match=r"\(b, 1, h, w\)"):
        module_of("foe-splines", iterations=1, tau=0.25)(torch.ones(shape))


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        ("perona-malik", {"iterations": 1, "tau": 0.2}, UnknownModelError, "to train"),
        ("foe-splines", {"iterations": 1}, InvalidSettingError, "give iterations and"),
        ("foe-splines", {"iterations": 0, "tau": 0.2}, InvalidSettingError, "at least 1"),
        ("foe-splines", {"iterations": 1, "tau": -1.0}, InvalidSettingError, "above 0"),
        ("conductance-unet-s", {"iterations": 6, "tau": 0.2}, InvalidSettingError, "at most 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, settings, error, message):
    with pytest.raises(error, match=message):
        DenoisingModule(model, NOISE.to_dict(), **settings)


def test_its_example_runs():
    assert doctest.testmod(zoo_module).failed == 0
