"""The fine-tuning widget: a model learns from regions of a layer, and is saved under a name."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.layers import Image, Labels, Layer, Shapes
from napari.utils.theme import get_theme
from qtpy.QtCore import QSize
from qtpy.QtWidgets import (
    QCheckBox,
    QFileDialog,
    QHBoxLayout,
    QInputDialog,
    QLabel,
    QLineEdit,
    QMessageBox,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_learned_diffusion.config import DiffusionConfig, FineTuneConfig
from napari_learned_diffusion.core.errors import InvalidSettingError, LearnedDiffusionError
from napari_learned_diffusion.core.text import one_line
from napari_learned_diffusion.core.user_models import (
    PREFIX,
    UserModel,
    damaged_user_models,
    delete_user_model,
    export_user_model,
    import_user_model,
    list_user_models,
    rename_user_model,
    user_model,
)
from napari_learned_diffusion.core.zoo import STANDARD_MODEL
from napari_learned_diffusion.files._napari import declared_missing
from napari_learned_diffusion.jobs.progress import Progress
from napari_learned_diffusion.widgets import _finetune_tasks
from napari_learned_diffusion.widgets._controls import (
    DEVICE_TITLES,
    LARGEST_NUMBER,
    NOISE_TITLES,
    Choice,
    Colours,
    ModelChoice,
    Note,
    NumberBox,
    PauseButton,
    heading_button,
    make_rows,
)
from napari_learned_diffusion.widgets._curve_plot import CurvePlot
from napari_learned_diffusion.widgets._dock import DockedWidget, FormScroll, explain, shut_down
from napari_learned_diffusion.widgets._finetune_tasks import FineTuneRequest
from napari_learned_diffusion.widgets._form import FormValues
from napari_learned_diffusion.widgets._layers import (
    MARK,
    Source,
    find_layer,
    mark_of,
    read,
    remove_layer,
)
from napari_learned_diffusion.widgets._results import selection_kept
from napari_learned_diffusion.widgets._runner import Runner
from napari_learned_diffusion.widgets._text import plain, short_name, tell_error

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_learned_diffusion.jobs.finetune import FineTuned

FORM_WIDTH = 340
REGIONS_NAME = "regions"
REGION_COLOUR = "#ffb000"

MODE_TITLES = {
    "paired": "A clean image of the same",
    "clean": "Regions that are clean already",
    "noisy": "Noisy regions alone",
    "repeats": "A second noisy image of the same",
    "neighbours": "The slices before and after",
}
MODE_NOTES = {
    "paired": (
        "The best where you have it: an average of many frames, or a long exposure, pixel by pixel "
        "in place. It may have another scale of intensities."
    ),
    "clean": (
        "For regions with hardly any noise, such as one long exposure in a stack of short ones: "
        "noise like that of the other slices is added to them. Fits correlated noise, too."
    ),
    "noisy": (
        "Always possible. Needs a good estimate of the noise and gains less; noise that neighbours "
        "share is measured in flat parts first."
    ),
    "repeats": "Two acquisitions of the same, each with noise of its own. Nothing may have moved.",
    "neighbours": "For stacks whose slices lie so close that neighbours show nearly the same.",
}
PARAMETER_TITLES = {"all": "All", "last": "Last layers only"}
ADDED_TITLES = {"auto": "Automatic", "model": "By the noise model", "measured": "As measured"}

_DEFAULT = FineTuneConfig()


class FineTuneWidget(DockedWidget):
    """Fine-tune a model on regions of an image layer, and manage one's own models.

    Parameters
    ----------
    napari_viewer
        The viewer whose layers are learned from.
    load_jobs
        Returns the module of the job; called in a worker, for importing it imports torch.
    """

    def __init__(
        self, napari_viewer: Viewer, load_jobs: Callable[[], Any] = _finetune_tasks.load_jobs
    ) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._load_jobs = load_jobs
        self._stopped = threading.Event()
        self._request: FineTuneRequest | None = None
        self._tuned: FineTuned | None = None
        self._preview_id: Hashable = None

        self._run = Runner(self, in_activity_dock=True)
        self._make_controls()
        self._explain()
        self._lay_out()
        self._connect()
        self._on_theme()
        self._on_layers()
        self._on_mode()
        self._refresh_own()

    # --- the window -------------------------------------------------------------------------------

    def sizeHint(self) -> QSize:
        # Texts that can be wrapped would ask for more width than the form needs.
        return QSize(FORM_WIDTH, super().sizeHint().height())

    def _make_controls(self) -> None:
        self.layer = Choice({})
        self.layer_info = Note()
        self.model = ModelChoice(with_automatic=False, only_learned=True)
        self.model.set_key(STANDARD_MODEL)
        self.mode = Choice(MODE_TITLES)
        self.mode_info = Note()
        self.reference = Choice({})
        self.regions = Choice({})
        self.new_button = QPushButton("New")
        self.noise_kind = Choice(NOISE_TITLES)
        self.noise_sigma = NumberBox(0.0, LARGEST_NUMBER)
        self.advanced_button = heading_button()
        self.advanced = QWidget()
        self.steps = NumberBox(1, 100_000, is_whole=True, empty=f"{_DEFAULT.steps}")
        self.learning_rate = NumberBox(1e-8, 1.0, empty=f"{_DEFAULT.learning_rate:g}")
        self.parameters = Choice(PARAMETER_TITLES)
        self.added_noise = Choice(ADDED_TITLES)
        self.patch = NumberBox(16, 1024, is_whole=True, empty=f"{_DEFAULT.patch}")
        self.batch = NumberBox(1, 256, is_whole=True, empty=f"{_DEFAULT.batch}")
        self.held_out = NumberBox(0.01, 0.5, empty=f"{_DEFAULT.held_out:g}")
        self.seed = NumberBox(0, 2**31 - 1, is_whole=True, empty=f"{_DEFAULT.seed}")
        self.device = Choice(DEVICE_TITLES)

        self.plot = CurvePlot()
        self.legend = QLabel()
        self.preview = QCheckBox("Preview of the slice in view")
        self.preview.setChecked(True)
        self.start_button = QPushButton("Start")
        self.pause_button = PauseButton()
        self.stop_button = QPushButton("Stop")
        self.cancel_button = QPushButton("Cancel")
        self.progress_bar = QProgressBar()
        self.progress_bar.setTextVisible(False)
        self.progress_bar.setFixedHeight(10)
        self.status = Note()
        self.name = QLineEdit()
        self.name.setPlaceholderText("name of the new model")
        self.save_button = QPushButton("Save")
        self.own = Choice({})
        self.own_info = Note()
        self.rename_button = QPushButton("Rename")
        self.delete_button = QPushButton("Delete")
        self.import_button = QPushButton("Import")
        self.export_button = QPushButton("Export")

    def _explain(self) -> None:
        """Tooltips, in plain words."""
        tips: dict[QWidget, str] = {
            self.layer: "The noisy image that the model shall learn to denoise.",
            self.model: "The model to start from. It stays as it is: a copy learns.",
            self.mode: "What there is to learn from.",
            self.reference: "The image layer that shows the same, of the same shape.",
            self.regions: (
                "A Shapes or Labels layer: rectangles, ellipses, polygons or painted areas, on any "
                "slices. A part of them is held out to tell which step is the best."
            ),
            self.new_button: "Make a Shapes layer for the chosen image, ready to draw rectangles.",
            self.noise_kind: "Noise model of the layer; automatic lets the image decide.",
            self.noise_sigma: "Standard deviation of the noise; empty: estimated from the image.",
            self.advanced_button: "Steps, learning rate, and other settings.",
            self.steps: "Steps at most; it ends earlier where nothing gets better any more.",
            self.learning_rate: "How far a step goes at most.",
            self.parameters: "Last layers only is more cautious: it changes less, and gains less.",
            self.added_noise: (
                "Noise that is added, with clean or noisy regions alone: as the noise model says, "
                "or with the spectrum measured in flat parts."
            ),
            self.patch: "Edge length of the squares that are learned from, in pixels.",
            self.batch: "Squares in a step.",
            self.held_out: "Part of the regions that is never trained on.",
            self.seed: "The same seed and the same regions give the same model.",
            self.device: "Where to compute.",
            self.plot: "Change of the error: below the dashed line is better than at the start.",
            self.preview: "Show every few seconds how the current model denoises the slice.",
            self.start_button: "Fine-tune a copy of the model.",
            self.pause_button: "Stand still until it is pressed again.",
            self.stop_button: "End here, and keep the best step so far.",
            self.cancel_button: "End here, and forget what was learned.",
            self.name: "The model then goes by this name, here and in Denoise by diffusion.",
            self.save_button: "Save the new model among your own.",
            self.own: "Your own models.",
            self.rename_button: "Give the model another name.",
            self.delete_button: "Delete the model for good.",
            self.import_button: "Add a model from a .safetensors file, after checking it.",
            self.export_button: "Write the model to a .safetensors file, to give it to others.",
        }
        for control, tip in tips.items():
            control.setToolTip(tip)

    def _lay_out(self) -> None:
        form = QWidget()
        rows = self._rows = make_rows()
        rows.setContentsMargins(8, 6, 8, 4)
        rows.addRow("Layer", self.layer)
        rows.addRow(self.layer_info)
        rows.addRow("Model", self.model)
        rows.addRow("Learn from", self.mode)
        rows.addRow(self.mode_info)
        rows.addRow("Reference", self.reference)
        rows.addRow("Regions", _row(self.regions, self.new_button))
        rows.addRow("Noise", self.noise_kind)
        rows.addRow("Level", self.noise_sigma)
        rows.addRow(self.advanced_button)
        rows.addRow(self.advanced)
        inner = self._advanced_rows = make_rows()
        inner.setContentsMargins(10, 0, 0, 0)
        inner.addRow("Steps", self.steps)
        inner.addRow("Learning rate", self.learning_rate)
        inner.addRow("Parameters", self.parameters)
        inner.addRow("Added noise", self.added_noise)
        inner.addRow("Patch", self.patch)
        inner.addRow("Batch", self.batch)
        inner.addRow("Held out", self.held_out)
        inner.addRow("Seed", self.seed)
        inner.addRow("Device", self.device)
        self.advanced.setLayout(inner)
        rows.addRow(self.plot)
        rows.addRow(self.legend)
        title = QLabel("My models")
        rows.addRow(title)
        rows.addRow(self.own)
        rows.addRow(self.own_info)
        buttons = (self.rename_button, self.delete_button, self.import_button, self.export_button)
        rows.addRow(_row(*buttons))
        form.setLayout(rows)

        foot = QVBoxLayout()
        foot.setContentsMargins(8, 4, 8, 8)
        foot.setSpacing(6)
        foot.addWidget(self.preview)
        runs = (self.start_button, self.pause_button, self.stop_button, self.cancel_button)
        foot.addLayout(_row(*runs))
        foot.addWidget(self.progress_bar)
        foot.addWidget(self.status)
        foot.addLayout(_row(self.name, self.save_button))

        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        column.addWidget(FormScroll(form, FORM_WIDTH), 1)
        column.addLayout(foot)
        self._on_advanced(is_open=False)

    def _connect(self) -> None:
        self.layer.currentIndexChanged.connect(self._on_edited)
        self.mode.currentIndexChanged.connect(self._on_mode)
        self.regions.currentIndexChanged.connect(self._on_edited)
        self.reference.currentIndexChanged.connect(self._on_edited)
        self.noise_kind.currentIndexChanged.connect(self._on_mode)
        self.advanced_button.toggled.connect(self._on_advanced)
        self.new_button.clicked.connect(self.new_regions)
        self.preview.toggled.connect(self._on_preview_toggled)
        self.start_button.clicked.connect(self.start)
        self.pause_button.toggled.connect(self._on_pause)
        self.stop_button.clicked.connect(self.stop)
        self.cancel_button.clicked.connect(self.cancel)
        self.name.textChanged.connect(self._update_buttons)
        self.save_button.clicked.connect(self.save)
        self.own.currentIndexChanged.connect(self._on_own)
        self.rename_button.clicked.connect(self.rename)
        self.delete_button.clicked.connect(self.delete)
        self.import_button.clicked.connect(self.import_model)
        self.export_button.clicked.connect(self.export)

        self._run.started.connect(self._on_started)
        self._run.progressed.connect(self._on_progressed)
        self._run.reported.connect(self._on_reported)
        self._run.succeeded.connect(self._on_succeeded)
        self._run.failed.connect(self._on_failed)
        self._run.cancelled.connect(self._on_cancelled)
        self._run.finished.connect(self._on_finished)

        # napari keeps weak references to these methods, so a closed widget isn't kept alive.
        layers = self._viewer.layers.events
        layers.removed.connect(self._on_removed)
        for event in (layers.inserted, layers.removed, layers.reordered):
            event.connect(self._on_layers)
        self._viewer.events.theme.connect(self._on_theme)
        self.destroyed.connect(partial(shut_down, (self._run,)))

    @property
    def is_working(self) -> bool:
        """Whether a training is on."""
        return not self._run.is_idle

    def leave(self) -> None:
        """Stop everything and leave no preview behind, because dock or window were closed."""
        self._run.cancel()
        self._remove_preview()

    def _on_theme(self) -> None:
        colours = Colours.of(get_theme(self._viewer.theme))
        for note in (self.layer_info, self.mode_info, self.status, self.own_info):
            note.set_colours(colours.quiet, colours.error)
        self.plot.set_colours(colours.background, colours.quiet, colours.accent)
        self.legend.setText(
            f"<span style='font-size: 9pt; color: {colours.quiet}'>"
            f"<b style='color: {colours.accent}'>—</b> held out &nbsp; — training &nbsp; "
            "- - starting model</span>"
        )

    def _on_advanced(self, is_open: bool) -> None:
        self.advanced_button.setText("▾  Advanced" if is_open else "▸  Advanced")
        self._rows.setRowVisible(self.advanced, is_open)

    # --- layers -----------------------------------------------------------------------------------

    def _on_layers(self) -> None:
        """List the layers anew."""
        layers = [la for la in self._viewer.layers if la.unique_id != self._preview_id]
        images = {la.unique_id: la.name for la in layers if isinstance(la, Image)}
        marks = {la.unique_id: la.name for la in layers if isinstance(la, Shapes | Labels)}
        active = self._viewer.layers.selection.active
        chosen = active.unique_id if active is not None else None
        self.layer.set_titles(images, chosen if chosen in images else next(iter(images), None))
        others = [key for key in images if key != self.layer.key()]
        self.reference.set_titles(images, next(iter(others), None))
        self.regions.set_titles(marks, next(reversed(marks), None))
        self._update_source()

    def _on_removed(self, event: Any) -> None:
        removed: Layer = event.value
        if removed.unique_id == self._preview_id:
            self._preview_id = None
            self.preview.setChecked(False)
        if self._request is not None and removed.unique_id == self._request.source.layer_id:
            self.cancel()

    def _source(self) -> Source | None:
        layer = self._layer(self.layer)
        return None if layer is None else read(layer, self._viewer.dims)

    def _layer(self, choice: Choice) -> Layer | None:
        return find_layer(self._viewer.layers, choice.key())

    def _update_source(self) -> None:
        try:
            source = self._source()
        except LearnedDiffusionError as error:
            self.layer_info.show_error(str(error))
        else:
            hint = "Open an image first: File ▸ Open, or File ▸ Open Sample."
            self.layer_info.show_text(hint if source is None else source.describe())
        self._update_buttons()

    def new_regions(self) -> None:
        """Make a Shapes layer in the place of the chosen image, ready for rectangles."""
        image = self._layer(self.layer)
        if image is None:
            return
        try:
            place = read(image, self._viewer.dims).placement
        except LearnedDiffusionError as error:
            self._fail(str(error))
            return
        layer = Shapes(
            ndim=image.ndim,
            name=f"{image.name} {REGIONS_NAME}",
            edge_color=REGION_COLOUR,
            face_color="transparent",
            edge_width=max(1.0, min(image.data.shape[-2:]) / 200),
            **place.keywords(),
        )
        self._viewer.layers.append(layer)
        self._viewer.layers.selection.active = layer
        layer.mode = "add_rectangle"
        self.regions.set_key(layer.unique_id)
        self.status.show_text("Draw one rectangle or more on the image, on any slices.")

    # --- the form ---------------------------------------------------------------------------------

    def _on_mode(self) -> None:
        mode = self.mode.key()
        self.mode_info.show_text(MODE_NOTES[mode])
        self._rows.setRowVisible(self.reference, mode in ("paired", "repeats"))
        self._advanced_rows.setRowVisible(self.added_noise, mode in ("clean", "noisy"))
        known = self.noise_kind.key() in ("gaussian", "rician", "correlated")
        self._rows.setRowVisible(self.noise_sigma, known)
        self._on_edited()

    def _on_edited(self) -> None:
        if self.status.is_error:
            self.status.show_text("")  # what went wrong may have been mended just now
        self._update_source()

    def _update_buttons(self) -> None:
        is_busy = self._run.is_busy
        self.start_button.setEnabled(not is_busy and self.layer.count() > 0)
        self.new_button.setEnabled(self.layer.count() > 0)
        for button in (self.pause_button, self.stop_button, self.cancel_button):
            button.setEnabled(is_busy)
        can_save = self._tuned is not None and self._tuned.improved
        self.name.setEnabled(can_save)
        self.save_button.setEnabled(can_save and bool(self.name.text().strip()))
        has_own = self.own.count() > 0
        for button in (self.rename_button, self.delete_button, self.export_button):
            button.setEnabled(has_own)

    def config(self) -> FineTuneConfig:
        """How to learn, by the form.

        Raises
        ------
        InvalidSettingError
            if a value is out of its range.
        """
        given: dict[str, Any] = {
            "steps": self.steps.whole_value(),
            "learning_rate": self.learning_rate.value(),
            "patch": self.patch.whole_value(),
            "batch": self.batch.whole_value(),
            "held_out": self.held_out.value(),
            "seed": self.seed.whole_value(),
        }
        return FineTuneConfig(
            mode=self.mode.key(),
            parameters=self.parameters.key(),
            added_noise=self.added_noise.key(),
            **{name: value for name, value in given.items() if value is not None},
        )

    def diffusion(self) -> DiffusionConfig:
        """The starting model and its noise, by the form."""
        values = FormValues(
            model=self.model.key(),
            noise_kind=self.noise_kind.key(),
            noise_sigma=self.noise_sigma.value(),
            device=self.device.key(),
        )
        return values.config()

    def request(self) -> FineTuneRequest:
        """Freeze form and layers.

        Raises
        ------
        LearnedDiffusionError
            if something is missing or doesn't fit.
        """
        source, image = self._source(), self._layer(self.layer)
        if source is None or image is None:
            raise InvalidSettingError("Open an image first: File ▸ Open, or File ▸ Open Sample.")
        regions = self._layer(self.regions)
        if regions is None:
            raise InvalidSettingError(
                "There are no regions yet. Press New, then draw a rectangle on the image."
            )
        config = self.config()
        reference = None
        if config.needs_reference:
            other = self._layer(self.reference)
            if other is None or other.unique_id == source.layer_id:
                raise InvalidSettingError(
                    "Choose another image layer as the reference, or another way to learn."
                )
            reference = read(other, self._viewer.dims).data
        return FineTuneRequest(
            source,
            _finetune_tasks.select(regions, image),
            reference,
            config,
            self.diffusion().also_missing(declared_missing(source.metadata)),
            self.preview.isChecked() and source.index is not None,
        )

    # --- a training -------------------------------------------------------------------------------

    def start(self) -> None:
        """Fine-tune a copy of the model."""
        if self._run.is_busy:
            return
        try:
            self._request = self.request()
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        self._tuned = None
        self._stopped.clear()
        self.pause_button.setChecked(False)
        self.plot.show_curve(None, self._request.config.steps)
        self._run.submit(
            partial(
                _finetune_tasks.fine_tune,
                self._request,
                self.pause_button.paused,
                self._stopped,
                self._load_jobs,
            ),
            f"Fine-tuning on {short_name(self._request.source.name)}",
        )

    def stop(self) -> None:
        """End the training, and keep the best step so far."""
        self._stopped.set()
        self.pause_button.setChecked(False)
        self.stop_button.setEnabled(False)

    def cancel(self) -> None:
        """End the training, and forget what was learned."""
        self._run.cancel()
        self.cancel_button.setEnabled(False)

    def _on_pause(self) -> None:
        if self._run.is_busy:
            self.status.show_text(self.pause_button.news())

    def _on_started(self) -> None:
        self.progress_bar.setRange(0, 0)
        self.status.show_text("Preparing …")
        self._update_buttons()

    def _on_progressed(self, progress: Progress, _: object) -> None:
        if self.pause_button.isChecked():
            return
        self.progress_bar.setRange(0, 1000)
        self.progress_bar.setValue(1000 * progress.done // max(1, progress.total))
        self.status.show_text(f"{progress.message} …")

    def _on_reported(self, news: list[Any]) -> None:
        request = self._request
        if request is None or not news:
            return
        self.plot.show_curve(news[-1].curve, request.config.steps)
        planes = [progress.plane for progress in news if progress.plane is not None]
        if planes and self.preview.isChecked():
            self._show_preview(request.source, planes[-1])

    def _on_succeeded(self, answer: tuple[FineTuned, tuple[str, ...]]) -> None:
        tuned, notes = answer
        self._tuned = tuned
        if self._request is not None:
            self.plot.show_curve(tuned.curve, self._request.config.steps)
            if tuned.improved and not self.name.text():
                self.name.setText(suggested_name(self._request.source.name))
        lines = [tuned.summary(), f"{tuned.seconds:.0f} s", *notes, *tuned.messages]
        if tuned.improved:
            lines.insert(1, "Save it below to use it.")
        self.status.show_text("\n".join(lines))

    def _on_failed(self, error: Exception) -> None:
        self._fail(explain(error))

    def _on_cancelled(self) -> None:
        self.plot.show_curve(None, 1)
        self.status.show_text("Cancelled. No model has changed.")

    def _on_finished(self) -> None:
        self._request = None
        self.pause_button.setChecked(False)
        self._remove_preview()
        self.progress_bar.reset()
        self.progress_bar.setRange(0, 1000)
        self._update_buttons()

    def _fail(self, message: str) -> None:
        self.status.show_error(message)
        tell_error(message)

    # --- the preview ------------------------------------------------------------------------------

    def _on_preview_toggled(self, is_on: bool) -> None:
        if not is_on:
            self._remove_preview()

    def _show_preview(self, source: Source, plane: Any) -> None:
        data, place = source.as_slice_of_layer(plane), source.slice_placement()
        layers = self._viewer.layers
        layer = None if self._preview_id is None else find_layer(layers, self._preview_id)
        if layer is not None and mark_of(layer).get("source_id") == str(source.layer_id):
            place.apply(layer)
            layer.data = data
            return
        mark = {"role": "preview", "source_id": str(source.layer_id), "source": source.name}
        layer = Image(
            data,
            name=f"{source.name} fine-tuning",
            metadata={MARK: mark},
            **place.keywords(),
            **source.display,
        )
        self._preview_id = layer.unique_id
        below = [at for at, la in enumerate(layers) if la.unique_id == source.layer_id]
        with selection_kept(layers):
            layers.insert(below[0] + 1 if below else len(layers), layer)

    def _remove_preview(self) -> None:
        layer_id, self._preview_id = self._preview_id, None
        layer = None if layer_id is None else find_layer(self._viewer.layers, layer_id)
        if layer is not None:
            remove_layer(self._viewer.layers, layer)

    # --- the user's own models --------------------------------------------------------------------

    def save(self) -> None:
        """Save the new model under the name in the form."""
        if self._tuned is None:
            return
        name = self.name.text().strip()
        try:
            saved = self._tuned.save(name)
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        self._tuned = None
        self.name.clear()
        self._refresh_own(saved.name)
        self.model.refresh()
        self.status.show_text(
            f"Saved as {saved.name}. It is in the list of Denoise by diffusion, under My models."
        )

    def _refresh_own(self, chosen: str | None = None) -> None:
        names = {model.name: model.name for model in list_user_models()}
        # Damaged ones can be deleted, too.
        for key in damaged_user_models():
            names[key.removeprefix(PREFIX)] = f"{key.removeprefix(PREFIX)} (damaged)"
        self.own.set_titles(names, next(iter(names), None))
        if chosen is not None:
            self.own.set_key(chosen)
        self._on_own()

    def _on_own(self) -> None:
        name = self.own.key()
        try:
            model = None if name is None else user_model(name)
        except LearnedDiffusionError as error:
            problem = damaged_user_models().get(f"{PREFIX}{name}", str(error))
            self.own_info.show_error(problem)
        else:
            self.own_info.show_text("None yet." if model is None else _described(model))
        self._update_buttons()

    def rename(self) -> None:
        """Ask for another name of the chosen model."""
        name = self.own.key()
        new, is_given = QInputDialog.getText(self, "Rename model", "New name", text=name)
        if is_given and new.strip() != name:
            self._manage(lambda: rename_user_model(name, new.strip()).name)

    def delete(self) -> None:
        """Delete the chosen model, if the user is sure."""
        name = self.own.key()
        question = f"Delete the model “{name}” for good?"
        answer = QMessageBox.question(self, "Delete model", plain(question))
        if answer == QMessageBox.StandardButton.Yes:
            self._manage(lambda: delete_user_model(name))

    def import_model(self) -> None:
        """Add a model from a file."""
        path, _ = QFileDialog.getOpenFileName(self, "Import model", "", "Models (*.safetensors)")
        if path:
            self._manage(lambda: import_user_model(Path(path)).name)

    def export(self) -> None:
        """Write the chosen model to a file."""
        name = self.own.key()
        path, _ = QFileDialog.getSaveFileName(
            self, "Export model", f"{name}.safetensors", "Models (*.safetensors)"
        )
        if path:
            # The dialog has asked before it names a file that is there.
            self._manage(lambda: export_user_model(name, Path(path), overwrite=True))

    def _manage(self, act: Callable[[], object]) -> None:
        """Do something to the user's models, and list them anew; a name that it gives is chosen."""
        try:
            chosen = act()
        except LearnedDiffusionError as error:
            self._fail(str(error))
            return
        self._refresh_own(chosen if isinstance(chosen, str) else self.own.key())
        self.model.refresh()
        self.status.show_text("")


def suggested_name(layer: str) -> str:
    """A name for a model by the layer that it has learned from."""
    return re.sub(r"[^\w .+()-]|^\W+", "", layer)[:48].strip(" .") or "model"


def _described(model: UserModel) -> str:
    facts = model.facts
    return f"{model.summary}\nGain {facts['gain_dB']:.2f} dB, {one_line(facts['date'])}."


def _row(*widgets: QWidget) -> QHBoxLayout:
    row = QHBoxLayout()
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(6)
    for widget in widgets:
        stretch = 0 if isinstance(widget, QPushButton) and len(widgets) == 2 else 1
        row.addWidget(widget, stretch)
    return row
