"""The manifest of a batch: what was made from which input, with which settings.

``batch.json`` is a picture of all records. What is recorded while a batch runs is appended to
``batch.journal``, a line each, so that a record costs the same however many there are; at the end
of a batch, or where one was killed at the beginning of the next, the journal is merged and removed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from napari_learned_diffusion.core.atomic import real, sync_folder, why_not_written, write_text
from napari_learned_diffusion.core.errors import FileWriteError

MANIFEST, JOURNAL = "batch.json", "batch.journal"

VERSION = 2
"""Version 1 had the names of the inputs as keys, no journal, and no sizes of the results."""

Record: TypeAlias = Mapping[str, Any]

_UNFINISHED_WRITING = re.compile(rf"\.{re.escape(Path(MANIFEST).stem)}\.[0-9a-f]{{8}}\.part\.json")


def _is_relative(value: Any) -> bool:
    """Whether it is a path below the folder: nothing else is ever looked at or removed."""
    return (
        isinstance(value, str)
        and value != ""
        and not PurePosixPath(value).is_absolute()
        and not Path(value).is_absolute()
        and ".." not in PurePosixPath(value).parts
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_stamp(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) is int for n in value)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": _is_text,
    "source": _is_text,
    "state": _is_text,
    "input_hash": _is_text,
    "message": _is_text,
    "settings": lambda value: isinstance(value, dict),
    "weights": _is_text_or_none,
    "output": _is_relative,
    "scratch": _is_relative,
    "result": _is_stamp,
}
"""What the fields of a record must be; others, such as the time that it took, are only kept."""


class Manifest:
    """The records of a batch's inputs, kept in the output folder.

    An input is known by where it is; one of the same name from elsewhere is another. Several
    threads may record. Only one batch at a time may have a folder's manifest open.

    Parameters
    ----------
    folder
        The output folder.
    alike
        Makes one of names that the folder's disk doesn't tell apart.

    Raises
    ------
    FileWriteError
        if what is there in place of the manifest can't be set aside, or a newer version of the
        program has written it.
    """

    def __init__(self, folder: Path, alike: Callable[[str], str] = str) -> None:
        self._folder, self._alike = folder, alike
        self._path, self._journal_path = folder / MANIFEST, folder / JOURNAL
        self._turn = threading.RLock()
        self._records: dict[str, Record] = {}
        self._keys_of_name: defaultdict[str, set[str]] = defaultdict(set)
        self._key_of_output: dict[str, str] = {}
        self._journal: FileIO | None = None
        self._is_torn = False
        self.notes: list[str] = []
        """What wasn't as it should be, in sentences."""
        self.unfinished: list[Record] = []
        """What an earlier batch had recorded when it was killed."""
        try:
            self._load()
        except OSError as error:
            raise FileWriteError(why_not_written(self._path, error)) from error

    def of(self, place: str, name: str) -> Record:
        """The record of an input: by where it is, or of version 1 without that by its name."""
        with self._turn:
            return self._records.get(place) or self._records.get(_key_of_name(name), {})

    def of_name(self, name: str) -> list[Record]:
        """The records of all inputs of a name, wherever they are or were."""
        with self._turn:
            return [self._records[key] for key in sorted(self._keys_of_name.get(name, ()))]

    def record(self, place: str, **values: Any) -> None:
        """Replace the record of an input, on the disk too, before this returns.

        Raises
        ------
        OSError
            if it can't be written; it is as before then.
        """
        with self._turn:
            self._append({"source": place} | values)
            self._put({"source": place} | values)

    def close(self) -> None:
        """Merge the journal; where that fails, as on a full disk, the next batch does it."""
        with self._turn, suppress(OSError):
            if self._journal is not None:
                self._journal.close()
                self._journal = None
                self._merge()

    # --- records ----------------------------------------------------------------------------------

    def _put(self, record: Record) -> None:
        key, name = _key(record), record["name"]
        if key != _key_of_name(name):
            self._drop(_key_of_name(name))  # of version 1: known better now
        self._records[key] = record
        self._keys_of_name[name].add(key)
        output = record.get("output")
        if record["state"] != "done" or output is None:
            return
        # What another input had made at this place isn't there any more.
        target = self._alike(output)
        former = self._key_of_output.get(target, key)
        if former != key and former in self._records:
            self._records[former] = {**self._records[former], "state": "replaced"}
        self._key_of_output[target] = key

    def _drop(self, key: str) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self._keys_of_name[record["name"]].discard(key)

    # --- files ------------------------------------------------------------------------------------

    def _load(self) -> None:
        for path in self._folder.iterdir():
            if _UNFINISHED_WRITING.fullmatch(path.name):  # of a batch that was killed in it
                path.unlink(missing_ok=True)
        damaged = self._load_picture()
        if self._load_journal() or damaged:
            self._merge()

    def _load_picture(self) -> bool:
        """Read ``batch.json``; says whether a part of it is damaged, which is set aside then."""
        if not os.path.lexists(self._path):
            return False
        files = _read_files(self._path)
        if files is None:
            self._set_aside(self._path, "isn't the manifest of a batch or is damaged", "Nothing")
            return False
        whole = 0
        for label, values in files.items():
            record = _checked({"name": label, **values} if isinstance(values, dict) else None)
            if record is not None:
                self._put(record)
                whole += 1
        if whole < len(files):
            kept = f"{whole} of {len(files)} records"
            self._set_aside(self._path, "is damaged", kept)
        return whole < len(files)

    def _load_journal(self) -> bool:
        """Take over what a batch had recorded when it was killed; says whether there was any."""
        path = self._journal_path
        if not os.path.lexists(path):
            return False
        if not stat.S_ISREG(path.lstat().st_mode):
            self._set_aside(path, "isn't the journal of a batch", "Nothing")
            return False
        lines = path.read_bytes().split(b"\n")
        records = [_checked(_parsed(line)) for line in lines if line]
        whole = [record for record in records if record is not None]
        # The last line was being written when the batch was killed.
        if any(record is None for record in records[:-1]) or (records and not whole):
            self._set_aside(path, "is damaged", f"{len(whole)} of {len(records)} records")
        for record in whole:
            self._put(record)
        self.unfinished = whole
        return True

    def _set_aside(self, path: Path, what: str, kept: str) -> None:
        """Give what can't be read another name, because a new one will be written."""
        aside = path.with_name(f"{path.name}.damaged")
        number = 2
        while os.path.lexists(aside):
            aside = path.with_name(f"{path.name}.damaged{number}")
            number += 1
        try:
            path.rename(aside)
        except OSError as error:
            raise FileWriteError(
                f"{path} {what}, and can't be renamed ({error.strerror or error}). Choose another "
                "output folder, or remove it."
            ) from error
        self.notes.append(
            f"{path} {what}. It is kept as {aside.name}. {kept} could be taken over from it; "
            "results that aren't on record any more are replaced only where overwriting is allowed."
        )

    def _append(self, record: Record) -> None:
        line = json.dumps(record).encode("ascii") + b"\n"
        if self._journal is None:
            self._journal = self._journal_path.open("ab", buffering=0)
            sync_folder(self._folder)
        if self._is_torn:  # by a full disk
            line = b"\n" + line
        self._is_torn = True
        if self._journal.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._journal.fileno())
        self._is_torn = False

    def _merge(self) -> None:
        files: dict[str, Record] = {}
        for key, record in self._records.items():
            name = record["name"]
            files[name if name not in files else f"{name} ({key})"] = record
        write_text(real(self._path), json.dumps({"version": VERSION, "files": files}))
        self._journal_path.unlink(missing_ok=True)


def _key(record: Record) -> str:
    source = record.get("source")
    return _key_of_name(record["name"]) if source is None else str(source)


def _key_of_name(name: str) -> str:
    return f"name {name}"  # no absolute path, and no "array NAME"


def _read_files(path: Path) -> dict[str, Any] | None:
    """The records of ``batch.json``, unchecked; ``None`` where it isn't one."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        files = content["files"]
        version = int(content.get("version", 1))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    if version > VERSION:
        raise FileWriteError(
            f"{path} was written by a newer version of the program. Update "
            "napari-learned-diffusion, or choose another output folder."
        )
    return files if isinstance(files, dict) else None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _checked(record: Any) -> Record | None:
    """A record whose fields are what they must be."""
    if not isinstance(record, dict) or not {"name", "state"} <= record.keys():
        return None
    known = (name for name in _FIELDS if name in record)
    return record if all(_FIELDS[name](record[name]) for name in known) else None
