"""Train a learned diffusivity and write its weights and its model card."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from napari_learned_diffusion.config import CHECKPOINT_EVERY, TrainingConfig
from napari_learned_diffusion.core.device import is_out_of_memory, resolve_device
from napari_learned_diffusion.core.diffusivity import learned_diffusivity_class
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.errors import (
    DeviceError,
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
)
from napari_learned_diffusion.core.learning.distributed import rank_and_number
from napari_learned_diffusion.core.learning.patches import TrainingImages, read_images
from napari_learned_diffusion.core.learning.training import TrainStep, fit, validate
from napari_learned_diffusion.core.weights import read_model, read_tensors, write_model
from napari_learned_diffusion.jobs.progress import Job, Progress

_MOST_DRAWING = 8


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Parameters
    ----------
    weights, card
        The files that were written.
    validation
        PSNR in dB on the held-out images after the last step, by noise level.
    skipped
        Files that weren't used, each with the reason.
    """

    weights: Path
    card: Path
    validation: dict[float, float]
    skipped: tuple[str, ...]


def train(
    model: str,
    folders: tuple[Path, ...],
    output: Path,
    config: TrainingConfig | None = None,
    *,
    data_name: str,
    architecture: dict[str, int] | None = None,
    start: Path | None = None,
    device: str = "auto",
    resume: bool = True,
    every: int = CHECKPOINT_EVERY,
    workers: int | None = None,
    on_step: Callable[[TrainStep], None] | None = None,
) -> Job[Trained]:
    """Train ``model`` and write ``MODEL.safetensors`` and ``MODEL.json``.

    An interrupted run is continued by the same call: the checkpoint lies in ``output`` until the
    run is complete. Of several processes (see `core.learning.distributed`) the first writes the
    files.

    Parameters
    ----------
    model
        Key of a learned diffusivity.
    folders
        Folders of clean images.
    output
        Folder for the weights and the card; made where it isn't there.
    data_name
        What the images are, for the card.
    architecture
        Arguments of the model other than its defaults.
    start
        Weights of the same kind of model to begin with, in place of random ones. They must be of
        the same architecture, but may have fewer looks or blocks, or a smaller width: what is new
        begins anew.
    resume
        Whether to go on from a checkpoint that is there already.
    every
        Steps between two validations and checkpoints.
    workers
        Processes that draw the patches of the next steps meanwhile; ``None`` for one on each of up
        to 8 cores beside a GPU, none on a CPU, which has its cores for the network.
    on_step
        Called after every step.

    Yields
    ------
    A `Progress` after every step; closing the generator there ends the run, and its checkpoint
    stays.

    Raises
    ------
    LearnedDiffusionError
        if the model, the device or the images aren't there, if the model has no such architecture,
        if a checkpoint can't be used or the output can't be written; `DeviceError` where memory
        runs out.
    """
    config = config or TrainingConfig()
    model_class = learned_diffusivity_class(model)
    _check_architecture(model_class, architecture or {})
    yield Progress(0, config.steps, "Reading the images")
    images = read_images(folders, config.patch)
    digest = None if start is None else _digest(start)
    make_folder(output)
    # The parameters that a run begins with belong to its seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        made = model_class(**(architecture or {}))
    if start is not None:
        made.load_state_dict(_begin_with(start, made))
    # Convolutions are faster so, those in bfloat16 twice as fast.
    target = resolve_device(device)
    made = made.to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint = output / f"{model}.checkpoint.safetensors"
    steps = fit(
        made,
        images,
        config,
        checkpoint=checkpoint,
        resume=resume,
        every=every,
        workers=drawing_processes(target) if workers is None else workers,
    )
    try:
        with errors_of_training():
            for step in steps:
                if on_step is not None:
                    on_step(step)
                yield Progress(step.step, config.steps, _message(step))
    finally:
        steps.close()
    validation = validate(made, images.validation, config)
    weights, card = output / f"{model}.safetensors", output / f"{model}.json"
    if rank_and_number()[0] == 0:
        write_model(weights, made.cpu())
        facts = _card(made, images, config, data_name, validation)
        facts["details"]["training"]["start"] = digest
        write_card(card, facts)
        checkpoint.unlink(missing_ok=True)
    return Trained(weights, card, validation, images.skipped)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where it isn't there.

    Raises
    ------
    FileWriteError
        if it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileWriteError(f"The folder {folder} can't be made: {error}") from error


