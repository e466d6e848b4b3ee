"""MRC and CCP4 maps: micrographs, tilt series and tomograms of electron microscopy."""

from __future__ import annotations

import math
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
from napari_learned_diffusion.files._units import MICROMETERS, UNKNOWN, Step, parse_step
from napari_learned_diffusion.files.volume import Volume

MRC_SUFFIXES = (".mrcs", ".mrc", ".map", ".ccp4", ".rec", ".st")

_HEADER_BYTES = 1024
_UNIT = "angstrom"
_LABELS = 10


def read_mrc(path: Path, series: int | None, lazy: bool | None) -> Volume:
    if series:
        raise FileFormatError(f"{path} holds one image: there is no series {series}.")
    mrcfile = require("mrcfile", "mrc", "MRC files")
    with refusing(path, "MRC"), mrcfile.open(path, header_only=True) as mrc:
        header = mrc.header.copy()
        extended = mrc.extended_header.tobytes()
        steps = {letter: _step(mrc.voxel_size[letter.lower()]) for letter in "XYZ"}
        shape = tuple(mrcfile.utils.data_shape_from_header(header))
        dtype = mrcfile.utils.data_dtype_from_header(header)
    offset = _HEADER_BYTES + len(extended)
    missing = offset + math.prod(shape) * dtype.itemsize - path.stat().st_size
    if missing > 0:
        raise FileFormatError(
            f"{path} is truncated: {missing} bytes of its pixels are missing. "
            "Copy or export it again."
        )
    axes = _axes(header, len(shape))
    planes = PlanesOnDisk(
        path=path,
        read_plane=ContiguousPlanes(path, offset, dtype, shape[-2:]),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        plane_ndim=2,
        stamp=stamp_of(path),
        series=0,
    )
    lazily = is_lazy(lazy, math.prod(shape) * dtype.itemsize)
    return Volume(
        data=planes.as_dask() if lazily else planes[(slice(None),) * len(shape)],
        axes=axes,
        scale=tuple(steps.get(axis, UNKNOWN)[0] for axis in axes),
        units=tuple(steps.get(axis, UNKNOWN)[1] for axis in axes),
        name=path.stem,
        metadata={
            "source": str(path),
            "format": "mrc",
            "series": 0,
            "series_count": 1,
            "mrc": {"header": header.tobytes(), "extended": extended},
        },
    )


def write_mrc(path: Path, volume: Volume, _: str | None) -> None:
    mrcfile = require("mrcfile", "mrc", "MRC files")
    data = volume.data
    if data.ndim > 3:
        raise FileFormatError(
            f"An MRC file has at most three axes, and this image has {volume.axes}. "
            "Write OME-Zarr or TIFF, or its parts one by one."
        )
    try:
        stored = mrcfile.utils.dtype_from_mode(mrcfile.utils.mode_from_dtype(data.dtype))
    except ValueError as error:
        raise FileFormatError(
            f"MRC can't hold pixels of type {data.dtype}. Convert the image to float32 first, "
            "or write TIFF or OME-Zarr."
        ) from error
    if not np.can_cast(data.dtype, stored):
        raise FileFormatError(
            f"MRC would cut pixels of type {data.dtype} to {stored}. Convert the image to float32 "
            "first, or write TIFF or OME-Zarr."
        )
    header, extended = _header_for(path, volume, stored, mrcfile)
    # The source's extended header is copied as it is, so its byte order stays the file's.
    stored = stored.newbyteorder(header.dtype["nx"].byteorder)
    statistics = _Statistics()
    with path.open("r+b") as stream:
        stream.write(header.tobytes() + extended)
        for plane in planes_of(data, plane_ndim=2):
            statistics.add(plane)
            stream.write(plane.astype(stored, copy=False).tobytes())
        statistics.fill(header)
        stream.seek(0)
        stream.write(header.tobytes())


