r"""Fields of experts: diffusivities of many learned contrasts instead of the gradient alone.

Every model of this file is

.. math:: g_e = \exp\Big(\vartheta_n + \sum_i \varphi_i\big((K_i v)_e\big)\Big)

with learned kernels :math:`K_i` and, for each, a learned function :math:`\varphi_i` of its answer;
they differ in the family that the :math:`\varphi_i` are from [1]_.

The diffusivity is needed where the flux is, in the middle of an edge between two pixels, and so
that is where the kernels are centred: with an even number of pixels along the edge and an odd one
across it, and turned by exchanging the axes from edges along a row to edges along a column. A map
on pixels that is averaged to the edges afterwards blurs its lines over two pixels.

The learned factor :math:`e^{\vartheta_n}` makes the time step of iteration ``n`` longer or shorter;
iterations beyond those that a model was trained for go on with the last one.

References
----------
.. [1] J. Valdivia Ortega, M. Haas, A. Effland, "Learning diffusion functions for image
   restoration", HAL hal-04573661 (2024).
.. [2] S. Roth, M. J. Black, "Fields of experts", Int. J. Comput. Vis. 82 (2009), 205-229.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, softplus

from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.layers import (
    contrast_convolution,
    derivative_kernels,
)
from napari_learned_diffusion.core.operators import Stencil

LARGEST_EXPONENT = 30.0
"""Beyond it the limiter decides alone, and single precision would overflow."""

STRIP_ELEMENTS = 1 << 18
"""How many answers of experts are turned into exponents at once: five times as fast as all."""


class FieldsOfExperts(LearnedDiffusivity):
    """What the families share: kernels, time steps, and how they become conductances.

    Parameters
    ----------
    experts
        Number of kernels.
    size
        Pixels of each kernel across the edge, an odd number; along it there is one more.
    iterations
        Number of iterations with a time step of their own.
    """

    reference = (
        "J. Valdivia Ortega, M. Haas, A. Effland, Learning diffusion functions for image "
        "restoration, HAL hal-04573661 (2024)"
    )
    last_layers = ("log_steps", "spline_values", "drops", "coefficients", "log_alphas")

    def __init__(self, experts: int, size: int, iterations: int) -> None:
        super().__init__(experts=experts, size=size, iterations=iterations)
        self.kernels = nn.Parameter(derivative_kernels(experts, size, size + 1))
        self.log_steps = nn.Parameter(torch.zeros(iterations))

    @abstractmethod
    def exponents(self, x: Tensor) -> Tensor:
        """The sum of all experts' functions, ``(b, experts, h, w)`` to ``(b, 1, h, w)``."""

    def functions(self, x: Tensor) -> Tensor:
        r"""Each expert's function less its value at 0, :math:`\varphi_i(x) - \varphi_i(0)`.

        What the model adds up is told apart by letting one expert answer at a time.

        Parameters
        ----------
        x
            ``(points,)``, answers of a kernel.

        Returns
        -------
        ``(experts, points)``
        """
        n = self.kernels.shape[0]
        answers = x.new_zeros(n, n, 1, len(x))
        answers[range(n), range(n), 0] = x
        return (self.exponents(answers) - self.exponents(x.new_zeros(1, n, 1, 1)))[:, 0, 0]

    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        log_step = self.log_steps[min(step, len(self.log_steps) - 1)]
        exponents = [
            self._in_strips(contrast_convolution(v, kernels, valid))
            for kernels in (self.kernels.transpose(2, 3), self.kernels)
        ]
        return (torch.cat(exponents, dim=1) + log_step).clamp(max=LARGEST_EXPONENT).exp()

    def _in_strips(self, x: Tensor) -> Tensor:
        """The exponents, a few rows at a time so that what is in between stays in the cache."""
        rows = max(1, STRIP_ELEMENTS * x.shape[-2] // x.numel())
        return torch.cat([self.exponents(strip) for strip in torch.split(x, rows, dim=-2)], dim=-2)

    @property
    def reach(self) -> int:
        return self.kernels.shape[-2] // 2

    @property
    def working_maps(self) -> int:
        return 3 * self.kernels.shape[0] + 24


class Splines(FieldsOfExperts):
    r"""Every function is a spline of order 1 on 20 equal pieces of [0, 1] (FoE-S).

    .. math:: \varphi_i(x) = s_i(\sigma(x)), \qquad \sigma(x) = \frac{1}{1 + e^{-x}}

    The sigmoid brings all answers into the interval, finely where they are small.
    """

    key = "foe-splines"
    title = "Fields of experts, splines"
    summary = (
        "Learned filters, each with a learned curve of how much its answer slows the diffusion."
    )
    pieces = 20

    def __init__(self, experts: int = 24, size: int = 5, iterations: int = 8) -> None:
        super().__init__(experts, size, iterations)
        # Less the stronger the contrast, from a little above that of noise on.
        knots = -torch.relu(torch.linspace(0, 1, self.pieces + 1) - 0.6)
        self.spline_values = nn.Parameter((16.0 / experts * knots).repeat(experts, 1))

    def knot_values(self) -> Tensor:
        """Values of the splines at the ends of their pieces, ``(experts, pieces + 1)``."""
        return self.spline_values

    def exponents(self, x: Tensor) -> Tensor:
        return spline_sum(torch.sigmoid(x), self.knot_values())


class DecreasingSplines(Splines):
    r"""Splines that never rise (FoE-D): the stronger a contrast, the less flows.

    .. math:: s_i(k / 20) = s_i(0) - \sum_{l \le k} \operatorname{softplus}(d_{il})
    """

    key = "foe-decreasing"
    title = "Fields of experts, decreasing splines"
    summary = (
        "As the splines, but every curve falls: the stronger a learned contrast, the less diffuses."
    )

    def __init__(self, experts: int = 24, size: int = 5, iterations: int = 8) -> None:
        super().__init__(experts, size, iterations)
        drops = -self.spline_values.detach().diff(dim=1)
        self.spline_values = nn.Parameter(self.spline_values.detach()[:, :1].clone())
        # The inverse of softplus; a drop of 0 has none, so the flat part falls a little.
        self.drops = nn.Parameter(torch.expm1(drops.clamp(min=0.01)).log())

    def knot_values(self) -> Tensor:
        falls = -softplus(self.drops).cumsum(dim=1)
        return self.spline_values + pad(falls, (1, 0))


class Monomials(FieldsOfExperts):
    r"""Function ``i`` is a coefficient times the power ``i`` (FoE-M).

    .. math:: \varphi_i(x) = c_i\, \sigma(x)^i, \qquad i = 1, 2, \dots
    """

    key = "foe-monomials"
    title = "Fields of experts, monomials"
    summary = "Learned filters with the simplest curves, one power each."

    def __init__(self, experts: int = 24, size: int = 5, iterations: int = 8) -> None:
        super().__init__(experts, size, iterations)
        self.coefficients = nn.Parameter(torch.full((experts,), -16.0 / experts))

    def exponents(self, x: Tensor) -> Tensor:
        powers = torch.arange(1, len(self.coefficients) + 1, device=x.device, dtype=x.dtype)
        # As exp(i log sigma(x)): no power of a number close to 0, whose slope would be infinite.
        monomials = (powers.view(1, -1, 1, 1) * logsigmoid(x)).exp()
        return (self.coefficients.view(1, -1, 1, 1) * monomials).sum(dim=1, keepdim=True)


class RothBlack(FieldsOfExperts):
    r"""The experts of Roth and Black [2]_, a product of Student's t-distributions (FoE-RB).

    .. math:: \varphi_i(x) = -\alpha_i \log\left(1 + x^2/2\right), \qquad \alpha_i > 0
    """

    key = "foe-roth-black"
    title = "Fields of experts, Roth and Black"
    summary = "Learned filters with heavy-tailed curves of one number each: a learned Perona–Malik."

    def __init__(self, experts: int = 24, size: int = 5, iterations: int = 8) -> None:
        super().__init__(experts, size, iterations)
        self.log_alphas = nn.Parameter(torch.full((experts,), -math.log(experts / 2)))

    def exponents(self, x: Tensor) -> Tensor:
        alphas = self.log_alphas.exp().view(1, -1, 1, 1)
        return -(alphas * torch.log1p(x.square() / 2)).sum(dim=1, keepdim=True)


def spline_sum(t: Tensor, knot_values: Tensor) -> Tensor:
    r"""The sum of one spline of order 1 per channel, :math:`\sum_i s_i(t_i)`.

    Parameters
    ----------
    t
        ``(b, n, h, w)``, in [0, 1].
    knot_values
        ``(n, pieces + 1)``: values at equally spaced knots from 0 to 1.

    Returns
    -------
    ``(b, 1, h, w)``
    """
    n, pieces = knot_values.shape[0], knot_values.shape[1] - 1
    position = t * pieces
    # From 0 for NaN, too, which has no piece: the result is NaN then, as it should.
    piece = position.detach().to(torch.int32).clamp_(0, pieces - 1)
    first = torch.arange(0, n * pieces, pieces, device=t.device, dtype=torch.int32)
    index = piece.add_(first.view(1, n, 1, 1)).flatten()
    # Each piece as the straight line that it lies on: what is gathered are its two numbers.
    slopes = knot_values.diff(dim=1)
    intercepts = knot_values[:, :-1] - slopes * torch.arange(pieces, device=t.device)
    intercept, slope = (x.flatten().index_select(0, index).view_as(t) for x in (intercepts, slopes))
    return torch.addcmul(intercept, slope, position).sum(dim=1, keepdim=True)
