"""Fine-tuning: a trained model goes on learning from parts of a few slices.

Patches are drawn from the regions, at random places and flipped, but not turned: scan lines and
non-square pixels have a direction. No patch holds a pixel of the held-out part, which alone decides
which step is the best. Training runs the product's own solver, the limiter included, with the noise
model of each slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from napari_learned_diffusion.config import SMALLEST_PATCH, FineTuneConfig
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.objectives import (
    RECORRUPTION,
    Image,
    Mask,
    NoiseSource,
    as_batch,
    recorrupted,
    squared_error,
    sure,
)
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.training import descend, learning_rate, make_optimiser

CLEAR_GAIN = 0.02
"""Decibels on the held-out part from which on a step is better than the starting model."""

WINDOW = 128
"""Largest edge of the windows that the held-out part is looked at in, in pixels."""

MOST_WINDOWS = 12
CONTEXT = 24
"""Pixels around a window that the model sees beside it."""

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
    def scale(self) -> float:
        """Variance of the noise, mean over the regions: what errors are counted in."""
        inside = self.learn | self.held_out
        return float(np.mean(self.source.model.variance(self.estimate[inside].astype(np.float64))))


@dataclass(frozen=True)
class FineTuneStep:
    """What a step did. Losses are squared errors in units of the noise's variance.

    Parameters
    ----------
    step
        Number of steps done, from 0, which is the starting model.
    loss
        Of this step's patches; NaN of the starting model.
    held_out
        On the held-out part; ``None`` where it wasn't looked at.
    best_step, best_held_out
        The best so far.
    """

    step: int
    loss: float
    held_out: float | None
    best_step: int
    best_held_out: float


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


def adapt(
    model: LearnedDiffusivity,
    scenes: Sequence[Scene],
    config: FineTuneConfig,
    diffusion: Diffusion,
    *,
    stop: Callable[[], bool] | None = None,
) -> Generator[FineTuneStep, None, None]:
    """Fine-tune a model in place; in the end it has the parameters of its best step.

    Parameters
    ----------
    scenes
        At least one of them has pixels to learn from and one has held-out pixels.
    stop
        Asked before every step; once it returns ``True``, the training ends with the best so far.

    Yields
    ------
    A `FineTuneStep` for the starting model and after every step. A generator that is closed leaves
    the model wherever it was.

    Raises
    ------
    InvalidSettingError
        if the regions hold no patch that is clear of the held-out part, or the training diverges.
    """
    device = next(model.parameters()).device
    patches = Patches(scenes, config.patch)
    windows = held_out_windows(scenes, config.seed)
    tuned = tuned_parameters(model, config)
    model.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimiser = make_optimiser(tuned)
    best = deepcopy(model.state_dict())
    model.eval()
    start = _look(model, windows, config, diffusion, device)
    best_step, best_held_out, looks_without = 0, start, 0
    yield FineTuneStep(0, math.nan, start, 0, start)
    for step in range(config.steps):
        if stop is not None and stop():
            break
        rng = np.random.default_rng([config.seed, step])
        loss = _loss(model, patches.draw(config.batch, rng), config, diffusion, device, rng)
        rate = learning_rate(step, config.steps, config.learning_rate)
        descend(optimiser, loss, float(loss.detach()), rate, step)
        held_out = None
        if (step + 1) % config.every == 0 or step + 1 == config.steps:
            held_out = _look(model, windows, config, diffusion, device)
            looks_without += 1
            if held_out < best_held_out:
                best, best_step, best_held_out = deepcopy(model.state_dict()), step + 1, held_out
                looks_without = 0
        yield FineTuneStep(step + 1, float(loss.detach()), held_out, best_step, best_held_out)
        if looks_without >= config.patience:
            break
    model.load_state_dict(best)


def gain(start: float, now: float) -> float:
    """By how many decibels an error became smaller; 0 where an estimate of one is no longer > 0."""
    if start <= 0:
        return 0.0
    return 10 * math.log10(start / max(now, 0.1 * start))


def tuned_parameters(model: LearnedDiffusivity, config: FineTuneConfig) -> list[nn.Parameter]:
    """The parameters that a fine-tuning changes."""
    if config.parameters == "all":
        return list(model.parameters())
    names = model.last_layers
    return [p for name, p in model.named_parameters() if any(n in name for n in names)]


# --- patches --------------------------------------------------------------------------------------


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


def _loss(
    model: LearnedDiffusivity,
    patches: Sequence[Patch],
    config: FineTuneConfig,
    diffusion: Diffusion,
    device: torch.device,
    rng: np.random.Generator,
) -> Tensor:
    """Mean over the patches of their error in units of their noise."""
    total: Tensor | float = 0.0
    batch = partial(as_batch, device=device)
    for number in sorted({p.number for p in patches}):
        group = [p for p in patches if p.number == number]
        scene = group[0].scene
        pairs = [_pair(p, config, rng) for p in group]
        noisy, target = (batch([pair[i] for pair in pairs]) for i in (0, 1))
        noise = scene.source.model
        if config.mode == "noisy":
            noise = noise.amplified(1 + RECORRUPTION**2)
        valid = None if scene.valid is None else batch([p.of(scene.valid) for p in group])
        u = diffusion(model, noisy, noise, valid, gradients=True)
        errors = squared_error(u, target, batch([p.of(scene.learn) for p in group]))
        total = total + errors.sum() / scene.scale
    assert isinstance(total, Tensor)
    return total / len(patches)


def _pair(patch: Patch, config: FineTuneConfig, rng: np.random.Generator) -> tuple[Image, Image]:
    """What goes in and what should come out."""
    scene = patch.scene
    image = patch.of(scene.image)
    if config.mode == "clean":
        return _with_noise(image, patch.of(scene.learn), scene.source, rng), image
    if config.mode == "noisy":
        return recorrupted(image, patch.of(scene.estimate), scene.source, rng)
    assert scene.target is not None
    return image, patch.of(scene.target)


def _with_noise(image: Image, inside: Mask, source: NoiseSource, rng: np.random.Generator) -> Image:
    """Noise in the clean regions; around them there is some already."""
    return np.where(inside, source.add(image, rng), image)


# --- the held-out part ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a scene around held-out pixels, and the seed of the noise it is looked at with."""

    scene: Scene
    where: tuple[slice, slice]
    weight: Mask
    seed: tuple[int, ...]


