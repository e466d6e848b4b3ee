"""What a user does with the Check widget, in napari's own window and without one."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from napari.components import ViewerModel
from napari.utils.notifications import notification_manager
from qtpy.QtCore import QCoreApplication, QEvent, Qt
from qtpy.QtWidgets import QApplication

from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.jobs import check as jobs
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._layers import MARK
from napari_learned_diffusion.widgets.check import CheckWidget

TIMEOUT = 30_000
SIGMA = 8.0

Make = Callable[..., CheckWidget]
Finish = Callable[[CheckWidget], None]


class GatedJobs:
    """The real job behind a gate: while it is closed, the job steps without getting on."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.closed = 0

    def load(self) -> GatedJobs:
        return self

    def check_plane(self, *planes: Any) -> Job[jobs.Check]:
        try:
            self.running.set()
            while not self.gate.wait(0.002):
                yield Progress(0, 1, "waiting")
            return (yield from jobs.check_plane(*planes))
        except GeneratorExit:
            self.closed += 1
            raise


@pytest.fixture
def gated() -> GatedJobs:
    return GatedJobs()


@pytest.fixture
def make(qtbot: Any, gated: GatedJobs) -> Make:
    def make(viewer: Any, *, docked: bool = False) -> CheckWidget:
        widget = CheckWidget(viewer, gated.load)
        if docked:
            viewer.window.add_dock_widget(widget, name="Check the result")
        else:
            qtbot.addWidget(widget)
        return widget

    return make


@pytest.fixture
def finish(qtbot: Any) -> Finish:
    def wait(widget: CheckWidget) -> None:
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)

    return wait


