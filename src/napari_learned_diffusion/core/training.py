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
import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from napari_learned_diffusion.config import (
    CHECKPOINT_EVERY,
    NoiseTrainingConfig,
    TrainingConfig,
)
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.distributed import mean_over_processes, rank_and_number
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.metrics import psnr
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian
from napari_learned_diffusion.core.optimisers import Optimiser
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

GREY_LEVELS = 255.0
"""Range of the training images, to which noise levels and PSNR refer."""

VALIDATION_LEVELS = (15.0, 25.0, 50.0)
VALIDATION_CROP = 160
VALIDATION_IMAGES = 10

_REFERENCE_NOISE = 25.0

# Of patches with photon noise: how far they are dimmed at most, and the mean intensity, in units of
# their noise, below which the gain grows no more.
_DIMMEST = 4.0
_DARKEST = 0.25

# Standard deviation in pixels of what blurs a patch, the smallest and the largest.
_BLUR = 0.5, 3.0

_HELD_OUT = 20
_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
_LUMA = np.array([0.299, 0.587, 0.114])
_HIGHEST = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}

Image = NDArray[np.float32]


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


@dataclass(frozen=True)
class TrainingImages:
    """Grey images on the 0-255 scale, each ``(h, w)``.

    Parameters
    ----------
    training, validation
        What is learned from, and the fixed few that are held out; a single image serves as both.
    skipped
        Files that weren't used, each with the reason.
    """

    training: tuple[Image, ...]
    validation: tuple[Image, ...]
    skipped: tuple[str, ...]


def read_images(folders: Sequence[Path], patch: int) -> TrainingImages:
    """All images of some folders (not of folders within them), in the order of their names.

    Parameters
    ----------
    patch
        Smaller images are skipped, in pixels.

    Raises
    ------
    InvalidImageError
        if no image is left; the message says what became of the files.
    """
    images, skipped = [], []
    for folder in folders:
        if not folder.is_dir():
            raise InvalidImageError(f"There is no folder {folder}.")
        for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES):
            try:
                image = _read_grey(path)
                if min(image.shape) < patch:
                    raise InvalidImageError(f"smaller than a patch of {patch} pixels")
            except InvalidImageError as error:
                skipped.append(f"{path.name}: {error}")
            else:
                images.append(image)
    if not images:
        reasons = "".join(f"\n  {reason}" for reason in skipped[:5])
        raise InvalidImageError(
            f"There is no image to train on in {', '.join(map(str, folders))}; JPEG, PNG, TIFF and "
            f"BMP are read.{reasons}"
        )
    held_out = images[::_HELD_OUT]
    training = [image for i, image in enumerate(images) if i % _HELD_OUT] or held_out
    return TrainingImages(tuple(training), tuple(held_out[:VALIDATION_IMAGES]), tuple(skipped))


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

    In each process of a group (see `core.distributed`) the model ends with the same parameters.

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
        _Steps(images.training, config, rank, number),
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


class Patches(NamedTuple):
    """What a step learns from.

    Parameters
    ----------
    clean, noisy
        ``(batch, 1, patch, patch)``, in units of the noise; of photon noise, in units of that at
        the mean intensity.
    noise_sigma
        ``(batch,)``, standard deviation of the noise on the 0-255 scale.
    gain
        ``(batch,)``, of photon noise, in the unit of the patches; 0 for any other noise.
    """

    clean: Tensor
    noisy: Tensor
    noise_sigma: Tensor
    gain: Tensor

    def share(self, rank: int, number: int) -> Patches:
        """What one of several processes learns from."""
        return Patches(*(tensor[rank::number] for tensor in self))

    def on(self, device: torch.device) -> Patches:
        """The same on a device."""
        meanwhile = device.type == "cuda"  # what it takes, pinned memory, is there for these
        return Patches(*(tensor.to(device, non_blocking=meanwhile) for tensor in self))


class _Steps(Dataset[Patches]):
    """By the number of a step, what a process learns from in it."""

    def __init__(
        self, images: Sequence[Image], config: TrainingConfig, rank: int, number: int
    ) -> None:
        self._images, self._config, self._rank, self._number = images, config, rank, number

    def __getitem__(self, step: int) -> Patches:
        return draw_patches(self._images, self._config, step).share(self._rank, self._number)


def draw_patches(images: Sequence[Image], config: TrainingConfig, step: int) -> Patches:
    """The patches of a step, which depend on the seed and its number alone."""
    rng = np.random.default_rng([config.seed, step])
    patches = []
    for _ in range(config.batch):
        image = images[int(rng.integers(len(images)))]
        y, x = (rng.integers(n - config.patch + 1) for n in image.shape)
        patch = np.rot90(image[y : y + config.patch, x : x + config.patch], int(rng.integers(4)))
        patch = patch[:, ::-1] if rng.integers(2) else patch
        patch = _lines(patch, rng) if rng.random() < config.lines else patch
        patches.append(_blurred(patch, rng) if rng.random() < config.blurred else patch)
    low, high = np.log(config.noise_range)
    noise_sigma = np.exp(rng.uniform(low, high, config.batch))
    clean = np.stack(patches)[:, None] / noise_sigma[:, None, None, None]
    noisy = clean + rng.normal(size=clean.shape)
    gain = np.zeros(config.batch)
    for number, kind in enumerate(rng.random(config.batch)):
        if kind < config.correlated:
            noisy[number, 0] = clean[number, 0] + _correlated(
                noisy[number, 0] - clean[number, 0], rng
            )
        elif kind < config.correlated + config.photon:
            dimmer = np.exp(rng.uniform(0, np.log(_DIMMEST)))
            clean[number] /= dimmer
            noise_sigma[number] *= dimmer
            noisy[number], gain[number] = _counted(clean[number], rng)
    return Patches(*(torch.from_numpy(a).float() for a in (clean, noisy, noise_sigma, gain)))


