"""What a worker does with a request: generators over the jobs, which alone import torch."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import MapsConfig
from napari_learned_diffusion.core.errors import FileWriteError, InvalidImageError
from napari_learned_diffusion.core.zoo import card
from napari_learned_diffusion.files import write
from napari_learned_diffusion.jobs.planes import write_plane
from napari_learned_diffusion.jobs.progress import Job, Progress, Result
from napari_learned_diffusion.jobs.result_type import result_type
from napari_learned_diffusion.widgets._content import checksum
from napari_learned_diffusion.widgets._imports import import_module
from napari_learned_diffusion.widgets._text import short_name

if TYPE_CHECKING:
    from napari_learned_diffusion.core.noise import NoiseModel
    from napari_learned_diffusion.files import Volume
    from napari_learned_diffusion.jobs.check import Check
    from napari_learned_diffusion.jobs.denoise import Denoised, Prepared, Report
    from napari_learned_diffusion.jobs.inspection import Inspection
    from napari_learned_diffusion.widgets._form import Request
    from napari_learned_diffusion.widgets._layers import Source
    from napari_learned_diffusion.widgets._lazy_stack import Index, LazyStack


CLEAR_ANISOTROPY = 0.2
"""Below it there is no orientation worth a colour: the map is transparent there."""

_LIMITS_SHARE, _LIMITS_STEP = 0.995, 3
"""Share of the pixels within the contrast limits of a map; every how many pixels are looked at."""


_PAUSE_SECONDS = 0.05


def load_jobs() -> Any:
    """The module of the jobs. Importing it imports torch, so this is called in a worker."""
    return import_module("napari_learned_diffusion.jobs.denoise")


def load_inspection() -> Any:
    """The module of the job that inspects a slice; as `load_jobs`."""
    return import_module("napari_learned_diffusion.jobs.inspection")


def load_check() -> Any:
    """The module of the job that checks a result; as `load_jobs`."""
    return import_module("napari_learned_diffusion.jobs.check")


@dataclass(frozen=True, eq=False)
class Estimate:
    """The noise of a layer, and the request to find it."""

    request: Request
    prepared: Prepared


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a request.

    Parameters
    ----------
    request
        What had been asked.
    whole
        What the automatic settings became for the layer as a whole, if that was looked at.
    used
        What they became for what was denoised.
    report
        Seconds, noise, drift and range.
    denoised, residual, diffusivity, orientation
        Arrays of the shape of the slice or of the whole layer; ``None`` if not asked for. The
        orientation is NaN where the anisotropy is below `CLEAR_ANISOTROPY`.
    largest_diffusivity
        Highest value of the diffusivity, at least 1.
    """

    request: Request
    whole: Prepared | None
    used: Prepared
    report: Report
    denoised: Any
    residual: Any
    diffusivity: NDArray[np.float32] | None
    orientation: NDArray[np.float32] | None
    largest_diffusivity: float


def estimate(request: Request, load: Callable[[], Any] = load_jobs) -> Job[Estimate]:
    """Find the noise model and every other automatic setting, from the data anew."""
    yield Progress(0, 1, "Estimating the noise")
    return Estimate(request, _prepare(request, load()))


def _prepare(request: Request, jobs: Any, *, is_quick: bool = False) -> Prepared:
    """What the automatic settings become for the layer as a whole.

    Parameters
    ----------
    is_quick
        Whether to trust what is known of a lazy layer without a look at one of its slices.
    """
    source = request.source
    is_known = is_quick or not request.probes.has_changed(source)
    if is_known and request.known.prepared is not None:
        return request.known.prepared
    config = request.effective_config if is_known else request.config
    prepared: Prepared = jobs.prepare(source.data, config, plane_axes=source.plane_axes)
    return prepared


def _prepare_slice(
    request: Request, whole: Prepared | None, plane: NDArray[Any], jobs: Any
) -> Prepared:
    """What the automatic settings become for one slice; ``whole`` is what they are for all."""
    if whole is not None and not whole.slice_by_slice:
        return whole
    prepared: Prepared = jobs.prepare(plane, request.config, plane_axes=(0, 1))
    if whole is None:
        return prepared
    # All slices have one type, which the stack decides.
    return replace(prepared, low_noise_sigma=whole.low_noise_sigma, largest=whole.largest)


