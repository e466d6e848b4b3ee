"""Names that users and strangers have chosen, made fit to be file names."""

from __future__ import annotations

import unicodedata

from napari_learned_diffusion.core.user_models import RESERVED_NAMES

LONGEST_FILE_NAME = 200
"""Bytes; file systems take 255, and a suffix, and what is written aside, need their room."""

_FORBIDDEN = '<>:"/\\|?*'


def as_file_name(name: str, *, otherwise: str = "layer") -> str:
    """A layer's name as a file may be called on every system, without a suffix.

    Parameters
    ----------
    otherwise
        Where nothing of the name is left.
    """
    one_line = " ".join(name.split())
    kept = "".join("_" if c in _FORBIDDEN else c for c in one_line if _is_visible(c))
    kept = kept.lstrip(".~ ")
    # Cut between letters, and not in the bytes of one.
    kept = kept.encode()[:LONGEST_FILE_NAME].decode(errors="ignore").strip(" .")
    if kept.split(".")[0].lower() in RESERVED_NAMES:
        kept = f"_{kept}"
    return kept or otherwise


def _is_visible(letter: str) -> bool:
    """Whether a letter is no control character, nor one that turns the direction of text."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn")
