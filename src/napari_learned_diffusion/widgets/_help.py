"""What should I choose? The same table in a window and, as Markdown, in ``docs/choosing.md``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QDialog, QDialogButtonBox, QTextBrowser, QVBoxLayout, QWidget

TITLE = "What should I choose?"

SIZE = 780, 560
"""Of the window, in pixels, at first."""


class Advice(NamedTuple):
    """What to choose for one kind of image."""

    images: str
    model: str
    noise: str
    iterations: str
    hint: str


WIDTHS = 22, 14, 28, 14, 22
"""Of the columns, in hundredths."""

HEADER = Advice("Images", "Model", "Noise", "Iterations", "Look out for")

ADVICE = (
    Advice(
        "Fluorescence with few photons: confocal, widefield, light sheet",
        "Automatic",
        "Automatic, which finds Poisson–Gaussian. Each channel by itself; Noise of: Each slice, "
        "where slices were scaled one by one",
        "Automatic",
        "Bright spots of a pixel or two: they may be flattened. Fewer iterations keep more.",
    ),
    Advice(
        "MRI, magnitude images",
        "Automatic",
        "Automatic, which finds Rician where the air shows it, else Poisson–Gaussian",
        "Automatic",
        "A scan with hardly any noise gains hardly anything. With parallel imaging (SENSE, GRAPPA) "
        "the noise varies over the field of view, and the estimate can cost nearly 3 dB: then "
        "choose Gaussian, with the standard deviation measured in uniform tissue.",
    ),
    Advice(
        "CT after reconstruction, low dose",
        "Automatic",
        "Correlated, with the standard deviation that you measure in one uniform tissue: the "
        "estimate is often too low",
        "Automatic",
        "Streaks. They are correlated over many pixels and stay.",
    ),
    Advice(
        "Scanning EM: FIB-SEM, serial block face",
        "Automatic",
        "Automatic, or Gaussian",
        "Automatic",
        "Thin membranes in the residual: then take fewer iterations.",
    ),
    Advice(
        "Transmission EM of sections, texture everywhere",
        "Automatic",
        "Gaussian, with the standard deviation measured in an empty area: without a smooth spot "
        "the estimate may be too high",
        "Fewer than automatic, if detail shows in the residual",
        "Fine texture looks like noise.",
    ),
    Advice(
        "Cryo-electron tomograms, very noisy",
        "Automatic",
        "Gaussian or Correlated, with the standard deviation measured in the ice",
        "Automatic",
        "Little is gained: slices are denoised one by one, and most of the noise is correlated.",
    ),
    Advice(
        "Interpolated, registered or compressed images",
        "Automatic",
        "Correlated, with the standard deviation measured in a uniform area",
        "Automatic",
        "Denoise before interpolating, where you can.",
    ),
    Advice(
        "Very large stacks, a quick look, or a strength to be set by hand",
        "Perona–Malik",
        "As in the row of such images",
        "Automatic. More smooth more",
        "About one decibel weaker than Automatic, and about ten times faster.",
    ),
    Advice(
        "Comparisons with the literature",
        "Fields of experts, U-Net, or K chosen by a network",
        "As in the row of such images",
        "Automatic",
        "The models of Valdivia Ortega, Haas and Effland (2024), trained for noise of up to a "
        "third of the range of the image.",
    ),
)

NOTES = (
    "Not sure? Leave everything on Automatic, press Estimate, and look at the live preview.",
    "The noise level matters more than the model. Too low a level leaves noise standing as if it "
    "were an edge; too high a level blurs.",
    "Then look at the residual: it should show noise and nothing else.",
)


def as_markdown() -> str:
    """The table and the notes for the documentation."""
    rows = [HEADER, tuple("---" for _ in HEADER), *ADVICE]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in NOTES) + "\n"


def as_html() -> str:
    """The same for the window."""

    def row(cells: Sequence[str], tag: str) -> str:
        inside = "".join(
            f"<{tag} align='left' width='{width}%'>{escape(cell)}</{tag}>"
            for cell, width in zip(cells, WIDTHS, strict=True)
        )
        return f"<tr valign='top'>{inside}</tr>"

    rows = [row(HEADER, "th"), *(row(advice, "td") for advice in ADVICE)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in NOTES)
    table = "".join(rows)
    return (
        f"<ul>{notes}</ul><table width='100%' border='1' cellspacing='0' cellpadding='6'"
        f" style='border-collapse: collapse'>{table}</table>"
    )


class HelpDialog(QDialog):
    """The table in a window of its own, beside which the form can be used.

    Parameters
    ----------
    parent
        napari's window, whose theme it follows.
    """

    def __init__(self, parent: QWidget | None) -> None:
        super().__init__(parent)
        self.setWindowTitle(TITLE)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.resize(*SIZE)
        self.text = QTextBrowser()
        self.text.setHtml(as_html())
        buttons = QDialogButtonBox(QDialogButtonBox.StandardButton.Close)
        buttons.rejected.connect(self.close)
        column = QVBoxLayout(self)
        column.addWidget(self.text)
        column.addWidget(buttons)
