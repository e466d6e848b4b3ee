"""The Conductance U-Net: its reach, its memory, tiles, and the guarantees with any parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_learned_diffusion.config import Gaussian, TrainingConfig
from napari_learned_diffusion.core.diffusivity.conductance_unet import (
    ALIGNMENT,
    ConductanceUNet,
    LargeConductanceUNet,
)
from napari_learned_diffusion.core.diffusivity.turns import TURNS
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.learning.patches import TrainingImages
from napari_learned_diffusion.core.learning.training import fit
from napari_learned_diffusion.core.operators import Stencil
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate, solve
from napari_learned_diffusion.core.weights import read_model, write_model

BOTH = [ConductanceUNet, LargeConductanceUNet]
RUN = {"noise": Gaussian(1.0), "scheme": Explicit(0.25)}


def scrambled(
    seed: int = 0,
    size: float = 0.3,
    model_class: type[ConductanceUNet] = ConductanceUNet,
    **architecture: int,
) -> ConductanceUNet:
    """A small network with random parameters, large enough that everything reaches the output."""
    model = model_class(**{"width": 4, "looks": 2, "steps": 4, "reach": 4} | architecture).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(size * noise)
    return model.eval()


def noise_image(h: int, w: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(1, 1, h, w, dtype=torch.float64, generator=generator)


def edges(model: ConductanceUNet, v: torch.Tensor) -> torch.Tensor:
    return model.conductances(v, Stencil(model.offsets(0)), None, 0)


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("mixed", [False, True])
@settings(max_examples=10)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 10.0]), tau=st.floats(0.05, 5))
def test_guarantees_hold_for_any_parameters(model_class, mixed, seed, size, tau):
    u, tolerance = 10 * noise_image(21, 18, seed), 1e-9
    if mixed:  # bfloat16 takes the place of float32 only; there parameters of 10 overflow
        u, size, tolerance = u.float(), min(size, 1), 1e-3
    model = scrambled(seed, size, model_class).to(u.dtype)
    before = u
    run = {"noise": Gaussian(10.0), "scheme": Explicit(tau), "iterations": model.most_iterations}
    for state in iterate(u, model, **run, mixed=mixed):
        assert state.u.dtype == u.dtype
        assert state.u.min() >= u.min() - tolerance
        assert state.u.max() <= u.max() + tolerance
        assert abs(state.u.double().mean() - u.double().mean()) < tolerance
        assert state.u.norm() <= before.norm() + tolerance
        before = state.u.clone()


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5), (8, 8), (17, 30)])
def test_any_size_is_taken(shape, model_class):
    v = noise_image(*shape)
    for state in iterate(v, scrambled(model_class=model_class), **RUN, iterations=8):
        assert state.u.shape == v.shape
        assert torch.isfinite(state.u).all()


def test_brightness_makes_no_difference():
    model, v = scrambled(), noise_image(20, 22)
    torch.testing.assert_close(edges(model, v + 100), edges(model, v))


@pytest.mark.parametrize(
    ("depth", "model_class"),
    [(1, ConductanceUNet), (2, ConductanceUNet), (1, LargeConductanceUNet)],
)
def test_the_reach_is_tight(depth, model_class):
    model, seen = scrambled(looks=1, depth=depth, model_class=model_class), 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # so that no rectifier hides anything
    size = 8 * ALIGNMENT * 4
    for offset in range(0, ALIGNMENT, 3):
        v = noise_image(size, 16).requires_grad_()
        at = size // 2 + offset
        (felt,) = torch.autograd.grad(edges(model, v)[0, :, at].sum(), v)
        rows = felt[0, 0].abs().sum(dim=1).nonzero()[:, 0]
        seen = max(seen, int((rows - at).abs().max()))
    assert model.reach - 3 <= seen <= model.reach


@pytest.mark.parametrize("turn", TURNS, ids=str)
def test_turning_the_image_turns_what_the_large_one_makes_of_it(turn):
    model, u = scrambled(model_class=LargeConductanceUNet), noise_image(24, 16)
    run = RUN | {"iterations": 8}
    turned = solve(turn.image(u), model, **run).u
    torch.testing.assert_close(turn.image_back(turned), solve(u, model, **run).u)


def test_in_training_the_large_one_looks_once():
    model, u = scrambled(model_class=LargeConductanceUNet), noise_image(16, 16)
    small = scrambled(model_class=ConductanceUNet)
    torch.testing.assert_close(edges(model.train(), u), edges(small, u))
    assert not torch.allclose(edges(model.eval(), u), edges(small, u))


@pytest.mark.parametrize("turned", [False, True])
def test_training_can_look_at_all_orientations(monkeypatch, turned):
    model = LargeConductanceUNet(width=2, depth=1)
    seen = []
    monkeypatch.setattr(
        model.networks[0],
        "forward",
        lambda *given, forward=model.networks[0].forward: seen.append(1) or forward(*given),
    )
    image = np.linspace(0, 255, 32 * 32, dtype=np.float32).reshape(32, 32)
    images = TrainingImages((image,), (image,), ())
    config = TrainingConfig(steps=1, batch=1, patch=16, iterations=4, turned=turned)
    loop = fit(model, images, config, every=2)
    monkeypatch.setattr("napari_learned_diffusion.core.learning.training.validate", lambda *_: {})
    assert [step.step for step in loop] == [1]
    assert len(seen) == (4 if turned else 1)


def test_edges_get_shorter_after_each_look():
    assert ConductanceUNet(width=2).reaches == (8, 4, 2, 1, 1)
    assert ConductanceUNet(width=2, steps=3, reach=2).reaches == (2, 1, 1)
    model = scrambled()
    assert model.offsets(4) == ((4, 0), (0, 4), (4, 4), (4, -4))
    assert model.most_iterations == 8


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("iterations", [3, 8])
def test_tiles_that_begin_at_multiples_give_what_the_whole_gives(iterations, model_class):
    model = scrambled(model_class=model_class)
    halo = -(-model.halo(iterations) // ALIGNMENT) * ALIGNMENT
    u = noise_image(2 * halo + 40, 24)
    whole = solve(u, model, **RUN, iterations=iterations).u
    tile = solve(u[..., 16:, :], model, **RUN, iterations=iterations).u
    torch.testing.assert_close(tile[..., halo:, :], whole[..., 16 + halo :, :])
    tile = solve(u[..., : halo + 8, :], model, **RUN, iterations=iterations).u
    torch.testing.assert_close(tile[..., :8, :], whole[..., :8, :])


def test_fewer_iterations_are_the_first_of_more():
    model, u = scrambled(), noise_image(24, 24)
    more = solve(u, model, **RUN, iterations=8, keep_history=True)
    fewer = solve(u, model, **RUN, iterations=5)
    torch.testing.assert_close(fewer.u, more.history[4].u)


def test_more_iterations_than_the_model_has_are_refused():
    model = scrambled()
    with pytest.raises(InvalidSettingError, match="at most 8 iterations"):
        iterate(noise_image(8, 8), model, **RUN, iterations=9)


def test_two_runs_at_once_don_t_mix_their_memories():
    model, images = scrambled(), [noise_image(16, 16, seed) for seed in (0, 1)]
    alone = [solve(u, model, **RUN, iterations=8).u for u in images]
    runs = [iterate(u, model, **RUN, iterations=8) for u in images]
    for states in zip(*runs, strict=True):
        together = [state.u.clone() for state in states]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_later_looks_see_the_noisy_image_too():
    """So what comes later isn't decided by the half-diffused image alone."""
    model, u = scrambled(), noise_image(16, 16)
    flat = torch.zeros_like(u)
    stencil = Stencil(model.offsets(4))
    answers = []
    for noisy in (u, flat):
        run = model.begun()
        run.conductances(noisy, stencil, None, 0)
        answers.append(run.conductances(flat, stencil, None, 4))
    assert not torch.allclose(*answers)


def test_gradients_reach_every_parameter():
    model, u = scrambled(), noise_image(16, 16)
    for state in iterate(u, model, **RUN, iterations=8, gradients=True):
        last = state.u
    last.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_weights_take_two_bytes_each(tmp_path):
    torch.manual_seed(0)
    model = ConductanceUNet(width=8)
    write_model(tmp_path / "weights.safetensors", model)
    count = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "weights.safetensors").stat().st_size < 2 * count + 20_000
    read = read_model(tmp_path / "weights.safetensors", ConductanceUNet)
    for ours, theirs in zip(model.parameters(), read.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
