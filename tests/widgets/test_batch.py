"""What a user does with the batch widget, on a real viewer and with the real job."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
from napari.settings import get_settings
from napari.utils.notifications import notification_manager
from npe2 import PluginManifest
from numpy.typing import NDArray
from qtpy.QtCore import QCoreApplication, QEvent, QMimeData, QPoint, QPointF, QRect, Qt, QUrl
from qtpy.QtGui import QDesktopServices, QDropEvent
from qtpy.QtWidgets import QAbstractButton, QApplication, QFileDialog, QLabel, QScrollArea

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import Volume, read, write
from napari_learned_diffusion.jobs import batch as batch_module
from napari_learned_diffusion.jobs.batch_sources import Source, VolumeSource
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._batch_table import MESSAGE, NOISE, SLICES, STATE, BatchTable
from napari_learned_diffusion.widgets.batch import PREVIEW_NAME, BatchWidget

TIMEOUT = 60_000
SLICES_OF_A_SCAN = 4


class HeldJobs:
    """The real job, which stands still after so many slices as long as the gate is shut."""

    BatchConfig = batch_module.BatchConfig

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.hold_after = 1
        self.planes = self.closed = 0

    def load(self) -> HeldJobs:
        return self

    def hold(self, after: int = 1) -> None:
        """Stand still after so many slices more."""
        self.planes, self.hold_after = 0, after
        self.gate.clear()

    def denoise_batch(self, *given: Any, **options: Any) -> Job[Any]:
        job = batch_module.denoise_batch(*given, **options)
        try:
            while True:
                try:
                    progress = next(job)
                except StopIteration as stop:
                    return stop.value
                yield progress
                self.planes += progress.plane is not None
                while self.planes >= self.hold_after and not self.gate.wait(0.002):
                    yield Progress(progress.done, progress.total, "Held")
        except GeneratorExit:
            job.close()
            self.closed += 1  # last, since tests then look at what closing has written
            raise


def noisy(shape: tuple[int, ...] = (SLICES_OF_A_SCAN, 24, 32), seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(100, 8, shape).round().astype("int16")


def save(path: Path, seed: int = 0, shape: tuple[int, ...] = (SLICES_OF_A_SCAN, 24, 32)) -> Path:
    data = noisy(shape, seed)
    axes = "TZYX"[-data.ndim :]
    volume = Volume(data, axes, (2.0,) * data.ndim, ("micrometer",) * data.ndim, "a")
    return write(path, volume, overwrite=True)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of two stacks, and one below it."""
    folder = tmp_path / "scans"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.tif", "b.mrc", "more/c.tif")):
        save(folder / name, seed)
    return folder


@pytest.fixture(autouse=True)
def _fresh_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchWidget, "remembered_out", "")
    notification_manager.records.clear()


@pytest.fixture
def jobs() -> Iterator[HeldJobs]:
    jobs = HeldJobs()
    yield jobs
    jobs.gate.set()


@pytest.fixture
def viewer(make_napari_viewer: Any) -> Any:
    return make_napari_viewer()


@pytest.fixture
def widget(viewer: Any, jobs: HeldJobs) -> BatchWidget:
    """The widget in the viewer's dock, set to be quick."""
    return dock(viewer, jobs)


def dock(viewer: Any, jobs: HeldJobs) -> BatchWidget:
    widget = BatchWidget(viewer, jobs.load)
    widget.form.model.set_key("perona-malik")
    widget.form.noise_kind.set_key("gaussian")
    widget.form.noise_sigma.set_value(8)
    widget.form.iterations.set_value(2)
    viewer.window.add_dock_widget(widget, name="Denoise a batch", area="right")
    return widget


Finish = Callable[[BatchWidget], None]


@pytest.fixture
def finish(qtbot: Any) -> Finish:
    def wait(widget: BatchWidget) -> None:
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)

    return wait


@pytest.fixture
def add(finish: Finish) -> Callable[..., None]:
    def add_paths(widget: BatchWidget, *paths: Path) -> None:
        widget.add_paths(paths)
        finish(widget)

    return add_paths