def denoise_slice(
    request: Request, load: Callable[[], Any] = load_jobs, *, is_quick: bool = False
) -> Job[Answer]:
    """Denoise the slice that was in view, to come out as it does when the stack is denoised.

    Parameters
    ----------
    request
        What to do.
    load
        Returns the module of the jobs.
    is_quick
        Whether to trust what is known of a lazy layer without a look at one of its slices.
    """
    yield Progress(0, 1, "Preparing")
    jobs = load()
    whole = None
    if not request.known.slice_by_slice:
        whole = _prepare(request, jobs, is_quick=is_quick)
    yield Progress(0, 1, "Reading the slice")
    plane = request.source.read_slice()
    used = _prepare_slice(request, whole, plane, jobs)
    result: Denoised = yield from jobs.denoise_plane(
        plane,
        used.config,
        spacing=request.source.spacing,
        tiling=request.tiling,
        prepared=used,
        maps=request.maps,
    )
    residual = _subtract(plane, result.image) if request.outputs.residual else None
    return Answer(request, whole, used, result.report, result.image, residual, *_maps(result))


def denoise_stack(
    request: Request, out: NDArray[Any], load: Callable[[], Any] = load_jobs
) -> Job[Answer]:
    """Denoise every slice of the layer, each into its place in ``out``.

    Where the result has another type than ``out``, which shows what is done so far, it gets an
    array of its own.
    """
    source = request.source
    # What isn't done yet looks like the source, except where that would load a lazy layer.
    for index in _planes(source):
        out[index] = source.data[index] if isinstance(source.data, np.ndarray) else source.blank()
        yield Progress(0, 1, "Preparing")
    jobs = load()
    whole = _prepare(request, jobs)
    target = result_type(out.dtype, whole)
    denoised = out if target.dtype == out.dtype else np.empty(out.shape, target.dtype)
    job: Job[Denoised] = jobs.denoise_stack(
        source.data,
        whole.config,
        plane_axes=source.plane_axes,
        spacing=source.spacing,
        tiling=request.tiling,
        prepared=whole,
        maps=request.maps,
        out=denoised,
    )
    if denoised is not out:
        job = _shown_in(out, source.plane_axes, job)
    result = yield from job
    residual = None
    if request.outputs.residual:
        residual = yield from _stack_residual(source, denoised)
    return Answer(request, whole, whole, result.report, denoised, residual, *_maps(result))


def _shown_in(out: NDArray[Any], axes: tuple[int, int], job: Job[Result]) -> Job[Result]:
    """A job whose finished planes are put into an array of whole numbers, too, to be seen."""
    try:
        while True:
            try:
                progress = next(job)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if progress.plane is not None and progress.index is not None:
                write_plane(out, progress.index, axes, np.rint(progress.plane))
            yield progress
    finally:
        job.close()


@dataclass(frozen=True, eq=False)
class Inspected:
    """A slice in every iteration.

    Parameters
    ----------
    request
        What had been asked.
    whole
        What the automatic settings became for the layer as a whole, if that was looked at.
    found
        The maps and numbers.
    limits
        Contrast limits that suit the maps, by the fields of `found`.
    """

    request: Request
    whole: Prepared | None
    found: Inspection
    limits: dict[str, tuple[float, float]]


def inspect_slice(request: Request, load: Callable[[], Any] = load_inspection) -> Job[Inspected]:
    """Look at the slice that was in view in every iteration.

    Where their number is automatic there are twice as many as suggested, if the model can do that:
    where to stop is seen only by going beyond it.
    """
    yield Progress(0, 1, "Preparing")
    jobs = load()
    whole = None if request.known.slice_by_slice else _prepare(request, jobs)
    yield Progress(0, 1, "Reading the slice")
    plane = request.source.read_slice()
    used = _prepare_slice(request, whole, plane, jobs)
    config = used.config
    has_end = card(config.model).most_iterations is not None
    if request.config.iterations is None and config.scheme == "explicit" and not has_end:
        used = replace(used, config=config.with_(iterations=2 * (config.iterations or 0)))
    found: Inspection = yield from jobs.inspect_plane(
        plane, spacing=request.source.spacing, prepared=used
    )
    yield Progress(found.iterations, found.iterations, "Preparing the layers")
    limits = {
        "denoised": request.source.display["contrast_limits"],
        # Of the last one: the noise of the first image would drown its edges, and long edges, which
        # some models begin with, conduct many times as well as short ones.
        "gradient": _limits(found.gradient[-1:]),
        "diffusivity": _limits(found.diffusivity[-1:]),
        "flux": _limits(found.flux),
    }
    return Inspected(request, whole, found, limits)


