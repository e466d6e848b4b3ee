"""Several images in one TIFF: none is left out without a word, and they come back as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write, write_image

POSITIONS = np.random.default_rng(0).integers(0, 1000, (3, 20, 30)).astype(np.uint16)


def write_positions(path: Path, images: Sequence[NDArray[Any]] = tuple(POSITIONS)) -> Path:
    """An OME-TIFF of one image a position, as microscopes write it."""
    with tifffile.TiffWriter(path, ome=True) as tif:
        for number, image in enumerate(images):
            words = {
                "axes": "ZYX"[-image.ndim :],
                "Name": f"Pos{number}",
                "PhysicalSizeX": 0.1,
                "PhysicalSizeY": 0.2,
                "Plane": {"PositionX": [100.5 * number + 1] * (image.size // image[0].size)},
            }
            if image.ndim == 2:
                words["Plane"] = {"PositionX": [100.5 * number + 1]}
            else:
                del words["Plane"]
            tif.write(image, photometric="minisblack", metadata=words)
    return path


def append_all(path: Path, images: Sequence[NDArray[Any]], **options: Any) -> Path:
    for number, image in enumerate(images):
        tifffile.imwrite(path, image, append=number > 0, photometric="minisblack", **options)
    return path


def assert_lazy_agrees(path: Path, volume: Volume) -> None:
    lazy = read(path, lazy=True)
    assert isinstance(lazy.data, da.Array)
    np.testing.assert_array_equal(lazy.data.compute(), volume.data)
    assert (lazy.axes, lazy.scale, lazy.name) == (volume.axes, volume.scale, volume.name)


def test_positions_of_one_size_are_a_stack(tmp_path: Path) -> None:
    path = write_positions(tmp_path / "plate.ome.tif")
    volume = read(path)
    np.testing.assert_array_equal(volume.data, POSITIONS)
    assert (volume.axes, volume.scale, volume.name) == ("PYX", (1.0, 0.2, 0.1), "plate")
    assert volume.metadata["series_count"] == 3
    assert "notes" not in volume.metadata
    assert_lazy_agrees(path, volume)


@pytest.mark.parametrize("name", ["out.ome.tif", "out.tif"])
@pytest.mark.parametrize("lazy", [False, True])
def test_positions_come_back_as_positions(tmp_path: Path, name: str, lazy: bool) -> None:
    volume = read(write_positions(tmp_path / "plate.ome.tif"), lazy=lazy)
    path = write(tmp_path / name, replace(volume, data=volume.data[:, ::-1]))
    with tifffile.TiffFile(path) as tif:
        assert [series.name for series in tif.series] == ["Pos0", "Pos1", "Pos2"]
        for series, position in zip(tif.series, POSITIONS, strict=True):
            np.testing.assert_array_equal(series.asarray(), position[::-1])
        images = tifffile.xml2dict(tif.ome_metadata or "")["OME"]["Image"]
    assert [image["Pixels"]["Plane"]["PositionX"] for image in images] == [1.0, 101.5, 202.0]
    assert_lazy_agrees(path, read(path))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("axes", ["YX", "ZYX"])
def test_files_written_by_append_are_a_stack_and_come_back(
    tmp_path: Path, compression: str | None, axes: str
) -> None:
    images = [np.stack([image] * 2) if axes == "ZYX" else image for image in POSITIONS]
    options = {"compression": compression, "metadata": {"axes": axes}}
    path = append_all(tmp_path / "movie.tif", images, **options)
    volume = read(path)
    assert volume.axes == "P" + axes
    np.testing.assert_array_equal(volume.data, images)
    assert_lazy_agrees(path, volume)
    copy = write(tmp_path / "out.tif", volume)
    with tifffile.TiffFile(copy) as tif:
        assert [series.shape for series in tif.series] == [images[0].shape] * 3
    np.testing.assert_array_equal(read(copy).data, images)


def test_a_stack_goes_into_other_files_as_one_image(tmp_path: Path) -> None:
    volume = read(write_positions(tmp_path / "plate.ome.tif"))
    moved = replace(volume, scale=(5.0, *volume.scale[1:]))
    with tifffile.TiffFile(write(tmp_path / "depth.tif", moved)) as tif:
        assert [series.shape for series in tif.series] == [POSITIONS.shape]


def test_images_that_do_not_fit_together_are_told_and_chosen(tmp_path: Path) -> None:
    images = [POSITIONS[0][:10], POSITIONS[1], POSITIONS[2][:, :10]]
    path = append_all(tmp_path / "mixed.tif", images)
    volume = read(path)
    np.testing.assert_array_equal(volume.data, POSITIONS[1])
    (note,) = volume.metadata["notes"]
    assert "3 images" in note
    assert "series 1" in note
    assert "Choose 0, 2 with --series" in note
    for number, image in enumerate(images):
        np.testing.assert_array_equal(read(path, series=number).data, image)
    with pytest.raises(FileFormatError, match="no series 3"):
        read(path, series=3)


@pytest.mark.parametrize(
    "second",
    [
        {"dtype": np.int16},
        {"photometric": "miniswhite"},
        {"metadata": {"axes": "ZX"}},
        {"resolution": (7, 7), "resolutionunit": "CENTIMETER"},
        {"extratags": [(274, "H", 1, 3, True)]},
    ],
)
def test_images_of_another_meaning_are_not_stacked(tmp_path: Path, second: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, POSITIONS[0], photometric="minisblack", metadata={"axes": "YX"})
    options = {"photometric": "minisblack", "metadata": {"axes": "YX"}} | second
    image = POSITIONS[1].astype(options.pop("dtype", np.uint16))
    tifffile.imwrite(path, image, append=True, **options)
    volume = read(path)
    assert volume.data.ndim == 2
    assert volume.metadata["other_series"] == [1]


def test_thumbnails_labels_and_levels_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tif:
        image = POSITIONS[0]
        tif.write(image, metadata={"axes": "YX", "Name": "slide"}, subifds=1)
        tif.write(image[::2, ::2], subfiletype=1)
        tif.write(image[:5, :5], metadata={"axes": "YX", "Name": "label image"})
        tif.write(image[:5, :6], metadata={"axes": "YX", "Name": "Thumbnail"})
    volume = read(path)
    np.testing.assert_array_equal(volume.data, POSITIONS[0])
    assert volume.metadata["notes"] == ["Passed over in slide.ome.tif: label image, Thumbnail."]
    assert "other_series" not in volume.metadata
    assert_lazy_agrees(path, volume)


def test_reduced_images_are_passed_over_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(POSITIONS[0])
        tif.write(POSITIONS[0][:7, :7], subfiletype=1)
    volume = read(path)
    np.testing.assert_array_equal(volume.data, POSITIONS[0])
    assert "notes" not in volume.metadata


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_of_files_that_belong_together_each_gives_its_own_position(
    tmp_path: Path, compression: str | None
) -> None:
    pixels = '<Pixels ID="Pixels:{0}" DimensionOrder="XYCZT" Type="uint16" SizeX="30" SizeY="20" '
    pixels += 'SizeC="1" SizeZ="1" SizeT="1"><Channel ID="Channel:{0}:0" SamplesPerPixel="1"/>'
    pixels += '<TiffData IFD="0" PlaneCount="1"><UUID FileName="pos{0}.ome.tif">urn:uuid:{0}</UUID>'
    pixels += "</TiffData></Pixels>"
    images = "".join(
        f'<Image ID="Image:{k}" Name="Pos{k}">{pixels.format(k)}</Image>' for k in range(3)
    )
    for number, position in enumerate(POSITIONS):
        xml = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:'
        xml += f'{number}">{images}</OME>'
        tifffile.imwrite(
            tmp_path / f"pos{number}.ome.tif",
            position,
            description=xml,
            metadata=None,
            compression=compression,
            ome=False,
        )
    for number, position in enumerate(POSITIONS):
        path = tmp_path / f"pos{number}.ome.tif"
        np.testing.assert_array_equal(read(path).data, position)
        np.testing.assert_array_equal(read(path, lazy=True).data, position)
        for other in range(3):
            for lazy in (False, True):
                data = read(path, series=other, lazy=lazy).data
                np.testing.assert_array_equal(np.asarray(data), POSITIONS[other])


def test_planes_that_the_description_does_not_name_are_told(tmp_path: Path) -> None:
    path = write_positions(tmp_path / "a.ome.tif")
    xml = tifffile.tiffcomment(path)
    last = xml[xml.index('<Image ID="Image:2"') : xml.index("</OME>")]
    tifffile.tiffcomment(path, xml.replace(last, "").encode())
    volume = read(path)
    np.testing.assert_array_equal(volume.data, POSITIONS[:2])
    assert volume.metadata["notes"] == [
        "Left out of a.ome.tif: 1 plane that its description doesn't name."
    ]


# --- in napari ------------------------------------------------------------------------------------


def layers_of(path: Path | list[Path]) -> list[tuple[Any, dict[str, Any], str]]:
    reader = get_reader([str(p) for p in path] if isinstance(path, list) else str(path))
    assert reader is not None
    return reader([str(p) for p in path] if isinstance(path, list) else str(path))


def test_positions_are_one_layer_and_are_saved_as_positions(tmp_path: Path) -> None:
    ((data, meta, _),) = layers_of(write_positions(tmp_path / "plate.ome.tif"))
    assert data.shape == POSITIONS.shape
    assert meta["axis_labels"] == ("p", "y", "x")
    write_image(str(tmp_path / "out.tif"), data, meta)
    with tifffile.TiffFile(tmp_path / "out.tif") as tif:
        assert [series.name for series in tif.series] == ["Pos0", "Pos1", "Pos2"]


def test_images_that_do_not_fit_together_are_layers_in_their_order(tmp_path: Path) -> None:
    images = [POSITIONS[0][:10], POSITIONS[1], POSITIONS[2][:, :10]]
    path = append_all(tmp_path / "mixed.tif", images)
    layers = layers_of(path)
    assert [meta["name"] for _, meta, _ in layers] == ["mixed [0]", "mixed [1]", "mixed [2]"]
    for (data, _, _), image in zip(layers, images, strict=True):
        np.testing.assert_array_equal(data, image)
    with pytest.raises(FileFormatError, match="open it by itself"):
        layers_of([path, path])
