"""What a batch leaves in its output folder, so that it can be stopped at any moment and go on.

- ``batch.json``, the manifest: what was made from which content with which settings
  (`batch_manifest`);
- ``batch.jsonl``, the log: a line for everything that happened, also of earlier runs;
- ``NAME.part``, a folder for each result that isn't finished: the planes that are done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.atomic import check_target, shortened, write_text
from napari_learned_diffusion.core.errors import FileWriteError

LOG, UNFINISHED = "batch.jsonl", ".part"

_STATE, _PIXELS, _MARKS, _RESULT = "state.json", "pixels", "done", "result"
_OWN_NAME = re.compile(
    rf"{_PIXELS}|{_MARKS}|{_RESULT}|{re.escape(_STATE)}|\.state\.[0-9a-f]{{8}}\.part\.json"
)
"""What a folder of unfinished slices holds; anything else in it is the user's."""

_LONGEST_NAME, _KEPT_BYTES = 180, 80
"""Bytes of a folder's name; of a longer one the beginning is kept, and a number tells it apart."""

_DONE = np.uint64(1 << 32)
"""Added to the checksum of a slice that is done, so that it isn't 0."""

_BLOCK_BYTES = 64 * 2**20


class Log:
    """A JSON object a line, appended to the log; also keeps a second batch out of the folder.

    Raises
    ------
    FileWriteError
        if another batch is writing to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        check_target(self.path, overwrite=True)  # a pipe would wait for a reader
        self._stream = self.path.open("a", encoding="utf-8")
        if not _locked(self._stream.fileno()):
            self._stream.close()
            raise FileWriteError(
                f"Another batch is writing to {folder}. Wait for it, or choose another folder."
            )

    def alike(self, name: str) -> str:
        """One of the names that the folder's disk doesn't tell apart, or only some disks do."""
        name = unicodedata.normalize("NFC", name)
        return name.casefold() if self._is_caseless else name

    @cached_property
    def _is_caseless(self) -> bool:
        other = self.path.with_name(LOG.upper())
        return other.exists() and other.samefile(self.path)

    def write(self, event: str, **values: Any) -> None:
        """Append a line with the time (UTC), the event, and values; NaN becomes null.

        A log that can't be written, as on a full disk, stops nothing.
        """
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        with suppress(OSError):
            self._stream.write(json.dumps(line | plain) + "\n")
            self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk has been told of already
            self._stream.close()


def _locked(descriptor: int) -> bool:
    """Lock a file as long as it is open, however the process ends; where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network disks that have no locks
        return True
    return True


@dataclass(frozen=True)
class _Pixels:
    """Planes in a file one after the other, ``(n, rows, columns)``; reads rows that are asked for.

    Not mapped into memory: the pages would count as the program's.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    marks: NDArray[np.uint64]
    """Of every plane, what it must be; 0 where it isn't there."""
    tick: Callable[[float], None] = lambda _: None
    """Told before each read how far into the file it ends, from 0 to 1."""

    @property
    def ndim(self) -> int:
        return 3

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        (planes, rows, columns), height = key, self.shape[1]
        start, stop, _ = rows.indices(height)
        first, last, _ = planes.indices(self.shape[0])
        whole = last - first == self.shape[0]
        self.tick(stop / height if whole else last / self.shape[0])
        parts = [self._rows(number, start, stop)[:, columns] for number in range(first, last)]
        return np.stack(parts)

    def _rows(self, number: int, start: int, stop: int) -> NDArray[Any]:
        _, height, width = self.shape
        count = (stop - start) * width
        offset = (number * height + start) * width * self.dtype.itemsize
        found = np.fromfile(self.path, self.dtype, count, offset=offset)
        is_plane = stop - start == height
        if len(found) != count or (is_plane and _mark(found) != self.marks[number]):
            raise FileWriteError(
                f"Slices that were denoised have got lost from {self.path}: the disk or the "
                "connection to it has failed. Start the batch again; they are denoised anew."
            )
        return found.reshape(-1, width)


def _mark(plane: NDArray[Any]) -> np.uint64:
    """What is kept of a plane to know it again: that it is there, and a checksum."""
    content = np.ascontiguousarray(plane).reshape(-1).view(np.uint8)
    return _DONE + np.uint64(zlib.crc32(content.data))


