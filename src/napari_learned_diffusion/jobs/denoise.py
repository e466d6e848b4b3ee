"""Denoise a plane, a stack, or a lazy stack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, MapsConfig, TilingConfig
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.jobs.plane_solver import PlaneResult, PlaneSolver
from napari_learned_diffusion.jobs.planes import (
    LAST_AXES,
    PlaneAxes,
    check_image,
    check_spacing,
    plane_indices,
    read_plane,
    write_plane,
)
from napari_learned_diffusion.jobs.prepare import Prepared, prepare
from napari_learned_diffusion.jobs.progress import Job, Progress, run
from napari_learned_diffusion.jobs.report import Report, Tally
from napari_learned_diffusion.jobs.result_type import result_type

if TYPE_CHECKING:
    import dask.array as da

__all__ = [
    "Denoised",
    "Prepared",
    "Report",
    "denoise_lazy",
    "denoise_plane",
    "denoise_stack",
    "prepare",
]

_PROGRESS_PER_PLANE = 1000
"""Units of progress that a plane counts, however many steps it takes."""


@dataclass(frozen=True)
class Denoised:
    """A denoised image and how it came about.

    Parameters
    ----------
    image
        In the shape of the input; its type is decided by `jobs.result_type`.
    diffusivity
        Mean conductance around each pixel in the step that was asked for, of the same shape,
        float32, NaN where the input was; ``None`` where it wasn't asked for or no step was done.
    prepared
        The settings that were used.
    report
        What was done.
    orientation
        Orientation of strongest diffusion in that step, in degrees from 0 to below 180: the angle
        from the column axis, counter-clockwise with the rows running down. NaN also where
        diffusion was equal in all directions. Otherwise as the diffusivity.
    anisotropy
        How much stronger it was in that orientation than across it, from 0 to 1.
    """

    image: Any
    diffusivity: NDArray[np.float32] | None
    prepared: Prepared
    report: Report
    orientation: NDArray[np.float32] | None = None
    anisotropy: NDArray[np.float32] | None = None


def denoise_plane(
    plane: NDArray[Any],
    config: DiffusionConfig | None = None,
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    tiling: TilingConfig | None = None,
    prepared: Prepared | None = None,
    maps: MapsConfig | None = None,
) -> Job[Denoised]:
    """Denoise one plane, ``(h, w)``; as `denoise_stack`, which see."""
    if len(plane.shape) != 2:
        raise InvalidImageError(
            f"A plane has two dimensions, not {len(plane.shape)}. Use denoise_stack for stacks."
        )
    return denoise_stack(
        plane,
        config,
        spacing=spacing,
        tiling=tiling,
        prepared=prepared,
        maps=maps,
    )


def denoise_stack(
    stack: Any,
    config: DiffusionConfig | None = None,
    *,
    plane_axes: PlaneAxes = LAST_AXES,
    spacing: tuple[float, float] = (1.0, 1.0),
    tiling: TilingConfig | None = None,
    prepared: Prepared | None = None,
    maps: MapsConfig | None = None,
    out: Any = None,
    maps_out: Mapping[str, Any] | None = None,
) -> Job[Denoised]:
    """Denoise every plane of a stack, one after the other.

    Parameters
    ----------
    stack
        Numpy, dask or zarr array of any number of dimensions, integers or floats. Planes are read
        when their turn comes. Pixels that hold no intensity (NaN, infinity, masked ones, fill
        values, a constant background, see `core.missing`) take no part and come back as they were.
        Of a masked array the image is a masked array, too.
    config
        ``None``: everything automatic.
    plane_axes
        Row axis and column axis of the planes.
    spacing
        Distance of rows and of columns, in any unit. It tells the directions in maps of
        orientation; the diffusion counts in pixels, which denoises better, unless ``use_spacing``.
    tiling
        How large planes are cut. On running out of memory the tile is halved and tried again.
    prepared
        What `prepare` returned, in place of ``config``.
    maps
        Which maps of the diffusion to keep, and of which step; ``None`` keeps none. Where each
        slice gets a number of iterations of its own, the maps of slices that took fewer are NaN.
    out
        Array to write the result into, of the shape of the stack and the type that
        `jobs.result_type.result_type` says; ``None`` makes one.
    maps_out
        Arrays to write the maps into, float32 and of the shape of the stack, by the names in
        ``maps.names``; ``None`` makes them.

    Yields
    ------
    A `Progress` after every diffusion step; closing the generator there cancels.

    Raises
    ------
    LearnedDiffusionError
        as `prepare`; `InvalidSettingError` where there are fewer iterations than the step of the
        maps; and `DeviceError` where memory doesn't suffice for the smallest tile.
    """
    rows_columns = check_image(stack, plane_axes)
    shape = tuple(stack.shape)
    if prepared is None:
        yield Progress(0, 1, "Estimating the noise")
        prepared = prepare(stack, config, plane_axes=plane_axes)
    spacing = check_spacing(spacing)
    target = result_type(stack.dtype, prepared)
    out = _array(out, shape, target.dtype)
    tiling = tiling or TilingConfig()
    solver = PlaneSolver(prepared, spacing, tiling)
    indices = plane_indices(shape, rows_columns)
    maps = maps or MapsConfig()
    if not (prepared.slice_by_slice and prepared.requested.iterations is None):
        _check_step(maps, solver.iterations)
    shown = {
        name: _array(maps_out and maps_out[name], shape, np.dtype(np.float32))
        for name in (maps.names if solver.iterations else ())
    }
    tally = Tally()
    steps = _PROGRESS_PER_PLANE
    start = time.perf_counter()
    for number, index in enumerate(indices):
        plane = target.as_solved(read_plane(stack, index, rows_columns))
        message = f"Slice {number + 1} of {len(indices)}" if len(indices) > 1 else "Diffusing"
        if prepared.slice_by_slice:
            yield Progress(number * steps, len(indices) * steps, f"{message}: estimating the noise")
            solver = PlaneSolver(prepared.of(plane), spacing, tiling)
        job = solver.solve(plane, maps)
        try:
            while True:
                done = number * steps + next(job) * steps // solver.iterations
                yield Progress(done, len(indices) * steps, message)
        except StopIteration as stop:
            result: PlaneResult = stop.value
        finally:
            job.close()
        write_plane(out, index, rows_columns, result.plane)
        for name, shown_map in shown.items():
            write_plane(shown_map, index, rows_columns, result.maps[name])
        tally.add(plane, result, solver, maps)
        yield Progress((number + 1) * steps, len(indices) * steps, message, index, result.plane)
    seconds = time.perf_counter() - start
    report = tally.report(seconds, solver.device_name, target.message)
    image = out
    if isinstance(stack, np.ma.MaskedArray) and isinstance(out, np.ndarray):
        mask = np.ma.getmaskarray(stack).copy()
        image = np.ma.MaskedArray(out, mask, fill_value=stack.fill_value)
    return Denoised(image, shown.pop("diffusivity", None), prepared, report, **shown)


def _array(given: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """The array that a caller wants a result in, or a new one."""
    if given is None:
        return np.empty(shape, dtype)
    if tuple(given.shape) != shape or np.dtype(given.dtype) != dtype:
        raise InvalidImageError(
            f"The output has shape {tuple(given.shape)} and type {given.dtype}, "
            f"but {shape} and {dtype} are needed."
        )
    return given


def _check_step(maps: MapsConfig, iterations: int) -> None:
    if iterations and maps.is_after(iterations):
        raise InvalidSettingError(
            f"There is no map of step {maps.step}: only {iterations} iterations are done. "
            f"Choose a step from 1 to {iterations}, or leave it out for the last."
        )


def denoise_lazy(
    stack: da.Array,
    config: DiffusionConfig | None = None,
    *,
    plane_axes: PlaneAxes = LAST_AXES,
    spacing: tuple[float, float] = (1.0, 1.0),
    tiling: TilingConfig | None = None,
    prepared: Prepared | None = None,
) -> da.Array:
    """A dask array whose planes are denoised when they are computed; parameters as above.

    Only the planes that the noise model is estimated from are computed now.
    """
    import dask.array as da

    rows, columns = check_image(stack, plane_axes)
    spacing = check_spacing(spacing)
    if prepared is None:
        prepared = prepare(stack, config, plane_axes=plane_axes)
    last = stack.ndim - 2, stack.ndim - 1
    moved = da.moveaxis(stack, (rows, columns), last)
    planes = moved.rechunk((*(1 for _ in moved.shape[:-2]), -1, -1))
    dtype = result_type(stack.dtype, prepared).dtype

    def denoise_block(block: NDArray[Any]) -> NDArray[Any]:
        job = denoise_stack(block, spacing=spacing, tiling=tiling, prepared=prepared)
        image: NDArray[Any] = run(job).image
        return image

    denoised = planes.map_blocks(
        denoise_block, dtype=dtype, meta=np.empty((0,) * stack.ndim, dtype)
    )
    result: da.Array = da.moveaxis(denoised, last, (rows, columns))
    return result
