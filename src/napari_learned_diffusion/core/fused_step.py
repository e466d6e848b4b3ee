r"""The limiter and the diffusion step on the CPU, each in one pass over the memory, with gradients.

As tensor operations the two walk over every map of edges a dozen times, and their derivatives twice
as often: more than the networks of the learned models take. These kernels read each row once or
twice. `core.limiter` and `core.operators` are the reference that they are tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_learned_diffusion.core.fused import Bands
from napari_learned_diffusion.core.limiter import LARGEST
from napari_learned_diffusion.core.operators import Stencil

Maps = NDArray[np.floating[Any]]
"""``(b, edges, h, w)`` or ``(b, h, w)``, C-contiguous, all of one call in the same precision."""

# Sums may be contracted to fused multiply-adds; nothing may assume that NaN or inf don't occur.
_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "arcp", "nsz"}, error_model="numpy")


def limited(conductances: Tensor, tau: float, stencil: Stencil) -> Tensor:
    """`core.limiter.limit` for tensors on the CPU; parameters as there."""
    edges = _Edges(stencil, tau, conductances.dtype)
    result: Tensor = _Limit.apply(conductances, edges)  # type: ignore[no-untyped-call]
    return result


def advanced(u: Tensor, conductances: Tensor, tau: float, stencil: Stencil) -> Tensor:
    r"""One step, :math:`u + \tau \operatorname{div}(g \nabla u)`, for tensors on the CPU.

    Parameters
    ----------
    u
        ``(b, 1, h, w)``.
    conductances
        ``(b, edges, h, w)``, of the same type.
    tau
        Time step, in squared pixels.
    """
    edges = _Edges(stencil, tau, u.dtype)
    result: Tensor = _Advance.apply(u, conductances, edges)  # type: ignore[no-untyped-call]
    return result


class _Edges:
    """What the kernels need to know of a stencil: offsets, and the weights tau/h²."""

    def __init__(self, stencil: Stencil, tau: float, dtype: torch.dtype) -> None:
        precision = torch.empty(0, dtype=dtype).numpy().dtype
        self.dy = np.array([dy for dy, _ in stencil.offsets])
        self.dx = np.array([dx for _, dx in stencil.offsets])
        self.weights = (tau / np.square(stencil.lengths)).astype(precision)

    def run(self, kernel: Callable[..., None], *maps: Maps) -> None:
        """Call a kernel for all rows of all planes, in as many threads as torch may use."""
        planes, _, rows, columns = max((m.shape for m in maps), key=len)
        bands = Bands((planes * rows, columns), torch.get_num_threads())
        try:
            bands.run(partial(kernel, *maps, self.weights, self.dy, self.dx))
        finally:
            bands.close()


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, conductances: Tensor, edges: _Edges) -> Tensor:
        g = conductances.detach().contiguous().numpy()
        sums = np.empty((g.shape[0], *g.shape[2:]), g.dtype)
        edges.run(_sum_rows, g, sums)
        result = np.zeros_like(g)
        edges.run(_limit_rows, g, sums, result)
        ctx.edges, ctx.sums, ctx.limited = edges, sums, result
        return torch.from_numpy(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        seen = gradient.contiguous().numpy()
        of_sums, result = np.empty_like(ctx.sums), np.zeros_like(seen)
        ctx.edges.run(_sums_backward, seen, ctx.limited, ctx.sums, of_sums)
        ctx.edges.run(_limit_backward, seen, ctx.sums, of_sums, result)
        return torch.from_numpy(result), None


class _Advance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, conductances: Tensor, edges: _Edges) -> Tensor:
        before = u.detach().contiguous().numpy()[:, 0]
        g = conductances.detach().contiguous().numpy()
        after = np.empty_like(before)
        edges.run(_advance_rows, g, before, after)
        ctx.edges, ctx.before, ctx.g = edges, before, g
        return torch.from_numpy(after[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        seen = gradient.contiguous().numpy()[:, 0]
        of_u = of_g = None
        if ctx.needs_input_grad[0]:
            # The step is a symmetric matrix: it is its own adjoint.
            after = np.empty_like(seen)
            ctx.edges.run(_advance_rows, ctx.g, seen, after)
            of_u = torch.from_numpy(after[:, None])
        if ctx.needs_input_grad[1]:
            result = np.zeros_like(ctx.g)
            ctx.edges.run(_advance_backward, result, seen, ctx.before)
            of_g = torch.from_numpy(result)
        return of_u, of_g, None


# Each kernel fills the rows [top, bottom), counted over all planes. An edge e of pixel (y, x) leads
# to (y + dy[e], x + dx[e]); within a row, those of columns [a, b) stay inside and end at [c, d).


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _sound(g: Any, largest: Any, zero: Any) -> Any:  # pragma: no cover - compiled
    """A conductance that the limiter takes as it is, or 0; as `core.limiter.is_sound`."""
    return g if (g >= zero and g <= largest) else zero


@_jit
def _columns(width: int, dx: int) -> tuple[int, int, int, int]:  # pragma: no cover - compiled
    a, b = max(0, -dx), max(0, min(width, width - dx))
    return (a, b, a + dx, b + dx) if b > a else (0, 0, 0, 0)


@_jit
def _sum_rows(  # pragma: no cover - compiled
    g: Maps,
    sums: Maps,
    weights: Maps,
    dy: NDArray[np.int64],
    dx: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """``sums``: the weight S of a pixel's neighbours."""
    _, edges, height, width = g.shape
    largest, zero = weights.dtype.type(LARGEST), weights.dtype.type(0)
    for row in range(top, bottom):
        n, y = row // height, row % height
        sums[n, y] = 0
        for e in range(edges):
            a, b, c, d = _columns(width, dx[e])
            weight = weights[e]
            if y + dy[e] < height:
                here, out = g[n, e, y, a:b], sums[n, y, a:b]
                for x in range(b - a):
                    out[x] += weight * _sound(here[x], largest, zero)
            if y >= dy[e]:
                there, out = g[n, e, y - dy[e], a:b], sums[n, y, c:d]
                for x in range(b - a):
                    out[x] += weight * _sound(there[x], largest, zero)


