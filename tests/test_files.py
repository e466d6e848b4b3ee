"""TIFF in and out: pixels, axes, voxel size and units survive, and broken files are refused."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile

from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
)
from napari_learned_diffusion.files import (
    COMPRESSIONS,
    FORMATS,
    Volume,
    _lazy,
    _tiff_write,
    read,
    supported_suffixes,
    write,
)
from napari_learned_diffusion.files._tiff_metadata import pixel_size

UNSIGNED = ["bool", "uint8", "uint16", "uint32", "uint64"]
SIGNED = ["int8", "int16", "int32", "int64", "float16", "float32", "float64"]
DTYPES = [*UNSIGNED, *SIGNED, "complex64", "complex128"]
LENGTHS = {"Y": 7, "X": 9, "Z": 4, "T": 3, "C": 2, "S": 3, "Q": 2, "I": 1}
STEPS = {
    "X": (0.1, "micrometer"),
    "Y": (0.65, "micrometer"),
    "Z": (2.5, "micrometer"),
    "T": (0.3, "second"),
}


def make_volume(
    dtype: str = "uint16", axes: str = "ZYX", shape: tuple[int, ...] | None = None
) -> Volume:
    """Random pixels, of the dtype's full range of signs, with a different step on each axis."""
    rng = np.random.default_rng(0)
    shape = shape or tuple(LENGTHS[axis] for axis in axes)
    lowest = -100 if np.dtype(dtype).kind in "ifc" else 0
    data = rng.uniform(lowest, 100, shape).round()
    steps = [STEPS.get(axis, (1.0, "pixel")) for axis in axes]
    return Volume(
        data=(data > 50 if dtype == "bool" else data).astype(dtype),
        axes=axes,
        scale=tuple(step for step, _ in steps),
        units=tuple(unit for _, unit in steps),
        name="stack",
    )


def assert_same(actual: Volume, expected: Volume) -> None:
    assert actual.data.dtype == expected.data.dtype
    assert actual.data.dtype.isnative
    assert actual.data.shape == expected.data.shape
    assert actual.axes == expected.axes
    assert actual.scale == expected.scale
    assert actual.units == expected.units
    np.testing.assert_array_equal(np.asarray(actual.data), np.asarray(expected.data))


def in_chunks(volume: Volume, planes: int = 1) -> Volume:
    leading = (planes,) * (volume.data.ndim - 2)
    return replace(volume, data=da.from_array(volume.data, chunks=leading + volume.data.shape[-2:]))


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what goes in comes out -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", ["YX", "CZYX", "TZCYX", "ZYXS", "SYX", "YXZ", "IQTZCYX"])
def test_round_trip_keeps_everything(tmp_path: Path, dtype: str, axes: str) -> None:
    volume = make_volume(dtype, axes)
    path = write(tmp_path / "stack.tif", volume)
    assert_same(read(path), volume)
    assert_same(read(path, lazy=True), volume)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", ["uint16", "int16", "int64", "float32"])
@pytest.mark.parametrize("lazy", [False, True])
def test_round_trip_compressed(tmp_path: Path, compression: str, dtype: str, lazy: bool) -> None:
    volume = make_volume(dtype, "TZYX")
    flat = replace(volume, data=np.zeros_like(volume.data, shape=(3, 4, 64, 64)))
    path = write(tmp_path / "flat.tif", flat, compression=compression)
    assert path.stat().st_size < flat.data.nbytes / 2
    assert_same(read(path, lazy=lazy), flat)
    path = write(tmp_path / "stack.tif", volume, compression=compression)
    assert_same(read(path, lazy=lazy), volume)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ("ZYX", (1, 7, 9)),
        ("TZYX", (3, 1, 7, 9)),
        ("TZCYX", (1, 1, 1, 7, 9)),
        ("ZYX", (4, 1, 9)),
        ("ZYX", (4, 7, 1)),
        ("YX", (1, 1)),
        ("YXZ", (7, 9, 1)),
        ("ZYXS", (1, 7, 9, 3)),
        ("YXS", (7, 9, 1)),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_axes_of_length_one_survive(
    tmp_path: Path, dtype: str, axes: str, shape: tuple[int, ...], lazy: bool
) -> None:
    volume = make_volume(dtype, axes, shape)
    assert_same(read(write(tmp_path / "thin.tif", volume), lazy=lazy), volume)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int64"])
