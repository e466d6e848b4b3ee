"""What a model has learned: a curve, kernels with their functions, or a histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyqtgraph as pg
from numpy.typing import NDArray
from qtpy.QtCore import QRectF, QSize
from qtpy.QtWidgets import QFrame, QWidget

from napari_learned_diffusion.jobs.learned import Curve, Experts, Learned, Scatter
from napari_learned_diffusion.widgets._controls import Colours
from napari_learned_diffusion.widgets._plots import (
    colour_axis,
    dashed,
    make_axis,
    make_colour,
)

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.inspection import Inspection

HEIGHT = 300
"""In pixels."""

COLUMNS = 4
"""Experts beside each other."""

FORWARD, BACKWARD = "#4caf50", "#e57373"
KERNEL_COLORMAP, COUNT_COLORMAP = "CET-D1", "CET-L3"

_ELLIPTICITY = "b(s) = a(s) + 2 s a′(s)".replace(" ", "\xa0")  # on one line
_LOWEST_B = -0.3
_DOT = 8
_NO_POINTS: NDArray[np.float64] = np.array([])


class LearnedPlot(pg.GraphicsView):  # type: ignore[misc]
    """The plot that suits the model, put together anew when another one is shown.

    Parameters
    ----------
    parent
        Who owns it.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFixedHeight(HEIGHT)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self._colours: Colours | None = None
        self._learned: Learned | None = None
        self._step = 0
        self._layout = pg.GraphicsLayout()
        self._dots: list[pg.ScatterPlotItem] = []
        self._histogram: pg.PlotCurveItem | None = None
        self._image: pg.ImageItem | None = None
        self._mean: pg.PlotCurveItem | None = None
        self._box: pg.ViewBox | None = None

    def sizeHint(self) -> QSize:
        return QSize(COLUMNS * 30, HEIGHT)

    def set_colours(self, colours: Colours) -> None:
        """Follow napari's theme."""
        self._colours = colours
        self.setBackground(make_colour(colours.background))
        self._draw()

    def show_learned(self, learned: Learned | None) -> None:
        """Draw what a model has learned; ``None`` draws nothing."""
        self._learned = learned
        self._step = 0
        self._draw()

    def _draw(self) -> None:
        learned = self._learned
        # A layout whose items were taken out doesn't give new ones all of its room.
        self._layout = pg.GraphicsLayout()
        self._layout.setContentsMargins(0, 4, 8, 6)
        self._layout.setSpacing(3)
        self._dots = []
        self._histogram = self._image = self._mean = self._box = None
        colours = self._colours
        if learned is None or colours is None:
            self.setCentralItem(self._layout)
            return
        if isinstance(learned, Curve):
            self._draw_curve(learned, colours)
        elif isinstance(learned, Experts):
            self._draw_experts(learned, colours)
        else:
            self._draw_scatter(colours)
        self.setCentralItem(self._layout)
        self.set_step(self._step)

    def set_step(self, step: int) -> None:
        """Show the histogram of a step, counted from 0 among those that are kept."""
        self._step = step
        learned = self._learned
        if isinstance(learned, Curve) and self._histogram is not None:
            counts = learned.counts[step].astype(float)
            self._histogram.setData(learned.bins, counts / max(1.0, counts.max()))
        elif isinstance(learned, Scatter):
            self._show_counts(learned, step)

    def show_points(self, x: NDArray[Any] = _NO_POINTS, y: NDArray[Any] = _NO_POINTS) -> None:
        """Mark where a pixel is: on the curve, in the histogram, or one point for each expert."""
        if len(self._dots) == 1:
            self._dots[0].setData(x, y)
        else:
            for dot, *point in zip(self._dots, x, y, strict=False):
                dot.setData(*([value] for value in point))
            for dot in self._dots[len(x) :]:
                dot.clear()

    def _draw_curve(self, curve: Curve, colours: Colours) -> None:
        box = self._make_box("gradient, noise = 1 per pixel", "a(s), b(s)", colours)
        top = float(curve.gradient[-1])
        for start, end, colour in (
            (0.0, curve.turning_point, FORWARD),
            (curve.turning_point, top, BACKWARD),
        ):
            shade = make_colour(colour)
            shade.setAlpha(45)
            region = pg.LinearRegionItem((start, end), movable=False, brush=shade, pen=None)
            for line in region.lines:
                line.setPen(None)
            box.addItem(region)
        grey = make_colour(colours.quiet)
        grey.setAlpha(90)
        self._histogram = pg.PlotCurveItem(
            curve.bins,
            np.zeros(len(curve.bins) - 1),
            stepMode="center",
            fillLevel=0.0,
            brush=grey,
            pen=None,
        )
        box.addItem(self._histogram)
        text, accent = make_colour(colours.quiet), make_colour(colours.accent)
        box.addItem(pg.InfiniteLine(0.0, angle=0, pen=pg.mkPen(text, width=1)))
        box.addItem(
            pg.InfiniteLine(
                curve.contrast,
                angle=90,
                pen=dashed(colours.quiet),
                label="K",
                labelOpts={"position": 0.93, "color": text},
            )
        )
        box.addItem(_line(curve.gradient, curve.ellipticity, dashed(colours.quiet)))
        box.addItem(_line(curve.gradient, curve.diffusivity, pg.mkPen(accent, width=2)))
        self._add_dots(box, colours)
        box.setXRange(0, top, padding=0)
        box.setYRange(_LOWEST_B, 1.05, padding=0)

    def _draw_experts(self, experts: Experts, colours: Colours) -> None:
        low, high = float(experts.functions.min()), float(experts.functions.max())
        reach = float(experts.answers[-1])
        for number, (kernel, function) in enumerate(
            zip(experts.kernels, experts.functions, strict=True)
        ):
            row, column = divmod(number, COLUMNS)
            above, below = (pg.ViewBox(enableMenu=False, enableMouse=False) for _ in range(2))
            above.setAspectLocked(True)
            above.invertY(True)
            top = float(np.abs(kernel).max()) or 1.0
            image = pg.ImageItem(kernel, axisOrder="row-major", levels=(-top, top))
            image.setColorMap(pg.colormap.get(KERNEL_COLORMAP))
            above.addItem(image)
            text, accent = make_colour(colours.quiet), make_colour(colours.accent)
            for angle in (0, 90):
                below.addItem(pg.InfiniteLine(0.0, angle=angle, pen=pg.mkPen(text, width=1)))
            below.addItem(_line(experts.answers, function, pg.mkPen(accent, width=2)))
            self._add_dots(below, colours)
            below.setXRange(-reach, reach, padding=0.02)
            below.setYRange(low, high if high > low else low + 1.0, padding=0.06)
            self._layout.addItem(above, 2 * row, column)
            self._layout.addItem(below, 2 * row + 1, column)

    def _draw_scatter(self, colours: Colours) -> None:
        box = self._make_box("gradient, noise = 1 per pixel", "diffusivity", colours)
        self._image = pg.ImageItem(axisOrder="row-major")
        self._image.setColorMap(pg.colormap.get(COUNT_COLORMAP))
        self._mean = pg.PlotCurveItem(pen=pg.mkPen(make_colour(colours.accent), width=2))
        box.addItem(self._image)
        box.addItem(self._mean)
        self._box = box
        self._add_dots(box, colours)

    def _show_counts(self, scatter: Scatter, step: int) -> None:
        counts = scatter.counts[step].astype(float)
        x, y = scatter.gradient_bins, scatter.diffusivity_bins[step]
        if self._image is None or self._mean is None or self._box is None:
            return
        shown = np.log1p(counts)
        self._image.setImage(shown, levels=(0.0, float(shown.max()) or 1.0))
        self._image.setRect(QRectF(0.0, 0.0, float(x[-1]), float(y[-1])))
        in_column = counts.sum(axis=0)
        means = counts.T @ ((y[1:] + y[:-1]) / 2) / np.maximum(in_column, 1)
        is_there = in_column > 0
        self._mean.setData(((x[1:] + x[:-1]) / 2)[is_there], means[is_there])
        self._box.setXRange(0, float(x[-1]), padding=0)
        self._box.setYRange(0, float(y[-1]), padding=0)

    def _make_box(self, bottom: str, left: str, colours: Colours) -> pg.ViewBox:
        """A plot of one box and two axes."""
        box = pg.ViewBox(enableMenu=False, enableMouse=False)
        for side, label, place in (("left", left, (0, 0)), ("bottom", bottom, (1, 1))):
            axis = make_axis(side)
            axis.setLabel(label)
            axis.linkToView(box)
            colour_axis(axis, colours.quiet)
            self._layout.addItem(axis, *place)
        self._layout.addItem(box, 0, 1)
        return box

    def _add_dots(self, box: pg.ViewBox, colours: Colours) -> None:
        dots = pg.ScatterPlotItem(
            size=_DOT,
            brush=pg.mkBrush(make_colour(colours.error)),
            pen=pg.mkPen(make_colour(colours.background)),
        )
        box.addItem(dots)
        self._dots.append(dots)


