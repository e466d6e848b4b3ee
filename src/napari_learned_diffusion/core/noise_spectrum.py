r"""Correlated noise, measured in the flattest blocks of an image.

High frequencies hold little of noise that neighbouring pixels share, so here all frequencies are
measured, in blocks of 16×16 pixels. They are sorted into two halves like the fields of a
chessboard. Texture shows in both halves of a block, but Gaussian noise is independent between them,
whatever its spectrum: the blocks that are flat in one half measure the noise in the other, without
bias. The mean of the spectrum found in this way is the variance of a pixel.

What is flat isn't noise for sure. `FlatSpectrum.is_clear` asks for what tells noise from texture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from napari_learned_diffusion.core.noise_fit import MAX_CLIPPED, bin_numbers, group_members
from napari_learned_diffusion.core.noise_measurement import (
    Floats,
    Layout,
    Pixels,
    cut_blocks,
    special_values_of,
)

SIZE = 16
ENOUGH_BLOCKS = 96
MOST_BLOCKS = 16_384
# Share of the blocks, the flattest, that is measured, and the fewest of them.
FLATTEST = 0.08
FEWEST = 24
ROUNDS = 5
LENGTHS = np.linspace(0, 3, 61)
INTENSITY_GROUPS = 8

# Variance of a pixel over the one of white noise with the same high frequencies.
NOT_WHITE = 1.7
# High over highest frequencies, below which white noise ends the spectrum, and the rest is texture.
FALLING = 2.5
# Lowest over middle frequencies, relative to noise of that correlation length.
STEEP = 1.6
# Fourth moment of the middle frequencies over the one of normal numbers.
HEAVY_TAILED = 1.08
# Spread of the flattest blocks' energies, as a variance, over the one of Gaussian noise.
UNLIKE = 3.5
# Variance at an intensity over the one of the flattest blocks, below which it is the same noise.
EVEN = 1.6
# Variance in flat blocks over the one in those of a clean part, above which it is noise.
LOUDER = 4.0
# Part of the range of intensities that must have the same noise.
COVERED = 0.5


@dataclass(frozen=True)
class FlatSpectrum:
    """Noise in the flattest blocks, on the unit range, and what speaks for its being noise.

    Parameters
    ----------
    noise_sigma
        Standard deviation of a pixel.
    correlation_length
        Of the Gaussian filter that gives neighbouring pixels the correlation found, in pixels.
    intensity, curve, count
        Mean intensity, noise level and number of the flattest blocks, at those intensities where
        they are as flat as anywhere.
    redness
        Variance of a pixel over the one of white noise with the same high frequencies.
    fall
        High over highest frequencies.
    steepness
        How much the spectrum rises towards low frequencies, over what noise of that correlation
        length does. Noise levels out; texture goes on rising.
    tails
        Fourth moment of the middle frequencies, 1 for normal numbers. Texture has heavy tails.
    unlikeness
        Spread of the blocks' energies over the one of Gaussian noise. Texture differs by place.
    coverage
        Part of the range of intensities over which there are such blocks. What is flat in the air
        only doesn't tell the noise of all else.
    spread
        Largest over smallest variance of the planes.
    spectrum
        ``(SIZE, SIZE)``, the energy of each cosine frequency over the variance of a pixel; its
        mean is 1. The first frequencies, which shading lifts, are filled in by their neighbours.
    """

    noise_sigma: float
    correlation_length: float
    intensity: Floats
    curve: Floats
    count: Floats
    redness: float
    fall: float
    steepness: float
    tails: float
    unlikeness: float
    coverage: float
    spread: float
    spectrum: Floats

    def is_noise_beside(self, clean: FlatSpectrum | None) -> bool:
        """Whether this is correlated noise, for someone who knows a clean part of the same.

        What is flat there has the texture but not the noise, so nothing needs to be told from
        texture by its looks.

        Parameters
        ----------
        clean
            Of the clean part, on the same range; ``None`` where it has too few blocks.
        """
        if clean is None:
            return self.is_clear
        louder = self.noise_sigma**2 > LOUDER * clean.noise_sigma**2
        return self.redness > NOT_WHITE and louder

    @property
    def is_clear(self) -> bool:
        """Whether flat areas show correlated noise that is the same everywhere."""
        return (
            self.redness > NOT_WHITE
            and self.fall > FALLING
            and self.steepness < STEEP
            and self.tails < HEAVY_TAILED
            and self.unlikeness < UNLIKE
            and self.coverage > COVERED
        )


@dataclass(frozen=True)
class _Blocks:
    energy: Floats  # (n_blocks, SIZE, SIZE), squared cosine frequencies
    mean: Floats
    plane: NDArray[np.intp]


class _Frequencies:
    """Which of the cosine frequencies of a block are counted as what."""

    row, column = np.indices((SIZE, SIZE))
    order = row + column
    # The first frequencies are left out: shading lifts them, neither noise nor texture.
    used = order > 1
    halves = (used & (order % 2 == 0), used & (order % 2 == 1))
    radius = np.rint(np.hypot(row, column)).astype(np.intp)
    lowest = (order == 2) | (order == 3)
    low = (order >= 2) & (order <= 4)
    middle = (order >= 5) & (order <= 8)
    tested = (order >= 3) & (order <= 8)
    high = order >= SIZE
    next_high = high & (order < SIZE + SIZE // 4)
    top = order >= SIZE + SIZE // 2
    # Texture is strongest at low frequencies, so these say most of whether a block is flat.
    weight = 1 / (1.0 + order)
    # Correlation of neighbours is the mean of these cosines over the spectrum.
    neighbours = (np.cos(np.pi * row / SIZE) + np.cos(np.pi * column / SIZE)) / 2


def flat_spectrum(pixels: Pixels, sample: NDArray[Any]) -> FlatSpectrum | None:
    """What the flattest blocks hold; ``None`` where there are too few blocks to tell."""
    blocks = _measure(pixels, sample)
    if len(blocks.mean) < ENOUGH_BLOCKS:
        return None
    spectrum, flat = _flat_blocks(blocks.energy)
    activity = [_activity(blocks.energy, spectrum, half) for half in _Frequencies.halves]
    variance, length = _pixel_variance(spectrum)
    expected = _gaussian_spectrum(length)
    f = _Frequencies
    groups = group_members(bin_numbers(blocks.mean, INTENSITY_GROUPS, FEWEST))
    floors, means, counts = np.array([_floor(activity, blocks.mean, inside) for inside in groups]).T
    even = floors <= max(EVEN, float(floors.min()))
    span = float(np.ptp(np.quantile(blocks.mean, [0.05, 0.95])))
    planes = [np.flatnonzero(blocks.plane == number) for number in np.unique(blocks.plane)]
    levels = [_floor(activity, blocks.mean, inside)[0] for inside in planes]
    return FlatSpectrum(
        noise_sigma=float(np.sqrt(variance)),
        correlation_length=length,
        intensity=means[even],
        curve=np.sqrt(variance * floors[even]),
        count=counts[even],
        redness=variance / float(spectrum[f.high].mean()),
        fall=float(spectrum[f.next_high].mean() / spectrum[f.top].mean()),
        steepness=float(
            (spectrum[f.low].mean() / spectrum[f.middle].mean())
            / (expected[f.low].mean() / expected[f.middle].mean())
        ),
        tails=_tails(blocks.energy, flat),
        unlikeness=_unlikeness(activity, flat),
        coverage=float(np.ptp(means[even])) / max(span, np.finfo(np.float64).tiny),
        spread=max(levels) / min(levels),
        spectrum=_filled(spectrum),
    )


def _filled(spectrum: Floats) -> Floats:
    f = _Frequencies
    filled = np.where(f.used, spectrum, spectrum[f.lowest].mean())
    return np.asarray(filled / filled.mean())


def coloured(white: Floats, spectrum: Floats) -> Floats:
    """White noise ``(..., h, w)`` of variance 1, as noise of that `FlatSpectrum.spectrum`.

    Correlated across the ends of an axis as if it were cyclic.
    """
    along = [2 * SIZE * np.abs(np.fft.fftfreq(n)) for n in white.shape[-2:]]
    at = np.meshgrid(*along, indexing="ij")
    energy = map_coordinates(spectrum, at, order=1, mode="nearest")
    transfer = np.sqrt(energy / energy.mean())
    return np.asarray(np.fft.ifft2(np.fft.fft2(white) * transfer).real)


def _measure(pixels: Pixels, sample: NDArray[Any]) -> _Blocks:
    dct = Layout(SIZE).dct
    energy, means, planes = [np.zeros((0, SIZE, SIZE))], [np.zeros(0)], [np.zeros(0, np.intp)]
    for cut in cut_blocks(pixels, special_values_of(sample), SIZE, MOST_BLOCKS):
        kept = cut.blocks[cut.special <= MAX_CLIPPED]
        energy.append(np.square(dct @ kept @ dct.T))
        means.append(kept.mean(axis=(1, 2)))
        planes.append(np.full(len(kept), cut.plane))
    return _Blocks(np.concatenate(energy), np.concatenate(means), np.concatenate(planes))


def _flat_blocks(energy: Floats) -> tuple[Floats, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The spectrum ``(SIZE, SIZE)`` of the flattest blocks, and those flat in either half."""
    first, second = _Frequencies.halves
    weakest = np.argsort(energy[:, _Frequencies.used].sum(axis=1))[: _n_flat(len(energy))]
    spectrum = energy[weakest].mean(axis=0)
    for _ in range(ROUNDS):
        flat = tuple(
            np.argsort(_activity(energy, spectrum, half))[: _n_flat(len(energy))]
            for half in (first, second)
        )
        spectrum = np.zeros_like(spectrum)
        spectrum[second] = energy[flat[0]][:, second].mean(axis=0)
        spectrum[first] = energy[flat[1]][:, first].mean(axis=0)
    return spectrum, (flat[0], flat[1])


