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

import numpy as np
import torch
from torch import Tensor

from napari_learned_diffusion.core.errors import InvalidSettingError

Offset = tuple[int, int]

FOUR_NEIGHBOURS: tuple[Offset, ...] = ((1, 0), (0, 1))
EIGHT_NEIGHBOURS: tuple[Offset, ...] = (*FOUR_NEIGHBOURS, (1, 1), (1, -1))
"""Each edge once: the neighbours on the other side are the same edges seen from their other end."""

LARGEST_RATIO = 1000.0
"""Most elongated pixels; beyond it the squares of distances leave single precision nothing."""

_ISOTROPIC = 1e-3
"""Anisotropy below which the direction of strongest diffusion is a matter of rounding."""


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

    def count_edges(self, h: int, w: int) -> int:
        """Number of edges between the pixels of a slice of ``h`` times ``w``."""
        return sum(max(0, h - dy) * max(0, w - abs(dx)) for dy, dx in self.offsets)

    @property
    def largest_sum(self) -> float:
        """Sum of 1/h² over the edges of a pixel in the interior, both directions."""
        return sum(2 / length**2 for length in self.lengths)

    @property
    def directions(self) -> tuple[tuple[float, float], ...]:
        """Unit vector ``(ex, ey)`` of each edge on square pixels, x to the right and y down."""
        hy, hx = self.spacing
        ends = zip(self.offsets, self.lengths, strict=True)
        return tuple((dx * hx / length, dy * hy / length) for (dy, dx), length in ends)

    @property
    def isotropic_weights(self) -> tuple[float, ...]:
        r"""Weights of the edges that favour no direction, :math:`\sum_e w_e\, e e^T = I`.

        Of all such weights, those that are nearest to equal ones; for the neighbours of square
        pixels they are equal.

        Raises
        ------
        InvalidSettingError
            if the edges are so one-sided that there are no such weights of at least 0.
        """
        angles = [2 * math.atan2(ey, ex) for ex, ey in self.directions]
        bias = np.array([np.cos(angles), np.sin(angles)])
        weights = 1 - np.linalg.pinv(bias) @ bias.sum(axis=1)
        if weights.min() < -1e-9 or weights.sum() < 1e-9:
            raise InvalidSettingError("The edges have no weights that favour no direction.")
        return tuple((2 * weights.clip(min=0) / weights.sum()).tolist())


def pixel_spacing(spacing: tuple[float, float]) -> tuple[float, float]:
    """Spacing in any unit to spacing in pixels: 1 along the finer axis.

    The contrast parameter, the time step and the noise belong to pixels, so only the ratio of the
    two spacings matters: a slice gives the same result in millimetres and in micrometres.
    """
    hy, hx = checked_spacing(spacing)
    finest = min(hy, hx)
    if max(hy, hx) > LARGEST_RATIO * finest:
        raise InvalidSettingError(
            f"The pixels are {max(hy, hx) / finest:.3g} times as long along one axis as along the "
            f"other; at most {LARGEST_RATIO:g} times can be computed. Check the spacing {spacing}."
        )
    return hy / finest, hx / finest


def checked_spacing(spacing: tuple[float, float]) -> tuple[float, float]:
    """A spacing as positive numbers; files may count an axis backwards.

    Raises
    ------
    InvalidSettingError
        unless they are finite numbers other than 0.
    """
    hy, hx = (abs(float(h)) for h in spacing)
    if not (math.isfinite(hy) and math.isfinite(hx) and hy > 0 and hx > 0):
        raise InvalidSettingError(
            f"The pixel spacing must be two finite numbers other than 0, not {spacing}."
        )
    return hy, hx


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


def magnitude(field: Tensor, stencil: Stencil) -> Tensor:
    r"""Length of the vector that an edge field stands for around each pixel.

    .. math:: |f|_i = \Big(\sum_e w_e \, \overline{f^2_{i,e}}\Big)^{1/2}

    where :math:`\overline{f^2_{i,e}}` is the mean of the squares on the two edges that leave pixel
    ``i`` in the direction ``e`` and ``-e``, and the weights are `Stencil.isotropic_weights`: of the
    `gradient` of a plane it is its slope, whatever the edges and the spacing.

    Parameters
    ----------
    field
        ``(b, edges, h, w)``, such as a gradient, or conductances times a gradient, the flux.

    Returns
    -------
    ``(b, 1, h, w)``, at least 0, in the unit of the field.
    """
    squares = _mean_of_both_edges(field.square(), stencil)
    weights = squares.new_tensor(stencil.isotropic_weights).view(1, -1, 1, 1)
    return (weights * squares).sum(dim=1, keepdim=True).sqrt()


