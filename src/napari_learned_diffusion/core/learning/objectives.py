r"""What a fine-tuning minimises: from patches to pairs of what goes in and what should come out.

With a noisy image :math:`y`, the denoiser :math:`f` and noise of covariance :math:`\Sigma`:

- *supervised*: :math:`\lVert f(y) - u^*\rVert^2` for a clean image :math:`u^*`, given, or made
  noisy here;
- *Noise2Noise* [1]_: :math:`\lVert f(y) - y'\rVert^2` for a second noisy image :math:`y'` of the
  same;
- *Recorrupted2Recorrupted* [2]_: :math:`\lVert f(y + \alpha z) - (y - z/\alpha)\rVert^2` with
  :math:`z \sim \mathcal N(0, \Sigma)`. Both halves have independent noise, so it has the gradient
  of the supervised loss at noise that is :math:`\sqrt{1 + \alpha^2}` times as strong;
- *SURE* [3]_, an estimate of the supervised loss that needs no clean image, with a Monte-Carlo
  divergence [4]_,

  .. math:: \frac1n \Big( \lVert f(y) - y\rVert^2 - \operatorname{tr}\Sigma
            + \frac2\varepsilon\, b^T \big(f(y + \varepsilon b) - f(y)\big) \Big),
            \quad b \sim \mathcal N(0, \Sigma).

References
----------
.. [1] J. Lehtinen et al., "Noise2Noise: learning image restoration without clean data", ICML
   (2018).
.. [2] T. Pang, H. Zheng, Y. Quan, H. Ji, "Recorrupted-to-Recorrupted: unsupervised deep learning
   for image denoising", CVPR (2021).
.. [3] C. M. Stein, "Estimation of the mean of a multivariate normal distribution", Ann. Statist. 9
   (1981), 1135-1151.
.. [4] S. Ramani, T. Blu, M. Unser, "Monte-Carlo SURE", IEEE Trans. Image Process. 17 (2008),
   1540-1554.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_learned_diffusion.core.noise import Correlated, NoiseModel
from napari_learned_diffusion.core.noise_spectrum import coloured

RECORRUPTION = 0.5
r"""The :math:`\alpha` of Recorrupted2Recorrupted."""

PROBE = 0.02
r"""The :math:`\varepsilon` of SURE, in standard deviations of the noise."""

Image = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class NoiseSource:
    """Noise to draw from.

    Parameters
    ----------
    model
        How strong it is.
    spectrum
        How it is correlated, see `core.noise_spectrum.FlatSpectrum`; ``None``: as the model says.
    """

    model: NoiseModel
    spectrum: NDArray[np.float64] | None = None

    def draw(self, clean: Image, rng: np.random.Generator) -> NDArray[np.float64]:
        """Noise of mean 0 as an image of true intensities ``clean``, ``(h, w)``, would have it."""
        if self.spectrum is not None:
            unit = coloured(rng.normal(size=clean.shape), self.spectrum)
        elif isinstance(self.model, Correlated):
            unit = Correlated(1.0, self.model.correlation_length).add(np.zeros(clean.shape), rng)
        else:
            unit = rng.normal(size=clean.shape)
        return np.asarray(unit * np.sqrt(self.model.variance(clean.astype(np.float64))))

    def add(self, clean: Image, rng: np.random.Generator) -> NDArray[np.float64]:
        """A noisy copy of a clean image ``(h, w)``."""
        if self.spectrum is None:
            return self.model.add(clean, rng)
        return clean + self.draw(clean, rng)


def recorrupted(
    noisy: Image, estimate: Image, source: NoiseSource, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""What goes in, with :math:`1 + \alpha^2` times the variance, and what should come out.

    Parameters
    ----------
    noisy
        ``(h, w)``.
    estimate
        About the true intensities, which the strength of the noise may depend on.
    """
    z = source.draw(estimate, rng)
    return noisy + RECORRUPTION * z, noisy - z / RECORRUPTION


def squared_error(u: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error over the pixels of ``weight``, for each image of ``(b, 1, h, w)``."""
    axes = (1, 2, 3)
    return ((u - target).square() * weight).sum(axes) / weight.sum(axes).clamp(min=1)


def sure(
    denoise: Callable[[Tensor], Tensor],
    noisy: Tensor,
    probe: Tensor,
    variance: Tensor,
    weight: Tensor,
) -> tuple[float, float]:
    """Stein's unbiased estimate of the mean squared error over the pixels of ``weight``.

    Beside the estimate, what of it is in proportion to the noise's variance: if that is wrong by
    some percent, the estimate is wrong by as many percent of this.

    Parameters
    ----------
    denoise
        From a noisy image to the denoised one.
    noisy
        ``(1, 1, h, w)``.
    probe
        Noise like that of the image, drawn anew.
    variance
        Of the noise of each pixel.
    weight
        1 where pixels count, else 0.
    """
    u = denoise(noisy)
    moved = denoise(noisy + PROBE * probe)
    divergence = probe.double() * (moved.double() - u.double()) / PROBE
    residual = (u.double() - noisy.double()).square()
    of_noise = 2 * divergence - variance.double()
    weights = weight.double()
    pixels = weights.sum().clamp(min=1)
    in_proportion = float((of_noise * weights).sum() / pixels)
    return float((residual * weights).sum() / pixels) + in_proportion, in_proportion


def as_batch(images: Sequence[Image | Mask], device: torch.device) -> Tensor:
    """Images of one shape as ``(b, 1, h, w)`` in single precision."""
    stacked = np.ascontiguousarray(np.stack(images), dtype=np.float32)
    return torch.from_numpy(stacked)[:, None].to(device)
