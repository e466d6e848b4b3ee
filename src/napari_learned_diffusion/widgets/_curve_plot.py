"""A small plot of the course of a fine-tuning."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyqtgraph as pg
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QWidget

from napari_learned_diffusion.widgets._plots import SmallPlot, make_colour

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_learned_diffusion.jobs.finetune import Curve

LEAST_SPAN = 0.5
"""Decibels that the plot spans, at least, so that noise doesn't look like progress."""

MOST_ABOVE = 3.0
"""Decibels above the starting model that are shown: what is worse only matters as being worse."""


class CurvePlot(SmallPlot):
    """Change of training and held-out error, in decibels; the starting model is the line at 0.

    Parameters
    ----------
    parent
        Who owns it.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._axes["bottom"].setLabel("step")
        self._axes["left"].setLabel("error (dB)")
        self._start = pg.InfiniteLine(0, angle=0)
        self._training = pg.PlotCurveItem()
        self._held_out = pg.PlotCurveItem()
        self._points = pg.ScatterPlotItem(size=5)
        for item in (self._start, self._training, self._held_out, self._points):
            self._box.addItem(item)
        self.show_curve(None, 1)

    def show_curve(self, curve: Curve | None, steps: int) -> None:
        """Draw the losses up to the last look at the held-out part.

        Parameters
        ----------
        curve
            ``None`` for none.
        steps
            That the training takes at most.
        """
        at, training, held_out = changes(curve)
        self._training.setData(at[1:], training)
        self._held_out.setData(at, held_out)
        self._points.setData(at, held_out)
        self._box.setXRange(0, max(1, steps), padding=0.02)
        shown = np.concatenate([held_out, training, [0.0]])
        low, high = float(shown.min()), min(float(shown.max()), MOST_ABOVE)
        missing = max(0.0, LEAST_SPAN - (high - low))
        self._box.setYRange(low - missing, high, padding=0.12)

    def set_colours(self, background: str, text: str, line: str) -> None:
        """Follow napari's theme; all are CSS colours."""
        self._set_axis_colours(background, text)
        self._start.setPen(pg.mkPen(make_colour(text), width=1, style=Qt.PenStyle.DashLine))
        faint = make_colour(text)
        faint.setAlpha(150)
        self._training.setPen(pg.mkPen(faint, width=1.5))
        self._held_out.setPen(pg.mkPen(make_colour(line), width=2))
        self._points.setBrush(pg.mkBrush(make_colour(line)))
        self._points.setPen(pg.mkPen(None))


def changes(
    curve: Curve | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps of the looks, and the change of the training error and of the held-out error, in dB.

    The training error is that of all steps between two looks, relative to the first of these.
    """
    if curve is None or not curve.held_out:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    at = np.array([step for step, _ in curve.held_out])
    losses = np.array(curve.training)
    means = np.array([losses[a:b].mean() for a, b in pairwise(at)])
    held_out = np.array([error for _, error in curve.held_out])
    return at.astype(np.float64), _decibels(means), _decibels(held_out)


def _decibels(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative to the first; an estimate of an error may fall below 0."""
    if len(errors) == 0 or errors[0] <= 0:
        return np.zeros(len(errors))
    return np.asarray(10 * np.log10(np.maximum(errors / errors[0], 1e-2)))
