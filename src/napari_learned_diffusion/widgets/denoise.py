"""The Denoise widget: a form, a live preview, and runs over a slice or a stack."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from napari.layers import Image, Labels, Layer
from napari.utils.theme import get_theme
from numpy.typing import NDArray
from qtpy.QtCore import QTimer
from qtpy.QtGui import QShowEvent
from qtpy.QtWidgets import (
    QApplication,
    QCheckBox,
    QHBoxLayout,
    QLabel,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
)

from napari_learned_diffusion.config import MapsConfig
from napari_learned_diffusion.core.errors import LearnedDiffusionError
from napari_learned_diffusion.recipe import as_python, as_shell
from napari_learned_diffusion.widgets import _tasks
from napari_learned_diffusion.widgets._controls import Choice, Colours, DiffusionForm, Note
from napari_learned_diffusion.widgets._dock import (
    DockedWidget,
    FormScroll,
    explain,
    set_shortcut,
    shut_down,
)
from napari_learned_diffusion.widgets._form import Findings, Request, config_for, make_request
from napari_learned_diffusion.widgets._layers import (
    MARK,
    Placement,
    Source,
    find_layer,
    find_result,
    mark_of,
    read,
    remove_layer,
)
from napari_learned_diffusion.widgets._lazy import LazyResult
from napari_learned_diffusion.widgets._preferences import Preferences, Session, opening
from napari_learned_diffusion.widgets._results import (
    DIFFUSIVITY_COLORMAP,
    RESIDUAL_COLORMAP,
    RESIDUAL_LIMIT,
    OneByOne,
    position,
    selection_kept,
    show_result,
)
from napari_learned_diffusion.widgets._runner import Runner
from napari_learned_diffusion.widgets._text import short_name, tell_error

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_learned_diffusion.jobs.prepare import Prepared
    from napari_learned_diffusion.jobs.progress import Progress
    from napari_learned_diffusion.widgets._form import FormValues
    from napari_learned_diffusion.widgets._lazy_stack import Index
    from napari_learned_diffusion.widgets._tasks import Answer, Estimate

PREVIEW_DELAY = 120
"""Milliseconds without a change after which preview and result as you scroll are computed anew."""

STACK_WAYS = {"now": "now", "scroll": "as you scroll"}

SHORTCUTS = {
    "live_preview": "Ctrl+Shift+L",
    "slice_button": "Ctrl+Shift+D",
    "stack_button": "Ctrl+Shift+K",
}
"""Keys that napari leaves free, by the control that they press."""

FORM_WIDTH = 340
"""Of the form and its scroll bar, in pixels, at least: what its widest row takes."""

ORIENTATION_COLORMAP = "hsv"
ORIENTATION_LIMITS = (0.0, 180.0)
"""In degrees."""

PACKAGES = ("napari-learned-diffusion", "napari", "numpy", "torch")
"""Packages whose versions a result notes down."""


class DenoiseWidget(DockedWidget):
    """Denoise an image layer by diffusion.

    Parameters
    ----------
    napari_viewer
        The viewer whose layers are denoised.
    load_jobs
        Returns the module of the jobs; called in a worker, for importing it imports torch.
    """

    remembered: ClassVar[Session | None] = None
    """What the form held when it was closed last in this session."""

    def __init__(
        self, napari_viewer: Viewer, load_jobs: Callable[[], Any] = _tasks.load_jobs
    ) -> None:
        super().__init__()
        self._has_left = False
        self._viewer = napari_viewer
        self._load_jobs = load_jobs
        self._findings = Findings()
        self._watched: Sequence[Layer] = ()
        self._source: Source | None = None
        self._preview_id: Hashable = None
        self._previewed: Any = None

        # Of the run that is on: what was asked, and what has to be undone if it doesn't end well.
        self._request: Request | None = None
        self._out: NDArray[Any] | None = None
        self._replaced: Any = None
        self._reason = ""

        self._shows = OneByOne(self)

        # Results that are denoised as the user scrolls, by the layer that they are made from.
        self._lazy: dict[Hashable, LazyResult] = {}

        self._run = Runner(self, in_activity_dock=True)
        self._preview = Runner(self)
        self._estimation = Runner(self)
        self._runners = (self._run, self._preview, self._estimation)
        self._preview_timer = QTimer(self)
        self._preview_timer.setSingleShot(True)
        self._preview_timer.setInterval(PREVIEW_DELAY)
        self._lazy_timer = QTimer(self)
        self._lazy_timer.setSingleShot(True)
        self._lazy_timer.setInterval(PREVIEW_DELAY)

        self._make_controls()
        self._lay_out()
        self._connect()
        self._on_theme()
        self._on_layers()
        self._open()

    def adopt(self, values: FormValues, layer_id: Any) -> None:
        """Take over settings, and the layer that they were found on if it is still there."""
        self.form.layer.set_key(layer_id)
        self.form.set_values(values)
        self._on_form()

    # --- the window -------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        self.form = DiffusionForm()
        self.live_preview = QCheckBox("Live preview of the slice in view")
        self.live_preview.setToolTip(
            "Denoise the slice in view whenever the slider or a setting changes, into a layer of "
            "its own that goes away with the preview."
        )
        self.slice_button = QPushButton("Denoise slice")
        self.slice_button.setToolTip("Denoise the slice in view.")
        self.stack_button = QPushButton("Denoise stack")
        self.stack_button.setToolTip("Denoise every slice of the layer, now or as you scroll.")
        self.stack_way = Choice(STACK_WAYS)
        self.stack_way.setToolTip(
            "Now: denoise every slice, one after the other.\nAs you scroll: denoise the slice in "
            "view, and in the background those that come next. Changing a setting begins anew."
        )
        self.progress_bar = QProgressBar()
        # A thin track; a tall empty box looks like something to type into.
        self.progress_bar.setTextVisible(False)
        self.progress_bar.setFixedHeight(10)
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.setToolTip(
            "Stop at once. All layers stay as they were before the run. With nothing running, end "
            "the results as you scroll; those that lack slices go away."
        )
        self.status = Note()
        self.lazy_info = Note()
        self.python_button = QPushButton("Python")
        self.python_button.setToolTip("Copy the settings as a Python call.")
        self.shell_button = QPushButton("Shell")
        self.shell_button.setToolTip("Copy the settings as a shell command.")
        self.progress_bar.setToolTip("How much of the run is done.")
        for name, keys in SHORTCUTS.items():
            set_shortcut(getattr(self, name), keys)

    def _lay_out(self) -> None:
        self._scroll = FormScroll(self.form, FORM_WIDTH)

        runs = QHBoxLayout()
        runs.addWidget(self.slice_button, 1)
        runs.addWidget(self.stack_button, 1)
        runs.addWidget(self.stack_way, 1)
        progress = QHBoxLayout()
        progress.addWidget(self.progress_bar, 1)
        progress.addWidget(self.cancel_button)
        copy = QHBoxLayout()
        copy.addWidget(QLabel("Copy settings as"))
        copy.addWidget(self.python_button, 1)
        copy.addWidget(self.shell_button, 1)

        # Outside of the scroll area, so that the buttons are in sight however short the dock is.
        foot = QVBoxLayout()
        foot.setContentsMargins(8, 4, 8, 8)
        foot.setSpacing(6)
        foot.addWidget(self.live_preview)
        foot.addLayout(runs)
        foot.addLayout(progress)
        foot.addWidget(self.lazy_info)
        foot.addWidget(self.status)
        foot.addLayout(copy)

        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        column.addWidget(self._scroll, 1)
        column.addLayout(foot)

    def _connect(self) -> None:
        self.form.changed.connect(self._on_form)
        self.form.estimate_clicked.connect(self.estimate)
        self.form.advanced_button.toggled.connect(self._on_advanced)
        self.live_preview.toggled.connect(self._on_live_preview)
        self.slice_button.clicked.connect(self.denoise_slice)
        self.stack_button.clicked.connect(self._on_stack_button)
        self.cancel_button.clicked.connect(self.cancel)
        self.python_button.clicked.connect(self.copy_as_python)
        self.shell_button.clicked.connect(self.copy_as_shell)
        self._preview_timer.timeout.connect(self._start_preview)
        self._lazy_timer.timeout.connect(self._renew_lazy)

        self._run.started.connect(self._on_run_started)
        self._run.progressed.connect(self._on_run_progressed)
        self._run.succeeded.connect(self._on_run_succeeded)
        self._run.failed.connect(self._on_run_failed)
        self._run.cancelled.connect(self._on_run_cancelled)
        self._run.finished.connect(self._on_run_finished)
        self._preview.succeeded.connect(self._on_preview_succeeded)
        self._preview.failed.connect(self._on_preview_failed)
        self._estimation.started.connect(self._update_buttons)
        self._estimation.succeeded.connect(self._on_estimated)
        self._estimation.failed.connect(self._on_estimation_failed)
        self._estimation.cancelled.connect(self._on_estimation_cancelled)
        self._estimation.finished.connect(self._update_buttons)

        # napari keeps weak references to these methods, so a closed widget isn't kept alive.
        layers, dims = self._viewer.layers.events, self._viewer.dims.events
        layers.removed.connect(self._on_removed)
        for event in (layers.inserted, layers.removed, layers.reordered):
            event.connect(self._on_layers)
        for event in (dims.current_step, dims.order, dims.ndisplay):
            event.connect(self._on_view)
        self._viewer.events.theme.connect(self._on_theme)
        self.destroyed.connect(partial(shut_down, self._runners))

    def _on_advanced(self, is_open: bool) -> None:
        if is_open:
            # Once the section has its height, for it opens below what is in sight.
            QTimer.singleShot(0, self._scroll_to_advanced)

    def _scroll_to_advanced(self) -> None:
        self._scroll.ensureWidgetVisible(self.form.advanced)

    @property
    def is_working(self) -> bool:
        """Whether anything is computed, or about to be."""
        timers = self._preview_timer, self._lazy_timer
        workers: list[Runner | LazyResult | OneByOne] = [
            *self._runners,
            *self._lazy.values(),
            self._shows,
        ]
        return any(t.isActive() for t in timers) or not all(w.is_idle for w in workers)

    def _open(self) -> None:
        """Fill the form with what it held when it was closed, or with the preferences."""
        begin = opening(DenoiseWidget.remembered)
        self.form.set_values(begin.values)
        self.form.advanced_button.setChecked(begin.advanced)
        self.stack_way.set_key(begin.stack_way)
        self.live_preview.setChecked(begin.live_preview)
        self._on_form()

    def _remember(self) -> None:
        DenoiseWidget.remembered = Session(
            Preferences.read(),
            self.form.values(),
            self.live_preview.isChecked(),
            self.stack_way.key(),
            self.form.advanced_button.isChecked(),
        )

    def showEvent(self, event: QShowEvent | None) -> None:
        super().showEvent(event)
        self._has_left = False

    def leave(self) -> None:
        """Stop everything and leave no preview behind, because dock or window were closed."""
        if not self._has_left:
            self._has_left = True
            self._remember()
        self.live_preview.setChecked(False)
        for runner in self._runners:
            runner.cancel()
        self._end_all_lazy()
        self._shows.clear()

    def _on_theme(self) -> None:
        colours = Colours.of(get_theme(self._viewer.theme))
        self.form.set_colours(colours)
        for note in (self.status, self.lazy_info):
            note.set_colours(colours.quiet, colours.error)

    # --- the chosen layer -------------------------------------------------------------------------

    def _on_layers(self) -> None:
        """List the layers anew; at first, the active one is chosen."""
        layers = [
            layer
            for layer in self._viewer.layers
            if isinstance(layer, Image | Labels) and layer.unique_id != self._preview_id
        ]
        self._watch(layers)
        ids = [layer.unique_id for layer in layers]
        active = self._viewer.layers.selection.active
        if active is not None and active.unique_id in ids:
            chosen: Hashable = active.unique_id
        else:
            chosen = ids[-1] if ids else None
        self.form.set_layers(dict(zip(ids, (layer.name for layer in layers), strict=True)), chosen)
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
        removed: Layer = event.value
        if removed.unique_id == self._preview_id:
            self._preview_id = None
            self.live_preview.setChecked(False)
        for lazy in list(self._lazy.values()):
            if removed.unique_id == lazy.source_id or removed.data is lazy.stack:
                self._end_lazy(lazy)
        if self._request is None:
            return
        if removed.unique_id == self._request.source.layer_id or (
            self._out is not None and removed.data is self._out
        ):
            self._cancel(f"Cancelled: the layer “{short_name(removed.name)}” was removed.")

    def _on_data(self, event: Any) -> None:
        layer_id = event.source.unique_id
        lazy = self._lazy.get(layer_id)
        if self._request is not None and self._request.source.layer_id == layer_id:
            # The result would lie beside another image, and what was found out isn't true of it.
            self._cancel(f"Cancelled: the layer “{short_name(event.source.name)}” got other data.")
        if layer_id == self.form.layer.key():
            self._estimation.cancel()
            self._findings = Findings()
            self._on_view()
        if lazy is not None:
            self._begin_again(lazy)

    def _on_drawn(self, event: Any) -> None:
        """A layer is drawn anew, perhaps because its array has been changed in place."""
        layer_id = event.source.unique_id
        lazy, run = self._lazy.get(layer_id), self._request
        read_before = [
            self._source,
            run.source if run is not None else None,
            lazy.request.source if lazy is not None else None,
        ]
        of_layer = {
            (id(source.data), source.content): source
            for source in read_before
            if source is not None and source.layer_id == layer_id
        }
        if any(source.has_changed() for source in of_layer.values()):
            self._on_data(event)
            return
        if self._source is not None and self._source.layer_id == layer_id:
            source = self._read(layer_id)
            if source is not None and _slice_key(source) != self._previewed:
                self._ask_for_preview()
        if lazy is not None:
            lazy.look_at(lazy.stack.in_view)

    def _on_view(self) -> None:
        self._update_source()
        self._ask_for_preview()
        self._look_at_lazy()

    def _on_form(self) -> None:
        if self.status.is_error:
            self.status.show_text("")  # what went wrong may have been mended just now
        self._update_source()
        self._ask_for_preview()
        if self._lazy:
            self._lazy_timer.start()

    def _update_source(self) -> None:
        """Look at the chosen layer; say what it is, or why it can't be denoised."""
        layer = find_layer(self._viewer.layers, self.form.layer.key())
        self._source = None
        if layer is None:
            self.form.show_layer("Open an image first: File ▸ Open, or File ▸ Open Sample.", "")
        else:
            try:
                source = read(layer, self._viewer.dims)
            except LearnedDiffusionError as error:
                self.form.show_layer(str(error), "", is_problem=True)
            else:
                self._source = source
                text = "\n".join(filter(None, (source.describe(), source.slice_problem)))
                self.form.show_layer(
                    text, source.intensity_unit, is_problem=bool(source.slice_problem)
                )
        self._show_findings()
        self._update_buttons()

    def _show_findings(self) -> None:
        """Say what *automatic* means, as far as that is known for the settings in the form."""
        estimate = used = None
        scope = ""
        if self._source is not None:
            with suppress(LearnedDiffusionError):
                config = config_for(self.form.values(), self._source)
                estimate = self._findings.estimate(self._source, config)
                used = self._findings.used(self._source, config)
                scope = self._findings.scope(self._source, config)
        self.form.show_findings(estimate, used, scope)

    def _update_buttons(self) -> None:
        source = self._source
        is_ready = source is not None and not self._run.is_busy and self.form.values().outputs.any
        self.slice_button.setEnabled(is_ready and source is not None and not source.slice_problem)
        self.stack_button.setEnabled(is_ready and source is not None and bool(source.other_axes))
        self.form.estimate_button.setEnabled(source is not None and not self._estimation.is_busy)
        self.cancel_button.setEnabled(self._run.is_busy or bool(self._lazy))
        self.python_button.setEnabled(source is not None)
        self.shell_button.setEnabled(source is not None)

    def _make_request(self) -> Request | None:
        """Freeze form and layer; ``None``, with the reason in the status line, if that fails."""
        self._update_source()
        if self._source is None:
            return None
        try:
            return make_request(self.form.values(), self._source, self._findings)
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return None

    def _on_stack_button(self) -> None:
        if self.stack_way.key() == "now":
            self.denoise_stack()
        else:
            self.denoise_as_you_scroll()

    # --- a run ------------------------------------------------------------------------------------

    def denoise_slice(self) -> None:
        """Denoise the slice in view into a layer that lies on this slice."""
        request = self._make_request()
        if request is None or self._run.is_busy:
            return
        if request.source.slice_problem:
            self.status.show_error(request.source.slice_problem)
            return
        self._request = request
        self._run.submit(
            partial(_tasks.denoise_slice, request, self._load_jobs),
            f"Denoising a slice of {short_name(request.source.name)}",
        )

    def denoise_stack(self) -> None:
        """Denoise all slices into a layer that fills up while it runs."""
        request = self._make_request()
        if request is None or self._run.is_busy:
            return
        source = request.source
        try:
            out = np.zeros(source.data.shape, source.data.dtype)
        except MemoryError:
            self._fail(
                f"There is too little memory for the result of “{short_name(source.name)}”. "
                "Denoise the file from the shell instead, which writes slice by slice: Copy "
                "settings as Shell."
            )
            return
        self._request, self._out = request, out
        if request.outputs.denoised:
            self._show_unfinished(source, out)
        self._run.submit(
            partial(_tasks.denoise_stack, request, out, self._load_jobs),
            f"Denoising {short_name(source.name)}",
        )

    def cancel(self) -> None:
        """Stop the run; all layers become what they were before. Else end what is lazy."""
        if self._run.is_busy:
            self._cancel("Cancelled. All layers are as they were before.")
        else:
            self._end_all_lazy()

    def _cancel(self, reason: str) -> None:
        self._reason = reason
        self._run.cancel()
        self.cancel_button.setEnabled(False)

    def _on_run_started(self) -> None:
        self._preview_timer.stop()
        self._preview.cancel()
        for lazy in self._lazy.values():
            lazy.hold(True)
        self.progress_bar.setRange(0, 0)
        self.status.show_text("Preparing …")
        self._update_buttons()

    def _on_run_progressed(self, progress: Progress, planes: list[tuple[int, ...]]) -> None:
        # A bar of Qt counts in 32 bits; a big stack has more steps than that.
        self.progress_bar.setRange(0, 1000)
        self.progress_bar.setValue(1000 * progress.done // max(1, progress.total))
        share = progress.done / max(1, progress.total)
        self.status.show_text(f"{progress.message} … {share:.0%}")
        request = self._request
        if not planes or self._out is None or request is None:
            return
        layer = find_result(self._viewer.layers, request.source, "denoised")
        if layer is not None:
            layer.refresh(highlight=False, extent=False)

    def _on_run_succeeded(self, answer: Answer) -> None:
        self._findings.add(answer.request, answer.whole, answer.used)
        self._show_answer(answer)
        lazy = self._lazy.get(answer.request.source.layer_id)
        if lazy is not None and self._replaced is lazy.stack:
            self._end_lazy(lazy)  # its layer shows the whole result now
        self._out = self._replaced = None
        report = answer.report
        source = answer.request.source
        lines = [report.summary(source.intensity_unit), *report.messages]
        self.status.show_text("\n".join(lines))

    def _on_run_failed(self, error: Exception) -> None:
        self._roll_back()
        self._fail(explain(error))

    def _on_run_cancelled(self) -> None:
        self._roll_back()
        self.status.show_text(self._reason or "Cancelled.")

    def _on_run_finished(self) -> None:
        self._request = self._out = self._replaced = None
        self._reason = ""
        self.progress_bar.reset()
        self.progress_bar.setRange(0, 1000)
        self._update_source()
        self._ask_for_preview()
        for lazy in list(self._lazy.values()):
            lazy.hold(False)
            if lazy.is_stale:
                self._begin_again(lazy)
        self._look_at_lazy()

    def _fail(self, message: str) -> None:
        self.status.show_error(message)
        tell_error(message)

    # --- the layers that a run makes --------------------------------------------------------------

    def _show_unfinished(self, source: Source, out: NDArray[Any]) -> None:
        """Put the array that is being filled on display."""
        layer = find_result(self._viewer.layers, source, "denoised")
        if layer is not None and layer.ndim == out.ndim:
            # Everything else follows when the run has ended well.
            self._replaced = layer.data
            layer.data = out
        else:
            self._show(source, "denoised", out, source.placement, source.display, {})

    def _roll_back(self) -> None:
        """Undo `_show_unfinished`."""
        request, out, replaced = self._request, self._out, self._replaced
        self._out = self._replaced = None
        if request is None or out is None:
            return
        layer = find_result(self._viewer.layers, request.source, "denoised")
        if layer is None or layer.data is not out:
            return
        if replaced is None:
            self._remove(layer, request.source)
        else:
            layer.data = replaced

    def _remove(self, layer: Layer, source: Source) -> None:
        """Take a layer away; if it was the selected one, its source is that now."""
        layers = self._viewer.layers
        remove_layer(layers, layer)
        if layers.selection.active is None:
            layers.selection.active = find_layer(layers, source.layer_id)

    def _show_answer(self, answer: Answer) -> None:
        request = answer.request
        source = request.source
        is_whole = self._out is not None
        place = source.placement if is_whole else source.slice_placement()
        details = _details(answer, None if is_whole else source.index)

        def show(name: str, array: Any, look: dict[str, Any], is_selected: bool) -> None:
            role, data = name, array
            if not is_whole and source.other_axes:
                role, data = f"{name} (slice)", source.as_slice_of_layer(array)
            self._shows.add(
                partial(
                    self._show, source, role, data, place, look, details, is_selected=is_selected
                )
            )

        is_alone = not request.outputs.denoised
        if answer.diffusivity is not None:
            limits = 0.0, answer.largest_diffusivity
            look = {"colormap": DIFFUSIVITY_COLORMAP, "contrast_limits": limits}
            show("diffusivity", answer.diffusivity, look, is_alone)
        if answer.orientation is not None:
            look = {"colormap": ORIENTATION_COLORMAP, "contrast_limits": ORIENTATION_LIMITS}
            show("orientation", answer.orientation, look, is_alone)
        if answer.residual is not None:
            limit = RESIDUAL_LIMIT * answer.report.noise_sigma
            limit = limit if np.isfinite(limit) and limit > 0 else 1.0
            look = {"colormap": RESIDUAL_COLORMAP, "contrast_limits": (-limit, limit)}
            show("residual", answer.residual, look, is_alone)
        if request.outputs.denoised:
            show("denoised", answer.denoised, source.display, True)
        self._shows.begin()

    def _show(
        self,
        source: Source,
        role: str,
        data: Any,
        place: Placement,
        look: dict[str, Any],
        details: dict[str, Any],
        *,
        is_selected: bool = True,
    ) -> None:
        """Update the layer that an earlier run has made, or add one."""
        show_result(
            self._viewer.layers, source, role, data, place, look, details, is_selected=is_selected
        )

    # --- as you scroll ----------------------------------------------------------------------------

    def denoise_as_you_scroll(self) -> None:
        """Show a result whose slices are denoised when they come into view."""
        request = self._make_request()
        if request is None or self._run.is_busy:
            return
        source = request.source
        lazy = self._lazy.get(source.layer_id)
        if lazy is not None:
            self._begin_again(lazy)
            return
        lazy = LazyResult(request, Preferences.read().cache, self._load_jobs, self)
        before = find_result(self._viewer.layers, source, "denoised")
        if before is not None and before.ndim == lazy.stack.ndim:
            lazy.replaced = before.data, before.metadata
        self._lazy[source.layer_id] = lazy
        lazy.filled.connect(self._on_lazy_filled)
        lazy.prepared.connect(self._on_lazy_prepared)
        lazy.failed.connect(self._on_lazy_failed)
        self._show_lazy(lazy)
        lazy.go_on()

    def _show_lazy(self, lazy: LazyResult) -> None:
        source, details = lazy.request.source, {"unfinished": True}
        self._show(source, "denoised", lazy.stack, source.placement, source.display, details)
        self._show_lazy_state()

    def _begin_again(self, lazy: LazyResult) -> None:
        """Settings or data have changed: what was denoised so far doesn't hold any more."""
        if self._request is not None:
            lazy.is_stale = True  # the layer belongs to a run, whose end looks here again
            return
        layer = find_layer(self._viewer.layers, lazy.source_id)
        if layer is None:
            return
        try:
            source = read(layer, self._viewer.dims)
            request = make_request(self.form.values(), source, self._findings)
        except LearnedDiffusionError as error:
            self._on_lazy_failed(lazy, error)
            return
        lazy.begin_again(request)
        self._show_lazy(lazy)

    def _renew_lazy(self) -> None:
        """Begin again where the settings have changed."""
        lazy = self._lazy.get(self.form.layer.key())
        request = self._make_request() if lazy is not None else None
        if lazy is None or request is None:
            return
        before = lazy.request
        if (request.config, request.tiling) != (before.config, before.tiling):
            self._begin_again(lazy)

    def _look_at_lazy(self) -> None:
        """Tell what is lazy which slice is in view; with other axes in view it begins again."""
        for lazy in list(self._lazy.values()):
            source = self._source
            if source is None or source.layer_id != lazy.source_id:
                source = self._read(lazy.source_id)
            if source is None:
                continue
            if source.plane_axes == lazy.request.source.plane_axes:
                lazy.look_at(source.index)
            else:
                self._begin_again(lazy)
        self._show_lazy_state()

    def _read(self, layer_id: Hashable) -> Source | None:
        """A layer as it is now; ``None`` if it can't be denoised, which the form says elsewhere."""
        layer = find_layer(self._viewer.layers, layer_id)
        with suppress(LearnedDiffusionError):
            return None if layer is None else read(layer, self._viewer.dims)
        return None

    def _lazy_layer(self, lazy: LazyResult) -> Image | None:
        """The layer that shows it; ``None`` while a run shows its own result there."""
        layer = find_result(self._viewer.layers, lazy.request.source, "denoised")
        return layer if layer is not None and layer.data is lazy.stack else None

    def _on_lazy_filled(self, lazy: LazyResult, indices: list[Index]) -> None:
        layer = self._lazy_layer(lazy)
        if layer is not None and lazy.stack.in_view in indices:
            layer.refresh(highlight=False, extent=False)
        self._show_lazy_state()

    def _on_lazy_prepared(self, lazy: LazyResult, whole: Prepared) -> None:
        self._findings.add(lazy.request, whole, whole)
        self._show_findings()
        layer = self._lazy_layer(lazy)
        if layer is not None:
            mark = {**mark_of(layer), **_how(whole)}
            layer.metadata = {**layer.metadata, MARK: mark}

    def _on_lazy_failed(self, lazy: LazyResult, error: Exception) -> None:
        self._end_lazy(lazy)
        self._fail(explain(error))

    def _end_lazy(self, lazy: LazyResult) -> None:
        """Stop. The layer stays if it is complete; else it becomes what it was before, or goes."""
        del self._lazy[lazy.source_id]
        lazy.stop()
        layer = self._lazy_layer(lazy)
        if layer is not None:
            lazy.stack.drop_changed()
            if lazy.stack.n_ready == lazy.stack.n_slices:
                mark = {k: value for k, value in mark_of(layer).items() if k != "unfinished"}
                layer.metadata = {**layer.metadata, MARK: mark}
                layer.data = lazy.stack.finished()
            elif lazy.replaced is not None:
                layer.data, layer.metadata = lazy.replaced
            else:
                self._remove(layer, lazy.request.source)
        lazy.deleteLater()
        self._show_lazy_state()
        self._update_buttons()

    def _end_all_lazy(self) -> None:
        for lazy in list(self._lazy.values()):
            self._end_lazy(lazy)

    def _show_lazy_state(self) -> None:
        """Say how many slices are ready."""
        lines = []
        for lazy in self._lazy.values():
            stack, source = lazy.stack, lazy.request.source
            count = f"{stack.n_ready} of {stack.n_slices}"
            text = f"“{short_name(source.name)}” as you scroll: {count} slices ready."
            if stack.in_view is None:
                text += " No slice is in view now."
            lines.append(text)
        self.lazy_info.show_text("\n".join(lines))

    # --- the live preview -------------------------------------------------------------------------

    def _on_live_preview(self, is_on: bool) -> None:
        if is_on:
            self._ask_for_preview()
        else:
            self._preview_timer.stop()
            self._preview.cancel()
            self._remove_preview()

    def _ask_for_preview(self) -> None:
        if self.live_preview.isChecked():
            # What is being computed is stale already; its time is better spent on the next one.
            self._preview.cancel()
            self._preview_timer.start()

    def _start_preview(self) -> None:
        if not self.live_preview.isChecked() or self._run.is_busy:
            return  # the end of the run asks again
        request = self._make_request()
        if request is None or request.source.slice_problem:
            self._remove_preview()
            return
        self._previewed = _slice_key(request.source)
        request = replace(request, maps=MapsConfig())  # only the result is shown
        self._preview.submit(
            partial(_tasks.denoise_slice, request, self._load_jobs, is_quick=True), "Live preview"
        )

    def _on_preview_succeeded(self, answer: Answer) -> None:
        source = answer.request.source
        self._findings.add(answer.request, answer.whole, answer.used)
        self._show_findings()
        layers = self._viewer.layers
        layer = find_layer(layers, self._preview_id) if self._preview_id is not None else None
        data, place = source.as_slice_of_layer(answer.denoised), source.slice_placement()
        mark = {"role": "preview", "source_id": str(source.layer_id), "source": source.name}
        if layer is not None and (
            mark_of(layer).get("source_id") != mark["source_id"] or layer.ndim != data.ndim
        ):
            self._remove_preview()
            layer = None
        if layer is None:
            layer = Image(
                data,
                name=f"{source.name} preview",
                metadata={MARK: mark},
                **place.keywords(),
                **source.display,
            )
            self._preview_id = layer.unique_id
            with selection_kept(layers):
                layers.insert(position(layers, source, "preview"), layer)
        else:
            place.apply(layer)
            layer.data = data
        summary = answer.report.summary(source.intensity_unit)
        self.status.show_text("\n".join([f"Preview: {summary}", *answer.report.messages]))

    def _on_preview_failed(self, error: Exception) -> None:
        # In the widget only: with a popup for each position of the slider nobody could work.
        self._remove_preview()
        self.status.show_error(explain(error))

    def _remove_preview(self) -> None:
        layer_id, self._preview_id = self._preview_id, None
        layer = None if layer_id is None else find_layer(self._viewer.layers, layer_id)
        if layer is not None:
            remove_layer(self._viewer.layers, layer)

    # --- estimating the noise ---------------------------------------------------------------------

    def estimate(self) -> None:
        """Estimate the noise of the layer, of the kind that is chosen."""
        source = self._source
        if source is None:
            return
        values = self.form.values().with_automatic_noise()
        try:
            request = make_request(values, source, Findings())
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        request = replace(request, probes=self._findings.probes)
        self.status.show_text("Estimating the noise …")
        self._estimation.submit(
            partial(_tasks.estimate, request, self._load_jobs), "Estimating the noise"
        )

    def _on_estimated(self, estimated: Estimate) -> None:
        request, prepared = estimated.request, estimated.prepared
        self._findings.add(request, prepared, prepared)
        self.status.show_text("")
        is_same = (
            self._source is not None
            and self._source.layer_id == request.source.layer_id
            and not request.source.has_changed()
            and self.form.values().noise_kind == request.config.noise_kind
        )
        if is_same and prepared.estimate is not None:
            self.form.adopt_estimate(prepared.estimate)
        self._show_findings()

    def _on_estimation_cancelled(self) -> None:
        self.status.show_text("The noise wasn't estimated.")

    def _on_estimation_failed(self, error: Exception) -> None:
        self._fail(explain(error))

    # --- copying ----------------------------------------------------------------------------------

    def copy_as_python(self) -> None:
        """Put the settings on the clipboard, as a Python call."""
        request = self._make_request()
        if request is not None:
            source = request.source
            first, second = (axis - source.data.ndim for axis in source.plane_axes)
            text = as_python(
                request.config,
                f"viewer.layers[{source.name!r}].data",
                axes=(first, second),
                spacing=source.spacing,
                tiling=request.tiling,
            )
            self._copy(text, "a Python call")

    def copy_as_shell(self) -> None:
        """Put the settings on the clipboard, as a shell command."""
        request = self._make_request()
        if request is not None:
            path = PurePath(request.source.path or "image.tif")
            target = path.with_name(f"{path.stem}_denoised.tif")
            text = as_shell(request.config, str(path), str(target), tiling=request.tiling)
            letters = request.source.plane_letters
            self._copy(f"{text} --plane={letters}" if letters else text, "a shell command")

    def _copy(self, text: str, what: str) -> None:
        clipboard = QApplication.clipboard()
        if clipboard is not None:
            clipboard.setText(text)
            self.status.show_text(f"Copied the settings as {what}.")


def _slice_key(source: Source) -> tuple[Any, ...]:
    """What tells one slice from another, and from itself after a change in place."""
    return source.layer_id, source.plane_axes, source.index, source.content_at(source.index)


def _details(answer: Answer, index: tuple[int, ...] | None) -> dict[str, Any]:
    """How a result came about, for its metadata: plain values that any writer can keep."""
    details = {**_how(answer.used), "report": asdict(answer.report)}
    if index:
        details["slice"] = index
    if answer.request.maps.step is not None:
        details["map_step"] = answer.request.maps.step
    return details


def _how(used: Prepared) -> dict[str, Any]:
    config = used.config
    return {
        "model": config.model,
        "weights": used.weights,
        "settings": {f.name: getattr(config, f.name) for f in fields(config) if f.name != "noise"},
        "noise": config.noise.to_dict() if config.noise is not None else None,
        "versions": {package: version(package) for package in PACKAGES},
    }