def _n_flat(count: int, at_least: int = FEWEST) -> int:
    return min(count, max(at_least, int(FLATTEST * count)))


def _activity(energy: Floats, spectrum: Floats, half: NDArray[np.bool_]) -> Floats:
    """Mean energy of each block over the spectrum's, in one half of the frequencies."""
    f = _Frequencies
    count = np.bincount(f.radius[f.used])
    smooth = np.bincount(f.radius[f.used], spectrum[f.used]) / np.maximum(1, count)
    tiny = np.finfo(np.float64).tiny
    weight = f.weight[half] / np.maximum(smooth[f.radius[half]], tiny)
    return np.asarray(energy[:, half] @ weight / f.weight[half].sum())


def _pixel_variance(spectrum: Floats) -> tuple[float, float]:
    """Variance of a pixel and the correlation length, from all frequencies but the first.

    The first ones are filled in as noise of that correlation length has them, beside all others or
    beside their neighbours, whichever is less: noise of a CT kernel is weak there.
    """
    f = _Frequencies
    expected = [_gaussian_spectrum(length) for length in LENGTHS]
    correlation = [float(np.average(f.neighbours[f.used], weights=s[f.used])) for s in expected]
    found = float(np.average(f.neighbours[f.used], weights=spectrum[f.used]))
    length = float(np.interp(found, correlation, LENGTHS))
    gaussian = _gaussian_spectrum(length)
    first = gaussian[~f.used].sum()
    measured = spectrum[f.used].sum()
    filled = min(
        measured * first / gaussian[f.used].sum(),
        spectrum[f.lowest].mean() * first / gaussian[f.lowest].mean(),
    )
    return float(measured + filled) / SIZE**2, length


