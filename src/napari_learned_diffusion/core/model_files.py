"""What the header of a model's file says, checked before anything is made of it.

A file may come from anywhere, be damaged, or claim what isn't so. It is opened only if it is a
regular file, no more than its header is read, its numbers must be in their ranges, and its tensors
must fill it exactly. Nothing is ever unpickled, and no torch is imported.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.errors import FileFormatError

FORMAT = 1
"""Raised whenever older versions of the package couldn't read new files any more."""

LARGEST_FILE = 1 << 29
"""Bytes; the largest architecture that makes sense has a tenth of it."""

LARGEST_HEADER = 1 << 20
LARGEST_NUMBER = 1024
"""Of an architecture's arguments, and of diffusion steps."""

LONGEST_TEXT = 1000
"""Characters of a card's summary, date or version."""

_LENGTH = 8
"""Bytes that say how long the header is."""

_BYTES = {"F16": 2, "F32": 4}
"""Of a number, by the types that parameters are stored in."""

_NO_MODEL = (
    "is no model that this package has saved. Other formats, pickles among them, are not read, "
    "because loading one can run code that is hidden in it."
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Header:
    """What a file says about its model.

    Parameters
    ----------
    base
        Key in the registry of the model that it was made from.
    architecture
        Arguments of that model's class.
    shapes
        Of the tensors, by their names.
    facts
        The card: how it came about.
    """

    base: str
    architecture: dict[str, int]
    shapes: Shapes
    facts: dict[str, Any]

    @property
    def parameters(self) -> int:
        """Number of learned parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def require_file(path: Path) -> int:
    """Refuse folders, pipes, devices and sockets, of which reading may never end.

    Returns
    -------
    Size in bytes.

    Raises
    ------
    FileFormatError
        if it is none, isn't there, or can't be looked at.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # the latter of a name with a zero byte
        raise FileFormatError(f"{path} can't be read: {_reason(error)}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise FileFormatError(f"{path} is a folder, and no file of a model.")
    if not stat.S_ISREG(status.st_mode):
        raise FileFormatError(f"{path} is a pipe, device or socket, and no file of a model.")
    return status.st_size


def read_header(path: Path) -> Header:
    """What a file says about its model, checked; the tensors aren't read.

    Raises
    ------
    FileFormatError
        if it is missing, no regular file, too large, damaged, or not of this package.
    """
    tensors, header, room = _parse(path)
    try:
        base, architecture, facts = header["model"], header["architecture"], header["card"]
    except KeyError as error:
        raise FileFormatError(f"{path} {_NO_MODEL}") from error
    if not isinstance(base, str) or base not in REGISTRY:
        raise FileFormatError(f"{path} is of the model {base!r}, which this version hasn't got.")
    if not _bundled_weights(base).is_file():
        raise FileFormatError(
            f"{path} is of an architecture that can't be made: {base} has no learned parameters."
        )
    shapes = _shapes(path, tensors, room)
    problem = _card_problem(facts)
    if not _is_architecture(architecture):
        problem = "its architecture isn't whole numbers in their range"
    if problem:
        raise FileFormatError(
            f"{path} has a header that isn't as this package writes it: {problem}."
        )
    _compare(path, Header(base, architecture, shapes, facts), bundled_header(base))
    return Header(base, architecture, shapes, facts)


def _compare(path: Path, found: Header, known: Header | None) -> None:
    """Refuse what can't be of that model, as far as that is seen without making one."""
    if known is None:
        return
    if not found.architecture.keys() <= known.architecture.keys():
        raise FileFormatError(f"{path} is of an architecture that can't be made.")
    if found.architecture == known.architecture and found.shapes != known.shapes:
        raise FileFormatError(f"{path} doesn't hold the parameters of the model {found.base}.")


@cache
def bundled_header(base: str) -> Header | None:
    """What the package's own weights of a model say; ``None`` where they are damaged."""
    with as_file(_bundled_weights(base)) as path:
        try:
            tensors, header, room = _parse(path)
            return Header(base, header["architecture"], _shapes(path, tensors, room), {})
        except (FileFormatError, KeyError):
            return None


def _bundled_weights(base: str) -> Any:
    return files("napari_learned_diffusion").joinpath("weights", f"{base}.safetensors")


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The tensors that a file lists, the header that this package wrote, and bytes for tensors."""
    size = require_file(path)
    if size > LARGEST_FILE:
        raise FileFormatError(f"{path} is too large to be a model of this package.")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            text = file.read(min(length, LARGEST_HEADER + 1))
    except OSError as error:
        raise FileFormatError(f"{path} can't be read: {_reason(error)}.") from error
    if len(text) > LARGEST_HEADER:
        raise FileFormatError(f"{path} is too large to be a model of this package.")
    try:
        tensors = json.loads(text)
        header = json.loads(tensors.pop("__metadata__")["header"])
        version = header["format"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{path} {_NO_MODEL}") from error
    if not _is_number(version, 0, 10**9) or not isinstance(header, dict):
        raise FileFormatError(f"{path} {_NO_MODEL}")
    if version > FORMAT:
        raise FileFormatError(
            f"{path} has the format {version}, but this version reads up to {FORMAT}. Update "
            "napari-learned-diffusion."
        )
    return tensors, header, size - _LENGTH - length


def _shapes(path: Path, tensors: dict[str, Any], room: int) -> Shapes:
    """The shapes of tensors that fill the file exactly."""
    shapes: dict[str, tuple[int, ...]] = {}
    taken = 0
    for name, tensor in tensors.items():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        is_shape = isinstance(shape, list) and all(
            type(n) is int and 0 <= n <= LARGEST_FILE for n in shape
        )
        width = _BYTES.get(tensor["dtype"]) if is_shape and _is_text(tensor.get("dtype")) else None
        if not is_shape or width is None or shape is None:
            raise FileFormatError(
                f"{path} has a header that isn't as this package writes it: {name!r} is no tensor "
                "of 16 or 32 bits."
            )
        shapes[name] = tuple(shape)
        taken += width * math.prod(shape)
    if not shapes or taken != room:
        raise FileFormatError(
            f"{path} is damaged: it has {max(room, 0)} bytes of parameters in place of {taken}."
        )
    return shapes


def _is_architecture(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and type(v) is int and 0 < v <= LARGEST_NUMBER for k, v in value.items()
    )


def _card_problem(facts: Any) -> str:
    """What is wrong with a card, in words; nothing where nothing is."""
    if not isinstance(facts, dict):
        return "it has no card"
    for name in ("summary", "date", "version"):
        if not _is_text(facts.get(name)):
            return f"its card has no text {name!r} of at most {LONGEST_TEXT} characters"
    if not _is_number(facts.get("gain_dB"), -LARGEST_NUMBER, LARGEST_NUMBER):
        return "its card's gain in decibels isn't in its range"
    noise = facts.get("noise_range")
    is_range = (
        isinstance(noise, list)
        and len(noise) == 2
        and all(_is_number(level, 0, 1e6) for level in noise)
        and noise[0] <= noise[1]
    )
    if not is_range:
        return "its card's noise levels aren't two numbers in their range"
    suggestion = facts.get("suggestion")
    if not isinstance(suggestion, dict):
        return "its card suggests no settings"
    if type(suggestion.get("iterations")) is not int or not _is_number(
        suggestion["iterations"], 1, LARGEST_NUMBER
    ):
        return "its card's number of iterations isn't in its range"
    if not _is_number(suggestion.get("tau"), 1e-6, LARGEST_NUMBER):
        return "its card's time step isn't in its range"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _is_number(value: Any, low: float, high: float) -> bool:
    """Whether a value is a number in a range; true and false are none, and NaN is in no range."""
    return type(value) in (int, float) and low <= value <= high


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
