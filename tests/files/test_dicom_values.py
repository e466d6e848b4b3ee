"""Values of DICOM: rescaling of each slice, padding, and quantities that the source can't hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from typer.testing import CliRunner

from napari_learned_diffusion import cli
from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write, write_dicom_series

RNG = np.random.default_rng(0)
QUICK = ("--model", "perona-malik", "--noise-sigma", "20", "--iterations", "3")

Change = Callable[[Any, int], None]


def make_series(
    folder: Path,
    stored: NDArray[Any],
    change: Change = lambda *_: None,
    *,
    bits: int = 16,
    slope: float = 1,
    intercept: float = 0,
) -> Path:
    """Slices of stored numbers, 2 mm apart."""
    folder.mkdir()
    series = generate_uid()
    for i, plane in enumerate(stored):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.InstanceNumber = series, i + 1
        dataset.ImagePositionPatient = [0, 0, 2.0 * i]
        dataset.Rows, dataset.Columns = plane.shape
        dataset.BitsAllocated = 8 * plane.dtype.itemsize
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        dataset.PixelRepresentation = int(plane.dtype.kind == "i")
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        dataset.WindowCenter, dataset.WindowWidth = 40, 400
        dataset.PixelData = plane.tobytes()
        if "PixelPaddingValue" in dataset:
            del dataset.PixelPaddingValue
        change(dataset, i)
        dataset.save_as(folder / f"{i}.dcm")
    return folder


def pad(value: int, limit: int | None = None, kind: str = "SS") -> Change:
    def change(dataset: Any, _: int) -> None:
        dataset.add_new("PixelPaddingValue", kind, value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", kind, limit)

    return change


def stored_in(folder: Path) -> NDArray[Any]:
    files = sorted(folder.iterdir())
    return np.stack(
        [np.frombuffer(d.PixelData, np.int16).reshape(d.Rows, d.Columns) for d in map(dcm, files)]
    )


def dcm(path: Path) -> Any:
    return pydicom.dcmread(path)


@pytest.fixture
def hounsfield() -> NDArray[Any]:
    """Stored numbers of 12 bits without sign, -1024 less in Hounsfield units."""
    return RNG.normal(1064, 30, (2, 24, 20)).round().astype(np.uint16)


# --- padding --------------------------------------------------------------------------------------


def test_padding_is_no_intensity_in_the_units_of_the_data(tmp_path: Path) -> None:
    stored = RNG.integers(0, 2000, (2, 12, 10)).astype(np.int16)
    stored[:, :3] = -2000
    volume = read(make_series(tmp_path / "a", stored, pad(-2000), intercept=-1024))
    assert volume.missing == (-3024,)
    np.testing.assert_array_equal(volume.data == -3024, stored == -2000)
    slope = read(make_series(tmp_path / "b", stored, pad(-2000), slope=0.3, intercept=-7))
    np.testing.assert_array_equal(np.isin(slope.data, slope.missing), stored == -2000)


def test_a_range_of_padding(tmp_path: Path) -> None:
    stored = np.array([[[-2000, -1999, -1998, -1997, 5]]], np.int16)
    for ends in ((-2000, -1998), (-1998, -2000)):
        folder = make_series(tmp_path / f"{ends[0]}", stored, pad(*ends))
        assert read(folder).missing == (-2000, -1999, -1998)


def test_padding_with_the_type_of_the_other_sign(tmp_path: Path) -> None:
    stored = np.array([[[-2000, 7, 8, 9]]], np.int16)
    folder = make_series(tmp_path / "a", stored, pad(65536 - 2000, kind="US"))
    assert read(folder).missing == (-2000,)


@pytest.mark.parametrize("lazy", [False, True])
def test_padding_beyond_the_bits_in_use_is_told_from_values_and_comes_back(
    tmp_path: Path, lazy: bool
) -> None:
    stored = np.array([[[63536, 2096, 100, 4095], [63536, 0, 7, 63536]]], np.uint16)
    folder = make_series(tmp_path / "a", stored, pad(63536, kind="US"), bits=12, intercept=-1024)
    volume = read(folder, lazy=lazy)
    np.testing.assert_array_equal(np.asarray(volume.data), stored.astype(int) - 1024)
    assert volume.missing == (62512,)
    out = write(tmp_path / "out", volume)
    np.testing.assert_array_equal(stored_in(out).view(np.uint16), stored)
    assert dcm(out / "000001.dcm").PixelPaddingValue == 63536


def test_the_bits_above_are_ignored_where_they_are_no_padding(tmp_path: Path) -> None:
    stored = np.array([[[0x1005, 0xF123, 7, 9]]], np.uint16)  # as overlays lie in them
    volume = read(make_series(tmp_path / "a", stored, bits=12))
    np.testing.assert_array_equal(volume.data[0, 0], [0x005, 0x123, 7, 9])


def test_padding_of_each_slice_counts(tmp_path: Path) -> None:
    stored = RNG.integers(0, 9, (2, 4, 5)).astype(np.int16)

    def change(dataset: Any, i: int) -> None:
        pad(-10 - i)(dataset, i)

    assert read(make_series(tmp_path / "a", stored, change)).missing == (-11, -10)
    assert read(make_series(tmp_path / "b", stored)).missing == ()


def test_padding_comes_back_from_the_shell(tmp_path: Path, hounsfield: NDArray[Any]) -> None:
    stored = hounsfield.astype(np.int16)
    stored[:, :, :6] = -2000
    folder = make_series(tmp_path / "a", stored, pad(-2000), intercept=-1024)
    done = CliRunner().invoke(cli.app, ["denoise", str(folder), str(tmp_path / "out"), *QUICK])
    assert done.exit_code == 0, done.output
    found = stored_in(tmp_path / "out")
    assert (found[:, :, :6] == -2000).all()
    assert dcm(tmp_path / "out" / "000001.dcm").PixelPaddingValue == -2000
    assert (found[:, :, 12:] != stored[:, :, 12:]).any()


# --- rescaling ------------------------------------------------------------------------------------


def test_each_slice_has_its_own_scale(tmp_path: Path) -> None:
    stored = RNG.integers(0, 30000, (3, 12, 10)).astype(np.int16)
    slopes = (0.25, 1.5, 0.001)

    def change(dataset: Any, i: int) -> None:
        dataset.RescaleSlope = slopes[i]

    folder = make_series(tmp_path / "a", stored, change)
    volume = read(folder)
    np.testing.assert_allclose(volume.data, stored * np.array(slopes)[:, None, None], rtol=1e-6)
    out = write(tmp_path / "out", volume)
    np.testing.assert_array_equal(stored_in(out), stored)
    np.testing.assert_array_equal(read(out).data, volume.data)


def test_a_scale_that_gives_no_values_is_refused(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a", np.zeros((1, 4, 5), np.int16))
    content = (folder / "0.dcm").read_bytes()
    (folder / "0.dcm").write_bytes(content.replace(b"DS\x04\x001.0 ", b"DS\x04\x00 nan"))
    with pytest.raises(FileFormatError, match="rescale slope nan"):
        read(folder)


# --- other quantities -----------------------------------------------------------------------------


def as_result(volume: Volume, data: NDArray[Any], quantity: str | None = None) -> Volume:
    metadata = volume.metadata | ({"quantity": quantity} if quantity else {})
    return replace(volume, data=data, metadata=metadata)


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, -1024), (0.37, 0), (0.37, -5)])
def test_what_was_removed_is_negative_and_lies_between_steps(
    tmp_path: Path, hounsfield: NDArray[Any], slope: float, intercept: float
) -> None:
    folder = make_series(tmp_path / "a", hounsfield, slope=slope, intercept=intercept, bits=12)
    removed = RNG.normal(0, 5, hounsfield.shape).astype(np.float32)
    removed[0, 0, 0] = 0
    out = write(tmp_path / "out", as_result(read(folder), removed, "residual"))
    found = read(out)
    np.testing.assert_allclose(found.data, removed, atol=1e-3)
    assert found.data[0, 0, 0] == 0
    header = dcm(out / "000001.dcm")
    assert header.SeriesDescription.endswith("residual")
    assert "WindowCenter" not in header
    assert header.PatientID == dcm(folder / "0.dcm").PatientID


def test_maps_with_pixels_that_have_no_value(tmp_path: Path, hounsfield: NDArray[Any]) -> None:
    folder = make_series(tmp_path / "a", hounsfield, slope=0.37)
    diffusivity = RNG.uniform(0, 1, hounsfield.shape).astype(np.float32)
    diffusivity[:, :2] = np.nan
    found = read(write(tmp_path / "out", as_result(read(folder), diffusivity, "diffusivity")))
    known = np.isfinite(diffusivity)
    np.testing.assert_allclose(found.data[known], diffusivity[known], atol=1e-4)
    np.testing.assert_array_equal(np.isin(found.data, found.missing), ~known)


def test_a_mean_between_the_steps_of_whole_numbers(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    folder = make_series(tmp_path / "a", hounsfield, intercept=-1024)
    mean = (hounsfield - 1024.0 + 0.25).astype(np.float32)
    out = write(tmp_path / "out", as_result(read(folder), mean))
    np.testing.assert_array_equal(read(out).data, mean)
    assert dcm(out / "000001.dcm").WindowCenter == 40  # it is in the units of the values
    # Of the source's own type it is stored as the source is.
    rounded = as_result(read(folder), np.rint(mean).astype(read(folder).data.dtype))
    header = dcm(write(tmp_path / "whole", rounded) / "000001.dcm")
    assert (header.RescaleSlope, header.BitsStored, header.PixelRepresentation) == (1, 16, 0)


def test_a_mean_of_scaled_numbers_keeps_the_scale(tmp_path: Path) -> None:
    stored = RNG.integers(0, 4096, (2, 24, 20)).astype(np.uint16)
    folder = make_series(tmp_path / "a", stored, slope=0.37, bits=12)
    volume = read(folder)
    mean = (volume.data + np.roll(volume.data, 1, axis=2)) / np.float32(2)
    out = write(tmp_path / "out", as_result(volume, mean))
    assert dcm(out / "000001.dcm").RescaleSlope == pytest.approx(0.37)
    np.testing.assert_allclose(read(out).data, mean, atol=0.37 / 2 + 1e-3)


def test_whole_numbers_beyond_the_source_are_not_cut(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    volume = read(make_series(tmp_path / "a", hounsfield, bits=12))
    for low, high in ((-300, 300), (60000, 65000)):
        data = RNG.integers(low, high, hounsfield.shape).astype(np.int32)
        np.testing.assert_array_equal(
            read(write(tmp_path / f"{low}", as_result(volume, data))).data, data
        )
    wide = np.where(hounsfield > 1064, 100_000, -5).astype(np.int32)
    with pytest.raises(FileFormatError, match="up to 16 bits"):
        write(tmp_path / "wide", as_result(volume, wide))
    infinite = np.where(hounsfield > 1064, np.inf, 0).astype(np.float32)
    with pytest.raises(FileFormatError, match="infinite"):
        write(tmp_path / "infinite", as_result(volume, infinite))
    assert not (tmp_path / "wide").exists()


def test_residual_and_maps_of_a_series_from_the_shell(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    folder = make_series(tmp_path / "a", hounsfield, bits=12)
    names = {n: tmp_path / n for n in ("residual", "diffusivity", "anisotropy")}
    options = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    call = ["denoise", str(folder), str(tmp_path / "out"), *QUICK, *options]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 0, done.output
    expected = read(folder).data.astype(float) - read(tmp_path / "out").data
    np.testing.assert_allclose(read(names["residual"]).data, expected, atol=0.01)
    for name in ("diffusivity", "anisotropy"):
        assert len(np.unique(read(names[name]).data)) > 50, name


def test_a_layer_of_what_was_removed_is_saved_as_it_is(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    folder = str(make_series(tmp_path / "a", hounsfield, bits=12))
    reader = get_reader(folder)
    assert reader is not None
    (_, given, _) = reader(folder)[0]
    removed = RNG.normal(0, 5, hounsfield.shape).astype(np.float32)
    meta = given | {"name": "removed", "contrast_limits": (-20, 20)}
    write_dicom_series(str(tmp_path / "out"), removed, meta)
    np.testing.assert_allclose(read(tmp_path / "out").data, removed, atol=1e-3)
    header = dcm(tmp_path / "out" / "000001.dcm")
    assert (header.WindowCenter, header.WindowWidth) == (0, 40)


# --- where a series goes --------------------------------------------------------------------------


def test_denoise_writes_a_series_as_a_batch_does(tmp_path: Path, hounsfield: NDArray[Any]) -> None:
    folder = make_series(tmp_path / "a", hounsfield, intercept=-1024)
    for name in ("out", "1.2.840.113619.2.5"):
        call = ["denoise", str(folder), str(tmp_path / name), *QUICK]
        done = CliRunner().invoke(cli.app, call)
        assert done.exit_code == 0, done.output
    call = ["batch", str(folder), "--out", str(tmp_path / "batch"), *QUICK]
    assert CliRunner().invoke(cli.app, call).exit_code == 0
    expected = read(tmp_path / "batch" / "a").data
    np.testing.assert_array_equal(read(tmp_path / "out").data, expected)
    call = ["diffusivity", str(folder), str(tmp_path / "g"), *QUICK]
    assert CliRunner().invoke(cli.app, call).exit_code == 0
    assert len(np.unique(read(tmp_path / "g").data)) > 50


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("out.dcm", "A DICOM series of 2 slices is a folder of files: give a name that doesn't"),
        ("out.png", "must end in one of"),
        ("a", "are the same file"),
    ],
)
def test_targets_that_no_series_can_have_are_refused_before_anything_is_computed(
    tmp_path: Path, hounsfield: NDArray[Any], target: str, words: str
) -> None:
    folder = make_series(tmp_path / "a", hounsfield)
    done = CliRunner().invoke(cli.app, ["denoise", str(folder), str(tmp_path / target), *QUICK])
    assert done.exit_code == 1
    assert words in done.stderr
    assert "Time" not in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_other_files_in_the_folder_of_the_result_stay(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    folder = make_series(tmp_path / "a", hounsfield)
    mine = tmp_path / "out" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    call = ["denoise", str(folder), str(mine.parent), *QUICK]
    for options in ([], ["--overwrite"]):
        done = CliRunner().invoke(cli.app, [*call, *options])
        assert done.exit_code == 1
        assert mine.read_text() == "mine"
        assert [p.name for p in mine.parent.iterdir()] == ["notes.txt"]


def test_a_source_that_is_gone_when_the_result_is_written(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    volume = read(make_series(tmp_path / "a", hounsfield))
    (tmp_path / "a" / "1.dcm").unlink()
    with pytest.raises(FileFormatError, match=r"1\.dcm is gone"):
        write(tmp_path / "out", volume)
    assert not (tmp_path / "out").exists()


def test_a_cropped_series_has_headers_of_its_own(tmp_path: Path, hounsfield: NDArray[Any]) -> None:
    volume = read(make_series(tmp_path / "a", hounsfield))
    cropped = replace(volume, data=volume.data[:, 4:16, 2:])
    out = write(tmp_path / "out", cropped)
    np.testing.assert_array_equal(read(out).data, cropped.data)


def test_slices_without_identifiers_have_results_with_some(
    tmp_path: Path, hounsfield: NDArray[Any]
) -> None:
    folder = make_series(tmp_path / "a", hounsfield)
    for path in folder.iterdir():
        dataset = dcm(path)
        del dataset.SOPInstanceUID, dataset.SOPClassUID
        dataset.save_as(path, enforce_file_format=False)
    out = write(tmp_path / "out", read(folder))
    np.testing.assert_array_equal(read(out).data, hounsfield)
    assert dcm(out / "000001.dcm").SOPInstanceUID


def test_a_header_that_cannot_be_copied_says_so(tmp_path: Path, hounsfield: NDArray[Any]) -> None:
    folder = make_series(tmp_path / "a", hounsfield)
    path = folder / "0.dcm"
    content = path.read_bytes()
    assert b"\x08\x00\x08\x00CS" in content  # ImageType; there is no type BS
    path.write_bytes(content.replace(b"\x08\x00\x08\x00CS", b"\x08\x00\x08\x00BS"))
    with pytest.raises(FileFormatError, match=r"header of .*0\.dcm can't be copied"):
        write(tmp_path / "out", read(folder))
    assert not (tmp_path / "out").exists()
