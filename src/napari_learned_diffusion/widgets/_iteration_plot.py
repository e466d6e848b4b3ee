"""Curves over the iterations, with a line at the one on display that can be moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyqtgraph as pg
from numpy.typing import NDArray
from qtpy.QtCore import QSize, Signal
from qtpy.QtWidgets import QFrame, QWidget

from napari_learned_diffusion.widgets._plots import (
    colour_axis,
    dashed,
    make_axis,
    make_colour,
)

if TYPE_CHECKING:
    from napari_learned_diffusion.widgets._controls import Colours

HEIGHT = 250
"""Of the three curves together, in pixels."""

_AXIS_WIDTH = 52
_MARK_SIZE = 9


class IterationPlot(pg.GraphicsView):  # type: ignore[misc]
    """Q, what has been removed, and the value of a pixel, each over the iterations.

    Parameters
    ----------
    parent
        Who owns it.
    """

    moved = Signal(int)
    """The user has moved the line to an iteration, or has clicked there."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFixedHeight(HEIGHT)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self._iterations = 0
        self._is_updating = False
        layout = pg.GraphicsLayout()
        layout.setContentsMargins(0, 4, 8, 6)
        layout.setSpacing(3)
        self._q, self._removed, self._pixel = (
            _Row(layout, row, label, self._on_line_moved)
            for row, label in enumerate(("Q", "removed", "pixel"))
        )
        self._rows = (self._q, self._removed, self._pixel)
        for row in self._rows[1:]:
            row.box.setXLink(self._q.box)
        self._bottom = make_axis("bottom")
        self._bottom.setLabel("iteration")
        self._bottom.linkToView(self._pixel.box)
        layout.addItem(self._bottom, len(self._rows), 1)
        self.setCentralItem(layout)
        # As much removed as there is noise.
        self._noise_level = pg.InfiniteLine(1.0, angle=0)
        self._removed.box.addItem(self._noise_level)
        self.scene().sigMouseClicked.connect(self._on_clicked)
        self.clear()

    def sizeHint(self) -> QSize:
        # pyqtgraph would ask for the width of a whole window.
        return QSize(2 * _AXIS_WIDTH, HEIGHT)

    def clear(self) -> None:
        """Show nothing."""
        self._iterations = 0
        for row in self._rows:
            row.clear()
        self._noise_level.setVisible(False)

    def show_curves(
        self,
        q: NDArray[np.float64],
        removed: NDArray[np.float64],
        best_by_q: int | None,
        best_by_discrepancy: int | None,
    ) -> None:
        """Draw Q and the variance of what was removed, with a mark where each suggests to stop."""
        self._iterations = len(q) - 1
        steps = np.arange(len(q))
        self._q.show_curve(steps, q, best_by_q)
        self._removed.show_curve(steps, removed, best_by_discrepancy, include=(0.0, 1.05))
        self._noise_level.setVisible(True)
        self._q.box.setXRange(0, max(1, self._iterations), padding=0.03)
        self.show_pixel(np.array([]), np.array([]))

    def show_pixel(self, steps: NDArray[Any], values: NDArray[Any]) -> None:
        """Draw what becomes of a pixel's value, in layer units; empty arrays draw nothing."""
        self._pixel.show_curve(steps, values, None)

    def set_iteration(self, iteration: int) -> None:
        """Move the line."""
        self._is_updating = True
        for row in self._rows:
            row.line.setVisible(self._iterations > 0)
            row.line.setValue(iteration)
        self._is_updating = False

    def set_colours(self, colours: Colours) -> None:
        """Follow napari's theme."""
        self.setBackground(make_colour(colours.background))
        for row in self._rows:
            row.set_colours(colours)
        colour_axis(self._bottom, colours.quiet)
        self._noise_level.setPen(dashed(colours.quiet))

    def _on_line_moved(self, line: Any) -> None:
        if not self._is_updating:
            self._move_to(line.value())

    def _on_clicked(self, event: Any) -> None:
        if self._iterations and not event.isAccepted():
            self._move_to(self._q.box.mapSceneToView(event.scenePos()).x())

    def _move_to(self, position: float) -> None:
        iteration = min(max(round(position), 0), self._iterations)
        self.set_iteration(iteration)
        self.moved.emit(iteration)


class _Row:
    """One curve with its axis, its mark, and the line that can be moved."""

    def __init__(self, layout: pg.GraphicsLayout, row: int, label: str, on_moved: Any) -> None:
        self.box = pg.ViewBox(enableMenu=False, enableMouse=False)
        self.axis = make_axis("left")
        self.axis.setWidth(_AXIS_WIDTH)
        self.axis.setLabel(label)
        self.axis.linkToView(self.box)
        layout.addItem(self.axis, row, 0)
        layout.addItem(self.box, row, 1)
        self.curve = pg.PlotCurveItem()
        self.mark = pg.ScatterPlotItem(size=_MARK_SIZE)
        self.line = pg.InfiniteLine(0.0, angle=90, movable=True)
        self.line.sigPositionChanged.connect(on_moved)
        for item in (self.curve, self.mark, self.line):
            self.box.addItem(item)

    def clear(self) -> None:
        self.curve.setData([], [])
        self.mark.clear()
        self.line.setVisible(False)

    def show_curve(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        marked: int | None,
        include: Sequence[float] = (),
    ) -> None:
        finite = y[np.isfinite(y)]
        self.mark.clear()
        if finite.size == 0:
            self.curve.setData([], [])
            return
        self.curve.setData(x, y)
        if marked is not None:
            self.mark.setData([marked], [float(y[marked])])
        shown = [float(finite.min()), float(finite.max()), *include]
        low, high = min(shown), max(shown)
        self.box.setYRange(low, high if high > low else low + 1.0, padding=0.08)

    def set_colours(self, colours: Colours) -> None:
        colour_axis(self.axis, colours.quiet)
        self.curve.setPen(pg.mkPen(make_colour(colours.quiet), width=2))
        self.mark.setBrush(pg.mkBrush(make_colour(colours.accent)))
        self.mark.setPen(pg.mkPen(None))
        self.line.setPen(pg.mkPen(make_colour(colours.accent), width=2))
        self.line.setHoverPen(pg.mkPen(make_colour(colours.error), width=3))
