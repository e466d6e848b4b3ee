"""The controls of the form: what the user edits, read out as plain `FormValues`."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtGui import QStandardItemModel, QValidator, QWheelEvent
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QCheckBox,
    QComboBox,
    QFormLayout,
    QGridLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from napari_learned_diffusion.config import DEFAULT_MODEL, MAX_ITERATIONS, DiffusionConfig
from napari_learned_diffusion.core.noise import NOISE_MODELS
from napari_learned_diffusion.core.text import one_line
from napari_learned_diffusion.core.user_models import PREFIX, is_user_key
from napari_learned_diffusion.core.zoo import BEST_MODEL, STANDARD_MODEL, damaged_models, list_cards
from napari_learned_diffusion.widgets._form import FormValues, Outputs
from napari_learned_diffusion.widgets._help import TITLE as HELP_TITLE
from napari_learned_diffusion.widgets._help import HelpDialog
from napari_learned_diffusion.widgets._noise_plot import NoisePlot
from napari_learned_diffusion.widgets._text import PlainLabel, breakable, plain, short_name

if TYPE_CHECKING:
    from napari_learned_diffusion.core.noise_estimation import NoiseEstimate
    from napari_learned_diffusion.core.zoo import ModelCard

AUTOMATIC = "automatic"

NOISE_TITLES = {
    "auto": "Automatic",
    "gaussian": "Gaussian",
    "poisson-gaussian": "Poisson–Gaussian",
    "rician": "Rician",
    "correlated": "Correlated",
}
SCOPE_TITLES = {"auto": "Automatic", "stack": "Whole stack", "slice": "Each slice"}
FUNCTION_TITLES = {"rational": "1 / (1 + s/K²)", "exponential": "exp(−s/K²)"}
SCHEME_TITLES = {"explicit": "Explicit Euler", "fed": "Fast explicit diffusion"}
DEVICE_TITLES = {"auto": "Automatic", "cpu": "CPU", "cuda": "CUDA (NVIDIA)", "mps": "MPS (Apple)"}

TYPE_TITLES = {"auto": "Automatic", "same": "As the image", "float32": "float32"}

SMALLEST_TILE = 32
LARGEST_TILE = 65_536
LARGEST_NUMBER = 1e30


class Colours(NamedTuple):
    """CSS colours that can be read on a theme's background, which napari's own red can't be."""

    background: str
    quiet: str
    error: str
    accent: str

    @classmethod
    def of(cls, theme: Any) -> Colours:
        """The colours that go with a theme of napari."""
        background = theme.to_rgb_dict()["background"]
        if theme.type == "dark":
            return cls(background, "#c3c7ce", "#ff8a80", "#7ea2ff")
        return cls(background, "#4a4a4f", "#b3261e", "#2456c8")


