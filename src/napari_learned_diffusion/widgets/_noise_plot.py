"""A small plot of the noise against the intensity: what was measured, and the model in use."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pyqtgraph as pg
from qtpy.QtWidgets import QWidget

from napari_learned_diffusion.widgets._plots import SmallPlot, make_colour

if TYPE_CHECKING:
    from napari_learned_diffusion.core.noise import NoiseModel
    from napari_learned_diffusion.core.noise_estimation import NoiseCurve

LARGEST_POINT, SMALLEST_POINT = 8.0, 4.0
"""Diameters in pixels; a point's area grows with the number of image blocks behind it."""


class NoisePlot(SmallPlot):
    """Noise against intensity.

    Parameters
    ----------
    parent
        Who owns it.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._line = pg.PlotCurveItem()
        self._points = pg.ScatterPlotItem()
        self._box.addItem(self._line)
        self._box.addItem(self._points)
        self._unit: str | None = None
        self._shown: tuple[NoiseCurve | None, NoiseModel | None] = None, None
        self.set_unit("")

    def set_unit(self, unit: str) -> None:
        """Label both axes with the unit of the intensities."""
        if unit == self._unit:
            return
        self._unit = unit
        suffix = f" ({escape(unit)})" if unit else ""  # pyqtgraph makes HTML of a label
        self._axes["bottom"].setLabel(f"intensity{suffix}")
        self._axes["left"].setLabel("noise")

    def show_noise(self, curve: NoiseCurve | None, model: NoiseModel | None) -> None:
        """Draw measured points, the standard deviation that a model predicts, or both.

        Parameters
        ----------
        curve
            Measurements; ``None`` for none.
        model
            The noise model in use, drawn over the range of the measurements.
        """
        before, before_model = self._shown
        if curve is before and model == before_model:
            return  # as at every slice that the user scrolls over
        self._shown = curve, model
        if curve is None or len(curve.intensity) == 0:
            self._points.clear()
            self._line.setData([], [])
            return
        share = np.sqrt(curve.weight / max(float(np.max(curve.weight)), 1e-300))
        size = SMALLEST_POINT + (LARGEST_POINT - SMALLEST_POINT) * share
        self._points.setData(x=curve.intensity, y=curve.noise_sigma, size=size)
        top = float(np.max(curve.noise_sigma))
        if model is None:
            self._line.setData([], [])
        else:
            low, high = float(np.min(curve.intensity)), float(np.max(curve.intensity))
            margin = 0.05 * (high - low) or 1.0
            u = np.linspace(low - margin, high + margin, 200)
            sigma = np.sqrt(model.variance(u))
            # Dots lie at the mean of noisy intensities, which may be off the true one.
            self._line.setData(model.mean(u), sigma)
            top = max(top, float(np.max(sigma)))
        # From 0, so that a nearly constant noise looks nearly constant.
        self._box.setYRange(0.0, (1.15 * top) or 1.0, padding=0)

    def set_colours(self, background: str, text: str, line: str) -> None:
        """Follow napari's theme; all are CSS colours."""
        self._set_axis_colours(background, text)
        dots = make_colour(text)
        dots.setAlpha(170)
        self._points.setBrush(pg.mkBrush(dots))
        self._points.setPen(pg.mkPen(None))
        self._line.setPen(pg.mkPen(make_colour(line), width=2))
