"""The limiter: any conductances become a doubly stochastic averaging."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.core.fused_step import limited
from napari_learned_diffusion.core.limiter import LARGEST, count_unsound, limit
from napari_learned_diffusion.core.operators import (
    EIGHT_NEIGHBOURS,
    FOUR_NEIGHBOURS,
    Stencil,
    divergence,
    edge_sums,
    gradient,
    mean_of_ends,
)
from napari_learned_diffusion.core.schemes import LONGEST_STEP


def wild_conductances(stencil: Stencil, h: int, w: int, size: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    g = torch.rand(1, len(stencil.offsets), h, w, dtype=torch.float64, generator=generator) ** 4
    return g * size * (mean_of_ends(torch.ones(1, 1, h, w, dtype=torch.float64), stencil) > 0)


@pytest.mark.parametrize("offsets", [FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS, ((4, 0), (0, 2))])
@given(
    size=st.floats(1e-3, 1e6), tau=st.floats(1e-3, 1e3), hx=st.floats(1, 5), seed=st.integers(0, 99)
)
def test_a_limited_step_is_a_doubly_stochastic_matrix(offsets, size, tau, hx, seed):
    stencil = Stencil(offsets, (1.0, hx))
    h, w = 5, 4
    g = limit(wild_conductances(stencil, h, w, size, seed), tau, stencil)
    basis = torch.eye(h * w, dtype=torch.float64).view(h * w, 1, h, w)
    step = basis + tau * divergence(g * gradient(basis, stencil), stencil)
    matrix = step.view(h * w, h * w).T
    assert matrix.min() >= -1e-12
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(matrix.sum(0), torch.ones(h * w, dtype=torch.float64))


def test_conductances_that_a_step_can_take_are_left_alone():
    stencil = Stencil()
    g = wild_conductances(stencil, 6, 6, 1.0, 0)
    torch.testing.assert_close(limit(g, 0.25, stencil), g, rtol=0, atol=0)


def test_the_weight_of_the_neighbours_is_brought_to_one_where_it_was_larger():
    stencil = Stencil()
    g = mean_of_ends(torch.full((1, 1, 8, 8), 3.0), stencil)
    weight = edge_sums(limit(g, 1.0, stencil), stencil)
    assert weight.max() <= 1 + 1e-6
    assert weight[0, 0, 4, 4] == pytest.approx(1)


def test_the_limiter_passes_gradients_on():
    stencil = Stencil()
    g = wild_conductances(stencil, 4, 4, 2.0, 1).clamp(min=0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: limit(g, 1.0, stencil), (g,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limiter", [limit, limited])
@pytest.mark.parametrize("tau", [0.25, LONGEST_STEP])
def test_what_is_no_conductance_becomes_none_and_leaves_the_others_alone(limiter, dtype, tau):
    g = torch.rand(2, 2, 9, 11, dtype=dtype)
    strange = torch.rand(g.shape) < 0.3
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 1e35], dtype=dtype)
    wild = torch.where(strange, values[torch.randint(5, g.shape)], g)
    result = limiter(wild, tau, Stencil())
    assert (result >= 0).all()
    assert result.isfinite().all()
    expected = limiter(torch.where(strange, 0, g), tau, Stencil())
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert int(count_unsound(wild)) == int(strange.sum())
    assert int(count_unsound(g)) == 0


@pytest.mark.parametrize("limiter", [limit, limited])
def test_the_largest_conductances_and_the_longest_step_give_numbers(limiter):
    g = torch.full((1, 4, 6, 6), LARGEST)
    stencil = Stencil(EIGHT_NEIGHBOURS)
    result = limiter(g, LONGEST_STEP, stencil)
    assert result.isfinite().all()
    u = torch.rand(1, 1, 6, 6)
    step = u + LONGEST_STEP * divergence(result * gradient(u, stencil), stencil)
    assert u.min() - 1e-5 <= step.min() <= step.max() <= u.max() + 1e-5
