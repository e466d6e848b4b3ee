"""NIfTI: volumes and time series of MRI, with their affine and scaling."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import refusing, require
from napari_learned_diffusion.files._honest import DEFLATE_RATIO, check_claimed
from napari_learned_diffusion.files._lazy import (
    ContiguousPlanes,
    PlanesOnDisk,
    is_lazy,
    planes_of,
    stamp_of,
)
from napari_learned_diffusion.files._rescale import Rescale
from napari_learned_diffusion.files._units import MICROMETERS, PIXEL, UNKNOWN, Step, parse_step
from napari_learned_diffusion.files.volume import Volume, bare_name

NIFTI_SUFFIXES = (".nii.gz", ".nii")

_AXES = "XYZTCQI"
_UNITS = {
    "meter": "meter",
    "mm": "millimeter",
    "micron": "micrometer",
    "sec": "second",
    "msec": "millisecond",
    "usec": "microsecond",
}
"""NIfTI's units as pint knows them."""

_SECONDS = {"millisecond": 1e-3, "microsecond": 1e-6, "second": 1.0, "minute": 60.0, "hour": 3600.0}

_LARGEST_NIFTI1 = 32767

_PIECE = 2**20
"""Bytes that are read of a file at once where its length can't be trusted."""

_LARGEST_OFFSET = 2**26
"""Bytes before the first pixel, or after the last, that a file may have and be believed."""


