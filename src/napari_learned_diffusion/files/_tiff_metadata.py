"""What the flavours of TIFF say about steps, units and more, and the note that `write` adds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from napari_learned_diffusion.files._tiff_ome import OmeImages
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


class Description:
    """What a TIFF says in words, XML or JSON about its series, parsed once.

    Parameters
    ----------
    tif
        The file, open.
    """

    def __init__(self, tif: TiffFile) -> None:
        self._tif = tif
        kinds = {series.kind for series in tif.series}
        self._ome = OmeImages(tif) if "ome" in kinds else None
        self._imagej = (tif.imagej_metadata or {}) if "imagej" in kinds else {}
        self._shaped = (tif.shaped_metadata or ()) if "shaped" in kinds else ()

    def name(self, number: int) -> str:
        """Name of a series, or its number."""
        if self._ome is not None:
            return self._ome.name(number)
        return str(self._tif.series[number].name or number)

    def note(self, number: int) -> dict[str, Any]:
        """What `write` has left in the file beyond the format's own fields."""
        note: Any = None
        match self._tif.series[number].kind:
            case "imagej":
                note = self._imagej.get(NOTE)
            case "ome" if self._ome is not None:
                note = self._ome.mapped.get(NOTE)
            case "shaped":
                note = self._words(number).get(NOTE)
        with suppress(ValueError, TypeError):
            note = json.loads(note)
        return note if isinstance(note, dict) else {}

    def calibration(self, number: int) -> tuple[dict[str, Step], dict[str, Any]]:
        """Step and unit of each axis of which they are known, and the metadata worth keeping."""
        series, note = self._tif.series[number], self.note(number)
        metadata: dict[str, Any]
        if series.kind == "ome" and self._ome is not None:
            steps, metadata = self._ome.calibration(number)
        elif series.kind == "imagej":
            steps, metadata = _imagej_calibration(series.keyframe, self._imagej)
        else:
            words = self._words(number)
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

    def source(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Metadata by which the words of some series come back when they are written."""
        if self._ome is None:
            return {}
        return {"ome": {"xml": self._ome.text, "images": self._ome.ids(numbers)}}

    def _words(self, number: int) -> dict[str, Any]:
        """The JSON that tifffile keeps in its own TIFFs, for one series."""
        return self._shaped[number] if number < len(self._shaped) else {}


def is_signed(imagej: Mapping[str, Any]) -> bool:
    """Whether 16-bit values are ImageJ's way of storing signed ones: the line value − 32768."""
    return (imagej.get("cf"), imagej.get("c0"), imagej.get("c1")) == (0, -SIGNED_OFFSET, 1)


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


def display_range(words: Mapping[str, Any]) -> tuple[float, float] | None:
    """Contrast limits of an ImageJ file's first channel, as values of its pixels."""
    ranges = words.get("Ranges")
    low, high = ranges[:2] if ranges else (words.get("min"), words.get("max"))
    if not (isinstance(low, int | float) and isinstance(high, int | float)):
        return None
    offset = SIGNED_OFFSET if is_signed(words) else 0
    limits = float(low) - offset, float(high) - offset
    return limits if math.isfinite(low) and math.isfinite(high) and low < high else None


def _imagej_calibration(
    page: TiffPage, words: Mapping[str, Any]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Steps and metadata of an ImageJ file; its contrast limits are those of the first channel."""
    metadata: dict[str, Any] = {
        "format": "ImageJ TIFF",
        "imagej": {k: v for k, v in words.items() if k != NOTE},
    }
    if (limits := display_range(words)) is not None:
        metadata["contrast_limits"] = limits
    labels = words.get("Labels", [])
    if isinstance(labels, list) and 1 < len(labels) == words.get("channels"):
        metadata["channel_names"] = [str(label) for label in labels]
    return _word_steps(page, words), metadata
