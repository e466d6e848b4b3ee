"""MRC, DICOM, NIfTI, OME-Zarr in and out: pixels, axes, voxel size, units, headers survive."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import mrcfile
import nibabel
import numpy as np
import pydicom
import pytest
import zarr
from nibabel.testing import data_path
from pydicom.data import get_testdata_file

from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
    MissingDependencyError,
)
from napari_learned_diffusion.files import Volume, read, write

MM = "millimeter"
NM = "nanometer"


def make_volume(dtype: str = "int16", axes: str = "ZYX", unit: str = MM, **changes: Any) -> Volume:
    lengths = {"X": 9, "Y": 7, "Z": 4, "T": 3, "C": 2}
    steps = {"X": 0.5, "Y": 0.75, "Z": 2.5, "T": 1.5, "C": 1.0}
    units = {"T": "second", "C": "pixel"}
    data = np.random.default_rng(0).integers(0, 100, [lengths[a] for a in axes]).astype(dtype)
    given = {
        "data": data,
        "axes": axes,
        "scale": tuple(steps[a] for a in axes),
        "units": tuple(units.get(a, unit) for a in axes),
        "name": "stack",
    }
    return Volume(**given | changes)


def assert_same(actual: Volume, expected: Volume) -> None:
    np.testing.assert_array_equal(np.asarray(actual.data), np.asarray(expected.data))
    assert actual.data.dtype == expected.data.dtype
    assert actual.data.dtype.isnative
    assert actual.axes == expected.axes
    assert actual.scale == pytest.approx(expected.scale)
    assert actual.units == expected.units


def cut(path: Path, share: float = 0.7) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


# --- what is true of every format -----------------------------------------------------------------

NAMES = ["a.mrc", "a.nii", "a.nii.gz", "a.ome.zarr", "a"]


def save(path: Path, volume: Volume, **options: Any) -> Path:
    return write(path, volume, format=None if path.suffix else "dicom", **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lazy", [False, True])
def test_round_trip(tmp_path: Path, name: str, lazy: bool) -> None:
    unit = "angstrom" if name == "a.mrc" else MM
    volume = make_volume(unit=unit)
    path = save(tmp_path / name, volume)
    found = read(path, lazy=lazy)
    assert_same(found, volume)
    assert isinstance(found.data, da.Array) == lazy
    assert found.name == "a"
    again = save(tmp_path / f"again-{name}", found)
    assert_same(read(again), volume)


@pytest.mark.parametrize("name", NAMES)
def test_dask_arrays_are_written(tmp_path: Path, name: str) -> None:
    volume = make_volume(unit="angstrom" if name == "a.mrc" else MM)
    lazy = replace(volume, data=da.from_array(volume.data, chunks=(2, 7, 9)))
    assert_same(read(save(tmp_path / name, lazy)), volume)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_overwritten_without_leave(tmp_path: Path, name: str) -> None:
    volume = make_volume()
    path = save(tmp_path / name, volume)
    with pytest.raises(FileWriteError, match="exists"):
        save(path, volume)
    other = replace(volume, data=volume.data + 1)
    save(path, other, overwrite=True)
    np.testing.assert_array_equal(read(path).data, other.data)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_the_image_that_is_still_being_read_is_not_replaced(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, make_volume())
    with pytest.raises(FileWriteError, match="still being read"):
        save(path, read(path, lazy=True), overwrite=True)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.mrc", "mrcfile", "mrc"), ("a.nii", "nibabel", "nifti"), ("a", "pydicom", "dicom")],
)
def test_a_missing_library_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    path = save(tmp_path / name, make_volume())
    monkeypatch.setitem(__import__("sys").modules, module, None)
    for action in (lambda: read(path), lambda: save(tmp_path / f"b-{name}", make_volume())):
        with pytest.raises(MissingDependencyError, match=rf"{module}.*diffusion\[{extra}\]"):
            action()


def test_compression_is_for_tiff(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingError, match="for TIFF"):
        write(tmp_path / "a.mrc", make_volume(), compression="zstd")


@pytest.mark.parametrize("name", ["a.mrc", "a.nii", "a.nii.gz", "a.dcm"])
def test_wrong_magic(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is no image at all " * 200)
    with pytest.raises(FileFormatError, match="copy or export it again"):
        read(path)


@pytest.mark.parametrize("name", ["a.mrc", "a.nii", "a.nii.gz", "a.dcm"])
def test_truncated(tmp_path: Path, name: str) -> None:
    axes = "YX" if name == "a.dcm" else "ZYX"
    noise = np.random.default_rng(0).integers(0, 30000, (40,) * len(axes)).astype("int16")
    path = cut(write(tmp_path / name, replace(make_volume(axes=axes), data=noise)))
    with pytest.raises(FileFormatError, match=r"truncated|damaged"):
        read(path)


@pytest.mark.parametrize(
    ("name", "volume", "reason"),
    [
        ("a.mrc", make_volume("float64"), "can't hold|would cut"),
        ("a.mrc", make_volume(axes="TZYX"), "at most three axes"),
        ("a.nii", make_volume("float16"), "can't hold"),
        ("a.nii", make_volume(axes="CYX"), "in this order"),
        ("a.ome.zarr", replace(make_volume(), axes="QYX"), "Rename"),
        ("a", make_volume("float32"), "whole numbers"),
        ("a", make_volume(axes="TYX"), "ZYX"),
        ("a.dcm", make_volume(), "a folder of files"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, name: str, volume: Volume, reason: str) -> None:
    with pytest.raises(FileFormatError, match=reason):
        save(tmp_path / name, volume)
    assert list(tmp_path.iterdir()) == []


# --- MRC ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float16", "float32"])
@pytest.mark.parametrize("axes", ["YX", "ZYX"])
def test_mrc_modes(tmp_path: Path, dtype: str, axes: str) -> None:
    volume = make_volume(dtype, axes, "angstrom")
    path = write(tmp_path / "a.mrc", volume)
    assert_same(read(path), volume)
    assert dtype == "float16" or mrcfile.validate(path)  # mrcfile overflows while it validates


def test_mrc_voxel_size_is_in_angstroms(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mrc", make_volume("float32", unit=NM))
    found = read(path)
    assert found.scale == pytest.approx((25.0, 7.5, 5.0))
    assert set(found.units) == {"angstrom"}


def test_mrc_header_and_extended_header_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "a.mrc"
    extended = np.frombuffer(b"tilt angles and more".ljust(160), "V1")
    with mrcfile.new(source) as mrc:
        mrc.set_data(np.zeros((3, 4, 5), "float32"))
        mrc.set_extended_header(extended)
        mrc.header.exttyp = b"SERI"
        mrc.header.origin.x = 12.5
        mrc.header.nxstart = -7
        mrc.add_label("from the microscope")
    volume = read(source)
    noted = replace(volume, data=volume.data + 2, metadata=volume.metadata | {"processing": "note"})
    with mrcfile.open(write(tmp_path / "b.mrc", noted)) as mrc:
        assert mrc.extended_header.tobytes() == extended.tobytes()
        assert (mrc.header.exttyp, mrc.header.origin.x, mrc.header.nxstart) == (b"SERI", 12.5, -7)
        assert [label.split()[0] for label in mrc.get_labels()][-2:] == ["from", "note"]
        assert mrc.header.dmin == mrc.header.dmax == mrc.header.dmean == 2


def test_mrc_of_the_other_byte_order_and_axis_order(tmp_path: Path) -> None:
    source = tmp_path / "a.map"
    data = np.arange(60, dtype=">f4").reshape(3, 4, 5)
    with mrcfile.new(source) as mrc:
        mrc.set_data(data)
        mrc.header.mapc, mrc.header.mapr, mrc.header.maps = 3, 1, 2
        mrc.voxel_size = (1.0, 2.0, 3.0)
    for lazy in (False, True):
        volume = read(source, lazy=lazy)
        assert volume.axes == "YXZ"
        assert dict(zip(volume.axes, volume.scale, strict=True)) == {"X": 1.0, "Y": 2.0, "Z": 3.0}
        copy = write(tmp_path / "b.map", volume, overwrite=True)
        with mrcfile.open(copy) as mrc:
            np.testing.assert_array_equal(mrc.data, data)
            assert (mrc.header.mapc, mrc.header.mapr, mrc.header.maps) == (3, 1, 2)


# --- NIfTI ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("axes", ["YX", "ZYX", "TZYX"])
def test_nifti_types(tmp_path: Path, dtype: str, axes: str) -> None:
    volume = make_volume(dtype, axes)
    assert_same(read(write(tmp_path / "a.nii.gz", volume)), volume)


@pytest.mark.parametrize("lazy", [False, True])
def test_nifti_of_nibabel(tmp_path: Path, lazy: bool) -> None:
    source = Path(data_path) / "example4d.nii.gz"
    volume = read(source, lazy=lazy)
    assert volume.axes == "TZYX"
    assert volume.units == ("second", MM, MM, MM)
    copy = nibabel.load(write(tmp_path / "copy.nii.gz", volume))
    original = nibabel.load(source)
    np.testing.assert_array_equal(copy.get_fdata(), original.get_fdata())
    np.testing.assert_array_equal(copy.affine, original.affine)
    assert copy.get_data_dtype() == original.get_data_dtype()
    assert copy.header.extensions == original.header.extensions


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"), [(2, -1000, "int32"), (0.1, 3, "float32")]
)
@pytest.mark.parametrize("lazy", [False, True])
def test_nifti_scaling(
    tmp_path: Path, endianness: str, slope: float, intercept: float, dtype: str, lazy: bool
) -> None:
    stored = np.arange(60, dtype=f"{endianness}i2").reshape(3, 4, 5)
    header = nibabel.Nifti1Header(endianness=endianness)
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header.set_slope_inter(slope, intercept)
    source = tmp_path / "a.nii"
    with source.open("wb") as stream:
        header.write_to(stream)
        stream.write(b"\0" * (header.get_data_offset() - stream.tell()) + stored.tobytes("F"))
    volume = read(source, lazy=lazy)
    assert volume.data.dtype == dtype
    np.testing.assert_allclose(np.asarray(volume.data), slope * stored.T + intercept, rtol=1e-6)
    copy = nibabel.load(write(tmp_path / "b.nii", volume))
    np.testing.assert_array_equal(np.asarray(copy.dataobj.get_unscaled()), stored)
    assert (copy.dataobj.slope, copy.dataobj.inter) == pytest.approx((slope, intercept))


# --- OME-Zarr -------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["YX", "ZYX", "TCZYX"])
def test_zarr_axes(tmp_path: Path, axes: str) -> None:
    volume = make_volume("uint16", axes, "micrometer")
    assert_same(read(write(tmp_path / "a.zarr", volume)), volume)


def test_zarr_has_levels_of_half_the_size(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 1000, (2, 600, 900)).astype("uint16")
    path = write(tmp_path / "a.ome.zarr", make_volume(data=data))
    group = zarr.open_group(path, mode="r")
    (image,) = group.attrs["ome"]["multiscales"]
    levels = [group[level["path"]] for level in image["datasets"]]
    assert [level.shape for level in levels] == [(2, 600, 900), (2, 300, 450), (2, 150, 225)]
    scales = [level["coordinateTransformations"][0]["scale"] for level in image["datasets"]]
    assert scales == [[2.5, 0.75, 0.5], [2.5, 1.5, 1.0], [2.5, 3.0, 2.0]]
    means = data.reshape(2, 300, 2, 450, 2).mean((2, 4))
    np.testing.assert_array_equal(levels[1][...], np.rint(means))


def test_zarr_of_version_0_4(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "a.zarr", zarr_format=2)
    data = np.arange(24, dtype=">u2").reshape(2, 3, 4)
    group.create_array("0", data=data, chunks=(2, 2, 2))
    scale = [{"type": "scale", "scale": [3.0, 0.5, 0.5]}]
    axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    for lazy in (False, True):
        volume = read(tmp_path / "a.zarr", lazy=lazy)
        np.testing.assert_array_equal(np.asarray(volume.data), data)
        assert volume.data.dtype == np.uint16
        assert (volume.axes, volume.scale) == ("ZYX", (3.0, 0.5, 0.5))


def test_zarr_without_an_image(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "a.zarr")
    with pytest.raises(FileFormatError, match="without an image"):
        read(tmp_path / "a.zarr")


# --- DICOM ----------------------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Five slices of a CT in a folder, their names against their order."""
    folder = tmp_path / "ct"
    folder.mkdir()
    for number in range(5):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        dataset.ImagePositionPatient = [0, 0, 2.5 * number]
        dataset.InstanceNumber = number + 1
        dataset.SOPInstanceUID = f"1.2.3.{number}"
        dataset.PixelData = (dataset.pixel_array + number).tobytes()
        dataset.save_as(folder / f"{9 - number}.dcm")
    (folder / "DICOMDIR").write_bytes(b"")
    return folder


