"""Libraries that come with an extra of the package, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from napari_learned_diffusion.core.errors import (
    FileFormatError,
    LearnedDiffusionError,
    MissingDependencyError,
)


def require(module: str, extra: str, purpose: str) -> Any:
    """An optional module, imported.

    Parameters
    ----------
    module
        Its dotted name.
    extra
        The extra of the package that brings it.
    purpose
        What it is for, for people; begins a sentence: ``"MRC files"``.

    Raises
    ------
    MissingDependencyError
        if it isn't installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # One that is there may miss another, which no extra of ours brings.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingDependencyError(
            f"{purpose} need the library {error.name}. "
            f"Install it: pip install 'napari-learned-diffusion[{extra}]'"
        ) from error


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one sentence about the file.

    Errors of the system and of the installation pass, as do our own: who called knows more about
    them.
    """
    try:
        yield
    except (LearnedDiffusionError, MemoryError, ImportError):
        raise
    except Exception as error:
        # Decoders raise system errors without a number where the data is wrong.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # The libraries have no list of what a damaged file makes them raise.
        raise FileFormatError(
            f"{path} isn't a readable {kind} file ({_first_line(error)}). "
            "It may be damaged or of another format: copy or export it again."
        ) from error


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn a refusal of the system to read into a sentence about the file.

    Raises
    ------
    FileFormatError
        with the system's reason.
    """
    try:
        yield
    except MemoryError as error:
        raise FileFormatError(
            f"{path} needs more memory than there is. Read it lazily, or close other programs."
        ) from error
    except OSError as error:
        raise FileFormatError(
            f"{path} can't be read ({error.strerror or error}). Check your permission to read "
            "it and that its disk is still there."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