@pytest.fixture
def truth() -> Any:
    """Three slices of 24 × 32 pixels."""
    y, x = np.mgrid[:24, :32]
    return np.stack([100 + 60.0 * ((x + y // 2 + z) // 6 % 2) for z in range(3)])


def _fill(viewer: Any, truth: Any, **keywords: Any) -> Any:
    """Truth, input and result in a viewer; the input."""
    noisy = truth + np.random.default_rng(0).normal(0, SIGMA, truth.shape)
    viewer.add_image(truth, name="truth", **keywords)
    source = viewer.add_image(noisy, name="cells", contrast_limits=(50, 200), **keywords)
    mark = {
        "role": "denoised",
        "source_id": str(source.unique_id),
        "source": "cells",
        "model": "foe-splines",
        "noise": Gaussian(SIGMA).to_dict(),
    }
    viewer.add_image(truth + 0.1, name="cells denoised", metadata={MARK: mark}, **keywords)
    return source


def _check(widget: CheckWidget, finish: Finish) -> None:
    widget.check()
    finish(widget)
    assert not widget.status.is_error, widget.status.text()


def _texts(widget: CheckWidget, name: str) -> list[str]:
    return [cell.text() for cell in widget.cells[name]]


# --- numbers --------------------------------------------------------------------------------------


def test_the_slice_in_view_is_measured_before_and_after(
    model: ViewerModel, make: Make, finish: Finish, truth: Any
) -> None:
    source = _fill(model, truth)
    model.dims.set_point(0, 1)
    widget = make(model)
    assert widget.result.currentText() == "cells denoised"
    assert widget.input.currentText() == "cells"
    assert widget.reference.currentText() == "None"
    _check(widget, finish)
    assert _texts(widget, "Noise (flat areas)")[0] == "8"
    assert _texts(widget, "Lowest") == [f"{source.data[1].min():.4g}", "100.1"]
    assert _texts(widget, "PSNR") == ["–", "–"]
    assert "white noise" in widget.structure.text()
    assert widget.picture._image.image.shape == (11, 11)
    widget.reference.setCurrentIndex(widget.reference.findText("truth"))
    assert _texts(widget, "Noise (flat areas)") == [
        "–",
        "–",
    ]  # what was measured was something else
    _check(widget, finish)
    before, after = (float(text.removesuffix(" dB")) for text in _texts(widget, "PSNR"))
    assert after == pytest.approx(20 * np.log10(60 / 0.1), abs=0.01)
    assert before < 25
    assert float(_texts(widget, "SSIM")[1]) > 0.99


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_layers_of_any_dimension(
    model: ViewerModel, make: Make, finish: Finish, truth: Any, ndim: int
) -> None:
    data = {2: truth[0], 3: truth, 4: np.stack([truth, truth])}[ndim]
    scale = (2, 3, 0.5, 0.7)[-ndim:]
    source = _fill(model, data, scale=scale)
    widget = make(model)
    _check(widget, finish)
    widget.show_residual()
    (residual,) = (layer for layer in model.layers if "residual" in layer.name)
    assert residual.ndim == ndim
    np.testing.assert_allclose(residual.scale, scale)
    low, high = residual.contrast_limits
    assert low == -high < 0
    world = residual.data_to_world((0,) * ndim)
    index = widget._checked.request.source.index
    np.testing.assert_allclose(world, source.data_to_world((*index, 0, 0)))


def test_without_a_result_it_says_what_to_do(model: ViewerModel, make: Make, truth: Any) -> None:
    widget = make(model)
    assert "Denoise a slice or a stack first" in widget.status.text()
    model.add_image(truth)
    assert not widget.check_button.isEnabled()


def test_layers_that_do_not_belong_together(
    model: ViewerModel, make: Make, finish: Finish, truth: Any
) -> None:
    _fill(model, truth)
    model.add_image(np.zeros((9, 9)), name="small")
    widget = make(model)
    widget.reference.setCurrentIndex(widget.reference.findText("small"))
    widget.check()
    assert "another size" in widget.status.text()
    widget.reference.setCurrentIndex(0)
    model.dims.ndisplay = 3
    widget.check()
    assert "2D view" in widget.status.text()
    model.dims.ndisplay = 2
    _check(widget, finish)


def test_a_layer_that_goes_while_it_is_measured(
    qtbot: Any, model: ViewerModel, make: Make, finish: Finish, gated: GatedJobs, truth: Any
) -> None:
    source = _fill(model, truth)
    widget = make(model)
    gated.gate.clear()
    widget.check()
    qtbot.waitUntil(gated.running.is_set, timeout=TIMEOUT)
    model.layers.remove(source)
    finish(widget)
    assert gated.closed == 1
    assert "was removed" in widget.status.text()
    gated.gate.set()
    widget.input.setCurrentIndex(widget.input.findText("truth"))
    _check(widget, finish)


# --- looking --------------------------------------------------------------------------------------


def test_side_by_side_and_back(qtbot: Any, model: ViewerModel, make: Make, truth: Any) -> None:
    _fill(model, truth)
    model.layers["cells"].visible = False
    grid = model.canvas.grid
    grid.shape = (2, 3)
    grid.stride = 2
    widget = make(model)
    qtbot.mouseClick(widget.side_button, Qt.MouseButton.LeftButton)
    assert [layer.visible for layer in model.layers] == [False, True, True]
    assert (grid.enabled, grid.shape, grid.stride) == (True, (1, 2), 1)
    qtbot.mouseClick(widget.side_button, Qt.MouseButton.LeftButton)
    assert [layer.visible for layer in model.layers] == [True, False, True]
    assert (grid.enabled, grid.shape, grid.stride) == (False, (2, 3), 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_the_wipe_shows_both_sides_of_an_edge(
    qtbot: Any, model: ViewerModel, make: Make, finish: Finish, truth: Any, order: Any
) -> None:
    source = _fill(model, truth)
    model.dims.order = order
    model.dims.set_point(0, 2)
    widget = make(model)
    assert not widget.wipe_button.isEnabled()
    _check(widget, finish)
    qtbot.mouseClick(widget.wipe_button, Qt.MouseButton.LeftButton)
    assert model.layers[-1].name == "cells wipe"
    for share in (0.25, 0.75, 0.0, 1.0):
        widget.wipe_slider.setValue(round(1000 * share))
        shown = model.layers[-1].data[0]
        before, after = source.data[2], truth[2] + 0.1
        if order[-1] == 1:
            shown, before, after = shown.T, before.T, after.T
        edge = round(share * shown.shape[1])
        np.testing.assert_allclose(shown[:, :edge], before[:, :edge], rtol=1e-6)
        np.testing.assert_allclose(shown[:, edge:], after[:, edge:], rtol=1e-6)
    qtbot.mouseClick(widget.wipe_button, Qt.MouseButton.LeftButton)
    wipe = model.layers["cells wipe"]
    assert not wipe.visible
    assert widget.input.findText(wipe.name) == -1
    model.dims.set_point(0, 1)
    _check(widget, finish)
    model.add_image(truth, name="on top")
    widget.wipe_button.setChecked(True)
    assert model.layers[-1] is wipe
    assert wipe.visible
    assert wipe.extent.world[0, 0] == wipe.extent.world[1, 0] == 1
    model.layers.remove(wipe)
    assert not widget.wipe_button.isChecked()


def test_the_wipe_of_another_input_takes_the_place_of_the_first(
    model: ViewerModel, make: Make, finish: Finish, truth: Any
) -> None:
    _fill(model, truth)
    widget = make(model)
    _check(widget, finish)
    widget.wipe_button.setChecked(True)
    widget.input.set_key(model.layers["truth"].unique_id)
    assert not model.layers["cells wipe"].visible
    _check(widget, finish)
    widget.wipe_button.setChecked(True)
    wipes = [layer for layer in model.layers if layer.name.endswith("wipe")]
    assert [layer.name for layer in wipes] == ["truth wipe"]


# --- exporting ------------------------------------------------------------------------------------


def test_the_record_is_written_beside_the_result(
    model: ViewerModel, make: Make, finish: Finish, truth: Any, tmp_path: Path
) -> None:
    _fill(model, truth.astype(np.float32), scale=(3, 0.5, 0.5), units=("um",) * 3)
    widget = make(model)
    _check(widget, finish)
    widget.export(tmp_path / "out")
    finish(widget)
    assert widget.status.text() == "Written: out.tif, out.json"
    np.testing.assert_allclose(tifffile.imread(tmp_path / "out.tif"), truth + 0.1, rtol=1e-6)
    record = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert record["layer"] == "cells denoised"
    assert record["model"] == "foe-splines"
    assert record["noise"] == {"key": "gaussian", "noise_sigma": SIGMA}
    assert record["check"]["slice"] == [1]
    assert record["check"]["psnr"] is None
    assert record["check"]["range_kept"] is True
    assert len(record["check"]["autocorrelation"]) == 11


def test_a_folder_that_is_not_there_is_told(
    model: ViewerModel, make: Make, finish: Finish, truth: Any, tmp_path: Path
) -> None:
    notification_manager.records.clear()
    _fill(model, truth)
    widget = make(model)
    widget.export(tmp_path / "nowhere" / "out.tif")
    finish(widget)
    assert widget.status.is_error
    assert widget.export_button.isEnabled()


# --- in the window --------------------------------------------------------------------------------


def test_closing_the_dock_brings_the_layers_back_and_lets_go(
    make_napari_viewer: Any, make: Make, finish: Finish, truth: Any
) -> None:
    viewer = make_napari_viewer()
    _fill(viewer, truth)
    widget = make(viewer, docked=True)
    _check(widget, finish)
    widget.wipe_button.setChecked(True)
    widget.side_button.setChecked(True)
    assert viewer.canvas.grid.enabled
    viewer.window.remove_dock_widget(widget)
    assert not viewer.canvas.grid.enabled
    assert [layer.name for layer in viewer.layers] == ["truth", "cells", "cells denoised"]
    gone = weakref.ref(widget)
    del widget
    gc.collect()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    QApplication.processEvents()
    assert gone() is None
    viewer.add_image(truth)
    viewer.theme = "light"


def test_a_session_through_napari_s_proxy(
    make_napari_viewer_proxy: Any, make: Make, finish: Finish, truth: Any
) -> None:
    viewer = make_napari_viewer_proxy()
    _fill(viewer, truth)
    widget = make(viewer, docked=True)
    _check(widget, finish)
    widget.side_button.setChecked(True)
    assert viewer.canvas.grid.enabled
    widget.wipe_button.setChecked(True)
    assert not viewer.canvas.grid.enabled
    widget.wipe_button.setChecked(False)
    widget.show_residual()
    assert "cells residual (slice)" in [layer.name for layer in viewer.layers]
