"""How the forms show text that others have written: as text, and never as markup.

Qt takes a text for rich text where it looks like it, in labels, tooltips and message boxes, and
then loads the images that it names. Names of files, layers and models, units and the summaries of
models come from elsewhere, and messages about errors contain them.
"""

from __future__ import annotations

import re

from napari.utils import notifications
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QLabel, QWidget

from napari_learned_diffusion.core.text import one_line

LONGEST_NAME = 80
"""Letters of a name in a message or a list; of a longer one the middle is left out."""

_NOTHING = "\u200b"
"""A space without width."""

_WORD = 36
"""Letters of a word after which a line may be broken."""

_LONG_WORD = re.compile(rf"([^\s{_NOTHING}]{{{_WORD}}})(?=\S)")
_LONG_WORD_END = re.compile(rf"([^\s{_NOTHING}]{{{_WORD}}}){_NOTHING}")


def plain(text: str) -> str:
    """The same to the eye, but nothing that Qt takes for rich text.

    It is for tooltips and for what napari shows, where the format can't be chosen. No ``<`` begins
    a tag, and no ``&`` an entity, any more.
    """
    return text.replace("<", f"<{_NOTHING}").replace("&", f"&{_NOTHING}")


def short_name(name: object) -> str:
    """A name as it stands in messages and lists: on one line, and not too long."""
    return one_line(str(name), LONGEST_NAME)


def breakable(text: str, *, is_back: bool = False) -> str:
    """A text whose words can be wrapped where they are longer than a form is wide.

    Parameters
    ----------
    is_back
        Whether to make the text as it was before.
    """
    if is_back:
        return _LONG_WORD_END.sub(r"\1", text)
    return _LONG_WORD.sub(rf"\1{_NOTHING}", text)


def tell_error(message: str) -> None:
    """Show what went wrong as a notification of napari."""
    notifications.show_error(plain(message))


class PlainLabel(QLabel):
    """A label that shows any text as it is."""

    def __init__(self, text: str = "", parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setText(text)
