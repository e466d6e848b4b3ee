"""What a user does with the widget, from choosing a layer to closing the window."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dask.array as da
import numpy as np
import pytest
from napari.components import ViewerModel
from napari.utils.notifications import notification_manager
from qtpy.QtWidgets import QApplication

from napari_learned_diffusion.config import MapsConfig
from napari_learned_diffusion.core.errors import DeviceError, InvalidImageError
from napari_learned_diffusion.core.noise import Correlated, Gaussian, PoissonGaussian, Rician
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.widgets._layers import MARK, Placement
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

TIMEOUT = 20_000

Make = Callable[[Any], DenoiseWidget]
Finish = Callable[[DenoiseWidget], None]


def _names(viewer: Any) -> list[str]:
    return [layer.name for layer in viewer.layers]


def _warnings() -> list[str]:
    return [note.message for note in notification_manager.records]


@pytest.fixture(autouse=True)
def _no_old_notifications() -> None:
    notification_manager.records.clear()


# --- choosing -------------------------------------------------------------------------------------


def test_without_layers_the_widget_says_what_to_do(model: ViewerModel, make_widget: Make) -> None:
    widget = make_widget(model)
    assert "Open an image" in widget.form.layer_info.text()
    for button in (widget.slice_button, widget.stack_button, widget.form.estimate_button):
        assert not button.isEnabled()


def test_the_active_layer_is_chosen_and_the_choice_stays(
    model: ViewerModel, make_widget: Make, stack: Any
) -> None:
    first = model.add_image(stack, name="first")
    model.add_image(stack, name="second")
    model.layers.selection.active = first
    widget = make_widget(model)
    assert widget.form.layer.currentText() == "first"
    model.add_image(stack, name="third")
    model.layers.move(0, 3)
    assert widget.form.layer.currentText() == "first"
    first.name = "renamed"
    assert widget.form.layer.currentText() == "renamed"
    model.layers.remove(first)
    assert widget.form.layer.currentText() == "third"


def test_a_first_layer_is_chosen_when_it_comes(
    model: ViewerModel, make_widget: Make, stack: Any
) -> None:
    widget = make_widget(model)
    model.add_image(stack, name="late")
    assert widget.form.layer.currentText() == "late"
    assert widget.stack_button.isEnabled()


@pytest.mark.parametrize("kind", ["rgb", "labels", "bool", "multiscale"])
def test_what_cannot_be_denoised_is_said_at_once(
    model: ViewerModel, make_widget: Make, kind: str
) -> None:
    if kind == "rgb":
        model.add_image(np.zeros((8, 9, 3), np.uint8), rgb=True)
    elif kind == "labels":
        model.add_labels(np.zeros((8, 9), int))
    elif kind == "bool":
        model.add_image(np.zeros((8, 9), bool))
    else:
        model.add_image([np.zeros((16, 16)), np.zeros((8, 8))], multiscale=True)
    widget = make_widget(model)
    assert widget.form.layer_info.is_error
    assert not widget.slice_button.isEnabled()
    assert not widget.stack_button.isEnabled()
    widget.denoise_slice()
    widget.denoise_stack()
    assert not widget.is_working


def test_a_plane_has_no_stack_to_denoise(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack[0], name="plane")
    widget = make_widget(model)
    assert widget.slice_button.isEnabled()
    assert not widget.stack_button.isEnabled()
    for _ in range(2):
        widget.denoise_slice()
        finish(widget)
    assert _names(model) == ["plane", "plane denoised"]
    np.testing.assert_array_equal(model.layers["plane denoised"].data, stack[0] + 1)


def test_the_3d_view_says_what_to_do_and_still_denoises_stacks(
    model: ViewerModel, make_widget: Make, stack: Any
) -> None:
    model.add_image(stack)
    widget = make_widget(model)
    model.dims.ndisplay = 3
    assert "2D view" in widget.form.layer_info.text()
    assert not widget.slice_button.isEnabled()
    assert widget.stack_button.isEnabled()


def test_with_nothing_to_show_nothing_can_be_run(
    model: ViewerModel, make_widget: Make, stack: Any
) -> None:
    model.add_image(stack)
    widget = make_widget(model)
    widget.form.denoised.setChecked(False)
    assert not widget.slice_button.isEnabled()
    assert not widget.stack_button.isEnabled()


# --- a slice --------------------------------------------------------------------------------------


def test_a_slice_is_denoised_where_it_lies(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells", scale=(3, 0.5, 0.25), units=("um",) * 3)
    widget = make_widget(model)
    model.dims.set_point(0, 3 * 2)
    widget.slice_button.click()
    assert not widget.slice_button.isEnabled()
    assert widget.cancel_button.isEnabled()
    finish(widget)
    result = model.layers["cells denoised (slice)"]
    np.testing.assert_array_equal(result.data, stack[2:3] + 1)
    np.testing.assert_allclose(result.translate, (6, 0, 0))
    np.testing.assert_allclose(result.scale, layer.scale)
    assert result.units == layer.units
    assert tuple(result.contrast_limits) == tuple(layer.contrast_limits)
    assert "removed 4.9 of 5" in widget.status.text()
    assert "range kept" in widget.status.text()
    assert widget.slice_button.isEnabled()
    assert not widget.cancel_button.isEnabled()
    (call,) = jobs.called("denoise_plane")
    assert call["spacing"] == (0.5, 0.25)
    np.testing.assert_array_equal(stack, layer.data)  # the source is untouched


def test_running_again_updates_the_layer(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    model.dims.set_point(0, 1)
    widget.denoise_slice()
    finish(widget)
    result = model.layers["cells denoised (slice)"]
    result.contrast_limits = (3, 4)
    result.name = "mine"
    model.dims.set_point(0, 4)
    widget.denoise_slice()
    finish(widget)
    assert _names(model) == ["cells", "mine"]
    np.testing.assert_array_equal(result.data, stack[4:] + 1)
    assert result.translate[0] == 4
    assert tuple(result.contrast_limits) == (3, 4)


def test_every_output_is_shown_in_order(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.residual.setChecked(True)
    widget.form.diffusivity.setChecked(True)
    widget.form.orientation.setChecked(True)
    for _ in range(2):
        widget.denoise_slice()
        finish(widget)
        widget.denoise_stack()
        finish(widget)
    roles = ("diffusivity", "orientation", "residual", "denoised")
    names = [f"cells {part}" for role in roles for part in (f"{role} (slice)", role)]
    assert _names(model) == ["cells", *names]
    assert model.layers.selection.active.name == "cells denoised"
    residual = model.layers["cells residual"]
    np.testing.assert_array_equal(residual.data, np.full(stack.shape, -1.0))
    assert tuple(residual.contrast_limits) == (-20, 20)
    assert residual.colormap.name == "PiYG"
    diffusivity = model.layers["cells diffusivity"]
    assert tuple(diffusivity.contrast_limits) == (0, 1)
    assert diffusivity.data.shape == stack.shape
    orientation = model.layers["cells orientation"]
    assert tuple(orientation.contrast_limits) == (0, 180)
    assert orientation.colormap.name == "hsv"


def test_the_orientation_is_transparent_where_there_is_none(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells", scale=(3, 0.5, 0.5))
    widget = make_widget(model)
    widget.form.orientation.setChecked(True)
    widget.form.denoised.setChecked(False)
    widget.denoise_slice()
    finish(widget)
    layer = model.layers["cells orientation (slice)"]
    assert layer is model.layers.selection.active
    np.testing.assert_array_equal(layer.scale, (3, 0.5, 0.5))
    assert np.isnan(layer.data[..., 0]).all()  # where the anisotropy is low
    assert (layer.data[..., 1:] == 30).all()
    assert layer.colormap.map(np.array([np.nan]))[0, 3] == 0
    mark = layer.metadata[MARK]
    assert (mark["role"], mark["source"]) == ("orientation (slice)", "cells")


def test_maps_are_of_the_step_in_the_form(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    assert not widget.form.map_step.isEnabled()
    widget.form.diffusivity.setChecked(True)
    assert widget.form.map_step.isEnabled()
    widget.form.map_step.set_value(2)
    widget.denoise_slice()
    finish(widget)
    widget.denoise_stack()
    finish(widget)
    for name in ("denoise_plane", "denoise_stack"):
        assert jobs.called(name)[0]["maps"] == MapsConfig(diffusivity=True, step=2)
    assert model.layers["cells diffusivity"].metadata[MARK]["map_step"] == 2
    widget.live_preview.setChecked(True)
    finish(widget)
    assert jobs.called("denoise_plane")[-1]["maps"] == MapsConfig()  # they wouldn't be shown


def test_a_step_of_the_maps_that_is_not_done_is_told(
    model: ViewerModel, make_widget: Make, finish: Finish
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    model.add_image(np.random.default_rng(0).normal(0, 5, (2, 40, 40)), name="cells")
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.model.set_key("perona-malik")
    widget.form.iterations.set_value(3)
    widget.form.orientation.setChecked(True)
    widget.form.map_step.set_value(4)
    widget.denoise_stack()
    finish(widget)
    assert widget.status.is_error
    assert "only 3 iterations" in widget.status.text()
    assert _names(model) == ["cells"]
    widget.form.map_step.set_value(3)
    widget.denoise_stack()
    finish(widget)
    assert _names(model) == ["cells", "cells orientation", "cells denoised"]


def test_results_say_how_they_came_about(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells", metadata={"patient": 7})
    widget = make_widget(model)
    widget.form.model.set_key("perona-malik")
    widget.form.iterations.set_value(9)
    widget.denoise_slice()
    finish(widget)
    metadata = model.layers[-1].metadata
    assert metadata["patient"] == 7
    mark = metadata[MARK]
    assert mark["source"] == "cells"
    assert mark["model"] == "perona-malik"
    assert mark["weights"] == ""  # a classical model has none
    assert mark["settings"]["iterations"] == 9
    assert mark["noise"] == {"key": "gaussian", "noise_sigma": 5.0}
    assert mark["report"]["seconds"] == 0.1
    assert set(mark["versions"]) == {"napari-learned-diffusion", "napari", "numpy", "torch"}
    assert mark["slice"] == (2,)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0)])
def test_the_plane_in_view_is_denoised_whatever_the_order(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any, order: Any
) -> None:
    model.add_image(stack, name="cells", scale=(3, 2, 1))
    model.dims.order = order
    for axis, at in enumerate((4, 3, 7)):
        model.dims.set_point(axis, at * (3, 2, 1)[axis])
    widget = make_widget(model)
    widget.denoise_slice()
    finish(widget)
    where = [slice(None)] * 3
    where[order[0]] = slice((4, 3, 7)[order[0]], (4, 3, 7)[order[0]] + 1)
    np.testing.assert_array_equal(model.layers[-1].data, stack[tuple(where)] + 1)
    expected = tuple(float((3, 2, 1)[axis]) for axis in sorted(order[1:]))
    assert jobs.called("denoise_plane")[0]["spacing"] == expected


def test_a_layer_of_four_axes(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any
) -> None:
    data = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)
    model.add_image(data, name="movie")
    widget = make_widget(model)
    model.dims.set_point(0, 1)
    model.dims.set_point(1, 2)
    widget.denoise_slice()
    finish(widget)
    np.testing.assert_array_equal(model.layers[-1].data, data[1:, 2:] + 1)
    np.testing.assert_array_equal(model.layers[-1].translate, (1, 2, 0, 0))
    widget.denoise_stack()
    finish(widget)
    np.testing.assert_array_equal(model.layers["movie denoised"].data, data + 1)
    assert model.layers["movie denoised"].data.dtype == np.uint16


# --- a stack --------------------------------------------------------------------------------------

SPATIAL = {
    "scale": (3, 0.5, 0.25),
    "translate": (10, 20, 30),
    "rotate": 30,
    "shear": (0.1, 0, 0),
    "affine": np.array([[1, 0, 0, 5], [0, 0, -1, 6], [0, 1, 0, 7], [0, 0, 0, 1.0]]),
    "units": ("um", "um", "um"),
    "axis_labels": ("z", "y", "x"),
}


def test_a_stack_is_denoised_with_all_its_metadata(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    layer = model.add_image(
        stack, name="cells", contrast_limits=(5, 50), colormap="magma", **SPATIAL
    )
    widget = make_widget(model)
    widget.denoise_stack()
    finish(widget)
    result = model.layers["cells denoised"]
    np.testing.assert_array_equal(result.data, stack + 1)
    here, there = Placement.of(layer).keywords(), Placement.of(result).keywords()
    for name, value in here.items():
        np.testing.assert_array_equal(value, there[name], err_msg=name)
    assert tuple(result.contrast_limits) == (5, 50)
    assert result.colormap.name == "magma"
    assert result.data.dtype == stack.dtype


def test_the_layer_fills_up_while_the_job_runs(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any
) -> None:
    data = np.zeros((50, 8, 9), np.int16)
    data[:] = 10
    model.add_image(data, name="cells")
    widget = make_widget(model)
    jobs.gate.clear()
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    result = model.layers["cells denoised"]
    np.testing.assert_array_equal(result.data, data)  # not done yet, so it looks like the source
    refreshed = []
    result.refresh = lambda **_: refreshed.append(1)  # type: ignore[method-assign]
    jobs.gate.set()
    finish(widget)
    assert refreshed
    np.testing.assert_array_equal(result.data, data + 1)


def test_a_lazy_layer_is_read_plane_by_plane(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    loaded: list[int] = []

    def load(block: Any, block_info: Any = None) -> Any:
        loaded.append(block_info[0]["array-location"][0][0])
        return block

    lazy = da.from_array(stack, chunks=(1, -1, -1)).map_blocks(load, dtype=stack.dtype)
    model.add_image(lazy, name="lazy", contrast_limits=(0, 1000))
    widget = make_widget(model)
    widget.form.residual.setChecked(True)
    model.dims.set_point(0, 3)
    loaded.clear()
    widget.denoise_slice()
    finish(widget)
    assert set(loaded) == {3}
    widget.denoise_stack()
    finish(widget)
    np.testing.assert_array_equal(model.layers["lazy denoised"].data, stack + 1)
    residual = model.layers["lazy residual"].data
    assert isinstance(residual, da.Array)
    np.testing.assert_array_equal(np.asarray(residual), np.full(stack.shape, -1.0))


def test_running_a_stack_again_updates_the_layer(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    for _ in range(2):
        widget.denoise_stack()
        finish(widget)
    assert _names(model) == ["cells", "cells denoised"]


def test_another_widget_finds_the_result_again(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    for _ in range(2):
        model.layers.selection.active = layer
        widget = make_widget(model)
        widget.denoise_stack()
        finish(widget)
        widget.deleteLater()
    assert _names(model) == ["cells", "cells denoised"]


# --- cancelling and failing -----------------------------------------------------------------------


def _start(qtbot: Any, widget: DenoiseWidget, jobs: Any, what: str) -> None:
    jobs.running.clear()
    jobs.gate.clear()
    getattr(widget, what)()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)


@pytest.mark.parametrize("what", ["denoise_slice", "denoise_stack"])
def test_cancelling_leaves_everything_as_it_was(
    qtbot: Any,
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    jobs: Any,
    stack: Any,
    what: str,
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    _start(qtbot, widget, jobs, what)
    widget.cancel_button.click()
    finish(widget)
    assert jobs.closed == 1
    assert _names(model) == ["cells"]
    assert model.layers.selection.active.name == "cells"
    assert "Cancelled" in widget.status.text()
    assert widget.slice_button.isEnabled()
    assert not widget.cancel_button.isEnabled()


def test_cancelling_a_second_run_keeps_the_first_result(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_stack()
    finish(widget)
    first = model.layers["cells denoised"].data
    metadata = dict(model.layers["cells denoised"].metadata)
    _start(qtbot, widget, jobs, "denoise_stack")
    assert model.layers["cells denoised"].data is not first
    widget.cancel()
    finish(widget)
    assert model.layers["cells denoised"].data is first
    assert model.layers["cells denoised"].metadata == metadata


ERRORS = [
    RuntimeError("CUDA out of memory"),
    InvalidImageError("This image can't be denoised."),
    DeviceError("There is no CUDA device; choose Automatic."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("what", ["denoise_slice", "denoise_stack", "estimate"])
def test_an_error_is_told_and_the_form_lives(
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    jobs: Any,
    stack: Any,
    what: str,
    error: Exception,
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.error = error
    getattr(widget, what)()
    finish(widget)
    assert str(error) in widget.status.text()
    assert widget.status.is_error
    assert any(str(error) in message for message in _warnings())
    assert _names(model) == ["cells"]
    assert widget.slice_button.isEnabled()
    assert widget.form.estimate_button.isEnabled()
    jobs.error = None
    widget.form.iterations.set_value(3)
    assert not widget.status.is_error
    widget.denoise_slice()
    finish(widget)
    assert _names(model) == ["cells", "cells denoised (slice)"]


def test_an_error_in_the_middle_of_a_stack_leaves_no_half_result(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    _start(qtbot, widget, jobs, "denoise_stack")
    jobs.error = RuntimeError("out of memory")
    jobs.gate.set()
    finish(widget)
    assert _names(model) == ["cells"]


def test_too_little_memory_for_the_result_is_told(
    model: ViewerModel, make_widget: Make, stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("napari_learned_diffusion.widgets.denoise.np", SimpleNamespace(zeros=fail))
    widget.denoise_stack()
    assert "too little memory" in widget.status.text()
    assert not widget.is_working


@pytest.mark.parametrize("what", ["denoise_slice", "denoise_stack"])
def test_removing_the_layer_cancels(
    qtbot: Any,
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    jobs: Any,
    stack: Any,
    what: str,
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    _start(qtbot, widget, jobs, what)
    model.layers.remove(layer)
    finish(widget)
    assert jobs.closed == 1
    assert "“cells” was removed" in widget.status.text()
    assert _names(model) == []


def test_removing_the_growing_result_cancels(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    _start(qtbot, widget, jobs, "denoise_stack")
    model.layers.remove("cells denoised")
    finish(widget)
    assert "“cells denoised” was removed" in widget.status.text()
    assert _names(model) == ["cells"]


def test_messages_of_the_job_are_shown(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.messages = ("The noise level is 0.",)
    widget.denoise_slice()
    finish(widget)
    assert "The noise level is 0." in widget.status.text()


# --- noise ----------------------------------------------------------------------------------------


def test_estimating_shows_the_noise_and_what_automatic_means(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="ct", metadata={"intensity_unit": "HU"})
    widget = make_widget(model)
    widget.form.model.set_key("perona-malik")
    widget.form.estimate_button.click()
    assert not widget.form.estimate_button.isEnabled()
    finish(widget)
    text = widget.form.noise_info.text()
    assert "Gaussian, standard deviation 5 HU" in text
    assert "Confidence 90%" in text
    assert "much data" in text
    assert widget.form.noise_plot.isVisibleTo(widget.form)
    assert widget.form.iterations.lineEdit().placeholderText() == "automatic (3)"
    assert widget.form.contrast.lineEdit().placeholderText() == "automatic (1.5)"
    assert widget.form.values().noise_kind == "auto"  # the form still says automatic
    widget.form.function.set_key("exponential")
    assert widget.form.iterations.lineEdit().placeholderText() == "automatic"
    assert "Gaussian" in widget.form.noise_info.text()  # which doesn't depend on the function


@pytest.mark.parametrize(
    ("kind", "noise"),
    [
        ("gaussian", Gaussian(5.0)),
        ("poisson-gaussian", PoissonGaussian(2.0, 3.0)),
        ("rician", Rician(4.0)),
        ("correlated", Correlated(6.0, 0.8)),
    ],
)
def test_estimating_fills_the_boxes_of_the_kind_that_is_chosen(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any, kind: str, noise: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.noise_kind.set_key(kind)
    widget.estimate()
    finish(widget)
    assert widget.form.values().config().noise == noise
    assert widget.form.noise_plot.isVisibleTo(widget.form)
    widget.estimate()
    finish(widget)
    assert widget.form.values().config().noise == noise


def test_the_estimate_is_kept_while_other_settings_change(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_slice()
    finish(widget)
    widget.denoise_slice()
    finish(widget)
    assert len(jobs.called("prepare")) == 1  # the very same settings
    widget.form.iterations.set_value(4)
    widget.denoise_slice()
    finish(widget)
    assert jobs.called("prepare")[-1]["config"].noise == Gaussian(5.0)
    layer.data = stack + 100
    widget.denoise_slice()
    finish(widget)
    assert jobs.called("prepare")[-1]["config"].noise is None


def test_slices_that_differ_are_estimated_one_by_one(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.slices_differ = True
    widget.denoise_slice()
    finish(widget)
    assert [call["image"].ndim for call in jobs.called("prepare")] == [3, 2]
    model.dims.set_point(0, 0)
    widget.denoise_slice()
    finish(widget)
    assert [call["image"].ndim for call in jobs.called("prepare")] == [3, 2, 2]
    np.testing.assert_array_equal(jobs.called("prepare")[-1]["image"], stack[0])


def test_the_noise_that_is_given_reaches_the_job(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.noise_kind.set_key("gaussian")
    widget.form.noise_sigma.set_value(7)
    widget.form.tile.set_value(64)
    widget.denoise_slice()
    finish(widget)
    (call,) = jobs.called("denoise_plane")
    assert call["prepared"].config.noise == Gaussian(7.0)
    assert call["tiling"].tile == 64


# --- live preview ---------------------------------------------------------------------------------


def test_the_preview_follows_slider_and_form(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    model.dims.set_point(0, 1)
    widget.live_preview.setChecked(True)
    finish(widget)
    preview = model.layers["cells preview"]
    np.testing.assert_array_equal(preview.data, stack[1:2] + 1)
    assert model.layers.selection.active is layer
    assert widget.form.layer.count() == 1  # the preview can't be chosen
    model.dims.set_point(0, 3)
    finish(widget)
    assert model.layers["cells preview"] is preview
    np.testing.assert_array_equal(preview.data, stack[3:4] + 1)
    assert preview.translate[0] == 3
    widget.form.iterations.set_value(2)
    finish(widget)
    assert jobs.called("denoise_plane")[-1]["prepared"].config.iterations == 2
    model.dims.order = (1, 0, 2)
    finish(widget)
    assert preview.data.shape == (5, 1, 16)
    widget.live_preview.setChecked(False)
    assert _names(model) == ["cells"]


def test_a_moving_slider_cancels_the_preview_that_is_being_computed(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.gate.clear()
    widget.live_preview.setChecked(True)
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    for at in (0, 1, 3, 4):
        model.dims.set_point(0, at)
    qtbot.waitUntil(lambda: jobs.closed == 1, timeout=TIMEOUT)
    jobs.gate.set()
    finish(widget)
    assert len(jobs.called("denoise_plane")) == 2  # the first and the last, none in between
    np.testing.assert_array_equal(model.layers["cells preview"].data, stack[4:] + 1)


def test_the_preview_waits_for_a_run(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.live_preview.setChecked(True)
    finish(widget)
    _start(qtbot, widget, jobs, "denoise_stack")
    model.dims.set_point(0, 4)
    qtbot.waitUntil(lambda: not widget._preview_timer.isActive(), timeout=TIMEOUT)
    assert len(jobs.called("denoise_plane")) == 1
    jobs.gate.set()
    finish(widget)
    np.testing.assert_array_equal(model.layers["cells preview"].data, stack[4:] + 1)


def test_the_preview_follows_the_chosen_layer(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack[0], name="plane")
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.live_preview.setChecked(True)
    finish(widget)
    widget.form.layer.setCurrentText("plane")
    finish(widget)
    assert _names(model) == ["plane", "plane preview", "cells"]
    np.testing.assert_array_equal(model.layers["plane preview"].data, stack[0] + 1)


def test_deleting_the_preview_switches_it_off(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.live_preview.setChecked(True)
    finish(widget)
    model.layers.remove("cells preview")
    assert not widget.live_preview.isChecked()


def test_without_a_slice_in_view_there_is_no_preview(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.live_preview.setChecked(True)
    finish(widget)
    model.dims.ndisplay = 3
    finish(widget)
    assert _names(model) == ["cells"]
    model.dims.ndisplay = 2
    finish(widget)
    assert _names(model) == ["cells", "cells preview"]


def test_an_error_in_the_preview_is_told_without_a_popup(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.error = InvalidImageError("All is NaN here.")
    widget.live_preview.setChecked(True)
    finish(widget)
    assert widget.status.text() == "All is NaN here."
    assert not _warnings()
    jobs.error = None
    model.dims.set_point(0, 1)
    finish(widget)
    assert "cells preview" in _names(model)


# --- copying --------------------------------------------------------------------------------------


def test_the_python_call_does_what_the_widget_does(
    model: ViewerModel, make_widget: Make, finish: Finish
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    rng = np.random.default_rng(0)
    data = rng.normal(100, 10, (2, 24, 24)).astype(np.float32)
    model.add_image(data, name="cells", scale=(1, 2, 1))
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.noise_kind.set_key("gaussian")
    widget.form.noise_sigma.set_value(10)
    widget.form.iterations.set_value(5)
    widget.denoise_stack()
    finish(widget)
    widget.python_button.click()
    names: dict[str, Any] = {"viewer": model}
    exec(QApplication.clipboard().text(), names)
    np.testing.assert_array_equal(names["denoised"], model.layers["cells denoised"].data)
    assert "Python" in widget.status.text()


def test_the_shell_command_is_understood(
    model: ViewerModel, make_widget: Make, tmp_path: Any, stack: Any
) -> None:
    from typer.testing import CliRunner

    from napari_learned_diffusion.cli import app
    from napari_learned_diffusion.files import Volume, read, write

    path = tmp_path / "my cells.tif"
    write(path, Volume(stack, "ZYX", (1, 1, 1), ("micrometer",) * 3, "my cells"))
    model.add_image(stack, name="cells", axis_labels=("z", "y", "x"))
    model.dims.order = (1, 0, 2)
    widget = make_widget(model)
    widget.form.noise_kind.set_key("poisson-gaussian")
    widget.form.gain.set_value(1)
    widget.form.offset.set_value(-0.5)
    widget.form.iterations.set_value(2)
    widget.shell_button.click()
    words = shlex.split(QApplication.clipboard().text())
    assert words[:4] == ["napari-learned-diffusion", "denoise", "image.tif", "image_denoised.tif"]
    assert "--plane=ZX" in words
    target = tmp_path / "out.tif"
    outcome = CliRunner().invoke(app, ["denoise", str(path), str(target), *words[4:]])
    assert outcome.exit_code == 0, outcome.output
    assert read(target).data.shape == stack.shape


# --- with the real jobs ---------------------------------------------------------------------------


def test_real_jobs_from_noise_to_result(
    model: ViewerModel, make_widget: Make, finish: Finish
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    rng = np.random.default_rng(1)
    clean = np.where(np.arange(64) < 32, 100.0, 200.0) * np.ones((3, 64, 1))
    noisy = (clean + rng.normal(0, 15, clean.shape)).astype(np.float32)
    noisy[1, 5, 5] = np.nan
    noisy[1, 6, 6] = np.inf
    model.add_image(noisy, name="edge", contrast_limits=(0, 300))
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.residual.setChecked(True)
    widget.form.diffusivity.setChecked(True)
    widget.denoise_stack()
    finish(widget)
    assert not widget.status.is_error, widget.status.text()
    result = model.layers["edge denoised"].data
    ok = np.isfinite(noisy)
    assert np.isnan(result[1, 5, 5])
    assert np.isinf(result[1, 6, 6])
    assert np.std((result - clean)[ok]) < 0.6 * 15
    np.testing.assert_allclose(
        model.layers["edge residual"].data[ok], noisy[ok] - result[ok], atol=1e-4
    )
    assert "2 NaN or infinite pixels" in widget.status.text()
    model.dims.set_point(0, 0)
    widget.denoise_slice()
    finish(widget)
    np.testing.assert_allclose(model.layers["edge denoised (slice)"].data[0], result[0], rtol=1e-5)


@pytest.mark.parametrize("scope", ["stack", "slice"])
def test_real_jobs_give_a_slice_as_they_give_it_in_the_stack(
    model: ViewerModel, make_widget: Make, finish: Finish, scope: str
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    rng = np.random.default_rng(2)
    level = np.array([5.0, 20.0, 60.0])[:, None, None]
    model.add_image((500 + rng.normal(0, 1, (3, 64, 64)) * level).astype(np.float32), name="uneven")
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.noise_scope.set_key(scope)
    widget.denoise_stack()
    finish(widget)
    for at in (0, 2):
        model.dims.set_point(0, at)
        widget.denoise_slice()
        finish(widget)
        np.testing.assert_allclose(
            model.layers["uneven denoised (slice)"].data[0],
            model.layers["uneven denoised"].data[at],
            rtol=1e-6,
        )


def test_real_jobs_with_no_noise_say_so(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    model.add_image(stack, name="clean")
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.noise_kind.set_key("gaussian")
    widget.form.noise_sigma.set_value(0)
    widget.form.residual.setChecked(True)
    widget.form.diffusivity.setChecked(True)
    widget.denoise_slice()
    finish(widget)
    assert "noise level is 0" in widget.status.text()
    np.testing.assert_array_equal(model.layers["clean denoised (slice)"].data, stack[2:3])


def test_the_fake_is_like_the_real_thing(jobs: Any, stack: Any) -> None:
    from inspect import signature

    from napari_learned_diffusion.jobs import denoise as real_jobs

    prepared = jobs.prepare(stack, real_jobs.DiffusionConfig(), plane_axes=(1, 2))
    assert real_jobs.prepare(stack, plane_axes=(1, 2)).config.noise is not None
    maps = MapsConfig()
    assert run(jobs.denoise_plane(stack[0], prepared.config, prepared=prepared, maps=maps))
    options = {"spacing", "tiling", "prepared", "maps"}
    assert options <= set(signature(real_jobs.denoise_plane).parameters)
    assert options | {"plane_axes", "out"} <= set(signature(real_jobs.denoise_stack).parameters)
