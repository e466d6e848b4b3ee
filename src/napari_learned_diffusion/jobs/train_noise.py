"""Train the noise network and write its weights and its card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from napari_learned_diffusion.config import CHECKPOINT_EVERY, NoiseTrainingConfig
from napari_learned_diffusion.core.device import resolve_device
from napari_learned_diffusion.core.learning.noise_training import (
    NoiseScores,
    NoiseTrainStep,
    fit_noise_network,
)
from napari_learned_diffusion.core.learning.noise_windows import read_objects
from napari_learned_diffusion.core.noise_network import NoiseNetwork
from napari_learned_diffusion.core.weights import write_model
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.jobs.train import (
    drawing_processes,
    errors_of_training,
    make_folder,
    revision,
    write_card,
)


@dataclass(frozen=True)
class TrainedNoiseNetwork:
    """What a training made.

    Parameters
    ----------
    weights, card
        The files that were written.
    validation
        Scores on the held-out images after the last step.
    """

    weights: Path
    card: Path
    validation: NoiseScores


def train_noise_network(
    folders: tuple[Path, ...],
    output: Path,
    config: NoiseTrainingConfig | None = None,
    *,
    data_name: str,
    device: str = "auto",
    resume: bool = True,
    every: int = CHECKPOINT_EVERY,
    workers: int | None = None,
    on_step: Callable[[NoiseTrainStep], None] | None = None,
) -> Job[TrainedNoiseNetwork]:
    """Train the noise network and write ``noise.safetensors`` and ``noise.json``.

    An interrupted run is continued by the same call: the checkpoint lies in ``output`` until the
    run is complete.

    Parameters
    ----------
    folders
        Folders of clean photographs, and of stacks (TIFF) with little noise.
    output, data_name, device, resume, every, workers, on_step
        As of `jobs.train.train`.

    Yields
    ------
    A `Progress` after every step; closing the generator there ends the run, and its checkpoint
    stays.

    Raises
    ------
    LearnedDiffusionError
        as of `jobs.train.train`.
    """
    config = config or NoiseTrainingConfig()
    yield Progress(0, config.steps, "Reading the images")
    objects = read_objects(folders)
    make_folder(output)
    # The parameters that a run begins with belong to its seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = NoiseNetwork()
    target = resolve_device(device)
    network = network.to(target)
    checkpoint = output / "noise.checkpoint.safetensors"
    yield Progress(0, config.steps, "Simulating CT scans")
    steps = fit_noise_network(
        network,
        objects,
        config,
        checkpoint=checkpoint,
        resume=resume,
        every=every,
        workers=drawing_processes(target) if workers is None else workers,
    )
    scores = NoiseScores(*[float("nan")] * 4)
    try:
        with errors_of_training():
            for step in steps:
                if on_step is not None:
                    on_step(step)
                scores = step.validation or scores
                yield Progress(step.step, config.steps, f"Loss {step.loss:.4f}")
    finally:
        steps.close()
    weights, card = output / "noise.safetensors", output / "noise.json"
    write_model(weights, network.cpu())
    write_card(card, _card(network, len(objects), config, data_name, scores))
    checkpoint.unlink(missing_ok=True)
    return TrainedNoiseNetwork(weights, card, scores)


def _card(
    network: NoiseNetwork,
    objects: int,
    config: NoiseTrainingConfig,
    data_name: str,
    scores: NoiseScores,
) -> dict[str, Any]:
    return {
        "title": "Noise network",
        "summary": "Looks at windows of an image and says how strong and how correlated their "
        "noise is.",
        "parameters": sum(p.numel() for p in network.parameters()),
        "details": {
            "reference": "napari-learned-diffusion, docs/benchmarks.md",
            "architecture": network.architecture,
            "training": {
                "data": data_name,
                "images": objects,
                **asdict(config),
                "revision": revision(),
                "torch": torch.__version__,
            },
            "validation": {name: round(value, 4) for name, value in scores._asdict().items()},
        },
    }
