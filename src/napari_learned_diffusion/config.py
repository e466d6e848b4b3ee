"""What a user can set, as frozen dataclasses that own the defaults. Imports neither torch nor Qt.

Forms, the command line and the Python API are made from these; ``None`` always means *automatic*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, get_args

import numpy as np

from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.noise import (
    NOISE_MODELS,
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.schemes import Explicit

DEFAULT_MODEL = "auto"
"""The best model that there is, or the one that other settings ask for."""

Function = Literal["rational", "exponential"]
SchemeName = Literal["explicit", "fed"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "float64", "mixed"]
NoiseChoice = Literal["auto", "gaussian", "poisson-gaussian", "rician", "correlated"]
NoiseScope = Literal["auto", "stack", "slice"]
ResultType = Literal["auto", "same", "float32"]

FUNCTIONS: tuple[Function, ...] = ("rational", "exponential")
SCHEMES: tuple[SchemeName, ...] = ("explicit", "fed")
PRECISIONS: tuple[Precision, ...] = ("float32", "float64", "mixed")
NOISE_CHOICES: tuple[NoiseChoice, ...] = get_args(NoiseChoice)
RESULT_TYPES: tuple[ResultType, ...] = get_args(ResultType)
OptimiserName = Literal["adamw", "muon"]
OPTIMISERS: tuple[OptimiserName, ...] = get_args(OptimiserName)
FineTuneMode = Literal["paired", "clean", "noisy", "repeats", "neighbours"]
AddedNoise = Literal["auto", "model", "measured"]
TunedParameters = Literal["all", "last"]
FINE_TUNE_MODES: tuple[FineTuneMode, ...] = get_args(FineTuneMode)
ADDED_NOISES: tuple[AddedNoise, ...] = get_args(AddedNoise)
TUNED_PARAMETERS: tuple[TunedParameters, ...] = get_args(TunedParameters)
NOISE_SCOPES: tuple[NoiseScope, ...] = ("auto", "stack", "slice")
MAX_ITERATIONS = 100_000
DOUBTFUL = 0.5
"""Confidence of a noise estimate below which the user is told."""
SMALLEST_PATCH = 16
"""Edge length of the patches of a fine-tuning, in pixels, at least."""
CHECKPOINT_EVERY = 250
"""Steps of a training between two validations and checkpoints."""


@dataclass(frozen=True)
class DiffusionConfig:
    """How to denoise. Every field that is ``None`` is chosen from the data.

    Parameters
    ----------
    model
        Key of the diffusivity; `napari_learned_diffusion.list_models` lists them. ``"auto"``: the
        one that suits the device, see `core.zoo.suitable_model`.
    iterations
        Number of diffusion steps, at least 0.
    noise
        The noise model, in layer units. ``None``: estimated from the data.
    noise_kind
        Which noise model is estimated where ``noise`` is ``None``; ``"auto"`` lets the data choose.
    noise_scope
        Whether one noise model is estimated for the ``"stack"`` or one for each ``"slice"``;
        ``"auto"``: for each slice where they differ clearly in their noise. Settings that are
        chosen from the data follow the same scope.
    contrast
        Contrast parameter K of ``perona-malik``, in units of the noise's standard deviation, > 0.
    function
        Diffusivity of ``perona-malik``: ``"rational"`` 1/(1+s/K²) or ``"exponential"`` exp(-s/K²).
    scheme
        ``"explicit"``: explicit Euler, every guarantee holds. ``"fed"``: fast explicit diffusion,
        long varying steps that reach a large stopping time in few iterations (``perona-malik``
        only).
    tau
        Time step of the explicit scheme, > 0, in squared pixels.
    stopping_time
        Stopping time of the FED scheme, > 0, in squared pixels.
    presmooth_sigma
        Standard deviation of the Gaussian that smooths the image which ``perona-malik`` looks at
        (Catté et al. 1992), in pixels; 0 is none.
    device
        Where to compute; ``"auto"`` takes the fastest that is there.
    precision
        Number format of the solver. ``"mixed"``: float32, but learned models look at the image in
        bfloat16, which is faster on many processors and hardly less exact.
    missing
        Values that are no intensities, such as the fill value that a file declares, in layer units.
        Pixels that have one take no part and come back as they were; so do NaN, infinity and fill
        values that are plain to see, see `core.missing`.
    use_spacing
        Whether the diffusion goes by the distances of rows and columns where these differ. By
        default it counts in pixels, which has denoised better with every model that there is, see
        docs/benchmarks.md; the spacing then tells the physical directions in maps of orientation.
    dtype
        Type of the result: the ``"same"`` as the image's, or ``"float32"``. ``"auto"``: float32 for
        an image of whole numbers whose noise is finer than about one grey level, which rounding
        would destroy; else the same.

    Raises
    ------
    InvalidSettingError
        if a value is of another kind or out of its range.
    """

    model: str = DEFAULT_MODEL
    iterations: int | None = None
    noise: NoiseModel | None = None
    noise_kind: NoiseChoice = "auto"
    noise_scope: NoiseScope = "auto"
    contrast: float | None = None
    function: Function = "rational"
    scheme: SchemeName = "explicit"
    tau: float | None = None
    stopping_time: float | None = None
    presmooth_sigma: float | None = None
    device: Device = "auto"
    precision: Precision = "float32"
    missing: tuple[float, ...] = ()
    use_spacing: bool = False
    dtype: ResultType = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise InvalidSettingError(
                f"The model must be a key such as {DEFAULT_MODEL!r} or 'perona-malik', "
                f"not {_shown(self.model)}."
            )
        if self.noise is not None and not isinstance(self.noise, NoiseModel):
            raise InvalidSettingError(
                "The noise must be a noise model such as Gaussian(8), or None to be estimated, "
                f"not {_shown(self.noise)}. Which kind is estimated says noise_kind."
            )
        _normalise(self, {"iterations": as_whole, "contrast": as_number, "tau": as_number})
        _normalise(self, {"stopping_time": as_number, "presmooth_sigma": as_number})
        if self.iterations is not None and not 0 <= self.iterations <= MAX_ITERATIONS:
            raise InvalidSettingError(
                f"The number of iterations must be a whole number from 0 to {MAX_ITERATIONS}, "
                f"not {self.iterations!r}."
            )
        _check_positive("The contrast parameter K", self.contrast)
        if self.contrast is not None and not 1e-9 <= self.contrast <= 1e9:
            raise InvalidSettingError(
                "The contrast parameter K must be from 1e-9 to 1e9 standard deviations of the "
                f"noise, not {self.contrast:g}."
            )
        _check_positive("The time step tau", self.tau)
        if self.tau is not None:
            Explicit(self.tau)
        _check_positive("The stopping time", self.stopping_time)
        sigma = self.presmooth_sigma
        if sigma is not None and not (math.isfinite(sigma) and 0 <= sigma <= 50):
            raise InvalidSettingError(
                f"Presmoothing must be a number of pixels from 0 to 50, not {sigma}."
            )
        object.__setattr__(self, "device", _device_by_name(self.device))
        _check_choice("function", self.function, FUNCTIONS)
        _check_choice("scheme", self.scheme, SCHEMES)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("noise kind", self.noise_kind, NOISE_CHOICES)
        _check_choice("noise scope", self.noise_scope, NOISE_SCOPES)
        object.__setattr__(self, "missing", _numbers("Missing values", self.missing))
        _check_choice("type of the result", self.dtype, RESULT_TYPES)

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def also_missing(self, values: tuple[float, ...]) -> Self:
        """A copy for a file that declares missing values of its own."""
        new = tuple(v for v in values if v not in self.missing)
        return self.with_(missing=(*self.missing, *new)) if new else self

    def changed(self) -> dict[str, Any]:
        """The fields that differ from the defaults, in order."""
        default = type(self)()
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        }


@dataclass(frozen=True)
class TilingConfig:
    """How large planes are cut.

    Parameters
    ----------
    tile
        Edge length of a tile in pixels, halo not counted, at least 32. ``None``: as large as the
        memory budget allows.
    memory_budget
        Bytes that the solver may use at once. ``None``: a part of what is free on the device.
    """

    tile: int | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        _normalise(self, {"tile": as_whole, "memory_budget": as_whole})
        if self.tile is not None and self.tile < 32:
            raise InvalidSettingError(f"A tile must have at least 32 pixels, not {self.tile}.")
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise InvalidSettingError("The memory budget must be above 0 bytes.")


@dataclass(frozen=True)
class MapsConfig:
    """Which maps of the diffusion are kept beside the denoised image, and of which step.

    Parameters
    ----------
    diffusivity
        The mean conductance around each pixel, without unit.
    orientation
        The orientation of strongest diffusion, in degrees, and the anisotropy, from 0 to 1.
    step
        The diffusion step that they are of, counted from 1. ``None``: the last.
    """

    diffusivity: bool = False
    orientation: bool = False
    step: int | None = None

    def __post_init__(self) -> None:
        if self.step is None:
            return
        object.__setattr__(self, "step", as_whole("The step of the maps", self.step))
        if self.step < 1:
            raise InvalidSettingError(
                f"The step of the maps must be a whole number from 1, not {self.step}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The maps that are kept."""
        directional = ("orientation", "anisotropy")
        return ("diffusivity",) * self.diffusivity + directional * self.orientation

    def is_after(self, iterations: int) -> bool:
        """Whether a run of so many steps ends before the step that the maps are of."""
        return bool(self.names) and self.step is not None and self.step > iterations


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Parameters
    ----------
    steps
        Number of optimiser steps.
    batch, patch
        Patches in a step, of all processes together, and their edge length in pixels.
    iterations, tau
        Diffusion steps, and their length in squared pixels.
    noise_range
        Lowest and highest noise level on the 0-255 scale; each patch draws its own, uniform in the
        logarithm.
    correlated, photon
        Parts of the patches, from 0 to 1 and at most 1 together, whose noise is correlated between
        neighbouring pixels, and whose noise is that of counted photons, the noise level being that
        at the mean intensity, and up to four times what was drawn. Half of the latter are as a
        detector counts that multiplies electrons (EMCCD, photomultiplier).
    lines
        Part of the patches, from 0 to 1, that show the edges of an image instead of the image: thin
        bright lines on a dark ground, as fluorescence does.
    blurred
        Part of the patches, from 0 to 1, that are blurred before noise is added, as optics and
        interpolation do: in them there is no detail as fine as a pixel.
    turned
        Whether a model that looks at the image in several orientations does so in training, at so
        many times the cost; by default it looks once.
    optimiser
        ``"adamw"``, or ``"muon"``, which learns the kernels of large networks in fewer steps.
    learning_rate
        Highest one; it rises over the first fifth of the steps and falls to 0 along a cosine.
    mixed
        Whether the model computes in bfloat16, and only the diffusion in float32.
    seed
        Of the first parameters, the patches and their noise, at least 0.
    """

    steps: int = 3000
    batch: int = 4
    patch: int = 64
    iterations: int = 8
    tau: float = 0.25
    noise_range: tuple[float, float] = (5.0, 75.0)
    correlated: float = 0.0
    photon: float = 0.0
    lines: float = 0.0
    blurred: float = 0.0
    turned: bool = False
    optimiser: OptimiserName = "adamw"
    learning_rate: float = 2e-3
    mixed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "patch", "iterations"):
            _check_least(name, getattr(self, name), 1)
        _check_positive("tau", self.tau)
        _check_least("seed", self.seed, 0)
        low, high = (as_number("noise_range", end) for end in self.noise_range)
        if not 0 < low <= high < math.inf:
            raise InvalidSettingError(
                f"The noise range must be two numbers above 0, the lower first, not {low}, {high}."
            )
        for name in ("correlated", "photon", "lines", "blurred"):
            if not 0 <= as_number(name, getattr(self, name)) <= 1:
                raise InvalidSettingError(
                    f"The part {name} must be from 0 to 1, not {getattr(self, name)}."
                )
        _check_choice("optimiser", self.optimiser, OPTIMISERS)
        if self.correlated + self.photon > 1:
            raise InvalidSettingError(
                "The parts correlated and photon must be at most 1 together, not "
                f"{self.correlated + self.photon:g}."
            )
        if not 0 < as_number("learning_rate", self.learning_rate) < math.inf:
            raise InvalidSettingError(
                f"The learning rate must be a finite number above 0, not {self.learning_rate}."
            )


@dataclass(frozen=True)
class NoiseTrainingConfig:
    """How to train the noise network.

    Parameters
    ----------
    steps, batch
        Number of optimiser steps, and windows in each.
    scans
        Windows of CT noise that are computed before the first step.
    optimiser, learning_rate, mixed, seed
        As of `TrainingConfig`.
    """

    steps: int = 12_000
    batch: int = 16
    scans: int = 800
    optimiser: OptimiserName = "muon"
    learning_rate: float = 2e-3
    mixed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "scans"):
            _check_least(name, getattr(self, name), 1)
        _check_least("seed", self.seed, 0)
        _check_choice("optimiser", self.optimiser, OPTIMISERS)
        if not 0 < self.learning_rate < math.inf:
            raise InvalidSettingError(
                f"The learning rate must be a finite number above 0, not {self.learning_rate}."
            )


@dataclass(frozen=True)
class FineTuneConfig:
    """How to fine-tune a model on selected regions.

    Parameters
    ----------
    mode
        What there is to learn from. ``"paired"``: a reference, the same image with little noise.
        ``"clean"``: the regions themselves are good; noise of the stack's own level is added to
        them. ``"noisy"``: noisy regions alone, by the known noise model (Recorrupted2Recorrupted).
        ``"repeats"``: a second noisy image of the same (Noise2Noise). ``"neighbours"``: the slices
        before and after, which show nearly the same (Noise2Noise).
    added_noise
        Noise that is added in the modes ``"clean"`` and ``"noisy"``: drawn from the noise
        ``"model"``, or with the spectrum ``"measured"`` in flat parts of the stack; ``"auto"``
        measures where the noise is correlated.
    steps
        Optimiser steps at most, at least 1.
    learning_rate
        Highest one; it rises over the first fifth of the steps and falls to 0 along a cosine.
    patch, batch
        Edge length of the patches, in pixels, at least 16, and patches in a step.
    parameters
        ``"all"``, or the ``"last"`` layers and activation functions only.
    held_out
        Part of the regions, above 0 and at most 0.5, that is never trained on: it tells which step
        is the best.
    every
        Steps between two looks at the held-out part.
    patience
        Looks without a better step after which the training ends.
    seed
        Of patches and noise, at least 0: the same seed and regions give the same model.
    """

    mode: FineTuneMode = "paired"
    added_noise: AddedNoise = "auto"
    steps: int = 300
    learning_rate: float = 1e-3
    patch: int = 96
    batch: int = 4
    parameters: TunedParameters = "all"
    held_out: float = 0.2
    every: int = 15
    patience: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("fine-tuning mode", self.mode, FINE_TUNE_MODES)
        _check_choice("added noise", self.added_noise, ADDED_NOISES)
        _check_choice("choice of parameters", self.parameters, TUNED_PARAMETERS)
        for name, least in (("steps", 1), ("batch", 1), ("every", 1), ("patience", 1), ("seed", 0)):
            _check_least(name, getattr(self, name), least)
        _check_least("patch", self.patch, SMALLEST_PATCH)
        if not 0 < as_number("learning_rate", self.learning_rate) < math.inf:
            raise InvalidSettingError(
                f"The learning rate must be a finite number above 0, not {self.learning_rate}."
            )
        if not 0 < as_number("held_out", self.held_out) <= 0.5:
            raise InvalidSettingError(
                f"The held-out part must be above 0 and at most 0.5, not {self.held_out}."
            )

    @property
    def needs_reference(self) -> bool:
        """Whether there must be a second image."""
        return self.mode in ("paired", "repeats")


def as_whole(name: str, value: Any) -> int:
    """A setting as a whole number of Python's own type, which JSON can hold.

    Raises
    ------
    InvalidSettingError
        if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidSettingError(f"{name} must be a whole number, not {_shown(value)}.")
    return int(value)