def click(qtbot: Any, button: QAbstractButton) -> None:
    assert button.isEnabled(), button.text()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def column(widget: BatchWidget, number: int) -> list[str]:
    return [row.cells()[number] for row in widget.table.rows]


def names(widget: BatchWidget) -> list[str]:
    return column(widget, 0)


# --- the list -------------------------------------------------------------------------------------


def test_an_empty_widget_offers_only_what_makes_sense(widget: BatchWidget) -> None:
    for button in (
        widget.start_button,
        widget.pause_button,
        widget.cancel_button,
        widget.retry_button,
        widget.remove_button,
        widget.clear_button,
        widget.log_button,
    ):
        assert not button.isEnabled()
    assert not widget.form.layer.isVisibleTo(widget)
    assert not widget.form.denoised.isVisibleTo(widget)
    assert not widget.form.estimate_button.isVisibleTo(widget)


def test_files_and_folders_are_chosen_in_dialogs(
    qtbot: Any,
    widget: BatchWidget,
    scans: Path,
    tmp_path: Path,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = save(tmp_path / "alone.tif", 5)
    monkeypatch.setattr(QFileDialog, "getOpenFileNames", lambda *_, **__: ([str(alone)], ""))
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_, **__: str(scans))
    click(qtbot, widget.files_button)
    finish(widget)
    assert widget.out.text() == str(tmp_path / "denoised")
    click(qtbot, widget.folder_button)
    finish(widget)
    assert names(widget) == ["alone.tif", "a.tif", "b.mrc", "more/c.tif"]
    click(qtbot, widget.folder_button)
    finish(widget)
    assert len(widget.table.rows) == 4
    assert "3 on the list already" in widget.status.text()
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_, **__: "")
    click(qtbot, widget.out_button)
    assert widget.out.text() == str(tmp_path / "denoised")
    monkeypatch.setattr(QFileDialog, "getExistingDirectory", lambda *_, **__: str(tmp_path / "x"))
    click(qtbot, widget.out_button)
    assert widget.out.text() == str(tmp_path / "x")


def test_paths_added_one_after_the_other_are_all_found(
    widget: BatchWidget, scans: Path, tmp_path: Path, finish: Finish
) -> None:
    widget.add_paths([scans])
    widget.add_paths([save(tmp_path / "d.tif")])
    finish(widget)
    assert names(widget) == ["a.tif", "b.mrc", "more/c.tif", "d.tif"]
    assert widget.out.text() == str(tmp_path / "scans denoised")


def test_files_can_be_dropped_on_the_table(
    widget: BatchWidget, scans: Path, finish: Finish
) -> None:
    dragged = QMimeData()
    dragged.setUrls([QUrl.fromLocalFile(str(scans)), QUrl("https://example.org/a.tif")])
    event = QDropEvent(
        QPointF(5, 5),
        Qt.DropAction.CopyAction,
        dragged,
        Qt.MouseButton.LeftButton,
        Qt.KeyboardModifier.NoModifier,
    )
    widget.view.dropEvent(event)
    finish(widget)
    assert len(widget.table.rows) == 3


def test_a_folder_without_images_is_told_in_the_form(
    widget: BatchWidget, tmp_path: Path, add: Any
) -> None:
    (tmp_path / "empty").mkdir()
    add(widget, tmp_path / "empty")
    assert widget.status.is_error
    assert "holds no image" in widget.status.text()


def test_rows_are_removed_and_cleared(
    qtbot: Any, widget: BatchWidget, scans: Path, add: Any
) -> None:
    add(widget, scans)
    widget.view.selectRow(1)
    assert str(scans / "b.mrc") in widget.details.text()
    click(qtbot, widget.remove_button)
    assert names(widget) == ["a.tif", "more/c.tif"]
    click(qtbot, widget.clear_button)
    assert not widget.table.rows
    assert (scans / "b.mrc").exists()


