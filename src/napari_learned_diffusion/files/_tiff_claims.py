"""Whether a TIFF holds what it claims: before memory is taken for it, and to its last byte."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from xml.etree import ElementTree

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files._honest import ANY_RATIO, DEFLATE_RATIO, check_claimed

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

Directories: TypeAlias = dict[int, tuple[int, ...]]
"""By the place of a directory, the tags that pixels are decoded by."""

_IMAGE_DESCRIPTION = 270

_DIRECTORY_BYTES = 16
"""Each plane needs a directory, which is longer than this."""

_JPEG = (6, 7, 33007, 34892)

_RATIOS = {
    5: 4096.0,  # LZW: 12 bits for a string of at most 4096 bytes
    **dict.fromkeys((8, 32946), float(DEFLATE_RATIO)),
    32773: 128.0,  # PackBits
    **dict.fromkeys(_JPEG, 1024.0),  # a block of 64 pixels of up to 2 bytes takes a bit at least
}
"""The most that a compression can reach, by its code."""

_DEFAULTS = {258: 1, 259: 1, 266: 1, 277: 1, 284: 1, 317: 1, 339: 1}
"""Tags that pixels are decoded by, and what they are where they're missing."""

_SIZES = (256, 257)
"""Tags of the width and the height."""

_GENERAL_COMPRESSIONS = (5, 8, 32946, 32773, 34925, 50000)
"""LZW, deflate (twice), PackBits, LZMA, zstd: streams of bytes, whose length tells."""

_ALIGNMENT = 16
"""Bytes by which some programs fill up a strip."""


def check_claims(tif: TiffFile, path: Path) -> None:
    """Refuse numbers of planes that the file can't hold, before tifffile makes lists of them.

    Raises
    ------
    FileFormatError
        naming the number.
    """
    if not tif.pages:
        return
    page = tif.pages.first
    shape = tuple(int(length) for length in page.shape)
    if page.dtype is not None and 0 not in shape:
        is_packed = page.bitspersample < 8 * page.dtype.itemsize
        ratio = 16 if page.compression == 1 else _RATIOS.get(page.compression, ANY_RATIO)
        packed = page.compression != 1 or is_packed
        check_claimed(path, shape, page.dtype, compressed=packed, ratio=ratio)
    for text in (page.description, page.description1):
        if page.is_ome and text.strip().endswith("OME>"):
            _check_ome(ElementTree.fromstring(text), tif, path)
    if page.is_micromanager:
        summary = (tif.micromanager_metadata or {}).get("Summary") or {}
        counts = [summary.get(key, 1) for key in ("Frames", "Slices", "Channels", "Positions")]
        _check_planes(math.prod(max(1, int(count)) for count in counts), path, _size(path))


def _check_ome(root: ElementTree.Element, tif: TiffFile, path: Path) -> None:
    names = {uuid.get("FileName") for uuid in root.iter() if uuid.tag.endswith("UUID")}
    beside = [path.parent / name for name in names if name]
    room = _size(path) + sum(_size(file) for file in beside if file.name != path.name)
    for pixels in root.iter():
        if pixels.tag.endswith("}Pixels"):
            sizes = [_whole(pixels.get(f"Size{axis}", 1)) for axis in "CTZ"]
            _check_planes(math.prod(sizes), path, room)
            area = math.prod(_whole(pixels.get(f"Size{axis}", 1)) for axis in "XY")
            _check_planes(math.prod(sizes) * area / (ANY_RATIO * _DIRECTORY_BYTES), path, room)
            for data in pixels:
                if data.tag.endswith("TiffData"):
                    counts = (data.get(key, 0) for key in ("PlaneCount", "NumPlanes"))
                    _check_planes(max(_whole(count) for count in counts), path, room)
        elif "Along" in pixels.tag and "End" in pixels.attrib:
            start, end = float(pixels.get("Start", 0)), float(pixels.get("End", 0))
            steps = (end - start) / float(pixels.get("Step", 1))
            _check_planes(steps if math.isfinite(steps) else math.inf, path, room)


def _whole(text: object) -> int:
    return int(str(text))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_planes(count: float, path: Path, room: int) -> None:
    if count > max(1, room / _DIRECTORY_BYTES):
        raise FileFormatError(
            f"{path} claims more planes or pixels than its {room:,} bytes can hold: it is "
            "truncated or damaged. Copy or export it again."
        )