def held_out_windows(scenes: Sequence[Scene], seed: int) -> list[Window]:
    """Windows that cover the held-out pixels, or so many of them as are enough."""
    windows = []
    for number, scene in enumerate(scenes):
        rows, columns = (np.flatnonzero(scene.held_out.any(axis)) for axis in (1, 0))
        if len(rows) == 0:
            continue
        for y in range(rows[0], rows[-1] + 1, WINDOW):
            for x in range(columns[0], columns[-1] + 1, WINDOW):
                inner = np.zeros_like(scene.held_out)
                inner[y : y + WINDOW, x : x + WINDOW] = True
                inner &= scene.held_out
                if inner.any():
                    where = _around(inner)
                    windows.append(Window(scene, where, inner[where], (seed, number, y, x)))
    if len(windows) > MOST_WINDOWS:
        at = (np.arange(MOST_WINDOWS) + 0.5) * len(windows) / MOST_WINDOWS
        windows = [windows[int(i)] for i in at]
    return windows


def _around(mask: Mask) -> tuple[slice, slice]:
    edges = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis))
        edges.append(slice(max(0, int(inside[0]) - CONTEXT), int(inside[-1]) + 1 + CONTEXT))
    return edges[0], edges[1]


def _look(
    model: LearnedDiffusivity,
    windows: Sequence[Window],
    config: FineTuneConfig,
    diffusion: Diffusion,
    device: torch.device,
) -> float:
    """Error over the held-out pixels in units of the noise's variance, or an estimate of it."""
    errors, pixels = 0.0, 0
    batch = partial(as_batch, device=device)
    for window in windows:
        scene, where = window.scene, window.where
        # The same random numbers at every look, so that looks can be compared.
        rng = np.random.default_rng(window.seed)
        valid = None if scene.valid is None else batch([scene.valid[where]])
        denoise = partial(_denoise, model, diffusion, scene.source.model, valid)
        image, weight = scene.image[where], batch([window.weight])
        if config.mode in ("paired", "clean"):
            noisy, target = image, scene.target[where] if scene.target is not None else image
            if config.mode == "clean":
                noisy = _with_noise(image, window.weight, scene.source, rng)
            error = float(squared_error(denoise(batch([noisy])), batch([target]), weight))
        else:
            estimate = scene.estimate[where].astype(np.float64)
            probe = batch([scene.source.draw(estimate, rng)])
            variance = batch([scene.source.model.variance(estimate)])
            error = sure(denoise, batch([image]), probe, variance, weight)
        count = int(window.weight.sum())
        errors += count * error / scene.scale
        pixels += count
    return errors / pixels


def _denoise(
    model: LearnedDiffusivity,
    diffusion: Diffusion,
    noise: NoiseModel,
    valid: Tensor | None,
    noisy: Tensor,
) -> Tensor:
    return diffusion(model, noisy, noise, valid)
