r"""Content-Noise Complementary Learning (CNCL) [1]_, the comparison of the paper's tables.

Not a diffusion and without its guarantees, so in the benchmarks only. **Not trained here**: two
cores are too slow for it, and there is no row of quality where there are no weights. This module
has the model at its published size, its losses and its training step, and counts its cost:
``python -m benchmarks.cncl``.

One predictor learns the content of a noisy image :math:`y`, another its noise; a fusion weighs the
two estimates of the content,

.. math:: \hat u = w_1 C(y) + w_2 \bigl(y - N(y)\bigr) + b , \qquad \hat n = N(y) ,

and a discriminator :math:`D` judges, patch by patch, whether content and noise go with the image.
With the clean image :math:`u` and :math:`n = y - u`, and both parts weighed equally in the
:math:`L^1` term,

.. math::
   \ell_G &= \lVert D(\hat u, \hat n, y) - 1 \rVert^2
             + 100 \cdot \tfrac12 \bigl(|\hat u - u|_1 + |\hat n - n|_1\bigr) , \\
   \ell_D &= \tfrac12 \lVert D(u, n, y) - 1 \rVert^2
             + \tfrac12 \lVert D(\hat u, \hat n, y) \rVert^2 ,

all norms being means. Where [1]_ leaves something open, the model follows its authors' program.

References
----------
.. [1] M. Geng, X. Meng, J. Yu, et al., "Content-Noise Complementary Learning for Medical Image
   Denoising", IEEE Transactions on Medical Imaging 41 (2), 407-419 (2022).
   https://doi.org/10.1109/TMI.2021.3113365
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from benchmarks.cost import multiply_accumulates

WIDTHS = (64, 128, 256, 512, 1024)
"""Channels of a predictor's levels, from full resolution down."""

DISCRIMINATOR_WIDTHS = (64, 128, 256, 512)

_PIXEL_WEIGHT = 100.0


class Parts(NamedTuple):
    """What a noisy image consists of, two tensors of ``(b, 1, h, w)``."""

    content: Tensor
    noise: Tensor


class Predictor(nn.Module):
    """A U-Net from an image to an image: 3×3 convolutions, batch normalisation, ReLU.

    Parameters
    ----------
    widths
        Channels of the levels, from full resolution down. Edge lengths of the image must be
        multiples of 2 to the number of levels below the first.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        *upper, bottom = widths
        levels = zip([1, *upper], upper, strict=False)
        self.down = nn.ModuleList(_two_convolutions(i, w, w) for i, w in levels)
        self.bottom = _two_convolutions(upper[-1], bottom, upper[-1])
        self.up = nn.ModuleList(
            _two_convolutions(2 * wide, wide, narrow) for narrow, wide in pairwise(upper)
        )
        # The last two convolutions are linear, since noise and standardised content have signs.
        self.head = nn.Sequential(
            nn.Conv2d(2 * upper[0], upper[0] // 2, 3, padding=1),
            nn.Conv2d(upper[0] // 2, 1, 3, padding=1),
        )
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.UpsamplingBilinear2d(scale_factor=2)

    def forward(self, y: Tensor) -> Tensor:
        skipped = []
        for level in self.down:
            y = level(y)
            skipped.append(y)
            y = self.pool(y)
        y = self.upsample(self.bottom(y))
        for level in reversed(self.up):
            y = self.upsample(level(torch.cat([y, skipped.pop()], dim=1)))
        result: Tensor = self.head(torch.cat([y, skipped.pop()], dim=1))
        return result


class Generator(nn.Module):
    """Content and noise of an image, from two predictors and the fusion of their contents.

    Parameters
    ----------
    widths
        Of each `Predictor`.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.content = Predictor(widths)
        self.noise = Predictor(widths)
        self.fusion = nn.Conv2d(2, 1, 1)
        self.apply(_initialise)

    def forward(self, y: Tensor) -> Parts:
        noise = self.noise(y)
        return Parts(self.fusion(torch.cat([self.content(y), y - noise], dim=1)), noise)


