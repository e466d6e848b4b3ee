"""What a user does with the fine-tuning widget, on a real viewer and with the real job."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from napari.components import ViewerModel
from qtpy.QtWidgets import QAbstractButton, QComboBox, QFileDialog, QInputDialog, QMessageBox

from napari_learned_diffusion import denoise
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.user_models import (
    delete_user_model,
    list_user_models,
    save_user_model,
)
from napari_learned_diffusion.jobs import finetune as job_module
from napari_learned_diffusion.jobs.finetune import Curve
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._controls import DiffusionForm, NumberBox
from napari_learned_diffusion.widgets._curve_plot import CurvePlot, changes
from napari_learned_diffusion.widgets.finetune import MODE_TITLES, FineTuneWidget, suggested_name

TIMEOUT = 60_000
SIZE = 48
FACTS = {
    "summary": "Small.",
    "noise_range": [5.0, 75.0],
    "suggestion": {"iterations": 2, "tau": 0.25},
    "gain_dB": 0.5,
    "date": "2024-05-01",
    "version": "0.1.0",
}


class HeldJobs:
    """The real job, which stands still after so many steps as long as the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.steps = self.closed = 0

    def load(self) -> HeldJobs:
        return self

    def fine_tune(self, *given: Any, **options: Any) -> Job[Any]:
        job = job_module.fine_tune(*given, **options)
        self.steps = 0
        try:
            while True:
                try:
                    progress = next(job)
                except StopIteration as stop:
                    return stop.value
                yield progress
                self.steps = progress.done
                while progress.done >= 2 and not self.gate.wait(0.002):
                    yield Progress(progress.done, progress.total, "Held")
        except GeneratorExit:
            self.closed += 1
            raise
        finally:
            job.close()


@pytest.fixture
def jobs() -> HeldJobs:
    return HeldJobs()


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray]:
    """A noisy stack and the clean one."""
    rng = np.random.default_rng(0)
    clean = np.stack([np.kron(rng.uniform(40, 200, (6, 6)), np.ones((8, 8))) for _ in range(3)])
    return (clean + rng.normal(0, 10, clean.shape)).astype(np.float32), clean.astype(np.float32)


@pytest.fixture
def start(user_models_folder: Path) -> str:
    """A small model that diffuses far too little: easily bettered."""
    torch.manual_seed(0)
    model = Splines(experts=4, size=3, iterations=2)
    with torch.no_grad():
        model.log_steps -= 2
    return save_user_model("start", model, FACTS).key


@pytest.fixture
def widget(qtbot: Any, jobs: HeldJobs, start: str, images: Any) -> FineTuneWidget:
    """The widget of a viewer with a noisy stack, its reference and a rectangle."""
    viewer = ViewerModel()
    noisy, clean = images
    viewer.add_image(clean, name="clean", scale=(3, 0.5, 0.5))
    viewer.add_image(noisy, name="noisy", scale=(3, 0.5, 0.5), translate=(0, 10, 20))
    widget = FineTuneWidget(viewer, jobs.load)
    qtbot.addWidget(widget)
    widget.model.set_key(start)
    widget.noise_kind.set_key("gaussian")
    widget.noise_sigma.set_value(10)
    widget.steps.set_value(8)
    widget.patch.set_value(24)
    widget.batch.set_value(2)
    widget.learning_rate.set_value(0.05)
    widget.new_regions()
    viewer.layers["noisy regions"].add_rectangles(
        [np.array([[1, 2, 2], [1, 2, 45], [1, 45, 45], [1, 45, 2]])]
    )
    viewer.dims.set_current_step(0, 1)
    return widget


@pytest.fixture
def finish(qtbot: Any) -> Callable[[FineTuneWidget], None]:
    def wait(widget: FineTuneWidget) -> None:
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)

    return wait


def names() -> list[str]:
    return [model.name for model in list_user_models()]


