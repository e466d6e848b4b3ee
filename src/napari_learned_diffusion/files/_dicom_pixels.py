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
        _check_is_whole(path, dataset, pydicom)
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


def _check_is_whole(path: Path, dataset: Any, pydicom: Any) -> None:
    """Refuse a stream of JPEG without an end: decoders make up what is missing, or wait for it."""
    if dataset.file_meta.TransferSyntaxUID not in (*_JPEG, *_JPEG_LS):
        return
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1)
    if not frame.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise FileFormatError(f"{path} is truncated or damaged. Copy or export it again.")


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
