"""What ImageJ and OME say in words comes back, and a name that ends in .ome.tif is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write, write_image

CHANNELS = np.random.default_rng(0).integers(0, 1000, (3, 24, 30)).astype(np.uint16)
LUTS = [np.stack([np.roll(np.arange(256), k)] * 3).astype(np.uint8) for k in range(3)]
WORDS: dict[str, Any] = {
    "mode": "composite",
    "loop": True,
    "Ranges": (0.0, 100.0, 0.0, 1000.0, 5.0, 5000.0),
    "LUTs": LUTS,
    "Labels": ["DAPI", "GFP µ", "RFP"],
    "Info": "first line\nµ = second",
    "Properties": {"key": "value"},
    "Overlays": [b"one", b"two"],
    "ROI": b"roi",
    "cf": 0,
    "c0": -1000.0,
    "c1": 2.0,
    "vunit": "HU",
    "xorigin": 3.5,
}


def write_composite(path: Path, **words: Any) -> Path:
    metadata = {"axes": "CYX"} | WORDS | words
    tifffile.imwrite(path, CHANNELS, imagej=True, metadata=metadata)
    return path


def imagej_words(path: Path) -> dict[str, Any]:
    with tifffile.TiffFile(path) as tif:
        assert tif.is_imagej
        return tif.imagej_metadata or {}


@pytest.mark.parametrize("lazy", [False, True])
def test_a_composite_of_imagej_comes_back(tmp_path: Path, lazy: bool) -> None:
    volume = read(write_composite(tmp_path / "a.tif"), lazy=lazy)
    assert volume.metadata["channel_names"] == WORDS["Labels"]
    words = imagej_words(write(tmp_path / "b.tif", volume))
    tables = words.pop("LUTs")
    for before, after in zip(LUTS, tables, strict=True):
        np.testing.assert_array_equal(before, after)
    assert {key: words[key] for key in WORDS if key != "LUTs"} == {
        key: value for key, value in WORDS.items() if key != "LUTs"
    }


def test_of_another_quantity_range_and_calibration_are_left_out(tmp_path: Path) -> None:
    volume = read(write_composite(tmp_path / "a.tif"))
    metadata = {key: v for key, v in volume.metadata.items() if key != "contrast_limits"}
    residual = replace(volume, data=volume.data.astype(np.float32) - 500, metadata=metadata)
    words = imagej_words(write(tmp_path / "residual.tif", residual))
    assert not words.keys() & {"Ranges", "min", "max", "cf", "c0", "c1", "vunit"}
    assert words["Labels"] == WORDS["Labels"]


def test_of_fewer_planes_labels_and_tables_are_left_out(tmp_path: Path) -> None:
    volume = read(write_composite(tmp_path / "a.tif"))
    words = imagej_words(write(tmp_path / "b.tif", replace(volume, data=volume.data[:2])))
    assert not words.keys() & {"Labels", "LUTs", "Ranges"}
    assert words["Info"] == WORDS["Info"]


def test_words_beyond_ascii_are_written_as_imagej_does(tmp_path: Path) -> None:
    volume = read(write_composite(tmp_path / "a.tif"))
    volume.metadata["imagej"] |= {"vunit": "µmol", "stain": "Ångström"}
    words = imagej_words(write(tmp_path / "b.tif", volume))
    assert words["vunit"] == "\\u00B5mol"
    assert words["stain"] == "\\u00C5ngstr\\u00F6m"


@pytest.mark.parametrize("lazy", [False, True])
def test_signed_pixels_of_imagej_go_back_into_an_imagej_file(tmp_path: Path, lazy: bool) -> None:
    hounsfield = np.array([[-1000, 0], [40, 3000]], np.int16)
    stored = (hounsfield.astype(int) + 2**15).astype(np.uint16)
    words = {"cf": 0, "c0": -32768, "c1": 1, "vunit": "gray value", "min": 32608, "max": 33008}
    tifffile.imwrite(tmp_path / "a.tif", stored, imagej=True, metadata=words)
    volume = read(tmp_path / "a.tif", lazy=lazy)
    path = write(tmp_path / "b.tif", volume)
    assert {key: imagej_words(path)[key] for key in words} == words
    np.testing.assert_array_equal(tifffile.imread(path), stored)
    again = read(path)
    np.testing.assert_array_equal(again.data, hounsfield)
    assert again.metadata["contrast_limits"] == (-160, 240)


def test_words_of_imagej_survive_a_way_through_napari(tmp_path: Path) -> None:
    data = CHANNELS[0]
    words = {"Info": "notes", "cf": 0, "c0": -1000.0, "c1": 1.0, "vunit": "HU"}
    tifffile.imwrite(tmp_path / "a.tif", data, imagej=True, metadata=words)
    reader = get_reader(str(tmp_path / "a.tif"))
    assert reader is not None
    layer, meta, _ = reader(str(tmp_path / "a.tif"))[0]
    write_image(str(tmp_path / "b.tif"), layer, meta)
    found = imagej_words(tmp_path / "b.tif")
    assert {key: found[key] for key in words} == words


# --- OME ------------------------------------------------------------------------------------------

XML = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0"
 Creator="a microscope"><Instrument ID="Instrument:0"><Objective ID="Objective:0" LensNA="1.4"/>
</Instrument><Image ID="Image:7" Name="cells"><AcquisitionDate>2020-02-02T20:20:02
</AcquisitionDate><Description>three &lt;stains&gt; µ</Description>
<InstrumentRef ID="Instrument:0"/><ObjectiveSettings ID="Objective:0"/>
<StageLabel Name="A1" X="1" Y="2"/><Pixels ID="Pixels:7"
 DimensionOrder="XYZCT" Type="uint16" SignificantBits="12" BigEndian="false" SizeX="30" SizeY="24"
 SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="100" PhysicalSizeXUnit="nm" PhysicalSizeY="0.2">
<Channel ID="Channel:7:0" Name="DAPI" Color="-16776961" SamplesPerPixel="1"/>
<Channel ID="Channel:7:1" Name="GFP" EmissionWavelength="510" SamplesPerPixel="1"/>
<Channel ID="Channel:7:2" Name="RFP" SamplesPerPixel="1"/>
<TiffData IFD="0" PlaneCount="3"/>
<Plane TheZ="0" TheC="0" TheT="0" PositionX="12.5" ExposureTime="0.1"/>
<Plane TheZ="0" TheC="1" TheT="0" PositionX="12.5"/>
<Plane TheZ="0" TheC="2" TheT="0" PositionX="12.5"/></Pixels>
<ROIRef ID="ROI:0"/><AnnotationRef ID="Annotation:0"/></Image>
<StructuredAnnotations><CommentAnnotation ID="Annotation:0" Namespace="lab"><Value>kept</Value>
</CommentAnnotation></StructuredAnnotations><ROI ID="ROI:0"><Union/></ROI></OME>"""


