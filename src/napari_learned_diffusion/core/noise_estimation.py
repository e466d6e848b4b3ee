r"""Estimate the noise model of image data from the data itself.

Every plane is cut into square blocks, and each block into its cosine frequencies (orthonormal
DCT-II), in which white noise has the same variance everywhere. What the image shows sits in the
low frequencies, so the high ones *measure* the noise and the low ones *select* the blocks that
hold little else. White noise is independent between the two, so the selection doesn't bias the
measurement [1]_ [2]_. The variances of the selected blocks, gathered in bins of the block's mean
intensity, are the noise curve; a robust line through it is the noise model [3]_

.. math:: \operatorname{var}(u) = \mathrm{gain}\cdot u + \mathrm{offset}.

References
----------
.. [1] N. N. Ponomarenko, V. V. Lukin, M. S. Zriakhov, A. Kaarna, J. Astola, "An automatic approach
   to lossy compression of AVIRIS images", IEEE IGARSS (2007), 472-475.
.. [2] M. Colom, A. Buades, "Analysis and extension of the Ponomarenko et al. method, estimating a
   noise curve from a single image", Image Processing On Line 3 (2013), 173-197.
.. [3] A. Foi, M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian noise
   modeling and fitting for single-image raw-data", IEEE Trans. Image Process. 17 (2008), 1737-1754.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, special

from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.noise import Gaussian, NoiseModel, PoissonGaussian

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

KINDS = ("auto", "gaussian", "poisson-gaussian")

# Blocks of a stack: above the first number they don't overlap, beyond the second some are skipped.
MANY_BLOCKS = 8192
MOST_BLOCKS = 200_000
MAX_SPECIAL = 16
# Share of a bin's pixels that may be clipped: the variance loses less than 10 % up to here.
MAX_CLIPPED = 0.04
# Share of the blocks, those with the weakest texture, that is measured in any case.
WEAKEST = 0.03
FEWEST = 12
FIT_ROUNDS = 5
# Bins aren't trusted further than this, relative: real noise curves aren't exactly lines.
MODEL_ERROR = 0.05
# "auto": how much the noise must change over the image, and by how many standard errors.
NOTABLE_CHANGE = 1.15
SIGNIFICANT = 4.0
# The change asked for where only a part of the intensities has smooth areas: there texture that
# grows with the intensity looks like noise that does.
CHANGE_IN_TEXTURE = 1.6
# Low over high frequencies, above which they can't both be white noise.
NOT_WHITE = 1.5
# Lowest over middle frequencies, below which it is correlated noise and above which texture.
CORRELATED = 1.5
STEEP = 2.5
# High over highest frequencies, above which there is no floor of white noise at the end.
FALLING = 1.2
# Variance of the noisiest over the one of the quietest plane, above which they share no model.
DIFFERENT_PLANES = 2.0


@dataclass(frozen=True)
class NoiseCurve:
    """Measured noise against intensity, for plots. All three are ``(n_bins,)``.

    Parameters
    ----------
    intensity
        Mean intensity of each bin, in layer units, ascending.
    noise_sigma
        Standard deviation of the noise measured there, in layer units.
    weight
        Number of blocks behind each measurement.
    """

    intensity: Floats
    noise_sigma: Floats
    weight: Floats


@dataclass(frozen=True)
class NoiseEstimate:
    """A noise model found in data, and how far to trust it.

    Parameters
    ----------
    model
        The noise model, in layer units.
    curve
        The measurements that it was fitted to.
    confidence
        0 (a guess) to 1 (much data that fits the model well).
    message
        One sentence for the user: what was chosen, why, and what to beware of.
    slices_differ
        Whether the planes differ so much in their noise that one model can't serve them all.
    """

    model: NoiseModel
    curve: NoiseCurve
    confidence: float
    message: str
    slices_differ: bool = False


def sample_planes(n_planes: int, at_most: int = 16) -> NDArray[np.intp]:
    """Indices of up to ``at_most`` planes, evenly spread over a stack and ascending.

    The planes stand for equal parts of the stack, so the first and last ones, often empty, are
    taken only where all are.
    """
    if n_planes < 1 or at_most < 1:
        raise InvalidSettingError("There must be at least one plane to sample.")
    count = min(n_planes, at_most)
    return ((np.arange(count) + 0.5) * n_planes / count).astype(np.intp)


def estimate_noise(
    planes: NDArray[Any],
    kind: Literal["auto", "gaussian", "poisson-gaussian"] = "auto",
    *,
    mask: NDArray[np.bool_] | None = None,
) -> NoiseEstimate:
    r"""Estimate the noise model of a plane, or the one that the planes of a stack share.

    Left out are pixels that aren't finite or not in the ``mask``, exactly constant areas (clipped
    air, a stripped skull, padding), and intensities at which many pixels are clipped or saturated.
    Of all other blocks of 8×8 pixels (4×4 or 2×2 where there are too few) those count whose low
    frequencies show little but noise; their high frequencies are measured by the median, corrected
    for its bias. Where the smoothest areas have a spectrum that only correlated noise has, flat and
    then falling (a CT kernel), the noise that the high frequencies lack is added.

    The line through the noise curve is a robust weighted fit to the relative deviations (Tukey's
    weights, from the Theil-Sen line), with :math:`\mathrm{gain} > 0`. ``"auto"`` takes it where its
    slope is significant and changes the noise by more than 15 % over the image's intensities (60 %
    where only a part of these has smooth areas), else the Gaussian model. ``"gaussian"``, on data
    whose noise grows with the intensity, gives the root mean square of the noise over the image.

    Parameters
    ----------
    planes
        ``(h, w)`` or ``(n, h, w)``, real numbers of any dtype, in layer units. The planes should
        share one intensity scale; planes scaled one by one are to be estimated one by one.
    kind
        Noise model to fit, or ``"auto"`` to let the data choose.
    mask
        ``(h, w)`` or ``(n, h, w)``, True where pixels count. ``None``: everywhere.

    Returns
    -------
    NoiseEstimate
        in layer units; ``Gaussian(0.0)`` where there is no noise, as in a constant image.

    Raises
    ------
    InvalidImageError
        if the array doesn't hold real planes, the mask doesn't fit, or no pixel is finite.
    InvalidSettingError
        if there is no such kind.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> round(estimate_noise(100 + rng.normal(0, 5, (256, 256))).model.noise_sigma, 1)
    5.0
    """
    if kind not in KINDS:
        raise InvalidSettingError(
            f"There is no noise kind {kind!r}. Choose one of: {', '.join(KINDS)}."
        )
    data = _checked(planes, mask)
    if data.scale == 0:
        return _no_noise("The image is constant: no noise found.")
    return _estimate(data, kind)


@dataclass(frozen=True)
class _Data:
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
        largest = max(abs(self.lowest), abs(self.lowest + self.scale))
        return float(np.finfo(self.planes.dtype).eps) * largest / self.scale

    def on_unit_range(self, values: NDArray[Any]) -> Floats:
        # On [0, 1] the estimate is equivariant by construction, and squares can't overflow.
        return (values.astype(np.float64) - self.lowest) / self.scale

    def sample(self, at_most: int = 200_000) -> NDArray[Any]:
        step = max(1, self.n_pixels // at_most)
        parts = [plane[ok][::step] for plane, ok in zip(self.planes, self.valid, strict=True)]
        return np.concatenate(parts)


@dataclass(frozen=True)
class _Blocks:
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
class _Layout:
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
        return _mean_square_quantile(p, int(self.low.sum()))

    @property
    def high_median(self) -> float:
        """Median of ``high`` of white noise of variance 1; below 1, the mean."""
        return _mean_square_quantile(0.5, int(self.high.sum()))


def _mean_square_quantile(p: float, count: int) -> float:
    """Quantile of the mean of ``count`` squared standard normal numbers (chi-square / count)."""
    return float(special.chdtri(count, 1 - p)) / count


def _checked(planes: NDArray[Any], mask: NDArray[np.bool_] | None) -> _Data:
    stack = np.asarray(planes)
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
    valid = np.isfinite(stack)
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
    return _Data(stack, valid, lowest, highest - lowest)


def _no_noise(message: str, confidence: float = 1.0) -> NoiseEstimate:
    empty = np.zeros(0)
    return NoiseEstimate(Gaussian(0.0), NoiseCurve(empty, empty, empty), confidence, message)


def _special_values(sample: NDArray[Any]) -> NDArray[Any]:
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


def _measure_blocks(
    data: _Data, special_values: NDArray[Any], layout: _Layout
) -> tuple[_Blocks, Floats]:
    """All blocks in which every pixel counts; the exactly constant ones apart, by their means."""
    size = layout.size
    n_blocks = data.n_pixels / size**2
    stride = size if n_blocks >= MANY_BLOCKS else max(1, size // 2)
    # Of a huge stack whole rows of blocks are skipped, so that time and memory stay bounded.
    row_stride = stride * max(1, round(n_blocks / MOST_BLOCKS))
    dct = layout.dct
    names = (layout.low, layout.high, layout.coarse, layout.middle, layout.top)
    bands = np.stack(names, axis=1)
    mean_of_band = bands / np.maximum(1, bands.sum(axis=0))
    rows: list[Floats] = []
    constant_means: list[Floats] = []
    for number, (plane, ok) in enumerate(zip(data.planes, data.valid, strict=True)):
        if min(plane.shape) < size:
            continue
        unit = data.on_unit_range(np.where(ok, plane, data.lowest))
        is_special = np.zeros(plane.shape, dtype=np.bool_)
        for value in special_values:
            is_special |= plane == value
        is_special &= ok
        is_constant = is_special & (
            ndimage.minimum_filter(unit, 3) == ndimage.maximum_filter(unit, 3)
        )

        def windows(pixels: NDArray[Any]) -> NDArray[Any]:
            view = np.lib.stride_tricks.sliding_window_view(pixels, (size, size))
            return view[::row_stride, ::stride].reshape(-1, size, size)

        whole = windows(ok).all(axis=(1, 2))
        blocks = windows(unit)[whole]
        # A block of one value is constant too where that value is no more frequent than others.
        constant = windows(is_constant)[whole].any(axis=(1, 2)) | (np.ptp(blocks, axis=(1, 2)) == 0)
        special_part = windows(is_special)[whole].mean(axis=(1, 2))[~constant]
        constant_means.append(np.median(blocks[constant].reshape(-1, size**2), axis=1))
        blocks = blocks[~constant]
        energy = np.square(dct @ blocks @ dct.T).reshape(len(blocks), size**2)
        rows.append(
            np.stack(
                [
                    blocks.mean(axis=(1, 2)),
                    *(energy @ mean_of_band).T,
                    special_part,
                    np.full(len(blocks), float(number)),
                ]
            )
        )
    table = np.concatenate(rows, axis=1) if rows else np.zeros((len(fields(_Blocks)), 0))
    return _Blocks(*table), np.concatenate(constant_means) if rows else np.zeros(0)


@dataclass(frozen=True)
class _Bins:
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
class _Line:
    """``variance = slope · intensity + offset``, and never below ``floor``."""

    slope: float
    offset: float
    floor: float
    slope_error: float = np.inf
    misfit: float = 0.0  # robust relative deviation of the bins from it

    def __call__(self, intensity: Floats) -> Floats:
        return np.maximum(self.slope * intensity + self.offset, self.floor)


def _estimate(data: _Data, kind: str) -> NoiseEstimate:
    sample = data.sample()
    special_values = _special_values(sample)
    for size, enough in ((8, 64), (4, 32), (2, 1)):
        layout = _Layout(size)
        blocks, constant_means = _measure_blocks(data, special_values, layout)
        if len(blocks) >= enough:
            break
    n_constant = len(constant_means)
    if len(blocks) == 0:
        if n_constant:
            return _no_noise("The image is made of exactly constant areas: no noise found.")
        return _from_neighbours(data)
    if _is_noise_free(blocks, constant_means):
        return _no_noise("The image is made of exactly constant areas: no noise found.")
    notes: list[str] = []
    confidence = len(blocks) / (len(blocks) + 50)
    if n_constant > 0.1 * (n_constant + len(blocks)):
        notes.append("a large exactly constant background was left out")

    blocks, share_clipped = _without_clipped(blocks)
    if share_clipped == 1:
        notes.append("most pixels lie at an end of the range, so the noise may be underestimated")
        confidence *= 0.3
    elif share_clipped > 0.1:
        notes.append("intensities with many clipped or saturated pixels were left out")

    level = _flat_level(blocks, layout)
    if level <= (4 * data.resolution) ** 2:
        return _no_noise("No noise found: the smoothest parts of the image are free of it.", 0.8)
    bins, line = _fit_curve(blocks, level, layout)
    span = np.quantile(blocks.mean, [0.05, 0.95])
    ends = np.sqrt(line(span))
    significant = len(bins.count) > 2 and line.slope > SIGNIFICANT * line.slope_error
    smooth = bins.intensity[bins.excess < 0.5]
    covered = np.ptp(smooth) > 0.5 * np.ptp(span)
    change = NOTABLE_CHANGE if covered else CHANGE_IN_TEXTURE
    grows = significant and bool(ends[1] > change * ends[0])
    if grows or kind == "poisson-gaussian":
        confidence /= 1 + (line.misfit / 0.5) ** 2
    else:
        line = _Line(0.0, level, level)

    texture, correlation = _low_frequencies(blocks, line, layout)
    if correlation > 1.1:
        notes.append(
            "the noise is correlated between neighbouring pixels, which is counted in only roughly"
        )
        confidence *= 0.7
    elif texture > NOT_WHITE:
        notes.append(
            "fine texture everywhere, or noise that is correlated between neighbouring pixels, "
            "makes the level uncertain"
        )
        confidence *= max(0.2, NOT_WHITE / texture)
    slices_differ = _spread_over_planes(blocks, line) > DIFFERENT_PLANES
    if slices_differ:
        notes.append("the slices differ in their noise")
        confidence *= 0.5
    step = _grey_level(sample) / data.scale
    if np.mean(line(blocks.mean)) < (0.6 * step) ** 2:
        notes.append("there are few grey levels, the noise is finer than one")
        confidence *= 0.5

    curve = NoiseCurve(
        bins.intensity * data.scale + data.lowest,
        np.sqrt(bins.variance * correlation) * data.scale,
        bins.count,
    )
    ends = ends * np.sqrt(correlation) * data.scale
    model: NoiseModel
    if kind == "poisson-gaussian" or (kind == "auto" and grows):
        # Without any growth: one percent of it over the range, which changes nothing but is valid.
        slope = max(line.slope, 0.01 * level)
        offset = line.offset if slope == line.slope else level
        model = PoissonGaussian(slope * correlation, offset * correlation)
        reason = (
            f"the noise grows with the intensity, from {ends[0]:.3g} to {ends[1]:.3g}"
            if grows
            else "as asked for, though the noise hardly grows with the intensity"
        )
    else:
        model = Gaussian(float(np.sqrt(np.mean(line(blocks.mean)) * correlation)))
        reason = (
            "its mean level, as asked for, though the noise grows with the intensity"
            if grows
            else "the noise is about the same at all intensities"
        )
    model = model.transformed(data.scale, data.lowest)
    message = "; ".join([f"{model.describe()}: {reason}", *notes]) + "."
    return NoiseEstimate(model, curve, float(np.clip(confidence, 0, 1)), message, slices_differ)


def _is_noise_free(blocks: _Blocks, constant_means: Floats) -> bool:
    """Whether constant areas fill most of the image and are more than a background.

    A background is constant at one value, perhaps two. Many of them, or nothing but such values in
    the other blocks too, are labels or a phantom: what is left there are edges, and no noise.
    """
    n_constant = len(constant_means)
    if n_constant < len(blocks):
        return False
    _, counts = np.unique(constant_means, return_counts=True)
    common = int(np.count_nonzero(counts >= 0.02 * n_constant))
    return common >= 3 or float(np.median(blocks.special)) > 0.95


def _without_clipped(blocks: _Blocks) -> tuple[_Blocks, float]:
    """The blocks at intensities where hardly a pixel is clipped, and the share of the others.

    Whole intensity bins go, never single blocks: those that happen to touch the end of the range
    less than their like are a biased choice. All stay, and the share is 1, where none would.
    """
    numbers = _bin_numbers(blocks.mean)
    clipped = np.zeros(len(blocks), dtype=np.bool_)
    for inside in _members(numbers):
        weak = inside[blocks.low[inside] <= np.quantile(blocks.low[inside], 0.25)]
        clipped[inside] = blocks.special[weak].mean() > MAX_CLIPPED
    if np.count_nonzero(~clipped) < min(FEWEST, len(blocks)):
        return blocks, 1.0
    kept = _Blocks(*(getattr(blocks, f.name)[~clipped] for f in fields(blocks)))
    return kept, float(clipped.mean())


def _members(numbers: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def _bin_numbers(mean: Floats, at_most: int = 24, fewest: int = 24) -> NDArray[np.intp]:
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


def _flat_level(blocks: _Blocks, layout: _Layout) -> float:
    """Variance of noise that is the same everywhere, measured in the weakest texture there is."""
    variance = 0.0
    for _ in range(FIT_ROUNDS):
        weak = _weak(blocks.low, variance * layout.low_quantile(0.9))
        variance = float(np.median(blocks.high[weak])) / layout.high_median
    return variance


def _fit_curve(blocks: _Blocks, level: float, layout: _Layout) -> tuple[_Bins, _Line]:
    members = _members(_bin_numbers(blocks.mean))
    line = _Line(0.0, level, level)
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
        bins = _Bins(*np.array(rows).T)
        line = _fit_line(bins, layout)
        limit = layout.low_quantile(0.9)
    return bins, line


def _fit_line(bins: _Bins, layout: _Layout) -> _Line:
    r"""Robust line through the bins, by iteratively reweighted least squares (Tukey's weights).

    The deviations :math:`v_k / f(u_k) - 1` are relative, since the variance of a measured variance
    grows with its square. Bins with more texture than the others weigh less.
    """
    x, y = bins.intensity, bins.variance
    n_high = int(layout.high.sum())
    prior = 1 / (2 / (n_high * bins.count) + MODEL_ERROR**2)
    excess = bins.excess
    prior /= (1 + excess**2) ** 2
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
    return _Line(slope, offset, floor, slope_error, misfit)


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


def _low_frequencies(blocks: _Blocks, line: _Line, layout: _Layout) -> tuple[float, float]:
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


def _spread_over_planes(blocks: _Blocks, line: _Line) -> float:
    """Largest over smallest variance of the planes, each relative to the line; 1 for one plane."""
    expected = line(blocks.mean)
    relative_low = blocks.low / expected
    levels = []
    for inside in _members(blocks.plane.astype(np.intp)):
        # The plane's own smoother half, so that a plane with more noise isn't taken for texture.
        weak = inside[_weak(relative_low[inside], float(np.median(relative_low[inside])))]
        levels.append(float(blocks.high[weak].sum() / expected[weak].sum()))
    return max(levels) / max(min(levels), 1e-6)


def _grey_level(sample: NDArray[Any]) -> float:
    """Distance between neighbouring grey levels, in layer units; 0 where values are continuous."""
    values = np.unique(sample).astype(np.float64)
    return float(np.diff(values).min()) if 1 < len(values) < len(sample) / 4 else 0.0


def _from_neighbours(data: _Data) -> NoiseEstimate:
    """What differences of adjacent pixels tell where not even blocks of 2×2 are whole."""
    differences = [np.zeros(0)]
    for plane, ok in zip(data.planes, data.valid, strict=True):
        values = data.on_unit_range(np.where(ok, plane, data.lowest))
        for axis in (0, 1):
            both = np.diff(ok.astype(np.int8), axis=axis) == 0
            both &= ok.take(np.arange(ok.shape[axis] - 1), axis=axis)
            differences.append(np.diff(values, axis=axis)[both])
    steps = np.concatenate(differences)
    if len(steps) == 0:
        return _no_noise("There are no neighbouring pixels to compare: no noise found.", 0.0)
    sigma = float(np.sqrt(np.median(steps**2) / _mean_square_quantile(0.5, 1) / 2))
    model = Gaussian(sigma * data.scale)
    centre = np.array([np.mean(data.sample().astype(np.float64))])
    return NoiseEstimate(
        model,
        NoiseCurve(centre, np.array([model.noise_sigma]), np.array([float(len(steps))])),
        0.1,
        f"{model.describe()}: a guess from differences of neighbours, as the image is too small.",
    )