@contextmanager
def errors_of_training() -> Iterator[None]:
    """Say in words that memory ran out or a process that draws patches has ended."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):
            raise DeviceError(
                "A process that draws patches has ended, perhaps because memory ran out. "
                "Go on with fewer workers, or with 0."
            ) from error
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            "There is too little memory for this batch. Take fewer or smaller patches."
        ) from error


def drawing_processes(device: torch.device) -> int:
    """How many processes draw patches beside a training on a device."""
    return 0 if device.type == "cpu" else min(_MOST_DRAWING, (os.cpu_count() or 2) - 1)


def _begin_with(start: Path, made: LearnedDiffusivity) -> dict[str, torch.Tensor]:
    """The parameters of a weights file that fits a model; what it hasn't begins anew."""
    found = read_model(start, _kin(start, type(made)))
    theirs, ours = found.architecture, made.architecture
    differing = {k for k, v in ours.items() if theirs.get(k) != v}
    grown = differing & {"looks", "width", "blocks"}
    smaller = {k for k in grown if theirs.get(k, 0) < ours[k]}
    if differing - smaller:
        raise InvalidSettingError(f"{start} is of the architecture {theirs}, not of {ours}.")
    parameters, old = made.state_dict(), found.state_dict()
    for name, tensor in parameters.items():
        if name in old:
            parameters[name] = _widened(old[name], tensor, name)
        elif "blocks" in smaller and ".second." in name:
            # What a new residual block adds to what goes in: nothing, yet.
            parameters[name] = torch.zeros_like(tensor)
    return parameters


def _kin(start: Path, model_class: type[LearnedDiffusivity]) -> type[LearnedDiffusivity]:
    """The class of a weights file: the model's own, or the one that it is a larger version of."""
    key = read_tensors(start)[1].get("model")
    parents = (c for c in model_class.__mro__ if issubclass(c, LearnedDiffusivity))
    return next((c for c in parents if getattr(c, "key", None) == key), model_class)


def _widened(narrow: torch.Tensor, wide: torch.Tensor, name: str) -> torch.Tensor:
    """Parameters with which the channels of ``narrow`` do what they did, whatever the new ones do.

    The new channels see all others, as ``wide`` says; the old ones don't see them, yet.
    """
    if narrow.shape == wide.shape:
        return narrow
    old = tuple(slice(n) for n in narrow.shape)
    result = wide.clone()
    if narrow.ndim > 1:
        # (out, in, rows, columns); a transposed convolution has them the other way round.
        out = 1 if ".from_" in name else 0
        result[(slice(None),) * out + (old[out],)] = 0
    result[old] = narrow
    return result


def _digest(start: Path) -> str:
    """What tells one weights file from another, for the card."""
    try:
        return hashlib.sha256(start.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise FileFormatError(f"{start} can't be read: {error}") from error


def _check_architecture(
    model_class: type[LearnedDiffusivity], architecture: dict[str, int]
) -> None:
    known = list(inspect.signature(model_class).parameters)
    for name, value in architecture.items():
        if name not in known:
            raise InvalidSettingError(
                f"{model_class.key} has no {name!r} to set; it has {', '.join(known) or 'nothing'}."
            )
        if value < 1:
            raise InvalidSettingError(f"{name} must be at least 1, not {value}.")


def _message(step: TrainStep) -> str:
    if step.validation is None:
        return f"Loss {step.loss:.4f}"
    scores = " / ".join(f"{dB:.2f}" for dB in step.validation.values())
    return f"Loss {step.loss:.4f}, {scores} dB on the held-out images"


def _card(
    model: LearnedDiffusivity,
    images: TrainingImages,
    config: TrainingConfig,
    data_name: str,
    validation: dict[float, float],
) -> dict[str, Any]:
    return {
        "title": model.title,
        "summary": model.summary,
        "parameters": sum(p.numel() for p in model.parameters()),
        "noise_range": list(config.noise_range),
        "settings": list(model.settings),
        "most_iterations": model.most_iterations,
        "details": {
            "reference": model.reference,
            "suggestion": {"iterations": config.iterations, "tau": config.tau},
            "architecture": model.architecture,
            "training": {
                "data": data_name,
                "images": len(images.training),
                **asdict(config),
                "revision": revision(),
                "torch": torch.__version__,
            },
            "validation": {
                "images": len(images.validation),
                "psnr": {f"{level:g}": round(dB, 3) for level, dB in validation.items()},
            },
        },
    }


def write_card(path: Path, facts: dict[str, Any]) -> None:
    """Write a model card."""
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


def revision() -> str | None:
    """The commit that the code is at, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
