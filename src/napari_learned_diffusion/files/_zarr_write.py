"""Writing OME-Zarr 0.5: chunked images of several resolutions, for what is large."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._lazy import planes_of
from napari_learned_diffusion.files._units import OME_LENGTHS, OME_TIMES, PIXEL
from napari_learned_diffusion.files.volume import Volume

_VERSION = "0.5"
_AXES = "TCZYX"
_TYPES = {"T": "time", "C": "channel"}
_CHUNK = 1024
"""Largest edge length of a chunk in a plane, in pixels; along other axes it is 1."""

_SMALLEST = 256
"""Levels are halved until no edge of a plane is longer."""

_DESCRIPTIONS = ("zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata")
_LEVEL = re.compile(r"s?\d+")
_CHUNK_NAME = re.compile(rf"c|\d+(\.\d+)*|{'|'.join(map(re.escape, _DESCRIPTIONS))}")
"""Names of files and folders in a level."""


def write_zarr(path: Path, volume: Volume, _: str | None) -> None:
    """All levels of an image, plane by plane; compressed as zarr does by itself (zstd)."""
    import zarr

    if not set(volume.axes) <= set(_AXES):
        raise FileFormatError(
            f"OME-Zarr has the axes T, C, Z, Y and X, and this image has {volume.axes}. "
            "Rename the others, or write TIFF."
        )
    axes = "".join(axis for axis in _AXES if axis in volume.axes)
    volume = volume.transposed(axes)
    data = volume.data
    missing = _representable(volume.missing, data.dtype)
    group = zarr.create_group(path, zarr_format=3)
    shapes = list(_level_shapes(data.shape))
    levels = [
        group.create_array(
            str(number),
            shape=shape,
            dtype=data.dtype,
            chunks=(1,) * (len(shape) - 2) + tuple(min(n, _CHUNK) for n in shape[-2:]),
            dimension_names=list(axes.lower()),
            fill_value=data.dtype.type(missing[0] if missing else 0),
            attributes={"missing_value": list(missing)} if missing else {},
            # Left out, empty chunks couldn't be told from lost ones.
            config={"write_empty_chunks": True},
        )
        for number, shape in enumerate(shapes)
    ]
    ranges = _Ranges(axes, data.shape)
    indices = np.ndindex(*data.shape[:-2])
    for index, plane in zip(indices, planes_of(data, plane_ndim=2), strict=True):
        ranges.add(index, plane, missing)
        for level in levels:
            plane = plane if level is levels[0] else _halved(plane, missing)
            level[index] = plane
    # Last, so that a folder that isn't finished is no image.
    group.attrs["ome"] = _metadata(volume, axes, shapes) | _omero(volume, ranges)


def _representable(values: tuple[float, ...], dtype: np.dtype[Any]) -> tuple[float, ...]:
    """Those of the values that pixels of a type can have."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return tuple(v for v in values if v == int(v) and limits.min <= v <= limits.max)
    return values if dtype.kind == "f" else ()


class _Ranges:
    """Lowest and highest intensity of each channel, of planes that come one by one."""

    def __init__(self, axes: str, shape: tuple[int, ...]) -> None:
        self._axis = axes.find("C")
        count = shape[self._axis] if self._axis >= 0 else 1
        self.found = [(math.inf, -math.inf)] * count

    def add(self, index: tuple[int, ...], plane: NDArray[Any], missing: tuple[float, ...]) -> None:
        if plane.dtype.kind not in "iuf":
            return
        channel = index[self._axis] if self._axis >= 0 else 0
        finite = plane[np.isfinite(plane) & ~np.isin(plane, missing)]
        if finite.size:
            lowest, highest = self.found[channel]
            self.found[channel] = (
                min(lowest, float(finite.min())),
                max(highest, float(finite.max())),
            )


def _omero(volume: Volume, ranges: _Ranges) -> dict[str, Any]:
    """How the channels are called and shown, where the volume says something about it."""
    count = len(ranges.found)
    block: Mapping[str, Any] = volume.metadata.get("omero") or {}
    channels: Sequence[Any] = block.get("channels", ())
    names = volume.metadata.get("channel_names", ())
    limits = volume.metadata.get("contrast_limits") if count == 1 else None
    known = len(channels) == count
    if not (known or len(names) == count or limits):
        return {}
    written: list[dict[str, Any]] = []
    for number, (lowest, highest) in enumerate(ranges.found):
        if lowest > highest:
            lowest, highest = 0.0, 1.0
        channel: dict[str, Any] = {"color": "FFFFFF", "active": True}
        if known:
            channel = dict(channels[number])
        window = {"min": lowest, "max": highest, "start": lowest, "end": highest}
        window |= channel.get("window") or {}
        if limits:
            window |= {"start": float(limits[0]), "end": float(limits[1])}
        channel["window"] = window
        if len(names) == count:
            channel["label"] = str(names[number])
        written.append(channel)
    return {"omero": (dict(block) if known else {}) | {"channels": written}}


def foreign_in_zarr(folder: Path) -> Path | None:
    """The first thing in a folder that isn't of the levels of one image; None if there is none.

    Labels, tables and the like stand beside the levels in an OME-Zarr of other programs.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _LEVEL.fullmatch(path.name):
            found = next((p for p in path.rglob("*") if not _CHUNK_NAME.fullmatch(p.name)), None)
            if found is not None:
                return found
        elif path.name not in _DESCRIPTIONS or not path.is_file():
            return path
    return None


def _level_shapes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    yield shape
    while max(shape[-2:]) > _SMALLEST and min(shape[-2:]) > 1:
        shape = (*shape[:-2], *(n // 2 for n in shape[-2:]))
        yield shape


def _halved(plane: NDArray[Any], missing: tuple[float, ...]) -> NDArray[Any]:
    """Means of 2 × 2 pixels, rounded for integers; an odd last row or column is left out.

    Where a value that is no intensity takes part, it remains.
    """
    rows, columns = plane.shape[0] // 2, plane.shape[1] // 2
    blocks = plane[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    means = blocks.mean((1, 3))
    if plane.dtype.kind in "iu":
        means = np.rint(means)
    halved = np.asarray(means, plane.dtype)
    for value in missing:
        halved[(blocks == value).any((1, 3))] = value
    return halved


def _metadata(volume: Volume, axes: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What OME-NGFF 0.5 wants to be said about axes and levels."""
    described = []
    for axis in axes:
        entry = {"name": axis.lower(), "type": _TYPES.get(axis, "space")}
        unit = volume.step(axis)[1]
        if unit in (OME_TIMES if axis == "T" else OME_LENGTHS) and unit != PIXEL and axis != "C":
            entry["unit"] = unit
        described.append(entry)
    datasets = []
    placement = volume.metadata.get("placement", {})
    starts = [float(shift) for shift in placement.get("translate", (0.0,) * len(axes))]
    for number in range(len(shapes)):
        factors = [2.0**number if axis in "YX" else 1.0 for axis in axes]
        scale = [volume.step(axis)[0] * f for axis, f in zip(axes, factors, strict=True)]
        shift = [
            start + volume.step(axis)[0] * (f - 1) / 2
            for start, axis, f in zip(starts, axes, factors, strict=True)
        ]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if any(shift):
            transforms.append({"type": "translation", "translation": shift})
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    image: dict[str, Any] = {
        "name": volume.name,
        "axes": described,
        "datasets": datasets,
        "type": "mean",
    }
    note = volume.metadata.get("processing")
    if note is not None:
        image["metadata"] = {"description": note}
    return {"version": _VERSION, "multiscales": [image]}
