"""Image files in and out: pixels together with their axes, voxel size and units.

`read` and `write` turn a file into a `Volume` and back; `get_reader` and `write_image` offer the
same to napari. A format is one entry of ``_FORMATS``. So far that is TIFF:

- read: plain and multi-page TIFF, ImageJ hyperstacks (also those over 4 GB with one directory),
  OME-TIFF, BigTIFF, with any compression that imagecodecs knows;
- written: the first of ImageJ TIFF, OME-TIFF and tifffile's own "shaped" TIFF that can carry the
  volume's type, axes, voxel size and units without loss; BigTIFF where 4 GB don't suffice.

Files over `LAZY_ABOVE` bytes of pixels are opened lazily, one dask chunk a plane, and dask arrays
are written plane by plane, so that no whole stack needs to fit into memory.
"""

from __future__ import annotations

import errno
import json
import math
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
)

if TYPE_CHECKING:
    import os
    from xml.etree.ElementTree import Element

    import dask.array as da
    from tifffile import TiffFile, TiffPage, TiffPageSeries

    PathLike: TypeAlias = str | os.PathLike[str]
    Array: TypeAlias = NDArray[Any] | da.Array
    LayerData: TypeAlias = tuple[Array, dict[str, Any], str]

LAZY_ABOVE = 512 * 2**20
"""Bytes of pixels above which `read` opens a file lazily unless told otherwise."""

COMPRESSIONS = ("deflate", "lzw", "zstd")
"""Lossless compressions that `write` offers."""

PIXEL = "pixel"
"""The unit of an axis of which no physical size is known."""

_NOTE = "napari_learned_diffusion"
"""Key under which a TIFF keeps what its own fields have no place for, as JSON."""

_NOTED_METADATA = ("placement", "contrast_limits")
"""Metadata that every TIFF written carries in that note."""

_CLASSIC_TIFF_BYTES = 2**32 - 2**25
"""Pixels that fit in a TIFF with 32-bit offsets; 32 MiB are left for the directories."""

_CHANNELS_TO_SPLIT = 7
"""Up to so many channels become layers of their own; more of them are a spectrum."""


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
        ``contrast_limits``, ``channel_names``, ``placement`` (translate, affine …), ``imagej``.

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
    return tuple(suffix for file_format in _FORMATS for suffix in file_format.suffixes)


def _format_of(path: Path) -> _Format:
    """The format that a file name's suffix stands for."""
    for file_format in _FORMATS:
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
        if any(source.samefile(path) for source in _files_behind(volume.data) if source.exists()):
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


# --- pixels that stay in their file until asked for -----------------------------------------------


@dataclass(frozen=True)
class _ContiguousPlanes:
    """Reads planes that lie one after the other in a file, uncompressed."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __call__(self, index: int) -> NDArray[Any]:
        count = math.prod(self.shape)
        offset = self.offset + index * count * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count, offset=offset).reshape(self.shape)


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


@dataclass(frozen=True)
class _PlanesOnDisk:
    """Looks like an array of ``shape`` and reads the planes that an index asks for."""

    path: Path
    read_plane: Callable[[int], NDArray[Any]]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    plane_ndim: int
    stamp: tuple[int, int]
    series: int

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: tuple[slice | int, ...]) -> NDArray[Any]:
        self._check_unchanged()
        leading = self.ndim - self.plane_ndim
        numbers = np.arange(math.prod(self.shape[:leading])).reshape(self.shape[:leading])
        wanted = np.asarray(numbers[key[:leading]])
        planes = [self.read_plane(int(number))[key[leading:]] for number in wanted.flat]
        stack = np.stack(planes).astype(self.dtype, copy=False)
        return stack.reshape(wanted.shape + planes[0].shape)

    def _check_unchanged(self) -> None:
        """Refuse a file that was replaced: what lies at the old offsets are other pixels now."""
        try:
            unchanged = _stamp(self.path) == self.stamp
        except OSError as error:
            raise FileFormatError(
                f"{self.path} is gone ({error}). Open the image again."
            ) from error
        if not unchanged:
            raise FileFormatError(
                f"{self.path} has changed since it was opened. Open the image again."
            )

    def __dask_tokenize__(self) -> tuple[object, ...]:
        return str(self.path), self.stamp, self.series, self.shape

    def as_dask(self) -> da.Array:
        """The same as a dask array of one chunk a plane."""
        import dask.array as da

        leading = self.ndim - self.plane_ndim
        chunks = (1,) * leading + self.shape[leading:]
        # fancy=False: lists of indices are then applied to whole planes, not handed to us.
        array: da.Array = da.from_array(  # type: ignore[no-untyped-call]
            self, chunks=chunks, fancy=False, meta=np.empty((0,) * self.ndim, self.dtype)
        )
        return array


def _stamp(path: Path) -> tuple[int, int]:
    """Time of the last change and size of a file."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _files_behind(data: Array) -> set[Path]:
    """Files that a lazy array's planes are yet to be read from."""
    graph = getattr(data, "dask", None)
    if graph is None:
        return set()
    sources = set()
    for name, layer in graph.layers.items():
        if str(name).startswith("original-"):
            for node in layer.values():
                source = getattr(node, "value", node)
                if isinstance(source, _PlanesOnDisk):
                    sources.add(source.path)
    return sources


