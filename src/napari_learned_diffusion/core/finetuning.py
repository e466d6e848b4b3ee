"""Fine-tuning: a trained model goes on learning from parts of a few slices.

Patches are drawn from the regions, at random places and flipped, but not turned: scan lines and
non-square pixels have a direction. No patch holds a pixel of the held-out part, which alone decides
which step is the best. Training runs the product's own solver, the limiter included, with the noise
model of each slice.

Errors are counted relative to the starting model's in the same slice, so that slices count alike
however bright or noisy they are, as decibels do; without a clean image, relative to the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
from napari_learned_diffusion.core.optimisers import Optimiser
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.training import descend, learning_rate

CLEAR_GAIN = 0.02
"""Decibels on the held-out part from which on a step is better than the starting model."""

MOST_CREDIBLE, LEAST_KNOWN = 0.25, 0.1
"""Without a clean image errors are estimated, and wrong by some percent of the noise's variance, as
that is. Below `LEAST_KNOWN` of it a gain of more than `MOST_CREDIBLE` decibels isn't believed:
where the noise was overestimated, the estimate rewards smoothing for its own sake."""

UNCERTAINTY = 0.1
"""By which part the variance of the noise may be wrong. What is better must be so all the same."""

WINDOW = 128
"""Largest edge of the windows that the held-out part is looked at in, in pixels."""

MOST_WINDOWS = 12
CONTEXT = 24
"""Pixels around a window that the model sees beside it."""

MOST_UNLIKE = 8.0
"""By which factor the weights of slices may differ from their mean, at most."""

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
class FineTuneStep:
    """What a step did. Losses are squared errors relative to the starting model's, or the noise's.

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
    patches = Patches(scenes, config.patch)
    held = HeldOut(scenes, config, diffusion)
    tuned = tuned_parameters(model, config)
    model.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    optimiser = Optimiser(model)
    best = deepcopy(model.state_dict())
    model.eval()
    start = held.begin(model)
    best_step, best_held_out, looks_without, is_credible = 0, start, 0, True
    yield FineTuneStep(0, math.nan, start.value, 0, start.value)
    for step in range(config.steps):
        if stop is not None and stop():
            break
        rng = np.random.default_rng([config.seed, step])
        drawn = patches.draw(config.batch, rng)
        loss = _loss(model, drawn, held.scales, config, diffusion, rng)
        rate = learning_rate(step, config.steps, config.learning_rate)
        descend(optimiser, loss, float(loss.detach()), rate, step)
        held_out = None
        if (step + 1) % config.every == 0 or step + 1 == config.steps:
            held_out = held.look(model)
            looks_without += 1
            is_credible = (
                knows_truth(config)
                or held_out.value >= LEAST_KNOWN
                or gain(start.value, held_out.value) <= MOST_CREDIBLE
            )
            if held_out.is_below(best_held_out) and is_credible:
                best, best_step, best_held_out = deepcopy(model.state_dict()), step + 1, held_out
                looks_without = 0
        yield FineTuneStep(
            step + 1,
            float(loss.detach()),
            None if held_out is None else held_out.value,
            best_step,
            best_held_out.value,
        )
        if looks_without >= config.patience or not is_credible:
            break
    model.load_state_dict(best)


def gain(start: float, now: float) -> float:
    """By how many decibels an error became smaller; 0 where an estimate of one is no longer > 0."""
    if start <= 0:
        return 0.0
    return 10 * math.log10(start / max(now, 0.1 * start))


def knows_truth(config: FineTuneConfig) -> bool:
    """Whether there is a clean image, so that errors are measured and not estimated."""
    return config.mode in ("paired", "clean")


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
    scales: NDArray[np.float64],
    config: FineTuneConfig,
    diffusion: Diffusion,
    rng: np.random.Generator,
) -> Tensor:
    """Mean over the patches of their error, each over the scale of its scene."""
    total: Tensor | float = 0.0
    batch = partial(as_batch, device=next(model.parameters()).device)
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
        total = total + errors.sum() / float(scales[number])
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

    number: int
    where: tuple[slice, slice]
    weight: Mask
    seed: tuple[int, ...]


def windows_of(masks: Sequence[Mask], seed: int, most: int) -> list[Window]:
    """Windows that cover some pixels of each scene, or so many of the windows as are enough."""
    windows = []
    for number, mask in enumerate(masks):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if len(rows) == 0:
            continue
        for y in range(rows[0], rows[-1] + 1, WINDOW):
            for x in range(columns[0], columns[-1] + 1, WINDOW):
                inner = np.zeros_like(mask)
                inner[y : y + WINDOW, x : x + WINDOW] = True
                inner &= mask
                if inner.any():
                    where = _around(inner)
                    windows.append(Window(number, where, inner[where], (seed, number, y, x)))
    if len(windows) > most:
        at = (np.arange(most) + 0.5) * len(windows) / most
        windows = [windows[int(i)] for i in at]
    return windows


