"""What isn't a file of pixels is refused in words, and at once."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import FORMATS, get_reader, read, supported_suffixes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such files")

SUFFIXES = [*supported_suffixes(), ""]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_named_pipe_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    with pytest.raises(FileFormatError, match="is a named pipe, not an image file"):
        read(path)
    link = tmp_path / f"b{suffix}"
    link.symlink_to(path)
    with pytest.raises(FileFormatError, match="is a named pipe"):
        read(link)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_link_to_a_device_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.symlink_to("/dev/zero")
    with pytest.raises(FileFormatError, match="is a device, not an image file"):
        read(path)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("a.tif")
        with pytest.raises(FileFormatError, match="is a socket"):
            read("a.tif")


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tif").symlink_to(tmp_path / "b.tif")
    with pytest.raises(FileFormatError, match=r"is a link to .*b\.tif, which isn't there"):
        read(tmp_path / "a.tif")
    (tmp_path / "b.tif").symlink_to(tmp_path / "a.tif")
    with pytest.raises(FileFormatError, match="leads back to itself"):
        read(tmp_path / "a.tif")


def test_a_folder_that_contains_itself_is_no_image(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    assert get_reader(tmp_path) is None
    with pytest.raises(FileFormatError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a\0b.tif", "x" * 300 + ".tif", "", "gone.mrc", "gone/gone.tif"])
def test_names_of_no_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileFormatError):
        read(tmp_path / name)


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mrc"
    path.write_bytes(bytes(2000))

    def read_mrc(*_: object) -> None:
        raise MemoryError

    monkeypatch.setitem(FORMATS, "mrc", replace(FORMATS["mrc"], read=read_mrc))
    with pytest.raises(FileFormatError, match="more memory than there is"):
        read(path)
