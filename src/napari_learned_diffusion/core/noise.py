"""Noise models: what the noise of a layer is, and the intensities in which it is 1 everywhere.

A noise model has its parameters in layer units (Hounsfield units, counts, bytes …) and one method
that the rest of the package lives by, ``stabilise``: it maps intensities to units in which the
noise has standard deviation 1 at every intensity. Diffusivities only ever see stabilised
intensities; the diffusion itself moves the raw ones. So no inverse transform is needed, and none
of its bias arises.

The models work on numpy arrays and torch tensors alike and need neither to be imported.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import InvalidSettingError

Intensities = TypeVar("Intensities", bound=Any)
"""A number, a numpy array or a torch tensor of intensities."""


class NoiseModel(ABC):
    """How strong the noise is at each intensity."""

    key: ClassVar[str]

    @abstractmethod
    def variance(self, intensity: Intensities) -> Intensities:
        """Variance of the noise at a true ``intensity``, in squared layer units."""

    @abstractmethod
    def stabilise(self, intensity: Intensities) -> Intensities:
        """Map layer units, of any shape, to units in which the noise has standard deviation 1."""

    def mean(self, intensity: Intensities) -> Intensities:
        """Mean of the noisy intensities at a true ``intensity``, in layer units."""
        return intensity

    @abstractmethod
    def transformed(self, scale: float, shift: float) -> Self:
        """The noise model of ``scale * u + shift`` where this is the one of ``u``; scale > 0."""

    @abstractmethod
    def amplified(self, factor: float) -> Self:
        """The same noise with ``factor`` times the variance, > 0."""

    @property
    @abstractmethod
    def is_zero(self) -> bool:
        """Whether there is no noise at all, so that nothing is to be removed."""

    @abstractmethod
    def describe(self, unit: str = "") -> str:
        """One short line for people, with the unit of the layer."""

    def add(self, image: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float64]:
        """A noisy copy of a clean ``image``, of the same shape, in float64."""
        clean = np.asarray(image, dtype=np.float64)
        return clean + rng.normal(size=clean.shape) * np.sqrt(self.variance(clean))

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Key and parameters, as written into metadata; `noise_model_from_dict` reads it back."""
        return {"key": self.key, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class _SameEverywhere(NoiseModel):
    """Noise with one standard deviation for all intensities."""

    noise_sigma: float

    def __post_init__(self) -> None:
        _normalise(self)
        _check_noise_sigma(self.noise_sigma)

    def variance(self, intensity: Intensities) -> Intensities:
        variance: Intensities = intensity * 0 + self.noise_sigma**2
        return variance

    def stabilise(self, intensity: Intensities) -> Intensities:
        stabilised: Intensities = intensity / self.noise_sigma
        return stabilised

    def transformed(self, scale: float, shift: float) -> Self:
        return replace(self, noise_sigma=self.noise_sigma * scale)

    def amplified(self, factor: float) -> Self:
        return replace(self, noise_sigma=self.noise_sigma * factor**0.5)

    @property
    def is_zero(self) -> bool:
        return self.noise_sigma == 0


@dataclass(frozen=True)
class Gaussian(_SameEverywhere):
    """The same noise at every intensity: ``stabilise(u) = u / noise_sigma``.

    Parameters
    ----------
    noise_sigma
        Standard deviation of the noise, in layer units, at least 0.

    Raises
    ------
    InvalidSettingError
        if ``noise_sigma`` is negative or not finite.
    """

    key: ClassVar[str] = "gaussian"

    def describe(self, unit: str = "") -> str:
        return f"Gaussian, standard deviation {self.noise_sigma:.4g} {unit}".rstrip()


@dataclass(frozen=True)
class Correlated(_SameEverywhere):
    r"""Gaussian noise that neighbouring pixels share: ``stabilise(u) = u / noise_sigma``.

    It is what reconstruction kernels (CT), interpolation (MRI, registered images), resampling (EM)
    and demosaicking leave of white noise. The filter that correlates is taken for a Gaussian whose
    standard deviation is the correlation length :math:`\ell`, so that pixels at the distance d have
    the correlation :math:`e^{-d^2 / 4\ell^2}`.

    Parameters
    ----------
    noise_sigma
        Standard deviation of the noise of a single pixel, in layer units, at least 0: what is left
        of it after the filter, and what is measured in an area that should be uniform.
    correlation_length
        In pixels, at least 0, which is white noise. It tells how noise is added, not how it is
        stabilised.

    Raises
    ------
    InvalidSettingError
        if either is negative or not finite.
    """

    correlation_length: float = 1.0
    key: ClassVar[str] = "correlated"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.correlation_length) and self.correlation_length >= 0):
            raise InvalidSettingError(
                "The correlation length must be a finite number of pixels of at least 0, "
                f"not {self.correlation_length}."
            )

    def add(self, image: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float64]:
        """A noisy copy of a clean ``image``, in float64.

        Noise is correlated along the last two axes, and across their ends as if they were cyclic.
        """
        clean = np.asarray(image, dtype=np.float64)
        white = rng.normal(size=clean.shape)
        axes = tuple(range(clean.ndim))[-2:]
        transfer = np.ones(())
        for axis in axes:
            # Its square is the spectrum, whose mean is the variance of a pixel.
            along = np.exp(
                -((_angular_frequencies(clean.shape[axis]) * self.correlation_length) ** 2)
            )
            along /= along.mean()
            transfer = transfer[..., None] * np.sqrt(along)
        noise = np.fft.ifftn(np.fft.fftn(white, axes=axes) * transfer, axes=axes).real
        return np.asarray(clean + self.noise_sigma * noise)

    def describe(self, unit: str = "") -> str:
        level = f"{self.noise_sigma:.4g} {unit}".rstrip()
        return (
            f"Correlated, standard deviation {level}, "
            f"correlation length {self.correlation_length:.3g} px"
        )


