"""The one module that runs jobs in threads: one job at a time, cancelled within one step.

A `Runner` drives a job in a generator worker of napari and reports on the main thread. It knows two
traps of superqt 0.9. A generator that raises ``RuntimeError``, as torch does when memory runs out,
makes the worker emit neither ``errored`` nor ``finished``; so errors come back as values. And after
``quit()`` nobody closes the generator; so the worker does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from napari.qt.threading import GeneratorWorker
from napari.utils import cancelable_progress
from qtpy.QtCore import QObject, QTimer, Signal

from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._text import plain

REPORT_SECONDS = 0.03
"""Between two progress reports of a thread; a PDE step of a small image takes a tenth of that."""

FLUSH_MILLISECONDS = 60
"""Between two updates of what the user sees of the progress."""


@dataclass(frozen=True)
class _Outcome:
    """How a job has ended: with a result, with an error, or cancelled."""

    result: Any = None
    error: Exception | None = None
    cancelled: bool = False


def _drive(
    make_job: Callable[[], Job[Any]], cancelled: threading.Event
) -> Generator[Progress, None, _Outcome]:
    """Run a job step by step and turn whatever happens into a value."""
    try:
        return (yield from _step(make_job(), cancelled))
    except Exception as error:
        return _Outcome(error=error)


def _step(job: Job[Any], cancelled: threading.Event) -> Generator[Progress, None, _Outcome]:
    reported = 0.0
    try:
        while not cancelled.is_set():
            try:
                progress = next(job)
            except StopIteration as stop:
                return _Outcome(result=stop.value)
            now = time.monotonic()
            if progress.index is not None or now - reported >= REPORT_SECONDS:
                reported = now
                yield progress
        return _Outcome(cancelled=True)
    finally:
        job.close()


class _Worker(GeneratorWorker[Progress, None, _Outcome]):
    """A generator worker that closes its generator in its own thread."""

    def work(self) -> _Outcome | Exception | None:
        try:
            outcome: _Outcome | Exception | None = super().work()
        finally:
            self._gen.close()
        return outcome


class _ActivityProgress(cancelable_progress):
    """A bar in napari's activity dock whose button cancels at once.

    napari calls ``cancel_callback`` only while it iterates, and here nothing is iterated.
    """

    def cancel(self) -> None:
        super().cancel()
        if self.cancel_callback is not None:
            self.cancel_callback()


@dataclass(frozen=True)
class _Task:
    number: int
    make_job: Callable[[], Job[Any]]
    title: str
    cancelled: threading.Event


class Runner(QObject):
    """Runs one job at a time in a thread; asking anew replaces what was asked before.

    Every request has a number. What comes back under another number than the last is dropped.

    Parameters
    ----------
    parent
        Who owns it.
    in_activity_dock
        Whether napari's activity dock shows the progress, with a button to cancel.
    """

    started = Signal()
    progressed = Signal(object, object)
    """The latest `Progress`, and the list of the indices of planes finished since the last time."""
    reported = Signal(object)
    """Every `Progress` with an index since the last time, in a list, right after `progressed`."""
    succeeded = Signal(object)
    failed = Signal(object)
    cancelled = Signal()
    finished = Signal()
    """Always the last one of a job that wasn't replaced, whatever has happened before."""

    def __init__(self, parent: QObject | None = None, *, in_activity_dock: bool = False) -> None:
        super().__init__(parent)
        self._in_activity_dock = in_activity_dock
        self._number = 0
        self._running: _Task | None = None
        self._waiting: _Task | None = None
        self._worker: _Worker | None = None
        self._activity: _ActivityProgress | None = None
        self._latest: Progress | None = None
        self._news: list[Progress] = []
        self._shown: Progress | None = None
        self._is_settled = True
        self._is_shut_down = False
        self._flush_timer = QTimer(self)
        self._flush_timer.setInterval(FLUSH_MILLISECONDS)
        self._flush_timer.timeout.connect(self._on_tick)

    @property
    def is_busy(self) -> bool:
        """Whether a job runs that is still wanted."""
        if self._waiting is not None:
            return True
        return self._is_wanted() and not self._is_settled

    @property
    def is_idle(self) -> bool:
        """Whether no thread is at work any more, wanted or not."""
        return self._running is None and self._waiting is None

    def submit(self, make_job: Callable[[], Job[Any]], title: str) -> None:
        """Run a job, as soon as the one that runs has noticed that it is cancelled.

        Parameters
        ----------
        make_job
            Called in the thread; makes the generator.
        title
            What is done, for the activity dock.
        """
        if self._is_shut_down:
            return
        self._number += 1
        self._waiting = _Task(self._number, make_job, title, threading.Event())
        if self._running is None:
            self._start_next()
        else:
            self._running.cancelled.set()

    def cancel(self) -> None:
        """Stop the job within one of its steps, and forget the one that waits."""
        self._waiting = None
        if self._running is not None:
            self._running.cancelled.set()

    def shut_down(self) -> None:
        """Cancel, and never report again; for when the viewer closes."""
        self._is_shut_down = True
        self.cancel()
        self._flush_timer.stop()
        if self._worker is not None:
            self._worker.quit()
            self._worker.yielded.disconnect(self._on_yielded)
            self._worker.returned.disconnect(self._on_returned)
            self._worker.errored.disconnect(self._on_errored)
            self._worker.signals.finished.disconnect(self._on_finished)
            self._worker = None
        self._close_activity()
        self._running = None

    def _start_next(self) -> None:
        task, self._waiting = self._waiting, None
        if task is None:
            return
        self._running = task
        self._is_settled = False
        self._latest, self._news = None, []
        self.started.emit()
        if self._in_activity_dock:
            # napari processes events in here, so the viewer may be gone when it returns.
            self._activity = _ActivityProgress(
                desc=plain(task.title), total=0, cancel_callback=self.cancel, leave=False
            )
            if self._is_shut_down:
                self._close_activity()
                return
        worker = _Worker(_drive, task.make_job, task.cancelled)
        worker.yielded.connect(self._on_yielded)
        worker.returned.connect(self._on_returned)
        worker.errored.connect(self._on_errored)
        worker.signals.finished.connect(self._on_finished)
        self._worker = worker
        self._flush_timer.start()
        worker.start()

    def _is_wanted(self) -> bool:
        """Whether what comes back belongs to the last request."""
        task = self._running
        return (
            task is not None
            and not self._is_shut_down
            and task.number == self._number
            and not task.cancelled.is_set()
        )

    def _on_yielded(self, progress: Progress) -> None:
        self._latest = progress
        if progress.index is not None:
            self._news.append(progress)

    def _on_tick(self) -> None:
        self._report()
        activity, progress = self._activity, self._shown
        if activity is None or progress is None or progress.done <= activity.n:
            return
        activity.total = progress.total
        # Last of all: napari processes events in here, in which the job may end and the bar close.
        activity.update(progress.done - activity.n)

    def _report(self) -> None:
        progress, self._latest = self._latest, None
        news, self._news = self._news, []
        if progress is not None and self._is_wanted():
            self._shown = progress
            self.progressed.emit(progress, [new.index for new in news])
            self.reported.emit(news)

    def _on_returned(self, outcome: _Outcome) -> None:
        self._report()
        if outcome.cancelled or not self._is_wanted():
            return
        self._is_settled = True
        if outcome.error is not None:
            self.failed.emit(outcome.error)
        else:
            self.succeeded.emit(outcome.result)

    def _on_errored(self, error: Exception) -> None:
        if self._is_wanted():
            self._is_settled = True
            self.failed.emit(error)

    def _on_finished(self) -> None:
        self._worker = None
        self._running = None
        self._shown = None
        self._flush_timer.stop()
        self._close_activity()
        if self._waiting is not None:
            self._start_next()
            return
        if not self._is_settled:
            self.cancelled.emit()
        self.finished.emit()

    def _close_activity(self) -> None:
        activity, self._activity = self._activity, None
        if activity is not None:
            activity.close()
