"""What the plots share. They are put together from pyqtgraph's parts, for a ready-made plot makes
seven menus that live on as windows of their own.
"""

from __future__ import annotations

import pyqtgraph as pg
from qtpy.QtCore import Qt
from qtpy.QtGui import QColor, QPen


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
