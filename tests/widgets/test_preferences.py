"""What forms begin with: napari's preferences, and what was set earlier in the session."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, get_args

import pytest
from napari.components import ViewerModel
from napari.settings import get_plugin_settings
from npe2 import PluginManifest
from qtpy.QtWidgets import QAbstractButton, QAbstractSpinBox, QComboBox, QLineEdit, QWidget

from napari_learned_diffusion.config import DEFAULT_MODEL, Device
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.widgets._form import FormValues
from napari_learned_diffusion.widgets._preferences import PLUGIN, Preferences, Session, opening
from napari_learned_diffusion.widgets.batch import BatchWidget
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

Make = Callable[[Any], DenoiseWidget]
Finish = Callable[[DenoiseWidget], None]


@pytest.fixture
def chosen(npe2pm: Any, plugin_settings: None) -> Any:
    """The plugin's page of the preferences."""
    npe2pm.register(PluginManifest.from_distribution(PLUGIN))
    return get_plugin_settings(PLUGIN).denoising  # type: ignore[attr-defined]


def test_the_manifest_has_the_defaults_and_every_choice(chosen: Any) -> None:
    assert Preferences.read() == Preferences()
    fields = type(chosen).model_fields
    assert fields["model"].json_schema_extra["enum"] == [DEFAULT_MODEL, *REGISTRY]
    assert fields["device"].json_schema_extra["enum"] == list(get_args(Device))
    assert all(field.title and field.description for field in fields.values())


def test_a_napari_that_does_not_know_the_plugin_gives_the_defaults(
    npe2pm: Any, plugin_settings: None
) -> None:
    assert Preferences.read() == Preferences()


def test_forms_begin_with_the_preferences(
    model: ViewerModel, make_widget: Make, chosen: Any, stack: Any, qtbot: Any
) -> None:
    chosen.model, chosen.device = "perona-malik", "cpu"
    chosen.tile, chosen.memory, chosen.live_preview = 96, 100, True
    widget = make_widget(model)
    values = widget.form.values()
    assert (values.model, values.device, values.tile) == ("perona-malik", "cpu", 96)
    assert values.tiling().memory_budget == 100 << 20
    assert widget.live_preview.isChecked()
    batch = BatchWidget(model)
    qtbot.addWidget(batch)
    assert batch.form.values() == values


def test_the_memory_for_slices_as_you_scroll_is_as_chosen(
    model: ViewerModel, make_widget: Make, finish: Finish, chosen: Any, stack: Any
) -> None:
    chosen.cache = 16
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_as_you_scroll()
    finish(widget)
    assert model.layers["cells denoised"].data._capacity == (16 << 20) // stack[0].nbytes


def test_a_form_that_is_opened_again_is_as_it_was(
    make_napari_viewer: Any, jobs: Any, stack: Any, finish: Finish
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(stack)
    widget = DenoiseWidget(viewer, jobs.load)
    viewer.window.add_dock_widget(widget, name="Denoise")
    widget.form.model.set_key("perona-malik")
    widget.form.contrast.set_value(2.5)
    widget.form.residual.setChecked(True)
    widget.form.advanced_button.setChecked(True)
    widget.stack_way.set_key("scroll")
    widget.live_preview.setChecked(True)
    finish(widget)
    values = widget.form.values()
    viewer.window.remove_dock_widget(widget)
    finish(widget)
    again = DenoiseWidget(viewer, jobs.load)
    viewer.window.add_dock_widget(again, name="Denoise")
    assert again.form.values() == values
    assert again.form.contrast.isVisibleTo(again.form)
    assert again.stack_way.key() == "scroll"
    assert again.live_preview.isChecked()
    finish(again)
    viewer.window.remove_dock_widget(again)
    finish(again)


def test_the_batch_remembers_too(model: ViewerModel, qtbot: Any) -> None:
    batch = BatchWidget(model)
    qtbot.addWidget(batch)
    batch.form.iterations.set_value(3)
    batch.leave()
    again = BatchWidget(model)
    qtbot.addWidget(again)
    assert again.form.values().iterations == 3


def test_a_preference_that_was_changed_since_wins(chosen: Any) -> None:
    earlier = Session(
        Preferences.read(), FormValues(model="unet", device="cpu", iterations=2), live_preview=True
    )
    assert opening(earlier) == earlier
    chosen.model, chosen.live_preview = "perona-malik", False
    assert opening(earlier).values == FormValues(model="perona-malik", device="cpu", iterations=2)
    assert opening(earlier).live_preview  # which has not been changed
    chosen.live_preview = True
    assert opening(Session(Preferences(), FormValues())).live_preview


def test_napari_shows_the_page(make_napari_viewer: Any, chosen: Any) -> None:
    from napari._qt.dialogs.preferences_dialog import PreferencesDialog

    viewer = make_napari_viewer()
    dialog = PreferencesDialog(parent=viewer.window._qt_window)
    titles = [dialog._list.item(row).text() for row in range(dialog._list.count())]
    assert "Learned Diffusion" in titles
    dialog.close()
    dialog.deleteLater()
    gc.collect()


@pytest.mark.parametrize("make", [DenoiseWidget, BatchWidget])
def test_every_control_explains_itself(model: ViewerModel, qtbot: Any, make: Any) -> None:
    widget = make(model)
    qtbot.addWidget(widget)
    controls = QAbstractButton | QComboBox | QAbstractSpinBox | QLineEdit
    silent = [
        f"{type(child).__name__} {child.objectName()} {getattr(child, 'text', str)()}"
        for child in widget.findChildren(QWidget)
        if isinstance(child, controls) and not child.toolTip() and not _is_part(child)
    ]
    assert not silent


def _is_part(child: QWidget) -> bool:
    """Whether a control belongs to another one, or to Qt's tables."""
    names = "qt_spinbox_lineedit", "qt_tableview_cornerbutton"
    return child.objectName() in names or type(child.parent()).__name__ in {
        "NumberBox",
        "BatchView",
        "QTableView",
    }
