"""Pixels of a TIFF as its tags want them to be understood, and the tags for writing them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._lazy import ContiguousPlanes, PlanesOnDisk, stamp_of

if TYPE_CHECKING:
    import dask.array as da
    from tifffile import TiffFile, TiffPage

    from napari_learned_diffusion.files.volume import Array

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _MASK, _YCBCR = 0, 1, 2, 3, 4, 6
_CFA, _LINEAR_RAW = 32803, 34892
_UNDERSTOOD = (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _MASK, _YCBCR, _CFA, _LINEAR_RAW)

_PHOTOMETRICS = {5: "CMYK", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32844: "LogL", 32845: "LogLuv"}

_PLAIN_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
"""Those that know nothing of colour spaces, so that YCbCr stays YCbCr."""

_ORIENTATION, _NODATA = 274, 42113


def check_meaning(page: TiffPage, path: Path) -> None:
    """Refuse pixels that are neither intensities nor red, green and blue.

    Raises
    ------
    FileFormatError
        naming the colour space.
    """
    photometric = int(page.photometric)
    name = _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    if photometric == _YCBCR and page.compression in _PLAIN_COMPRESSIONS:
        photometric, name = -1, "YCbCr"
    if photometric not in _UNDERSTOOD:
        raise FileFormatError(
            f"{path} has colours in {name}, which aren't intensities. Convert it to RGB or to grey."
        )
    if photometric == _PALETTE and page.colormap is None:
        raise FileFormatError(
            f"{path} is damaged: its palette is missing. Copy or export it again."
        )


def meaning_of(page: TiffPage, is_imagej: bool) -> dict[str, Any]:
    """What the tags of a page say about its pixels beyond their type, as metadata.

    Parameters
    ----------
    page
        Any of a series.
    is_imagej
        Whether ImageJ wrote the file: its palettes are look-up tables for intensities.

    Returns
    -------
    dict
        ``photometric`` "miniswhite"; ``palette`` (look-up table for intensities, `(3, levels)` of
        16 bits); ``colours`` (the same where pixels are numbers of colours instead);
        ``orientation`` 2 to 8; each only where it isn't the usual.
    """
    meaning: dict[str, Any] = {}
    if page.photometric == _WHITE_IS_ZERO and page.dtype != bool:
        meaning["photometric"] = "miniswhite"
    if page.colormap is not None and page.samplesperpixel == 1:
        table = np.asarray(page.colormap, np.uint16)
        is_palette = page.photometric == _PALETTE
        meaning["palette" if is_imagej or _is_ramp(table) or not is_palette else "colours"] = table
    orientation = page.tags.valueof(_ORIENTATION)
    if orientation in range(2, 9):
        meaning["orientation"] = int(orientation)
    return meaning


def missing_values(page: TiffPage) -> tuple[float, ...]:
    """The value that GDAL's tag declares to be no data, if the pixels' type can have it."""
    text = page.tags.valueof(_NODATA)
    try:
        value = float(str(text).replace(",", "."))
    except ValueError:
        return ()
    dtype = np.dtype(page.dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not (value.is_integer() and limits.min <= value <= limits.max):
            return ()
    return () if math.isnan(value) else (value,)


def _is_ramp(table: NDArray[np.uint16]) -> bool:
    """Whether colours get steadily brighter or darker: a look-up table for intensities."""
    brightness = np.array([299, 587, 114]) @ table.astype(np.int64)
    steps = np.diff(brightness)
    return bool((steps >= 0).all() or (steps <= 0).all())


def coloured(data: Array, table: NDArray[np.uint16]) -> Array:
    """Numbers of colours to red, green and blue along a new last axis."""
    # Tables have 16 bits; those of 8-bit images hold each value twice, or times 256.
    eight = bool((table % 257 == 0).all() or (table % 256 == 0).all())
    colours = (table >> 8).astype(np.uint8).T if eight else table.T

    def look_up(numbers: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = colours[np.minimum(numbers, len(colours) - 1)]
        return found

    if isinstance(data, np.ndarray):
        return look_up(data)
    lazy: Any = data
    chunks, axis = (*lazy.chunks, (3,)), lazy.ndim
    meta = np.empty((0,) * (axis + 1), colours.dtype)
    result: da.Array = lazy.map_blocks(
        look_up, dtype=colours.dtype, chunks=chunks, new_axis=axis, meta=meta
    )
    return result


def oriented(data: Array, axes: tuple[int, int], orientation: int) -> Array:
    """Rows and columns as they are to be shown; what is stored for a plane that is shown so.

    Parameters
    ----------
    data
        Pixels with rows and columns as stored.
    axes
        Positions of the row axis and the column axis.
    orientation
        Value of the tag: 2 to 4 mirror, 5 to 8 also exchange rows and columns.
    """
    rows, columns = axes
    if orientation >= 5:
        data = data.swapaxes(rows, columns)
    # After the exchange the mirrored axes are those of what is shown.
    mirrored = {2: "x", 3: "yx", 4: "y", 5: "", 6: "x", 7: "yx", 8: "y"}[orientation]
    steps = [slice(None)] * data.ndim
    for letter, axis in (("y", rows), ("x", columns)):
        if letter in mirrored:
            steps[axis] = slice(None, None, -1)
    return data[tuple(steps)]


def stored_as(orientation: int) -> int:
    """The orientation by which `oriented` turns what is shown back into what was stored."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def tags_for(metadata: Mapping[str, Any], missing: tuple[float, ...]) -> list[tuple[Any, ...]]:
    """Tags beyond tifffile's own that say again what `meaning_of` and `missing_values` found."""
    tags: list[tuple[Any, ...]] = []
    if orientation := metadata.get("orientation"):
        tags.append((_ORIENTATION, "H", 1, orientation, False))
    if missing:
        value = missing[0]
        text = str(int(value)) if float(value).is_integer() and abs(value) < 2**63 else repr(value)
        tags.append((_NODATA, "s", 0, text, False))
    return tags


