r"""The classical diffusivity of Perona and Malik, evaluated edge by edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from napari_learned_diffusion.config import DiffusionConfig, Function
from napari_learned_diffusion.core.diffusivity.base import Diffusivity, Suggestion
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.operators import Stencil, gradient
from napari_learned_diffusion.core.presmoothing import kernel_radius, presmooth


def _rational(x: Tensor) -> Tensor:
    return 1 / (1 + x)


def _exponential(x: Tensor) -> Tensor:
    return torch.exp(-x)


FUNCTIONS: dict[Function, Callable[[Tensor], Tensor]] = {
    "rational": _rational,
    "exponential": _exponential,
}
"""The diffusivity as a function of s/K²."""


def ellipticity(x: Tensor, function: Function) -> Tensor:
    r"""How diffusion acts across an edge: forward where this is positive, backward below 0.

    .. math:: b(s) = a(s) + 2 s\, a'(s)

    Parameters
    ----------
    x
        :math:`s/K^2`, squared gradients in units of the squared contrast parameter, of any shape.
    function
        Which :math:`a`.

    Returns
    -------
    :math:`b`, of the same shape, without unit.
    """
    with torch.enable_grad():
        t = x.detach().clone().requires_grad_()
        a = FUNCTIONS[function](t)
        (slope,) = torch.autograd.grad(a.sum(), t)
    return (a + 2 * t * slope).detach()


class PeronaMalik(Diffusivity):
    r"""Conducts well within regions and badly across edges [1]_.

    .. math:: g_{ij} = a\!\left(\left(\frac{v_j - v_i}{h_{ij}}\right)^2\right), \qquad
              a(s) = \frac{1}{1 + s/K^2} \quad\text{or}\quad a(s) = e^{-s/K^2}

    on the stabilised image, smoothed beforehand by a Gaussian of ``presmooth_sigma`` [2]_.

    Parameters
    ----------
    contrast
        K, in standard deviations of the noise (per pixel), > 0: stronger gradients are edges.
    function
        ``"rational"`` favours wide regions, ``"exponential"`` edges of high contrast.
    presmooth_sigma
        In pixels, at least 0; 0 is none.

    Raises
    ------
    InvalidSettingError
        if a parameter is out of its range.

    References
    ----------
    .. [1] P. Perona, J. Malik, "Scale-space and edge detection using anisotropic diffusion",
       IEEE Trans. Pattern Anal. Mach. Intell. 12 (1990), 629-639.
    .. [2] F. Catté, P.-L. Lions, J.-M. Morel, T. Coll, "Image selective smoothing and edge
       detection by nonlinear diffusion", SIAM J. Numer. Anal. 29 (1992), 182-193.
    """

    key = "perona-malik"
    whole_steps_on_cpu = True

    def __init__(
        self, contrast: float, function: Function = "rational", presmooth_sigma: float = 0.0
    ) -> None:
        super().__init__()
        if not (math.isfinite(contrast) and contrast > 0):
            raise InvalidSettingError(
                f"The contrast parameter K must be a finite number above 0, not {contrast}."
            )
        if not (math.isfinite(presmooth_sigma) and presmooth_sigma >= 0):
            raise InvalidSettingError(
                f"Presmoothing must be a number of pixels of at least 0, not {presmooth_sigma}."
            )
        if function not in FUNCTIONS:
            raise InvalidSettingError(
                f"There is no diffusivity {function!r}. Choose one of: {', '.join(FUNCTIONS)}."
            )
        self.contrast = contrast
        self.function = function
        self.presmooth_sigma = presmooth_sigma

    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        return self.of_smoothed(presmooth(v, self.presmooth_sigma, stencil.spacing, valid), stencil)

    def of_smoothed(self, seen: Tensor, stencil: Stencil) -> Tensor:
        """Conductances, ``(b, edges, h, w)``, of a stabilised image that has been presmoothed."""
        return FUNCTIONS[self.function]((gradient(seen, stencil) / self.contrast) ** 2)

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        if config.contrast is None or config.presmooth_sigma is None:
            raise InvalidSettingError("perona-malik needs a contrast parameter K and presmoothing.")
        return cls(config.contrast, config.function, config.presmooth_sigma)

    @classmethod
    def suggest(cls, v: NDArray[np.floating[Any]], model: str = "") -> Suggestion:
        r"""Settings from the roughness of the image, by power laws tuned on natural images.

        With the roughness :math:`r` of `roughness`, :math:`K = k_0 r^{k_1}` and the stopping time
        :math:`T = t_0 r^{t_1}`: the smoother the image is under its noise, the longer and the more
        cautiously it diffuses. The numbers and where they were tuned are in the model's card.
        """
        from napari_learned_diffusion.core.zoo import card  # the cards import this package

        tuned = card(cls.key).details["suggestion"]
        r = float(np.clip(roughness(v), *tuned["roughness_range"]))
        k0, k1 = tuned["contrast"]
        t0, t1 = tuned["stopping_time"]
        p0, p1 = tuned["presmooth_sigma"]
        return Suggestion(
            stopping_time=t0 * r**t1,
            tau=tuned["tau"],
            contrast=k0 * r**k1,
            presmooth_sigma=float(np.clip(p0 + p1 * math.log(r), *tuned["presmooth_sigma_range"])),
        )

    @property
    def working_maps(self) -> int:
        return 28

    @property
    def reach(self) -> int:
        return kernel_radius(self.presmooth_sigma)


def roughness(v: NDArray[np.floating[Any]]) -> float:
    r"""How much the image itself adds to the differences that the noise makes, where it shows any.

    .. math:: r = \frac{q_{75}\left((v_j - v_i)^2\right)}{2\,\chi^2_{1;\,0.75}} - 1

    over all neighbours in blocks of 32 by 32 pixels whose variance is clearly above the noise's: 0
    for pure noise, large for an image whose details tower above its noise. The quantile, other than
    the mean, isn't carried away by a few strong edges; and empty background, however large, can't
    speak for the object in it. Exactly constant areas (clipped air, stripped skull) hold no noise
    and are left out.

    Parameters
    ----------
    v
        ``(n, h, w)``, stabilised intensities, NaN where a pixel isn't valid.

    Returns
    -------
    At least 0, without unit; 0 where there is no structure, or no two neighbours to compare.
    """
    looked_at = _structured(v) & ~_constant(v)
    along_y = np.diff(v, axis=-2)[looked_at[:, :-1]]
    along_x = np.diff(v, axis=-1)[looked_at[:, :, :-1]]
    squares = np.concatenate([along_y, along_x]) ** 2
    squares = squares[np.isfinite(squares)]
    if squares.size == 0:
        return 0.0
    return max(0.0, float(np.quantile(squares, 0.75)) / _NOISE_QUANTILE - 1)


_NOISE_QUANTILE = 2 * 1.3233036969314664
"""75th percentile of a squared difference of two pixels of pure noise: 2 times chi-squared's."""

_BLOCK = 32
_STRUCTURE = 1.6
"""Variance above which a block shows more than noise, which has 1: ten standard errors above."""


def _structured(v: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Pixels of the blocks whose variance says that the image shows something there."""
    valid = np.isfinite(v)
    filled = np.where(valid, v, 0)
    starts = [np.arange(0, size, _BLOCK) for size in v.shape[1:]]

    def block_sums(values: NDArray[Any]) -> NDArray[np.float64]:
        over_rows = np.add.reduceat(values, starts[0], axis=1, dtype=np.float64)
        return np.asarray(np.add.reduceat(over_rows, starts[1], axis=2))

    count = np.maximum(block_sums(valid), 1)
    variance = block_sums(filled**2) / count - (block_sums(filled) / count) ** 2
    blocks = variance > _STRUCTURE
    per_pixel = blocks.repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)
    return np.asarray(per_pixel[:, : v.shape[1], : v.shape[2]])


def _constant(v: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Pixels whose neighbourhood of 3 by 3 has one value only."""
    size = (1, 3, 3)
    same: NDArray[np.bool_] = ndimage.maximum_filter(v, size) == ndimage.minimum_filter(v, size)
    return same
