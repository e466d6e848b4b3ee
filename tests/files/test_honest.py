"""A claim of more pixels than a file of its size can hold is refused before memory is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._honest import DEFLATE_RATIO, check_claimed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1000))
    return path


def test_a_claim_that_fits_passes(file: Path) -> None:
    check_claimed(file, (10, 50), np.uint16, compressed=False)
    check_claimed(file, (10, 40), np.uint16, compressed=False, offset=200)
    check_claimed(file, (100, 50, 100), np.uint16, compressed=True, ratio=DEFLATE_RATIO)
    check_claimed(file, (), np.uint8, compressed=False)


@pytest.mark.parametrize(
    ("shape", "compressed"),
    [((10, 51), False), ((10**9, 4, 4), False), ((10**9, 64, 64), True), ((2**40, 2**40), True)],
)
def test_a_claim_beyond_the_file_is_refused(
    file: Path, shape: tuple[int, ...], compressed: bool
) -> None:
    with pytest.raises(FileFormatError, match=r"holds only 1\.0 kB.*export it again"):
        check_claimed(file, shape, np.uint16, compressed=compressed)


def test_what_lies_before_the_pixels_counts(file: Path) -> None:
    with pytest.raises(FileFormatError, match="truncated"):
        check_claimed(file, (10, 50), np.uint16, compressed=False, offset=1)


def test_lengths_of_numpy_do_not_overflow(file: Path) -> None:
    with pytest.raises(FileFormatError, match="TB"):
        check_claimed(file, np.full(3, 2**30, np.int32).tolist(), "f8", compressed=False)
    with pytest.raises(FileFormatError, match="holds only"):
        check_claimed(file, tuple(np.full(4, 2**16, np.int32)), "u1", compressed=True)


def test_negative_lengths_are_refused(file: Path) -> None:
    with pytest.raises(FileFormatError, match="can't be"):
        check_claimed(file, (-5, -5), np.uint8, compressed=False)


def test_a_small_image_may_be_shorter_than_its_claim(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_bytes(b"")
    check_claimed(tmp_path / "tiny", (8, 8), np.uint8, compressed=True)


def test_all_files_of_a_folder_count(tmp_path: Path) -> None:
    (tmp_path / "0" / "0").mkdir(parents=True)
    for name in ("a", "0/b", "0/0/c"):
        (tmp_path / name).write_bytes(bytes(400))
    check_claimed(tmp_path, (1200,), np.uint8, compressed=False)
    with pytest.raises(FileFormatError, match=r"holds only 1\.2 kB"):
        check_claimed(tmp_path, (1201,), np.uint8, compressed=False)
