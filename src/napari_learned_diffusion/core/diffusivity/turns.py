"""The four ways to turn an image, and how maps of edges are turned back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from napari_learned_diffusion.core.operators import Offset


@dataclass(frozen=True)
class Turn:
    """Quarter turns of the last two axes.

    Parameters
    ----------
    quarters
        Number of quarter turns, counter-clockwise on the screen.
    """

    quarters: int

    def image(self, image: Tensor) -> Tensor:
        """The image turned, ``(..., h, w)`` or ``(..., w, h)``."""
        return torch.rot90(image, self.quarters, (-2, -1))

    def image_back(self, image: Tensor) -> Tensor:
        """What `image` made of an image, turned back."""
        return torch.rot90(image, -self.quarters, (-2, -1))

    def edges_back(self, field: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
        """A field on the edges of the turned image as one on the edges of the image itself.

        Parameters
        ----------
        field
            ``(b, edges, h, w)``, see `core.operators`.
        offsets
            Of the edges; turning must lead from each to another of them or to its opposite.
        """
        maps: dict[Offset, Tensor] = {}
        for number, offset in enumerate(offsets):
            dy, dx = self._back(offset)
            back = self.image_back(field[:, number : number + 1])
            if (dy, dx) not in offsets:
                # The same edge seen from its other end, which is where its entry belongs.
                dy, dx = -dy, -dx
                back = back.roll((-dy, -dx), (-2, -1))
            maps[dy, dx] = back
        return torch.cat([maps[offset] for offset in offsets], dim=1)

    def _back(self, offset: Offset) -> Offset:
        dy, dx = offset
        for _ in range(self.quarters):
            dy, dx = dx, -dy
        return dy, dx


TURNS = tuple(Turn(quarters) for quarters in range(4))
"""All four, the one that changes nothing first."""
