"""Stored numbers of a DICOM slice and what they mean: rescaling, bits in use, padding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._rescale import Rescale

_EXACT = 1e-3
"""Part of a stored step by which a value may be off and count as lying on it."""

_FINE = 0.01
"""Part of a plane's standard deviation that rounding to stored steps may be off by."""

_HIGHEST = 32767
"""The highest stored number of 16 bits with a sign; the lowest is kept for padding."""

_LONGEST_NUMBER = 16
"""Letters of a decimal number in DICOM."""


@dataclass(frozen=True)
class Values:
    """How the numbers of one slice are stored.

    Parameters
    ----------
    rescale
        Type of the stored numbers, slope and intercept.
    bits
        How many bits of each are in use.
    padding
        Lowest and highest of the stored numbers that stand for no value, as they are stored.
    """

    rescale: Rescale
    bits: int
    padding: tuple[int, int] | None = None

    @classmethod
    def of(cls, dataset: Any) -> Values:
        """What a header says.

        Raises
        ------
        ValueError, TypeError, AttributeError
            if it makes no sense.
        """
        allocated = int(dataset.BitsAllocated)
        bits = int(dataset.get("BitsStored") or allocated)
        is_signed = bool(dataset.PixelRepresentation)
        slope = float(dataset.get("RescaleSlope") or 1)
        intercept = float(dataset.get("RescaleIntercept") or 0)
        if not (math.isfinite(slope) and math.isfinite(intercept)):
            raise ValueError(f"rescale slope {slope}, intercept {intercept}")
        stored = np.dtype(f"{'i' if is_signed else 'u'}{allocated // 8}")
        ends = [
            _as_stored(dataset.get(name), stored)
            for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")
        ]
        padding = None
        if ends[0] is not None:
            other = ends[0] if ends[1] is None else ends[1]
            padding = min(ends[0], other), max(ends[0], other)
        return cls(
            Rescale(stored, slope, intercept), bits if 0 < bits <= allocated else allocated, padding
        )

    @property
    def is_signed(self) -> bool:
        return self.rescale.stored.kind == "i"

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest number that the bits in use hold."""
        half = 1 << self.bits - 1
        return (-half, half - 1) if self.is_signed else (0, 2 * half - 1)

    @property
    def is_padded_beyond(self) -> bool:
        """Whether padding uses bits that values don't."""
        low, high = self.limits
        return self.padding is not None and (self.padding[0] < low or self.padding[1] > high)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that holds every value, and padding."""
        ends = [*self.limits, *(self.padding or ())]
        return np.dtype(self.rescale.value_type(min(ends), max(ends)))

    def apply(self, stored: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Stored numbers to values; where padding uses other bits, with all bits as stored."""
        if self.is_padded_beyond and self.padding is not None:
            unused = 8 * self.rescale.stored.itemsize - self.bits
            padded = (stored >= self.padding[0]) & (stored <= self.padding[1])
            stored = np.where(padded, stored, (stored << unused) >> unused)
        return self.rescale.apply(stored, dtype)

    def missing(self, dtype: np.dtype[Any]) -> list[float]:
        """The values that stand for no value."""
        if self.padding is None:
            return []
        padding = np.arange(self.padding[0], self.padding[1] + 1)
        return [float(value) for value in self.rescale.apply(padding, dtype)]

    def can_store(self, plane: NDArray[Any]) -> bool:
        """Whether the stored numbers reach all values of a plane, in steps that are fine enough."""
        stored = self._exact(plane)
        known = np.isfinite(stored)
        if self.padding is None:
            if not known.all():
                return False
        else:
            known &= (stored < self.padding[0] - _EXACT) | (stored > self.padding[1] + _EXACT)
            if np.isinf(stored).any():
                return False
        stored = stored[known]
        if stored.size == 0:
            return True
        rounded = np.rint(stored)
        low, high = self.limits
        if rounded.min() < low or rounded.max() > high:
            return False
        off = float(np.sqrt(np.mean((stored - rounded) ** 2)))
        return off <= _EXACT or off <= _FINE * float(stored.std())

    def store(self, plane: NDArray[Any]) -> NDArray[Any]:
        """Values to stored numbers, NaN to padding; only those that `can_store` is true of."""
        stored = self._exact(plane)
        if self.padding is not None:
            stored[np.isnan(stored)] = self.padding[0]
        limits = np.iinfo(self.rescale.stored)
        # Clipped as unsigned 64-bit numbers have no exact bounds in floating point.
        rounded: NDArray[Any] = np.rint(stored).clip(limits.min, limits.max)
        return rounded.astype(self.rescale.stored)

    def _exact(self, plane: NDArray[Any]) -> NDArray[Any]:
        """Values to stored numbers that aren't rounded."""
        wide: NDArray[Any] = plane.astype(np.float64)
        return (wide - self.rescale.intercept) / self.rescale.slope


def _as_stored(value: object, stored: np.dtype[Any]) -> int | None:
    """A number of a header, which may have the other sign's type, as the pixels are stored."""
    try:
        number = int(str(value))
    except (TypeError, ValueError):
        return None
    bits = 8 * stored.itemsize
    number %= 1 << bits
    return number - (1 << bits) if stored.kind == "i" and number >= 1 << bits - 1 else number


@dataclass
class Extent:
    """What values there are in planes that come one by one."""

    lowest: float = math.inf
    highest: float = -math.inf
    are_whole: bool = True
    has_nan: bool = False

    def add(self, plane: NDArray[Any]) -> None:
        if plane.dtype.kind == "f":
            self.are_whole = False
            self.has_nan |= bool(np.isnan(plane).any())
            if self.has_nan:
                plane = plane[~np.isnan(plane)]
        if plane.size:
            self.lowest = min(self.lowest, float(plane.min()))
            self.highest = max(self.highest, float(plane.max()))


def values_for(extent: Extent) -> Values:
    """16 bits with a sign for any values: whole numbers as they are, others in 65535 steps.

    Steps are powers of two, so that 0, and whole numbers where steps are smaller, stay exact.

    Raises
    ------
    FileFormatError
        if values are infinite, or whole numbers need more than 16 bits.
    """
    lowest, highest = extent.lowest, extent.highest
    if lowest > highest:  # there are none
        lowest = highest = 0.0
    largest = max(abs(lowest), abs(highest))
    if not math.isfinite(largest):
        raise FileFormatError(
            "DICOM holds no infinite values. Write OME-Zarr, NIfTI or TIFF, or set them to NaN."
        )
    slope, intercept = 1.0, 0.0
    if extent.are_whole:
        if largest > _HIGHEST:
            intercept = math.floor((lowest + highest) / 2)
        if highest - intercept > _HIGHEST or lowest - intercept < -_HIGHEST:
            raise FileFormatError(
                f"DICOM holds whole numbers of up to 16 bits, and this image has them from "
                f"{lowest:.0f} to {highest:.0f}. Write OME-Zarr, NIfTI or TIFF."
            )
    elif largest > 0:
        slope = float(decimal(2.0 ** math.ceil(math.log2(largest / _HIGHEST))))
        # Rounding to the letters of a decimal may have left it a little too small.
        slope *= 2 if slope * _HIGHEST < largest else 1
    padding = (-_HIGHEST - 1,) * 2 if extent.has_nan else None
    return Values(Rescale(np.dtype(np.int16), slope, intercept), 16, padding)


def decimal(number: float) -> str:
    """A number in at most the letters that DICOM allows for."""
    for digits in range(17, 0, -1):
        text = f"{number:.{digits}g}"
        if len(text) <= _LONGEST_NUMBER:
            return text
    return "0"
