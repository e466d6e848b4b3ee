r"""Training a learned diffusivity on clean images with noise added.

The loss of a patch is its mean squared error in units of the noise variance, times the noise level,

.. math:: \ell = \frac{\sigma}{\sigma_0} \cdot
                 \frac{1}{n} \Big\lVert \frac{u_N - u^*}{\sigma} \Big\rVert^2 ,
                 \qquad \sigma_0 = 25,

since the error that is left grows about like :math:`\sigma`: so every noise level weighs the same,
and one set of weights serves them all. Training runs the product's own solver, the limiter
included.

Whatever is random in a step depends on the seed and the number of the step alone. A run that was
interrupted and continued from its checkpoint is therefore the same as one that wasn't. Several
processes share the patches of a step, so that their number changes nothing either, but rounding.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from napari_learned_diffusion.config import (
    CHECKPOINT_EVERY,
    NoiseTrainingConfig,
    TrainingConfig,
)
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.learning.distributed import mean_over_processes, rank_and_number
from napari_learned_diffusion.core.learning.optimisers import Optimiser, descend, learning_rate
from napari_learned_diffusion.core.learning.patches import (
    GREY_LEVELS,
    Image,
    Patches,
    PatchesByStep,
    TrainingImages,
)
from napari_learned_diffusion.core.metrics import psnr
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate, solve
from napari_learned_diffusion.core.trainable import Trainable
from napari_learned_diffusion.core.weights import (
    describe,
    fill,
    read_tensors,
    require_model,
    write_tensors,
)

VALIDATION_LEVELS = (15.0, 25.0, 50.0)
VALIDATION_CROP = 160

_REFERENCE_NOISE = 25.0


@dataclass(frozen=True)
class TrainStep:
    """What a step did.

    Parameters
    ----------
    step
        Number of steps done, from 1.
    loss
        Of this step's patches, see above.
    learning_rate
        That the step was done with.
    validation
        PSNR in dB on the held-out images by noise level; ``None`` where it wasn't measured.
    """

    step: int
    loss: float
    learning_rate: float
    validation: dict[float, float] | None


def fit(
    model: LearnedDiffusivity,
    images: TrainingImages,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    resume: bool = True,
    every: int = CHECKPOINT_EVERY,
    workers: int = 0,
) -> Generator[TrainStep, None, None]:
    """Train a model in place, step by step.

    In each process of a group (see `distributed`) the model ends with the same parameters.

    Parameters
    ----------
    checkpoint
        Written every so many steps, by the first process.
    resume
        Whether the run goes on from a checkpoint that is there already.
    every
        Steps between two validations, after each of which the checkpoint is written.
    workers
        Processes that draw the patches of the next steps meanwhile; 0 draws them in between.

    Yields
    ------
    A `TrainStep` after every step; closing the generator there ends the training.

    Raises
    ------
    FileFormatError
        if the checkpoint is cut short, of another model, of a newer format or no safetensors.
    InvalidSettingError
        if the checkpoint is of a run with other settings, if the patches can't be shared equally,
        or if the training diverges.
    """
    rank, number = rank_and_number()
    if config.batch % number:
        raise InvalidSettingError(
            f"{number} processes can't share a batch of {config.batch} equally. "
            f"Take a multiple of {number}."
        )
    device = next(model.parameters()).device
    optimiser = Optimiser(model, config.optimiser)
    done = 0
    if resume and checkpoint is not None and checkpoint.exists():
        done = restore(checkpoint, model, optimiser, config)
    objective: nn.Module = _Objective(model, config)
    if number > 1:
        objective = DistributedDataParallel(objective)
    steps = range(done, config.steps)
    drawn = DataLoader(
        PatchesByStep(images.training, config, rank, number),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # which nobody else draws from
    )
    for step, patches in zip(steps, drawn, strict=True):
        rate = learning_rate(step, config.steps, config.learning_rate)
        # There is nothing else that the models do otherwise in training.
        model.train(not config.turned)
        loss: Tensor = objective(patches.on(device))
        # What the processes agree on, so that all of them stop.
        mean_loss = mean_over_processes(loss.detach())
        descend(optimiser, loss, mean_loss, rate, step)
        validation = None
        if (step + 1) % every == 0 or step + 1 == config.steps:
            validation = validate(model, images.validation, config)
            if checkpoint is not None and rank == 0:
                save(checkpoint, model, optimiser, config, step + 1)
        yield TrainStep(step + 1, mean_loss, rate, validation)


def validate(
    model: LearnedDiffusivity, images: Sequence[Image], config: TrainingConfig
) -> dict[float, float]:
    """Mean PSNR, in dB, of the images' centres at each of `VALIDATION_LEVELS`."""
    model.eval()
    device = next(model.parameters()).device
    means = {}
    for noise_sigma in VALIDATION_LEVELS:
        scores = []
        for number, image in enumerate(images):
            clean = _centre(image, VALIDATION_CROP).astype(np.float64)
            rng = np.random.default_rng([number, round(noise_sigma)])
            noisy = clean + rng.normal(0, noise_sigma, clean.shape)
            u = torch.from_numpy(noisy).to(device, torch.float32)[None, None]
            noise = Gaussian(noise_sigma)
            with torch.no_grad():
                ready = model.adapted(noise.stabilise(u), config.iterations * config.tau)
            denoised = solve(
                u, ready, noise=noise, scheme=Explicit(config.tau), iterations=config.iterations
            ).u[0, 0]
            result = np.clip(denoised.double().cpu().numpy(), 0, GREY_LEVELS)
            scores.append(psnr(result, clean, data_range=GREY_LEVELS))
        means[noise_sigma] = float(np.mean(scores))
    return means


