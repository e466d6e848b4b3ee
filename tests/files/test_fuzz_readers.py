"""Damaged files of every format: refused in the package's own words, or read right; never more.

What is tried is the same at every run. To try more, and others each time::

    FUZZ_EXAMPLES=5000 python -m pytest tests/files/test_fuzz_readers.py -o faulthandler_timeout=60
"""

from __future__ import annotations

import os
import re
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import LearnedDiffusionError
from napari_learned_diffusion.files import Volume, read, write

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))

PIXELS = np.random.default_rng(0).integers(0, 120, (3, 16, 12)).astype(np.int16)
ROOM = 8 * 2**20
"""Bytes that a reader may take for itself, however small the file is."""

Files = dict[str, bytes]
"""Content of the files of an image by their places; a single file's place is empty."""


# --- the files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Parameters
    ----------
    name
        Of the file or folder.
    make
        Writes `PIXELS` to a path.
    checked
        Pattern for the places of the files in which a checksum covers every pixel.
    """

    name: str
    make: Callable[[Path], Any]
    checked: str = "none"


def volume_of(dtype: str = "int16", **metadata: Any) -> Volume:
    data = PIXELS.astype(dtype)
    steps, units = (2.0, 0.5, 0.5), ("millimeter",) * 3
    return Volume(data, "ZYX", steps, units, "a", metadata)


def by_us(dtype: str = "int16", **options: Any) -> Callable[[Path], Any]:
    return lambda path: write(path, volume_of(dtype), **options)


def by_tifffile(**options: Any) -> Callable[[Path], Any]:
    options = {"photometric": "minisblack"} | options
    return lambda path: tifffile.imwrite(path, PIXELS.astype(np.uint16), **options)


def zarr_of(version: int, compressors: Any, **options: Any) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        group = zarr.create_group(path, zarr_format=version)
        group.create_array("0", data=PIXELS, chunks=(1, 16, 12), compressors=compressors, **options)
        scale = [{"type": "scale", "scale": [2.0, 0.5, 0.5]}]
        axes = [{"name": name, "type": "space"} for name in "zyx"]
        datasets = [{"path": "0", "coordinateTransformations": scale}]
        described = {"multiscales": [{"axes": axes, "datasets": datasets}]}
        group.attrs.update({"ome": described} if version == 3 else described)

    return make


CHUNKS = r"0/.*\d"

KINDS = {
    "tiff": Kind("a.tif", by_tifffile(metadata=None)),
    "tiff, deflate": Kind("a.tif", by_tifffile(metadata=None, compression="zlib")),
    "tiff, lzw, predictor": Kind("a.tif", by_tifffile(compression="lzw", predictor=True)),
    "tiff, tiles, big": Kind("a.btf", by_tifffile(bigtiff=True, tile=(16, 16))),
    "ImageJ": Kind("a.tif", by_tifffile(imagej=True, metadata={"axes": "ZYX", "unit": "um"})),
    "OME-TIFF": Kind("a.ome.tif", by_tifffile(ome=True, metadata={"axes": "ZYX"})),
    "our TIFF": Kind("a.tif", by_us("float32", compression="zstd")),
    "MRC": Kind("a.mrc", by_us()),
    "MRC, bytes": Kind("a.mrc", by_us("int8")),
    "NIfTI": Kind("a.nii", by_us()),
    "NIfTI, gzip": Kind("a.nii.gz", by_us(), ".*"),
    "DICOM": Kind("a", by_us(format="dicom"), "none"),
    "OME-Zarr": Kind("a.ome.zarr", by_us()),
    "zarr 2, blosc": Kind("a.zarr", zarr_of(2, numcodecs.Blosc("lz4"))),
    "zarr 2, gzip": Kind("a.zarr", zarr_of(2, numcodecs.GZip()), CHUNKS),
    "zarr 2, none": Kind("a.zarr", zarr_of(2, None)),
    "zarr 3, crc32c": Kind(
        "a.zarr", zarr_of(3, [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]), CHUNKS
    ),
    "zarr 3, blosc, shards": Kind(
        "a.zarr", zarr_of(3, zarr.codecs.BloscCodec(), shards=(3, 16, 12))
    ),
}


def files_at(path: Path) -> Files:
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def put(path: Path, files: Files) -> None:
    """Make a path hold exactly these files."""
    if path.is_dir():
        shutil.rmtree(path)
    for place, content in files.items():
        file = path / place if place else path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


# --- the damage -----------------------------------------------------------------------------------

places = st.one_of(st.integers(0, 700), st.integers(0, 2**20))
widths = st.sampled_from([1, 2, 4, 8])
SMALL = (0, 1, 2, 3, 127, 128, 255, 256, 2**15, 2**16 - 1)
LARGE = (10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
extremes = st.sampled_from(SMALL + LARGE)
NUMBERS = ("-1", "0", "7", "1000000000", "99999999999999999999", "1e999", "1.5", "NaN")
OTHERS = ("null", "true", '""', '"x"', "[]", "{}", "[1]")
words = st.sampled_from(NUMBERS + OTHERS)

Damage = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Flip:
    """Bits of one byte are changed."""

    place: int
    bits: int

    def __call__(self, content: bytes) -> bytes:
        i = self.place % len(content)
        return content[:i] + bytes([content[i] ^ self.bits]) + content[i + 1 :]


@dataclass(frozen=True)
class Number:
    """A number is written over another, aligned as numbers in headers are."""

    place: int
    width: int
    value: int
    is_big: bool

    def __call__(self, content: bytes) -> bytes:
        i = self.place % len(content) // self.width * self.width
        wrapped = self.value % 2 ** (8 * self.width)
        number = wrapped.to_bytes(self.width, "big" if self.is_big else "little")
        return (content[:i] + number + content[i + self.width :])[: len(content)]


@dataclass(frozen=True)
class Word:
    """A number in a text is replaced by something else."""

    place: int
    word: str

    def __call__(self, content: bytes) -> bytes:
        found = list(re.finditer(rb"\d+(\.\d+)?", content[:4096]))
        if not found:
            return content
        one = found[self.place % len(found)]
        return content[: one.start()] + self.word.encode() + content[one.end() :]


@dataclass(frozen=True)
class Loss:
    """Some bytes are missing in the middle."""

    place: int
    count: int

    def __call__(self, content: bytes) -> bytes:
        i = self.place % len(content)
        return content[:i] + content[i + self.count :]


@dataclass(frozen=True)
class Cut:
    """The end is missing."""

    place: int

    def __call__(self, content: bytes) -> bytes:
        return content[: self.place % len(content)]


flips = st.builds(Flip, places, st.integers(1, 255))
numbers = st.builds(Number, places, widths, extremes, st.booleans())
others = st.one_of(st.builds(Word, places, words), st.builds(Loss, places, st.integers(1, 40)))
cuts = st.builds(Cut, places)
damages = st.one_of(
    st.lists(flips, min_size=1, max_size=3),
    st.lists(numbers, min_size=1, max_size=2),
    st.lists(others, min_size=1, max_size=1),
    st.lists(cuts, min_size=1, max_size=1),
)


# --- what must be -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What reading gave: pixels and notes, or a sentence; and the most memory it took."""

    pixels: NDArray[Any] | None
    said: str
    peak: int


