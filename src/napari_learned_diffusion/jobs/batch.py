"""Denoise many files to a folder: slice by slice, in bounded memory, stopped and resumed at will.

Planes are read and kept here while an engine computes others, in a thread of this process or on the
workers of a cluster; meanwhile two threads examine the next file and write the result of the last.
What is finished is kept aside plane by plane (`batch_state.Scratch`) and becomes the result when it
is whole, so that no result is ever half-written. Which input's result goes where is settled before
anything is begun (`batch_targets`), and what was made is on record (`batch_manifest`).
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.atomic import (
    check_target,
    move_into_place,
    why_not_written,
)
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
)
from napari_learned_diffusion.core.noise_estimation import sample_planes
from napari_learned_diffusion.core.zoo import weights_hash
from napari_learned_diffusion.files import FORMATS, Volume, write
from napari_learned_diffusion.files._extras import readable
from napari_learned_diffusion.files.formats import Format, check_compression
from napari_learned_diffusion.files.formats import check_target as check_result
from napari_learned_diffusion.jobs.batch_engines import (
    ConnectionLostError,
    Engine,
    LocalEngine,
    PlaneOutcome,
    PlaneTask,
    StoppedError,
    settled,
)
from napari_learned_diffusion.jobs.batch_manifest import Manifest, Record
from napari_learned_diffusion.jobs.batch_reading import PlaneReader
from napari_learned_diffusion.jobs.batch_sources import Source, Stamp, result_stamp
from napari_learned_diffusion.jobs.batch_state import UNFINISHED, Log, Scratch, remove_scratch
from napari_learned_diffusion.jobs.batch_targets import Targets
from napari_learned_diffusion.jobs.planes import check_image
from napari_learned_diffusion.jobs.prepare import Prepared, prepare
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.jobs.result_type import ResultType, for_format, result_type

State = Literal["waiting", "running", "writing", "done", "skipped", "failed"]
_FINAL: tuple[State, ...] = ("done", "skipped", "failed")

_PROGRESS_PER_FILE = 1000
_HEARTBEAT_SECONDS = 0.2
_MEASURED_PLANES = 2
_LARGE_TIFF = 4 * 2**30
"""Bytes above which a TIFF becomes an OME-Zarr unless told otherwise: fewer programs read it."""


_FINGERPRINT = ("input_hash", "settings", "weights")
"""What the pixels of a result depend on."""


@dataclass(frozen=True)
class BatchConfig:
    """Where the results of a batch go, and how.

    Parameters
    ----------
    out
        The output folder; made where it isn't there.
    format
        Key of `napari_learned_diffusion.files.FORMATS`; ``None``: each file's own, but OME-Zarr for
        a TIFF of more than 4 GiB.
    overwrite
        Whether everything is computed anew and may replace what is there; never an input.
    only_failed
        Whether to try only those files again that have failed before.
    plane, series
        Letters of the axes that span a slice, and which image of a file that holds several;
        ``None``: Y and X, and the largest.
    compression
        Lossless compression of those results that are TIFF.
    """

    out: Path
    format: str | None = None
    overwrite: bool = False
    only_failed: bool = False
    plane: str | None = None
    series: int | None = None
    compression: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise InvalidSettingError(
                f"There is no format {self.format!r}. Choose one of: {', '.join(FORMATS)}."
            )
        check_compression(FORMATS[self.format or "tiff"], self.compression)


@dataclass(frozen=True)
class FileStatus:
    """Where a batch is with one of its files; a row of a table.

    Parameters
    ----------
    number
        Of the file in the batch, from 0.
    source
        What is read.
    state
        ``"done"``, ``"skipped"`` and ``"failed"`` are final.
    output
        What is written; ``None`` as long as that isn't known.
    planes_done, planes
        Slices that are finished, of all; 0 of 0 before the file is opened.
    seconds
        Since the file was begun.
    noise_sigma, removed_sigma
        Noise level by the noise model, and standard deviation of what was removed, in the file's
        units; NaN where it wasn't measured.
    message
        For people: why it failed or was skipped, or what wasn't as usual.
    """

    number: int
    source: Source
    state: State = "waiting"
    output: Path | None = None
    planes_done: int = 0
    planes: int = 0
    seconds: float = 0.0
    noise_sigma: float = math.nan
    removed_sigma: float = math.nan
    message: str = ""

    @property
    def is_final(self) -> bool:
        """Whether the batch is through with the file."""
        return self.state in _FINAL


@dataclass(frozen=True)
class BatchProgress(Progress):
    """A report of a running batch: progress of the whole, and what is new about one file.

    ``index`` is ``None`` where nothing is new, and an empty tuple where the file's state has
    changed without a slice being finished; ``plane`` is the slice that was finished, for a preview.
    """

    file: FileStatus | None = None


@dataclass(frozen=True)
class BatchSummary:
    """How a batch has ended.

    Parameters
    ----------
    files
        Every file in its final state.
    seconds
        Wall-clock time.
    solver_seconds
        Time that the workers spent on denoising, all of them together.
    megapixels
        What was denoised, in millions of pixels.
    log
        The log, in JSON lines.
    notes
        What wasn't as it should be in the output folder, in sentences.
    """

    files: tuple[FileStatus, ...]
    seconds: float
    solver_seconds: float
    megapixels: float
    log: Path
    notes: tuple[str, ...] = ()

    def count(self, state: State) -> int:
        """How many files ended so."""
        return sum(file.state == state for file in self.files)

    def describe(self) -> str:
        """The numbers in one line."""
        counts = [f"{self.count(state)} {state}" for state in _FINAL]
        speed = self.megapixels / self.seconds if self.seconds > 0 else 0.0
        return f"{', '.join(counts)} · {self.seconds:.1f} s · {speed:.2f} megapixels/s"


def denoise_batch(
    sources: Sequence[Source],
    batch: BatchConfig,
    config: DiffusionConfig | None = None,
    *,
    tiling: TilingConfig | None = None,
    engine: Engine | None = None,
) -> Job[BatchSummary]:
    """Denoise files to a folder. A file that fails is reported, and the others go on.

    What the manifest in the output folder has as done from the same content with the same settings
    and weights is skipped, unless it is to be overwritten. What was interrupted goes on from the
    slices that are there. Inputs whose results would be in each other's way fail before anything
    is begun.

    Parameters
    ----------
    sources
        What to denoise, see `find_sources`.
    batch
        Where to, and how.
    config
        How to denoise; ``None``: everything automatic.
    tiling
        How large planes are cut.
    engine
        Where to compute; it is closed in the end. ``None``: in a thread.

    Yields
    ------
    A `BatchProgress` for every slice, every change of a file's state, and while slices are computed
    at least five times a second; closing the generator there stops the batch within one step of the
    diffusion, and it can go on later.

    Raises
    ------
    FileWriteError
        if the output folder can't be written to, or another batch does so.
    LearnedDiffusionError
        if the settings contradict each other, or the connection to a cluster is lost.
    """
    computing: Engine = engine if engine is not None else LocalEngine(tiling or TilingConfig())
    with computing, _open_folder(batch.out) as log:
        config = settled(config or DiffusionConfig())
        run = _Run(sources, batch, config, computing, Manifest(batch.out, log.alike), log)
        try:
            for _ in run.steps():
                yield from run.reports()
            yield from run.reports()
        finally:
            run.close()
        return run.summary()


def _open_folder(folder: Path) -> Log:
    """Make the output folder, try whether it can be written to, and begin its log."""
    try:
        if folder.is_symlink():
            check_target(folder, overwrite=True, folder=True)
        folder.mkdir(parents=True, exist_ok=True)
        # Only trying tells, by a file that has no name that anybody else's could have.
        with tempfile.TemporaryFile(dir=folder):
            pass
        return Log(folder)
    except OSError as error:
        raise FileWriteError(why_not_written(folder, error)) from error


@dataclass(frozen=True)
class _Examined:
    """A file of which all is known that there is to know before its planes are denoised."""

    volume: Volume
    axes: tuple[int, int]
    target: Path
    format: Format
    scratch: Scratch
    config: DiffusionConfig
    prepared: Prepared | None
    type: ResultType
    record: dict[str, Any]
    stamp: Stamp | None
    may_replace: bool
    leftover: Path | None
    """An earlier scratch of the same input, at another place."""
    seconds: float


@dataclass
class _File:
    """A file while it is in work."""

    status: FileStatus
    found: _Examined
    task: PlaneTask
    record: dict[str, Any]
    begun: float
    planes: PlaneReader = field(init=False)
    pending: Sequence[int] = field(init=False)
    measured: set[int] = field(init=False)
    in_flight: int = 0
    noise: list[tuple[float, float]] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.planes = PlaneReader(self.found.volume.data, self.found.axes)
        done = self.scratch.done
        self.planes_done = int(np.count_nonzero(done))
        self.pending = np.flatnonzero(~done).tolist() if self.planes_done else range(len(done))
        count = len(self.pending)
        chosen = sample_planes(count, _MEASURED_PLANES) if count else ()
        self.measured = {self.pending[i] for i in chosen}

    planes_done: int = field(init=False)

    @property
    def source(self) -> Source:
        return self.status.source

    @property
    def scratch(self) -> Scratch:
        return self.found.scratch

    def keep(self, number: int, plane: NDArray[Any]) -> None:
        self.scratch.write(number, plane)
        self.planes_done += 1

    @property
    def is_whole(self) -> bool:
        return self.planes_done == len(self.planes)

    def current(self, state: State, message: str | None = None) -> FileStatus:
        noise_sigma, removed_sigma = (
            (float(np.median(level)) for level in zip(*self.noise, strict=True))
            if self.noise
            else (math.nan, math.nan)
        )
        self.status = replace(
            self.status,
            state=state,
            planes_done=self.planes_done,
            planes=len(self.planes),
            seconds=time.perf_counter() - self.begun,
            noise_sigma=noise_sigma,
            removed_sigma=removed_sigma,
            message=self.status.message if message is None else message,
        )
        return self.status


class _Run:
    """The course of a batch: begins files, keeps the engine busy, and collects what it has done."""

    def __init__(
        self,
        sources: Sequence[Source],
        batch: BatchConfig,
        config: DiffusionConfig,
        engine: Engine,
        manifest: Manifest,
        log: Log,
    ) -> None:
        self.batch, self.config, self.engine = batch, config, engine
        self.manifest, self.log = manifest, log
        self.files = [FileStatus(number, source) for number, source in enumerate(sources)]
        self.settings = _as_json(config, batch)
        self.weights = weights_hash(config.model)
        self.targets = Targets(sources, batch.out, batch.format, log.alike)
        self.open: dict[int, _File] = {}
        self.running: dict[Any, tuple[_File, int]] = {}
        self.writing: dict[Future[FileStatus], _File] = {}
        self.examiner = ThreadPoolExecutor(1, "batch-examine")
        self.writer = ThreadPoolExecutor(1, "batch-write")
        self.stop = threading.Event()
        self.doing = ""
        self.events: deque[BatchProgress] = deque()
        self.start = time.perf_counter()
        self.solver_seconds = 0.0
        self.pixels = self.ended = 0

    # --- the course -------------------------------------------------------------------------------

    def steps(self) -> Iterator[None]:
        """Do the work; yields whenever something may have happened."""
        self.log.write("batch", files=len(self.files), settings=self.settings)
        for note in self.manifest.notes:
            self.log.write("note", message=note)
            self._say(note)
        self._remove_leftovers()
        for number, reason in sorted(self.targets.clashes.items()):
            self._fail(self.files[number], FileWriteError(reason))
        yield
        files = tuple(file for file in self.files if not file.is_final)
        ahead = deque(self.examiner.submit(self._examine, status) for status in files[:1])
        for status, later in zip_longest(files, files[1:]):
            self._say(f"{status.source.name}: opening")
            if later:  # examined while the slices of this one are denoised
                ahead.append(self.examiner.submit(self._examine, later))
            file = yield from self._begin(status, ahead.popleft())
            yield
            for number in file.pending if file else ():
                while len(self.running) >= self.engine.slots:
                    yield from self._collect()
                if file is None or file.status.state != "running":
                    break
                self._submit(file, number)
                yield
            if file and file.status.state == "running" and not file.pending:
                self._finish(file)
        while self.running or self.writing:
            yield from self._collect()

    def reports(self) -> Iterator[BatchProgress]:
        """What has happened since the last time, or a sign of life."""
        if not self.events:
            self._say(self.doing or "Denoising")
        while self.events:
            yield self.events.popleft()

    def close(self) -> None:
        """Let go of files that are in work; they can be resumed."""
        self.stop.set()
        for future in self.running:
            with suppress(Exception):
                future.cancel()
        for thread in (self.examiner, self.writer):
            thread.shutdown(wait=True, cancel_futures=True)
        for file in self.open.values():
            file.scratch.close()
            self.log.write("stopped", file=file.source.name)
        self.manifest.close()

    def summary(self) -> BatchSummary:
        summary = BatchSummary(
            tuple(self.files),
            time.perf_counter() - self.start,
            self.solver_seconds,
            self.pixels / 1e6,
            self.log.path,
            tuple(self.manifest.notes),
        )
        counts = {state: summary.count(state) for state in _FINAL}
        self.log.write("summary", seconds=round(summary.seconds, 3), **counts)
        return summary

    # --- one file ---------------------------------------------------------------------------------

    def _begin(
        self, status: FileStatus, examined: Future[_Examined | FileStatus]
    ) -> Generator[None, None, _File | None]:
        """Open a file, unless it is done or fails."""
        begun = time.perf_counter()
        while not examined.done():
            yield from self._collect(examined)
        try:
            found = examined.result()
            if isinstance(found, FileStatus):
                self._report(found)
                return None
            begun = time.perf_counter() - found.seconds
            file = self._open(status, found, begun)
        except Exception as error:
            self._fail(replace(status, seconds=time.perf_counter() - begun), error)
            return None
        self.open[status.number] = file
        self._report(file.current("running"))
        return file

    def _examine(self, status: FileStatus) -> _Examined | FileStatus:
        """Whether a file has to be denoised, and how; or that it is skipped. In a thread."""
        begun = time.perf_counter()
        source = status.source
        source.check()
        known = self.manifest.of(source.place, source.name)
        if self.batch.only_failed and known.get("state") != "failed":
            return replace(status, state="skipped", message="It hasn't failed before.")
        stamp = source.stamp()
        record = self._record(source, known, stamp)
        made = self._made_before(source, known, record)
        if made is not None:
            message = "It was done before, with the same settings."
            return replace(status, state="skipped", output=made, message=message)
        volume = source.read(self.batch.series)
        if "S" in volume.axes:
            raise InvalidImageError(
                f"{source.path} is a colour image. Split it into its channels and denoise each by "
                "itself."
            )
        axes = check_image(volume.data, volume.axes_of_planes(self.batch.plane))
        file_format, target = self._target(source, volume)
        self.targets.claim(status.number, target)
        self.targets.check_no_input(source, target)
        may_replace = self.batch.overwrite or self._is_ours(known, target)
        check_result(target, file_format, overwrite=may_replace)
        config = self.config.also_missing(volume.missing)
        config = for_format(config, volume.data.dtype, file_format)
        # A single slice is prepared by the worker: the noise of many files is found in parallel.
        # Only the type of a result of whole numbers must be known before.
        is_stack = math.prod(volume.data.shape) > math.prod(volume.data.shape[a] for a in axes)
        is_open = config.dtype == "auto" and volume.data.dtype.kind in "iu"
        prepared = prepare(volume.data, config, plane_axes=axes) if is_stack or is_open else None
        wanted = result_type(volume.data.dtype, prepared or config)
        scratch, leftover = self._scratch(source, volume, axes, target, known, record, wanted.dtype)
        scratch.examine(self._ticker(f"{source.name}: checking the slices that are done"))
        self.doing = ""
        return _Examined(
            volume,
            axes,
            target,
            file_format,
            scratch,
            config,
            prepared,
            wanted,
            record,
            stamp,
            may_replace,
            leftover,
            time.perf_counter() - begun,
        )

    def _record(self, source: Source, known: Record, stamp: Stamp | None) -> dict[str, Any]:
        """What is to be kept of an input, whatever comes of it."""
        # Without reading it, only where nothing about it has changed, and nobody asks for more.
        same = stamp is not None and known.get("stamp") == stamp.digest
        trusted = same and "input_hash" in known and not self.batch.overwrite
        return {
            "name": source.name,
            "source": source.place,
            "stamp": stamp.digest if stamp is not None and stamp.is_settled else None,
            "input_hash": known["input_hash"] if trusted else self._hash(source),
            "settings": self.settings,
            "weights": self.weights,
        }

    def _made_before(self, source: Source, known: Record, record: Record) -> Path | None:
        """The result that is there from the same content, settings and weights, as it was left."""
        if self.batch.overwrite:
            return None
        # The same content from another place, too: an input may have been moved.
        for made in (known, *self.manifest.of_name(source.name)):
            if made.get("state") != "done" or _fingerprint(made) != _fingerprint(record):
                continue
            output = self.batch.out / str(made.get("output", ""))
            if not self._is_intact(made, output):
                continue
            if record["stamp"] is not None and known.get("stamp") != record["stamp"]:
                values = {**made, **{key: record[key] for key in ("name", "source", "stamp")}}
                self.manifest.record(source.place, **values)
            return output
        return None

    def _is_intact(self, made: Record, output: Path) -> bool:
        """Whether a result is as it was left; of an earlier version whether there is any."""
        if not output.exists():
            return False
        count, size, _ = result_stamp(output)
        if "result" not in made:
            return size > 0
        return bool(made["result"][:2] == [count, size])

    def _is_ours(self, known: Record, target: Path) -> bool:
        """Whether what is at a target was put there by a batch that was killed just then.

        So is a file that was done and has lost all its content: there is nothing in it to lose.
        """
        if not target.exists() or known.get("output") != self._below(target):
            return False
        now = result_stamp(target)
        if known.get("state") == "done":
            return target.is_file() and now[1] == 0
        return bool(known.get("result") == now)

    def _below(self, path: Path) -> str:
        """A path as the manifest has it."""
        return path.relative_to(self.batch.out).as_posix()

    def _scratch(
        self,
        source: Source,
        volume: Volume,
        axes: tuple[int, int],
        target: Path,
        known: Record,
        record: Record,
        dtype: np.dtype[Any],
    ) -> tuple[Scratch, Path | None]:
        """Where the slices of a file are kept, and where they were kept before."""
        shape = volume.data.shape
        count = math.prod(shape) // (shape[axes[0]] * shape[axes[1]])
        on_record = known.get("scratch")
        if on_record is None and known.get("state") in ("running", "failed"):  # version 1
            on_record = known.get("output", "") + UNFINISHED if "output" in known else None
        before = None if on_record is None else self.batch.out / on_record
        is_beside = before is not None and before.parent == target.parent
        scratch = Scratch(
            target,
            source.place,
            _fingerprint(record),
            (count, shape[axes[0]], shape[axes[1]]),
            dtype,
            known=(before.name,) if before is not None and is_beside else (),
            is_taken=self.targets.is_claimed,
        )
        return scratch, before if before != scratch.folder else None

    def _remove_leftovers(self) -> None:
        """Remove slices of results that were finished when an earlier batch was killed."""
        for made in self.manifest.unfinished:
            now = self.manifest.of(str(made.get("source", "")), str(made["name"]))
            if now.get("state") in ("done", "replaced") and "scratch" in now:
                remove_scratch(self.batch.out / now["scratch"])

    def _hash(self, source: Source) -> str:
        found = source.content_hash(self._ticker(f"{source.name}: checking its content"))
        self.doing = ""
        return found

    def _ticker(self, what: str) -> Callable[[float], None]:
        """For work in a thread: tells how much of it is done, from 0 to 1, and ends it if asked."""

        def tick(part: float) -> None:
            if self.stop.is_set():
                raise StoppedError
            self.doing = f"{what}, {100 * min(part, 1):.0f} %"

        return tick

    def _open(self, status: FileStatus, found: _Examined, begun: float) -> _File:
        name, place = status.source.name, status.source.place
        record = found.record | {
            "output": self._below(found.target),
            "scratch": self._below(found.scratch.folder),
        }
        # On record before it is made, so that whatever is left of it is known as the batch's own.
        self.manifest.record(place, **record, state="running")
        if found.leftover is not None:
            remove_scratch(found.leftover)
        found.scratch.open()
        token = f"{status.number} {record['input_hash']}"
        told = (*found.volume.metadata.get("notes", ()), found.type.message)
        notes = " ".join(filter(None, told))
        file = _File(
            status=replace(status, output=found.target, message=notes),
            found=found,
            task=PlaneTask(token, found.config, found.prepared, found.volume.spacing(found.axes)),
            record=record,
            begun=begun,
        )
        self.log.write("begun", file=name, planes=len(file.planes), resumed=file.planes_done)
        return file

    def _target(self, source: Source, volume: Volume) -> tuple[Format, Path]:
        """Format and path of the result."""
        own = source.format
        wanted = FORMATS[self.batch.format] if self.batch.format else own
        if wanted is None:
            raise FileFormatError(f"{source.path} is of no known format.")
        is_large = wanted.key == "tiff" and volume.data.nbytes > _LARGE_TIFF
        # Positions and axes of no known meaning are for TIFF alone.
        if self.batch.format is None and is_large and set(volume.axes) <= set("TCZYX"):
            wanted = FORMATS["zarr"]
        return wanted, self.targets.path(source, own, wanted)

    def _submit(self, file: _File, number: int) -> None:
        try:
            with readable(file.source.path):
                plane = file.planes[number]
            future = self.engine.submit(plane, file.task, number in file.measured)
        except ConnectionLostError:
            raise
        except Exception as error:
            self._fail_open(file, error)
            return
        self.running[future] = file, number
        file.in_flight += 1

    def _collect(self, *others: Future[Any]) -> Iterator[None]:
        """Keep the planes that are finished, in the order in which they were begun.

        Each is told of before the next is kept, and the last of a file before the result is
        written: who stops at a slice finds that slice, and nothing later of that file. Where
        nothing is denoised, the wait is for results that are written, or for ``others``.
        """
        ended = set()
        if self.running:
            ended = set(self.engine.wait(list(self.running), _HEARTBEAT_SECONDS))
        else:
            wait([*self.writing, *others], _HEARTBEAT_SECONDS, FIRST_COMPLETED)
        yield
        for future in [future for future in self.running if future in ended]:
            file, number = self.running.pop(future)
            file.in_flight -= 1
            if file.status.state != "running":
                continue
            try:
                self._keep(file, number, future.result())
            except Exception as error:
                self._fail_open(file, error)
                continue
            yield
            if file.is_whole:
                self._finish(file)
        for written in [written for written in self.writing if written.done()]:
            file = self.writing.pop(written)
            try:
                status = written.result()
            except Exception as error:
                self._fail_open(file, error)
            else:
                del self.open[status.number]
                self._report(status)
            yield

    def _keep(self, file: _File, number: int, outcome: PlaneOutcome) -> None:
        file.keep(number, outcome.plane)
        file.messages.update(outcome.messages)
        if outcome.noise is not None:
            file.noise.append(outcome.noise)
        self.solver_seconds += outcome.seconds
        self.pixels += outcome.plane.size
        self._report(file.current("running"), file.planes.index(number), outcome.plane)

    def _finish(self, file: _File) -> None:
        self._report(file.current("writing"))
        self.writing[self.writer.submit(self._write_result, file)] = file

    def _write_result(self, file: _File) -> FileStatus:
        """Write the result from the planes, and only then forget them. In a thread."""
        found, place = file.found, file.source.place
        self._check_unchanged(file)
        tick = self._ticker(f"{file.source.name}: writing the result")
        data = file.scratch.as_array(found.volume.data.shape, found.axes, tick)
        note = _note(self.config, found.prepared)
        staged = write(
            file.scratch.staging(found.target.name),
            replace(found.volume, data=data, metadata=found.volume.metadata | {"processing": note}),
            compression=self.batch.compression if found.format.compressions else None,
            format=found.format.key,
        )
        record = file.record | {"result": result_stamp(staged)}
        # Who is killed after the renaming finds by this that what is there is the batch's own.
        self.manifest.record(place, **record, state="running")
        move_into_place(
            staged, found.target, overwrite=found.may_replace, foreign=found.format.foreign
        )
        self.doing = ""
        status = file.current("done", " ".join(_sentences(file)))
        self.manifest.record(
            place,
            **record,
            state="done",
            seconds=round(status.seconds, 3),
            message=status.message,
        )
        file.scratch.remove()
        return status

    def _check_unchanged(self, file: _File) -> None:
        """Refuse to call a result that of an input which has changed meanwhile."""
        before, now = file.found.stamp, file.source.stamp()
        if before is None or now is None or before.digest == now.digest:
            return
        if self._hash(file.source) != file.record["input_hash"]:
            raise FileFormatError(
                f"{file.source.path} has changed while it was denoised. Start the batch again."
            )

    # --- what is told -----------------------------------------------------------------------------

    def _fail_open(self, file: _File, error: Exception) -> None:
        """Give a file up; its planes stay unless its input is what is wrong."""
        if isinstance(error, FileFormatError | InvalidImageError):
            file.scratch.remove()
        else:
            file.scratch.close()
        self.open.pop(file.status.number, None)
        self._fail(file.current("failed"), error, file.record)

    def _fail(
        self, status: FileStatus, error: Exception, record: dict[str, Any] | None = None
    ) -> None:
        message = _sentence(error, status)
        name, place = status.source.name, status.source.place
        known = record or dict(self.manifest.of(place, name))
        # A result that is there stays on record: who comes back to its settings finds it done.
        if known.get("state") != "done":
            with suppress(OSError):  # on a full disk it is told all the same
                values = known | {"name": name, "state": "failed", "message": message}
                self.manifest.record(place, **values | {"source": place})
        self._report(replace(status, state="failed", message=message))

    def _say(self, message: str) -> None:
        """Something to read while nothing is new."""
        self.events.append(BatchProgress(*self._progress(), message))

    def _report(
        self,
        status: FileStatus,
        index: tuple[int, ...] = (),
        plane: NDArray[Any] | None = None,
    ) -> None:
        self.files[status.number] = status
        if status.is_final:
            self.ended += 1
            self.log.write(
                status.state,
                file=status.source.name,
                output=None if status.output is None else str(status.output),
                seconds=round(status.seconds, 3),
                noise_sigma=status.noise_sigma,
                removed_sigma=status.removed_sigma,
                message=status.message,
            )
        text = f"{status.source.name}: {status.state}"
        if status.planes > 1 and status.state == "running":
            text = f"{status.source.name}: slice {status.planes_done} of {status.planes}"
        self.events.append(BatchProgress(*self._progress(), text, index, plane, status))

    def _progress(self) -> tuple[int, int]:
        parts = (f.status.planes_done / max(f.status.planes, 1) for f in self.open.values())
        done = self.ended + sum(parts)
        return int(done * _PROGRESS_PER_FILE), len(self.files) * _PROGRESS_PER_FILE


def _fingerprint(record: Record) -> dict[str, Any]:
    """What the pixels of a result depend on."""
    return {key: record.get(key) for key in _FINGERPRINT}


def _as_json(config: DiffusionConfig, batch: BatchConfig) -> dict[str, Any]:
    """What the pixels of a result depend on, beside the input and the weights.

    The device isn't among it: who moves on to another one needn't begin anew.
    """
    own = {key: getattr(batch, key) for key in ("format", "plane", "series", "compression")}
    values = asdict(config) | {"noise": config.noise.to_dict() if config.noise else None}
    del values["device"]
    # Results of versions without these settings stay valid.
    if values.pop("missing"):
        own |= {"missing": list(config.missing)}
    if values["dtype"] == "auto":
        del values["dtype"]
    return values | own


def _note(config: DiffusionConfig, prepared: Prepared | None) -> str:
    """What was done, for the header of the result; the beginning fits into 80 letters."""
    program = "napari-learned-diffusion"
    note = f"{program} {version(program)}: denoised by diffusion, {config.model}"
    if prepared is not None and not prepared.slice_by_slice:
        note += f"; noise {prepared.noise.describe()}; {prepared.config.iterations} iterations"
    return note


def _sentences(file: _File) -> Iterator[str]:
    """What wasn't as usual."""
    if file.status.message:
        yield file.status.message
    total = len(file.planes)
    for message, count in file.messages.most_common(3):
        yield message if count == total else f"{count} slices: {message}"


def _sentence(error: Exception, status: FileStatus) -> str:
    """An error in one sentence for the user."""
    if isinstance(error, LearnedDiffusionError):
        return str(error)
    if isinstance(error, OSError):
        return why_not_written(status.output or status.source.path, error)
    return f"{status.source.path}: {type(error).__name__}: {error}"
