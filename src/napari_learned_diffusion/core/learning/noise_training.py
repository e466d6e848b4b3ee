r"""Training the noise network on windows with known noise.

The loss of a cell is the negative logarithm of the Gaussian likelihood of its level's logarithm,
with the variance that the network itself says, and the squared error of the autocorrelation:

.. math:: \ell = \tfrac12 (\lambda - \log\sigma)^2 e^{-\nu} + \tfrac12 \nu
                 + 2\,\overline{(\rho - \rho^*)^2} .

As in `core.learning.training`, whatever is random in a step depends on the seed and its number
alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from napari_learned_diffusion.config import CHECKPOINT_EVERY, NoiseTrainingConfig
from napari_learned_diffusion.core.learning.noise_windows import Object, Simulator, Windows
from napari_learned_diffusion.core.learning.optimisers import Optimiser, descend, learning_rate
from napari_learned_diffusion.core.learning.training import restore, save
from napari_learned_diffusion.core.noise_network import NoiseNetwork, least_level

VALIDATION_BATCHES = 24
_VALIDATION_SCANS = 60
_HELD_OUT = 16
_LAGS_WEIGHT = 2.0


class NoiseScores(NamedTuple):
    """How well the noise of held-out windows is told.

    Parameters
    ----------
    median_error
        Median relative error of the level of a cell.
    within
        Share of the cells whose level is within 25 %.
    spread
        Root-mean-square error in units of what the network says it is; 1 is right.
    lags
        Root-mean-square error of the autocorrelation.
    """

    median_error: float
    within: float
    spread: float
    lags: float


@dataclass(frozen=True)
class NoiseTrainStep:
    """What a step did; as `core.learning.training.TrainStep`, with other scores."""

    step: int
    loss: float
    learning_rate: float
    validation: NoiseScores | None


def fit_noise_network(
    network: NoiseNetwork,
    objects: Sequence[Object],
    config: NoiseTrainingConfig,
    *,
    checkpoint: Path | None = None,
    resume: bool = True,
    every: int = CHECKPOINT_EVERY,
    workers: int = 0,
) -> Generator[NoiseTrainStep, None, None]:
    """Train a network in place, step by step; parameters and errors as of `training.fit`."""
    device = next(network.parameters()).device
    optimiser = Optimiser(network, config.optimiser)
    done = 0
    if resume and checkpoint is not None and checkpoint.exists():
        done = restore(checkpoint, network, optimiser, config)
    held_out = objects[::_HELD_OUT]
    learned = [o for i, o in enumerate(objects) if i % _HELD_OUT] or list(held_out)
    validation = Simulator(
        held_out, config.batch, seed=2**31 + config.seed, scans=_VALIDATION_SCANS
    )
    steps = range(done, config.steps)
    drawn = DataLoader(
        # A short run needs no more scans than it has windows.
        Simulator(
            learned, config.batch, config.seed, min(config.scans, config.steps * config.batch)
        ),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        generator=torch.Generator(),  # which nobody else draws from
    )
    for step, windows in zip(steps, drawn, strict=True):
        rate = learning_rate(step, config.steps, config.learning_rate)
        loss = _loss(network, _on(windows, device), mixed=config.mixed)
        mean_loss = float(loss.detach())
        descend(optimiser, loss, mean_loss, rate, step)
        scores = None
        if (step + 1) % every == 0 or step + 1 == config.steps:
            scores = validate_noise_network(network, validation)
            if checkpoint is not None:
                save(checkpoint, network, optimiser, config, step + 1)
        yield NoiseTrainStep(step + 1, mean_loss, rate, scores)
    if not steps:  # stopped after its last step
        yield NoiseTrainStep(done, math.nan, 0.0, validate_noise_network(network, validation))


def validate_noise_network(network: NoiseNetwork, windows: Simulator) -> NoiseScores:
    """Scores on some batches, always the same ones."""
    device = next(network.parameters()).device
    errors, expected, lags = [], [], []
    for number in range(VALIDATION_BATCHES):
        batch = _on(windows[number], device)
        with torch.no_grad():
            level, log_variance, rho = network(batch.noisy)
        counts = batch.weight > 0
        errors.append((level - _target(batch))[counts])
        expected.append(log_variance.exp()[counts])
        known = batch.correlated > 0
        lags.append((rho.mean((2, 3)) - batch.autocorrelation)[known].square().flatten())
    error = torch.cat(errors)
    return NoiseScores(
        float(error.abs().median()),
        float((error.abs() < 0.223).double().mean()),
        float((error.square() / torch.cat(expected)).mean().sqrt()),
        float(torch.cat(lags).mean().sqrt()),
    )


def _loss(network: NoiseNetwork, windows: Windows, *, mixed: bool) -> Tensor:
    with torch.autocast(windows.noisy.device.type, torch.bfloat16, enabled=mixed):
        level, log_variance, rho = network(windows.noisy)
    error = (level.float() - _target(windows)).square()
    log_variance = log_variance.float()
    likelihood = 0.5 * (error * torch.exp(-log_variance) + log_variance) * windows.weight
    lags = (rho.float() - windows.autocorrelation[:, :, None, None]).square().mean(1, keepdim=True)
    known = windows.weight * windows.correlated[:, None, None, None]
    of_level: Tensor = likelihood.sum() / windows.weight.sum().clamp(min=1)
    of_lags: Tensor = (lags * known).sum() / known.sum().clamp(min=1)
    return of_level + _LAGS_WEIGHT * of_lags


def _target(windows: Windows) -> Tensor:
    """Logarithm of the level, or of the least that is told."""
    return torch.maximum(windows.noise_sigma.clamp(min=1e-30).log(), least_level(windows.noisy))


def _on(windows: Windows, device: torch.device) -> Windows:
    return Windows(*(tensor.to(device) for tensor in windows))