@dataclass(frozen=True)
class PoissonGaussian(NoiseModel):
    r"""Photon noise on top of read-out noise: the variance grows with the intensity.

    .. math:: \operatorname{var}(u) = \mathrm{gain}\cdot u + \mathrm{offset}

    ``stabilise`` is the generalised Anscombe transform [1]_ [2]_,

    .. math:: v(u) = \tfrac{2}{\mathrm{gain}}
              \sqrt{\mathrm{gain}\cdot u + \tfrac38\,\mathrm{gain}^2 + \mathrm{offset}}

    continued by its tangent where the radicand falls below ``gain²``, so that it is strictly
    increasing and differentiable on all intensities, however far below the darkest true one
    noise or a detector's pedestal may bring them.

    Parameters
    ----------
    gain
        Layer units per photon (or electron), above 0.
    offset
        Variance at intensity 0, in squared layer units. A detector with a pedestal ``m`` and
        read-out noise ``s`` has ``offset = s² - gain·m``, so it may be negative.

    Raises
    ------
    InvalidSettingError
        if ``gain`` isn't positive or either isn't finite.

    References
    ----------
    .. [1] F. Murtagh, J.-L. Starck, A. Bijaoui, "Image restoration with noise suppression using a
       multiresolution support", Astron. Astrophys. Suppl. 112 (1995), 179-189.
    .. [2] M. Mäkitalo, A. Foi, "Optimal inversion of the generalized Anscombe transformation for
       Poisson-Gaussian noise", IEEE Trans. Image Process. 22 (2013), 91-103.
    """

    gain: float
    offset: float = 0.0
    key: ClassVar[str] = "poisson-gaussian"

    def __post_init__(self) -> None:
        _normalise(self)
        if not (math.isfinite(self.gain) and self.gain > 0):
            raise InvalidSettingError(
                f"The gain must be a finite number above 0, not {self.gain}; "
                "noise of the same strength everywhere is the Gaussian model."
            )
        if not math.isfinite(self.offset):
            raise InvalidSettingError(f"The offset must be a finite number, not {self.offset}.")

    def variance(self, intensity: Intensities) -> Intensities:
        variance: Intensities = (intensity * self.gain + self.offset).clip(min=0)
        return variance

    def stabilise(self, intensity: Intensities) -> Intensities:
        # r is the radicand in units of gain², v = 2 sqrt(r); below r = 1 the tangent v = 1 + r.
        r = intensity / self.gain + (self.offset / self.gain**2 + 0.375)
        stabilised: Intensities = 2 * r.clip(min=1) ** 0.5 + (r.clip(max=1) - 1)
        return stabilised

    def transformed(self, scale: float, shift: float) -> Self:
        gain = self.gain * scale
        return type(self)(gain, self.offset * scale**2 - gain * shift)

    def amplified(self, factor: float) -> Self:
        return type(self)(self.gain * factor, self.offset * factor)

    @property
    def is_zero(self) -> bool:
        return False

    def describe(self, unit: str = "") -> str:
        squared = f" {unit}²" if unit else ""
        gain = f"{self.gain:.4g} {unit}".rstrip()
        return f"Poisson-Gaussian, gain {gain}, offset {self.offset:.4g}{squared}"


