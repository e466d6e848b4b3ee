r"""Edge differences on the pixel grid and their exact adjoint.

The pixels of a slice are the cells of a finite-volume grid. An *edge* joins two of them; it is
given by its offset ``(dy, dx)`` from the pixel ``i`` that it starts at to the pixel ``j`` that it
ends at. A field on edges has shape ``(b, edges, h, w)``: entry ``[:, e, y, x]`` belongs to the edge
that starts at pixel ``(y, x)``; where that edge would leave the image the entry is 0 and is never
read, which is the reflecting (Neumann) boundary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from napari_learned_diffusion.core.errors import InvalidSettingError

Offset = tuple[int, int]

FOUR_NEIGHBOURS: tuple[Offset, ...] = ((1, 0), (0, 1))
EIGHT_NEIGHBOURS: tuple[Offset, ...] = (*FOUR_NEIGHBOURS, (1, 1), (1, -1))
"""Each edge once: the neighbours on the other side are the same edges seen from their other end."""


@dataclass(frozen=True)
class Stencil:
    """Which edges there are, and how long they are.

    Parameters
    ----------
    offsets
        ``(dy, dx)`` of each edge, in pixels, ``dy >= 0``, each edge from one of its ends only.
    spacing
        Distance of neighbouring rows and columns, ``(hy, hx)``, in pixels: 1 for the finer of the
        two axes, see `pixel_spacing`.
    """

    offsets: tuple[Offset, ...] = FOUR_NEIGHBOURS
    spacing: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if any(dy < 0 or (dy == 0 and dx <= 0) for dy, dx in self.offsets):
            raise InvalidSettingError("Edges must point down, or to the right within a row.")
        if not all(math.isfinite(h) and h > 0 for h in self.spacing):
            raise InvalidSettingError(
                f"The pixel spacing must be two finite numbers above 0, not {self.spacing}."
            )

    @property
    def lengths(self) -> tuple[float, ...]:
        """Length of each edge, in pixels."""
        hy, hx = self.spacing
        return tuple(math.hypot(dy * hy, dx * hx) for dy, dx in self.offsets)

    @property
    def reach(self) -> int:
        """How many pixels away the farthest neighbour is, along either axis."""
        return max(max(dy, abs(dx)) for dy, dx in self.offsets)

    @property
    def largest_sum(self) -> float:
        """Sum of 1/h² over the edges of a pixel in the interior, both directions."""
        return sum(2 / length**2 for length in self.lengths)


def pixel_spacing(spacing: tuple[float, float]) -> tuple[float, float]:
    """Spacing in any unit to spacing in pixels: 1 along the finer axis.

    The contrast parameter, the time step and the noise belong to pixels, so only the ratio of the
    two spacings matters: a slice gives the same result in millimetres and in micrometres.
    """
    hy, hx = (abs(float(h)) for h in spacing)
    if not (math.isfinite(hy) and math.isfinite(hx) and hy > 0 and hx > 0):
        raise InvalidSettingError(
            f"The pixel spacing must be two finite numbers other than 0, not {spacing}."
        )
    finest = min(hy, hx)
    return hy / finest, hx / finest


def gradient(u: Tensor, stencil: Stencil) -> Tensor:
    r"""Differences along the edges, :math:`(\nabla u)_e = (u_j - u_i) / h_e`.

    Parameters
    ----------
    u
        ``(b, 1, h, w)``

    Returns
    -------
    ``(b, edges, h, w)``, in units of ``u`` per pixel.
    """
    return _per_edge(u, stencil, lambda i, j, length: (j - i) / length)


def divergence(flux: Tensor, stencil: Stencil) -> Tensor:
    r"""What flows into each pixel, the negative adjoint of `gradient`.

    .. math:: \langle \nabla u, f \rangle = -\langle u, \operatorname{div} f \rangle

    Parameters
    ----------
    flux
        ``(b, edges, h, w)``, positive from the end ``j`` of an edge towards its start ``i``.

    Returns
    -------
    ``(b, 1, h, w)``
    """
    h, w = flux.shape[-2:]
    total = flux.new_zeros((flux.shape[0], 1, h, w))
    for e, (offset, length) in enumerate(zip(stencil.offsets, stencil.lengths, strict=True)):
        start, end = _ends(offset, h, w)
        f = flux[:, e : e + 1][start] / length
        total[start] += f
        total[end] -= f
    return total


def edge_sums(field: Tensor, stencil: Stencil) -> Tensor:
    """Sum an edge field over all edges of a pixel, ``(b, edges, h, w)`` to ``(b, 1, h, w)``."""
    h, w = field.shape[-2:]
    total = field.new_zeros((field.shape[0], 1, h, w))
    for e, offset in enumerate(stencil.offsets):
        start, end = _ends(offset, h, w)
        f = field[:, e : e + 1][start]
        total[start] += f
        total[end] += f
    return total


def mean_of_ends(pixels: Tensor, stencil: Stencil) -> Tensor:
    """From a map on pixels, ``(b, 1, h, w)``, to edges: the mean of their two ends."""
    return _per_edge(pixels, stencil, lambda i, j, _: (i + j) / 2)


def max_of_ends(pixels: Tensor, stencil: Stencil) -> Tensor:
    """From a map on pixels, ``(b, 1, h, w)``, to edges: the larger of their two ends."""
    return _per_edge(pixels, stencil, lambda i, j, _: torch.maximum(i, j))


def open_edges(valid: Tensor, stencil: Stencil) -> Tensor:
    """Edges both of whose ends are valid: ``(b, 1, h, w)`` of 0 and 1 to ``(b, edges, h, w)``."""
    return _per_edge(valid, stencil, lambda i, j, _: i * j)


def mean_conductance(conductances: Tensor, stencil: Stencil) -> Tensor:
    r"""The diffusivity that a pixel feels: its edges' conductances, weighted as the step does.

    .. math:: \bar g_i = \sum_j \frac{g_{ij}}{h_{ij}^2} \Big/ \sum_j \frac{1}{h_{ij}^2}

    over the neighbours ``j`` inside the image; ``(b, edges, h, w)`` to ``(b, 1, h, w)``.
    """
    weights = conductances.new_tensor([1 / length**2 for length in stencil.lengths])
    weights = weights.view(1, -1, 1, 1).expand(conductances.shape)
    return edge_sums(conductances * weights, stencil) / edge_sums(weights, stencil).clamp(
        min=torch.finfo(conductances.dtype).tiny
    )


def _ends(
    offset: Offset, h: int, w: int
) -> tuple[tuple[slice | int, ...], tuple[slice | int, ...]]:
    """Where the edges of one offset start and where they end, as slices of the last two axes."""
    dy, dx = offset
    dy, dx = min(dy, h), max(-w, min(dx, w))
    rows = slice(0, h - dy), slice(dy, h)
    columns = (slice(0, w - dx), slice(dx, w)) if dx >= 0 else (slice(-dx, w), slice(0, w + dx))
    everything = slice(None)
    return (
        (everything, everything, rows[0], columns[0]),
        (everything, everything, rows[1], columns[1]),
    )


def _per_edge(
    pixels: Tensor, stencil: Stencil, combine: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor:
    """An edge field from the values at both ends of each edge, 0 where an edge leaves the image."""
    b, _, h, w = pixels.shape
    field = pixels.new_zeros((b, len(stencil.offsets), h, w))
    for e, (offset, length) in enumerate(zip(stencil.offsets, stencil.lengths, strict=True)):
        start, end = _ends(offset, h, w)
        field[:, e : e + 1][start] = combine(pixels[start], pixels[end], length)
    return field
