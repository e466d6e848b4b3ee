"""Which images of a TIFF are read: one, several as a stack, and which ones are passed over."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from napari_learned_diffusion.core.errors import FileFormatError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

_AUXILIARY = frozenset(
    {"thumbnail", "label", "label image", "macro", "macro image", "overview", "preview", "map"}
)
"""Names under which scanners of slides and others store pictures beside the image itself."""


@dataclass(frozen=True)
class Choice:
    """Images of a file that are read together.

    Parameters
    ----------
    numbers
        The series, all of one shape, type and meaning where there are several.
    others
        Series that hold images as well and weren't chosen.
    notes
        Sentences for people on what was left out.
    """

    numbers: tuple[int, ...]
    others: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def choose_series(
    tif: TiffFile, wanted: int | None, path: Path, kind_of: Callable[[int], Hashable]
) -> Choice:
    """The series that was asked for, or all images where they fit together, or the largest.

    Parameters
    ----------
    tif
        The file.
    wanted
        Number of a series, or None.
    path
        The file's, for messages.
    kind_of
        What two series must have in common, beside shape, type and axes, to be one stack.

    Raises
    ------
    FileFormatError
        if there is no such series, or none at all.
    """
    series = tif.series
    if not series:
        raise FileFormatError(f"{path} holds no image. Copy or export it again.")
    if wanted is not None:
        if not 0 <= wanted < len(series):
            raise FileFormatError(
                f"{path} has {len(series)} image series, counted from 0: "
                f"there is no series {wanted}."
            )
        return Choice((wanted,))
    images, passed_over = _images(tif, series)
    notes = _note_on(path, [series[number].name for number in passed_over])
    first = series[images[0]]
    alike = (first.shape, first.dtype, first.axes, kind_of(images[0]))
    if all(
        (s.shape, s.dtype, s.axes, kind_of(n)) == alike for n, s in ((n, series[n]) for n in images)
    ):
        return Choice(tuple(images), notes=notes)
    largest = max(images, key=lambda number: series[number].size)
    others = tuple(number for number in images if number != largest)
    told = (
        f"{path.name} holds {len(images)} images that don't fit together in shape, type or voxel "
        f"size: series {largest}, the largest, was taken and the others were left out. Choose "
        f"{', '.join(map(str, others[:8]))}{' …' if len(others) > 8 else ''} with --series, or "
        "series= in Python.",
    )
    return Choice((largest,), others, (*told, *notes))


def _images(tif: TiffFile, series: Sequence[TiffPageSeries]) -> tuple[list[int], list[int]]:
    """Numbers of series that are images, and of those to be passed over that have a name."""
    numbers = range(len(series))
    here = [n for n in numbers if series[n].size and _has_pages_in(series[n], tif)]
    # Where all planes lie in other files, those are opened by themselves.
    candidates = here or list(numbers)
    named = [n for n in candidates if series[n].name.strip().lower() in _AUXILIARY]
    reduced = [n for n in candidates if series[n].keyframe.subfiletype & 0b101]
    images = [n for n in candidates if n not in named and n not in reduced]
    if not images:
        return [max(candidates, key=lambda n: math.prod(series[n].shape))], []
    return images, named


def _has_pages_in(series: TiffPageSeries, tif: TiffFile) -> bool:
    if not series.is_multifile:
        return series.keyframe.parent is tif
    return any(page is not None and page.parent is tif for page in series)


def _note_on(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"Passed over in {path.name}: {', '.join(names)}.",)
