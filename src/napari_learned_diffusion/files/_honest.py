"""Whether a file can hold the pixels that its header claims, asked before memory is taken."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from napari_learned_diffusion.core.errors import FileFormatError

DEFLATE_RATIO = 1032
"""The most that deflate (zip, gzip, ``.nii.gz``) can compress: 258 bytes by two bits [1]_.

.. [1] zlib Technical Details, https://www.zlib.net/zlib_tech.html
"""

ANY_RATIO = 32768
"""The most that any compression in use is taken to reach: zstd's 128 KiB by 4 bytes."""

_ROOM = 4096
"""Bytes that are never worth refusing, so that a tiny image may be shorter than its header."""


def check_claimed(
    path: Path,
    shape: Sequence[int],
    dtype: DTypeLike,
    *,
    compressed: bool,
    ratio: float = ANY_RATIO,
    offset: int = 0,
) -> None:
    """Refuse a claim of more pixels than a file of its size can hold.

    Call it with what a header says, before an array of that shape is made or its planes are
    counted.

    Parameters
    ----------
    path
        The file, or a folder, of which all files count together.
    shape
        Lengths of the axes that the header claims.
    dtype
        Type of the pixels as stored.
    compressed
        Whether pixels may take less than their size in the file.
    ratio
        The most that the compression can reach; only for compressed pixels.
    offset
        Bytes of the file before the first pixel.

    Raises
    ------
    FileFormatError
        if a length is negative, or the file is too short for the claim.
    """
    lengths = [int(length) for length in shape]
    claimed = math.prod(lengths) * np.dtype(dtype).itemsize
    text = f"{path} claims {' × '.join(map(str, lengths))} pixels of type {np.dtype(dtype)}"
    if any(length < 0 for length in lengths):
        raise FileFormatError(f"{text}, which can't be. It is damaged: copy or export it again.")
    needed = offset + (max(0, claimed - _ROOM) / ratio if compressed else claimed)
    stored = _size(path, needed)
    if stored < needed:
        raise FileFormatError(
            f"{text}, {_in_words(claimed)}, but holds only {_in_words(stored)}: it is truncated "
            "or damaged. Copy or export it again."
        )


def _size(path: Path, enough: float) -> int:
    """Bytes in a file, or in a folder's files until they are ``enough``."""
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for size in _sizes(path):
        total += size
        if total >= enough:
            break
    return total


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        for name in names:
            yield Path(place, name).lstat().st_size


def _in_words(n_bytes: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes} bytes"