@pytest.mark.parametrize("axes", ["ZYX", "TZYX", "YXZ"])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_dask_arrays_of_any_chunks_are_written(
    tmp_path: Path, dtype: str, axes: str, planes: int
) -> None:
    volume = make_volume(dtype, axes)
    path = write(tmp_path / "stack.tif", in_chunks(volume, planes))
    assert_same(read(path), volume)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_layout_and_byte_order_do_not_matter(tmp_path: Path, order: Any) -> None:
    volume = make_volume("uint16")
    swapped = np.asarray(volume.data, order=order).astype(">u2", order=order)
    assert_same(read(write(tmp_path / "stack.tif", replace(volume, data=swapped))), volume)


@pytest.mark.parametrize(
    ("dtype", "axes", "kind"),
    [
        ("uint8", "ZYX", "ImageJ TIFF"),
        ("uint16", "TZCYX", "ImageJ TIFF"),
        ("float32", "YX", "ImageJ TIFF"),
        ("uint8", "ZYXS", "ImageJ TIFF"),
        ("uint16", "CZYX", "OME-TIFF"),
        ("uint16", "YXS", "OME-TIFF"),
        ("int16", "ZYX", "OME-TIFF"),
        ("float64", "TZCYX", "OME-TIFF"),
        ("int64", "ZYX", "TIFF"),
        ("uint8", "YXZ", "TIFF"),
    ],
)
def test_the_most_widely_read_flavour_that_fits_is_written(
    tmp_path: Path, dtype: str, axes: str, kind: str
) -> None:
    path = write(tmp_path / "stack.tif", make_volume(dtype, axes))
    assert read(path).metadata["format"] == kind


