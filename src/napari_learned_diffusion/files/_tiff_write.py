"""Volumes to TIFF files: ImageJ's, OME's or tifffile's own, whichever first fits without loss.

A file whose name ends in ``.ome.tif`` is an OME-TIFF, and what came from an OME-TIFF or an ImageJ
TIFF goes back into one if it fits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._lazy import planes_of
from napari_learned_diffusion.files._tiff_metadata import (
    NOTE,
    NOTED_METADATA,
    SIGNED_OFFSET,
    display_range,
    is_signed,
)
from napari_learned_diffusion.files._tiff_ome import OME_SUFFIXES, merged
from napari_learned_diffusion.files._tiff_pixels import oriented, stored_as, tags_for
from napari_learned_diffusion.files._units import (
    MICROMETERS,
    OME_LENGTHS,
    OME_TIMES,
    PIXEL,
    UNKNOWN,
)
from napari_learned_diffusion.files.volume import Volume

if TYPE_CHECKING:
    from typing import BinaryIO

_CLASSIC_TIFF_BYTES = 2**32 - 2**25
"""Pixels that fit in a TIFF with 32-bit offsets; 32 MiB are left for the directories."""

_OME_TYPES = (
    *("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64"),
    *("complex64", "complex128"),
)

_IMAGEJ_OWN = frozenset(
    {"ImageJ", "SCIFIO", "images", "channels", "slices", "frames", "hyperstack", "order", "axes"}
    | {"unit", "yunit", "zunit", "tunit", "spacing", "finterval", "fps", "min", "max", "shape"}
    | {"Labels", "LUTs", "Ranges", "mode", "cf", "c0", "c1", "c2", "c3", "c4", "vunit", NOTE}
)
"""Words of an ImageJ file that follow from the pixels and steps, or aren't copied unseen."""

_IMAGEJ_TAGS = frozenset(
    {"Info", "Labels", "Ranges", "LUTs", "Plot", "ROI", "Overlays", "Properties"}
)
"""What ImageJ stores in tags of its own, not as words of the description."""

_CALIBRATION = ("cf", "c0", "c1", "c2", "c3", "c4", "vunit")
"""Words for the function from stored numbers to values, and the unit of these."""


@dataclass(frozen=True)
class _Words:
    """What is said about an image in one flavour of TIFF.

    Parameters
    ----------
    metadata
        tifffile's argument of that name.
    resolution
        tifffile's arguments for the resolution tags.
    """

    metadata: dict[str, Any]
    resolution: dict[str, Any]


@dataclass(frozen=True)
class _Flavour:
    """A flavour of TIFF: how tifffile is told, and what it says about an image."""

    imagej: bool
    ome: bool
    words: Callable[[Volume], _Words]


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
    volume = _as_stored(volume)
    parts = _parts(volume)
    flavour = _flavour(path, volume, parts, compression)
    bigtiff = data.nbytes > _CLASSIC_TIFF_BYTES
    # Our own stream: tifffile would swallow that its last bytes don't fit on the disk any more.
    with path.open("x+b") as stream:
        with TiffWriter(stream, bigtiff=bigtiff, imagej=flavour.imagej, ome=flavour.ome) as tif:
            for part in parts:
                _write_image(tif, part, flavour, compression)
        if flavour.ome and "ome" in volume.metadata:
            _restore_xml(stream, volume.metadata["ome"])


def _as_stored(volume: Volume) -> Volume:
    """Rows and columns as in the source, where that is to be shown turned or mirrored."""
    orientation = volume.metadata.get("orientation")
    if orientation is None:
        return volume
    rows, columns = volume.plane_axes
    data = oriented(volume.data, (rows, columns), stored_as(orientation))
    scale, units = list(volume.scale), list(volume.units)
    if orientation >= 5:
        scale[rows], scale[columns] = scale[columns], scale[rows]
        units[rows], units[columns] = units[columns], units[rows]
    return replace(volume, data=data, scale=tuple(scale), units=tuple(units))


