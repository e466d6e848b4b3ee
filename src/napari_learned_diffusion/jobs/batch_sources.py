"""What a batch works through: the images among files, folders and patterns, and their content."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_learned_diffusion.core.atomic import real
from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import FORMATS, Volume, read, supported_suffixes
from napari_learned_diffusion.files._extras import readable
from napari_learned_diffusion.files._lazy import files_behind
from napari_learned_diffusion.files.formats import Format, check_kind, format_of
from napari_learned_diffusion.jobs.batch_reading import PlaneReader

_DICOM, _ZARR = FORMATS["dicom"], FORMATS["zarr"]

_LAZY_ABOVE = 128 * 2**20
"""Bytes above which a file is read slice by slice."""

_HASHED_BYTES = 8 * 2**20
"""What is read at once of a file for its hash."""

_SETTLED_SECONDS = 2
"""After so long another change of a file gives it another time, on any file system."""

_MAGIC_LETTERS = frozenset("*?[")

Tick = Callable[[float], None]


def _silent(_: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Stamp:
    """What tells without reading that files are as they were.

    Parameters
    ----------
    digest
        SHA-256 of name, size, times of the last changes of content and of status, and number on the
        disk, of every file.
    is_settled
        Whether any change from now on would give another digest.
    """

    digest: str
    is_settled: bool


@dataclass(frozen=True)
class Source:
    """One image of a batch.

    Parameters
    ----------
    path
        A file, or the folder of a DICOM series or an OME-Zarr.
    name
        Its path below the folder that was given, with slashes; its result goes to the same place
        below the output folder.
    """

    path: Path
    name: str

    @property
    def place(self) -> str:
        """Where it is: what tells it from every other image, also of the same name."""
        return str(real(self.path))

    @property
    def format(self) -> Format | None:
        """The format that its result has unless told otherwise."""
        return format_of(self.path)

    def check(self) -> None:
        """Refuse what is no file or folder, before it is opened; raises as `find_sources`."""
        with readable(self.path):
            check_kind(self.path)

    def reads_from(self) -> list[Path]:
        """The files and folders that its pixels come from, which mustn't be written over."""
        return [self.path]

    def stamp(self) -> Stamp | None:
        """What tells at a glance that the content is the same; ``None`` where nothing does."""
        with readable(self.path):
            return content_stamp(self.path)

    def content_hash(self, tick: Tick = _silent) -> str:
        """SHA-256 of the content; ``tick`` as in `content_hash`."""
        with readable(self.path):
            return content_hash(self.path, tick)

    def read(self, series: int | None = None) -> Volume:
        """Open it; lazily where it is large, or a folder, which is read file by file anyway."""
        with readable(self.path):
            is_large = self.path.is_dir() or self.path.stat().st_size > _LAZY_ABOVE
        return read(self.path, series=series, lazy=True if is_large else None)


@dataclass(frozen=True, eq=False)
class VolumeSource(Source):
    """An image that is an array already, such as a layer of a viewer; nothing is copied.

    Parameters
    ----------
    path
        The name that it would have as a file; there is no such file.
    name
        As of every source.
    volume
        Its pixels and axes. It mustn't change while the batch runs.
    """

    volume: Volume

    @property
    def place(self) -> str:
        return f"array {self.name}"

    @property
    def format(self) -> Format | None:
        return FORMATS["tiff"]

    def check(self) -> None:
        """An array is there."""

    def reads_from(self) -> list[Path]:
        return sorted(files_behind(self.volume.data))

    def stamp(self) -> Stamp | None:
        return None

    def content_hash(self, tick: Tick = _silent) -> str:
        volume = self.volume
        meaning = (volume.data.dtype.str, volume.data.shape, volume.axes, volume.scale)
        total = hashlib.sha256(repr((*meaning, volume.units)).encode())
        planes = PlaneReader(volume.data, volume.plane_axes)
        for number in range(len(planes)):
            tick(number / len(planes))
            total.update(np.ascontiguousarray(planes[number]).tobytes())
        return total.hexdigest()

    def read(self, series: int | None = None) -> Volume:
        return self.volume


def find_sources(inputs: Iterable[str | Path], out: Path) -> list[Source]:
    """The images that files, folders and patterns stand for, each once, in their order.

    Parameters
    ----------
    inputs
        Files; folders, searched with all folders below for images of the formats that are known;
        and patterns with ``*``, ``?`` or ``[``, where ``**`` stands for any folders. A part of a
        pattern that is there as it is written is taken as it is written.
    out
        The output folder. Where it lies among the inputs, it is passed over, and so are the matches
        of a pattern that lie in it beside others that don't.

    Raises
    ------
    FileFormatError
        if there is no such file, it is no file or folder, a folder can't be read, or a folder or
        pattern has no image.
    """
    found: dict[Path, Source] = {}
    out = real(out)
    for given in inputs:
        sources = [source for path in _expand(given, out) for source in _sources(path, out)]
        if not sources:
            raise FileFormatError(
                f"{given} holds no image of a known format ({', '.join(supported_suffixes())})."
            )
        for source in sources:
            found.setdefault(real(source.path), source)
    return list(found.values())


# --- files, folders and patterns ------------------------------------------------------------------