@pytest.mark.parametrize(
    ("scale", "units"),
    [
        ((1.0, 1.0, 1.0), ("pixel", "pixel", "pixel")),
        ((3.0, 1.0, 1.0), ("pixel", "pixel", "pixel")),
        ((1.0, 0.1, 0.2), ("pixel", "micrometer", "micrometer")),
        ((1.0, 0.1, 0.2), ("micrometer", "micrometer", "micrometer")),
        ((5.0, 0.7, 0.7), ("millimeter", "millimeter", "millimeter")),
        ((30.0, 4.0, 4.0), ("nanometer", "nanometer", "nanometer")),
        ((0.9, 1.06, 1.06), ("angstrom", "angstrom", "angstrom")),
        ((0.5, 250.0, 250.0), ("micrometer", "nanometer", "nanometer")),
        ((1e-9, 1e-9, 1e-9), ("meter", "meter", "meter")),
        ((2.0, 0.123456789, 3.14159265), ("inch", "inch", "inch")),
        ((2.0, 0.1, 0.1), ("second", "micrometer", "micrometer")),
        ((2.0, 0.1, 0.1), ("furlong", "micrometer", "micrometer")),
        ((-2.0, -0.1, 0.1), ("micrometer", "micrometer", "micrometer")),
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_steps_and_units_survive_exactly(
    tmp_path: Path, dtype: str, scale: tuple[float, ...], units: tuple[str, ...]
) -> None:
    volume = replace(make_volume(dtype), scale=scale, units=units)
    assert_same(read(write(tmp_path / "stack.tif", volume)), volume)


@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_large_files_are_bigtiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    volume = make_volume(dtype)
    monkeypatch.setattr(_tiff_write, "_CLASSIC_TIFF_BYTES", volume.data.nbytes - 1)
    path = write(tmp_path / "stack.tif", in_chunks(volume))
    with tifffile.TiffFile(path) as tif:
        assert tif.is_bigtiff
        assert not tif.is_imagej
    assert_same(read(path, lazy=True), volume)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int64"])
def test_names_may_hold_anything(tmp_path: Path, dtype: str) -> None:
    volume = replace(make_volume(dtype), name='<cell> & "nucleus" α µm')
    assert_same(read(write(tmp_path / "zelle µ α.tif", volume)), volume)


def test_contrast_channels_and_placement_survive(tmp_path: Path) -> None:
    placement = {"translate": np.array([1.0, 2.0, 3.0, 4.0])}
    metadata = {
        "contrast_limits": (np.float32(2), 90.5),
        "channel_names": ["nuclei", "actin"],
        "placement": placement,
    }
    for dtype in ("uint16", "int16", "int64"):
        volume = replace(make_volume(dtype, "CZYX"), metadata=metadata)
        kept = read(write(tmp_path / f"{dtype}.tif", volume)).metadata
        assert kept["contrast_limits"] == (2.0, 90.5)
        assert kept["placement"] == {"translate": [1.0, 2.0, 3.0, 4.0]}
        if kept["format"] == "OME-TIFF":
            assert kept["channel_names"] == ["nuclei", "actin"]


def test_imagej_finds_the_voxel_size_where_it_looks(tmp_path: Path) -> None:
    path = write(tmp_path / "stack.tif", make_volume("uint16", "TZYX"))
    with tifffile.TiffFile(path) as tif:
        words = tif.imagej_metadata
        assert words is not None
        assert (words["slices"], words["frames"]) == (4, 3)
        assert (words["unit"], words["spacing"], words["finterval"]) == ("micron", 2.5, 0.3)
        tags = tif.pages.first.tags
        assert tags["XResolution"].value == (10, 1)
        assert np.divide(*tags["YResolution"].value) == pytest.approx(1 / 0.65)


def test_ome_readers_find_the_voxel_size_where_they_look(tmp_path: Path) -> None:
    path = write(tmp_path / "stack.tif", make_volume("int16", "TZYX"))
    with tifffile.TiffFile(path) as tif:
        assert tif.ome_metadata is not None
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    assert [pixels[f"PhysicalSize{axis}"] for axis in "XYZ"] == [0.1, 0.65, 2.5]
    assert {pixels[f"PhysicalSize{axis}Unit"] for axis in "XYZ"} == {"µm"}
    assert (pixels["TimeIncrement"], pixels["TimeIncrementUnit"]) == (0.3, "s")


# --- files of other programs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "unit"),
    [
        ("micron", "micrometer"),
        ("um", "micrometer"),
        (r"\u00B5m", "micrometer"),
        ("microns", "micrometer"),
        ("nm", "nanometer"),
        ("mm", "millimeter"),
        ("cm", "centimeter"),
        ("inch", "inch"),
        ("inches", "inch"),
        ("pixel", "pixel"),
        ("pixels", "pixel"),
        ("parsec", "pixel"),
    ],
)
@pytest.mark.parametrize("byteorder", [">", "<"])
def test_imagej_units(tmp_path: Path, word: str, unit: str, byteorder: Any) -> None:
    data = np.arange(4 * 5 * 6, dtype=np.uint16).reshape(4, 5, 6)
    tifffile.imwrite(
        tmp_path / "imagej.tif",
        data,
        imagej=True,
        byteorder=byteorder,
        # As ImageJ rounds it: 0.65 is 1 / 1.538462.
        resolution=((1538462, 1000000), (4, 1)),
        metadata={"axes": "ZYX", "spacing": 0.30000001192092896, "unit": word, "min": 3, "max": 9},
    )
    for lazy in (False, True):
        volume = read(tmp_path / "imagej.tif", lazy=lazy)
        expected = Volume(data, "ZYX", (0.3, 0.25, 0.65), (unit,) * 3, "imagej")
        assert_same(volume, expected)
        assert volume.metadata["contrast_limits"] == (3, 9)


def test_imagej_time_and_missing_spacing(tmp_path: Path) -> None:
    data = np.zeros((3, 2, 5, 6), np.uint8)
    path = tmp_path / "movie.tif"
    tifffile.imwrite(path, data, imagej=True, metadata={"axes": "TZYX", "fps": 4.0, "unit": "um"})
    volume = read(path)
    assert volume.scale[:2] == (0.25, 1.0)
    assert volume.units[:2] == ("second", "pixel")


@pytest.mark.parametrize("lazy", [False, True])
def test_signed_pixels_of_imagej(tmp_path: Path, lazy: bool) -> None:
    hounsfield = np.array([[-1000, 0], [40, 3000]], np.int16)
    stored = (hounsfield.astype(int) + 2**15).astype(np.uint16)
    words = {"cf": 0, "c0": -32768, "c1": 1, "min": 2**15 - 160, "max": 2**15 + 240}
    tifffile.imwrite(tmp_path / "ct.tif", stored, imagej=True, metadata=words)
    volume = read(tmp_path / "ct.tif", lazy=lazy)
    assert volume.data.dtype == np.int16
    np.testing.assert_array_equal(volume.data, hounsfield)
    assert volume.metadata["contrast_limits"] == (-160, 240)


def test_ome_of_other_programs(tmp_path: Path) -> None:
    data = np.arange(2 * 3 * 5 * 6, dtype=np.float32).reshape(2, 3, 5, 6)
    words = {
        "axes": "CZYX",
        "PhysicalSizeX": 80.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.1,
        "PhysicalSizeZ": 0.4000000059604645,
        "Channel": {"Name": ["DAPI", "GFP"]},
    }
    tifffile.imwrite(tmp_path / "cell.ome.tif", data, ome=True, metadata=words)
    volume = read(tmp_path / "cell.ome.tif")
    units = ("pixel", "micrometer", "micrometer", "nanometer")
    assert_same(volume, Volume(data, "CZYX", (1.0, 0.4, 0.1, 80.0), units, ""))
    assert volume.name == "cell"
    assert volume.metadata["channel_names"] == ["DAPI", "GFP"]


@pytest.mark.parametrize(
    ("unit", "resolution", "step"),
    [
        ("CENTIMETER", (100000, 50000), (0.1, 0.2, "micrometer")),
        ("INCH", (254, 508), (100.0, 50.0, "micrometer")),
        ("INCH", (72, 72), (1.0, 1.0, "pixel")),
        ("INCH", (96, 96), (1.0, 1.0, "pixel")),
        ("NONE", (1, 1), (1.0, 1.0, "pixel")),
        ("NONE", (4, 4), (1.0, 1.0, "pixel")),
        ("NONE", (2, 1), (1.0, 2.0, "pixel")),
        ("MICROMETER", (4, 2), (0.25, 0.5, "micrometer")),
    ],
)
def test_resolution_tags_of_plain_tiff(
    tmp_path: Path, unit: Any, resolution: tuple[int, int], step: tuple[float, float, str]
) -> None:
    data = np.zeros((3, 5, 6), np.uint8)
    tifffile.imwrite(
        tmp_path / "plain.tif",
        data,
        photometric="minisblack",
        metadata=None,
        resolution=resolution,
        resolutionunit=unit,
    )
    volume = read(tmp_path / "plain.tif")
    x, y, name = step
    assert_same(volume, Volume(data, "IYX", (1.0, y, x), ("pixel", name, name), ""))


def test_ome_images_are_told_by_name_where_some_have_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tif:
        for name, size in (("lost", 1.0), ("kept", 0.5)):
            words = {"axes": "YX", "Name": name, "PhysicalSizeX": size, "PhysicalSizeY": size}
            tif.write(np.zeros((8, 9), np.int16), metadata=words)
    xml = tifffile.tiffcomment(path)
    data = '<TiffData IFD="0" PlaneCount="1"/>'
    assert data in xml
    tifffile.tiffcomment(path, xml.replace(data, "").encode())
    volume = read(path)
    assert volume.scale == (0.5, 0.5)
    assert volume.metadata["series_count"] == 1


def test_voxel_size_in_words_of_tifffile(tmp_path: Path) -> None:
    words = {"axes": "ZYX", "unit": "um", "spacing": 2.0}
    data = np.zeros((3, 8, 9), np.int16)
    tifffile.imwrite(
        tmp_path / "a.tif",
        data,
        photometric="minisblack",
        resolution=(4, 2),
        resolutionunit="NONE",
        metadata=words,
    )
    assert_same(
        read(tmp_path / "a.tif"), Volume(data, "ZYX", (2.0, 0.5, 0.25), ("micrometer",) * 3, "")
    )


@pytest.mark.parametrize("value", [(0, 0), (0, 1), (1, 0)])
def test_meaningless_resolutions_are_no_voxel_size(tmp_path: Path, value: tuple[int, int]) -> None:
    path = tmp_path / "a.tif"
    data = np.zeros((5, 6), np.uint8)
    tifffile.imwrite(path, data, metadata=None, resolution=(7, 9), resolutionunit="CENTIMETER")
    assert read(path).units == ("micrometer", "micrometer")
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags["XResolution"].overwrite(value)
    assert_same(read(path), Volume(data, "YX", (1.0, 1.0), ("pixel", "pixel"), ""))


@pytest.mark.parametrize(
    ("fraction", "size"),
    [
        ((10, 1), 0.1),
        ((8, 1), 0.125),
        ((1538462, 1000000), 0.65),
        ((33333, 1000000), 30.0),
        ((3, 1), 1 / 3),
        ((7250, 100), 1 / 72.5),
        ((0, 1), None),
        ((1, 0), None),
        (5, None),
    ],
)
def test_fractions_become_the_decimals_they_stand_for(fraction: object, size: float | None) -> None:
    assert pixel_size(fraction) == size


@pytest.mark.parametrize(
    ("compression", "options"),
    [
        (None, {}),
        (None, {"tile": (16, 16)}),
        ("zlib", {"tile": (16, 16)}),
        ("lzw", {"predictor": True}),
        ("zstd", {}),
        ("packbits", {}),
    ],
)
@pytest.mark.parametrize("bigtiff", [False, True])
def test_plain_stacks_however_stored(
    tmp_path: Path, options: dict[str, Any], compression: Any, bigtiff: bool
) -> None:
    data = np.random.default_rng(0).integers(0, 999, (3, 40, 50), np.uint16)
    path = tmp_path / "plain.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as tif:
        for plane in data:
            tif.write(plane, contiguous=False, metadata=None, compression=compression, **options)
    for lazy in (False, True):
        expected = Volume(data, "IYX", (1.0,) * 3, ("pixel",) * 3, "")
        assert_same(read(path, lazy=lazy), expected)


def test_axes_that_tifffile_does_not_know_get_letters_of_their_own(tmp_path: Path) -> None:
    data = np.zeros((2, 3, 2, 5, 6), np.uint8)
    tifffile.imwrite(tmp_path / "q.tif", data, photometric="minisblack")
    volume = read(tmp_path / "q.tif")
    assert volume.axes.endswith("YX")
    assert len(set(volume.axes)) == 5
    assert volume.data.shape == data.shape


def test_series_are_chosen_by_number_or_size(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    shapes = [(8, 8), (3, 20, 30), (3, 20, 30), (9, 9)]
    with tifffile.TiffWriter(path) as tif:
        for value, shape in enumerate(shapes):
            tif.write(np.full(shape, value, np.uint8), photometric="minisblack")
    assert np.unique(read(path).data).tolist() == [1]
    for value, shape in enumerate(shapes):
        for lazy in (False, True):
            volume = read(path, series=value, lazy=lazy)
            assert volume.data.shape == shape
            assert np.unique(np.asarray(volume.data)).tolist() == [value]
            assert volume.metadata["series"] == value
    with pytest.raises(FileFormatError, match="4 image series"):
        read(path, series=4)
    with pytest.raises(FileFormatError, match="no series -1"):
        read(path, series=-1)


# --- lazily ---------------------------------------------------------------------------------------


def test_only_large_files_are_lazy_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = make_volume()
    path = write(tmp_path / "stack.tif", volume)
    monkeypatch.setattr(_lazy, "LAZY_ABOVE", volume.data.nbytes)
    assert isinstance(read(path).data, np.ndarray)
    monkeypatch.setattr(_lazy, "LAZY_ABOVE", volume.data.nbytes - 1)
    assert isinstance(read(path).data, da.Array)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_lazy_arrays_have_one_chunk_a_plane_and_survive_pickling(
    tmp_path: Path, compression: str | None
) -> None:
    volume = make_volume("uint16", "TZYX")
    data = read(write(tmp_path / "a.tif", volume, compression=compression), lazy=True).data
    assert data.chunksize == (1, 1, 7, 9)
    np.testing.assert_array_equal(data[1, ::2, 2:5, 3], volume.data[1, ::2, 2:5, 3])
    np.testing.assert_array_equal(data[:, [3, 0]], volume.data[:, [3, 0]])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data)).compute(), volume.data)


