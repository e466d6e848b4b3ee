"""Volumes to TIFF files: ImageJ's, OME's or tifffile's own, whichever first fits without loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._lazy import planes_of
from napari_learned_diffusion.files._tiff_metadata import NOTE, NOTED_METADATA
from napari_learned_diffusion.files._units import (
    MICROMETERS,
    OME_LENGTHS,
    OME_TIMES,
    PIXEL,
    UNKNOWN,
)
from napari_learned_diffusion.files.volume import Volume

_CLASSIC_TIFF_BYTES = 2**32 - 2**25
"""Pixels that fit in a TIFF with 32-bit offsets; 32 MiB are left for the directories."""

_OME_TYPES = (
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def write_tiff(path: Path, volume: Volume, compression: str | None) -> None:
    from tifffile import TiffWriter

    data = volume.data
    if data.dtype.kind not in "buifc" or data.dtype.itemsize > (
        16 if data.dtype.kind == "c" else 8
    ):
        raise FileFormatError(
            f"TIFF can't hold pixels of type {data.dtype}. "
            "Convert the image to float32 or float64 first."
        )
    if _fits_imagej(volume, compression):
        imagej, ome, (resolution, words) = True, False, _imagej_words(volume)
    elif _fits_ome(volume):
        imagej, ome, (resolution, words) = False, True, _ome_words(volume)
    else:
        imagej, ome, (resolution, words) = False, False, _shaped_words(volume)
    samples = volume.axes.endswith("S") and data.shape[-1] > 1 and data.dtype != bool
    colour = samples and data.shape[-1] in (3, 4) and data.dtype.kind in "uf"
    bigtiff = data.nbytes > _CLASSIC_TIFF_BYTES
    # Our own stream: tifffile would swallow that its last bytes don't fit on the disk any more.
    with (
        path.open("x+b") as stream,
        TiffWriter(stream, bigtiff=bigtiff, imagej=imagej, ome=ome) as tif,
    ):
        tif.write(
            planes_of(data, plane_ndim=3 if samples else _stored_ndim(data.shape)),
            shape=data.shape,
            dtype=data.dtype,
            photometric="rgb" if colour else "minisblack",
            planarconfig="contig" if samples else None,
            compression=compression,
            metadata={"axes": volume.axes, **words},
            **resolution,
        )


def _stored_ndim(shape: tuple[int, ...]) -> int:
    """How many of the last axes tifffile puts into a page: two, not counting trailing ones."""
    trailing = next((i for i, size in enumerate(reversed(shape)) if size > 1), len(shape))
    return min(2 + trailing, len(shape))


def _is_subsequence(part: str, whole: str) -> bool:
    letters = iter(whole)
    return all(letter in letters for letter in part)


def _has_plain_planes(volume: Volume) -> bool:
    """Whether planes come last, samples are a colour's, and the steps positive and finite."""
    axes = volume.axes.removesuffix("S")
    return (
        axes.endswith("YX")
        and (axes == volume.axes or volume.data.shape[-1] in (3, 4))
        # tifffile takes a last axis of length 1 for samples.
        and volume.data.shape[axes.index("X")] > 1
        and all(0 < step < math.inf for step in volume.scale)
    )


def _fits_imagej(volume: Volume, compression: str | None) -> bool:
    """Whether ImageJ's TIFF carries the volume without loss."""
    data, axes = volume.data, volume.axes
    (x, unit), (y, unit_y), z = (volume.step(axis) for axis in "XYZ")
    time = volume.step("T")
    return (
        data.dtype in (np.uint8, np.uint16, np.float32)
        and _has_plain_planes(volume)
        and _is_subsequence(axes, "TZCYXS")
        and ("S" not in axes or data.dtype == np.uint8)
        and data.nbytes <= _CLASSIC_TIFF_BYTES
        and compression in (None, "deflate", "lzw")
        and unit == unit_y
        and unit in OME_LENGTHS
        and (z[1] == unit or z == UNKNOWN)
        and (time[1] == "second" or time == UNKNOWN)
        and volume.step("C") == volume.step("S") == UNKNOWN
        # Beyond this a fraction of 32-bit numbers can't hold the resolution.
        and 1e-6 <= min(x, y) <= max(x, y) <= 1e6
    )


