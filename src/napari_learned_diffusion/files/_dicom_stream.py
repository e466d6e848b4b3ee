"""DICOM files as bytes: whether a file is one, and its elements, in as much memory as it takes."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from napari_learned_diffusion.core.errors import FileFormatError

_PREAMBLE = 128
_MAGIC = b"DICM"
_START = _PREAMBLE + len(_MAGIC)

_FIRST_GROUPS = {b"\x02\x00": "little", b"\x08\x00": "little", b"\x00\x08": "big"}
"""Groups that a file without a preamble begins with, and the byte order that they tell."""

_FIRST_VALUE = 256
"""Bytes of the longest value that the first element of such a file has: a number, date or UID."""

_LENGTH, _SYNTAX = b"\x02\x00\x00\x00UL", b"\x02\x00\x10\x00UI"
"""Elements of a file's own header: how long it is, and how the others are encoded."""

_HEAD = 4096
"""Bytes in which that header lies."""

_INFLATED_AT_ONCE = 2**20
_INFLATED_BEYOND = 2**24
"""Bytes that a deflated file may have beside its pixels."""


def is_dicom(path: Path) -> bool:
    """Whether a file's content says that it is DICOM; cheap, and without a library.

    Files without the preamble begin with their first element: a group of 2 or 8, and then either a
    type of value or a length that such a value can have.
    """
    with path.open("rb") as stream:
        start = stream.read(_START)
    return start[_PREAMBLE:] == _MAGIC or _is_first_element(start[:8])


def _is_first_element(start: bytes) -> bool:
    order = _FIRST_GROUPS.get(start[:2])
    if order is None or len(start) < 8:
        return False
    number = int.from_bytes(start[2:4], "little" if order == "little" else "big")
    is_typed = start[4:6].isalpha() and start[4:6].isupper()
    length = int.from_bytes(start[4:8], "little")
    # An even length, as every value has; a typed one has its length after the type.
    is_counted = order == "little" and 0 < length <= _FIRST_VALUE and length % 2 == 0
    return number <= _FIRST_VALUE and (is_typed or is_counted)


class _Bounded(io.BufferedReader):
    """A file that gives what is left where more is asked for, before memory is taken for it."""

    def __init__(self, path: Path) -> None:
        raw = io.FileIO(path)
        super().__init__(raw)
        self._size = raw.seek(0, io.SEEK_END)
        self.seek(0)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with _Bounded(path) as stream:
        start = stream.read(_START)
        stream.seek(0)
        # Only the beginning of one that has no preamble, or pydicom would take any text for one.
        if start[_PREAMBLE:] != _MAGIC and not _is_first_element(start[:8]):
            raise FileFormatError(
                f"{path} isn't a readable DICOM file: it doesn't begin like one. "
                "It may be damaged or of another format: copy or export it again."
            )
        yield stream


def read_elements(
    path: Path, pydicom: Any, tags: list[str] | None = None, *, before_pixels: bool = False
) -> Any:
    """The elements of a file.

    Parameters
    ----------
    path
        The file.
    pydicom
        The library.
    tags
        Names of the elements that are wanted; ``None``: all.
    before_pixels
        Whether to stop at the pixels.

    Returns
    -------
    pydicom.FileDataset
        With a transfer syntax, as files without a preamble lack it.

    Raises
    ------
    FileFormatError
        if it doesn't begin like DICOM, or is compressed to far less than it says.
    Exception
        what the library raises on damaged files.
    """
    options = {"force": True, "stop_before_pixels": before_pixels, "specific_tags": tags}
    uids = pydicom.uid
    with _opened(path) as stream:
        if _meta_element(stream, _SYNTAX) == uids.DeflatedExplicitVRLittleEndian.encode():
            dataset = _read_deflated(path, stream, pydicom, options)
        else:
            dataset = pydicom.dcmread(stream, **options)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uids.ExplicitVRLittleEndian if little else uids.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _meta_element(stream: BinaryIO, tag: bytes) -> bytes | None:
    """An element of the file's own header, by its number and type; None if it isn't there."""
    head = stream.read(_HEAD)
    stream.seek(0)
    at = head.find(tag, _START)
    if head[_PREAMBLE:_START] != _MAGIC or at < 0:
        return None
    start = at + len(tag) + 2
    length = int.from_bytes(head[at + len(tag) : start], "little")
    return head[start : start + length].rstrip(b"\0")


def _read_deflated(path: Path, stream: BinaryIO, pydicom: Any, options: dict[str, Any]) -> Any:
    """A file whose elements are deflated: inflated no further than its pixels can take.

    Its stream has no checksum, but it must come to its end with the file.
    """
    length = int.from_bytes(_meta_element(stream, _LENGTH) or b"", "little")
    stream.seek(_START + 12 + length)  # the length itself is an element of 12 bytes
    packed = stream.read()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(packed, _INFLATED_BEYOND)
    head = _parse(plain, pydicom, options | {"stop_before_pixels": True, "specific_tags": None})
    if options["stop_before_pixels"]:
        return head
    rows, columns, bits, frames = (
        int(head.get(name) or 1) for name in ("Rows", "Columns", "BitsAllocated", "NumberOfFrames")
    )
    most = rows * columns * bits * frames // 8 + _INFLATED_BEYOND
    pieces = [plain]
    total = len(plain)
    while not inflater.eof and inflater.unconsumed_tail:
        pieces.append(inflater.decompress(inflater.unconsumed_tail, _INFLATED_AT_ONCE))
        total += len(pieces[-1])
        if total > most:
            raise FileFormatError(
                f"{path} holds far more than the {rows} × {columns} pixels that it tells of. It is "
                "damaged, or no image: copy or export it again."
            )
    whole = b"".join(pieces)
    # Nothing may follow, but some programs end as gzip does, with checksum and length.
    checksum = zlib.crc32(whole).to_bytes(4, "little") + len(whole).to_bytes(4, "little")
    rest = inflater.unused_data
    if not inflater.eof or (rest.strip(b"\0") and rest[:8] != checksum):
        raise FileFormatError(f"{path} is truncated or damaged. Copy or export it again.")
    return _parse(whole, pydicom, options)


def _parse(plain: bytes, pydicom: Any, options: dict[str, Any]) -> Any:
    dataset = pydicom.dcmread(io.BytesIO(plain), **options)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    return dataset