# --- reading --------------------------------------------------------------------------------------


def read_pixels(tif: TiffFile, numbers: Sequence[int]) -> NDArray[Any]:
    """All pixels of a series, or of several alike, of the machine's byte order.

    Returns
    -------
    numpy.ndarray
        Of the series' shape; of several with an axis before it.
    """
    if len(numbers) == 1:
        return _pixels_of(tif, numbers[0])
    first = tif.series[numbers[0]]
    # One array is filled, so that the images aren't in memory twice.
    stack = np.empty((len(numbers), *first.shape), first.dtype.newbyteorder("="))
    for image, number in zip(stack, numbers, strict=True):
        image[...] = _pixels_of(tif, number)
    return stack


def _pixels_of(tif: TiffFile, number: int) -> NDArray[Any]:
    series = tif.series[number]
    if series.keyframe.parent is tif:
        data = np.asarray(series.asarray())
    else:
        # As a whole, tifffile would read them at their place in the other file from this one.
        pages = [page for page in series if page is not None]
        data = np.stack([_decoded(page) for page in pages]).reshape(series.shape)
    return data.astype(data.dtype.newbyteorder("="), copy=False)


def lazy_pixels(path: Path, tif: TiffFile, numbers: Sequence[int]) -> da.Array:
    """As `read_pixels`, but a dask array of one chunk a plane.

    Raises
    ------
    FileFormatError
        if planes can't be read by themselves.
    """
    import dask.array as da

    series = tif.series[numbers[0]]
    if series.transform is not None:
        return da.from_array(read_pixels(tif, numbers))  # type: ignore[no-untyped-call,no-any-return]
    page_size = series.keyframe.size
    # By the number of pixels, since a page's shape and the series' drop different axes of length 1.
    plane_shapes = (series.shape[first:] for first in range(series.ndim - 2, -1, -1))
    plane_shape = next((s for s in plane_shapes if math.prod(s) == page_size), None)
    if plane_shape is None:
        raise FileFormatError(
            f"{path} stores pages of {page_size} pixels for an image of shape {series.shape} "
            "and can't be read in parts. Read it with lazy=False."
        )
    offsets = [
        tif.series[n].dataoffset if tif.series[n].keyframe.parent is tif else None for n in numbers
    ]
    known = [offset for offset in offsets if offset is not None]
    read_plane: Callable[[int], NDArray[Any]]
    if len(known) == len(numbers):
        stored = series.dtype.newbyteorder(tif.byteorder)
        planes = [ContiguousPlanes(path, offset, stored, plane_shape) for offset in known]
        read_plane = planes[0] if len(planes) == 1 else _Runs(planes, series.size // page_size)
    else:
        read_plane = _EncodedPlanes(path, tuple(numbers), plane_shape)
    native = series.dtype.newbyteorder("=")
    return PlanesOnDisk(
        path=path,
        series=numbers[0] if len(numbers) == 1 else -1,
        read_plane=read_plane,
        shape=series.shape if len(numbers) == 1 else (len(numbers), *series.shape),
        dtype=native,
        plane_ndim=len(plane_shape),
        stamp=stamp_of(path),
    ).as_dask()


@dataclass(frozen=True)
class _Runs:
    """Planes of several images of as many planes each, one image after the other."""

    images: list[ContiguousPlanes]
    count: int

    def __call__(self, index: int) -> NDArray[Any]:
        image, plane = divmod(index, self.count)
        return self.images[image](plane)


def _decoded(page: Any) -> NDArray[Any]:
    """Pixels of a page, whose file is open only meanwhile if it was closed."""
    handle = page.parent.filehandle
    was_closed = handle.closed
    if was_closed:
        handle.open()
    try:
        return np.asarray(page.asarray())
    finally:
        if was_closed:
            handle.close()


class _EncodedPlanes:
    """Reads the pages of some series of a TIFF, one after the other, decoding each."""

    def __init__(self, path: Path, numbers: tuple[int, ...], shape: tuple[int, ...]) -> None:
        from tifffile import TiffFile

        self._arguments = path, numbers, shape
        self._shape = shape
        self._lock = Lock()
        # The directories are parsed once; the file is open only while a page is read, so that
        # no handle outlives its use (Windows can't replace a file that is open).
        with TiffFile(path) as tif:
            self._pages = [page for n in numbers for page in tif.series[n] if page is not None]

    def __call__(self, index: int) -> NDArray[Any]:
        page = self._pages[index]
        with self._lock:
            return _decoded(page).reshape(self._shape)

    def __reduce__(
        self,
    ) -> tuple[type[_EncodedPlanes], tuple[Path, tuple[int, ...], tuple[int, ...]]]:
        return type(self), self._arguments