def test_imagej_stack_over_4_gb_with_a_single_directory(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    shape = (1100, 2048, 1024)
    tifffile.imwrite(
        path, shape=shape, dtype=np.uint16, imagej=True, truncate=True, metadata={"axes": "ZYX"}
    )
    with tifffile.TiffFile(path) as tif:
        assert len(tif.pages) == 1
        offset, byteorder = tif.series[0].dataoffset, tif.byteorder
    assert offset is not None
    with path.open("r+b") as stream:
        stream.seek(offset + 1099 * 2048 * 1024 * 2)
        stream.write(np.arange(1024).astype(byteorder + "u2").tobytes())
    volume = read(path)
    assert isinstance(volume.data, da.Array)
    assert volume.data.shape == shape
    np.testing.assert_array_equal(volume.data[1099, 0], np.arange(1024))
    assert not volume.data[1098, -1].compute().any()


def test_a_file_that_changes_after_opening_is_not_misread(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", make_volume("uint16"))
    lazy = read(path, lazy=True)
    write(path, make_volume("uint16", "ZYX", (9, 9, 9)), overwrite=True)
    with pytest.raises(FileFormatError, match="has changed"):
        lazy.data.compute()
    path.unlink()
    with pytest.raises(FileFormatError, match="is gone"):
        lazy.data.compute()


# --- files that can't be read ---------------------------------------------------------------------


def whole_files(tmp_path: Path) -> dict[str, bytes]:
    """One complete file of each flavour, stored in each way."""
    contents = {}
    for dtype in ("uint16", "int16", "int64"):
        for compression in (None, "lzw"):
            volume = make_volume(dtype, "ZYX", (5, 32, 32))
            path = write(tmp_path / "whole.tif", volume, overwrite=True, compression=compression)
            contents[f"{dtype} {compression}"] = path.read_bytes()
    for bigtiff in (False, True):
        with tifffile.TiffWriter(tmp_path / "whole.tif", bigtiff=bigtiff) as tif:
            for plane in make_volume("uint16", "ZYX", (5, 32, 32)).data:
                tif.write(plane, contiguous=False, metadata=None)
        contents[f"plain {bigtiff=}"] = (tmp_path / "whole.tif").read_bytes()
    return contents


@pytest.mark.parametrize("lazy", [False, True])
def test_truncated_files_are_refused_wherever_they_were_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lazy: bool
) -> None:
    caplog.set_level("CRITICAL", logger="tifffile")
    path = tmp_path / "cut.tif"
    for kind, content in whole_files(tmp_path).items():
        end = len(content) - 16  # up to so many bytes at the end only fill up the last pages
        for length in (*range(20), *range(20, end, len(content) // 25), end - 1):
            path.write_bytes(content[:length])
            with pytest.raises(FileFormatError, match=r"\. (Copy|It may be damaged)"):
                pytest.fail(f"{length} bytes of {kind} read as {read(path, lazy=lazy)}")
        path.write_bytes(content)
        assert read(path, lazy=lazy).data.shape == (5, 32, 32)


@pytest.mark.parametrize("imagej", [False, True])
def test_a_truncated_stack_with_a_single_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, imagej: bool
) -> None:
    caplog.set_level("CRITICAL", logger="tifffile")
    path = tmp_path / "a.tif"
    data = make_volume().data
    tifffile.imwrite(path, data, imagej=imagej, truncate=True, photometric="minisblack")
    np.testing.assert_array_equal(read(path, lazy=True).data, data)
    path.write_bytes(path.read_bytes()[: -data[0].nbytes])
    with pytest.raises(FileFormatError, match="truncated"):
        read(path)


def test_planes_in_files_that_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="tifffile")
    path = write(tmp_path / "a.ome.tif", make_volume("int16"))
    content = path.read_bytes()
    # The description goes on claiming planes that another file would have to hold.
    assert content.count(b'SizeZ="4"') == 1
    path.write_bytes(content.replace(b'SizeZ="4"', b'SizeZ="9"'))
    with pytest.raises(FileFormatError, match="beside it"):
        read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"not a TIFF file, only called so", "isn't a readable TIFF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "isn't a readable TIFF"),
        (b"II*\x00", "isn't a readable TIFF"),
        (b"II*\x00\x00\x00\x00\x00", "holds no image|isn't a readable TIFF"),
        (b"MM\x00*\xff\xff\xff\xff", "isn't a readable TIFF|holds no image"),
        (bytes(1000), "isn't a readable TIFF"),
    ],
)
def test_other_content_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
) -> None:
    caplog.set_level("CRITICAL", logger="tifffile")
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=reason):
        read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="There is no file"):
        read(tmp_path / "nowhere.tif")
    with pytest.raises(FileFormatError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(FileFormatError, match="is a folder"):
        read(tmp_path / "folder.tif")
    with pytest.raises(FileFormatError, match="can't be read"):
        read(tmp_path / ("long" * 100 + ".tif"))
    (tmp_path / "a.jpg").write_bytes(b"abc")
    with pytest.raises(FileFormatError, match=r"doesn't end in .*\.tif"):
        read(tmp_path / "a.jpg")


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tif", make_volume())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tifffile, "TiffFile", refuse)  # chmod would not stop root
    with pytest.raises(FileFormatError, match="Permission denied"):
        read(path)


def test_suffixes_are_known_in_any_case(tmp_path: Path) -> None:
    assert {".tif", ".tiff", ".ome.tif"} <= set(supported_suffixes())
    for suffix in supported_suffixes():
        axes = "YX" if suffix in FORMATS["dicom"].suffixes else "ZYX"
        path = write(tmp_path / f"stack{suffix.upper()}", make_volume(axes=axes))
        assert read(path).name == "stack"


# --- volumes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"axes": "YX"}, {"axes": "ZZX"}, {"axes": "ZTX"}, {"scale": (1.0,)}, {"units": ("pixel",)}],
)
def test_volumes_that_contradict_themselves(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidImageError):
        replace(make_volume(), **changes)


