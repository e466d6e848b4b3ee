"""TIFF files to volumes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._lazy import (
    ContiguousPlanes,
    PlanesOnDisk,
    is_lazy,
    stamp_of,
)
from napari_learned_diffusion.files._tiff_metadata import (
    SIGNED_OFFSET,
    calibration,
    is_signed,
    note_in,
)
from napari_learned_diffusion.files._units import UNKNOWN
from napari_learned_diffusion.files.volume import Volume, bare_name

if TYPE_CHECKING:
    import dask.array as da
    from tifffile import TiffFile, TiffPageSeries

# Longer suffixes first: a name loses the one that matches first.
TIFF_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".btf", ".tf8", ".tf2")

_IMAGE_DESCRIPTION = 270


def read_tiff(path: Path, series: int | None, lazy: bool | None) -> Volume:
    from tifffile import TiffFile

    try:
        with TiffFile(path) as tif:
            number = _choose_series(tif, series, path)
            chosen = tif.series[number]
            _check_complete(tif, chosen, path)
            note = note_in(tif, number)
            axes, shape = _axes_and_shape(chosen, note)
            lazily = is_lazy(lazy, chosen.nbytes)
            data = _lazy_pixels(path, tif, number) if lazily else _pixels(chosen)
            steps, metadata = calibration(tif, number, note)
            count = len(tif.series)
    except (FileFormatError, MemoryError, OSError):
        raise
    except Exception as error:
        # tifffile raises whatever a damaged directory leads it to: there is no list of types.
        raise FileFormatError(
            f"{path} isn't a readable TIFF file ({error}). "
            "It may be damaged or of another format: copy or export it again."
        ) from error
    metadata |= {"source": str(path), "series": number, "series_count": count}
    if data.dtype == np.uint16 and is_signed(metadata.get("imagej", {})):
        # Flipping the highest bit subtracts the offset without a wider type in between.
        data = (data ^ np.uint16(SIGNED_OFFSET)).view(np.int16)
    name = bare_name(path, TIFF_SUFFIXES)
    return Volume(
        data=data.reshape(shape),
        axes=axes,
        scale=tuple(steps.get(axis, UNKNOWN)[0] for axis in axes),
        units=tuple(steps.get(axis, UNKNOWN)[1] for axis in axes),
        name=name if count == 1 else f"{name} [{chosen.name or number}]",
        metadata=metadata,
    )


def _choose_series(tif: TiffFile, wanted: int | None, path: Path) -> int:
    if not tif.series:
        raise FileFormatError(f"{path} holds no image. Copy or export it again.")
    if wanted is None:
        return max(range(len(tif.series)), key=lambda number: tif.series[number].size)
    if not 0 <= wanted < len(tif.series):
        raise FileFormatError(
            f"{path} has {len(tif.series)} image series, counted from 0: "
            f"there is no series {wanted}."
        )
    return wanted


def _check_complete(tif: TiffFile, series: TiffPageSeries, path: Path) -> None:
    """Refuse a file of which a part is missing, where tifffile would give zeros or fewer pages."""
    truncated = FileFormatError(
        f"{path} is truncated: a part of its pixels is missing. Copy or export it again."
    )
    pages = [page for page in series if page is not None]
    if len(pages) < len(series):
        raise FileFormatError(
            f"{path} names planes that aren't there. Put the other files of the same image "
            "beside it, or export it again."
        )
    if tif.is_imagej and series.kind == "generic":
        # tifffile falls back to single pages where ImageJ's data would end behind the file.
        raise truncated
    codes, _ = _directory(tif, tif.pages[0].offset)
    if _IMAGE_DESCRIPTION in codes and _IMAGE_DESCRIPTION not in tif.pages.first.tags:
        # tifffile leaves out what lies behind the file's end, and axes and voxel size with it.
        raise truncated
    _, following = _directory(tif, tif.pages[-1].offset)
    if following and following not in {page.offset for page in tif.pages}:
        raise truncated
    if series.dataoffset is not None:
        if series.dataoffset + series.nbytes > tif.filehandle.size:
            raise truncated
        return
    if series.keyframe.size * len(pages) != series.size:
        raise truncated
    for page in pages:
        size = page.parent.filehandle.size
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if offset + count > size:
                raise truncated


def _directory(tif: TiffFile, offset: int) -> tuple[set[int], int]:
    """Codes of the tags in the directory at ``offset``, and where the next one begins, or 0."""
    tiff, handle = tif.tiff, tif.filehandle
    handle.seek(offset)
    (count,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    tags = handle.read(count * tiff.tagsize)
    (following,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    codes = {
        struct.unpack_from(tif.byteorder + "H", tags, i * tiff.tagsize)[0] for i in range(count)
    }
    return codes, following


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


def _pixels(series: TiffPageSeries) -> NDArray[Any]:
    data = np.asarray(series.asarray())
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def _lazy_pixels(path: Path, tif: TiffFile, number: int) -> da.Array:
    series = tif.series[number]
    page_size = series.keyframe.size
    # By the number of pixels, since a page's shape and the series' drop different axes of length 1.
    plane_shapes = (series.shape[first:] for first in range(series.ndim - 2, -1, -1))
    plane_shape = next((s for s in plane_shapes if math.prod(s) == page_size), None)
    if plane_shape is None:
        raise FileFormatError(
            f"{path} stores pages of {page_size} pixels for an image of shape {series.shape} "
            "and can't be read in parts. Read it with lazy=False."
        )
    read_plane: Callable[[int], NDArray[Any]]
    if series.dataoffset is not None:
        stored = series.dtype.newbyteorder(tif.byteorder)
        read_plane = ContiguousPlanes(path, series.dataoffset, stored, plane_shape)
    else:
        read_plane = _EncodedPlanes(path, number, plane_shape)
    native = series.dtype.newbyteorder("=")
    return PlanesOnDisk(
        path=path,
        series=number,
        read_plane=read_plane,
        shape=series.shape,
        dtype=native,
        plane_ndim=len(plane_shape),
        stamp=stamp_of(path),
    ).as_dask()


class _EncodedPlanes:
    """Reads the pages of one series of a TIFF, decoding each."""

    def __init__(self, path: Path, series: int, shape: tuple[int, ...]) -> None:
        from tifffile import TiffFile

        self._arguments = path, series, shape
        self._shape = shape
        self._lock = Lock()
        # The directories are parsed once; the file is open only while a page is read, so that
        # no handle outlives its use (Windows can't replace a file that is open).
        with TiffFile(path) as tif:
            self._pages = [page for page in tif.series[series] if page is not None]

    def __call__(self, index: int) -> NDArray[Any]:
        page = self._pages[index]
        with self._lock:
            handle = page.parent.filehandle
            handle.open()
            try:
                return np.asarray(page.asarray()).reshape(self._shape)
            finally:
                handle.close()

    def __reduce__(self) -> tuple[type[_EncodedPlanes], tuple[Path, int, tuple[int, ...]]]:
        return type(self), self._arguments
