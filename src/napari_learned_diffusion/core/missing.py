"""Pixels that hold no intensity: which they are is decided here, and nowhere else.

Such pixels take no part: nothing flows into or out of them, they have no say in the noise, and they
come back exactly as they were. There are four kinds.

Not finite or masked
    NaN, infinity, and what a masked array masks.
Declared
    Pixels that have a value which the file, or the caller, says to be no intensity.
Fill values
    What programs write where they know nothing, such as the lowest float32. A value is taken for
    one only where it is so far from all others that it can't be of the same image, see
    `_fill_values`. A bright value never is, unless it is beyond any detector: hot pixels, metal in
    a CT and saturated pixels are data.
Constant background
    A large area of exactly one value in an image whose noise couldn't have left it so: the outside
    of a field of view or of a brain mask, see `_constant_background`. Clipped pixels (saturated
    white, the zeros of a photon count) are data.

The first three don't depend on the noise, so the noise is estimated without them; the last does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_learned_diffusion.core.noise import NoiseModel

Bools = NDArray[np.bool_]

# Fill values beyond any detector, of either sign, to six digits: the largest float32 and float64,
# netCDF's, and those of resampling, climate and geology programs.
_CONVENTIONS = (
    float(np.finfo(np.float32).max),
    float(np.finfo(np.float64).max),
    9.969209968386869e36,
    1.7014118346046923e38,
    1e20,
    1e30,
    1e36,
)
_HUGE = 1e15
# How many times the others (their 99th percentile) a value must be: a detector spans 1e5 at most.
_BEYOND_CONVENTION = 1e5
_BEYOND = 1e10
_MIXED = 1e6

# Conventions of moderate size, all negative.
_MODERATE = (
    *(-999.0, -9999.0, -99999.0, -999999.0, -65504.0),
    *(float(-(2**bits) + n) for bits in (15, 31, 63) for n in (0, 1)),
)
_RANGES_BELOW_CONVENTION = 1.0
_RANGES_BELOW = 10.0
_REPEATED = 10
_MOST_VALUES = 4

# Of constant areas: squares of so many pixels an edge, in all this part of the plane and so many
# pixels at least, and that part of all the pixels of their value.
_SQUARE = 5
_LEAST_PART = 0.005
_LEAST_PIXELS = 64
_SOLID = 0.5

_SAMPLE = 200_000


@dataclass(frozen=True)
class Missing:
    """Which pixels of a plane take no part, and why.

    Parameters
    ----------
    mask
        ``(h, w)``, True where a pixel takes no part.
    not_finite, masked, declared
        Number of pixels that are NaN or infinite, that are masked in a masked array, and that have
        a declared value.
    fill_values, background
        Values that were recognised as a fill value or as a constant background, with the number of
        pixels of each.
    """

    mask: Bools
    not_finite: int = 0
    masked: int = 0
    declared: int = 0
    fill_values: Mapping[float, int] = field(default_factory=dict)
    background: Mapping[float, int] = field(default_factory=dict)

    @property
    def valid(self) -> Bools | None:
        """True where a pixel takes part; ``None`` where all do."""
        return ~self.mask if self.mask.any() else None

    @property
    def is_everything(self) -> bool:
        """Whether no pixel is left."""
        return bool(self.mask.all())


def missing_pixels(
    plane: NDArray[Any],
    declared: Sequence[float] = (),
    noise: NoiseModel | None = None,
) -> Missing:
    """The pixels of a plane that take no part.

    Parameters
    ----------
    plane
        ``(h, w)``, integers or floats, may be a masked array.
    declared
        Values that are known to be no intensities, in the unit of the plane.
    noise
        The noise model, in the same unit. ``None``: a constant background isn't looked for.
    """
    values = np.ma.getdata(plane)
    mask = np.ma.getmaskarray(plane).copy()
    masked = int(np.count_nonzero(mask))
    not_finite = found = 0
    if values.dtype.kind == "f":
        strange = ~np.isfinite(values) & ~mask
        not_finite = int(np.count_nonzero(strange))
        mask |= strange
    for value in declared:
        theirs = _has_value(values, value) & ~mask
        found += int(np.count_nonzero(theirs))
        mask |= theirs
    fill_values: dict[float, int] = {}
    for theirs in _fill_values(values, mask):
        _count_values(values, theirs, fill_values)
        mask |= theirs
    background: dict[float, int] = {}
    if noise is not None and not noise.is_zero:
        theirs = _constant_background(values, ~mask, noise)
        _count_values(values, theirs, background)
        mask |= theirs
    return Missing(mask, not_finite, masked, found, fill_values, background)


def without_missing(plane: NDArray[Any], declared: Sequence[float] = ()) -> NDArray[Any]:
    """A plane as noise is measured on it: floating point, NaN where a pixel holds no intensity."""
    mask = missing_pixels(plane, declared).mask
    values = np.ma.getdata(plane)
    if values.dtype.kind == "f" and np.array_equal(mask, np.isnan(values)):
        return values
    kept = values.astype(np.result_type(values.dtype, np.float32))
    kept[mask] = np.nan
    return kept


def both_without_missing(
    before: NDArray[Any], after: NDArray[Any], declared: Sequence[float] = ()
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A plane before and after denoising, NaN in both where the first holds no intensity."""
    before = without_missing(before, declared)
    if before.dtype.kind == "f":
        after = np.where(np.isnan(before), np.nan, after)
    return before, after


