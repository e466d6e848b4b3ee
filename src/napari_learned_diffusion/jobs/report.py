"""What a run did to the image, in numbers and sentences for the user."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import MapsConfig
from napari_learned_diffusion.core.missing import Missing
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.noise_estimation import estimate_noise
from napari_learned_diffusion.jobs.plane_solver import PlaneResult, PlaneSolver, extent


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
        Standard deviation of the noise, root mean square over the image, in the input and what is
        left of it in the result; NaN where it wasn't measured.
    mean_drift
        Mean of the result minus mean of the input.
    range_before, range_after
        Lowest and highest value.
    range_kept
        Whether no value left the range of its plane.
    masked_pixels
        Pixels that took no part and came back as they were: NaN, infinite, masked or declared
        missing ones, fill values, a constant background.
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
        parts = [f"{self.seconds:.3g} s on {self.device}"]
        if np.isfinite(self.noise_after):
            parts.append(f"noise {self.noise_before:.3g} → {self.noise_after:.3g} {unit}".rstrip())
        parts.append(f"mean drift {self.mean_drift:.1g} {unit}".rstrip())
        parts.append("range kept" if self.range_kept else "range left")
        return " · ".join(parts)


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


def noise_levels(
    noise: NoiseModel, before: NDArray[Any], after: NDArray[Any]
) -> tuple[float, float]:
    """Noise of a plane, root mean square in layer units: by the model, and what is left of it.

    What is left is as much less as the same measure finds after than before, in stabilised units,
    where one number says it for all intensities.
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
    found = estimate_noise(noise.stabilise(finite), "gaussian").model
    return math.sqrt(found.variance(0.0))


def _union(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(a[0], b[0]), max(a[1], b[1])