def layer_names(widget: FineTuneWidget) -> list[str]:
    return [layer.name for layer in widget._viewer.layers]


def test_the_whole_path_from_regions_to_a_model_of_one_s_own(widget, finish, images, start) -> None:
    assert widget.layer.currentText() == "noisy"
    assert widget.reference.currentText() == "clean"
    assert widget.regions.currentText() == "noisy regions"
    regions = widget._viewer.layers["noisy regions"]
    np.testing.assert_allclose(regions.scale, (3, 0.5, 0.5))
    np.testing.assert_allclose(regions.translate, (0, 10, 20))
    widget.start()
    finish(widget)
    assert not widget.status.is_error, widget.status.text()
    assert "dB better than my/start" in widget.status.text()
    assert layer_names(widget) == ["clean", "noisy", "noisy regions"]  # the preview is gone
    at, training, held_out = changes(widget._tuned.curve)
    assert at.tolist() == [0, 8]
    assert len(training) == 1
    assert held_out[0] == 0 > held_out[1]
    assert widget.name.text() == "noisy"
    widget.name.setText("cells")
    widget.save_button.click()
    assert "Saved as cells" in widget.status.text()
    assert names() == ["cells", "start"]
    assert widget.own.currentText() == "cells"
    assert "fine-tuned on noisy (paired)" in widget.own_info.text()
    assert not widget.save_button.isEnabled()
    noisy, clean = images
    results = [denoise(noisy[1], key, noise_sigma=10, device="cpu") for key in (start, "my/cells")]
    errors = [np.mean((result - clean[1]) ** 2) for result in results]
    assert errors[1] < errors[0]


def test_own_models_are_in_the_denoise_form_under_a_heading(qtbot, start) -> None:
    form = DiffusionForm()
    qtbot.addWidget(form)
    titles = [form.model.itemText(i) for i in range(form.model.count())]
    assert titles[-2:] == ["My models", "start"]
    assert not form.model.model().item(form.model.count() - 2).isEnabled()
    form.model.set_key(start)
    assert form.values().config().model == start
    assert form.model_info.text() == "Small."
    save_user_model("other", Splines(experts=4, size=3, iterations=2), FACTS)
    form.model.refresh()
    assert form.model.key() == start
    assert form.model.findData("my/other") > 0
    delete_user_model("start")
    form.model.refresh()
    assert form.model.key() == "auto"
    assert form.values().config().model == "auto"


def test_only_models_with_parameters_can_be_tuned(widget) -> None:
    keys = [widget.model.itemData(i) for i in range(widget.model.count())]
    assert "perona-malik" not in keys
    assert "auto" not in keys
    assert "conductance-unet-s" in keys


def test_pause_stop_and_preview(qtbot, widget, jobs, finish) -> None:
    widget.steps.set_value(500)
    jobs.gate.clear()
    widget.start()
    qtbot.waitUntil(lambda: jobs.steps >= 2, timeout=TIMEOUT)
    qtbot.waitUntil(lambda: "noisy fine-tuning" in layer_names(widget), timeout=TIMEOUT)
    shown = widget._viewer.layers["noisy fine-tuning"]
    assert shown.data.shape == (1, SIZE, SIZE)
    np.testing.assert_allclose(shown.translate, (3, 10, 20))
    assert not widget.start_button.isEnabled()
    widget.pause_button.click()
    assert widget.pause_button.text() == "Resume"
    jobs.gate.set()
    qtbot.wait(100)
    assert jobs.steps <= 3
    widget.pause_button.click()
    qtbot.waitUntil(lambda: jobs.steps >= 6, timeout=TIMEOUT)
    widget.stop_button.click()
    finish(widget)
    assert widget._tuned.steps < 500
    assert "noisy fine-tuning" not in layer_names(widget)


