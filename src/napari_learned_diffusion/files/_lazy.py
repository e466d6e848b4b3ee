"""Pixels that stay in their file until asked for, and arrays that are taken plane by plane."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import readable, refusing

if TYPE_CHECKING:
    import dask.array as da

    from napari_learned_diffusion.files.volume import Array

LAZY_ABOVE = 512 * 2**20
"""Bytes of pixels above which `read` opens a file lazily unless told otherwise."""


def is_lazy(wanted: bool | None, n_bytes: int) -> bool:
    """Whether so many bytes of pixels are to stay in their file, unless said by ``wanted``."""
    return n_bytes > LAZY_ABOVE if wanted is None else wanted


@dataclass(frozen=True)
class ContiguousPlanes:
    """Reads planes that lie one after the other in a file, uncompressed."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __call__(self, index: int) -> NDArray[Any]:
        count = math.prod(self.shape)
        offset = self.offset + index * count * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count, offset=offset).reshape(self.shape)


@dataclass(frozen=True)
class OnDisk:
    """Pixels that stay in a file or folder until asked for.

    Parameters
    ----------
    path
        What was opened.
    stamp
        `stamp_of` of ``stamped`` when it was opened.
    """

    path: Path
    stamp: tuple[int, int]

    @property
    def stamped(self) -> Path:
        """The file that changes when the pixels are replaced."""
        return self.path

    def check_unchanged(self) -> None:
        """Refuse a file that was replaced: what lies at the old offsets are other pixels now."""
        try:
            unchanged = stamp_of(self.stamped) == self.stamp
        except OSError as error:
            raise FileFormatError(
                f"{self.path} is gone ({error}). Open the image again."
            ) from error
        if not unchanged:
            raise FileFormatError(
                f"{self.path} has changed since it was opened. Open the image again."
            )


@dataclass(frozen=True)
class PlanesOnDisk(OnDisk):
    """Looks like an array of ``shape`` and reads the planes that an index asks for."""

    read_plane: Callable[[int], NDArray[Any]]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    plane_ndim: int
    series: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: tuple[slice | int, ...]) -> NDArray[Any]:
        self.check_unchanged()
        leading = self.ndim - self.plane_ndim
        # Ranges of positions: a list of all planes could be larger than a plane.
        chosen = [range(n)[k] for n, k in zip(self.shape[:leading], key[:leading], strict=True)]
        positions = product(*([c] if isinstance(c, int) else c for c in chosen))
        within = key[leading:]
        kept = tuple(len(c) for c in chosen if isinstance(c, range))
        plane_shape = np.broadcast_to(np.uint8(0), self.shape[leading:])[within].shape
        # One array is filled, so that the planes aren't in memory twice.
        out = np.empty((math.prod(kept), *plane_shape), self.dtype)
        with readable(self.path), refusing(self.path, "image"):
            for number, position in enumerate(positions):
                out[number] = self.read_plane(_number_of(position, self.shape))[within]
        return out.reshape(kept + plane_shape)

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return str(self.path), self.stamp, self.series, self.shape

    def as_dask(self) -> da.Array:
        """The same as a dask array of one chunk a plane."""
        import dask.array as da

        leading = self.ndim - self.plane_ndim
        chunks = (1,) * leading + self.shape[leading:]
        # fancy=False: lists of indices are then applied to whole planes, not handed to us.
        array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
            self, chunks=chunks, fancy=False, meta=np.empty((0,) * self.ndim, self.dtype)
        )
        return array


def _number_of(position: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """How many planes lie before the one at a position, which counts along the first axes."""
    number = 0
    for i, n in zip(position, shape, strict=False):
        number = number * n + i
    return number


def stamp_of(path: Path) -> tuple[int, int]:
    """Time of the last change and size of a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def files_behind(data: Array) -> set[Path]:
    """Files that a lazy array's planes are yet to be read from."""
    graph = getattr(data, "dask", None)
    if graph is None:
        return set()
    sources = set()
    for name, layer in graph.layers.items():
        if str(name).startswith("original-"):
            for node in layer.values():
                source = getattr(node, "value", node)
                if isinstance(source, OnDisk):
                    sources.add(source.path)
                elif hasattr(source, "store_path"):  # an array of zarr: the folder of its group
                    # A folder, or a zip file; an array in memory has neither.
                    place = getattr(source.store, "root", getattr(source.store, "path", None))
                    if place is not None:
                        sources.add(Path(str(place)))
    return sources


def planes_of(data: Array, plane_ndim: int) -> Iterator[NDArray[Any]]:
    """The planes of an array one by one, each chunk of the axis before them computed once."""
    if data.ndim == plane_ndim:
        yield np.asarray(data)
        return
    *outer, last = data.shape[:-plane_ndim]
    chunks = getattr(data, "chunks", None)
    steps = chunks[len(outer)] if chunks else (1,) * last
    for index in np.ndindex(*outer):
        start = 0
        for step in steps:
            yield from np.asarray(data[(*index, slice(start, start + step))])
            start += step
