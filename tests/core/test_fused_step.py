"""The kernels for limiter and step do what the tensor operations do, derivatives included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from napari_learned_diffusion.core.fused_step import advanced, limited
from napari_learned_diffusion.core.limiter import limit
from napari_learned_diffusion.core.operators import Stencil, divergence, gradient

TAU = 0.25
STENCILS = [
    Stencil(),
    Stencil(spacing=(1.0, 2.5)),
    *(Stencil(((r, 0), (0, r), (r, r), (r, -r))) for r in (1, 2, 4)),
]
SHAPES = [(2, 13, 17), (1, 3, 40), (1, 5, 2), (1, 1, 1), (3, 400, 150)]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Large images are then worked on in bands, however many processors there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def fields(
    shape: tuple[int, int, int], stencil: Stencil, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """An image and conductances, some beyond what the limiter lets pass and some below."""
    generator = torch.Generator().manual_seed(0)
    b, h, w = shape
    u = torch.randn(b, 1, h, w, dtype=dtype, generator=generator)
    g = torch.rand(b, len(stencil.offsets), h, w, dtype=dtype, generator=generator)
    return u.requires_grad_(), (3 * stencil.reach**2 * g).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stencil", STENCILS, ids=["4", "spacing", "1", "2", "4-far"])
def test_results_and_derivatives_are_those_of_the_tensor_operations(stencil, shape, dtype):
    u, g = fields(shape, stencil, dtype)
    weights = torch.randn_like(u)
    limits = limit(g, TAU, stencil)
    expected = u + TAU * divergence(limits * gradient(u, stencil), stencil)
    result = advanced(u, limited(g, TAU, stencil), TAU, stencil)
    torch.testing.assert_close(result, expected)
    derivatives = (torch.autograd.grad((r * weights).sum(), (u, g)) for r in (result, expected))
    # In single precision, rounding decides which end limits an edge where both sums are alike.
    if dtype == torch.float64:
        torch.testing.assert_close(*derivatives)


def test_derivatives_are_those_of_the_results():
    stencil = STENCILS[3]
    u, g = fields((1, 6, 5), stencil, torch.float64)
    assert gradcheck(lambda u, g: advanced(u, limited(g, TAU, stencil), TAU, stencil), (u, g))


def test_layouts_make_no_difference():
    u, g = fields((2, 12, 10), Stencil(), torch.float64)
    expected = advanced(u, limited(g, TAU, Stencil()), TAU, Stencil())
    last = torch.channels_last
    result = advanced(
        u.to(memory_format=last), limited(g.to(memory_format=last), TAU, Stencil()), TAU, Stencil()
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_what_went_in_stays_as_it_was():
    u, g = fields((1, 9, 9), Stencil(), torch.float64)
    before = u.detach().clone(), g.detach().clone()
    advanced(u, limited(g, TAU, Stencil()), TAU, Stencil()).sum().backward()
    torch.testing.assert_close((u.detach(), g.detach()), before, rtol=0, atol=0)
