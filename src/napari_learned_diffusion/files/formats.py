"""Reading and writing in whatever format a file's name stands for, and why that may fail."""

from __future__ import annotations

import errno
import secrets
import shutil
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
from napari_learned_diffusion.files._dicom import (
    DICOM_SUFFIXES,
    files_of_series,
    read_dicom,
    write_dicom,
)
from napari_learned_diffusion.files._lazy import files_behind
from napari_learned_diffusion.files._mrc import MRC_SUFFIXES, read_mrc, write_mrc
from napari_learned_diffusion.files._nifti import NIFTI_SUFFIXES, read_nifti, write_nifti
from napari_learned_diffusion.files._tiff_read import TIFF_SUFFIXES, read_tiff
from napari_learned_diffusion.files._tiff_write import write_tiff
from napari_learned_diffusion.files._zarr import ZARR_SUFFIXES, is_zarr, read_zarr, write_zarr
from napari_learned_diffusion.files.volume import Volume

if TYPE_CHECKING:
    import os

    PathLike: TypeAlias = str | os.PathLike[str]

COMPRESSIONS = ("deflate", "lzw", "zstd")
"""Lossless compressions that `write` offers for TIFF."""


@dataclass(frozen=True)
class Format:
    """How files of one format are told, read and written.

    Parameters
    ----------
    key
        Its name in options.
    suffixes
        Ends of the names of its files.
    read, write
        Functions of path, series and laziness; of path, volume and compression.
    suffix
        What a name is given that has none of the suffixes.
    is_folder
        Whether a folder can be an image of the format, by what is in it.
    compressions
        Those that ``write`` knows.
    """

    key: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, int | None, bool | None], Volume]
    write: Callable[[Path, Volume, str | None], None]
    suffix: str
    is_folder: Callable[[Path], bool] = lambda _: False
    compressions: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    file_format.key: file_format
    for file_format in (
        Format("tiff", TIFF_SUFFIXES, read_tiff, write_tiff, ".tif", compressions=COMPRESSIONS),
        Format("mrc", MRC_SUFFIXES, read_mrc, write_mrc, ".mrc"),
        Format("nifti", NIFTI_SUFFIXES, read_nifti, write_nifti, ".nii.gz"),
        Format("zarr", ZARR_SUFFIXES, read_zarr, write_zarr, ".ome.zarr", is_zarr),
        # A series is a folder, whose name needs no suffix.
        Format(
            "dicom",
            DICOM_SUFFIXES,
            read_dicom,
            write_dicom,
            "",
            lambda folder: bool(files_of_series(folder)),
        ),
    )
}
"""Every format by its key; a name's suffix decides for the first that has it."""


def read(path: PathLike, *, series: int | None = None, lazy: bool | None = None) -> Volume:
    """Read an image file with its axes, voxel size and units.

    Parameters
    ----------
    path
        The file, or the folder of a DICOM series or an OME-Zarr.
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
    MissingDependencyError
        if the format's library isn't installed; the message names the extra that brings it.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise FileFormatError(f"There is no file {path}. Check its name and folder.")
        if path.is_file() and path.stat().st_size == 0:
            raise FileFormatError(f"{path} is empty. Copy or export it again.")
        file_format = format_of(path)
        if file_format is None:
            raise FileFormatError(_unknown(path))
        return file_format.read(path, series, lazy)
    except OSError as error:
        raise FileFormatError(
            f"{path} can't be read ({error.strerror or error}). Check your permission to read "
            "it and that its disk is still there."
        ) from error


def write(
    path: PathLike,
    volume: Volume,
    *,
    overwrite: bool = False,
    compression: str | None = None,
    format: str | None = None,
) -> Path:
    """Write a volume so that `read` gives back its type, shape, axes, scale and units.

    A dask array is computed plane by plane (chunk by chunk along the axis before the planes), so
    memory holds one chunk. The file is written under another name beside ``path`` and renamed
    when complete: whatever goes wrong, a file that was there before is untouched.

    Parameters
    ----------
    path
        Where to; the suffix chooses the format unless ``format`` is given. A DICOM series and an
        OME-Zarr become folders.
    volume
        What to write.
    overwrite
        Replace a file that is there.
    compression
        None, or one of `COMPRESSIONS` for TIFF; all of them are lossless. ImageJ reads deflate and
        lzw. OME-Zarr and ``.nii.gz`` are compressed anyway.
    format
        Key of `FORMATS`.

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
    file_format = FORMATS[format] if format else _format_by_suffix(path)
    if file_format is None:
        raise FileFormatError(_unknown(path))
    check_compression(file_format, compression)
    if volume.data.size == 0:
        raise FileFormatError(f"An image of shape {volume.data.shape} has no pixels to write.")
    try:
        # Through a symbolic link to its target, which would otherwise be replaced by a file.
        target = path.resolve()
        _check_target(target, volume, overwrite, file_format)
        with _written_aside(target) as unfinished:
            file_format.write(unfinished, volume, compression)
    except OSError as error:
        raise FileWriteError(why_not_written(path, error)) from error
    return path


