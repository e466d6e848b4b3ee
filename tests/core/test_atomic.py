"""What is written is whole or not there, and nothing of the user's is replaced without leave."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from napari_learned_diffusion.core import atomic
from napari_learned_diffusion.core.errors import FileWriteError

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(path: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic.written_aside(path, overwrite=overwrite) as unfinished:
        unfinished.write_text(text)


def put_folder(path: Path, text: str, *, overwrite: bool = False, foreign: Any = None) -> None:
    with atomic.written_aside(path, overwrite=overwrite, folder=True, foreign=foreign) as aside:
        aside.mkdir()
        (aside / "content").write_text(text)


def notes_in(folder: Path) -> Path | None:
    return next((path for path in folder.iterdir() if path.name != "content"), None)


def refuse(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_is_replaced_only_with_leave(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    put(path, "old")
    with pytest.raises(FileWriteError, match=r"exists.*allow overwriting"):
        put(path, "new")
    assert path.read_text() == "old"
    put(path, "new", overwrite=True)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("links", [True, False])
def test_what_is_put_at_the_place_while_a_file_is_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Also on file systems without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    path = tmp_path / "a.tif"
    put(path, "first")
    path.unlink()
    writing = atomic.written_aside(path, overwrite=False)
    writing.__enter__().write_text("mine")
    path.write_text("the user's")
    with pytest.raises(FileWriteError, match="exists"):
        writing.__exit__(None, None, None)
    assert path.read_text() == "the user's"
    assert names(tmp_path) == ["a.tif"]


@pytest.mark.skipif(sys.platform == "win32", reason="renaming doesn't replace there anyway")
def test_what_appears_in_the_moment_of_renaming_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tif"
    link = os.link

    def late(source: Path, target: Path) -> None:
        path.write_text("the user's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileWriteError, match="exists"):
        put(path, "mine")
    assert path.read_text() == "the user's"
    assert names(tmp_path) == ["a.tif"]


def test_a_folder_is_replaced_only_with_leave_and_if_nothing_else_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    put_folder(path, "old")
    with pytest.raises(FileWriteError, match="exists"):
        put_folder(path, "new", foreign=notes_in)
    put_folder(path, "new", overwrite=True, foreign=notes_in)
    assert (path / "content").read_text() == "new"
    (path / "notes.txt").write_text("the user's")
    with pytest.raises(FileWriteError, match=r"holds notes\.txt, which isn't part"):
        put_folder(path, "newer", overwrite=True, foreign=notes_in)
    assert names(path) == ["content", "notes.txt"]
    assert names(tmp_path) == ["a.zarr"]


def test_a_folder_that_cannot_be_exchanged_is_back_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    put_folder(path, "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == path and (self / "content").read_text() == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="Input/output"):
            put_folder(path, "new", overwrite=True)
    assert (path / "content").read_text() == "old"
    assert names(tmp_path) == ["a.zarr"]


def test_a_file_and_a_folder_never_take_each_others_place(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileWriteError, match="is a folder"):
        put(tmp_path / "folder", "new", overwrite=True)
    with pytest.raises(FileWriteError, match="is a file"):
        put_folder(tmp_path / "file", "new", overwrite=True)
    assert names(tmp_path) == ["file", "folder"]


@posix_only
def test_a_file_is_written_through_a_link_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.tif").write_text("old")
    (tmp_path / "a.tif").symlink_to("far/b.tif")
    put(tmp_path / "a.tif", "new", overwrite=True)
    assert (tmp_path / "a.tif").is_symlink()
    assert (tmp_path / "far" / "b.tif").read_text() == "new"
    assert names(tmp_path / "far") == ["b.tif"]


@posix_only
@pytest.mark.parametrize("target", ["nowhere/b.tif", "a.tif"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.tif").symlink_to(target)
    with pytest.raises(FileWriteError, match=r"is a link to .*, which isn't there"):
        put(tmp_path / "a.tif", "new", overwrite=True)
    assert (tmp_path / "a.tif").is_symlink()


@posix_only
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "a.tif"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        monkeypatch.chdir(tmp_path)  # paths of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("a.tif")
    with pytest.raises(FileWriteError, match="device, pipe or socket"):
        put(path, "new", overwrite=True)


def test_another_file_system_behind_a_link_is_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, far = tmp_path / "staged", tmp_path / "far"
    staged.mkdir()
    far.mkdir()
    (staged / "a.tif").write_text("new")
    (far / "a.tif").write_text("old")
    replace = Path.replace

    def within(self: Path, target: Path) -> Path:
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", within)
    atomic.move_into_place(staged / "a.tif", far / "a.tif", overwrite=True)
    assert (far / "a.tif").read_text() == "new"
    assert names(far) == ["a.tif"]
    assert names(staged) == []


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folders of an image before, and the folder that holds it after the renaming."""
    course: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        here = Path(f"/proc/self/fd/{descriptor}")
        course.append(here.readlink().name if here.exists() else "?")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        course.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    put_folder(tmp_path / "a.zarr", "new")
    at = course.index("renamed")
    assert len(course[:at]) == 2
    if "?" not in course:
        assert "content" in course[:at]
        assert course[at + 1 :] == [tmp_path.name]


def test_a_disk_that_fails_while_it_syncs_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.tif", "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            put(tmp_path / "a.tif", "new", overwrite=True)
    assert (tmp_path / "a.tif").read_text() == "old"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.EINVAL))  # a file system that can't sync
        put(tmp_path / "a.tif", "new", overwrite=True)
    assert (tmp_path / "a.tif").read_text() == "new"
    assert names(tmp_path) == ["a.tif"]


@pytest.mark.parametrize("name", ["断層" * 40 + "像.tif", "x" * 251 + ".tif", "a." + "b" * 250])
def test_names_up_to_the_longest_that_there_may_be(tmp_path: Path, name: str) -> None:
    put(tmp_path / name, "long")
    put(tmp_path / name, "longer", overwrite=True)
    assert (tmp_path / name).read_text() == "longer"
    assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_told(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_text("x")
    with pytest.raises(FileWriteError, match="too long"):
        atomic.copy_file(source, tmp_path / ("x" * 300), overwrite=False)


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.tif")
    put(path, "odd")
    assert path.read_text() == "odd"


def test_the_programs_own_files_are_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    atomic.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state.json"]


def test_a_copy_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("x")
    monkeypatch.setattr(shutil, "copyfile", refuse(errno.ENOSPC))
    with pytest.raises(FileWriteError, match="disk is full"):
        atomic.copy_file(source, target, overwrite=False)
    assert names(tmp_path) == ["a"]
