"""Denoise a plane, a stack, or a lazy stack: automatic settings, units, tiles, progress, report."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.device import (
    device_name,
    is_out_of_memory,
    memory_budget,
    release_memory,
    resolve_device,
)
from napari_learned_diffusion.core.diffusivity import diffusivity_class
from napari_learned_diffusion.core.diffusivity.base import Diffusivity
from napari_learned_diffusion.core.errors import DeviceError, InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.noise_estimation import (
    NoiseEstimate,
    estimate_noise,
    sample_planes,
)
from napari_learned_diffusion.core.schemes import (
    STABLE_TAU,
    Explicit,
    FastExplicitDiffusion,
    Scheme,
)
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.zoo import load_model
from napari_learned_diffusion.jobs.planes import (
    PlaneAxes,
    SolverUnits,
    check_image,
    plane_indices,
    read_plane,
    write_plane,
)
from napari_learned_diffusion.jobs.progress import Job, Progress, run
from napari_learned_diffusion.jobs.tiling import SMALLEST_TILE, cut, largest_tile

if TYPE_CHECKING:
    import dask.array as da

LAST_AXES: PlaneAxes = (-2, -1)

_PROGRESS_PER_PLANE = 1000
"""Units of progress that a plane counts, however many steps it takes."""

_MEASURED_PLANES = 4
"""Planes of a result whose remaining noise is measured for the report."""

_ROUNDING = 1e-5
"""Part of the range by which single precision may miss it without the range being left."""


@dataclass(frozen=True)
class Prepared:
    """Settings with nothing left automatic.

    Parameters
    ----------
    config
        Every field that was ``None`` is filled in, and the device is one that is there.
    estimate
        How the noise model was estimated; ``None`` where the caller gave it.
    requested
        The configuration as it was given.
    """

    config: DiffusionConfig
    estimate: NoiseEstimate | None
    requested: DiffusionConfig

    @property
    def slice_by_slice(self) -> bool:
        """Whether a stack needs this done anew for each slice."""
        if self.estimate is None or self.requested.noise_scope == "stack":
            return False
        return self.requested.noise_scope == "slice" or self.estimate.slices_differ

    @property
    def noise(self) -> NoiseModel:
        """The noise model, in layer units."""
        if self.config.noise is None:
            raise InvalidSettingError("The settings have not been prepared: no noise model is set.")
        return self.config.noise


@dataclass(frozen=True)
class Report:
    """What a run did, in layer units.

    Parameters
    ----------
    seconds
        Wall-clock time, the noise estimate not counted.
    device
        Name of the device.
    noise_before, noise_after
        Standard deviation of the noise at the image's median intensity, in the input and what is
        left of it in the result; NaN where it wasn't measured.
    mean_drift
        Mean of the result minus mean of the input.
    range_before, range_after
        Lowest and highest value.
    range_kept
        Whether no value left the range of its plane.
    masked_pixels
        Pixels that were NaN or infinite and came back as they were.
    messages
        Sentences for the user.
    """

    seconds: float
    device: str
    noise_before: float
    noise_after: float
    mean_drift: float
    range_before: tuple[float, float]
    range_after: tuple[float, float]
    range_kept: bool
    masked_pixels: int
    messages: tuple[str, ...] = ()

    def summary(self, unit: str = "") -> str:
        """The report in one line."""
        parts = [f"{self.seconds:.2f} s on {self.device}"]
        if np.isfinite(self.noise_after):
            parts.append(f"noise {self.noise_before:.3g} → {self.noise_after:.3g} {unit}".rstrip())
        parts.append(f"mean drift {self.mean_drift:.1g} {unit}".rstrip())
        parts.append("range kept" if self.range_kept else "range left")
        return " · ".join(parts)


@dataclass(frozen=True)
class Denoised:
    """A denoised image and how it came about.

    Parameters
    ----------
    image
        In the dtype and shape of the input.
    diffusivity
        Mean conductance around each pixel in the last step, of the same shape, float32, NaN where
        the input was; ``None`` where it wasn't asked for or no step was done.
    prepared
        The settings that were used.
    report
        What was done.
    """

    image: Any
    diffusivity: NDArray[np.float32] | None
    prepared: Prepared
    report: Report


def prepare(
    image: Any,
    config: DiffusionConfig | None = None,
    *,
    plane_axes: PlaneAxes = LAST_AXES,
) -> Prepared:
    """Fill in what the configuration leaves automatic, from a few planes of the image.

    Parameters
    ----------
    image
        Numpy, dask or zarr array of any number of dimensions; at most 16 planes are read.
    config
        ``None``: everything automatic.
    plane_axes
        Row axis and column axis of the planes.

    Raises
    ------
    LearnedDiffusionError
        if the image can't be denoised, the model or the device isn't there, or settings contradict
        each other.
    """
    requested = config = config or DiffusionConfig()
    rows_columns = check_image(image, plane_axes)
    model = diffusivity_class(config.model)
    device = resolve_device(config.device, config.precision)
    if config.scheme == "fed" and config.model != "perona-malik":
        raise InvalidSettingError(
            "The FED scheme needs a diffusivity that is at most 1: it is for perona-malik only."
        )
    indices = list(plane_indices(tuple(image.shape), rows_columns))
    samples = np.stack(
        [
            read_plane(image, indices[i], rows_columns).astype(np.float64)
            for i in sample_planes(len(indices))
        ]
    )
    samples[~np.isfinite(samples)] = np.nan
    if np.isnan(samples).all():
        raise InvalidImageError("The image holds no number: every pixel is NaN or infinite.")
    estimate = None
    noise = config.noise
    if noise is None:
        estimate = estimate_noise(samples, config.noise_kind)
        noise = estimate.model
    config = config.with_(noise=noise, device=str(device))
    if noise.is_zero:
        # Nothing will be done; the rest is filled in only so that nothing is left open.
        idle = config.with_(iterations=0, contrast=1.0, tau=STABLE_TAU, presmooth_sigma=0.0)
        return Prepared(idle, estimate, requested)
    suggestion = model.suggest(noise.stabilise(samples))
    tau = config.tau if config.tau is not None else suggestion.tau
    time_wanted = config.stopping_time or suggestion.stopping_time
    iterations = config.iterations
    if iterations is None and config.scheme == "fed":
        iterations = FastExplicitDiffusion(time_wanted).least_iterations()
    elif iterations is None:
        iterations = max(1, round(time_wanted / tau))
    return Prepared(
        config.with_(
            iterations=iterations,
            tau=tau,
            stopping_time=time_wanted if config.scheme == "fed" else None,
            contrast=config.contrast if config.contrast is not None else suggestion.contrast,
            presmooth_sigma=(
                config.presmooth_sigma
                if config.presmooth_sigma is not None
                else suggestion.presmooth_sigma
            ),
        ),
        estimate,
        requested,
    )


def denoise_plane(
    plane: NDArray[Any],
    config: DiffusionConfig | None = None,
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    tiling: TilingConfig | None = None,
    prepared: Prepared | None = None,
    want_diffusivity: bool = False,
    measure: bool = True,
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
        want_diffusivity=want_diffusivity,
        measure=measure,
    )


def denoise_stack(
    stack: Any,
    config: DiffusionConfig | None = None,
    *,
    plane_axes: PlaneAxes = LAST_AXES,
    spacing: tuple[float, float] = (1.0, 1.0),
    tiling: TilingConfig | None = None,
    prepared: Prepared | None = None,
    want_diffusivity: bool = False,
    measure: bool = True,
    out: Any = None,
) -> Job[Denoised]:
    """Denoise every plane of a stack, one after the other.

    Parameters
    ----------
    stack
        Numpy, dask or zarr array of any number of dimensions, integers or floats. Planes are read
        when their turn comes. NaN and infinite pixels take no part and come back as they were.
    config
        ``None``: everything automatic.
    plane_axes
        Row axis and column axis of the planes.
    spacing
        Distance of rows and of columns, in any unit: only their ratio matters.
    tiling
        How large planes are cut. On running out of memory the tile is halved and tried again.
    prepared
        What `prepare` returned, in place of ``config``.
    want_diffusivity
        Whether to keep the diffusivity of the last step.
    measure
        Whether to measure the noise that is left, for the report.
    out
        Array to write the result into, of the shape and dtype of the stack; ``None`` makes one.

    Yields
    ------
    A `Progress` after every diffusion step; closing the generator there cancels.

    Raises
    ------
    LearnedDiffusionError
        as `prepare`; and `DeviceError` where memory doesn't suffice for the smallest tile.
    """
    rows_columns = check_image(stack, plane_axes)
    shape = tuple(stack.shape)
    if prepared is None:
        yield Progress(0, 1, "Estimating the noise")
        prepared = prepare(stack, config, plane_axes=plane_axes)
    if out is None:
        out = np.empty(shape, stack.dtype)
    elif tuple(out.shape) != shape or np.dtype(out.dtype) != np.dtype(stack.dtype):
        raise InvalidImageError(
            f"The output has shape {tuple(out.shape)} and type {out.dtype}, "
            f"but {shape} and {stack.dtype} are needed."
        )
    tiling = tiling or TilingConfig()
    solver = _PlaneSolver(prepared, spacing, tiling)
    shown = np.empty(shape, np.float32) if want_diffusivity and solver.iterations else None
    tally = _Tally()
    indices = list(plane_indices(shape, rows_columns))
    slice_by_slice = prepared.slice_by_slice and len(indices) > 1
    steps = _PROGRESS_PER_PLANE
    noises = {}
    start = time.perf_counter()
    for number, index in enumerate(indices):
        plane = read_plane(stack, index, rows_columns)
        message = f"Slice {number + 1} of {len(indices)}" if len(indices) > 1 else "Diffusing"
        if slice_by_slice and np.isfinite(plane).any():
            yield Progress(number * steps, len(indices) * steps, f"{message}: estimating the noise")
            solver = _PlaneSolver(prepare(plane, prepared.requested), spacing, tiling)
        noises[index] = solver.prepared.noise
        job = solver.solve(plane, shown is not None)
        try:
            while True:
                done = number * steps + next(job) * steps // solver.iterations
                yield Progress(done, len(indices) * steps, message)
        except StopIteration as stop:
            result: _PlaneResult = stop.value
        finally:
            job.close()
        write_plane(out, index, rows_columns, result.plane)
        if shown is not None and result.diffusivity is not None:
            write_plane(shown, index, rows_columns, result.diffusivity)
        tally.add(plane, result, solver)
        yield Progress((number + 1) * steps, len(indices) * steps, message, index, result.plane)
    seconds = time.perf_counter() - start
    before = after = float("nan")
    if measure:
        measured = [indices[i] for i in sample_planes(len(indices), _MEASURED_PLANES)]
        levels = [
            _noise_levels(
                noises[i], read_plane(stack, i, rows_columns), read_plane(out, i, rows_columns)
            )
            for i in measured
        ]
        before, after = (float(np.median(level)) for level in zip(*levels, strict=True))
    report = Report(
        seconds=seconds,
        device=solver.device_name,
        noise_before=before,
        noise_after=after,
        mean_drift=tally.mean_drift,
        range_before=tally.range_before,
        range_after=tally.range_after,
        range_kept=tally.range_kept,
        masked_pixels=tally.masked,
        messages=tuple(_messages(tally)),
    )
    return Denoised(out, shown, prepared, report)


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
    if prepared is None:
        prepared = prepare(stack, config, plane_axes=plane_axes)
    last = stack.ndim - 2, stack.ndim - 1
    moved = da.moveaxis(stack, (rows, columns), last)
    planes = moved.rechunk((*(1 for _ in moved.shape[:-2]), -1, -1))
    config = prepared.requested
    shared = None if prepared.slice_by_slice else prepared

    def denoise_block(block: NDArray[Any]) -> NDArray[Any]:
        if not np.isfinite(block).any():
            return block
        job = denoise_stack(
            block, config, spacing=spacing, tiling=tiling, prepared=shared, measure=False
        )
        image: NDArray[Any] = run(job).image
        return image

    denoised = planes.map_blocks(
        denoise_block, dtype=stack.dtype, meta=np.empty((0,) * stack.ndim, stack.dtype)
    )
    result: da.Array = da.moveaxis(denoised, last, (rows, columns))
    return result


@dataclass(frozen=True)
class _PlaneResult:
    plane: NDArray[Any]
    diffusivity: NDArray[np.float32] | None
    valid: NDArray[np.bool_] | None
    range_kept: bool


@dataclass
class _PlaneSolver:
    """Everything that stays the same from plane to plane."""

    prepared: Prepared
    spacing: tuple[float, float]
    tiling: TilingConfig
    halved_to: int | None = None
    scheme: Scheme = field(init=False)
    model: Diffusivity = field(init=False)

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.device = torch.device(config.device)
        self.device_name = device_name(self.device)
        self.iterations = 0 if self.prepared.noise.is_zero else config.iterations or 0
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        if self.iterations == 0:
            return
        self.scheme = _scheme(config)
        self.model = load_model(config).to(self.device, self.dtype).eval()
        self.halo = self.iterations * (self.model.reach + 1)

    def solve(
        self, plane: NDArray[Any], want_diffusivity: bool
    ) -> Generator[int, None, _PlaneResult]:
        """Denoise a plane; yields the number of steps done, of ``iterations``."""
        valid = np.isfinite(plane) if plane.dtype.kind == "f" else None
        if valid is not None and valid.all():
            valid = None
        if self.iterations == 0 or (valid is not None and not valid.any()):
            nothing = np.full(plane.shape, np.nan, np.float32) if want_diffusivity else None
            return _PlaneResult(plane, nothing, valid, True)
        units = SolverUnits.of(plane, valid)
        u = units.encode(plane, valid, self.prepared.config.precision)
        noise = units.noise(self.prepared.noise)
        while True:
            tile = self._tile(plane.shape)
            try:
                result, shown = yield from self._solve_tiles(
                    u, valid, noise, tile, want_diffusivity
                )
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(tile, error)
        decoded = units.decode(result)
        slack = _ROUNDING * (units.highest - units.lowest)
        low, high = _extent(decoded, valid)
        kept = low >= units.lowest - slack and high <= units.highest + slack
        denoised = units.to_dtype(decoded, self.scheme.keeps_range)
        if valid is not None:
            denoised[~valid] = plane[~valid]
            if shown is not None:
                shown[~valid] = np.nan
        return _PlaneResult(denoised, shown, valid, kept)

    def _solve_tiles(
        self,
        u: NDArray[np.floating[Any]],
        valid: NDArray[np.bool_] | None,
        noise: NoiseModel,
        tile: int,
        want_diffusivity: bool,
    ) -> Generator[int, None, tuple[NDArray[np.floating[Any]], NDArray[np.float32] | None]]:
        result = np.empty_like(u)
        shown = np.empty(u.shape, np.float32) if want_diffusivity else None
        tiles = cut((u.shape[0], u.shape[1]), tile, self.halo)
        for number, part in enumerate(tiles):
            states = iterate(
                self._tensor(u[part.outer]),
                self.model,
                noise=noise,
                scheme=self.scheme,
                iterations=self.iterations,
                spacing=self.spacing,
                valid=None if valid is None else self._tensor(valid[part.outer]),
            )
            try:
                for state in states:
                    if state.step == self.iterations:
                        result[part.target] = state.u[0, 0].cpu().numpy()[part.inner]
                        if shown is not None:
                            shown[part.target] = (
                                state.diffusivity()[0, 0].float().cpu().numpy()[part.inner]
                            )
                    yield (number * self.iterations + state.step) // len(tiles)
            finally:
                states.close()
        return result, shown

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        contiguous = torch.from_numpy(np.ascontiguousarray(array))
        return contiguous.to(self.device, self.dtype)[None, None]

    def _tile(self, shape: tuple[int, ...]) -> int:
        if self.halved_to is not None:
            return self.halved_to
        if self.tiling.tile is not None:
            return self.tiling.tile
        size = torch.finfo(self.dtype).bits // 8
        budget = self.tiling.memory_budget or memory_budget(self.device)
        return largest_tile((shape[0], shape[1]), self.halo, self.model.working_maps * size, budget)

    def _halve(self, tile: int, error: BaseException) -> None:
        release_memory(self.device)
        if tile // 2 < SMALLEST_TILE:
            raise DeviceError(
                f"There is too little memory on {self.device_name} even for tiles of {tile} "
                "pixels. Close other programs, take fewer iterations, or compute on the CPU."
            ) from error
        self.halved_to = tile // 2


@dataclass
class _Tally:
    """Sums over the planes, for the report."""

    planes: int = 0
    pixels: int = 0
    masked: int = 0
    drift: float = 0.0
    range_before: tuple[float, float] = (np.inf, -np.inf)
    range_after: tuple[float, float] = (np.inf, -np.inf)
    range_kept: bool = True
    without_noise: int = 0
    idle: int = 0
    overshooting: bool = False
    halved_to: int | None = None

    def add(self, plane: NDArray[Any], result: _PlaneResult, solver: _PlaneSolver) -> None:
        valid = result.valid
        self.planes += 1
        if solver.prepared.noise.is_zero:
            self.without_noise += 1
        elif solver.iterations == 0:
            self.idle += 1
        else:
            self.overshooting = self.overshooting or not solver.scheme.keeps_range
        self.halved_to = solver.halved_to or self.halved_to
        count = plane.size if valid is None else int(np.count_nonzero(valid))
        self.masked += plane.size - count
        if count == 0:
            return
        before, after = (p if valid is None else p[valid] for p in (plane, result.plane))
        self.drift += float(np.subtract(after, before, dtype=np.float64).sum())
        self.pixels += count
        self.range_before = _union(self.range_before, _extent(plane, valid))
        self.range_after = _union(self.range_after, _extent(result.plane, valid))
        self.range_kept = self.range_kept and result.range_kept

    @property
    def mean_drift(self) -> float:
        return self.drift / self.pixels if self.pixels else 0.0


def _extent(plane: NDArray[Any], valid: NDArray[np.bool_] | None) -> tuple[float, float]:
    values = plane if valid is None else plane[valid]
    return float(values.min()), float(values.max())


def _union(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(a[0], b[0]), max(a[1], b[1])


def _scheme(config: DiffusionConfig) -> Scheme:
    if config.scheme == "fed" and config.stopping_time is not None:
        return FastExplicitDiffusion(config.stopping_time)
    if config.tau is None:
        raise InvalidSettingError("The settings have not been prepared: no time step is set.")
    return Explicit(config.tau)


def _noise_levels(
    noise: NoiseModel, before: NDArray[Any], after: NDArray[Any]
) -> tuple[float, float]:
    """Noise at a plane's median intensity, in layer units: by the model, and what is left of it.

    What is left is measured in stabilised units, where one number says it for all intensities.
    """
    finite = before[np.isfinite(before)]
    if noise.is_zero or finite.size == 0:
        return 0.0, 0.0
    level = float(noise.variance(np.median(finite).astype(np.float64))) ** 0.5
    stabilised = noise.stabilise(np.where(np.isfinite(after), after, np.nan).astype(np.float64))
    left = estimate_noise(stabilised, "gaussian").model
    return level, level * float(left.variance(np.float64(0))) ** 0.5


def _messages(tally: _Tally) -> Iterator[str]:
    if tally.without_noise:
        yield (
            "The noise level is 0: the image was given back as it is."
            if tally.planes == tally.without_noise
            else f"{tally.without_noise} slices hold no noise and were given back as they are."
        )
    if tally.idle:
        yield "With 0 iterations the image was given back as it is."
    if tally.overshooting:
        yield "FED keeps the mean, but single values may leave the range of the input."
    if tally.masked:
        yield f"{tally.masked} NaN or infinite pixels took no part and came back as they were."
    if tally.halved_to is not None:
        yield f"Memory ran short, so the slices were cut into tiles of {tally.halved_to} pixels."
