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
from dataclasses import asdict, dataclass, fields
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

    @abstractmethod
    def transformed(self, scale: float, shift: float) -> Self:
        """The noise model of ``scale * u + shift`` where this is the one of ``u``; scale > 0."""

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

    def to_dict(self) -> dict[str, Any]:
        """Key and parameters, as written into metadata; `noise_model_from_dict` reads it back."""
        return {"key": self.key, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Gaussian(NoiseModel):
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

    noise_sigma: float
    key: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_sigma) and self.noise_sigma >= 0):
            raise InvalidSettingError(
                f"The noise level must be a finite number of at least 0, not {self.noise_sigma}."
            )

    def variance(self, intensity: Intensities) -> Intensities:
        variance: Intensities = intensity * 0 + self.noise_sigma**2
        return variance

    def stabilise(self, intensity: Intensities) -> Intensities:
        stabilised: Intensities = intensity / self.noise_sigma
        return stabilised

    def transformed(self, scale: float, shift: float) -> Self:
        return type(self)(self.noise_sigma * scale)

    @property
    def is_zero(self) -> bool:
        return self.noise_sigma == 0

    def describe(self, unit: str = "") -> str:
        return f"Gaussian, standard deviation {self.noise_sigma:.4g} {unit}".rstrip()


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
    offset: float
    key: ClassVar[str] = "poisson-gaussian"

    def __post_init__(self) -> None:
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

    @property
    def is_zero(self) -> bool:
        return False

    def describe(self, unit: str = "") -> str:
        squared = f" {unit}²" if unit else ""
        gain = f"{self.gain:.4g} {unit}".rstrip()
        return f"Poisson-Gaussian, gain {gain}, offset {self.offset:.4g}{squared}"


NOISE_MODELS: dict[str, type[NoiseModel]] = {c.key: c for c in (Gaussian, PoissonGaussian)}
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
    names = {f.name for f in fields(model)}  # type: ignore[arg-type]
    if set(values) != names:
        raise InvalidSettingError(
            f"The noise model {key!r} takes {', '.join(sorted(names))}, not {', '.join(values)}."
        )
    return model(**values)
