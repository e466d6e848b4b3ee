"""Large planes in tiles that together give exactly what the whole plane gives.

In one diffusion step nothing travels farther than the model's reach plus one pixel. A tile with a
halo of that many pixels for each step is therefore right in its inside, whatever its border does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil

Window = tuple[slice, slice]

SMALLEST_TILE = 32


@dataclass(frozen=True)
class Tile:
    """A part of a plane.

    Parameters
    ----------
    outer
        What is computed, halo included, in the plane.
    target
        What is kept of it, in the plane.
    inner
        The same, within the outer window.
    """

    outer: Window
    target: Window
    inner: Window


def cut(shape: tuple[int, int], tile: int, halo: int, multiple: int = 1) -> list[Tile]:
    """Cut a plane into tiles of at most ``tile`` pixels along each axis, halo not counted.

    Every tile, halo included, begins at a ``multiple`` of pixels. A plane that is smaller than one
    multiple is a tile of its own.
    """
    halo = ceil(halo / multiple) * multiple
    cells_of_tile = max(1, tile // multiple)
    axes = []
    for size in shape:
        cells = ceil(size / multiple)
        count = ceil(cells / cells_of_tile)
        bounds = [min(size, round(i * cells / count) * multiple) for i in range(count + 1)]
        axes.append(
            [
                (
                    slice(max(0, a - halo), min(size, b + halo)),
                    slice(a, b),
                    slice(a - max(0, a - halo), b - max(0, a - halo)),
                )
                for a, b in pairwise(bounds)
            ]
        )
    return [Tile((y[0], x[0]), (y[1], x[1]), (y[2], x[2])) for y, x in product(axes[0], axes[1])]


def largest_tile(shape: tuple[int, int], halo: int, bytes_per_pixel: float, budget: int) -> int:
    """The largest tile that fits into ``budget`` bytes with its halo, at least `SMALLEST_TILE`."""
    if shape[0] * shape[1] * bytes_per_pixel <= budget:
        return max(shape)
    edge = int((budget / bytes_per_pixel) ** 0.5) - 2 * halo
    return min(max(shape), max(SMALLEST_TILE, edge))
