"""One plane through the solver: units, tiles, memory, and the pixels that take no part."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, MapsConfig, TilingConfig
from napari_learned_diffusion.core.device import (
    device_name,
    is_out_of_memory,
    memory_budget,
    release_memory,
)
from napari_learned_diffusion.core.diffusivity.base import Diffusivity, LearnedDiffusivity
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidSettingError,
    ModelFailedError,
)
from napari_learned_diffusion.core.missing import Missing, missing_pixels
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.operators import (
    anisotropy,
    checked_spacing,
    in_space,
    orientation,
)
from napari_learned_diffusion.core.schemes import Explicit, FastExplicitDiffusion, Scheme
from napari_learned_diffusion.core.solve import State, iterate
from napari_learned_diffusion.core.zoo import load_model
from napari_learned_diffusion.jobs.planes import (
    SolverUnits,
    Spacing,
    check_values,
    diffusion_spacing,
    stabilised_range,
)
from napari_learned_diffusion.jobs.prepare import Prepared
from napari_learned_diffusion.jobs.tiling import SMALLEST_TILE, cut, largest_tile

_ROUNDING = 1e-5
"""Part of the range by which single precision may miss it without the range being left."""

Maps = dict[str, NDArray[np.float32]]
"""Maps of a plane by their names in `MapsConfig.names`, NaN where they say nothing."""


@dataclass(frozen=True)
class PlaneResult:
    """A plane after the diffusion.

    Parameters
    ----------
    plane
        ``(h, w)``, in the dtype of the input.
    maps
        The maps that were asked for.
    missing
        Which pixels took no part.
    range_kept
        Whether every value lies in the range of the pixels that took part.
    unsound
        Part of the edges for which the model gave no conductance, so that nothing flowed along
        them, in the step where they were most.
    unchanged
        Whether not one pixel changed, though there were steps.
    unresolved
        Whether the noise is finer than the number format resolves at these intensities.
    """

    plane: NDArray[Any]
    maps: Maps
    missing: Missing
    range_kept: bool = True
    unsound: float = 0.0
    unchanged: bool = False
    unresolved: bool = False

    @property
    def valid(self) -> NDArray[np.bool_] | None:
        """True where a pixel took part; ``None`` where all did."""
        return self.missing.valid


@dataclass
class PlaneSolver:
    """Everything that stays the same from plane to plane."""

    prepared: Prepared
    spacing: tuple[float, float]
    tiling: TilingConfig
    given: LearnedDiffusivity | None = None
    """A model in training, in place of the one that the settings name."""
    halved_to: int | None = None
    scheme: Scheme = field(init=False)
    model: Diffusivity = field(init=False)

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.spacing = checked_spacing(self.spacing)
        self.device = torch.device(config.device)
        self.device_name = device_name(self.device)
        self.iterations = 0 if self.prepared.noise.is_zero else config.iterations or 0
        self.number_format = "float64" if config.precision == "float64" else "float32"
        self.dtype: torch.dtype = getattr(torch, self.number_format)
        if self.iterations == 0:
            return
        self.scheme = _scheme(config)
        model = self.given or load_model(config)
        self.model = model.to(self.device, self.dtype).eval()
        self.halo = self.model.halo(self.iterations)

    @property
    def steps_spacing(self) -> Spacing:
        """The distances that the diffusion goes by."""
        return diffusion_spacing(self.prepared.config, self.spacing)

    def solve(
        self, plane: NDArray[Any], maps: MapsConfig | None = None
    ) -> Generator[int, None, PlaneResult]:
        """Denoise a plane; yields the number of steps done, of ``iterations``.

        Maps of a step that isn't reached are NaN everywhere.

        Raises
        ------
        InvalidImageError
            as `jobs.planes.check_values`.
        InvalidSettingError
            if the noise is so weak that no number can tell the image in units of it.
        ModelFailedError
            if the model gives no number for any edge.
        DeviceError
            if memory doesn't suffice for the smallest tile.
        """
        maps = maps or MapsConfig()
        missing = self.missing(plane)
        plane = np.ma.getdata(plane)
        if self.iterations == 0 or missing.is_everything:
            return PlaneResult(plane.copy(), _blank_maps(maps, plane.shape), missing)
        valid = missing.valid
        units = self.units(plane, valid)
        u = units.encode(plane, valid, self.number_format)
        noise = units.noise(self.prepared.noise)
        span = stabilised_range(self.prepared.noise, units.lowest, units.highest)
        if self.given is not None:
            with torch.no_grad():
                self.model = self.given.adapted(
                    noise.stabilise(self.tensor(u)), self.scheme.stopping_time(self.iterations)
                )
        while True:
            tile = self._tile(plane.shape)
            try:
                result, shown, unsound = yield from self._solve_tiles(u, valid, noise, tile, maps)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(tile, error)
        decoded = units.decode(result)
        slack = _ROUNDING * (units.highest - units.lowest)
        low, high = extent(decoded, valid)
        kept = low >= units.lowest - slack and high <= units.highest + slack
        if not (math.isfinite(low) and math.isfinite(high)):
            raise self.failed()
        denoised = units.to_dtype(decoded, self.scheme.keeps_range)
        # Through the solver's numbers and back, even what never changed would be rounded.
        unchanged = result == u
        if valid is not None:
            unchanged |= missing.mask
            for shown_map in shown.values():
                shown_map[missing.mask] = np.nan
        denoised[unchanged] = plane[unchanged]
        resolution = float(torch.finfo(self.dtype).eps)
        return PlaneResult(
            denoised,
            shown,
            missing,
            kept,
            unsound,
            unchanged=bool(unchanged.all()) and units.lowest < units.highest,
            unresolved=span * resolution > 1,
        )

    def missing(self, plane: NDArray[Any]) -> Missing:
        """The pixels of a plane that take no part."""
        noise = self.prepared.noise if self.iterations else None
        return missing_pixels(plane, self.prepared.config.missing, noise)

    def units(self, plane: NDArray[Any], valid: NDArray[np.bool_] | None) -> SolverUnits:
        """The solver's numbers for a plane.

        Raises
        ------
        InvalidImageError
            as `jobs.planes.check_values`.
        InvalidSettingError
            if the noise is so weak that no number can tell the image in units of it.
        """
        units = SolverUnits.of(plane, valid)
        check_values(units.lowest, units.highest, plane.dtype)
        stabilised_range(self.prepared.noise, units.lowest, units.highest)
        return units

    def failed(self) -> ModelFailedError:
        """The error for a model that gives no conductance anywhere."""
        return ModelFailedError(
            f"The model {self.prepared.config.model} gave no number for any edge of the image, so "
            "nothing can be diffused. Its weights or the noise level are out of all proportion: "
            "choose another model, or train this one again."
        )

    def _solve_tiles(
        self,
        u: NDArray[np.floating[Any]],
        valid: NDArray[np.bool_] | None,
        noise: NoiseModel,
        tile: int,
        maps: MapsConfig,
    ) -> Generator[int, None, tuple[NDArray[np.floating[Any]], Maps, float]]:
        result = np.empty_like(u)
        unsound: list[list[torch.Tensor]] = [[] for _ in range(self.iterations)]
        edges = np.zeros(self.iterations)
        shown = _blank_maps(maps, u.shape)
        tiles = cut((u.shape[0], u.shape[1]), tile, self.halo, self.model.alignment)
        for number, part in enumerate(tiles):
            inside = None if valid is None else valid[part.outer]
            states = self.states(u[part.outer], inside, noise)
            try:
                for state in states:
                    unsound[state.step - 1].append(state.unsound)
                    edges[state.step - 1] += state.stencil.count_edges(*state.u.shape[-2:])
                    if state.step == self.iterations:
                        result[part.target] = state.u[0, 0].cpu().numpy()[part.inner]
                    if state.step == (maps.step or self.iterations):
                        for name, found in self._maps_of(state, maps).items():
                            shown[name][part.target] = found[part.inner]
                    yield (number * self.iterations + state.step) // len(tiles)
            finally:
                states.close()
        counts = np.array([sum(int(count) for count in step) for step in unsound])
        parts = counts / np.maximum(edges, 1)
        if parts.max() >= 1:
            raise self.failed()
        return result, shown, float(parts.max())

    def states(
        self,
        u: NDArray[np.floating[Any]],
        valid: NDArray[np.bool_] | None,
        noise: NoiseModel,
    ) -> Generator[State, None, None]:
        """The steps of a plane or a part of it, ``(h, w)``, in the solver's numbers."""
        return iterate(
            self.tensor(u),
            self.model,
            noise=noise,
            scheme=self.scheme,
            iterations=self.iterations,
            spacing=self.steps_spacing,
            valid=None if valid is None else self.tensor(valid),
            mixed=self.prepared.config.precision == "mixed",
        )

    def _maps_of(self, state: State, maps: MapsConfig) -> Maps:
        found: dict[str, torch.Tensor] = {}
        if maps.diffusivity:
            found["diffusivity"] = state.diffusivity()
        if maps.orientation:
            tensor = state.diffusion_tensor()
            degrees = orientation(tensor)
            if not self.prepared.config.use_spacing:
                degrees = in_space(degrees, self.spacing)
            found |= {"orientation": degrees, "anisotropy": anisotropy(tensor)}
        return {name: values[0, 0].float().cpu().numpy() for name, values in found.items()}

    def tensor(self, array: NDArray[Any]) -> torch.Tensor:
        """``(h, w)`` to ``(1, 1, h, w)``, where and how precisely the solver computes."""
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


def extent(plane: NDArray[Any], valid: NDArray[np.bool_] | None) -> tuple[float, float]:
    values = plane if valid is None else plane[valid]
    return float(values.min()), float(values.max())


def _blank_maps(maps: MapsConfig, shape: tuple[int, ...]) -> Maps:
    return {name: np.full(shape, np.nan, np.float32) for name in maps.names}


def _scheme(config: DiffusionConfig) -> Scheme:
    if config.scheme == "fed" and config.stopping_time is not None:
        return FastExplicitDiffusion(config.stopping_time)
    if config.tau is None:
        raise InvalidSettingError("The settings have not been prepared: no time step is set.")
    return Explicit(config.tau)