def _line(x: NDArray[Any], y: NDArray[Any], pen: Any) -> pg.PlotCurveItem:
    return pg.PlotCurveItem(x, y, pen=pen)


def explain_learned(learned: Learned, step: int) -> str:
    """What the plot shows, in plain words."""
    if isinstance(learned, Curve):
        share = learned.backward[step]
        return (
            f"K = {learned.contrast:.3g} standard deviations of the noise per pixel.\n"
            f"Line: diffusivity a(s) of the squared gradient s. Dashed: {_ELLIPTICITY}. "
            "Green: forward, differences even out. Red: backward, edges are sharpened, at "
            f"{share:.0%} of all neighbours before this step. Grey: how many have which gradient."
        )
    if isinstance(learned, Experts):
        reach = learned.answers[-1]
        low, high = learned.functions.min(), learned.functions.max()
        return (
            f"The {len(learned.kernels)} kernels that matter most on this slice, and below each "
            "what its answer adds to the logarithm of the conductance: down is less diffusion.\n"
            f"Answers from -{reach:.2g} to {reach:.2g} standard deviations of the noise, added "
            f"{low:.2g} to {high:.2g}."
        )
    return (
        "Pixels by gradient and diffusivity before this step, bright where there are many. "
        "Line: mean diffusivity at each gradient. A network has no single curve: it knows noise "
        "from edges of the same gradient."
    )


