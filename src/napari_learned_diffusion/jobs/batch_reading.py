"""Planes of an array that is larger than memory, read one after the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.jobs.planes import plane_indices, read_plane

_BLOCK_BYTES = 128 * 2**20
"""Slices are read in blocks of at most so many bytes where a chunk holds parts of several."""


class PlaneReader:
    """Reads the planes of an array one after the other, in blocks where that saves reading twice.

    Chunks that hold several slices, or that cut them, would otherwise be read for each slice.
    """

    def __init__(self, data: Any, axes: tuple[int, int]) -> None:
        self._data, self._axes = data, axes
        self._indices = plane_indices(tuple(data.shape), axes)
        others = [axis for axis in range(data.ndim) if axis not in axes]
        self._axis = others[-1] if others else None
        self._count = self._planes_at_once()
        self._where: tuple[int, ...] = ()
        self._block: NDArray[Any] = np.empty(0)

    def _planes_at_once(self) -> int:
        data, axes = self._data, self._axes
        if self._axis is None or isinstance(data, np.ndarray):
            return 1
        plane_bytes = math.prod(data.shape[axis] for axis in axes) * data.dtype.itemsize
        affordable = max(1, _BLOCK_BYTES // plane_bytes)
        whole = all(len(data.chunks[axis]) == 1 for axis in axes)
        depth = max(data.chunks[self._axis])
        return int(min(affordable, depth if whole or depth > 1 else data.shape[self._axis]))

    def __len__(self) -> int:
        return len(self._indices)

    def index(self, number: int) -> tuple[int, ...]:
        return self._indices[number]

    def __getitem__(self, number: int) -> NDArray[Any]:
        index = self._indices[number]
        if self._axis is None or self._count == 1:
            return read_plane(self._data, index, self._axes)
        axis, start = self._axis, index[-1] // self._count * self._count
        if (where := (*index[:-1], start)) != self._where:
            others = iter((*index[:-1], slice(start, start + self._count)))
            key = tuple(
                slice(None) if a in self._axes else next(others) for a in range(self._data.ndim)
            )
            self._where, self._block = where, np.asarray(self._data[key])
        rows, columns = self._axes
        # The axis of slices is where it was among the two others, whatever came before them.
        place = (rows < axis) + (columns < axis)
        plane: NDArray[Any] = np.take(self._block, index[-1] - start, axis=place)
        return plane.T if rows > columns else plane