def as_number(name: str, value: Any) -> float:
    """A setting as a number of Python's own type, which JSON can hold.

    Raises
    ------
    InvalidSettingError
        if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidSettingError(f"{name} must be a number, not {_shown(value)}.")
    return int(value) if isinstance(value, Integral) else float(value)


def _normalise(settings: Any, kinds: Mapping[str, Callable[[str, Any], Any]]) -> None:
    """Bring those fields of frozen settings that are given to their kind."""
    for name, kind in kinds.items():
        value = getattr(settings, name)
        if value is not None:
            object.__setattr__(settings, name, kind(name, value))


def _device_by_name(device: Any) -> str:
    """The name of a device, which a torch.device, too, says."""
    if isinstance(device, str) or type(device).__module__.partition(".")[0] == "torch":
        return str(device)
    raise InvalidSettingError(
        f"The device must be a name such as 'auto', 'cpu' or 'cuda', not {_shown(device)}."
    )


def _shown(value: Any) -> str:
    """A value that a caller gave, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _check_least(name: str, value: int, least: int) -> None:
    if as_whole(name, value) < least:
        raise InvalidSettingError(f"{name} must be at least {least}, not {value}.")


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """One number or several as a tuple of numbers."""
    try:
        return tuple(float(value) for value in np.atleast_1d(np.asarray(values, np.float64)))
    except (TypeError, ValueError):
        raise InvalidSettingError(f"{name} must be numbers, not {values!r}.") from None


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(as_number(name, value)) and value > 0):
        raise InvalidSettingError(f"{name} must be a finite number above 0, not {value}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InvalidSettingError(
            f"There is no {name} {_shown(value)}. Choose one of: {', '.join(choices)}."
        )


