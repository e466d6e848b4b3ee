"""Pixels mean what their tags say, and the tags come back so that a result looks the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write

DATA = np.random.default_rng(0).integers(0, 250, (3, 20, 30)).astype(np.uint8)


def read_both(path: Path) -> Volume:
    """The volume, of which it was seen that reading it lazily gives the same."""
    volume, lazy = read(path, lazy=False), read(path, lazy=True)
    assert isinstance(lazy.data, da.Array)
    assert (lazy.axes, lazy.scale, lazy.units) == (volume.axes, volume.scale, volume.units)
    assert lazy.data.dtype == volume.data.dtype
    np.testing.assert_array_equal(lazy.data.compute(), volume.data)
    return volume


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, {"imagej": True}, {"ome": True}, {"compression": "zlib"}, {"metadata": None}]
)
def test_white_is_zero_stays_so(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    data = DATA.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="miniswhite", **options)
    volume = read_both(tmp_path / "a.tif")
    np.testing.assert_array_equal(volume.data, data)
    with tifffile.TiffFile(write(tmp_path / "b.tif", volume)) as tif:
        assert tif.pages.first.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        np.testing.assert_array_equal(tif.asarray(), data)
    reader = get_reader(str(tmp_path / "a.tif"))
    assert reader is not None
    assert reader(str(tmp_path / "a.tif"))[0][1]["colormap"] == "gray_r"


GREEN = np.zeros((3, 256), np.uint16)
GREEN[1] = np.arange(256) * 257
MIXED = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16) * 257


@pytest.mark.parametrize(("table", "imagej"), [(GREEN, False), (GREEN, True), (MIXED, True)])
def test_a_look_up_table_for_intensities_comes_back(
    tmp_path: Path, table: Any, imagej: bool
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA, photometric="palette", colormap=table, imagej=imagej)
    volume = read_both(path)
    np.testing.assert_array_equal(volume.data, DATA)
    with tifffile.TiffFile(write(tmp_path / "b.tif", volume)) as tif:
        assert tif.is_imagej == imagej or imagej is False
        np.testing.assert_array_equal(tif.pages.first.colormap, table)
        np.testing.assert_array_equal(tif.asarray(), DATA)


def test_a_palette_of_colours_is_applied(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", DATA[0], photometric="palette", colormap=MIXED)
    volume = read_both(tmp_path / "a.tif")
    assert volume.axes == "YXS"
    assert volume.data.dtype == np.uint8
    np.testing.assert_array_equal(volume.data, (MIXED >> 8).T[DATA[0]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"imagej": True}])
def test_orientation_is_honoured_and_comes_back(
    tmp_path: Path, orientation: int, options: dict[str, Any]
) -> None:
    shown = {
        1: DATA,
        2: DATA[:, :, ::-1],
        3: DATA[:, ::-1, ::-1],
        4: DATA[:, ::-1],
        5: DATA.swapaxes(1, 2),
        6: np.rot90(DATA, -1, (1, 2)),
        7: DATA[:, ::-1, ::-1].swapaxes(1, 2),
        8: np.rot90(DATA, 1, (1, 2)),
    }[orientation]
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        DATA,
        photometric="minisblack",
        resolution=(10000, 5000),
        resolutionunit=None if "imagej" in options else "CENTIMETER",
        extratags=[(274, "H", 1, orientation, True)],
        **options,
    )
    volume = read_both(path)
    np.testing.assert_array_equal(volume.data, shown)
    if "imagej" not in options:
        steps = (2.0, 1.0) if orientation < 5 else (1.0, 2.0)
        assert volume.scale[1:] == steps
    copy = write(tmp_path / "b.tif", volume)
    with tifffile.TiffFile(copy) as tif:
        np.testing.assert_array_equal(tif.asarray(), DATA)
        assert tif.pages.first.tags.valueof(274, 1) == orientation
    again = read_both(copy)
    np.testing.assert_array_equal(again.data, shown)
    assert again.scale == volume.scale


@pytest.mark.parametrize(
    ("dtype", "text", "missing"),
    [
        ("int16", "-9999", (-9999.0,)),
        ("float32", "-3.4028234663852886e+38", (-3.4028234663852886e38,)),
        ("uint8", "-9999", ()),
        ("float32", "nan", ()),
        ("float32", "none", ()),
    ],
)
def test_values_that_gdal_declares_to_be_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, text: str, missing: Any
) -> None:
    caplog.set_level("CRITICAL", logger="tifffile")
    path = tmp_path / "a.tif"
    tags = [(42113, "s", 0, text, True)]
    tifffile.imwrite(path, DATA.astype(dtype), photometric="minisblack", extratags=tags)
    volume = read(path)
    assert volume.missing == missing
    assert read(write(tmp_path / "b.tif", volume)).missing == missing


@pytest.mark.parametrize("photometric", ["separated", "cielab", "ycbcr"])
def test_other_colour_spaces_are_refused(tmp_path: Path, photometric: Any) -> None:
    samples = 4 if photometric == "separated" else 3
    data = np.zeros((20, 30, samples), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric=photometric, planarconfig="contig")
    with pytest.raises(FileFormatError, match="Convert it to RGB or to grey"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (DATA.astype(np.int8), {}),
        (DATA.astype(np.float16), {"compression": "zlib", "predictor": True}),
        (DATA.astype(np.uint64) << 40, {}),
        (DATA.astype(np.complex64) * 1j, {}),
        (DATA > 100, {}),
        (DATA.astype(np.float32) / 7, {"compression": "lzw", "predictor": True}),
        (DATA.astype(np.uint16), {"tile": (16, 16), "compression": "zlib", "predictor": True}),
        (DATA.astype(np.uint16), {"tile": (16, 16), "bigtiff": True, "byteorder": ">"}),
        (DATA.astype(np.uint16), {"rowsperstrip": 7, "byteorder": ">"}),
        (DATA.astype(np.uint16), {"bitspersample": 12}),
    ],
)
def test_types_and_layouts_are_read_exactly(
    tmp_path: Path, data: Any, options: dict[str, Any]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, photometric="minisblack", metadata=None, **options)
    volume = read_both(path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.data.dtype == data.dtype
    np.testing.assert_array_equal(read_both(write(tmp_path / "b.tif", volume)).data, data)


@pytest.mark.parametrize(
    ("planar", "compression"),
    [
        ("contig", None),
        ("contig", "zlib"),
        ("contig", "jpeg"),
        ("separate", None),
        ("separate", "zlib"),
    ],
)
def test_colour_is_read_however_stored(
    tmp_path: Path, planar: Any, compression: str | None
) -> None:
    data = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    stored = data if planar == "contig" else np.moveaxis(data, -1, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, stored, photometric="rgb", planarconfig=planar, compression=compression, metadata=None
    )
    volume = read_both(path)
    assert volume.axes == ("YXS" if planar == "contig" else "SYX")
    if compression != "jpeg":
        np.testing.assert_array_equal(volume.data, stored)
    copy = read_both(write(tmp_path / "b.tif", volume))
    np.testing.assert_array_equal(copy.data, volume.data)
    assert copy.axes == volume.axes


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (4, 1, 9), (4, 9, 1), (4, 1, 1)])
@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif"])
@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_thin_planes_are_read_and_written(
    tmp_path: Path, shape: tuple[int, ...], name: str, dtype: str
) -> None:
    data = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    axes = "ZYX"[-len(shape) :]
    made = Volume(data, axes, (1.0,) * len(shape), ("pixel",) * len(shape), "thin")
    volume = read_both(write(tmp_path / name, made))
    assert (volume.axes, volume.data.shape) == (axes, shape)
    np.testing.assert_array_equal(volume.data, data)
    with tifffile.TiffFile(tmp_path / name) as tif:
        assert tif.is_ome or name == "a.tif"