def _correlated(white: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    r"""White noise of variance 1 through a random filter that keeps the variance.

    .. math:: |H(\omega)| \propto |\omega|^p\,
              e^{-(s_y^2 \omega_y^2 + s_x^2 \omega_x^2) / 2}

    Interpolated and resampled images have ``p = 0``; those reconstructed from projections (CT) have
    the ramp that sharpens them, ``p`` up to 1, beside the kernel that smooths them.
    """
    sy, sx = rng.uniform(0.3, 1.2, 2)
    power = rng.uniform(0, 1) * rng.integers(2)
    y, x = (
        2 * np.pi * frequencies(n)
        for frequencies, n in zip((np.fft.fftfreq, np.fft.rfftfreq), white.shape, strict=True)
    )
    y = y[:, None]
    transfer = np.hypot(y, x) ** power * np.exp(-((sy * y) ** 2 + (sx * x) ** 2) / 2)
    noise = np.fft.irfft2(np.fft.rfft2(white) * transfer, white.shape)
    unit: NDArray[np.float64] = noise / noise.std()
    return unit


def _counted(
    clean: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], float]:
    """Photon noise of variance 1 at the mean intensity, and its gain.

    Every other time the detector multiplies each electron by a number of its own, of exponential
    distribution, as EMCCD cameras and photomultipliers do. That doubles the variance of a count and
    leaves more outliers than photons alone.
    """
    gain = 1 / max(float(clean.mean()), _DARKEST)
    if rng.integers(2):
        electron = gain / 2
        return electron * rng.standard_gamma(rng.poisson(clean / electron)), gain
    return gain * rng.poisson(clean / gain).astype(np.float64), gain


def _lines(patch: Image, rng: np.random.Generator) -> Image:
    """The magnitude of a patch's gradient at a scale of about a pixel, on the 0-255 scale."""
    from scipy.ndimage import gaussian_gradient_magnitude

    edges: Image = gaussian_gradient_magnitude(patch, rng.uniform(0.7, 1.5))
    brightest = max(float(np.percentile(edges, 99.5)), 1.0)
    edges *= GREY_LEVELS / brightest
    return edges.clip(0, GREY_LEVELS)


def _blurred(patch: Image, rng: np.random.Generator) -> Image:
    """A patch with nothing finer than a pixel or some, as optics and interpolation leave it."""
    from scipy.ndimage import gaussian_filter

    blurred: Image = gaussian_filter(patch, np.exp(rng.uniform(*np.log(_BLUR))))
    return blurred


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


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Of a step, from 0: it rises over the first fifth of the steps, then falls along a cosine."""
    part = (step + 0.5) / steps
    if part < 0.2:
        return highest * part / 0.2
    return highest * 0.5 * (1 + math.cos(math.pi * (part - 0.2) / 0.8))


def descend(optimiser: Optimiser, loss: Tensor, mean_loss: float, rate: float, step: int) -> None:
    """Take a step down the gradient, clipped to a norm of 1.

    Parameters
    ----------
    loss
        What this process's patches give; its gradient is averaged over the processes.
    mean_loss
        Its mean over the processes, by which all of them stop if it is no number.
    rate
        Learning rate of this step.
    step
        Number of steps done.

    Raises
    ------
    InvalidSettingError
        if the training diverges.
    """
    if not math.isfinite(mean_loss):
        raise InvalidSettingError(
            f"The loss is no number any more in step {step + 1}: the training diverged. "
            "Take a lower learning rate."
        )
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(optimiser.parameters, 1.0)
    optimiser.step(rate)


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


def _read_grey(path: Path) -> Image:
    """Luma on the 0-255 scale, rounded to whole grey levels where the file holds bytes."""
    from skimage.io import imread

    try:
        pixels = imread(path)
    except Exception as error:  # every reader behind imread has exceptions of its own
        raise InvalidImageError(f"can't be read ({error})") from error
    if pixels.dtype not in _HIGHEST:
        raise InvalidImageError(f"holds {pixels.dtype}; 8 and 16 bits are read")
    scale = GREY_LEVELS / _HIGHEST[pixels.dtype]
    if pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        pixels = np.rint(pixels[..., :3] @ _LUMA)
    elif pixels.ndim != 2:
        raise InvalidImageError(f"is no single grey or colour image but {pixels.shape}")
    grey: Image = (pixels * scale).astype(np.float32)
    return grey


def _centre(image: Image, size: int) -> Image:
    top, left = (max(0, (n - size) // 2) for n in image.shape)
    return image[top : top + size, left : left + size]
