"""The Batch widget: files, folders and layers to a folder, with a table of what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from napari.layers import Image, Layer
from napari.utils.theme import get_theme
from numpy.typing import NDArray
from qtpy.QtCore import Qt, QTimer, QUrl
from qtpy.QtGui import QDesktopServices
from qtpy.QtWidgets import (
    QCheckBox,
    QFileDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_learned_diffusion.core.errors import LearnedDiffusionError
from napari_learned_diffusion.files import supported_suffixes
from napari_learned_diffusion.jobs.batch_sources import Source, VolumeSource
from napari_learned_diffusion.jobs.batch_state import LOG
from napari_learned_diffusion.widgets import _batch_tasks
from napari_learned_diffusion.widgets._batch_table import BatchTable, BatchView
from napari_learned_diffusion.widgets._batch_tasks import BatchRequest
from napari_learned_diffusion.widgets._controls import (
    Choice,
    Colours,
    DiffusionForm,
    Note,
    PauseButton,
)
from napari_learned_diffusion.widgets._dock import (
    DockedWidget,
    FormScroll,
    explain,
    set_shortcut,
    shut_down,
)
from napari_learned_diffusion.widgets._layers import as_volume, find_layer, remove_layer
from napari_learned_diffusion.widgets._names import as_file_name
from napari_learned_diffusion.widgets._preferences import Preferences, Session, opening
from napari_learned_diffusion.widgets._runner import Runner

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_learned_diffusion.jobs.batch import BatchProgress, BatchSummary
    from napari_learned_diffusion.jobs.progress import Progress

FORM_WIDTH = 360
"""Of the widget in pixels, at least."""

PREVIEW_INTERVAL = 500
"""Milliseconds between two pictures of the preview, at least."""

SHORTCUT = "Ctrl+Shift+B"
"""Keys that start a batch, which napari leaves free."""

PREVIEW_NAME = "batch preview"

FORMAT_TITLES = {
    "": "As the input",
    "tiff": "TIFF",
    "mrc": "MRC",
    "nifti": "NIfTI",
    "zarr": "OME-Zarr",
    "dicom": "DICOM series",
}


class BatchWidget(DockedWidget):
    """Denoise files, folders and layers to a folder.

    Parameters
    ----------
    napari_viewer
        The viewer whose layers can be added, and that shows the preview.
    load_jobs
        Returns the module of the batch; called in a worker, for importing it imports torch.
    """

    remembered_out: ClassVar[str] = ""
    """The output folder that was chosen last in this session."""

    remembered: ClassVar[Session | None] = None
    """What the form held when it was closed last in this session."""

    def __init__(
        self, napari_viewer: Viewer, load_jobs: Callable[[], Any] = _batch_tasks.load_jobs
    ) -> None:
        super().__init__()
        self._viewer = napari_viewer
        self._load_jobs = load_jobs
        self._looking_for: list[Path] = []
        self._layer_ids: dict[str, Hashable] = {}
        """Layers that were added, by the file name that each was given."""

        # Of the run that is on, or was: the rows of its files.
        self._numbers: list[int] = []

        self._preview_id: Hashable = None
        self._previewed = -1
        self._plane: tuple[int, NDArray[Any]] | None = None
        self._preview_timer = QTimer(self)
        self._preview_timer.setSingleShot(True)
        self._preview_timer.setInterval(PREVIEW_INTERVAL)

        self._run = Runner(self, in_activity_dock=True)
        self._search = Runner(self)
        self._runners = (self._run, self._search)

        self._make_controls()
        self._explain()
        self._lay_out()
        self._connect()
        self._on_theme()
        self._update_buttons()

    # --- the window -------------------------------------------------------------------------------

    def _make_controls(self) -> None:
        self.files_button = QPushButton("Files")
        self.folder_button = QPushButton("Folder")
        self.layers_button = QPushButton("Layers")
        self.remove_button = QPushButton("Remove")
        self.clear_button = QPushButton("Clear")
        self.table = BatchTable(self)
        self.view = BatchView(self.table)
        self.details = Note()
        self.out = QLineEdit(self.remembered_out)
        self.out.setPlaceholderText("output folder")
        self.out_button = QPushButton("Choose")
        self.format = Choice(FORMAT_TITLES)
        self.overwrite = QCheckBox("Overwrite results")
        self.only_failed = QCheckBox("Only failed before")
        self.form = DiffusionForm(for_files=True)
        self.form.set_values(opening(BatchWidget.remembered).values)
        self.preview = QCheckBox("Preview of the latest slice")
        self.start_button = QPushButton("Start")
        self.pause_button = PauseButton()
        self.cancel_button = QPushButton("Cancel")
        self.progress_bar = QProgressBar()
        self.progress_bar.setTextVisible(False)
        self.progress_bar.setFixedHeight(10)
        self.status = Note()
        self.retry_button = QPushButton("Retry failed")
        self.log_button = QPushButton("Open log folder")

    def _explain(self) -> None:
        """Tooltips, in plain words."""
        tips = {
            self.files_button: "Add image files: TIFF, MRC, DICOM, NIfTI.",
            self.folder_button: (
                "Add a folder: every image in it and in the folders below, or the DICOM series or "
                "OME-Zarr that it is."
            ),
            self.layers_button: (
                "Add the image layers that are selected in the layer list. Nothing is copied; "
                "don't change them while the batch runs."
            ),
            self.remove_button: "Take the selected rows off the list. The files stay.",
            self.clear_button: "Take all rows off the list. The files stay.",
            self.out: "Folder that the results are written to; it is made where it isn't there.",
            self.out_button: "Choose the output folder.",
            self.format: (
                "File format of the results. As the input: each file's own; layers become TIFF, "
                "and a TIFF of more than 4 GiB an OME-Zarr."
            ),
            self.overwrite: (
                "Denoise everything anew, also what is done, and replace results that are in the "
                "output folder already. Inputs are never replaced."
            ),
            self.only_failed: (
                "Denoise only those files that have failed in an earlier batch into this folder."
            ),
            self.preview: (
                f"Show the slice that was denoised last in the layer “{PREVIEW_NAME}”, anew at "
                "most twice a second."
            ),
            self.start_button: (
                "Denoise the files, one after the other. What was done before with the same "
                "settings is skipped, what was stopped goes on where it was."
            ),
            self.pause_button: "Begin no other slice until it is pressed again.",
            self.cancel_button: (
                "Stop within one diffusion step. Slices that are done are kept: Start goes on "
                "from there."
            ),
            self.retry_button: "Denoise those files of the list once more that have failed.",
            self.log_button: f"Open the output folder, where the log {LOG} lies.",
        }
        for control, tip in tips.items():
            control.setToolTip(tip)
        set_shortcut(self.start_button, SHORTCUT)

    def _lay_out(self) -> None:
        inputs = _row(
            QLabel("Add"), self.files_button, self.folder_button, self.layers_button, None
        )
        inputs.addWidget(self.remove_button)
        inputs.addWidget(self.clear_button)
        head = QVBoxLayout()
        head.setContentsMargins(8, 6, 8, 4)
        head.setSpacing(6)
        head.addLayout(inputs)
        head.addWidget(self.view, 1)
        head.addWidget(self.details)
        head.addLayout(self._lay_out_output())

        foot = QVBoxLayout()
        foot.setContentsMargins(8, 4, 8, 8)
        foot.setSpacing(6)
        foot.addWidget(self.preview)
        runs = QHBoxLayout()
        for button in (self.start_button, self.pause_button, self.cancel_button):
            runs.addWidget(button, 1)
        foot.addLayout(runs)
        foot.addWidget(self.progress_bar)
        foot.addWidget(self.status)
        foot.addLayout(_row(self.retry_button, self.log_button))

        column = QVBoxLayout(self)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        column.addLayout(head, 3)
        column.addWidget(FormScroll(self.form, FORM_WIDTH), 2)
        column.addLayout(foot)

    def _lay_out_output(self) -> QFormLayout:
        rows = QFormLayout()
        rows.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
        rows.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
        rows.setHorizontalSpacing(10)
        rows.setVerticalSpacing(5)
        rows.addRow("Output", _row(self.out, self.out_button))
        rows.addRow("Format", self.format)
        rows.addRow(_row(self.overwrite, self.only_failed))
        return rows

    def _connect(self) -> None:
        self.files_button.clicked.connect(self._choose_files)
        self.folder_button.clicked.connect(self._choose_folder)
        self.layers_button.clicked.connect(self.add_layers)
        self.remove_button.clicked.connect(self.remove)
        self.clear_button.clicked.connect(self.clear)
        self.view.dropped.connect(self.add_paths)
        selection = self.view.selectionModel()
        if selection is not None:
            selection.selectionChanged.connect(self._on_selected)
        self.table.dataChanged.connect(self._show_details)
        self.out_button.clicked.connect(self._choose_out)
        self.out.textChanged.connect(self._on_edited)
        self.form.changed.connect(self._on_edited)
        self.preview.toggled.connect(self._on_preview_toggled)
        self._preview_timer.timeout.connect(self._show_preview)
        self.start_button.clicked.connect(self.start)
        self.pause_button.toggled.connect(self._on_pause)
        self.cancel_button.clicked.connect(self.cancel)
        self.retry_button.clicked.connect(self.retry_failed)
        self.log_button.clicked.connect(self.open_log_folder)

        self._run.started.connect(self._on_started)
        self._run.progressed.connect(self._on_progressed)
        self._run.reported.connect(self._on_reported)
        self._run.succeeded.connect(self._on_succeeded)
        self._run.failed.connect(self._on_failed)
        self._run.cancelled.connect(self._on_cancelled)
        self._run.finished.connect(self._on_finished)
        self._search.started.connect(self._update_buttons)
        self._search.succeeded.connect(self._on_found)
        self._search.failed.connect(self._on_not_found)
        self._search.finished.connect(self._update_buttons)

        # napari keeps weak references to these methods, so a closed widget isn't kept alive.
        self._viewer.layers.events.removed.connect(self._on_layer_removed)
        self._viewer.events.theme.connect(self._on_theme)
        self.destroyed.connect(partial(shut_down, self._runners))

    @property
    def is_working(self) -> bool:
        """Whether a batch or the search for images is on."""
        return not all(runner.is_idle for runner in self._runners)

    def leave(self) -> None:
        """Stop everything and leave no preview behind, because dock or window were closed."""
        BatchWidget.remembered = Session(Preferences.read(), self.form.values())
        self.preview.setChecked(False)
        for runner in self._runners:
            runner.cancel()

    def _on_theme(self) -> None:
        colours = Colours.of(get_theme(self._viewer.theme))
        self.form.set_colours(colours)
        self.table.set_colours(colours)
        for note in (self.status, self.details):
            note.set_colours(colours.quiet, colours.error)

    def _on_edited(self) -> None:
        if self.status.is_error:
            self.status.show_text("")  # what went wrong may have been mended just now
        self._update_buttons()

    def _update_buttons(self) -> None:
        is_busy, has_rows = self._run.is_busy, bool(self.table.rows)
        can_edit = not is_busy
        for control in (
            self.files_button,
            self.folder_button,
            self.layers_button,
            self.out,
            self.out_button,
            self.format,
            self.overwrite,
            self.only_failed,
            self.form,
        ):
            control.setEnabled(can_edit)
        self.view.setAcceptDrops(can_edit)
        self.remove_button.setEnabled(can_edit and bool(self.view.chosen()))
        self.clear_button.setEnabled(can_edit and has_rows)
        self.start_button.setEnabled(can_edit and has_rows and not self._search.is_busy)
        self.retry_button.setEnabled(can_edit and bool(self.table.numbers("failed")))
        self.pause_button.setEnabled(is_busy)
        self.cancel_button.setEnabled(is_busy)
        folder = self._out_folder()
        self.log_button.setEnabled(folder is not None and (folder / LOG).exists())

    # --- what to denoise --------------------------------------------------------------------------

    def _choose_files(self) -> None:
        patterns = " ".join(f"*{suffix}" for suffix in supported_suffixes())
        names, _ = QFileDialog.getOpenFileNames(
            self, "Add images", "", f"Images ({patterns});;All files (*)"
        )
        self.add_paths([Path(name) for name in names])

    def _choose_folder(self) -> None:
        name = QFileDialog.getExistingDirectory(self, "Add a folder of images")
        self.add_paths([Path(name)] if name else [])

    def add_paths(self, paths: Sequence[Path]) -> None:
        """Add files, and the images in folders; where no output folder is chosen, propose one."""
        if not paths or self._run.is_busy:
            return
        if self._out_folder() is None:
            self._propose_out(paths[0])
        out = self._out_folder()
        if out is None:
            return
        # A search that is on is begun anew, for the earlier paths too.
        self._looking_for += paths
        self.status.show_text("Looking for images …")
        self._search.submit(
            partial(_batch_tasks.find, tuple(self._looking_for), out), "Looking for images"
        )

    def _on_found(self, sources: list[Source]) -> None:
        self._looking_for.clear()
        self._add(sources)

    def _on_not_found(self, error: Exception) -> None:
        self._looking_for.clear()
        self.status.show_error(explain(error))

    def add_layers(self) -> None:
        """Add the image layers that are selected in the viewer."""
        chosen = [layer for layer in self._viewer.layers if layer in self._viewer.layers.selection]
        if not chosen:
            self.status.show_error("Select one or more image layers in the layer list first.")
            return
        try:
            volumes = [as_volume(layer) for layer in chosen]
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        if self._out_folder() is None and chosen[0].source.path:
            self._propose_out(Path(chosen[0].source.path))
        names = [self._name_of(layer) for layer in chosen]
        self._add(
            [
                VolumeSource(Path(name), name, volume)
                for name, volume in zip(names, volumes, strict=True)
            ]
        )

    def _name_of(self, layer: Layer) -> str:
        """The file name that a layer goes by, the same each time and no other layer's."""
        for name, layer_id in self._layer_ids.items():
            if layer_id == layer.unique_id:
                return name
        first = as_file_name(str(layer.name))
        names = (f"{first}{f' {n}' * (n > 1)}.tif" for n in count(1))
        name = next(name for name in names if name not in self._layer_ids)
        self._layer_ids[name] = layer.unique_id
        return name

    def _renew(self, number: int) -> None:
        """Read the layer of a row once more, which may have got other data since."""
        source = self.table.rows[number].source
        if isinstance(source, VolumeSource):
            layer = find_layer(self._viewer.layers, self._layer_ids.get(str(source.path)))
            if layer is not None:
                renewed = replace(source, volume=as_volume(layer))
                self.table.replace_source(number, renewed)

    def _add(self, sources: Sequence[Source]) -> None:
        added = self.table.add(sources)
        known = len(sources) - added
        text = f"Added {added} image{'s' * (added != 1)}."
        self.status.show_text(f"{text} {known} on the list already." if known else text)
        self._update_buttons()

    def remove(self) -> None:
        """Take the selected rows off the list."""
        self.table.remove(self.view.chosen())
        self._update_buttons()

    def clear(self) -> None:
        """Take all rows off the list."""
        self.table.remove(range(len(self.table.rows)))
        self.status.show_text("")
        self._update_buttons()

    def _on_selected(self) -> None:
        self._show_details()
        self._update_buttons()

    def _show_details(self) -> None:
        """Say everything about the one row that is selected, for columns are narrow."""
        chosen = self.view.chosen()
        if len(chosen) != 1:
            self.details.show_text("")
            return
        row = self.table.rows[chosen[0]]
        show = self.details.show_error if row.state == "failed" else self.details.show_text
        show(row.describe())

    # --- where to ---------------------------------------------------------------------------------

    def _choose_out(self) -> None:
        name = QFileDialog.getExistingDirectory(self, "Choose the output folder", self.out.text())
        if name:
            self.out.setText(name)

    def _propose_out(self, path: Path) -> None:
        """A folder beside the input, which the user sees and may change."""
        path = path.absolute()
        name = f"{path.name} denoised" if path.is_dir() else "denoised"
        self.out.setText(str(path.parent / name))

    def _out_folder(self) -> Path | None:
        text = self.out.text().strip()
        return Path(text).expanduser() if text else None

    def open_log_folder(self) -> None:
        """Show the output folder, with the log in it, in the system's file manager."""
        folder = self._out_folder()
        if folder is not None and not QDesktopServices.openUrl(QUrl.fromLocalFile(str(folder))):
            self.status.show_text(f"The log is {folder / LOG}.")

    # --- a run ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Denoise every file of the list."""
        self._start(range(len(self.table.rows)), only_failed=self.only_failed.isChecked())

    def retry_failed(self) -> None:
        """Denoise those files once more that have failed."""
        self._start(self.table.numbers("failed"), only_failed=False)

    def _start(self, numbers: Sequence[int], *, only_failed: bool) -> None:
        if self._run.is_busy or not numbers:
            return
        out = self._out_folder()
        if out is None:
            self.status.show_error("Choose an output folder first.")
            return
        values = self.form.values()
        try:
            for number in numbers:
                self._renew(number)
            request = BatchRequest(
                sources=tuple(self.table.rows[number].source for number in numbers),
                out=out,
                format=self.format.key() or None,
                overwrite=self.overwrite.isChecked(),
                only_failed=only_failed,
                config=values.config(),
                tiling=values.tiling(),
            )
        except LearnedDiffusionError as error:
            self.status.show_error(str(error))
            return
        BatchWidget.remembered_out = self.out.text()
        self._numbers = list(numbers)
        self.table.wait(numbers)
        self.pause_button.setChecked(False)
        self._run.submit(
            partial(_batch_tasks.denoise_batch, request, self.pause_button.paused, self._load_jobs),
            "Denoising a batch",
        )

    def cancel(self) -> None:
        """Stop the batch; what is done stays done."""
        self._run.cancel()
        self.cancel_button.setEnabled(False)

    def _on_pause(self) -> None:
        if self._run.is_busy:
            self.status.show_text(self.pause_button.news())

    def _on_started(self) -> None:
        self._previewed = -1
        self.progress_bar.setRange(0, 0)
        self.status.show_text("Preparing …")
        self._update_buttons()

    def _on_progressed(self, progress: Progress, _: object) -> None:
        # A bar of Qt counts in 32 bits; a long batch has more steps than that.
        self.progress_bar.setRange(0, 1000)
        self.progress_bar.setValue(1000 * progress.done // max(1, progress.total))

    def _on_reported(self, news: list[BatchProgress]) -> None:
        for progress in news:
            status = progress.file
            if status is None:
                continue
            self.table.update(self._numbers[status.number], status)
            if progress.plane is not None:
                self._plane = status.number, progress.plane
        if news and not self.pause_button.isChecked():
            last = news[-1]
            self.status.show_text(f"{last.message} … {last.done / max(1, last.total):.0%}")
        if not self._preview_timer.isActive():
            self._show_preview()

    def _on_succeeded(self, summary: BatchSummary) -> None:
        for status in summary.files:
            self.table.update(self._numbers[status.number], status)
        self._show_preview()
        text = "\n".join([summary.describe(), *summary.notes])
        failed = self.table.numbers("failed")
        if not failed:
            self.status.show_text(text)
            return
        self.status.show_error(f"{text}\nSelect a failed file to read why it has failed.")
        self.view.selectRow(failed[0])

    def _on_failed(self, error: Exception) -> None:
        self.status.show_error(explain(error))

    def _on_cancelled(self) -> None:
        self.status.show_text("Stopped. Start goes on with the slices that aren't done.")

    def _on_finished(self) -> None:
        self.table.stop()
        self._plane = None
        self.pause_button.setChecked(False)
        self.progress_bar.reset()
        self.progress_bar.setRange(0, 1000)
        self._update_buttons()

    # --- the preview ------------------------------------------------------------------------------

    def _on_preview_toggled(self, is_on: bool) -> None:
        if is_on:
            self._show_preview()
            return
        layer_id, self._preview_id = self._preview_id, None
        layer = None if layer_id is None else find_layer(self._viewer.layers, layer_id)
        if layer is not None:
            remove_layer(self._viewer.layers, layer)

    def _show_preview(self) -> None:
        """Show the plane that came last; the next one not before the timer has run out."""
        if self._plane is None or not self.preview.isChecked():
            return
        (number, plane), self._plane = self._plane, None
        self._preview_timer.start()
        is_new_file, self._previewed = number != self._previewed, number
        size = _pixel_size(self.table.rows[self._numbers[number]].source)
        layers = self._viewer.layers
        layer = find_layer(layers, self._preview_id) if self._preview_id is not None else None
        if not isinstance(layer, Image):
            layer = Image(plane, name=PREVIEW_NAME, **size)
            self._preview_id = layer.unique_id
            active = layers.selection.active
            layers.append(layer)
            if active is not None:
                layers.selection.active = active
        else:
            layer.data = plane
        if is_new_file:
            layer.scale, layer.units = size["scale"], size["units"]
            layer.contrast_limits = _limits(plane)

    def _on_layer_removed(self, event: Any) -> None:
        if event.value.unique_id == self._preview_id:
            self._preview_id = None
            self.preview.setChecked(False)


def _row(*widgets: QWidget | None) -> QHBoxLayout:
    """Widgets side by side; ``None`` is a gap that takes what is left."""
    row = QHBoxLayout()
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(6)
    for widget in widgets:
        if widget is None:
            row.addStretch()
        else:
            row.addWidget(widget)
    return row


def _pixel_size(source: Source) -> dict[str, Any]:
    """Scale and units of a slice; of a file they aren't known here, and pixels it is."""
    if not isinstance(source, VolumeSource):
        return {"scale": (1.0, 1.0), "units": ("pixel", "pixel")}
    volume, axes = source.volume, source.volume.plane_axes
    return {
        "scale": tuple(volume.scale[axis] for axis in axes),
        "units": tuple(volume.units[axis] for axis in axes),
    }


def _limits(plane: NDArray[Any]) -> tuple[float, float]:
    """Contrast limits that a few outliers don't spoil."""
    finite = plane[np.isfinite(plane)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(finite, (0.2, 99.8)))
    return low, high if high > low else low + 1.0
