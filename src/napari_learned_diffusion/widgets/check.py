"""The Check widget: whether a result can be trusted, in numbers, pictures, and side by side."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyqtgraph as pg
from napari.layers import Image, Layer
from napari.utils.theme import get_theme
from numpy.typing import NDArray
from qtpy.QtCore import QSize, Qt
from qtpy.QtWidgets import (
    QFileDialog,
    QFrame,
    QGridLayout,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSizePolicy,
    QSlider,
    QVBoxLayout,
    QWidget,
)

from napari_learned_diffusion.core.errors import LearnedDiffusionError
from napari_learned_diffusion.core.noise import noise_model_from_dict
from napari_learned_diffusion.widgets import _tasks
from napari_learned_diffusion.widgets._compare import SideBySide, Wipe
from napari_learned_diffusion.widgets._controls import Choice, Colours, Note, make_rows
from napari_learned_diffusion.widgets._dock import DockedWidget, FormScroll, explain, shut_down
from napari_learned_diffusion.widgets._layers import (
    Source,
    as_volume,
    find_layer,
    has_other_content,
    mark_of,
    read,
)
from napari_learned_diffusion.widgets._names import as_file_name
from napari_learned_diffusion.widgets._plots import make_colour
from napari_learned_diffusion.widgets._results import (
    RESIDUAL_COLORMAP,
    RESIDUAL_LIMIT,
    show_result,
)
from napari_learned_diffusion.widgets._runner import Runner
from napari_learned_diffusion.widgets._tasks import CheckRequest
from napari_learned_diffusion.widgets._text import PlainLabel, short_name, tell_error

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_learned_diffusion.core.noise import NoiseModel
    from napari_learned_diffusion.jobs.check import Check
    from napari_learned_diffusion.widgets._tasks import Checked

WIDTH = 340
"""In pixels, at least."""

PICTURE_SIZE = 110
"""Edge of the picture of the autocorrelation, in pixels."""

NO_REFERENCE = "none"

ROWS = ("Noise (flat areas)", "Mean", "Lowest", "Highest", "Q", "PSNR", "SSIM")


class CheckWidget(DockedWidget):
    """Compare a result with what it was made from.

    Parameters
    ----------
    napari_viewer
        The viewer whose layers are compared.
    load_jobs
        Returns the module of the job; called in a worker, for importing it imports torch.
    """

    def __init__(
        self, napari_viewer: Viewer, load_jobs: Callable[[], Any] = _tasks.load_check
    ) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._load_jobs = load_jobs
        self._watched: Sequence[Layer] = ()
        self._checked: Checked | None = None
        self._running: CheckRequest | None = None
        self._reason = ""
        self._run = Runner(self)
        self._export = Runner(self, in_activity_dock=True)
        self._side_by_side = SideBySide(napari_viewer)
        self._wipe = Wipe(napari_viewer)
        self._make_controls()
        self._lay_out()
        self._connect()
        self._on_theme()
        self._on_layers()
        self._show_checked()

    # --- the window -------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        self.result = Choice({})
        self.result.setToolTip("The denoised layer to check.")
        self.input = Choice({})
        self.input.setToolTip("The layer that it was made from.")
        self.reference = Choice({})
        self.reference.setToolTip(
            "A layer that shows the truth, for PSNR and SSIM: a simulation's, or a longer exposure."
            " It must be in the same units."
        )
        self.check_button = QPushButton("Check slice")
        self.check_button.setToolTip("Measure the slice in view before and after.")
        self.status = Note()
        self.cells: dict[str, tuple[PlainLabel, PlainLabel]] = {}
        self.structure = Note()
        self.picture = AutocorrelationPicture()
        self.picture.setToolTip(
            "The residual beside itself, shifted by up to 5 pixels: red where it is alike, blue "
            "where it is opposite. Of noise alone it is grey off the centre."
        )
        self.side_button = QPushButton("Side by side")
        self.side_button.setCheckable(True)
        self.side_button.setToolTip(
            "Show input and result alone, beside each other. Press again to go back."
        )
        self.wipe_button = QPushButton("Wipe")
        self.wipe_button.setCheckable(True)
        self.wipe_button.setToolTip(
            "Show the input on the left and the result on the right of an edge that you move. Press"
            " again to go back."
        )
        self.wipe_slider = QSlider(Qt.Orientation.Horizontal)
        self.wipe_slider.setRange(0, 1000)
        self.wipe_slider.setValue(500)
        self.wipe_slider.setToolTip("Where the edge is.")
        self.residual_button = QPushButton("Residual layer")
        self.residual_button.setToolTip(
            "Show input minus result as a layer, in layer units, with colours that are as strong "
            "for plus as for minus."
        )
        self.export_button = QPushButton("Export with record …")
        self.export_button.setToolTip(
            "Write the result as TIFF, and beside it as JSON how it was made and what was measured."
        )

    def _lay_out(self) -> None:
        rows = make_rows()
        rows.addRow("Result", self.result)
        rows.addRow("Input", self.input)
        rows.addRow("Reference", self.reference)
        table = QGridLayout()
        table.setHorizontalSpacing(10)
        table.setVerticalSpacing(3)
        for at, heading in enumerate(("before", "after"), start=1):
            table.addWidget(QLabel(heading), 0, at)
            table.setColumnStretch(at, 1)
        tips = {
            "Noise (flat areas)": "Standard deviation of the noise by its model, and what of it is "
            "visible in flat areas of the result, which is less than its error.",
            "Mean": "Mean intensity, in layer units. It should stay.",
            "Lowest": "Lowest intensity. It should not fall.",
            "Highest": "Highest intensity. It should not rise.",
            "Q": "Oriented structure, in layer units: higher is more structure and less noise.",
            "PSNR": "Nearness to the reference, in decibels: higher is nearer.",
            "SSIM": "Likeness to the reference, at most 1.",
        }
        for row, name in enumerate(ROWS, start=1):
            title = QLabel(name)
            cells = PlainLabel("–"), PlainLabel("–")
            self.cells[name] = cells
            for at, label in enumerate((title, *cells)):
                label.setToolTip(tips[name])
                table.addWidget(label, row, at)
        structure = QHBoxLayout()
        structure.addWidget(self.picture)
        structure.addWidget(self.structure, 1)
        views = QHBoxLayout()
        views.addWidget(self.side_button, 1)
        views.addWidget(self.wipe_button, 1)
        views.addWidget(self.residual_button, 1)
        page = QWidget()
        column = QVBoxLayout(page)
        column.setContentsMargins(8, 6, 8, 8)
        column.setSpacing(8)
        column.addLayout(rows)
        column.addWidget(self.check_button)
        column.addWidget(self.status)
        column.addLayout(table)
        column.addLayout(structure)
        column.addLayout(views)
        column.addWidget(self.wipe_slider)
        column.addWidget(self.export_button)
        column.addStretch()
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        outer.addWidget(FormScroll(page, WIDTH))

    def _connect(self) -> None:
        self.result.currentIndexChanged.connect(self._on_result)
        for choice in (self.input, self.reference):
            choice.currentIndexChanged.connect(self._forget)
        self.check_button.clicked.connect(self.check)
        self.side_button.toggled.connect(self._on_side_by_side)
        self.wipe_button.toggled.connect(self._on_wipe)
        self.wipe_slider.valueChanged.connect(self._on_wipe_moved)
        self.residual_button.clicked.connect(self.show_residual)
        self.export_button.clicked.connect(self._ask_where_to)
        self._run.started.connect(self._on_run_started)
        self._run.succeeded.connect(self._on_run_succeeded)
        self._run.failed.connect(self._on_failed)
        self._run.cancelled.connect(self._on_run_cancelled)
        self._run.finished.connect(self._on_run_finished)
        self._export.started.connect(self._update_buttons)
        self._export.succeeded.connect(self._on_exported)
        self._export.failed.connect(self._on_failed)
        self._export.finished.connect(self._update_buttons)
        # napari keeps weak references to these methods, so a closed widget isn't kept alive.
        layers = self._viewer.layers.events
        layers.removed.connect(self._on_removed)
        for event in (layers.inserted, layers.removed, layers.reordered):
            event.connect(self._on_layers)
        self._viewer.events.theme.connect(self._on_theme)
        self.destroyed.connect(partial(shut_down, (self._run, self._export)))

    @property
    def is_working(self) -> bool:
        """Whether anything is measured or written."""
        return not (self._run.is_idle and self._export.is_idle)

    def leave(self) -> None:
        """Stop everything and show the layers as they were: dock or window were closed."""
        self._run.cancel()
        self._export.cancel()
        self.side_button.setChecked(False)
        self.wipe_button.setChecked(False)
        self._wipe.remove()

    def _on_theme(self) -> None:
        colours = Colours.of(get_theme(self._viewer.theme))
        self.picture.setBackground(make_colour(colours.background))
        for note in (self.status, self.structure):
            note.set_colours(colours.quiet, colours.error)

    # --- the layers -------------------------------------------------------------------------------

    def _on_layers(self) -> None:
        layers = [
            layer
            for layer in self._viewer.layers
            if isinstance(layer, Image) and layer.unique_id != self._wipe.layer_id
        ]
        for layer in self._watched:
            layer.events.name.disconnect(self._on_layers)
            layer.events.data.disconnect(self._on_drawn)
            layer.events.set_data.disconnect(self._on_drawn)
        self._watched = layers
        for layer in layers:
            layer.events.name.connect(self._on_layers)
            layer.events.data.connect(self._on_drawn)
            layer.events.set_data.connect(self._on_drawn)
        names = {layer.unique_id: str(layer.name) for layer in layers}
        results = {layer.unique_id: str(layer.name) for layer in layers if is_result(layer)}
        newest = next(reversed(results), None)
        _fill(self.result, results, newest)
        _fill(self.input, names, None)
        _fill(self.reference, {NO_REFERENCE: "None", **names}, NO_REFERENCE)
        if self.input.key() is None:
            self._choose_input()
        self._update_buttons()
        if not results:
            self.status.show_text("Denoise a slice or a stack first; then it can be checked here.")

    def _on_result(self) -> None:
        self._choose_input()
        self._forget()

    def _choose_input(self) -> None:
        """The layer that the chosen result was made from."""
        result = self._layer(self.result)
        if result is None:
            return
        source_id = mark_of(result).get("source_id")
        for layer in self._viewer.layers:
            if str(layer.unique_id) == source_id:
                self.input.set_key(layer.unique_id)

    def _layer(self, choice: Choice) -> Layer | None:
        return find_layer(self._viewer.layers, choice.key())

    def _forget(self) -> None:
        """The choice has changed: what was measured is of other layers."""
        self._checked = None
        self.side_button.setChecked(False)
        self.wipe_button.setChecked(False)
        self._show_checked()
        self._update_buttons()

    def _on_removed(self, event: Any) -> None:
        removed = event.value.unique_id
        if self._running is not None and removed in self._running.layer_ids:
            self._reason = f"Cancelled: the layer “{short_name(event.value.name)}” was removed."
            self._run.cancel()
        if removed == self._wipe.layer_id:
            self._wipe.forget()
            self.wipe_button.setChecked(False)
        if removed in (self.result.key(), self.input.key()):
            self.side_button.setChecked(False)
            self.wipe_button.setChecked(False)

    def _on_drawn(self, event: Any) -> None:
        """A layer has got other data, or its array may have been changed in place."""
        layer: Layer = event.source

        def is_other(request: CheckRequest) -> bool:
            return any(
                source.layer_id == layer.unique_id and has_other_content(layer, source)
                for source in request.layers
            )

        if self._running is not None and is_other(self._running):
            self._reason = f"Cancelled: the layer “{short_name(layer.name)}” got other data."
            self._run.cancel()
        if self._checked is not None and is_other(self._checked.request):
            self._forget()
            self.status.show_text(
                f"The layer “{short_name(layer.name)}” has changed. Check it again."
            )

    def _update_buttons(self) -> None:
        has_pair = self._layer(self.result) is not None and self._layer(self.input) is not None
        has_numbers = self._checked is not None
        self.check_button.setEnabled(has_pair and not self._run.is_busy)
        self.side_button.setEnabled(has_pair)
        for control in (self.wipe_button, self.residual_button):
            control.setEnabled(has_pair and has_numbers)
        self.wipe_slider.setEnabled(self.wipe_button.isChecked())
        self.export_button.setEnabled(has_pair and not self._export.is_busy)

    # --- measuring --------------------------------------------------------------------------------

    def check(self) -> None:
        """Measure the slice in view."""
        result, source = self._layer(self.result), self._layer(self.input)
        if result is None or source is None or self._run.is_busy:
            return
        reference = self._layer(self.reference)
        dims = self._viewer.dims
        try:
            before = read(source, dims)
            request = CheckRequest(
                source=before,
                result=read(result, dims),
                reference=None if reference is None else read(reference, dims),
                noise=_noise_of(mark_of(result), before),
                is_of_result=_is_made_from(mark_of(result), before),
            )
            request.check()
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        self._running = request
        self._run.submit(partial(_tasks.check_slice, request, self._load_jobs), "Checking a slice")

    def _on_run_started(self) -> None:
        self.status.show_text("Measuring …")
        self._update_buttons()

    def _on_run_succeeded(self, checked: Checked) -> None:
        self._checked = checked
        source, result = checked.request.source, checked.request.result
        text = source.describe()
        if not checked.request.is_of_result:
            text += (
                f"\n“{short_name(source.name)}” has changed since “{short_name(result.name)}” was "
                "made from it. Denoise it again."
            )
        self.status.show_text(text)
        self._show_checked()

    def _on_failed(self, error: Exception) -> None:
        message = explain(error)
        self.status.show_error(message)
        tell_error(message)

    def _on_run_cancelled(self) -> None:
        self.status.show_text(self._reason or "Cancelled.")

    def _on_run_finished(self) -> None:
        self._running = None
        self._reason = ""
        self._update_buttons()

    def _show_checked(self) -> None:
        checked = self._checked
        if checked is None:
            for cells in self.cells.values():
                for cell in cells:
                    cell.setText("–")
            self.structure.show_text("")
            self.picture.show_picture(None)
            return
        check, unit = checked.check, checked.request.source.intensity_unit
        for name, pair, of in (
            ("Noise (flat areas)", check.noise, unit),
            ("Mean", check.mean, unit),
            ("Lowest", check.lowest, unit),
            ("Highest", check.highest, unit),
            ("Q", check.q, unit),
            ("PSNR", check.psnr, "dB"),
            ("SSIM", check.ssim, ""),
        ):
            for cell, value in zip(self.cells[name], pair or (None, None), strict=True):
                cell.setText("–" if value is None else f"{value:.4g} {of}".rstrip())
        kept = "Range kept." if check.range_kept else "Values have left the input's range."
        found, white = check.largest_autocorrelation, check.white_noise
        drift = f"{check.mean_drift:.2g} {unit}".rstrip()
        lines = [
            _verdict(check),
            f"Largest autocorrelation {found:.3f}, of white noise {white:.3f}.",
            f"Removed {check.removed:.2f} of the noise's variance.",
            f"{kept} Mean drift {drift}.",
        ]
        self.structure.show_text("\n".join(lines))
        self.picture.show_picture(check.autocorrelation)

    # --- looking ----------------------------------------------------------------------------------

    def _on_side_by_side(self, is_on: bool) -> None:
        result, source = self._layer(self.result), self._layer(self.input)
        if is_on and result is not None and source is not None:
            self.wipe_button.setChecked(False)
            self._side_by_side.begin([source, result])
        else:
            self._side_by_side.end()
        self._update_buttons()

    def _on_wipe(self, is_on: bool) -> None:
        if is_on and self._checked is not None:
            self.side_button.setChecked(False)
            self._wipe.begin(self._checked)
            self._on_wipe_moved()
        else:
            self._wipe.end()
        self._update_buttons()

    def _on_wipe_moved(self) -> None:
        self._wipe.move_to(self.wipe_slider.value() / self.wipe_slider.maximum())

    def show_residual(self) -> None:
        """Show input minus result of the slice that was measured, as a layer."""
        checked = self._checked
        if checked is None:
            return
        source, check = checked.request.source, checked.check
        limit = RESIDUAL_LIMIT * check.noise[0]
        limit = limit if np.isfinite(limit) and limit > 0 else 1.0
        role = "residual (slice)" if source.other_axes else "residual"
        show_result(
            self._viewer.layers,
            source,
            role,
            source.as_slice_of_layer(check.residual),
            source.slice_placement(),
            {"colormap": RESIDUAL_COLORMAP, "contrast_limits": (-limit, limit)},
            {"slice": source.index},
        )

    # --- exporting --------------------------------------------------------------------------------

    def _ask_where_to(self) -> None:
        result = self._layer(self.result)
        if result is None:
            return
        path, _ = QFileDialog.getSaveFileName(
            self, "Export the result", f"{as_file_name(result.name)}.tif", "TIFF (*.tif *.tiff)"
        )
        if path:
            self.export(Path(path))

    def export(self, path: Path) -> None:
        """Write the result as TIFF and its record as JSON beside it; what is there is replaced."""
        result = self._layer(self.result)
        if result is None:
            return
        if path.suffix.lower() not in (".tif", ".tiff"):
            path = path.with_name(f"{path.name}.tif")
        record = {"layer": str(result.name), **mark_of(result)}
        if self._checked is not None:
            record["check"] = self._checked.to_dict()
        try:
            volume = as_volume(result)
        except LearnedDiffusionError as error:
            self._on_failed(error)
            return
        self._export.submit(
            partial(_tasks.export_result, path, volume, record),
            f"Exporting {short_name(result.name)}",
        )

    def _on_exported(self, paths: tuple[Path, Path]) -> None:
        self.status.show_text("Written: " + ", ".join(path.name for path in paths))


class AutocorrelationPicture(pg.GraphicsView):  # type: ignore[misc]
    """A small picture, grey where there is nothing to see."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFixedSize(PICTURE_SIZE, PICTURE_SIZE)
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Fixed)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents, False)
        box = pg.ViewBox(enableMenu=False, enableMouse=False, lockAspect=True, invertY=True)
        self.setCentralItem(box)
        self._image = pg.ImageItem(axisOrder="row-major")
        self._image.setColorMap(pg.colormap.get("CET-D1"))
        box.addItem(self._image)

    def sizeHint(self) -> QSize:
        return QSize(PICTURE_SIZE, PICTURE_SIZE)

    def show_picture(self, found: NDArray[np.float64] | None) -> None:
        """Draw an autocorrelation, its strongest value off the centre in full colour."""
        if found is None:
            self._image.clear()
            return
        centre = tuple(size // 2 for size in found.shape)
        away = found.copy()
        away[centre] = 0.0
        top = max(0.1, float(np.abs(away).max()))
        self._image.setImage(found, levels=(-top, top))


def _verdict(check: Check) -> str:
    if check.has_structure:
        return "The residual holds structure: look at it."
    if check.is_white:
        return "The residual looks like white noise."
    return "The residual is nearly white, as averaging neighbours leaves it."


def _is_made_from(mark: dict[str, Any], source: Source) -> bool:
    """Whether a layer is still what a result says that it was made from, as far as is known."""
    is_other_layer = mark.get("source_id") != str(source.layer_id)
    return is_other_layer or tuple(mark.get("content") or source.content) == source.content


def _noise_of(mark: dict[str, Any], source: Source) -> NoiseModel | None:
    """The noise model that a result was made with; ``None``: what it was found in has changed."""
    noise = mark.get("noise")
    if noise is None or not _is_made_from(mark, source):
        return None
    return noise_model_from_dict(noise)


def is_result(layer: Layer) -> bool:
    """Whether a layer is a denoised image of ours."""
    return str(mark_of(layer).get("role", "")).startswith("denoised")


def _fill(choice: Choice, names: dict[Hashable, str], otherwise: Hashable) -> None:
    """List layers anew; the choice stays where it can."""
    before = choice.key()
    choice.blockSignals(True)
    choice.clear()
    for key, name in names.items():
        choice.add(key, name)
    choice.setCurrentIndex(choice.findData(before if before in names else otherwise))
    choice.blockSignals(False)