def test_equal_names_get_folders_or_numbers() -> None:
    table = BatchTable()
    volume = Volume(noisy(), "ZYX", (1.0,) * 3, ("pixel",) * 3, "cells")
    table.add([Source(Path("x/a.tif"), "a.tif"), Source(Path("y/a.tif"), "a.tif")])
    table.add([VolumeSource(Path("a.ome.tif"), "a.ome.tif", volume)])
    assert table.add([Source(Path("x/a.tif"), "a.tif")]) == 0
    table.add([Source(Path("z/y/a.tif"), "a.tif")])
    assert [row.source.name for row in table.rows] == [
        "a.tif",
        "y/a.tif",
        "a.ome.tif",
        "y/a 2.tif",
    ]


# --- a run ----------------------------------------------------------------------------------------


def test_a_folder_with_a_broken_file_then_again_then_mended(
    qtbot: Any, widget: BatchWidget, scans: Path, tmp_path: Path, add: Any, finish: Finish
) -> None:
    broken = scans / "broken.tif"
    broken.write_bytes((scans / "a.tif").read_bytes()[:400])
    add(widget, scans)
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["done", "done", "failed", "done"]
    assert column(widget, SLICES)[0] == f"{SLICES_OF_A_SCAN} / {SLICES_OF_A_SCAN}"
    removed, noise = (float(level) for level in column(widget, NOISE)[0].split(" of "))
    assert noise > removed > 0
    assert "3 done, 0 skipped, 1 failed" in widget.status.text()
    assert widget.status.is_error
    assert str(broken) in widget.details.text()  # the failed row is chosen
    assert widget.details.is_error
    out = tmp_path / "scans denoised"
    result = read(out / "more" / "c.tif")
    assert (result.axes, result.scale) == ("ZYX", (2.0,) * 3)
    assert result.data.std() < noisy(seed=2).std()

    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["skipped", "skipped", "failed", "skipped"]

    save(broken, 9)
    click(qtbot, widget.retry_button)
    finish(widget)
    assert column(widget, STATE) == ["skipped", "skipped", "done", "skipped"]
    assert widget.status.text().startswith("1 done, 0 skipped, 0 failed")
    assert not widget.retry_button.isEnabled()
    events = [json.loads(line)["event"] for line in (out / "batch.jsonl").read_text().splitlines()]
    assert events.count("summary") == 3


def test_only_failed_ones_again(
    qtbot: Any, widget: BatchWidget, scans: Path, add: Any, finish: Finish
) -> None:
    add(widget, scans)
    widget.only_failed.setChecked(True)
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["skipped"] * 3
    assert set(column(widget, MESSAGE)) == {"It hasn't failed before."}


def test_overwriting_needs_leave_and_formats_can_be_chosen(
    qtbot: Any, widget: BatchWidget, scans: Path, tmp_path: Path, add: Any, finish: Finish
) -> None:
    add(widget, scans / "a.tif")
    widget.format.set_key("mrc")
    widget.out.setText(str(tmp_path / "out"))
    click(qtbot, widget.start_button)
    finish(widget)
    assert (tmp_path / "out" / "a.mrc").exists()
    widget.form.iterations.set_value(1)
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["failed"]
    assert "allow overwriting" in column(widget, MESSAGE)[0]
    widget.overwrite.setChecked(True)
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["done"]


def test_cancel_keeps_the_slices_that_are_done(
    qtbot: Any,
    widget: BatchWidget,
    jobs: HeldJobs,
    scans: Path,
    tmp_path: Path,
    add: Any,
    finish: Finish,
) -> None:
    add(widget, scans)
    jobs.hold(after=SLICES_OF_A_SCAN + 2)
    click(qtbot, widget.start_button)
    qtbot.waitUntil(lambda: column(widget, SLICES)[1] == "2 / 4", timeout=TIMEOUT)
    for control in (widget.files_button, widget.clear_button, widget.form, widget.out):
        assert not control.isEnabled()
    click(qtbot, widget.cancel_button)
    finish(widget)
    assert jobs.closed == 1
    # The first one's result may not have been told of, and the third may have been opened.
    assert column(widget, STATE)[0] in {"done", "stopped"}
    assert column(widget, STATE)[1] == "stopped"
    assert column(widget, STATE)[2] in {"stopped", "waiting"}
    assert "Goes on from here" in column(widget, MESSAGE)[1]
    jobs.gate.set()
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE)[0] in {"skipped", "done"}
    assert column(widget, STATE)[1:] == ["done", "done"]
    log = (tmp_path / "scans denoised" / "batch.jsonl").read_text()
    assert any(line.get("resumed", 0) >= 2 for line in map(json.loads, log.splitlines()))


