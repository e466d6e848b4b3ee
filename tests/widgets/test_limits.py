"""A form doesn't ask for what the job would refuse, and says why at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from napari.components import ViewerModel

from napari_learned_diffusion.config import MAX_ITERATIONS
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.zoo import card
from napari_learned_diffusion.widgets._controls import DiffusionForm, NumberBox
from napari_learned_diffusion.widgets._form import FormValues
from napari_learned_diffusion.widgets.inspection import InspectionWidget


@pytest.fixture
def form(qtbot: Any) -> DiffusionForm:
    form = DiffusionForm()
    qtbot.addWidget(form)
    return form


def _note(form: DiffusionForm) -> str:
    return form._iterations_info.text()


@pytest.mark.parametrize("key", ["auto", *REGISTRY])
def test_the_form_takes_no_more_iterations_than_the_model(form: DiffusionForm, key: str) -> None:
    most = card("conductance-unet-s" if key == "auto" else key).most_iterations
    form.model.set_key(key)
    form.iterations.lineEdit().setText("60")
    form.iterations.editingFinished.emit()
    if most is None:
        assert form.values().iterations == 60
        assert not _note(form)
    else:
        assert form.values().iterations is None
        assert f"at most {most} iterations" in _note(form)
        form.iterations.lineEdit().setText("3")
        assert form.values().iterations == 3
        assert not _note(form)


def test_another_model_lowers_the_number_and_says_so(form: DiffusionForm) -> None:
    form.model.set_key("perona-malik")
    form.iterations.set_value(60)
    form.model.set_key("unet")
    assert form.values().iterations == 60
    form.model.set_key("auto")
    assert form.values().iterations == 5
    assert form.iterations.lineEdit().text() == "5"
    assert "at most 5 iterations" in _note(form)
    form.model.set_key("perona-malik")
    assert not _note(form)


def test_values_from_an_earlier_form_are_brought_into_range(form: DiffusionForm) -> None:
    form.set_values(FormValues(model="conductance-unet", iterations=60))
    assert form.values().iterations == 5
    assert form.iterations.lineEdit().text() == "5"


def test_more_than_any_model_takes_is_told(form: DiffusionForm) -> None:
    form.model.set_key("perona-malik")
    form.iterations.lineEdit().setText(str(MAX_ITERATIONS + 1))
    assert f"at most {MAX_ITERATIONS}" in _note(form)
    form.iterations.lineEdit().setText("nonsense")
    assert not _note(form)


def test_a_setting_that_the_model_lacks_is_not_in_sight_and_is_not_asked_for(
    form: DiffusionForm,
) -> None:
    form.model.set_key("perona-malik")
    form.contrast.set_value(3.0)
    form.scheme.set_key("fed")
    form.stopping_time.set_value(7.0)
    for key in ("auto", "unet", "conductance-unet-s"):
        form.model.set_key(key)
        assert form.contrast.isHidden()
        config = form.values().config()
        assert (config.model, config.contrast, config.scheme) == (key, None, "explicit")
        assert config.stopping_time is None
    form.model.set_key("perona-malik")
    assert form.values().config().contrast == 3.0


@pytest.mark.parametrize("value", [1234567.89, 0.123456789, 1e-20, 5e29, 0.1])
def test_a_number_that_is_shown_is_the_number_that_was_set(qtbot: Any, value: float) -> None:
    box = NumberBox(-1e30, 1e30)
    qtbot.addWidget(box)
    box.set_value(value)
    assert box.value() == value


def test_an_inspection_takes_no_more_iterations_than_the_model(
    qtbot: Any, model: ViewerModel
) -> None:
    model.add_image(np.random.default_rng(0).normal(100, 5, (24, 32)), name="cells")
    widget = InspectionWidget(model)
    qtbot.addWidget(widget)
    widget.settings.set_key("own")
    widget.form.model.set_key("perona-malik")
    widget.count.set_value(40)
    assert widget.count.value() == 40
    widget.form.model.set_key("conductance-unet-s")
    assert widget.count.value() == 5
    assert "at most 5 iterations" in widget.count_info.text()
    widget.settings.set_key("denoise")  # whose model is automatic
    widget.count.lineEdit().setText("40")
    assert "at most 5 iterations" in widget.count_info.text()
    assert widget.count.value() == 5
