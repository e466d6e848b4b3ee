"""The widget in napari's own window: its menus, its docks, its themes, and how it goes away."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from napari.settings import get_settings
from napari.utils import progress
from npe2 import PluginManifest
from qtpy.QtCore import QCoreApplication, QEvent, QPoint, QRect, Qt
from qtpy.QtGui import QAction, QKeySequence
from qtpy.QtWidgets import (
    QAbstractButton,
    QApplication,
    QComboBox,
    QLabel,
    QScrollArea,
    QWidget,
)

from napari_learned_diffusion.widgets._controls import NumberBox
from napari_learned_diffusion.widgets.batch import SHORTCUT as BATCH_SHORTCUT
from napari_learned_diffusion.widgets.denoise import SHORTCUTS, DenoiseWidget

TIMEOUT = 20_000
PLUGIN = "napari-learned-diffusion"
TITLE = "Denoise by diffusion"


@pytest.fixture
def dock(jobs: Any) -> Callable[[Any], DenoiseWidget]:
    """Puts a widget into a viewer's window."""

    def add(viewer: Any) -> DenoiseWidget:
        widget = DenoiseWidget(viewer, jobs.load)
        viewer.window.add_dock_widget(widget, name=TITLE, area="right")
        return widget

    return add


def _let_go() -> None:
    gc.collect()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    QApplication.processEvents()