def test_cancel_leaves_everything_as_it_was(qtbot, widget, jobs, finish) -> None:
    jobs.gate.clear()
    widget.start()
    qtbot.waitUntil(lambda: jobs.steps >= 2, timeout=TIMEOUT)
    widget.cancel_button.click()
    finish(widget)
    assert widget.status.text() == "Cancelled. No model has changed."
    assert jobs.closed == 1
    assert not widget.save_button.isEnabled()
    assert names() == ["start"]
    assert layer_names(widget) == ["clean", "noisy", "noisy regions"]
    jobs.gate.set()
    widget.start()
    finish(widget)
    assert "dB better" in widget.status.text()


def test_removing_the_layer_cancels(qtbot, widget, jobs, finish) -> None:
    jobs.gate.clear()
    widget.start()
    qtbot.waitUntil(lambda: jobs.steps >= 2, timeout=TIMEOUT)
    widget._viewer.layers.remove("noisy")
    finish(widget)
    assert jobs.closed == 1
    assert "Cancelled" in widget.status.text()


def test_where_nothing_is_better_it_says_so(widget, finish) -> None:
    widget.learning_rate.set_value(1e-8)
    widget.start()
    finish(widget)
    assert "Nothing beat the starting model" in widget.status.text()
    assert not widget.save_button.isEnabled()


def test_labels_are_regions_too(widget, finish) -> None:
    labels = np.zeros((3, SIZE, SIZE), np.int32)
    labels[0, 4:44, 4:44] = 2
    layer = widget._viewer.add_labels(labels, name="painted")
    widget.regions.set_key(layer.unique_id)
    widget.mode.set_key("noisy")
    assert widget.reference.isHidden()
    widget.start()
    finish(widget)
    assert widget._tuned is not None, widget.status.text()
    assert widget._tuned.facts["regions"]["pixels"] == 1600


def test_mistakes_are_told_in_the_form(qtbot, widget, finish, monkeypatch) -> None:
    viewer = widget._viewer
    regions = viewer.layers["noisy regions"]
    regions.data = [np.array([[1, 900, 900], [1, 900, 990], [1, 990, 990], [1, 990, 900]])]
    widget.start()
    finish(widget)
    assert "No region lies in the image" in widget.status.text()
    regions.data = []
    widget.start()
    finish(widget)
    assert "No region is selected" in widget.status.text()
    widget.reference.set_key(widget.layer.key())
    widget.start()
    assert "another image layer as the reference" in widget.status.text()
    small = viewer.add_image(np.zeros((3, 20, 20)), name="small")
    widget.reference.set_key(small.unique_id)
    regions.add_rectangles([np.array([[1, 2, 2], [1, 2, 45], [1, 45, 45], [1, 45, 2]])])
    widget.start()
    finish(widget)
    assert "(3, 20, 20)" in widget.status.text()
    widget.held_out.set_value(0.3)
    viewer.layers.remove("noisy regions")
    with pytest.raises(InvalidSettingError, match="Press New"):
        widget.request()
    flat = viewer.add_shapes([np.array([[2, 2], [2, 45], [45, 45], [45, 2]])], name="flat")
    widget.regions.set_key(flat.unique_id)
    with pytest.raises(InvalidImageError, match="2 axes, the image 3"):
        widget.request()
    assert names() == ["start"]


def test_a_name_that_is_taken_or_a_full_disk_keeps_the_result(widget, finish, monkeypatch) -> None:
    widget.start()
    finish(widget)
    widget.name.setText("start")
    widget.save()
    assert widget.status.is_error
    assert "already" in widget.status.text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    widget.name.setText("cells")
    with monkeypatch.context() as patched:
        patched.setattr("napari_learned_diffusion.core.weights.save_file", full)
        widget.save()
    assert "disk is full" in widget.status.text()
    assert names() == ["start"]
    widget.save()
    assert names() == ["cells", "start"]


