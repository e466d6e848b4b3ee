"""The controls, and that every one of them reaches the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from qtpy.QtCore import QPoint, QPointF, Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import QApplication, QWidget

from napari_learned_diffusion.config import (
    NOISE_CHOICES,
    DiffusionConfig,
    MapsConfig,
    TilingConfig,
)
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.noise import (
    NOISE_MODELS,
    Correlated,
    Gaussian,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.noise_estimation import NoiseCurve
from napari_learned_diffusion.core.zoo import (
    CLASSICAL_MODEL,
    STANDARD_MODEL,
    card,
    list_cards,
)
from napari_learned_diffusion.widgets._controls import NOISE_TITLES, DiffusionForm, NumberBox
from napari_learned_diffusion.widgets._form import FormValues, Outputs


@pytest.fixture
def form(qtbot: Any) -> DiffusionForm:
    form = DiffusionForm()
    qtbot.addWidget(form)
    return form


@pytest.fixture
def box(qtbot: Any) -> NumberBox:
    box = NumberBox(0, 1000)
    qtbot.addWidget(box)
    return box


# --- numbers --------------------------------------------------------------------------------------


def test_an_empty_box_is_automatic_and_says_which_number_that_is(box: NumberBox) -> None:
    assert box.value() is None
    assert box.lineEdit().placeholderText() == "automatic"
    box.show_automatic(1.23456)
    assert box.lineEdit().placeholderText() == "automatic (1.23)"
    assert box.value() is None


def test_typing_gives_numbers_and_clearing_gives_automatic(qtbot: Any, box: NumberBox) -> None:
    seen = []
    box.changed.connect(lambda: seen.append(box.value()))
    qtbot.keyClicks(box, "12,5")
    assert box.value() == 12.5
    box.clear()
    assert box.value() is None
    assert seen[-2:] == [12.5, None]


def test_nonsense_cannot_be_typed_and_half_typed_numbers_go_away(
    qtbot: Any, box: NumberBox
) -> None:
    box.set_value(3)
    qtbot.keyClicks(box, "x")
    assert box.value() == 3
    box.lineEdit().setText("1e")
    assert box.value() == 3
    qtbot.keyClick(box, Qt.Key.Key_Return)
    assert box.lineEdit().text() == "3"


def test_small_and_large_numbers_keep_their_digits(box: NumberBox) -> None:
    for number in (1.25e-7, 0.001, 999.5):
        box.set_value(number)
        assert box.value() == pytest.approx(number)


@pytest.mark.parametrize(
    ("value", "steps", "expected"),
    [(25.0, 1, 26.0), (0.3, -1, 0.29), (0.0, 1, 0.1), (1000, 1, 1000)],
)
def test_the_buttons_step_by_what_is_felt(
    box: NumberBox, value: float, steps: int, expected: float
) -> None:
    box.set_value(value)
    box.stepBy(steps)
    assert box.value() == pytest.approx(expected)


def test_the_buttons_start_at_the_automatic_number(qtbot: Any) -> None:
    box = NumberBox(0, 1000, is_whole=True)
    qtbot.addWidget(box)
    box.show_automatic(24)
    box.stepBy(1)
    assert box.whole_value() == 25


def test_a_passing_wheel_changes_nothing(box: NumberBox) -> None:
    box.set_value(5)
    event = QWheelEvent(
        QPointF(5, 5),
        QPointF(5, 5),
        QPoint(0, 120),
        QPoint(0, 120),
        Qt.MouseButton.NoButton,
        Qt.KeyboardModifier.NoModifier,
        Qt.ScrollPhase.NoScrollPhase,
        False,
    )
    QApplication.sendEvent(box, event)
    assert box.value() == 5


# --- form to settings -----------------------------------------------------------------------------


def test_an_untouched_form_gives_the_defaults(form: DiffusionForm) -> None:
    assert form.values() == FormValues()
    assert form.values().config() == DiffusionConfig()
    assert form.values().tiling() == TilingConfig()


EDITS: dict[str, tuple[Callable[[DiffusionForm], None], dict[str, Any]]] = {
    "iterations": (lambda f: f.iterations.set_value(3), {"iterations": 3}),
    "contrast": (lambda f: f.contrast.set_value(2.5), {"contrast": 2.5}),
    "function": (lambda f: f.function.set_key("exponential"), {"function": "exponential"}),
    "tau": (lambda f: f.tau.set_value(0.1), {"tau": 0.1}),
    "presmoothing": (lambda f: f.presmooth_sigma.set_value(0.7), {"presmooth_sigma": 0.7}),
    "device": (lambda f: f.device.set_key("cuda"), {"device": "cuda"}),
    "result type": (lambda f: f.dtype.set_key("float32"), {"dtype": "float32"}),
    "scheme": (
        lambda f: (f.scheme.set_key("fed"), f.stopping_time.set_value(9)),
        {"scheme": "fed", "stopping_time": 9.0},
    ),
    "scope": (lambda f: f.noise_scope.set_key("slice"), {"noise_scope": "slice"}),
    "gaussian": (
        lambda f: (f.noise_kind.set_key("gaussian"), f.noise_sigma.set_value(25)),
        {"noise": Gaussian(25.0)},
    ),
    "no noise": (
        lambda f: (f.noise_kind.set_key("gaussian"), f.noise_sigma.set_value(0)),
        {"noise": Gaussian(0.0)},
    ),
    "gaussian to be estimated": (
        lambda f: f.noise_kind.set_key("gaussian"),
        {"noise_kind": "gaussian"},
    ),
    "poisson-gaussian": (
        lambda f: (
            f.noise_kind.set_key("poisson-gaussian"),
            f.gain.set_value(2),
            f.offset.set_value(-30),
        ),
        {"noise": PoissonGaussian(2.0, -30.0)},
    ),
    "rician": (
        lambda f: (f.noise_kind.set_key("rician"), f.noise_sigma.set_value(25)),
        {"noise": Rician(25.0)},
    ),
    "no rician noise": (
        lambda f: (f.noise_kind.set_key("rician"), f.noise_sigma.set_value(0)),
        {"noise": Gaussian(0.0)},
    ),
    "correlated": (
        lambda f: (
            f.noise_kind.set_key("correlated"),
            f.noise_sigma.set_value(25),
            f.correlation_length.set_value(0.7),
        ),
        {"noise": Correlated(25.0, 0.7)},
    ),
    "correlated, who knows how far": (
        lambda f: (f.noise_kind.set_key("correlated"), f.noise_sigma.set_value(25)),
        {"noise": Correlated(25.0)},
    ),
    "correlated to be estimated": (
        lambda f: f.noise_kind.set_key("correlated"),
        {"noise_kind": "correlated"},
    ),
    "poisson-gaussian to be estimated": (
        lambda f: f.noise_kind.set_key("poisson-gaussian"),
        {"noise_kind": "poisson-gaussian"},
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_control_reaches_the_settings(form: DiffusionForm, name: str) -> None:
    edit, expected = EDITS[name]
    if card(CLASSICAL_MODEL).settings & expected.keys():
        form.model.set_key(CLASSICAL_MODEL)
        expected = {"model": CLASSICAL_MODEL, **expected}
    changes = []
    form.changed.connect(lambda: changes.append(form.values().config().changed()))
    edit(form)
    assert form.values().config().changed() == expected
    assert changes[-1] == expected


def test_every_setting_has_a_control() -> None:
    reached = {name for _, expected in EDITS.values() for name in expected}
    # Chosen below; single precision is all that a layer needs; its file declares what is missing;
    # and pixels count as square unless Python says otherwise.
    without = {"model", "precision", "missing", "use_spacing"}
    assert reached | without == {field.name for field in fields(DiffusionConfig)}


def test_every_model_can_be_chosen(form: DiffusionForm) -> None:
    assert form.values().config().model == "auto"
    assert card(STANDARD_MODEL).title in form.model_info.text()
    for model in list_cards():
        form.model.set_key(model.key)
        assert form.values().config().model == model.key
        assert form.model_info.text() == model.summary


def test_no_more_iterations_than_the_model_was_made_for(form: DiffusionForm) -> None:
    form.model.set_key(CLASSICAL_MODEL)
    form.iterations.set_value(40)
    form.model.set_key(STANDARD_MODEL)
    assert form.values().iterations == card(STANDARD_MODEL).most_iterations == 5
    form.iterations.set_value(9)
    assert form.values().iterations == 5


def test_tile_and_outputs(form: DiffusionForm) -> None:
    form.tile.set_value(256)
    form.residual.setChecked(True)
    form.diffusivity.setChecked(True)
    form.denoised.setChecked(False)
    assert form.values().tiling() == TilingConfig(tile=256)
    outputs = form.values().outputs
    assert outputs == Outputs(denoised=False, residual=True, diffusivity=True)
    assert outputs.has_maps


def test_the_step_of_the_maps(form: DiffusionForm) -> None:
    form.model.set_key("perona-malik")
    assert form.map_step._edit.placeholderText() == "last"
    form.map_step.set_value(7)
    assert form.values().maps() == MapsConfig()  # no map is shown
    form.orientation.setChecked(True)
    assert form.values().maps() == MapsConfig(orientation=True, step=7)
    form.map_step.set_value(None)
    assert form.values().maps() == MapsConfig(orientation=True)
    form.show_findings(None, DiffusionConfig(iterations=20))
    assert form.map_step._edit.placeholderText() == "last (20)"
    values = FormValues(outputs=Outputs(orientation=True), map_step=3)
    form.set_values(values)
    assert form.values() == values


def test_a_learned_model_gets_none_of_the_classical_settings() -> None:
    values = FormValues(
        model="unet", contrast=2.0, function="exponential", scheme="fed", presmooth_sigma=1.0
    )
    assert values.config() == DiffusionConfig(model="unet")


def test_settings_out_of_range_are_told() -> None:
    with pytest.raises(InvalidSettingError):
        FormValues(tau=-1.0).config()


def test_values_go_in_and_come_out(form: DiffusionForm) -> None:
    values = FormValues(
        noise_kind="poisson-gaussian", gain=1.5, offset=2.0, iterations=3, tau=0.125, tile=64
    )
    seen = []
    form.changed.connect(lambda: seen.append(1))
    form.set_values(values)
    assert form.values() == values
    assert not seen  # filling the form isn't the user's doing


# --- what is shown --------------------------------------------------------------------------------


def test_only_what_applies_is_shown(form: DiffusionForm) -> None:
    form.show()
    form.advanced_button.setChecked(True)
    assert not form.contrast.isVisible()
    form.model.set_key(CLASSICAL_MODEL)
    assert form.contrast.isVisible()
    assert not form.noise_sigma.isVisible()
    assert not form.stopping_time.isVisible()
    form.noise_kind.set_key("gaussian")
    form.scheme.set_key("fed")
    assert form.noise_sigma.isVisible()
    assert form.stopping_time.isVisible()
    assert not form.tau.isVisible()
    form.noise_kind.set_key("poisson-gaussian")
    assert form.gain.isVisible()
    assert form.offset.isVisible()
    assert not form.noise_sigma.isVisible()
    form.noise_kind.set_key("rician")
    assert form.noise_sigma.isVisible()
    assert not form.gain.isVisible()
    assert not form.correlation_length.isVisible()
    form.noise_kind.set_key("correlated")
    assert form.noise_sigma.isVisible()
    assert form.correlation_length.isVisible()


def test_every_noise_model_can_be_chosen_and_its_parameters_entered(form: DiffusionForm) -> None:
    assert list(NOISE_TITLES) == list(NOISE_CHOICES) == ["auto", *NOISE_MODELS]
    for key, model in NOISE_MODELS.items():
        form.noise_kind.set_key(key)
        shown = {name for name, box in form._noise_boxes.items() if box.isVisibleTo(form)}
        # A magnitude image has its zero at zero.
        assert shown == set(model.parameters()) - {"pedestal"}


def test_every_control_explains_itself(form: DiffusionForm) -> None:
    silent = {"advanced", "layer_info", "model_info", "noise_info"}
    for name, control in vars(form).items():
        if isinstance(control, QWidget) and not name.startswith("_") and name not in silent:
            assert control.toolTip(), name


def test_the_unit_stands_beside_the_noise(form: DiffusionForm) -> None:
    form.show_layer("a layer", "HU")
    labels = [form._rows.labelForField(w).text() for w in (form.noise_sigma, form.offset)]
    assert labels == ["Level (HU)", "Offset (HU²)"]


def test_the_line_of_the_noise_plot_lies_at_the_mean_of_noisy_intensities(
    form: DiffusionForm,
) -> None:
    model = Rician(10.0)
    curve = NoiseCurve(np.array([12.5, 200.0]), np.array([6.6, 10.0]), np.ones(2))
    form.noise_plot.show_noise(curve, model)
    x, y = form.noise_plot._line.getData()
    assert x.min() == pytest.approx(12.5, rel=0.05)
    assert y.min() == pytest.approx(6.55, rel=0.05)
    assert y.max() == pytest.approx(10, rel=0.01)