# Of Rician noise of standard deviation 1: the variance of the magnitude m of a signal θ is, with
# t = θ², 1 - P(t) / Q(t). The coefficients rise with the power of t. It is exact for no signal and
# to the first order for a strong one, 1 - 1/(2t); in between it is within 0.05 %.
_RICIAN_ABOVE = (math.pi / 2 - 1, 0.0375, 0.00817)
_RICIAN_BELOW = (1.0, 0.445, 0.0865, 0.01634)
# stabilise(m) = sqrt(m² - shift), and its tangent below the join. The shift of 1/2 is the best for
# strong signals; this one and the join keep the standard deviation within 6 % of 1 for all of them.
_RICIAN_SHIFT, _RICIAN_JOIN = 0.55, 0.675


@dataclass(frozen=True)
class Rician(NoiseModel):
    r"""Noise of magnitude images, as MRI shows them: Gaussian noise in both parts of a complex u.

    .. math:: m = \sqrt{(u + n_1)^2 + n_2^2}, \qquad n_1, n_2 \sim \mathcal N(0, \sigma^2)

    Where the signal is more than about three times the noise it is nearly Gaussian. Without signal,
    in the air, it is Rayleigh noise, of mean 1.25 σ and standard deviation 0.66 σ [1]_. So

    .. math:: v(m) = \sqrt{m^2/\sigma^2 - 0.55}

    brings it to a standard deviation of 1 within 6 % at every signal, the form that is the best one
    for strong signals [2]_. Below 0.82 σ its tangent continues it, so that it is strictly
    increasing and differentiable on all intensities.

    Parameters
    ----------
    noise_sigma
        Standard deviation σ of the noise of either part, in layer units, above 0. A strong signal
        has noise of this standard deviation.
    pedestal
        The intensity of no signal, in layer units; 0 unless the image was shifted.

    Raises
    ------
    InvalidSettingError
        if ``noise_sigma`` isn't positive or either isn't finite.

    References
    ----------
    .. [1] H. Gudbjartsson, S. Patz, "The Rician distribution of noisy MRI data", Magn. Reson. Med.
       34 (1995), 910-914.
    .. [2] A. Foi, "Noise estimation and removal in MR imaging: the variance-stabilization
       approach", IEEE ISBI (2011), 1809-1814.
    """

    noise_sigma: float
    pedestal: float = 0.0
    key: ClassVar[str] = "rician"

    def __post_init__(self) -> None:
        _normalise(self)
        _check_noise_sigma(self.noise_sigma)
        if self.noise_sigma == 0:
            raise InvalidSettingError(
                "The noise level of Rician noise must be above 0; no noise is the Gaussian model."
            )
        if not math.isfinite(self.pedestal):
            raise InvalidSettingError(f"The pedestal must be a finite number, not {self.pedestal}.")

    def variance(self, intensity: Intensities) -> Intensities:
        # Without bound, t³ would overflow in single precision; beyond it the variance is 1.
        t = ((intensity - self.pedestal) / self.noise_sigma).clip(min=0, max=1e5) ** 2
        variance: Intensities = self.noise_sigma**2 * (
            1 - _polynomial(_RICIAN_ABOVE, t) / _polynomial(_RICIAN_BELOW, t)
        )
        return variance

    def mean(self, intensity: Intensities) -> Intensities:
        # The mean square of the magnitude is u² + 2 σ².
        signal = (intensity - self.pedestal).clip(min=0)
        square = signal**2 + 2 * self.noise_sigma**2 - self.variance(intensity)
        mean: Intensities = square**0.5 + self.pedestal
        return mean

    def stabilise(self, intensity: Intensities) -> Intensities:
        join = _RICIAN_JOIN**0.5
        slope = join / (_RICIAN_JOIN - _RICIAN_SHIFT) ** 0.5
        m = (intensity - self.pedestal) / self.noise_sigma
        stabilised: Intensities = (m.clip(min=join) ** 2 - _RICIAN_SHIFT) ** 0.5 + slope * (
            m.clip(max=join) - join
        )
        return stabilised

    def add(self, image: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float64]:
        """A noisy copy of a clean ``image``, in float64; below the pedestal there is no signal."""
        signal = (np.asarray(image, dtype=np.float64) - self.pedestal).clip(min=0)
        real, imaginary = rng.normal(0, self.noise_sigma, (2, *signal.shape))
        return np.asarray(np.hypot(signal + real, imaginary) + self.pedestal)

    def transformed(self, scale: float, shift: float) -> Self:
        return type(self)(self.noise_sigma * scale, self.pedestal * scale + shift)

    def amplified(self, factor: float) -> Self:
        return type(self)(self.noise_sigma * factor**0.5, self.pedestal)

    @property
    def is_zero(self) -> bool:
        return False

    def describe(self, unit: str = "") -> str:
        text = f"Rician, noise level {self.noise_sigma:.4g} {unit}".rstrip()
        return f"{text}, pedestal {self.pedestal:.4g} {unit}".rstrip() if self.pedestal else text