def _count_values(values: NDArray[Any], mask: Bools, counts: dict[float, int]) -> None:
    """Add the most frequent values of a mask, with their numbers; the rest counts for the first."""
    found, numbers = np.unique(values[mask], return_counts=True)
    order = np.argsort(numbers)[::-1]
    for i in order[:_MOST_VALUES]:
        counts[float(found[i])] = counts.get(float(found[i]), 0) + int(numbers[i])
    if len(order) > _MOST_VALUES:
        counts[float(found[order[0]])] += int(numbers[order[_MOST_VALUES:]].sum())


def _has_value(values: NDArray[Any], value: float) -> Bools:
    """Pixels of a value, which files round to the precision that they have."""
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        exact = float(value).is_integer() and limits.min <= int(value) <= limits.max
        return np.asarray(values == int(value)) if exact else np.zeros(values.shape, np.bool_)
    if not math.isfinite(value):
        return np.asarray(np.isnan(values) if math.isnan(value) else values == value)
    with np.errstate(over="ignore", invalid="ignore"):
        if abs(value) >= _HUGE:
            return np.asarray(np.abs(values / value - 1) < 1e-6)
        return np.asarray(
            (values == value) | (values == np.float32(value)) | (values == np.float16(value))
        )


# --- fill values ----------------------------------------------------------------------------------


def _fill_values(values: NDArray[Any], mask: Bools) -> Iterator[Bools]:
    """Pixels of fill values that nobody declared, as boolean planes one after another.

    Huge ones, in floating point: values of at least 1e15 that are a known convention and at least
    1e5 times as large as the others, or 1e10 times, if they are alike or few. Beside these the
    mixtures go that interpolation makes of them.

    Moderate ones: the lowest value of the plane, if it is negative, repeated exactly, and farther
    below the others than these span (from their 0.1th to their 99.9th percentile). A value that is
    no known convention (-999, -9999, -32768 …) must be ten spans below and have ten pixels.
    """
    kept = ~mask
    if not kept.any():
        return
    if values.dtype.kind == "f" and values.dtype.itemsize > 2:  # half precision ends at 65504
        huge = _huge_fill_values(values, kept)
        if huge is not None:
            yield huge
            kept = kept & ~huge
    if values.dtype.kind not in "if":  # none is negative
        return
    for _ in range(_MOST_VALUES):
        moderate = _moderate_fill_value(values, kept)
        if moderate is None:
            return
        yield moderate
        kept = kept & ~moderate


