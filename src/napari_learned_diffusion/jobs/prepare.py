"""From what the user asked for to settings with nothing left automatic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, NoiseChoice
from napari_learned_diffusion.core.device import resolve_device
from napari_learned_diffusion.core.diffusivity import diffusivity_class
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.missing import missing_pixels, without_missing
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.noise_estimation import (
    NoiseEstimate,
    estimate_noise,
    sample_planes,
)
from napari_learned_diffusion.core.schemes import STABLE_TAU, FastExplicitDiffusion
from napari_learned_diffusion.core.zoo import (
    card,
    check_settings,
    noise_kind_of,
    suitable_model,
    weights_hash,
)
from napari_learned_diffusion.jobs.planes import (
    LAST_AXES,
    PlaneAxes,
    check_image,
    check_values,
    plane_indices,
    read_plane,
    stabilised_range,
)

SAMPLES = 16
_WINDOW = 512
"""At most so many samples are taken: whole planes, or square windows of so many pixels an edge."""

_BLOCK = 8
"""Edge length of the blocks whose means tell where the image is dark, in pixels."""

_SLICES_ASKED = 4
_SURE_ENOUGH = 0.5


@dataclass(frozen=True)
class Prepared:
    """Settings with nothing left automatic.

    Parameters
    ----------
    config
        Every field that was ``None`` is filled in, and the device is one that is there.
    estimate
        How the noise model was estimated; ``None`` where the caller gave it.
    requested
        The configuration as it was given.
    slices_differ
        Whether the slices of a stack differ in their noise, and each says surely enough how.
    weights
        Hash of the parameters that the model has learned, ``""`` for a classical one.
    n_slices
        Number of slices of the image.
    low_noise_sigma
        Noise level that a quarter of the image stays below, in layer units; NaN for an image of
        floating point numbers, and where nothing is done.
    largest
        Largest absolute value seen.
    """

    config: DiffusionConfig
    estimate: NoiseEstimate | None
    requested: DiffusionConfig
    slices_differ: bool = False
    weights: str = ""
    n_slices: int = 1
    low_noise_sigma: float = math.nan
    largest: float = math.nan

    @property
    def slice_by_slice(self) -> bool:
        """Whether each slice of the stack gets a noise model, and what depends on it, of its own.

        Decided here alone: everybody else asks for the settings `of` a slice.
        """
        if self.n_slices == 1 or self.estimate is None or self.requested.noise_scope == "stack":
            return False
        return self.requested.noise_scope == "slice" or self.slices_differ

    def of(self, plane: NDArray[Any]) -> Prepared:
        """The settings of one slice ``(h, w)`` of the stack."""
        if not self.slice_by_slice or missing_pixels(plane, self.requested.missing).is_everything:
            return self
        # All slices have one type, which the stack decides.
        return replace(
            prepare(plane, self.requested),
            low_noise_sigma=self.low_noise_sigma,
            largest=self.largest,
        )

    @property
    def noise(self) -> NoiseModel:
        """The noise model, in layer units."""
        if self.config.noise is None:
            raise InvalidSettingError("The settings have not been prepared: no noise model is set.")
        return self.config.noise


def placed(config: DiffusionConfig) -> DiffusionConfig:
    """The configuration with the model chosen, and the device that is the fastest for it.

    A GPU has to be told each of the many small steps of `perona-malik`. Unless slices are large and
    cores are few, that takes longer than the CPU takes to do them.

    Raises
    ------
    DeviceError
        if the device isn't there.
    UnknownModelError
        if there is no such model.
    """
    device = resolve_device(config.device, config.precision)
    key = suitable_model(config, device.type)
    single = config.precision != "float64"
    if config.device == "auto" and single and diffusivity_class(key).whole_steps_on_cpu:
        device = resolve_device("cpu")
    return config.with_(model=key, device=str(device))


def prepare(
    image: Any,
    config: DiffusionConfig | None = None,
    *,
    plane_axes: PlaneAxes = LAST_AXES,
) -> Prepared:
    """Fill in what the configuration leaves automatic, from a few planes of the image.

    Parameters
    ----------
    image
        Numpy, dask or zarr array of any number of dimensions; at most 16 planes are read.
    config
        ``None``: everything automatic.
    plane_axes
        Row axis and column axis of the planes.

    Raises
    ------
    LearnedDiffusionError
        if the image can't be denoised, the model or the device isn't there, or settings contradict
        each other.
    """
    requested = config or DiffusionConfig()
    rows_columns = check_image(image, plane_axes)
    check_settings(requested)
    config = placed(requested)
    model = diffusivity_class(config.model)
    check_settings(config)
    indices = plane_indices(tuple(image.shape), rows_columns)
    samples = _sample(image, indices, rows_columns, config.missing)
    if np.isnan(samples).all():
        raise InvalidImageError(
            "The image holds no number: every pixel is NaN, infinite, masked or a fill value."
        )
    lowest, highest = float(np.nanmin(samples)), float(np.nanmax(samples))
    check_values(lowest, highest, np.dtype(image.dtype))
    estimate = None
    differ = False
    n_slices = len(indices)
    largest = float(np.nanmax(np.abs(samples)))
    is_whole = np.dtype(image.dtype).kind in "iu"
    noise = config.noise
    if noise is None:
        kind = noise_kind_of(config)
        estimate = estimate_noise(samples, kind)
        if kind != config.noise_kind:
            learned = f"{estimate.message} The model has learned from such noise."
            estimate = replace(estimate, message=learned)
        noise = estimate.model
        differ = estimate.slices_differ and _can_tell(samples, kind)
    config = config.with_(noise=noise)
    if noise.is_zero:
        # Nothing will be done; the rest is filled in only so that nothing is left open.
        idle = config.with_(iterations=0, contrast=1.0, tau=STABLE_TAU, presmooth_sigma=0.0)
        return Prepared(idle, estimate, requested, n_slices=n_slices, largest=largest)
    stabilised_range(noise, lowest, highest)
    for sample in samples:  # which settings suit the image is told by what takes part
        sample[missing_pixels(sample, noise=noise).mask] = np.nan
    suggestion = model.suggest(noise.stabilise(samples), config.model)
    tau = config.tau if config.tau is not None else suggestion.tau
    time_wanted = config.stopping_time or suggestion.stopping_time
    iterations = config.iterations
    if iterations is None and config.scheme == "fed":
        iterations = FastExplicitDiffusion(time_wanted).least_iterations()
    elif iterations is None:
        iterations = max(1, round(time_wanted / tau))
        most = card(config.model).most_iterations
        if most is not None and iterations > most:
            raise InvalidSettingError(
                f"With time steps of {tau:g} {config.model} would take {iterations} iterations, "
                f"and it was made for at most {most}. Give a larger tau, or leave it automatic."
            )
    prepared = Prepared(
        config.with_(
            iterations=iterations,
            tau=tau,
            stopping_time=time_wanted if config.scheme == "fed" else None,
            contrast=config.contrast if config.contrast is not None else suggestion.contrast,
            presmooth_sigma=(
                config.presmooth_sigma
                if config.presmooth_sigma is not None
                else suggestion.presmooth_sigma
            ),
        ),
        estimate,
        requested,
        differ,
        weights_hash(config.model),
        n_slices,
        _low_noise_sigma(noise, samples) if is_whole and iterations else math.nan,
        largest,
    )
    if prepared.slice_by_slice and math.isfinite(prepared.low_noise_sigma):
        return replace(prepared, low_noise_sigma=_lowest_of_slices(samples, noise_kind_of(config)))
    return prepared


def _sample(
    image: Any,
    indices: Sequence[tuple[int, ...]],
    plane_axes: PlaneAxes,
    missing: tuple[float, ...],
) -> NDArray[np.float64]:
    """Planes spread over the stack, or windows spread over large ones: ``(n, h, w)``, NaN where
    a pixel holds no intensity.

    Some million pixels tell all there is to know about the noise; more would only take time and
    memory.
    """
    chosen = [indices[i] for i in sample_planes(len(indices), SAMPLES)]
    shape = [image.shape[axis] for axis in plane_axes]
    windows = [(slice(None), slice(None))]
    if len(chosen) * shape[0] * shape[1] > SAMPLES * _WINDOW**2:
        starts = [range(0, max(1, size - _WINDOW + 1), _WINDOW) for size in shape]
        windows = [
            (slice(y, y + _WINDOW), slice(x, x + _WINDOW)) for y in starts[0] for x in starts[1]
        ]
    of_each = sample_planes(len(windows), max(1, SAMPLES // len(chosen)))
    samples = []
    for number, index in enumerate(chosen):
        plane = without_missing(read_plane(image, index, plane_axes), missing)
        # Moving on from plane to plane, so that not all windows are of the same corner.
        samples += [plane[windows[(w + number) % len(windows)]] for w in of_each]
    return np.stack(samples).astype(np.float64)


def _low_noise_sigma(noise: NoiseModel, samples: NDArray[np.float64]) -> float:
    """Noise level that a quarter of the image stays below; NaN where all is constant.

    By the means of blocks, since single pixels scatter; exactly constant ones hold no noise.
    """
    size = min(_BLOCK, *samples.shape[1:])
    rows, columns = (length // size for length in samples.shape[1:])
    cut = samples[:, : rows * size, : columns * size]
    blocks = cut.reshape(-1, rows, size, columns, size).swapaxes(2, 3).reshape(-1, size**2)
    blocks = blocks[np.isfinite(blocks).all(axis=1)]
    means = blocks.mean(axis=1)[np.ptp(blocks, axis=1) > 0]
    return float(np.quantile(np.sqrt(noise.variance(means)), 0.25)) if len(means) else math.nan


def _lowest_of_slices(samples: NDArray[np.float64], kind: NoiseChoice) -> float:
    """The lowest `_low_noise_sigma` of slices that have noise models of their own."""
    alone = [samples[i] for i in sample_planes(len(samples), _SLICES_ASKED)]
    models = [(s, estimate_noise(s, kind).model) for s in alone if np.isfinite(s).any()]
    levels = [_low_noise_sigma(m, s[None]) for s, m in models if not m.is_zero]
    return min((level for level in levels if math.isfinite(level)), default=math.nan)


def _can_tell(samples: NDArray[np.float64], kind: NoiseChoice) -> bool:
    """Whether single slices say surely enough what their noise is; else the stack knows better."""
    alone = [samples[i] for i in sample_planes(len(samples), _SLICES_ASKED)]
    sure = [estimate_noise(s, kind).confidence for s in alone if np.isfinite(s).any()]
    return bool(np.median(sure) >= _SURE_ENOUGH)