def _planes(data: Array, plane_ndim: int) -> Iterator[NDArray[Any]]:
    """The planes of an array one by one, each chunk of the axis before them computed once."""
    *outer, last = data.shape[:-plane_ndim] or (1,)
    if data.ndim == plane_ndim:
        yield np.asarray(data)
        return
    chunks = getattr(data, "chunks", None)
    steps = chunks[len(outer)] if chunks else (1,) * last
    for index in np.ndindex(*outer):
        start = 0
        for step in steps:
            yield from np.asarray(data[(*index, slice(start, start + step))])
            start += step


# --- units ----------------------------------------------------------------------------------------

_MICROMETERS = {
    "picometer": 1e-6,
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
    "inch": 25400.0,
}
"""Length of each unit that a TIFF may state."""

_OME_LENGTHS = {
    "picometer": "pm",
    "angstrom": "Å",
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "inch": "in",
    PIXEL: "pixel",
}
_OME_TIMES = {
    "nanosecond": "ns",
    "microsecond": "µs",
    "millisecond": "ms",
    "second": "s",
    "minute": "min",
    "hour": "h",
}
_ALIASES = {
    "micron": "micrometer",
    "\\u00b5m": "micrometer",
    "sec": "second",
    "msec": "millisecond",
    "usec": "microsecond",
    "hr": "hour",
    "\\u00c5": "angstrom",
    "\\u00e5": "angstrom",
    "a": "angstrom",
}


def _plain(text: str) -> str:
    """Spellings of one unit made the same: case, both letters mu, British and plural endings."""
    text = text.strip().lower().replace("\u03bc", "u").replace("\u00b5", "u")
    if len(text) > 3:
        text = text.removesuffix("s").replace("metre", "meter")
    return {"inche": "inch"}.get(text, text)


_UNITS = {
    _plain(spelling): unit
    for unit, spelling in [
        *((unit, unit) for unit in (*_OME_LENGTHS, *_OME_TIMES)),
        *((unit, symbol) for unit, symbol in (*_OME_LENGTHS.items(), *_OME_TIMES.items())),
        *((unit, alias) for alias, unit in _ALIASES.items()),
    ]
}


def _unit(text: object) -> str:
    """The pint name of a unit as some program wrote it, ``"pixel"`` if it says nothing."""
    return _UNITS.get(_plain(str(text)), PIXEL)


Step: TypeAlias = tuple[float, str]
"""Step along an axis and its unit."""

_UNKNOWN: Step = (1.0, PIXEL)


def _without_float32_noise(value: float) -> float:
    """0.1 for 0.10000000149011612: the decimal that a single-precision number was meant to be."""
    single = np.float32(value)
    if math.isclose(float(single), value, rel_tol=1e-10):
        return float(str(single))
    return value