@lru_cache(maxsize=128)
def _gaussian_spectrum(length: float) -> Floats:
    """Mean squared cosine frequencies ``(SIZE, SIZE)`` of `Correlated` noise of variance 1."""
    omega = 2 * np.pi * np.fft.fftfreq(16 * SIZE)
    correlation = np.fft.ifft(np.exp(-((omega * length) ** 2))).real
    distance = np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))
    dct = Layout(SIZE).dct
    along = np.einsum("ki,ij,kj->k", dct, (correlation / correlation[0])[distance], dct)
    return np.outer(along, along)


def _floor(
    activity: list[Floats], mean: Floats, inside: NDArray[np.intp]
) -> tuple[float, float, float]:
    """Variance of the flattest of some blocks, over all blocks' one; their mean and number."""
    count = _n_flat(len(inside), FEWEST // 3)
    chosen = [inside[np.argsort(a[inside])[:count]] for a in activity]
    level = (activity[1][chosen[0]].mean() + activity[0][chosen[1]].mean()) / 2
    return float(level), float(mean[chosen[0]].mean()), float(count)


def _tails(energy: Floats, flat: tuple[NDArray[np.intp], NDArray[np.intp]]) -> float:
    ratios = []
    for blocks, half in zip(flat, reversed(_Frequencies.halves), strict=True):
        tested = energy[blocks][:, half & _Frequencies.tested]
        ratios.append((tested**2).mean(axis=0) / (3 * tested.mean(axis=0) ** 2))
    return float(np.median(np.concatenate(ratios)))


def _unlikeness(activity: list[Floats], flat: tuple[NDArray[np.intp], NDArray[np.intp]]) -> float:
    ratios = []
    for blocks, measured, half in zip(
        flat, reversed(activity), reversed(_Frequencies.halves), strict=True
    ):
        weight = _Frequencies.weight[half] / _Frequencies.weight[half].sum()
        values = measured[blocks]
        # By the quartiles, since a flat area may hold a few edges.
        quartiles = np.quantile(values, [0.25, 0.5, 0.75])
        spread = (quartiles[2] - quartiles[0]) / (1.349 * quartiles[1])
        ratios.append(spread**2 / (2 * float((weight**2).sum())))
    return float(np.sqrt(np.prod(ratios)))
