r"""A network that looks at windows of an image and says what their noise is.

Of every cell of 16×16 pixels it answers three things: the standard deviation of the noise, how sure
it is of that, and the noise's autocorrelation at the `LAGS`. It sees each window in units of the
window's own fine contrast, so that its answers follow any change of unit exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from napari_learned_diffusion.core.trainable import Trainable

WINDOW = 96
"""Edge length of a window, in pixels."""
CELL = 16
"""Edge length of a cell, in pixels, for which there is one answer."""

N_LAGS = 14
"""Number of `core.learning.acquisitions.LAGS`."""

LEAST = -4.0
"""Logarithm of the least noise level that is told, in units of a window's contrast."""


class NoiseNetwork(Trainable):
    """Residual convolutions at 1/2 to 1/16 of the resolution.

    Pooling takes the mean and the root-mean-square: how strong a filter responds is what tells
    noise. Missing pixels are told by a mask.

    Parameters
    ----------
    widths
        Channels at 1/2, 1/4, 1/8 and 1/16 of the resolution.
    blocks
        Convolutions at each of them.
    """

    key = "noise"
    stored_in_half = True
    outer_layers = ("stem", "out")

    def __init__(
        self,
        widths: Sequence[int] = (32, 48, 64, 80),
        blocks: Sequence[int] = (3, 3, 3, 3),
    ) -> None:
        super().__init__(widths=list(widths), blocks=list(blocks))
        self.stem = nn.Conv2d(8, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(number))
            for width, number in zip(widths, blocks, strict=True)
        )
        self.down = nn.ModuleList(
            nn.Conv2d(2 * fine, coarse, 1) for fine, coarse in itertools.pairwise(widths)
        )
        self.window = nn.Linear(2 * widths[-1], widths[-1])
        self.out = nn.Conv2d(widths[-1], 2 + N_LAGS, 1)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tell the noise of some windows.

        Parameters
        ----------
        windows
            ``(n, 1, h, w)`` in layer units, h and w multiples of `CELL`; NaN where pixels are
            missing.

        Returns
        -------
        tuple of tensors
            ``(n, 1, h / CELL, w / CELL)``, logarithm of the noise level in layer units; the same
            shape, logarithm of the variance of that; ``(n, N_LAGS, h / CELL, w / CELL)``, the
            autocorrelation.
        """
        valid = windows.isfinite()
        mean, contrast = _scale(windows, valid)
        seen = torch.asinh((windows.where(valid, mean) - mean) / contrast / 2) * 2
        both = torch.cat([seen, 1 - valid.to(seen.dtype)], dim=1)
        h = functional.relu(self.stem(functional.pixel_unshuffle(both, 2)))
        for number, level in enumerate(self.levels):
            if number:
                h = functional.relu(self.down[number - 1](_pooled(h)))
            for convolution in level:  # type: ignore[attr-defined]
                h = functional.relu(h + convolution(h))
        whole = torch.cat([h.mean((2, 3)), (h.square().mean((2, 3)) + 1e-6).sqrt()], dim=1)
        h = functional.relu(h + self.window(whole)[:, :, None, None])
        out = self.out(h)
        level = out[:, :1] + contrast.log()
        return level, out[:, 1:2].clamp(-7, 3), torch.tanh(out[:, 2:])


def least_level(windows: Tensor) -> Tensor:
    """Logarithm of the least level that is told of each window, ``(n, 1, 1, 1)``, in layer units.

    Noise below it can't be seen, and as much is answered where there is none.
    """
    return _scale(windows, windows.isfinite())[1].log() + LEAST


def _scale(windows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and fine contrast ``(n, 1, 1, 1)`` of the pixels that are there."""
    count = valid.sum((2, 3), keepdim=True).clamp(min=1)
    known = windows.where(valid, 0.0)
    mean = known.sum((2, 3), keepdim=True) / count
    square = ((known - mean).square() * valid).sum((2, 3), keepdim=True) / count
    diagonal = known[..., 1:, 1:] - known[..., :-1, 1:] - known[..., 1:, :-1] + known[..., :-1, :-1]
    whole = valid[..., 1:, 1:] & valid[..., :-1, 1:] & valid[..., 1:, :-1] & valid[..., :-1, :-1]
    fine = (diagonal.square() * whole).sum((2, 3), keepdim=True) / whole.sum(
        (2, 3), keepdim=True
    ).clamp(min=1)
    return mean, fine.sqrt() / 2 + 0.05 * square.sqrt() + 1e-12


def _pooled(h: Tensor) -> Tensor:
    root_mean_square = (functional.avg_pool2d(h.square(), 2) + 1e-6).sqrt()
    return torch.cat([functional.avg_pool2d(h, 2), root_mean_square], dim=1)