@_jit
def _limit_rows(  # pragma: no cover - compiled
    g: Maps,
    sums: Maps,
    limited: Maps,
    weights: Maps,
    dy: NDArray[np.int64],
    dx: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """``limited``: conductances over max(1, S at both ends)."""
    _, edges, height, width = g.shape
    largest, zero = weights.dtype.type(LARGEST), weights.dtype.type(0)
    one = weights.dtype.type(1)
    for row in range(top, bottom):
        n, y = row // height, row % height
        for e in range(edges):
            if y + dy[e] < height:
                a, b, c, d = _columns(width, dx[e])
                start, end = sums[n, y, a:b], sums[n, y + dy[e], c:d]
                here, out = g[n, e, y, a:b], limited[n, e, y, a:b]
                for x in range(b - a):
                    sound = _sound(here[x], largest, zero)
                    out[x] = sound / max(one, max(start[x], end[x]))


@_jit
def _advance_rows(  # pragma: no cover - compiled
    g: Maps,
    before: Maps,
    after: Maps,
    weights: Maps,
    dy: NDArray[np.int64],
    dx: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """``after``: each pixel and the weighted differences to its neighbours."""
    _, edges, height, width = g.shape
    change = np.empty(width, before.dtype)
    for row in range(top, bottom):
        n, y = row // height, row % height
        change[:] = 0
        for e in range(edges):
            a, b, c, d = _columns(width, dx[e])
            weight = weights[e]
            if y + dy[e] < height:
                here, out = g[n, e, y, a:b], change[a:b]
                start, end = before[n, y, a:b], before[n, y + dy[e], c:d]
                for x in range(b - a):
                    out[x] += weight * here[x] * (end[x] - start[x])
            if y >= dy[e]:
                there, out = g[n, e, y - dy[e], a:b], change[c:d]
                start, end = before[n, y - dy[e], a:b], before[n, y, c:d]
                for x in range(b - a):
                    out[x] += weight * there[x] * (start[x] - end[x])
        u, result = before[n, y], after[n, y]
        for x in range(width):
            result[x] = u[x] + change[x]


@_jit
def _advance_backward(  # pragma: no cover - compiled
    result: Maps,
    gradient: Maps,
    before: Maps,
    weights: Maps,
    dy: NDArray[np.int64],
    dx: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """``result``: derivative of the loss by each conductance."""
    _, edges, height, width = result.shape
    for row in range(top, bottom):
        n, y = row // height, row % height
        for e in range(edges):
            if y + dy[e] < height:
                a, b, c, d = _columns(width, dx[e])
                weight = weights[e]
                out = result[n, e, y, a:b]
                by_start, by_end = gradient[n, y, a:b], gradient[n, y + dy[e], c:d]
                start, end = before[n, y, a:b], before[n, y + dy[e], c:d]
                for x in range(b - a):
                    out[x] = weight * (by_start[x] - by_end[x]) * (end[x] - start[x])


@_jit
def _sums_backward(  # pragma: no cover - compiled
    gradient: Maps,
    limited: Maps,
    sums: Maps,
    of_sums: Maps,
    weights: Maps,
    dy: NDArray[np.int64],
    dx: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """``of_sums``: derivative of the loss by S; the end where it is larger limits an edge."""
    _, edges, height, width = gradient.shape
    zero, one = weights.dtype.type(0), weights.dtype.type(1)
    for row in range(top, bottom):
        n, y = row // height, row % height
        of_sums[n, y] = 0
        for e in range(edges):
            a, b, c, d = _columns(width, dx[e])
            if y + dy[e] < height:
                by, g, out = gradient[n, e, y, a:b], limited[n, e, y, a:b], of_sums[n, y, a:b]
                mine, other = sums[n, y, a:b], sums[n, y + dy[e], c:d]
                for x in range(b - a):
                    rules = mine[x] > one and mine[x] >= other[x]
                    out[x] -= by[x] * g[x] / mine[x] if rules else zero
            if y >= dy[e]:
                above = y - dy[e]
                by, g, out = (
                    gradient[n, e, above, a:b],
                    limited[n, e, above, a:b],
                    of_sums[n, y, c:d],
                )
                mine, other = sums[n, y, c:d], sums[n, above, a:b]
                for x in range(b - a):
                    rules = mine[x] > one and mine[x] > other[x]
                    out[x] -= by[x] * g[x] / mine[x] if rules else zero


@_jit
def _limit_backward(  # pragma: no cover - compiled
    gradient: Maps,
    sums: Maps,
    of_sums: Maps,
    result: Maps,
    weights: Maps,
    dy: NDArray[np.int64],
    dx: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """``result``: derivative of the loss by each conductance before the limiter."""
    _, edges, height, width = gradient.shape
    one = weights.dtype.type(1)
    for row in range(top, bottom):
        n, y = row // height, row % height
        for e in range(edges):
            if y + dy[e] < height:
                a, b, c, d = _columns(width, dx[e])
                weight = weights[e]
                by, out = gradient[n, e, y, a:b], result[n, e, y, a:b]
                start, end = sums[n, y, a:b], sums[n, y + dy[e], c:d]
                of_start, of_end = of_sums[n, y, a:b], of_sums[n, y + dy[e], c:d]
                for x in range(b - a):
                    direct = by[x] / max(one, max(start[x], end[x]))
                    out[x] = direct + weight * (of_start[x] + of_end[x])