def test_pause_holds_and_resume_goes_on(
    qtbot: Any, widget: BatchWidget, jobs: HeldJobs, scans: Path, add: Any, finish: Finish
) -> None:
    add(widget, scans)
    jobs.hold(after=2)
    click(qtbot, widget.start_button)
    qtbot.waitUntil(lambda: column(widget, SLICES)[0] == "2 / 4", timeout=TIMEOUT)
    click(qtbot, widget.pause_button)
    assert widget.pause_button.text() == "Resume"
    jobs.gate.set()
    qtbot.wait(300)
    planes = jobs.planes
    assert planes < 3 * SLICES_OF_A_SCAN
    assert widget.status.text() == "Paused."
    click(qtbot, widget.pause_button)
    finish(widget)
    assert jobs.planes == 3 * SLICES_OF_A_SCAN
    assert column(widget, STATE) == ["done"] * 3
    assert widget.pause_button.text() == "Pause"


def test_a_paused_batch_can_be_cancelled(
    qtbot: Any, widget: BatchWidget, jobs: HeldJobs, scans: Path, add: Any, finish: Finish
) -> None:
    add(widget, scans)
    jobs.hold()
    click(qtbot, widget.start_button)
    qtbot.waitUntil(lambda: jobs.planes >= 1, timeout=TIMEOUT)
    click(qtbot, widget.pause_button)
    click(qtbot, widget.cancel_button)
    finish(widget)
    assert not widget.pause_button.isChecked()
    assert not widget.status.is_error


def test_a_bad_output_folder_is_told_in_the_form(
    qtbot: Any, widget: BatchWidget, scans: Path, tmp_path: Path, add: Any, finish: Finish
) -> None:
    add(widget, scans)
    widget.out.setText("")
    click(qtbot, widget.start_button)
    assert "Choose an output folder" in widget.status.text()
    (tmp_path / "file").write_text("")
    widget.out.setText(str(tmp_path / "file"))
    assert not widget.status.text()
    click(qtbot, widget.start_button)
    finish(widget)
    assert widget.status.is_error
    assert "can't be written" in widget.status.text()
    assert column(widget, STATE) == ["waiting"] * 3
    assert widget.start_button.isEnabled()


