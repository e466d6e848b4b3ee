"""Reading and writing in whatever format a file's name stands for, and why that may fail."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from napari_learned_diffusion.core import atomic
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
)
from napari_learned_diffusion.files._dicom import DICOM_SUFFIXES, is_series, read_dicom
from napari_learned_diffusion.files._dicom_stream import is_dicom
from napari_learned_diffusion.files._dicom_write import foreign_in_series, is_single, write_dicom
from napari_learned_diffusion.files._extras import readable, refusing
from napari_learned_diffusion.files._lazy import files_behind
from napari_learned_diffusion.files._mrc import MRC_SUFFIXES, read_mrc, write_mrc
from napari_learned_diffusion.files._nifti import NIFTI_SUFFIXES, read_nifti, write_nifti
from napari_learned_diffusion.files._tiff_read import TIFF_SUFFIXES, read_tiff
from napari_learned_diffusion.files._tiff_write import write_tiff
from napari_learned_diffusion.files._zarr import ZARR_SUFFIXES, ZIPPED_ZARR, is_zarr, read_zarr
from napari_learned_diffusion.files._zarr_write import foreign_in_zarr, write_zarr
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
    makes_folder
        Whether ``write`` makes a folder of a path.
    foreign
        The first thing in a folder that ``write`` wouldn't have made; ``None`` if there is none.
    holds_fractions
        Whether it has a type of floating point numbers.
    """

    key: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, int | None, bool | None], Volume]
    write: Callable[[Path, Volume, str | None], None]
    suffix: str
    is_folder: Callable[[Path], bool] = lambda _: False
    compressions: tuple[str, ...] = ()
    makes_folder: Callable[[Path], bool] = lambda _: False
    foreign: atomic.Foreign = lambda _: None
    holds_fractions: bool = True


FORMATS: dict[str, Format] = {
    file_format.key: file_format
    for file_format in (
        Format("tiff", TIFF_SUFFIXES, read_tiff, write_tiff, ".tif", compressions=COMPRESSIONS),
        Format("mrc", MRC_SUFFIXES, read_mrc, write_mrc, ".mrc"),
        Format("nifti", NIFTI_SUFFIXES, read_nifti, write_nifti, ".nii.gz"),
        Format(
            "zarr",
            ZARR_SUFFIXES,
            read_zarr,
            write_zarr,
            ".ome.zarr",
            is_zarr,
            makes_folder=lambda _: True,
            foreign=foreign_in_zarr,
        ),
        # A series is a folder, whose name needs no suffix.
        Format(
            "dicom",
            DICOM_SUFFIXES,
            read_dicom,
            write_dicom,
            "",
            is_series,
            makes_folder=lambda path: not is_single(path),
            foreign=foreign_in_series,
            holds_fractions=False,
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
        Which of the images in the file, counted from 0. None passes over thumbnails and labels,
        and takes all others of a TIFF as a stack where they are alike; otherwise the one with the
        most pixels (the first of several), and ``metadata["notes"]`` says what was left out.
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
    with readable(path):
        check_kind(path)
        if path.is_file() and path.stat().st_size == 0:
            raise FileFormatError(f"{path} is empty. Copy or export it again.")
        file_format = format_of(path)
        if file_format is None:
            raise FileFormatError(_unknown(path))
        with refusing(path, file_format.key):
            return file_format.read(path, series, lazy)


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_kind(path: Path) -> None:
    """Refuse what isn't there, and what isn't a file or a folder: it could be read for ever.

    Raises
    ------
    FileFormatError
        with what it is.
    OSError
        if that can't be found out.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, ValueError) as error:
        if path.is_symlink():
            raise FileFormatError(
                f"{path} is a link to {path.readlink()}, which isn't there. Choose another file."
            ) from error
        raise FileFormatError(f"There is no file {path}. Check its name and folder.") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FileFormatError(
            f"{path} is a link that leads back to itself. Choose another file."
        ) from error
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is not None:
        raise FileFormatError(f"{path} is {kind}, not an image file. Choose a file.")


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
        OME-Zarr become folders; the name of such a series needs no suffix where the volume was
        read from one.
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
    file_format = FORMATS[format] if format else format_to_write(path, volume.metadata)
    if file_format is None:
        raise FileFormatError(_unknown(path))
    check_compression(file_format, compression)
    if volume.data.size == 0:
        raise FileFormatError(f"An image of shape {volume.data.shape} has no pixels to write.")
    try:
        check_target(path, file_format, overwrite=overwrite)
        _check_not_read_from(path, volume)
        with atomic.written_aside(
            path,
            overwrite=overwrite,
            folder=file_format.makes_folder(path),
            foreign=file_format.foreign,
        ) as unfinished:
            file_format.write(unfinished, volume, compression)
    except OSError as error:
        raise FileWriteError(atomic.why_not_written(path, error)) from error
    return path


def check_target(path: Path, file_format: Format, *, overwrite: bool) -> None:
    """Refuse a place where something is that may not be replaced by an image of a format.

    Raises
    ------
    FileWriteError
        as `core.atomic.check_target`.
    """
    atomic.check_target(
        path,
        overwrite=overwrite,
        folder=file_format.makes_folder(path),
        foreign=file_format.foreign,
    )


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
    """The format of a file or a folder; None if there is none.

    A file's suffix decides, or where it is unknown whether the content is DICOM; of a folder what
    is in it.

    Raises
    ------
    OSError
        if a folder can't be read.
    """
    if path.is_dir():
        return next((f for f in FORMATS.values() if f.is_folder(path)), None)
    found = format_by_suffix(path)
    # Scanners and archives name files by numbers and UIDs.
    return FORMATS["dicom"] if found is None and path.is_file() and is_dicom(path) else found


def format_by_suffix(path: Path) -> Format | None:
    """The format that a name stands for; None if there is none."""
    name = path.name.lower()
    return next((f for f in FORMATS.values() if name.endswith(f.suffixes)), None)


def format_to_write(path: Path, metadata: Mapping[str, Any]) -> Format | None:
    """The format that a name stands for; None if there is none.

    A name without a suffix, or with a number as UIDs have it, is a series where ``metadata`` says
    that the image is of DICOM.
    """
    found = format_by_suffix(path)
    bare = not path.suffix or path.suffix[1:].isdecimal()
    return FORMATS["dicom"] if found is None and bare and "dicom" in metadata else found


def _unknown(path: Path) -> str:
    if path.name.lower().endswith(ZIPPED_ZARR):
        return f"{path} is a zipped zarr. Unzip it and choose the folder."
    if path.is_dir():
        return (
            f"{path} is a folder, neither of a DICOM series nor an OME-Zarr. "
            "Choose one of the files in it."
        )
    return (
        f"{path} doesn't end in {', '.join(supported_suffixes())}. "
        "Convert it, or give it the suffix of its format."
    )


def _check_not_read_from(path: Path, volume: Volume) -> None:
    """Refuse to write over the file or folder that the pixels are yet to be read from."""
    if not path.exists():
        return
    sources = {place for source in files_behind(volume.data) for place in (source, source.parent)}
    if any(source.samefile(path) for source in sources if source.exists()):
        raise FileWriteError(f"The image is still being read from {path}. Choose another name.")
