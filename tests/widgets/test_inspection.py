"""What a user does with the Inspect widget, in napari's own window and without one."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from napari.components import ViewerModel
from napari.settings import get_settings
from napari.utils.notifications import notification_manager
from npe2 import PluginManifest
from qtpy.QtCore import QCoreApplication, QEvent, Qt
from qtpy.QtWidgets import QApplication

from napari_learned_diffusion.core.errors import DeviceError
from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.core.zoo import card
from napari_learned_diffusion.jobs import inspection as jobs
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._layers import mark_of
from napari_learned_diffusion.widgets.denoise import DenoiseWidget
from napari_learned_diffusion.widgets.inspection import MAPS, InspectionWidget

TIMEOUT = 30_000
SIGMA = 8.0
NAMES = [f"cells iterations {name}" for name in MAPS]

Make = Callable[..., InspectionWidget]
Finish = Callable[[InspectionWidget], None]


class GatedJobs:
    """The real job behind a gate: while it is closed, the job steps without getting on."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.error: Exception | None = None
        self.closed = 0
        self.prepare = jobs.prepare

    def load(self) -> GatedJobs:
        return self

    def inspect_plane(self, plane: Any, **options: Any) -> Job[jobs.Inspection]:
        try:
            self.running.set()
            while not self.gate.wait(0.002):
                yield Progress(0, 1, "waiting")
            if self.error is not None:
                raise self.error
            return (yield from jobs.inspect_plane(plane, **options))
        except GeneratorExit:
            self.closed += 1
            raise


@pytest.fixture
def gated() -> GatedJobs:
    return GatedJobs()


