"""The Inspect widget: a slice in every iteration, as layers, and where the diffusion might stop."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Layer
from napari.utils.theme import get_theme
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import (
    QHBoxLayout,
    QLabel,
    QProgressBar,
    QPushButton,
    QSlider,
    QTabWidget,
    QVBoxLayout,
    QWidget,
)

from napari_learned_diffusion.config import MAX_ITERATIONS
from napari_learned_diffusion.core.errors import LearnedDiffusionError
from napari_learned_diffusion.core.zoo import card
from napari_learned_diffusion.widgets import _tasks
from napari_learned_diffusion.widgets._controls import (
    Choice,
    Colours,
    DiffusionForm,
    Note,
    NumberBox,
    make_rows,
)
from napari_learned_diffusion.widgets._dock import (
    DockedWidget,
    FormScroll,
    explain,
    find_docked,
    open_docked,
    shut_down,
)
from napari_learned_diffusion.widgets._form import Findings, FormValues, Request, make_request
from napari_learned_diffusion.widgets._iteration_plot import IterationPlot
from napari_learned_diffusion.widgets._layers import (
    Source,
    find_layer,
    find_result,
    mark_of,
    read,
)
from napari_learned_diffusion.widgets._learned_plot import (
    LearnedPlot,
    explain_learned,
    probe_learned,
)
from napari_learned_diffusion.widgets._results import DIFFUSIVITY_COLORMAP, OneByOne, show_result
from napari_learned_diffusion.widgets._runner import Runner
from napari_learned_diffusion.widgets._text import short_name, tell_error
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_learned_diffusion.jobs.inspection import Inspection
    from napari_learned_diffusion.jobs.progress import Progress
    from napari_learned_diffusion.widgets._tasks import Inspected

DENOISE_TITLE = "Denoise by diffusion"
"""Of the Denoise widget, in the manifest."""

WIDTH = 340
"""In pixels, at least."""

PROBE_DELAY = 40
"""Milliseconds between two looks at the pixel under the cursor."""

MAPS = {
    "flux": "Flux magnitude",
    "gradient": "Gradient magnitude",
    "diffusivity": "Diffusivity",
    "denoised": "Denoised image",
}
"""Fields of `Inspection` that become layers, from the lowest to the highest."""

COLORMAPS = {"flux": "viridis", "gradient": "magma", "diffusivity": DIFFUSIVITY_COLORMAP}

FIRST_SHOWN = "denoised"

ITERATIONS = "iterations"
"""First word of the roles of the layers."""


class InspectionWidget(DockedWidget):
    """Look into the diffusion of a slice.

    Parameters
    ----------
    napari_viewer
        The viewer whose layers are inspected.
    load_jobs
        Returns the module of the job; called in a worker, for importing it imports torch.
    """

    def __init__(
        self, napari_viewer: Viewer, load_jobs: Callable[[], Any] = _tasks.load_inspection
    ) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._load_jobs = load_jobs
        self._findings = Findings()
        self._watched: Sequence[Layer] = ()
        self._source: Source | None = None
        self._request: Request | None = None
        self._values: FormValues | None = None
        self._reason = ""
        self._answer: Inspected | None = None
        self._iteration = 0
        self._probed: tuple[int, int] | None = None

        self._run = Runner(self, in_activity_dock=True)
        self._shows = OneByOne(self)
        self._probe_timer = QTimer(self)
        self._probe_timer.setSingleShot(True)
        self._probe_timer.setInterval(PROBE_DELAY)

        self._make_controls()
        self._lay_out()
        self._connect()
        self._on_theme()
        self._on_layers()
        self._show_found()

    # --- the window -------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        self.layer = Choice({})
        self.layer.setToolTip("The image layer whose slice in view is inspected. It isn't changed.")
        self.layer_info = Note()
        self.settings = Choice({"denoise": "As in the Denoise form", "own": "Set here"})
        self.settings.setToolTip(
            "Whose model, noise and other settings hold.\nAs in the Denoise form: all automatic "
            "where that form isn't open.\nSet here: in the tab Settings."
        )
        self.count = NumberBox(1, MAX_ITERATIONS, is_whole=True, start=20)
        self.count.setToolTip(
            "How many diffusion steps are done and looked at.\nEmpty: twice as many as the model "
            "suggests, so that you see beyond the end, or as many as it was made for."
        )
        self.inspect_button = QPushButton("Inspect slice")
        self.inspect_button.setToolTip(
            "Diffuse the slice in view and show every iteration: the image, its gradient, the "
            "diffusivity and the flux."
        )
        self.progress_bar = QProgressBar()
        self.progress_bar.setTextVisible(False)
        self.progress_bar.setFixedHeight(10)
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.setToolTip("Stop at once. All layers stay as they are.")
        self.status = Note()

        self.shown = Choice({key: MAPS[key] for key in reversed(MAPS)})
        self.shown.setToolTip(
            "Which of the four maps is visible. Gradient and flux are lengths in layer units per "
            "pixel; the diffusivity has no unit."
        )
        self.plot = IterationPlot()
        self.plot.setToolTip(
            "Q: oriented structure, in layer units; the higher, the more structure and the less "
            "noise.\nRemoved: variance of what was taken away, where 1 (dashed) is as much as the "
            "noise has.\nPixel: value under the cursor, in layer units.\nDots: where to stop by "
            "either. Drag the line, or click, to go to an iteration."
        )
        self.scrubber = QSlider(Qt.Orientation.Horizontal)
        self.scrubber.setToolTip("The iteration on display; it moves with the viewer's slider.")
        self.scrubber_label = QLabel()
        self.numbers = Note()
        self.q_button = QPushButton()
        self.q_button.setToolTip(
            "Go to the iteration with the highest Q: most oriented structure, least noise."
        )
        self.discrepancy_button = QPushButton()
        self.discrepancy_button.setToolTip(
            "Go to the iteration in which as much has been taken away as there is noise "
            "(discrepancy principle)."
        )
        self.use_button = QPushButton("Use this iteration")
        self.use_button.setToolTip(
            "Set the Denoise form to stop after this iteration. It is opened if need be."
        )
        self.probe_info = Note()
        self.learned_plot = LearnedPlot()
        self.learned_info = Note()
        self.learned_probe = Note()
        self.count_info = Note()
        self.form = DiffusionForm(for_files=True)

    def _lay_out(self) -> None:
        rows = make_rows()
        rows.setContentsMargins(8, 6, 8, 0)
        rows.addRow("Layer", self.layer)
        rows.addRow(self.layer_info)
        rows.addRow("Settings", self.settings)
        rows.addRow("Iterations", self.count)
        rows.addRow(self.count_info)
        progress = QHBoxLayout()
        progress.addWidget(self.progress_bar, 1)
        progress.addWidget(self.cancel_button)
        head = QVBoxLayout()
        head.setContentsMargins(8, 4, 8, 4)
        head.setSpacing(6)
        head.addWidget(self.inspect_button)
        head.addLayout(progress)
        head.addWidget(self.status)

        self.tabs = QTabWidget()
        self.tabs.addTab(FormScroll(self._iterations_page(), WIDTH), "Iterations")
        self.tabs.addTab(FormScroll(self._learned_page(), WIDTH), "What it learned")
        self._settings_tab = self.tabs.addTab(FormScroll(self.form, WIDTH), "Settings")

        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        column.addLayout(rows)
        column.addLayout(head)
        column.addWidget(self.tabs, 1)

    def _iterations_page(self) -> QWidget:
        suggestions = QHBoxLayout()
        suggestions.addWidget(self.q_button, 1)
        suggestions.addWidget(self.discrepancy_button, 1)
        scrubber = QHBoxLayout()
        scrubber.addWidget(self.scrubber, 1)
        scrubber.addWidget(self.scrubber_label)
        shown = make_rows()
        shown.addRow("Show", self.shown)
        page = QWidget()
        column = QVBoxLayout(page)
        column.setContentsMargins(8, 6, 8, 6)
        column.setSpacing(6)
        column.addLayout(shown)
        column.addLayout(scrubber)
        column.addWidget(self.plot)
        column.addWidget(self.numbers)
        column.addLayout(suggestions)
        column.addWidget(self.use_button)
        column.addWidget(self.probe_info)
        column.addStretch()
        return page

    def _learned_page(self) -> QWidget:
        page = QWidget()
        column = QVBoxLayout(page)
        column.setContentsMargins(8, 6, 8, 6)
        column.setSpacing(6)
        column.addWidget(self.learned_plot)
        column.addWidget(self.learned_info)
        column.addWidget(self.learned_probe)
        column.addStretch()
        return page

    def _connect(self) -> None:
        self.layer.currentIndexChanged.connect(self._update_source)
        self.settings.currentIndexChanged.connect(self._on_settings)
        self.form.model.currentIndexChanged.connect(self._limit_count)
        self.count.refused.connect(self._on_count_refused)
        self.inspect_button.clicked.connect(self.inspect)
        self.cancel_button.clicked.connect(self.cancel)
        self.shown.currentIndexChanged.connect(self._on_shown)
        self.plot.moved.connect(self.go_to)
        self.scrubber.valueChanged.connect(self.go_to)
        self.q_button.clicked.connect(self._go_to_best_q)
        self.discrepancy_button.clicked.connect(self._go_to_discrepancy)
        self.use_button.clicked.connect(self.use_iteration)
        self._probe_timer.timeout.connect(self._probe)

        self._run.started.connect(self._on_run_started)
        self._run.progressed.connect(self._on_run_progressed)
        self._run.succeeded.connect(self._on_run_succeeded)
        self._run.failed.connect(self._on_run_failed)
        self._run.cancelled.connect(self._on_run_cancelled)
        self._run.finished.connect(self._on_run_finished)

        # napari keeps weak references to these methods, so a closed widget isn't kept alive.
        layers, dims = self._viewer.layers.events, self._viewer.dims.events
        layers.removed.connect(self._on_removed)
        for event in (layers.inserted, layers.removed, layers.reordered):
            event.connect(self._on_layers)
        for event in (dims.current_step, dims.order, dims.ndisplay):
            event.connect(self._on_view)
        self._viewer.cursor.events.position.connect(self._on_cursor)
        self._viewer.events.theme.connect(self._on_theme)
        self.destroyed.connect(partial(shut_down, (self._run,)))

    @property
    def is_working(self) -> bool:
        """Whether a run is on, or layers are still to be shown."""
        return not (self._run.is_idle and self._shows.is_idle)

    def leave(self) -> None:
        """Stop everything, because dock or window were closed."""
        self._probe_timer.stop()
        self._run.cancel()
        self._shows.clear()

    def _on_theme(self) -> None:
        colours = Colours.of(get_theme(self._viewer.theme))
        self.form.set_colours(colours)
        self.plot.set_colours(colours)
        self.learned_plot.set_colours(colours)
        for note in (
            self.layer_info,
            self.count_info,
            self.status,
            self.numbers,
            self.probe_info,
            self.learned_info,
            self.learned_probe,
        ):
            note.set_colours(colours.quiet, colours.error)

    # --- what is inspected ------------------------------------------------------------------------

    def _on_layers(self) -> None:
        layers = [
            layer
            for layer in self._viewer.layers
            if isinstance(layer, Image | Labels) and not _is_of_inspection(layer)
        ]
        self._watch(layers)
        names = {layer.unique_id: layer.name for layer in layers}
        active = self._viewer.layers.selection.active
        chosen: Hashable = active.unique_id if active is not None else None
        before = self.layer.key()
        if before in names:
            chosen = before
        elif chosen not in names:
            chosen = next(reversed(names), None)
        self.layer.blockSignals(True)
        self.layer.clear()
        for layer_id, name in names.items():
            self.layer.add(layer_id, name)
        self.layer.setCurrentIndex(self.layer.findData(chosen))
        self.layer.blockSignals(False)
        self._update_source()

    def _watch(self, layers: Sequence[Layer]) -> None:
        for layer in self._watched:
            layer.events.name.disconnect(self._on_layers)
            layer.events.data.disconnect(self._on_data)
            layer.events.set_data.disconnect(self._on_drawn)
        self._watched = layers
        for layer in layers:
            layer.events.name.connect(self._on_layers)
            layer.events.data.connect(self._on_data)
            layer.events.set_data.connect(self._on_drawn)

    def _on_removed(self, event: Any) -> None:
        if self._request is not None and event.value.unique_id == self._request.source.layer_id:
            self._cancel(f"Cancelled: the layer “{short_name(event.value.name)}” was removed.")

    def _on_data(self, event: Any) -> None:
        layer: Layer = event.source
        if layer.unique_id == self.layer.key():
            self._findings = Findings()
            self._update_source()
        if self._request is not None and layer.unique_id == self._request.source.layer_id:
            self._cancel(
                f"Cancelled: the layer “{short_name(layer.name)}” has new data. Inspect it again."
            )

    def _on_drawn(self, event: Any) -> None:
        """A layer is drawn anew, perhaps because its array has been changed in place."""
        asked = self._source, None if self._request is None else self._request.source
        if any(
            source is not None
            and source.layer_id == event.source.unique_id
            and source.has_changed()
            for source in asked
        ):
            self._on_data(event)

    def _on_view(self) -> None:
        self._update_source()
        self._follow_viewer()

    def _on_settings(self) -> None:
        if self.settings.key() == "own":
            self.tabs.setCurrentIndex(self._settings_tab)
        self._limit_count()
        self._update_source()

    def _update_source(self) -> None:
        layer = find_layer(self._viewer.layers, self.layer.key())
        self._source = None
        if layer is None:
            self.layer_info.show_text("Open an image first: File ▸ Open, or File ▸ Open Sample.")
        else:
            try:
                self._source = source = read(layer, self._viewer.dims)
            except LearnedDiffusionError as error:
                self.layer_info.show_error(str(error))
            else:
                if source.slice_problem:
                    self.layer_info.show_error(source.slice_problem)
                else:
                    self.layer_info.show_text(source.describe())
        self._update_buttons()

    def _limit_count(self) -> None:
        """No more iterations than the model can do."""
        self.count.set_maximum(self.form.model.most_iterations(self.values().model))

    def _on_count_refused(self, why: str) -> None:
        text = f"This model takes {why} iterations: it was trained for that many." if why else ""
        self.count_info.show_text(text)

    def _update_buttons(self) -> None:
        source = self._source
        is_ready = source is not None and not source.slice_problem
        self.inspect_button.setEnabled(is_ready and not self._run.is_busy)
        self.cancel_button.setEnabled(self._run.is_busy)
        self.form.setEnabled(self.settings.key() == "own")

    def values(self) -> FormValues:
        """The settings that hold: those of the Denoise form, those set here, or automatic ones."""
        if self.settings.key() == "own":
            return self.form.values()
        denoise = find_docked(self._viewer, DenoiseWidget)
        return FormValues() if denoise is None else denoise.form.values()

    # --- a run ------------------------------------------------------------------------------------

    def inspect(self) -> None:
        """Inspect the slice in view."""
        self._update_source()
        source = self._source
        if source is None or source.slice_problem or self._run.is_busy:
            return
        self._limit_count()  # the model of the Denoise form may have changed
        values = self.values()
        try:
            wanted = replace(values, iterations=self.count.whole_value())
            request = make_request(wanted, source, self._findings)
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        self._request, self._values = request, values
        self._run.submit(
            partial(_tasks.inspect_slice, request, self._load_jobs),
            f"Inspecting a slice of {short_name(source.name)}",
        )

    def cancel(self) -> None:
        """Stop the run; all layers stay as they are."""
        self._cancel("Cancelled. All layers are as they were before.")

    def _cancel(self, reason: str) -> None:
        self._reason = reason
        self._run.cancel()
        self.cancel_button.setEnabled(False)

    def _on_run_started(self) -> None:
        self.progress_bar.setRange(0, 0)
        self.status.show_text("Preparing …")
        self._update_buttons()

    def _on_run_progressed(self, progress: Progress, _: object) -> None:
        self.progress_bar.setRange(0, max(1, progress.total))
        self.progress_bar.setValue(progress.done)
        self.status.show_text(f"{progress.message} …")

    def _on_run_succeeded(self, answer: Inspected) -> None:
        found = answer.found
        self._findings.add(answer.request, answer.whole, found.prepared)
        self._answer = answer
        self._probed = None
        self.count.show_automatic(found.iterations)
        self._shows.clear()
        self._shows.add(self._show_found)
        for name in MAPS:
            self._shows.add(partial(self._show_map, answer, name))
        self._shows.add(self._on_all_shown)
        self._shows.begin()
        self.status.show_text(_describe(answer))

    def _on_run_failed(self, error: Exception) -> None:
        message = explain(error)
        self.status.show_error(message)
        tell_error(message)

    def _on_run_cancelled(self) -> None:
        self.status.show_text(self._reason or "Cancelled.")

    def _on_run_finished(self) -> None:
        self._request = None
        self._reason = ""
        self.progress_bar.reset()
        self.progress_bar.setRange(0, 1000)
        self._update_source()

    # --- layers -----------------------------------------------------------------------------------

    def _show_map(self, answer: Inspected, name: str) -> None:
        """A layer for a map, with an axis of iterations before those of the source."""
        source, found, limits = answer.request.source, answer.found, answer.limits[name]
        maps = getattr(found, name)
        first = (len(found.denoised) - len(maps)) * found.stride
        look: dict[str, Any] = dict(source.display)
        look |= {"contrast_limits": limits, "visible": name == self.shown.key()}
        if name in COLORMAPS:
            look |= {"colormap": COLORMAPS[name], "gamma": 1.0}
        camera, ndim = self._viewer.scene.camera, self._viewer.dims.ndim
        view = {"center": camera.center, "zoom": camera.zoom}
        layer = show_result(
            self._viewer.layers,
            source,
            f"{ITERATIONS} {name}",
            source.as_iterations_of_layer(maps),
            source.iterations_placement(first, found.stride),
            look,
            {"model": found.prepared.config.model, "slice": source.index},
            is_selected=False,
        )
        if self._viewer.dims.ndim != ndim:
            camera.update(view)  # napari shows all of the image whenever there is a new axis
        if name in COLORMAPS:
            # Those of another model or slice would show nothing.
            layer.contrast_limits = limits

    def _on_all_shown(self) -> None:
        self._on_shown()
        self.go_to(self._iteration)

    def _layer_of(self, name: str) -> Image | None:
        """The layer of a map of the last inspection, if it is still there."""
        if self._answer is None:
            return None
        source = self._answer.request.source
        return find_result(self._viewer.layers, source, f"{ITERATIONS} {name}")

    def _on_shown(self) -> None:
        for name in MAPS:
            layer = self._layer_of(name)
            if layer is not None and layer.visible != (name == self.shown.key()):
                layer.visible = not layer.visible  # napari draws anew at each assignment

    # --- the iteration on display -----------------------------------------------------------------

    def _show_found(self) -> None:
        """Curves and suggestions of the last inspection."""
        answer = self._answer
        for control in (self.shown, self.scrubber, self.use_button):
            control.setEnabled(answer is not None)
        found = None if answer is None else answer.found
        by_q = None if found is None else found.best_by_q
        by_discrepancy = None if found is None else found.best_by_discrepancy
        self.q_button.setText("Highest Q" if by_q is None else f"Highest Q: {by_q}")
        self.discrepancy_button.setText(
            "As noise" if by_discrepancy is None else f"As noise: {by_discrepancy}"
        )
        self.q_button.setEnabled(by_q is not None)
        self.discrepancy_button.setEnabled(by_discrepancy is not None)
        self.learned_plot.show_learned(None if found is None else found.learned)
        if found is None:
            self.learned_info.show_text("Inspect a slice to see what its model has learned.")
            self.plot.clear()
            self.numbers.show_text("Inspect a slice to see it in every iteration.")
            self.scrubber_label.setText("–")
            return
        self.scrubber.blockSignals(True)
        self.scrubber.setRange(0, found.iterations)
        self.scrubber.blockSignals(False)
        self.plot.show_curves(found.q, found.residual_variance, by_q, by_discrepancy)
        suggested = (by_discrepancy, by_q, found.iterations)
        self._set_iteration(next(k for k in suggested if k is not None))

    def go_to(self, iteration: int) -> None:
        """Show an iteration, in the viewer too."""
        answer = self._answer
        if answer is None:
            return
        self._set_iteration(iteration)
        axis = self._iteration_axis()
        if axis is not None:
            self._viewer.dims.set_point(axis, iteration)

    def _iteration_axis(self) -> int | None:
        """The viewer's axis of iterations; ``None`` where no layer has it any more."""
        layers = (self._layer_of(name) for name in MAPS)
        layer = next((layer for layer in layers if layer is not None), None)
        return None if layer is None else int(self._viewer.dims.ndim - layer.ndim)

    def _follow_viewer(self) -> None:
        axis = self._iteration_axis()
        # While layers still come, the viewer's new axis stands at 0.
        if axis is not None and self._answer is not None and self._shows.is_idle:
            at = round(self._viewer.dims.point[axis])
            iteration = min(max(at, 0), self._answer.found.iterations)
            if iteration != self._iteration:
                self._set_iteration(iteration)

    def _set_iteration(self, iteration: int) -> None:
        """Move line and scrubber, and say what there is to say of the iteration."""
        answer = self._answer
        if answer is None:
            return
        found = answer.found
        self._iteration = iteration
        self.plot.set_iteration(iteration)
        self.scrubber.blockSignals(True)
        self.scrubber.setValue(iteration)
        self.scrubber.blockSignals(False)
        self.scrubber_label.setText(f"{iteration} / {found.iterations}")
        unit = answer.request.source.intensity_unit
        lines = [
            f"Time {found.times[iteration]:.3g} px² · Q {found.q[iteration]:.4g} {unit}".rstrip(),
            f"Removed {found.residual_variance[iteration]:.2f} of the noise's variance",
        ]
        if found.best_by_discrepancy is None:
            lines.append("In no iteration as much is removed as there is noise.")
        if found.stride > 1:
            lines.append(f"To save memory only every {found.stride}th iteration has maps.")
        self.numbers.show_text("\n".join(lines))
        self.learned_plot.set_step(self._step(found))
        self.learned_info.show_text(explain_learned(found.learned, self._step(found)))
        self._show_probe()

    def _step(self, found: Inspection) -> int:
        """The step among those kept that led to the iteration on display, or the first."""
        return max(0, self._iteration // found.stride - 1)

    def _go_to_best_q(self) -> None:
        if self._answer is not None and self._answer.found.best_by_q is not None:
            self.go_to(self._answer.found.best_by_q)

    def _go_to_discrepancy(self) -> None:
        if self._answer is not None and self._answer.found.best_by_discrepancy is not None:
            self.go_to(self._answer.found.best_by_discrepancy)

    def use_iteration(self) -> None:
        """Hand the iteration on display back to the Denoise widget, which is opened if need be."""
        answer, values = self._answer, self._values
        if answer is None or values is None:
            return
        found = answer.found
        if found.prepared.config.scheme == "fed":
            # Its iterations share out a stopping time, so that is what has to change.
            time = float(found.times[self._iteration])
            values = replace(values, stopping_time=time, iterations=None)
        else:
            values = replace(values, iterations=self._iteration)
        denoise = open_docked(self._viewer, DenoiseWidget, DENOISE_TITLE)
        denoise.adopt(values, answer.request.source.layer_id)
        self.status.show_text(f"The Denoise form stops after iteration {self._iteration} now.")

    # --- the pixel under the cursor ---------------------------------------------------------------

    def _on_cursor(self) -> None:
        if self._answer is not None and not self._probe_timer.isActive():
            self._probe_timer.start()

    def _probe(self) -> None:
        """Find the pixel under the cursor."""
        answer = self._answer
        layer = self._layer_of("denoised")
        if answer is None or layer is None:
            return
        source = answer.request.source
        at = np.rint(layer.world_to_data(self._viewer.cursor.position)).astype(int)
        row, column = (int(at[axis + 1]) for axis in source.plane_axes)
        height, width = source.plane_shape
        is_inside = 0 <= row < height and 0 <= column < width
        pixel = (row, column) if is_inside else None
        if pixel != self._probed:
            self._probed = pixel
            self._show_probe()

    def _show_probe(self) -> None:
        """The value of the pixel through the iterations, and what its edges conduct."""
        answer, pixel = self._answer, self._probed
        if answer is None or pixel is None:
            self.plot.show_pixel(np.array([]), np.array([]))
            self.learned_plot.show_points()
            for note in (self.probe_info, self.learned_probe):
                note.show_text("")
            return
        found, unit = answer.found, answer.request.source.intensity_unit
        values = found.denoised[:, pixel[0], pixel[1]]
        self.plot.show_pixel(found.stride * np.arange(len(values)), values)
        at = self._iteration // found.stride
        value = f"{values[at]:.5g} {unit}".rstrip()
        lines = [f"Pixel {pixel[0]}, {pixel[1]}: {values[0]:.5g} → {value}"]
        if at > 0:
            lines.append(f"Conductances {_conductances(found, at - 1, pixel)}")
        self.probe_info.show_text("\n".join(lines))
        x, y, text = probe_learned(found, self._step(found), pixel)
        self.learned_plot.show_points(x, y)
        self.learned_probe.show_text(f"Pixel {pixel[0]}, {pixel[1]}: {text}")


ARROWS = {
    (0, 1): "→",
    (0, -1): "←",
    (1, 0): "↓",
    (-1, 0): "↑",
    (1, 1): "↘",
    (1, -1): "↙",
    (-1, 1): "↗",
    (-1, -1): "↖",
}


def _conductances(found: Inspection, step: int, pixel: tuple[int, int]) -> str:
    """What each edge of a pixel conducted in a step, with an arrow for its direction."""
    parts = []
    for (dy, dx), conductance in found.edges[step].around(pixel).items():
        length = max(abs(dy), abs(dx))
        parts.append(f"{ARROWS[(dy // length, dx // length)]} {conductance:.2f}")
    return "  ".join(parts)


def _describe(answer: Inspected) -> str:
    """One line: model and noise."""
    config = answer.found.prepared.config
    noise = answer.found.prepared.noise.describe(answer.request.source.intensity_unit)
    return f"{card(config.model).title} · {noise}"


def _is_of_inspection(layer: Layer) -> bool:
    return str(mark_of(layer).get("role", "")).startswith(ITERATIONS)