def check_complete(tif: TiffFile, series: TiffPageSeries, path: Path, known: Directories) -> None:
    """Refuse a file of which a part is missing, where tifffile would give zeros or fewer pages.

    Parameters
    ----------
    tif, path
        The file.
    series
        One of its series.
    known
        What `check_directories` found.
    """
    truncated = FileFormatError(
        f"{path} is truncated: a part of its pixels is missing. Copy or export it again."
    )
    if math.prod(series.shape) == 0:
        raise FileFormatError(f"{path} holds an image without pixels. Export it again.")
    if series.dataoffset is not None and len(series) > len(tif.pages):
        listed = [series[0]]  # one directory for all planes
    else:
        listed = list(series)
    pages = [page for page in listed if page is not None]
    if len(pages) < len(listed):
        raise FileFormatError(
            f"{path} names planes that aren't there. Put the other files of the same image "
            "beside it, or export it again."
        )
    if tif.is_imagej and series.kind == "generic":
        # tifffile falls back to single pages where ImageJ's data would end behind the file.
        raise truncated
    _check_alike([page for page in pages if page.parent is tif], known, path)
    if series.dataoffset is not None:
        if series.dataoffset + series.nbytes > tif.filehandle.size:
            raise truncated
        if not series.is_truncated and len(series) == len(pages):
            _check_stored_sizes(series.keyframe, pages, path)
        if series.keyframe.parent is tif:
            _check_beside_header(tif, [(series.dataoffset, series.nbytes)], path)
        return
    if series.keyframe.size * len(pages) != series.size:
        raise truncated
    for page in pages:
        size = page.parent.filehandle.size
        if any(
            offset + count > size
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ):
            raise truncated
    _check_stored_sizes(series.keyframe, pages, path)
    _check_apart(pages, path)
    here = [page for page in pages if page.parent is tif]
    segments = [s for p in here for s in zip(p.dataoffsets, p.databytecounts, strict=True)]
    _check_beside_header(tif, segments, path)
    _check_first_segment(series.keyframe, path)


def _check_stored_sizes(page: TiffPage, pages: list[Any], path: Path) -> None:
    """Refuse planes whose stored bytes are too few or too many for their width and height.

    Parameters
    ----------
    page
        The one that all are like.
    pages
        Planes of one series.
    """
    if page.is_lsm or page.is_stk or page.is_ndpi:
        return  # these have conventions of their own
    segments = math.prod(page.chunked)
    whole = _bytes_of_segment(page)
    everything = segments * whole if page.is_tiled else _bytes_of_strips(page)
    ratio = _RATIOS.get(page.compression, ANY_RATIO)
    for single in pages:
        counts = single.databytecounts
        # Segments of neither place nor size are left out on purpose, being empty.
        empty = sum(count == 0 for count in counts)
        lost = any(o and not c for o, c in zip(single.dataoffsets, counts, strict=True))
        expected = max(0, everything - empty * whole)
        most = (segments - empty) * (whole + _ALIGNMENT)
        stored = sum(counts)
        if page.compression == 1 and not page.is_subsampled:
            fits = expected <= stored <= most
        else:
            fits = expected <= ratio * (stored + _ALIGNMENT)
        if lost or not fits or len(counts) != segments or not _tags_agree(page, segments):
            raise FileFormatError(
                f"{path} stores other numbers of bytes than an image of {page.imagewidth} × "
                f"{page.imagelength} pixels takes: it is truncated or its header is damaged. "
                "Copy or export it again."
            )


def _check_apart(pages: list[Any], path: Path) -> None:
    """Refuse strips or tiles that overlap: the place of one of them must be wrong."""
    by_file: dict[int, set[tuple[int, int]]] = {}
    for page in pages:
        # The same twice is a saving that some programs make.
        known = by_file.setdefault(id(page.parent), set())
        known |= set(zip(page.dataoffsets, page.databytecounts, strict=True))
    for segments in by_file.values():
        end = 0
        for offset, count in sorted(segments):
            if offset < end:
                raise FileFormatError(
                    f"{path} is damaged: its strips or tiles are said to lie one over the other. "
                    "Copy or export it again."
                )
            end = offset + count


