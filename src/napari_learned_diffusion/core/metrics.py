"""How good an image is: against a reference (PSNR, SSIM, LPIPS) and without one (Q).

The range of the intensities is never guessed: 8-bit values may live in 0–255 or in 40–90, and the
decibels mean nothing without it. Everything but LPIPS is computed in float64.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_learned_diffusion.core.errors import (
    InvalidImageError,
    InvalidSettingError,
    MissingDependencyError,
)

SSIM_SIGMA = 1.5
"""Standard deviation of SSIM's Gaussian window, in pixels."""

SSIM_MIN_PIXELS = 2 * int(3.5 * SSIM_SIGMA + 0.5) + 1
"""Edge length of that window, cut off at 3.5 standard deviations: no image may be smaller."""

Q_PATCH = 8
"""Edge length of the patches of Q, in pixels: no slice may be smaller."""

LPIPS_MIN_PIXELS = 64
"""Edge length below which the network of LPIPS has no pixels left in its last layers."""


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


def lpips(image: ArrayLike, reference: ArrayLike, *, data_range: float) -> float:
    r"""Learned perceptual distance [1]_, version 0.1 with AlexNet; 0 where both are equal.

    .. math:: d = \sum_l \frac{1}{H_l W_l} \sum_{y,x}
              \left\lVert w_l \odot (\hat f^l_{yx}(u) - \hat f^l_{yx}(r)) \right\rVert_2^2

    with the features :math:`\hat f^l` of layer :math:`l`, of norm 1 at every pixel, and learned
    weights :math:`w_l`. The grey image stands in all three channels. Nothing is downloaded: without
    the package and the weights there is no figure.

    Parameters
    ----------
    image, reference
        ``(h, w)`` each, both sides at least `LPIPS_MIN_PIXELS`; finite real numbers from 0 to
        ``data_range``.
    data_range
        :math:`R`, what white is, in the same units, > 0.

    Returns
    -------
    The distance, without unit, at least 0; the smaller, the closer.

    Raises
    ------
    MissingDependencyError
        if the package or its weights aren't there, see `lpips_missing`.
    InvalidImageError
        if the shapes differ, they aren't slices, they are too small, or a value isn't a finite real
        number.
    InvalidSettingError
        if ``data_range`` isn't a finite number above 0.

    References
    ----------
    .. [1] R. Zhang, P. Isola, A. A. Efros, E. Shechtman, O. Wang, "The unreasonable effectiveness
       of deep features as a perceptual metric", CVPR (2018), 586-595.
    """
    u, r = _pair(image, reference)
    _check_range(data_range)
    if u.ndim != 2 or min(u.shape) < LPIPS_MIN_PIXELS:
        raise InvalidImageError(
            f"LPIPS needs slices of at least {LPIPS_MIN_PIXELS} x {LPIPS_MIN_PIXELS} pixels, "
            f"not the shape {u.shape}."
        )
    reason = lpips_missing()
    if reason is not None:
        raise MissingDependencyError(reason)
    import torch  # slow to import, and rarely needed

    scaled = (
        torch.from_numpy(2 / data_range * x - 1).float().expand(1, 3, *x.shape) for x in (u, r)
    )
    with torch.no_grad():
        return float(_lpips_network()(*scaled))


def lpips_missing() -> str | None:
    """Why `lpips` can't be computed here, and what to do about it; ``None`` where it can."""
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        return (
            "LPIPS needs the lpips package. Install it by "
            "'python -m pip install napari-learned-diffusion[metrics]'."
        )
    weights = _alexnet_weights()
    if not weights.is_file():
        return (
            f"LPIPS needs the weights of AlexNet at {weights}. Download them by "
            "'python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\"'."
        )
    return None


def _alexnet_weights() -> Path:
    """Where torchvision keeps what it downloads."""
    import torch

    url: str = import_module("torchvision.models").AlexNet_Weights.IMAGENET1K_V1.url
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


@cache
def _lpips_network() -> Any:
    return import_module("lpips").LPIPS(net="alex", verbose=False).eval()


