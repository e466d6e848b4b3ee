"""From what the user asked for to settings with nothing left automatic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.device import resolve_device
from napari_learned_diffusion.core.diffusivity import diffusivity_class
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.noise import NoiseModel
from napari_learned_diffusion.core.noise_estimation import (
    NoiseEstimate,
    estimate_noise,
    sample_planes,
)
from napari_learned_diffusion.core.schemes import STABLE_TAU, FastExplicitDiffusion
from napari_learned_diffusion.jobs.planes import (
    LAST_AXES,
    PlaneAxes,
    check_image,
    plane_indices,
    read_plane,
)


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
    """

    config: DiffusionConfig
    estimate: NoiseEstimate | None
    requested: DiffusionConfig

    @property
    def slice_by_slice(self) -> bool:
        """Whether a stack needs this done anew for each slice."""
        if self.estimate is None or self.requested.noise_scope == "stack":
            return False
        return self.requested.noise_scope == "slice" or self.estimate.slices_differ

    @property
    def noise(self) -> NoiseModel:
        """The noise model, in layer units."""
        if self.config.noise is None:
            raise InvalidSettingError("The settings have not been prepared: no noise model is set.")
        return self.config.noise


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
    requested = config = config or DiffusionConfig()
    rows_columns = check_image(image, plane_axes)
    model = diffusivity_class(config.model)
    device = resolve_device(config.device, config.precision)
    if config.scheme == "fed" and config.model != "perona-malik":
        raise InvalidSettingError(
            "The FED scheme needs a diffusivity that is at most 1: it is for perona-malik only."
        )
    indices = list(plane_indices(tuple(image.shape), rows_columns))
    samples = np.stack(
        [
            read_plane(image, indices[i], rows_columns).astype(np.float64)
            for i in sample_planes(len(indices))
        ]
    )
    samples[~np.isfinite(samples)] = np.nan
    if np.isnan(samples).all():
        raise InvalidImageError("The image holds no number: every pixel is NaN or infinite.")
    estimate = None
    noise = config.noise
    if noise is None:
        estimate = estimate_noise(samples, config.noise_kind)
        noise = estimate.model
    config = config.with_(noise=noise, device=str(device))
    if noise.is_zero:
        # Nothing will be done; the rest is filled in only so that nothing is left open.
        idle = config.with_(iterations=0, contrast=1.0, tau=STABLE_TAU, presmooth_sigma=0.0)
        return Prepared(idle, estimate, requested)
    suggestion = model.suggest(noise.stabilise(samples))
    tau = config.tau if config.tau is not None else suggestion.tau
    time_wanted = config.stopping_time or suggestion.stopping_time
    iterations = config.iterations
    if iterations is None and config.scheme == "fed":
        iterations = FastExplicitDiffusion(time_wanted).least_iterations()
    elif iterations is None:
        iterations = max(1, round(time_wanted / tau))
    return Prepared(
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
    )