def read_nifti(path: Path, series: int | None, lazy: bool | None) -> Volume:
    if series:
        raise FileFormatError(f"{path} holds one image: there is no series {series}.")
    nibabel = require("nibabel", "nifti", "NIfTI files")
    compressed = _is_compressed(path)
    with refusing(path, "NIfTI"), _refusing_damage(path):
        quiet = nibabel.imageglobals.LoggingOutputSuppressor()
        with _open(path) as stream, quiet:
            header = _read_header(path, stream, nibabel)
        layout = nibabel.arrayproxy.ArrayProxy(str(path), header)
        shape = tuple(int(n) for n in layout.shape)
        stored, offset = np.dtype(layout.dtype), int(layout.offset)
        rescale = Rescale(stored, float(layout.slope), float(layout.inter))
    if stored.kind not in "iufc":
        raise FileFormatError(
            f"{path} has pixels of type {stored}, which are no intensities: a colour image? "
            "Split it into its channels."
        )
    if not 2 <= len(shape) <= len(_AXES) or min(shape) < 1:
        raise FileFormatError(f"{path} has the shape {shape}, which is no image.")
    check_claimed(
        path,
        shape,
        stored,
        compressed=compressed,
        ratio=DEFLATE_RATIO,
        offset=0 if compressed else offset,
    )
    stamp = stamp_of(path)
    needed = offset + math.prod(shape) * stored.itemsize
    held = _check_to_the_end(path, needed) if compressed else stamp[1]
    plane_bytes = math.prod(shape[:2]) * stored.itemsize
    dtype = np.dtype(rescale.value_type())
    # The first axis varies fastest, so planes of Y and X lie one after the other.
    planes = PlanesOnDisk(
        path=path,
        read_plane=_Planes(_stored_planes(path, shape, stored, offset, nibabel), rescale, dtype),
        shape=shape[::-1],
        dtype=dtype,
        plane_ndim=2,
        stamp=stamp,
        series=0,
    )
    lazily = is_lazy(lazy, math.prod(shape) * dtype.itemsize)
    steps = [_step(header, i) for i in range(len(shape))][::-1]
    limits = float(header["cal_min"]), float(header["cal_max"])
    return Volume(
        data=planes.as_dask() if lazily else planes[(slice(None),) * len(shape)],
        axes=_AXES[: len(shape)][::-1],
        scale=tuple(step for step, _ in steps),
        units=tuple(unit for _, unit in steps),
        name=bare_name(path, NIFTI_SUFFIXES),
        metadata={
            "source": str(path),
            "format": "nifti",
            "series": 0,
            "series_count": 1,
            "notes": list(_notes(path, (held - needed) // plane_bytes)),
            "nifti": {"header": header, "rescale": rescale},
        }
        | ({"contrast_limits": limits} if _is_window(*limits) else {}),
    )


def write_nifti(path: Path, volume: Volume, _: str | None) -> None:
    nibabel = require("nibabel", "nifti", "NIfTI files")
    if not _is_prefix(volume.axes):
        raise FileFormatError(
            f"NIfTI has the axes X, Y, Z, T, C in this order without a gap, and this image has "
            f"{volume.axes}. Write TIFF or OME-Zarr."
        )
    order = [volume.axes.index(axis) for axis in reversed(_AXES[: volume.data.ndim])]
    data = volume.data.transpose(order)
    for header, rescale in _headers_for(volume, data.shape[::-1], nibabel):
        with nibabel.openers.Opener(str(path), "wb") as stream:
            header.write_to(stream)
            stream.write(b"\0" * (header.get_data_offset() - stream.tell()))
            if _write_planes(stream, data, rescale):
                return


def _write_planes(stream: Any, data: Any, rescale: Rescale) -> bool:
    """Write planes as far as they can be stored as they are; whether that was so of all."""
    is_own_type = rescale.is_trivial and rescale.stored.newbyteorder("=") == data.dtype
    for plane in planes_of(data, plane_ndim=2):
        with np.errstate(invalid="ignore"):  # NaN as an integer
            stored = rescale.undo(np.ascontiguousarray(plane))
            kept = is_own_type or np.array_equal(rescale.apply(stored, data.dtype), plane)
        if not kept:
            return False
        stream.write(stored.tobytes())
    return True


# --- the file -------------------------------------------------------------------------------------


def _is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if _is_compressed(path) else path.open("rb")


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn what a damaged compressed file raises, partly as errors of the system, into ours."""
    try:
        yield
    except EOFError as error:
        raise FileFormatError(f"{path} is truncated. Copy or export it again.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise FileFormatError(
            f"{path} can't be decompressed ({error}): it is truncated, damaged or of another "
            "format. Please copy or export it again."
        ) from error


class _Piecewise:
    """A stream for reading that takes no more memory than there are bytes to be read."""

    def __init__(self, stream: gzip.GzipFile | BufferedReader) -> None:
        self._stream = stream
        self.tell = stream.tell

    def read(self, count: int) -> bytes:
        pieces = []
        while count > 0 and (piece := self._stream.read(min(count, _PIECE))):
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


def _read_header(path: Path, stream: gzip.GzipFile | BufferedReader, nibabel: Any) -> Any:
    """The header and its extensions."""
    size = int.from_bytes(stream.read(4), "little")
    stream.seek(0)
    kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    sizes = {kind.sizeof_hdr: kind for kind in kinds}
    sizes |= {int.from_bytes(n.to_bytes(4, "big"), "little"): kind for n, kind in sizes.items()}
    if size not in sizes:
        raise FileFormatError(
            f"{path} doesn't begin like a NIfTI file. It may be damaged or of another format: copy "
            "or export it again."
        )
    content = _Piecewise(stream)
    block = content.read(sizes[size].sizeof_hdr)
    if (offset := sizes[size](block).get_data_offset()) > _LARGEST_OFFSET:
        raise FileFormatError(
            f"{path} claims that its pixels begin after {offset} bytes, which can't be. It is "
            "damaged: copy or export it again."
        )
    stream.seek(0)
    return sizes[size].from_fileobj(content)


def _check_to_the_end(path: Path, needed: int) -> int:
    """Read a compressed file to its end, where the checksum of its content stands.

    Returns
    -------
    int
        Bytes of its content.

    Raises
    ------
    FileFormatError
        if the content isn't what was compressed, is shorter than ``needed`` bytes, or goes on for
        much longer.
    """
    total = 0
    with _refusing_damage(path), gzip.open(path) as stream:
        while piece := stream.read(_PIECE):
            total += len(piece)
            if total > 2 * needed + _LARGEST_OFFSET:
                raise FileFormatError(
                    f"{path} holds far more than the {needed} bytes that its header tells of. It "
                    "is damaged, or no image: copy or export it again."
                )
    if total < needed:
        raise FileFormatError(
            f"{path} is truncated: {needed - total} bytes of its pixels are missing. "
            "Copy or export it again."
        )
    return total


@dataclass(frozen=True)
class _Planes:
    """Reads planes and gives their numbers the meaning that slope and intercept say."""

    stored: Callable[[int], NDArray[Any]]
    rescale: Rescale
    dtype: np.dtype[Any]

    def __call__(self, index: int) -> NDArray[Any]:
        return self.rescale.apply(self.stored(index), self.dtype)


@dataclass(frozen=True)
class _CompressedPlanes:
    """Reads planes of a compressed file; going on from one to the next costs least."""

    path: Path
    proxy: Any

    def __call__(self, index: int) -> NDArray[Any]:
        with _refusing_damage(self.path):
            return np.asarray(self.proxy[..., index]).T


def _stored_planes(
    path: Path, shape: tuple[int, ...], stored: np.dtype[Any], offset: int, nibabel: Any
) -> Callable[[int], NDArray[Any]]:
    columns, rows, *others = shape
    if not _is_compressed(path):
        return ContiguousPlanes(path, offset, stored, (rows, columns))
    spec = (columns, rows, math.prod(others)), stored, offset
    flat = nibabel.arrayproxy.ArrayProxy(str(path), spec, mmap=False, keep_file_open=True)
    return _CompressedPlanes(path, flat)


def _notes(path: Path, surplus: int) -> Iterator[str]:
    """A sentence about slices that the header doesn't tell of."""
    if surplus > 0:
        yield (
            f"{path} holds bytes for {surplus} more slices than its header tells of; they weren't "
            "read. Check the header, or export the image again."
        )


# --- the header -----------------------------------------------------------------------------------


def _step(header: Any, axis: int) -> Step:
    """Voxel size along an axis and its unit; pixels where the file says a size without a unit."""
    step = parse_step(header["pixdim"][axis + 1])
    try:
        length, time = header.get_xyzt_units()
    except KeyError:  # codes that NIfTI doesn't have
        length = time = "unknown"
    unit = _UNITS.get(length if axis < 3 else time if axis == 3 else "", PIXEL)
    return UNKNOWN if step is None else (step, unit)


def _is_window(lowest: float, highest: float) -> bool:
    """Whether two intensities are a range to display; both are 0 where none is stated."""
    return math.isfinite(lowest) and math.isfinite(highest) and lowest < highest


def _headers_for(
    volume: Volume, shape: tuple[int, ...], nibabel: Any
) -> Iterator[tuple[Any, Rescale]]:
    """Headers to write with, in the order to be tried: the last can hold any pixels.

    That is the source's header where the volume is of a NIfTI file's shape, otherwise a new one.
    The source's type and scaling come first, where the pixels are what it was read as. Whatever
    they can't hold exactly, such as a mean of integers that are scaled or what was removed from
    them, is stored as it is.
    """
    source = volume.metadata.get("nifti")
    own = Rescale(volume.data.dtype.newbyteorder("<"))
    if source is None or tuple(source["header"].get_data_shape()) != shape:
        yield _described(_new_header(volume, shape, nibabel), own, volume), own
        return
    rescale = replace(source["rescale"], stored=source["rescale"].stored.newbyteorder("<"))
    if np.dtype(rescale.value_type()) == volume.data.dtype and rescale != own:
        yield _described(_copied_header(source["header"], volume), rescale, volume), rescale
    yield _described(_copied_header(source["header"], volume), own, volume), own


def _copied_header(source: Any, volume: Volume) -> Any:
    header = source.as_byteswapped("<")
    if not header.extensions:  # swapping the bytes loses them
        header.extensions.extend(source.extensions)
    if _is_window(float(header["cal_min"]), float(header["cal_max"])):
        # Of other quantities, such as what was removed, the source's range would show nothing.
        header["cal_min"], header["cal_max"] = volume.metadata.get("contrast_limits") or (0, 0)
    return header


def _described(header: Any, rescale: Rescale, volume: Volume) -> Any:
    """Set type, scaling and a note of the processing."""
    _set_type(header, rescale.stored)
    header.set_slope_inter(rescale.slope, rescale.intercept)
    note = volume.metadata.get("processing")
    if note is not None:
        header["descrip"] = note.encode("ascii", "replace")[:80]
    header["vox_offset"] = 0  # where extensions end is found out anew
    return header


def _set_type(header: Any, dtype: np.dtype[Any]) -> None:
    from nibabel.spatialimages import HeaderDataError

    try:
        header.set_data_dtype(dtype)
    except HeaderDataError as error:
        raise FileFormatError(
            f"NIfTI can't hold pixels of type {dtype}. Convert the image to float32 first."
        ) from error


def _new_header(volume: Volume, shape: tuple[int, ...], nibabel: Any) -> Any:
    """A header with the voxel size in millimetres and the time step in seconds.

    Sizes without a unit keep their numbers, as the file can say that it knows none.
    """
    large = max(shape) > _LARGEST_NIFTI1
    kind = nibabel.Nifti2Header if large else nibabel.Nifti1Header
    header = kind(endianness="<")
    header.set_data_shape(shape)
    sizes = [volume.step(axis) for axis in "XYZ"]
    lengths = [_in(step, MICROMETERS, "millimeter") for step in sizes]
    if not any(lengths):
        steps = [step for step, _ in sizes]
    else:
        steps = [length or 1.0 for length in lengths]
    time = _in(volume.step("T"), _SECONDS, "second")
    steps += [time or volume.step("T")[0], *(1.0,) * 3]
    header.set_zooms(steps[: len(shape)])
    header.set_xyzt_units("mm" if any(lengths) else 0, "sec" if time else 0)
    header.set_sform(np.diag([*steps[:3], 1.0]), code="scanner" if any(lengths) else "unknown")
    return header


def _in(step: Step, sizes: Mapping[str, float], unit: str) -> float | None:
    """A step converted to another unit, or None where it isn't known."""
    return step[0] * sizes[step[1]] / sizes[unit] if step[1] in sizes else None


def _is_prefix(axes: str) -> bool:
    """Whether the axes leave no gap in NIfTI's order, so that they keep their meaning."""
    return set(axes) == set(_AXES[: len(axes)])