def _number(value: object) -> float | None:
    """A step that is written as text or number; None unless it is finite and positive."""
    try:
        step = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return _without_float32_noise(step) if 0 < step < math.inf else None


def _pixel_size(resolution: object, length: float = 1.0) -> float | None:
    """The pixel size for so many pixels on a ``length``, or None if the fraction says nothing.

    Parameters
    ----------
    resolution
        A TIFF tag's value, which should be a fraction as two whole numbers.
    length
        What the resolution refers to, in the unit that the size is wanted in.
    """
    if not isinstance(resolution, tuple) or len(resolution) != 2 or min(resolution) <= 0:
        return None
    numerator, denominator = resolution
    size: float = length * denominator / numerator
    tolerance = 1e-10
    if denominator >= 10**5 and 10**9 % denominator == 0:
        # ImageJ and others round the resolution to some decimals: 0.65 µm becomes 1 / 1.538462.
        tolerance = max(tolerance, 0.5 / numerator)
    for digits in range(1, 11):
        simple = float(f"{size:.{digits}g}")
        if math.isclose(simple, size, rel_tol=tolerance):
            return simple
    return size


# --- reading TIFF ---------------------------------------------------------------------------------


def _read_tiff(path: Path, series: int | None, lazy: bool | None) -> Volume:
    from tifffile import TiffFile

    try:
        with TiffFile(path) as tif:
            number = _choose_series(tif, series, path)
            chosen = tif.series[number]
            _check_complete(tif, chosen, path)
            axes, shape = _axes_and_shape(tif, number)
            if lazy is None:
                lazy = chosen.nbytes > LAZY_ABOVE
            data = _lazy_pixels(path, tif, number) if lazy else _pixels(chosen)
            steps, metadata = _calibration(tif, number)
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
    if data.dtype == np.uint16 and _is_signed(metadata.get("imagej", {})):
        # Flipping the highest bit subtracts the offset without a wider type in between.
        data = (data ^ np.uint16(_SIGNED_OFFSET)).view(np.int16)
    name = path.name[: -len(next(s for s in _TIFF_SUFFIXES if path.name.lower().endswith(s)))]
    return Volume(
        data=data.reshape(shape),
        axes=axes,
        scale=tuple(steps.get(axis, _UNKNOWN)[0] for axis in axes),
        units=tuple(steps.get(axis, _UNKNOWN)[1] for axis in axes),
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


_IMAGE_DESCRIPTION = 270


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


def _axes_and_shape(tif: TiffFile, number: int) -> tuple[str, tuple[int, ...]]:
    """Axes, each letter once, and the shape; axes of length 1 as our note tells to keep them."""
    series = tif.series[number]
    wanted = _note(tif, number).get("axes", "")
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
        read_plane = _ContiguousPlanes(path, series.dataoffset, stored, plane_shape)
    else:
        read_plane = _EncodedPlanes(path, number, plane_shape)
    native = series.dtype.newbyteorder("=")
    return _PlanesOnDisk(
        path=path,
        series=number,
        read_plane=read_plane,
        shape=series.shape,
        dtype=native,
        plane_ndim=len(plane_shape),
        stamp=_stamp(path),
    ).as_dask()


_SIGNED_OFFSET = 2**15


def _is_signed(imagej: Mapping[str, Any]) -> bool:
    """Whether 16-bit values are ImageJ's way of storing signed ones: the line value − 32768."""
    return (imagej.get("cf"), imagej.get("c0"), imagej.get("c1")) == (0, -_SIGNED_OFFSET, 1)


def _shaped_words_of(tif: TiffFile, number: int) -> dict[str, Any]:
    """The JSON that tifffile keeps in its own TIFFs, for one series."""
    descriptions = tif.shaped_metadata or ()
    return descriptions[number] if number < len(descriptions) else {}


def _note(tif: TiffFile, number: int) -> dict[str, Any]:
    """What `write` has left in the file beyond the format's own fields."""
    note: Any = None
    match tif.series[number].kind:
        case "imagej":
            note = (tif.imagej_metadata or {}).get(_NOTE)
        case "ome":
            note = next((e.text for e in _ome_root(tif).iter() if e.get("K") == _NOTE), None)
        case "shaped":
            note = _shaped_words_of(tif, number).get(_NOTE)
    with suppress(ValueError, TypeError):
        note = json.loads(note)
    return note if isinstance(note, dict) else {}


def _calibration(tif: TiffFile, number: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """Step and unit of each axis of which they are known, and the metadata worth keeping."""
    series = tif.series[number]
    metadata: dict[str, Any]
    match series.kind:
        case "ome":
            steps, metadata = _ome_calibration(tif, number)
        case "imagej":
            steps, metadata = _imagej_calibration(series.keyframe, tif.imagej_metadata or {})
            metadata["format"] = "ImageJ TIFF"
        case _:
            words = _shaped_words_of(tif, number)
            # tifffile's own files may tell the voxel size in ImageJ's words.
            steps = _word_steps(series.keyframe, words) if "unit" in words else {}
            steps = steps or _tag_steps(series.keyframe)
            metadata = {"format": "TIFF"}
    note = _note(tif, number)
    for axis, scale, unit in zip(
        note.get("axes", ""), note.get("scale", ()), note.get("units", ()), strict=False
    ):
        steps[axis] = (float(scale), str(unit))
    metadata |= {key: note[key] for key in _NOTED_METADATA if key in note}
    if "contrast_limits" in metadata:
        metadata["contrast_limits"] = tuple(metadata["contrast_limits"])
    return steps, metadata


_RESOLUTION_UNITS = {2: "inch", 3: "centimeter", 4: "millimeter", 5: "micrometer"}
"""Values of the ResolutionUnit tag: the standard's two, and two that are in use."""


def _pixel_sizes(page: TiffPage, length: float = 1.0) -> dict[str, float]:
    """Pixel sizes along X and Y, where both resolutions are stated; see `_pixel_size`."""
    sizes = {}
    for axis, tag in (("X", "XResolution"), ("Y", "YResolution")):
        value = page.tags[tag].value if tag in page.tags else None
        if (size := _pixel_size(value, length)) is None:
            return {}
        sizes[axis] = size
    return sizes


def _tag_steps(page: TiffPage) -> dict[str, Step]:
    """Steps from a plain TIFF's resolution tags, in micrometers."""
    sizes = _pixel_sizes(page)
    if not sizes:
        return {}
    code = int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 2
    if code not in _RESOLUTION_UNITS:
        # Without a unit the resolutions only say how much longer than wide a pixel is.
        ratio = sizes["Y"] / sizes["X"]
        return {} if ratio == 1 else {"Y": (ratio, PIXEL)}
    numerator, denominator = page.tags["XResolution"].value
    if code == 2 and numerator in (72 * denominator, 96 * denominator):
        # A screen's resolution is what programs write that know nothing. ImageJ ignores it too.
        return {}
    micrometers = _pixel_sizes(page, length=_MICROMETERS[_RESOLUTION_UNITS[code]])
    return {axis: (size, "micrometer") for axis, size in micrometers.items()}


def _word_steps(page: TiffPage, words: Mapping[str, Any]) -> dict[str, Step]:
    """Steps from the words of an ImageJ description and the resolution tags."""
    unit = _unit(words.get("unit", PIXEL))
    steps = {
        axis: (size, _unit(words.get(f"{axis.lower()}unit", unit)))
        for axis, size in _pixel_sizes(page).items()
    }
    if (spacing := _number(words.get("spacing"))) is not None:
        steps["Z"] = (spacing, _unit(words.get("zunit", unit)))
    if (interval := _number(words.get("finterval"))) is not None:
        steps["T"] = (interval, _unit(words.get("tunit", "second")))
    elif (frames_per_second := _number(words.get("fps"))) is not None:
        steps["T"] = (1 / frames_per_second, "second")
    return steps


def _imagej_calibration(
    page: TiffPage, words: Mapping[str, Any]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Steps and metadata of an ImageJ file; its contrast limits are those of the first channel."""
    metadata: dict[str, Any] = {"imagej": {k: v for k, v in words.items() if k != _NOTE}}
    limits = words.get("Ranges", (words.get("min"), words.get("max")))[:2]
    if all(isinstance(limit, int | float) for limit in limits) and limits[0] < limits[1]:
        offset = _SIGNED_OFFSET if _is_signed(words) else 0
        metadata["contrast_limits"] = tuple(float(limit) - offset for limit in limits)
    return _word_steps(page, words), metadata


def _ome_root(tif: TiffFile) -> Element:
    from xml.etree import ElementTree

    return ElementTree.fromstring(tif.ome_metadata or "<OME/>")


def _ome_calibration(tif: TiffFile, number: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """Steps and metadata from the OME-XML of a series."""
    images = _ome_root(tif).findall("{*}Image")
    if len(images) != len(tif.series):
        # Images without pixels are no series of tifffile's: then only the name tells.
        images = [image for image in images if image.get("Name") == tif.series[number].name]
        pixels = images[0].find("{*}Pixels") if images else None
    else:
        pixels = images[number].find("{*}Pixels")
    steps: dict[str, Step] = {}
    metadata: dict[str, Any] = {"format": "OME-TIFF"}
    if pixels is None:
        return steps, metadata
    for axis in "XYZ":
        if (size := _number(pixels.get(f"PhysicalSize{axis}"))) is not None:
            steps[axis] = (size, _unit(pixels.get(f"PhysicalSize{axis}Unit", "µm")))
    if (interval := _number(pixels.get("TimeIncrement"))) is not None:
        steps["T"] = (interval, _unit(pixels.get("TimeIncrementUnit", "s")))
    names = [channel.get("Name") for channel in pixels.findall("{*}Channel")]
    if any(names):
        metadata["channel_names"] = [name or f"channel {i}" for i, name in enumerate(names)]
    return steps, metadata


# --- writing TIFF ---------------------------------------------------------------------------------


_OME_TYPES = (
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def _write_tiff(path: Path, volume: Volume, compression: str | None) -> None:
    from tifffile import TiffWriter

    data = volume.data
    if data.dtype.kind not in "buifc" or data.dtype.itemsize > (
        16 if data.dtype.kind == "c" else 8
    ):
        raise FileFormatError(
            f"TIFF can't hold pixels of type {data.dtype}. "
            "Convert the image to float32 or float64 first."
        )
    if _fits_imagej(volume, compression):
        imagej, ome, (resolution, words) = True, False, _imagej_words(volume)
    elif _fits_ome(volume):
        imagej, ome, (resolution, words) = False, True, _ome_words(volume)
    else:
        imagej, ome, (resolution, words) = False, False, _shaped_words(volume)
    samples = volume.axes.endswith("S") and data.shape[-1] > 1 and data.dtype != bool
    colour = samples and data.shape[-1] in (3, 4) and data.dtype.kind in "uf"
    bigtiff = data.nbytes > _CLASSIC_TIFF_BYTES
    # Our own stream: tifffile would swallow that its last bytes don't fit on the disk any more.
    with (
        path.open("x+b") as stream,
        TiffWriter(stream, bigtiff=bigtiff, imagej=imagej, ome=ome) as tif,
    ):
        tif.write(
            _planes(data, plane_ndim=3 if samples else _stored_ndim(data.shape)),
            shape=data.shape,
            dtype=data.dtype,
            photometric="rgb" if colour else "minisblack",
            planarconfig="contig" if samples else None,
            compression=compression,
            metadata={"axes": volume.axes, **words},
            **resolution,
        )


def _stored_ndim(shape: tuple[int, ...]) -> int:
    """How many of the last axes tifffile puts into a page: two, not counting trailing ones."""
    trailing = next((i for i, size in enumerate(reversed(shape)) if size > 1), len(shape))
    return min(2 + trailing, len(shape))


def _step(volume: Volume, axis: str) -> Step:
    """Step and unit along an axis; 1 pixel for an axis that the volume lacks."""
    if axis not in volume.axes:
        return _UNKNOWN
    i = volume.axes.index(axis)
    return volume.scale[i], volume.units[i]


def _is_subsequence(part: str, whole: str) -> bool:
    letters = iter(whole)
    return all(letter in letters for letter in part)


def _has_plain_planes(volume: Volume) -> bool:
    """Whether planes come last, samples are a colour's, and the steps positive and finite."""
    axes = volume.axes.removesuffix("S")
    return (
        axes.endswith("YX")
        and (axes == volume.axes or volume.data.shape[-1] in (3, 4))
        # tifffile takes a last axis of length 1 for samples.
        and volume.data.shape[axes.index("X")] > 1
        and all(0 < step < math.inf for step in volume.scale)
    )


def _fits_imagej(volume: Volume, compression: str | None) -> bool:
    """Whether ImageJ's TIFF carries the volume without loss."""
    data, axes = volume.data, volume.axes
    (x, unit), (y, unit_y), z = (_step(volume, axis) for axis in "XYZ")
    time = _step(volume, "T")
    return (
        data.dtype in (np.uint8, np.uint16, np.float32)
        and _has_plain_planes(volume)
        and _is_subsequence(axes, "TZCYXS")
        and ("S" not in axes or data.dtype == np.uint8)
        and data.nbytes <= _CLASSIC_TIFF_BYTES
        and compression in (None, "deflate", "lzw")
        and unit == unit_y
        and unit in _OME_LENGTHS
        and (z[1] == unit or z == _UNKNOWN)
        and (time[1] == "second" or time == _UNKNOWN)
        and _step(volume, "C") == _step(volume, "S") == _UNKNOWN
        # Beyond this a fraction of 32-bit numbers can't hold the resolution.
        and 1e-6 <= min(x, y) <= max(x, y) <= 1e6
    )


def _imagej_words(volume: Volume) -> tuple[dict[str, Any], dict[str, Any]]:
    x, unit = _step(volume, "X")
    y, _ = _step(volume, "Y")
    # ImageJ's own word for micrometers; its file holds no letters beyond ASCII.
    words: dict[str, Any] = {"unit": {"micrometer": "micron"}.get(unit, unit)}
    z, time = _step(volume, "Z"), _step(volume, "T")
    if z != _UNKNOWN:
        words["spacing"] = z[0]
    if time != _UNKNOWN:
        words["finterval"] = time[0]
    if limits := volume.metadata.get("contrast_limits"):
        words["min"], words["max"] = limits
    if note := _note_for(volume):
        words[_NOTE] = json.dumps(note)
    return {"resolution": (1 / x, 1 / y), "resolutionunit": "NONE"}, words


def _fits_ome(volume: Volume) -> bool:
    """Whether OME-TIFF carries the volume without loss."""
    leading = set(volume.axes.removesuffix("S")) - set("YX")
    time = _step(volume, "T")
    return (
        volume.data.dtype.name in _OME_TYPES
        and _has_plain_planes(volume)
        and leading <= set("TZC")
        and all(_step(volume, axis)[1] in _OME_LENGTHS for axis in "XYZ")
        and (time[1] in _OME_TIMES or time == _UNKNOWN)
        and _step(volume, "C") == _step(volume, "S") == _UNKNOWN
    )


def _ome_words(volume: Volume) -> tuple[dict[str, Any], dict[str, Any]]:
    words: dict[str, Any] = {"Name": volume.name}
    for axis in "XYZ":
        step, unit = _step(volume, axis)
        if (step, unit) != _UNKNOWN:
            words[f"PhysicalSize{axis}"] = step
            words[f"PhysicalSize{axis}Unit"] = _OME_LENGTHS[unit]
    step, unit = _step(volume, "T")
    if unit != PIXEL:
        words["TimeIncrement"] = step
        words["TimeIncrementUnit"] = _OME_TIMES[unit]
    names = volume.metadata.get("channel_names")
    if names and "C" in volume.axes and len(names) == volume.data.shape[volume.axes.index("C")]:
        words["Channel"] = {"Name": list(names)}
    if note := _note_for(volume):
        words["MapAnnotation"] = {"Namespace": _NOTE, _NOTE: json.dumps(note)}
    return _resolution_in_cm(volume), words


def _shaped_words(volume: Volume) -> tuple[dict[str, Any], dict[str, Any]]:
    note = _note_for(volume) | {
        "axes": volume.axes,
        "scale": list(volume.scale),
        "units": list(volume.units),
    }
    return _resolution_in_cm(volume), {_NOTE: note}


def _resolution_in_cm(volume: Volume) -> dict[str, Any]:
    """The pixel size for programs that read neither OME nor our note."""
    micrometers = [
        step * _MICROMETERS.get(unit, math.nan) for step, unit in (_step(volume, a) for a in "XY")
    ]
    if not all(1e-3 <= size <= 1e9 for size in micrometers):
        return {}
    x, y = (_MICROMETERS["centimeter"] / size for size in micrometers)
    return {"resolution": (x, y), "resolutionunit": "CENTIMETER"}


def _note_for(volume: Volume) -> dict[str, Any]:
    """What ImageJ's and OME's own fields have no place for."""
    note: dict[str, Any] = {}
    if 1 in volume.data.shape:
        # Readers of TIFF drop axes of length 1.
        note["axes"] = volume.axes
    note |= {key: volume.metadata[key] for key in _NOTED_METADATA if volume.metadata.get(key)}
    # Numbers and arrays of numpy among them become plain ones, which is all that JSON knows.
    plain: dict[str, Any] = json.loads(
        json.dumps(note, default=lambda value: np.asarray(value).tolist())
    )
    return plain


# --- the formats ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """How files of one format are told, read and written."""

    suffixes: tuple[str, ...]
    read: Callable[[Path, int | None, bool | None], Volume]
    write: Callable[[Path, Volume, str | None], None]


# Longer suffixes first: a name loses the one that matches first.
_TIFF_SUFFIXES = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".btf", ".tf8", ".tf2")

_FORMATS = (_Format(_TIFF_SUFFIXES, _read_tiff, _write_tiff),)


# --- napari ---------------------------------------------------------------------------------------


def get_reader(path: PathLike | Sequence[PathLike]) -> Callable[[Any], list[LayerData]] | None:
    """Offer napari a reader for the path, or for a list of paths to stack.

    Returns
    -------
    callable or None
        None if a name has a suffix that isn't ours.
    """
    paths = path if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    ours = all(Path(p).name.lower().endswith(supported_suffixes()) for p in paths)
    return _read_layers if paths and ours else None


def _read_layers(path: PathLike | Sequence[PathLike]) -> list[LayerData]:
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [_layer(_stack(path))]
    return [_layer(read(path))]


def _stack(paths: Sequence[PathLike]) -> Volume:
    """Several files of the same shape and type as one lazy volume with an axis before the others.

    Planes become slices (Z), anything larger frames (T).
    """
    import dask.array as da

    volumes = [read(path, lazy=True) for path in paths]
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for path, volume in zip(paths, volumes, strict=True):
        if (volume.data.shape, volume.data.dtype, volume.axes) != (
            first.data.shape,
            first.data.dtype,
            first.axes,
        ):
            raise FileFormatError(
                f"{path} is {volume.axes} of shape {volume.data.shape} and type "
                f"{volume.data.dtype}, but {paths[0]} is {first.axes} of shape "
                f"{first.data.shape} and type {first.data.dtype}: open them one by one."
            )
    axis = next(letter for letter in "ZTQIUVW" if letter not in first.axes)
    return replace(
        first,
        data=da.stack([volume.data for volume in volumes]),  # type: ignore[no-untyped-call]
        axes=axis + first.axes,
        scale=(1.0, *first.scale),
        units=(PIXEL, *first.units),
    )


def _layer(volume: Volume) -> LayerData:
    """A volume as napari's layer data tuple."""
    data, axes = volume.data, volume.axes
    placement = volume.metadata.get("placement", {})
    kwargs: dict[str, Any] = {}
    if "S" in axes and data.shape[axes.index("S")] in (3, 4) and data.dtype.kind in "uf":
        samples = axes.index("S")
        data = data.transpose([i for i in range(data.ndim) if i != samples] + [samples])
        kwargs["rgb"] = True
        axes = axes.replace("S", "")
    elif "C" in axes and 1 < data.shape[axes.index("C")] <= _CHANNELS_TO_SPLIT and not placement:
        kwargs["channel_axis"] = axes.index("C")
        axes = axes.replace("C", "")
    steps = [_step(volume, axis) for axis in axes]
    name: str | list[str] = volume.name
    if "channel_axis" in kwargs:
        count = data.shape[kwargs["channel_axis"]]
        names = volume.metadata.get("channel_names", [])
        if len(names) != count:
            names = [f"channel {i}" for i in range(count)]
        name = [f"{volume.name} {channel}" for channel in names]
    elif "contrast_limits" in volume.metadata and "rgb" not in kwargs:
        kwargs["contrast_limits"] = volume.metadata["contrast_limits"]
    return (
        data,
        {
            "name": name,
            "scale": tuple(step for step, _ in steps),
            "units": tuple(unit for _, unit in steps),
            "axis_labels": tuple(axis.lower() for axis in axes),
            "metadata": dict(volume.metadata),
            **kwargs,
            **placement,
        },
        "image",
    )


def write_image(path: str, data: Any, meta: dict[str, Any]) -> list[str]:
    """Write one image layer for napari, which has asked before a file is replaced.

    Parameters
    ----------
    path
        Where to.
    data
        The layer's pixels, or its levels if it is multiscale; the finest is written.
    meta
        The layer's attributes; scale, units, axis labels and where it lies are kept.

    Returns
    -------
    list of str
        The file written.

    Raises
    ------
    FileWriteError, FileFormatError
        as `write`.
    """
    return [str(write(path, _volume_of_layer(path, data, meta), overwrite=True))]


_AXIS_WORDS = {"time": "T", "depth": "Z", "channel": "C", "channels": "C", "frame": "T"}


def _volume_of_layer(path: str, data: Any, meta: Mapping[str, Any]) -> Volume:
    if meta.get("multiscale"):
        data = data[0]
    if not isinstance(data, np.ndarray) and not hasattr(data, "dask"):
        import dask.array as da

        data = da.from_array(data)  # type: ignore[no-untyped-call]
    colour = bool(meta.get("rgb"))
    ndim = data.ndim - colour
    axes = _axes_of_labels(meta.get("axis_labels") or (), ndim)
    scale = tuple(float(step) for step in meta.get("scale", (1.0,) * ndim))
    units = tuple(str(unit) for unit in meta.get("units") or (PIXEL,) * ndim)
    kept = {"placement": _placement(meta), "contrast_limits": meta.get("contrast_limits")}
    return Volume(
        data=data,
        axes=axes + "S" * colour,
        scale=scale + (1.0,) * colour,
        units=units + (PIXEL,) * colour,
        name=str(meta.get("name") or Path(path).stem),
        metadata={key: value for key, value in kept.items() if value},
    )


def _axes_of_labels(labels: Sequence[str], ndim: int) -> str:
    """Axis letters from a layer's labels, or by position where these don't tell."""
    letters = [_AXIS_WORDS.get(label.lower(), label.upper()) for label in labels]
    named = len(letters) == len(set(letters)) == ndim and {"Y", "X"} <= set(letters)
    if named and all(len(letter) == 1 and letter.isalpha() and letter != "S" for letter in letters):
        return "".join(letters)
    return "UVWIQTZYX"[-ndim:]


def _placement(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a layer's transforms beside its scale that do something, as plain lists."""
    ndim = len(meta.get("scale", ()))
    neutral = {
        "translate": np.zeros(ndim),
        "rotate": np.eye(ndim),
        "shear": np.zeros(ndim * (ndim - 1) // 2),
        "affine": np.eye(ndim + 1),
    }
    placement = {}
    for key, nothing in neutral.items():
        value = np.asarray(meta.get(key, nothing), dtype=float)
        if value.shape != nothing.shape or not np.array_equal(value, nothing):
            placement[key] = value.tolist()
    return placement
