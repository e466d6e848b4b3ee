"""What a run did to the image, in numbers and sentences for the user."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_learned_diffusion.config import DOUBTFUL, MapsConfig
from napari_learned_diffusion.core.missing import Missing
from napari_learned_diffusion.core.noise import Correlated, NoiseModel
from napari_learned_diffusion.core.noise_estimation import estimate_noise
from napari_learned_diffusion.jobs.plane_solver import PlaneResult, PlaneSolver, extent

_NOT_SQUARE = 1.01
"""Ratio of the spacings above which it is said that they aren't used."""


@dataclass(frozen=True)
class Report:
    """What a run did, in layer units.

    Parameters
    ----------
    seconds
        Wall-clock time, the noise estimate not counted.
    device
        Name of the device.
    noise_sigma
        Standard deviation of the noise by the noise model, root mean square over the pixels that
        hold noise; NaN where there are none, as in an empty image.
    removed_sigma
        Standard deviation of what was removed, input minus result, over the same pixels. Where the
        result is good it is a little smaller than ``noise_sigma``; detail that was removed counts
        in it, too.
    mean_drift
        Mean of the result minus mean of the input.
    range_before, range_after
        Lowest and highest value.
    range_kept
        Whether no value left the range of its plane.
    masked_pixels
        Pixels that took no part and came back as they were: NaN, infinite, masked or declared
        missing ones, fill values, a constant background.
    noise_sigmas, iterations
        Lowest and highest noise level, and number of iterations, of the slices that had any.
    messages
        Sentences for the user.
    """

    seconds: float
    device: str
    noise_sigma: float
    removed_sigma: float
    mean_drift: float
    range_before: tuple[float, float]
    range_after: tuple[float, float]
    range_kept: bool
    masked_pixels: int
    noise_sigmas: tuple[float, float] = (math.nan, math.nan)
    iterations: tuple[int, int] = (0, 0)
    messages: tuple[str, ...] = ()

    def removed(self, unit: str = "") -> str:
        """How much of the noise was removed, in words; empty where there was none."""
        return describe_removed(self.noise_sigma, self.removed_sigma, unit)

    def summary(self, unit: str = "") -> str:
        """The report in one line."""
        parts = [f"{self.seconds:.3g} s on {self.device}"]
        if removed := self.removed(unit):
            parts.append(f"removed {removed}")
        parts.append(f"mean drift {self.mean_drift:.1g} {unit}".rstrip())
        parts.append("range kept" if self.range_kept else "range left")
        return " · ".join(parts)


def describe_removed(noise_sigma: float, removed_sigma: float, unit: str = "") -> str:
    """How much was removed of how much noise, and the part of the noise model's variance that is.

    Parameters
    ----------
    noise_sigma, removed_sigma
        As of `Report`.
    unit
        Of the intensities.
    """
    if not (math.isfinite(removed_sigma) and noise_sigma > 0):
        return ""
    share = (removed_sigma / noise_sigma) ** 2
    levels = f"{removed_sigma:.4g} of {noise_sigma:.4g} {unit}".rstrip()
    return f"{levels} ({share:.0%} of the noise variance)"


