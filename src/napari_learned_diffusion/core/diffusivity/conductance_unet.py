"""Small networks that look at the image a few times and set the conductance of every edge."""

from __future__ import annotations

from copy import copy
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle, relu, softplus

from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.turns import TURNS, Turn
from napari_learned_diffusion.core.operators import Offset, Stencil

ALIGNMENT = 8
"""The networks work at a half, a quarter and an eighth of the resolution."""

_STEM = 6
_EDGES = 4


class ConductanceUNet(LearnedDiffusivity):
    r"""A few looks at the image, after each of which some cheap diffusion steps run.

    .. math:: g_{ij}^{(n)} = r_n^2 \operatorname{softplus}\big(\mathrm{net}_k(v_k, v_0)\big)_{n,ij}

    Look ``k`` is a U-Net of its own. It sees the stabilised image as it is by then, :math:`v_k`,
    beside the noisy one, :math:`v_0`, and what the look before made of it (its last features). It
    answers with the conductances of the edges to the 8 neighbours at distance :math:`r_n`, for all
    steps ``n`` until the next look: long edges first, then short ones. An edge is shared by its two
    ends however long it is, so every guarantee of the limiter holds.

    The networks see contrasts only, never the brightness itself. They begin with kernels at every
    other pixel and end with four answers for each such place, so they compute at half the
    resolution; there is no normalisation, and what an edge gets depends on its surroundings alone.

    Parameters
    ----------
    width
        Channels at half resolution; the levels below have two and three times as many.
    looks
        Number of networks.
    steps
        Diffusion steps after each look.
    reach
        Length of the longest edges along an axis, in pixels: 1, 2, 4 or 8.
    depth
        Residual blocks on the way up at half resolution, for each one elsewhere.
    blocks
        Residual blocks at each of the other levels, down and up.
    """

    key = "conductance-unet-s"
    title = "Conductance U-Net, small"
    summary = (
        "A neural network looks at the image once and says, edge by edge, where to diffuse. Nearly "
        "the best here, and fast."
    )
    reference = "napari-learned-diffusion, docs/research.md"
    stored_in_half = True
    last_layers = ("merge_fine", "head")
    outer_layers = (".kernels", "head")
    orientations: ClassVar[int] = 1
    """In how many of `TURNS` the networks look at the image."""

    def __init__(
        self,
        width: int = 32,
        looks: int = 1,
        steps: int = 5,
        reach: int = 8,
        depth: int = 2,
        blocks: int = 1,
    ) -> None:
        super().__init__(
            width=width, looks=looks, steps=steps, reach=reach, depth=depth, blocks=blocks
        )
        self.width, self.depth, self.blocks = width, depth, blocks
        self.reaches = _falling(steps, reach)
        self.networks = nn.ModuleList(
            _Look(width, steps, depth, blocks, again=look > 0) for look in range(looks)
        )
        self._noisy: Tensor | None = None
        self._features: list[Tensor | None] = []
        self._planned: Tensor | None = None

    def begun(self) -> Self:
        run = copy(self)
        run._noisy, run._features, run._planned = None, [], None
        return run

    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        look, within = divmod(step, len(self.reaches))
        if step == 0:
            self._noisy = None
        if within == 0 or self._planned is None:
            self._planned = None
            self._planned = self._look(v, look)
        h, w = v.shape[-2:]
        return self._planned[:, _EDGES * within : _EDGES * (within + 1), :h, :w]

    def _look(self, v: Tensor, look: int) -> Tensor:
        """The conductances of all steps until the next look, ``(b, steps · edges, h, w)``."""
        if self._noisy is None:
            self._noisy = seen = v
            self._features = [None] * len(self._turns)
        else:
            seen = torch.cat([v, self._noisy], dim=1)
        seen = _to_multiple(seen)
        total: Tensor | None = None
        for number, turn in enumerate(self._turns):
            answer, features = self.networks[look](turn.image(seen), self._features[number])
            self._features[number] = features if look + 1 < len(self.networks) else None
            # Four half-resolution channels make a map at full resolution.
            maps = softplus(pixel_shuffle(answer, 2).to(v.dtype))
            maps = torch.cat(
                [
                    turn.edges_back(maps[:, _EDGES * n : _EDGES * (n + 1)], self.offsets(n))
                    for n in range(len(self.reaches))
                ],
                dim=1,
            )
            total = maps if total is None else total + maps
        assert total is not None
        scales = [r**2 / len(self._turns) for r in self.reaches for _ in range(_EDGES)]
        return total * total.new_tensor(scales).view(1, -1, 1, 1)

    @property
    def _turns(self) -> tuple[Turn, ...]:
        # Training turns its patches at random, which comes to nearly the same.
        return TURNS[: 1 if self.training else self.orientations]

    def offsets(self, step: int) -> tuple[Offset, ...]:
        r = self.reaches[step % len(self.reaches)]
        return ((r, 0), (0, r), (r, r), (r, -r))

    @property
    def most_iterations(self) -> int:
        return len(self.networks) * len(self.reaches)

    def halo(self, iterations: int) -> int:
        looks = -(-iterations // len(self.reaches))
        travelled = sum(self.reaches[n % len(self.reaches)] for n in range(iterations))
        # The limiter at an edge's far end looks at the edges that go on from there.
        return looks * (self.reach + max(self.reaches)) + travelled

    @property
    def alignment(self) -> int:
        return ALIGNMENT

    @property
    def reach(self) -> int:
        # Kernels of 6 and the sampling; then in each block 3×3 convolutions: 2 at a half of the
        # resolution, 2 at a quarter, 2 at an eighth, 2 and 2·depth on the way up; at the worst
        # pixel. A turned edge was looked at from its other end.
        blocks = self.blocks * (36 + 4 * self.depth)
        return 9 + blocks + (self.orientations > 1) * max(self.reaches)

    @property
    def working_maps(self) -> int:
        # Measured on 1024²: 99 with 32 channels and one look, 175 with 64 and four. A quarter is
        # added: with less, a slice of 2048² took more memory than its tiles were meant to.
        return 20 + 13 * self.width // 4


class _Look(nn.Module):
    """A U-Net at half resolution; its answers are for the four pixels at each place."""

    def __init__(self, width: int, steps: int, depth: int, blocks: int, *, again: bool) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 3 * width
        kernels = torch.randn(a, 1 + again, _STEM, _STEM)
        self.kernels = nn.Parameter(kernels / _STEM)
        self.carried = nn.Conv2d(a, a, 1) if again else None
        self.fine = _stage(a, blocks)
        self.to_middle = nn.Conv2d(a, b, 2, stride=2)
        self.middle = _stage(b, blocks)
        self.to_coarse = nn.Conv2d(b, c, 2, stride=2)
        self.coarse = _stage(c, blocks)
        self.from_coarse = nn.ConvTranspose2d(c, b, 2, stride=2)
        self.merge_middle = _stage(b, blocks)
        self.from_middle = nn.ConvTranspose2d(b, a, 2, stride=2)
        self.merge_fine = _stage(a, depth * blocks)
        self.head = nn.Conv2d(a, 4 * _EDGES * steps, 1)
        # Little diffusion to begin with: where the limiter rules, there is little to learn from.
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, -2.0)

    def forward(self, seen: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
        fine = _contrasts(seen, self.kernels)
        if self.carried is not None and carried is not None:
            fine = self.carried(carried).add_(fine)
        fine = self.fine(fine)
        middle = self.middle(self.to_middle(fine))
        coarse = self.coarse(self.to_coarse(middle))
        middle = self.merge_middle(self.from_coarse(coarse).add_(middle))
        fine = self.merge_fine(self.from_middle(middle).add_(fine))
        return self.head(relu(fine)), fine


def _stage(width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(width) for _ in range(blocks)))