def _huge_fill_values(values: NDArray[Any], kept: Bools) -> Bools | None:
    huge = kept & (np.abs(values) >= _HUGE)
    n_huge = int(np.count_nonzero(huge))
    if n_huge == 0:
        return None
    sizes = np.abs(values.astype(np.float64))
    known = np.zeros_like(huge)
    for convention in _CONVENTIONS:
        for value in (convention, -convention):
            known |= huge & _has_value(values, value)
    others = kept & ~known
    known &= sizes >= _BEYOND_CONVENTION * _size(values[others])
    size = _size(values[kept & ~huge])
    if size == 0:  # nothing to compare with but zeros, or nothing
        return known if known.any() else None
    _, counts = np.unique(values[huge], return_counts=True)
    alike = int(counts.max()) >= n_huge / 2
    few = n_huge <= 0.01 * np.count_nonzero(kept)
    if known.any() or alike or few:
        known |= huge & (sizes >= (_MIXED if known.any() else _BEYOND) * size)
    return known if known.any() else None


def _moderate_fill_value(values: NDArray[Any], kept: Bools) -> Bools | None:
    if not kept.any():
        return None
    lowest = values[kept].min()
    if not lowest < 0 or (values.dtype.kind == "f" and float(lowest) <= -_HUGE):
        return None
    theirs = kept & (values == lowest)
    others = values[kept & ~theirs]
    count = int(np.count_nonzero(theirs))
    is_known = float(lowest) in _MODERATE
    if count < (2 if is_known else _REPEATED) or len(others) < _REPEATED:
        return None
    low, high = np.quantile(_some(others), [0.001, 0.999])
    ranges = _RANGES_BELOW_CONVENTION if is_known else _RANGES_BELOW
    return theirs if 0 < ranges * (high - low) < low - float(lowest) else None


def _size(values: NDArray[Any]) -> float:
    """The 99th percentile of the magnitudes; 0 where there are no values."""
    return float(np.quantile(np.abs(_some(values)), 0.99)) if values.size else 0.0


