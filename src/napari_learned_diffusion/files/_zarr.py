"""OME-Zarr: chunked images of several resolutions, for what is too large for one file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import refusing
from napari_learned_diffusion.files._lazy import is_lazy, planes_of
from napari_learned_diffusion.files._units import OME_LENGTHS, OME_TIMES, PIXEL, parse_unit
from napari_learned_diffusion.files.volume import Volume, bare_name

ZARR_SUFFIXES = (".ome.zarr", ".zarr")

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


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup"))


def read_zarr(path: Path, series: int | None, lazy: bool | None) -> Volume:
    """The finest level of one of the images of an OME-Zarr, version 0.1 to 0.5."""
    import zarr

    with refusing(path, "OME-Zarr"):
        group = zarr.open_group(path, mode="r")
        attributes: Mapping[str, Any] = group.attrs.asdict()
        images = attributes.get("ome", attributes).get("multiscales", [])
    number = series or 0
    if not images:
        raise FileFormatError(
            f"{path} is a zarr group without an image of OME-NGFF. "
            "Choose one of the images in it, such as a field of a well."
        )
    if not 0 <= number < len(images):
        raise FileFormatError(
            f"{path} has {len(images)} image series, counted from 0: there is no series {number}."
        )
    with refusing(path, "OME-Zarr"):
        image = images[number]
        level = image["datasets"][0]
        array: Any = group[level["path"]]
        axes, units = _axes(image, array.ndim)
        scale = np.ones(array.ndim)
        for part in (level, image):
            for step in part.get("coordinateTransformations", []):
                if step["type"] == "scale":
                    scale = scale * step["scale"]
        data = _pixels(array, is_lazy(lazy, array.nbytes))
    known = (unit != PIXEL for unit in units)
    return Volume(
        data=data,
        axes=axes,
        scale=tuple(float(s) if k else 1.0 for s, k in zip(scale, known, strict=True)),
        units=units,
        name=bare_name(path, ZARR_SUFFIXES),
        metadata={
            "source": str(path),
            "format": "zarr",
            "series": number,
            "series_count": len(images),
        },
    )


def _axes(image: Mapping[str, Any], ndim: int) -> tuple[str, tuple[str, ...]]:
    """Letters and units of the axes; versions before 0.3 have all five and before 0.4 no units."""
    described = image.get("axes") or list(_AXES[-ndim:])
    entries = [{"name": a} if isinstance(a, str) else a for a in described]
    letters = "".join(str(entry["name"])[:1].upper() for entry in entries)
    return letters, tuple(parse_unit(entry.get("unit", "")) for entry in entries)


def _pixels(array: Any, lazily: bool) -> Any:
    if not lazily:
        pixels = np.asarray(array[...])
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    import dask.array as da

    data = da.from_array(array, chunks=array.chunks)  # type: ignore[no-untyped-call]
    return data.astype(array.dtype.newbyteorder("="))


def write_zarr(path: Path, volume: Volume, _: str | None) -> None:
    """All levels of an image, plane by plane; compressed as zarr does by itself (zstd)."""
    import zarr

    if not set(volume.axes) <= set(_AXES):
        raise FileFormatError(
            f"OME-Zarr has the axes T, C, Z, Y and X, and this image has {volume.axes}. "
            "Rename the others, or write TIFF."
        )
    axes = "".join(axis for axis in _AXES if axis in volume.axes)
    data = volume.data.transpose([volume.axes.index(axis) for axis in axes])
    group = zarr.create_group(path, zarr_format=3)
    shapes = list(_level_shapes(data.shape))
    levels = [
        group.create_array(
            str(number),
            shape=shape,
            dtype=data.dtype,
            chunks=(1,) * (len(shape) - 2) + tuple(min(n, _CHUNK) for n in shape[-2:]),
            dimension_names=list(axes.lower()),
        )
        for number, shape in enumerate(shapes)
    ]
    indices = np.ndindex(*data.shape[:-2])
    for index, plane in zip(indices, planes_of(data, plane_ndim=2), strict=True):
        for level in levels:
            plane = plane if level is levels[0] else _halved(plane)
            level[index] = plane
    # Last, so that a folder that isn't finished is no image.
    group.attrs["ome"] = _metadata(volume, axes, shapes)


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


def _halved(plane: NDArray[Any]) -> NDArray[Any]:
    """Means of 2 × 2 pixels, rounded for integers; an odd last row or column is left out."""
    rows, columns = plane.shape[0] // 2, plane.shape[1] // 2
    blocks = plane[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    if plane.dtype.kind in "iu":
        return np.asarray(np.rint(blocks.mean((1, 3))), plane.dtype)
    return np.asarray(blocks.mean((1, 3)), plane.dtype)


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
    for number in range(len(shapes)):
        factors = [2.0**number if axis in "YX" else 1.0 for axis in axes]
        scale = [volume.step(axis)[0] * f for axis, f in zip(axes, factors, strict=True)]
        shift = [volume.step(axis)[0] * (f - 1) / 2 for axis, f in zip(axes, factors, strict=True)]
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if number:
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
