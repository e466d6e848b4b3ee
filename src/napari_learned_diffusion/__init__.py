"""Denoise 2D slices of CT, MRI and electron-microscopy stacks by nonlinear diffusion.

The result can only average what is there: every output pixel is a convex average of input pixels,
the mean is kept, and no value leaves the input's range. Importing the package is light: torch is
imported by the first call that computes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from napari_learned_diffusion.api import denoise, diffusivity, fine_tune, orientation
    from napari_learned_diffusion.config import (
        DiffusionConfig,
        FineTuneConfig,
        MapsConfig,
        TilingConfig,
    )
    from napari_learned_diffusion.core.errors import LearnedDiffusionError, LearnedDiffusionWarning
    from napari_learned_diffusion.core.noise import (
        Correlated,
        Gaussian,
        NoiseModel,
        PoissonGaussian,
        Rician,
    )
    from napari_learned_diffusion.core.noise_estimation import NoiseEstimate, estimate_noise
    from napari_learned_diffusion.core.zoo import ModelCard, load_model
    from napari_learned_diffusion.core.zoo import list_cards as list_models
    from napari_learned_diffusion.jobs.finetune import FineTuned
    from napari_learned_diffusion.jobs.zoo_export import export_to_zoo
    from napari_learned_diffusion.jobs.zoo_module import DenoisingModule

__version__ = "0.1.0"

__all__ = [
    "Correlated",
    "DenoisingModule",
    "DiffusionConfig",
    "FineTuneConfig",
    "FineTuned",
    "Gaussian",
    "LearnedDiffusionError",
    "LearnedDiffusionWarning",
    "MapsConfig",
    "ModelCard",
    "NoiseEstimate",
    "NoiseModel",
    "PoissonGaussian",
    "Rician",
    "TilingConfig",
    "denoise",
    "diffusivity",
    "estimate_noise",
    "export_to_zoo",
    "fine_tune",
    "list_models",
    "load_model",
    "orientation",
]

_HOMES = {
    "Correlated": "core.noise:Correlated",
    "DenoisingModule": "jobs.zoo_module:DenoisingModule",
    "DiffusionConfig": "config:DiffusionConfig",
    "FineTuneConfig": "config:FineTuneConfig",
    "FineTuned": "jobs.finetune:FineTuned",
    "Gaussian": "core.noise:Gaussian",
    "LearnedDiffusionError": "core.errors:LearnedDiffusionError",
    "LearnedDiffusionWarning": "core.errors:LearnedDiffusionWarning",
    "MapsConfig": "config:MapsConfig",
    "ModelCard": "core.zoo:ModelCard",
    "NoiseEstimate": "core.noise_estimation:NoiseEstimate",
    "NoiseModel": "core.noise:NoiseModel",
    "PoissonGaussian": "core.noise:PoissonGaussian",
    "Rician": "core.noise:Rician",
    "TilingConfig": "config:TilingConfig",
    "denoise": "api:denoise",
    "diffusivity": "api:diffusivity",
    "estimate_noise": "core.noise_estimation:estimate_noise",
    "export_to_zoo": "jobs.zoo_export:export_to_zoo",
    "fine_tune": "api:fine_tune",
    "list_models": "core.zoo:list_cards",
    "load_model": "core.zoo:load_model",
    "orientation": "api:orientation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
