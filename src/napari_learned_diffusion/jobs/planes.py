"""Planes of an array of any dimension, and their way into the solver's units and back."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, as_number
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.noise import NoiseModel

PlaneAxes = tuple[int, int]
Spacing = tuple[float, float]
"""Distance of rows and of columns, in any unit."""

LAST_AXES: PlaneAxes = (-2, -1)


def check_image(image: Any, plane_axes: PlaneAxes) -> PlaneAxes:
    """The plane axes counted from the front, of an image that can be denoised.

    Parameters
    ----------
    image
        Any array with ``shape``, ``dtype`` and indexing: numpy, dask, zarr.
    plane_axes
        Row axis and column axis of the planes; negative ones count from the end.

    Raises
    ------
    InvalidImageError
        if it has fewer than two dimensions, no pixels, values that are no intensities, or no such
        axes.
    """
    shape, dtype = tuple(image.shape), np.dtype(image.dtype)
    if dtype.kind == "b":
        raise InvalidImageError(
            "The image is boolean: a mask has no noise that diffusion could remove. "
            "Choose an image of intensities, or convert it to numbers first."
        )
    if dtype.kind == "c":
        raise InvalidImageError(
            "The image is complex. "
            "Denoise its magnitude, or its real and imaginary parts one by one."
        )
    if dtype.kind not in "iuf":
        raise InvalidImageError(f"The image has values of type {dtype}, which are no intensities.")
    if len(shape) < 2:
        raise InvalidImageError(
            f"The image has {len(shape)} dimension{'s' if len(shape) != 1 else ''}; "
            "planes of two dimensions are needed."
        )
    if 0 in shape:
        raise InvalidImageError(f"The image has no pixels: its shape is {shape}.")
    rows, columns = _two_axes(plane_axes)
    if not all(-len(shape) <= a < len(shape) for a in (rows, columns)):
        raise InvalidImageError(f"An image of shape {shape} has no plane axes {plane_axes}.")
    rows, columns = rows % len(shape), columns % len(shape)
    if rows == columns:
        raise InvalidImageError("The two axes of a plane must differ.")
    return rows, columns


def _two_axes(plane_axes: Any) -> PlaneAxes:
    """Two numbers, of whatever kind of integer."""
    try:
        rows, columns = (operator.index(axis) for axis in plane_axes)
    except (TypeError, ValueError) as error:
        raise InvalidImageError(
            "The axes of a plane are two whole numbers, such as (-2, -1): its row axis and its "
            f"column axis, not {plane_axes!r}."
        ) from error
    return rows, columns


def check_spacing(spacing: Any) -> tuple[float, float]:
    """The distance of rows and of columns, as numbers of Python's own type.

    Raises
    ------
    InvalidSettingError
        unless they are two finite numbers above 0.
    """
    try:
        rows, columns = (as_number("spacing", distance) for distance in spacing)
    except (TypeError, ValueError, InvalidSettingError):
        rows = columns = math.nan
    if not all(math.isfinite(d) and d > 0 for d in (rows, columns)):
        raise InvalidSettingError(
            "The spacing is two finite numbers above 0, the distance of rows and of columns, "
            f"not {spacing!r}."
        )
    return float(rows), float(columns)


class PlaneIndices(Sequence[tuple[int, ...]]):
    """Index of every plane of a stack, computed when asked for: a stack may have any number.

    Parameters
    ----------
    lengths
        Numbers of planes along the axes that aren't part of the planes.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self._lengths = tuple(int(n) for n in lengths)

    def __len__(self) -> int:
        return math.prod(self._lengths)

    @overload
    def __getitem__(self, number: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, number: slice) -> list[tuple[int, ...]]: ...

    def __getitem__(self, number: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        rest = range(len(self))[number]
        index = []
        for length in reversed(self._lengths):
            rest, position = divmod(rest, length)
            index.append(position)
        return tuple(reversed(index))

    def __contains__(self, index: object) -> bool:
        return (
            isinstance(index, tuple)
            and len(index) == len(self._lengths)
            and all(0 <= i < n for i, n in zip(index, self._lengths, strict=True))
        )

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Number of the plane with an index."""
        number = 0
        if value in self:
            for i, n in zip(value, self._lengths, strict=True):
                number = number * n + i
            if number in range(len(self))[start:stop]:
                return number
        raise ValueError(f"There is no plane {value}.")


def plane_indices(shape: tuple[int, ...], plane_axes: PlaneAxes) -> PlaneIndices:
    """Index of every plane, one number for each axis that isn't part of the planes."""
    return PlaneIndices(tuple(n for axis, n in enumerate(shape) if axis not in plane_axes))


def plane_key(index: tuple[int, ...], ndim: int, plane_axes: PlaneAxes) -> tuple[Any, ...]:
    """What to index an array with to get a plane."""
    others = iter(index)
    return tuple(slice(None) if axis in plane_axes else next(others) for axis in range(ndim))


LARGEST_EXTENT = 1e100
"""Squares of the values, and of what they are divided by, must have a double."""

LARGEST_INTEGER = 2**53
"""Beyond it integers have no double of their own."""


def check_values(lowest: float, highest: float, dtype: np.dtype[Any]) -> None:
    """Refuse values that can't be computed with.

    Raises
    ------
    InvalidImageError
        if floating-point values, or their differences, are beyond 1e100 or below 1e-100, or
        integers beyond 2⁵³.
    """
    largest, extent = max(abs(lowest), abs(highest)), highest / 2 - lowest / 2
    if dtype.kind in "iu":
        if largest > LARGEST_INTEGER:
            raise InvalidImageError(
                f"The image has integers up to {largest:.3g}, which can't be computed exactly: "
                "beyond 2^53 they have no floating-point number of their own. Subtract the lowest "
                "value first, or convert the image to another type."
            )
    elif highest > lowest and not (largest <= LARGEST_EXTENT and extent >= 1 / LARGEST_EXTENT):
        raise InvalidImageError(
            f"The image has values from {lowest:.3g} to {highest:.3g}, whose squares are beyond "
            "what a computer calculates with. Divide the image by its largest value first."
        )


LARGEST_STABILISED = 1e15
"""Largest intensity, in standard deviations of the noise, that a model is shown: sums of squares
are finite in single precision."""


def stabilised_range(noise: NoiseModel, lowest: float, highest: float) -> float:
    """The range of a plane in standard deviations of its noise.

    Raises
    ------
    InvalidSettingError
        if the noise is so weak that no number can tell the image in units of it.
    """
    try:
        with np.errstate(all="ignore"):
            low, high = noise.stabilise(np.array([lowest, highest]))
    except (ZeroDivisionError, OverflowError):
        low, high = -np.inf, np.inf
    if not max(abs(low), abs(high)) <= LARGEST_STABILISED:
        raise InvalidSettingError(
            f"The noise model ({noise.describe()}) is too weak to compute with: the image reaches "
            f"from {lowest:.4g} to {highest:.4g}. Give the noise level in the units of the image."
        )
    return float(high - low)


def diffusion_spacing(config: DiffusionConfig, spacing: Spacing) -> Spacing:
    """The distances that the diffusion goes by: by default it counts in pixels."""
    return spacing if config.use_spacing else (1.0, 1.0)


def read_plane(image: Any, index: tuple[int, ...], plane_axes: PlaneAxes) -> NDArray[Any]:
    """One plane in memory, ``(rows, columns)``; of a lazy array only that plane is computed.

    A masked array stays one.
    """
    plane: NDArray[Any] = np.asanyarray(image[plane_key(index, len(image.shape), plane_axes)])
    if not isinstance(plane, np.ma.MaskedArray):
        plane = np.asarray(plane)
    return plane.T if plane_axes[0] > plane_axes[1] else plane


def write_plane(
    image: Any, index: tuple[int, ...], plane_axes: PlaneAxes, plane: NDArray[Any]
) -> None:
    """Write one plane, ``(rows, columns)``, into an array."""
    key = plane_key(index, len(image.shape), plane_axes)
    image[key] = plane.T if plane_axes[0] > plane_axes[1] else plane


@dataclass(frozen=True)
class SolverUnits:
    """The affine map from a plane's intensities to numbers around 0 and of size 1, and back.

    The solver commutes with it, so it changes nothing but the rounding: offsets of millions and
    values of any size keep single precision's seven digits for the image itself. The scale is a
    power of two, so scaling is exact.
    """

    centre: float
    scale: float
    lowest: float
    highest: float
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, plane: NDArray[Any], valid: NDArray[np.bool_] | None) -> SolverUnits:
        """Fitted to the valid pixels of a plane, of which there is at least one."""
        values = plane if valid is None else plane[valid]
        lowest, highest = float(values.min()), float(values.max())
        centre = float(values.mean(dtype=np.float64))
        if not math.isfinite(centre):  # the sum of huge values overflowed
            centre = lowest / 2 + highest / 2
        extent = max(highest / 2 - centre / 2, centre / 2 - lowest / 2)
        scale = 2.0 ** math.frexp(extent)[1] if extent > 0 else 1.0
        return cls(centre, scale, lowest, highest, plane.dtype)

    def encode(
        self, plane: NDArray[Any], valid: NDArray[np.bool_] | None, precision: str
    ) -> NDArray[np.floating[Any]]:
        """Intensities to the solver's numbers; invalid pixels become the mean of the valid ones."""
        u = plane.astype(np.float64)
        u -= self.centre
        u /= self.scale
        if valid is not None:
            u[~valid] = 0
        return u.astype(precision)

    def noise(self, model: NoiseModel) -> NoiseModel:
        """The noise model in the solver's numbers."""
        return model.transformed(1 / self.scale, -self.centre / self.scale)

    def decode(self, u: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The solver's numbers to intensities, unrounded."""
        return u.astype(np.float64) * self.scale + self.centre

    def to_dtype(self, intensities: NDArray[np.float64], keeps_range: bool) -> NDArray[Any]:
        """Intensities in the dtype of the plane: rounded and clipped for integers.

        Where the scheme keeps the range, rounding in the last digit isn't allowed to leave it.
        """
        if keeps_range:
            intensities = intensities.clip(self.lowest, self.highest)
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            # 2^64 - 1 has no double: the next double below it is what fits.
            highest = np.nextafter(float(limits.max), 0) if limits.bits == 64 else limits.max
            intensities = np.rint(intensities).clip(limits.min, highest)
        return intensities.astype(self.dtype)
