"""Layers that the learned diffusivities share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad


def contrast_convolution(v: Tensor, kernels: Tensor, valid: Tensor | None) -> Tensor:
    r"""Convolve an image with kernels that see contrasts only, never the brightness itself.

    .. math:: x_i = \sum_d k_d\, m_{i+d}\, (v_{i+d} - v_i), \qquad
              k \leftarrow k - \operatorname{mean}(k)

    with ``m`` 1 at valid pixels and 0 elsewhere. Adding a constant to the image changes nothing, so
    that no model needs the mean of a plane, which a tile doesn't know. The border is continued by
    its outermost pixels.

    Parameters
    ----------
    v
        ``(b, 1, h, w)``, stabilised intensities.
    kernels
        ``(n, 1, rows, columns)``, centred on the pixel; along an axis where a kernel is even, half
        a pixel further, which is the middle of the edge to the next pixel.
    valid
        ``(b, 1, h, w)`` of 0 and 1: pixels of 0 have no say. ``None``: all are valid.

    Returns
    -------
    ``(b, n, h, w)``
    """
    rows, columns = kernels.shape[-2:]
    border = [(columns - 1) // 2, columns // 2, (rows - 1) // 2, rows // 2]
    kernels = kernels - kernels.mean((2, 3), keepdim=True)
    if valid is None:
        return conv2d(pad(v, border, mode="replicate"), kernels)
    m = pad(valid, border, mode="replicate")
    return conv2d(pad(v, border, mode="replicate") * m, kernels) - v * conv2d(m, kernels)


def derivative_kernels(n: int, rows: int, columns: int) -> Tensor:
    """Kernels to begin with, derivatives of Gaussians of norm 1: ``(n, 1, rows, columns)``.

    First and second ones, in four directions, at growing scales, each with both signs: a rectifier
    or a decreasing function can then tell light details from dark ones.
    """
    y, x = torch.meshgrid(
        torch.arange(rows) - (rows - 1) / 2,
        torch.arange(columns) - (columns - 1) / 2,
        indexing="ij",
    )
    kernels = []
    for pair in range((n + 1) // 2):
        angle = math.pi * (pair % 4) / 4
        scale = 0.7 + 0.3 * (pair // 8)
        t = (x * math.cos(angle) + y * math.sin(angle)) / scale
        window = torch.exp(-(x**2 + y**2) / (2 * scale**2))
        kernel = (t if pair // 4 % 2 == 0 else t**2 - 1) * window
        kernel = kernel - kernel.mean()
        kernel = kernel / kernel.norm()
        kernels += [kernel, -kernel]
    return torch.stack(kernels[:n]).unsqueeze(1)
