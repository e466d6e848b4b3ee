"""What the flavours of TIFF say about steps, units and more, and the note that `write` adds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from napari_learned_diffusion.files._units import (
    MICROMETERS,
    PIXEL,
    Step,
    parse_step,
    parse_unit,
)

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

NOTE = "napari_learned_diffusion"
"""Key under which a TIFF keeps what its own fields have no place for, as JSON."""

NOTED_METADATA = ("placement", "contrast_limits")
"""Metadata that every TIFF written carries in that note."""

SIGNED_OFFSET = 2**15

_RESOLUTION_UNITS = {2: "inch", 3: "centimeter", 4: "millimeter", 5: "micrometer"}
"""Values of the ResolutionUnit tag: the standard's two, and two that are in use."""


def note_in(tif: TiffFile, number: int) -> dict[str, Any]:
    """What `write` has left in the file beyond the format's own fields."""
    note: Any = None
    match tif.series[number].kind:
        case "imagej":
            note = (tif.imagej_metadata or {}).get(NOTE)
        case "ome":
            note = next((e.text for e in _ome_root(tif).iter() if e.get("K") == NOTE), None)
        case "shaped":
            note = _shaped_words_of(tif, number).get(NOTE)
    with suppress(ValueError, TypeError):
        note = json.loads(note)
    return note if isinstance(note, dict) else {}