def edit(path: Path, change: Callable[[Any], None]) -> None:
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


@pytest.mark.parametrize("lazy", [False, True])
def test_dicom_is_ordered_and_in_hounsfield_units(series: Path, lazy: bool) -> None:
    volume = read(series, lazy=lazy)
    stored = pydicom.dcmread(get_testdata_file("CT_small.dcm")).pixel_array.astype(int)
    expected = np.stack([stored + number - 1024 for number in range(5)])
    np.testing.assert_array_equal(np.asarray(volume.data), expected)
    assert volume.data.dtype.kind == "i"
    assert volume.axes == "ZYX"
    assert volume.scale == pytest.approx((2.5, 0.661468, 0.661468))
    assert set(volume.units) == {MM}
    assert volume.metadata["notes"] == []


def test_dicom_derived_series(series: Path, tmp_path: Path) -> None:
    volume = read(series, lazy=True)
    noted = replace(volume, data=volume.data + 7, metadata=volume.metadata | {"processing": "note"})
    files = sorted(write(tmp_path / "out", noted, format="dicom").iterdir())
    sources = [pydicom.dcmread(p) for p in sorted(series.glob("*.dcm"), reverse=True)]
    results = [pydicom.dcmread(p) for p in files]
    for source, result in zip(sources, results, strict=True):
        np.testing.assert_array_equal(result.pixel_array, source.pixel_array + 7)
        for same in ("RescaleIntercept", "PixelSpacing", "PatientID", "StudyInstanceUID", "Rows"):
            assert result[same].value == source[same].value
        assert result.ImageType[0] == "DERIVED"
        assert result.DerivationDescription == "note"
        (reference,) = result.SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert result.file_meta.MediaStorageSOPInstanceUID == result.SOPInstanceUID
    assert len({r.SOPInstanceUID for r in results} | {s.SOPInstanceUID for s in sources}) == 10
    (new,) = {r.SeriesInstanceUID for r in results}
    assert new != sources[0].SeriesInstanceUID
    assert_same(read(tmp_path / "out"), noted)


