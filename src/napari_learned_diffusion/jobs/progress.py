"""What a long job says while it runs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """One report of a running job. Each is also a place where the job can be closed.

    Parameters
    ----------
    done, total
        Units of work, of the whole job; ``0 <= done <= total``.
    message
        What is being done, for people.
    index
        Index of the plane that has just been finished, one number for each axis that isn't part of
        the plane; ``None`` between planes.
    plane
        That plane, denoised, in the dtype of the input.
    """

    done: int
    total: int
    message: str
    index: tuple[int, ...] | None = None
    plane: NDArray[Any] | None = None


Job = Generator[Progress, None, Result]
"""A job yields its progress and returns its result. Closing it cancels it within one step."""


def run(job: Job[Result], on_progress: Callable[[Progress], None] | None = None) -> Result:
    """Run a job to its end and return its result."""
    try:
        while True:
            progress = next(job)
            if on_progress is not None:
                on_progress(progress)
    except StopIteration as stop:
        result: Result = stop.value
        return result
    finally:
        job.close()
