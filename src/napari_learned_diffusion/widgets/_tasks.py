"""What a worker does with a request: generators over the jobs, which alone import torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.jobs.progress import Job, Progress

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.denoise import Denoised, Prepared, Report
    from napari_learned_diffusion.widgets._form import Request
    from napari_learned_diffusion.widgets._layers import Source


def load_jobs() -> Any:
    """The module of the jobs. Importing it imports torch, so this is called in a worker."""
    return importlib.import_module("napari_learned_diffusion.jobs.denoise")


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of a request.

    Parameters
    ----------
    request
        What had been asked.
    prepared
        What the automatic settings became.
    report
        Seconds, noise, drift and range.
    denoised, residual, diffusivity
        Arrays of the shape of the slice or of the whole layer; ``None`` if not asked for.
    """

    request: Request
    prepared: Prepared
    report: Report
    denoised: Any
    residual: Any
    diffusivity: NDArray[np.float32] | None


def estimate(request: Request, load: Callable[[], Any] = load_jobs) -> Job[Prepared]:
    """Find the noise model and every other automatic setting, from the data anew."""
    yield Progress(0, 1, "Estimating the noise")
    source = request.source
    prepared: Prepared = load().prepare(
        source.data, request.config, plane_axes=source.plane_axes, spacing=source.spacing
    )
    yield Progress(1, 1, "Estimated the noise")
    return prepared


def _prepare(request: Request, jobs: Any) -> Any:
    # Of the whole layer even for one slice, so that a slice comes out as the stack's does.
    source = request.source
    return jobs.prepare(
        source.data,
        request.effective_config,
        plane_axes=source.plane_axes,
        spacing=source.spacing,
    )


def denoise_slice(request: Request, load: Callable[[], Any] = load_jobs) -> Job[Answer]:
    """Denoise the slice that was in view."""
    yield Progress(0, 1, "Preparing")
    jobs = load()
    prepared = _prepare(request, jobs)
    yield Progress(0, 1, "Reading the slice")
    plane = request.source.read_slice()
    result: Denoised = yield from jobs.denoise_plane(
        plane,
        request.effective_config,
        spacing=request.source.spacing,
        tiling=request.tiling,
        prepared=prepared,
        want_diffusivity=request.outputs.diffusivity,
    )
    residual = _subtract(plane, result.image) if request.outputs.residual else None
    return Answer(request, prepared, result.report, result.image, residual, result.diffusivity)


def denoise_stack(
    request: Request, out: NDArray[Any], load: Callable[[], Any] = load_jobs
) -> Job[Answer]:
    """Denoise every slice of the layer, each into its place in ``out``."""
    yield Progress(0, 1, "Preparing")
    jobs = load()
    source = request.source
    prepared = _prepare(request, jobs)
    result: Denoised = yield from jobs.denoise_stack(
        source.data,
        request.effective_config,
        plane_axes=source.plane_axes,
        spacing=source.spacing,
        tiling=request.tiling,
        prepared=prepared,
        want_diffusivity=request.outputs.diffusivity,
        out=out,
    )
    residual = None
    if request.outputs.residual:
        residual = yield from _stack_residual(source, out)
    return Answer(request, prepared, result.report, out, residual, result.diffusivity)


def _stack_residual(source: Source, out: NDArray[Any]) -> Job[Any]:
    """Input minus result; of a lazy layer lazily, so that it isn't loaded whole."""
    if not isinstance(source.data, np.ndarray):
        import dask.array as da

        return da.map_blocks(
            _subtract,
            source.data,
            da.from_array(out, chunks=source.data.chunks),
            dtype=np.float32,
        )
    residual = np.empty(out.shape, np.float32)
    for done, index in enumerate(_planes(source)):
        residual[index] = _subtract(source.data[index], out[index])
        yield Progress(done + 1, source.n_slices, "Computing the residual")
    return residual


def _planes(source: Source) -> Iterator[tuple[Any, ...]]:
    shape = [1 if axis in source.plane_axes else n for axis, n in enumerate(source.data.shape)]
    for index in np.ndindex(*shape):
        yield tuple(slice(None) if a in source.plane_axes else i for a, i in enumerate(index))


def _subtract(noisy: NDArray[Any], denoised: NDArray[Any]) -> NDArray[np.float32]:
    # Infinite pixels come back as they were, and infinity minus infinity is NaN: nothing was taken.
    with np.errstate(invalid="ignore"):
        return np.subtract(noisy, denoised, dtype=np.float64).astype(np.float32)