def _around(mask: Mask) -> tuple[slice, slice]:
    edges = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis))
        edges.append(slice(max(0, int(inside[0]) - CONTEXT), int(inside[-1]) + 1 + CONTEXT))
    return edges[0], edges[1]


class HeldOutError(NamedTuple):
    """The error on the held-out part, over the scale.

    Parameters
    ----------
    value
        Measured or estimated.
    of_noise
        What of it is in proportion to the variance of the noise; 0 where it was measured.
    """

    value: float
    of_noise: float

    def is_below(self, other: HeldOutError) -> bool:
        """Whether it is smaller, also where the variance is wrong by its `UNCERTAINTY`."""
        less, more = other.value - self.value, other.of_noise - self.of_noise
        return less > UNCERTAINTY * abs(more)


class HeldOut:
    """Looks at the held-out part.

    Attributes
    ----------
    scales
        Of each scene, the squared error of the starting model, within limits: an error that is
        nearly nothing, as in a dark corner, mustn't count for everything.
    """

    def __init__(
        self, scenes: Sequence[Scene], config: FineTuneConfig, diffusion: Diffusion
    ) -> None:
        self.scenes, self.config, self.diffusion = scenes, config, diffusion
        held_out = [scene.held_out for scene in scenes]
        self.windows = windows_of(held_out, config.seed, MOST_WINDOWS)
        self.scales = np.ones(len(scenes))

    def begin(self, model: LearnedDiffusivity) -> HeldOutError:
        """Set the scales; the error of the starting model, about 1."""
        if not knows_truth(self.config):
            # An estimate of an error may be anything, and its scale is the noise's.
            self.scales = np.array([scene.noise_variance for scene in self.scenes])
            return self.look(model)
        inside = [scene.learn | scene.held_out for scene in self.scenes]
        most = max(MOST_WINDOWS, len(inside))
        (errors, _), pixels = self._errors(model, windows_of(inside, self.config.seed, most))
        noise = np.array([scene.noise_variance for scene in self.scenes])
        seen = pixels > 0
        relative = errors[seen] / noise[seen]
        middle = max(float(np.average(relative, weights=pixels[seen])), 1e-3)
        relative = np.clip(relative, middle / MOST_UNLIKE, middle * MOST_UNLIKE)
        self.scales = noise * middle
        self.scales[seen] = noise[seen] * relative
        return self.look(model)

    def look(self, model: LearnedDiffusivity) -> HeldOutError:
        """Mean over the held-out pixels of the error, or of its estimate, over the scale."""
        errors, pixels = self._errors(model, self.windows)
        return HeldOutError(*np.average(errors / self.scales, axis=1, weights=pixels).tolist())

    def _errors(
        self, model: LearnedDiffusivity, windows: Sequence[Window]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Squared error and its part in proportion to the noise's variance, ``(2, scenes)``, and
        the number of pixels that they were measured on.
        """
        sums, pixels = np.zeros((2, len(self.scenes))), np.zeros(len(self.scenes))
        for window in windows:
            count = int(window.weight.sum())
            sums[:, window.number] += count * np.array(self._error(model, window))
            pixels[window.number] += count
        return sums / np.maximum(pixels, 1), pixels

    def _error(self, model: LearnedDiffusivity, window: Window) -> tuple[float, float]:
        scene, where = self.scenes[window.number], window.where
        batch = partial(as_batch, device=next(model.parameters()).device)
        # The same random numbers at every look, so that looks can be compared.
        rng = np.random.default_rng(window.seed)
        valid = None if scene.valid is None else batch([scene.valid[where]])
        denoise = partial(_denoise, model, self.diffusion, scene.source.model, valid)
        image, weight = scene.image[where], batch([window.weight])
        if knows_truth(self.config):
            noisy, target = image, scene.target[where] if scene.target is not None else image
            if self.config.mode == "clean":
                noisy = _with_noise(image, window.weight, scene.source, rng)
            return float(squared_error(denoise(batch([noisy])), batch([target]), weight)), 0.0
        estimate = scene.estimate[where].astype(np.float64)
        probe = batch([scene.source.draw(estimate, rng)])
        variance = batch([scene.source.model.variance(estimate)])
        return sure(denoise, batch([image]), probe, variance, weight)


def _denoise(
    model: LearnedDiffusivity,
    diffusion: Diffusion,
    noise: NoiseModel,
    valid: Tensor | None,
    noisy: Tensor,
) -> Tensor:
    return diffusion(model, noisy, noise, valid)
