"""Writing files so that they are complete or not there, and what may be replaced by them.

The one place that decides whether something may be replaced, and that writes aside, syncs and
renames. Everything that the package writes for a user goes through here.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from napari_learned_diffusion.core.errors import FileWriteError

Foreign = Callable[[Path], Path | None]
"""The first thing in a folder that isn't of what would be written there; None if there is none."""

_STEM_BYTES, _SUFFIX_BYTES = 60, 20
"""Of a file's own name, so much is kept in the name that it has while it is written."""

_SYNCING = 8
"""Files of a folder that are synced at once; file systems then do several in one go."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES}
"""Of file systems that can't sync folders; a disk that fails gives other numbers."""


def check_target(
    path: Path, *, overwrite: bool, folder: bool = False, foreign: Foreign | None = None
) -> None:
    """Refuse a place where something is that may not be replaced.

    Parameters
    ----------
    path
        What would be written.
    overwrite
        Whether what is there may be replaced, as long as it is of the same kind.
    folder
        Whether a folder would be written, not a file.
    foreign
        Tells what in a folder that is there isn't of such an image; that is never replaced.

    Raises
    ------
    FileWriteError
        if something is there that may not be replaced.
    """
    if not os.path.lexists(path):
        return
    if not path.exists():
        raise FileWriteError(
            f"{path} is a link to {path.readlink()}, which isn't there. Remove the link, or choose "
            "another name."
        )
    if not (path.is_file() or path.is_dir()):
        raise FileWriteError(
            f"{path} is neither a file nor a folder, but a device, pipe or socket. Choose another "
            "name."
        )
    if path.is_dir() and not folder:
        raise FileWriteError(f"{path} is a folder. Choose another name, or one in the folder.")
    if folder and not path.is_dir():
        raise FileWriteError(f"{path} is a file, and a folder is to be written. Choose another.")
    if not overwrite:
        raise FileWriteError(
            f"{path} exists. Choose another name or folder, or allow overwriting (shell: add "
            "--overwrite)."
        )
    other = foreign(path) if folder and foreign is not None else None
    if other is not None:
        raise FileWriteError(
            f"{path} holds {other.relative_to(path)}, which isn't part of an image as it would be "
            "written there, and is never replaced. Move it elsewhere, or choose another name."
        )


@contextmanager
def written_aside(
    path: Path, *, overwrite: bool, folder: bool = False, foreign: Foreign | None = None
) -> Iterator[Path]:
    """Give a name beside ``path`` to write to, and move it there once all went well.

    Whatever goes wrong, what was there before is as it was, and nothing else is left.

    Raises
    ------
    FileWriteError
        as `check_target`, before and after the writing.
    OSError
        if it can't be written.
    """
    check_target(path, overwrite=overwrite, folder=folder, foreign=foreign)
    # In the same folder, because only within a file system is renaming atomic; and through a link
    # to its target, which would otherwise be replaced by a file.
    place = real(path)
    unfinished = place.with_name(aside_name(place))
    try:
        yield unfinished
        move_into_place(unfinished, place, overwrite=overwrite, foreign=foreign)
    finally:
        # In a folder that can't be written this fails as well: the reason is on its way up.
        with suppress(OSError):
            _remove(unfinished)


def move_into_place(
    finished: Path, path: Path, *, overwrite: bool, foreign: Foreign | None = None
) -> None:
    """Sync a file or folder, and rename it to ``path``.

    Without leave to overwrite nothing is replaced, not even what was put there a moment ago.

    Raises
    ------
    FileWriteError
        as `check_target`.
    OSError
        if it can't be moved; it is where it was then, and so is what was at ``path``.
    """
    is_folder = finished.is_dir()
    check_target(path, overwrite=overwrite, folder=is_folder, foreign=foreign)
    path = real(path)
    sync(finished)
    try:
        if not os.path.lexists(path):
            _rename_to_nothing(finished, path)
        elif is_folder:
            _exchange_folder(finished, path)
        else:
            finished.replace(path)
    except FileExistsError:
        check_target(path, overwrite=False, folder=is_folder, foreign=foreign)
        raise
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_across(finished, path, overwrite=overwrite, foreign=foreign)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file of the program's own, complete or as it was before, and on the disk at once."""
    unfinished = path.with_name(aside_name(path))
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def copy_file(source: Path, target: Path, *, overwrite: bool) -> None:
    """Copy a file; the target is complete or as it was before, never half.

    Raises
    ------
    FileWriteError
        if it can't be written, or is there and may not be replaced.
    """
    try:
        with written_aside(target, overwrite=overwrite) as unfinished:
            shutil.copyfile(source, unfinished)
    except OSError as error:
        raise FileWriteError(why_not_written(target, error)) from error


def aside_name(path: Path) -> str:
    """A name for a file while it is written: hidden, with its suffix, and never too long."""
    # Of two, such as .ome.tif, both: they say in which form it is to be written.
    kept = ("".join(path.suffixes[-2:]), path.suffix, "")
    suffix = next(s for s in kept if len(s.encode("utf-8", "replace")) <= _SUFFIX_BYTES)
    return f".{shortened(path.stem, _STEM_BYTES)}.{secrets.token_hex(4)}.part{suffix}"


def shortened(name: str, n_bytes: int) -> str:
    """The beginning of a name, of at most so many bytes and whole letters."""
    return os.fsencode(name)[:n_bytes].decode("utf-8", "ignore")


def real(path: Path) -> Path:
    """A path without links; unlike ``Path.resolve`` it takes links that lead in a circle."""
    return Path(os.path.realpath(path))


def sync(path: Path) -> None:
    """Have a file, or all files and folders below a folder, on the disk before this returns."""
    if not path.is_dir():
        _sync_file(path)
        return
    files: list[Path] = []
    folders = [path]
    for found in path.rglob("*"):
        (folders if found.is_dir() else files).append(found)
    with ThreadPoolExecutor(_SYNCING, "sync") as threads:
        for _ in threads.map(_sync_file, files):
            pass
    for folder in folders:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    if os.name == "nt":  # folders can't be opened there
        return
    _sync_file(folder, os.O_RDONLY)


def why_not_written(path: Path, error: OSError) -> str:
    """What the system's refusal to write means for the user, and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {path} was not written. Free space or choose another folder."
    if error.errno == errno.ENAMETOOLONG:
        return f"The name of {path} is too long for its disk. Choose a shorter one."
    return (
        f"{path} can't be written ({error.strerror or error}). "
        "Check that the folder exists and that you may write to it, or choose another."
    )


def _sync_file(path: Path, flags: int = os.O_RDWR) -> None:
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # a file that may only be read; what matters is that it was written
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _rename_to_nothing(finished: Path, path: Path) -> None:
    """Rename, but fail with FileExistsError where something has appeared meanwhile."""
    if os.name == "nt" or finished.is_dir():  # neither replaces anything but an empty folder
        finished.rename(path)
        return
    try:
        os.link(finished, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        finished.replace(path)
    else:
        finished.unlink()


def _exchange_folder(finished: Path, path: Path) -> None:
    """Put a folder in the place of another, which no system does in one step."""
    old = finished.with_name(aside_name(path))
    path.rename(old)
    try:
        finished.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _copy_across(finished: Path, path: Path, *, overwrite: bool, foreign: Foreign | None) -> None:
    """Move to another file system, where a link has led."""
    is_folder = finished.is_dir()
    with written_aside(path, overwrite=overwrite, folder=is_folder, foreign=foreign) as aside:
        (shutil.copytree if is_folder else shutil.copyfile)(finished, aside)
    _remove(finished)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
