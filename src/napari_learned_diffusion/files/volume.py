"""What `read` gives and `write` takes: pixels, and what their axes mean."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.files._units import UNKNOWN, Step

if TYPE_CHECKING:
    from pathlib import Path

    import dask.array as da
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any] | da.Array


@dataclass(frozen=True)
class Volume:
    """Pixels and what their axes mean.

    Parameters
    ----------
    data
        Pixels in the machine's byte order, an array of numpy or dask.
    axes
        One capital letter an axis, none twice: ``Y`` and ``X`` span the planes, ``Z`` depth,
        ``T`` time, ``C`` channel, ``S`` samples of a colour; ``I``, ``Q`` and others are unknown.
    scale
        Step along each axis in that axis' unit; 1.0 where unknown.
    units
        Name of each axis' unit as pint knows it, such as ``"micrometer"``; ``"pixel"`` where
        unknown.
    name
        For people: the file's name without its suffix.
    metadata
        What else the file said: ``source`` (path), ``format``, ``series``, and where present
        ``contrast_limits``, ``channel_names``, ``placement`` (translate, affine …), ``notes``
        (sentences on what was left out) and what a format writes back, such as ``imagej``.
    missing
        Values that the file declares to be no intensities, such as DICOM's pixel padding value or
        a fill value, in the units of ``data``. Pixels that have one are masked.

    Raises
    ------
    InvalidImageError
        if ``axes``, ``scale`` or ``units`` don't fit ``data``.
    """

    data: Array
    axes: str
    scale: tuple[float, ...]
    units: tuple[str, ...]
    name: str
    metadata: dict[str, Any] = field(default_factory=dict)
    missing: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        ndim = self.data.ndim
        if not len(self.axes) == len(self.scale) == len(self.units) == ndim:
            raise InvalidImageError(
                f"An image of {ndim} axes needs as many letters, steps and units; given were "
                f"axes {self.axes!r}, scale {self.scale} and units {self.units}."
            )
        if len(set(self.axes)) != ndim or not {"Y", "X"} <= set(self.axes):
            raise InvalidImageError(
                f"Axes {self.axes!r} must hold Y and X, and no letter twice. Rename the axes."
            )

    @property
    def plane_axes(self) -> tuple[int, int]:
        """Positions of Y and X among the axes."""
        return self.axes.index("Y"), self.axes.index("X")

    def axes_of_planes(self, letters: str | None) -> tuple[int, int]:
        """Positions of the row axis and the column axis that two letters name; Y and X for None.

        Raises
        ------
        InvalidSettingError
            if they aren't two different letters of the volume's axes.
        """
        if letters is None:
            return self.plane_axes
        wanted = letters.upper()
        if len(wanted) != 2 or wanted[0] == wanted[1] or not set(wanted) <= set(self.axes):
            raise InvalidSettingError(
                f"--plane takes two different letters of the file's axes, {self.axes}, "
                f"not {letters!r}."
            )
        return self.axes.index(wanted[0]), self.axes.index(wanted[1])

    def spacing(self, axes: tuple[int, int]) -> tuple[float, float]:
        """Distance of rows and of columns; equal where their units can't be compared."""
        rows, columns = axes
        if self.units[rows] != self.units[columns]:
            return 1.0, 1.0
        return self.scale[rows], self.scale[columns]

    def step(self, axis: str) -> Step:
        """Step along an axis and its unit; 1 pixel for an axis that the volume lacks."""
        if axis not in self.axes:
            return UNKNOWN
        i = self.axes.index(axis)
        return self.scale[i], self.units[i]

    def transposed(self, axes: str) -> Volume:
        """The same with its axes in another order, and what places it in the world with them.

        Parameters
        ----------
        axes
            The volume's letters in the order wanted.
        """
        if axes == self.axes:
            return self
        order = [self.axes.index(letter) for letter in axes]
        metadata = dict(self.metadata)
        if "placement" in metadata:
            metadata["placement"] = _permuted(metadata["placement"], order)
        return replace(
            self,
            data=self.data.transpose(order),
            axes=axes,
            scale=tuple(self.scale[i] for i in order),
            units=tuple(self.units[i] for i in order),
            metadata=metadata,
        )


def _permuted(placement: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """Vectors and matrices of a layer's place for axes in another order."""
    permuted = {}
    for key, value in placement.items():
        if key == "shear":
            continue  # numbers above a diagonal, which another order of axes doesn't have
        numbers = np.asarray(value, dtype=float)
        # A transform has one more row and column, which isn't an axis.
        places = [*order, *range(len(order), len(numbers))]
        permuted[key] = numbers[np.ix_(*[places] * numbers.ndim)].tolist()
    return permuted


def bare_name(path: Path, suffixes: tuple[str, ...]) -> str:
    """A file's name without the first of the suffixes, in any case, that it ends in."""
    suffix = next((s for s in suffixes if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]