def _limits(maps: NDArray[np.float32]) -> tuple[float, float]:
    """From 0 to what nearly all pixels stay below; a part of them tells it well enough."""
    some = maps[:, ::_LIMITS_STEP, ::_LIMITS_STEP]
    some = some[np.isfinite(some)]
    top = float(np.quantile(some, _LIMITS_SHARE)) if some.size else 0.0
    return 0.0, top if top > 0 else 1.0


def denoise_lazily(
    request: Request, stack: LazyStack, load: Callable[[], Any] = load_jobs
) -> Job[Prepared | None]:
    """Denoise the slices that the stack wants, the most wanted first, until it wants none.

    Returns
    -------
    What the automatic settings became for the layer as a whole; ``None`` where each slice has its
    own.
    """
    yield Progress(0, 1, "Preparing")
    jobs = load()
    whole = None
    # The type of all slices is decided by the stack where it has whole numbers.
    if not request.known.slice_by_slice or request.source.data.dtype.kind in "iu":
        whole = _prepare(request, jobs, is_quick=stack.n_ready > 0)
        stack.adopt_type(result_type(request.source.data.dtype, whole).dtype)
    while (index := stack.next()) is not None:
        # A copy, for an array in memory may be changed in place meanwhile.
        plane = request.source.read_at(index).copy()
        denoised = plane
        if plane.dtype.kind != "f" or np.isfinite(plane).any():
            used = _prepare_slice(request, whole, plane, jobs)
            job: Job[Denoised] = jobs.denoise_plane(
                plane,
                used.config,
                spacing=request.source.spacing,
                tiling=request.tiling,
                prepared=used,
                maps=MapsConfig(),
            )
            result = yield from _unless_late(job, index, stack)
            if result is None:
                continue
            denoised = result.image
        stack.put(index, denoised, checksum(plane))
        yield Progress(stack.n_ready, stack.n_slices, "As you scroll", index)
    return whole


def _unless_late(job: Job[Denoised], index: Index, stack: LazyStack) -> Job[Denoised | None]:
    """Run a job for a slice to its end, or to where another slice is wanted more."""
    try:
        while not stack.has_better(index):
            try:
                yield next(job)
            except StopIteration as stop:
                result: Denoised = stop.value
                return result
        return None
    finally:
        job.close()


def _maps(
    result: Denoised,
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None, float]:
    """Diffusivity, orientation and the largest diffusivity, ready to be shown."""
    largest = 1.0
    if result.diffusivity is not None:
        # Long edges, of which some models have steps, diffuse faster than at 1.
        largest = float(np.fmax.reduce(result.diffusivity, axis=None, initial=1.0))
    if result.orientation is not None and result.anisotropy is not None:
        result.orientation[result.anisotropy < CLEAR_ANISOTROPY] = np.nan
    return result.diffusivity, result.orientation, largest


def _stack_residual(source: Source, out: NDArray[Any]) -> Job[Any]:
    """Input minus result; of a lazy layer lazily, so that it isn't loaded whole."""
    if not isinstance(source.data, np.ndarray):
        import dask.array as da

        done = da.from_array(out, chunks=source.data.chunks)  # type: ignore[no-untyped-call]
        residual: Any = da.map_blocks(  # type: ignore[no-untyped-call]
            _subtract, source.data, done, dtype=np.float32
        )
        return residual
    difference = np.empty(out.shape, np.float32)
    for done, index in enumerate(_planes(source)):
        difference[index] = _subtract(source.data[index], out[index])
        yield Progress(done + 1, source.n_slices, "Computing the residual")
    return difference


