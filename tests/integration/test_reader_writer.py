"""Reading and writing TIFF through npe2, as napari does when a file is dropped or saved."""

from __future__ import annotations

from fnmatch import fnmatch
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import npe2
import numpy as np
import pydicom
import pytest
import tifffile
from napari.components import ViewerModel
from napari.layers import Image
from npe2 import PluginManifest

from napari_learned_diffusion.core.errors import FileFormatError, FileWriteError
from napari_learned_diffusion.files import (
    Volume,
    get_reader,
    read,
    supported_suffixes,
    write,
    write_dicom_series,
    write_image,
)
from napari_learned_diffusion.files._napari import _layer

if TYPE_CHECKING:
    from npe2._pytest_plugin import TestPluginManager

PLUGIN = "napari-learned-diffusion"
UM = "micrometer"


@pytest.fixture
def plugin(npe2pm: TestPluginManager) -> TestPluginManager:
    """npe2 with this plugin alone, as its manifest describes it."""
    manifest = PluginManifest.from_file(
        Path(str(package_files("napari_learned_diffusion"))) / "napari.yaml"
    )
    npe2pm.register(manifest)
    return npe2pm


def stack(path: Path, dtype: str = "uint16", axes: str = "ZYX", **kwargs: Any) -> Volume:
    """Write a small file with a different step on each axis."""
    lengths = {"Z": 3, "Y": 8, "X": 9, "C": 2, "T": 4, "S": 3}
    steps = {"Z": (2.0, UM), "Y": (0.5, UM), "X": (0.25, UM), "T": (1.5, "second")}
    shape = tuple(lengths[axis] for axis in axes)
    volume = Volume(
        data=np.random.default_rng(0).integers(0, 100, shape).astype(dtype),
        axes=axes,
        scale=tuple(steps.get(axis, (1.0, "pixel"))[0] for axis in axes),
        units=tuple(steps.get(axis, (1.0, "pixel"))[1] for axis in axes),
        name=path.stem,
        **kwargs,
    )
    write(path, volume)
    return volume


def layers_of(paths: list[Path], *, stacked: bool = False) -> list[Image]:
    """The layers that napari shows for files, opened by this plugin through npe2."""
    viewer = ViewerModel()
    names = [str(path) for path in paths]
    for data, meta, kind in npe2.read(names, stack=stacked, plugin_name=PLUGIN):
        assert kind == "image"
        viewer.add_image(data, **meta)
    return list(viewer.layers)


def unit_names(layer: Image) -> tuple[str, ...]:
    return tuple(str(unit) for unit in layer.units)


def test_a_dropped_tiff_keeps_its_voxel_size(plugin: TestPluginManager, tmp_path: Path) -> None:
    volume = stack(tmp_path / "stack.tif")
    (layer,) = layers_of([tmp_path / "stack.tif"])
    np.testing.assert_array_equal(layer.data, volume.data)
    assert layer.name == "stack"
    assert tuple(layer.scale) == (2.0, 0.5, 0.25)
    assert unit_names(layer) == (UM, UM, UM)
    assert layer.axis_labels == ("z", "y", "x")
    assert not layer.rgb


def test_unknown_steps_stay_pixels_beside_known_ones(
    plugin: TestPluginManager, tmp_path: Path
) -> None:
    data = np.zeros((3, 8, 9), np.uint8)
    volume = Volume(data, "ZYX", (1.0, 0.5, 0.5), ("pixel", UM, UM), "")
    write(tmp_path / "a.tif", volume)
    viewer = ViewerModel()
    ((data, meta, _),) = npe2.read([str(tmp_path / "a.tif")], stack=False, plugin_name=PLUGIN)
    viewer.add_image(data, **meta)
    assert unit_names(viewer.layers[0]) == ("pixel", UM, UM)
    # The viewer goes on measuring, too, since each axis has one kind of unit.
    assert viewer.layers.units is not None


@pytest.mark.parametrize("axes", ["YXS", "SYX", "ZYXS"])
def test_colour_becomes_one_rgb_layer(plugin: TestPluginManager, tmp_path: Path, axes: str) -> None:
    volume = stack(tmp_path / "colour.tif", "uint8", axes)
    (layer,) = layers_of([tmp_path / "colour.tif"])
    assert layer.rgb
    np.testing.assert_array_equal(layer.data, np.moveaxis(volume.data, axes.index("S"), -1))
    assert tuple(layer.scale[-2:]) == (0.5, 0.25)
    assert layer.axis_labels[-2:] == ("y", "x")


@pytest.mark.parametrize("lazy_above", [0, 2**40])
def test_channels_become_layers(
    plugin: TestPluginManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lazy_above: int,
) -> None:
    monkeypatch.setattr("napari_learned_diffusion.files._lazy.LAZY_ABOVE", lazy_above)
    metadata = {"channel_names": ["nuclei", "actin"]}
    volume = stack(tmp_path / "cell.tif", "int16", "TCYX", metadata=metadata)
    layers = layers_of([tmp_path / "cell.tif"])
    assert [layer.name for layer in layers] == ["cell nuclei", "cell actin"]
    for channel, layer in enumerate(layers):
        np.testing.assert_array_equal(np.asarray(layer.data), volume.data[:, channel])
        assert tuple(layer.scale) == (1.5, 0.5, 0.25)
        assert unit_names(layer) == ("second", UM, UM)
        assert layer.axis_labels == ("t", "y", "x")