def zhu_milanfar_q(
    image: ArrayLike, *, patch_size: int = Q_PATCH, significance: float = 0.001
) -> float:
    r"""How much oriented structure an image shows, without a reference: Q of [1]_.

    .. math:: Q = \frac1M \sum_{k :\, R_k > \tau} s_{1,k} R_k, \qquad
              R = \frac{s_1 - s_2}{s_1 + s_2}

    over the :math:`M` patches that fit beside each other from the upper left corner, with the
    singular values :math:`s_1 \ge s_2` of a patch's gradients, a matrix of one row a pixel and two
    columns. Blur lowers :math:`s_1`, noise lowers the coherence :math:`R`. Only anisotropic patches
    count, those above `anisotropy_threshold`, but the sum is divided by the number of all of them,
    as in the authors' code: the mean over the anisotropic ones alone grows with the noise, because
    the few that pass by chance then have large :math:`s_1`.

    Gradients are central differences, one-sided at the border of each patch. The authors keep the
    patches that are anisotropic in the noisy image while they compare results; here each image
    decides for itself.

    Parameters
    ----------
    image
        ``(h, w)``, both sides at least ``patch_size``; finite real numbers in any unit.
    patch_size
        Edge length of a patch, in pixels, at least 2.
    significance
        :math:`\delta`, as of `anisotropy_threshold`.

    Returns
    -------
    Q, at least 0, in the unit of the image: images on other scales can't be compared. The larger,
    the more structure and the less noise; it doesn't say whether the structure is the true one.

    Raises
    ------
    InvalidImageError
        if the image is no slice, smaller than a patch, or a value isn't a finite real number.
    InvalidSettingError
        if ``patch_size`` or ``significance`` is out of its range.

    References
    ----------
    .. [1] X. Zhu, P. Milanfar, "Automatic parameter selection for denoising algorithms using a
       no-reference measure of image content", IEEE Trans. Image Process. 19 (2010), 3116-3132.

    Examples
    --------
    A ramp of 3 a pixel: 64 equal gradients have s₁ = 3 √64 and s₂ = 0.

    >>> ramp = 3.0 * np.arange(16) * np.ones((16, 1))
    >>> round(zhu_milanfar_q(ramp), 9)
    24.0
    """
    patches = _patches(_slice(image, patch_size), patch_size)
    gy: NDArray[np.float64] = np.gradient(patches, axis=-2)
    gx: NDArray[np.float64] = np.gradient(patches, axis=-1)
    s1, coherence = _coherence(gy, gx, _rounding(patches))
    anisotropic = coherence > anisotropy_threshold(patch_size**2, significance)
    return float(np.mean(s1 * coherence * anisotropic))


def anisotropic_share(
    image: ArrayLike, *, patch_size: int = Q_PATCH, significance: float = 0.001
) -> float:
    r"""Percentage of the patches that are anisotropic, by a Sobel gradient of 5 × 5 pixels.

    The test of `zhu_milanfar_q`, :math:`R > \tau`, without its strength :math:`s_1`. The gradient
    smooths, so that its noise is correlated and pure noise passes more often than by
    ``significance``: in 8 patches of 100. The share tells images apart, and no more.

    Parameters
    ----------
    image, patch_size, significance
        As of `zhu_milanfar_q`.

    Returns
    -------
    From 0 to 100, without unit; scaling the image changes nothing.

    Raises
    ------
    InvalidImageError, InvalidSettingError
        as `zhu_milanfar_q`.

    Examples
    --------
    A checkerboard has as much gradient in either direction, stripes in one only.

    >>> y, x = np.indices((16, 16)) // 4 % 2
    >>> anisotropic_share(x ^ y), anisotropic_share(x)
    (0.0, 100.0)
    """
    from scipy.ndimage import correlate1d  # slow to import, and rarely needed

    u = _slice(image, patch_size)
    smooth, difference = (1, 4, 6, 4, 1), (-1, -2, 0, 2, 1)
    gradients = [
        correlate1d(
            correlate1d(u, difference, axis=axis, mode="mirror"),
            smooth,
            axis=1 - axis,
            mode="mirror",
        )
        for axis in (0, 1)
    ]
    gy, gx = (_patches(g, patch_size) for g in gradients)
    rounding = 96 * _rounding(_patches(u, patch_size))  # 96: sum of the filter's absolute weights
    _, coherence = _coherence(gy, gx, rounding)
    anisotropic = coherence > anisotropy_threshold(patch_size**2, significance)
    return 100 * float(np.mean(anisotropic))