def test_dicom_values_stay_within_the_stored_bits(series: Path, tmp_path: Path) -> None:
    volume = read(series)
    beyond = replace(volume, data=np.full_like(volume.data, 31000))
    path = write(tmp_path / "out", beyond, format="dicom")
    assert read(path).data.max() == 31000


def test_dicom_reports_missing_and_duplicate_slices(series: Path) -> None:
    (series / "7.dcm").unlink()
    volume = read(series)
    (note,) = volume.metadata["notes"]
    assert "missing" in note
    assert "8.dcm and 6.dcm" in note
    shutil.copy(series / "8.dcm", series / "8b.dcm")
    notes = read(series).metadata["notes"]
    assert any("lie where another one does" in note for note in notes)
    assert read(series).data.shape[0] == 5


def test_dicom_of_several_series(series: Path) -> None:
    edit(series / "5.dcm", lambda dataset: setattr(dataset, "SeriesInstanceUID", "1.2.9"))
    volume = read(series)
    assert volume.data.shape[0] == 4
    assert any("holds 2 series" in note for note in volume.metadata["notes"])
    shapes = {read(series, series=number).data.shape[0] for number in (0, 1)}
    assert shapes == {1, 4}
    with pytest.raises(FileFormatError, match="no series 2"):
        read(series, series=2)


