"""MRC and CCP4 maps: micrographs, tilt series and tomograms of electron microscopy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._extras import require
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

_BYTES = 0
"""Mode of bytes, which are signed by the standard and unsigned in older programs."""

_HALF_BYTES = 101
"""Mode of two pixels a byte."""

_TYPES = {_BYTES: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2", _HALF_BYTES: "u1"}
_MODES = {"i1": _BYTES, "i2": 1, "f4": 2, "u1": 6, "u2": 6, "f2": 12}
"""Bytes without a sign become 16-bit numbers unless IMOD's flag said that the source had them."""

_REFUSED = {
    3: "a Fourier transform in complex integers",
    4: "a Fourier transform in complex numbers",
    16: "colours",
}

# IMOD's own fields: https://bio3d.colorado.edu/imod/doc/mrc_format.txt
_IMOD_STAMP = 1146047817
_IMOD_PLACE = slice(152, 160)
_SIGNED, _NO_RMS, _PACKED = 1, 8, 16


@dataclass(frozen=True)
class _Layout:
    """What a header says about the pixels that follow it.

    Parameters
    ----------
    header
        Of one element, in the byte order of the file.
    order
        ``"<"`` or ``">"``.
    """

    header: NDArray[Any]
    order: str

    def number(self, name: str) -> int:
        return int(self.header[name][0])

    @property
    def mode(self) -> int:
        return self.number("mode")

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two pixels of 4 bits, the first one in its lower half."""
        flags = _imod_flags(self)
        flagged = self.mode == _BYTES and flags is not None and bool(flags & _PACKED)
        return self.mode == _HALF_BYTES or flagged

    @property
    def is_unsigned(self) -> bool:
        """Whether pixels of mode 0 have no sign: by IMOD's flag, or where the range says so."""
        if self.mode != _BYTES:
            return False
        flags = _imod_flags(self)
        if flags is not None:
            return not flags & _SIGNED or bool(flags & _PACKED)
        return self.is_unsigned_by_range

    @property
    def is_unsigned_by_range(self) -> bool:
        """Whether the largest value is one that signed bytes can't have."""
        lowest, highest = float(self.header["dmin"][0]), float(self.header["dmax"][0])
        return (
            self.mode == _BYTES
            and _imod_flags(self) is None
            and lowest >= 0
            and 127 < highest < 256
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels in memory, in the byte order of the file."""
        name = "u1" if self.is_unsigned else _TYPES[self.mode]
        return np.dtype(f"{self.order}{name}")

    @property
    def shape(self) -> tuple[int, ...]:
        columns, rows, sections = (self.number(n) for n in ("nx", "ny", "nz"))
        if self.mode == _BYTES and self.is_packed:
            columns *= 2  # counted are bytes
        group, depth = self.number("ispg"), self.number("mz")
        if 401 <= group <= 630 and depth > 0 and sections % depth == 0:
            return sections // depth, depth, rows, columns
        if group == 0 and sections == 1:
            return rows, columns
        return sections, rows, columns

    @property
    def plane_bytes(self) -> int:
        rows, columns = self.shape[-2:]
        return rows * ((columns + 1) // 2 if self.is_packed else columns * self.dtype.itemsize)

    @property
    def offset(self) -> int:
        return _HEADER_BYTES + self.number("nsymbt")

    @property
    def end(self) -> int:
        """Bytes that a file with this header has at least."""
        return self.offset + math.prod(self.shape[:-2]) * self.plane_bytes

    @property
    def is_sound(self) -> bool:
        """Whether the header can be one: pixels of a known type, and not less than none."""
        known = self.mode in _TYPES or self.mode in _REFUSED
        lengths = (self.number(n) for n in ("nx", "ny", "nz"))
        return known and min(lengths) > 0 and self.number("nsymbt") >= 0

    @property
    def axes(self) -> str:
        """Letters from the slowest axis to the fastest, as the header maps them; else ZYX."""
        ndim = len(self.shape)
        letters = {1: "X", 2: "Y", 3: "Z"}
        mapped = [letters.get(self.number(name)) for name in ("maps", "mapr", "mapc")]
        axes = "".join(m for m in mapped if m)
        if sorted(axes) != list("XYZ") or not {"X", "Y"} <= set(axes[-ndim:]):
            axes = "ZYX"
        return axes[-ndim:] if ndim <= 3 else "T" + axes

    def step(self, letter: str) -> Step:
        """Voxel size along an axis."""
        count = self.number(f"m{letter.lower()}")
        length = float(self.header["cella"][letter.lower()][0])
        step = parse_step(np.float32(length / count)) if count > 0 else None
        return UNKNOWN if step is None else (step, _UNIT)


@dataclass(frozen=True)
class _PackedPlanes:
    """Reads planes of 4 bits a pixel, whose rows begin at whole bytes."""

    path: Path
    offset: int
    shape: tuple[int, ...]

    def __call__(self, index: int) -> NDArray[Any]:
        rows, columns = self.shape
        width = (columns + 1) // 2
        offset = self.offset + index * rows * width
        packed = np.fromfile(self.path, np.uint8, rows * width, offset=offset).reshape(rows, width)
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)[:, :columns]


def read_mrc(path: Path, series: int | None, lazy: bool | None) -> Volume:
    if series:
        raise FileFormatError(f"{path} holds one image: there is no series {series}.")
    require("mrcfile", "mrc", "MRC files")
    size = path.stat().st_size
    with path.open("rb") as stream:
        layout = _layout_of(path, stream.read(_HEADER_BYTES), size)
        missing = layout.end - size
        if missing > 0:
            raise FileFormatError(
                f"{path} is truncated: {missing} bytes of its pixels are missing. "
                "Copy or export it again."
            )
        extended = stream.read(layout.number("nsymbt"))
    shape, dtype, axes = layout.shape, layout.dtype, layout.axes
    planes = PlanesOnDisk(
        path=path,
        read_plane=(
            _PackedPlanes(path, layout.offset, shape[-2:])
            if layout.is_packed
            else ContiguousPlanes(path, layout.offset, dtype, shape[-2:])
        ),
        shape=shape,
        dtype=dtype.newbyteorder("="),
        plane_ndim=2,
        stamp=stamp_of(path),
        series=0,
    )
    steps = [layout.step(axis) if axis in "XYZ" else UNKNOWN for axis in axes]
    lazily = is_lazy(lazy, math.prod(shape) * dtype.itemsize)
    return Volume(
        data=planes.as_dask() if lazily else planes[(slice(None),) * len(shape)],
        axes=axes,
        scale=tuple(step for step, _ in steps),
        units=tuple(unit for _, unit in steps),
        name=path.stem,
        metadata={
            "source": str(path),
            "format": "mrc",
            "series": 0,
            "series_count": 1,
            "notes": _notes(path, layout, size),
            "mrc": {
                "header": layout.header.tobytes(),
                "extended": extended,
                "order": layout.order,
            },
        },
    )


def _layout_of(path: Path, content: bytes, size: int) -> _Layout:
    """The header in the byte order in which it makes sense.

    The machine stamp is asked first and little-endian second, as mrcfile does where it is to be
    permissive: stamps are missing in old files, and wrong in some.

    Raises
    ------
    FileFormatError
        if it makes sense in neither, or pixels are of a kind that can't be denoised.
    """
    if content[:2] in (b"\x1f\x8b", b"BZ") and content[208:211] != b"MAP":
        raise FileFormatError(f"{path} is compressed. Decompress it first, with gunzip or bunzip2.")
    if len(content) < _HEADER_BYTES:
        raise FileFormatError(
            f"{path} isn't a readable MRC file: it is too short for a header. "
            "Copy or export it again."
        )
    first = _order_by_stamp(content) or "<"
    both = [_parse(content, order) for order in (first, "<" if first == ">" else ">")]
    sound = [layout for layout in both if layout.is_sound]
    if not sound:
        raise FileFormatError(
            f"{path} isn't a readable MRC file: its header gives pixels of mode {both[0].mode} and "
            f"{both[0].number('nx')} × {both[0].number('ny')} × {both[0].number('nz')} of them. "
            "It may be damaged or of another format: copy or export it again."
        )
    fitting = [one for one in sound if one.mode in _REFUSED or one.end <= size]
    layout = (fitting or sound)[0]
    if layout.mode in _REFUSED:
        raise FileFormatError(
            f"{path} holds {_REFUSED[layout.mode]} (MRC mode {layout.mode}), not intensities. "
            "Convert it to an image of real numbers first."
        )
    return layout


def _parse(content: bytes, order: str) -> _Layout:
    """A header as it stands in a file, in the given byte order."""
    mrcfile = require("mrcfile", "mrc", "MRC files")
    dtype = mrcfile.dtypes.HEADER_DTYPE.newbyteorder(order)
    return _Layout(np.frombuffer(content, dtype, 1).copy(), order)


def _order_by_stamp(content: bytes) -> str | None:
    mrcfile = require("mrcfile", "mrc", "MRC files")
    try:
        return str(mrcfile.utils.byte_order_from_machine_stamp(content[212:216]))
    except ValueError:
        return None


def _notes(path: Path, layout: _Layout, size: int) -> list[str]:
    """What the user should know of a header that isn't as it should be."""
    notes = []
    stamped = _order_by_stamp(layout.header.tobytes())
    if stamped != layout.order:
        which = "no known machine stamp" if stamped is None else "the machine stamp of another"
        name = "little" if layout.order == "<" else "big"
        notes.append(f"{path.name} has {which}; it was read as {name}-endian.")
    if layout.is_unsigned_by_range:
        highest = float(layout.header["dmax"][0])
        notes.append(
            f"{path.name} was read as bytes from 0 to 255, because its header gives {highest:g} "
            "as the largest."
        )
    if (left := (size - layout.end) // layout.plane_bytes) > 0:
        notes.append(
            f"{path.name} is longer than its header says, by {left} slices: these were left out."
        )
    return notes


def _imod_flags(layout: _Layout) -> int | None:
    """IMOD's flags; None where IMOD hasn't written any."""
    stamp, flags = np.frombuffer(layout.header.tobytes()[_IMOD_PLACE], f"{layout.order}i4")
    return int(flags) if stamp == _IMOD_STAMP else None


def write_mrc(path: Path, volume: Volume, _: str | None) -> None:
    require("mrcfile", "mrc", "MRC files")
    mode = _MODES.get(volume.data.dtype.str[1:])
    if mode is None:
        raise FileFormatError(
            f"MRC can't hold pixels of type {volume.data.dtype}. Convert the image to float32 "
            "first, or write TIFF or OME-Zarr."
        )
    layout, extended, data = _layout_for(path, volume, mode)
    stored = layout.dtype
    header = layout.header
    statistics = _Statistics()
    with path.open("wb") as stream:
        stream.write(header.tobytes() + extended)
        for plane in planes_of(data, plane_ndim=2):
            statistics.add(plane)
            stream.write(plane.astype(stored, copy=False).tobytes())
        statistics.fill(header)
        stream.seek(0)
        stream.write(header.tobytes())


def _layout_for(path: Path, volume: Volume, mode: int) -> tuple[_Layout, bytes, Any]:
    """Header, extended header and pixels in the header's order of axes.

    The headers are the source's where the volume is of an MRC file's shape.
    """
    data = volume.data
    kept = volume.metadata.get("mrc")
    if kept is not None:
        source = _parse(kept["header"], kept["order"])
        if (source.is_unsigned or source.is_packed) and data.dtype == np.uint8:
            mode = _BYTES
        found, axes = source.axes, volume.axes
        if sorted(found) == sorted(axes):
            data = data.transpose([axes.index(letter) for letter in found])
        if data.shape == source.shape:
            _describe(source, volume, mode)
            # Copied as it is, so that its byte order stays the file's.
            return source, kept["extended"], data
    if volume.data.ndim > 3:
        raise FileFormatError(
            f"An MRC file has at most three axes, and this image has {volume.axes}. "
            "Write OME-Zarr or TIFF, or its parts one by one."
        )
    layout = _new_layout(path, volume)
    _describe(layout, volume, mode)
    return layout, b"", volume.data


def _new_layout(path: Path, volume: Volume) -> _Layout:
    """A header for a volume of up to three axes, without type and voxel size."""
    mrcfile = require("mrcfile", "mrc", "MRC files")
    shape = volume.data.shape
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.zeros((1,) * len(shape), np.int8))
        header = np.array([mrc.header.copy()], mrc.header.dtype)
    order = "<" if header["nx"].dtype.newbyteorder("=") == np.dtype("<i4") else ">"
    template = _parse(header.tobytes(), order).header
    numbers = (1,) * (3 - len(shape)) + shape
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
    return _Layout(template, order)


def _describe(layout: _Layout, volume: Volume, mode: int) -> None:
    """Set type, byte order, voxel size and a note of the processing."""
    mrcfile = require("mrcfile", "mrc", "MRC files")
    header = layout.header
    if layout.is_packed and layout.mode == _BYTES:
        header["nx"] *= 2
    header["mode"] = mode
    header["map"] = mrcfile.constants.MAP_ID
    header["machst"] = mrcfile.utils.machine_stamp_from_byte_order(layout.order)
    _describe_bytes(layout, volume.data.dtype)
    for axis in volume.axes:
        step, unit = volume.step(axis)
        if axis in "XYZ" and unit in MICROMETERS:
            angstroms = step * MICROMETERS[unit] / MICROMETERS[_UNIT]
            header["cella"][axis.lower()] = angstroms * header[f"m{axis.lower()}"]
    note = volume.metadata.get("processing")
    if note is not None:
        number = min(max(0, int(header["nlabl"][0])), _LABELS - 1)
        header["label"][0, number] = note.encode("ascii", "replace")[:80]
        header["nlabl"] = number + 1


def _describe_bytes(layout: _Layout, dtype: np.dtype[Any]) -> None:
    """Set IMOD's flags so that they are true of what is written, where there are any or must be."""
    flags = _imod_flags(layout)
    unsigned = layout.mode == _BYTES and dtype == np.uint8
    if flags is None and not unsigned:
        return
    flags = (flags or 0) & ~(_NO_RMS | _PACKED | _SIGNED)
    if not unsigned:
        flags |= _SIGNED
    fields = np.array([_IMOD_STAMP, flags], f"{layout.order}i4")
    layout.header.view("u1")[_IMOD_PLACE] = fields.view("u1")


class _Statistics:
    """Range, mean and standard deviation of finite pixels that come plane by plane."""

    def __init__(self) -> None:
        self._lowest, self._highest = math.inf, -math.inf
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, plane: NDArray[Any]) -> None:
        finite = plane[np.isfinite(plane)]
        if not finite.size:
            return
        self._lowest = min(self._lowest, float(finite.min()))
        self._highest = max(self._highest, float(finite.max()))
        self._count += finite.size
        self._sum += float(finite.sum(dtype=np.float64))
        self._squares += float(np.square(finite, dtype=np.float64).sum())

    def fill(self, header: NDArray[Any]) -> None:
        if not self._count:
            return
        mean = self._sum / self._count
        header["dmin"], header["dmax"], header["dmean"] = self._lowest, self._highest, mean
        header["rms"] = math.sqrt(max(0.0, self._squares / self._count - mean**2))
