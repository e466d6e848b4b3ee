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

    Errors of the system pass, as do our own: who called knows more about them.
    """
    try:
        yield
    except (LearnedDiffusionError, MemoryError, OSError):
        raise
    except Exception as error:
        # The libraries have no list of what a damaged file makes them raise.
        raise FileFormatError(
            f"{path} isn't a readable {kind} file ({_first_line(error)}). "
            "It may be damaged or of another format: copy or export it again."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
