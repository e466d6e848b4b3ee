"""What the plots share. They are put together from pyqtgraph's parts, for a ready-made plot makes
seven menus that live on as windows of their own.
"""

from __future__ import annotations

import pyqtgraph as pg
from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QPen
from qtpy.QtWidgets import QFrame, QWidget

HEIGHT = 132
"""Of a plot in a form, in pixels: enough to tell a line from a constant."""


class SmallPlot(pg.GraphicsView):  # type: ignore[misc]
    """A plot with two axes, to look at.

    Parameters
    ----------
    parent
        Who owns it.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFixedHeight(HEIGHT)
        self.setFrameShape(QFrame.Shape.NoFrame)
        # Wheel and drag belong to the scroll area around the plot.
        self.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self._box = pg.ViewBox(enableMenu=False, enableMouse=False)
        self._axes = {side: make_axis(side) for side in ("left", "bottom")}
        layout = pg.GraphicsLayout()
        # Below, because an axis lets its label hang 5 pixels out of its own rectangle.
        layout.setContentsMargins(0, 4, 6, 6)
        layout.setSpacing(0)
        layout.addItem(self._axes["left"], 0, 0)
        layout.addItem(self._box, 0, 1)
        layout.addItem(self._axes["bottom"], 1, 1)
        self.setCentralItem(layout)
        for axis in self._axes.values():
            axis.linkToView(self._box)

    def _set_axis_colours(self, background: str, text: str) -> None:
        """Follow napari's theme; both are CSS colours."""
        self.setBackground(make_colour(background))
        for axis in self._axes.values():
            colour_axis(axis, text)


def make_axis(side: str) -> pg.AxisItem:
    """An axis with few ticks, which point into the plot."""
    axis = pg.AxisItem(side)
    axis.setStyle(tickLength=-4, tickTextOffset=3, maxTickLevel=0)
    axis.enableAutoSIPrefix(False)
    return axis


def colour_axis(axis: pg.AxisItem, text: str) -> None:
    """Draw an axis in a CSS colour."""
    axis.setPen(pg.mkPen(make_colour(text), width=1))
    axis.setTextPen(pg.mkPen(make_colour(text)))


def make_colour(colour: str) -> QColor:
    """A colour as napari's themes write it, ``rgb(1, 2, 3)``."""
    if colour.startswith("rgb("):
        return QColor(*(int(part) for part in colour[4:-1].split(",")))
    return QColor(colour)


def dashed(colour: str) -> QPen:
    """A pen for what is there to compare with."""
    pen = QPen(make_colour(colour))
    pen.setStyle(Qt.PenStyle.DashLine)
    pen.setCosmetic(True)  # as wide on the screen, however the plot is scaled
    return pen
