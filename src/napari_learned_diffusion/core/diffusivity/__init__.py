"""Every diffusivity by its key. Adding one is a file in this package and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from napari_learned_diffusion.core.errors import UnknownModelError

if TYPE_CHECKING:
    from napari_learned_diffusion.core.diffusivity.base import Diffusivity, LearnedDiffusivity

REGISTRY: dict[str, str] = {
    "perona-malik": "perona_malik:PeronaMalik",
    "foe-splines": "fields_of_experts:Splines",
    "foe-decreasing": "fields_of_experts:DecreasingSplines",
    "foe-monomials": "fields_of_experts:Monomials",
    "foe-roth-black": "fields_of_experts:RothBlack",
    "unet": "unet:UNet",
    "conductance-unet-s": "conductance_unet:ConductanceUNet",
    "conductance-unet": "conductance_unet:LargeConductanceUNet",
    "k-automation": "k_automation:KAutomation",
}
"""Key to ``module:class``, so that listing the models imports no torch."""


def diffusivity_class(key: str) -> type[Diffusivity]:
    """The class of a model: the one that is registered as ``key``, or that a user's own is of.

    Raises
    ------
    UnknownModelError
        if there is none; the message lists those that there are.
    """
    from napari_learned_diffusion.core.user_models import is_user_key, user_model

    if is_user_key(key):
        key = user_model(key).base
    if key not in REGISTRY:
        raise UnknownModelError(f"There is no model {key!r}. There are: {', '.join(REGISTRY)}.")
    found: type[Diffusivity] = _import(REGISTRY[key])
    return found


def learned_diffusivity_class(key: str) -> type[LearnedDiffusivity]:
    """The class of a diffusivity that can be trained.

    Raises
    ------
    UnknownModelError
        if there is none; the message lists those that there are.
    """
    from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity

    found = _import(REGISTRY[key]) if key in REGISTRY else None
    if found is None or not issubclass(found, LearnedDiffusivity):
        learned = (k for k, v in REGISTRY.items() if issubclass(_import(v), LearnedDiffusivity))
        raise UnknownModelError(
            f"There is no model {key!r} to train. There are: {', '.join(learned)}."
        )
    return found


def _import(path: str) -> type:
    module, name = path.split(":")
    found: type = getattr(import_module(f"{__name__}.{module}"), name)
    return found
