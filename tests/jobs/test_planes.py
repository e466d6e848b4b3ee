"""Planes of arrays, and the way into the solver's units and back."""

from __future__ import annotations

import tracemalloc

import dask.array as da
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian
from napari_learned_diffusion.jobs.batch_reading import PlaneReader
from napari_learned_diffusion.jobs.planes import (
    SolverUnits,
    check_image,
    plane_indices,
    read_plane,
    write_plane,
)

DTYPES = ["u1", "i1", "u2", "i2", ">u2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]


@pytest.mark.parametrize("axes", [(-2, -1), (0, 2), (2, 0), (1, 0), (-1, -3)])
def test_planes_are_read_and_written_along_any_two_axes(axes):
    image = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    rows, columns = check_image(image, axes)
    copy = np.zeros_like(image)
    indices = list(plane_indices(image.shape, (rows, columns)))
    (other,) = {0, 1, 2} - {rows, columns}
    assert len(indices) == image.shape[other]
    for index in indices:
        plane = read_plane(image, index, (rows, columns))
        assert plane.shape == (image.shape[rows], image.shape[columns])
        write_plane(copy, index, (rows, columns), plane)
    np.testing.assert_array_equal(copy, image)


def test_indices_of_planes_are_those_of_ndindex():
    indices = plane_indices((2, 5, 3, 4, 6), (1, 4))
    expected = list(np.ndindex(2, 3, 4))
    assert len(indices) == len(expected)
    assert list(indices) == expected
    assert [indices.index(i) for i in expected] == list(range(24))
    assert indices[-1] == (1, 2, 3)
    assert indices[2:7:2] == expected[2:7:2]
    assert (1, 2, 3) in indices
    assert (2, 0, 0) not in indices
    assert (1, 2) not in indices
    with pytest.raises(IndexError):
        indices[24]
    with pytest.raises(ValueError, match="no plane"):
        indices.index((2, 0, 0))


def test_one_plane_has_the_empty_index():
    indices = plane_indices((5, 6), (0, 1))
    assert list(indices) == [()]
    assert indices.index(()) == 0


def test_planes_of_an_absurdly_long_stack_take_no_memory():
    indices = plane_indices((10**9, 10**6, 4, 4), (2, 3))
    assert len(indices) == 10**15
    assert indices[10**15 - 1] == (10**9 - 1, 10**6 - 1)
    tracemalloc.start()
    try:
        assert PlaneReader(np.broadcast_to(np.uint8(1), (10**9, 4, 4)), (1, 2))[10**8].sum() == 16
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_only_the_plane_asked_for_is_computed_of_a_lazy_array():
    computed = []

    def load(block_info=None):
        computed.append(block_info[None]["chunk-location"][0])
        return np.zeros((1, 4, 4))

    lazy = da.map_blocks(load, dtype=float, chunks=((1,) * 5, (4,), (4,)), meta=np.empty((0, 0, 0)))
    read_plane(lazy, (3,), (1, 2))
    assert computed == [3]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.ones((4, 4), bool), "boolean"),
        (np.ones((4, 4), complex), "complex"),
        (np.full((4, 4), "a"), "no intensities"),
        (np.ones((4, 4), object), "no intensities"),
        (np.ones(4), "1 dimension;"),
        (np.ones(()), "0 dimensions;"),
        (np.ones((4, 0)), "no pixels"),
        (np.ones((0, 4, 4)), "no pixels"),
    ],
)
def test_what_can_t_be_denoised_is_refused(image, message):
    with pytest.raises(InvalidImageError, match=message):
        check_image(image, (-2, -1))


@pytest.mark.parametrize(("axes", "message"), [((0, 3), "no plane axes"), ((1, -1), "differ")])
def test_axes_that_make_no_plane_are_refused(axes, message):
    with pytest.raises(InvalidImageError, match=message):
        check_image(np.ones((4, 4)), axes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_solver_units_and_back_are_the_identity_for_every_dtype(dtype):
    rng = np.random.default_rng(0)
    plane = rng.integers(0, 100, (7, 9)).astype(dtype)
    units = SolverUnits.of(plane, None)
    u = units.encode(plane, None, "float32")
    assert abs(u).max() <= 2
    assert u.mean() == pytest.approx(0, abs=1e-6)
    back = units.to_dtype(units.decode(u), keeps_range=True)
    assert back.dtype == plane.dtype
    if plane.dtype.kind == "f":
        np.testing.assert_allclose(back, plane, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(back, plane)


@given(
    scale=st.floats(1e-290, 1e290),
    centre=st.floats(-1, 1),
    size=st.floats(0.01, 1),
)
def test_values_of_any_size_keep_single_precision(scale, centre, size):
    plane = scale * (centre + size * np.linspace(-1, 1, 12).reshape(3, 4))
    units = SolverUnits.of(plane, None)
    back = units.decode(units.encode(plane, None, "float32"))
    np.testing.assert_allclose(back, plane, rtol=0, atol=1e-6 * np.ptp(plane) + 1e-14 * scale)


def test_a_large_offset_costs_no_digits():
    plane = 1e7 + np.random.default_rng(1).normal(size=(8, 8))
    units = SolverUnits.of(plane, None)
    back = units.decode(units.encode(plane, None, "float32"))
    np.testing.assert_allclose(back, plane, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u8", "i8"])
def test_integers_are_rounded_and_clipped(dtype):
    limits = np.iinfo(dtype)
    plane = np.array([[limits.min, limits.max]], dtype)
    units = SolverUnits.of(plane, None)
    wild = np.array([[float(limits.min) * 1.1 - 10.0, float(limits.max) * 1.1, 3.5001, 4.4999]])
    out = units.to_dtype(wild, keeps_range=False)
    assert out[0, 0] == limits.min
    assert out[0, 1] >= limits.max - (2048 if limits.bits == 64 else 0)
    assert out[0, 2:].tolist() == [4, 4]


def test_masked_pixels_become_the_mean():
    plane = np.array([[1.0, 3.0], [np.nan, np.inf]])
    valid = np.isfinite(plane)
    units = SolverUnits.of(plane, valid)
    u = units.encode(plane, valid, "float64")
    assert u[1].tolist() == [0, 0]
    assert units.decode(u)[1].tolist() == [2, 2]


@pytest.mark.parametrize("noise", [Gaussian(3.0), PoissonGaussian(2.0, -30.0)])
def test_the_noise_model_goes_along(noise):
    plane = np.linspace(40, 500, 12).reshape(3, 4)
    units = SolverUnits.of(plane, None)
    u = units.encode(plane, None, "float64")
    here, there = noise.stabilise(plane), units.noise(noise).stabilise(u)
    np.testing.assert_allclose(there - there[0, 0], here - here[0, 0], atol=1e-9)