def anisotropy_threshold(pixels: int, significance: float = 0.001) -> float:
    r"""The coherence that white noise exceeds with a probability of ``significance`` only.

    .. math:: \tau = \sqrt{\frac{1 - \delta^{1/(n-1)}}{1 + \delta^{1/(n-1)}}}

    for :math:`n` independent gradients of Gaussian noise [1]_. Those of neighbouring pixels aren't,
    but with central differences it holds all the same: 0.09 % of patches of pure noise pass.

    Parameters
    ----------
    pixels
        :math:`n`, the pixels of a patch, at least 2.
    significance
        :math:`\delta`, above 0 and below 1.

    Returns
    -------
    Above 0 and below 1.

    Raises
    ------
    InvalidSettingError
        if a parameter is out of its range.

    References
    ----------
    .. [1] X. Zhu, P. Milanfar, "Automatic parameter selection for denoising algorithms using a
       no-reference measure of image content", IEEE Trans. Image Process. 19 (2010), 3116-3132.

    Examples
    --------
    >>> round(anisotropy_threshold(64), 4)
    0.234
    """
    if pixels < 2:
        raise InvalidSettingError(f"A patch must have at least 2 pixels, not {pixels}.")
    if not 0 < significance < 1:
        raise InvalidSettingError(
            f"The significance must be above 0 and below 1, not {significance}."
        )
    root = significance ** (1 / (pixels - 1))
    return math.sqrt((1 - root) / (1 + root))


def _slice(image: ArrayLike, patch_size: int) -> NDArray[np.float64]:
    if patch_size < 2:
        raise InvalidSettingError(f"A patch must be at least 2 pixels wide, not {patch_size}.")
    u = _checked("image", image)
    if u.ndim != 2 or min(u.shape) < patch_size:
        raise InvalidImageError(
            f"Patches of {patch_size} x {patch_size} pixels need a slice of at least that size, "
            f"not the shape {u.shape}."
        )
    return u