@dataclass
class Tally:
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
    without_maps: int = 0
    halved_to: int | None = None
    missing: Counter[str] = field(default_factory=Counter)
    fill_values: Counter[float] = field(default_factory=Counter)
    background: Counter[float] = field(default_factory=Counter)
    model: str = ""
    unsound: float = 0.0
    unchanged: int = 0
    unresolved: int = 0
    doubtful: int = 0
    noisy_pixels: int = 0
    variance: float = 0.0
    removed: float = 0.0
    noise_sigmas: tuple[float, float] = (np.inf, -np.inf)
    iterations: tuple[int, int] = (0, 0)
    elongated: float = 1.0

    def add(
        self,
        plane: NDArray[Any],
        result: PlaneResult,
        solver: PlaneSolver,
        maps: MapsConfig | None = None,
    ) -> None:
        valid = result.valid
        self.planes += 1
        if solver.prepared.noise.is_zero:
            self.without_noise += 1
        elif solver.iterations == 0:
            self.idle += 1
        else:
            self.overshooting = self.overshooting or not solver.scheme.keeps_range
            self.without_maps += maps is not None and maps.is_after(solver.iterations)
        self.halved_to = solver.halved_to or self.halved_to
        self.model = solver.prepared.config.model
        self.unsound = max(self.unsound, result.unsound)
        self.unchanged += result.unchanged
        self.unresolved += result.unresolved
        self._add_missing(result.missing)
        rows, columns = solver.spacing
        if solver.iterations and not solver.prepared.config.use_spacing:
            self.elongated = max(rows / columns, columns / rows)
        count = plane.size if valid is None else int(np.count_nonzero(valid))
        self.masked += plane.size - count
        if count == 0:
            return
        before, after = (p if valid is None else p[valid] for p in (plane, result.plane))
        self.drift += float(np.subtract(after, before, dtype=np.float64).sum())
        self.pixels += count
        self.range_before = _union(self.range_before, extent(plane, valid))
        self.range_after = _union(self.range_after, extent(result.plane, valid))
        self.range_kept = self.range_kept and result.range_kept
        self._add_noise(plane, result, solver)

    def _add_noise(self, plane: NDArray[Any], result: PlaneResult, solver: PlaneSolver) -> None:
        """What was removed where there was noise: not in exactly constant areas, nor where idle."""
        noise, estimate = solver.prepared.noise, solver.prepared.estimate
        if noise.is_zero or solver.iterations == 0:
            return
        holds_noise = ~_is_constant(plane)
        if result.valid is not None:
            holds_noise &= result.valid
        count = int(np.count_nonzero(holds_noise))
        if count == 0:
            return
        before = plane[holds_noise].astype(np.float64)
        variance = float(noise.variance(before).sum())
        self.noisy_pixels += count
        self.variance += variance
        self.removed += float(np.square(before - result.plane[holds_noise]).sum())
        sigma = math.sqrt(variance / count)
        self.noise_sigmas = _union(self.noise_sigmas, (sigma, sigma))
        low, high = self.iterations
        self.iterations = (
            min(low or solver.iterations, solver.iterations),
            max(high, solver.iterations),
        )
        # An estimate for the whole stack is judged once, by whoever has asked for it.
        if estimate is not None and solver.prepared.n_slices == 1:
            self.doubtful += estimate.confidence < DOUBTFUL

    def noise_levels(self) -> tuple[float, float]:
        """Standard deviation of the noise by the noise model, and of what was removed."""
        if self.noisy_pixels == 0:
            return math.nan, math.nan
        count = self.noisy_pixels
        return math.sqrt(self.variance / count), math.sqrt(self.removed / count)

    def report(self, seconds: float, device: str, *messages: str) -> Report:
        """The report; ``messages`` come before those of the planes, empty ones are left out."""
        noise_sigma, removed_sigma = self.noise_levels()
        return Report(
            seconds=seconds,
            device=device,
            noise_sigma=noise_sigma,
            removed_sigma=removed_sigma,
            mean_drift=self.mean_drift,
            range_before=self.range_before,
            range_after=self.range_after,
            range_kept=self.range_kept,
            masked_pixels=self.masked,
            noise_sigmas=self.noise_sigmas if self.noisy_pixels else (math.nan, math.nan),
            iterations=self.iterations,
            messages=(*filter(None, messages), *self.messages()),
        )

    def _add_missing(self, missing: Missing) -> None:
        self.missing["NaN or infinite"] += missing.not_finite
        self.missing["masked"] += missing.masked
        self.missing["missing by declaration"] += missing.declared
        self.fill_values.update(missing.fill_values)
        self.background.update(missing.background)

    @property
    def mean_drift(self) -> float:
        return self.drift / self.pixels if self.pixels else 0.0

    def messages(self) -> Iterator[str]:
        """Sentences for the user about what wasn't as usual."""
        if self.without_noise:
            yield (
                "The noise level is 0: the image was given back as it is."
                if self.planes == self.without_noise
                else f"{self.without_noise} slices hold no noise and were given back as they are."
            )
        if self.doubtful and self.planes > 1:
            yield (
                f"The noise estimate of {self.doubtful} of {self.planes} slices is doubtful: its "
                f"confidence is below {DOUBTFUL:g}."
            )
        if self.idle:
            yield "With 0 iterations the image was given back as it is."
        if self.overshooting:
            yield "FED keeps the mean, but single values may leave the range of the input."
        if self.without_maps:
            yield (
                f"{self.without_maps} slices took fewer iterations than the step that the maps "
                "are of: their maps are empty."
            )
        yield from self._of_missing()
        if self.unsound:
            yield (
                f"The model {self.model} gave no number for up to {100 * self.unsound:.2g} % of "
                "the edges: there nothing was diffused. Its weights may be damaged."
            )
        if self.unchanged:
            yield (
                "Not one pixel changed: the model lets nothing flow at this noise level."
                if self.unchanged == self.planes
                else f"{self.unchanged} slices didn't change: there the model lets nothing flow."
            )
        if self.elongated > _NOT_SQUARE:
            yield (
                f"Pixels are {self.elongated:.3g} times as long along one axis as along the other. "
                "The diffusion counts in pixels, which denoises better: the voxel size isn't used."
            )
        if self.unresolved:
            yield (
                "The noise level is finer than single precision resolves in this range of values: "
                "small differences were rounded. Check the noise level, or take the precision "
                "float64."
            )
        if self.halved_to is not None:
            yield f"Memory ran short, so the slices were cut into tiles of {self.halved_to} pixels."

    def _of_missing(self) -> Iterator[str]:
        for kind, count in self.missing.items():
            if count:
                yield f"{count} {kind} pixels took no part and came back as they were."
        for value, count in self.fill_values.items():
            yield (
                f"{count} pixels of the value {value:.9g} can't be intensities: "
                "taken for missing, they took no part and came back as they were."
            )
        for value, count in self.background.items():
            yield (
                f"{count} pixels in areas of exactly {value:.9g}, which noise couldn't leave so, "
                "were taken for a masked background: they took no part and came back as they were."
            )