def test_channel_names_that_do_not_fit_are_left_out() -> None:
    data = np.zeros((2, 8, 9), np.uint8)
    metadata = {"channel_names": ["only one"]}
    volume = Volume(data, "CYX", (1.0,) * 3, ("pixel",) * 3, "a", metadata)
    _, meta, _ = _layer(volume)
    assert meta["name"] == ["a channel 0", "a channel 1"]


def test_a_spectrum_stays_one_layer(plugin: TestPluginManager, tmp_path: Path) -> None:
    data = np.zeros((31, 8, 9), np.int16)
    write(tmp_path / "a.tif", Volume(data, "CYX", (1.0,) * 3, ("pixel",) * 3, ""))
    (layer,) = layers_of([tmp_path / "a.tif"])
    assert layer.data.shape == data.shape


def test_contrast_limits_are_those_of_the_file(plugin: TestPluginManager, tmp_path: Path) -> None:
    stack(tmp_path / "a.tif", metadata={"contrast_limits": (10, 60)})
    (layer,) = layers_of([tmp_path / "a.tif"])
    assert tuple(layer.contrast_limits) == (10, 60)


@pytest.mark.parametrize("compressed", [False, True])
def test_files_are_stacked_lazily(
    plugin: TestPluginManager, tmp_path: Path, compressed: bool
) -> None:
    paths = [tmp_path / f"slice{i}.tif" for i in range(4)]
    planes = np.arange(4 * 8 * 9, dtype=np.uint16).reshape(4, 8, 9)
    for path, plane in zip(paths, planes, strict=True):
        volume = Volume(plane, "YX", (0.5, 0.25), (UM, UM), "")
        write(path, volume, compression="deflate" if compressed else None)
    (layer,) = layers_of(paths, stacked=True)
    assert isinstance(layer.data, da.Array)
    assert layer.data.chunksize == (1, 8, 9)
    np.testing.assert_array_equal(layer.data.compute(), planes)
    assert layer.axis_labels == ("z", "y", "x")
    assert unit_names(layer) == ("pixel", UM, UM)


def test_a_list_of_one_file_is_that_file(plugin: TestPluginManager, tmp_path: Path) -> None:
    stack(tmp_path / "a.tif")
    (layer,) = layers_of([tmp_path / "a.tif"], stacked=True)
    assert layer.data.shape == (3, 8, 9)
    assert tuple(layer.scale) == (2.0, 0.5, 0.25)


def test_files_that_differ_are_not_stacked(plugin: TestPluginManager, tmp_path: Path) -> None:
    stack(tmp_path / "a.tif", "uint16")
    stack(tmp_path / "b.tif", "int16")
    with pytest.raises(FileFormatError, match="open them one by one"):
        layers_of([tmp_path / "a.tif", tmp_path / "b.tif"], stacked=True)


def test_only_known_suffixes_are_taken(tmp_path: Path) -> None:
    assert get_reader("a.TIF") is not None
    assert get_reader(tmp_path / "a.ome.tiff") is not None
    assert get_reader(["a.tif", "b.tiff"]) is not None
    assert get_reader("a.png") is None
    assert get_reader(["a.tif", "b.png"]) is None
    assert get_reader([]) is None


