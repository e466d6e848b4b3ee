"""Whether chunks of a zarr array can be what its metadata claims, asked before they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._honest import check_claimed

_COUNTED = 100_000
"""Chunks are all counted in arrays of at most so many; else it is made sure that some are there."""

_LEAST_SHARE = 1e-3
_SPARSE = 64 * 2**20
"""Of larger arrays (in bytes), at least this share of the chunks must be there."""

_MANY_MISSING = 0.1

_HEADER_BYTES = 32
"""No header of a compressed chunk is longer."""

_NO_CHUNK = 2**64 - 1
"""Start and length of a chunk that a shard doesn't hold."""


def check_chunks(path: Path, array: Any) -> list[str]:
    """Refuse an array most of which can't be there; a note where much of it isn't.

    By the specification a chunk that isn't there is one of fill values, but an array that claims
    a million times more than there is has been damaged or forged.
    """
    folder = path / array.path
    check_claimed(folder, array.shape, array.dtype, compressed=True)
    sizes = array.shards or array.chunks
    total = math.prod(-(-n // max(1, size)) for n, size in zip(array.shape, sizes, strict=True))
    enough = total if total <= _COUNTED else math.ceil(total * _LEAST_SHARE)
    count = 0
    for _ in _chunk_files(folder):
        count += 1
        if count >= enough:
            return []
    if array.nbytes > _SPARSE and count < total * _LEAST_SHARE:
        raise FileFormatError(
            f"{path} claims {total:,} chunks, and {count:,} are there. "
            "It may be damaged: copy or export it again."
        )
    if total - count < total * _MANY_MISSING:
        return []
    return [
        f"{path.name} lacks {total - count:,} of its {total:,} chunks; their pixels were read as "
        f"the fill value {array.fill_value}."
    ]


def _chunk_files(folder: Path) -> Iterator[str]:
    """Files of chunks, none of which is opened.

    Raises
    ------
    FileFormatError
        if one is a pipe or a device, which could be read for ever.
    """
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif not entry.is_file():
                    raise FileFormatError(f"{entry.path} isn't a file. Remove it, or copy again")
                elif entry.name != "zarr.json" and not entry.name.startswith("."):
                    yield entry.path


def check_headers(folder: Path, array: Any, key: Any) -> None:
    """Refuse chunks that are empty or truncated, or would be more pixels than a chunk has.

    Blosc reads past the end of a chunk that was cut, and its pixels are then whatever lies in
    memory there; and all of these take the memory that a chunk's header asks for.

    Parameters
    ----------
    folder
        Of the array.
    key
        Which pixels are to be read.

    Raises
    ------
    FileFormatError
        with the chunk's path.
    """
    claimed_of = _CLAIMS.get(_compressor(array))
    expected = math.prod(array.chunks) * np.dtype(array.dtype).itemsize
    for coordinates in product(*_positions(array.shape, array.shards or array.chunks, key)):
        path = folder / array.metadata.encode_chunk_key(coordinates)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            continue  # it stands for fill values
        if not size:
            # zarr takes an empty shard as one that isn't there.
            raise FileFormatError(f"{path} is an empty chunk. Copy or export the image again.")
        if claimed_of is None:
            continue
        with path.open("rb") as stream:
            for start, length in _pieces(stream, size, path, array, coordinates, key):
                stream.seek(min(start, size))
                claimed, needed = claimed_of(stream.read(min(length, _HEADER_BYTES)))
                if claimed not in (expected, None) or needed > length or start + length > size:
                    raise FileFormatError(
                        f"{path} is a damaged chunk: its header gives {claimed} bytes of pixels "
                        f"in {needed} bytes of file; {expected} are wanted, and the file has "
                        f"{length}. Copy or export the image again."
                    )


def _positions(shape: tuple[int, ...], sizes: tuple[int, ...], key: Any) -> list[range]:
    """Positions along each axis of the chunks of such sizes that an index needs."""
    keys = [slice(None)] * len(shape) if key is ... else key
    needed = []
    for k, n, size in zip(keys, shape, sizes, strict=True):
        chosen = range(n)[k]
        if isinstance(chosen, int):
            chosen = range(chosen, chosen + 1)
        needed.append(
            range(min(chosen) // size, max(chosen) // size + 1) if len(chosen) else range(0)
        )
    return needed


def _pieces(
    stream: BinaryIO,
    size: int,
    path: Path,
    array: Any,
    coordinates: tuple[int, ...],
    key: Any,
) -> list[tuple[int, int]]:
    """Start and length of the chunks in a file that an index needs: itself, or those in a shard.

    The index of a shard is numbers of 64 bits, with a checksum of 32 bits after them; zarr
    verifies that [1]_.

    .. [1] https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
    """
    if not array.shards:
        return [(0, size)]
    per_shard = [whole // one for whole, one in zip(array.shards, array.chunks, strict=True)]
    n_bytes = 16 * math.prod(per_shard)
    settings = _shard_settings(array)
    checksum = 4 * ("crc32c" in [codec["name"] for codec in settings.get("index_codecs", ())])
    at_start = str(settings.get("index_location", "end")) == "start"
    begin = 0 if at_start else size - n_bytes - checksum
    if begin < 0 or size < n_bytes:
        raise FileFormatError(f"{path} is a truncated shard. Copy or export the image again.")
    stream.seek(begin)
    index = np.frombuffer(stream.read(n_bytes), "<u8").reshape(*per_shard, 2)
    within = tuple(
        slice(max(0, needed.start - c * n), max(0, needed.stop - c * n))
        for needed, c, n in zip(
            _positions(array.shape, array.chunks, key), coordinates, per_shard, strict=True
        )
    )
    pairs = index[within].reshape(-1, 2).tolist()
    return [(int(a), int(b)) for a, b in pairs if (a, b) != (_NO_CHUNK, _NO_CHUNK)]


def _shard_settings(array: Any) -> Mapping[str, Any]:
    described: Mapping[str, Any] = array.metadata.to_dict()
    settings: Mapping[str, Any] = described["codecs"][0].get("configuration", {})
    return settings


def _compressor(array: Any) -> str:
    """Name of the codec that made a chunk's first bytes of its pixels; nothing where unsure."""
    described = array.metadata.to_dict()
    if described["zarr_format"] == 2:
        compressor = described.get("compressor") or {}
        return "" if described.get("filters") else str(compressor.get("id", ""))
    codecs = _shard_settings(array)["codecs"] if array.shards else described["codecs"]
    names = [str(codec["name"]) for codec in codecs]
    after = names[names.index("bytes") + 1 :] if "bytes" in names else []
    # A checksum comes after what it is of.
    return after[0].removeprefix("numcodecs.") if after and after[1:] in ([], ["crc32c"]) else ""


def _blosc(start: bytes) -> tuple[int | None, int]:
    """Bytes of pixels and bytes in the file, as the first bytes of a chunk give them."""
    if len(start) < 16:
        return None, 16
    claimed, stored = (int.from_bytes(start[i : i + 4], "little") for i in (4, 12))
    is_copied = start[2] & 2
    return claimed, max(stored, claimed + 16 if is_copied else 16)


def _zstd(start: bytes) -> tuple[int | None, int]:
    """As `_blosc`; a frame needn't say how much it holds [1]_.

    .. [1] RFC 8878, section 3.1.1.1, https://www.rfc-editor.org/rfc/rfc8878
    """
    if len(start) < 6 or start[:4] != b"\x28\xb5\x2f\xfd":
        return None, 6
    is_single = bool(start[4] & 32)
    n_bytes = (int(is_single), 2, 4, 8)[start[4] >> 6]
    offset = 5 + (not is_single) + (0, 1, 2, 4)[start[4] & 3]
    if not n_bytes:
        return None, 6
    claimed = int.from_bytes(start[offset : offset + n_bytes], "little")
    return claimed + 256 * (n_bytes == 2), offset + n_bytes


def _lz4(start: bytes) -> tuple[int | None, int]:
    """As `_blosc`."""
    return int.from_bytes(start[:4], "little"), 4


_CLAIMS: dict[str, Callable[[bytes], tuple[int | None, int]]] = {
    "blosc": _blosc,
    "zstd": _zstd,
    "lz4": _lz4,
}
