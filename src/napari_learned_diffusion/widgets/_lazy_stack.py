"""A stack whose slices are denoised one by one, as an array that a layer can show at once.

napari indexes the data of a layer in the window's thread whenever the slider moves. So indexing
gives what is there, and never computes: the denoised slice, or the noisy one while it isn't done.
A worker asks which slice is wanted `next`, and puts it here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import InvalidImageError

if TYPE_CHECKING:
    from napari_learned_diffusion.widgets._layers import Source

Index = tuple[int, ...]
"""Of a slice: one number for each axis that isn't part of it."""

AHEAD, BEHIND = 24, 6
"""So many slices are computed in the direction of scrolling, and so many in the other."""

CACHE_BYTES = 1 << 30
"""Memory that denoised slices may take; beyond it, those are forgotten that are farthest away."""


class LazyStack:
    """What is denoised so far, in the shape of the whole stack. Safe to use from any thread.

    Parameters
    ----------
    source
        The layer that is denoised.
    budget
        Bytes that denoised slices may take; the one in view always has its place.
    before
        Slices of an earlier result, shown while the new ones aren't done.
    """

    def __init__(
        self,
        source: Source,
        budget: int = CACHE_BYTES,
        before: dict[Index, NDArray[Any]] | None = None,
    ) -> None:
        self.shape: tuple[int, ...] = tuple(int(n) for n in source.data.shape)
        self.dtype = np.dtype(source.data.dtype)
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape, dtype=np.int64))
        self.n_slices = source.n_slices
        self._source = source
        self._counts = tuple(self.shape[axis] for axis in source.other_axes)
        rows, columns = source.plane_shape
        self._capacity = max(1, budget // (rows * columns * self.dtype.itemsize))
        self._lock = threading.Lock()
        self._planes: dict[Index, NDArray[Any]] = {}
        self._made_from: dict[Index, int | None] = {}
        self._before = dict(before or {})
        self._in_view: Index | None = None
        self._axis, self._direction = len(self._counts) - 1, 1

    # --- for the window ---------------------------------------------------------------------------

    @property
    def n_ready(self) -> int:
        """Number of slices that are denoised."""
        return len(self._planes)

    @property
    def in_view(self) -> Index | None:
        """The slice in view; ``None`` if there is none."""
        return self._in_view

    def look_at(self, index: Index | None) -> None:
        """Note which slice is in view, and with it in which direction the user scrolls."""
        with self._lock:
            if index is not None and self._in_view is not None and index != self._in_view:
                moves = [there - here for here, there in zip(self._in_view, index, strict=True)]
                self._axis = max(range(len(moves)), key=lambda axis: abs(moves[axis]))
                self._direction = 1 if moves[self._axis] > 0 else -1
            self._in_view = index

    def drop_changed(self, index: Index | None = None) -> bool:
        """Forget slices whose input has been changed in place since; whether there were any.

        Parameters
        ----------
        index
            The one to look at; ``None``: all of them.
        """
        with self._lock:
            known = dict(self._made_from)
        if index is not None:
            known = {index: known[index]} if index in known else {}
        changed = [
            at
            for at, was in known.items()
            if was is not None and self._source.content_at(at) not in (was, None)
        ]
        with self._lock:
            for at in changed:
                self._planes.pop(at, None)
                self._made_from.pop(at, None)
        return bool(changed)

    def shown(self) -> dict[Index, NDArray[Any]]:
        """The slice in view if it is denoised, to be shown until there is a newer one."""
        with self._lock:
            for planes in (self._planes, self._before):
                if self._in_view in planes:
                    return {self._in_view: planes[self._in_view]}
        return {}

    def finished(self) -> NDArray[Any]:
        """The whole result.

        Raises
        ------
        InvalidImageError
            if slices are missing; the message says what to do.
        """
        self.drop_changed()
        with self._lock:
            planes = dict(self._planes)
        if len(planes) < self.n_slices:
            raise InvalidImageError(
                f"Only {len(planes)} of {self.n_slices} slices are denoised so far. Press Denoise "
                "stack with “now” in the form: it denoises the others, too."
            )
        whole = np.empty(self.shape, self.dtype)
        for index, plane in planes.items():
            whole[self._source.select(index)] = plane
        return whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        # Whoever wants all of it, such as a writer, must not get slices that aren't denoised.
        return self.finished().astype(dtype or self.dtype, copy=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> NDArray[Any]:
        return self.finished()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """What is denoised so far; elsewhere what the source has, or nothing if that isn't loaded.

        Parameters
        ----------
        key
            Numbers, slices and an ellipsis, as napari asks.
        """
        ranges, squeeze = self._ranges(key)
        where = tuple(slice(r.start, r.stop if r.stop >= 0 else None, r.step) for r in ranges)
        others, plane_axes = self._source.other_axes, self._source.plane_axes
        if isinstance(self._source.data, np.ndarray):
            block = self._source.data[where].astype(self.dtype)
        else:
            block = np.full([len(r) for r in ranges], self._source.blank(), self.dtype)
        part = tuple(where[axis] for axis in plane_axes)
        with self._lock:
            ready = {**self._before, **self._planes}
        for index, plane in ready.items():
            if all(i in ranges[axis] for i, axis in zip(index, others, strict=True)):
                at = tuple(ranges[a].index(i) for i, a in zip(index, others, strict=True))
                block[self._source.select(at)] = plane[part]
        return block[tuple(0 if axis in squeeze else slice(None) for axis in range(self.ndim))]

    def _ranges(self, key: Any) -> tuple[list[range], set[int]]:
        """The numbers that a key takes of each axis, and the axes of which it takes only one."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        keys += [slice(None)] * (self.ndim - len(keys))
        ranges, squeeze = [], set()
        for axis, (wanted, count) in enumerate(zip(keys, self.shape, strict=True)):
            if isinstance(wanted, slice):
                ranges.append(range(count)[wanted])
            else:
                number = range(count)[wanted]
                ranges.append(range(number, number + 1))
                squeeze.add(axis)
        return ranges, squeeze

    # --- for the worker ---------------------------------------------------------------------------

    def adopt_type(self, dtype: np.dtype[Any]) -> None:
        """Note the type of the result, which is known only when the noise is."""
        with self._lock:
            self.dtype = dtype

    def next(self) -> Index | None:
        """The slice that is wanted most and isn't there; ``None`` if there is none."""
        with self._lock:
            return next((index for index in self._window() if index not in self._planes), None)

    def has_better(self, index: Index) -> bool:
        """Whether the slice in view waits while ``index`` is computed."""
        with self._lock:
            view = self._in_view
            return view is not None and view != index and view not in self._planes

    def put(self, index: Index, plane: NDArray[Any], made_from: int | None = None) -> None:
        """Keep a denoised slice, and forget others where there are too many.

        Parameters
        ----------
        made_from
            Checksum of the slice that it was made from, where that is known.
        """
        with self._lock:
            self._planes[index] = plane
            self._made_from[index] = made_from
            self._before.pop(index, None)
            while len(self._planes) > self._capacity:
                farthest = max(self._planes, key=self._distance)
                del self._planes[farthest], self._made_from[farthest]

    def _distance(self, index: Index) -> int:
        view = self._in_view or index
        return sum(abs(there - here) for here, there in zip(view, index, strict=True))

    def _window(self) -> Iterator[Index]:
        """The slice in view, those ahead and those behind, no more than there is memory for."""
        view = self._in_view
        if view is None:
            return
        steps = [0, *range(1, AHEAD + 1), *range(-1, -BEHIND - 1, -1)]
        room = self._capacity
        for step in steps:
            index = list(view)
            if index:
                index[self._axis] += step * self._direction
            inside = all(0 <= i < n for i, n in zip(index, self._counts, strict=True))
            if inside and room > 0:
                room -= 1
                yield tuple(index)
