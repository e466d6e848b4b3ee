"""Stored numbers and what they mean: slope and intercept, as DICOM and NIfTI have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_SINGLE_STEPS = 2**24
"""Whole numbers that single precision tells from each other."""


@dataclass(frozen=True)
class Rescale:
    """``value = slope * stored + intercept``, and back.

    Parameters
    ----------
    stored
        Type of the stored numbers.
    slope, intercept
        In the unit of the values, such as Hounsfield units.
    """

    stored: np.dtype[Any]
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def is_trivial(self) -> bool:
        return self.slope == 1 and self.intercept == 0

    def value_type(self, lowest: float | None = None, highest: float | None = None) -> DTypeLike:
        """The smallest type that holds every value exactly, or a floating one.

        Parameters
        ----------
        lowest, highest
            Range of the stored numbers, where it is smaller than their type's.
        """
        if self.is_trivial:
            return self.stored.newbyteorder("=")
        if self.stored.kind == "c":
            return np.complex128
        info = np.iinfo if self.stored.kind in "iu" else np.finfo
        limits = info(self.stored)
        ends = [
            self.slope * float(given if given is not None else limit) + self.intercept
            for given, limit in ((lowest, limits.min), (highest, limits.max))
        ]
        whole = float(self.slope).is_integer() and float(self.intercept).is_integer()
        if whole and self.stored.kind in "iu":
            for name in ("int16", "int32", "int64"):
                fits = np.iinfo(name)
                if fits.min <= min(ends) and max(ends) <= fits.max:
                    return name
        # Steps of the size of the slope must be told from each other even there.
        largest = max(abs(end) for end in ends)
        fine = largest <= min(abs(self.slope) * _SINGLE_STEPS, float(np.finfo(np.float32).max))
        return np.float32 if self.stored.itemsize <= 2 and fine else np.float64

    def apply(self, stored: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
        """Stored numbers to values of type ``dtype``."""
        if self.is_trivial:
            return stored.astype(dtype, copy=False)
        wide = {"i": np.int64, "c": np.complex128}.get(np.dtype(dtype).kind, np.float64)
        with np.errstate(over="ignore"):  # infinite then, and so masked
            values = stored.astype(wide) * wide(self.slope) + wide(self.intercept)
            return np.asarray(values, dtype)

    def undo(
        self, values: NDArray[Any], lowest: float | None = None, highest: float | None = None
    ) -> NDArray[Any]:
        """Values to stored numbers, rounded and kept within their range for integers."""
        if self.is_trivial and values.dtype == self.stored:
            return values
        wide: DTypeLike = np.complex128 if values.dtype.kind == "c" else np.float64
        stored: NDArray[Any] = (values.astype(wide) - self.intercept) / self.slope
        if self.stored.kind not in "iu":
            return stored.astype(self.stored)
        limits = np.iinfo(self.stored)
        low = limits.min if lowest is None else lowest
        high = limits.max if highest is None else highest
        rounded: NDArray[Any] = np.rint(stored).clip(low, high).astype(self.stored)
        return rounded