def _expand(given: str | Path, out: Path) -> list[Path]:
    path = Path(given)
    if os.path.lexists(path):
        with readable(path):
            check_kind(path)
        return [path]
    start, parts = (Path(path.anchor), path.parts[1:]) if path.anchor else (Path(), path.parts)
    # What a pattern happens to hit and can't be an image is passed over, as in folders.
    matches = sorted(p for p in set(_matches(start, parts)) if _may_be_input(p))
    if not matches:
        raise FileFormatError(f"There is no file {given}. Check its name and folder.")
    # Results of an earlier run are no inputs of the next.
    return [match for match in matches if not real(match).is_relative_to(out)] or matches


def _matches(base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """What is there below a folder and fits the parts of a pattern."""
    if not parts:
        yield base
        return
    first, *others = parts
    rest = tuple(others)
    if first == "**":
        for folder in _folders_below(base):
            yield from _matches(folder, rest)
    elif os.path.lexists(base / first):
        yield from _matches(base / first, rest)
    elif _MAGIC_LETTERS & set(first):
        for path in _entries(base):
            is_shown = not path.name.startswith(".") or first.startswith(".")
            if is_shown and fnmatch.fnmatch(path.name, first) and (not rest or path.is_dir()):
                yield from _matches(path, rest)


def _folders_below(base: Path) -> Iterator[Path]:
    """A folder and all below it but hidden ones, each once, whatever links lead in a circle."""
    seen, waiting = {real(base)}, [base]
    while waiting:
        folder = waiting.pop()
        yield folder
        for path in _entries(folder):
            if path.is_dir() and not path.name.startswith(".") and real(path) not in seen:
                seen.add(real(path))
                waiting.append(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # no folder, or none that may be read: nothing in it fits
        return []


def _sources(path: Path, out: Path) -> Iterator[Source]:
    if path.is_dir() and not _is_image(path):
        yield from _inside(path, path, out, {real(path)})
    elif real(path) != out:
        yield Source(path, real(path).name)


def _inside(folder: Path, root: Path, out: Path, seen: set[Path]) -> Iterator[Source]:
    """Images in a folder and all below it; ``seen`` holds the folders that have been entered."""
    with readable(folder):
        paths = sorted(folder.iterdir())
    for path in paths:
        place = real(path)
        if path.name.startswith(".") or place == out:
            continue
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            if place in seen or _is_scratch(path):
                continue
            seen.add(place)
            if _is_image(path):
                yield Source(path, name)
            else:
                yield from _inside(path, root, out, seen)
        elif _may_be_input(path) and _is_file_of_a_format(path):
            yield Source(path, name)


def _may_be_input(path: Path) -> bool:
    """Whether to look at it: a file, a folder, or a broken link, which is told when it is read."""
    return path.is_file() or path.is_dir() or (path.is_symlink() and not path.exists())


def _is_file_of_a_format(path: Path) -> bool:
    """Whether a file's name, or where that doesn't tell its content, is of a known format."""
    try:
        return format_of(path) is not None
    except OSError:  # one that can't be read and isn't called like an image
        return False


def _is_scratch(folder: Path) -> bool:
    """Whether a folder holds unfinished slices of a batch."""
    return folder.name.endswith(".part") and (folder / "state.json").is_file()


def _is_image(folder: Path) -> bool:
    """Whether a folder is one image: a zarr, even a broken one, or nothing but DICOM files."""
    with readable(folder):
        if folder.name.lower().endswith(_ZARR.suffixes) or format_of(folder) is _ZARR:
            return True
        if not _DICOM.is_folder(folder):
            return False
        others = tuple(set(supported_suffixes()) - set(_DICOM.suffixes))
        return not any(p.is_dir() or p.name.lower().endswith(others) for p in folder.iterdir())


# --- content --------------------------------------------------------------------------------------


def content_stamp(path: Path) -> Stamp:
    """What tells without reading that a file, or every file of a folder, is as it was.

    The time of the last change of status can't be set, so a file that was replaced by another of
    the same size and time has another stamp. Windows doesn't know that time: nothing settles there.
    """
    total, newest = hashlib.sha256(), 0
    for file in _files(path):
        status = file.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        facts = (*times, status.st_size, status.st_ino)
        total.update(_name_of(file, path) + f"\0{facts}\n".encode())
        newest = max(newest, *times)
    is_settled = os.name != "nt" and time.time_ns() - newest > _SETTLED_SECONDS * 10**9
    return Stamp(total.hexdigest(), is_settled)


def content_hash(path: Path, tick: Tick = _silent) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder.

    Parameters
    ----------
    tick
        Told again and again how much is done, from 0 to 1; what it raises ends the work.
    """
    files = _files(path)
    size = sum(file.stat().st_size for file in files)
    read = 0

    def digest(file: Path) -> str:
        nonlocal read
        found = hashlib.sha256()
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_HASHED_BYTES):
                found.update(block)
                read += len(block)
                tick(read / max(size, read))
        return found.hexdigest()

    if path.is_file():
        return digest(path)
    total = hashlib.sha256()
    for file in files:
        total.update(_name_of(file, path) + f"\0{digest(file)}\n".encode())
    return total.hexdigest()


def result_stamp(path: Path) -> list[int]:
    """Number of files of a result, their bytes, and the time of the last change, which it keeps
    when it is renamed."""
    status = [file.stat() for file in _files(path)]
    return [
        len(status),
        sum(s.st_size for s in status),
        max((s.st_mtime_ns for s in status), default=0),
    ]


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _name_of(file: Path, folder: Path) -> bytes:
    """A file's name below a folder; names need not be text."""
    return os.fsencode(file.relative_to(folder).as_posix())