def write_ome(path: Path, xml: str = XML) -> Path:
    tifffile.imwrite(
        path,
        CHANNELS,
        photometric="minisblack",
        description=xml.replace("\n", "").encode(),
        metadata=None,
        ome=False,
    )
    return path


def ome_of(path: Path) -> Any:
    with tifffile.TiffFile(path) as tif:
        assert tif.is_ome
        return ElementTree.fromstring(tif.ome_metadata or "")


@pytest.mark.parametrize("name", ["out.ome.tif", "out.OME.TIFF", "out.tif"])
@pytest.mark.parametrize("lazy", [False, True])
def test_all_of_the_xml_comes_back(tmp_path: Path, name: str, lazy: bool) -> None:
    volume = read(write_ome(tmp_path / "a.ome.tif"), lazy=lazy)
    path = write(tmp_path / name, volume)
    root = ome_of(path)
    image = root.find("{*}Image")
    assert image.findtext("{*}Description") == "three <stains> µ"
    assert image.find("{*}StageLabel").get("Name") == "A1"
    assert root.find("{*}Instrument/{*}Objective").get("LensNA") == "1.4"
    assert root.findtext("{*}StructuredAnnotations/{*}CommentAnnotation/{*}Value") == "kept"
    pixels = image.find("{*}Pixels")
    assert pixels.get("PhysicalSizeX") == "100.0"
    assert pixels.get("SignificantBits") == "12"
    assert [c.get("Name") for c in pixels.findall("{*}Channel")] == ["DAPI", "GFP", "RFP"]
    assert pixels.find("{*}Channel").get("Color") == "-16776961"
    assert [p.get("PositionX") for p in pixels.findall("{*}Plane")] == ["12.5"] * 3
    assert root.get("UUID") != "urn:uuid:0"
    again = read(path)
    np.testing.assert_array_equal(again.data, CHANNELS)
    assert (again.axes, again.scale, again.units) == (volume.axes, volume.scale, volume.units)
    assert again.metadata["channel_names"] == ["DAPI", "GFP", "RFP"]


