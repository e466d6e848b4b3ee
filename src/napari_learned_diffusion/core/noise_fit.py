"""From measured blocks to the noise curve and the line through it: the other half of estimation.

Blocks are gathered in bins of their mean intensity, and those of the weakest texture count.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.noise import Rician
from napari_learned_diffusion.core.noise_measurement import Blocks, Floats, Layout

# Share of a bin's pixels that may be clipped: the variance loses less than 10 % up to here.
MAX_CLIPPED = 0.04
# Share of the blocks, those with the weakest texture, that is measured in any case.
WEAKEST = 0.03
FEWEST = 12
FIT_ROUNDS = 5
# Bins aren't trusted further than this, relative: real noise curves aren't exactly lines.
MODEL_ERROR = 0.05
# Low over high frequencies, above which they can't both be white noise.
NOT_WHITE = 1.5
# Lowest over middle frequencies, below which it is correlated noise and above which texture.
CORRELATED = 1.5
STEEP = 2.5
# High over highest frequencies, above which there is no floor of white noise at the end.
FALLING = 1.2
# Mean magnitudes, in noise levels, below which there is no signal and above which a clear one.
AIR, CLEAR_SIGNAL = 1.6, 2.8


@dataclass(frozen=True)
class Bins:
    """The noise curve on the unit range while it is fitted; all ``(n_bins,)``."""

    intensity: Floats
    variance: Floats
    count: Floats  # blocks measured
    texture: Floats  # low over expected high frequencies; below 1 in white noise and no texture

    @property
    def excess(self) -> Floats:
        """Relative texture beyond the bins with the least."""
        return np.maximum(self.texture / np.quantile(self.texture, 0.25) - 1, 0)


@dataclass(frozen=True)
class Line:
    """``variance = slope · intensity + offset``, and never below ``floor``."""

    slope: float
    offset: float
    floor: float
    slope_error: float = np.inf
    misfit: float = 0.0  # robust relative deviation of the bins from it

    def __call__(self, intensity: Floats) -> Floats:
        return np.maximum(self.slope * intensity + self.offset, self.floor)


def without_clipped(blocks: Blocks) -> tuple[Blocks, float]:
    """The blocks at intensities where hardly a pixel is clipped, and the share of the others.

    Whole intensity bins go, never single blocks: those that happen to touch the end of the range
    less than their like are a biased choice. All stay, and the share is 1, where none would.
    """
    numbers = bin_numbers(blocks.mean)
    clipped = np.zeros(len(blocks), dtype=np.bool_)
    for inside in group_members(numbers):
        weak = inside[blocks.low[inside] <= np.quantile(blocks.low[inside], 0.25)]
        clipped[inside] = blocks.special[weak].mean() > MAX_CLIPPED
    if np.count_nonzero(~clipped) < min(FEWEST, len(blocks)):
        return blocks, 1.0
    kept = Blocks(*(getattr(blocks, f.name)[~clipped] for f in fields(blocks)))
    return kept, float(clipped.mean())


def flat_level(blocks: Blocks, layout: Layout) -> float:
    """Variance of noise that is the same everywhere, measured in the weakest texture there is."""
    variance = 0.0
    for _ in range(FIT_ROUNDS):
        weak = _weak(blocks.low, variance * layout.low_quantile(0.9))
        variance = float(np.median(blocks.high[weak])) / layout.high_median
    return variance


def fit_curve(blocks: Blocks, level: float, layout: Layout) -> tuple[Bins, Line]:
    """The noise curve and the line through it, which in turn tells the blocks that count."""
    members = group_members(bin_numbers(blocks.mean))
    line = Line(0.0, level, level)
    limit = 0.0  # the first look is at each bin's weakest texture, as its noise isn't known yet
    for _ in range(FIT_ROUNDS):
        relative_low = blocks.low / line(blocks.mean)
        rows: list[tuple[float, float, float, float]] = []
        for inside in members:
            weak = inside[_weak(relative_low[inside], limit)]
            rows.append(
                (
                    float(blocks.mean[weak].mean()),
                    float(np.median(blocks.high[weak])) / layout.high_median,
                    float(len(weak)),
                    float(np.median(relative_low[weak])),
                )
            )
        bins = Bins(*np.array(rows).T)
        line = _fit_line(bins, layout)
        limit = layout.low_quantile(0.9)
    return bins, line


def low_frequencies(blocks: Blocks, line: Line, layout: Layout) -> tuple[float, float]:
    r"""How much the low frequencies hold beyond white noise, and how much of that is noise.

    Returns
    -------
    texture
        Low over high frequencies in the smoothest blocks, 1 for white noise.
    correlation
        Variance of the noise over the one of its high frequencies: above 1 where the smoothest
        blocks have a spectrum that is level at low frequencies and falls at high ones, as
        reconstruction kernels and interpolation leave it. The one of texture is steep throughout.
    """
    expected = line(blocks.mean)
    relative_low = blocks.low / expected
    texture = float(np.quantile(relative_low, WEAKEST)) / layout.low_quantile(WEAKEST)
    weak = _weak(relative_low, max(1.0, texture) * layout.low_quantile(0.5))
    if layout.size < 8 or texture < NOT_WHITE or len(weak) < 64:
        return texture, 1.0
    coarse, middle, high, top = (
        float(np.mean((band / expected)[weak]))
        for band in (blocks.coarse, blocks.middle, blocks.high, blocks.top)
    )
    if high < FALLING * top:
        return texture, 1.0
    # Between the two there is no telling; a cliff would make neighbouring slices differ.
    trust = float(np.interp(coarse / middle, [CORRELATED, STEEP], [1, 0]))
    n_low, n_high = int(layout.low.sum()), int(layout.high.sum())
    whole = (n_low * texture + n_high) / (n_low + n_high)
    return texture, 1 + trust * (whole - 1)


def spread_over_planes(blocks: Blocks, expected: Floats) -> float:
    """Largest over smallest variance of the planes, relative to the blocks' expected ones."""
    relative_low = blocks.low / expected
    levels = []
    for inside in group_members(blocks.plane.astype(np.intp)):
        # The plane's own smoother half, so that a plane with more noise isn't taken for texture.
        weak = inside[_weak(relative_low[inside], float(np.median(relative_low[inside])))]
        levels.append(float(blocks.high[weak].sum() / expected[weak].sum()))
    return max(levels) / max(min(levels), 1e-6)


