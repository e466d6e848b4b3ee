"""What tells whether the pixels of a layer are still those that something was found out about.

Consoles and other plugins change arrays in place, often without telling napari. So whatever is
remembered of a layer is remembered together with the *content* of its array: a checksum at the time
of use, over all of a small array and over some rows of a large one. An array that is loaded lazily
isn't loaded for that in the window's thread; there a worker looks at one slice, see `Probes`.
"""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from napari_learned_diffusion.widgets._layers import Source

Content = tuple[int | str, ...]
"""Equal for arrays of the same content; plain values, as a result's metadata keep them."""

WHOLE_BYTES = 1 << 22
"""Up to so many bytes all pixels are looked at, which takes a millisecond; of larger arrays, so
many bytes, which takes a few."""

_ROWS_FROM_DISK = 64
"""Rows that are looked at in an array that lies on a disk, where each may be waited for."""


def content_of(data: Any) -> Content:
    """The content of an array, cheap enough for every move of a slider.

    Parameters
    ----------
    data
        A numpy array; or what is loaded lazily, of which only the name or the identity counts.
    """
    kind: Content = (str(data.dtype), *(int(n) for n in data.shape))
    if not isinstance(data, np.ndarray):
        return (*kind, str(getattr(data, "name", id(data))))
    return (*kind, checksum(_part(data)))


def checksum(pixels: NDArray[Any]) -> int:
    """CRC-32 of an array's pixels."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)


def _part(data: NDArray[Any]) -> NDArray[Any]:
    """All of a small array; of a large one rows that are spread over it."""
    # In the order in which the pixels lie in memory: else a row is collected from all over it.
    data = data.transpose(np.argsort(-np.abs(data.strides), kind="stable"))
    if data.ndim == 0 or data.nbytes <= WHOLE_BYTES:
        return data
    leading = data.shape[:-1]
    n_rows = int(np.prod(leading, dtype=np.int64))
    wanted = max(1, WHOLE_BYTES // (data.shape[-1] * data.itemsize))
    if isinstance(data, np.memmap):
        wanted = min(wanted, _ROWS_FROM_DISK)
    chosen = np.linspace(0, n_rows - 1, min(n_rows, wanted)).astype(np.int64)
    return np.asarray(data[np.unravel_index(chosen, leading)])


class Probes:
    """Whether lazily loaded arrays still give the slice that they gave. Safe in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[Any, tuple[tuple[int, ...], int | None]] = {}

    def has_changed(self, source: Source) -> bool:
        """Read the slice that was looked at first, and compare it with what it was last time.

        False at the first call, which looks at the slice in view, and for numpy arrays, whose
        content is compared as a whole.
        """
        if isinstance(source.data, np.ndarray):
            return False
        key = source.layer_id, source.plane_axes, source.data.shape
        middle = tuple(source.data.shape[axis] // 2 for axis in source.other_axes)
        with self._lock:
            index, before = self._seen.get(key, (source.index or middle, None))
        found = checksum(source.read_at(index))
        with self._lock:
            self._seen[key] = index, found
        return before is not None and before != found
