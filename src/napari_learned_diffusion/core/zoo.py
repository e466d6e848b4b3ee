"""The models that there are, what their cards say, and how to make one ready to use.

A *card* is the JSON file ``weights/KEY.json``: what a model is for, in words for users, and where
its parameters come from. Reading the cards imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, TypeVar

from napari_learned_diffusion.core.diffusivity import REGISTRY, diffusivity_class
from napari_learned_diffusion.core.errors import UnknownModelError

if TYPE_CHECKING:
    from napari_learned_diffusion.config import DiffusionConfig
    from napari_learned_diffusion.core.diffusivity.base import Diffusivity, LearnedDiffusivity

Learned = TypeVar("Learned", bound="LearnedDiffusivity")


@dataclass(frozen=True)
class ModelCard:
    """What a user should know about a model.

    Parameters
    ----------
    key
        Name in the registry.
    title, summary
        A name and one sentence for people.
    parameters
        Number of learned parameters.
    noise_range
        Noise levels that the model was made for, on the 0–255 scale of natural images.
    details
        Where the model comes from: data set, command, seed, references, tuned values.
    """

    key: str
    title: str
    summary: str
    parameters: int
    noise_range: tuple[float, float]
    details: dict[str, Any]


@cache
def card(key: str) -> ModelCard:
    """The card of the model ``key``.

    Raises
    ------
    UnknownModelError
        if there is no such model; the message lists those that there are.
    """
    if key not in REGISTRY:
        raise UnknownModelError(f"There is no model {key!r}. There are: {', '.join(REGISTRY)}.")
    text = files("napari_learned_diffusion").joinpath("weights", f"{key}.json").read_text("utf-8")
    content = json.loads(text)
    low, high = content["noise_range"]
    return ModelCard(
        key=key,
        title=content["title"],
        summary=content["summary"],
        parameters=int(content["parameters"]),
        noise_range=(float(low), float(high)),
        details=content["details"],
    )


def list_cards() -> list[ModelCard]:
    """The cards of all models, in the registry's order."""
    return [card(key) for key in REGISTRY]


def load_model(config: DiffusionConfig) -> Diffusivity:
    """The diffusivity that a complete configuration asks for, on the CPU.

    Raises
    ------
    UnknownModelError
        if there is no such model.
    """
    return diffusivity_class(config.model).from_config(config)


def bundled_model(model_class: type[Learned]) -> Learned:
    """A learned diffusivity with the weights that come with the package, on the CPU."""
    from napari_learned_diffusion.core.weights import read_model  # safetensors imports torch

    weights = files("napari_learned_diffusion").joinpath(
        "weights", f"{model_class.key}.safetensors"
    )
    with as_file(weights) as path:
        return read_model(path, model_class)