def _parts(volume: Volume) -> list[Volume]:
    """The volume, or the images that it was stacked from when it was read."""
    names = _names_of_parts(volume)
    if not names:
        return [volume]
    data: Any = volume.data
    return [
        replace(
            volume,
            data=data[number],
            axes=volume.axes[1:],
            scale=volume.scale[1:],
            units=volume.units[1:],
            name=name,
        )
        for number, name in enumerate(names)
    ]


def _names_of_parts(volume: Volume) -> list[str]:
    stacked = volume.metadata.get("stacked") or {}
    names = list(stacked.get("names", ()))
    is_stack = (
        volume.axes.startswith(stacked.get("axis", "-"))
        and len(names) == volume.data.shape[0]
        and (volume.scale[0], volume.units[0]) == UNKNOWN
        and not volume.metadata.get("placement")
    )
    return names if is_stack else []


def _write_image(tif: Any, volume: Volume, flavour: _Flavour, compression: str | None) -> None:
    data, words = volume.data, flavour.words(volume)
    dtype, shape = data.dtype, data.shape
    samples = volume.axes.endswith("S") and shape[-1] > 1 and dtype.kind != "b"
    colour = samples and shape[-1] in (3, 4) and dtype.kind in "uf"
    planes = planes_of(data, plane_ndim=3 if samples else _stored_ndim(shape))
    if flavour.imagej and dtype == np.int16:
        dtype, planes = np.dtype(np.uint16), _with_offset(planes)
    table = None if samples else _table_for(volume, flavour)
    photometric = volume.metadata.get("photometric", "minisblack")
    if colour:
        photometric = "rgb"
    elif table is not None and data.dtype.kind == "u":
        photometric = "palette"
    tif.write(
        planes,
        shape=shape,
        dtype=dtype,
        photometric=photometric,
        planarconfig="contig" if samples else None,
        colormap=table,
        compression=compression,
        metadata={"axes": volume.axes, **words.metadata},
        extratags=tags_for(volume.metadata, volume.missing),
        **words.resolution,
    )