def _check_beside_header(tif: TiffFile, data: list[tuple[int, int]], path: Path) -> None:
    """Refuse pixels that are said to lie where the first directory and its values are."""
    page = tif.pages.first
    taken = [(page.offset, tif.tiff.tagnosize + len(page.tags) * tif.tiff.tagsize)]
    taken += [(tag.valueoffset, tag.valuebytecount) for tag in page.tags if tag.valuebytecount > 8]
    for start, count in taken:
        if any(offset < start + count and start < offset + n for offset, n in data if n):
            raise FileFormatError(
                f"{path} is damaged: its pixels are said to lie where its header is. Copy or "
                "export it again."
            )


def _tags_agree(page: TiffPage, segments: int) -> bool:
    """Whether as many places of strips or tiles are stored as there should be."""
    tag = page.tags.get(324) or page.tags.get(273)
    return tag is None or tag.count == segments


def _bytes_of_row(page: TiffPage) -> int:
    columns = page.tilewidth if page.is_tiled else page.imagewidth
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    return math.ceil(page.bitspersample * samples * columns / 8)


def _bytes_of_segment(page: TiffPage) -> int:
    """Bytes of a whole strip or tile, uncompressed."""
    if page.is_tiled:
        return int(page.tilelength * max(1, page.tiledepth)) * _bytes_of_row(page)
    return int(min(page.rowsperstrip, page.imagelength)) * _bytes_of_row(page)


def _bytes_of_strips(page: TiffPage) -> int:
    """Bytes of all strips together, uncompressed."""
    copies = page.samplesperpixel if page.planarconfig == 2 else 1
    return int(page.imagelength * max(1, page.imagedepth) * copies) * _bytes_of_row(page)


def _check_first_segment(page: TiffPage, path: Path) -> None:
    """Refuse a width, height or number of bits that a decompressed strip or tile contradicts.

    tifffile cuts off what is too much, and the rows would lie askew.
    """
    is_stream = page.compression in _GENERAL_COMPRESSIONS and page.fillorder == 1
    if not (is_stream or page.compression in _JPEG) or not page.databytecounts[0]:
        return
    from tifffile import COMPRESSION, TIFF

    handle = page.parent.filehandle
    was_closed = handle.closed
    if was_closed:  # one of several files of an image
        handle.open()
    try:
        handle.seek(page.dataoffsets[0])
        encoded = handle.read(page.databytecounts[0])
    finally:
        if was_closed:
            handle.close()
    if page.compression in _JPEG:
        _check_jpeg(page, encoded, path)
        return
    expected = _bytes_of_segment(page)
    # Some programs fill up the last strip, and so the only one, to its number of rows.
    filled = expected
    if not page.is_tiled and page.rowsperstrip < 2 * page.imagelength:
        filled = page.rowsperstrip * _bytes_of_row(page)
    # Left to measure for itself how much there will be, the decoder of LZW may crash on a damaged
    # stream. The others measure it, which takes no more memory than there is to be found.
    is_lzw = page.compression == COMPRESSION.LZW
    room = max(expected, filled) + _ALIGNMENT + 1 if is_lzw else None
    found = len(TIFF.DECOMPRESSORS[page.compression](encoded, out=room))
    # A tile at the edge may be stored as small as what is shown of it.
    shown = min(1, page.imagelength / page.tilelength) if page.is_tiled else 1.0
    shown *= min(1, page.imagewidth / page.tilewidth) if page.is_tiled else 1.0
    if found < math.floor(expected * shown) or (found > expected + _ALIGNMENT and found != filled):
        raise FileFormatError(
            f"{path} stores {found} bytes where {expected} are expected: its header is damaged. "
            "Copy or export it again."
        )


