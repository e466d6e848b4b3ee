"""The table of a batch: a row for each file, and the view that files are dropped on."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, Qt, Signal
from qtpy.QtGui import (
    QColor,
    QDragEnterEvent,
    QDragMoveEvent,
    QDropEvent,
    QPainter,
    QPaintEvent,
)
from qtpy.QtWidgets import (
    QAbstractItemView,
    QHeaderView,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableView,
    QWidget,
)

from napari_learned_diffusion.jobs.batch_sources import Source, VolumeSource
from napari_learned_diffusion.widgets._text import plain, short_name

if TYPE_CHECKING:
    from qtpy.QtCore import QMimeData

    from napari_learned_diffusion.jobs.batch import FileStatus
    from napari_learned_diffusion.widgets._controls import Colours

FILE, STATE, SLICES, NOISE, TIME, MESSAGE = range(6)
TITLES = ("File", "State", "Slices", "Noise", "Time", "Message")
TIPS = (
    "The image, as its result will be called below the output folder.",
    "Waiting, running, writing the result, done, skipped because it was done before, failed or "
    "stopped.",
    "Slices that are done, of all.",
    "Standard deviation of what was removed, of that of the noise, in the units of the image.",
    "Since the file was begun, in seconds.",
    "Why it failed or was skipped, or what wasn't as usual.",
)
_WIDTHS = (110, 58, 54, 84, 50, 320)
"""Of the columns in pixels; the last takes what is left, and the first grows with the names."""

_LONGEST_NAME = 140
"""Width in pixels up to which the first column grows by itself."""

_LINE_LETTERS = 90
"""After so many letters a line of a tooltip is broken."""

Index = QModelIndex | QPersistentModelIndex


@dataclass(frozen=True)
class Row:
    """One file of the table.

    Parameters
    ----------
    source
        What is read.
    status
        Where the batch is with it; ``None`` before it has come to it.
    is_stopped
        Whether the batch was stopped while the file was in work.
    """

    source: Source
    status: FileStatus | None = None
    is_stopped: bool = False

    @property
    def state(self) -> str:
        """What the column of that name says."""
        if self.is_stopped:
            return "stopped"
        return "waiting" if self.status is None else self.status.state

    def cells(self) -> tuple[str, ...]:
        """The text of every column."""
        status = self.status
        if status is None:
            return (self.source.name, self.state, "", "", "", "")
        slices = f"{status.planes_done} / {status.planes}" if status.planes else ""
        took_time = status.seconds > 0 and status.state != "skipped"
        seconds = f"{status.seconds:.1f} s" if took_time else ""
        return (self.source.name, self.state, slices, self._noise(), seconds, self._message())

    def describe(self) -> str:
        """Everything about the file in a few lines; paths in full."""
        _, state, slices, noise, seconds, message = self.cells()
        facts = [state, f"{slices} slices" * bool(slices), f"noise {noise}" * bool(noise), seconds]
        lines = [_place(self.source), ", ".join(filter(None, facts)), message]
        if self.status is not None and self.status.output is not None:
            lines.insert(1, f"→ {self.status.output}")
        return "\n".join(filter(None, lines))

    def _message(self) -> str:
        if self.is_stopped or self.status is None:
            return "Goes on from here at the next start." if self.is_stopped else ""
        # The name stands beside it, and would take the room of what has happened.
        path, name = str(self.source.path), PurePosixPath(self.source.name).name
        message = self.status.message
        for start in (f"{path}: ", f"{path} "):
            message = message.removeprefix(start)
        return message.replace(path, name)

    def _noise(self) -> str:
        status = self.status
        if status is None or math.isnan(status.noise_sigma):
            return ""
        return f"{status.removed_sigma:.3g} of {status.noise_sigma:.3g}"


def _place(source: Source) -> str:
    if isinstance(source, VolumeSource):
        return f"Layer “{short_name(source.volume.name)}”"
    return str(source.path)


class BatchTable(QAbstractTableModel):
    """The files of a batch; the widget adds them, and the running batch tells what becomes of them.

    Parameters
    ----------
    parent
        Who owns it.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.rows: list[Row] = []
        self._colours: dict[str, QColor] = {}

    # --- what the widget does ---------------------------------------------------------------------

    def add(self, sources: Iterable[Source]) -> int:
        """Add what isn't there yet; returns how many that were.

        Files of the same name from different folders get their folder's name before theirs, for
        else one result would be in the other's way.
        """
        places = {row.source.place for row in self.rows}
        names = {row.source.name for row in self.rows}
        new: list[Row] = []
        for source in sources:
            if source.place in places:
                continue
            named = replace(source, name=_free_name(source, names))
            places.add(named.place)
            names.add(named.name)
            new.append(Row(named))
        if new:
            first = len(self.rows)
            self.beginInsertRows(QModelIndex(), first, first + len(new) - 1)
            self.rows += new
            self.endInsertRows()
        return len(new)

    def remove(self, numbers: Iterable[int]) -> None:
        """Take files off the list; on the disk nothing happens."""
        for number in sorted(numbers, reverse=True):
            self.beginRemoveRows(QModelIndex(), number, number)
            del self.rows[number]
            self.endRemoveRows()

    def replace_source(self, number: int, source: Source) -> None:
        """Read something else in a row from now on, under the name that it has."""
        self.rows[number] = replace(self.rows[number], source=source)

    def update(self, number: int, status: FileStatus) -> None:
        """Show what is new about a file."""
        self._set(number, replace(self.rows[number], status=status, is_stopped=False))

    def wait(self, numbers: Iterable[int]) -> None:
        """Forget what became of files that are about to be denoised."""
        for number in numbers:
            self._set(number, Row(self.rows[number].source))

    def stop(self) -> None:
        """The batch has ended before its time: what was running isn't any more."""
        for number, row in enumerate(self.rows):
            if row.state in ("running", "writing"):
                self._set(number, replace(row, is_stopped=True))

    def numbers(self, *states: str) -> list[int]:
        """The rows in one of some states."""
        return [number for number, row in enumerate(self.rows) if row.state in states]

    def set_colours(self, colours: Colours) -> None:
        """Follow napari's theme."""
        self._colours = {
            "failed": QColor(colours.error),
            "done": QColor(colours.accent),
            "running": QColor(colours.accent),
            "writing": QColor(colours.accent),
        }
        self._changed(0, len(self.rows) - 1)

    def _set(self, number: int, row: Row) -> None:
        self.rows[number] = row
        self._changed(number, number)

    def _changed(self, first: int, last: int) -> None:
        if last >= first:
            self.dataChanged.emit(self.index(first, FILE), self.index(last, MESSAGE))

    # --- what Qt asks -----------------------------------------------------------------------------

    def rowCount(self, parent: Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(self.rows)

    def columnCount(self, parent: Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(TITLES)

    def headerData(
        self,
        section: int,
        orientation: Qt.Orientation,
        role: int = Qt.ItemDataRole.DisplayRole,
    ) -> Any:
        if orientation != Qt.Orientation.Horizontal:
            return None
        texts = {Qt.ItemDataRole.DisplayRole: TITLES, Qt.ItemDataRole.ToolTipRole: TIPS}
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter
        return texts[Qt.ItemDataRole(role)][section] if role in texts else None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        row = self.rows[index.row()]
        if role == Qt.ItemDataRole.DisplayRole:
            return row.cells()[index.column()]
        if role == Qt.ItemDataRole.ToolTipRole:
            return _wrapped(row.describe())
        if role == Qt.ItemDataRole.ForegroundRole and index.column() in (STATE, MESSAGE):
            is_coloured = index.column() == STATE or row.state == "failed"
            return self._colours.get(row.state) if is_coloured else None
        return None


def _wrapped(text: str) -> str:
    lines = (
        textwrap.fill(line, _LINE_LETTERS, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )
    return plain("\n".join(lines))


def _free_name(source: Source, taken: set[str]) -> str:
    """The source's name, made different from those that are taken."""
    name = source.name
    if name in taken and not isinstance(source, VolumeSource):
        name = f"{source.path.resolve().parent.name}/{name}"
    path, number = PurePosixPath(name), 2
    while name in taken:
        first, dot, suffixes = path.name.partition(".")
        name = path.with_name(f"{first} {number}{dot}{suffixes}").as_posix()
        number += 1
    return name


class _MessageDelegate(QStyledItemDelegate):
    """Draws a message that is too long from its beginning; a name keeps its end, too."""

    def initStyleOption(self, option: QStyleOptionViewItem | None, index: QModelIndex) -> None:
        super().initStyleOption(option, index)
        if option is not None:
            option.textElideMode = Qt.TextElideMode.ElideRight


class BatchView(QTableView):
    """Shows the table, and takes files and folders that are dropped on it.

    Parameters
    ----------
    table
        What is shown.
    parent
        Who owns it.
    """

    dropped = Signal(object)
    """The paths of files and folders, in a list."""

    def __init__(self, table: BatchTable, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setModel(table)
        self.setAcceptDrops(True)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.setWordWrap(False)
        self.setShowGrid(False)
        self.setMinimumHeight(120)
        header, numbers = self.horizontalHeader(), self.verticalHeader()
        if header is not None and numbers is not None:
            header.setStretchLastSection(True)
            header.setMinimumSectionSize(40)
            header.setHighlightSections(False)
            numbers.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
            numbers.setDefaultSectionSize(22)
            numbers.hide()
        for column, width in enumerate(_WIDTHS):
            self.setColumnWidth(column, width)
        self.setItemDelegateForColumn(MESSAGE, _MessageDelegate(self))
        table.rowsInserted.connect(self._make_room_for_names)

    def chosen(self) -> list[int]:
        """The rows that are selected."""
        selection = self.selectionModel()
        return sorted(index.row() for index in selection.selectedRows()) if selection else []

    def _make_room_for_names(self) -> None:
        wanted = min(self.sizeHintForColumn(FILE) + 6, _LONGEST_NAME)
        if wanted > self.columnWidth(FILE):
            self.setColumnWidth(FILE, wanted)

    def dragEnterEvent(self, event: QDragEnterEvent | None) -> None:
        _take_files(event)

    def dragMoveEvent(self, event: QDragMoveEvent | None) -> None:
        _take_files(event)

    def dropEvent(self, event: QDropEvent | None) -> None:
        paths = [] if event is None else _paths(event.mimeData())
        if event is not None and paths:
            event.acceptProposedAction()
            self.dropped.emit(paths)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        super().paintEvent(event)
        model, area = self.model(), self.viewport()
        if model is None or area is None or model.rowCount():
            return
        painter = QPainter(area)
        painter.setPen(self.palette().color(self.foregroundRole()))
        painter.setOpacity(0.7)
        text = "Add files, a folder or layers,\nor drop files here."
        painter.drawText(area.rect(), Qt.AlignmentFlag.AlignCenter, text)
        painter.end()


def _take_files(event: QDragMoveEvent | None) -> None:
    if event is not None and _paths(event.mimeData()):
        event.acceptProposedAction()


def _paths(dragged: QMimeData | None) -> Sequence[Path]:
    urls = dragged.urls() if dragged is not None else []
    return [Path(url.toLocalFile()) for url in urls if url.isLocalFile()]