def flat_noise_levels(
    noise: NoiseModel, before: NDArray[Any], after: NDArray[Any]
) -> tuple[float, float]:
    """Noise of a plane, root mean square in layer units: by the model, and visible in flat areas.

    What is visible in flat areas of the result is no measure of its error, which is larger: noise
    that stayed beside edges, and coarse noise, aren't in it. It is as much less as the same measure
    finds after than before, in stabilised units, where one number says it for all intensities; of
    correlated noise by its whole spectrum, since its high frequencies say little.
    """
    finite = before[np.isfinite(before)]
    if noise.is_zero or finite.size == 0:
        return 0.0, 0.0
    level = float(np.sqrt(np.mean(noise.variance(finite.astype(np.float64)))))
    found_before, found_after = (_stabilised_sigma(noise, plane) for plane in (before, after))
    left = found_after / found_before if found_before > 0 else 1.0
    return level, level * left


def _stabilised_sigma(noise: NoiseModel, plane: NDArray[Any]) -> float:
    finite = np.where(np.isfinite(plane), plane, np.nan).astype(np.float64)
    kind: Literal["correlated", "gaussian"] = (
        "correlated" if isinstance(noise, Correlated) else "gaussian"
    )
    found = estimate_noise(noise.stabilise(finite), kind).model
    return math.sqrt(found.variance(0.0))


def _is_constant(plane: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a pixel and all its neighbours have one value, as in a masked background."""
    if plane.dtype.kind == "f" and plane.dtype.itemsize not in (4, 8):  # which scipy can't filter
        plane = plane.astype(np.float64)
    smooth = ndimage.minimum_filter(plane, 3) == ndimage.maximum_filter(plane, 3)
    return np.asarray(smooth, np.bool_)


def _union(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(a[0], b[0]), max(a[1], b[1])