def check_compression(file_format: Format, compression: str | None) -> None:
    """Refuse a compression that there isn't, or that the format doesn't know.

    Raises
    ------
    InvalidSettingError
        with the compressions that there are.
    """
    if compression is None or compression in file_format.compressions:
        return
    if compression in COMPRESSIONS:
        raise InvalidSettingError(
            f"Compression {compression!r} is for TIFF, not for {file_format.key}. Leave it out."
        )
    raise InvalidSettingError(
        f"Compression {compression!r} isn't known. Choose {', '.join(COMPRESSIONS)} or none."
    )


def supported_suffixes() -> tuple[str, ...]:
    """File name suffixes that `read` and `write` know, in lower case with their dots."""
    return tuple(suffix for file_format in FORMATS.values() for suffix in file_format.suffixes)


def format_of(path: Path) -> Format | None:
    """The format of a file by its suffix or of a folder by what is in it; None if there is none.

    Raises
    ------
    OSError
        if a folder can't be read.
    """
    if path.is_dir():
        return next((f for f in FORMATS.values() if f.is_folder(path)), None)
    return _format_by_suffix(path)


def _format_by_suffix(path: Path) -> Format | None:
    name = path.name.lower()
    return next((f for f in FORMATS.values() if name.endswith(f.suffixes)), None)


def _unknown(path: Path) -> str:
    if path.is_dir():
        return (
            f"{path} is a folder, neither of a DICOM series nor an OME-Zarr. "
            "Choose one of the files in it."
        )
    return (
        f"{path} doesn't end in {', '.join(supported_suffixes())}. "
        "Convert it, or give it the suffix of its format."
    )


def _check_target(path: Path, volume: Volume, overwrite: bool, file_format: Format) -> None:
    """Refuse to replace a folder, a file without leave, or the one that is still being read."""
    if path.is_dir() and not file_format.is_folder(path):
        raise FileWriteError(f"{path} is a folder. Add a file name.")
    if path.exists():
        if not overwrite:
            raise FileWriteError(f"{path} exists. Choose another name or allow overwriting.")
        sources = {
            place for source in files_behind(volume.data) for place in (source, source.parent)
        }
        if any(source.samefile(path) for source in sources if source.exists()):
            raise FileWriteError(f"The image is still being read from {path}. Choose another name.")


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, and move it there once all went well."""
    # In the same folder, because only within a file system is renaming atomic.
    unfinished = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield unfinished
        move_into_place(unfinished, path)
    finally:
        # In a folder that can't be written this fails as well: the reason is on its way up.
        with suppress(OSError):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink(missing_ok=True)


def move_into_place(finished: Path, path: Path) -> None:
    """Rename a file or folder to ``path`` in the same file system, in place of what is there."""
    if not (finished.is_dir() and path.is_dir()):
        finished.replace(path)
        return
    # A folder can't replace another in one step.
    old = finished.with_name(f"{finished.name}.old")
    path.replace(old)
    finished.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def why_not_written(path: Path, error: OSError) -> str:
    """What the system's refusal to write means for the user, and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {path} was not written. Free space or choose another folder."
    return (
        f"{path} can't be written ({error.strerror or error}). "
        "Check that the folder exists and that you may write to it, or choose another."
    )
