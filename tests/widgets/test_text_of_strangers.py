"""Names, units, summaries and messages from elsewhere: shown as text in every form, never drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyqtgraph as pg
import pytest
import tifffile
from napari.components import ViewerModel
from napari.utils.notifications import notification_manager
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QAbstractItemView, QComboBox, QFileDialog, QLabel, QMessageBox, QWidget

from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.core.user_models import save_user_model
from napari_learned_diffusion.core.zoo import learned_model
from napari_learned_diffusion.jobs import check as check_jobs
from napari_learned_diffusion.jobs import inspection as inspection_jobs
from napari_learned_diffusion.widgets import _runner
from napari_learned_diffusion.widgets._layers import INTENSITY_UNIT
from napari_learned_diffusion.widgets._names import LONGEST_FILE_NAME, as_file_name
from napari_learned_diffusion.widgets._text import plain, short_name
from napari_learned_diffusion.widgets.batch import BatchWidget
from napari_learned_diffusion.widgets.check import CheckWidget
from napari_learned_diffusion.widgets.denoise import DenoiseWidget
from napari_learned_diffusion.widgets.finetune import FineTuneWidget
from napari_learned_diffusion.widgets.inspection import InspectionWidget

TIMEOUT = 60_000

IMAGE = '<img src="x.png">'
HOSTILE = [
    IMAGE,
    '<a href="x">here</a>',
    "<b>bold</b>",
    "&lt;img&gt; &amp;",
    "<table><tr><td>1",
    "</qt>",
]
ODD = [
    "[red]brackets[/red]",
    "cells\nsecond line",
    "🧬 émoji 細胞",
    "خلايا",
    "a\u202eb",
    "x" * 300,
    "a/b\\c:d*?",
    "%s {0} %(name)s",
    "' \" $(ls) `ls`",
]


def _would_be_drawn(text: str) -> bool:
    """Whether Qt would draw something of a text; napari's own tooltips are rich, but escaped."""
    rich = Qt.mightBeRichText(text)
    return rich and re.search(r"<(img|a |b>|table|/qt>.)", text.removeprefix("<qt>")) is not None


def _rich_texts(widget: QWidget) -> Iterator[str]:
    """Every text of a form that could be drawn as markup: tooltips, labels, lists, plots."""
    for child in [widget, *widget.findChildren(QWidget)]:
        yield child.toolTip()
        yield child.whatsThis()
        if isinstance(child, QLabel) and child.textFormat() != Qt.TextFormat.PlainText:
            yield child.text()
        if isinstance(child, QComboBox):
            for at in range(child.count()):
                yield str(child.itemData(at, Qt.ItemDataRole.ToolTipRole) or "")
        model = child.model() if isinstance(child, QAbstractItemView) else None
        for row in range(model.rowCount() if model is not None else 0):
            for column in range(model.columnCount()):
                index = model.index(row, column)
                yield str(model.data(index, Qt.ItemDataRole.ToolTipRole) or "")
        if isinstance(child, pg.GraphicsView):
            for item in child.scene().items():
                if isinstance(item, pg.AxisItem):
                    yield item.label.toHtml().partition("<body")[2]


def _nothing_is_drawn(widget: QWidget) -> None:
    drawn = [text for text in _rich_texts(widget) if _would_be_drawn(text)]
    # What the form itself writes: the legend of the fine-tuning.
    assert [text for text in drawn if "held out" not in text] == []


