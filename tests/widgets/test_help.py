"""The table of what to choose: in the documentation, in a window, and true to what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from napari_learned_diffusion.core.zoo import CLASSICAL_MODEL, card
from napari_learned_diffusion.widgets._controls import NOISE_TITLES
from napari_learned_diffusion.widgets._help import ADVICE, TITLE, HelpDialog, as_markdown
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="the source distribution holds no docs")
def test_the_documentation_has_the_same_table() -> None:
    assert as_markdown() in (DOCS / "choosing.md").read_text("utf-8")


def test_it_names_what_the_form_has() -> None:
    assert {advice.model for advice in ADVICE} >= {"Automatic", card(CLASSICAL_MODEL).title}
    text = " ".join(advice.noise for advice in ADVICE)
    assert all(title in text for title in NOISE_TITLES.values())


def test_the_button_opens_a_window_of_napari_s(
    qtbot: Any, make_napari_viewer: Any, jobs: Any
) -> None:
    viewer = make_napari_viewer(show=True)
    widget = DenoiseWidget(viewer, jobs.load)
    viewer.window.add_dock_widget(widget, name="Denoise")
    widget.form.help_button.click()
    window = viewer.window._qt_window
    (dialog,) = window.findChildren(HelpDialog)
    assert dialog.windowTitle() == TITLE
    assert ADVICE[0].images in dialog.text.toPlainText()
    dialog.close()
    qtbot.waitUntil(lambda: not window.findChildren(HelpDialog), timeout=20_000)
