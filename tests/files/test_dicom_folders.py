"""DICOM folders as scanners and archives leave them: names, other files, series, compression."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import UID, generate_uid
from typer.testing import CliRunner

from napari_learned_diffusion import cli
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    LearnedDiffusionError,
    MissingDependencyError,
)
from napari_learned_diffusion.files import _dicom_pixels, get_reader, read, write
from napari_learned_diffusion.files.formats import FORMATS, format_of

QUICK = ("--model", "perona-malik", "--noise-sigma", "8", "--iterations", "1")
AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)

Change = Callable[[Any], None]


def ct(change: Change | None = None) -> Any:
    """A slice of 128 × 128 pixels in Hounsfield units, with changes."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    if change is not None:
        change(dataset)
    return dataset


def make_series(
    folder: Path, names: str = "{i}.dcm", count: int = 3, change: Change | None = None
) -> Path:
    """A series of slices 2 mm apart."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    for i in range(count):
        dataset = ct(change)
        dataset.SeriesInstanceUID, dataset.InstanceNumber = uid, i + 1
        dataset.ImagePositionPatient = [0, 0, 2.0 * i]
        dataset.save_as(folder / names.format(i=i, uid=dataset.SOPInstanceUID))
    return folder


def notes(folder: Path, **options: Any) -> str:
    return " ".join(read(folder, **options).metadata["notes"])


# --- names ----------------------------------------------------------------------------------------

NAMES = ["IM{i:04d}", "image.{i:03d}", "{uid}", "CT.{uid}", "{i}.IMA", "{i}.dcm.bak"]


@pytest.mark.parametrize("names", NAMES)
def test_files_are_told_by_their_content_whatever_their_names(tmp_path: Path, names: str) -> None:
    folder = make_series(tmp_path / "a", names)
    (folder / "VERSION").write_text("1.0")
    (folder / "notes.txt").write_text("of the radiologist " * 20)
    (folder / ".DS_Store").write_bytes(bytes(200))
    volume = read(folder)
    assert volume.data.shape == (3, 128, 128)
    assert volume.metadata["notes"] == []
    file = next(p for p in folder.iterdir() if pydicom.misc.is_dicom(p))
    assert format_of(file) is FORMATS["dicom"]
    assert read(file).data.shape == (128, 128)
    assert get_reader(str(file)) is not None


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian"])
def test_files_without_a_preamble_are_read(tmp_path: Path, syntax: str) -> None:
    folder = make_series(tmp_path / "a")
    expected = read(folder).data
    for path in sorted(folder.iterdir()):
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
        bare = pydicom.Dataset(dataset)
        bare.save_as(
            path.with_suffix(""),
            implicit_vr=syntax.startswith("Implicit"),
            little_endian=True,
            enforce_file_format=False,
        )
        assert path.with_suffix("").read_bytes()[128:132] != b"DICM"
        path.unlink()
    volume = read(folder)
    np.testing.assert_array_equal(volume.data, expected)
    copy = read(write(tmp_path / "copy", volume))
    np.testing.assert_array_equal(copy.data, expected)


def test_texts_and_tables_are_no_dicom(tmp_path: Path) -> None:
    for name, content in {
        "a": b"\x08\x00",
        "b": b"\x08\x00 a text that begins oddly",
        "c": b"",
        "d": b"x,y\n1,2\n" * 40,
        "e": bytes(400),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert format_of(tmp_path / name) is None, name
    assert format_of(tmp_path) is None


def test_a_batch_leaves_no_patient_out(tmp_path: Path) -> None:
    for i, names in enumerate(NAMES):
        make_series(tmp_path / "patients" / f"p{i}", names, count=2)
    # One whose slices lie beside a folder, as some programs put their settings there.
    mixed = make_series(tmp_path / "patients" / "mixed", "IM{i}", count=2)
    (mixed / "more").mkdir()
    out = tmp_path / "out"
    call = ["batch", str(tmp_path / "patients"), "--out", str(out), *QUICK]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 0, done.output
    for i in range(len(NAMES)):
        assert read(out / f"p{i}").data.shape == (2, 128, 128)
    assert "mixed" in done.output
    assert {p.name for p in (out / "mixed").iterdir()} == {"IM0", "IM1"}


# --- other files in the folder --------------------------------------------------------------------


def report(dataset: Any) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(
        "1.2.840.10008.5.1.4.1.1.88.67"
    )
    for name in ("Rows", "Columns", "BitsAllocated", "PixelData", "SamplesPerPixel"):
        delattr(dataset, name)


def presentation_state(dataset: Any) -> None:
    report(dataset)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(
        "1.2.840.10008.5.1.4.1.1.11.1"
    )


def colour(dataset: Any) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = 0
    dataset.Rows = dataset.Columns = 16
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = bytes(16 * 16 * 3)


def palette(dataset: Any) -> None:
    dataset.PhotometricInterpretation = "PALETTE COLOR"


def frames(dataset: Any) -> None:
    dataset.NumberOfFrames = 2
    dataset.PixelData *= 2


def enhanced(dataset: Any) -> None:
    dataset.NumberOfFrames = 1
    dataset.SharedFunctionalGroupsSequence = [pydicom.Dataset()]


def parametric(dataset: Any) -> None:
    dataset.BitsAllocated = 32
    dataset.FloatPixelData = np.zeros(128 * 128, np.float32).tobytes()
    for name in ("PixelRepresentation", "PixelData", "BitsStored", "HighBit"):
        delattr(dataset, name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (report, "holds no image (X-Ray Radiation Dose SR)"),
        (presentation_state, "holds no image (Grayscale Softcopy Presentation State)"),
        (colour, "is a colour image"),
        (palette, "is a colour image"),
        (frames, "several frames"),
        (enhanced, "several frames"),
        (parametric, "no whole numbers"),
    ],
)
@pytest.mark.parametrize("is_same_series", [False, True])
def test_what_is_no_slice_is_left_out_with_a_word(
    tmp_path: Path, change: Change, word: str, is_same_series: bool
) -> None:
    folder = make_series(tmp_path / "a")
    other = ct(change)
    if is_same_series:
        other.SeriesInstanceUID = pydicom.dcmread(folder / "0.dcm").SeriesInstanceUID
    other.save_as(folder / "zz.dcm")
    for options in ({}, {"series": 0}, {"lazy": True}):
        assert read(folder, **options).data.shape == (3, 128, 128)
        assert f"zz.dcm {word}" in notes(folder, **options) or word in notes(folder, **options)
    with pytest.raises(FileFormatError) as raised:
        read(folder / "zz.dcm")
    assert word in str(raised.value)


def test_a_grey_screen_shot_is_a_series_of_its_own(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a")
    shot = pydicom.dcmread(folder / "0.dcm")
    shot.SOPClassUID = shot.file_meta.MediaStorageSOPClassUID = (
        pydicom.uid.SecondaryCaptureImageStorage
    )
    shot.save_as(folder / "00.dcm")
    assert read(folder).data.shape == (3, 128, 128)
    assert "holds 2 series" in notes(folder)
    assert notes(folder, series=1) == ""


def test_a_directory_of_the_disc_is_not_worth_a_word(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a")

    def directory(dataset: Any) -> None:
        report(dataset)
        dataset.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.1.3.10")
        del dataset.SOPClassUID

    ct(directory).save_as(folder / "INDEX", enforce_file_format=False)
    assert read(folder).metadata["notes"] == []


def test_a_folder_of_nothing_but_reports_says_so(tmp_path: Path) -> None:
    ct(report).save_as(tmp_path / "a.dcm")
    with pytest.raises(FileFormatError, match="holds no image"):
        read(tmp_path)


def test_what_was_left_out_is_told_in_shell_batch_and_napari(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a", count=2)
    ct(report).save_as(folder / "zz.dcm")
    said = "zz.dcm holds no image"
    call = ["denoise", str(folder), str(tmp_path / "out"), *QUICK]
    assert said in CliRunner().invoke(cli.app, call).stderr
    assert said in CliRunner().invoke(cli.app, ["estimate-noise", str(folder)]).stderr
    call = ["diffusivity", str(folder), str(tmp_path / "g.tif"), *QUICK]
    assert said in CliRunner().invoke(cli.app, call).stderr
    call = ["batch", str(folder), "--out", str(tmp_path / "batch"), *QUICK]
    assert said in CliRunner().invoke(cli.app, call).output
    reader = get_reader(str(folder))
    assert reader is not None
    with pytest.warns(UserWarning, match=said):
        reader(str(folder))


# --- series ---------------------------------------------------------------------------------------


def test_orientations_of_a_localizer_are_series_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "localizer"
    folder.mkdir()
    number = 0
    uid = generate_uid()
    for axis, orientation in ((2, AXIAL), (1, CORONAL), (0, SAGITTAL)):
        for step in range(3):
            dataset = ct()
            place = [-60.0, -60.0, 60.0]
            place[axis] = 10.0 * step
            dataset.SeriesInstanceUID, dataset.InstanceNumber = uid, number
            dataset.ImagePositionPatient = place
            # As scanners round them.
            dataset.ImageOrientationPatient = [c + 1e-5 * step for c in orientation]
            dataset.save_as(folder / f"{number}.dcm")
            number += 1
    for series, name in enumerate(("axial", "coronal", "sagittal")):
        volume = read(folder, series=series)
        files = [Path(path).stem for path, _ in volume.metadata["dicom"]["slices"]]
        assert sorted(files) == [str(3 * series + i) for i in range(3)]
        assert volume.scale[0] == pytest.approx(10, rel=1e-3)
        assert f"{series} (3 × 128 × 128 {name}" in notes(folder)
    assert "Series 0 was read" in notes(folder)
    assert "--series 1" in notes(folder)
    with pytest.raises(FileFormatError, match="has 3 series"):
        read(folder, series=3)


def test_slices_of_another_size_of_pixels_are_another_series(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a", "{i}.dcm", 3)
    uid = pydicom.dcmread(folder / "0.dcm").SeriesInstanceUID
    make_series(folder, "zoomed{i}.dcm", 2, lambda d: setattr(d, "PixelSpacing", [0.3, 0.3]))
    for path in folder.glob("zoomed*"):
        dataset = pydicom.dcmread(path)
        dataset.SeriesInstanceUID = uid
        dataset.save_as(path)
    assert read(folder, series=1).scale[1:] == (0.3, 0.3)
    assert read(folder).data.shape[0] == 3


def test_slices_without_place_and_number_are_told(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a")
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.ImagePositionPatient, dataset.InstanceNumber
        dataset.save_as(path)
    assert "order is that of the files' names" in notes(folder)


def test_files_that_napari_opens_as_a_stack_are_ordered_by_place(tmp_path: Path) -> None:
    folder = make_series(tmp_path / "a")
    paths = [str(folder / f"{i}.dcm") for i in (2, 0, 1)]
    reader = get_reader(paths)
    assert reader is not None
    data, meta, _ = reader(paths)[0]
    np.testing.assert_array_equal(np.asarray(data), read(folder).data)
    assert meta["scale"] == pytest.approx(read(folder).scale)


def test_reversed_grey_values_stay_as_they_are_stored(tmp_path: Path) -> None:
    folder = make_series(
        tmp_path / "a", change=lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1")
    )
    plain = make_series(tmp_path / "b")
    np.testing.assert_array_equal(read(folder).data, read(plain).data)
    out = write(tmp_path / "out", read(folder))
    assert pydicom.dcmread(out / "000001.dcm").PhotometricInterpretation == "MONOCHROME1"


# --- compression and damage -----------------------------------------------------------------------

CODECS = {
    "JPEG Extended": (
        lambda a: imagecodecs.jpeg8_encode(a, level=100, bitspersample=12),
        pydicom.uid.JPEGExtended12Bit,
    ),
    "JPEG-LS": (imagecodecs.jpegls_encode, pydicom.uid.JPEGLSLossless),
    "JPEG Lossless": (imagecodecs.ljpeg_encode, pydicom.uid.JPEGLosslessSV1),
    "JPEG 2000": (
        lambda a: imagecodecs.jpeg2k_encode(a, level=0, reversible=True, codecformat="j2k"),
        pydicom.uid.JPEG2000Lossless,
    ),
    "High-Throughput JPEG 2000": (
        lambda a: imagecodecs.htj2k_encode(a, reversible=True),
        pydicom.uid.HTJ2KLossless,
    ),
}


def compressed(name: str) -> Change:
    encode, syntax = CODECS[name]

    def change(dataset: Any) -> None:
        pixels = np.ascontiguousarray(dataset.pixel_array.astype(np.uint16))
        dataset.PixelRepresentation = 0
        dataset.PixelData = encapsulate([encode(pixels)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax

    return change


@pytest.mark.parametrize("name", CODECS)
def test_compressed_slices_are_read(tmp_path: Path, name: str) -> None:
    folder = make_series(tmp_path / "a", count=2, change=compressed(name))
    plain = make_series(tmp_path / "b", count=2)
    found = read(folder).data
    np.testing.assert_allclose(found, read(plain).data, atol=name == "JPEG Extended")  # a lossy one
    # A result isn't compressed, and says so.
    np.testing.assert_array_equal(read(write(tmp_path / "copy", read(folder))).data, found)


@pytest.mark.parametrize("name", CODECS)
def test_a_compression_that_needs_a_package_names_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.dcm"
    ct(compressed(name)).save_as(path)
    decoder = pydicom.pixels.get_decoder(CODECS[name][1])
    needs = {"gdcm": ("gdcm>=3.0.10",), "pyjpegls": ("numpy", "pyjpegls>=1.2")}
    monkeypatch.setattr(decoder, "_available", {"gdcm": None})
    monkeypatch.setattr(decoder, "_unavailable", needs)
    monkeypatch.setattr(_dicom_pixels, "is_available", lambda _: False)
    with pytest.raises(MissingDependencyError) as raised:
        read(path, lazy=True)
    assert f"compressed as {CODECS[name][1].name}" in str(raised.value)
    assert "install pyjpegls: pip" in str(raised.value)
    assert "napari-learned-diffusion[dicom]" in str(raised.value)


def test_a_video_says_that_it_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    dataset = ct(compressed("JPEG-LS"))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    dataset.save_as(path)
    with pytest.raises(FileFormatError, match=r"MPEG2 .* can't be decoded here"):
        read(path)


def deflated(dataset: Any) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian


def test_a_deflated_file(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    ct(deflated).save_as(path)
    np.testing.assert_array_equal(read(path).data, ct().pixel_array.astype(int) - 1024)
    whole = path.read_bytes()
    for length in range(300, len(whole) - 2, 997):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            read(path)


def test_a_deflated_file_that_goes_on_and_on(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    ct(deflated).save_as(path)
    dataset = pydicom.dcmread(path)
    start = 144 + int(dataset.file_meta.FileMetaInformationGroupLength)
    content = path.read_bytes()
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    plain = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    bomb = packer.compress(plain) + packer.compress(bytes(2**26)) + packer.flush()
    path.write_bytes(content[:start] + bomb)
    with pytest.raises(FileFormatError, match="far more"):
        read(path)


def test_a_claim_of_more_pixels_than_the_file_holds(tmp_path: Path) -> None:
    for change in (lambda _: None, deflated, compressed("JPEG-LS")):
        dataset = ct(change)
        dataset.Rows = dataset.Columns = 65535
        dataset.save_as(tmp_path / "a.dcm")
        with pytest.raises(FileFormatError, match="65535 × 65535"):
            read(tmp_path / "a.dcm", lazy=True)


@pytest.mark.parametrize("name", CODECS)
def test_a_compressed_stream_of_another_size(tmp_path: Path, name: str) -> None:
    """Refused before a decoder takes memory: only the size that stands in the stream is changed."""
    dataset = ct(compressed(name))
    size = (128).to_bytes(4 if "2000" in name else 2)
    huge = (60000).to_bytes(len(size))
    assert size * 2 in dataset.PixelData
    dataset.PixelData = dataset.PixelData.replace(size * 2, huge * 2, 1)
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(FileFormatError, match="60000 × 60000"):
        read(tmp_path / "a.dcm")


@pytest.mark.parametrize("name", ["JPEG Extended", "JPEG Lossless", "JPEG-LS"])
def test_a_stream_without_its_end(tmp_path: Path, name: str) -> None:
    dataset = ct(compressed(name))
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    for length in (len(frame) // 2, len(frame) - 4):
        dataset.PixelData = encapsulate([frame[:length]])
        dataset.save_as(tmp_path / "a.dcm")
        with pytest.raises(FileFormatError, match="truncated or damaged"):
            read(tmp_path / "a.dcm")


def small(dataset: Any) -> None:
    """As few bytes as a slice can have, so that all of them can be tried."""
    pixels = dataset.pixel_array[:12, :12]
    kept = "SOP|Rows|Columns|Bits|HighBit|Pixel|Samples|Photometric|Rescale|Series|Image|Instance"
    for element in list(dataset):
        if not element.keyword.startswith(tuple(kept.split("|"))):
            del dataset[element.tag]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = pixels.tobytes()


@pytest.mark.parametrize("name", [None, *CODECS])
def test_damaged_and_shortened_files_raise_nothing_else(tmp_path: Path, name: str | None) -> None:
    dataset = ct(small)
    if name is not None:
        compressed(name)(dataset)
    path = tmp_path / "a.dcm"
    dataset.save_as(path)
    whole = path.read_bytes()
    good = read(path).data
    rng = np.random.default_rng(0)
    for at in range(132, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        shortened = whole[:at]
        for content in (damaged, shortened):
            path.write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # pydicom tells of what it corrects
                    volume = read(path)
            except LearnedDiffusionError:
                continue
            found = volume.data
            with suppress(LearnedDiffusionError):
                write(tmp_path / "out", volume, overwrite=True)
            assert found.nbytes <= 4 * max(len(whole), 4096)
            if content is shortened:
                np.testing.assert_array_equal(found, good)
