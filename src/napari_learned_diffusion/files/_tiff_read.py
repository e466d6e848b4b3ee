"""TIFF files to volumes."""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_learned_diffusion.core.errors import FileFormatError, LearnedDiffusionError
from napari_learned_diffusion.files._lazy import is_lazy
from napari_learned_diffusion.files._tiff_claims import (
    check_claims,
    check_complete,
    check_directories,
    planes_left_out,
)
from napari_learned_diffusion.files._tiff_metadata import SIGNED_OFFSET, Description, is_signed
from napari_learned_diffusion.files._tiff_pixels import (
    check_meaning,
    coloured,
    lazy_pixels,
    meaning_of,
    missing_values,
    oriented,
    read_pixels,
)
from napari_learned_diffusion.files._tiff_series import Choice, choose_series
from napari_learned_diffusion.files._units import UNKNOWN
from napari_learned_diffusion.files.volume import Volume, bare_name

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

    from napari_learned_diffusion.files.volume import Array

# Longer suffixes first: a name loses the one that matches first.
TIFF_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".btf", ".tf8", ".tf2")

_STACK_LETTERS = "PQIUVWJKMNORABDEFGHL"
"""Letters for the axis along which series are stacked, P for positions first."""


def read_tiff(path: Path, series: int | None, lazy: bool | None) -> Volume:
    from tifffile import TiffFile

    with _refusing_damaged(path), TiffFile(path) as tif:
        check_claims(tif, path)
        words = Description(tif)
        choice = choose_series(tif, series, path, lambda number: _kind_of(tif, words, number))
        known = check_directories(tif, path)
        for number in choice.numbers:
            check_complete(tif, tif.series[number], path, known)
        check_meaning(tif.series[choice.numbers[0]].keyframe, path)
        size = sum(tif.series[number].nbytes for number in choice.numbers)
        notes = [*choice.notes, *planes_left_out(tif, path, known)]
        return _Reader(path, tif, words, is_lazy(lazy, size)).volume(choice, notes)


@contextmanager
def _refusing_damaged(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes tifffile raise into a sentence about the file."""
    try:
        yield
    except FileFormatError:
        raise
    except MemoryError as error:
        raise FileFormatError(
            f"{path} is too large for the memory that is free. Close other programs, or read it "
            "with lazy=True."
        ) from error
    except OSError as error:
        # Of a damaged file's numbers, systems only say that an argument is invalid.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise FileFormatError(_damaged(path, error)) from error
    except LearnedDiffusionError as error:
        raise FileFormatError(_damaged(path, error)) from error
    except Exception as error:
        # tifffile raises whatever a damaged directory leads it to: there is no list of types.
        raise FileFormatError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), "").rstrip(".") or type(error).__name__
    return (
        f"{path} isn't a readable TIFF file ({reason}). "
        "It may be damaged or of another format: copy or export it again."
    )


def _kind_of(tif: TiffFile, words: Description, number: int) -> Hashable:
    """What series must share to be one stack: the meaning of their pixels, and the voxel size."""
    steps, metadata = words.calibration(number)
    page = tif.series[number].keyframe
    meaning = meaning_of(page, is_imagej=False)
    tables = tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in meaning.values())
    names = tuple(metadata.get("channel_names", ()))
    return int(page.photometric), tuple(meaning), tables, tuple(sorted(steps.items())), names


class _Reader:
    """Makes volumes of the series of one open file."""

    def __init__(self, path: Path, tif: TiffFile, words: Description, lazily: bool) -> None:
        self._path, self._tif, self._words, self._lazily = path, tif, words, lazily

    def volume(self, choice: Choice, notes: Sequence[str]) -> Volume:
        """The series that were chosen, stacked where there are several.

        Parameters
        ----------
        choice
            Which ones.
        notes
            Sentences for people on what was left out.
        """
        path, tif, words, numbers = self._path, self._tif, self._words, choice.numbers
        series, count = tif.series[numbers[0]], len(tif.series)
        steps, metadata = words.calibration(numbers[0])
        axes, shape = _axes_and_shape(series, words.note(numbers[0]))
        meaning = meaning_of(series.keyframe, series.kind == "imagej")
        name = bare_name(path, TIFF_SUFFIXES)
        if len(numbers) > 1:
            letter = next(letter for letter in _STACK_LETTERS if letter not in axes)
            axes, shape = letter + axes, (len(numbers), *shape)
            names = [words.name(number) for number in numbers]
            metadata["stacked"] = {"axis": letter, "names": names}
        elif count > 1:
            name = f"{name} [{words.name(numbers[0])}]"
        data = self._pixels(numbers).reshape(shape)
        if data.dtype == np.uint16 and is_signed(metadata.get("imagej", {})):
            # Flipping the highest bit subtracts the offset without a wider type in between.
            data = (data ^ np.uint16(SIGNED_OFFSET)).view(np.int16)
        orientation = meaning.get("orientation", 1)
        if orientation > 1:
            data = oriented(data, (axes.index("Y"), axes.index("X")), orientation)
        if orientation >= 5:
            steps = {{"X": "Y", "Y": "X"}.get(axis, axis): step for axis, step in steps.items()}
        if "colours" in meaning:
            data, axes = coloured(data, meaning.pop("colours")), axes + "S"
        told = [*notes, *_on_other_files(series, path)]
        metadata |= meaning | words.source(numbers)
        metadata |= {"source": str(path), "series": numbers[0], "series_count": count}
        metadata |= {"pixel_type": data.dtype.name} | ({"notes": told} if told else {})
        if choice.others:
            metadata["other_series"] = list(choice.others)
        return Volume(
            data=data,
            axes=axes,
            scale=tuple(steps.get(axis, UNKNOWN)[0] for axis in axes),
            units=tuple(steps.get(axis, UNKNOWN)[1] for axis in axes),
            name=name,
            metadata=metadata,
            missing=missing_values(series.keyframe),
        )

    def _pixels(self, numbers: tuple[int, ...]) -> Array:
        if self._lazily:
            return lazy_pixels(self._path, self._tif, numbers)
        return read_pixels(self._tif, numbers)


def _on_other_files(series: TiffPageSeries, path: Path) -> Iterator[str]:
    if series.is_multifile:
        yield (
            f"{path.name} is one of several files of the same image, all of which were read "
            "together."
        )


def _axes_and_shape(series: TiffPageSeries, note: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Axes, each letter once, and the shape; axes of length 1 as our note tells to keep them."""
    wanted = note.get("axes", "")
    sizes = dict(zip(series.get_axes(squeeze=False), series.get_shape(squeeze=False), strict=True))
    kept = [axis for axis in wanted if sizes.get(axis, 1) > 1 or axis in series.axes]
    if kept == list(series.axes):
        return wanted, tuple(sizes.get(axis, 1) for axis in wanted)
    return _unique_axes(series.axes), series.shape


def _unique_axes(axes: str) -> str:
    """Axes with each letter once: repeated ones, from the left, become letters not yet used."""
    letters = list(axes)
    unused = iter(letter for letter in "QIUVWJKMNOPRABDEFGHL" if letter not in axes)
    for i in range(len(letters)):
        if letters[i] in letters[i + 1 :]:
            letters[i] = next(unused)
    return "".join(letters)