def test_importing_and_opening_the_form_leaves_torch_out() -> None:
    code = """
import sys
from qtpy.QtWidgets import QApplication
app = QApplication([])
from napari.components import ViewerModel
from napari_learned_diffusion.widgets.denoise import DenoiseWidget
viewer = ViewerModel()
widget = DenoiseWidget(viewer)
assert "torch" not in sys.modules, "torch"
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
    )


def test_a_session_through_napari_s_proxy(
    qtbot: Any, make_napari_viewer_proxy: Any, dock: Any, jobs: Any, stack: Any, finish: Any
) -> None:
    viewer = make_napari_viewer_proxy()
    viewer.add_image(stack, name="cells", scale=(3, 1, 1), units=("um",) * 3)
    widget = dock(viewer)
    widget.estimate()
    finish(widget)
    assert "Gaussian" in widget.form.noise_info.text()
    widget.live_preview.setChecked(True)
    finish(widget)
    viewer.dims.set_point(0, 9)
    finish(widget)
    np.testing.assert_array_equal(viewer.layers["cells preview"].data, stack[3:4] + 1)
    widget.form.residual.setChecked(True)
    for _ in range(2):
        qtbot.mouseClick(widget.slice_button, Qt.MouseButton.LeftButton)
        finish(widget)
        qtbot.mouseClick(widget.stack_button, Qt.MouseButton.LeftButton)
        finish(widget)
    assert [layer.name for layer in viewer.layers] == [
        "cells",
        "cells residual (slice)",
        "cells residual",
        "cells denoised (slice)",
        "cells denoised",
        "cells preview",
    ]
    np.testing.assert_array_equal(viewer.layers["cells denoised"].data, stack + 1)
    jobs.gate.clear()
    jobs.running.clear()
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    qtbot.mouseClick(widget.cancel_button, Qt.MouseButton.LeftButton)
    jobs.gate.set()
    finish(widget)
    np.testing.assert_array_equal(viewer.layers["cells denoised"].data, stack + 1)
    widget.live_preview.setChecked(False)


@pytest.mark.parametrize("by_user", [False, True], ids=["closed by code", "closed by hand"])
def test_closing_the_viewer_ends_the_run(
    qtbot: Any, make_napari_viewer: Any, dock: Any, jobs: Any, stack: Any, by_user: bool
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.add_image(stack, name="cells")
    widget = dock(viewer)
    jobs.gate.clear()
    widget.live_preview.setChecked(True)
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    if by_user:
        viewer.window._qt_window.close()
        del viewer.window._qt_window  # napari itself doesn't notice, and would close it again
    else:
        viewer.close()
    qtbot.waitUntil(lambda: jobs.closed == 1, timeout=TIMEOUT)
    assert not progress._all_instances


def test_closing_the_dock_ends_the_run_and_the_preview(
    qtbot: Any, make_napari_viewer: Any, dock: Any, jobs: Any, stack: Any, finish: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(stack, name="cells")
    widget = dock(viewer)
    widget.live_preview.setChecked(True)
    finish(widget)
    jobs.gate.clear()
    jobs.running.clear()
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    viewer.window.remove_dock_widget(widget)
    finish(widget)
    assert jobs.closed == 1
    assert [layer.name for layer in viewer.layers] == ["cells"]
    gone = weakref.ref(widget)
    del widget
    _let_go()
    assert gone() is None  # nothing in the viewer holds on to it
    viewer.dims.set_point(0, 1)
    viewer.add_image(stack)
    viewer.theme = "light"


@pytest.mark.parametrize("change", ["hide", "float"])
def test_hiding_or_moving_the_dock_does_not_stop_the_run(
    qtbot: Any,
    make_napari_viewer: Any,
    dock: Any,
    jobs: Any,
    stack: Any,
    finish: Any,
    change: str,
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.add_image(stack, name="cells")
    widget = dock(viewer)
    jobs.gate.clear()
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    if change == "hide":
        widget.parent().hide()
    else:
        widget.parent().setFloating(True)
    qtbot.wait(50)
    jobs.gate.set()
    finish(widget)
    assert "cells denoised" in viewer.layers


def test_two_viewers_keep_apart(
    make_napari_viewer: Any, dock: Any, stack: Any, finish: Any
) -> None:
    first, second = make_napari_viewer(), make_napari_viewer()
    first.add_image(stack, name="one")
    second.add_image(stack * 2, name="two")
    widgets = dock(first), dock(second)
    for widget in widgets:
        widget.denoise_stack()
    for widget in widgets:
        finish(widget)
    assert [layer.name for layer in first.layers] == ["one", "one denoised"]
    assert [layer.name for layer in second.layers] == ["two", "two denoised"]
    np.testing.assert_array_equal(second.layers[1].data, stack * 2 + 1)


def test_the_activity_dock_follows_the_run(
    qtbot: Any, make_napari_viewer: Any, dock: Any, jobs: Any, stack: Any, finish: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(stack, name="cells")
    widget = dock(viewer)
    jobs.gate.clear()
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    (bar,) = progress._all_instances
    assert "Denoising cells" in bar.desc
    bar.cancel()
    finish(widget)
    assert jobs.closed == 1
    assert not progress._all_instances
    assert [layer.name for layer in viewer.layers] == ["cells"]


def test_the_keys_press_the_buttons_and_are_free(
    qtbot: Any, make_napari_viewer: Any, dock: Any, stack: Any, finish: Any
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.add_image(stack, name="cells")
    window = viewer.window._qt_window
    taken = {keys.toString() for a in window.findChildren(QAction) for keys in a.shortcuts()}
    taken |= {
        QKeySequence(str(keys)).toString()
        for bindings in get_settings().shortcuts.shortcuts.values()
        for keys in bindings
    }
    assert not taken & {*SHORTCUTS.values(), BATCH_SHORTCUT}
    widget = dock(viewer)
    for name, keys in SHORTCUTS.items():
        assert keys in getattr(widget, name).toolTip()
        assert getattr(widget, name).shortcut().toString() == keys
    window.activateWindow()
    pressed = []
    widget.slice_button.clicked.connect(lambda: pressed.append("slice"))
    widget.slice_button.animateClick()
    finish(widget)
    qtbot.waitUntil(lambda: pressed == ["slice"], timeout=TIMEOUT)
    finish(widget)


def _find_action(menu: Any, text: str) -> Any:
    for action in menu.actions():
        if action.menu() is not None:
            found = _find_action(action.menu(), text)
            if found is not None:
                return found
        elif text in action.text().replace("&", ""):
            return action
    return None


@pytest.mark.parametrize("menu_name", ["plugins_menu", "layers_menu"])
def test_the_menus_open_the_widget(
    make_napari_viewer: Any, npe2pm: Any, stack: Any, menu_name: str
) -> None:
    npe2pm.register(PluginManifest.from_distribution(PLUGIN))
    viewer = make_napari_viewer()
    viewer.add_image(stack, name="cells")
    action = _find_action(getattr(viewer.window, menu_name), TITLE)
    assert action is not None, f"“{TITLE}” isn't in the {menu_name}"
    action.trigger()
    (widget,) = viewer.window._qt_window.findChildren(DenoiseWidget)
    assert widget.form.layer.currentText() == "cells"


# --- how it looks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theme", "is_open", "scale"),
    [
        ("dark", False, 1.0),
        ("dark", True, 1.0),
        ("light", False, 1.0),
        ("light", True, 1.0),
        ("dark", False, 1.25),
        ("dark", True, 1.25),
    ],
)
def test_nothing_is_clipped_at_1280_by_800(
    qtbot: Any,
    make_napari_viewer: Any,
    dock: Any,
    stack: Any,
    finish: Any,
    theme: str,
    is_open: bool,
    scale: float,
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.theme = theme
    appearance = get_settings().appearance
    appearance.font_size = math.ceil(scale * appearance.font_size)
    viewer.window.resize(1280, 800)
    viewer.add_image(stack, name="a layer with a rather long name, as files often have")
    widget = dock(viewer)
    widget.estimate()
    finish(widget)
    widget.form.noise_kind.set_key("poisson-gaussian")
    widget.form.advanced_button.setChecked(is_open)
    QApplication.processEvents()
    scroll = widget.findChild(QScrollArea)
    window = viewer.window._qt_window
    assert window.width() <= 1280
    assert window.height() <= 800
    assert widget.form.width() <= scroll.viewport().width()
    if not is_open and scale == 1:
        assert widget.form.height() <= scroll.viewport().height()
    outside = [child for child in _visible(widget) if not _lies_in(child, widget, scroll)]
    assert not outside
    cramped = [child for child in _visible(widget) if _is_cramped(child)]
    assert not cramped


def test_bad_news_can_be_read_in_both_themes(
    make_napari_viewer: Any, dock: Any, stack: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(stack)
    widget = dock(viewer)
    widget.status.show_error("Something went wrong")
    colours = set()
    for theme in ("dark", "light"):
        viewer.theme = theme
        colours.add(widget.status.styleSheet())
    assert len(colours) == 2


def _visible(widget: DenoiseWidget) -> list[QWidget]:
    kinds = QAbstractButton | QComboBox | QLabel | NumberBox
    return [
        child
        for child in widget.findChildren(QWidget)
        if isinstance(child, kinds) and child.isVisible()
    ]


def _lies_in(child: QWidget, widget: QWidget, scroll: QScrollArea) -> bool:
    """Whether a control is whole, or at least can be scrolled to."""
    area: QWidget = scroll.widget() if scroll.isAncestorOf(child) else widget
    return area.rect().contains(QRect(child.mapTo(area, QPoint(0, 0)), child.size()))


def _is_cramped(child: QWidget) -> bool:
    if isinstance(child, QLabel) and child.wordWrap():
        return child.heightForWidth(child.width()) > child.height()
    if isinstance(child, QComboBox):
        return False  # a long name is elided, by design
    return child.width() < child.minimumSizeHint().width()
