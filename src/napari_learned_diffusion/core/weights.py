"""Weights files: safetensors with a JSON header that says what they belong to.

Nothing is ever unpickled: a file from anywhere can be opened without running what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from napari_learned_diffusion.core.atomic import why_not_written, written_aside
from napari_learned_diffusion.core.errors import FileFormatError, FileWriteError
from napari_learned_diffusion.core.model_files import FORMAT as FORMAT
from napari_learned_diffusion.core.model_files import require_file
from napari_learned_diffusion.core.trainable import Trainable

Model = TypeVar("Model", bound=Trainable)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any], *, overwrite: bool = True
) -> None:
    """Write tensors and a JSON header; the file is complete or as it was before, never half.

    Raises
    ------
    FileWriteError
        if the folder can't be written to, or the file is there and may not be replaced.
    """
    metadata = {"header": json.dumps(header | {"format": FORMAT})}
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        with written_aside(path, overwrite=overwrite) as aside:
            save_file(contiguous, aside, metadata)
    except OSError as error:
        raise FileWriteError(why_not_written(path, error)) from error
    except SafetensorError as error:
        raise FileWriteError(f"{path} couldn't be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header that `write_tensors` wrote, on the CPU.

    Raises
    ------
    FileFormatError
        if the file is missing, cut short, not of this package, or of a newer format.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"{path} is no intact safetensors file ({error}). Other formats, pickles among them, "
            "are not read, because loading one can run code that is hidden in it."
        ) from error
    try:
        header = json.loads(metadata["header"])
        version = int(header["format"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FileFormatError(f"{path} was not written by this package.") from error
    if version > FORMAT:
        raise FileFormatError(
            f"{path} has the format {version}, but this version reads up to {FORMAT}. "
            "Update napari-learned-diffusion."
        )
    return tensors, header


def write_model(path: Path, model: Trainable) -> None:
    """Write the parameters of a model, and what it takes to make it again."""
    tensors = model.state_dict()
    if model.stored_in_half:
        tensors = {name: t.half() for name, t in tensors.items()}
    write_tensors(path, tensors, describe(model))


def read_model(path: Path, model_class: type[Model]) -> Model:
    """The model that `write_model` wrote, on the CPU.

    Raises
    ------
    FileFormatError
        as `read_tensors`, or if the file is of another model.
    """
    tensors, header = read_tensors(path)
    require_model(path, header, model_class)
    model = model_class(**header["architecture"])
    fill(path, model, tensors)
    return model


def describe(model: Trainable) -> dict[str, Any]:
    """The part of a header that tells which model the tensors belong to."""
    return {"model": model.key, "architecture": model.architecture}


def require_model(path: Path, header: dict[str, Any], model_class: type[Model]) -> None:
    """Refuse the header of another model's file."""
    if header.get("model") != model_class.key:
        raise FileFormatError(
            f"{path} is of the model {header.get('model')!r}, not of {model_class.key!r}."
        )


def fill(path: Path, model: Trainable, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model's parameters, all of them and no others."""
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise FileFormatError(f"{path} doesn't fit its model: {error}") from error