@pytest.fixture(params=[*HOSTILE, *ODD], ids=lambda name: name[:20])
def name(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def layers(model: ViewerModel, name: str) -> ViewerModel:
    """A layer of that name and with that unit, and a mask of that name."""
    rng = np.random.default_rng(0)
    data = (100 + rng.normal(0, 5, (3, 24, 32))).astype(np.float32)
    model.add_image(data, name=name, metadata={INTENSITY_UNIT: name})
    model.add_labels(np.zeros((3, 24, 32), int), name=f"{name} mask")
    model.layers.selection.active = model.layers[0]
    return model


@pytest.fixture
def own_model(user_models_folder: Path, name: str) -> Path:
    """A model whose card says that, and a damaged file of that name where there can be one."""
    facts = {
        "summary": name,
        "noise_range": [5.0, 75.0],
        "suggestion": {"iterations": 2, "tau": 0.2},
        "gain_dB": 1.0,
        "date": name,
        "version": name,
    }
    path = save_user_model("own", learned_model("foe-splines"), facts).path
    with suppress(OSError):  # where no file can be called that
        Path(f"{user_models_folder}/{name}.safetensors").touch()
    return path


# --- the pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_text_is_not_taken_for_rich_text(text: str) -> None:
    for shown in (text, f"line\n{text}", f"{text}\n{text}", f"  {text}", f"“{text}” is empty."):
        assert not Qt.mightBeRichText(plain(shown))
        assert plain(shown).replace("\u200b", "") == shown


def test_a_name_is_one_line_and_not_too_long(name: str) -> None:
    shown = short_name(name)
    assert 0 < len(shown) <= 80
    assert "\n" not in shown


def test_a_name_becomes_a_file_name_of_every_system(name: str, tmp_path: Path) -> None:
    made = as_file_name(name)
    assert made
    assert not set('<>:"/\\|?*\n') & set(made)
    assert made == made.strip(" .")
    path = tmp_path / f"{made}.tif"
    path.touch()
    assert path.parent == tmp_path


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("", "layer"),
        (" ... ", "layer"),
        ("..", "layer"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("~root", "root"),
        ("con", "_con"),
        ("NUL.tif", "_NUL.tif"),
        ("細" * 200, "細" * (LONGEST_FILE_NAME // 3)),
    ],
)
def test_names_that_no_file_may_have(name: str, made: str) -> None:
    assert as_file_name(name) == made


# --- the forms ------------------------------------------------------------------------------------


def test_the_denoise_form(
    layers: ViewerModel,
    name: str,
    own_model: Path,
    jobs: Any,
    make_widget: Callable[[Any], DenoiseWidget],
    finish: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles: list[str] = []
    real = _runner._ActivityProgress

    def spy(*given: Any, **options: Any) -> Any:
        titles.append(options["desc"])
        return real(*given, **options)

    monkeypatch.setattr(_runner, "_ActivityProgress", spy)
    notification_manager.records.clear()
    widget = make_widget(layers)
    assert widget.form.layer.count() == 2
    assert "\n" not in widget.form.layer.currentText()
    widget.form.model.set_key("my/own")
    widget.form.model.refresh()
    widget.estimate()
    finish(widget)
    widget.denoise_stack()
    finish(widget)
    assert f"{name} denoised" in [layer.name for layer in layers.layers]
    widget.denoise_as_you_scroll()
    finish(widget)
    _nothing_is_drawn(widget)
    jobs.error = FileFormatError(f"{name} is no image.")
    widget.denoise_slice()
    finish(widget)
    assert widget.status.is_error
    _nothing_is_drawn(widget)
    assert titles
    assert not any(map(_would_be_drawn, titles))
    assert not any(map(Qt.mightBeRichText, (n.message for n in notification_manager.records)))
    widget.form.layer.setCurrentIndex(1)  # the mask can't be denoised
    assert widget.form.layer_info.is_error
    _nothing_is_drawn(widget)
    widget.cancel()


def test_the_inspect_form(qtbot: Any, layers: ViewerModel, own_model: Path) -> None:
    widget = InspectionWidget(layers, lambda: inspection_jobs)
    qtbot.addWidget(widget)
    widget.settings.set_key("own")
    widget.form.model.set_key("my/own")
    widget.form.device.set_key("cpu")
    widget.count.set_value(2)
    widget.inspect()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert not widget.status.is_error, widget.status.text()
    _nothing_is_drawn(widget)


def test_the_check_form(
    qtbot: Any, layers: ViewerModel, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = layers.layers[0]
    mark = {"role": "denoised", "source_id": str(source.unique_id)}
    metadata = {"napari-learned-diffusion": mark, INTENSITY_UNIT: name}
    layers.add_image(source.data + 1, name=f"{name} denoised", metadata=metadata)
    widget = CheckWidget(layers, lambda: check_jobs)
    qtbot.addWidget(widget)
    widget.check()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert widget.cells["Noise (flat areas)"][0].text() != "–"
    _nothing_is_drawn(widget)
    offered: list[str] = []

    def choose(_: Any, __: str, proposed: str, ___: str) -> tuple[str, str]:
        offered.append(proposed)
        return str(tmp_path / proposed), ""

    monkeypatch.setattr(QFileDialog, "getSaveFileName", choose)
    widget.export_button.click()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert not widget.status.is_error, widget.status.text()
    assert (tmp_path / offered[0]).exists()
    assert (tmp_path / offered[0]).with_suffix(".json").exists()
    _nothing_is_drawn(widget)


def test_the_fine_tuning_form(
    qtbot: Any,
    layers: ViewerModel,
    own_model: Path,
    user_models_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widget = FineTuneWidget(layers)
    qtbot.addWidget(widget)
    asked: list[str] = []

    def ask(_: Any, __: str, question: str) -> Any:
        asked.append(question)
        return QMessageBox.StandardButton.No

    monkeypatch.setattr(QMessageBox, "question", ask)
    notification_manager.records.clear()
    for at in range(widget.own.count()):
        widget.own.setCurrentIndex(at)
        _nothing_is_drawn(widget)
        widget.delete_button.click()
    assert asked
    assert not any(map(Qt.mightBeRichText, asked))
    widget.new_regions()
    widget.own.setCurrentIndex(widget.own.count() - 1)
    widget.regions.setCurrentIndex(0)
    _nothing_is_drawn(widget)
    assert not any(map(Qt.mightBeRichText, (n.message for n in notification_manager.records)))


def test_the_batch_form(
    qtbot: Any, layers: ViewerModel, name: str, own_model: Path, tmp_path: Path
) -> None:
    widget = BatchWidget(layers)
    qtbot.addWidget(widget)
    widget.out.setText(str(tmp_path / "out"))
    widget.form.model.set_key("perona-malik")
    widget.form.iterations.set_value(1)
    layers.layers.selection = {layers.layers[0]}
    widget.add_layers()
    bad = tmp_path / f"{as_file_name(name)}.tif"
    bad.write_bytes(b"x")
    widget.add_paths([bad])
    if name in HOSTILE and "/" not in name:
        worse = tmp_path / f"{name}.tif"
        tifffile.imwrite(worse, np.zeros((8, 8), np.uint8))
        widget.add_paths([worse])
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    _nothing_is_drawn(widget)
    widget.start()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert widget.table.rows[0].state == "done", widget.table.rows[0].describe()
    for row in range(len(widget.table.rows)):
        widget.view.selectRow(row)
        _nothing_is_drawn(widget)


def test_layers_whose_names_make_one_file_name_are_two_files(
    qtbot: Any, model: ViewerModel, tmp_path: Path
) -> None:
    widget = BatchWidget(model)
    qtbot.addWidget(widget)
    widget.out.setText(str(tmp_path))
    for value, name in enumerate(("a/b", "a:b", "a?b")):
        model.add_image(np.full((24, 32), value, np.uint8), name=name)
    model.layers.select_all()
    widget.add_layers()
    widget.add_layers()
    assert "3 on the list already" in widget.status.text()
    widget.form.model.set_key("perona-malik")
    widget.start()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    written = sorted(p.name for p in tmp_path.glob("*.tif"))
    assert written == ["a_b 2.tif", "a_b 3.tif", "a_b.tif"]
    assert [int(tifffile.imread(tmp_path / n).max()) for n in ("a_b.tif", *written[:2])] == [
        0,
        1,
        2,
    ]