def test_a_broken_file_is_an_error_in_words(plugin: TestPluginManager, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(FileFormatError, match="is empty"):
        layers_of([tmp_path / "a.tif"])


# --- writing --------------------------------------------------------------------------------------


def save(layer: Image, path: Path) -> None:
    written = npe2.write(str(path), [layer], plugin_name=PLUGIN)
    assert written == [str(path)]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "int64"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_saved_layer_comes_back(
    plugin: TestPluginManager, tmp_path: Path, dtype: str, lazy: bool
) -> None:
    data = np.random.default_rng(0).uniform(0, 90, (4, 3, 8, 9)).astype(dtype)
    layer = Image(
        da.from_array(data, chunks=(1, 1, 8, 9)) if lazy else data,
        scale=(1.5, 2.0, 0.5, 0.25),
        units=("second", UM, UM, UM),
        axis_labels=("t", "z", "y", "x"),
        translate=(0, 10, 20, 30),
        contrast_limits=(5, 50),
    )
    save(layer, tmp_path / "saved.tif")
    (back,) = layers_of([tmp_path / "saved.tif"])
    assert back.data.dtype == dtype
    np.testing.assert_array_equal(back.data, data)
    np.testing.assert_array_equal(back.scale, layer.scale)
    np.testing.assert_array_equal(back.translate, layer.translate)
    np.testing.assert_array_equal(back.contrast_limits, layer.contrast_limits)
    assert back.units == layer.units
    assert back.axis_labels == layer.axis_labels


def test_a_layer_that_lies_askew_comes_back_askew(
    plugin: TestPluginManager, tmp_path: Path
) -> None:
    affine = np.array([[0.0, -1.0, 4.0], [1.0, 0.0, 5.0], [0.0, 0.0, 1.0]])
    layer = Image(np.zeros((8, 9), np.uint8), affine=affine, rotate=30, scale=(2, 2), shear=[0.5])
    save(layer, tmp_path / "a.tif")
    (back,) = layers_of([tmp_path / "a.tif"])
    points = np.array([[0, 0], [7, 0], [0, 8], [3, 4]])
    for point in points:
        np.testing.assert_allclose(back.data_to_world(point), layer.data_to_world(point))


def test_defaults_of_napari_become_plain_axes(plugin: TestPluginManager, tmp_path: Path) -> None:
    save(Image(np.zeros((3, 8, 9), np.uint16)), tmp_path / "a.tif")
    volume = read(tmp_path / "a.tif")
    assert volume.axes == "ZYX"
    assert volume.units == ("pixel",) * 3
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        assert tif.is_imagej


def test_rgb_and_multiscale_layers_are_written(plugin: TestPluginManager, tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    save(Image(rgb, rgb=True, scale=(0.5, 0.5), units=(UM, UM)), tmp_path / "rgb.tif")
    (back,) = layers_of([tmp_path / "rgb.tif"])
    assert back.rgb
    np.testing.assert_array_equal(back.data, rgb)
    levels = [np.ones((16, 18), np.uint8), np.ones((8, 9), np.uint8)]
    save(Image(levels, multiscale=True), tmp_path / "levels.tif")
    assert read(tmp_path / "levels.tif").data.shape == (16, 18)


def test_arrays_that_are_neither_numpy_nor_dask_are_written(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    array = zarr.array(np.arange(3 * 8 * 9, dtype=np.uint16).reshape(3, 8, 9))
    assert write_image(str(tmp_path / "a.tif"), array, {}) == [str(tmp_path / "a.tif")]
    np.testing.assert_array_equal(read(tmp_path / "a.tif").data, array[:])


def test_saving_over_the_open_file_is_refused(plugin: TestPluginManager, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    stack(path)
    before = path.read_bytes()
    layer = Image(read(path, lazy=True).data)
    with pytest.raises(FileWriteError, match="Choose another name"):
        npe2.write(str(path), [layer], plugin_name=PLUGIN)
    assert path.read_bytes() == before


def test_the_manifest_knows_every_suffix(plugin: TestPluginManager) -> None:
    manifest = plugin.get_manifest(PLUGIN)
    (reader,) = manifest.contributions.readers or []
    assert reader.accepts_directories
    for suffix in supported_suffixes():
        if suffix in (".nii", ".nii.gz", ".ome.zarr", ".zarr"):
            continue  # napari has well-kept readers for these
        assert any(fnmatch(f"stack{suffix}", pattern) for pattern in reader.filename_patterns)
    for writer in manifest.contributions.writers or []:
        assert set(writer.filename_extensions) <= set(supported_suffixes())


def test_the_manifest_names_what_exists(plugin: TestPluginManager) -> None:
    for name, function in (
        ("read", get_reader),
        ("write", write_image),
        ("write_dicom", write_dicom_series),
    ):
        assert plugin.commands.get(f"{PLUGIN}.{name}") is function


def test_an_mrc_keeps_its_header_through_napari(plugin: TestPluginManager, tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(3, 8, 9)).astype(np.float32)
    made = Volume(data, "ZYX", (4.0, 2.0, 2.0), ("angstrom",) * 3, "")
    write(tmp_path / "a.mrc", made)
    (layer,) = layers_of([tmp_path / "a.mrc"])
    assert unit_names(layer) == ("angstrom",) * 3
    npe2.write(str(tmp_path / "b.mrc"), [layer], plugin_name=PLUGIN)
    assert (tmp_path / "b.mrc").stat().st_size == (tmp_path / "a.mrc").stat().st_size
    copy = read(tmp_path / "b.mrc")
    np.testing.assert_array_equal(copy.data, data)
    assert copy.scale == (4.0, 2.0, 2.0)


def test_a_dropped_dicom_folder_is_saved_as_a_derived_series(
    plugin: TestPluginManager, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).integers(0, 100, (3, 8, 9)).astype(np.int16)
    made = Volume(data, "ZYX", (4.0, 2.0, 2.0), ("millimeter",) * 3, "")
    write(tmp_path / "ct", made, format="dicom")
    (layer,) = layers_of([tmp_path / "ct"])
    np.testing.assert_array_equal(layer.data, data)
    assert tuple(layer.scale) == (4.0, 2.0, 2.0)
    plugin.commands.execute(
        f"{PLUGIN}.write_dicom", args=(str(tmp_path / "out"), *layer.as_layer_data_tuple()[:2])
    )
    np.testing.assert_array_equal(read(tmp_path / "out").data, data)
    assert "DERIVED" in pydicom.dcmread(tmp_path / "out" / "000001.dcm").ImageType


def test_a_folder_without_images_is_left_to_others(tmp_path: Path) -> None:
    assert get_reader(tmp_path) is None
