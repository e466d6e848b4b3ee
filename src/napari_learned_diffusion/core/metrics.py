"""How close an image is to its reference: PSNR, SSIM, and the fit of pairs of unknown scaling.

The range of the intensities is never guessed: 8-bit values may live in 0–255 or in 40–90, and the
decibels mean nothing without it. Everything is computed in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError

SSIM_SIGMA = 1.5
"""Standard deviation of SSIM's Gaussian window, in pixels."""

SSIM_MIN_PIXELS = 2 * int(3.5 * SSIM_SIGMA + 0.5) + 1
"""Edge length of that window, cut off at 3.5 standard deviations: no image may be smaller."""


def psnr(image: ArrayLike, reference: ArrayLike, *, data_range: float) -> float:
    r"""Peak signal-to-noise ratio, in decibels; the larger, the closer.

    .. math:: \mathrm{PSNR} = 10 \log_{10} \frac{R^2}{\frac1N \sum_i (u_i - r_i)^2}

    Parameters
    ----------
    image, reference
        :math:`u` and :math:`r`, of the same shape, in the same units; finite real numbers.
    data_range
        :math:`R`, the largest intensity minus the smallest one that there can be, in the same
        units, > 0: 255 for bytes.

    Returns
    -------
    The ratio in decibels; infinity where both are equal.

    Raises
    ------
    InvalidImageError
        if the shapes differ, an image is empty, or a value isn't a finite real number.
    InvalidSettingError
        if ``data_range`` isn't a finite number above 0.

    Examples
    --------
    >>> psnr([[0.0, 25.5]], [[0.0, 0.0]], data_range=255)  # doctest: +ELLIPSIS
    23.01...
    """
    u, r = _pair(image, reference)
    _check_range(data_range)
    error = float(np.mean((u - r) ** 2))
    return math.inf if error == 0 else 10 * math.log10(data_range**2 / error)


def ssim(image: ArrayLike, reference: ArrayLike, *, data_range: float) -> float:
    r"""Structural similarity [1]_, averaged over a slice; 1 where both are equal.

    .. math:: \mathrm{SSIM} = \frac{(2\mu_u\mu_r + c_1)(2\sigma_{ur} + c_2)}
              {(\mu_u^2 + \mu_r^2 + c_1)(\sigma_u^2 + \sigma_r^2 + c_2)}, \qquad
              c_1 = (0.01 R)^2, \quad c_2 = (0.03 R)^2

    with local means, variances and covariance under a Gaussian window of `SSIM_SIGMA` pixels,
    population variances (divided by N, not N - 1), and without the border that the window doesn't
    fit into, as in the original code.

    Parameters
    ----------
    image, reference
        ``(h, w)`` each, both sides at least `SSIM_MIN_PIXELS`, in the same units; finite real
        numbers.
    data_range
        :math:`R`, as of `psnr`.

    Returns
    -------
    The mean, without unit, at most 1.

    Raises
    ------
    InvalidImageError
        if the shapes differ, they aren't slices, the window doesn't fit into them, or a value isn't
        a finite real number.
    InvalidSettingError
        if ``data_range`` isn't a finite number above 0.

    References
    ----------
    .. [1] Z. Wang, A. C. Bovik, H. R. Sheikh, E. P. Simoncelli, "Image quality assessment: from
       error visibility to structural similarity", IEEE Trans. Image Process. 13 (2004), 600-612.

    Examples
    --------
    >>> slice_ = np.arange(256.0).reshape(16, 16)
    >>> ssim(slice_, slice_, data_range=255)
    1.0
    """
    from skimage.metrics import structural_similarity  # slow to import, and rarely needed

    u, r = _pair(image, reference)
    _check_range(data_range)
    if u.ndim != 2 or min(u.shape) < SSIM_MIN_PIXELS:
        raise InvalidImageError(
            f"SSIM needs slices of at least {SSIM_MIN_PIXELS} x {SSIM_MIN_PIXELS} pixels, "
            f"not the shape {u.shape}."
        )
    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            u,
            r,
            data_range=data_range,
            gaussian_weights=True,
            sigma=SSIM_SIGMA,
            use_sample_covariance=False,
        )
    )


def affine_fit(image: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    r"""The image, scaled and shifted to fit its reference best in the least-squares sense.

    .. math:: a u + b, \qquad (a, b) = \arg\min_{a, b} \sum_i (a u_i + b - r_i)^2

    For pairs that were scaled to their data type separately, so that gain and offset between them
    are unknown. Compare only what was fitted the same way: the fit also forgives a denoiser that
    has lost contrast.

    Parameters
    ----------
    image, reference
        :math:`u` and :math:`r`, of the same shape; finite real numbers.

    Returns
    -------
    The fitted image, of the same shape, in units of the reference. A constant image becomes the
    mean of the reference.

    Raises
    ------
    InvalidImageError
        if the shapes differ, an image is empty, or a value isn't a finite real number.

    Examples
    --------
    >>> affine_fit([1.0, 2.0, 3.0], [10.0, 30.0, 50.0])
    array([10., 30., 50.])
    """
    u, r = _pair(image, reference)
    centred = u - u.mean()
    spread = float(np.mean(centred**2))
    a = float(np.mean(centred * (r - r.mean()))) / spread if spread > 0 else 0.0
    fitted: NDArray[np.float64] = a * centred + r.mean()
    return fitted


def _pair(
    image: ArrayLike, reference: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    u, r = _checked("image", image), _checked("reference", reference)
    if u.shape != r.shape:
        raise InvalidImageError(
            f"The image and its reference must have the same shape, not {u.shape} and {r.shape}."
        )
    return u, r


def _checked(name: str, values: ArrayLike) -> NDArray[np.float64]:
    given: NDArray[Any] = np.asarray(values)
    if given.dtype.kind not in "biuf":
        raise InvalidImageError(f"The {name} must hold real numbers, not {given.dtype}.")
    array = given.astype(np.float64, copy=False)
    if array.size == 0:
        raise InvalidImageError(f"The {name} has no pixels.")
    if not np.isfinite(array).all():
        raise InvalidImageError(
            f"The {name} has pixels that are NaN or infinite; compare only the others."
        )
    return array


def _check_range(data_range: float) -> None:
    if not (math.isfinite(data_range) and data_range > 0):
        raise InvalidSettingError(
            f"The data range must be a finite number above 0, not {data_range}."
        )
