"""Noisy patches of clean images, which models learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from napari_learned_diffusion.config import (
    TrainingConfig,
)
from napari_learned_diffusion.core.errors import InvalidImageError

GREY_LEVELS = 255.0
"""Range of the training images, to which noise levels and PSNR refer."""


VALIDATION_IMAGES = 10


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


class PatchesByStep(Dataset[Patches]):
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
