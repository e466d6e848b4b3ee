"""The U-Net: its reach, its alignment, and the guarantees with any parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_learned_diffusion.config import Gaussian
from napari_learned_diffusion.core.diffusivity.unet import UNet
from napari_learned_diffusion.core.operators import Stencil, open_edges
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate, solve


def scrambled(seed: int, size: float = 0.3) -> UNet:
    """A network with random parameters, large enough that everything reaches the output."""
    model = UNet().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(size * noise)
    return model.eval()


def noise_image(h: int, w: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(1, 1, h, w, dtype=torch.float64, generator=generator)


def edges(model: UNet, v: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    return model.conductances(v, Stencil(), valid, 0)


@settings(max_examples=10)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 10.0]), tau=st.floats(0.05, 5))
def test_guarantees_hold_for_any_parameters(seed, size, tau):
    model = scrambled(seed, size)
    u = 10 * noise_image(13, 11, seed)
    before = u
    for state in iterate(u, model, noise=Gaussian(10.0), scheme=Explicit(tau), iterations=3):
        assert state.u.min() >= u.min() - 1e-9
        assert state.u.max() <= u.max() + 1e-9
        assert abs(state.u.mean() - u.mean()) < 1e-9
        assert state.u.norm() <= before.norm() + 1e-9
        before = state.u.clone()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5), (6, 4), (17, 30)])
def test_any_size_is_taken(shape):
    v = noise_image(*shape)
    g = edges(scrambled(0), v)
    assert g.shape == (1, 2, *shape)
    assert torch.isfinite(g).all()


def test_brightness_makes_no_difference():
    model, v = scrambled(0), noise_image(20, 22)
    torch.testing.assert_close(edges(model, v + 100), edges(model, v))


@pytest.mark.parametrize("corner", [(0, 0), (1, 2), (2, 1), (3, 3)])
def test_the_reach_is_tight(corner):
    model = scrambled(0)
    y, x = 48 + corner[0], 48 + corner[1]
    v = noise_image(100, 100)
    changed = v.clone()
    changed[..., y, x] += 30
    rows, columns = (edges(model, changed) != edges(model, v))[0].any(dim=0).nonzero().T
    seen = max(int((rows - y).abs().max()), int((columns - x).abs().max()))
    assert model.reach - 3 <= seen <= model.reach


def test_tiles_that_begin_at_multiples_give_what_the_whole_gives():
    model, u = scrambled(0), noise_image(150, 40)
    run = {"noise": Gaussian(1.0), "scheme": Explicit(0.25), "iterations": 2}
    whole = solve(u, model, **run).u
    halo = 2 * (model.reach + 1)
    start = halo
    assert halo % model.alignment == 0
    tile = solve(u[..., start - halo : start + 20 + halo, :], model, **run).u
    torch.testing.assert_close(tile[..., halo : halo + 20, :], whole[..., start : start + 20, :])


def test_invalid_pixels_have_no_say():
    model, v = scrambled(0), noise_image(24, 24)
    valid = torch.ones_like(v)
    valid[..., 8:15, 9:13] = 0
    other = torch.where(valid == 1, v, 1000.0)
    is_open = open_edges(valid, Stencil())
    ours, theirs = (edges(model, image, valid) * is_open for image in (v, other))
    torch.testing.assert_close(ours, theirs)


def test_the_size_is_about_the_paper_s():
    assert 25_000 <= sum(p.numel() for p in UNet().parameters()) <= 33_000
