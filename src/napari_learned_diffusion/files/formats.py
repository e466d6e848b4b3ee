"""Reading and writing in whatever format a file's name stands for, and why that may fail."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
)
from napari_learned_diffusion.files._lazy import files_behind
from napari_learned_diffusion.files._tiff_read import TIFF_SUFFIXES, read_tiff
from napari_learned_diffusion.files._tiff_write import write_tiff
from napari_learned_diffusion.files.volume import Volume

if TYPE_CHECKING:
    import os

    PathLike: TypeAlias = str | os.PathLike[str]

COMPRESSIONS = ("deflate", "lzw", "zstd")
"""Lossless compressions that `write` offers."""


@dataclass(frozen=True)
class Format:
    """How files of one format are told, read and written."""

    suffixes: tuple[str, ...]
    read: Callable[[Path, int | None, bool | None], Volume]
    write: Callable[[Path, Volume, str | None], None]


FORMATS = (Format(TIFF_SUFFIXES, read_tiff, write_tiff),)


def read(path: PathLike, *, series: int | None = None, lazy: bool | None = None) -> Volume:
    """Read an image file with its axes, voxel size and units.

    Parameters
    ----------
    path
        The file.
    series
        Which of the images in the file, counted from 0. None takes the one with the most
        pixels (the first of several), so that thumbnails and labels are passed over.
    lazy
        True for a dask array of one chunk a plane, read when computed; False for a numpy array;
        None for a dask array above `LAZY_ABOVE` bytes of pixels.

    Returns
    -------
    Volume
        Axes in the file's order. Colour has an axis ``S``.

    Raises
    ------
    FileFormatError
        if the file is missing, empty, truncated or not of the format that its name says.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise FileFormatError(f"{path} is a folder. Choose one of the files in it.")
        if not path.exists():
            raise FileFormatError(f"There is no file {path}. Check its name and folder.")
        if path.stat().st_size == 0:
            raise FileFormatError(f"{path} is empty. Copy or export it again.")
        return _format_of(path).read(path, series, lazy)
    except OSError as error:
        raise FileFormatError(
            f"{path} can't be read ({error.strerror or error}). Check your permission to read "
            "it and that its disk is still there."
        ) from error


def write(
    path: PathLike, volume: Volume, *, overwrite: bool = False, compression: str | None = None
) -> Path:
    """Write a volume so that `read` gives back its type, shape, axes, scale and units.

    A dask array is computed plane by plane (chunk by chunk along the axis before the planes), so
    memory holds one chunk. The file is written under another name beside ``path`` and renamed
    when complete: whatever goes wrong, a file that was there before is untouched.

    Parameters
    ----------
    path
        Where to; the suffix chooses the format.
    volume
        What to write.
    overwrite
        Replace a file that is there.
    compression
        None, or one of `COMPRESSIONS`; all of them are lossless. ImageJ reads deflate and lzw.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    FileWriteError
        if ``path`` exists and may not be replaced, can't be written, or is the file that the
        volume's pixels are yet to be read from.
    FileFormatError
        if the format can't hold such pixels.
    InvalidSettingError
        if ``compression`` isn't known.
    """
    path = Path(path)
    file_format = _format_of(path)
    if compression is not None and compression not in COMPRESSIONS:
        raise InvalidSettingError(
            f"Compression {compression!r} isn't known. Choose {', '.join(COMPRESSIONS)} or none."
        )
    if volume.data.size == 0:
        raise FileFormatError(f"An image of shape {volume.data.shape} has no pixels to write.")
    try:
        # Through a symbolic link to its target, which would otherwise be replaced by a file.
        target = path.resolve()
        _check_target(target, volume, overwrite)
        with _written_aside(target) as unfinished:
            file_format.write(unfinished, volume, compression)
    except OSError as error:
        raise FileWriteError(_why_not_written(path, error)) from error
    return path


def supported_suffixes() -> tuple[str, ...]:
    """File name suffixes that `read` and `write` know, in lower case with their dots."""
    return tuple(suffix for file_format in FORMATS for suffix in file_format.suffixes)


def _format_of(path: Path) -> Format:
    """The format that a file name's suffix stands for."""
    for file_format in FORMATS:
        if path.name.lower().endswith(file_format.suffixes):
            return file_format
    raise FileFormatError(
        f"{path} doesn't end in {', '.join(supported_suffixes())}. "
        "Convert it, or give it the suffix of its format."
    )


def _check_target(path: Path, volume: Volume, overwrite: bool) -> None:
    """Refuse to replace a folder, a file without leave, or the one that is still being read."""
    if path.is_dir():
        raise FileWriteError(f"{path} is a folder. Add a file name.")
    if path.exists():
        if not overwrite:
            raise FileWriteError(f"{path} exists. Choose another name or allow overwriting.")
        if any(source.samefile(path) for source in files_behind(volume.data) if source.exists()):
            raise FileWriteError(f"The image is still being read from {path}. Choose another name.")


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, and move it there once all went well."""
    # In the same folder, because only within a file system is renaming atomic.
    unfinished = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        # In a folder that can't be written this fails as well: the reason is on its way up.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _why_not_written(path: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {path} was not written. Free space or choose another folder."
    return (
        f"{path} can't be written ({error.strerror or error}). "
        "Check that the folder exists and that you may write to it, or choose another."
    )
