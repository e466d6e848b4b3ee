"""Check a result: what was taken away, whether it was noise, and how near the truth it came."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.metrics import (
    Q_PATCH,
    SSIM_MIN_PIXELS,
    autocorrelation,
    largest_autocorrelation,
    psnr,
    ssim,
    white_noise_autocorrelation,
    zhu_milanfar_q,
)
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.noise_estimation import estimate_noise
from napari_learned_diffusion.jobs.planes import check_image
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.jobs.report import flat_noise_levels

REACH = 5
"""Of the autocorrelation, in pixels."""

STRUCTURE = 0.14
"""Autocorrelation that tells of structure. Averaging neighbours, which is all that diffusion does,
leaves some in the residual even where there is nothing but noise; how much, and how much there is
where too much was smoothed, is measured by benchmarks/residual_structure.py."""

_STEPS = 4


@dataclass(frozen=True, eq=False)
class Check:
    """What a result is beside its input, in layer units; pairs are before and after.

    Parameters
    ----------
    noise
        Noise level, by the noise model, and what of it is visible in flat areas of the result.
    mean, lowest, highest
        Of the pixels.
    q
        Q of `core.metrics.zhu_milanfar_q`; NaN for a slice smaller than a patch of it.
    removed
        Mean square of what was taken away, in stabilised units: 1 is as much as the noise has.
    residual
        ``(h, w)``, input minus result, float32.
    autocorrelation
        ``(11, 11)``, of the residual in stabilised units.
    largest_autocorrelation, white_noise
        The largest of it off the centre, and what that would be of white noise.
    psnr, ssim
        To the reference, in decibels and without unit; ``None`` without a reference, and where the
        slice is too small for SSIM.
    """

    noise: tuple[float, float]
    mean: tuple[float, float]
    lowest: tuple[float, float]
    highest: tuple[float, float]
    q: tuple[float, float]
    removed: float
    residual: NDArray[np.float32]
    autocorrelation: NDArray[np.float64]
    largest_autocorrelation: float
    white_noise: float
    psnr: tuple[float, float] | None
    ssim: tuple[float, float] | None

    @property
    def mean_drift(self) -> float:
        """Mean after minus mean before."""
        return self.mean[1] - self.mean[0]

    @property
    def range_kept(self) -> bool:
        """Whether no value lies outside of those of the input."""
        return self.lowest[0] <= self.lowest[1] and self.highest[1] <= self.highest[0]

    @property
    def is_white(self) -> bool:
        """Whether the residual is no more alike to itself, shifted, than white noise may be."""
        return self.largest_autocorrelation <= 2 * self.white_noise

    @property
    def has_structure(self) -> bool:
        """Whether the residual is so much alike to itself that it holds structure."""
        return not self.is_white and self.largest_autocorrelation > STRUCTURE

    def to_dict(self) -> dict[str, Any]:
        """The numbers, as they are written into a file."""
        numbers = asdict(self)
        del numbers["residual"]
        numbers["autocorrelation"] = np.round(self.autocorrelation, 4).tolist()
        return numbers | {"mean_drift": self.mean_drift, "range_kept": self.range_kept}


def check_plane(
    before: NDArray[Any],
    after: NDArray[Any],
    noise: NoiseModel | None = None,
    reference: NDArray[Any] | None = None,
) -> Job[Check]:
    """Compare a plane before and after denoising.

    Parameters
    ----------
    before, after
        ``(h, w)``, in the same units. Pixels that are NaN or infinite in either take no part; Q and
        SSIM see them as the mean of the others.
    noise
        Noise model of ``before``; ``None``: estimated from it.
    reference
        ``(h, w)``, without noise, in the same units; its range is that of PSNR and SSIM.

    Yields
    ------
    A `Progress` after each kind of measurement; closing the generator there cancels.

    Raises
    ------
    InvalidImageError
        if the shapes differ, or there is no number that all images have.
    """
    for image in (before, after, *(() if reference is None else (reference,))):
        check_image(image, (-2, -1))
        if image.shape != before.shape or image.ndim != 2:
            raise InvalidImageError(
                "Input, result and reference must be slices of the same size, not "
                f"{before.shape} and {image.shape}. Choose layers that belong together."
            )
    b, a = (np.asarray(image, np.float64) for image in (before, after))
    valid = np.isfinite(b) & np.isfinite(a)
    if not valid.any():
        raise InvalidImageError("The slices have no number in common: all are NaN or infinite.")
    yield Progress(0, _STEPS, "Measuring the noise")
    if noise is None:
        noise = estimate_noise(np.where(valid, b, np.nan)).model
    levels = flat_noise_levels(noise, np.where(valid, b, np.nan), np.where(valid, a, np.nan))
    yield Progress(1, _STEPS, "Looking for structure in the residual")
    stabilised = b - a if noise.is_zero else noise.stabilise(b) - noise.stabilise(a)
    removed = float(np.mean(stabilised[valid] ** 2))
    found = autocorrelation(np.where(valid, stabilised, np.nan), reach=REACH)
    yield Progress(2, _STEPS, "Measuring Q")
    filled = [np.where(valid, image, image[valid].mean()) for image in (b, a)]
    q = (math.nan, math.nan)
    if min(b.shape) >= Q_PATCH:
        q = (zhu_milanfar_q(filled[0]), zhu_milanfar_q(filled[1]))
    yield Progress(3, _STEPS, "Comparing with the reference")
    return Check(
        noise=levels,
        mean=(float(b[valid].mean()), float(a[valid].mean())),
        lowest=(float(b[valid].min()), float(a[valid].min())),
        highest=(float(b[valid].max()), float(a[valid].max())),
        q=q,
        removed=removed,
        residual=np.where(valid, b - a, np.nan).astype(np.float32),
        autocorrelation=found,
        largest_autocorrelation=largest_autocorrelation(found),
        white_noise=white_noise_autocorrelation(int(valid.sum()), reach=REACH),
        **_compared(b, a, reference, valid),
    )


def _compared(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    reference: NDArray[Any] | None,
    valid: NDArray[np.bool_],
) -> dict[str, tuple[float, float] | None]:
    """PSNR and SSIM of both to the reference."""
    if reference is None:
        return {"psnr": None, "ssim": None}
    r = np.asarray(reference, np.float64)
    common = valid & np.isfinite(r)
    extent = float(np.ptp(r[common])) if common.any() else 0.0
    if extent <= 0:
        raise InvalidImageError("The reference shows nothing: it has one value only.")
    images = before, after
    decibels = [psnr(image[common], r[common], data_range=extent) for image in images]
    similarities = None
    if min(r.shape) >= SSIM_MIN_PIXELS:
        mean = r[common].mean()
        filled = [np.where(common, image, mean) for image in (*images, r)]
        first, second = (ssim(image, filled[2], data_range=extent) for image in filled[:2])
        similarities = first, second
    return {"psnr": (decibels[0], decibels[1]), "ssim": similarities}
