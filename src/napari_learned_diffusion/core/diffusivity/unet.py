"""A small U-Net that looks at the image before every step and says where to diffuse."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad, relu

from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.layers import (
    contrast_convolution,
    derivative_kernels,
)
from napari_learned_diffusion.core.operators import Stencil


class UNet(LearnedDiffusivity):
    r"""The conductances are the output of an encoder and decoder (U-Net of [1]_).

    .. math:: g(v) = e^{\vartheta_n}\, \sigma(\mathrm{net}(v)), \qquad \sigma(x) = 1/(1 + e^{-x})

    The paper's network has one output channel, a map on pixels; averaged to the edges, its lines
    are two pixels wide. This one has two, for the edges along columns and along rows. Three levels
    of three convolutions each on the way down, two on each level on the way up. In place of the
    paper's standardisation the first kernels see contrasts only, and there is no batch
    normalisation: what an edge gets depends on its surroundings alone.

    Parameters
    ----------
    width
        Channels at full resolution; the levels below have two and three times as many.
    iterations
        Number of iterations with a time step :math:`\vartheta_n` of their own.

    References
    ----------
    .. [1] J. Valdivia Ortega, M. Haas, A. Effland, "Learning diffusion functions for image
       restoration", HAL hal-04573661 (2024).
    """

    key = "unet"
    title = "U-Net"
    summary = (
        "A small neural network looks at the image before every step and says where to diffuse."
    )
    reference = (
        "J. Valdivia Ortega, M. Haas, A. Effland, Learning diffusion functions for image "
        "restoration, HAL hal-04573661 (2024)"
    )
    last_layers = ("log_steps", "merge_fine", "head")

    def __init__(self, width: int = 8, iterations: int = 8) -> None:
        super().__init__(width=width, iterations=iterations)
        a, b, c = width, 2 * width, 3 * width
        self.kernels = nn.Parameter(derivative_kernels(a, 5, 5))
        self.bias = nn.Parameter(torch.zeros(a, 1, 1))
        self.fine = _block(a, a, a)
        self.middle = _block(a, b, b, b)
        self.coarse = _block(b, c, c, c)
        self.merge_middle = _block(c + b, b, b)
        self.merge_fine = _block(b + a, a, a)
        self.head = nn.Conv2d(a, 2, 1)
        self.log_steps = nn.Parameter(torch.zeros(iterations))

    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        h, w = v.shape[-2:]
        v = _to_multiple(v, self.alignment)
        if valid is None:
            fine = relu(contrast_convolution(v, self.kernels, None) + self.bias)
        else:
            valid = _to_multiple(valid, self.alignment)
            fine = relu(contrast_convolution(v, self.kernels, valid) + self.bias) * valid
        fine = self.fine(fine)
        middle = self.middle(avg_pool2d(fine, 2))
        coarse = self.coarse(avg_pool2d(middle, 2))
        middle = self.merge_middle(torch.cat([_double(coarse), middle], dim=1))
        fine = self.merge_fine(torch.cat([_double(middle), fine], dim=1))
        log_step = self.log_steps[min(step, len(self.log_steps) - 1)]
        return log_step.exp() * torch.sigmoid(self.head(fine))[..., :h, :w]

    @property
    def alignment(self) -> int:
        return 4

    @property
    def reach(self) -> int:
        # From a pixel back: 2 convolutions, pooled to 1/2, 2 there, pooled to 1/4, 3 there; then 3
        # at 1/2 and 4 pixels at full resolution. From the worst place in a cell of 4 these are 31.
        return 31

    @property
    def working_maps(self) -> int:
        return 13 * self.kernels.shape[0] + 16  # measured on 1024²: 121 with 8 kernels


def _block(*channels: int) -> nn.Sequential:
    """3×3 convolutions from each number of channels to the next, with a ReLU after each."""
    layers: list[nn.Module] = []
    for i, o in pairwise(channels):
        convolution = nn.Conv2d(i, o, 3, padding=1, padding_mode="replicate")
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)


def _double(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2, mode="nearest")


def _to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Continue an image by its last row and column until its size is a multiple."""
    h, w = x.shape[-2:]
    return pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")