class _Block(nn.Module):
    """Two 3×3 convolutions, added to what went in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        nn.init.normal_(self.second.weight, std=0.3 * (9 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        # In place where nothing else needs what is overwritten: memory is what limits large slices.
        out: Tensor = self.second(relu(self.first(relu(x)), inplace=True))
        return out.add_(x)


class LargeConductanceUNet(ConductanceUNet):
    r"""The same, wider, and with no favourite direction.

    Its networks look at the image turned in all four ways, and an edge gets the mean of what they
    say of it. So turning the image turns the result, exactly where the size is a multiple of 8
    pixels.
    """

    key = "conductance-unet"
    title = "Conductance U-Net, large"
    summary = (
        "The small one's wider relative, which looks at the image turned in four ways. The best "
        "here, and some ten times slower."
    )
    orientations = 4

    def __init__(
        self,
        width: int = 64,
        looks: int = 1,
        steps: int = 5,
        reach: int = 8,
        depth: int = 2,
        blocks: int = 1,
    ) -> None:
        super().__init__(width, looks, steps, reach, depth, blocks)


def _contrasts(seen: Tensor, kernels: Tensor) -> Tensor:
    """Kernels of mean 0 at every other pixel; the border is continued by its outermost pixels."""
    kernels = kernels - kernels.mean((2, 3), keepdim=True)
    border = (_STEM // 2 - 1,) * 4
    # Of strong contrasts the logarithm: they reach to a hundred times that of the noise.
    return torch.asinh(conv2d(pad(seen, border, mode="replicate"), kernels, stride=2))


def _falling(steps: int, reach: int) -> tuple[int, ...]:
    """Reach of the edges in each step after a look: half as far each time, then 1."""
    return tuple(max(1, reach >> n) for n in range(steps))


def _to_multiple(x: Tensor) -> Tensor:
    """Continue an image by its last row and column until its size is a multiple."""
    h, w = x.shape[-2:]
    return pad(x, (0, -w % ALIGNMENT, 0, -h % ALIGNMENT), mode="replicate")