def test_the_xml_of_other_pixels_is_true_of_them(tmp_path: Path) -> None:
    volume = read(write_ome(tmp_path / "a.ome.tif"))
    part = replace(volume, data=volume.data[:2].astype(np.float32), scale=(1.0, 0.5, 0.4))
    path = write(tmp_path / "b.ome.tif", part)
    pixels = ome_of(path).find("{*}Image/{*}Pixels")
    assert (pixels.get("Type"), pixels.get("SizeC")) == ("float", "2")
    assert pixels.get("SignificantBits") is None
    assert len(pixels.findall("{*}Channel")) == 2
    assert pixels.findall("{*}Plane") == []
    assert read(path).scale == (1.0, 0.5, 0.4)


def test_a_result_written_again_holds_one_note_of_ours(tmp_path: Path) -> None:
    volume = read(write_ome(tmp_path / "a.ome.tif"))
    for number, limits in enumerate([(0.0, 9.0), (1.0, 8.0)]):
        metadata = volume.metadata | {"contrast_limits": limits}
        path = write(tmp_path / f"{number}.ome.tif", replace(volume, metadata=metadata))
        volume = read(path)
        assert volume.metadata["contrast_limits"] == limits
    root = ome_of(path)
    assert len(root.findall("{*}StructuredAnnotations/{*}MapAnnotation")) == 1
    assert len(root.findall("{*}Image/{*}AnnotationRef")) == 2


@pytest.mark.parametrize("name", ["a.ome.tif", "a.OME.TIF", "a.ome.tiff"])
@pytest.mark.parametrize(
    ("dtype", "axes", "shape"),
    [
        ("uint8", "ZYX", (3, 8, 9)),
        ("uint16", "TZCYX", (2, 3, 2, 8, 9)),
        ("float32", "YX", (8, 9)),
        ("bool", "ZYX", (3, 8, 9)),
        ("uint8", "YXS", (8, 9, 3)),
        ("uint16", "HZYX", (2, 3, 8, 9)),
        ("int16", "CYX", (4, 1, 9)),
    ],
)
def test_a_name_that_promises_ome_is_kept(
    tmp_path: Path, name: str, dtype: str, axes: str, shape: tuple[int, ...]
) -> None:
    data = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    units = tuple({"X": "furlong", "Y": "furlong"}.get(axis, "pixel") for axis in axes)
    made = Volume(data, axes, tuple(-2.0 if a == "Y" else 1.0 for a in axes), units, "a")
    path = write(tmp_path / name, made)
    ome_of(path)
    for lazy in (False, True):
        volume = read(path, lazy=lazy)
        np.testing.assert_array_equal(np.asarray(volume.data), data)
        assert volume.data.dtype == dtype
        assert (volume.axes, volume.scale, volume.units) == (axes, made.scale, units)


@pytest.mark.parametrize(
    ("dtype", "axes", "shape", "reason"),
    [
        ("int64", "ZYX", (3, 8, 9), "pixels of type int64"),
        ("float16", "YX", (8, 9), "pixels of type float16"),
        ("uint8", "YXZ", (8, 9, 3), "the axes YXZ"),
        ("uint8", "VQTZCYX", (2, 2, 1, 2, 1, 8, 9), "the axes VQTZCYX"),
    ],
)
def test_what_ome_cannot_hold_is_refused_under_its_name(
    tmp_path: Path, dtype: str, axes: str, shape: tuple[int, ...], reason: str
) -> None:
    made = Volume(np.ones(shape, dtype), axes, (1.0,) * len(axes), ("pixel",) * len(axes), "a")
    with pytest.raises(FileFormatError, match=rf"OME-TIFF can't hold .*{reason}.*\.tif without"):
        write(tmp_path / "a.ome.tif", made)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(read(write(tmp_path / "a.tif", made)).data, made.data)


def test_a_file_that_was_misnamed_keeps_its_name_and_kind(tmp_path: Path) -> None:
    data = CHANNELS.astype(np.int64)
    tifffile.imwrite(tmp_path / "a.ome.tif", data, photometric="minisblack", ome=False)
    volume = read(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(read(write(tmp_path / "b.ome.tif", volume)).data, data)
