r"""Gaussian presmoothing of the image that a diffusivity looks at (Catté, Lions, Morel, Coll 1992).

The diffusivity then judges an edge by more than the two pixels that it joins, which makes it robust
against noise; the image that diffuses stays as it is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d

TRUNCATE = 4.0
"""Where the kernel ends, in standard deviations; SciPy's default."""


def kernel_radius(sigma: float) -> int:
    """Reach of the kernel, in pixels."""
    return math.floor(TRUNCATE * sigma + 0.5)


def gaussian_taps(sigma: float) -> NDArray[np.float64]:
    """Sampled Gaussian of standard deviation ``sigma`` pixels, normalised to sum 1."""
    radius = kernel_radius(sigma)
    if radius == 0:
        return np.ones(1)
    x = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (x / sigma) ** 2)
    normalised: NDArray[np.float64] = taps / taps.sum()
    return normalised


def reflected_indices(size: int, radius: int) -> NDArray[np.int64]:
    """Indices ``-radius … size + radius - 1`` reflected into an axis: ``b a | a b c | c b``."""
    k = np.arange(-radius, size + radius) % (2 * size)
    return np.where(k < size, k, 2 * size - 1 - k)


def presmooth(
    v: Tensor, sigma: float, spacing: tuple[float, float], valid: Tensor | None = None
) -> Tensor:
    """Gaussian smoothing with reflecting boundary, over valid pixels only.

    Parameters
    ----------
    v
        ``(b, 1, h, w)``
    sigma
        Standard deviation, in pixels of the finer axis.
    spacing
        ``(hy, hx)``, in pixels.
    valid
        ``(b, 1, h, w)`` of 0 and 1: pixels of 0 have no part in any average.
    """
    if sigma == 0:
        return v
    if valid is None:
        return _separable(v, sigma, spacing)
    weight = _separable(valid, sigma, spacing)
    return _separable(v * valid, sigma, spacing) / weight.clamp(min=torch.finfo(v.dtype).tiny)


def presmooth_each(v: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """As `presmooth`, each plane of a batch with a ``sigma`` of its own, differentiable in it.

    Parameters
    ----------
    v
        ``(b, 1, h, w)``, all valid, at distance 1.
    sigma
        ``(b, 1, 1, 1)``, above 0, in pixels.
    radius
        Reach of the kernels, in pixels.
    """
    x = torch.arange(-radius, radius + 1, device=v.device, dtype=v.dtype)
    taps = torch.softmax(-0.5 * (x / sigma) ** 2, dim=-1)
    for axis, kernels in ((-2, taps.transpose(-2, -1)), (-1, taps)):
        source = torch.from_numpy(reflected_indices(v.shape[axis], radius)).to(v.device)
        planes = v.index_select(axis, source).transpose(0, 1)
        v = conv2d(planes, kernels, groups=len(taps)).transpose(0, 1)
    return v


def _separable(v: Tensor, sigma: float, spacing: tuple[float, float]) -> Tensor:
    for axis, h in zip((-2, -1), spacing, strict=True):
        taps = gaussian_taps(sigma / h)
        size = v.shape[axis]
        source = torch.from_numpy(reflected_indices(size, len(taps) // 2)).to(v.device)
        padded = v.index_select(axis, source)
        v = sum(
            (padded.narrow(axis, k, size) * float(tap) for k, tap in enumerate(taps)),
            start=torch.zeros_like(v),
        )
    return v
