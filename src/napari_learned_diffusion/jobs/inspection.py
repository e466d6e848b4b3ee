"""Look at a slice in every iteration: what the diffusion does to it, and where it might stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.device import is_out_of_memory, release_memory
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidImageError,
    InvalidSettingError,
)
from napari_learned_diffusion.core.metrics import Q_PATCH, zhu_milanfar_q
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.operators import (
    Offset,
    Stencil,
    gradient,
    magnitude,
    mean_conductance,
    pixel_spacing,
)
from napari_learned_diffusion.core.solve import State
from napari_learned_diffusion.jobs.learned import Learned
from napari_learned_diffusion.jobs.lookers import make_looker
from napari_learned_diffusion.jobs.plane_solver import PlaneSolver
from napari_learned_diffusion.jobs.planes import check_image
from napari_learned_diffusion.jobs.prepare import Prepared, prepare
from napari_learned_diffusion.jobs.progress import Job, Progress

MEMORY_BUDGET = 512 * 2**20
"""Bytes that the maps of all iterations may take together."""

_MAPS = 4
"""Kept of each iteration: denoised image, gradient, diffusivity, flux; float32 each."""


@dataclass(frozen=True, eq=False)
class StepEdges:
    """What the edges conducted in one step.

    Parameters
    ----------
    offsets
        ``(dy, dx)`` of each edge in pixels, from the pixel that it belongs to.
    conductances
        ``(edges, h, w)``, float16: 0 where an edge leaves the slice.
    """

    offsets: tuple[Offset, ...]
    conductances: NDArray[np.float16]

    def around(self, pixel: tuple[int, int]) -> dict[Offset, float]:
        """What the edges of a pixel conducted, by the offset of the neighbour that they lead to."""
        y, x = pixel
        height, width = self.conductances.shape[1:]
        found = {}
        for (dy, dx), map_ in zip(self.offsets, self.conductances, strict=True):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                found[dy, dx] = float(map_[y, x])
            if 0 <= y - dy < height and 0 <= x - dx < width:
                found[-dy, -dx] = float(map_[y - dy, x - dx])
        return found


@dataclass(frozen=True, eq=False)
class Inspection:
    """A slice in every iteration.

    Images and gradients are of iterations 0 (the input), ``stride``, ``2 * stride``, …; what
    belongs to a step begins with that of iteration ``stride``. All maps are float32 and NaN where
    a pixel took no part, as one that was NaN or infinite.

    Parameters
    ----------
    prepared
        The settings, with nothing left automatic.
    stride
        Every how many iterations the maps are kept: 1 unless they would take too much memory.
    times
        ``(iterations + 1,)``, diffusion time reached in each iteration, in squared pixels.
    denoised
        ``(kept, h, w)``, the image in layer units.
    gradient
        ``(kept, h, w)``, length of its gradient to the next neighbours, in layer units per pixel.
    diffusivity
        ``(kept - 1, h, w)``, mean conductance around each pixel in the step, without unit.
    flux
        ``(kept - 1, h, w)``, length of conductance times gradient over the edges of the step, in
        layer units per pixel.
    edges
        ``kept - 1`` of them, what each edge conducted.
    q
        ``(iterations + 1,)``, Q of `core.metrics.zhu_milanfar_q`, in layer units; NaN for a slice
        smaller than a patch of Q.
    residual_variance
        ``(iterations + 1,)``, mean square of what has been taken away, in stabilised units: 1 where
        it is as much as the noise.
    learned
        What the model has learned, with what it makes of the slice in the steps that are kept.
    """

    prepared: Prepared
    stride: int
    times: NDArray[np.float64]
    denoised: NDArray[np.float32]
    gradient: NDArray[np.float32]
    diffusivity: NDArray[np.float32]
    flux: NDArray[np.float32]
    edges: tuple[StepEdges, ...] = field(repr=False)
    q: NDArray[np.float64]
    residual_variance: NDArray[np.float64]
    learned: Learned

    @property
    def iterations(self) -> int:
        """Number of diffusion steps."""
        return len(self.times) - 1

    @property
    def best_by_q(self) -> int | None:
        """The iteration of the highest Q; ``None`` where there is no Q."""
        return None if np.isnan(self.q).all() else int(np.nanargmax(self.q))

    @property
    def best_by_discrepancy(self) -> int | None:
        r"""The iteration in which as much has been taken away as there is noise.

        Of the two on either side of :math:`\operatorname{mean}\big((v_0 - v_k)^2\big) = 1` the
        nearer one, with the stabilised images :math:`v` (Morozov's discrepancy principle). ``None``
        where less than that is taken away in all iterations.
        """
        above = np.flatnonzero(self.residual_variance >= 1)
        if len(above) == 0:
            return None
        first = int(above[0])
        pair = self.residual_variance[first - 1 : first + 1]
        return first - 1 + int(np.argmin(np.abs(pair - 1)))


def inspect_plane(
    plane: NDArray[Any],
    config: DiffusionConfig | None = None,
    *,
    spacing: tuple[float, float] = (1.0, 1.0),
    prepared: Prepared | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Job[Inspection]:
    """Denoise one plane and keep what there is to see in every iteration.

    Parameters
    ----------
    plane
        ``(h, w)``, integers or floats. Pixels that hold no intensity (`core.missing`) take no part;
        only Q sees them, as the mean of the others.
    config, spacing, prepared
        As of `jobs.denoise.denoise_stack`. The plane isn't cut into tiles.
    memory_budget
        Bytes that the maps may take together. Where they would take more, not every iteration's
        are kept, see `Inspection.stride`.

    Yields
    ------
    A `Progress` after every iteration; closing the generator there cancels.

    Raises
    ------
    LearnedDiffusionError
        as `prepare`; `InvalidSettingError` where no step is done; `InvalidImageError` where the
        maps of two iterations already are too large; `ModelFailedError` where the model gives no
        number; `DeviceError` where memory runs out.
    """
    rows_columns = check_image(plane, (-2, -1))
    if rows_columns != (0, 1):
        raise InvalidImageError(f"A plane has two dimensions, not {plane.ndim}.")
    if prepared is None:
        yield Progress(0, 1, "Estimating the noise")
        prepared = prepare(plane, config)
    solver = PlaneSolver(prepared, spacing, TilingConfig())
    if solver.iterations == 0:
        raise InvalidSettingError(
            "With a noise level of 0 or 0 iterations no step is done, so there is nothing to "
            "inspect. Give a noise level and iterations above 0."
        )
    missing = solver.missing(plane)
    plane = np.ma.getdata(plane)
    if missing.is_everything:
        raise InvalidImageError(
            "The slice holds no number: every pixel is NaN, infinite, masked or a fill value."
        )
    valid = missing.valid
    edges = max(len(solver.model.offsets(step)) for step in range(solver.iterations))
    stride = _stride(plane.shape, edges, solver.iterations, memory_budget)
    recorder = _Recorder(plane, valid, solver, stride)
    states = solver.states(recorder.u, valid, recorder.noise)
    try:
        for state in states:
            if 0 < state.stencil.count_edges(*plane.shape) <= int(state.unsound):
                raise solver.failed()
            recorder.add(state)
            yield Progress(state.step, solver.iterations, f"Iteration {state.step}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        release_memory(solver.device)
        raise DeviceError(
            f"There is too little memory on {solver.device_name} to inspect a slice of "
            f"{plane.shape[0]} × {plane.shape[1]} pixels. Inspect a part of it, as a layer of its "
            "own."
        ) from error
    finally:
        states.close()
    return recorder.inspection()


def _stride(shape: tuple[int, ...], edges: int, iterations: int, budget: int) -> int:
    """Every how many iterations the maps fit into the budget."""
    kept = budget // (shape[0] * shape[1] * (4 * _MAPS + 2 * edges))
    if kept < 2:
        raise InvalidImageError(
            f"A slice of {shape[0]} × {shape[1]} pixels is too large to keep its iterations in "
            f"{budget / 2**20:.0f} MiB. Inspect a part of it, as a layer of its own."
        )
    return max(1, math.ceil(iterations / (kept - 1)))


class _Recorder:
    """Collects the maps and numbers of a run."""

    def __init__(
        self,
        plane: NDArray[Any],
        valid: NDArray[np.bool_] | None,
        solver: PlaneSolver,
        stride: int,
    ) -> None:
        self._plane, self._valid, self._stride = plane, valid, stride
        self._prepared = solver.prepared
        self._units = solver.units(plane, valid)
        self.u = self._units.encode(plane, valid, solver.number_format)
        self.noise: NoiseModel = self._units.noise(solver.prepared.noise)
        self._neighbours = Stencil(spacing=pixel_spacing(solver.steps_spacing))
        shape = (solver.iterations // stride + 1, *plane.shape)
        self._denoised, self._gradient = (np.empty(shape, np.float32) for _ in range(2))
        after_input = (shape[0] - 1, *plane.shape)
        self._diffusivity, self._flux = (np.empty(after_input, np.float32) for _ in range(2))
        self._edges: list[StepEdges] = []
        self._times = np.zeros(solver.iterations + 1)
        self._q, self._variance = np.zeros_like(self._times), np.zeros_like(self._times)
        self._before = solver.tensor(self.u)
        self._noisy = self.noise.stabilise(self._before)
        self._mask = None if valid is None else torch.from_numpy(valid).to(solver.device)
        self._looker = make_looker(solver.model)
        self._note(0, 0.0, self._before)

    def add(self, state: State) -> None:
        """Note what a step has done."""
        if state.step % self._stride == 0:
            at = state.step // self._stride - 1
            g = state.conductances()
            flux = magnitude(g * gradient(self._before, state.stencil), state.stencil)
            self._put(self._flux[at], flux, self._units.scale)
            self._put(self._diffusivity[at], mean_conductance(g, state.stencil))
            largest = float(np.finfo(np.float16).max)
            edges = g[0].clamp(max=largest).cpu().numpy().astype(np.float16)
            self._edges.append(StepEdges(state.stencil.offsets, edges))
            seen = self.noise.stabilise(self._before)
            mask = None if self._mask is None else self._mask[None, None].to(seen.dtype)
            self._looker.add(seen, g, state.stencil, mask)
        # A buffer of the solver, which the next step may write to.
        self._before = state.u.clone()
        self._note(state.step, state.time, self._before)

    def _note(self, step: int, time: float, u: torch.Tensor) -> None:
        self._times[step] = time
        removed = (self._noisy - self.noise.stabilise(u))[0, 0]
        if self._mask is not None:
            removed = removed[self._mask]
        self._variance[step] = float(removed.square().mean())
        intensities = self._units.decode(u[0, 0].cpu().numpy())
        is_large = min(intensities.shape) >= Q_PATCH
        self._q[step] = zhu_milanfar_q(intensities) if is_large else np.nan
        if step % self._stride == 0:
            at = step // self._stride
            self._denoised[at] = intensities
            if self._valid is not None:
                self._denoised[at][~self._valid] = self._plane[~self._valid]
            slopes = magnitude(gradient(u, self._neighbours), self._neighbours)
            self._put(self._gradient[at], slopes, self._units.scale)

    def _put(self, target: NDArray[np.float32], values: torch.Tensor, scale: float = 1.0) -> None:
        target[:] = values[0, 0].float().cpu().numpy() * scale
        if self._valid is not None:
            target[~self._valid] = np.nan

    def inspection(self) -> Inspection:
        return Inspection(
            prepared=self._prepared,
            stride=self._stride,
            times=self._times,
            denoised=self._denoised,
            gradient=self._gradient,
            diffusivity=self._diffusivity,
            flux=self._flux,
            edges=tuple(self._edges),
            q=self._q,
            residual_variance=self._variance,
            learned=self._looker.learned(),
        )