def _imagej_words(volume: Volume) -> tuple[dict[str, Any], dict[str, Any]]:
    x, unit = volume.step("X")
    y, _ = volume.step("Y")
    # ImageJ's own word for micrometers; its file holds no letters beyond ASCII.
    words: dict[str, Any] = {"unit": {"micrometer": "micron"}.get(unit, unit)}
    z, time = volume.step("Z"), volume.step("T")
    if z != UNKNOWN:
        words["spacing"] = z[0]
    if time != UNKNOWN:
        words["finterval"] = time[0]
    if limits := volume.metadata.get("contrast_limits"):
        words["min"], words["max"] = limits
    if note := _note_for(volume):
        words[NOTE] = json.dumps(note)
    return {"resolution": (1 / x, 1 / y), "resolutionunit": "NONE"}, words


def _fits_ome(volume: Volume) -> bool:
    """Whether OME-TIFF carries the volume without loss."""
    leading = set(volume.axes.removesuffix("S")) - set("YX")
    time = volume.step("T")
    return (
        volume.data.dtype.name in _OME_TYPES
        and _has_plain_planes(volume)
        and leading <= set("TZC")
        and all(volume.step(axis)[1] in OME_LENGTHS for axis in "XYZ")
        and (time[1] in OME_TIMES or time == UNKNOWN)
        and volume.step("C") == volume.step("S") == UNKNOWN
    )


def _ome_words(volume: Volume) -> tuple[dict[str, Any], dict[str, Any]]:
    words: dict[str, Any] = {"Name": volume.name}
    for axis in "XYZ":
        step, unit = volume.step(axis)
        if (step, unit) != UNKNOWN:
            words[f"PhysicalSize{axis}"] = step
            words[f"PhysicalSize{axis}Unit"] = OME_LENGTHS[unit]
    step, unit = volume.step("T")
    if unit != PIXEL:
        words["TimeIncrement"] = step
        words["TimeIncrementUnit"] = OME_TIMES[unit]
    names = volume.metadata.get("channel_names")
    if names and "C" in volume.axes and len(names) == volume.data.shape[volume.axes.index("C")]:
        words["Channel"] = {"Name": list(names)}
    if note := _note_for(volume):
        words["MapAnnotation"] = {"Namespace": NOTE, NOTE: json.dumps(note)}
    return _resolution_in_cm(volume), words


def _shaped_words(volume: Volume) -> tuple[dict[str, Any], dict[str, Any]]:
    note = _note_for(volume) | {
        "axes": volume.axes,
        "scale": list(volume.scale),
        "units": list(volume.units),
    }
    return _resolution_in_cm(volume), {NOTE: note}


def _resolution_in_cm(volume: Volume) -> dict[str, Any]:
    """The pixel size for programs that read neither OME nor our note."""
    micrometers = [
        step * MICROMETERS.get(unit, math.nan) for step, unit in (volume.step(a) for a in "XY")
    ]
    if not all(1e-3 <= size <= 1e9 for size in micrometers):
        return {}
    x, y = (MICROMETERS["centimeter"] / size for size in micrometers)
    return {"resolution": (x, y), "resolutionunit": "CENTIMETER"}


def _note_for(volume: Volume) -> dict[str, Any]:
    """What ImageJ's and OME's own fields have no place for."""
    note: dict[str, Any] = {}
    if 1 in volume.data.shape:
        # Readers of TIFF drop axes of length 1.
        note["axes"] = volume.axes
    note |= {key: volume.metadata[key] for key in NOTED_METADATA if volume.metadata.get(key)}
    # Numbers and arrays of numpy among them become plain ones, which is all that JSON knows.
    plain: dict[str, Any] = json.loads(
        json.dumps(note, default=lambda value: np.asarray(value).tolist())
    )
    return plain