def _with_offset(planes: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Signed numbers as ImageJ stores them."""
    for plane in planes:
        yield plane.view(np.uint16) ^ np.uint16(SIGNED_OFFSET)


def _table_for(volume: Volume, flavour: _Flavour) -> NDArray[np.uint16] | None:
    """The look-up table of the source where the flavour can hold it for such pixels."""
    table = volume.metadata.get("palette")
    if table is None or not _has_type_of_source(volume):
        return None
    if volume.data.dtype not in (np.uint8, np.uint16):
        return None
    levels = 2 ** (8 * volume.data.dtype.itemsize)
    if table.shape[1] > levels or (flavour.imagej and volume.data.dtype != np.uint8):
        return None
    # Of images of 4 bits, which are written as 8, the table has 16 levels.
    filled = np.repeat(table[:, -1:], levels - table.shape[1], axis=1)
    return np.concatenate([table, filled], axis=1)


def _has_type_of_source(volume: Volume) -> bool:
    """Whether numbers mean what they meant in the file that the volume was read from."""
    return bool(volume.metadata.get("pixel_type") == volume.data.dtype.name)


def _restore_xml(stream: BinaryIO, source: Mapping[str, Any]) -> None:
    """Say again what the XML of the source says beyond the layout of the pixels."""
    from tifffile import TiffFile

    stream.seek(0)
    with TiffFile(stream) as tif:
        description = tif.pages.first.tags["ImageDescription"]
        xml = merged(description.value, source)
        if xml != description.value:
            description.overwrite(xml.encode())
        stream.flush()


# --- flavours -------------------------------------------------------------------------------------


def _flavour(path: Path, volume: Volume, parts: list[Volume], compression: str | None) -> _Flavour:
    """The flavour that the name promises, or that of the source if it fits, or the first that does.

    Raises
    ------
    FileFormatError
        if the name promises OME-TIFF, and that can't hold the volume.
    """
    first = parts[0]
    imagej = _Flavour(imagej=True, ome=False, words=_imagej_words)
    ome = _Flavour(imagej=False, ome=True, words=_ome_words)
    shaped = _Flavour(imagej=False, ome=False, words=_shaped_words)
    promised = path.name.lower().endswith(OME_SUFFIXES)
    if promised or ("ome" in volume.metadata and _fits_ome(first)):
        if (reason := _not_ome(first)) is None:
            return ome
        # Where the source had such a name and was none either, as of a batch, the name isn't ours.
        if not _is_misnamed(volume):
            raise FileFormatError(
                f"OME-TIFF can't hold {reason}. Choose a name that ends in .tif without .ome."
            )
    if len(parts) > 1:
        return shaped
    if _fits_imagej(volume, compression):
        return imagej
    return ome if _fits_ome(volume) else shaped


def _is_misnamed(volume: Volume) -> bool:
    """Whether the file that a volume was read from had the name of an OME-TIFF, but was none."""
    name = str(volume.metadata.get("source", "")).lower()
    return name.endswith(OME_SUFFIXES) and volume.metadata.get("format") != "OME-TIFF"


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


# --- ImageJ ---------------------------------------------------------------------------------------


def _fits_imagej(volume: Volume, compression: str | None) -> bool:
    """Whether ImageJ's TIFF carries the volume without loss."""
    data, axes = volume.data, volume.axes
    (x, unit), (y, unit_y), z = (volume.step(axis) for axis in "XYZ")
    time = volume.step("T")
    return (
        (data.dtype in (np.uint8, np.uint16, np.float32) or _is_signed_by_imagej(volume))
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


def _is_signed_by_imagej(volume: Volume) -> bool:
    """Whether pixels are signed by ImageJ's calibration, as they were in the source."""
    return volume.data.dtype == np.int16 and is_signed(volume.metadata.get("imagej") or {})


def _imagej_words(volume: Volume) -> _Words:
    x, unit = volume.step("X")
    y, _ = volume.step("Y")
    # ImageJ's own word for micrometers; its file holds no letters beyond ASCII.
    words: dict[str, Any] = {"unit": {"micrometer": "micron"}.get(unit, unit)}
    z, time = volume.step("Z"), volume.step("T")
    if z != UNKNOWN:
        words["spacing"] = z[0]
    if time != UNKNOWN:
        words["finterval"] = time[0]
    offset = SIGNED_OFFSET if _is_signed_by_imagej(volume) else 0
    if limits := volume.metadata.get("contrast_limits"):
        words["min"], words["max"] = (limit + offset for limit in limits)
    words |= _words_of_source(volume)
    if note := _note_for(volume):
        words[NOTE] = json.dumps(note)
    return _Words(words, {"resolution": (1 / x, 1 / y), "resolutionunit": "NONE"})


def _words_of_source(volume: Volume) -> dict[str, Any]:
    """What the ImageJ file that the volume was read from says and is still true."""
    source: Mapping[str, Any] = volume.metadata.get("imagej") or {}
    sizes = dict(zip(volume.axes, volume.data.shape, strict=True))
    channels = sizes.get("C", 1)
    images = channels * sizes.get("Z", 1) * sizes.get("T", 1)
    same_channels = channels == source.get("channels", 1)
    words = {key: value for key, value in source.items() if key not in _IMAGEJ_OWN}
    if _has_type_of_source(volume):
        words |= {key: source[key] for key in _CALIBRATION if key in source}
    if "S" not in sizes and same_channels:
        words |= {key: source[key] for key in ("mode", "LUTs") if key in source}
    labels = source.get("Labels", ())
    if len([labels] if isinstance(labels, str) else labels) == images:
        words["Labels"] = labels
    # Of another quantity, or after other limits were set, the source's are meaningless.
    is_kept = volume.metadata.get("contrast_limits") == display_range(source) is not None
    if is_kept and same_channels and "Ranges" in source:
        words["Ranges"] = source["Ranges"]
    return {
        key: value if key in _IMAGEJ_TAGS else _in_ascii(value)
        for key, value in words.items()
        if key in _IMAGEJ_TAGS or isinstance(value, bool | int | float | str)
    }


def _in_ascii(value: bool | int | float | str) -> bool | int | float | str:
    r"""A word of a description, letters beyond ASCII as ImageJ writes them: ``\u00B5``."""
    if not isinstance(value, str):
        return value
    return "".join(letter if letter.isascii() else f"\\u{ord(letter):04X}" for letter in value)


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


# --- OME ------------------------------------------------------------------------------------------


def _fits_ome(volume: Volume) -> bool:
    """Whether OME-TIFF carries the volume without loss, and without a note of ours."""
    leading = set(volume.axes.removesuffix("S")) - set("YX")
    return (
        volume.data.dtype.name in _OME_TYPES
        and _has_plain_planes(volume)
        and leading <= set("TZC")
        and _has_ome_steps(volume)
    )


def _has_ome_steps(volume: Volume) -> bool:
    time = volume.step("T")
    return (
        all(0 < step < math.inf for step in volume.scale)
        and all(volume.step(axis)[1] in OME_LENGTHS for axis in "XYZ")
        and (time[1] in OME_TIMES or time == UNKNOWN)
        and all(volume.step(axis) == UNKNOWN for axis in volume.axes if axis not in "XYZT")
    )


def _not_ome(volume: Volume) -> str | None:
    """What OME-TIFF can't hold of the volume, even with a note of ours; None if it can all."""
    from tifffile import OmeXml, OmeXmlError

    axes, shape, dtype = volume.axes, volume.data.shape, volume.data.dtype
    if dtype.name not in (*_OME_TYPES, "bool"):
        return f"pixels of type {dtype}"
    unfit = f"an image with the axes {axes} of shape {shape}"
    *leading, rows, columns = shape[:-1] if axes.endswith("S") else shape
    samples = shape[-1] if axes.endswith("S") else 1
    if axes.endswith("S") and (samples not in (3, 4) or dtype.kind not in "uf"):
        return unfit
    try:
        stored = (math.prod(leading), 1, 1, rows, columns, samples)
        OmeXml().addimage(dtype, shape, stored, axes=axes)
    except (OmeXmlError, ValueError):
        return unfit
    return None


def _ome_words(volume: Volume) -> _Words:
    words: dict[str, Any] = {"Name": volume.name}
    known = set(volume.axes) <= set("TZCYXS")
    if known and _has_ome_steps(volume):
        for axis in "XYZ":
            step, unit = volume.step(axis)
            if (step, unit) != UNKNOWN:
                words[f"PhysicalSize{axis}"] = step
                words[f"PhysicalSize{axis}Unit"] = OME_LENGTHS[unit]
        step, unit = volume.step("T")
        if unit != PIXEL:
            words["TimeIncrement"] = step
            words["TimeIncrementUnit"] = OME_TIMES[unit]
        note = _note_for(volume)
    else:
        note = _note_for(volume) | _steps_in_words(volume)
    names = volume.metadata.get("channel_names")
    if names and "C" in volume.axes and len(names) == volume.data.shape[volume.axes.index("C")]:
        words["Channel"] = {"Name": list(names)}
    if note:
        words["MapAnnotation"] = {"Namespace": NOTE, NOTE: json.dumps(note)}
    return _Words(words, _resolution_in_cm(volume))


# --- tifffile's own -------------------------------------------------------------------------------


def _shaped_words(volume: Volume) -> _Words:
    note = _note_for(volume) | _steps_in_words(volume)
    return _Words({NOTE: note}, _resolution_in_cm(volume))


def _steps_in_words(volume: Volume) -> dict[str, Any]:
    return {"axes": volume.axes, "scale": list(volume.scale), "units": list(volume.units)}


def _resolution_in_cm(volume: Volume) -> dict[str, Any]:
    """The pixel size for programs that read neither OME nor our note."""
    micrometers = [
        step * MICROMETERS.get(unit, math.nan) for step, unit in (volume.step(a) for a in "XY")
    ]
    if not all(1e-3 <= size <= 1e9 for size in micrometers):
        return {}
    x, y = (MICROMETERS["centimeter"] / size for size in micrometers)
    return {"resolution": (x, y), "resolutionunit": "CENTIMETER"}
