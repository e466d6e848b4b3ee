"""Text of strangers, such as file names, as it may be shown in a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text without control characters, which could move the cursor or hide what follows.

    Parameters
    ----------
    text
        May hold names of files and models; it becomes one line.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