def test_dicom_of_mixed_shapes(series: Path) -> None:
    def crop(dataset: Any) -> None:
        dataset.PixelData = dataset.pixel_array[:64].tobytes()
        dataset.Rows = 64

    edit(series / "6.dcm", crop)
    volume = read(series)
    assert volume.data.shape == (4, 128, 128)
    assert any("holds 2 series" in note for note in volume.metadata["notes"])
    assert read(series, series=1).data.shape == (1, 64, 128)


def test_dicom_of_several_frames_or_colours(series: Path) -> None:
    edit(series / "6.dcm", lambda dataset: setattr(dataset, "NumberOfFrames", 3))
    with pytest.raises(FileFormatError, match="several frames"):
        read(series / "6.dcm")
    assert any("several frames" in note for note in read(series).metadata["notes"])
    edit(series / "6.dcm", lambda dataset: setattr(dataset, "SamplesPerPixel", 3))
    with pytest.raises(FileFormatError, match="colour"):
        read(series / "6.dcm")
    assert any("colour" in note for note in read(series).metadata["notes"])


def test_dicom_file_that_changes_after_it_was_opened(series: Path) -> None:
    volume = read(series, lazy=True)
    (series / "6.dcm").write_bytes(b"gone")
    with pytest.raises(FileFormatError, match="has changed"):
        volume.data.compute(scheduler="synchronous")


def test_a_single_dicom_file_is_a_plane(series: Path, tmp_path: Path) -> None:
    volume = read(series / "9.dcm")
    assert volume.axes == "YX"
    assert_same(read(write(tmp_path / "b.dcm", volume)), volume)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is a folder"):
        read(tmp_path)
