"""Where the planes of a batch are denoised: in a thread of this process, or on a cluster."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidSettingError,
    LearnedDiffusionError,
)
from napari_learned_diffusion.core.zoo import Weights, weights_of
from napari_learned_diffusion.files._extras import require

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.plane_solver import PlaneSolver
    from napari_learned_diffusion.jobs.prepare import Prepared

_RETRIES = 3
"""How often a plane is tried again after a worker has died."""

_CONNECT_SECONDS = 15
_CLOSE_SECONDS = 5
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class PlaneTask:
    """How the planes of a file are to be denoised.

    Parameters
    ----------
    token
        The file's own, so that a worker knows which solver it may use again.
    config
        As requested.
    prepared
        For the whole stack; ``None``: chosen from the plane itself.
    spacing
        Distance of rows and of columns.
    """

    token: str
    config: DiffusionConfig
    prepared: Prepared | None
    spacing: tuple[float, float]


@dataclass(frozen=True)
class PlaneOutcome:
    """A denoised plane.

    Parameters
    ----------
    plane
        In the type that `jobs.result_type` says.
    seconds
        Time of the denoising.
    noise
        Noise level by the noise model, and standard deviation of what was removed, in layer units;
        ``None`` where there is no noise, or it wasn't measured.
    messages
        Sentences for the user.
    """

    plane: NDArray[Any]
    seconds: float
    noise: tuple[float, float] | None
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Certificates:
    """Files in PEM format by which a scheduler and its client know each other.

    Parameters
    ----------
    ca
        Certificate of the authority that has signed both.
    cert, key
        The client's certificate and its key; ``None`` where the key is in the same file.

    Raises
    ------
    InvalidSettingError
        if one of the files isn't there.
    """

    ca: Path
    cert: Path
    key: Path | None = None

    def __post_init__(self) -> None:
        for path in (self.ca, self.cert, self.key):
            if path is not None and not path.is_file():
                raise InvalidSettingError(f"There is no file {path}. Check its name and folder.")


class ConnectionLostError(LearnedDiffusionError):
    """The scheduler doesn't answer any more, so that no file can be denoised."""

    def __init__(self) -> None:
        super().__init__(
            "The connection to the cluster's scheduler is lost. What is done is kept: start the "
            "scheduler again, and the same batch once more to go on."
        )


class StoppedError(Exception):
    """The batch was closed while a thread was at work for it."""


class PlaneWorker:
    """Denoises planes, and keeps the solver from one plane of a file to the next.

    Parameters
    ----------
    tiling
        How large planes are cut.
    weights
        Of a learned model, in place of those in the worker's own installation.
    """

    def __init__(self, tiling: TilingConfig, weights: Weights | None = None) -> None:
        self._tiling, self._weights = tiling, weights
        self._token, self._kept = "", None

    _kept: PlaneSolver | None

    def __call__(
        self,
        plane: NDArray[Any],
        task: PlaneTask,
        measure: bool,
        stopped: Callable[[], bool] = lambda: False,
    ) -> PlaneOutcome:
        """Denoise a plane; ``stopped`` is asked after every step of the diffusion."""
        from napari_learned_diffusion.jobs.report import Tally
        from napari_learned_diffusion.jobs.result_type import result_type

        start = time.perf_counter()
        solver = self._solver(plane, task)
        target = result_type(plane.dtype, task.prepared or solver.prepared)
        plane = target.as_solved(plane)
        steps = solver.solve(plane)
        try:
            while True:
                next(steps)
                if stopped():
                    raise StoppedError
        except StopIteration as end:
            result = end.value
        finally:
            steps.close()
        seconds = time.perf_counter() - start
        tally = Tally()
        tally.add(plane, result, solver)
        noise = tally.noise_levels() if measure and tally.noisy_pixels else None
        return PlaneOutcome(result.plane, seconds, noise, tuple(tally.messages()))

    def _solver(self, plane: NDArray[Any], task: PlaneTask) -> PlaneSolver:
        from napari_learned_diffusion.jobs.prepare import prepare

        prepared = task.prepared
        if prepared is None or prepared.slice_by_slice:
            own = prepare(plane, task.config) if prepared is None else prepared.of(plane)
            return self._load(own, task)
        if self._kept is None or self._token != task.token:
            self._token, self._kept = task.token, self._load(prepared, task)
        return self._kept

    def _load(self, prepared: Prepared, task: PlaneTask) -> PlaneSolver:
        from napari_learned_diffusion.jobs.plane_solver import PlaneSolver
        from napari_learned_diffusion.jobs.prepare import placed

        # A worker may have another device than the client that has prepared the settings.
        device = placed(task.config).device
        prepared = replace(prepared, config=prepared.config.with_(device=device))
        solver = PlaneSolver(prepared, task.spacing, self._tiling)
        if self._weights is not None and solver.iterations:
            solver.model.load_state_dict(self._weights)
        return solver