def _step(value: object) -> Step:
    step = parse_step(value)
    return UNKNOWN if step is None else (step, _UNIT)


def _axes(header: Any, ndim: int) -> str:
    """Letters from the slowest axis to the fastest, as the header maps them; ZYX where it's odd."""
    letters = {1: "X", 2: "Y", 3: "Z"}
    mapped = [letters.get(int(header[name])) for name in ("maps", "mapr", "mapc")]
    axes = "".join(m for m in mapped if m)
    if sorted(axes) != list("XYZ") or not {"X", "Y"} <= set(axes[-ndim:]):
        axes = "ZYX"
    return axes[-ndim:] if ndim <= 3 else "T" + axes


def _header_for(
    path: Path, volume: Volume, stored: np.dtype[Any], mrcfile: Any
) -> tuple[NDArray[Any], bytes]:
    """Header and extended header: the source's where the volume is of an MRC file's shape."""
    shape = volume.data.shape
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.zeros((1,) * len(shape), stored))
        template = np.array([mrc.header.copy()], mrc.header.dtype)
    numbers = (1,) * (3 - len(shape)) + shape
    source = volume.metadata.get("mrc")
    if source is not None:
        header = _parse(source["header"], template.dtype)
        if tuple(int(header[n][0]) for n in ("nz", "ny", "nx")) == numbers:
            _describe(header, volume, mrcfile, stored)
            return header, source["extended"]
    axes = "Z" + volume.axes if len(shape) == 2 else volume.axes
    if not set(axes) <= set("XYZ"):
        axes = "ZYX"
    for name, count in zip(("nz", "ny", "nx"), numbers, strict=True):
        template[name] = count
    for name, axis in zip(("maps", "mapr", "mapc"), axes, strict=True):
        template[name] = "XYZ".index(axis) + 1
    for axis, count in zip(axes, numbers, strict=True):
        template[f"m{axis.lower()}"] = count
    template["ispg"] = 0 if len(shape) == 2 else 1
    _describe(template, volume, mrcfile, stored)
    return template, b""


def _parse(content: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A header as it stands in a file, in the byte order that gives it a known mode."""
    header = np.frombuffer(content, dtype).copy()
    if not 0 <= int(header["mode"][0]) < 256:
        header = header.view(dtype.newbyteorder())
    return header


def _describe(header: NDArray[Any], volume: Volume, mrcfile: Any, stored: np.dtype[Any]) -> None:
    """Set type, voxel size and a note of the processing."""
    header["mode"] = mrcfile.utils.mode_from_dtype(stored)
    for axis in volume.axes:
        step, unit = volume.step(axis)
        if axis in "XYZ" and unit in MICROMETERS:
            angstroms = step * MICROMETERS[unit] / MICROMETERS[_UNIT]
            header["cella"][axis.lower()] = angstroms * header[f"m{axis.lower()}"]
    note = volume.metadata.get("processing")
    if note is not None:
        number = min(int(header["nlabl"][0]), _LABELS - 1)
        header["label"][0, number] = note.encode("ascii", "replace")[:80]
        header["nlabl"] = number + 1


class _Statistics:
    """Range, mean and standard deviation of pixels that come plane by plane."""

    def __init__(self) -> None:
        self._lowest, self._highest = math.inf, -math.inf
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, plane: NDArray[Any]) -> None:
        if plane.dtype.kind == "c":
            return
        self._lowest = min(self._lowest, float(plane.min()))
        self._highest = max(self._highest, float(plane.max()))
        self._count += plane.size
        self._sum += float(plane.sum(dtype=np.float64))
        self._squares += float(np.square(plane, dtype=np.float64).sum())

    def fill(self, header: NDArray[Any]) -> None:
        if not self._count:
            return
        mean = self._sum / self._count
        header["dmin"], header["dmax"], header["dmean"] = self._lowest, self._highest, mean
        header["rms"] = math.sqrt(max(0.0, self._squares / self._count - mean**2))
