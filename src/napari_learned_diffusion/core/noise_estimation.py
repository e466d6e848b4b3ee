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

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.noise import (
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.noise_fit import (
    NOT_WHITE,
    Bins,
    Line,
    RicianFit,
    fit_curve,
    fit_rician,
    flat_level,
    low_frequencies,
    rayleigh_distance,
    rician_variance,
    spread_over_planes,
    without_clipped,
)
from napari_learned_diffusion.core.noise_measurement import (
    Blocks,
    Floats,
    Layout,
    Pixels,
    checked_pixels,
    is_noise_free,
    mean_square_quantile,
    measure_blocks,
)
from napari_learned_diffusion.core.noise_spectrum import flat_spectrum

Kind = Literal["auto", "gaussian", "poisson-gaussian", "rician", "correlated"]
KINDS = get_args(Kind)

# "auto": how much the noise must change over the image, and by how many standard errors.
NOTABLE_CHANGE = 1.15
SIGNIFICANT = 4.0
# The change asked for where only a part of the intensities has smooth areas: there texture that
# grows with the intensity looks like noise that does.
CHANGE_IN_TEXTURE = 1.6
# Variance of the noisiest over the one of the quietest plane, above which they share no model. A
# model that they share would be the quietest plane's. Photographs with the same noise, 16 together,
# stay below 1.3 where that noise is strong enough to matter.
DIFFERENT_PLANES = 1.5

# "auto" takes noise for Rician where air and signal by themselves give its level within so much …
AGREE = 0.15
# … the variances of the bins deviate by less than this from it …
RICIAN_MISFIT = 0.25
# … air is at least this share of the blocks, and its intensities have a Rayleigh distribution.
AIR_SHARE = 0.02
RAYLEIGH_DISTANCE = 0.08


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
    kind: Kind = "auto",
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
    pixels = checked_pixels(planes, mask)
    if pixels.scale == 0:
        return _no_noise("The image is constant: no noise found.")
    return _estimate(pixels, kind)


@dataclass(frozen=True)
class _Measured:
    """What the choice of a model is made from, on the unit range."""

    pixels: Pixels
    sample: NDArray[Any]
    blocks: Blocks
    layout: Layout
    level: float  # variance of noise that is the same everywhere
    bins: Bins
    line: Line

    @property
    def no_signal(self) -> float:
        """Where intensity 0 lies."""
        return -self.pixels.lowest / self.pixels.scale

    @property
    def flat_line(self) -> Line:
        return Line(0.0, self.level, self.level)

    def curve(self, variance: Floats) -> NoiseCurve:
        return self.curve_of(self.bins.intensity, np.sqrt(variance), self.bins.count)

    def curve_of(self, intensity: Floats, noise_sigma: Floats, weight: Floats) -> NoiseCurve:
        scale, lowest = self.pixels.scale, self.pixels.lowest
        return NoiseCurve(intensity * scale + lowest, noise_sigma * scale, weight)


@dataclass(frozen=True)
class _Choice:
    """A model, in layer units, and why it was chosen."""

    model: NoiseModel
    curve: NoiseCurve
    reason: str
    confidence: float
    slices_differ: bool
    notes: tuple[str, ...] = ()


def _estimate(pixels: Pixels, kind: str) -> NoiseEstimate:
    sample = pixels.sample()
    blocks, constant_means, layout = measure_blocks(pixels, sample)
    if is_noise_free(blocks, constant_means):
        return _no_noise("The image is made of exactly constant areas: no noise found.")
    if len(blocks) == 0:
        return _from_neighbours(pixels)
    notes: list[str] = []
    confidence = len(blocks) / (len(blocks) + 50)
    if len(constant_means) > 0.1 * (len(constant_means) + len(blocks)):
        notes.append("a large exactly constant background was left out")

    blocks, share_clipped = without_clipped(blocks)
    if share_clipped == 1:
        notes.append("most pixels lie at an end of the range, so the noise may be underestimated")
        confidence *= 0.3
    elif share_clipped > 0.1:
        notes.append("intensities with many clipped or saturated pixels were left out")

    level = flat_level(blocks, layout)
    if level <= (4 * pixels.resolution) ** 2:
        return _no_noise("No noise found: the smoothest parts of the image are free of it.", 0.8)
    bins, line = fit_curve(blocks, level, layout)
    measured = _Measured(pixels, sample, blocks, layout, level, bins, line)
    choice = _rician(measured, kind) or _correlated(measured, kind) or _white(measured, kind)
    notes += choice.notes
    confidence *= choice.confidence
    if choice.slices_differ:
        notes.append("the slices differ in their noise")
        confidence *= 0.5
    if _mean_variance(choice.model, sample) < (0.6 * _grey_level(sample)) ** 2:
        notes.append("there are few grey levels, the noise is finer than one")
        confidence *= 0.5
    message = "; ".join([f"{choice.model.describe()}: {choice.reason}", *notes]) + "."
    return NoiseEstimate(
        choice.model,
        choice.curve,
        float(np.clip(confidence, 0, 1)),
        message,
        choice.slices_differ,
    )


def _white(measured: _Measured, kind: str) -> _Choice:
    """Noise that is the same everywhere or grows with the intensity, by its high frequencies."""
    pixels, blocks, bins = measured.pixels, measured.blocks, measured.bins
    line, level, confidence = measured.line, measured.level, 1.0
    span = np.quantile(blocks.mean, [0.05, 0.95])
    ends = np.sqrt(line(span))
    grows = _grows(measured, span)
    if grows or kind == "poisson-gaussian":
        confidence /= 1 + (line.misfit / 0.5) ** 2
    else:
        line = measured.flat_line

    notes: tuple[str, ...] = ()
    texture, correlation = low_frequencies(blocks, line, measured.layout)
    if correlation > 1.1:
        notes = (
            "the noise is correlated between neighbouring pixels, which is counted in only roughly",
        )
        confidence *= 0.7
    elif texture > NOT_WHITE:
        notes = (
            "fine texture everywhere, or noise that is correlated between neighbouring pixels, "
            "makes the level uncertain",
        )
        confidence *= max(0.2, NOT_WHITE / texture)

    model: NoiseModel
    if kind == "poisson-gaussian" or (kind == "auto" and grows):
        model = _poisson_gaussian(line, level, correlation)
        ends = ends * np.sqrt(correlation) * pixels.scale
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
    return _Choice(
        model.transformed(pixels.scale, pixels.lowest),
        measured.curve(bins.variance * correlation),
        reason,
        confidence,
        spread_over_planes(blocks, line(blocks.mean)) > DIFFERENT_PLANES,
        notes,
    )


def _grows(measured: _Measured, span: Floats) -> bool:
    """Whether the line is steep enough, and known well enough, to be no constant."""
    bins, line = measured.bins, measured.line
    significant = len(bins.count) > 2 and line.slope > SIGNIFICANT * line.slope_error
    smooth = bins.intensity[bins.excess < 0.5]
    covered = np.ptp(smooth) > 0.5 * np.ptp(span)
    change = NOTABLE_CHANGE if covered else CHANGE_IN_TEXTURE
    dark, bright = np.sqrt(line(span))
    return bool(significant and bright > change * dark)


def _rician(measured: _Measured, kind: str) -> _Choice | None:
    """Rician noise, where it was asked for or is plain to see."""
    if kind not in ("auto", "rician"):
        return None
    pixels, bins, blocks = measured.pixels, measured.bins, measured.blocks
    fit = fit_rician(bins, measured.no_signal, measured.layout)
    seen = _is_rician(measured, fit)
    if kind == "auto" and not seen:
        return None
    reason = (
        "the background is the one of a magnitude image, and the signal has the noise to match"
        if seen
        else "as asked for, though background and signal don't show it plainly"
    )
    expected = rician_variance(fit.noise_sigma, measured.no_signal, blocks.mean)
    return _Choice(
        Rician(fit.noise_sigma * pixels.scale),
        measured.curve(bins.variance),
        reason,
        1 / (1 + (fit.misfit / 0.5) ** 2),
        spread_over_planes(blocks, expected) > DIFFERENT_PLANES,
    )


def _is_rician(measured: _Measured, fit: RicianFit) -> bool:
    pixels = measured.pixels
    agree = all(abs(found / fit.noise_sigma - 1) < AGREE for found in (fit.in_air, fit.in_signal))
    enough = fit.air_blocks >= AIR_SHARE * len(measured.blocks)
    if pixels.lowest < 0 or fit.misfit > RICIAN_MISFIT or not (agree and enough):
        return False
    noise_sigma = fit.noise_sigma * pixels.scale
    magnitudes = measured.sample.astype(np.float64) / noise_sigma
    step = _grey_level(measured.sample) / noise_sigma
    return rayleigh_distance(magnitudes, step) < RAYLEIGH_DISTANCE


def _correlated(measured: _Measured, kind: str) -> _Choice | None:
    """Correlated noise, where it was asked for or flat areas show it clearly."""
    asked = kind == "correlated"
    # White noise needs no second look, which takes as long as the first.
    if not asked and (kind != "auto" or not _may_be_correlated(measured)):
        return None
    found = flat_spectrum(measured.pixels, measured.sample)
    if not asked and (found is None or not found.is_clear):
        return None
    if found is None:
        white = _white(measured, "gaussian")
        level = float(np.sqrt(_mean_variance(white.model, measured.sample)))
        note = "there are too few flat areas to tell how far it is correlated"
        return replace(
            white,
            model=Correlated(level, 0.0),
            reason="as asked for",
            confidence=white.confidence * 0.5,
            notes=(*white.notes, note),
        )
    return _Choice(
        Correlated(found.noise_sigma * measured.pixels.scale, round(found.correlation_length, 3)),
        measured.curve_of(found.intensity, found.curve, found.count),
        (
            "flat areas show that neighbouring pixels share noise"
            if found.is_clear
            else "as asked for, though it can't be told from texture for sure"
        ),
        0.8 if found.is_clear else 0.4,
        found.spread > DIFFERENT_PLANES,
    )


def _may_be_correlated(measured: _Measured) -> bool:
    texture, _ = low_frequencies(measured.blocks, measured.flat_line, measured.layout)
    return texture > NOT_WHITE


def _mean_variance(model: NoiseModel, sample: NDArray[Any]) -> float:
    """Variance of the noise over an image, in squared layer units."""
    return float(np.mean(model.variance(sample.astype(np.float64))))


def _poisson_gaussian(line: Line, level: float, correlation: float) -> PoissonGaussian:
    # Without any growth: one percent of it over the range, which changes nothing but is valid.
    slope = max(line.slope, 0.01 * level)
    offset = line.offset if slope == line.slope else level
    return PoissonGaussian(slope * correlation, offset * correlation)


def _no_noise(message: str, confidence: float = 1.0) -> NoiseEstimate:
    empty = np.zeros(0)
    return NoiseEstimate(Gaussian(0.0), NoiseCurve(empty, empty, empty), confidence, message)


def _grey_level(sample: NDArray[Any]) -> float:
    """Distance between neighbouring grey levels, in layer units; 0 where values are continuous."""
    values = np.unique(sample).astype(np.float64)
    return float(np.diff(values).min()) if 1 < len(values) < len(sample) / 4 else 0.0


def _from_neighbours(pixels: Pixels) -> NoiseEstimate:
    """What differences of adjacent pixels tell where not even blocks of 2×2 are whole."""
    differences = [np.zeros(0)]
    for plane, ok in zip(pixels.planes, pixels.valid, strict=True):
        values = pixels.on_unit_range(np.where(ok, plane, pixels.lowest))
        for axis in (0, 1):
            both = np.diff(ok.astype(np.int8), axis=axis) == 0
            both &= ok.take(np.arange(ok.shape[axis] - 1), axis=axis)
            differences.append(np.diff(values, axis=axis)[both])
    steps = np.concatenate(differences)
    if len(steps) == 0:
        return _no_noise("There are no neighbouring pixels to compare: no noise found.", 0.0)
    sigma = float(np.sqrt(np.median(steps**2) / mean_square_quantile(0.5, 1) / 2))
    model = Gaussian(sigma * pixels.scale)
    centre = np.array([np.mean(pixels.sample().astype(np.float64))])
    return NoiseEstimate(
        model,
        NoiseCurve(centre, np.array([model.noise_sigma]), np.array([float(len(steps))])),
        0.1,
        f"{model.describe()}: a guess from differences of neighbours, as the image is too small.",
    )