def _planes(source: Source) -> Iterator[tuple[Any, ...]]:
    shape = [1 if axis in source.plane_axes else n for axis, n in enumerate(source.data.shape)]
    for index in np.ndindex(*shape):
        yield tuple(slice(None) if a in source.plane_axes else i for a, i in enumerate(index))


def _subtract(noisy: NDArray[Any], denoised: NDArray[Any]) -> NDArray[np.float32]:
    # Infinite pixels come back as they were, and infinity minus infinity is NaN: nothing was taken.
    with np.errstate(invalid="ignore"):
        difference: NDArray[np.float32] = np.subtract(noisy, denoised, dtype=np.float64).astype(
            np.float32
        )
        return difference


def pausable(job: Job[Result], paused: threading.Event) -> Job[Result]:
    """A job that stands still while ``paused`` is set, and can be closed then, too."""
    try:
        while True:
            try:
                progress = next(job)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            yield progress
            while paused.is_set():
                time.sleep(_PAUSE_SECONDS)
                yield Progress(progress.done, progress.total, progress.message)
    finally:
        job.close()


@dataclass(frozen=True, eq=False)
class CheckRequest:
    """What is to be compared; nothing in it changes when the user goes on working.

    Parameters
    ----------
    source, result, reference
        The layers as they were; ``None`` is no reference.
    noise
        The noise model of the source; ``None``: to be estimated.
    is_of_result
        Whether the source still has the content that the result was made from.
    """

    source: Source
    result: Source
    reference: Source | None
    noise: NoiseModel | None
    is_of_result: bool = True

    @property
    def layers(self) -> tuple[Source, ...]:
        """All layers that take part."""
        return self.source, self.result, *(() if self.reference is None else (self.reference,))

    @property
    def layer_ids(self) -> tuple[Hashable, ...]:
        """Their ids."""
        return tuple(layer.layer_id for layer in self.layers)

    def check(self) -> None:
        """Refuse layers that have no slice in view, or slices of different sizes.

        Raises
        ------
        InvalidImageError
            with a sentence that says why and what to do.
        """
        for layer in self.layers:
            if layer.slice_problem:
                raise InvalidImageError(layer.slice_problem)
            if layer.plane_shape != self.source.plane_shape:
                raise InvalidImageError(
                    f"“{short_name(layer.name)}” has slices of another size than "
                    f"“{short_name(self.source.name)}”. Choose layers that belong together."
                )


@dataclass(frozen=True, eq=False)
class Checked:
    """What came of a check: the two slices and what was measured."""

    request: CheckRequest
    before: NDArray[Any]
    after: NDArray[Any]
    check: Check

    def to_dict(self) -> dict[str, Any]:
        """The numbers and which slice they are of, as they are written into a file."""
        reference = self.request.reference
        return {
            "slice": self.request.source.index,
            "reference": None if reference is None else reference.name,
            **self.check.to_dict(),
        }


def check_slice(request: CheckRequest, load: Callable[[], Any] = load_check) -> Job[Checked]:
    """Compare the slices that were in view."""
    yield Progress(0, 1, "Reading the slices")
    jobs = load()
    before, after, *reference = (layer.read_slice() for layer in request.layers)
    check: Check = yield from jobs.check_plane(before, after, request.noise, *reference)
    return Checked(request, before, after, check)


def export_result(path: Path, volume: Volume, record: dict[str, Any]) -> Job[tuple[Path, Path]]:
    """Write a volume and, beside it, its record as JSON; both replace what is there.

    Raises
    ------
    FileWriteError, FileFormatError
        as `files.write`, or where the record can't be written.
    """
    yield Progress(0, 2, f"Writing {path.name}")
    written = write(path, volume, overwrite=True)
    yield Progress(1, 2, "Writing the record")
    beside = written.with_suffix(".json")
    text = json.dumps(_plain(record), indent=1, ensure_ascii=False)
    try:
        beside.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise FileWriteError(f"{beside} couldn't be written: {error}") from error
    return written, beside


def _plain(value: Any) -> Any:
    """The same in types that JSON has; numbers that it hasn't become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
