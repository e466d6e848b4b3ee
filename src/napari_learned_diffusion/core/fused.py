"""Perona–Malik steps on the CPU, all edges of a pixel in one pass over the memory.

A chain of tensor operations walks over the slice a dozen times a step and is bound by memory
traffic; these kernels read each row once, keep the fluxes of one row in cache and write the result.
Bands of rows run in threads (the kernels release the GIL), with a barrier between steps. The plain
torch version in `core.solve` is the reference that they are tested against.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numba
import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.presmoothing import gaussian_taps, reflected_indices
from napari_learned_diffusion.core.schemes import Step

Image = NDArray[np.float32]
"""One slice, `(h, w)`, C-contiguous."""

_MIN_PIXELS_PER_BAND = 131_072
"""Below that, handing a band to a thread costs more than it saves."""

# Sums may be contracted to fused multiply-adds; nothing may assume that NaN or inf don't occur.
_FAST = {"contract", "arcp", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy", inline="always")
def _rational(x: np.float32) -> np.float32:
    return np.float32(1) / (np.float32(1) + x)


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy", inline="always")
def _exponential(x: np.float32) -> np.float32:
    # exp(-x) = exp(-x/64)^64, the inner one a polynomial: unlike a call of exp, this vectorises.
    # Relative error below 2e-5; beyond x = 80 the true value is 0 in single precision.
    y = min(x, np.float32(80)) * np.float32(-1 / 64)
    p = np.float32(1 / 5040)
    p = p * y + np.float32(1 / 720)
    p = p * y + np.float32(1 / 120)
    p = p * y + np.float32(1 / 24)
    p = p * y + np.float32(1 / 6)
    p = p * y + np.float32(0.5)
    p = p * y + np.float32(1)
    p = p * y + np.float32(1)
    p *= p
    p *= p
    p *= p
    p *= p
    p *= p
    return p * p


def _make_step(diffusivity: Callable[[np.float32], np.float32]) -> Callable[..., None]:
    """A kernel that does one explicit step on the rows ``[top, bottom)`` of ``u`` into ``out``."""

    @numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
    def step(  # pragma: no cover - compiled
        u: Image,
        v: Image,
        valid: Image | None,
        out: Image,
        weights: tuple[np.float32, np.float32],
        scales: tuple[np.float32, np.float32],
        top: int,
        bottom: int,
    ) -> None:
        height, width = u.shape
        along_y = np.zeros(width, np.float32)  # flux between this row and the one above it
        along_x = np.zeros(width + 1, np.float32)  # flux between each pixel and its left neighbour
        if top > 0:
            for x in range(width):
                d = v[top, x] - v[top - 1, x]
                f = weights[0] * diffusivity(d * d * scales[0]) * (u[top, x] - u[top - 1, x])
                if valid is not None:
                    f *= valid[top, x] * valid[top - 1, x]
                along_y[x] = f
        for y in range(top, bottom):
            for x in range(1, width):
                d = v[y, x] - v[y, x - 1]
                f = weights[1] * diffusivity(d * d * scales[1]) * (u[y, x] - u[y, x - 1])
                if valid is not None:
                    f *= valid[y, x] * valid[y, x - 1]
                along_x[x] = f
            if y + 1 < height:
                for x in range(width):
                    d = v[y + 1, x] - v[y, x]
                    f = weights[0] * diffusivity(d * d * scales[0]) * (u[y + 1, x] - u[y, x])
                    if valid is not None:
                        f *= valid[y + 1, x] * valid[y, x]
                    out[y, x] = u[y, x] + ((f - along_y[x]) + (along_x[x + 1] - along_x[x]))
                    along_y[x] = f
            else:
                for x in range(width):
                    out[y, x] = u[y, x] + ((along_x[x + 1] - along_x[x]) - along_y[x])

    return step


_STEPS = {"rational": _make_step(_rational), "exponential": _make_step(_exponential)}


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _smooth(  # pragma: no cover - compiled
    image: Image,
    out: Image,
    taps_y: NDArray[np.float32],
    taps_x: NDArray[np.float32],
    source_y: NDArray[np.int64],
    source_x: NDArray[np.int64],
    top: int,
    bottom: int,
) -> None:
    """Separable convolution of the rows ``[top, bottom)``; the sources reflect at the boundary."""
    width = image.shape[1]
    reach = len(taps_x) // 2
    row = np.empty(width + 2 * reach, np.float32)
    inner = row[reach : reach + width]
    for y in range(top, bottom):
        inner[:] = 0
        for k in range(len(taps_y)):
            tap = taps_y[k]
            source = image[source_y[y + k]]
            for x in range(width):
                inner[x] += tap * source[x]
        for x in range(reach):
            row[x] = inner[source_x[x]]
            row[reach + width + x] = inner[source_x[reach + width + x]]
        target = out[y]
        target[:] = 0
        for k in range(len(taps_x)):
            tap = taps_x[k]
            for x in range(width):
                target[x] += tap * row[x + k]


class Bands:
    """Bands of rows, and the threads that work on them; a call returns when all bands are done."""

    def __init__(self, shape: tuple[int, int], threads: int) -> None:
        height, width = shape
        count = max(1, min(threads, height, height * width // _MIN_PIXELS_PER_BAND))
        edges = [round(height * i / count) for i in range(count + 1)]
        self._bands = list(itertools.pairwise(edges))
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def run(self, work: Callable[[int, int], None]) -> None:
        if self._pool is None:
            work(*self._bands[0])
        else:
            list(self._pool.map(lambda band: work(*band), self._bands))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class _Presmoother:
    """`core.presmoothing.presmooth` with its kernel, mask weights and buffer made once."""

    def __init__(
        self,
        shape: tuple[int, int],
        sigma: float,
        spacing: tuple[float, float],
        valid: Image | None,
        bands: Bands,
    ) -> None:
        taps = [gaussian_taps(sigma / h).astype(np.float32) for h in spacing]
        sources = [reflected_indices(n, len(t) // 2) for n, t in zip(shape, taps, strict=True)]
        self._kernel = taps[0], taps[1], sources[0], sources[1]
        self._bands = bands
        self._out = np.empty(shape, np.float32)
        self._valid = valid
        self._weight: Image | None = None
        if valid is not None:
            weight = self._convolve(valid).copy()
            self._weight = np.maximum(weight, np.finfo(np.float32).tiny, out=weight)

    def __call__(self, v: Image) -> Image:
        if self._valid is None or self._weight is None:
            return self._convolve(v)
        out = self._convolve(v * self._valid)
        out /= self._weight
        return out

    def _convolve(self, v: Image) -> Image:
        self._bands.run(partial(_smooth, v, self._out, *self._kernel))
        return self._out


def perona_malik_steps(
    u: Image,
    steps: Iterable[Step],
    *,
    stabilise: Callable[[Image], Image],
    contrast: float,
    function: str,
    presmooth_sigma: float,
    spacing: tuple[float, float],
    valid: Image | None,
    threads: int,
) -> Iterator[tuple[Image, Image]]:
    """Perona–Malik diffusion of one slice, where the limiter has nothing to do.

    Parameters
    ----------
    u
        ``(h, w)``, float32, finite, C-contiguous. Not written to.
    steps
        Time steps of the scheme.
    stabilise
        The noise model's, for the intensities of ``u``.
    contrast, function, presmooth_sigma
        See `core.diffusivity.perona_malik.PeronaMalik`.
    spacing
        ``(hy, hx)``, in pixels.
    valid
        ``(h, w)`` of 0 and 1, or ``None`` where all pixels are valid.
    threads
        How many threads to use at most.

    Yields
    ------
    What the diffusivity looked at, stabilised and smoothed, and the image after each step; both are
    buffers that the next step writes to.
    """
    hy, hx = spacing
    scales = np.float32(1 / (contrast * hy) ** 2), np.float32(1 / (contrast * hx) ** 2)
    step_rows = _STEPS[function]
    bands = Bands(u.shape, threads)
    smooth = _Presmoother(u.shape, presmooth_sigma, spacing, valid, bands)
    before, after = u, np.empty_like(u)
    seen = u
    try:
        for step in steps:
            if step.refresh:
                seen = np.ascontiguousarray(stabilise(before), dtype=np.float32)
                seen = smooth(seen) if presmooth_sigma else seen
            weights = np.float32(step.tau / hy**2), np.float32(step.tau / hx**2)
            bands.run(partial(step_rows, before, seen, valid, after, weights, scales))
            yield seen, after
            # The image that came in stays as it was: from the second step on two buffers alternate.
            before, after = after, np.empty_like(u) if before is u else before
    finally:
        bands.close()
