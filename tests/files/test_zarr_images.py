"""OME-Zarr and plain zarr as programs really write them, and what can't be right of them."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write, write_image

PIXELS = np.random.default_rng(0).integers(0, 1000, (4, 16, 12)).astype(np.uint16)


def scale_of(*steps: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(steps)}


def shift_of(*starts: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(starts)}


def image_of(
    axes: str = "zyx",
    transforms: list[dict[str, Any]] | None = None,
    path: str = "0",
    unit: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """An entry of ``multiscales``."""
    types = {"t": "time", "c": "channel"}
    described = [
        {"name": a, "type": types.get(a, "space")} | ({"unit": unit} if unit else {}) for a in axes
    ]
    level = {"path": path, "coordinateTransformations": transforms or [scale_of(*[1] * len(axes))]}
    return {"version": "0.4", "axes": described, "datasets": [level]} | more


def save(
    path: Path,
    data: NDArray[Any] = PIXELS,
    images: list[dict[str, Any]] | None = None,
    version: int = 2,
    chunks: tuple[int, ...] = (1, 16, 12),
    omero: Any = None,
    **options: Any,
) -> Path:
    group = zarr.create_group(path, zarr_format=version)
    array = group.create_array(
        "0", shape=data.shape, dtype=data.dtype, chunks=chunks[-data.ndim :], **options
    )
    array[...] = data
    described: dict[str, Any] = {"multiscales": images if images is not None else [image_of()]}
    if omero is not None:
        described["omero"] = omero
    group.attrs.update({"ome": {"version": "0.5"} | described} if version == 3 else described)
    return path


def written(path: Path) -> dict[str, Any]:
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    found: dict[str, Any] = attributes["ome"]
    return found


# --- where pixels lie -----------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [None, "micrometer", "furlong"])
@pytest.mark.parametrize("version", [2, 3])
def test_voxel_sizes_without_a_known_unit_keep_their_numbers(
    tmp_path: Path, version: int, unit: str | None
) -> None:
    image = image_of(transforms=[scale_of(2, 0.25, 0.25)], unit=unit)
    volume = read(save(tmp_path / "a.zarr", images=[image], version=version))
    assert volume.scale == (2.0, 0.25, 0.25)
    assert set(volume.units) == {"micrometer" if unit == "micrometer" else "pixel"}
    assert volume.spacing(volume.axes_of_planes("ZX")) == (2.0, 0.25)
    copy = read(write(tmp_path / "b.ome.zarr", volume))
    assert (copy.scale, copy.units) == (volume.scale, volume.units)


def test_transformations_of_a_level_come_before_those_of_the_image(tmp_path: Path) -> None:
    image = image_of(
        transforms=[scale_of(2, 0.5, 0.5), shift_of(10, 20, 30)],
        coordinateTransformations=[scale_of(3, 2, 1), shift_of(1, 1, 1), {"type": "identity"}],
    )
    volume = read(save(tmp_path / "a.zarr", images=[image]))
    assert volume.scale == (6.0, 1.0, 0.5)
    assert volume.metadata["placement"] == {"translate": [31.0, 41.0, 31.0]}


def test_the_translation_comes_back(tmp_path: Path) -> None:
    image = image_of(transforms=[scale_of(2, 0.25, 0.25), shift_of(10, 20, 30)], unit="micrometer")
    source = save(tmp_path / "a.zarr", np.zeros((2, 600, 300), np.uint16), images=[image])
    volume = read(source)
    (multiscale,) = written(write(tmp_path / "b.ome.zarr", volume))["multiscales"]
    first, second = (level["coordinateTransformations"] for level in multiscale["datasets"][:2])
    assert first == [scale_of(2.0, 0.25, 0.25), shift_of(10.0, 20.0, 30.0)]
    # The centre of the first pixel of a level lies between those of the level before.
    assert second == [scale_of(2.0, 0.5, 0.5), shift_of(10.0, 20.125, 30.125)]
    reader = get_reader(source)
    assert reader is not None
    with pytest.warns(UserWarning, match="lacks .* chunks"):
        ((data, attributes, _),) = reader(source)
    assert attributes["translate"] == [10.0, 20.0, 30.0]
    write_image(str(tmp_path / "c.ome.zarr"), data, attributes)
    assert read(tmp_path / "c.ome.zarr").metadata["placement"] == volume.metadata["placement"]


def test_axes_in_another_order_have_the_same_planes_in_napari(tmp_path: Path) -> None:
    image = image_of("xyz", [scale_of(1, 2, 3), shift_of(10, 20, 30)])
    source = save(tmp_path / "a.zarr", images=[image])
    volume = read(source)
    assert (volume.axes, volume.scale) == ("XYZ", (1.0, 2.0, 3.0))
    reader = get_reader(source)
    assert reader is not None
    ((data, attributes, _),) = reader(source)
    assert attributes["axis_labels"] == ("z", "y", "x")
    assert attributes["translate"] == [30.0, 20.0, 10.0]
    np.testing.assert_array_equal(data, PIXELS.T)
    copy = read(write(tmp_path / "b.ome.zarr", volume))
    assert (copy.axes, copy.scale) == ("ZYX", (3.0, 2.0, 1.0))
    assert copy.metadata["placement"] == {"translate": [30.0, 20.0, 10.0]}


@pytest.mark.parametrize("steps", [(0, 1, 1), (-1, 1, 1), (float("nan"), 1, 1)])
def test_steps_that_are_none_are_unknown(tmp_path: Path, steps: tuple[float, ...]) -> None:
    image = image_of(transforms=[scale_of(*steps)], unit="micrometer")
    volume = read(save(tmp_path / "a.zarr", images=[image]))
    assert volume.scale == (1.0, 1.0, 1.0)
    assert volume.units == ("pixel", "micrometer", "micrometer")


# --- channels -------------------------------------------------------------------------------------

OMERO = {
    "id": 1,
    "channels": [
        {
            "label": "DAPI",
            "color": "0000FF",
            "active": True,
            "window": {"min": 0, "max": 4095, "start": 10, "end": 500},
        },
        {
            "label": "GFP",
            "color": "00FF00",
            "active": False,
            "window": {"min": 0, "max": 4095, "start": 20, "end": 900},
        },
    ],
    "rdefs": {"model": "color"},
}


@pytest.fixture
def channels(tmp_path: Path) -> Path:
    data = PIXELS.reshape(2, 2, 16, 12)
    image = image_of("czyx", [scale_of(1, 2, 3, 4), shift_of(0, 10, 20, 30)])
    return save(tmp_path / "a.zarr", data, [image], chunks=(1, 1, 16, 12), omero=OMERO)


def test_the_omero_block_comes_back(channels: Path, tmp_path: Path) -> None:
    volume = read(channels)
    assert volume.metadata["channel_names"] == ["DAPI", "GFP"]
    assert written(write(tmp_path / "b.ome.zarr", volume))["omero"] == OMERO


def test_channels_are_shown_in_napari_as_the_omero_block_says(channels: Path) -> None:
    reader = get_reader(channels)
    assert reader is not None
    ((_, attributes, _),) = reader(channels)
    assert attributes["name"] == ["a DAPI", "a GFP"]
    assert attributes["colormap"] == ["#0000ff", "#00ff00"]
    assert attributes["contrast_limits"] == [(10.0, 500.0), (20.0, 900.0)]
    assert attributes["visible"] == [True, False]
    assert attributes["translate"] == [10, 20, 30]
    assert [m["omero"]["channels"] for m in attributes["metadata"]] == [
        [channel] for channel in OMERO["channels"]
    ]


def test_a_channel_saved_by_napari_keeps_its_part_of_the_block(
    channels: Path, tmp_path: Path
) -> None:
    image_layers = pytest.importorskip("napari.layers")
    stack_utils = pytest.importorskip("napari.layers.utils.stack_utils")
    reader = get_reader(channels)
    assert reader is not None
    ((data, attributes, _),) = reader(channels)
    axis = attributes.pop("channel_axis")
    parts = stack_utils.split_channels(data, axis, **attributes)
    layer = image_layers.Image(parts[1][0], **parts[1][1])
    assert tuple(layer.contrast_limits) == (20, 900)
    layer.contrast_limits = (30, 800)
    write_image(str(tmp_path / "b.ome.zarr"), *layer.as_layer_data_tuple()[:2])
    (channel,) = written(tmp_path / "b.ome.zarr")["omero"]["channels"]
    assert (channel["label"], channel["color"]) == ("GFP", "00FF00")
    assert channel["window"] == {"min": 0, "max": 4095, "start": 30, "end": 800}


def test_names_of_channels_of_another_format_are_written(tmp_path: Path) -> None:
    data = PIXELS.reshape(4, 16, 12)[:2]
    names = {"channel_names": ["one", "two"]}
    volume = Volume(data, "CYX", (1.0,) * 3, ("pixel",) * 3, "a", names)
    path = write(tmp_path / "a.ome.zarr", volume)
    assert read(path).metadata["channel_names"] == ["one", "two"]
    found = [channel["window"] for channel in written(path)["omero"]["channels"]]
    assert [(w["start"], w["end"]) for w in found] == [(p.min(), p.max()) for p in data]


@pytest.mark.parametrize(
    "omero",
    [
        {},
        {"channels": []},
        {"channels": [{"label": "of another"}]},
        {"channels": "none"},
        {"channels": [1, 2]},
        ["no block"],
        {"channels": [{"window": {"start": 5, "end": 5}, "color": 7}, {"window": "wide"}]},
    ],
)
def test_an_omero_block_that_does_not_fit_is_passed_over(tmp_path: Path, omero: Any) -> None:
    data = PIXELS.reshape(2, 2, 16, 12)
    path = save(tmp_path / "a.zarr", data, [image_of("czyx")], chunks=(1, 1, 16, 12), omero=omero)
    reader = get_reader(path)
    assert reader is not None
    ((_, attributes, _),) = reader(path)
    assert attributes["name"] == ["a channel 0", "a channel 1"]
    assert "contrast_limits" not in attributes


# --- which image ----------------------------------------------------------------------------------


def test_the_finest_level_is_read_whichever_comes_first(tmp_path: Path) -> None:
    image = image_of()
    image["datasets"] = [
        {"path": "small", "coordinateTransformations": [scale_of(1, 2, 2)]},
        {"path": "0", "coordinateTransformations": [scale_of(1, 1, 1)]},
        {"path": "gone", "coordinateTransformations": [scale_of(1, 4, 4)]},
    ]
    path = save(tmp_path / "a.zarr", images=[image])
    zarr.open_group(path).create_array("small", data=PIXELS[:, ::2, ::2])
    volume = read(path)
    np.testing.assert_array_equal(volume.data, PIXELS)
    assert volume.scale == (1.0, 1.0, 1.0)


def test_of_several_images_the_largest_is_read_and_the_others_are_mentioned(tmp_path: Path) -> None:
    images = [image_of(path="thumbnail"), image_of(name="raw")]
    path = save(tmp_path / "a.zarr", images=images)
    zarr.open_group(path).create_array("thumbnail", data=PIXELS[:, ::2, ::2])
    volume = read(path)
    assert (volume.metadata["series"], volume.metadata["series_count"]) == (1, 2)
    np.testing.assert_array_equal(volume.data, PIXELS)
    (note,) = volume.metadata["notes"]
    assert "2 images" in note
    assert "raw" in note
    chosen = read(path, series=0)
    np.testing.assert_array_equal(chosen.data, PIXELS[:, ::2, ::2])
    assert chosen.metadata["notes"] == []
    with pytest.raises(FileFormatError, match="no series 2"):
        read(path, series=2)


@pytest.mark.parametrize("version", [2, 3])
def test_images_of_bioformats2raw_are_series(tmp_path: Path, version: int) -> None:
    root = zarr.create_group(tmp_path / "a.zarr", zarr_format=version)
    layout = {"bioformats2raw.layout": 3}
    root.attrs.update({"ome": layout} if version == 3 else layout)
    for number, data in enumerate((PIXELS[:2], PIXELS, PIXELS + 1)):
        save(tmp_path / "a.zarr" / str(number), data, version=version)
    volume = read(tmp_path / "a.zarr")
    assert volume.metadata["series_count"] == 3
    assert volume.metadata["series"] == 1
    assert len(volume.metadata["notes"]) == 1
    np.testing.assert_array_equal(read(tmp_path / "a.zarr", series=2).data, PIXELS + 1)


def test_labels_are_passed_over_and_refused_by_themselves(tmp_path: Path) -> None:
    path = save(tmp_path / "a.zarr")
    labels = zarr.open_group(path).create_group("labels", attributes={"labels": ["cells"]})
    cells = labels.create_group("cells")
    cells.create_array("0", data=np.ones((40, 16, 12), np.uint32))
    cells.attrs.update({"multiscales": [image_of()], "image-label": {}})
    volume = read(path)
    np.testing.assert_array_equal(volume.data, PIXELS)
    assert volume.metadata["notes"] == []
    with pytest.raises(FileFormatError, match="holds labels"):
        read(path / "labels" / "cells")


def test_plates_and_wells_name_an_image(tmp_path: Path) -> None:
    root = zarr.create_group(tmp_path / "a.zarr", zarr_format=2)
    root.attrs["plate"] = {"wells": [{"path": "B/3"}]}
    with pytest.raises(FileFormatError, match=r"a\.zarr/B/3/0"):
        read(tmp_path / "a.zarr")
    well = root.create_group("B/3")
    well.attrs["well"] = {"images": [{"path": "7"}]}
    with pytest.raises(FileFormatError, match=r"a\.zarr/B/3/7"):
        read(tmp_path / "a.zarr" / "B" / "3")


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_without_a_description_is_an_image(tmp_path: Path, version: int) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=PIXELS, zarr_format=version)
    volume = read(tmp_path / "a.zarr")
    assert (volume.axes, volume.scale) == ("ZYX", (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(volume.data, PIXELS)
    group = zarr.create_group(tmp_path / "b.zarr", zarr_format=version)
    group.create_array("time", data=np.arange(4))
    group.create_array(
        "rain", data=PIXELS, **({"dimension_names": ["time", "x", "y"]} if version == 3 else {})
    )
    volume = read(tmp_path / "b.zarr")
    assert volume.axes == ("TXY" if version == 3 else "ZYX")
    np.testing.assert_array_equal(volume.data, PIXELS)
    group.create_array("snow", data=PIXELS)
    with pytest.raises(FileFormatError, match="rain, snow"):
        read(tmp_path / "b.zarr")
    np.testing.assert_array_equal(read(tmp_path / "b.zarr" / "snow").data, PIXELS)


TWO: dict[str, Any] = {"scale": (1.0, 1.0), "units": ("pixel", "pixel")}


# --- values that are no intensities ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "fill", "attributes", "missing"),
    [
        ("float32", 0, {}, ()),
        ("float32", float("nan"), {}, ()),
        ("float32", 1, {}, ()),
        ("float32", 9.969209968386869e36, {}, (float(np.float32(9.969209968386869e36)),)),
        ("float64", 1e20, {}, (1e20,)),
        ("float32", float(np.finfo("f4").min), {}, (float(np.finfo("f4").min),)),
        ("float32", -9999, {}, (-9999.0,)),
        ("float32", 0, {"_FillValue": 0}, (0.0,)),
        ("float32", 0, {"missing_value": [-1, -2]}, (-1.0, -2.0)),
        ("float32", 0, {"_FillValue": "AAAAAAAA"}, ()),
        ("int16", 0, {}, ()),
        ("int16", -1, {}, ()),
        ("int16", -32768, {}, (-32768.0,)),
        ("int16", -32767, {}, (-32767.0,)),
        ("uint16", 0, {}, ()),
        ("uint16", 65535, {}, (65535.0,)),
        ("uint8", 255, {}, ()),
        ("uint8", 0, {"_FillValue": 255}, (255.0,)),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
def test_fill_values_that_are_no_intensities_are_told(
    tmp_path: Path,
    version: int,
    dtype: str,
    fill: float,
    attributes: dict[str, Any],
    missing: tuple[float, ...],
) -> None:
    data = PIXELS.astype(dtype)
    if missing:
        data[0, :3] = missing[0]
    path = save(tmp_path / "a.zarr", data, version=version, fill_value=fill, attributes=attributes)
    volume = read(path)
    assert volume.missing == missing
    copy = read(write(tmp_path / "b.ome.zarr", volume))
    assert copy.missing == missing
    np.testing.assert_array_equal(copy.data, data)
    # As pixels of another type, they are what that type can hold of them.
    small = replace(volume, data=np.zeros((5, 5), np.uint8), axes="YX", **TWO)
    assert set(read(write(tmp_path / "c.ome.zarr", small)).missing) <= set(missing)


def test_a_fill_value_is_not_averaged_into_coarser_levels(tmp_path: Path) -> None:
    data = np.full((300, 300), 8.0, np.float32)
    data[0, 0] = 1e20
    missing = (float(np.float32(1e20)),)
    volume = Volume(data, "YX", (1.0, 1.0), ("pixel",) * 2, "a", missing=missing)
    coarse = zarr.open_group(write(tmp_path / "a.ome.zarr", volume))["1"]
    assert coarse[0, 0] == np.float32(1e20)
    assert np.unique(coarse[1:]).tolist() == [8.0]


# --- chunks ---------------------------------------------------------------------------------------


def test_a_written_image_has_all_its_chunks(tmp_path: Path) -> None:
    volume = Volume(np.zeros((5, 9, 9), np.uint16), "ZYX", (1.0,) * 3, ("pixel",) * 3, "a")
    path = write(tmp_path / "a.ome.zarr", volume)
    assert len([p for p in (path / "0" / "c").rglob("*") if p.is_file()]) == 5
    assert read(path).metadata["notes"] == []


@pytest.mark.parametrize("lazy", [False, True])
def test_many_missing_chunks_are_mentioned(tmp_path: Path, lazy: bool) -> None:
    path = save(tmp_path / "a.zarr", fill_value=7)
    for number in (0, 2):
        (path / "0" / f"{number}.0.0").unlink()
    volume = read(path, lazy=lazy)
    expected = PIXELS.copy()
    expected[[0, 2]] = 7
    np.testing.assert_array_equal(np.asarray(volume.data), expected)
    assert volume.metadata["notes"] == [
        "a.zarr lacks 2 of its 4 chunks; their pixels were read as the fill value 7."
    ]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("lazy", [None, False, True])
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((10**9, 16, 12), (1, 16, 12)),
        ((10**6, 16, 12), (1, 16, 12)),
        ((10**9, 10**9, 10**9), (1, 1, 1)),
        ((10**9, 10**9, 10**9), (10**9, 10**9, 10**9)),
        ((4, 2**40, 2**40), (1, 16, 12)),
    ],
)
def test_a_size_that_cannot_be_true_is_refused_before_memory_is_taken(
    tmp_path: Path,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    lazy: bool | None,
    version: int,
) -> None:
    path = save(tmp_path / "a.zarr", version=version)
    node = path / "0" / ("zarr.json" if version == 3 else ".zarray")
    described = json.loads(node.read_text())
    described["shape"] = list(shape)
    if version == 3:
        described["chunk_grid"]["configuration"]["chunk_shape"] = list(chunks)
    else:
        described["chunks"] = list(chunks)
    node.write_text(json.dumps(described))
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="claims"):
            read(path, lazy=lazy)
        assert tracemalloc.get_traced_memory()[1] < 4 * 10**6
    finally:
        tracemalloc.stop()


def test_few_chunks_of_many_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    array = zarr.create_array(
        path, shape=(50_000, 64, 64), chunks=(1, 64, 64), dtype=np.uint8, zarr_format=2
    )
    array[:2] = np.random.default_rng(0).integers(0, 256, (2, 64, 64))
    with pytest.raises(FileFormatError, match="claims 50,000 chunks, and 2 are there"):
        read(path)


def test_very_many_chunks_are_joined_in_a_lazy_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.zarr", chunks=(1, 4, 4))
    for most, count in ((48, 48), (47, 1)):
        monkeypatch.setattr("napari_learned_diffusion.files._zarr._MOST_TASKS", most)
        volume = read(path, lazy=True)
        assert isinstance(volume.data, da.Array)
        assert volume.data.npartitions == count
        np.testing.assert_array_equal(volume.data.compute(), PIXELS)


def test_axes_of_space_by_other_names(tmp_path: Path) -> None:
    image = image_of()
    for entry, name in zip(image["axes"], ("depth", "row", "column"), strict=True):
        entry["name"] = name
    assert read(save(tmp_path / "a.zarr", images=[image])).axes == "ZYX"


CODECS: dict[str, tuple[int, Any]] = {
    "none": (2, None),
    "zstd of version 2": (2, numcodecs.Zstd()),
    "zstd": (3, zarr.codecs.ZstdCodec()),
    "zstd with checksum": (3, zarr.codecs.ZstdCodec(checksum=True)),
    "zstd and crc32c": (3, [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]),
    "blosc of version 2": (2, numcodecs.Blosc("lz4")),
    "blosc of version 2, zstd": (2, numcodecs.Blosc("zstd")),
    "blosc": (3, zarr.codecs.BloscCodec(cname="lz4")),
    "lz4": (2, numcodecs.LZ4()),
    "gzip": (3, zarr.codecs.GzipCodec()),
    "gzip of version 2": (2, numcodecs.GZip()),
    "zlib": (2, numcodecs.Zlib()),
    "bz2": (2, numcodecs.BZ2()),
    "lzma": (2, numcodecs.LZMA()),
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_chunks_that_are_something_else_are_refused(tmp_path: Path, name: str, lazy: bool) -> None:
    version, compressors = CODECS[name]
    # Some of it compresses, and some doesn't.
    for data in (PIXELS, PIXELS // 100):
        path = tmp_path / f"{data.max()}.zarr"
        save(path, data, version=version, compressors=compressors)
        chunk = path / "0" / ("c/0/0/0" if version == 3 else "0.0.0")
        whole = chunk.read_bytes()
        cut = [whole[:n] for n in (0, 1, 4, 7, 15, 16, 17, len(whole) // 2, len(whole) - 1)]
        for content in (*cut, b"nonsense", bytes(1000)):
            chunk.write_bytes(content)
            with pytest.raises(FileFormatError):
                np.asarray(read(path, lazy=lazy).data)
        chunk.write_bytes(whole)
        np.testing.assert_array_equal(np.asarray(read(path, lazy=lazy).data), data)


@pytest.mark.parametrize(
    "name", ["zstd of version 2", "blosc of version 2", "lz4", "blosc", "zstd"]
)
def test_a_chunk_whose_header_claims_a_gigabyte_takes_no_memory(tmp_path: Path, name: str) -> None:
    version, compressors = CODECS[name]
    path = save(tmp_path / "a.zarr", PIXELS // 100, version=version, compressors=compressors)
    chunk = path / "0" / ("c/0/0/0" if version == 3 else "0.0.0")
    content = bytearray(chunk.read_bytes())
    if "zstd" in name:
        content[4:15] = bytes([0b11100000]) + (10**9).to_bytes(8, "little") + content[7:9]
    else:
        where = 4 if "blosc" in name else 0
        content[where : where + 4] = (10**9).to_bytes(4, "little")
    chunk.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="damaged chunk"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 10**6
    finally:
        tracemalloc.stop()


def test_filters_and_shards_are_read(tmp_path: Path) -> None:
    filters = [numcodecs.Delta(dtype="u2"), numcodecs.Shuffle(2)]
    path = save(tmp_path / "a.zarr", filters=filters, compressors=numcodecs.Blosc())
    np.testing.assert_array_equal(read(path).data, PIXELS)
    blosc = zarr.codecs.BloscCodec()
    path = save(
        tmp_path / "b.zarr", version=3, chunks=(1, 8, 12), shards=(2, 16, 12), compressors=blosc
    )
    volume = read(path, lazy=True)
    assert volume.metadata["notes"] == []
    np.testing.assert_array_equal(volume.data.compute(), PIXELS)
    (path / "0" / "c" / "1" / "0" / "0").write_bytes(b"")
    with pytest.raises(FileFormatError, match="is an empty chunk"):
        volume.data.compute()


@pytest.mark.parametrize("place", ["end", "start"])
@pytest.mark.parametrize("lazy", [False, True])
def test_chunks_in_a_shard_are_looked_at_before_they_are_decoded(
    tmp_path: Path, lazy: bool, place: str
) -> None:
    path = tmp_path / "a.zarr"
    blosc = zarr.codecs.BloscCodec(cname="lz4")
    codec = zarr.codecs.ShardingCodec(
        chunk_shape=(1, 8, 12), codecs=[zarr.codecs.BytesCodec(), blosc], index_location=place
    )
    save(path, version=3, chunks=(2, 16, 12), serializer=codec, compressors=None)
    np.testing.assert_array_equal(np.asarray(read(path, lazy=lazy).data), PIXELS)
    shard = path / "0" / "c" / "0" / "0" / "0"
    whole = shard.read_bytes()
    first = 0 if place == "end" else 4 * 16 + 4
    for at, number in ((4, 10**9), (12, 10**6)):
        content = bytearray(whole)
        content[first + at : first + at + 4] = number.to_bytes(4, "little")
        shard.write_bytes(content)
        with pytest.raises(FileFormatError, match="damaged chunk"):
            np.asarray(read(path, lazy=lazy).data)
    # What is in other shards can be read all the same.
    np.testing.assert_array_equal(np.asarray(read(path, lazy=True).data[2:]), PIXELS[2:])
    shard.write_bytes(whole[:20])
    with pytest.raises(FileFormatError, match="truncated shard"):
        np.asarray(read(path, lazy=lazy).data)


def test_a_chunk_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = save(tmp_path / "a.zarr")
    (path / "0" / "0.0.0").unlink()
    os.mkfifo(path / "0" / "0.0.0")
    with pytest.raises(FileFormatError, match="isn't a file"):
        read(path)


def test_a_lazy_image_that_was_replaced_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.zarr")
    volume = read(path, lazy=True)
    shutil.rmtree(path)
    with pytest.raises(FileFormatError, match="is gone"):
        volume.data.compute()
    save(path, PIXELS[:, :8].repeat(2, axis=1))
    with pytest.raises(FileFormatError, match="has changed"):
        volume.data.compute()


# --- what is no image -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.array([["a", "b"]]), "no intensities"),
        (np.zeros((0, 5), np.uint8), "no pixels"),
        (np.zeros(5, np.uint8), "2 axes|two or more|5"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    tmp_path: Path, data: NDArray[Any], reason: str
) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=data, zarr_format=2)
    with pytest.raises(FileFormatError, match=reason):
        read(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "image",
    [
        {},
        {"datasets": []},
        image_of(path="gone"),
        image_of(path="../b"),
        image_of("yx"),
        image_of("cty"),
        image_of(transforms=[scale_of(1, 1)]),
        image_of(transforms=[{"scale": [1, 1, 1]}]),
        7,
    ],
)
def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path, image: Any) -> None:
    path = save(tmp_path / "a.zarr", images=[image])
    with pytest.raises(FileFormatError, match=r"a\.zarr"):
        read(path)


def test_zipped_zarr_is_refused_in_words(tmp_path: Path) -> None:
    source = save(tmp_path / "a.zarr")
    for name in ("b.zarr.zip", "b.ome.zarr.zip", "b.ozx", "b.ome.zarr"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for part in source.rglob("*"):
                archive.write(part, part.relative_to(source))
        with pytest.raises(FileFormatError, match=r"[Uu]nzip|unpack"):
            read(tmp_path / name)