def test_own_models_are_managed(widget, monkeypatch, tmp_path) -> None:
    exported = tmp_path / "x.safetensors"
    monkeypatch.setattr(QInputDialog, "getText", lambda *_, **__: ("better", True))
    monkeypatch.setattr(QFileDialog, "getSaveFileName", lambda *_: (str(exported), ""))
    monkeypatch.setattr(QFileDialog, "getOpenFileName", lambda *_: (str(exported), ""))
    monkeypatch.setattr(QMessageBox, "question", lambda *_: QMessageBox.StandardButton.Yes)
    widget.rename_button.click()
    assert names() == ["better"]
    widget.export_button.click()
    assert exported.exists()
    widget.import_button.click()
    assert names() == ["better", "x"]
    assert widget.own.currentText() == "x"
    widget.import_button.click()
    assert "already" in widget.status.text()
    widget.delete_button.click()
    widget.delete_button.click()
    assert names() == []
    assert widget.own_info.text() == "None yet."
    assert not widget.export_button.isEnabled()
    assert widget.model.key() == "conductance-unet-s" or widget.model.findData("my/start") < 0


def test_the_request_is_what_the_form_says(widget) -> None:
    widget.mode.set_key("clean")
    widget.parameters.set_key("last")
    widget.added_noise.set_key("measured")
    widget.held_out.set_value(0.25)
    widget.seed.set_value(3)
    request = widget.request()
    config = request.config
    assert (config.mode, config.parameters, config.added_noise) == ("clean", "last", "measured")
    assert (config.steps, config.patch, config.batch) == (8, 24, 2)
    assert (config.held_out, config.seed, config.learning_rate) == (0.25, 3, 0.05)
    assert request.diffusion.model == "my/start"
    assert request.diffusion.noise.noise_sigma == 10
    assert request.reference is None
    (kind, corners), *_ = request.selection.shapes
    assert kind == "rectangle"
    np.testing.assert_allclose(corners[0], (1, 2, 2), atol=1e-4)


def test_every_control_explains_itself_and_every_mode_has_a_note(widget) -> None:
    for kind in (QAbstractButton, QComboBox, NumberBox):
        for control in widget.findChildren(kind):
            if control.isVisibleTo(widget) or control.parent() is widget.advanced:
                assert control.toolTip(), control
    for mode in MODE_TITLES:
        widget.mode.set_key(mode)
        assert widget.mode_info.text()


def test_names_are_suggested_from_layers() -> None:
    assert suggested_name("cells [3]: run/2") == "cells 3 run2"
    assert suggested_name("///") == "model"


def test_the_curve_in_decibels(qtbot) -> None:
    plot = CurvePlot()
    qtbot.addWidget(plot)
    curve = Curve((2.0, 2.0, 1.0, 1.0), ((0, 1.0), (2, 0.5), (4, -0.1)))
    at, training, held_out = changes(curve)
    assert at.tolist() == [0, 2, 4]
    np.testing.assert_allclose(training, (0, -3.01), atol=0.01)
    np.testing.assert_allclose(held_out, (0, -3.01, -20), atol=0.01)
    for shown in (None, Curve(), Curve((), ((0, -1.0),)), curve):
        plot.show_curve(shown, 100)


def test_closing_the_widget_stops_the_training(qtbot, widget, jobs) -> None:
    jobs.gate.clear()
    widget.start()
    qtbot.waitUntil(lambda: jobs.steps >= 2, timeout=TIMEOUT)
    widget.leave()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert jobs.closed == 1


def test_it_opens_in_napari_and_lets_go(make_napari_viewer, start) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(np.random.default_rng(0).normal(size=(3, 32, 32)), name="noise")
    dock, widget = viewer.window.add_plugin_dock_widget(
        "napari-learned-diffusion", "Fine-tune a model"
    )
    assert widget.layer.currentText() == "noise"
    viewer.theme = "light"
    viewer.window.remove_dock_widget(dock)
    del dock, widget
    gc.collect()