@pytest.fixture
def cells() -> Any:
    """Three slices of 24 × 32 pixels: bars and noise."""
    y, x = np.mgrid[:24, :32]
    bars = 100 + 60 * ((x + y // 2) // 6 % 2)
    noise = np.random.default_rng(0).normal(0, SIGMA, (3, 24, 32))
    return (bars + noise).astype(np.float32)


@pytest.fixture
def make(qtbot: Any, gated: GatedJobs) -> Make:
    """Makes a widget for a viewer, with four iterations of perona-malik set in it."""

    def make(viewer: Any, *, docked: bool = False) -> InspectionWidget:
        widget = InspectionWidget(viewer, gated.load)
        if docked:
            viewer.window.add_dock_widget(widget, name="Inspect diffusivity")
        else:
            qtbot.addWidget(widget)
        widget.settings.set_key("own")
        widget.form.model.set_key("perona-malik")
        widget.form.noise_kind.set_key("gaussian")
        widget.form.noise_sigma.set_value(SIGMA)
        widget.form.device.set_key("cpu")
        widget.count.set_value(4)
        return widget

    return make


@pytest.fixture
def finish(qtbot: Any) -> Finish:
    def wait(widget: InspectionWidget) -> None:
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)

    return wait


@pytest.fixture(autouse=True)
def _no_old_notifications() -> None:
    notification_manager.records.clear()


def _inspect(widget: InspectionWidget, finish: Finish) -> None:
    widget.inspect()
    finish(widget)
    assert not widget.status.is_error, widget.status.text()


# --- layers ---------------------------------------------------------------------------------------


def test_each_map_becomes_a_stack_of_iterations(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells", scale=(3, 0.5, 0.5), units=("um",) * 3)
    model.dims.set_point(0, 3)
    widget = make(model)
    _inspect(widget, finish)
    assert [layer.name for layer in model.layers] == ["cells", *NAMES]
    assert model.dims.axis_labels[0] == "iteration"
    assert model.dims.nsteps == (5, 3, 24, 32)
    denoised, diffusivity = (model.layers[f"cells iterations {n}"] for n in
                             ("denoised", "diffusivity"))  # fmt: skip
    assert denoised.data.shape == (5, 1, 24, 32)
    assert diffusivity.data.shape == (4, 1, 24, 32)
    np.testing.assert_allclose(denoised.data[0, 0], cells[1], rtol=1e-5)
    np.testing.assert_allclose(denoised.scale, (1, 3, 0.5, 0.5))
    np.testing.assert_allclose(denoised.translate, (0, 3, 0, 0))
    np.testing.assert_allclose(diffusivity.translate, (1, 3, 0, 0))
    assert [str(unit) for unit in denoised.units] == ["pixel", *["micrometer"] * 3]
    assert mark_of(denoised)["model"] == "perona-malik"
    assert [layer.visible for layer in model.layers] == [True, False, False, False, True]


def test_what_is_looked_at_and_selected_stays(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    model.add_image(cells, name="other")
    camera = model.scene.camera
    camera.update({"center": (0.0, 5.0, 7.0), "zoom": 40.0})
    model.layers.selection.update({model.layers["cells"], model.layers["other"]})
    seen: list[Any] = []
    model.layers.selection.events.changed.connect(seen.append)
    widget = make(model)
    widget.layer.set_key(model.layers["cells"].unique_id)
    _inspect(widget, finish)
    assert (camera.center, camera.zoom) == ((0.0, 5.0, 7.0), 40.0)
    assert model.layers.selection == {model.layers["cells"], model.layers["other"]}
    assert not seen


def test_maps_of_a_2d_layer(model: ViewerModel, make: Make, finish: Finish, cells: Any) -> None:
    model.add_image(cells[0], name="cells", scale=(2, 1), translate=(5, 6))
    widget = make(model)
    _inspect(widget, finish)
    layer = model.layers["cells iterations flux"]
    assert layer.data.shape == (4, 24, 32)
    np.testing.assert_allclose(layer.translate, (1, 5, 6))
    assert model.dims.ndim == 3


def test_maps_of_a_4d_layer_that_is_turned_in_its_plane(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    data = np.stack([cells, cells + 5])
    angle = np.deg2rad(30)
    turn = np.eye(4)
    turn[2:, 2:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    source = model.add_image(
        data, name="cells", rotate=turn, shear=(0, 0, 0, 0, 0, 0.1), scale=(1, 2, 3, 3)
    )
    model.dims.set_point((0, 1), (1, 4))
    widget = make(model)
    _inspect(widget, finish)
    layer = model.layers["cells iterations denoised"]
    assert layer.data.shape == (5, 1, 1, 24, 32)
    np.testing.assert_allclose(layer.data[0, 0, 0], data[1, 2], rtol=1e-5)
    # A pixel of the maps lies where that of the source does.
    world = layer.data_to_world((3, 0, 0, 5, 7))
    np.testing.assert_allclose(world[0], 3)
    np.testing.assert_allclose(world[1:], source.data_to_world((1, 2, 5, 7)), atol=1e-9)


def test_maps_of_a_4d_layer_that_is_looked_at_from_the_side(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    data = np.stack([cells, cells + 5])
    model.add_image(data, name="cells")
    model.dims.order = (0, 2, 1, 3)
    model.dims.set_point((0, 2), (1, 9))
    widget = make(model)
    _inspect(widget, finish)
    layer = model.layers["cells iterations denoised"]
    assert layer.data.shape == (5, 1, 3, 1, 32)
    np.testing.assert_allclose(layer.data[0, 0, :, 0], data[1, :, 9], rtol=1e-5)
    assert model.dims.order == (0, 1, 3, 2, 4)


def test_another_slice_takes_the_place_of_the_first(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    _inspect(widget, finish)
    model.dims.set_point(1, 2)
    widget.count.set_value(6)
    _inspect(widget, finish)
    layer = model.layers["cells iterations denoised"]
    assert len(model.layers) == 5
    assert layer.data.shape == (7, 1, 24, 32)
    assert layer.translate[1] == 2
    np.testing.assert_allclose(layer.data[0, 0], cells[2], rtol=1e-5)
    widget.count.set_value(2)
    _inspect(widget, finish)
    assert model.dims.nsteps[0] == 3


def test_the_chosen_map_is_the_visible_one(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    _inspect(widget, finish)
    for name in MAPS:
        widget.shown.set_key(name)
        visible = [layer.name for layer in model.layers if layer.visible]
        assert visible == ["cells", f"cells iterations {name}"]


def test_its_own_layers_are_not_offered(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    _inspect(widget, finish)
    assert [widget.layer.itemText(i) for i in range(widget.layer.count())] == ["cells"]


@pytest.mark.parametrize("kind", ["dask", "zarr"])
def test_of_a_lazy_layer_only_the_slice_is_read(
    model: ViewerModel, make: Make, finish: Finish, cells: Any, kind: str
) -> None:
    if kind == "dask":
        data = da.from_array(cells, chunks=(1, 24, 32))
    else:
        data = zarr.array(cells, chunks=(1, 24, 32))
    model.add_image(data, name="cells", contrast_limits=(0, 255))
    model.dims.set_point(0, 2)
    widget = make(model)
    _inspect(widget, finish)
    layer = model.layers["cells iterations denoised"]
    np.testing.assert_allclose(layer.data[0, 0], cells[2], rtol=1e-5)


def test_a_multiscale_layer_is_refused_in_words(model: ViewerModel, make: Make) -> None:
    model.add_image([np.zeros((16, 16)), np.zeros((8, 8))], multiscale=True)
    widget = make(model)
    assert "multiscale" in widget.layer_info.text()
    assert not widget.inspect_button.isEnabled()


def test_two_viewers_keep_apart(qtbot: Any, make: Make, finish: Finish, cells: Any) -> None:
    viewers = ViewerModel(), ViewerModel()
    widgets = []
    for viewer in viewers:
        viewer.add_image(cells, name="cells")
        widgets.append(make(viewer))
    widgets[0].inspect()
    widgets[1].inspect()
    for widget in widgets:
        finish(widget)
    widgets[0].go_to(1)
    widgets[1].go_to(3)
    assert [viewer.dims.point[0] for viewer in viewers] == [1, 3]
    assert [len(viewer.layers) for viewer in viewers] == [5, 5]


# --- the iteration --------------------------------------------------------------------------------


def test_slider_line_and_viewer_show_the_same_iteration(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    _inspect(widget, finish)
    widget.scrubber.setValue(3)
    assert model.dims.point[0] == 3
    assert widget.plot._q.line.value() == 3
    model.dims.set_point(0, 1)
    assert widget.scrubber.value() == 1
    assert widget.scrubber_label.text() == "1 / 4"
    widget.plot._move_to(2.2)
    assert model.dims.point[0] == widget.scrubber.value() == 2
    model.dims.set_point(1, 2)  # another slice, the same iteration
    assert widget.scrubber.value() == 2


def test_both_suggestions_can_be_gone_to(
    qtbot: Any, model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    widget.count.set_value(60)
    _inspect(widget, finish)
    found = widget._answer.found
    for button, expected in (
        (widget.q_button, found.best_by_q),
        (widget.discrepancy_button, found.best_by_discrepancy),
    ):
        assert button.text().endswith(f": {expected}")
        qtbot.mouseClick(button, Qt.MouseButton.LeftButton)
        assert widget.scrubber.value() == expected
        assert model.dims.point[0] == expected


def test_where_less_than_the_noise_is_removed_that_is_said(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    widget.count.set_value(1)
    _inspect(widget, finish)
    assert not widget.discrepancy_button.isEnabled()
    assert "In no iteration" in widget.numbers.text()


def test_automatic_iterations_go_beyond_the_suggested_end(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    widget.count.set_value(None)
    _inspect(widget, finish)
    found = widget._answer.found
    suggested = jobs.prepare(cells, widget.form.values().config()).config.iterations
    assert found.iterations == 2 * suggested
    widget.form.model.set_key("conductance-unet-s")
    _inspect(widget, finish)
    assert widget._answer.found.iterations == card("conductance-unet-s").most_iterations


def test_the_pixel_under_the_cursor_is_followed_through_the_iterations(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells", scale=(1, 0.5, 0.5))
    widget = make(model)
    _inspect(widget, finish)
    model.cursor.position = (0, 0, 5.0, 3.5)
    widget._probe()
    assert widget.probe_info.text().startswith("Pixel 10, 7:")
    for arrow in "↓↑→←":
        assert arrow in widget.probe_info.text()
    x, y = widget.plot._pixel.curve.getData()
    np.testing.assert_allclose(x, range(5))
    np.testing.assert_allclose(y, model.layers["cells iterations denoised"].data[:, 0, 10, 7])
    model.cursor.position = (0, 0, -5.0, 3.5)
    widget._probe()
    assert not widget.probe_info.text()


# --- what it learned ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words", "dots"),
    [
        ("perona-malik", "K = ", 1),
        ("k-automation", "K = ", 1),
        ("foe-splines", "kernels", 8),
        ("unet", "no single curve", 1),
        ("conductance-unet-s", "no single curve", 1),
    ],
)
def test_what_the_model_learned_is_shown_with_the_pixel_on_it(
    model: ViewerModel, make: Make, finish: Finish, cells: Any, key: str, words: str, dots: int
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    widget.form.model.set_key(key)
    widget.count.set_value(2)
    _inspect(widget, finish)
    assert words in widget.learned_info.text()
    model.cursor.position = (0, 0, 10, 7)
    widget._probe()
    plot = widget.learned_plot
    assert len(plot._dots) == dots
    assert all(len(dot.getData()[0]) for dot in plot._dots)
    assert widget.learned_probe.text().startswith("Pixel 10, 7:")
    before = [dot.getData() for dot in plot._dots]
    widget.go_to(1)
    assert any(not np.array_equal(b, d.getData()) for b, d in zip(before, plot._dots, strict=True))
    model.cursor.position = (0, 0, -10, 7)
    widget._probe()
    assert not any(len(dot.getData()[0]) for dot in plot._dots)


def test_models_take_turns_in_the_plot_and_themes_redraw_it(
    make_napari_viewer: Any, make: Make, finish: Finish, cells: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(cells, name="cells")
    widget = make(viewer, docked=True)
    for key, count in (("foe-decreasing", 3), ("perona-malik", 1), ("unet", 2)):
        widget.form.model.set_key(key)
        widget.count.set_value(count)
        _inspect(widget, finish)
    viewer.theme = "light"
    assert widget.learned_plot._image is not None
    assert widget.learned_plot._histogram is None


# --- settings, there and back ---------------------------------------------------------------------


def test_the_settings_of_the_denoise_form_hold_and_get_the_iteration_back(
    qtbot: Any, make_napari_viewer: Any, make: Make, finish: Finish, cells: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(cells, name="cells")
    denoise = DenoiseWidget(viewer)
    viewer.window.add_dock_widget(denoise, name="Denoise by diffusion")
    denoise.form.model.set_key("foe-splines")
    denoise.form.noise_kind.set_key("gaussian")
    denoise.form.noise_sigma.set_value(2 * SIGMA)
    denoise.form.residual.setChecked(True)
    widget = make(viewer, docked=True)
    widget.settings.set_key("denoise")
    _inspect(widget, finish)
    config = widget._answer.found.prepared.config
    assert config.model == "foe-splines"
    assert config.noise == Gaussian(2 * SIGMA)
    widget.go_to(3)
    qtbot.mouseClick(widget.use_button, Qt.MouseButton.LeftButton)
    assert denoise.form.iterations.whole_value() == 3
    assert denoise.form.residual.isChecked()
    assert denoise.form.model.key() == "foe-splines"


def test_without_the_denoise_form_all_is_automatic(model: ViewerModel, make: Make) -> None:
    widget = make(model)
    widget.settings.set_key("denoise")
    assert widget.values().config().changed() == {}
    assert not widget.form.isEnabled()


def test_the_denoise_form_is_opened_for_the_iteration(
    make_napari_viewer: Any, npe2pm: Any, make: Make, finish: Finish, cells: Any
) -> None:
    npe2pm.register(PluginManifest.from_distribution("napari-learned-diffusion"))
    viewer = make_napari_viewer()
    viewer.add_image(cells, name="cells")
    viewer.add_image(cells, name="others")
    viewer.layers.selection.active = viewer.layers["cells"]
    widget = make(viewer, docked=True)
    _inspect(widget, finish)
    widget.go_to(2)
    viewer.layers.selection.active = viewer.layers["others"]
    widget.use_iteration()
    (denoise,) = viewer.window._qt_window.findChildren(DenoiseWidget)
    assert denoise.form.iterations.whole_value() == 2
    assert denoise.form.model.key() == "perona-malik"
    assert denoise.form.noise_sigma.value() == SIGMA
    assert denoise.form.layer.currentText() == "cells"
    widget.go_to(3)
    widget.use_iteration()
    assert denoise.form.iterations.whole_value() == 3
    assert len(viewer.window._qt_window.findChildren(DenoiseWidget)) == 1


def test_of_fed_the_stopping_time_is_handed_over(
    make_napari_viewer: Any, make: Make, finish: Finish, cells: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(cells, name="cells")
    denoise = DenoiseWidget(viewer)
    viewer.window.add_dock_widget(denoise, name="Denoise by diffusion")
    widget = make(viewer, docked=True)
    widget.form.scheme.set_key("fed")
    widget.count.set_value(None)
    _inspect(widget, finish)
    widget.go_to(5)
    widget.use_iteration()
    expected = widget._answer.found.times[5]
    assert denoise.form.stopping_time.value() == pytest.approx(expected, rel=1e-4)
    assert denoise.form.iterations.value() is None


# --- trouble --------------------------------------------------------------------------------------


def test_without_an_image_it_says_what_to_do(model: ViewerModel, make: Make, cells: Any) -> None:
    widget = make(model)
    assert "Open an image" in widget.layer_info.text()
    assert not widget.inspect_button.isEnabled()
    model.add_labels(np.zeros((8, 9), int), name="cells")
    assert "labels" in widget.layer_info.text()
    model.layers.clear()
    model.add_image(cells)
    assert widget.inspect_button.isEnabled()
    model.dims.ndisplay = 3
    assert "2D view" in widget.layer_info.text()
    assert not widget.inspect_button.isEnabled()


@pytest.mark.parametrize("change", ["removed", "new data", "cancelled"])
def test_a_layer_that_goes_while_it_is_inspected(
    qtbot: Any,
    model: ViewerModel,
    make: Make,
    finish: Finish,
    gated: GatedJobs,
    cells: Any,
    change: str,
) -> None:
    layer = model.add_image(cells, name="cells")
    widget = make(model)
    gated.gate.clear()
    widget.inspect()
    qtbot.waitUntil(gated.running.is_set, timeout=TIMEOUT)
    if change == "removed":
        model.layers.remove(layer)
    elif change == "new data":
        layer.data = cells[:, :9, :10].astype(np.uint8)
    else:
        qtbot.mouseClick(widget.cancel_button, Qt.MouseButton.LeftButton)
    finish(widget)
    assert gated.closed == 1
    assert widget.status.text().startswith("Cancelled")
    assert len(model.layers) == (change != "removed")
    gated.gate.set()
    if change == "removed":
        model.add_image(cells, name="cells")
    _inspect(widget, finish)
    assert len(model.layers) == 5


def test_an_error_is_told_and_the_form_lives_on(
    model: ViewerModel, make: Make, finish: Finish, gated: GatedJobs, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    gated.error = DeviceError("There is too little memory.")
    widget.inspect()
    finish(widget)
    assert widget.status.is_error
    assert "too little memory" in widget.status.text()
    assert len(notification_manager.records) == 1
    gated.error = None
    widget.form.iterations.set_value(2)
    _inspect(widget, finish)


def test_layers_taken_away_by_the_user_are_not_missed(
    model: ViewerModel, make: Make, finish: Finish, cells: Any
) -> None:
    model.add_image(cells, name="cells")
    widget = make(model)
    _inspect(widget, finish)
    for name in NAMES:
        model.layers.remove(name)
        widget.shown.set_key("flux")
        widget.go_to(1)
        model.cursor.position = (0,) * model.dims.ndim
        widget._probe()
    assert widget.scrubber.value() == 1
    _inspect(widget, finish)
    assert len(model.layers) == 5


# --- in the window --------------------------------------------------------------------------------


def test_a_session_through_napari_s_proxy(
    qtbot: Any, make_napari_viewer_proxy: Any, npe2pm: Any, make: Make, finish: Finish, cells: Any
) -> None:
    npe2pm.register(PluginManifest.from_distribution("napari-learned-diffusion"))
    viewer = make_napari_viewer_proxy()
    viewer.add_image(cells, name="cells", scale=(4, 1, 2))
    widget = make(viewer, docked=True)
    qtbot.mouseClick(widget.inspect_button, Qt.MouseButton.LeftButton)
    finish(widget)
    assert [layer.name for layer in viewer.layers] == ["cells", *NAMES]
    widget.scrubber.setValue(1)
    assert viewer.dims.point[0] == 1
    widget.use_iteration()
    widget.go_to(2)
    widget.use_iteration()
    titles = [name for name in viewer.window.dock_widgets if "Denoise" in name]
    assert len(titles) == 1


def test_closing_the_dock_ends_the_run_and_lets_go_of_the_widget(
    qtbot: Any, make_napari_viewer: Any, make: Make, finish: Finish, gated: GatedJobs, cells: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(cells, name="cells")
    widget = make(viewer, docked=True)
    gated.gate.clear()
    widget.inspect()
    qtbot.waitUntil(gated.running.is_set, timeout=TIMEOUT)
    viewer.window.remove_dock_widget(widget)
    finish(widget)
    assert gated.closed == 1
    gone = weakref.ref(widget)
    del widget
    gc.collect()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    QApplication.processEvents()
    assert gone() is None
    viewer.dims.set_point(0, 1)
    viewer.cursor.position = (0, 1, 1)
    viewer.theme = "light"


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_it_takes_no_more_than_a_third_of_a_small_screen(
    qtbot: Any, make_napari_viewer: Any, make: Make, finish: Finish, cells: Any, scale: float
) -> None:
    viewer = make_napari_viewer(show=True)
    appearance = get_settings().appearance
    appearance.font_size = math.ceil(scale * appearance.font_size)
    viewer.window.resize(1280, 800)
    viewer.add_image(cells, name="a layer with a rather long name, as files often have")
    widget = make(viewer, docked=True)
    _inspect(widget, finish)
    window = viewer.window._qt_window
    QApplication.processEvents()
    assert widget.parent().minimumSizeHint().width() >= widget.minimumSizeHint().width()
    assert window.width() <= 1280
    assert window.height() <= 800
    assert widget.width() <= 1280 / 3
    for at in range(widget.tabs.count()):
        widget.tabs.setCurrentIndex(at)
        QApplication.processEvents()
        page = widget.tabs.widget(at)
        assert page.widget().width() <= page.viewport().width()
