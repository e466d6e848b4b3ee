"""The parts of a batch that run on workers of dask.distributed. Imports it: an extra."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from distributed import Client, LocalCluster, WorkerPlugin, get_worker
from distributed.security import Security
from numpy.typing import NDArray

from napari_learned_diffusion.config import TilingConfig
from napari_learned_diffusion.jobs.batch_engines import PlaneOutcome, PlaneTask, PlaneWorker

if TYPE_CHECKING:
    from napari_learned_diffusion.core.zoo import Weights
    from napari_learned_diffusion.jobs.batch_engines import Certificates

_LOOPBACK = "127.0.0.1"

_TALKATIVE = ("distributed.client", "distributed.core", "distributed.comm", "distributed.batched")
"""Loggers that print tracebacks where a connection is lost, which is told in a sentence."""


def start(workers: int | None) -> LocalCluster:
    """Processes on this machine, each with one thread and restarted when it dies.

    Who reaches a scheduler's port can run any code with the rights of who has started it. So it
    listens on this machine alone, and takes only connections with the certificate that is made for
    this cluster and never leaves memory: other users of the machine have none.
    """
    return LocalCluster(
        host=_LOOPBACK,
        protocol="tls",
        security=Security.temporary(),
        n_workers=workers or os.cpu_count(),
        threads_per_worker=1,
        processes=True,
        memory_limit=0,  # planes are few and their number is bounded; models are not dask's to stop
        dashboard_address=f"{_LOOPBACK}:0",
    )


def connect(
    address: LocalCluster | str | None, seconds: float, certificates: Certificates | None = None
) -> Client:
    """A client of a cluster, or of the scheduler at an address.

    Without certificates those in distributed's own configuration are used, if there are any.
    """
    security = None
    if certificates is not None:
        security = Security(
            tls_ca_file=str(certificates.ca),
            tls_client_cert=str(certificates.cert),
            tls_client_key=None if certificates.key is None else str(certificates.key),
            require_encryption=True,
        )
    return Client(address, timeout=seconds, set_as_default=False, security=security)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep distributed from printing tracebacks of connections that are lost."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
