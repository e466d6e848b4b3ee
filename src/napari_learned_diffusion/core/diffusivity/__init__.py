"""Every diffusivity by its key. Adding one is a file in this package and a line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from napari_learned_diffusion.core.errors import UnknownModelError

if TYPE_CHECKING:
    from napari_learned_diffusion.core.diffusivity.base import Diffusivity

REGISTRY: dict[str, str] = {
    "perona-malik": "perona_malik:PeronaMalik",
}
"""Key to ``module:class``, so that listing the models imports no torch."""


def diffusivity_class(key: str) -> type[Diffusivity]:
    """The class that is registered as ``key``.

    Raises
    ------
    UnknownModelError
        if there is none; the message lists those that there are.
    """
    if key not in REGISTRY:
        raise UnknownModelError(f"There is no model {key!r}. There are: {', '.join(REGISTRY)}.")
    module, name = REGISTRY[key].split(":")
    found: type[Diffusivity] = getattr(import_module(f"{__name__}.{module}"), name)
    return found