def _check_jpeg(page: TiffPage, encoded: bytes, path: Path) -> None:
    """Refuse a size or a number of samples that the header of a JPEG stream contradicts."""
    frame = _jpeg_frame(encoded)
    if frame is None:
        return
    bits, rows, columns, samples = frame
    wanted = page.samplesperpixel if page.planarconfig == 1 else 1
    # A tile at the edge, and the only strip, may be stored as small as what is shown of it.
    height = min(page.tilelength if page.is_tiled else page.rowsperstrip, page.imagelength)
    width = min(page.tilewidth, page.imagewidth) if page.is_tiled else page.imagewidth
    if samples != wanted or rows < height or columns < width or bits > max(8, page.bitspersample):
        raise FileFormatError(
            f"{path} holds a JPEG image of {columns} × {rows} × {samples}, where {width} × "
            f"{height} × {wanted} are expected: its header is damaged. Copy or export it again."
        )
    if page.bitspersample < 8:
        raise FileFormatError(
            f"{path} holds a JPEG image of {bits} bits, where {page.bitspersample} are expected: "
            "its header is damaged. Copy or export it again."
        )


def _jpeg_frame(encoded: bytes) -> tuple[int, int, int, int] | None:
    """Bits, rows, columns and samples by a JPEG stream's start of frame; None if there is none."""
    place = 2
    while place + 10 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, rows, columns, samples = struct.unpack_from(">BHHB", encoded, place + 4)
            return (bits, rows, columns, samples) if rows else None
        (length,) = struct.unpack_from(">H", encoded, place + 2)
        place += 2 + length
    return None


def check_directories(tif: TiffFile, path: Path) -> Directories:
    """Refuse directories that tifffile passes over; what the others say about their pixels.

    Returns
    -------
    dict
        By the place of a directory, the tags that pixels are decoded by.
    """
    truncated = FileFormatError(
        f"{path} is truncated: a part of its pixels is missing. Copy or export it again."
    )
    if not tif.pages:
        return {}
    found: Directories = {}
    place = tif.pages.first.offset
    while place and place not in found:
        if place >= tif.filehandle.size:
            raise truncated
        tags, following = _directory(tif, place)
        if not found and _IMAGE_DESCRIPTION in tags.keys() - {tag.code for tag in _first_tags(tif)}:
            # tifffile leaves out what lies behind the file's end: axes and voxel size with it.
            raise truncated
        if not all(tags.get(code) for code in _SIZES):
            raise FileFormatError(
                f"{path} is damaged: an image in it has no width or height. Copy or export it "
                "again."
            )
        found[place] = tuple(tags.get(code, default) for code, default in _DEFAULTS.items())
        place = following
    # tifffile goes on without the last of them if that is damaged, or one that leads back.
    if len(found) != len(tif.pages) and not tif.is_scanimage:
        raise truncated
    return found


def _first_tags(tif: TiffFile) -> list[Any]:
    return list(tif.pages.first.tags)


def _check_alike(pages: list[Any], known: Directories, path: Path) -> None:
    """Refuse planes that are decoded in different ways, where tifffile goes by the first."""
    if len({known[page.offset] for page in pages if page.offset in known}) > 1:
        raise FileFormatError(
            f"{path} is damaged: its planes are said to be stored in different ways. "
            "Copy or export it again."
        )


def _directory(tif: TiffFile, offset: int) -> tuple[dict[int, int], int]:
    """Tags in the directory at ``offset``, and where the next one begins, or 0.

    Values are those of single numbers; of others only how many there are.
    """
    tiff, handle = tif.tiff, tif.filehandle
    handle.seek(offset)
    (number,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
    entries = handle.read(number * tiff.tagsize)
    (following,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    tags = {}
    for i in range(number):
        code, kind = struct.unpack_from(tif.byteorder + "HH", entries, i * tiff.tagsize)
        (count,) = struct.unpack_from(tiff.offsetformat, entries, i * tiff.tagsize + 4)
        form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        tags[code] = 0 if code in _SIZES else count
        if count == 1 and form is not None:
            value = i * tiff.tagsize + 4 + tiff.offsetsize
            (tags[code],) = struct.unpack_from(tif.byteorder + form, entries, value)
    return tags, following


def planes_left_out(tif: TiffFile, path: Path, known: Directories) -> Iterator[str]:
    """A sentence if some of the file's directories belong to no series."""
    offsets = set(known)
    for series in tif.series:
        if len(series) > len(known) or series.is_truncated:
            return  # one directory stands for many planes
        for level in series.levels:
            offsets -= {page.offset for page in level if page is not None}
    if offsets:
        yield (
            f"Left out of {path.name}: {len(offsets)} plane{'s' * (len(offsets) > 1)} that its "
            "description doesn't name."
        )
