"""What a model has learned, as curves and histograms to be shown. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import Function


@dataclass(frozen=True, eq=False)
class Curve:
    r"""The diffusivity as a function of the gradient, and the gradients that there are.

    Parameters
    ----------
    contrast
        K, in standard deviations of the noise per pixel, as all gradients here.
    function
        Which :math:`a`.
    gradient
        ``(points,)``, from 0.
    diffusivity
        ``(points,)``, :math:`a(s)` of the squared gradient s.
    ellipticity
        ``(points,)``, :math:`b(s) = a(s) + 2 s a'(s)`: below 0 diffusion is backward.
    turning_point
        The gradient where b changes its sign.
    bins
        ``(bins + 1,)``, ends of the bins of gradients.
    counts
        ``(steps, bins)``, edges of the slice by their gradient before each step, presmoothed as the
        diffusivity sees it; stronger ones than the last bin's aren't counted.
    backward
        ``(steps,)``, part of the edges across which diffusion is backward, from 0 to 1.
    """

    contrast: float
    function: Function
    gradient: NDArray[np.float64]
    diffusivity: NDArray[np.float64]
    ellipticity: NDArray[np.float64]
    turning_point: float
    bins: NDArray[np.float64]
    counts: NDArray[np.int64]
    backward: NDArray[np.float64]

    def gradient_of(self, conductance: float) -> float:
        """The gradient of an edge that conducts so well; the strongest shown for less."""
        return float(np.interp(conductance, self.diffusivity[::-1], self.gradient[::-1]))


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts that vary most on the slice, of those whose kernels aren't much alike.

    Parameters
    ----------
    kernels
        ``(experts, rows, columns)`` of mean 0, for the edges along a row.
    answers
        ``(points,)``, answers of a kernel in standard deviations of the noise.
    functions
        ``(experts, points)``, what each adds to the logarithm of the conductance, less what it adds
        at 0.
    """

    kernels: NDArray[np.float64]
    answers: NDArray[np.float64]
    functions: NDArray[np.float64]

    def answers_at(self, v: NDArray[Any], pixel: tuple[int, int]) -> NDArray[np.float64]:
        """What each kernel says of the edge to the right of a pixel.

        Parameters
        ----------
        v
            ``(h, w)``, stabilised; NaN and infinite pixels have no say.
        pixel
            Row and column.
        """
        rows, columns = (
            np.clip(np.arange(n) - (n - 1) // 2 + at, 0, size - 1)
            for n, at, size in zip(self.kernels.shape[1:], pixel, v.shape, strict=True)
        )
        seen = np.asarray(v[np.ix_(rows, columns)], np.float64) - float(v[pixel])
        return np.asarray(
            np.einsum("erc,rc->e", self.kernels, np.where(np.isfinite(seen), seen, 0))
        )


@dataclass(frozen=True, eq=False)
class Scatter:
    """How diffusivity goes with the gradient around a pixel, where no single curve tells it.

    Parameters
    ----------
    gradient_bins
        ``(columns + 1,)``, in standard deviations of the noise per pixel.
    diffusivity_bins
        ``(steps, rows + 1)``, without unit.
    counts
        ``(steps, rows, columns)``, pixels of the slice.
    """

    gradient_bins: NDArray[np.float64]
    diffusivity_bins: NDArray[np.float64]
    counts: NDArray[np.int64]


Learned = Curve | Experts | Scatter