def noise_from_arguments(
    noise: NoiseModel | NoiseChoice | None, noise_sigma: float | None
) -> NoiseModel | None:
    """The noise model that a caller means by ``noise`` or by its short form ``noise_sigma``.

    Parameters
    ----------
    noise
        A noise model; the key of one, whose level is ``noise_sigma``; ``None``.
    noise_sigma
        Standard deviation in layer units; ``None``: as ``noise`` says, or to be estimated.

    Raises
    ------
    InvalidSettingError
        if the two contradict each other, or are of another kind.
    """
    if noise_sigma is None:
        return None if isinstance(noise, str) else noise
    level = as_number("noise_sigma", noise_sigma)
    if noise is None or (isinstance(noise, str) and noise == "auto"):
        return Gaussian(level)
    if not isinstance(noise, str):
        raise InvalidSettingError("Give either a noise model or noise_sigma, not both.")
    _check_choice("noise kind", noise, NOISE_CHOICES)
    model = NOISE_MODELS[noise]
    if "noise_sigma" not in model.parameters():
        raise InvalidSettingError(
            f"{noise} noise has no noise_sigma: give a noise model with "
            f"{' and '.join(model.parameters())}, or leave noise_sigma out to have it estimated."
        )
    return model(noise_sigma=level)  # type: ignore[call-arg]


__all__ = [
    "Correlated",
    "DiffusionConfig",
    "FineTuneConfig",
    "Gaussian",
    "MapsConfig",
    "NoiseModel",
    "PoissonGaussian",
    "Rician",
    "TilingConfig",
    "TrainingConfig",
    "noise_from_arguments",
]
