"""What the docked widgets share: how they notice that they are closed, and how they tell errors."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from qtpy.QtCore import QEvent, QObject, QSize, Qt, QTimer
from qtpy.QtGui import QHideEvent, QKeySequence
from qtpy.QtWidgets import QAbstractButton, QFrame, QScrollArea, QWidget

from napari_learned_diffusion.core.errors import LearnedDiffusionError
from napari_learned_diffusion.widgets._runner import Runner

if TYPE_CHECKING:
    from napari.viewer import Viewer

PLUGIN = "napari-learned-diffusion"

Widget = TypeVar("Widget", bound=QWidget)

_log = logging.getLogger(__name__)


class DockedWidget(QWidget):
    """A widget that is told when its dock or its window is closed."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        # A timer that goes with the widget: Qt may delete it before the event comes.
        self._hidden = QTimer(self)
        self._hidden.setSingleShot(True)
        self._hidden.timeout.connect(self._leave_with_window)

    def leave(self) -> None:
        """Stop everything: dock or window were closed."""
        raise NotImplementedError

    def changeEvent(self, event: QEvent | None) -> None:
        super().changeEvent(event)
        if event is not None and event.type() == QEvent.Type.ParentChange and not self.parent():
            # The dock was closed: napari lets go of the widget and leaves it to Python.
            self.leave()

    def hideEvent(self, event: QHideEvent | None) -> None:
        super().hideEvent(event)
        if event is not None and not event.spontaneous():
            # Not at once: a dock that is about to float is hidden for a moment, too.
            self._hidden.start(0)

    def _leave_with_window(self) -> None:
        window = self.window()
        if window is None or not window.isVisible():
            self.leave()


def find_docked(viewer: Viewer, kind: type[Widget]) -> Widget | None:
    """The widget of that class in the viewer's window, if it is open there."""
    window = getattr(viewer, "window", None)
    docked = window.dock_widgets.values() if window is not None else ()
    return next((widget for widget in docked if isinstance(widget, kind)), None)


def open_docked(viewer: Viewer, kind: type[Widget], title: str) -> Widget:
    """The widget of that class in front of the user, opened if it isn't there.

    Parameters
    ----------
    viewer
        One with a window.
    kind
        Class of the widget.
    title
        Its name in the manifest.
    """
    widget = find_docked(viewer, kind)
    if widget is None:
        _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, title)
    dock = widget.parent()
    if isinstance(dock, QWidget):
        dock.show()
        dock.raise_()
    return widget


class FormScroll(QScrollArea):
    """Scrolls a form up and down, and is as wide as it needs, whatever the font.

    Parameters
    ----------
    form
        What is scrolled.
    width
        In pixels, at least.
    """

    def __init__(self, form: QWidget, width: int) -> None:
        super().__init__()
        self._least = width
        self.setWidget(form)
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        if event is not None and event.type() == QEvent.Type.LayoutRequest:
            self.updateGeometry()
        return super().eventFilter(watched, event)

    def minimumSizeHint(self) -> QSize:
        hint, form, bar = super().minimumSizeHint(), self.widget(), self.verticalScrollBar()
        if form is not None and bar is not None:
            needed = form.minimumSizeHint().width() + bar.sizeHint().width()
            hint.setWidth(max(self._least, needed))
        return hint


def set_shortcut(button: QAbstractButton, keys: str) -> None:
    """Give a button keys that work in the whole window, and say so in its tooltip."""
    shortcut = QKeySequence(keys)
    button.setShortcut(shortcut)
    shown = shortcut.toString(QKeySequence.SequenceFormat.NativeText)
    button.setToolTip(f"{button.toolTip()}\nKeys: {shown}")


def shut_down(runners: tuple[Runner, ...], *_: object) -> None:
    """Stop runners for good; for the signal that their owner is destroyed."""
    for runner in runners:
        runner.shut_down()


def explain(error: Exception) -> str:
    """An error in words; of one that isn't ours the log gets the traceback."""
    if isinstance(error, LearnedDiffusionError):
        return str(error)
    _log.error("A job has failed.", exc_info=error)
    return f"Something went wrong: {type(error).__name__}: {error}"