def test_settings_out_of_range_are_told_in_the_form(
    qtbot: Any, widget: BatchWidget, scans: Path, add: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise FileFormatError("no such setting")

    add(widget, scans)
    monkeypatch.setattr(type(widget.form.values()), "config", refuse)
    click(qtbot, widget.start_button)
    assert widget.status.text() == "no such setting"
    assert not widget.is_working


def test_the_output_folder_is_remembered_and_the_log_can_be_found(
    qtbot: Any,
    viewer: Any,
    widget: BatchWidget,
    jobs: HeldJobs,
    scans: Path,
    tmp_path: Path,
    add: Any,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    add(widget, scans / "a.tif")
    widget.out.setText(str(tmp_path / "results"))
    click(qtbot, widget.start_button)
    finish(widget)
    monkeypatch.setattr(
        QDesktopServices, "openUrl", lambda url: bool(opened.append(url.toLocalFile()))
    )
    click(qtbot, widget.log_button)
    assert opened == [str(tmp_path / "results")]
    assert str(tmp_path / "results" / "batch.jsonl") in widget.status.text()
    assert dock(viewer, jobs).out.text() == str(tmp_path / "results")


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_lazy", [False, True], ids=["numpy", "dask"])
def test_layers_are_denoised_to_files(
    qtbot: Any, viewer: Any, widget: BatchWidget, tmp_path: Path, finish: Finish, is_lazy: bool
) -> None:
    data = noisy()
    layer = viewer.add_image(
        da.from_array(data, chunks=(1, 24, 32)) if is_lazy else data,
        name="cells: raw/1",
        scale=(3, 0.5, 0.5),
        units=("um",) * 3,
    )
    click(qtbot, widget.layers_button)
    assert names(widget) == ["cells_ raw_1.tif"]
    if not is_lazy:
        assert widget.table.rows[0].source.read().data is layer.data
    click(qtbot, widget.start_button)
    assert "Choose an output folder" in widget.status.text()
    widget.out.setText(str(tmp_path / "out"))
    widget.preview.setChecked(True)
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["done"]
    result = read(tmp_path / "out" / "cells_ raw_1.tif")
    assert result.scale == (3.0, 0.5, 0.5)
    assert result.data.dtype == data.dtype
    assert result.data.std() < data.std()
    assert tuple(viewer.layers[PREVIEW_NAME].scale) == (0.5, 0.5)
    assert viewer.layers[PREVIEW_NAME].units == layer.units[1:]
    np.testing.assert_array_equal(layer.data, data)
    click(qtbot, widget.start_button)
    finish(widget)
    assert column(widget, STATE) == ["skipped"]
    layer.data = noisy(seed=1)
    click(qtbot, widget.clear_button)
    click(qtbot, widget.layers_button)
    click(qtbot, widget.start_button)
    finish(widget)
    assert "allow overwriting" in column(widget, MESSAGE)[0]  # other content under the same name


def test_what_is_no_image_is_refused(qtbot: Any, viewer: Any, widget: BatchWidget) -> None:
    click(qtbot, widget.layers_button)
    assert "Select one or more image layers" in widget.status.text()
    viewer.add_labels(np.zeros((8, 9), int), name="cells")
    click(qtbot, widget.layers_button)
    assert widget.status.is_error
    assert "labels" in widget.status.text()


# --- the preview ----------------------------------------------------------------------------------


def test_the_preview_shows_slices_at_most_twice_a_second(
    qtbot: Any,
    viewer: Any,
    widget: BatchWidget,
    tmp_path: Path,
    add: Any,
    finish: Finish,
) -> None:
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.tif", 1, (40, 24, 32))
    save(tmp_path / "in" / "b.tif", 2, (20, 12, 16))
    add(widget, tmp_path / "in")
    widget.preview.setChecked(True)
    shown: list[tuple[int, ...]] = []
    viewer.layers.events.inserted.connect(
        lambda event: event.value.events.data.connect(lambda e: shown.append(e.source.data.shape))
    )
    begun = time.monotonic()
    click(qtbot, widget.start_button)
    finish(widget)
    seconds = time.monotonic() - begun
    (layer,) = viewer.layers
    assert layer.name == PREVIEW_NAME
    assert len(shown) <= 2 * seconds + 1
    assert layer.data.shape == (12, 16)  # the last one is shown in any case
    click(qtbot, widget.start_button)  # all is skipped, and the picture stays
    finish(widget)
    assert len(viewer.layers) == 1
    viewer.layers.clear()
    assert not widget.preview.isChecked()


def test_unchecking_the_preview_takes_it_away(
    qtbot: Any, viewer: Any, widget: BatchWidget, jobs: HeldJobs, scans: Path, add: Any
) -> None:
    add(widget, scans)
    widget.preview.setChecked(True)
    jobs.hold(after=2)
    click(qtbot, widget.start_button)
    qtbot.waitUntil(lambda: PREVIEW_NAME in viewer.layers, timeout=TIMEOUT)
    widget.preview.setChecked(False)
    assert PREVIEW_NAME not in viewer.layers
    widget.cancel()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)


# --- opening, closing, and looks ------------------------------------------------------------------


def test_napari_opens_the_widget_and_torch_stays_out(make_napari_viewer: Any, npe2pm: Any) -> None:
    npe2pm.register(PluginManifest.from_distribution("napari-learned-diffusion"))
    _, widget = make_napari_viewer().window.add_plugin_dock_widget(
        "napari-learned-diffusion", "Denoise a batch"
    )
    assert isinstance(widget, BatchWidget)
    code = "import sys, napari_learned_diffusion.widgets.batch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_closing_the_viewer_stops_the_batch(
    qtbot: Any, make_napari_viewer: Any, jobs: HeldJobs, scans: Path, tmp_path: Path, add: Any
) -> None:
    viewer = make_napari_viewer(show=True)
    widget = dock(viewer, jobs)
    add(widget, scans)
    jobs.hold()
    widget.start()
    qtbot.waitUntil(lambda: jobs.planes >= 1, timeout=TIMEOUT)
    viewer.close()
    qtbot.waitUntil(lambda: jobs.closed == 1, timeout=TIMEOUT)
    assert "stopped" in (tmp_path / "scans denoised" / "batch.jsonl").read_text()


