"""MRC files as programs really write them: flags, stamps, packed pixels, permuted axes."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import warnings
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write, write_image
from napari_learned_diffusion.jobs.planes import plane_indices, read_plane

IMOD = 1146047817
SIGNED, NO_RMS, PACKED = 1, 8, 16


def save(
    path: Path,
    data: NDArray[Any],
    *,
    order: str = "<",
    stamp: bytes | None = None,
    extended: bytes = b"",
    flags: int | None = None,
    **fields: Any,
) -> Path:
    """An MRC file with the header fields given; ``order`` is that of its numbers."""
    header = np.zeros(1, mrcfile.dtypes.HEADER_DTYPE.newbyteorder(order))
    given: dict[str, Any] = dict(
        zip(("nz", "ny", "nx"), (1,) * (3 - data.ndim) + data.shape, strict=True)
    )
    given |= {f"m{axis}": given[f"n{axis}"] for axis in "xyz"}
    given |= {"mode": 2, "mapc": 1, "mapr": 2, "maps": 3, "ispg": 0 if data.ndim == 2 else 1}
    given |= {"map": b"MAP ", "nsymbt": len(extended), "dmin": 0, "dmax": -1, "dmean": -2}
    for name, value in (given | fields).items():
        header[name] = value
    for axis in "xyz":
        header["cella"][axis] = 2.5 * header[f"m{axis}"]
    by_order = {"<": b"\x44\x44\x00\x00", ">": b"\x11\x11\x00\x00"}
    content = bytearray(header.tobytes())
    content[212:216] = by_order[order] if stamp is None else stamp
    if flags is not None:
        struct.pack_into(f"{order}ii", content, 152, IMOD, flags)
    path.write_bytes(bytes(content) + extended + data.tobytes())
    return path


def flags_of(path: Path, order: str = "<") -> tuple[int, int]:
    stamp, flags = struct.unpack_from(f"{order}ii", path.read_bytes(), 152)
    return stamp, flags


def stored_bytes(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.frombuffer(path.read_bytes()[1024:], np.uint8).reshape(shape)


@pytest.fixture
def grey() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 5, 7)).astype(np.uint8)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("flags", [0, 2, 4, NO_RMS])
def test_unsigned_bytes_of_imod_are_read_unsigned(
    tmp_path: Path, grey: NDArray[np.uint8], order: str, flags: int, lazy: bool
) -> None:
    path = save(tmp_path / "a.mrc", grey, mode=0, flags=flags, order=order)
    volume = read(path, lazy=lazy)
    assert volume.data.dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(volume.data), grey)


@pytest.mark.parametrize("order", ["<", ">"])
def test_unsigned_bytes_are_written_back_as_they_were_read(
    tmp_path: Path, grey: NDArray[np.uint8], order: str
) -> None:
    volume = read(save(tmp_path / "a.mrc", grey, mode=0, flags=4 | NO_RMS, order=order))
    darker = replace(volume, data=volume.data // 2)
    path = write(tmp_path / "b.mrc", darker)
    np.testing.assert_array_equal(stored_bytes(path, grey.shape), grey // 2)
    # The origin's sign is as it was, the deviation is computed, and bytes have no sign.
    assert flags_of(path, order) == (IMOD, 4)
    found = read(path)
    assert found.data.dtype == np.uint8
    np.testing.assert_array_equal(found.data, grey // 2)
    part = replace(volume, data=volume.data[:2])
    np.testing.assert_array_equal(read(write(tmp_path / "part.mrc", part)).data, grey[:2])


def test_bytes_that_imod_flags_as_signed_are_signed(
    tmp_path: Path, grey: NDArray[np.uint8]
) -> None:
    volume = read(save(tmp_path / "a.mrc", grey.view(np.int8), mode=0, flags=SIGNED))
    assert volume.data.dtype == np.int8
    path = write(tmp_path / "b.mrc", volume)
    assert flags_of(path) == (IMOD, SIGNED)
    np.testing.assert_array_equal(read(path).data, grey.view(np.int8))


def test_bytes_without_a_flag_are_signed_as_the_standard_says(
    tmp_path: Path, grey: NDArray[np.uint8]
) -> None:
    signed = grey.view(np.int8)
    for name, limits in (("a", (-128, 127)), ("b", (0, 127)), ("c", (0, -1)), ("d", (-3, 255))):
        path = save(tmp_path / f"{name}.mrc", signed, mode=0, dmin=limits[0], dmax=limits[1])
        volume = read(path)
        np.testing.assert_array_equal(volume.data, signed)
        assert volume.metadata["notes"] == []
        # Another program's bytes where IMOD has its flags stay as they were.
        assert flags_of(write(tmp_path / "out.mrc", volume, overwrite=True)) == (0, 0)


def test_bytes_without_a_flag_whose_range_is_no_signed_one_are_unsigned(
    tmp_path: Path, grey: NDArray[np.uint8]
) -> None:
    volume = read(save(tmp_path / "a.mrc", grey, mode=0, dmin=0, dmax=255))
    np.testing.assert_array_equal(volume.data, grey)
    assert "0 to 255" in volume.metadata["notes"][0]
    # The flag says so from now on, whatever the range of the result is.
    dark = write(tmp_path / "b.mrc", replace(volume, data=volume.data // 4))
    assert flags_of(dark) == (IMOD, 0)
    assert read(dark).data.dtype == np.uint8


def test_a_result_of_another_type_says_so_in_the_flags(
    tmp_path: Path, grey: NDArray[np.uint8]
) -> None:
    volume = read(save(tmp_path / "a.mrc", grey, mode=0, flags=0))
    signed = replace(volume, data=volume.data.view(np.int8))
    path = write(tmp_path / "b.mrc", signed)
    assert flags_of(path) == (IMOD, SIGNED)
    np.testing.assert_array_equal(read(path).data, signed.data)
    floats = replace(volume, data=volume.data.astype(np.float32) / 3)
    np.testing.assert_array_equal(read(write(tmp_path / "c.mrc", floats)).data, floats.data)


def pack(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    padded = np.pad(pixels, ((0, 0), (0, 0), (0, pixels.shape[2] % 2)))
    return padded[..., ::2] | padded[..., 1::2] << 4


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("columns", [6, 7])
def test_pixels_of_four_bits(tmp_path: Path, columns: int, lazy: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 16, (3, 5, columns)).astype(np.uint8)
    path = save(tmp_path / "a.mrc", pack(pixels), mode=101, nx=columns, mx=columns)
    volume = read(path, lazy=lazy)
    np.testing.assert_array_equal(np.asarray(volume.data), pixels)
    assert volume.scale == (2.5, 2.5, 2.5)
    copy = read(write(tmp_path / "b.mrc", volume))
    assert copy.data.dtype == np.uint8
    np.testing.assert_array_equal(copy.data, pixels)


def test_bytes_that_imod_flags_as_two_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 16, (3, 5, 8)).astype(np.uint8)
    volume = read(save(tmp_path / "a.mrc", pack(pixels), mode=0, flags=PACKED | SIGNED))
    np.testing.assert_array_equal(volume.data, pixels)
    path = write(tmp_path / "b.mrc", volume)
    assert flags_of(path) == (IMOD, 0)
    np.testing.assert_array_equal(read(path).data, pixels)


# --- stamps ---------------------------------------------------------------------------------------

STAMPS = [
    b"\x44\x44\x00\x00",
    b"\x11\x11\x00\x00",
    b"\x44\x41\x00\x00",
    bytes(4),
    b"DA\0\0",
    b"?%x!",
]


@pytest.mark.parametrize("mark", [b"MAP ", bytes(4)])
@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "name"), [(0, "i1"), (1, "i2"), (2, "f4"), (6, "u2"), (12, "f2")])
def test_wrong_and_missing_stamps_are_read_as_mrcfile_reads_them(
    tmp_path: Path, mode: int, name: str, order: str, stamp: bytes, mark: bytes
) -> None:
    data = np.random.default_rng(0).integers(0, 99, (3, 5, 7)).astype(f"{order}{name}")
    extended = bytes(range(96))
    path = save(
        tmp_path / "a.mrc",
        data,
        mode=mode,
        order=order,
        stamp=stamp,
        map=mark,
        extended=extended,
    )
    if mode:  # the sign of the mode tells mrcfile the order, and 0 has none
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mrcfile.open(path, permissive=True) as mrc:
                np.testing.assert_array_equal(mrc.data, data)
    volume = read(path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.data.dtype == np.dtype(name)
    is_right = stamp in {"<": (STAMPS[0], STAMPS[2]), ">": (STAMPS[1],)}[order]
    assert ("endian" in " ".join(volume.metadata["notes"])) != is_right
    # The result is one that can be read strictly.
    copy = write(tmp_path / "b.mrc", volume)
    with mrcfile.open(copy) as mrc:
        np.testing.assert_array_equal(mrc.data, data)
        assert mrc.extended_header.tobytes() == extended
        assert mrc.header.nx.dtype.byteorder.replace("=", "<") == order
    assert read(copy).metadata["notes"] == []


# --- axes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_permuted_axes_have_the_same_planes_in_napari_and_elsewhere(
    tmp_path: Path, order: tuple[int, int, int]
) -> None:
    data = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    columns, rows, sections = order
    extended = bytes(range(64))
    path = save(tmp_path / "a.mrc", data, mapc=columns, mapr=rows, maps=sections, extended=extended)
    volume = read(path)
    reader = get_reader(path)
    assert reader is not None
    ((pixels, attributes, _),) = reader(path)
    assert attributes["axis_labels"] == ("z", "y", "x")
    indices = plane_indices(data.shape, volume.plane_axes)
    assert len(indices) == len(pixels)
    for index, plane in zip(indices, pixels, strict=True):
        np.testing.assert_array_equal(plane, read_plane(volume.data, index, volume.plane_axes))
    # Written by napari or by the shell: the file's own axes and headers.
    attributes |= {"scale": np.array(attributes["scale"])}
    write_image(str(tmp_path / "napari.mrc"), pixels, attributes)
    write(tmp_path / "shell.mrc", volume)
    for name in ("napari.mrc", "shell.mrc"):
        with mrcfile.open(tmp_path / name) as mrc:
            np.testing.assert_array_equal(mrc.data, data)
            header = mrc.header
            assert (int(header.mapc), int(header.mapr), int(header.maps)) == order
            assert mrc.extended_header.tobytes() == extended


def test_axes_that_say_nothing_are_taken_as_usual(tmp_path: Path) -> None:
    data = np.zeros((3, 4, 5), np.float32)
    for number, order in enumerate([(0, 0, 0), (1, 1, 3), (7, 2, 3)]):
        fields = dict(zip(("mapc", "mapr", "maps"), order, strict=True))
        assert read(save(tmp_path / f"{number}.mrc", data, **fields)).axes == "ZYX"


def test_stacks_of_volumes_come_back(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
    volume = read(save(tmp_path / "a.mrc", data, ispg=401, mz=3))
    assert (volume.axes, volume.data.shape) == ("TZYX", (2, 3, 4, 5))
    assert volume.scale == (1.0, 2.5, 2.5, 2.5)
    with mrcfile.open(write(tmp_path / "b.mrc", volume)) as mrc:
        assert mrc.is_volume_stack()
        np.testing.assert_array_equal(mrc.data.reshape(data.shape), data)
    # Four volumes of six slices would leave two slices out.
    assert read(save(tmp_path / "c.mrc", data, ispg=401, mz=4)).data.shape == data.shape


# --- what can't be right --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mode": 3}, "Fourier transform"),
        ({"mode": 4}, "Fourier transform"),
        ({"mode": 16}, "colours"),
        ({"mode": 5}, "mode 5"),
        ({"mode": -1}, "mode -1"),
        ({"nx": 0}, "0 × 5 × 3"),
        ({"ny": -5}, "7 × -5 × 3"),
        ({"nz": 10**9}, "truncated"),
        ({"nx": 2**31 - 1, "ny": 2**31 - 1, "nz": 2**31 - 1}, "truncated"),
        ({"nsymbt": 2**31 - 1}, "truncated"),
        ({"nsymbt": -1024}, "isn't a readable MRC"),
    ],
)
def test_headers_that_cannot_be_are_refused_before_memory_is_taken(
    tmp_path: Path, fields: dict[str, int], reason: str
) -> None:
    path = save(tmp_path / "a.mrc", np.ones((3, 5, 7), np.float32), **fields)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=reason):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_compressed_files_and_stumps_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mrc", np.ones((3, 5, 7), np.float32))
    packed = tmp_path / "b.mrc"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(FileFormatError, match="gunzip"):
        read(packed)
    packed.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="too short"):
        read(packed)
    packed.write_bytes(bytes(4096))
    with pytest.raises(FileFormatError, match="0 × 0 × 0"):
        read(packed)


def test_slices_that_the_header_does_not_count_are_mentioned(tmp_path: Path) -> None:
    data = np.ones((5, 5, 7), np.float32)
    volume = read(save(tmp_path / "a.mrc", data, nz=3))
    assert volume.data.shape == (3, 5, 7)
    assert volume.metadata["notes"] == [
        "a.mrc is longer than its header says, by 2 slices: these were left out."
    ]


def test_what_is_not_a_number_stays_out_of_the_statistics(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    data[0] = np.nan
    data[1, 0, 0] = np.inf
    volume = Volume(data, "ZYX", (1.0,) * 3, ("pixel",) * 3, "a")
    with mrcfile.open(write(tmp_path / "a.mrc", volume)) as mrc:
        assert (mrc.header.dmin, mrc.header.dmax, mrc.header.dmean) == (13, 23, 18)
        np.testing.assert_array_equal(mrc.data, data)