@pytest.mark.parametrize(("axes", "plane"), [("YX", (0, 1)), ("XZY", (2, 0)), ("TYXS", (1, 2))])
def test_plane_axes(axes: str, plane: tuple[int, int]) -> None:
    assert make_volume(axes=axes).plane_axes == plane


# --- files that can't be written ------------------------------------------------------------------

BEFORE = b"what was there before"


def fails_at(plane: int, error: BaseException) -> Callable[..., Any]:
    """A function for map_blocks that lets so many planes pass and then raises."""
    counter = iter(range(10**6))

    def block(pixels: Any) -> Any:
        if next(counter) == plane:
            raise error
        return pixels

    return block


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int64"])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), MemoryError()])
def test_a_write_that_is_cut_short_leaves_everything_as_it_was(
    tmp_path: Path, dtype: str, compression: str | None, error: BaseException
) -> None:
    volume = in_chunks(make_volume(dtype))
    meta = np.empty((0, 0, 0), dtype)
    data = volume.data.map_blocks(fails_at(2, error), dtype=dtype, meta=meta)
    path = tmp_path / "a.tif"
    path.write_bytes(BEFORE)
    with pytest.raises(type(error)):
        write(path, replace(volume, data=data), overwrite=True, compression=compression)
    assert entries(tmp_path) == {"a.tif"}
    assert path.read_bytes() == BEFORE


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int64"])
@pytest.mark.parametrize("method", ["write", "write_array"])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, method: str
) -> None:
    original = getattr(tifffile.FileHandle, method)
    room = iter(range(2))

    def until_full(*args: Any, **kwargs: Any) -> Any:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    path = tmp_path / "a.tif"
    path.write_bytes(BEFORE)
    monkeypatch.setattr(tifffile.FileHandle, method, until_full)
    with pytest.raises(FileWriteError, match=r"disk is full.*Free space"):
        write(path, make_volume(dtype), overwrite=True)
    assert next(room, None) is None, "the disk never became full"
    assert entries(tmp_path) == {"a.tif"}
    assert path.read_bytes() == BEFORE


