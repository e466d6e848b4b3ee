"""Text that strangers have written, such as names of files and layers, made fit to be shown."""

from __future__ import annotations

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf"})
"""Unicode's categories of control characters, and of marks such as those that turn the direction of
text: with them a name can move the cursor of a terminal, or look like another name."""

_UNDECODED = "Cs"
"""Of bytes in the name of a file that are no letters; they can't be printed."""

_JOINERS = "\u200c\u200d"
"""Which aren't shown, but which some scripts and emoji need."""


def one_line(text: str, longest: int | None = None) -> str:
    """A text on one line, without characters that can't be seen.

    Parameters
    ----------
    text
        Anything.
    longest
        Number of characters from which the middle is left out; ``None``: as long as it is.
    """
    if longest is not None and len(text) > 4 * longest:
        text = text[: 2 * longest] + text[-2 * longest :]  # whose middle wouldn't be seen anyway
    words = "".join(" " if c in "\t\n\r\v\f\x85\u2028\u2029" else c for c in text).split()
    seen = "".join(
        "�" if unicodedata.category(c) == _UNDECODED else c
        for c in " ".join(words)
        if c in _JOINERS or is_visible(c)
    )
    if longest is None or len(seen) <= longest:
        return seen
    head = (longest - 1) // 2
    return f"{seen[:head]}…{seen[head + 1 - longest :]}"


def is_visible(letter: str) -> bool:
    """Whether a character has a place of its own in a line."""
    return unicodedata.category(letter) not in _HIDDEN