class Scratch:
    """The planes of a result that are done, in a folder beside where it will be.

    Planes come in any order. A checksum of each is kept, so a process may be killed and a disk may
    fail at any moment: the next one goes on with the planes that aren't there as they were.

    Finding the folder touches nothing. It is then to be examined, perhaps in another thread, and
    opened.

    Parameters
    ----------
    target
        The result.
    source
        Where its input is.
    fingerprint
        What the planes depend on. Planes of another fingerprint are thrown away.
    shape
        Number of planes, rows and columns.
    dtype
        Of the pixels.
    known
        Names of folders, of those beside the target, that are on record as this input's.
    is_taken
        Whether a folder is to be something else.
    """

    def __init__(
        self,
        target: Path,
        source: str,
        fingerprint: Mapping[str, Any],
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        *,
        known: Collection[str] = (),
        is_taken: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        self._state = {
            "version": 2,
            "source": source,
            "fingerprint": dict(fingerprint),
            "shape": list(shape),
            "dtype": dtype.str,
        }
        self.folder = self._find_folder(target, known, is_taken)
        self._marks_path = self.folder / _MARKS
        self._marks = np.zeros(0, np.uint64)
        self._pixels = _Pixels(self.folder / _PIXELS, shape, dtype, self._marks)
        self._stream: BufferedRandom | None = None
        self._marking: BufferedRandom | None = None

    @property
    def done(self) -> NDArray[np.bool_]:
        """Which planes are there."""
        return np.asarray(self._marks != 0)

    def _find_folder(
        self, target: Path, known: Collection[str], is_taken: Callable[[Path], bool]
    ) -> Path:
        """A folder of this input's, or the first name that is free."""
        for name in _folder_names(target.name, str(self._state["source"])):
            folder = target.with_name(name)
            if is_taken(folder):
                continue
            if not os.path.lexists(folder) or (name in known and is_scratch(folder)):
                return folder
            state = _read_state(folder)
            if "source" in state:
                is_own = state["source"] == self._state["source"]
            else:  # of an earlier version; the fingerprint has the input's content in it
                is_own = state.get("fingerprint") == self._state["fingerprint"]
            if is_own and is_scratch(folder):
                return folder
        raise AssertionError("There is no end of names.")

    def examine(self, tick: Callable[[float], None] = lambda _: None) -> None:
        """Look which planes are there and as they were, or whether there is space for them all.

        Raises
        ------
        FileWriteError
            if there is too little space.
        OSError
            if the folder can't be read.
        """
        count = self._pixels.shape[0]
        state = _read_state(self.folder)
        wanted = self._state if "version" in state else _of_version_1(self._state)
        if state != wanted:
            self._check_space()
            self._keep_marks(np.zeros(count, np.uint64))
            return
        marks = self._marks_of_version_1() if wanted is not self._state else self._read_marks()
        for number in np.flatnonzero(marks):
            tick((int(number) + 1) / count)
            if self._found_mark(int(number)) != marks[number]:
                marks[number] = 0
        self._keep_marks(marks)

    def _keep_marks(self, marks: NDArray[np.uint64]) -> None:
        self._marks = marks
        self._pixels = replace(self._pixels, marks=marks)

    def _read_marks(self) -> NDArray[np.uint64]:
        marks = np.zeros(self._pixels.shape[0], np.uint64)
        with suppress(FileNotFoundError):
            found = np.fromfile(self._marks_path, "<u8", len(marks))
            marks[: len(found)] = found
        return marks

    def _marks_of_version_1(self) -> NDArray[np.uint64]:
        """One byte a plane and no checksum: a plane of zeros is one that has got lost."""
        marks = np.zeros(self._pixels.shape[0], np.uint64)
        with suppress(FileNotFoundError):
            for number in np.flatnonzero(np.fromfile(self._marks_path, np.uint8, len(marks)) == 1):
                plane = self._read_plane(int(number))
                if plane is not None and plane.any():
                    marks[number] = _mark(plane)
        return marks

    def _found_mark(self, number: int) -> np.uint64:
        plane = self._read_plane(number)
        return np.uint64(0) if plane is None else _mark(plane)

    def _read_plane(self, number: int) -> NDArray[Any] | None:
        pixels = self._pixels
        size = pixels.shape[1] * pixels.shape[2]
        try:
            found = np.fromfile(
                pixels.path, pixels.dtype, size, offset=number * size * pixels.dtype.itemsize
            )
        except FileNotFoundError:
            return None
        return found if len(found) == size else None

    def _check_space(self) -> None:
        needed = math.prod(self._pixels.shape) * self._pixels.dtype.itemsize
        place = self.folder.parent
        while not place.is_dir() and place != place.parent:
            place = place.parent
        # The same again for the result that is written from it.
        if shutil.disk_usage(place).free < 2 * needed:
            raise FileWriteError(
                f"The disk is full: {self.folder.parent} has too little free space, "
                f"{2 * needed / 2**30:.1f} GiB are needed."
            )

    def open(self) -> None:
        """Make the folder, or open what is in it.

        Raises
        ------
        OSError
            if it can't be written.
        """
        if _read_state(self.folder) != self._state:
            whole = self._marks.any()  # of an earlier version
            if not whole:
                _empty(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._pixels.path.touch()
            self._marks_path.touch()
            write_text(self.folder / _STATE, json.dumps(self._state))
        else:
            self._pixels.path.touch()
            self._marks_path.touch()
        try:
            self._stream = self._pixels.path.open("r+b")
            self._marking = self._marks_path.open("r+b")
            self._marking.write(self._marks.astype("<u8").tobytes())  # without those that got lost
            self._marking.flush()
        except OSError:
            self.close()
            raise

    def write(self, number: int, plane: NDArray[Any]) -> None:
        """Keep a plane, ``(rows, columns)``."""
        if self._stream is None or self._marking is None:
            raise RuntimeError("the scratch isn't open")
        content = np.ascontiguousarray(plane, self._pixels.dtype)
        mark = _mark(content)
        self._stream.seek(number * content.nbytes)
        self._stream.write(content.data)
        self._stream.flush()
        self._marking.seek(number * mark.nbytes)
        self._marking.write(np.array(mark, "<u8").tobytes())
        self._marking.flush()
        self._marks[number] = mark

    def as_array(
        self, shape: tuple[int, ...], plane_axes: tuple[int, int], tick: Callable[[float], None]
    ) -> Any:
        """The planes as a dask array of ``shape`` whose planes span ``plane_axes``.

        ``tick`` is told how much has been read; what it raises ends the reading. Planes that aren't
        as they were raise FileWriteError.
        """
        import dask.array as da

        count, height, width = self._pixels.shape
        rows, columns = plane_axes
        last = {rows, columns} == {len(shape) - 2, len(shape) - 1}
        row_bytes = count * width * self._pixels.dtype.itemsize
        band = max(1, min(height, _BLOCK_BYTES // row_bytes))
        array = da.from_array(  # type: ignore[no-untyped-call]
            replace(self._pixels, tick=tick),
            chunks=(1, height, width) if last else (count, band, width),
            name=False,
            meta=np.empty((0, 0, 0), self._pixels.dtype),
        )
        others = [n for axis, n in enumerate(shape) if axis not in plane_axes]
        stacked = array.reshape(*others, height, width)
        return da.moveaxis(stacked, (-2, -1), (rows, columns))

    def staging(self, name: str) -> Path:
        """Where to write the result to, under its name, before it is moved to its place."""
        folder = self.folder / _RESULT
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder / name

    def close(self) -> None:
        """Let go of the files; they stay."""
        for stream in (self._stream, self._marking):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def remove(self) -> None:
        """Throw the planes away."""
        self.close()
        remove_scratch(self.folder)


def is_scratch(folder: Path) -> bool:
    """Whether a folder holds nothing but what a scratch does."""
    is_own = folder.is_dir() and not folder.is_symlink()
    return is_own and all(_OWN_NAME.fullmatch(path.name) for path in folder.iterdir())


def remove_scratch(folder: Path) -> None:
    """Remove what a scratch holds, and the folder, unless there is anything else in it."""
    with suppress(OSError):
        _empty(folder)
        folder.rmdir()


def _empty(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if _OWN_NAME.fullmatch(path.name):
            if path.name == _RESULT:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _folder_names(name: str, source: str) -> Iterator[str]:
    """Names for a scratch, the plainest first."""
    number = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    if len(os.fsencode(name)) <= _LONGEST_NAME:
        yield name + UNFINISHED
    start = shortened(name, _KEPT_BYTES)
    yield f"{start}.{number}{UNFINISHED}"
    for count in itertools.count(2):
        yield f"{start}.{number}-{count}{UNFINISHED}"


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
    try:
        state = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _of_version_1(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("fingerprint", "shape", "dtype")}