def test_a_disk_that_is_full_only_when_the_last_bytes_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BufferedRandom):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", lambda path, mode: Full(io.FileIO(path, "x+")))
    with pytest.raises(FileWriteError, match="disk is full"):
        write(tmp_path / "a.tif", make_volume())
    assert entries(tmp_path) == set()


def test_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(BEFORE)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "another program has the file open")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(FileWriteError, match="another program"):
        write(path, make_volume(), overwrite=True)
    assert entries(tmp_path) == {"a.tif"}
    assert path.read_bytes() == BEFORE


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    volume = make_volume()
    with pytest.raises(FileWriteError, match="Check that the folder exists"):
        write(tmp_path / "nowhere" / "a.tif", volume)
    (tmp_path / "file").write_bytes(BEFORE)
    with pytest.raises(FileWriteError, match="can't be written"):
        write(tmp_path / "file" / "a.tif", volume)
    (tmp_path / "folder.tif").mkdir()
    with pytest.raises(FileWriteError, match="is a folder"):
        write(tmp_path / "folder.tif", volume, overwrite=True)
    with pytest.raises(FileWriteError):
        write(tmp_path / ("long" * 100 + ".tif"), volume)
    with pytest.raises(FileFormatError, match="doesn't end in"):
        write(tmp_path / "a.png", volume)
    assert entries(tmp_path) == {"file", "folder.tif"}


