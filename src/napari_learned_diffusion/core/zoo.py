"""The models that there are, what their cards say, and how to make one ready to use.

A *card* is the JSON file ``weights/KEY.json``: what a model is for, in words for users, and where
its parameters come from. The user's own models have theirs in their files, see `core.user_models`.
Reading the cards imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from napari_learned_diffusion.config import DEFAULT_MODEL
from napari_learned_diffusion.core.diffusivity import REGISTRY, diffusivity_class
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    InvalidSettingError,
    UnknownModelError,
)
from napari_learned_diffusion.core.user_models import (
    UserModel,
    damaged_user_models,
    is_user_key,
    list_user_models,
    load_user_model,
    user_model,
)

if TYPE_CHECKING:
    from torch import Tensor

    from napari_learned_diffusion.config import DiffusionConfig, NoiseChoice
    from napari_learned_diffusion.core.diffusivity.base import Diffusivity, LearnedDiffusivity

STANDARD_MODEL, BEST_MODEL = "conductance-unet-s", "conductance-unet"
CLASSICAL_MODEL = "perona-malik"

Weights: TypeAlias = "Mapping[str, Tensor]"

Learned = TypeVar("Learned", bound="LearnedDiffusivity")


@dataclass(frozen=True)
class ModelCard:
    """What a user should know about a model.

    Parameters
    ----------
    key
        Name in the registry, or ``my/NAME`` of a user's own model.
    title, summary
        A name and one sentence for people.
    parameters
        Number of learned parameters.
    noise_range
        Noise levels that the model was made for, on the 0–255 scale of natural images.
    settings
        The fields of `config.DiffusionConfig` that this model has and others haven't.
    most_iterations
        Number of diffusion steps that the model was made for; ``None`` where there is no end.
    details
        Where the model comes from: data set, command, seed, references, tuned values.
    """

    key: str
    title: str
    summary: str
    parameters: int
    noise_range: tuple[float, float]
    settings: frozenset[str]
    most_iterations: int | None
    details: dict[str, Any]


def card(key: str) -> ModelCard:
    """The card of the model ``key``.

    Raises
    ------
    UnknownModelError
        if there is no such model; the message lists those that there are.
    """
    return _own_card(user_model(key)) if is_user_key(key) else _bundled_card(key)


def noise_kind_of(config: DiffusionConfig) -> NoiseChoice:
    """Which kind of noise to look for: the one that was asked for, or that the model asks for.

    A model of the user's own that has learned from correlated noise asks for that: without being
    told, an image rarely shows it for sure.
    """
    if config.noise_kind != "auto" or not is_user_key(config.model):
        return config.noise_kind
    try:
        noise = card(config.model).details.get("noise")
    except (UnknownModelError, FileFormatError):  # which whoever wants to use it will be told
        return "auto"
    learned = noise.get("key") if isinstance(noise, dict) else None
    return "correlated" if learned == "correlated" else "auto"


def _own_card(model: UserModel) -> ModelCard:
    """What the model that it was made from says, except for what has changed."""
    base, facts = _bundled_card(model.base), model.facts
    low, high = facts["noise_range"]
    steps, most = facts["suggestion"]["iterations"], base.most_iterations
    if most is not None and steps > most:
        raise FileFormatError(
            f"{model.path} suggests {steps} iterations, but {model.base} was made for at most "
            f"{most}."
        )
    return ModelCard(
        key=model.key,
        title=model.name,
        summary=model.summary,
        parameters=model.parameters,
        noise_range=(float(low), float(high)),
        settings=base.settings,
        most_iterations=base.most_iterations,
        details=facts | {"base": model.base, "architecture": model.architecture},
    )


@cache
def _bundled_card(key: str) -> ModelCard:
    if key not in REGISTRY:
        raise UnknownModelError(f"There is no model {key!r}. There are: {', '.join(REGISTRY)}.")
    name = f"{key}.json"
    try:
        text = files("napari_learned_diffusion").joinpath("weights", name).read_text("utf-8")
        content = json.loads(text)
        low, high = content["noise_range"]
        return ModelCard(
            key=key,
            title=content["title"],
            summary=content["summary"],
            parameters=int(content["parameters"]),
            noise_range=(float(low), float(high)),
            settings=frozenset(content.get("settings", ())),
            most_iterations=content.get("most_iterations"),
            details=content["details"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"The card {name} of the model {key} is missing or damaged. Install "
            "napari-learned-diffusion anew, or choose another model."
        ) from error


def list_cards() -> list[ModelCard]:
    """The cards of all models, in the registry's order, then the user's own by name.

    Those whose files are missing or damaged are left out; `damaged_models` says what is wrong.
    """
    return [found for _, found in _cards() if isinstance(found, ModelCard)]


def damaged_models() -> dict[str, str]:
    """A sentence about each model whose files are missing or damaged, by its key."""
    bundled_and_own = {key: found for key, found in _cards() if isinstance(found, str)}
    return bundled_and_own | damaged_user_models()


def _cards() -> Iterator[tuple[str, ModelCard | str]]:
    """The card of each model whose file can be read, or what is wrong with it."""
    for key in REGISTRY:
        try:
            yield key, _bundled_card(key)
        except FileFormatError as error:
            yield key, str(error)
    for model in list_user_models():
        try:
            yield model.key, _own_card(model)
        except FileFormatError as error:
            yield model.key, f"Damaged, delete or replace it: {error}"


def suitable_model(config: DiffusionConfig, device: str) -> str:
    """The key that ``config.model`` means on a kind of device, such as ``"cpu"``.

    ``"auto"`` is `STANDARD_MODEL` on processors and `BEST_MODEL` on GPUs; but `CLASSICAL_MODEL`
    where a setting is given that only it has.
    """
    if config.model != DEFAULT_MODEL:
        return config.model
    with suppress(FileFormatError):  # where its card is damaged, the others serve all the same
        if card(CLASSICAL_MODEL).settings & config.changed().keys():
            return CLASSICAL_MODEL
    return STANDARD_MODEL if device == "cpu" else BEST_MODEL


def check_settings(config: DiffusionConfig) -> None:
    """Refuse settings that the model can't follow, before anything is read or computed.

    Where the model is automatic, it is one of those that it may become.

    Raises
    ------
    InvalidSettingError
        with a sentence that says what to change.
    UnknownModelError
        if there is no such model.
    """
    keys = {suitable_model(config, device) for device in ("cpu", "cuda")}
    cards = [card(key) for key in sorted(keys)]
    if config.scheme == "fed" and not any("scheme" in c.settings for c in cards):
        raise InvalidSettingError(
            "The FED scheme needs a diffusivity that is at most 1: it is for perona-malik only."
        )
    limits = [c.most_iterations for c in cards]
    most = max((n for n in limits if n is not None), default=None)
    if most is None or None in limits or config.iterations is None or config.iterations <= most:
        return
    name = "The automatic model" if config.model == DEFAULT_MODEL else config.model
    raise InvalidSettingError(
        f"{name} was made for at most {most} iterations, not {config.iterations}. Take fewer, "
        f"leave the number automatic, or choose {CLASSICAL_MODEL}, which takes any number."
    )


def load_model(config: DiffusionConfig) -> Diffusivity:
    """The diffusivity that a complete configuration asks for, on the CPU.

    Raises
    ------
    UnknownModelError
        if there is no such model.
    """
    return diffusivity_class(config.model).from_config(config)


def learned_model(key: str) -> LearnedDiffusivity:
    """A copy of a model with parameters that can go on learning, on the CPU.

    Raises
    ------
    UnknownModelError
        if there is no such model, or it has none.
    """
    from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity

    model_class = diffusivity_class(key)
    if not issubclass(model_class, LearnedDiffusivity):
        raise UnknownModelError(
            f"{key} has no parameters that it could learn. Choose another model."
        )
    return trained_model(model_class, key)


def trained_model(model_class: type[Learned], key: str) -> Learned:
    """A diffusivity with the parameters of a user's own model, or those of the package; on the CPU.

    Parameters
    ----------
    key
        Of the model; all that isn't a user's own means the package's.
    """
    if not is_user_key(key):
        return bundled_model(model_class)
    own = load_user_model(key)
    if not isinstance(own, model_class):
        raise UnknownModelError(f"{key} is a model {own.key}, not a {model_class.key}.")
    return own


def bundled_model(model_class: type[Learned]) -> Learned:
    """A learned diffusivity with the weights that come with the package, on the CPU."""
    from napari_learned_diffusion.core.weights import read_model  # safetensors imports torch

    weights = files("napari_learned_diffusion").joinpath(
        "weights", f"{model_class.key}.safetensors"
    )
    with as_file(weights) as path:
        return read_model(path, model_class)


def weights_of(model: str) -> tuple[Weights | None, str]:
    """The parameters that a model has learned, and a hash of them; none for a classical one."""
    from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity

    kind = diffusivity_class(model)
    if not issubclass(kind, LearnedDiffusivity):
        return None, ""
    weights = trained_model(kind, model).state_dict()
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.cpu().contiguous().numpy().tobytes())
    return weights, total.hexdigest()


def weights_hash(model: str) -> str:
    """The hash that `weights_of` gives; of the package's own models it is remembered."""
    return weights_of(model)[1] if is_user_key(model) else _bundled_hash(model)


@cache
def _bundled_hash(model: str) -> str:
    return weights_of(model)[1]
