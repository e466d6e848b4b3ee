"""One contract for every model in the registry; a new one is tested by being registered."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_learned_diffusion.config import DiffusionConfig, Gaussian
from napari_learned_diffusion.core.diffusivity import REGISTRY, diffusivity_class
from napari_learned_diffusion.core.errors import InvalidSettingError, UnknownModelError
from napari_learned_diffusion.core.operators import Stencil
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.zoo import card, list_cards, load_model
from napari_learned_diffusion.jobs.denoise import prepare

MODELS = sorted(REGISTRY)


def ready(key: str) -> tuple[torch.nn.Module, DiffusionConfig]:
    image = np.random.default_rng(0).normal(100, 10, (48, 48))
    config = prepare(image, DiffusionConfig(model=key, noise=Gaussian(10.0), device="cpu")).config
    return load_model(config).eval(), config


@pytest.fixture(scope="module", params=MODELS)
def key(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 33, 47), (2, 1, 64, 40), (1, 1, 5, 3), (1, 1, 1, 1)])
def test_conductances_have_the_shape_of_the_edges_and_are_never_negative(key, shape, dtype):
    model, _ = ready(key)
    model = model.to(dtype)
    stencil = Stencil(model.offsets(0))
    v = 3 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    g = model.conductances(v, stencil, None, 0)
    assert g.shape == (shape[0], len(stencil.offsets), *shape[2:])
    assert g.dtype == dtype
    assert torch.isfinite(g).all()
    assert (g >= 0).all()


def test_memory_layout_makes_no_difference(key):
    model, _ = ready(key)
    stencil = Stencil(model.offsets(0))
    v = torch.randn(1, 1, 20, 24, generator=torch.Generator().manual_seed(1))
    strided = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(
        model.conductances(strided, stencil, None, 0), model.conductances(v, stencil, None, 0)
    )


def test_conductances_can_be_differentiated(key):
    model, _ = ready(key)
    model = model.double()
    stencil = Stencil(model.offsets(0))
    v = torch.randn(1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(
        lambda v: model.conductances(v, stencil, None, 0), (v.requires_grad_(),)
    )


def test_influence_ends_where_the_model_says(key):
    model, _ = ready(key)
    stencil = Stencil(model.offsets(0))
    size = 2 * model.reach + 9
    v = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(3))
    changed = v.clone()
    changed[..., 0, 0] += 10
    before = model.conductances(v, stencil, None, 0)
    after = model.conductances(changed, stencil, None, 0)
    far = model.reach + 1
    for number, (dy, dx) in enumerate(model.offsets(0)):
        # Where an edge leaves the image there is none.
        there = (..., number, slice(far, size - dy), slice(far, size - max(dx, 0)))
        torch.testing.assert_close(after[there], before[there])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15)
@given(seed=st.integers(0, 999), size=st.floats(0.1, 1e3), tau=st.floats(0.05, 5))
def test_guarantees_hold_for_every_model(key, dtype, seed, size, tau):
    model, _ = ready(key)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    u = (size * torch.randn(1, 1, 19, 23, generator=generator)).to(dtype)
    tolerance = float(u.abs().max()) * (1e-4 if dtype == torch.float32 else 1e-11)
    previous = u
    for state in iterate(u, model, noise=Gaussian(10.0), scheme=Explicit(tau), iterations=4):
        assert state.u.min() >= u.min() - tolerance
        assert state.u.max() <= u.max() + tolerance
        assert abs(state.u.double().mean() - u.double().mean()) <= tolerance
        assert state.u.double().norm() <= previous.double().norm() + tolerance * u.numel() ** 0.5
        previous = state.u.clone()
    constant = torch.full_like(u, 7.0)
    for state in iterate(constant, model, noise=Gaussian(10.0), scheme=Explicit(tau), iterations=2):
        torch.testing.assert_close(state.u, constant)


def test_suggestions_fill_in_everything_and_denoise(key):
    _, config = ready(key)
    assert config.iterations > 0
    assert config.tau > 0
    rng = np.random.default_rng(1)
    clean = np.kron(rng.uniform(50, 200, (6, 6)), np.ones((16, 16)))
    image = clean + rng.normal(0, 20, clean.shape)
    from napari_learned_diffusion import denoise

    error = np.mean((denoise(image, model=key, noise_sigma=20) - clean) ** 2)
    assert error < 0.3 * np.mean((image - clean) ** 2)


def test_cards_say_what_a_user_needs(key):
    found = card(key)
    assert found in list_cards()
    assert found.title
    assert found.summary.endswith(".")
    model, _ = ready(key)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < found.noise_range[0] < found.noise_range[1]


def test_the_registered_key_is_the_class_s_own(key):
    assert diffusivity_class(key).key == key


def test_an_unknown_model_is_refused_with_the_list_of_those_there_are():
    for ask in (diffusivity_class, card):
        with pytest.raises(UnknownModelError, match="perona-malik"):
            ask("no-such-model")


def test_a_configuration_with_gaps_makes_no_model():
    config = dataclasses.replace(DiffusionConfig(model="perona-malik"), contrast=None)
    with pytest.raises(InvalidSettingError, match="contrast"):
        load_model(config)
