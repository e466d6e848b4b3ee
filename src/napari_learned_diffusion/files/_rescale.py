"""Stored numbers and what they mean: slope and intercept, as DICOM and NIfTI have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


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
        whole = float(self.slope).is_integer() and float(self.intercept).is_integer()
        if whole and self.stored.kind in "iu":
            limits = np.iinfo(self.stored)
            ends = [
                self.slope * (given if given is not None else limit) + self.intercept
                for given, limit in ((lowest, limits.min), (highest, limits.max))
            ]
            for name in ("int16", "int32", "int64"):
                fits = np.iinfo(name)
                if fits.min <= min(ends) and max(ends) <= fits.max:
                    return name
        return np.float32 if self.stored.itemsize <= 2 else np.float64

    def apply(self, stored: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
        """Stored numbers to values of type ``dtype``."""
        if self.is_trivial:
            return stored.astype(dtype, copy=False)
        wide = np.int64 if np.dtype(dtype).kind == "i" else np.float64
        return (stored.astype(wide) * wide(self.slope) + wide(self.intercept)).astype(dtype)

    def undo(
        self, values: NDArray[Any], lowest: float | None = None, highest: float | None = None
    ) -> NDArray[Any]:
        """Values to stored numbers, rounded and kept within their range for integers."""
        if self.is_trivial and values.dtype == self.stored:
            return values
        stored = (values.astype(np.float64) - self.intercept) / self.slope
        if self.stored.kind not in "iu":
            return stored.astype(self.stored)
        limits = np.iinfo(self.stored)
        low = limits.min if lowest is None else lowest
        high = limits.max if highest is None else highest
        return np.rint(stored).clip(low, high).astype(self.stored)
