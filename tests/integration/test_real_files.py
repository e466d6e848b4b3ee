"""Files that other programs wrote: read, denoised by a batch, and read again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pydicom
import pytest
from nibabel.testing import data_path
from pydicom.data import get_testdata_file
from skimage import data as skimage_data

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.files import read, write
from napari_learned_diffusion.files.formats import format_of
from napari_learned_diffusion.jobs.batch import BatchConfig, denoise_batch
from napari_learned_diffusion.jobs.batch_sources import find_sources
from napari_learned_diffusion.jobs.progress import run

NATIVE = (
    "dicom_ct_fnndsc",
    "dicom_mr_t1_studyforrest",
    "em_cryoet_microtubule13pf_from_tif.mrc",
    "emd_3001.map",
    "mri_t2_fernando.nii.gz",
)


def shipped(name: str) -> Path:
    """A file that a library brings along, without a download."""
    if name.endswith(".dcm"):
        return Path(get_testdata_file(name, download=False))
    if name.endswith(".nii.gz"):
        return Path(data_path) / name
    return Path(skimage_data.__file__).parent / name


def check(path: Path, folder: Path) -> None:
    """A copy keeps all pixels, a batch all but the noise, and either what the pixels mean."""
    original = read(path)
    pixels = np.asarray(original.data, np.float64)
    kind = format_of(path)
    write(folder / "copy" / path.name, original, format=kind and kind.key)
    config = DiffusionConfig("perona-malik", 2, Gaussian(float(pixels.std()) / 4), device="cpu")
    out = folder / "out"
    (file,) = run(denoise_batch(find_sources([path], out), BatchConfig(out), config)).files
    assert file.state == "done", file.message
    assert file.output == out / path.name
    np.testing.assert_array_equal(read(folder / "copy" / path.name).data, original.data)
    for written in (folder / "copy" / path.name, out / path.name):
        found = read(written)
        assert (found.axes, found.units) == (original.axes, original.units)
        assert found.scale == pytest.approx(original.scale)
        assert (found.data.dtype, found.data.shape) == (original.data.dtype, original.data.shape)
    smooth = np.asarray(read(out / path.name).data, np.float64)
    assert 0.5 * pixels.std() < smooth.std() < pixels.std()
    # Whole numbers are rounded pixel by pixel.
    assert smooth.mean() == pytest.approx(pixels.mean(), abs=0.05 + 1e-3 * pixels.std())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "example4d.nii.gz", "multipage.tif"]
)
def test_files_that_libraries_ship(folder: Path, name: str) -> None:
    check(shipped(name), folder)


def test_a_folder_of_a_shipped_dicom_file(folder: Path) -> None:
    (folder / "series").mkdir()
    shutil.copy(shipped("MR_small.dcm"), folder / "series")
    check(folder / "series", folder)
    (derived,) = (folder / "out" / "series").iterdir()
    source, result = pydicom.dcmread(shipped("MR_small.dcm")), pydicom.dcmread(derived)
    assert result.StudyInstanceUID == source.StudyInstanceUID
    assert result.SOPInstanceUID != source.SOPInstanceUID
    assert result.EchoTime == source.EchoTime


def test_an_mrc_of_mrcfile(folder: Path) -> None:
    """The library ships none, so that it writes one, with what microscopes write into headers."""
    path = folder / "tomogram.mrc"
    with mrcfile.new(path) as mrc:
        mrc.set_data(np.random.default_rng(0).normal(0, 9, (4, 32, 40)).astype(np.float32))
        mrc.voxel_size = (13.3, 13.3, 13.3)
        mrc.header.origin = (-5.0, 2.0, 1.0)
        mrc.add_label("tilt series 7")
    check(path, folder)
    with mrcfile.open(folder / "out" / "tomogram.mrc") as mrc:
        assert mrc.header.origin.tolist() == (-5.0, 2.0, 1.0)
        assert any("tilt series 7" in label for label in mrc.get_labels())


@pytest.mark.skipif(
    "LEARNED_DIFFUSION_DATA" not in os.environ,
    reason="LEARNED_DIFFUSION_DATA names no folder of data",
)
@pytest.mark.parametrize("name", NATIVE)
def test_files_of_the_data_folder(folder: Path, name: str) -> None:
    path = Path(os.environ["LEARNED_DIFFUSION_DATA"]) / "native" / name
    if not path.exists():
        pytest.skip(f"The data folder has no native/{name}")
    check(path, folder)
