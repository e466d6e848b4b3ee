"""K-automation: what the network may choose, and that the diffusion follows it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_learned_diffusion.config import DiffusionConfig, Gaussian
from napari_learned_diffusion.core import zoo
from napari_learned_diffusion.core.diffusivity.k_automation import (
    LEAST,
    PRESMOOTHING,
    SMOOTH,
    KAutomation,
)
from napari_learned_diffusion.core.diffusivity.perona_malik import PeronaMalik
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.operators import Stencil
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.user_models import PREFIX


def scrambled(seed: int, size: float = 0.1) -> KAutomation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KAutomation()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += size * torch.randn(parameter.shape)
    return model.eval()


def planes(n: int = 2, h: int = 24, w: int = 20, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(n, 1, h, w, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.01, 0.1, 0.5]))
def test_whatever_the_network_says_makes_sense(seed, size):
    contrast, stopping_time, presmooth_sigma = scrambled(seed, size).choose(planes(seed=seed))
    for chosen in (contrast, stopping_time, presmooth_sigma):
        assert chosen.shape == (2, 1, 1, 1)
        assert torch.isfinite(chosen).all()
        assert (chosen >= LEAST).all()
    assert (presmooth_sigma >= PRESMOOTHING[0]).all()
    assert (presmooth_sigma <= PRESMOOTHING[1]).all()


def test_brightness_makes_no_difference():
    model, v = scrambled(0).double(), planes().double()
    for ours, theirs in zip(model.choose(v + 50), model.choose(v), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_different_planes_get_different_settings():
    for setting in scrambled(0).choose(torch.cat([planes(1), 5 * planes(1, seed=1)])):
        assert setting[0] != setting[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (33, 18)])
def test_any_size_is_taken(shape):
    assert all(torch.isfinite(x).all() for x in scrambled(0).choose(planes(1, *shape)))


def test_the_diffusion_is_perona_malik_s_with_what_was_chosen():
    model, v = scrambled(0), planes()
    adapted = model.adapted(v, stopping_time=2.0)
    contrast, wanted, presmooth_sigma = model.choose(v)
    found = adapted.conductances(v, Stencil(), None, 0)
    for i in range(2):
        classical = PeronaMalik(contrast[i].item(), "rational", presmooth_sigma[i].item())
        expected = classical.conductances(v[i : i + 1], Stencil(), None, 0)
        expected = expected * wanted[i].item() / 2.0
        # The kernels of all planes are cut at the same radius, that of one where it ends.
        torch.testing.assert_close(found[i : i + 1], expected, atol=1e-3, rtol=1e-2)
    assert model.contrast == 1.0  # and the model itself stays as it was


def test_gradients_reach_the_whole_network():
    model, v = scrambled(0), planes()
    for state in iterate(
        v,
        model.adapted(v, 1.0),
        noise=Gaussian(1.0),
        scheme=Explicit(0.2),
        iterations=2,
        gradients=True,
    ):
        u = state.u
    u.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.fixture
def bundled(monkeypatch) -> KAutomation:
    model = scrambled(3)
    monkeypatch.setattr(zoo, "bundled_model", lambda _: model)
    return model


OWN = PREFIX + "scanner"


@pytest.fixture
def own(monkeypatch) -> KAutomation:
    model = scrambled(3)
    monkeypatch.setattr(zoo, "load_user_model", lambda _: model)
    return model


def test_the_suggestion_is_the_geometric_mean_over_the_planes(own):
    v = planes(3)
    found = KAutomation.suggest(v[:, 0].double().numpy(), OWN)
    contrast, stopping_time, presmooth_sigma = (
        x.detach().log().mean().exp().item() for x in own.choose(v)
    )
    assert found.contrast == pytest.approx(contrast, rel=1e-4)
    assert found.stopping_time == pytest.approx(stopping_time, rel=1e-4)
    assert found.presmooth_sigma == pytest.approx(presmooth_sigma, rel=1e-4)
    assert found.iterations == max(1, round(found.stopping_time / found.tau))


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("size", [1.0, 0.2])
def test_the_package_s_network_may_lower_the_k_of_smooth_planes(monkeypatch, bundled, size, factor):
    v = size * planes(1)[:, 0].double().numpy()
    classical = PeronaMalik.suggest(v)
    wanted = factor * classical.contrast, 3.0, PRESMOOTHING[0]
    monkeypatch.setattr(bundled, "choose", lambda _: tuple(torch.tensor([x]) for x in wanted))
    found = KAutomation.suggest(v)
    assert (classical.contrast < SMOOTH) == (size < 1)
    if factor > 1 or size == 1:
        assert found == classical
    else:
        assert (found.contrast, found.stopping_time) == pytest.approx(wanted[:2])
        assert found.presmooth_sigma == classical.presmooth_sigma > PRESMOOTHING[0]


def test_invalid_pixels_count_as_the_mean_of_the_others(own):
    v = planes(1)[:, 0].double().numpy()
    v[0, 3:6, 4:9] = np.nan
    filled = np.where(np.isnan(v), np.nanmean(v), v)
    assert KAutomation.suggest(v, OWN).contrast == pytest.approx(
        KAutomation.suggest(filled, OWN).contrast, rel=1e-5
    )
    nothing = KAutomation.suggest(np.full((1, 9, 9), np.nan), OWN)
    assert math.isfinite(nothing.contrast)
    assert nothing.contrast > 0


def test_the_configuration_overrules_the_network(bundled):
    config = DiffusionConfig(contrast=0.9, function="exponential", presmooth_sigma=1.0)
    model = KAutomation.from_config(config)
    v = planes(1)
    expected = PeronaMalik(0.9, "exponential", 1.0).conductances(v, Stencil(), None, 0)
    torch.testing.assert_close(model.conductances(v, Stencil(), None, 0), expected)
    assert model.reach == 4


def test_a_configuration_without_k_is_refused(bundled):
    with pytest.raises(InvalidSettingError, match="contrast parameter K"):
        KAutomation.from_config(DiffusionConfig())


def test_the_size_is_about_the_paper_s():
    assert sum(p.numel() for p in KAutomation().parameters()) == pytest.approx(206_000, rel=0.02)