def diffusion_tensor(conductances: Tensor, stencil: Stencil) -> Tensor:
    r"""The tensor of the diffusion around each pixel, from the conductances of its edges.

    To second order, a step with conductances :math:`g_{ij}` over the edge vectors
    :math:`h_{ij} e_{ij}` is one of :math:`\partial_t u = \operatorname{div}(D \nabla u)` with

    .. math:: D_i \propto \sum_j \frac{g_{ij}}{h_{ij}^2} (h_{ij} e_{ij}) (h_{ij} e_{ij})^T
              \quad\Rightarrow\quad D_i = \sum_e w_e \, \bar g_{i,e} \, e e^T

    where :math:`\bar g_{i,e}` is the mean of the two edges that leave pixel ``i`` in the direction
    ``e`` and ``-e``, and the weights are `Stencil.isotropic_weights`: equal conductances ``g`` make
    :math:`D = g I`, whatever the edges and the spacing, up to the image's corners. Edges to four
    neighbours tell only horizontal from vertical; those to eight tell every direction.

    Parameters
    ----------
    conductances
        ``(b, edges, h, w)``, at least 0.

    Returns
    -------
    ``(b, 3, h, w)``: the entries xx, yy and xy, x to the right and y down. Positive semidefinite,
    and without unit, as the conductances are.
    """
    entries = [
        [w * ex * ex, w * ey * ey, w * ex * ey]
        for w, (ex, ey) in zip(stencil.isotropic_weights, stencil.directions, strict=True)
    ]
    along = _mean_of_both_edges(conductances, stencil)
    return torch.einsum("ek,behw->bkhw", along.new_tensor(entries), along)


def anisotropy(tensor: Tensor) -> Tensor:
    r"""How much stronger diffusion is in its strongest direction than across it.

    .. math:: \frac{\lambda_1 - \lambda_2}{\lambda_1 + \lambda_2}

    with the eigenvalues :math:`\lambda_1 \ge \lambda_2` of a `diffusion_tensor`.

    Parameters
    ----------
    tensor
        ``(b, 3, h, w)``

    Returns
    -------
    ``(b, 1, h, w)``, from 0 (equal in all directions, or no diffusion) to 1 (in one direction).
    """
    xx, yy, xy = tensor.chunk(3, dim=1)
    trace = (xx + yy).clamp(min=torch.finfo(tensor.dtype).tiny)
    difference = torch.hypot(xx - yy, 2 * xy)  # of the eigenvalues
    return (difference / trace).clamp(max=1)


def orientation(tensor: Tensor) -> Tensor:
    r"""The direction of strongest diffusion, that of the larger eigenvalue.

    .. math:: \theta = \tfrac12 \operatorname{atan2}(-2 D_{xy},\, D_{xx} - D_{yy})

    Parameters
    ----------
    tensor
        ``(b, 3, h, w)``, a `diffusion_tensor`.

    Returns
    -------
    ``(b, 1, h, w)``, in degrees, from 0 to below 180: the angle from the column axis (horizontal,
    x to the right), counter-clockwise as seen on the screen, where y points down. So 0 is along
    a row, 45 runs up to the right, and 90 is along a column. With a spacing the angle is that in
    physical space. NaN where diffusion is equal in all directions.
    """
    xx, yy, xy = tensor.chunk(3, dim=1)
    degrees = torch.rad2deg(torch.atan2(-2 * xy, xx - yy)) / 2
    degrees = torch.where(degrees < 0, degrees + 180, degrees)
    degrees = torch.where(degrees >= 180, 0, degrees).abs()  # of -1e-9 + 180, rounded; and of -0
    return torch.where(anisotropy(tensor) < _ISOTROPIC, torch.nan, degrees)


def in_space(degrees: Tensor, spacing: tuple[float, float]) -> Tensor:
    r"""An orientation on the pixel grid as the one in physical space.

    .. math:: \theta' = \operatorname{atan2}(h_y \sin\theta,\, h_x \cos\theta)

    Parameters
    ----------
    degrees
        Of any shape, from 0 to below 180, as of `orientation`.
    spacing
        Distance of rows and of columns, in any unit.
    """
    hy, hx = checked_spacing(spacing)
    if hy == hx:
        return degrees
    angle = torch.deg2rad(degrees)
    found = torch.rad2deg(torch.atan2(hy / hx * torch.sin(angle), torch.cos(angle)))
    return torch.where(found >= 180, 0, found)


def _mean_of_both_edges(conductances: Tensor, stencil: Stencil) -> Tensor:
    """Mean of the two edges that leave a pixel in opposite directions, ``(b, edges, h, w)``.

    At the border there may be only one of them, which then counts alone, or none: then the mean of
    the pixel's other directions stands in.
    """
    h, w = conductances.shape[-2:]
    sums = torch.zeros_like(conductances)
    counts = conductances.new_zeros((1, *conductances.shape[1:]))
    for e, offset in enumerate(stencil.offsets):
        g = conductances[:, e : e + 1]
        start, end = _ends(offset, h, w)
        for side in (start, end):
            sums[:, e : e + 1][side] += g[start]
            counts[:, e : e + 1][side] += 1
    means = sums / counts.clamp(min=1)
    known = (counts > 0).to(means.dtype)
    others = means.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(counts > 0, means, others)


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