@pytest.mark.parametrize("is_paused", [False, True])
def test_closing_the_dock_stops_the_batch(
    qtbot: Any,
    viewer: Any,
    jobs: HeldJobs,
    scans: Path,
    add: Any,
    finish: Finish,
    is_paused: bool,
) -> None:
    widget = dock(viewer, jobs)
    add(widget, scans)
    widget.preview.setChecked(True)
    jobs.hold()
    widget.start()
    qtbot.waitUntil(lambda: len(viewer.layers) == 1, timeout=TIMEOUT)
    widget.pause_button.setChecked(is_paused)
    viewer.window.remove_dock_widget(widget)
    finish(widget)
    assert jobs.closed == 1
    assert not viewer.layers
    gone = weakref.ref(widget)
    del widget
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    QApplication.processEvents()
    gc.collect()
    assert gone() is None  # nothing in the viewer holds on to it
    viewer.theme = "light"


@pytest.mark.parametrize(("theme", "scale"), [("dark", 1.0), ("light", 1.0), ("dark", 1.25)])
def test_nothing_is_clipped_at_1280_by_800(
    make_napari_viewer: Any, jobs: HeldJobs, scans: Path, add: Any, theme: str, scale: float
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.theme = theme
    appearance = get_settings().appearance
    appearance.font_size = math.ceil(scale * appearance.font_size)
    viewer.window.resize(1280, 800)
    widget = dock(viewer, jobs)
    add(widget, scans)
    widget.view.selectRow(0)
    widget.status.show_error("A rather long sentence about what went wrong, and what helps. " * 2)
    QApplication.processEvents()
    window, scroll = viewer.window._qt_window, widget.findChild(QScrollArea)
    assert window.width() <= 1280
    assert window.height() <= 800
    assert widget.form.width() <= scroll.viewport().width()
    for child in (*widget.findChildren(QAbstractButton), *widget.findChildren(QLabel)):
        if not child.isVisible() or scroll.isAncestorOf(child) or widget.view.isAncestorOf(child):
            continue
        assert widget.rect().contains(QRect(child.mapTo(widget, QPoint(0, 0)), child.size()))
        assert child.width() >= child.minimumSizeHint().width(), child.text()


def test_every_control_and_cell_explains_itself(widget: BatchWidget, scans: Path, add: Any) -> None:
    add(widget, scans)
    for button in widget.findChildren(QAbstractButton):
        if button.isVisibleTo(widget) and not widget.form.isAncestorOf(button) and button.text():
            assert button.toolTip(), button.text()
    table = widget.table
    for number in range(table.columnCount()):
        role = Qt.ItemDataRole.ToolTipRole
        assert table.headerData(number, Qt.Orientation.Horizontal, role)
        assert str(scans / "a.tif") in table.data(table.index(0, number), role)