class NumberBox(QAbstractSpinBox):
    """A number, or nothing: an empty box means *automatic* and says so, with the number in use.

    Qt's own spin boxes can't be empty and round to a fixed number of decimals, which is wrong for
    intensities that may be 0.001 or 40 000.

    Parameters
    ----------
    minimum, maximum
        Allowed range, both included.
    is_whole
        Whether only whole numbers are taken.
    start
        Where the buttons begin while nothing is known of the automatic value.
    empty
        What an empty box means.
    parent
        Who owns it.
    """

    changed = Signal()

    refused = Signal(str)
    """Why a number isn't taken, in words; empty once there is one that is."""

    def __init__(
        self,
        minimum: float,
        maximum: float,
        *,
        is_whole: bool = False,
        start: float = 1.0,
        empty: str = AUTOMATIC,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._minimum, self._maximum = minimum, maximum
        self._is_whole = is_whole
        self._start = start
        self._empty = empty
        self._automatic: float | None = None
        self._value: float | None = None
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._edit = QLineEdit()
        self.setLineEdit(self._edit)
        self._edit.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._edit.textChanged.connect(self._on_text_changed)
        self.editingFinished.connect(self._on_editing_finished)
        self.show_automatic(None)

    def value(self) -> float | None:
        """The number, ``None`` for automatic."""
        return self._value

    def whole_value(self) -> int | None:
        """The number of a box that takes only whole ones."""
        return None if self._value is None else int(self._value)

    def set_value(self, value: float | None) -> None:
        """Show a number, the nearest in the allowed range, or ``None`` for automatic."""
        if value is not None:
            value = min(max(value, self._minimum), self._maximum)
        self._edit.setText("" if value is None else self._format(value))

    def set_maximum(self, maximum: float) -> None:
        """Change the allowed range; a number above it becomes the maximum."""
        self._maximum = maximum
        is_above = self._value is not None and self._value > maximum
        if is_above:
            self.set_value(maximum)
        self.refused.emit(self._limit("at most", maximum) if is_above else "")

    def show_automatic(self, value: float | None) -> None:
        """Say which number *automatic* has turned out to be; ``None`` while it isn't known."""
        self._automatic = value
        text = self._empty
        if value is not None:
            text += f" ({value:.0f})" if self._is_whole else f" ({value:.3g})"
        self._edit.setPlaceholderText(text)

    def _format(self, value: float) -> str:
        return str(int(value)) if self._is_whole else f"{value:.12g}"

    def _limit(self, kind: str, value: float) -> str:
        return f"{kind} {self._format(value)}"

    def _why_refused(self, text: str) -> str:
        """What is wrong with a number that isn't in the allowed range; nothing of other texts."""
        try:
            value = float(text.replace(",", "."))
        except ValueError:
            return ""
        if value > self._maximum:
            return self._limit("at most", self._maximum)
        return self._limit("at least", self._minimum) if value < self._minimum else ""

    def _parse(self, text: str) -> float | None:
        """The number, ``None`` if the text isn't one in the allowed range."""
        try:
            value = int(text) if self._is_whole else float(text.replace(",", "."))
        except ValueError:
            return None
        is_allowed = math.isfinite(value) and self._minimum <= value <= self._maximum
        return value if is_allowed else None

    def _on_text_changed(self, text: str) -> None:
        value = self._parse(text) if text else None
        if text and value is None:
            self.refused.emit(self._why_refused(text))
            return  # half typed: the last number holds
        self.refused.emit("")
        if value != self._value:
            self._value = value
            self.changed.emit()

    def _on_editing_finished(self) -> None:
        if self._edit.text() and self._parse(self._edit.text()) is None:
            why = self._why_refused(self._edit.text())
            self.set_value(self._value)
            self.refused.emit(why)  # it stays until the next edit, for the number is gone

    def validate(self, input: str | None, pos: int) -> tuple[QValidator.State, str, int]:
        text = input or ""
        state = QValidator.State.Acceptable
        if text and self._parse(text) is None:
            looks_right = all(c.isdigit() or c in "+-.,eE" for c in text)
            state = QValidator.State.Intermediate if looks_right else QValidator.State.Invalid
        return state, text, pos

    def stepEnabled(self) -> QAbstractSpinBox.StepEnabledFlag:
        flag = QAbstractSpinBox.StepEnabledFlag
        return flag.StepUpEnabled | flag.StepDownEnabled

    def stepBy(self, steps: int) -> None:
        value = self._value
        if value is None:
            value = self._start if self._automatic is None else self._automatic
        value += steps * self._step(value)
        self.set_value(min(max(value, self._minimum), self._maximum))

    def _step(self, value: float) -> float:
        """One unit of the second digit, so that a step is felt and none jumps."""
        if self._is_whole:
            return 1 if abs(value) < 100 else float(10 ** (int(math.log10(abs(value))) - 1))
        return 10.0 ** (math.floor(math.log10(abs(value))) - 1) if value else 0.1

    def clear(self) -> None:
        self.set_value(None)

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        # A wheel that scrolls the form must not change the numbers that pass under the pointer.
        if event is not None and not self.hasFocus():
            event.ignore()
            return
        super().wheelEvent(event)


class Choice(QComboBox):
    """A combo box of keys with titles, narrow enough for a dock and deaf to a passing wheel."""

    def __init__(self, titles: dict[str, str], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        for key, title in titles.items():
            self.add(key, title)
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.setMinimumContentsLength(8)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)

    def set_titles(self, titles: Mapping[Any, str], chosen: Any = None) -> None:
        """List other keys; the choice stays where it can, else it becomes ``chosen``."""
        before = self.key()
        self.clear()
        for key, title in titles.items():
            self.add(key, title)
        self.set_key(before if before in titles else chosen)

    def add(self, key: Any, title: str) -> None:
        """List one more key. A title that is too long for a list is told in full by its tooltip."""
        shown = short_name(title)
        self.addItem(shown, key)
        if shown != title:
            at = self.count() - 1
            self.setItemData(at, plain(one_line(title)), Qt.ItemDataRole.ToolTipRole)

    def key(self) -> Any:
        """The chosen key."""
        return self.currentData()

    def set_key(self, key: Any) -> None:
        """Choose a key; one that isn't there is left alone."""
        at = self.findData(key)
        if at >= 0:
            self.setCurrentIndex(at)

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if event is not None and not self.hasFocus():
            event.ignore()
            return
        super().wheelEvent(event)


class ModelChoice(Choice):
    """The models, the user's own below the others, listed anew whenever the list opens.

    Parameters
    ----------
    with_automatic
        Whether the choice can be left to the program.
    only_learned
        Whether models without parameters are left out.
    """

    def __init__(self, *, with_automatic: bool = True, only_learned: bool = False) -> None:
        super().__init__({})
        self._with_automatic, self._only_learned = with_automatic, only_learned
        self.cards: dict[str, ModelCard] = {}
        self.refresh()

    def refresh(self) -> None:
        """List the models that there are now."""
        every = list_cards()
        self.cards = {c.key: c for c in every if c.parameters or not self._only_learned}
        titles = {DEFAULT_MODEL: "Automatic"} if self._with_automatic else {}
        titles |= {key: c.title for key, c in self.cards.items() if not is_user_key(key)}
        own = {key: c.title for key, c in self.cards.items() if is_user_key(key)}
        before = self.key()
        kept = titles | own
        with QSignalBlocker(self):
            self.set_titles(kept, next(iter(kept), None))
            for at, key in enumerate(kept):
                self.setItemData(at, plain(self.summary(key)), Qt.ItemDataRole.ToolTipRole)
            if own:
                self._insert_heading(len(titles), "My models")
            for key, problem in damaged_models().items():
                at = self.count()
                name = short_name(key.removeprefix(PREFIX))
                self._insert_heading(at, f"{name} (damaged)")
                self.setItemData(at, plain(one_line(problem)), Qt.ItemDataRole.ToolTipRole)
        if before is not None and before not in kept:
            self.currentIndexChanged.emit(self.currentIndex())

    def summary(self, key: str) -> str:
        """What a model is for, in a sentence; nothing of one that isn't in the list."""
        if key == DEFAULT_MODEL:
            standard, best = (
                self.cards[k].title if k in self.cards else k for k in (STANDARD_MODEL, BEST_MODEL)
            )
            return f"The one that suits the device: {standard} on processors, {best} on GPUs."
        return self.cards[key].summary if key in self.cards else ""

    def most_iterations(self, key: str) -> int:
        """How many diffusion steps a model can do, or that which stands for the automatic one."""
        found = self.cards.get(STANDARD_MODEL if key == DEFAULT_MODEL else key)
        return MAX_ITERATIONS if found is None else found.most_iterations or MAX_ITERATIONS

    def _insert_heading(self, at: int, text: str) -> None:
        """A line that can't be chosen."""
        self.insertItem(at, text)
        model = self.model()
        if isinstance(model, QStandardItemModel):
            item = model.item(at)
            if item is not None:
                item.setEnabled(False)

    def showPopup(self) -> None:
        self.refresh()
        super().showPopup()


class Note(PlainLabel):
    """Small wrapped text that explains something, or tells bad news in red.

    It takes no room while it is empty.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent=parent)
        self._is_error = False
        self._colours = "", ""
        self.setWordWrap(True)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.setMinimumWidth(1)
        self.hide()

    @property
    def is_error(self) -> bool:
        """Whether bad news are shown."""
        return self._is_error

    def text(self) -> str:
        return breakable(super().text(), is_back=True)

    def show_text(self, text: str) -> None:
        """Show a text in the usual colour."""
        self._show(text, is_error=False)

    def show_error(self, text: str) -> None:
        """Show what went wrong."""
        self._show(text, is_error=True)

    def set_colours(self, text: str, error: str) -> None:
        """Follow napari's theme; both are CSS colours."""
        self._colours = text, error
        self._restyle()

    def _show(self, text: str, *, is_error: bool) -> None:
        self._is_error = is_error
        self._restyle()
        self.setText(breakable(text))
        self.setVisible(bool(text))

    def _restyle(self) -> None:
        style = f"color: {self._colours[self._is_error]};"
        if style != self.styleSheet():
            self.setStyleSheet(style)


class DiffusionForm(QWidget):
    """Every setting of a run.

    Parameters
    ----------
    parent
        Who owns it.
    for_files
        Whether files are denoised, so that there is no layer to choose, look into or show.
    """

    changed = Signal()
    estimate_clicked = Signal()

    def __init__(self, parent: QWidget | None = None, *, for_files: bool = False) -> None:
        super().__init__(parent)
        self._estimate: NoiseEstimate | None = None
        self._scope = ""
        self._unit = ""
        self._is_updating = False
        self._memory_budget: int | None = None
        self._make_controls()
        self._lay_out()
        self._explain()
        self.set_values(FormValues())
        self._connect()
        self._on_kind_changed()
        self._on_outputs_changed()
        if for_files:
            self._hide_layers()

    def _hide_layers(self) -> None:
        for row in (self.layer, self.layer_info, self._outputs_title, self._outputs_grid):
            self._rows.setRowVisible(row, False)
        self._advanced_rows.setRowVisible(self.map_step, False)
        self.estimate_button.hide()

    def _make_controls(self) -> None:
        self.layer = Choice({})
        self.layer_info = Note()
        self.model = ModelChoice()
        self.help_button = QPushButton("Help")
        self.model_info = Note()
        self.noise_kind = Choice(NOISE_TITLES)
        self.estimate_button = QPushButton("Estimate")
        self.noise_sigma = NumberBox(0.0, LARGEST_NUMBER)
        self.correlation_length = NumberBox(0.0, 50.0)
        self.gain = NumberBox(1 / LARGEST_NUMBER, LARGEST_NUMBER)
        self.offset = NumberBox(-LARGEST_NUMBER, LARGEST_NUMBER)
        self._noise_boxes = {
            "noise_sigma": self.noise_sigma,
            "correlation_length": self.correlation_length,
            "gain": self.gain,
            "offset": self.offset,
        }
        self.noise_info = Note()
        self.noise_plot = NoisePlot()
        self.iterations = NumberBox(0, MAX_ITERATIONS, is_whole=True, start=20)
        self._iterations_info = Note()
        self.denoised = QCheckBox("Denoised")
        self.residual = QCheckBox("Residual")
        self.diffusivity = QCheckBox("Diffusivity")
        self.orientation = QCheckBox("Orientation")
        self._outputs = self.denoised, self.residual, self.diffusivity, self.orientation
        self.advanced_button = heading_button()
        self.advanced = QWidget()
        tiny = 1 / LARGEST_NUMBER
        self.contrast = NumberBox(tiny, LARGEST_NUMBER)
        self.function = Choice(FUNCTION_TITLES)
        self.scheme = Choice(SCHEME_TITLES)
        self.tau = NumberBox(tiny, LARGEST_NUMBER, start=0.25)
        self.stopping_time = NumberBox(tiny, LARGEST_NUMBER, start=5)
        self.presmooth_sigma = NumberBox(0.0, 50.0, start=0.5)
        self.noise_scope = Choice(SCOPE_TITLES)
        self.dtype = Choice(TYPE_TITLES)
        self.device = Choice(DEVICE_TITLES)
        self.tile = NumberBox(SMALLEST_TILE, LARGEST_TILE, is_whole=True, start=512)
        self.map_step = NumberBox(1, MAX_ITERATIONS, is_whole=True, empty="last")

    def _lay_out(self) -> None:
        model_row = QHBoxLayout()
        model_row.setContentsMargins(0, 0, 0, 0)
        model_row.setSpacing(6)
        model_row.addWidget(self.model, 1)
        model_row.addWidget(self.help_button)
        noise_row = QHBoxLayout()
        noise_row.setContentsMargins(0, 0, 0, 0)
        noise_row.setSpacing(6)
        noise_row.addWidget(self.noise_kind, 1)
        noise_row.addWidget(self.estimate_button)
        self._outputs_title = QLabel("Layers to show")
        outputs = self._outputs_grid = QGridLayout()
        outputs.setContentsMargins(0, 0, 0, 0)
        outputs.setHorizontalSpacing(12)
        outputs.setVerticalSpacing(4)
        for at, box in enumerate(self._outputs):
            outputs.addWidget(box, *divmod(at, 2))
        outputs.setColumnStretch(1, 1)

        self._rows = make_rows()
        self._rows.setContentsMargins(0, 0, 0, 0)
        self._rows.addRow("Layer", self.layer)
        self._rows.addRow(self.layer_info)
        self._rows.addRow("Model", model_row)
        self._rows.addRow(self.model_info)
        self._rows.addRow("Noise", noise_row)
        self._rows.addRow("Level", self.noise_sigma)
        self._rows.addRow("Correlation", self.correlation_length)
        self._rows.addRow("Gain", self.gain)
        self._rows.addRow("Offset", self.offset)
        self._rows.addRow(self.noise_info)
        self._rows.addRow(self.noise_plot)
        self._rows.addRow("Iterations", self.iterations)
        self._rows.addRow(self._iterations_info)
        self._rows.addRow(self._outputs_title)
        self._rows.addRow(outputs)

        self._advanced_rows = make_rows()
        self._advanced_rows.setContentsMargins(10, 0, 0, 0)
        self._advanced_rows.addRow("Contrast K", self.contrast)
        self._advanced_rows.addRow("Function", self.function)
        self._advanced_rows.addRow("Scheme", self.scheme)
        self._advanced_rows.addRow("Time step", self.tau)
        self._advanced_rows.addRow("Stopping time", self.stopping_time)
        self._advanced_rows.addRow("Presmoothing", self.presmooth_sigma)
        self._advanced_rows.addRow("Noise of", self.noise_scope)
        self._advanced_rows.addRow("Result type", self.dtype)
        self._advanced_rows.addRow("Device", self.device)
        self._advanced_rows.addRow("Tile size", self.tile)
        self._advanced_rows.addRow("Maps of step", self.map_step)
        self.advanced.setLayout(self._advanced_rows)

        column = QVBoxLayout(self)
        column.setContentsMargins(8, 6, 8, 6)
        column.setSpacing(6)
        column.addLayout(self._rows)
        column.addWidget(self.advanced_button)
        column.addWidget(self.advanced)
        column.addStretch()
        self._on_advanced_toggled(False)

    def _explain(self) -> None:
        """Tooltips, each with the unit, on the control and on its label."""
        automatic = "Empty: automatic, chosen from the data."
        tips = {
            self.layer: "The image layer to denoise. It is never changed.",
            self.model: "How the diffusivity, which decides where is smoothed, is computed.",
            self.help_button: HELP_TITLE + " A table by kind of image and noise.",
            self.noise_kind: (
                "What the noise is like.\nAutomatic: found from the data.\nGaussian: equally "
                "strong everywhere (EM).\nPoisson–Gaussian: grows with the intensity "
                "(photon counts).\nRician: of magnitude images, weaker in the air (MRI).\n"
                "Correlated: shared by neighbouring pixels (CT, interpolated images)."
            ),
            self.estimate_button: "Find the noise model from the layer's data.",
            self.noise_sigma: (
                f"Standard deviation of the noise, in layer units; 0 is no noise.\n{automatic}"
            ),
            self.correlation_length: (
                "How far the noise is correlated, in pixels: the standard deviation of the "
                "Gaussian filter that would correlate white noise so. It is noted with the result "
                "and doesn't change it.\nEmpty: found from the data, or 1."
            ),
            self.gain: f"Layer units per photon or electron: variance = gain · u + offset."
            f"\n{automatic}",
            self.offset: (
                "Noise variance at intensity 0, in squared layer units; may be negative where the "
                "detector adds a pedestal.\nEmpty: 0."
            ),
            self.iterations: (
                "Number of diffusion steps. Networks are made for a certain number, and do at most "
                f"that.\n{automatic}"
            ),
            self.denoised: "Show the result as a layer.",
            self.residual: (
                "Show input minus result, in layer units: it should look like noise and nothing "
                "else."
            ),
            self.diffusivity: (
                "Show the diffusivity, without unit: 1 where it smoothed freely, 0 across edges."
            ),
            self.orientation: (
                "Show the direction that was smoothed along most, in degrees from the horizontal, "
                "counter-clockwise.\nRed: horizontal, 0°. Yellow-green: rising to the right, 45°. "
                "Cyan: vertical, 90°. Violet: falling to the right, 135°. Transparent: about "
                "equally in all directions.\nOnly the Conductance U-Nets tell slanting directions; "
                "the other models tell horizontal from vertical."
            ),
            self.contrast: (
                "Contrast parameter K, in standard deviations of the noise: steeper edges are "
                f"kept.\n{automatic}"
            ),
            self.function: "Diffusivity as a function of s, the squared gradient.",
            self.scheme: (
                "Explicit Euler keeps every guarantee. Fast explicit diffusion reaches a long "
                "stopping time in few steps, but may leave the input's range in between."
            ),
            self.tau: f"Time step of the explicit scheme, in squared pixels.\n{automatic}",
            self.stopping_time: f"Diffusion time in all, in squared pixels.\n{automatic}",
            self.presmooth_sigma: (
                "Standard deviation of the Gaussian that smooths what the diffusivity looks at, "
                f"in pixels; 0 is none.\n{automatic}"
            ),
            self.noise_scope: (
                "For what one noise model is estimated. Automatic: for each slice, where the "
                "slices differ clearly in their noise."
            ),
            self.dtype: (
                "Type of the numbers of the result. Automatic: as the image; but float32 for whole "
                "numbers with noise of about one grey level or less, as of few photons, which "
                "rounding would destroy."
            ),
            self.device: "Where to compute. Automatic: the fastest that is there.",
            self.tile: (
                "Edge length of the tiles that large slices are cut into, in pixels. The result "
                "doesn't depend on it.\nEmpty: as large as the memory allows."
            ),
            self.map_step: (
                "Which iteration the layers Diffusivity and Orientation show, counted from 1.\n"
                "Empty: the last."
            ),
        }
        self.advanced_button.setToolTip("Settings that can stay as they are.")
        for control, tip in tips.items():
            control.setToolTip(tip)
            for rows in (self._rows, self._advanced_rows):
                label = rows.labelForField(control)
                if label is not None:
                    label.setToolTip(tip)
        self.noise_plot.setToolTip(
            "Dots: noise measured in the image, larger where more of the image stands behind it. "
            "Line: the noise model in use."
        )

    def _connect(self) -> None:
        self.help_button.clicked.connect(self.show_help)
        self.estimate_button.clicked.connect(self.estimate_clicked)
        self.advanced_button.toggled.connect(self._on_advanced_toggled)
        self.iterations.refused.connect(self._on_iterations_refused)
        for choice in (self.model, self.noise_kind, self.scheme):
            choice.currentIndexChanged.connect(self._on_kind_changed)
        for choice in (self.layer, self.function, self.noise_scope, self.dtype, self.device):
            choice.currentIndexChanged.connect(self._on_edited)
        for box in self._noise_boxes.values():
            box.changed.connect(self._on_noise_edited)
        for box in (
            self.iterations,
            self.contrast,
            self.tau,
            self.stopping_time,
            self.presmooth_sigma,
            self.tile,
            self.map_step,
        ):
            box.changed.connect(self._on_edited)
        for check in self._outputs:
            check.toggled.connect(self._on_outputs_changed)

    def show_help(self) -> None:
        """Open the table of what to choose for which images."""
        HelpDialog(self.window()).show()

    # --- values -----------------------------------------------------------------------------------

    def values(self) -> FormValues:
        """What the controls say."""
        return FormValues(
            model=self.model.key(),
            noise_kind=self.noise_kind.key(),
            noise_scope=self.noise_scope.key(),
            noise_sigma=self.noise_sigma.value(),
            correlation_length=self.correlation_length.value(),
            gain=self.gain.value(),
            offset=self.offset.value(),
            iterations=self.iterations.whole_value(),
            contrast=self.contrast.value(),
            function=self.function.key(),
            scheme=self.scheme.key(),
            tau=self.tau.value(),
            stopping_time=self.stopping_time.value(),
            presmooth_sigma=self.presmooth_sigma.value(),
            dtype=self.dtype.key(),
            device=self.device.key(),
            tile=self.tile.whole_value(),
            memory_budget=self._memory_budget,
            outputs=Outputs(*(check.isChecked() for check in self._outputs)),
            map_step=self.map_step.whole_value(),
        )

    def set_values(self, values: FormValues) -> None:
        """Fill the controls."""
        self._memory_budget = values.memory_budget
        with self._updating():
            self.model.set_key(values.model)
            self.noise_kind.set_key(values.noise_kind)
            self.noise_scope.set_key(values.noise_scope)
            self.noise_sigma.set_value(values.noise_sigma)
            self.correlation_length.set_value(values.correlation_length)
            self.gain.set_value(values.gain)
            self.offset.set_value(values.offset)
            self.iterations.set_value(values.iterations)
            self.contrast.set_value(values.contrast)
            self.function.set_key(values.function)
            self.scheme.set_key(values.scheme)
            self.tau.set_value(values.tau)
            self.stopping_time.set_value(values.stopping_time)
            self.presmooth_sigma.set_value(values.presmooth_sigma)
            self.dtype.set_key(values.dtype)
            self.device.set_key(values.device)
            self.tile.set_value(values.tile)
            self.denoised.setChecked(values.outputs.denoised)
            self.residual.setChecked(values.outputs.residual)
            self.diffusivity.setChecked(values.outputs.diffusivity)
            self.orientation.setChecked(values.outputs.orientation)
            self.map_step.set_value(values.map_step)

    def set_layers(self, names: dict[Any, str], chosen: Any) -> None:
        """List the layers that can be chosen, by their ids.

        The choice stays where it can; else it becomes ``chosen``.
        """
        before = self.layer.key()
        with self._updating():
            self.layer.set_titles(names, chosen)
        if self.layer.key() != before:
            self._on_edited()

    # --- what has been found out ------------------------------------------------------------------

    def show_layer(self, description: str, unit: str, *, is_problem: bool = False) -> None:
        """Describe the chosen layer, and state the unit of its intensities with the noise."""
        self._unit = unit
        if is_problem:
            self.layer_info.show_error(description)
        else:
            self.layer_info.show_text(description)
        squared = f"{unit}²" if unit else ""
        for box, name, of in (
            (self.noise_sigma, "Level", unit),
            (self.gain, "Gain", unit),
            (self.offset, "Offset", squared),
        ):
            label = self._rows.labelForField(box)
            if isinstance(label, QLabel):
                label.setTextFormat(Qt.TextFormat.PlainText)
                label.setText(f"{name} ({of})" if of else name)
        self.noise_plot.set_unit(unit)
        self._show_noise()

    def show_findings(
        self, estimate: NoiseEstimate | None, config: DiffusionConfig | None, scope: str = ""
    ) -> None:
        """Show the noise that was estimated, and what each automatic setting has become.

        Parameters
        ----------
        estimate
            Of the noise; ``None`` if there is none.
        config
            The settings with nothing left automatic; ``None`` while that isn't known.
        scope
            Of what the noise is, if not of all that is denoised.
        """
        self._estimate, self._scope = estimate, scope
        self._show_model(config)
        self._show_automatic(config)
        self._show_noise()

    def adopt_estimate(self, estimate: NoiseEstimate) -> None:
        """Fill the boxes that are shown with the noise that the user has asked to estimate."""
        with self._updating():
            if estimate.model.key == self.noise_kind.key():
                for name, value in estimate.model.to_dict().items():
                    if name in self._noise_boxes:
                        self._noise_boxes[name].set_value(float(f"{value:.4g}"))
        self._on_edited()

    def _show_automatic(self, config: DiffusionConfig | None) -> None:
        noise = config.noise if config is not None else None
        for name, box in self._noise_boxes.items():
            box.show_automatic(getattr(noise, name, None))
        for box, value in (
            (self.iterations, config.iterations if config else None),
            (self.map_step, config.iterations if config else None),
            (self.contrast, config.contrast if config else None),
            (self.tau, config.tau if config else None),
            (self.stopping_time, config.stopping_time if config else None),
            (self.presmooth_sigma, config.presmooth_sigma if config else None),
        ):
            box.show_automatic(value)

    def set_colours(self, colours: Colours) -> None:
        """Follow napari's theme."""
        for note in (self.layer_info, self.model_info, self.noise_info, self._iterations_info):
            note.set_colours(colours.quiet, colours.error)
        self.noise_plot.set_colours(colours.background, colours.quiet, colours.accent)

    def _show_model(self, config: DiffusionConfig | None) -> None:
        """Say what the model is for, and which one *automatic* has turned out to be."""
        key = self.model.key()
        text = self.model.summary(key)
        chosen = self.model.cards.get(config.model) if config is not None else None
        if key == DEFAULT_MODEL and chosen is not None:
            text = f"{text} Here it is {chosen.title}."
        self.model_info.show_text(text)

    def _show_noise(self) -> None:
        estimate, values = self._estimate, self.values()
        given = values.noise()
        text = ""
        if given is None and estimate is not None:
            # The message begins with the model too, but without its unit.
            rest = estimate.message.removeprefix(estimate.model.describe()).lstrip(" :.;")
            text = f"{estimate.model.describe(self._unit)}\nConfidence {estimate.confidence:.0%}"
            text += f": {rest}" if rest else "."
            if self._scope:
                text += f"\n{self._scope}"
        self.noise_info.show_text(text)
        model = given or (estimate.model if estimate else None)
        curve = estimate.curve if estimate else None
        has_curve = curve is not None and len(curve.intensity) > 0
        self.noise_plot.show_noise(curve, model)
        self._rows.setRowVisible(self.noise_plot, has_curve)

    # --- reactions --------------------------------------------------------------------------------

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Change controls without taking it for the user's doing."""
        before, self._is_updating = self._is_updating, True
        try:
            yield
        finally:
            self._is_updating = before

    def _on_edited(self) -> None:
        if not self._is_updating:
            self.changed.emit()

    def _on_iterations_refused(self, why: str) -> None:
        """Say at once what the model would refuse when it runs."""
        most = self.model.most_iterations(self.model.key())
        text = f"Iterations: {why}." if why else ""
        if why and most < MAX_ITERATIONS:
            text = f"This model takes {why} iterations: it was trained for that many."
        self._iterations_info.show_text(text)

    def _on_outputs_changed(self) -> None:
        self.map_step.setEnabled(self.diffusivity.isChecked() or self.orientation.isChecked())
        self._on_edited()

    def _on_noise_edited(self) -> None:
        if not self._is_updating:
            self._show_noise()
            self.changed.emit()

    def _on_kind_changed(self) -> None:
        """Show the controls that apply to the model, the noise and the scheme."""
        values = self.values()
        noise = NOISE_MODELS.get(values.noise_kind)
        for name, noise_box in self._noise_boxes.items():
            takes_it = noise is not None and name in noise.parameters()
            self._rows.setRowVisible(noise_box, takes_it)
        found = self.model.cards.get(values.model)
        own = frozenset() if found is None else found.settings
        fed = "scheme" in own and values.scheme == "fed"
        for name in ("contrast", "function", "scheme", "presmooth_sigma"):
            self._advanced_rows.setRowVisible(getattr(self, name), name in own)
        self._advanced_rows.setRowVisible(self.tau, not fed)
        self._advanced_rows.setRowVisible(self.stopping_time, fed)
        for box in (self.iterations, self.map_step):
            box.set_maximum(self.model.most_iterations(values.model))
        self._show_model(None)
        self._show_noise()
        self._on_edited()

    def _on_advanced_toggled(self, is_open: bool) -> None:
        self.advanced_button.setText("▾  Advanced" if is_open else "▸  Advanced")
        self.advanced.setVisible(is_open)


class PauseButton(QPushButton):
    """Stays down while the job pauses; the job's thread looks at `paused`."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Pause", parent)
        self.paused = threading.Event()
        self.setCheckable(True)
        self.toggled.connect(self._on_toggled)

    def news(self) -> str:
        """What has become of the job, for the status line."""
        return "Paused." if self.paused.is_set() else "Going on …"

    def _on_toggled(self, is_down: bool) -> None:
        if is_down:
            self.paused.set()
        else:
            self.paused.clear()
        self.setText("Resume" if is_down else "Pause")


def heading_button() -> QPushButton:
    """A heading that opens a section, not a button that stays pressed."""
    button = QPushButton()
    button.setCheckable(True)
    button.setStyleSheet(
        "QPushButton { text-align: left; padding: 4px 0px; }"
        "QPushButton, QPushButton:checked { background: transparent; }"
        "QPushButton:disabled { border: none; }"
    )
    return button


def make_rows() -> QFormLayout:
    """Rows of a label and a control, as every form has them."""
    rows = QFormLayout()
    rows.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    rows.setLabelAlignment(Qt.AlignmentFlag.AlignLeft)
    rows.setHorizontalSpacing(10)
    rows.setVerticalSpacing(5)
    return rows
