"""NIfTI: volumes and time series of MRI, with their affine and scaling."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import refusing, require
from napari_learned_diffusion.files._lazy import (
    ContiguousPlanes,
    PlanesOnDisk,
    is_lazy,
    planes_of,
    stamp_of,
)
from napari_learned_diffusion.files._rescale import Rescale
from napari_learned_diffusion.files._units import MICROMETERS, UNKNOWN, Step, parse_step
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


def read_nifti(path: Path, series: int | None, lazy: bool | None) -> Volume:
    if series:
        raise FileFormatError(f"{path} holds one image: there is no series {series}.")
    nibabel = require("nibabel", "nifti", "NIfTI files")
    with refusing(path, "NIfTI"):
        image = nibabel.load(path)
        header, proxy = image.header, image.dataobj
        shape = tuple(proxy.shape)
        stored = np.dtype(proxy.dtype)
        rescale = Rescale(stored, float(proxy.slope), float(proxy.inter))
    if stored.kind not in "iufc":
        raise FileFormatError(
            f"{path} has pixels of type {stored}, which are no intensities: a colour image? "
            "Split it into its channels."
        )
    if not 2 <= len(shape) <= len(_AXES) or 0 in shape:
        raise FileFormatError(f"{path} has the shape {shape}, which is no image.")
    dtype = np.dtype(rescale.value_type())
    # The first axis varies fastest, so planes of Y and X lie one after the other.
    planes = PlanesOnDisk(
        path=path,
        read_plane=_Planes(_stored_planes(path, proxy, nibabel), rescale, dtype),
        shape=shape[::-1],
        dtype=dtype,
        plane_ndim=2,
        stamp=stamp_of(path),
        series=0,
    )
    lazily = is_lazy(lazy, math.prod(shape) * dtype.itemsize)
    steps = [_step(header, i) for i in range(len(shape))][::-1]
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
            "nifti": {"header": header, "rescale": rescale},
        },
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
    header, rescale = _header_for(volume, data.shape[::-1], nibabel)
    with nibabel.openers.Opener(str(path), "wb") as stream:
        header.write_to(stream)
        stream.write(b"\0" * (header.get_data_offset() - stream.tell()))
        for plane in planes_of(data, plane_ndim=2):
            stream.write(rescale.undo(np.ascontiguousarray(plane)).tobytes())


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
        try:
            return np.asarray(self.proxy[..., index]).T
        except (OSError, EOFError, zlib.error) as error:
            raise FileFormatError(
                f"{self.path} is truncated or damaged ({error}). Copy or export it again."
            ) from error


def _stored_planes(path: Path, proxy: Any, nibabel: Any) -> Callable[[int], NDArray[Any]]:
    columns, rows, *others = proxy.shape
    count = math.prod(others)
    if path.name.lower().endswith(".gz"):
        spec = (columns, rows, count), proxy.dtype, proxy.offset
        flat = nibabel.arrayproxy.ArrayProxy(str(path), spec, mmap=False, keep_file_open=True)
        return _CompressedPlanes(path, flat)
    needed = proxy.offset + columns * rows * count * proxy.dtype.itemsize
    if path.stat().st_size < needed:
        raise FileFormatError(
            f"{path} is truncated: {needed - path.stat().st_size} bytes of its pixels are missing. "
            "Copy or export it again."
        )
    return ContiguousPlanes(path, proxy.offset, proxy.dtype, (rows, columns))


def _step(header: Any, axis: int) -> Step:
    """Voxel size along an axis and its unit."""
    step = parse_step(header["pixdim"][axis + 1])
    length, time = header.get_xyzt_units()
    unit = _UNITS.get(length if axis < 3 else time if axis == 3 else "")
    return UNKNOWN if step is None or unit is None else (step, unit)


def _header_for(volume: Volume, shape: tuple[int, ...], nibabel: Any) -> tuple[Any, Rescale]:
    """The source's header where the volume is of a NIfTI file's shape, otherwise a new one."""
    source = volume.metadata.get("nifti")
    if source is not None and tuple(source["header"].get_data_shape()) == shape:
        header, rescale = source["header"].as_byteswapped("<"), source["rescale"]
        if not header.extensions:  # swapping the bytes loses them
            header.extensions.extend(source["header"].extensions)
        rescale = replace(rescale, stored=rescale.stored.newbyteorder("<"))
    else:
        header = _new_header(volume, shape, nibabel)
        rescale = Rescale(volume.data.dtype.newbyteorder("<"))
        _set_type(header, rescale.stored)
    header.set_slope_inter(rescale.slope, rescale.intercept)
    note = volume.metadata.get("processing")
    if note is not None:
        header["descrip"] = note.encode("ascii", "replace")[:80]
    header["vox_offset"] = 0  # where extensions end is found out anew
    return header, rescale


def _set_type(header: Any, dtype: np.dtype[Any]) -> None:
    from nibabel.spatialimages import HeaderDataError

    try:
        header.set_data_dtype(dtype)
    except HeaderDataError as error:
        raise FileFormatError(
            f"NIfTI can't hold pixels of type {dtype}. Convert the image to float32 first."
        ) from error


def _new_header(volume: Volume, shape: tuple[int, ...], nibabel: Any) -> Any:
    """A header with the voxel size in millimetres and the time step in seconds."""
    large = max(shape) > _LARGEST_NIFTI1
    kind = nibabel.Nifti2Header if large else nibabel.Nifti1Header
    header = kind(endianness="<")
    header.set_data_shape(shape)
    lengths = [_in(volume.step(axis), MICROMETERS, "millimeter") for axis in "XYZ"]
    time = _in(volume.step("T"), _SECONDS, "second")
    steps = [length or 1.0 for length in lengths] + [time or 1.0] + [1.0] * 3
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
