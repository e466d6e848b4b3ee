"""What a batch leaves in its output folder, so that it can be stopped at any moment and go on.

- ``batch.json``, the manifest: what was made from which content with which settings;
- ``batch.jsonl``, the log: a line for everything that happened, also of earlier runs;
- ``NAME.part``, a folder for each result that isn't finished: the planes that are done.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileWriteError

MANIFEST, LOG, UNFINISHED = "batch.json", "batch.jsonl", ".part"

_BLOCK_BYTES = 64 * 2**20


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is complete or as it was before, never half."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(content))  # many times faster than json.dump
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


class Manifest:
    """The records of a batch's files by their names, kept in the output folder.

    Several threads may record.

    Parameters
    ----------
    folder
        The output folder.

    Raises
    ------
    FileWriteError
        if a file of the manifest's name is there that is none.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / MANIFEST
        self._turn = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self._records = dict(json.loads(self._path.read_text("utf-8"))["files"])
            except (ValueError, KeyError, TypeError) as error:
                raise FileWriteError(
                    f"{self._path} is no manifest of a batch. Choose another output folder, or "
                    "remove the file."
                ) from error

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self._records.get(name, {})

    def record(self, name: str, **values: Any) -> None:
        """Replace the record of a file, on disk too, before this returns."""
        with self._turn:
            self._records[name] = values
            write_json(self._path, {"version": 1, "files": self._records})


class Log:
    """A JSON object a line, appended to the log; also keeps a second batch out of the folder.

    Raises
    ------
    FileWriteError
        if another batch is writing to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self._stream = self.path.open("a", encoding="utf-8")
        if not _locked(self._stream.fileno()):
            self._stream.close()
            raise FileWriteError(
                f"Another batch is writing to {folder}. Wait for it, or choose another folder."
            )

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
    return True


@dataclass(frozen=True)
class _Pixels:
    """Planes in a file one after the other, ``(n, rows, columns)``; reads rows that are asked for.

    Not mapped into memory: the pages would count as the program's.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    tick: Callable[[float], None] = lambda _: None
    """Told before each read how far into the file it ends, from 0 to 1."""

    @property
    def ndim(self) -> int:
        return 3

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        (planes, rows, columns), (_, height, width) = key, self.shape
        start, stop, _ = rows.indices(height)
        first, last, _ = planes.indices(self.shape[0])
        whole = last - first == self.shape[0]
        self.tick(stop / height if whole else last / self.shape[0])
        parts = [
            np.fromfile(
                self.path,
                self.dtype,
                (stop - start) * width,
                offset=(number * height + start) * width * self.dtype.itemsize,
            ).reshape(-1, width)[:, columns]
            for number in range(first, last)
        ]
        return np.stack(parts)


class Scratch:
    """The planes of a result that are done, in a folder beside where it will be.

    Planes come in any order. Each is written before it is marked as done, so a process may be
    killed at any moment; the next one goes on with the planes that aren't marked.

    Parameters
    ----------
    path
        The result; the folder has the same name and ``.part``.
    fingerprint
        What the planes depend on. Planes of another fingerprint are thrown away.
    shape
        Number of planes, rows and columns.
    dtype
        Of the pixels.

    Raises
    ------
    OSError
        if it can't be written.
    FileWriteError
        if there is too little space.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, Any],
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
    ) -> None:
        self.folder = path.with_name(path.name + UNFINISHED)
        self._pixels = _Pixels(self.folder / "pixels", shape, dtype)
        self._marks = self.folder / "done"
        state = {"fingerprint": dict(fingerprint), "shape": list(shape), "dtype": dtype.str}
        if _read_json(self.folder / "state.json") != state:
            self._begin(state)
        marks = np.fromfile(self._marks, np.uint8, shape[0])
        self.done = np.zeros(shape[0], bool)
        self.done[: len(marks)] = marks == 1
        self._stream = self._pixels.path.open("r+b")
        self._marking = self._marks.open("r+b")

    def _begin(self, state: Mapping[str, Any]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        needed = math.prod(self._pixels.shape) * self._pixels.dtype.itemsize
        # The same again for the result that is written from it.
        if shutil.disk_usage(self.folder).free < 2 * needed:
            self.folder.rmdir()
            raise FileWriteError(
                f"The disk is full: {self.folder.parent} has too little free space, "
                f"{2 * needed / 2**30:.1f} GiB are needed."
            )
        self._pixels.path.touch()
        self._marks.touch()
        write_json(self.folder / "state.json", state)

    def write(self, number: int, plane: NDArray[Any]) -> None:
        """Keep a plane, ``(rows, columns)``."""
        content = np.ascontiguousarray(plane, self._pixels.dtype).tobytes()
        self._stream.seek(number * len(content))
        self._stream.write(content)
        self._stream.flush()
        self._marking.seek(number)
        self._marking.write(b"\1")
        self._marking.flush()
        self.done[number] = True

    def as_array(
        self, shape: tuple[int, ...], plane_axes: tuple[int, int], tick: Callable[[float], None]
    ) -> Any:
        """The planes as a dask array of ``shape`` whose planes span ``plane_axes``.

        ``tick`` is told how much has been read; what it raises ends the reading.
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
        folder = self.folder / "result"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder / name

    def close(self) -> None:
        """Let go of the files; they stay."""
        for stream in (self._stream, self._marking):
            with suppress(OSError):
                stream.close()

    def remove(self) -> None:
        """Throw the planes away."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