def outcome_of(path: Path, *, lazy: bool | None) -> Outcome:
    """Read all pixels of a path; only errors of the package's own family are caught."""
    pixels, said = None, ""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as outside of tests
            volume = read(path, lazy=lazy)
            claimed = volume.data.nbytes
            # A lazy image of a billion planes would be read for hours.
            if lazy and claimed > 100 * ROOM:
                pixels = np.asarray(volume.data[(0,) * (volume.data.ndim - 2)])
            else:
                pixels = np.asarray(volume.data)
            said = " ".join(volume.metadata.get("notes", ()))
    except LearnedDiffusionError as error:
        said = str(error)
        assert said
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
    return Outcome(pixels, said, peak)


@pytest.fixture(scope="module", autouse=True)
def _traced(whole: object) -> Iterator[None]:
    # Once for all: where it is stopped while a thread of zarr decompresses, Python may crash [1].
    # [1] https://github.com/python/cpython/issues/128679
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Files, NDArray[Any]]]:
    """Where each kind is tried, its files as they should be, and their pixels."""
    made = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        path = tmp_path_factory.mktemp(f"fuzz{number}") / kind.name
        kind.make(path)
        for lazy in (True, False):  # and imports what isn't to be counted later
            found = np.asarray(read(path, lazy=lazy).data)
            np.testing.assert_array_equal(found, PIXELS)
        made[name] = path, files_at(path), found
    return made


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_read_right(
    name: str, whole: dict[str, tuple[Path, Files, NDArray[Any]]]
) -> None:
    path, files, expected = whole[name]
    honest = sum(map(len, files.values())) + expected.nbytes

    @settings(max_examples=EXAMPLES, derandomize="FUZZ_EXAMPLES" not in os.environ, deadline=None)
    @given(which=st.integers(0, 7), damage=damages, lazy=st.booleans())
    def try_damage(which: int, damage: list[Damage], lazy: bool) -> None:
        place = sorted(files)[which % len(files)]
        content = files[place]
        for one in damage:
            content = one(content) if content else content
        put(path, files | {place: content})
        found = outcome_of(path, lazy=lazy)
        event("refused" if found.pixels is None else "read")
        assert found.peak < 4 * honest + ROOM
        if found.pixels is None:
            return
        is_cut = isinstance(damage[0], Cut)
        if is_cut or re.fullmatch(KINDS[name].checked, place):
            is_right = found.pixels.shape == expected.shape and bool(
                (found.pixels == expected).all()
            )
            assert is_right or (is_cut and found.said)

    try_damage()
