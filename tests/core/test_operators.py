"""Edge differences, their adjoint, and the sums that the limiter needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.operators import (
    EIGHT_NEIGHBOURS,
    FOUR_NEIGHBOURS,
    Stencil,
    divergence,
    edge_sums,
    gradient,
    max_of_ends,
    mean_conductance,
    mean_of_ends,
    open_edges,
    pixel_spacing,
)

LONG_REACH = ((4, 0), (0, 2), (3, -5))
STENCILS = [FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS, LONG_REACH]
sizes = st.integers(1, 9)
spacings = st.floats(0.2, 5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offsets", STENCILS)
@given(h=sizes, w=sizes, hy=spacings, hx=spacings, seed=st.integers(0, 99))
def test_divergence_is_the_negative_adjoint_of_the_gradient(offsets, h, w, hy, hx, seed):
    stencil = Stencil(offsets, (hy, hx))
    u = random(2, 1, h, w, seed=seed)
    flux = random(2, len(offsets), h, w, seed=seed + 1)
    left = (gradient(u, stencil) * flux).sum()
    right = -(u * divergence(flux, stencil)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-11)


def test_gradient_divides_the_difference_of_its_ends_by_the_length_of_the_edge():
    u = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    u[0, 0, 1, 1] = 6
    g = gradient(u, Stencil(EIGHT_NEIGHBOURS, (1.0, 2.0)))[0]
    assert g[0, 0, 1] == 6  # the edge from above, of length 1
    assert g[0, 1, 1] == -6
    assert g[1, 1, 0] == 3  # from the left, length 2
    assert g[2, 0, 0].item() == pytest.approx(6 / 5**0.5)  # down the diagonal
    assert g[3, 1, 1].item() == pytest.approx(-6 / 5**0.5)  # down and to the left
    assert torch.count_nonzero(g[:, 2, 2]) == 0


@pytest.mark.parametrize("offsets", STENCILS)
def test_edges_that_leave_the_image_are_zero_and_never_read(offsets):
    stencil = Stencil(offsets)
    edges = torch.full((1, len(offsets), 4, 5), torch.nan, dtype=torch.float64)
    inside = mean_of_ends(torch.ones(1, 1, 4, 5, dtype=torch.float64), stencil)
    for e, (dy, dx) in enumerate(offsets):
        assert inside[0, e].sum() == max(0, 4 - dy) * max(0, 5 - abs(dx))
    edges[inside == 1] = 1.0
    assert torch.isfinite(divergence(edges, stencil)).all()
    assert torch.isfinite(edge_sums(edges, stencil)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_tiny_images_have_the_edges_that_fit(shape):
    stencil = Stencil(EIGHT_NEIGHBOURS)
    counts = edge_sums(mean_of_ends(torch.ones(1, 1, *shape), stencil), stencil)
    h, w = shape
    expected = sum(2 * max(0, h - dy) * max(0, w - abs(dx)) for dy, dx in EIGHT_NEIGHBOURS)
    assert counts.sum() == expected


def test_ends_are_combined_edge_by_edge():
    pixels = torch.tensor([[1.0, 3.0], [5.0, 11.0]])[None, None]
    stencil = Stencil(FOUR_NEIGHBOURS)
    assert mean_of_ends(pixels, stencil)[0].tolist() == [[[3, 7], [0, 0]], [[2, 0], [8, 0]]]
    assert max_of_ends(pixels, stencil)[0].tolist() == [[[5, 11], [0, 0]], [[3, 0], [11, 0]]]
    valid = torch.tensor([[1.0, 1.0], [0.0, 1.0]])[None, None]
    assert open_edges(valid, stencil)[0].tolist() == [[[0, 1], [0, 0]], [[1, 0], [0, 0]]]


def test_mean_conductance_of_a_constant_is_that_constant_up_to_the_corners():
    stencil = Stencil(EIGHT_NEIGHBOURS, (1.0, 3.0))
    conductances = mean_of_ends(torch.full((1, 1, 4, 5), 0.7), stencil)
    torch.testing.assert_close(
        mean_conductance(conductances, stencil), torch.full((1, 1, 4, 5), 0.7)
    )


@pytest.mark.parametrize(
    ("given_spacing", "expected"), [((3, 1), (3, 1)), ((0.5, 2.0), (1, 4)), ((-2, 1), (2, 1))]
)
def test_only_the_ratio_of_the_spacings_counts(given_spacing, expected):
    assert pixel_spacing(given_spacing) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [(0, 1), (1, float("nan")), (float("inf"), 1)])
def test_a_spacing_that_is_none_is_refused(bad):
    with pytest.raises(InvalidSettingError, match="spacing"):
        pixel_spacing(bad)
    with pytest.raises(InvalidSettingError, match="spacing"):
        Stencil(FOUR_NEIGHBOURS, bad)


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1), (0, 0)])
def test_an_edge_seen_from_its_wrong_end_is_refused(offset):
    with pytest.raises(InvalidSettingError, match="point down"):
        Stencil((offset,))
