"""What a worker does for the batch widget: find images, and run a batch that can be paused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.jobs.batch_sources import Source, find_sources
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._imports import import_module
from napari_learned_diffusion.widgets._tasks import pausable

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.batch import BatchSummary


def load_jobs() -> Any:
    """The module of the batch. Importing it imports torch, so this is called in a worker."""
    return import_module("napari_learned_diffusion.jobs.batch")


@dataclass(frozen=True)
class BatchRequest:
    """Everything that a batch is told; nothing in it changes when the user goes on working.

    Parameters
    ----------
    sources
        What to denoise.
    out
        The output folder.
    format
        Key of the format of the results; ``None``: each file's own.
    overwrite, only_failed
        As in `jobs.batch.BatchConfig`.
    config, tiling
        The settings.
    """

    sources: tuple[Source, ...]
    out: Path
    format: str | None
    overwrite: bool
    only_failed: bool
    config: DiffusionConfig
    tiling: TilingConfig


def find(paths: Sequence[Path], out: Path) -> Job[list[Source]]:
    """The images among files and folders, which may be many on a slow disk."""
    yield Progress(0, 1, "Looking for images")
    return find_sources(paths, out)


def denoise_batch(
    request: BatchRequest, paused: threading.Event, load: Callable[[], Any] = load_jobs
) -> Job[BatchSummary]:
    """Denoise the files; while ``paused`` is set, nothing new is begun."""
    yield Progress(0, 1, "Preparing")
    jobs = load()
    batch = jobs.BatchConfig(
        out=request.out,
        format=request.format,
        overwrite=request.overwrite,
        only_failed=request.only_failed,
    )
    job: Job[BatchSummary] = jobs.denoise_batch(
        request.sources, batch, request.config, tiling=request.tiling
    )
    return (yield from pausable(job, paused))
