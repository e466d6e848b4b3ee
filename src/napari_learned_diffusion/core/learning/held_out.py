"""The held-out part of regions, which tells the best step of a fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from napari_learned_diffusion.config import FineTuneConfig
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.learning.objectives import (
    Mask,
    as_batch,
    squared_error,
    sure,
)
from napari_learned_diffusion.core.learning.scenes import (
    Diffusion,
    Scene,
    _with_noise,
    knows_truth,
)
from napari_learned_diffusion.core.noise import NoiseModel

UNCERTAINTY = 0.1
"""By which part the variance of the noise may be wrong. What is better must be so all the same."""


WINDOW = 128
"""Largest edge of the windows that the held-out part is looked at in, in pixels."""


MOST_WINDOWS = 12


CONTEXT = 24
"""Pixels around a window that the model sees beside it."""


MOST_UNLIKE = 8.0
"""By which factor the weights of slices may differ from their mean, at most."""


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