def calibration(
    tif: TiffFile, number: int, note: Mapping[str, Any]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Step and unit of each axis of which they are known, and the metadata worth keeping."""
    series = tif.series[number]
    metadata: dict[str, Any]
    match series.kind:
        case "ome":
            steps, metadata = _ome_calibration(tif, number)
        case "imagej":
            steps, metadata = _imagej_calibration(series.keyframe, tif.imagej_metadata or {})
            metadata["format"] = "ImageJ TIFF"
        case _:
            words = _shaped_words_of(tif, number)
            # tifffile's own files may tell the voxel size in ImageJ's words.
            steps = _word_steps(series.keyframe, words) if "unit" in words else {}
            steps = steps or _tag_steps(series.keyframe)
            metadata = {"format": "TIFF"}
    for axis, scale, unit in zip(
        note.get("axes", ""), note.get("scale", ()), note.get("units", ()), strict=False
    ):
        steps[axis] = (float(scale), str(unit))
    metadata |= {key: note[key] for key in NOTED_METADATA if key in note}
    if "contrast_limits" in metadata:
        metadata["contrast_limits"] = tuple(metadata["contrast_limits"])
    return steps, metadata


def is_signed(imagej: Mapping[str, Any]) -> bool:
    """Whether 16-bit values are ImageJ's way of storing signed ones: the line value − 32768."""
    return (imagej.get("cf"), imagej.get("c0"), imagej.get("c1")) == (0, -SIGNED_OFFSET, 1)


def _shaped_words_of(tif: TiffFile, number: int) -> dict[str, Any]:
    """The JSON that tifffile keeps in its own TIFFs, for one series."""
    descriptions = tif.shaped_metadata or ()
    return descriptions[number] if number < len(descriptions) else {}


def pixel_size(resolution: object, length: float = 1.0) -> float | None:
    """The pixel size for so many pixels on a ``length``, or None if the fraction says nothing.

    Parameters
    ----------
    resolution
        A TIFF tag's value, which should be a fraction as two whole numbers.
    length
        What the resolution refers to, in the unit that the size is wanted in.
    """
    if not isinstance(resolution, tuple) or len(resolution) != 2 or min(resolution) <= 0:
        return None
    numerator, denominator = resolution
    size: float = length * denominator / numerator
    tolerance = 1e-10
    if denominator >= 10**5 and 10**9 % denominator == 0:
        # ImageJ and others round the resolution to some decimals: 0.65 µm becomes 1 / 1.538462.
        tolerance = max(tolerance, 0.5 / numerator)
    for digits in range(1, 11):
        simple = float(f"{size:.{digits}g}")
        if math.isclose(simple, size, rel_tol=tolerance):
            return simple
    return size


def _pixel_sizes(page: TiffPage, length: float = 1.0) -> dict[str, float]:
    """Pixel sizes along X and Y, where both resolutions are stated; see `pixel_size`."""
    sizes = {}
    for axis, tag in (("X", "XResolution"), ("Y", "YResolution")):
        value = page.tags[tag].value if tag in page.tags else None
        if (size := pixel_size(value, length)) is None:
            return {}
        sizes[axis] = size
    return sizes


def _tag_steps(page: TiffPage) -> dict[str, Step]:
    """Steps from a plain TIFF's resolution tags, in micrometers."""
    sizes = _pixel_sizes(page)
    if not sizes:
        return {}
    code = int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 2
    if code not in _RESOLUTION_UNITS:
        # Without a unit the resolutions only say how much longer than wide a pixel is.
        ratio = sizes["Y"] / sizes["X"]
        return {} if ratio == 1 else {"Y": (ratio, PIXEL)}
    numerator, denominator = page.tags["XResolution"].value
    if code == 2 and numerator in (72 * denominator, 96 * denominator):
        # A screen's resolution is what programs write that know nothing. ImageJ ignores it too.
        return {}
    micrometers = _pixel_sizes(page, length=MICROMETERS[_RESOLUTION_UNITS[code]])
    return {axis: (size, "micrometer") for axis, size in micrometers.items()}


def _word_steps(page: TiffPage, words: Mapping[str, Any]) -> dict[str, Step]:
    """Steps from the words of an ImageJ description and the resolution tags."""
    unit = parse_unit(words.get("unit", PIXEL))
    steps = {
        axis: (size, parse_unit(words.get(f"{axis.lower()}unit", unit)))
        for axis, size in _pixel_sizes(page).items()
    }
    if (spacing := parse_step(words.get("spacing"))) is not None:
        steps["Z"] = (spacing, parse_unit(words.get("zunit", unit)))
    if (interval := parse_step(words.get("finterval"))) is not None:
        steps["T"] = (interval, parse_unit(words.get("tunit", "second")))
    elif (frames_per_second := parse_step(words.get("fps"))) is not None:
        steps["T"] = (1 / frames_per_second, "second")
    return steps


def _imagej_calibration(
    page: TiffPage, words: Mapping[str, Any]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Steps and metadata of an ImageJ file; its contrast limits are those of the first channel."""
    metadata: dict[str, Any] = {"imagej": {k: v for k, v in words.items() if k != NOTE}}
    limits = words.get("Ranges", (words.get("min"), words.get("max")))[:2]
    if all(isinstance(limit, int | float) for limit in limits) and limits[0] < limits[1]:
        offset = SIGNED_OFFSET if is_signed(words) else 0
        metadata["contrast_limits"] = tuple(float(limit) - offset for limit in limits)
    return _word_steps(page, words), metadata


def _ome_root(tif: TiffFile) -> ElementTree.Element:
    return ElementTree.fromstring(tif.ome_metadata or "<OME/>")


def _ome_calibration(tif: TiffFile, number: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """Steps and metadata from the OME-XML of a series."""
    steps: dict[str, Step] = {}
    metadata: dict[str, Any] = {"format": "OME-TIFF"}
    images = _ome_root(tif).findall("{*}Image")
    if len(images) != len(tif.series):
        # Images without pixels are no series of tifffile's: then only the name tells.
        name = tif.series[number].name
        image = next((image for image in images if image.get("Name") == name), None)
    else:
        image = images[number]
    pixels = None if image is None else image.find("{*}Pixels")
    if pixels is None:
        return steps, metadata
    for axis in "XYZ":
        if (size := parse_step(pixels.get(f"PhysicalSize{axis}"))) is not None:
            steps[axis] = (size, parse_unit(pixels.get(f"PhysicalSize{axis}Unit", "µm")))
    if (interval := parse_step(pixels.get("TimeIncrement"))) is not None:
        steps["T"] = (interval, parse_unit(pixels.get("TimeIncrementUnit", "s")))
    names = [channel.get("Name") for channel in pixels.findall("{*}Channel")]
    if any(names):
        metadata["channel_names"] = [name or f"channel {i}" for i, name in enumerate(names)]
    return steps, metadata
