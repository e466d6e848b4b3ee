"""What fine-tuning learns from: regions of slices, and patches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_learned_diffusion.config import SMALLEST_PATCH, FineTuneConfig
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.learning.objectives import (
    Image,
    Mask,
    NoiseSource,
)
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate

_ENOUGH = 0.5
"""Share of the best patch's region pixels that a patch must hold to be drawn."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A slice to learn from; all arrays are ``(h, w)``, intensities in the solver's units.

    Parameters
    ----------
    image
        What is denoised; with clean regions, what noise is added to.
    target
        Reference or second noisy image; ``None`` where there is none.
    estimate
        About the true intensities: the starting model's result.
    learn, held_out
        The parts of the regions; they don't overlap.
    blocked
        Pixels that no patch may hold: held-out ones, here or in the slice that is the target.
    source
        The noise of this slice.
    valid
        Pixels that aren't NaN or infinite; ``None`` where all are.
    """

    image: Image
    target: Image | None
    estimate: Image
    learn: Mask
    held_out: Mask
    blocked: Mask
    source: NoiseSource
    valid: Mask | None = None

    @property
    def noise_variance(self) -> float:
        """Variance of the noise, mean over the regions."""
        inside = self.learn | self.held_out
        return float(np.mean(self.source.model.variance(self.estimate[inside].astype(np.float64))))


@dataclass(frozen=True)
class Diffusion:
    """The steps that a model is run with."""

    iterations: int
    tau: float
    spacing: tuple[float, float] = (1.0, 1.0)

    def __call__(
        self,
        model: LearnedDiffusivity,
        noisy: Tensor,
        noise: NoiseModel,
        valid: Tensor | None = None,
        *,
        gradients: bool = False,
    ) -> Tensor:
        """Denoise ``(b, 1, h, w)``."""
        u = noisy
        with torch.set_grad_enabled(gradients):
            ready = model.adapted(noise.stabilise(noisy), self.iterations * self.tau)
        for state in iterate(
            noisy,
            ready,
            noise=noise,
            scheme=Explicit(self.tau),
            iterations=self.iterations,
            spacing=self.spacing,
            valid=valid,
            gradients=gradients,
        ):
            u = state.u
        return u


def knows_truth(config: FineTuneConfig) -> bool:
    """Whether there is a clean image, so that errors are measured and not estimated."""
    return config.mode in ("paired", "clean")


@dataclass(frozen=True, eq=False)
class Patch:
    """A part of a scene, flipped or not; arrays are views of the scene's."""

    scene: Scene
    number: int
    where: tuple[slice, slice]
    flips: tuple[slice, slice]

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """This part of an array of the scene."""
        return array[self.where][self.flips]


@dataclass
class Patches:
    """The places in the scenes that patches are drawn from."""

    scenes: Sequence[Scene]
    largest: int
    size: tuple[int, int] = field(init=False)
    _places: list[NDArray[np.intp]] = field(init=False)
    _shares: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        edge = self.largest
        while True:
            rows, columns = (
                min(edge, *(s.image.shape[axis] for s in self.scenes)) for axis in (0, 1)
            )
            places = [_places(scene, rows, columns) for scene in self.scenes]
            if any(len(p) for p in places):
                break
            edge //= 2
            if edge < SMALLEST_PATCH:
                raise InvalidSettingError(
                    "The regions are too small to learn from: no patch of "
                    f"{SMALLEST_PATCH} pixels is clear of the held-out part. Draw larger ones."
                )
        self.size = rows, columns
        self._places = places
        # Scenes count by the pixels that they have to learn from.
        pixels = np.array(
            [s.learn.sum() if len(p) else 0 for s, p in zip(self.scenes, places, strict=True)]
        )
        self._shares = pixels / pixels.sum()

    def draw(self, count: int, rng: np.random.Generator) -> list[Patch]:
        """Some patches, in the order of their scenes."""
        rows, columns = self.size
        drawn = []
        for number in np.sort(rng.choice(len(self.scenes), count, p=self._shares)):
            scene = self.scenes[number]
            place = self._places[number][rng.integers(len(self._places[number]))]
            y, x = divmod(int(place), scene.image.shape[1] - columns + 1)
            where = slice(y, y + rows), slice(x, x + columns)
            flips = tuple(slice(None, None, -1 if rng.integers(2) else 1) for _ in range(2))
            drawn.append(Patch(scene, int(number), where, (flips[0], flips[1])))
        return drawn


def _places(scene: Scene, rows: int, columns: int) -> NDArray[np.intp]:
    """Upper left corners, as indices into all of them, of the patches that may be drawn."""
    held = _sums(scene.blocked, rows, columns)
    learned = np.where(held == 0, _sums(scene.learn, rows, columns), 0)
    most = learned.max(initial=0)
    return np.flatnonzero(learned >= max(1, _ENOUGH * most))


def _sums(mask: Mask, rows: int, columns: int) -> NDArray[np.int64]:
    """Pixels of a mask in each window of that size, by a summed-area table."""
    table = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    upper, lower = table[:-rows], table[rows:]
    return np.asarray(
        lower[:, columns:] - lower[:, :-columns] - upper[:, columns:] + upper[:, :-columns]
    )


def _with_noise(image: Image, inside: Mask, source: NoiseSource, rng: np.random.Generator) -> Image:
    """Noise in the clean regions; around them there is some already."""
    return np.where(inside, source.add(image, rng), image)