def _some(values: NDArray[Any]) -> NDArray[np.float64]:
    """Evenly spread values of many, in double precision."""
    return values.ravel()[:: max(1, values.size // _SAMPLE)].astype(np.float64)


# --- constant background --------------------------------------------------------------------------


def _constant_background(values: NDArray[Any], kept: Bools, noise: NoiseModel) -> Bools:
    r"""Areas of exactly one value that the noise could not have left so.

    An area counts where squares of 5 by 5 pixels of one value cover 0.5 % of the plane (64 pixels
    at least) and half of all the pixels of this value; at the plane's border 3 rows are enough.
    It must reach the border of the plane; then others of the same value count with it.

    - The noise at that value must be at least one grey level: in a photon image with 80 % zeros
      there is none at 0, and in an image of few grey levels neighbours may well be equal.
    - Elsewhere the plane must be noisy, and there must be four such values at most: a phantom or a
      map of labels is constant everywhere, and whoever denoises it wants it denoised.
    - Where no values lie beyond it (the lowest or the highest of the plane), it must not be
      clipped. A clipped area is ragged: its border is where the noise decided which pixels are
      clipped. So at most a fifth of the pixels around it may have its value, and if a tenth of
      them are closer to it than the noise, hardly any.
    """
    nothing = np.zeros(values.shape, np.bool_)
    least = max(_LEAST_PIXELS, math.ceil(_LEAST_PART * values.size))
    if min(values.shape) < _SQUARE or values.size < 2 * least:
        return nothing
    centres = _centres_of_squares(values, kept, least)
    if centres is None:
        return nothing
    found, counts = np.unique(values[centres], return_counts=True)
    areas = {v: _squares(values, centres, v) for v in found[np.argsort(counts)[::-1][:16]]}
    areas = {v: a for v, a in areas.items() if _n_from_border(a) >= least}
    if not 0 < len(areas) <= _MOST_VALUES or not _is_noisy(values, kept & ~_grown(centres), noise):
        return nothing
    step = _grey_level(values[kept])
    background = nothing
    for value, area in areas.items():
        sigma = math.sqrt(max(0.0, float(noise.variance(np.float64(value)))))
        same = kept & (values == value)
        solid = np.count_nonzero(area) >= _SOLID * np.count_nonzero(same)
        if sigma < step or sigma == 0 or not solid:
            continue
        if _is_clipped(values, kept, float(value), area, sigma):
            continue
        labels, _ = ndimage.label(same, np.ones((3, 3)))
        touched = np.unique(labels[area])
        background = background | (np.isin(labels, touched) & same)
    return background


def _centres_of_squares(values: NDArray[Any], kept: Bools, least: int) -> Bools | None:
    """Middles of the squares of one value, ``None`` where there are few; the border goes on."""
    # Of noisy images hardly any neighbours are equal, which is quickly found out.
    if np.count_nonzero(values[:, 1:] == values[:, :-1]) < least // 2:
        return None
    reach = _SQUARE // 2
    padded, ok = np.pad(values, reach, mode="edge"), np.pad(kept, reach, mode="edge")
    along_row = (padded[:, 1:] == padded[:, :-1]) & ok[:, 1:] & ok[:, :-1]
    width = values.shape[1]
    rows = along_row[:, :width].copy()
    for shift in range(1, _SQUARE - 1):
        rows &= along_row[:, shift : shift + width]
    below = padded[1:, reach:-reach] == padded[:-1, reach:-reach]
    height = values.shape[0]
    squares = rows[:height].copy()
    for shift in range(1, _SQUARE):
        squares &= rows[shift : shift + height] & below[shift - 1 : shift - 1 + height]
    return squares if squares.any() else None


def _squares(values: NDArray[Any], centres: Bools, value: Any) -> Bools:
    """The squares of one value, of which the centres are given."""
    return np.asarray(_grown(centres & (values == value)) & (values == value))


def _grown(mask: Bools) -> Bools:
    """A mask with the pixels up to two rows and columns away."""
    return np.asarray(ndimage.maximum_filter(mask, _SQUARE, mode="constant"))


def _n_from_border(area: Bools) -> int:
    """Number of the pixels of an area in parts that reach the border of the plane."""
    if not any(side.any() for side in (area[0], area[-1], area[:, 0], area[:, -1])):
        return 0
    labels, _ = ndimage.label(area, np.ones((3, 3)))
    sides = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return int(np.bincount(labels.ravel())[np.unique(sides[sides > 0])].sum())


def _is_noisy(values: NDArray[Any], kept: Bools, noise: NoiseModel) -> bool:
    """Whether neighbours differ, where there is no constant area, as the noise says, or more."""
    pairs = kept[:, 1:] & kept[:, :-1]
    if np.count_nonzero(pairs) < max(_LEAST_PIXELS // 2, 0.001 * values.size):
        return False
    left, right = (_some(side[pairs]) for side in (values[:, :-1], values[:, 1:]))
    expected = np.sqrt(np.mean(noise.variance((left + right) / 2)))
    # Of white noise the median is 0.95 times it, of noise with a correlation of 0.95 a fifth.
    return bool(np.median(np.abs(right - left)) > 0.1 * expected)


def _grey_level(values: NDArray[Any]) -> float:
    """The usual distance between neighbouring values, next to 0 where they are continuous."""
    levels = np.unique(_some(values))
    return float(np.median(np.diff(levels))) if len(levels) > 1 else 0.0


def _is_clipped(values: NDArray[Any], kept: Bools, value: float, area: Bools, sigma: float) -> bool:
    """Whether an area looks as if pixels were clipped at its value, an end of the range."""
    elsewhere = kept & ~area
    beyond = 0.01 * np.count_nonzero(elsewhere)
    below = np.count_nonzero(values[elsewhere] < value)
    above = np.count_nonzero(values[elsewhere] > value)
    if min(below, above) > beyond:
        return False
    around = _grown(area) & elsewhere
    n_around = np.count_nonzero(around)
    distance = np.abs(values[around].astype(np.float64) - value)
    n_same = np.count_nonzero(distance == 0)
    n_near = np.count_nonzero(distance <= sigma) - n_same
    return bool(n_same > 0.2 * n_around or (n_near > 0.1 * n_around and n_same > 0.25 * n_near))
