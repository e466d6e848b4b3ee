"""Image data cut into blocks, and what is measured of each: the first half of noise estimation.

`noise_estimation` describes the method and names its references. All measurements are on the unit
range, where the lowest value of the data is 0 and the highest is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.missing import missing_pixels

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Blocks of a stack: above the first number they don't overlap, beyond the second some are skipped.
MANY_BLOCKS = 8192
MOST_BLOCKS = 200_000
MAX_SPECIAL = 16
_NEARLY_ALL = 0.99


@dataclass(frozen=True)
class Pixels:
    """Planes ``(n, h, w)`` as they came, which pixels count, and their range."""

    planes: NDArray[Any]
    valid: Bools
    lowest: float
    scale: float

    @property
    def n_pixels(self) -> int:
        return int(np.count_nonzero(self.valid))

    @property
    def resolution(self) -> float:
        """Rounding of the data's number format, in units of the range; 0 for integers."""
        if self.planes.dtype.kind != "f":
            return 0.0
        # Of nearly all values: a single one of 1e9, such as a zinger, says nothing of the others.
        largest = float(np.quantile(np.abs(self.sample().astype(np.float64)), _NEARLY_ALL))
        return float(np.finfo(self.planes.dtype).eps) * largest / self.scale

    def on_unit_range(self, values: NDArray[Any]) -> Floats:
        # On [0, 1] the estimate is equivariant by construction, and squares can't overflow.
        return (values.astype(np.float64) - self.lowest) / self.scale

    def sample(self, at_most: int = 200_000) -> NDArray[Any]:
        step = max(1, self.n_pixels // at_most)
        parts = [plane[ok][::step] for plane, ok in zip(self.planes, self.valid, strict=True)]
        return np.concatenate(parts)


def checked_pixels(planes: NDArray[Any], mask: NDArray[np.bool_] | None) -> Pixels:
    """The planes as `estimate_noise` takes them, or the reason why it doesn't."""
    try:
        stack = np.asarray(planes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidImageError(
            f"Noise is estimated from an array, not from a {type(planes).__name__}: {error}."
        ) from error
    if stack.dtype.kind not in "buif":
        raise InvalidImageError(
            f"Noise is estimated from real numbers, not from {stack.dtype}. "
            "Convert the image first."
        )
    if stack.ndim not in (2, 3):
        raise InvalidImageError(
            "Noise is estimated from a plane (h, w) or planes (n, h, w), not from an array of "
            f"shape {stack.shape}. Choose the two axes of a plane."
        )
    stack = stack[None] if stack.ndim == 2 else stack
    masks = np.ma.getmaskarray(planes).reshape(stack.shape)
    valid = np.zeros(stack.shape, np.bool_)
    for number, plane in enumerate(stack):
        valid[number] = ~missing_pixels(np.ma.array(plane, mask=masks[number])).mask
    if mask is not None:
        chosen = np.asarray(mask, dtype=np.bool_)
        if chosen.shape not in (np.shape(planes), stack.shape[1:]):
            raise InvalidImageError(
                f"The mask's shape {chosen.shape} doesn't fit the image's {np.shape(planes)}. "
                "Give a mask of the same height and width."
            )
        valid = valid & chosen
    ranges = [
        (float(plane[ok].min()), float(plane[ok].max()))
        for plane, ok in zip(stack, valid, strict=True)
        if ok.any()
    ]
    if not ranges:
        raise InvalidImageError(
            "No pixel has a finite value, so there is no noise to estimate. Choose another slice "
            "or mask, or set the noise level by hand."
        )
    lowest, highest = min(r[0] for r in ranges), max(r[1] for r in ranges)
    return Pixels(stack, valid, lowest, highest - lowest)


@dataclass(frozen=True)
class Blocks:
    """What is measured of each block; all ``(n_blocks,)``, on the unit range."""

    mean: Floats
    low: Floats  # mean square of the low frequencies: texture and noise
    high: Floats  # mean square of the high frequencies: noise
    coarse: Floats  # mean square of the lowest frequencies but the first
    middle: Floats  # mean square of the frequencies between coarse and high
    top: Floats  # mean square of the highest frequencies, part of high
    special: Floats  # fraction of pixels that are clipped, saturated or padded
    plane: Floats  # number of the plane

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Layout:
    """Which frequencies of a block of ``size`` × ``size`` pixels are counted as what."""

    size: int

    @property
    def order(self) -> NDArray[np.intp]:
        row, column = np.indices((self.size, self.size))
        return (row + column).ravel()

    @property
    def low(self) -> Bools:
        return (self.order > 0) & (self.order < self.size)

    @property
    def high(self) -> Bools:
        # No row and no column frequency is 0 here, so straight edges along the grid don't count.
        return self.order >= self.size

    @property
    def coarse(self) -> Bools:
        # The first frequencies are left out: shading lifts them, neither noise nor texture.
        return self.low & (self.order > 1) & (self.order <= max(1, self.size // 2 - 1))

    @property
    def middle(self) -> Bools:
        return self.low & (self.order >= self.size // 2)

    @property
    def top(self) -> Bools:
        return self.order >= self.size + self.size // 4

    @property
    def dct(self) -> Floats:
        k = np.arange(self.size)
        matrix = np.cos(np.pi * (2 * k + 1) * k[:, None] / (2 * self.size))
        matrix *= np.sqrt(2 / self.size)
        matrix[0] /= np.sqrt(2)
        return np.asarray(matrix)

    def low_quantile(self, p: float) -> float:
        """Quantile of ``low`` of white noise of variance 1."""
        return mean_square_quantile(p, int(self.low.sum()))

    @property
    def high_median(self) -> float:
        """Median of ``high`` of white noise of variance 1; below 1, the mean."""
        return mean_square_quantile(0.5, int(self.high.sum()))


def mean_square_quantile(p: float, count: int) -> float:
    """Quantile of the mean of ``count`` squared standard normal numbers (chi-square / count)."""
    return float(special.chdtri(count, 1 - p)) / count


def measure_blocks(pixels: Pixels, sample: NDArray[Any]) -> tuple[Blocks, Floats, Layout]:
    """The largest blocks of which there are enough, means of the exactly constant ones, layout."""
    special_values = special_values_of(sample)
    for size, enough in ((8, 64), (4, 32), (2, 1)):
        layout = Layout(size)
        blocks, constant_means = _measure_blocks_of(pixels, special_values, layout)
        if len(blocks) >= enough:
            break
    return blocks, constant_means, layout


@dataclass(frozen=True)
class Cut:
    """Square blocks of one plane, on the unit range, in which every pixel counts."""

    blocks: Floats  # (n_blocks, size, size)
    special: Floats  # fraction of pixels that are clipped, saturated or padded
    constant_means: Floats  # of the exactly constant blocks, which are left out
    plane: int


def cut_blocks(
    pixels: Pixels, special_values: NDArray[Any], size: int, at_most: int = MOST_BLOCKS
) -> Iterator[Cut]:
    """The blocks of ``size`` × ``size`` pixels of each plane; of many planes some rows of them."""
    n_blocks = pixels.n_pixels / size**2
    stride = size if n_blocks >= MANY_BLOCKS else max(1, size // 2)
    # Of a huge stack whole rows of blocks are skipped, so that time and memory stay bounded.
    row_stride = stride * max(1, round(n_blocks / at_most))

    def windows(values: NDArray[Any]) -> NDArray[Any]:
        view = np.lib.stride_tricks.sliding_window_view(values, (size, size))
        return view[::row_stride, ::stride].reshape(-1, size, size)

    for number, (plane, ok) in enumerate(zip(pixels.planes, pixels.valid, strict=True)):
        if min(plane.shape) < size:
            continue
        unit = pixels.on_unit_range(np.where(ok, plane, pixels.lowest))
        is_special = np.zeros(plane.shape, dtype=np.bool_)
        for value in special_values:
            is_special |= plane == value
        is_special &= ok
        is_constant = is_special & (
            ndimage.minimum_filter(unit, 3) == ndimage.maximum_filter(unit, 3)
        )
        whole = windows(ok).all(axis=(1, 2))
        blocks = windows(unit)[whole]
        # A block of one value is constant too where that value is no more frequent than others.
        constant = windows(is_constant)[whole].any(axis=(1, 2)) | (np.ptp(blocks, axis=(1, 2)) == 0)
        yield Cut(
            blocks[~constant],
            windows(is_special)[whole].mean(axis=(1, 2))[~constant],
            np.median(blocks[constant].reshape(-1, size**2), axis=1),
            number,
        )


def _measure_blocks_of(
    pixels: Pixels, special_values: NDArray[Any], layout: Layout
) -> tuple[Blocks, Floats]:
    """All blocks in which every pixel counts; the exactly constant ones apart, by their means."""
    size, dct = layout.size, layout.dct
    bands = np.stack([layout.low, layout.high, layout.coarse, layout.middle, layout.top], axis=1)
    mean_of_band = bands / np.maximum(1, bands.sum(axis=0))
    rows: list[Floats] = []
    constant_means: list[Floats] = []
    for cut in cut_blocks(pixels, special_values, size):
        n_blocks = len(cut.blocks)
        energy = np.square(dct @ cut.blocks @ dct.T).reshape(n_blocks, size**2)
        rows.append(
            np.stack(
                [
                    cut.blocks.mean(axis=(1, 2)),
                    *(energy @ mean_of_band).T,
                    cut.special,
                    np.full(n_blocks, float(cut.plane)),
                ]
            )
        )
        constant_means.append(cut.constant_means)
    table = np.concatenate(rows, axis=1) if rows else np.zeros((len(fields(Blocks)), 0))
    return Blocks(*table), np.concatenate(constant_means) if rows else np.zeros(0)


def special_values_of(sample: NDArray[Any]) -> NDArray[Any]:
    """Values that far more pixels have than have the values beside them.

    So look exactly constant areas, and the ends of the range where pixels were clipped.
    """
    values, counts = np.unique(sample, return_counts=True)
    if len(values) < 3:
        return values
    reach = min(4, len(values) - 1)
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(counts, reach, mode="reflect"), 2 * reach + 1
    )
    beside = np.median(np.delete(around, reach, axis=1), axis=1)
    often = counts > 10 * beside
    # At the ends a smaller heap is clipping already, yet the zeros of a photon count are none.
    often[0] |= counts[0] > 4 * counts[1]
    often[-1] |= counts[-1] > 4 * counts[-2]
    often &= counts >= max(20, 5e-4 * len(sample))
    most = np.argsort(counts * often)[::-1][:MAX_SPECIAL]
    return np.asarray(values[most[often[most]]])


def is_noise_free(blocks: Blocks, constant_means: Floats) -> bool:
    """Whether constant areas fill most of the image and are more than a background.

    A background is constant at one value, perhaps two. Many of them, or nothing but such values in
    the other blocks too, are labels or a phantom: what is left there are edges, and no noise.
    """
    n_constant = len(constant_means)
    if len(blocks) == 0:
        return n_constant > 0
    if n_constant < len(blocks):
        return False
    _, counts = np.unique(constant_means, return_counts=True)
    common = int(np.count_nonzero(counts >= 0.02 * n_constant))
    return common >= 3 or float(np.median(blocks.special)) > 0.95
