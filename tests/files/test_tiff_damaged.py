"""TIFFs that claim what can't be true: refused in words, before memory is taken for the claim."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array  # noqa: F401  # its import isn't to be counted as a reader's memory
import imagecodecs  # noqa: F401
import numpy as np
import pytest
import tifffile

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import read

DATA = np.random.default_rng(0).integers(0, 250, (4, 64, 64)).astype(np.uint16)
ROOM = 2**22
"""Bytes beyond which a refusal took memory for the claim."""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", logger="tifffile")


def assert_refused(path: Path, match: str = "export it again") -> None:
    read_once(path)
    for lazy in (False, True):
        tracemalloc.start()
        try:
            with pytest.raises(FileFormatError, match=match):
                read(path, lazy=lazy)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < ROOM


def read_once(path: Path) -> None:
    """What is imported while the first file is read isn't to be counted."""
    sound = path.with_name("sound.tif")
    tifffile.imwrite(sound, DATA[0], compression="zlib")
    assert read(sound).data.shape == DATA[0].shape


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('SizeZ="4"', 'SizeZ="1000000000"'),
        ('SizeX="64"', 'SizeX="1000000000"'),
        ('SizeT="1"', 'SizeT="99999999999999999999"'),
        ('PlaneCount="4"', 'PlaneCount="1000000000"'),
        ('SizeZ="4"', 'SizeZ="many"'),
        ('<TiffData IFD="0"', '<TiffData FirstZ="3" IFD="0"'),
    ],
)
def test_ome_xml_that_claims_more_than_the_file_holds(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, DATA, photometric="minisblack", metadata={"axes": "ZYX"})
    xml = tifffile.tiffcomment(path)
    assert old in xml
    tifffile.tiffcomment(path, xml.replace(old, new).encode())
    assert_refused(path)


def test_a_modulo_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, DATA, photometric="minisblack", metadata={"axes": "HYX"})
    xml = tifffile.tiffcomment(path)
    start = xml.index("<ModuloAlong")
    end = xml.index("</ModuloAlong") if "</ModuloAlong" in xml else xml.index("/>", start)
    along = xml[start:end]
    assert "End=" in along
    claim = along.replace(along[along.index("End=") :].split('"')[1], "1e12")
    tifffile.tiffcomment(path, xml.replace(along, claim).encode())
    assert_refused(path)


@pytest.mark.parametrize("old", [b"images=4\n", b"slices=4\n"])
def test_a_stack_of_imagej_that_claims_more_planes(tmp_path: Path, old: bytes) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA, imagej=True, metadata={"axes": "ZYX"})
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, old.replace(b"4", b"9")))
    if old.startswith(b"slices"):
        assert_refused(path, "truncated")
    else:
        np.testing.assert_array_equal(read(path).data, DATA)


def with_tag(path: Path, tag: str, value: int, **options: Any) -> Path:
    """An image of which one tag lies."""
    data = DATA[0].astype(np.uint8)
    tifffile.imwrite(path, data, photometric="minisblack", metadata=None, **options)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags[tag].overwrite(value, dtype="H")
    return path


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits", "jpeg"])
@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("ImageWidth", 60000),
        ("ImageWidth", 65),
        ("ImageWidth", 32),
        ("ImageLength", 60000),
        ("ImageLength", 65),
        ("SamplesPerPixel", 60000),
        ("SamplesPerPixel", 3),
    ],
)
def test_sizes_that_the_stored_bytes_contradict(
    tmp_path: Path, compression: str | None, tag: str, value: int
) -> None:
    if compression == "jpeg" and (tag, value) == ("ImageWidth", 32):
        value = 80  # a JPEG image may be larger than what is shown of it
    options = {"compression": compression, "rowsperstrip": 64}
    assert_refused(with_tag(tmp_path / "a.tif", tag, value, **options))


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength", "RowsPerStrip", "Compression"])
def test_planes_that_contradict_each_other(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tif:
        value = {"Compression": 5}.get(tag, 0)
        tif.pages[2].aspage().tags[tag].overwrite(value, dtype="H")
    if tag == "RowsPerStrip":
        # tifffile goes by the first plane, and all are stored alike.
        np.testing.assert_array_equal(read(path).data, DATA)
    else:
        assert_refused(path)


@pytest.mark.parametrize("place", ["another strip", "the header"])
def test_strips_in_places_that_are_taken(tmp_path: Path, place: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA[0], rowsperstrip=16, metadata=None, compression="packbits")
    with tifffile.TiffFile(path, mode="r+") as tif:
        offsets = list(tif.pages.first.dataoffsets)
        offsets[1] = offsets[0] + 100 if place == "another strip" else tif.pages.first.offset + 4
        tif.pages.first.tags["StripOffsets"].overwrite(offsets, dtype="I")
    assert_refused(path, "is damaged")


def test_a_strip_without_bytes_is_refused_and_one_left_out_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA[0], rowsperstrip=16, metadata=None, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as tif:
        tags = tif.pages.first.tags
        counts = list(tags["StripByteCounts"].value)
        counts[1] = 0
        tags["StripByteCounts"].overwrite(counts, dtype="I")
    assert_refused(path)
    with tifffile.TiffFile(path, mode="r+") as tif:
        tags = tif.pages.first.tags
        offsets = list(tags["StripOffsets"].value)
        offsets[1] = 0
        tags["StripOffsets"].overwrite(offsets, dtype="I")
    expected = DATA[0].copy()
    expected[16:32] = 0
    np.testing.assert_array_equal(read(path).data, expected)


def test_a_damaged_strip_is_a_sentence_also_when_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DATA, photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path) as tif:
        offset = tif.pages[3].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="export it again"):
        read(path)
    lazy = read(path, lazy=True).data
    np.testing.assert_array_equal(lazy[0], DATA[0])
    with pytest.raises(FileFormatError, match="export it again"):
        lazy[3].compute()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: tifffile.imwrite(path, DATA, imagej=True, metadata={"Info": "a"}),
        lambda path: tifffile.imwrite(path, DATA, photometric="minisblack", bigtiff=True),
        lambda path: tifffile.imwrite(path, DATA, photometric="minisblack", compression="lzw"),
        lambda path: tifffile.imwrite(
            path, DATA[0], photometric="palette", colormap=np.zeros((3, 2**16), np.uint16)
        ),
    ],
)
def test_cut_anywhere_it_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "a.tif"
    make(path)
    content = path.read_bytes()
    for length in np.linspace(8, len(content) - 17, 40).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            pytest.fail(f"{length} bytes were read as {read(path)}")
