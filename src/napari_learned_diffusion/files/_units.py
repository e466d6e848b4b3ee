"""Units of length and time, and steps along axes, as programs write them into files."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

PIXEL = "pixel"
"""The unit of an axis of which no physical size is known."""

Step: TypeAlias = tuple[float, str]
"""Step along an axis and its unit."""

UNKNOWN: Step = (1.0, PIXEL)

MICROMETERS = {
    "picometer": 1e-6,
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "inch": 25400.0,
}
"""Length of each unit that a TIFF may state."""

OME_LENGTHS = {
    "picometer": "pm",
    "angstrom": "Å",
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "inch": "in",
    PIXEL: "pixel",
}

OME_TIMES = {
    "nanosecond": "ns",
    "microsecond": "µs",
    "millisecond": "ms",
    "second": "s",
    "minute": "min",
    "hour": "h",
}

_ALIASES = {
    "micron": "micrometer",
    "\\u00b5m": "micrometer",
    "sec": "second",
    "msec": "millisecond",
    "usec": "microsecond",
    "hr": "hour",
    "\\u00c5": "angstrom",
    "\\u00e5": "angstrom",
    "a": "angstrom",
}


def _plain(text: str) -> str:
    """Spellings of one unit made the same: case, both letters mu, British and plural endings."""
    text = text.strip().lower().replace("\u03bc", "u").replace("\u00b5", "u")
    if len(text) > 3:
        text = text.removesuffix("s").replace("metre", "meter")
    return {"inche": "inch"}.get(text, text)


_UNITS = {
    _plain(spelling): unit
    for spelling, unit in [
        *((unit, unit) for unit in OME_LENGTHS | OME_TIMES),
        *((symbol, unit) for unit, symbol in (OME_LENGTHS | OME_TIMES).items()),
        *_ALIASES.items(),
    ]
}


def parse_unit(text: object) -> str:
    """The pint name of a unit as some program wrote it, ``"pixel"`` if it says nothing."""
    return _UNITS.get(_plain(str(text)), PIXEL)


def _without_float32_noise(value: float) -> float:
    """0.1 for 0.10000000149011612: the decimal that a single-precision number was meant to be."""
    single = np.float32(value)
    if math.isclose(float(single), value, rel_tol=1e-10):
        return float(str(single))
    return value


def parse_step(value: object) -> float | None:
    """A step that is written as text or number; None unless it is finite and positive."""
    try:
        step = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return _without_float32_noise(step) if 0 < step < math.inf else None
