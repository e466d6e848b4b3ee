"""What a batch works through: the images among files, folders and patterns, and their content."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import FORMATS, Volume, read, supported_suffixes
from napari_learned_diffusion.files._lazy import files_behind
from napari_learned_diffusion.files.formats import Format, format_of
from napari_learned_diffusion.jobs.batch_reading import PlaneReader

_DICOM, _ZARR = FORMATS["dicom"], FORMATS["zarr"]

_LAZY_ABOVE = 128 * 2**20
"""Bytes above which a file is read slice by slice."""

_HASHED_BYTES = 8 * 2**20
"""What is read at once of a file for its hash."""

Tick = Callable[[float], None]


def _silent(_: float) -> None:
    """Tell nobody."""


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
        """What the manifest knows it by."""
        return str(self.path.resolve())

    @property
    def format(self) -> Format | None:
        """The format that its result has unless told otherwise."""
        return format_of(self.path)

    def reads_from(self) -> list[Path]:
        """The files and folders that its pixels come from, which mustn't be written over."""
        return [self.path]

    def stamp(self) -> list[int] | None:
        """What tells at a glance that the content is the same; ``None`` where nothing does."""
        return content_stamp(self.path)

    def content_hash(self, tick: Tick = _silent) -> str:
        """SHA-256 of the content; ``tick`` as in `content_hash`."""
        return content_hash(self.path, tick)

    def read(self, series: int | None = None) -> Volume:
        """Open it; lazily where it is large, or a folder, which is read file by file anyway."""
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

    def reads_from(self) -> list[Path]:
        return sorted(files_behind(self.volume.data))

    def stamp(self) -> list[int] | None:
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
        and patterns with ``*``, ``?`` or ``[``, where ``**`` stands for any folders.
    out
        The output folder, which is passed over where it lies among the inputs.

    Raises
    ------
    FileFormatError
        if there is no such file, or a folder or pattern that has no image.
    """
    found: dict[Path, Source] = {}
    for given in inputs:
        sources = [source for path in _expand(given) for source in _sources(path, out.resolve())]
        if not sources:
            raise FileFormatError(
                f"{given} holds no image of a known format ({', '.join(supported_suffixes())})."
            )
        for source in sources:
            found.setdefault(source.path.resolve(), source)
    return list(found.values())


def _expand(given: str | Path) -> list[Path]:
    path = Path(given)
    if path.exists():
        return [path]
    # Path.glob knows no absolute patterns.
    matches = sorted(glob.glob(str(given), recursive=True))  # noqa: PTH207
    if not matches:
        raise FileFormatError(f"There is no file {given}. Check its name and folder.")
    return [Path(match) for match in matches]


def _sources(path: Path, out: Path) -> Iterator[Source]:
    if path.is_dir() and not _is_image(path):
        yield from _inside(path, path, out)
    elif path.resolve() != out:
        yield Source(path, path.resolve().name)


def _inside(folder: Path, root: Path, out: Path) -> Iterator[Source]:
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path.name.startswith(".") or path.name.endswith(".part") or path.resolve() == out:
            continue
        if path.is_dir():
            if _is_image(path):
                yield Source(path, name)
            else:
                yield from _inside(path, root, out)
        elif path.name.lower().endswith(supported_suffixes()):
            yield Source(path, name)


def _is_image(folder: Path) -> bool:
    """Whether a folder is one image: a zarr, even a broken one, or nothing but DICOM files."""
    if folder.name.lower().endswith(_ZARR.suffixes) or format_of(folder) is _ZARR:
        return True
    if not _DICOM.is_folder(folder):
        return False
    others = tuple(set(supported_suffixes()) - set(_DICOM.suffixes))
    return not any(p.is_dir() or p.name.lower().endswith(others) for p in folder.iterdir())


def content_stamp(path: Path) -> list[int]:
    """Number of files, their bytes, and the time of the last change; for telling at a glance."""
    status = [file.stat() for file in _files(path)]
    return [len(status), sum(s.st_size for s in status), max(s.st_mtime_ns for s in status)]


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
        total.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
    return total.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