def _patches(u: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """``(h, w)`` to ``(n, size, size)``, without what is left over at the right and below."""
    rows, columns = (n // size for n in u.shape)
    blocks = u[: rows * size, : columns * size].reshape(rows, size, columns, size)
    patches: NDArray[np.float64] = blocks.swapaxes(1, 2).reshape(-1, size, size)
    return patches


def _rounding(patches: NDArray[np.float64]) -> NDArray[np.float64]:
    """Singular values, one a patch, that may stem from rounding alone."""
    largest: NDArray[np.float64] = np.abs(patches).max(axis=(-2, -1))
    rounding: NDArray[np.float64] = np.finfo(np.float64).eps * patches.shape[-1] * largest
    return rounding


def _coherence(
    gy: NDArray[np.float64], gx: NDArray[np.float64], smallest: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First singular value and coherence of each patch's gradients; 0 where there is no gradient.

    One Jacobi rotation makes the two columns of a matrix orthogonal, and then their lengths are its
    singular values. That is as exact as a decomposition, several times as fast, and unlike the
    eigenvalues of the 2 x 2 matrix of products it keeps a second value that is nearly 0.

    Parameters
    ----------
    gy, gx
        ``(n, size, size)``
    smallest
        ``(n,)``; up to here a first singular value is none.
    """
    y, x = gy.reshape(len(gy), -1), gx.reshape(len(gx), -1)
    yy, xx, xy = (np.einsum("np,np->n", *pair) for pair in ((y, y), (x, x), (x, y)))
    angle = np.arctan2(2 * xy, xx - yy)[:, None] / 2
    cosine, sine = np.cos(angle), np.sin(angle)
    s1 = np.linalg.norm(cosine * x + sine * y, axis=1)
    s2 = np.linalg.norm(cosine * y - sine * x, axis=1)
    return s1, (s1 - s2) / np.where(s1 > smallest, s1 + s2, np.inf)


def autocorrelation(residual: ArrayLike, *, reach: int = 5) -> NDArray[np.float64]:
    r"""How alike a residual is to itself, shifted: structure in it shows away from the centre.

    .. math:: \rho(d) = \frac{\operatorname{mean}_i\big(r_i\, r_{i+d}\big)}
              {\operatorname{mean}_i\big(r_i^2\big)}

    of the residual less its mean, over the pairs of pixels that lie in the slice.

    Parameters
    ----------
    residual
        ``(h, w)``, both sides above ``reach``, in any unit. NaN and infinite pixels take no part.
    reach
        Longest shift along either axis, in pixels, at least 1.

    Returns
    -------
    ``(2 reach + 1, 2 reach + 1)``, symmetric about its centre, where it is 1; all 0 otherwise where
    the residual is constant. White noise gives about 0 everywhere else.

    Raises
    ------
    InvalidImageError
        if the residual is no slice of that size or holds no number.
    InvalidSettingError
        if ``reach`` is below 1.

    Examples
    --------
    Stripes of one pixel: neighbours across them are opposite, those along them equal.

    >>> stripes = np.where(np.arange(16) % 2, 1.0, -1.0) * np.ones((16, 1))
    >>> autocorrelation(stripes, reach=1)[1]
    array([-1.,  1., -1.])
    """
    if reach < 1:
        raise InvalidSettingError(f"The longest shift must be at least 1 pixel, not {reach}.")
    r = np.asarray(residual, dtype=np.float64)
    if r.ndim != 2 or min(r.shape) <= reach:
        raise InvalidImageError(
            f"Shifts of {reach} pixels need a slice of more than that, not the shape {r.shape}."
        )
    valid = np.isfinite(r)
    if not valid.any():
        raise InvalidImageError("The residual holds no number: every pixel is NaN or infinite.")
    r = np.where(valid, r - r[valid].mean(), 0.0)
    found = np.zeros((2 * reach + 1, 2 * reach + 1))
    found[reach, reach] = 1.0
    power = float(np.mean(r[valid] ** 2))
    if power <= np.finfo(np.float64).tiny:
        return found
    h, w = r.shape
    for dy in range(reach + 1):
        for dx in range(-reach if dy else 1, reach + 1):
            start = np.s_[: h - dy, max(0, -dx) : w - max(0, dx)]
            end = np.s_[dy:, max(0, dx) : w + min(0, dx)]
            pairs = max(1, int(np.count_nonzero(valid[start] & valid[end])))
            value = float(np.vdot(r[start], r[end])) / pairs / power
            found[reach + dy, reach + dx] = found[reach - dy, reach - dx] = value
    return found


def largest_autocorrelation(found: NDArray[np.float64]) -> float:
    """The largest absolute value of an `autocorrelation` away from its centre, from 0."""
    away = np.abs(found)
    away[tuple(size // 2 for size in found.shape)] = 0
    return float(away.max())


def white_noise_autocorrelation(pixels: int, *, reach: int = 5) -> float:
    r"""What `largest_autocorrelation` is of white noise, in half of all cases at most.

    Each of the :math:`m = \big((2\,\mathrm{reach} + 1)^2 - 1\big)/2` different shifts has an
    autocorrelation of standard deviation :math:`1/\sqrt{n}`, so the median of the largest is

    .. math:: \frac{1}{\sqrt{n}}\, \Phi^{-1}\!\left(\frac{1 + 2^{-1/m}}{2}\right).

    Parameters
    ----------
    pixels
        :math:`n`, of the residual, at least 1.
    reach
        As of `autocorrelation`.
    """
    shifts = ((2 * reach + 1) ** 2 - 1) // 2
    all_below: float = 0.5 ** (1 / shifts)
    return NormalDist().inv_cdf((1 + all_below) / 2) / math.sqrt(max(1, pixels))


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
