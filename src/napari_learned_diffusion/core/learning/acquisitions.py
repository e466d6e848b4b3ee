r"""Simulated acquisitions: a clean image as a scanner, a camera or a microscope would show it.

Each kind of acquisition is a frozen dataclass with one method, ``acquire``: from a clean plane it
makes a noisy one whose noise is *known*: its standard deviation at every pixel, and its mean
autocorrelation at the `LAGS`. Intensities are in layer units throughout.

The autocorrelation of noise :math:`n` with standard deviation :math:`\sigma(x)` is

.. math:: \rho(d) = \Big\langle \frac{n(x)\, n(x + d)}{\sigma(x)\, \sigma(x + d)} \Big\rangle .
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.noise import Rician

Plane = NDArray[np.float64]
"""``(h, w)``, in layer units unless told otherwise."""

LAGS = (
    *((0, x) for x in (1, 2)),
    *((y, x) for y in (1, 2) for x in range(-2, 3)),
    (0, 4),
    (4, 0),
)
"""Distances ``(rows, columns)`` in pixels at which the autocorrelation of noise is told."""


@dataclass(frozen=True)
class Acquired:
    """A simulated acquisition, and what is known of its noise.

    Parameters
    ----------
    noisy
        ``(h, w)``, what was acquired.
    clean
        ``(h, w)``, what the same acquisition shows without noise; blurred where it blurs.
    noise_sigma
        ``(h, w)``, standard deviation of the noise of each pixel.
    autocorrelation
        ``(len(LAGS),)``, of the noise, from -1 to 1.
    """

    noisy: Plane
    clean: Plane
    noise_sigma: Plane
    autocorrelation: NDArray[np.float64]


class Acquisition(ABC):
    """One kind of acquisition with its parameters."""

    @abstractmethod
    def acquire(self, clean: Plane, rng: np.random.Generator) -> Acquired:
        """Simulate it.

        Parameters
        ----------
        clean
            ``(h, w)``, the object.
        rng
            What the noise is drawn from.
        """


# --- cameras ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Camera(Acquisition):
    r"""Counted photons and read-out noise [1]_.

    .. math:: u = g\,\mathrm{Poisson}\Big(\frac{u_0 - m}{g}\Big) + m + \mathcal N(0, s^2)

    Parameters
    ----------
    gain
        Layer units per photon, g > 0.
    read_noise
        Standard deviation s of the read-out noise, in layer units.
    pedestal
        Intensity m without light, in layer units.
    multiplied
        Whether each electron is multiplied by a random number of exponential distribution, as in
        an EMCCD or a photomultiplier, which doubles the variance [2]_; ``gain`` then stays the
        mean one.
    grey_step
        Distance of grey levels to which the result is rounded, in layer units; 0 is none.

    References
    ----------
    .. [1] A. Foi, M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian noise
       modeling and fitting for single-image raw-data", IEEE Trans. Image Process. 17 (2008),
       1737-1754.
    .. [2] M. Robbins, B. Hadwen, "The noise performance of electron multiplying charge-coupled
       devices", IEEE Trans. Electron Devices 50 (2003), 1227-1232.
    """

    gain: float
    read_noise: float = 0.0
    pedestal: float = 0.0
    multiplied: bool = False
    grey_step: float = 0.0

    def acquire(self, clean: Plane, rng: np.random.Generator) -> Acquired:
        light = np.clip(clean - self.pedestal, 0, None)
        counts = rng.poisson(light / self.gain).astype(np.float64)
        if self.multiplied:
            counts = rng.standard_gamma(counts)
        noisy = self.gain * counts + self.pedestal
        noisy += rng.normal(size=clean.shape) * self.read_noise
        variance = self.gain * light * (1 + self.multiplied) + self.read_noise**2
        if self.grey_step:
            noisy = np.rint(noisy / self.grey_step) * self.grey_step
            variance = variance + self.grey_step**2 / 12
        return Acquired(noisy, light + self.pedestal, np.sqrt(variance), np.zeros(len(LAGS)))


# --- stationary noise with a spectrum ---------------------------------------------------------


class _Coloured(Acquisition):
    """White noise through a filter, times a level that may differ by place."""

    noise_sigma: float | Plane

    @abstractmethod
    def transfer(self, shape: tuple[int, int]) -> Plane:
        """Amplitude of the filter, any scale, on the grid of ``numpy.fft.fft2``."""

    def acquire(self, clean: Plane, rng: np.random.Generator) -> Acquired:
        transfer = self.transfer(_shape(clean))
        transfer = transfer / np.sqrt(np.mean(transfer**2))
        level = np.broadcast_to(np.asarray(self.noise_sigma, np.float64), clean.shape)
        noisy = clean + level * _filtered(rng.normal(size=clean.shape), transfer)
        return Acquired(noisy, clean, level, _autocorrelation(transfer**2))


@dataclass(frozen=True)
class White(_Coloured):
    """Independent noise of every pixel.

    Parameters
    ----------
    noise_sigma
        Standard deviation, in layer units; a number, or ``(h, w)``.
    """

    noise_sigma: float | Plane

    def transfer(self, shape: tuple[int, int]) -> Plane:
        return np.ones(shape)


@dataclass(frozen=True)
class Smoothed(_Coloured):
    r"""White noise through a Gaussian filter: resampling, optics after the detector, smoothing.

    Parameters
    ----------
    noise_sigma
        Standard deviation after the filter, in layer units; a number, or ``(h, w)``.
    lengths
        Standard deviation of the filter along rows' and columns' axes ``(y, x)``, in pixels.
    """

    noise_sigma: float | Plane
    lengths: tuple[float, float]

    def transfer(self, shape: tuple[int, int]) -> Plane:
        (fy, fx), (sy, sx) = _frequencies(shape), self.lengths
        amplitude: Plane = np.exp(-2 * np.pi**2 * ((sy * fy) ** 2 + (sx * fx) ** 2))
        return amplitude


@dataclass(frozen=True)
class Interpolated(_Coloured):
    r"""White noise of an image that was enlarged or rotated by linear interpolation.

    Its level differs by place within a pixel of the original; here is the mean over all places.
    The correlation at the distance d is the autocorrelation of the interpolating kernel at the
    distance on the original grid, a cubic B-spline of each of its coordinates.

    Parameters
    ----------
    noise_sigma
        Standard deviation after interpolation, in layer units; a number, or ``(h, w)``.
    zoom
        Pixels of the result per original pixel along ``(y, x)``, at least 1.
    angle
        Of the original grid, in degrees.
    """

    noise_sigma: float | Plane
    zoom: tuple[float, float] = (1.0, 1.0)
    angle: float = 0.0

    def transfer(self, shape: tuple[int, int]) -> Plane:
        # The spectrum of the mean autocorrelation: that of the tent, to the fourth power of sinc.
        fy, fx = _frequencies(shape)
        cos, sin = np.cos(np.deg2rad(self.angle)), np.sin(np.deg2rad(self.angle))
        v, u = (cos * fy + sin * fx) * self.zoom[0], (cos * fx - sin * fy) * self.zoom[1]
        amplitude: Plane = np.sinc(v) ** 2 * np.sinc(u) ** 2
        return amplitude


@dataclass(frozen=True)
class Lines(_Coloured):
    """White noise, and noise that all pixels of a row (or column) share: line scans, FIB-SEM.

    Parameters
    ----------
    noise_sigma
        Standard deviation of both together, in layer units; a number, or ``(h, w)``.
    share
        Part of the variance that is shared, from 0 to 1.
    along
        ``"rows"`` or ``"columns"``.
    """

    noise_sigma: float | Plane
    share: float
    along: Literal["rows", "columns"] = "rows"

    def transfer(self, shape: tuple[int, int]) -> Plane:
        n = shape[1] if self.along == "rows" else shape[0]
        amplitude = np.full(shape, np.sqrt(1 - self.share))
        shared = np.sqrt(1 - self.share + self.share * n)
        if self.along == "rows":
            amplitude[:, 0] = shared
        else:
            amplitude[0] = shared
        return amplitude


@dataclass(frozen=True)
class Micrograph(_Coloured):
    r"""Cryo-EM: shot noise, white, and the noise of ice and carbon, which falls with frequency.

    .. math:: S(f) \propto 1 - c + c\, \frac{a}{1 + (f / f_0)^2}

    with a such that the two parts have the variances 1 - c and c [1]_.

    Parameters
    ----------
    noise_sigma
        Standard deviation of both together, in layer units; a number, or ``(h, w)``.
    share
        Part c of the variance that is coloured, from 0 to 1.
    corner
        Frequency f₀ above which the coloured part falls, in cycles per pixel.

    References
    ----------
    .. [1] W. T. Baxter, R. A. Grassucci, H. Gao, J. Frank, "Determination of signal-to-noise ratios
       and spectral SNRs in cryo-EM low-dose imaging of molecules", J. Struct. Biol. 166 (2009),
       126-132.
    """

    noise_sigma: float | Plane
    share: float
    corner: float = 0.08

    def transfer(self, shape: tuple[int, int]) -> Plane:
        fy, fx = _frequencies(shape)
        falling = 1 / (1 + (fy**2 + fx**2) / self.corner**2)
        amplitude: Plane = np.sqrt(1 - self.share + self.share * falling / falling.mean())
        return amplitude


@dataclass(frozen=True)
class Kernel(_Coloured):
    r"""The spectrum that filtered backprojection gives noise, the same everywhere.

    .. math:: |H(f)|^2 \propto |f|^p \cos^{2q}\Big(\frac{\pi f}{2 f_c}\Big), \quad f < f_c

    p = 1 for a ramp filter; smaller where pixels are larger than detector elements. Unlike
    `Tomography` it costs no projection.

    Parameters
    ----------
    noise_sigma
        Standard deviation, in layer units; a number, or ``(h, w)``.
    power, apodisation
        p and q, at least 0.
    cut
        f_c, in cycles per pixel.
    """

    noise_sigma: float | Plane
    power: float = 1.0
    apodisation: float = 1.0
    cut: float = 0.5

    def transfer(self, shape: tuple[int, int]) -> Plane:
        r = np.hypot(*_frequencies(shape))
        rising = np.maximum(r, 0.5 / max(shape)) ** (self.power / 2)
        falling = np.cos(np.minimum(r / self.cut, 1) * np.pi / 2) ** self.apodisation
        amplitude: Plane = rising * falling + 1e-3
        return amplitude


# --- magnetic resonance -----------------------------------------------------------------------

Window = Literal["none", "hamming", "fermi", "tukey", "gauss"]


@dataclass(frozen=True)
class Magnitude(Acquisition):
    r"""MRI: white complex noise in k-space, a window, zero filling, coils, and the magnitude [1]_.

    .. math:: m = \big| g \cdot F^{-1} W n + F^{-1} W F u_0 \big|

    Parameters
    ----------
    noise_sigma
        Standard deviation of the real and of the imaginary part in the image, in layer units.
    matrix
        Sampled part of k-space along ``(y, x)``, above 0 and at most 1; the rest is filled with
        zeros, which interpolates the image by the reciprocal.
    elliptical
        Whether the corners of what is sampled are left out, too.
    window
        What k-space is multiplied by, as scanners do against ringing: along each axis a Hamming or
        Tukey window, or in all directions a Fermi or Gaussian one.
    strength
        Of the window, from 0 to 1.
    partial
        Part of the rows of k-space that are sampled, from 0.5 to 1 (partial Fourier); the rest is
        filled with zeros.
    g_factor
        ``(h, w)``, by which parallel imaging amplifies noise at each place [2]_; ``None``: 1.
    real
        Whether the real part is taken in place of the magnitude, as in phase-sensitive images.

    References
    ----------
    .. [1] H. Gudbjartsson, S. Patz, "The Rician distribution of noisy MRI data", Magn. Reson. Med.
       34 (1995), 910-914.
    .. [2] K. P. Pruessmann, M. Weiger, M. B. Scheidegger, P. Boesiger, "SENSE: sensitivity encoding
       for fast MRI", Magn. Reson. Med. 42 (1999), 952-962.
    """

    noise_sigma: float
    matrix: tuple[float, float] = (1.0, 1.0)
    elliptical: bool = False
    window: Window = "none"
    strength: float = 1.0
    partial: float = 1.0
    g_factor: Plane | None = None
    real: bool = False

    def acquire(self, clean: Plane, rng: np.random.Generator) -> Acquired:
        transfer = self._transfer(_shape(clean))
        signal = np.fft.ifft2(np.fft.fft2(clean) * transfer)
        amplitude = transfer / np.sqrt(np.mean(transfer**2))
        white = rng.normal(size=clean.shape) + 1j * rng.normal(size=clean.shape)
        level = self.noise_sigma * (1.0 if self.g_factor is None else self.g_factor)
        level = np.broadcast_to(np.asarray(level, np.float64), clean.shape)
        noisy = signal + level * np.fft.ifft2(np.fft.fft2(white) * amplitude)
        autocorrelation = _autocorrelation(amplitude**2)
        if self.real:
            return Acquired(noisy.real, signal.real, level, autocorrelation)
        shown = np.abs(signal)
        unit = Rician(1.0)
        sigma = level * np.sqrt(unit.variance(shown / np.maximum(level, 1e-12)))
        return Acquired(np.abs(noisy), shown, sigma, autocorrelation)

    def _transfer(self, shape: tuple[int, int]) -> Plane:
        # Half a sample more, so that the borders of what is sampled don't depend on rounding.
        y, x = (
            f * n / (n * part / 2 + 0.5)
            for f, n, part in zip(_frequencies(shape), shape, self.matrix, strict=True)
        )
        inside = (np.abs(y) <= 1) & (np.abs(x) <= 1)
        if self.elliptical:
            inside &= y**2 + x**2 <= 1
        if self.partial < 1:
            inside &= y >= 1 - 2 * self.partial
        return inside * self._window(y, x)

    def _window(self, y: Plane, x: Plane) -> Plane:
        s = self.strength
        if self.window == "hamming":
            low = 1 - 0.46 * s
            both = (low + (1 - low) * np.cos(np.pi * np.clip(a, -1, 1)) for a in (y, x))
            along_y, along_x = both
            return np.asarray(along_y * along_x)
        if self.window == "tukey":
            along_y, along_x = (_tukey(np.abs(a), s) for a in (y, x))
            return along_y * along_x
        r = np.hypot(y, x)
        if self.window == "fermi":
            return np.asarray(1 / (1 + np.exp(np.clip((r - (1.1 - 0.5 * s)) / 0.1, -50, 50))))
        if self.window == "gauss":
            return np.asarray(np.exp(-2.3 * s * r**2))
        return np.ones_like(r)


def _tukey(r: Plane, share: float) -> Plane:
    """1, falling along a cosine over the outer ``share`` of 0 to 1."""
    into = np.clip((r - (1 - share)) / max(share, 1e-6), 0, 1)
    falling: Plane = 0.5 * (1 + np.cos(np.pi * into))
    return falling


# --- computed tomography ----------------------------------------------------------------------

ReconstructionKernel = Literal["ramp", "shepp-logan", "cosine", "hamming", "hann"]


@dataclass(frozen=True)
class Tomography(Acquisition):
    r"""CT: photons counted behind the object, filtered backprojection of parallel rays [1]_.

    A ray with the line integral p has :math:`N = \mathrm{Poisson}(N_0 e^{-p})` photons, so that
    :math:`-\ln(N / N_0)` has the variance :math:`e^p / N_0`. The standard deviation of a pixel is
    exact for that variance, if it changes little over a few detector elements:

    .. math:: \sigma^2(x) = \Big(\frac{\pi}{A}\Big)^2 \sum_\theta \bar v_\theta(s_x)\, R(0)

    where R is the autocorrelation of the filter with the interpolation between detector elements.

    Parameters
    ----------
    photons
        N₀, photons of each ray in front of the object.
    kernel
        What the ramp filter is multiplied by: nothing, or the window of that name.
    attenuation
        Of a layer unit, per pixel: line integrals are sums of ``attenuation * (u - air)``.
    air
        Intensity that attenuates nothing, in layer units.
    element
        Width of a detector element, in pixels.
    angles
        Number of projections over 180°.
    electronic
        Variance of the electronic noise, in squared photons.

    References
    ----------
    .. [1] A. C. Kak, M. Slaney, "Principles of computerized tomographic imaging", IEEE Press
       (1988), chapter 3.
    """

    photons: float
    kernel: ReconstructionKernel = "ramp"
    attenuation: float = 2e-5
    air: float = -1000.0
    element: float = 1.0
    angles: int = 360
    electronic: float = 0.0

    def acquire(self, clean: Plane, rng: np.random.Generator) -> Acquired:
        projections = self.project(clean)
        expected = self.photons * np.exp(-projections)
        counts = rng.poisson(expected) + rng.normal(size=expected.shape) * self.electronic**0.5
        measured = -np.log(np.maximum(counts, 0.5) / self.photons)
        rows, columns = (np.arange(n, dtype=np.float64) for n in clean.shape)
        variance = (expected + self.electronic) / expected**2
        sigma, autocorrelation = self.noise(variance, clean.shape, rows, columns)
        noisy = self.reconstruct(measured, _shape(clean), rows, columns)
        shown = self.reconstruct(projections, _shape(clean), rows, columns)
        return Acquired(noisy, shown, sigma, autocorrelation)

    def project(self, clean: Plane) -> Plane:
        """Line integrals ``(angles, elements)`` of an object."""
        projections = _radon((clean - self.air).tobytes(), clean.shape, self.angles)
        # A column of _radon is a pixel wide.
        n = projections.shape[1]
        elements = int(np.ceil(n / self.element))
        at = (np.arange(elements) - (elements - 1) / 2) * self.element + (n - 1) / 2
        resampled = np.stack([np.interp(at, np.arange(n), row, 0, 0) for row in projections])
        return np.asarray(resampled * self.attenuation)

    def reconstruct(
        self, projections: Plane, shape: tuple[int, int], rows: Plane, columns: Plane
    ) -> Plane:
        """Backproject onto the pixels of some ``rows`` and ``columns``, in layer units."""
        filtered = _convolved(projections, self._filter(projections.shape[1]))
        image = self._backproject(filtered, shape, rows, columns)
        return image * (np.pi / self.angles / self.element / self.attenuation) + self.air

    def blur(self, shape: tuple[int, int]) -> Plane:
        """What the reconstruction multiplies an object's frequencies by; of ``fft2``'s layout."""
        f = np.minimum(np.hypot(*_frequencies(shape)) * self.element, 0.5)
        blurred: Plane = _KERNELS[self.kernel](f) * np.sinc(f) ** 2 * (f < 0.5)
        return blurred

    def noise(
        self, variance: Plane, shape: tuple[int, ...], rows: Plane, columns: Plane
    ) -> tuple[Plane, NDArray[np.float64]]:
        """Standard deviation ``(rows, columns)`` in layer units, and mean autocorrelation.

        Parameters
        ----------
        variance
            ``(angles, elements)``, of the line integrals.
        """
        taps = self._filter(variance.shape[1])
        local = _convolved(variance, taps**2 / np.sum(taps**2))
        table = _interpolated_autocorrelation(taps)
        factor = (np.pi / self.angles / self.element / self.attenuation) ** 2
        total = self._backproject(local, shape, rows, columns)
        sigma = np.sqrt(np.maximum(total, 0) * table[0] * factor)
        # The correlation of neighbours changes slowly: some pixels stand for all.
        some_rows, some_columns = (_spread(axis) for axis in (rows, columns))
        centre = self._backproject(local, shape, some_rows, some_columns)
        theta = self._theta
        along = np.cos(theta), np.sin(theta)
        correlations = []
        for y, x in LAGS:
            apart = np.abs(x * along[0] + y * along[1]) / self.element
            weight = np.interp(apart, np.arange(len(table)) * _TABLE_STEP, table, right=0.0)
            both = self._backproject(local * weight[:, None], shape, some_rows, some_columns)
            correlations.append(float(np.mean(both / centre)) / table[0])
        return sigma, np.array(correlations)

    @property
    def _theta(self) -> Plane:
        return np.arange(self.angles) * np.pi / self.angles

    def _filter(self, elements: int) -> Plane:
        """Taps of the apodised ramp at the distances 0, ±1 …, as ``numpy.fft`` orders them."""
        n = 2 * elements
        taps = np.zeros(n)
        odd = np.arange(1, elements, 2)
        taps[0] = 0.25
        taps[odd] = taps[-odd] = -1 / (np.pi * odd) ** 2
        f = np.fft.fftfreq(n)
        window = _KERNELS[self.kernel](f)
        return np.asarray(np.fft.ifft(np.fft.fft(taps).real * window).real)

    def _backproject(
        self, projections: Plane, shape: tuple[int, ...], rows: Plane, columns: Plane
    ) -> Plane:
        y, x = (
            (axis - (n - 1) / 2) / self.element
            for axis, n in zip((rows, columns), shape, strict=True)
        )
        out = np.zeros((len(y), len(x)))
        _accumulate(projections, np.cos(self._theta), np.sin(self._theta), y, x, out)
        return out


_KERNELS: dict[str, Any] = {
    "ramp": lambda f: np.ones_like(f),
    "shepp-logan": lambda f: np.sinc(f),
    "cosine": lambda f: np.cos(np.pi * f),
    "hamming": lambda f: 0.54 + 0.46 * np.cos(2 * np.pi * f),
    "hann": lambda f: 0.5 + 0.5 * np.cos(2 * np.pi * f),
}

_TABLE_STEP = 0.05
_TABLE_REACH = 8


@lru_cache(maxsize=16)
def _radon(pixels: bytes, shape: tuple[int, int], angles: int) -> Plane:
    """Line integrals ``(angles, diagonal)`` in layer units times pixels; kept, being slow."""
    from skimage.transform import radon

    image = np.frombuffer(pixels).reshape(shape)
    degrees = np.arange(angles) * 180 / angles
    # Its rows are the detector's; rays of the angle θ hit it at x cos θ - y sin θ.
    lines = radon(image, -degrees, circle=False, preserve_range=True)  # type: ignore[no-untyped-call]
    return np.asarray(lines.T)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _accumulate(  # pragma: no cover - compiled
    projections: Plane, cos: Plane, sin: Plane, rows: Plane, columns: Plane, out: Plane
) -> None:
    """Add to ``out`` what every projection has where each pixel lies, interpolated."""
    elements = projections.shape[1]
    centre = (elements - 1) / 2
    for a in range(len(cos)):
        line = projections[a]
        for i in range(len(rows)):
            start = rows[i] * sin[a] + centre
            for j in range(len(columns)):
                s = columns[j] * cos[a] + start
                left = int(np.floor(s))
                if left < 0 or left + 1 >= elements:
                    continue
                t = s - left
                out[i, j] += line[left] * (1 - t) + line[left + 1] * t


def _convolved(projections: Plane, taps: Plane) -> Plane:
    """Each projection through a filter of twice its length, without wrapping around."""
    n = projections.shape[1]
    spectrum = np.fft.rfft(projections, 2 * n, axis=1) * np.fft.rfft(taps)
    return np.asarray(np.fft.irfft(spectrum, 2 * n, axis=1)[:, :n])


def _interpolated_autocorrelation(taps: Plane) -> Plane:
    """Of filtered white noise, interpolated linearly, by distance in steps of `_TABLE_STEP`."""
    power = np.fft.ifft(np.abs(np.fft.fft(taps)) ** 2).real
    distances = np.arange(0, _TABLE_REACH + _TABLE_STEP, _TABLE_STEP)
    lags = np.arange(-_TABLE_REACH - 2, _TABLE_REACH + 3)
    return np.asarray(_cubic_b_spline(distances[:, None] - lags) @ power[lags])


def _cubic_b_spline(x: Plane) -> Plane:
    """The tent, convolved with itself."""
    r = np.abs(x)
    inner = 2 / 3 - r**2 + r**3 / 2
    outer = np.clip(2 - r, 0, None) ** 3 / 6
    return np.where(r < 1, inner, outer)


def _spread(axis: Plane, at_most: int = 5) -> Plane:
    """Some values of an axis, evenly spread."""
    return np.asarray(axis[np.linspace(0, len(axis) - 1, min(at_most, len(axis))).astype(int)])


# --- spectra ----------------------------------------------------------------------------------


def smooth_field(
    shape: tuple[int, int], length: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A random field of mean 0 and standard deviation 1 that changes over about ``length`` px."""
    from scipy.ndimage import zoom

    coarse = rng.normal(size=[max(2, int(n / length)) + 2 for n in shape])
    factors = [n / m for n, m in zip(shape, coarse.shape, strict=True)]
    field = zoom(coarse, factors, order=3)[: shape[0], : shape[1]]
    return np.asarray((field - field.mean()) / max(float(field.std()), 1e-9))


def _shape(image: Plane) -> tuple[int, int]:
    height, width = image.shape
    return height, width


def _frequencies(shape: tuple[int, int]) -> tuple[Plane, Plane]:
    """In cycles per pixel, ``(h, 1)`` and ``(1, w)``."""
    y, x = (np.asarray(np.fft.fftfreq(n), np.float64) for n in shape)
    return y[:, None], x[None]


def _filtered(white: Plane, transfer: Plane) -> Plane:
    return np.asarray(np.fft.ifft2(np.fft.fft2(white) * transfer).real)


def _autocorrelation(spectrum: Plane) -> NDArray[np.float64]:
    """At the `LAGS`, from a power spectrum."""
    covariance = np.fft.ifft2(spectrum).real
    height, width = covariance.shape
    lags = [covariance[y % height, x % width] for y, x in LAGS]
    return np.asarray(np.asarray(lags) / covariance[0, 0])