def _normalise(model: NoiseModel) -> None:
    """Bring the parameters to Python's own numbers, which JSON can hold."""
    for name in model.parameters():
        value = getattr(model, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InvalidSettingError(
                f"{name} of {model.key} noise must be a number, not {value!r}."
            )
        number = int(value) if isinstance(value, Integral) else float(value)
        object.__setattr__(model, name, number)


def _check_noise_sigma(noise_sigma: float) -> None:
    if not (math.isfinite(noise_sigma) and noise_sigma >= 0):
        raise InvalidSettingError(
            f"The noise level must be a finite number of at least 0, not {noise_sigma}."
        )


def _angular_frequencies(n: int) -> NDArray[np.float64]:
    return np.asarray(2 * np.pi * np.fft.fftfreq(n))


def _polynomial(coefficients: tuple[float, ...], t: Intensities) -> Intensities:
    value: Intensities = t * 0
    for coefficient in reversed(coefficients):
        value = value * t + coefficient
    return value


NOISE_MODELS: dict[str, type[NoiseModel]] = {
    c.key: c for c in (Gaussian, PoissonGaussian, Rician, Correlated)
}
"""Every noise model by its key; a new one is a class and an entry here."""


def noise_model_from_dict(parameters: dict[str, Any]) -> NoiseModel:
    """The noise model that `NoiseModel.to_dict` wrote."""
    values = dict(parameters)
    key = values.pop("key", None)
    if key not in NOISE_MODELS:
        raise InvalidSettingError(
            f"There is no noise model {key!r}. There are: {', '.join(NOISE_MODELS)}."
        )
    model = NOISE_MODELS[key]
    names = set(model.parameters())
    if set(values) != names:
        raise InvalidSettingError(
            f"The noise model {key!r} takes {', '.join(sorted(names))}, not {', '.join(values)}."
        )
    return model(**values)
