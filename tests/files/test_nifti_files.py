"""NIfTI: what is written of an image with a header of its own, and files that can't be trusted."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from napari_learned_diffusion import cli
from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, get_reader, read, write, write_image

RNG = np.random.default_rng(0)


def save(
    path: Path,
    data: NDArray[Any],
    slope: float | None = None,
    intercept: float = 0.0,
    **fields: Any,
) -> Path:
    """Write ``(Z, Y, X)`` as it is stored, with the fields of the header."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(data.shape[::-1])
    header.set_data_dtype(data.dtype)
    header.set_zooms((0.9, 0.8, 3.0))
    header.set_qform(np.array([[0.9, 0, 0, 5], [0, -0.8, 0, 6], [0, 0, -3, 7], [0, 0, 0, 1]]), 1)
    header.set_sform(np.array([[0.9, 0, 0, 8], [0, 0.8, 0, 9], [0, 0, 3, -4], [0, 0, 0, 1]]), 4)
    header["scl_slope"], header["scl_inter"] = slope or 0, intercept
    for name, value in fields.items():
        header[name] = value
    with nibabel.openers.Opener(str(path), "wb") as stream:
        header.write_to(stream)
        stream.write(b"\0" * (header.get_data_offset() - stream.tell()) + data.tobytes())
    return path


@pytest.fixture
def counts() -> NDArray[Any]:
    return RNG.poisson(300, (2, 24, 20)).astype(np.uint16)


# --- the type of what is written ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_what_was_removed_from_integers_is_written_as_it_is(
    tmp_path: Path, counts: NDArray[Any], name: str
) -> None:
    volume = read(save(tmp_path / name, counts))
    removed = RNG.normal(0, 20, counts.shape).astype(np.float32)
    path = write(tmp_path / f"removed-{name}", replace(volume, data=removed))
    found, source = nibabel.load(path), nibabel.load(tmp_path / name)
    np.testing.assert_array_equal(found.get_fdata().T, removed)
    assert found.get_data_dtype() == np.float32
    for form in ("sform", "qform"):
        actual, expected = (getattr(i.header, f"get_{form}")(coded=True) for i in (found, source))
        np.testing.assert_array_equal(actual[0], expected[0])
        assert actual[1] == expected[1]


def test_what_napari_writes_of_a_layer_with_the_sources_header(
    tmp_path: Path, counts: NDArray[Any]
) -> None:
    source = str(save(tmp_path / "a.nii.gz", counts))
    (_, given, _) = get_reader(source)(source)[0]
    layer = counts.astype(np.float32) - 300
    write_image(str(tmp_path / "b.nii.gz"), layer, given | {"name": "removed"})
    np.testing.assert_array_equal(nibabel.load(tmp_path / "b.nii.gz").get_fdata().T, layer)


def test_residual_and_maps_of_integers_from_the_shell(tmp_path: Path, counts: NDArray[Any]) -> None:
    source = save(tmp_path / "a.nii.gz", counts)
    names = {n: tmp_path / f"{n}.nii.gz" for n in ("residual", "diffusivity", "anisotropy")}
    options = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    quick = ["--model", "perona-malik", "--noise-sigma", "17", "-n", "3"]
    target = tmp_path / "out.nii.gz"
    done = CliRunner().invoke(cli.app, ["denoise", str(source), str(target), *quick, *options])
    assert done.exit_code == 0, done.output
    pixels = {name: nibabel.load(path).get_fdata() for name, path in names.items()}
    expected = nibabel.load(source).get_fdata() - nibabel.load(target).get_fdata()
    np.testing.assert_allclose(pixels["residual"], expected, atol=1e-3)
    assert pixels["residual"].min() < 0
    for name in ("diffusivity", "anisotropy"):
        assert len(np.unique(pixels[name])) > 50, name


@pytest.mark.parametrize(("slope", "intercept"), [(0.1, 0.0), (2.0, -1000.0), (0.5, 3.0)])
def test_scaled_integers_stay_so_only_where_they_hold_the_values(
    tmp_path: Path, counts: NDArray[Any], slope: float, intercept: float
) -> None:
    volume = read(save(tmp_path / "a.nii", counts, slope, intercept))
    copy = nibabel.load(write(tmp_path / "copy.nii", volume))
    np.testing.assert_array_equal(copy.dataobj.get_unscaled().T, counts)
    assert (copy.dataobj.slope, copy.dataobj.inter) == pytest.approx((slope, intercept))
    # What was removed is of the same type, but negative and between the steps of the scale.
    removed = (RNG.normal(0, 3, counts.shape) * 7).astype(volume.data.dtype)
    path = write(tmp_path / "removed.nii", replace(volume, data=removed))
    np.testing.assert_array_equal(np.asarray(read(path).data), removed)
    assert read(path).data.dtype == volume.data.dtype


def test_a_mean_that_only_the_last_slice_cannot_hold(tmp_path: Path, counts: NDArray[Any]) -> None:
    volume = read(save(tmp_path / "a.nii.gz", counts, 0.1), lazy=True)
    data = np.asarray(volume.data).copy()
    data[-1, -1, -1] += 0.03
    path = write(tmp_path / "b.nii.gz", replace(volume, data=data))
    np.testing.assert_array_equal(np.asarray(read(path).data), data)