class Engine(Protocol):
    """Computes planes, several at a time, and gives them back as futures."""

    link: str | None
    """Address of a page that shows what it does."""

    @property
    def slots(self) -> int:
        """How many planes it can have at once, so that none of its workers waits for the next."""

    def submit(self, plane: NDArray[Any], task: PlaneTask, measure: bool) -> Any:
        """A future of a `PlaneOutcome`."""

    def wait(self, futures: Collection[Any], seconds: float) -> list[Any]:
        """Those futures that are done; waits until one is, or so long."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class LocalEngine:
    """One thread of this process: it computes while the caller reads and writes."""

    link: str | None = None
    slots = 3  # one computed, one waiting, one being read or written

    def __init__(self, tiling: TilingConfig) -> None:
        self._worker = PlaneWorker(tiling)
        self._stop = threading.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "batch")

    def submit(self, plane: NDArray[Any], task: PlaneTask, measure: bool) -> Any:
        return self._thread.submit(self._worker, plane, task, measure, self._stop.is_set)

    def wait(self, futures: Collection[Any], seconds: float) -> list[Any]:
        first = concurrent.futures.FIRST_COMPLETED
        return list(concurrent.futures.wait(futures, seconds, first).done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)


class ClusterEngine:
    """The workers of dask.distributed: planes and results travel through the scheduler.

    Workers need neither see the files nor have the same weights installed.

    Parameters
    ----------
    config, tiling
        For the model and its weights, which go to every worker once, and how planes are cut.
    workers
        Number of processes to start on this machine.
    scheduler
        Address of a running scheduler, ``tls://HOST:PORT`` or ``tcp://HOST:PORT``, in place of
        ``workers``.
    certificates
        For ``tls://``; ``None``: those in distributed's own configuration.

    Raises
    ------
    MissingDependencyError
        if distributed or what it needs to encrypt isn't installed.
    InvalidSettingError
        if there are certificates for a connection that isn't encrypted.
    DeviceError
        if there is no scheduler at the address, it takes no such connection, or its workers can't
        load this package.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        tiling: TilingConfig,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        require("distributed", "cluster", "Clusters")
        if scheduler is None:
            require("cryptography", "cluster", "Encrypted connections to workers")
        elif certificates is not None and not scheduler.startswith("tls://"):
            raise InvalidSettingError(
                f"Certificates are for encrypted connections, and {scheduler} is none. Give an "
                "address that begins with tls://, or leave the certificates out."
            )
        import dask

        from napari_learned_diffusion.jobs import batch_cluster

        # Planes are part of their task, so that another worker can take it over: that's meant.
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"})
        weights, _ = weights_of(settled(config).model)
        self._plugin = batch_cluster.WorkerSetup(tiling, weights)
        self._open = ExitStack()
        with ExitStack() as opening:
            opening.enter_context(batch_cluster.quiet())
            cluster = None
            if scheduler is None:
                cluster = opening.enter_context(batch_cluster.start(workers))
            try:
                self._client = batch_cluster.connect(
                    cluster or scheduler, _CONNECT_SECONDS, certificates
                )
            except (OSError, ValueError, TypeError, RuntimeError) as error:
                raise DeviceError(_why_not_connected(scheduler, error)) from error
            opening.callback(self._close_client)
            try:
                self._client.register_plugin(self._plugin)
            except Exception as error:  # whatever a worker says
                raise DeviceError(
                    f"The workers of the cluster can't load this package ({error}). Install the "
                    "same version of it where they run."
                ) from error
            self.link: str | None = self._client.dashboard_link
            self._open = opening.pop_all()

    @property
    def slots(self) -> int:
        # Workers come and go.
        try:
            return max(2, 2 * len(self._client.nthreads()))
        except (OSError, RuntimeError) as error:
            raise ConnectionLostError from error

    def submit(self, plane: NDArray[Any], task: PlaneTask, measure: bool) -> Any:
        from napari_learned_diffusion.jobs.batch_cluster import denoise_on_worker

        self._check_connected()
        return self._client.submit(
            denoise_on_worker, plane, task, measure, self._plugin.name, pure=False, retries=_RETRIES
        )

    def wait(self, futures: Collection[Any], seconds: float) -> list[Any]:
        self._check_connected()
        # Not by distributed.wait: it needs the client to be the current one, and meanwhile what
        # other threads read with dask would be sent to the cluster, too.
        end = time.monotonic() + seconds
        while not (done := [future for future in futures if future.done()]):
            if time.monotonic() >= end:
                break
            time.sleep(_POLL_SECONDS)
        # Nobody but a client that has lost its scheduler cancels what is still waited for.
        if any(future.status in ("cancelled", "lost") for future in done):
            raise ConnectionLostError
        return done

    def _check_connected(self) -> None:
        if self._client.status != "running":
            raise ConnectionLostError

    def _close_client(self) -> None:
        with suppress(OSError):  # a scheduler that is gone doesn't say farewell
            self._client.close(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _why_not_connected(scheduler: str | None, error: Exception) -> str:
    if scheduler is not None and scheduler.startswith("tls://"):
        return (
            f"The scheduler of dask at {scheduler} can't be connected to ({error}). Check host and "
            "port, and that the certificates are those that it was started with."
        )
    return (
        f"There is no scheduler of dask at {scheduler} ({error}). "
        "Start one with `dask scheduler`, and check host and port."
    )


def settled(config: DiffusionConfig) -> DiffusionConfig:
    """The configuration with the model chosen, which must be the same wherever planes are computed.

    Raises
    ------
    DeviceError
        if the device isn't there.
    """
    from napari_learned_diffusion.jobs.prepare import placed

    # Better to fail here than in every worker.
    return config.with_(model=placed(config).model)
