"""Pixels of a DICOM file: decoded by libraries that a damaged file can't bring down."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError, MissingDependencyError

_DECODERS = ("imagecodecs", "pyjpegls", "pylibjpeg", "pydicom", "pillow")
"""Decoders in the order in which they are asked for.

Not among them is gdcm, which pydicom would ask first: it ends the whole program on some damaged
files.
"""

_JPEG = (
    "1.2.840.10008.1.2.4.50",  # baseline
    "1.2.840.10008.1.2.4.51",  # extended, up to 12 bit
    "1.2.840.10008.1.2.4.57",  # lossless
    "1.2.840.10008.1.2.4.70",  # lossless, first-order prediction: the usual one
)
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")

_END_OF_IMAGE = b"\xff\xd9"
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and JPEG-LS that rows and columns follow."""

_SIZE_OF_JPEG_2000 = b"\xff\x4f\xff\x51"

DECODER_DEPENDENCIES = dict.fromkeys(_JPEG, ("imagecodecs",))
"""Looked up by pydicom."""


def is_available(uid: str) -> bool:
    """Whether `decode_frame` can decode a transfer syntax; called by pydicom."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(frame: bytes, runner: Any) -> bytes:
    """A frame of JPEG as the bytes of its pixels; called by pydicom."""
    import imagecodecs

    pixels: NDArray[Any] = imagecodecs.jpeg_decode(frame)
    return pixels.astype(f"<u{runner.bits_allocated // 8}").tobytes()


def check_decodable(path: Path, syntax: Any, pydicom: Any) -> None:
    """Refuse pixels that no library here decodes.

    Raises
    ------
    MissingDependencyError
        with the packages that do.
    FileFormatError
        if there is none.
    """
    try:
        decoder = _decoder(syntax, pydicom)
    except NotImplementedError as error:
        raise FileFormatError(
            f"{path} is compressed as {syntax.name}, which can't be decoded here. Export it "
            "uncompressed, for instance with gdcmconv --raw."
        ) from error
    if _plugin(decoder) is None:
        raise MissingDependencyError(
            f"{path} is compressed as {syntax.name}. To decode it, install {_packages(decoder)}: "
            "pip install 'napari-learned-diffusion[dicom]'"
        )


def decoded(path: Path, dataset: Any, shape: tuple[int, int], pydicom: Any) -> NDArray[Any]:
    """The stored numbers of a file of one plane.

    Raises
    ------
    FileFormatError
        if they can't be decoded, or aren't of the shape.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        dataset.pixel_array_options(decoding_plugin=_plugin(_decoder(syntax, pydicom)))
        _check_frame(path, dataset, shape, pydicom)
    try:
        stored: NDArray[Any] = dataset.pixel_array
    except RuntimeError as error:
        raise FileFormatError(
            f"{path} can't be decoded as {syntax.name}. It may be damaged: copy or export it again."
        ) from error
    if stored.shape != shape:
        raise FileFormatError(
            f"{path} holds pixels of shape {stored.shape}, and its header says {shape}. It is "
            "damaged: copy or export it again."
        )
    return np.asarray(stored)


def _check_frame(path: Path, dataset: Any, shape: tuple[int, int], pydicom: Any) -> None:
    """Refuse a compressed frame before a decoder takes memory for it, or waits for its end.

    Raises
    ------
    FileFormatError
        if it is of another size than the header says, or is cut off: decoders make up the rest.
    """
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    is_jpeg = dataset.file_meta.TransferSyntaxUID in (*_JPEG, *_JPEG_LS)
    found = _shape_of_jpeg(frame) if is_jpeg else _shape_of_jpeg_2000(frame)
    if is_jpeg and not frame.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise FileFormatError(f"{path} is truncated or damaged. Copy or export it again.")
    if found is not None and found != shape:
        raise FileFormatError(
            f"{path} holds a compressed image of {found[0]} × {found[1]} pixels, and its header "
            f"says {shape[0]} × {shape[1]}. It is damaged: copy or export it again."
        )


def _shape_of_jpeg(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG or JPEG-LS says to have; None if it doesn't."""
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4])
        if marker in _FRAME_MARKERS:
            return int.from_bytes(frame[at + 5 : at + 7]), int.from_bytes(frame[at + 7 : at + 9])
        at += 1 if marker == 0xFF else 2 + length  # markers may be padded
    return None


def _shape_of_jpeg_2000(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG 2000 says to have; None if it is none."""
    at = frame.find(_SIZE_OF_JPEG_2000)
    if at < 0:
        return None
    numbers = [int.from_bytes(frame[i : i + 4]) for i in range(at + 8, at + 24, 4)]
    return numbers[1] - numbers[3], numbers[0] - numbers[2]


def _decoder(syntax: Any, pydicom: Any) -> Any:
    """The decoder of a transfer syntax, with ours for JPEG; raises NotImplementedError for none."""
    decoder = pydicom.pixels.get_decoder(syntax)
    if is_available(syntax) and "imagecodecs" not in decoder.available_plugins:
        decoder.add_plugin("imagecodecs", (__name__, "decode_frame"))
    return decoder


def _plugin(decoder: Any) -> str | None:
    """The first of the libraries that is there."""
    return next((name for name in _DECODERS if name in decoder.available_plugins), None)


def _packages(decoder: Any) -> str:
    """The packages that decode a compression and aren't there."""
    ways = [re.findall(r"([a-z][\w-]*)>=", text) for text in decoder.missing_dependencies]
    return ", or ".join(" and ".join(way) for way in ways if "gdcm" not in way)
