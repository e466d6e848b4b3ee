"""Fields of experts: the families keep what they promise, with any parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_learned_diffusion.config import Gaussian
from napari_learned_diffusion.core.diffusivity.fields_of_experts import (
    DecreasingSplines,
    FieldsOfExperts,
    Monomials,
    RothBlack,
    Splines,
    spline_sum,
)
from napari_learned_diffusion.core.operators import Stencil, open_edges
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate

FAMILIES = (Splines, DecreasingSplines, Monomials, RothBlack)


def scrambled(family: type[FieldsOfExperts], seed: int, size: float = 1.0) -> FieldsOfExperts:
    """A model with random parameters, as bad as training could make it."""
    model = family()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.key)
def family(request) -> type[FieldsOfExperts]:
    return request.param


@settings(max_examples=10)
@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 10.0]), tau=st.floats(0.05, 5))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_guarantees_hold_for_any_parameters(family, seed, size, tau):
    model = scrambled(family, seed, size).double()
    generator = torch.Generator().manual_seed(seed)
    u = 30 * torch.randn(1, 1, 13, 11, dtype=torch.float64, generator=generator)
    before = u
    for state in iterate(u, model, noise=Gaussian(10.0), scheme=Explicit(tau), iterations=3):
        assert state.u.min() >= u.min() - 1e-9
        assert state.u.max() <= u.max() + 1e-9
        assert abs(state.u.mean() - u.mean()) < 1e-9
        assert state.u.norm() <= before.norm() + 1e-9
        before = state.u.clone()


def test_brightness_makes_no_difference(family):
    model = scrambled(family, 0).double()
    v = torch.randn(1, 1, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        model.conductances(v + 100, Stencil(), None, 0), model.conductances(v, Stencil(), None, 0)
    )


def test_exchanging_rows_and_columns_exchanges_the_edges(family):
    model = scrambled(family, 0).double()
    v = torch.randn(1, 1, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    down, right = model.conductances(v, Stencil(), None, 0)[0]
    turned_down, turned_right = model.conductances(v.transpose(2, 3), Stencil(), None, 0)[0]
    torch.testing.assert_close(turned_down, right.T)
    torch.testing.assert_close(turned_right, down.T)


def test_invalid_pixels_have_no_say(family):
    model = scrambled(family, 0).double()
    v = torch.randn(1, 1, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    valid = torch.ones_like(v)
    valid[..., 4:7, 5:9] = 0
    other = torch.where(valid == 1, v, 1000.0)
    is_open = open_edges(valid, Stencil())
    ours, theirs = (
        model.conductances(image, Stencil(), valid, 0) * is_open for image in (v, other)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_mask_of_nothing_changes_nothing(family):
    model = scrambled(family, 0).double()
    v = torch.randn(1, 1, 12, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        model.conductances(v, Stencil(), torch.ones_like(v), 0),
        model.conductances(v, Stencil(), None, 0),
    )


def test_iterations_beyond_the_trained_ones_use_the_last_time_step(family):
    model = family(iterations=3)
    with torch.no_grad():
        model.log_steps.copy_(torch.tensor([0.0, -1.0, -2.0]))
    v = torch.randn(1, 1, 9, 9, generator=torch.Generator().manual_seed(5))
    second, third, ninth = (model.conductances(v, Stencil(), None, n) for n in (1, 2, 8))
    assert not torch.allclose(second, third)
    torch.testing.assert_close(third, ninth)


def test_spline_sum_is_linear_interpolation():
    rng = np.random.default_rng(0)
    knot_values = rng.normal(size=(3, 21))
    t = rng.uniform(size=(2, 3, 5, 4))
    t[0, :, 0, 0], t[0, :, 0, 1], t[0, :, 0, 2] = 0.0, 1.0, 0.35
    expected = sum(np.interp(t[:, i], np.linspace(0, 1, 21), knot_values[i]) for i in range(3))
    found = spline_sum(torch.from_numpy(t), torch.from_numpy(knot_values))
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=1e-12)


def test_spline_sum_is_differentiable_in_place_and_values():
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(1, 2, 3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    values = torch.randn(2, 21, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(spline_sum, (t, values))


@given(seed=st.integers(0, 10_000), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_decreasing_splines_never_rise(seed, size):
    model = scrambled(DecreasingSplines, seed, size)
    assert (model.knot_values().diff(dim=1) <= 0).all()


def test_ordinary_splines_may_rise():
    assert (scrambled(Splines, 0).knot_values().diff(dim=1) > 0).any()


def test_monomials_have_the_power_of_their_number():
    model = Monomials(experts=3).double()
    with torch.no_grad():
        model.coefficients.copy_(torch.tensor([2.0, -1.0, 0.5]))
    x = torch.tensor([-200.0, -1.0, 0.0, 2.0, 200.0], dtype=torch.float64)
    t = torch.sigmoid(x)
    found = model.exponents(x.view(1, 1, 1, 5).expand(1, 3, 1, 5))[0, 0, 0]
    torch.testing.assert_close(found, 2 * t - t**2 + 0.5 * t**3)


def test_roth_black_is_a_product_of_powers():
    model = RothBlack(experts=2).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alphas = model.log_alphas.exp()
    expected = (1 + x[:, 0] ** 2 / 2) ** -alphas[0] * (1 + x[:, 1] ** 2 / 2) ** -alphas[1]
    torch.testing.assert_close(model.exponents(x).exp()[:, 0], expected)


def test_sizes_are_those_of_the_paper(family):
    assert 500 <= sum(p.numel() for p in family().parameters()) <= 3100


def test_functions_add_up_to_the_exponent(family):
    model = scrambled(family, 3)
    x = torch.linspace(-3, 3, 7)
    n = model.kernels.shape[0]
    with torch.no_grad():
        functions = model.functions(x)
        whole = model.exponents(x.expand(n, 7)[None, :, None, :])[0, 0, 0]
        at_zero = model.exponents(torch.zeros(1, n, 1, 1)).item()
    assert functions.shape == (n, 7)
    torch.testing.assert_close(functions.sum(dim=0), whole - at_zero, atol=1e-3, rtol=1e-3)
