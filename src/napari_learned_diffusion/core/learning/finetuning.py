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
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from napari_learned_diffusion.config import FineTuneConfig
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.learning.held_out import HeldOut
from napari_learned_diffusion.core.learning.objectives import (
    RECORRUPTION,
    Image,
    as_batch,
    recorrupted,
    squared_error,
)
from napari_learned_diffusion.core.learning.optimisers import Optimiser, descend, learning_rate
from napari_learned_diffusion.core.learning.scenes import (
    Diffusion,
    Patch,
    Patches,
    Scene,
    _with_noise,
    knows_truth,
)

CLEAR_GAIN = 0.02
"""Decibels on the held-out part from which on a step is better than the starting model."""

MOST_CREDIBLE, LEAST_KNOWN = 0.25, 0.1
"""Without a clean image errors are estimated, and wrong by some percent of the noise's variance, as
that is. Below `LEAST_KNOWN` of it a gain of more than `MOST_CREDIBLE` decibels isn't believed:
where the noise was overestimated, the estimate rewards smoothing for its own sake."""


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


def tuned_parameters(model: LearnedDiffusivity, config: FineTuneConfig) -> list[nn.Parameter]:
    """The parameters that a fine-tuning changes."""
    if config.parameters == "all":
        return list(model.parameters())
    names = model.last_layers
    return [p for name, p in model.named_parameters() if any(n in name for n in names)]


# --- patches --------------------------------------------------------------------------------------


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


# --- the held-out part ----------------------------------------------------------------------------