def test_overwriting_needs_leave(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(BEFORE)
    with pytest.raises(FileWriteError, match="exists"):
        write(path, make_volume())
    assert path.read_bytes() == BEFORE
    assert write(path, make_volume(), overwrite=True) == path
    assert_same(read(path), make_volume())


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    target = write(tmp_path / "target.tif", make_volume("uint8"))
    link = tmp_path / "link.tif"
    link.symlink_to(target)
    assert write(link, make_volume("int16"), overwrite=True) == link
    assert link.is_symlink()
    assert read(target).data.dtype == np.int16


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_the_file_that_is_still_being_read_is_not_replaced(
    tmp_path: Path, compression: str | None
) -> None:
    path = write(tmp_path / "a.tif", make_volume(), compression=compression)
    before = path.read_bytes()
    lazy = read(path, lazy=True)
    derived = replace(lazy, data=(lazy.data[:, ::-1] + 1).astype(np.uint16))
    with pytest.raises(FileWriteError, match="Choose another name"):
        write(path, derived, overwrite=True)
    assert path.read_bytes() == before
    other = write(tmp_path / "b.tif", derived)
    np.testing.assert_array_equal(read(other).data, make_volume().data[:, ::-1] + 1)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (np.zeros((2, 0), np.uint8), FileFormatError),
        (np.array([["a", "b"]]), FileFormatError),
        (np.array([[None]]), FileFormatError),
        (np.zeros((2, 2), "datetime64[s]"), FileFormatError),
        (np.zeros((2, 2), np.longdouble), FileFormatError),
    ],
)
def test_pixels_that_tiff_cannot_hold(
    tmp_path: Path, data: np.ndarray[Any, Any], error: type[Exception]
) -> None:
    volume = Volume(data, "YX", (1.0, 1.0), ("pixel", "pixel"), "")
    with pytest.raises(error):
        write(tmp_path / "a.tif", volume)
    assert entries(tmp_path) == set()