def group_members(numbers: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Indices of those that have each number, ascending by the number."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def bin_numbers(mean: Floats, at_most: int = 24, fewest: int = 24) -> NDArray[np.intp]:
    """The intensity bin of each block.

    Bins of equal counts, and those that are wide are split evenly, since the few brightest blocks
    of a fluorescence image tell more of the slope than all of its background.
    """
    ordered = np.sort(mean)
    count = max(1, min(at_most, len(mean) // fewest))
    edges = np.concatenate(
        [
            np.quantile(ordered, np.linspace(0, 1, count + 1)[1:-1]),
            np.linspace(ordered[0], ordered[-1], at_most + 1)[1:-1],
        ]
    )
    kept: list[float] = []
    below_last = 0
    for edge in np.sort(edges):
        below = int(np.searchsorted(ordered, edge))
        if below - below_last >= fewest and len(ordered) - below >= fewest:
            kept.append(float(edge))
            below_last = below
    return np.searchsorted(np.array(kept), mean, side="right")


def _weak(low: Floats, limit: float) -> NDArray[np.intp]:
    """Those with no more in their low frequencies than noise has, at least some."""
    share = max(WEAKEST, min(1.0, FEWEST / len(low)))
    return np.flatnonzero(low <= max(limit, float(np.quantile(low, share))))


def _fit_line(bins: Bins, layout: Layout) -> Line:
    r"""Robust line through the bins, by iteratively reweighted least squares (Tukey's weights).

    The deviations :math:`v_k / f(u_k) - 1` are relative, since the variance of a measured variance
    grows with its square. Bins with more texture than the others weigh less.
    """
    x, y = bins.intensity, bins.variance
    prior = _trust(bins, layout)
    floor = max(0.1 * float(np.quantile(y, 0.1)), float(np.finfo(np.float64).tiny))
    slope, offset = _median_line(x, y, prior)
    darkest = int(np.argmin(x))
    slope_error, misfit = np.inf, 0.0
    for _ in range(20):
        fitted = np.maximum(slope * x + offset, floor)
        deviation = y / fitted - 1
        misfit = 1.4826 * _weighted_median(np.abs(deviation), prior)
        z = deviation / max(misfit, 0.03)
        weight = prior * np.maximum(1 - (z / 4.685) ** 2, 0.03) ** 2 / fitted**2
        weight /= weight.sum()
        x_mean, y_mean = weight @ x, weight @ y
        spread = float(weight @ (x - x_mean) ** 2)
        if spread == 0:
            slope, offset = 0.0, float(y_mean)
            continue
        slope = float(weight @ ((x - x_mean) * (y - y_mean))) / spread
        offset = float(y_mean - slope * x_mean)
        residual = float(weight @ (y - slope * x - offset) ** 2)
        slope_error = float(np.sqrt(residual / spread / max(1, len(x) - 2)))
        if slope * x[darkest] + offset < 0.25 * y[darkest]:
            # Some noise was seen in the dark, so the line must not cross 0 before: turn it there.
            away, rise = x - x[darkest], y - 0.25 * y[darkest]
            slope = float(weight @ (away * rise) / (weight @ away**2))
            offset = float(0.25 * y[darkest] - slope * x[darkest])
    return Line(slope, offset, floor, slope_error, misfit)


def _trust(bins: Bins, layout: Layout) -> Floats:
    """Weight of each bin: how exactly it is measured, and less where there is texture."""
    weight = 1 / (2 / (int(layout.high.sum()) * bins.count) + MODEL_ERROR**2)
    return np.asarray(weight / (1 + bins.excess**2) ** 2)


@dataclass(frozen=True)
class RicianFit:
    """Rician noise through the bins of a noise curve, on the unit range."""

    noise_sigma: float
    misfit: float  # robust relative deviation of the bins' variances from it
    in_air: float  # noise_sigma by the bins without signal alone, NaN where there are none
    in_signal: float  # and by those with a clear signal
    air_blocks: float


def fit_rician(bins: Bins, no_signal: float, layout: Layout) -> RicianFit:
    r"""Rician noise through the bins: the median of what each of them says by itself.

    Mean and variance of magnitudes determine signal and noise at once, since their ratio
    :math:`\mathrm{E}m / \sqrt{\operatorname{var} m}` tells the signal-to-noise ratio [1]_.

    References
    ----------
    .. [1] C. G. Koay, P. J. Basser, "Analytically exact correction scheme for signal extraction
       from noisy magnitude MR signals", J. Magn. Reson. 179 (2006), 317-322.
    """
    signal = np.linspace(0, 20, 401)
    unit = Rician(1.0)
    variance = unit.variance(signal)
    mean = bins.intensity - no_signal
    ratio = mean / np.sqrt(bins.variance)
    share = np.interp(ratio, unit.mean(signal) / np.sqrt(variance), variance)
    sigma = np.sqrt(bins.variance / share)
    weight = _trust(bins, layout)
    noise_sigma = _weighted_median(sigma, weight)
    deviation = np.abs((sigma / noise_sigma) ** 2 - 1)
    air = mean < AIR * noise_sigma
    clear = mean > CLEAR_SIGNAL * noise_sigma
    return RicianFit(
        noise_sigma,
        1.4826 * _weighted_median(deviation, weight),
        _weighted_median(sigma[air], weight[air]) if air.any() else np.nan,
        _weighted_median(sigma[clear], weight[clear]) if clear.any() else np.nan,
        float(bins.count[air].sum()),
    )


def rician_variance(noise_sigma: float, no_signal: float, mean: Floats) -> Floats:
    """Variance of Rician noise where the noisy intensities have that mean."""
    model = Rician(noise_sigma, no_signal)
    signal = no_signal + noise_sigma * np.linspace(0, 20, 401)
    return np.interp(mean, model.mean(signal), model.variance(signal))


def rayleigh_distance(magnitudes: Floats, step: float) -> float:
    r"""Largest difference of the distribution of the smallest magnitudes from a Rayleigh one's.

    Parameters
    ----------
    magnitudes
        In noise levels. Those above `AIR` don't count, as there may be a signal.
    step
        Distance of neighbouring grey levels, 0 if continuous.

    Returns
    -------
    float
        0 where they are equal, to 1.
    """
    values, counts = np.unique(magnitudes[magnitudes < AIR], return_counts=True)
    if len(values) == 0:
        return 1.0

    def rayleigh(m: Floats | float) -> Floats:
        return np.asarray(1 - np.exp(-(np.minimum(m, AIR) ** 2) / 2))

    share = np.cumsum(counts) / counts.sum()
    return float(np.abs(share - rayleigh(values + step / 2) / rayleigh(AIR)).max())


def _median_line(x: Floats, y: Floats, weight: Floats) -> tuple[float, float]:
    """Slope and offset of the weighted median of the lines through all pairs (Theil and Sen)."""
    first, second = np.triu_indices(len(x), 1)
    apart = np.abs(x[first] - x[second])
    first, second, apart = first[apart > 0], second[apart > 0], apart[apart > 0]
    slope = 0.0
    if len(apart):
        slopes = (y[first] - y[second]) / (x[first] - x[second])
        slope = _weighted_median(slopes, weight[first] * weight[second] * apart)
    return slope, _weighted_median(y - slope * x, weight)


def _weighted_median(values: Floats, weight: Floats) -> float:
    order = np.argsort(values)
    below = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(below, 0.5 * below[-1])]])
