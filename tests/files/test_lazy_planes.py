"""Pixels that stay in their file: what an index asks for is read, and nothing else."""

from __future__ import annotations

import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from napari_learned_diffusion.files._lazy import ContiguousPlanes, PlanesOnDisk, stamp_of


def planes_in(path: Path, shape: tuple[int, ...], leading: int) -> PlanesOnDisk:
    dtype = np.dtype(">u2")
    return PlanesOnDisk(
        path=path,
        read_plane=ContiguousPlanes(path, 10, dtype, shape[leading:]),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        plane_ndim=len(shape) - leading,
        stamp=stamp_of(path),
        series=0,
    )


@pytest.mark.parametrize("leading", [0, 1, 2])
def test_every_kind_of_index_gives_what_numpy_gives(tmp_path: Path, leading: int) -> None:
    shape = (3, 4, 5, 2)[2 - leading :]
    array = np.arange(np.prod(shape), dtype=">u2").reshape(shape)
    path = tmp_path / "pixels"
    path.write_bytes(bytes(10) + array.tobytes())
    planes = planes_in(path, array.shape, leading)
    keys = [slice(None), slice(1, None), slice(None, None, -2), slice(2, 2), 1, -1]
    for key in product(keys, repeat=array.ndim):
        found = planes[key]
        np.testing.assert_array_equal(found, array[key])
        assert np.shape(found) == array[key].shape
        assert found.dtype == np.uint16


def test_a_plane_of_a_stack_of_a_billion_planes_takes_the_memory_of_a_plane(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pixels"
    path.write_bytes(bytes(range(10)) + np.arange(64, dtype=">u2").tobytes())
    planes = planes_in(path, (10**9, 10**6, 4, 4), 2)
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(
            planes[0, 1:3, :, 0], np.arange(64).reshape(4, 4, 4)[1:3, :, 0]
        )
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
