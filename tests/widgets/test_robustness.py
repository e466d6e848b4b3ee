"""What users do to layers, files and views while a job runs, and layers of every kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from napari.components import ViewerModel

import napari_learned_diffusion
from napari_learned_diffusion.core import zoo
from napari_learned_diffusion.widgets._form import FormValues
from napari_learned_diffusion.widgets._layers import Placement
from napari_learned_diffusion.widgets._lazy_stack import LazyStack
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

TIMEOUT = 20_000

Make = Callable[[Any], DenoiseWidget]
Finish = Callable[[DenoiseWidget], None]

RUNS = ["denoise_slice", "denoise_stack", "denoise_as_you_scroll"]


def _names(viewer: Any) -> list[str]:
    return [layer.name for layer in viewer.layers]


@pytest.mark.parametrize("what", ["denoise_slice", "denoise_stack"])
@pytest.mark.parametrize("change", ["replaced", "resized", "retyped"])
def test_other_data_in_the_layer_cancel_the_run(
    qtbot: Any,
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    jobs: Any,
    stack: Any,
    what: str,
    change: str,
) -> None:
    other = {
        "replaced": stack + 50,
        "resized": stack[:3, 2:, :9],
        "retyped": stack.astype(np.uint16),
    }[change]
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.gate.clear()
    getattr(widget, what)()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    layer.data = other
    finish(widget)
    assert jobs.closed == 1
    assert "“cells” got other data" in widget.status.text()
    assert _names(model) == ["cells"]
    jobs.gate.set()
    widget.denoise_stack()
    finish(widget)
    result = model.layers["cells denoised"].data
    assert result.dtype == other.dtype
    np.testing.assert_array_equal(result, other + 1)
    assert jobs.called("prepare")[-1]["image"] is other  # nothing is known of it from before


def test_an_estimate_of_data_that_are_gone_is_dropped(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.noise_kind.set_key("gaussian")
    widget.estimate()
    layer.data = stack * 2
    finish(widget)
    assert widget.form.noise_sigma.value() is None
    assert not widget.form.noise_info.text()
    assert widget.form.estimate_button.isEnabled()


@pytest.mark.parametrize("what", [*RUNS, "estimate", "live_preview"])
def test_a_value_out_of_range_is_told(
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    stack: Any,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    with monkeypatch.context() as patch:
        patch.setattr(widget.form, "values", lambda: FormValues(tau=-1.0))
        if what == "live_preview":
            widget.live_preview.setChecked(True)
        else:
            getattr(widget, what)()
        finish(widget)
        assert widget.status.is_error
        assert "time step" in widget.status.text()
        assert _names(model) == ["cells"]
    widget.live_preview.setChecked(False)
    widget.denoise_stack()
    finish(widget)
    assert _names(model) == ["cells", "cells denoised"]


@pytest.mark.parametrize("what", RUNS)
def test_a_model_file_that_was_deleted_is_told(
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    tmp_path: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    weights = Path(napari_learned_diffusion.__file__).parent / "weights"
    shutil.copytree(weights, tmp_path / "weights", ignore=shutil.ignore_patterns("*.safetensors"))
    data = np.random.default_rng(0).normal(100, 10, (2, 32, 32)).astype(np.float32)
    model.add_image(data, name="cells")
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.model.set_key("foe-splines")
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "files", lambda _: tmp_path)
        getattr(widget, what)()
        finish(widget)
    assert widget.status.is_error
    assert "foe-splines.safetensors" in widget.status.text()
    assert _names(model) == ["cells"]
    widget.form.iterations.set_value(1)
    getattr(widget, what)()
    finish(widget)
    assert len(model.layers) == 2


@pytest.mark.parametrize("what", RUNS)
def test_a_zarr_layer_is_denoised(
    model: ViewerModel, make_widget: Make, finish: Finish, tmp_path: Path, stack: Any, what: str
) -> None:
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=stack.shape, chunks=(1, 12, 16), dtype=stack.dtype
    )
    array[:] = stack
    model.add_image(array, name="cells", contrast_limits=(0, 1000))
    widget = make_widget(model)
    model.dims.set_point(0, 2)
    getattr(widget, what)()
    finish(widget)
    result = np.asarray(model.layers[-1].data)
    np.testing.assert_array_equal(result, (stack[2:3] if what == "denoise_slice" else stack) + 1)


def test_a_movie_of_volumes_that_are_turned_and_shifted_as_you_scroll(
    model: ViewerModel, make_widget: Make, finish: Finish
) -> None:
    data = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)
    layer = model.add_image(
        data, name="movie", scale=(1, 3, 0.5, 0.25), translate=(0, 10, 20, 30), rotate=20
    )
    widget = make_widget(model)
    widget.denoise_as_you_scroll()
    finish(widget)
    result = model.layers["movie denoised"]
    here, there = Placement.of(layer).keywords(), Placement.of(result).keywords()
    for name, value in here.items():
        np.testing.assert_array_equal(value, there[name], err_msg=name)
    for time in (0, 1):
        for depth in range(3):
            model.dims.set_point((0, 1), layer.data_to_world((time, depth, 0, 0))[:2])
            finish(widget)
    np.testing.assert_array_equal(np.asarray(result.data), data + 1)


def test_a_result_as_you_scroll_in_a_real_window(
    qtbot: Any, make_napari_viewer: Any, jobs: Any, stack: Any, finish: Finish
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.add_image(stack, name="cells", scale=(3, 1, 0.5))
    widget = DenoiseWidget(viewer, jobs.load)
    viewer.window.add_dock_widget(widget, name="Denoise")
    widget.denoise_as_you_scroll()
    finish(widget)
    result = viewer.layers["cells denoised"]
    assert isinstance(result.data, LazyStack)
    viewer.dims.ndisplay = 3
    finish(widget)
    np.testing.assert_array_equal(result._data_view, stack + 1)
    viewer.dims.ndisplay = 2
    viewer.dims.roll()
    finish(widget)
    shown = result._data_view.T if result._data_view.shape[0] != 5 else result._data_view
    assert shown.size in {5 * 12, 5 * 16, 12 * 16}
    result.projection_mode = "mean"
    viewer.dims.thickness = (3, 3, 3)
    finish(widget)
    viewer.window.remove_dock_widget(widget)
    finish(widget)
    assert all(isinstance(layer.data, np.ndarray) for layer in viewer.layers)
