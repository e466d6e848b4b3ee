"""Names that users and strangers have chosen, made fit to be file names."""

from __future__ import annotations

from napari_learned_diffusion.core.text import is_visible, one_line
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
    kept = "".join("_" if c in _FORBIDDEN else c for c in one_line(name) if is_visible(c))
    kept = kept.lstrip(".~ ")
    # Cut between letters, and not in the bytes of one.
    kept = kept.encode()[:LONGEST_FILE_NAME].decode(errors="ignore").strip(" .")
    if kept.split(".")[0].lower() in RESERVED_NAMES:
        kept = f"_{kept}"
    return kept or otherwise
