"""Edge differences, their adjoint, and the sums that the limiter needs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.operators import (
    EIGHT_NEIGHBOURS,
    FOUR_NEIGHBOURS,
    Stencil,
    anisotropy,
    diffusion_tensor,
    divergence,
    edge_sums,
    gradient,
    magnitude,
    max_of_ends,
    mean_conductance,
    mean_of_ends,
    open_edges,
    orientation,
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


SHAPES = [(1, 1), (1, 5), (5, 1), (2, 2), (4, 5)]
SPACINGS = [(1.0, 1.0), (1.0, 3.0), (2.5, 1.0)]
LONG_EDGES = ((4, 0), (0, 4), (4, 4), (4, -4))


@pytest.mark.parametrize("offsets", [FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 2.5), (3.0, 1.0)])
def test_the_magnitude_of_the_gradient_of_a_plane_is_its_slope(offsets, spacing):
    stencil = Stencil(offsets, spacing)
    hy, hx = spacing
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(8.0), indexing="ij")
    plane = (3 * hy * y - 4 * hx * x).double()[None, None]
    slopes = magnitude(gradient(plane, stencil), stencil)[..., 1:-1, 1:-1]
    torch.testing.assert_close(slopes, torch.full_like(slopes, 5.0))


def test_the_magnitude_of_a_flux_is_as_many_times_that_of_the_gradient():
    u, stencil = random(2, 1, 5, 6), Stencil(EIGHT_NEIGHBOURS)
    slopes = gradient(u, stencil)
    torch.testing.assert_close(magnitude(0.3 * slopes, stencil), 0.3 * magnitude(slopes, stencil))
    assert magnitude(slopes, stencil).shape == u.shape


def conducting(conductances: dict[tuple[int, int], float], offsets=EIGHT_NEIGHBOURS, size=9):
    """Edges that conduct by their direction, the same everywhere."""
    edges = torch.zeros(1, len(offsets), size, size, dtype=torch.float64)
    for e, offset in enumerate(offsets):
        edges[:, e] = conductances.get(offset, 0.0)
    return edges


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offsets", [*STENCILS, LONG_EDGES])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_conductances_diffuse_equally_in_all_directions(shape, offsets, spacing):
    stencil = Stencil(offsets, spacing)
    pixels = torch.full((2, 1, *shape), 0.7, dtype=torch.float64)
    tensor = diffusion_tensor(mean_of_ends(pixels, stencil), stencil)
    reached = edge_sums(mean_of_ends(pixels, stencil), stencil) > 0
    identity = torch.tensor([0.7, 0.7, 0.0], dtype=torch.float64).view(1, 3, 1, 1) * reached
    torch.testing.assert_close(tensor, identity)
    assert anisotropy(tensor).max() < 1e-12
    assert orientation(tensor).isnan().all()


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("dy", "dx"), [(0, 1), (1, 0), (1, 1), (1, -1)])
def test_diffusion_along_one_kind_of_edge_has_the_physical_angle_of_that_edge(
    dy, dx, spacing, reach
):
    offsets = tuple((y * reach, x * reach) for y, x in EIGHT_NEIGHBOURS)
    edges = conducting({(dy * reach, dx * reach): 1.0}, offsets)
    tensor = diffusion_tensor(edges, Stencil(offsets, spacing))[..., 4:5, 4:5]
    hy, hx = spacing
    expected = math.degrees(math.atan2(-dy * hy, dx * hx)) % 180  # y points down
    assert orientation(tensor).item() == pytest.approx(expected)
    assert anisotropy(tensor).item() == pytest.approx(1)


@pytest.mark.parametrize("angle", [0, 10, 45, 77.5, 90, 135, 179])
def test_conductances_of_a_known_tensor_give_its_angle(angle):
    # Along the direction e the tensor conducts e·De; in eight directions that is enough to find it.
    theta = math.radians(angle)
    strong = (math.cos(theta), -math.sin(theta))
    stencil = Stencil(EIGHT_NEIGHBOURS)
    g = {
        offset: 0.2 + 0.6 * (ex * strong[0] + ey * strong[1]) ** 2
        for offset, (ex, ey) in zip(stencil.offsets, stencil.directions, strict=True)
    }
    tensor = diffusion_tensor(conducting(g), stencil)[..., 4:5, 4:5]
    assert orientation(tensor).item() == pytest.approx(angle)
    assert anisotropy(tensor).item() == pytest.approx(0.3)  # half of 0.6 / (0.8 + 0.2)


@given(seed=st.integers(0, 99))
def test_turning_the_conductances_by_90_degrees_turns_the_orientation(seed):
    pixels = 10 ** random(1, 2, 7, 7, seed=seed)
    four = Stencil(FOUR_NEIGHBOURS)
    down, right = pixels[:, :1], pixels[:, 1:]
    down[..., -1, :] = 0
    right[..., -1] = 0
    # Counter-clockwise, an edge to the right becomes one up: that of the pixel above it.
    turned_down = torch.rot90(right, 1, (-2, -1)).roll(-1, -2)
    turned_right = torch.rot90(down, 1, (-2, -1))
    before = diffusion_tensor(torch.cat([down, right], 1), four)
    after = diffusion_tensor(torch.cat([turned_down, turned_right], 1), four)
    expected = (torch.rot90(orientation(before), 1, (-2, -1)) + 90) % 180
    torch.testing.assert_close(orientation(after), expected, equal_nan=True)
    turned = torch.rot90(anisotropy(before), 1, (-2, -1))
    torch.testing.assert_close(anisotropy(after), turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 99))
def test_orientation_and_anisotropy_stay_in_their_ranges(dtype, seed):
    edges = (10 ** random(1, 4, 6, 7, seed=seed)).to(dtype)
    tensor = diffusion_tensor(edges, Stencil(EIGHT_NEIGHBOURS, (1.0, 2.0)))
    assert (tensor[:, 0] * tensor[:, 1] >= tensor[:, 2] ** 2 * (1 - 1e-5)).all()
    found = anisotropy(tensor)
    assert found.min() >= 0
    assert found.max() <= 1
    degrees = orientation(tensor)
    degrees = degrees[~degrees.isnan()]
    assert degrees.min() >= 0
    assert degrees.max() < 180


def test_an_angle_just_below_0_is_rounded_to_0():
    tensor = torch.tensor([1.0, 0.0, 1e-9]).view(1, 3, 1, 1)
    assert orientation(tensor).item() == 0


def test_no_diffusion_has_no_orientation():
    tensor = torch.zeros(1, 3, 2, 2)
    assert orientation(tensor).isnan().all()
    assert (anisotropy(tensor) == 0).all()


def test_edges_in_one_direction_alone_have_no_isotropic_weights():
    with pytest.raises(InvalidSettingError, match="favour no direction"):
        _ = Stencil(((0, 1),)).isotropic_weights


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
