"""Jobs in threads: every way in which one can end leaves the runner ready for the next."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from napari.qt.threading import WorkerBase
from napari.utils import progress as napari_progress

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._runner import Runner

TIMEOUT = 20_000


class Watcher:
    """Notes down what a runner reports."""

    def __init__(self, runner: Runner) -> None:
        self.events: list[tuple[str, Any]] = []
        self.threads: set[int] = set()
        runner.started.connect(lambda: self._note("started"))
        runner.progressed.connect(lambda p, planes: self._note("progressed", (p, planes)))
        runner.succeeded.connect(lambda result: self._note("succeeded", result))
        runner.failed.connect(lambda error: self._note("failed", error))
        runner.cancelled.connect(lambda: self._note("cancelled"))
        runner.finished.connect(lambda: self._note("finished"))

    def _note(self, name: str, value: Any = None) -> None:
        self.events.append((name, value))
        self.threads.add(threading.get_ident())

    def named(self, name: str) -> list[Any]:
        return [value for event, value in self.events if event == name]

    @property
    def ends(self) -> list[str]:
        return [event for event, _ in self.events if event not in {"progressed", "started"}]


@pytest.fixture
def runner(qtbot: Any) -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.shut_down()


@pytest.fixture
def watcher(runner: Runner) -> Watcher:
    return Watcher(runner)


class Endless:
    """A job that runs until it is closed."""

    def __init__(self) -> None:
        self.running = threading.Event()
        self.closed = threading.Event()
        self.closed_by = 0

    def __call__(self) -> Job[str]:
        try:
            while True:
                self.running.set()
                yield Progress(1, 2, "on and on")
        finally:
            self.closed_by = threading.get_ident()
            self.closed.set()


def _quick(result: Any) -> Callable[[], Job[Any]]:
    def job() -> Job[Any]:
        yield Progress(0, 1, "quick")
        return result

    return job


def _failing(error: BaseException) -> Callable[[], Job[Any]]:
    def job() -> Job[Any]:
        yield Progress(0, 1, "about to fail")
        raise error

    return job


def _wait(qtbot: Any, runner: Runner) -> None:
    qtbot.waitUntil(lambda: runner.is_idle, timeout=TIMEOUT)


def test_a_result_comes_back_on_the_main_thread(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    ran_in = []

    def job() -> Job[int]:
        ran_in.append(threading.get_ident())
        yield Progress(1, 1, "one")
        return 42

    runner.submit(job, "title")
    assert runner.is_busy
    _wait(qtbot, runner)
    assert watcher.named("succeeded") == [42]
    assert watcher.ends == ["succeeded", "finished"]
    assert watcher.threads == {threading.get_ident()}
    assert ran_in != [threading.get_ident()]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        InvalidImageError("no"),
        MemoryError(),
        StopAsyncIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_comes_back_and_the_runner_lives(
    qtbot: Any, runner: Runner, watcher: Watcher, error: Exception
) -> None:
    # superqt's worker alone falls silent on a RuntimeError, and its form stays dead.
    runner.submit(_failing(error), "title")
    _wait(qtbot, runner)
    assert watcher.named("failed") == [error]
    assert watcher.ends == ["failed", "finished"]
    runner.submit(_quick("again"), "title")
    _wait(qtbot, runner)
    assert watcher.named("succeeded") == ["again"]


def test_an_error_while_the_job_is_made_comes_back_too(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    def make() -> Job[Any]:
        raise RuntimeError("no torch")

    runner.submit(make, "title")
    _wait(qtbot, runner)
    assert watcher.ends == ["failed", "finished"]


def test_cancelling_closes_the_generator_in_its_thread(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    job = Endless()
    runner.submit(job, "title")
    qtbot.waitUntil(job.running.is_set, timeout=TIMEOUT)
    runner.cancel()
    assert not runner.is_busy
    _wait(qtbot, runner)
    assert job.closed.is_set()
    assert job.closed_by != threading.get_ident()
    assert watcher.ends == ["cancelled", "finished"]


def test_a_job_is_cancelled_within_one_step(qtbot: Any, runner: Runner) -> None:
    step = threading.Semaphore(0)
    steps = []

    def job() -> Job[None]:
        while True:
            steps.append(len(steps))
            step.acquire()
            yield Progress(0, 1, "step")

    runner.submit(job, "title")
    qtbot.waitUntil(lambda: len(steps) == 1, timeout=TIMEOUT)
    runner.cancel()
    step.release(10)
    _wait(qtbot, runner)
    assert len(steps) == 1


def test_the_last_request_wins_and_stale_answers_are_dropped(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    first = Endless()
    runner.submit(first, "first")
    qtbot.waitUntil(first.running.is_set, timeout=TIMEOUT)
    runner.submit(_quick("second"), "second")
    runner.submit(_quick("third"), "third")
    assert runner.is_busy
    _wait(qtbot, runner)
    assert first.closed.is_set()
    assert watcher.named("succeeded") == ["third"]
    assert watcher.ends == ["succeeded", "finished"]


def test_an_answer_that_is_under_way_when_a_new_question_comes_is_dropped(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    done = threading.Event()

    def job() -> Job[str]:
        yield Progress(0, 1, "")
        done.set()
        return "stale"

    runner.submit(job, "first")
    assert done.wait(TIMEOUT / 1000)  # the answer may lie in the event queue now
    runner.submit(_quick("fresh"), "second")
    _wait(qtbot, runner)
    assert watcher.named("succeeded") == ["fresh"]


def test_asking_from_within_the_answer_works(qtbot: Any, runner: Runner, watcher: Watcher) -> None:
    answers = []

    def on_answer(result: str) -> None:
        answers.append(result)
        if result == "first":
            runner.submit(_quick("second"), "second")

    runner.succeeded.connect(on_answer)
    runner.submit(_quick("first"), "first")
    qtbot.waitUntil(lambda: answers == ["first", "second"], timeout=TIMEOUT)
    _wait(qtbot, runner)


def test_asking_again_between_answer_and_end_works(qtbot: Any, runner: Runner) -> None:
    answers: list[int] = []
    runner.succeeded.connect(answers.append)
    for number in range(20):
        runner.submit(_quick(number), "title")
        qtbot.waitUntil(lambda number=number: number in answers, timeout=TIMEOUT)
    _wait(qtbot, runner)
    assert answers == list(range(20))


def test_every_plane_is_reported_however_fast_they_come(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    def job() -> Job[None]:
        for number in range(200):
            yield Progress(number, 200, "step")
            yield Progress(number + 1, 200, "plane", (number,))

    runner.submit(job, "title")
    _wait(qtbot, runner)
    planes = [index for _, reported in watcher.named("progressed") for index in reported]
    assert planes == [(number,) for number in range(200)]


def test_quitting_napari_ends_the_job(qtbot: Any, runner: Runner, watcher: Watcher) -> None:
    job = Endless()
    runner.submit(job, "title")
    qtbot.waitUntil(job.running.is_set, timeout=TIMEOUT)
    WorkerBase.await_workers(TIMEOUT)  # what napari does when it quits
    assert job.closed.is_set()
    _wait(qtbot, runner)
    assert watcher.ends == ["cancelled", "finished"]


def test_after_shutting_down_nothing_is_reported(
    qtbot: Any, runner: Runner, watcher: Watcher
) -> None:
    job = Endless()
    runner.submit(job, "title")
    qtbot.waitUntil(job.running.is_set, timeout=TIMEOUT)
    runner.shut_down()
    before = list(watcher.events)
    qtbot.waitUntil(job.closed.is_set, timeout=TIMEOUT)
    runner.submit(_quick("too late"), "title")
    qtbot.wait(50)
    assert watcher.events == before


def test_the_activity_dock_shows_the_job_and_can_cancel_it(qtbot: Any) -> None:
    runner = Runner(in_activity_dock=True)
    watcher = Watcher(runner)
    job = Endless()
    runner.submit(job, "Denoising cells")
    (bar,) = napari_progress._all_instances
    assert bar.desc.startswith("Denoising cells")
    qtbot.waitUntil(lambda: bar.n == 1 and bar.total == 2, timeout=TIMEOUT)
    bar.cancel()
    _wait(qtbot, runner)
    assert watcher.ends == ["cancelled", "finished"]
    assert not napari_progress._all_instances
    runner.shut_down()


def test_a_warning_in_a_job_does_no_harm(
    qtbot: Any, runner: Runner, watcher: Watcher, caplog: pytest.LogCaptureFixture
) -> None:
    import warnings

    def job() -> Job[str]:
        yield Progress(0, 1, "")
        warnings.warn("beware", UserWarning, stacklevel=2)
        return "done"

    with caplog.at_level(logging.CRITICAL):
        runner.submit(job, "title")
        _wait(qtbot, runner)
    assert watcher.ends == ["succeeded", "finished"]