def test_the_range_to_display_is_the_images_own(tmp_path: Path, counts: NDArray[Any]) -> None:
    volume = read(save(tmp_path / "a.nii", counts, cal_min=200, cal_max=400))
    assert volume.metadata["contrast_limits"] == (200, 400)
    copy = nibabel.load(write(tmp_path / "b.nii", volume)).header
    assert (copy["cal_min"], copy["cal_max"]) == (200, 400)
    other = {k: v for k, v in volume.metadata.items() if k != "contrast_limits"}
    copy = nibabel.load(write(tmp_path / "c.nii", replace(volume, metadata=other))).header
    assert (copy["cal_min"], copy["cal_max"]) == (0, 0)


# --- sizes and values -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 7, 64, 200])
def test_voxel_sizes_without_a_unit_keep_their_numbers(
    tmp_path: Path, counts: NDArray[Any], code: int
) -> None:
    volume = read(save(tmp_path / "a.nii", counts, xyzt_units=code))
    assert volume.scale == pytest.approx((3.0, 0.8, 0.9))
    assert set(volume.units) == {"pixel"}
    assert read(write(tmp_path / "b.nii", volume)).scale == pytest.approx((3.0, 0.8, 0.9))
    without = replace(volume, metadata={})
    copy = read(write(tmp_path / "c.nii", without))
    assert (copy.scale, copy.units) == (pytest.approx(volume.scale), volume.units)


def test_the_lowest_of_integers_that_fill_their_range_is_an_intensity(tmp_path: Path) -> None:
    # As nibabel scales floating point numbers; NIfTI has no field for values that are none.
    image = nibabel.Nifti1Image(np.linspace(0, 1, 60).reshape(3, 4, 5), np.eye(4))
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii")
    assert np.asarray(nibabel.load(tmp_path / "a.nii").dataobj.get_unscaled()).min() == -32768
    assert read(tmp_path / "a.nii").missing == ()


def test_large_intercepts_and_slopes_keep_values_apart(tmp_path: Path) -> None:
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for slope, intercept in ((0.25, 2.0**24), (1e38, 0.0)):
        volume = read(save(tmp_path / "a.nii", data, slope, intercept))
        assert len(np.unique(volume.data)) == 60
        assert np.isfinite(volume.data).all()


# --- files that can't be trusted ------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_every_damaged_byte_of_a_compressed_file_is_noticed(tmp_path: Path, lazy: bool) -> None:
    data = (100 + 8 * RNG.normal(size=(3, 20, 20))).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", data)
    whole = path.read_bytes()
    for at in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            found = np.asarray(read(path, lazy=lazy).data)
        except FileFormatError:
            continue
        # Of some bytes nothing depends, such as the time in gzip's own header.
        np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_length_but_the_whole_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, RNG.integers(0, 999, (2, 10, 10)).astype(np.int16))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"[Cc]opy or export it again"):
            read(path)


@pytest.mark.parametrize("field", ["dim", "datatype", "bitpix", "vox_offset", "scl_slope", "magic"])
@pytest.mark.parametrize("bit", [0, 3, 6, 7])
def test_a_header_with_a_changed_bit_raises_nothing_else(
    tmp_path: Path, field: str, bit: int
) -> None:
    path = save(tmp_path / "a.nii", RNG.integers(0, 999, (2, 10, 10)).astype(np.int16))
    whole = path.read_bytes()
    kind, start = nibabel.Nifti1Header.template_dtype.fields[field][:2]
    for at in range(start, start + kind.itemsize):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            assert np.asarray(read(path).data).nbytes <= 8 * len(whole)
        except FileFormatError:
            continue


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_claim_that_cannot_be_true(tmp_path: Path, name: str, lazy: bool) -> None:
    header = nibabel.Nifti2Header()
    header.set_data_shape((200_000, 200_000, 2))
    header.set_data_dtype(np.float64)
    path = tmp_path / name
    with nibabel.openers.Opener(str(path), "wb") as stream:
        header.write_to(stream)
    with pytest.raises(FileFormatError, match=r"claims 200000 × 200000 × 2 pixels.*640.0 GB"):
        read(path, lazy=lazy)


def test_extensions_longer_than_the_file_take_no_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.zeros((2, 3, 4), np.int16), vox_offset=352 + 2.0**25)
    content = bytearray(path.read_bytes()[:400])
    content[348] = 1
    content[352:360] = (2**25).to_bytes(4, "little") + bytes(4)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="isn't a readable NIfTI"):
        read(path)


def test_a_stream_that_goes_on_and_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from napari_learned_diffusion.files import _nifti

    monkeypatch.setattr(_nifti, "_LARGEST_OFFSET", 2**20)
    path = save(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), np.int16))
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(2**22)))
    with pytest.raises(FileFormatError, match="far more"):
        read(path)


def test_slices_that_the_header_does_not_tell_of_are_told(
    tmp_path: Path, counts: NDArray[Any]
) -> None:
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, counts)
        assert read(path).metadata["notes"] == []
        more = bytes(counts.nbytes)
        path.write_bytes(
            path.read_bytes() + (gzip.compress(more) if path.suffix == ".gz" else more)
        )
        (note,) = read(path).metadata["notes"]
        assert "2 more slices" in note


def test_complex_numbers_stay_complex(tmp_path: Path) -> None:
    data = (RNG.normal(size=(2, 4, 5)) + 1j * RNG.normal(size=(2, 4, 5))).astype(np.complex64)
    volume = read(save(tmp_path / "a.nii", data, 2.0))
    np.testing.assert_allclose(volume.data, 2 * data)
    copy: Volume = read(write(tmp_path / "b.nii", volume))
    np.testing.assert_allclose(copy.data, 2 * data)