def probe_learned(
    found: Inspection, step: int, pixel: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[Any], str]:
    """Where a pixel is in the plot, and what that means.

    Parameters
    ----------
    found
        The inspection.
    step
        Which of its steps.
    pixel
        Row and column.

    Returns
    -------
    x, y
        As `LearnedPlot.show_points` takes them.
    text
        For people.
    """
    learned = found.learned
    if isinstance(learned, Curve):
        y = np.array(list(found.edges[step].around(pixel).values()))
        x = np.array([learned.gradient_of(conductance) for conductance in y])
        backward = int(np.count_nonzero(x > learned.turning_point))
        return x, y, f"backward across {backward} of its {len(x)} edges."
    v = found.prepared.noise.stabilise(found.denoised[step].astype(np.float64))
    if isinstance(learned, Experts):
        x = learned.answers_at(v, pixel)
        pairs = zip(x, learned.functions, strict=True)
        y = np.array([np.interp(at, learned.answers, function) for at, function in pairs])
        return x, y, f"these kernels add {y.sum():.3g}, to the edge on its right."
    height, width = v.shape
    around = [
        [v[row, column] for row, column in ends if 0 <= row < height and 0 <= column < width]
        for ends in (
            ((pixel[0] - 1, pixel[1]), (pixel[0] + 1, pixel[1])),
            ((pixel[0], pixel[1] - 1), (pixel[0], pixel[1] + 1)),
        )
    ]
    squares = [np.mean([(value - v[pixel]) ** 2 for value in axis]) for axis in around if axis]
    gradient, diffusivity = float(np.sqrt(np.sum(squares))), float(found.diffusivity[step][pixel])
    text = f"gradient {gradient:.3g}, diffusivity {diffusivity:.3g}."
    return np.array([gradient]), np.array([diffusivity]), text
