"""The trained models as they are shipped."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from napari_learned_diffusion import denoise
from napari_learned_diffusion.config import DiffusionConfig, Gaussian
from napari_learned_diffusion.core.diffusivity import REGISTRY, diffusivity_class
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.fields_of_experts import DecreasingSplines
from napari_learned_diffusion.core.metrics import psnr
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.zoo import bundled_model, card
from napari_learned_diffusion.jobs.prepare import prepare

LEARNED = [k for k in REGISTRY if issubclass(diffusivity_class(k), LearnedDiffusivity)]
WEIGHTS = files("napari_learned_diffusion") / "weights"


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    """Squares and a smooth hill, on the 0-255 scale."""
    squares = np.kron(np.random.default_rng(0).uniform(30, 200, (6, 6)), np.ones((16, 16)))
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    return squares + 50 * np.exp(-3 * (x**2 + y**2))


@pytest.mark.parametrize("noise_sigma", [15, 50])
@pytest.mark.parametrize("key", LEARNED)
def test_more_or_fewer_iterations_degrade_gently(key, noise_sigma, clean):
    noisy = clean + np.random.default_rng(1).normal(0, noise_sigma, clean.shape)

    def quality(iterations: int) -> float:
        result = denoise(
            noisy, model=key, noise_sigma=noise_sigma, iterations=iterations, device="cpu"
        )
        return psnr(result, clean, data_range=255.0)

    automatic = DiffusionConfig(model=key, noise=Gaussian(noise_sigma), device="cpu")
    trained = prepare(noisy, automatic).config.iterations
    before, at = quality(0), quality(trained)
    assert at > before + 6
    assert quality((trained + 1) // 2) > before + 0.4 * (at - before)
    if card(key).most_iterations is None:
        assert quality(3 * trained // 2) > at - 0.7
        assert quality(2 * trained) > at - 1.5


@pytest.mark.parametrize("key", LEARNED)
def test_cards_and_weights_belong_together(key):
    model = bundled_model(diffusivity_class(key))
    details = card(key).details
    assert model.architecture == details["architecture"]
    assert details["training"]["noise_range"] == list(card(key).noise_range)
    assert (card(key).title, card(key).summary) == (model.title, model.summary)


def test_the_decreasing_model_s_trained_functions_decrease():
    values = bundled_model(DecreasingSplines).knot_values()
    assert (values.diff(dim=1) <= 0).all()
    assert (values[:, 0] - values[:, -1]).max() > 0.1


def test_every_model_has_its_files_and_no_file_is_left_over():
    shipped = {f.name for f in WEIGHTS.iterdir()}
    noise_network = {"noise.json", "noise.safetensors"}
    models = {f"{k}.json" for k in REGISTRY} | {f"{k}.safetensors" for k in LEARNED}
    assert shipped == models | noise_network


def test_all_weights_together_stay_small():
    weights = [f for f in WEIGHTS.iterdir() if f.name.endswith(".safetensors")]
    large = [f for f in weights if f.name.startswith("conductance-unet")]
    small = [f for f in weights if f not in large]
    assert sum(len(f.read_bytes()) for f in large) < 10_000_000
    assert sum(len(f.read_bytes()) for f in small) < 5_000_000


@pytest.mark.parametrize("key", [k for k in LEARNED if k.startswith("conductance-unet")])
def test_every_look_does_something(key, clean):
    """Training can switch a late look off: then it costs its time for nothing."""
    model = bundled_model(diffusivity_class(key)).eval()
    noisy = clean + np.random.default_rng(1).normal(0, 50, clean.shape)
    u = torch.from_numpy(noisy).float()[None, None]
    run = {"noise": Gaussian(50.0), "scheme": Explicit(0.25)}
    states = iterate(u, model, **run, iterations=model.most_iterations)
    means = [float(state.diffusivity().mean()) for state in states]
    steps = len(model.reaches)
    for look in range(len(model.networks)):
        assert max(means[look * steps : (look + 1) * steps]) > 0.01


@pytest.mark.parametrize("key", sorted(REGISTRY))
def test_cards_name_no_machine(key):
    assert "/work" not in json.dumps(card(key).details)
