"""What may be replaced: the same for every format, from Python and from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from napari_learned_diffusion import cli
from napari_learned_diffusion.core.errors import FileWriteError
from napari_learned_diffusion.files import Volume, read, write

NAMES = {"tiff": "a.tif", "mrc": "a.mrc", "nifti": "a.nii.gz", "zarr": "a.ome.zarr", "dicom": "a"}
FOLDERS = ("zarr", "dicom")
QUICK = ("--model", "perona-malik", "--noise-sigma", "8", "--iterations", "1")


def volume(value: int = 0) -> Volume:
    data: Any = np.full((2, 8, 9), value, np.int16)
    return Volume(data, "ZYX", (1.0,) * 3, ("millimeter",) * 3, "a")


@pytest.mark.parametrize("key", NAMES)
def test_an_image_is_replaced_with_leave_alone(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / NAMES[key], volume(1), format=key)
    with pytest.raises(FileWriteError, match="exists"):
        write(path, volume(2), format=key)
    assert read(path).data.max() == 1
    write(path, volume(2), format=key, overwrite=True)
    assert read(path).data.max() == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("key", FOLDERS)
@pytest.mark.parametrize("beside", ["notes.txt", "labels/0/zarr.json", "scout.dcm"])
def test_a_folder_with_anything_of_the_users_is_not_replaced(
    tmp_path: Path, key: str, beside: str
) -> None:
    path = write(tmp_path / NAMES[key], volume(1), format=key)
    mine = path / beside
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(FileWriteError, match=r"holds .* which isn't part"):
        write(path, volume(2), format=key, overwrite=True)
    assert mine.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("key", FOLDERS)
def test_a_folder_that_is_no_image_is_not_replaced(tmp_path: Path, key: str) -> None:
    mine = tmp_path / NAMES[key] / "n.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(FileWriteError, match="never replaced"):
        write(mine.parent, volume(), format=key, overwrite=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("key", FOLDERS)
def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path, key: str) -> None:
    path = tmp_path / NAMES[key]
    path.write_text("mine")
    with pytest.raises(FileWriteError, match="is a file"):
        write(path, volume(), format=key, overwrite=True)
    assert path.read_text() == "mine"


def test_an_existing_ome_zarr_as_output_of_the_shell(tmp_path: Path) -> None:
    source = write(tmp_path / "in.tif", volume(7))
    target = write(tmp_path / "out.ome.zarr", volume(1))
    call = ["denoise", str(source), str(target), *QUICK]
    refused = CliRunner().invoke(cli.app, call)
    assert refused.exit_code == 1
    assert "exists" in refused.stderr
    assert "add --overwrite" in refused.stderr
    assert read(target).data.max() == 1
    assert CliRunner().invoke(cli.app, [*call, "--overwrite"]).exit_code == 0
    assert read(target).data.max() == 7