def test_compressions_that_would_lose_something_are_unknown(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="Choose deflate, lzw, zstd"):
        write(tmp_path / "a.tif", make_volume(), compression="jpeg")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "compression"),
    [("uint16", None), ("int16", None), ("int64", None), ("uint16", "deflate")],
)
def test_a_stack_is_streamed_to_its_file(
    tmp_path: Path, dtype: str, compression: str | None
) -> None:
    computed: Counter[int] = Counter()

    def plane(block_info: Any) -> Any:
        z = block_info[None]["chunk-location"][0]
        computed[z] += 1
        return np.full((1, 512, 512), z, dtype)

    slices = 32
    data = da.map_blocks(
        plane, chunks=((1,) * slices, 512, 512), dtype=dtype, meta=np.empty((0, 0, 0), dtype)
    )
    volume = Volume(data, "ZYX", (1.0,) * 3, ("pixel",) * 3, "")
    write(tmp_path / "warm-up.tif", replace(volume, data=data[:2]), compression=compression)
    computed.clear()
    tracemalloc.start()
    try:
        write(tmp_path / "a.tif", volume, compression=compression)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert set(computed.values()) == {1}
    assert len(computed) == slices
    assert peak < data.nbytes / 4
    written = read(tmp_path / "a.tif", lazy=True).data
    np.testing.assert_array_equal(written[:, 0, 0], np.arange(slices))


def test_chunks_of_several_planes_are_computed_once(tmp_path: Path) -> None:
    computed: Counter[tuple[int, ...]] = Counter()

    def block(block_info: Any) -> Any:
        location = tuple(block_info[None]["chunk-location"])
        computed[location] += 1
        return np.zeros((1, 4, 8, 8), np.uint8)

    chunks = ((1, 1), (4, 4, 4), (8,), (8,))
    data = da.map_blocks(block, chunks=chunks, dtype=np.uint8, meta=np.empty((0,) * 4, np.uint8))
    write(tmp_path / "a.tif", Volume(data, "TZYX", (1.0,) * 4, ("pixel",) * 4, ""))
    assert len(computed) == 6
    assert set(computed.values()) == {1}


def test_importing_stays_light() -> None:
    heavy = {"torch", "napari", "qtpy", "tifffile", "dask", "zarr"}
    script = (
        f"import sys, napari_learned_diffusion.files\nprint(sorted({heavy!r} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert answer.stdout.decode().strip() == "[]"