class _Objective(nn.Module):
    """From patches to their loss: one module, since that is what processes can share."""

    def __init__(self, model: LearnedDiffusivity, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, patches: Patches) -> Tensor:
        u = _diffuse(self.model, patches, self.config)
        return _loss(u, patches.clean, patches.noise_sigma)


class _OfEach:
    """The noise of a batch: of photons in the planes that have a gain, else of variance 1."""

    is_zero = False

    def __init__(self, gain: Tensor) -> None:
        gain = gain.view(-1, 1, 1, 1)
        self._of_photons = gain > 0
        self._gain = gain.where(self._of_photons, 1.0)

    def stabilise(self, intensity: Tensor) -> Tensor:
        counts = intensity / self._gain
        return torch.where(self._of_photons, PoissonGaussian(1.0).stabilise(counts), intensity)


def _diffuse(model: LearnedDiffusivity, patches: Patches, config: TrainingConfig) -> Tensor:
    u, noise = patches.noisy, _OfEach(patches.gain)
    for state in iterate(
        u,
        model.adapted(noise.stabilise(u), config.iterations * config.tau),
        noise=noise,
        scheme=Explicit(config.tau),
        iterations=config.iterations,
        gradients=True,
        mixed=config.mixed,
    ):
        u = state.u
    return u


def _loss(u: Tensor, clean: Tensor, noise_sigma: Tensor) -> Tensor:
    error = (u - clean).square().mean(dim=(1, 2, 3))
    return (error * noise_sigma).mean() / _REFERENCE_NOISE


# --- what every training of a model shares ----------------------------------------------------


# --- checkpoints ------------------------------------------------------------------------------


def save(
    path: Path,
    model: Trainable,
    optimiser: Optimiser,
    config: TrainingConfig | NoiseTrainingConfig,
    step: int,
) -> None:
    """Write a checkpoint after ``step`` steps; the file is complete or as it was before."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= optimiser.remembered()
    header = describe(model) | {"step": step, "training": _as_json(config)}
    write_tensors(path, tensors, header)


def restore(
    path: Path,
    model: Trainable,
    optimiser: Optimiser,
    config: TrainingConfig | NoiseTrainingConfig,
) -> int:
    """Take model and optimiser to where a checkpoint was written; the number of steps done.

    Raises
    ------
    FileFormatError
        if the checkpoint is cut short, of another model, of a newer format or no safetensors.
    InvalidSettingError
        if it is of a run with other settings.
    """
    tensors, header = read_tensors(path)
    require_model(path, header, type(model))
    theirs, ours = header.get("training", {}), _as_json(config)
    differing = [f.name for f in fields(config) if theirs.get(f.name) != ours[f.name]]
    if header["architecture"] != model.architecture or differing:
        what = ", ".join(f"{k} {theirs.get(k)}" for k in differing) or "another architecture"
        raise InvalidSettingError(
            f"{path} is of a run with {what}. Continue with the same settings, or name another "
            "checkpoint."
        )
    fill(path, model, {n[6:]: t for n, t in tensors.items() if n.startswith("model.")})
    steps = int(header["step"])
    optimiser.remember(tensors, steps)
    return steps


def _as_json(config: TrainingConfig | NoiseTrainingConfig) -> dict[str, Any]:
    # Tuples become lists there.
    facts: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return facts


# --- images -----------------------------------------------------------------------------------


def _centre(image: Image, size: int) -> Image:
    top, left = (max(0, (n - size) // 2) for n in image.shape)
    return image[top : top + size, left : left + size]