class Discriminator(nn.Module):
    """PatchGAN: for each patch, near 1 where content and noise are those of the image.

    Parameters
    ----------
    widths
        Channels of the levels, each of half the resolution of the one before.
    """

    def __init__(self, widths: tuple[int, ...] = DISCRIMINATOR_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [_halve(3, widths[0]), nn.LeakyReLU(0.2)]
        for i, o in pairwise(widths):
            layers += [_halve(i, o), nn.InstanceNorm2d(o), nn.LeakyReLU(0.2)]
        layers += [nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(widths[-1], 1, 4, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, parts: Parts, y: Tensor) -> Tensor:
        verdict: Tensor = self.layers(torch.cat([*parts, y], dim=1))
        return verdict


def generator_loss(found: Parts, true: Parts, verdict: Tensor) -> Tensor:
    """What the generator minimises; ``verdict`` is the discriminator's on what was found."""
    pixels = (l1_loss(found.content, true.content) + l1_loss(found.noise, true.noise)) / 2
    return mse_loss(verdict, torch.ones_like(verdict)) + _PIXEL_WEIGHT * pixels


def discriminator_loss(of_true: Tensor, of_found: Tensor) -> Tensor:
    """What the discriminator minimises, from its verdicts on both."""
    right = mse_loss(of_true, torch.ones_like(of_true))
    wrong = mse_loss(of_found, torch.zeros_like(of_found))
    return (right + wrong) / 2


class Trainer:
    """Trains a generator against a discriminator, each with an Adam of its own.

    Parameters
    ----------
    learning_rate
        Of both; the default is the authors'.
    """

    def __init__(
        self, generator: Generator, discriminator: Discriminator, learning_rate: float = 2e-5
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self._of_generator, self._of_discriminator = (
            torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.5, 0.999))
            for network in (generator, discriminator)
        )

    def step(self, clean: Tensor, noisy: Tensor) -> tuple[float, float]:
        """One step of the generator, then one of the discriminator.

        Parameters
        ----------
        clean, noisy
            ``(b, 1, h, w)``, both with the noisy images' mean and standard deviation taken out.

        Returns
        -------
        The loss of the generator and of the discriminator before the step.
        """
        true = Parts(clean, noisy - clean)
        found: Parts = self.generator(noisy)
        of_generator = generator_loss(found, true, self.discriminator(found, noisy))
        _descend(self._of_generator, of_generator)
        seen = Parts(*(part.detach() for part in found))
        of_discriminator = discriminator_loss(
            self.discriminator(true, noisy), self.discriminator(seen, noisy)
        )
        _descend(self._of_discriminator, of_discriminator)
        return float(of_generator.detach()), float(of_discriminator.detach())


class Cost(NamedTuple):
    """Number of parameters, and of multiply-accumulates for one image."""

    parameters: int
    multiply_accumulates: int


PUBLISHED = Cost(47_830_000, 76_810_000_000)
"""For an image of 256² pixels, as in table 3 of the paper that compares itself with this model.

Its authors' program, which this model follows, is 3 % smaller.
"""


def count(size: int = 256) -> tuple[Cost, Cost]:
    """Cost of the generator and of the discriminator at their published size.

    Counted without memory for them.

    Parameters
    ----------
    size
        Edge length of the image, in pixels.
    """
    with torch.device("meta"):
        generator, discriminator, y = Generator(), Discriminator(), torch.empty(1, 1, size, size)
    return (
        Cost(_parameters(generator), multiply_accumulates(generator, y)),
        Cost(_parameters(discriminator), multiply_accumulates(discriminator, Parts(y, y), y)),
    )


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _two_convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(channels):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)


def _halve(i: int, o: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 4, stride=2, padding=1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def main() -> int:
    generator, discriminator = count()
    together = Cost(*(sum(both) for both in zip(generator, discriminator, strict=True)))
    rows = {
        "generator": generator,
        "discriminator": discriminator,
        "together": together,
        "published": PUBLISHED,
    }
    print("| | parameters / M | GMAC at 256² |")
    print("|---|---|---|")
    for name, cost in rows.items():
        parameters, operations = cost.parameters / 1e6, cost.multiply_accumulates / 1e9
        print(f"| {name} | {parameters:.2f} | {operations:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
