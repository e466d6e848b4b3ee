"""The parts of a batch that run on workers of dask.distributed. Imports it: an extra."""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING, Any

from distributed import Client, LocalCluster, WorkerPlugin, get_worker
from numpy.typing import NDArray

from napari_learned_diffusion.config import TilingConfig
from napari_learned_diffusion.jobs.batch_engines import PlaneOutcome, PlaneTask, PlaneWorker

if TYPE_CHECKING:
    from napari_learned_diffusion.core.zoo import Weights


def start(workers: int | None) -> LocalCluster:
    """Processes on this machine, each with one thread and restarted when it dies."""
    return LocalCluster(
        n_workers=workers or os.cpu_count(),
        threads_per_worker=1,
        processes=True,
        memory_limit=0,  # planes are few and their number is bounded; models are not dask's to stop
        dashboard_address="127.0.0.1:0",
    )


def connect(address: LocalCluster | str | None, seconds: float) -> Client:
    """A client of a cluster, or of the scheduler at an address."""
    return Client(address, timeout=seconds, set_as_default=False)


class WorkerSetup(WorkerPlugin):  # type: ignore[misc]
    """Gives every worker, also one that joins later, the model's weights once."""

    name = "napari-learned-diffusion"

    def __init__(self, tiling: TilingConfig, weights: Weights | None) -> None:
        self._arguments = tiling, weights

    def setup(self, worker: Any) -> None:
        self.denoise = PlaneWorker(*self._arguments)
        self.turn = Lock()
        self.number = worker.name if isinstance(worker.name, int) else 0


def denoise_on_worker(
    plane: NDArray[Any], task: PlaneTask, measure: bool, plugin: str
) -> PlaneOutcome:
    """Denoise a plane with what the plugin has set up."""
    setup = get_worker().plugins[plugin]
    _take_gpu(setup.number)
    with setup.turn:  # the solver uses several threads by itself
        outcome: PlaneOutcome = setup.denoise(plane, task, measure)
    return outcome


def _take_gpu(number: int) -> None:
    """One GPU for each worker where there are several; the choice holds for the thread."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
