"""The command ``train``: the training job from a shell. Imports torch only when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table
from rich.text import Text

from napari_learned_diffusion.config import (
    CHECKPOINT_EVERY,
    Device,
    NoiseTrainingConfig,
    TrainingConfig,
)
from napari_learned_diffusion.core.atomic import check_target
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.text import one_line
from napari_learned_diffusion.jobs.progress import Progress, run

if TYPE_CHECKING:
    from napari_learned_diffusion.core.learning.noise_training import NoiseScores, NoiseTrainStep
    from napari_learned_diffusion.core.learning.training import TrainStep

_TRAINING, _DIFFUSION, _COMPUTING, _FILES = (
    "Training",
    "Diffusion that is trained for",
    "Computing",
    "Files",
)

OPTIONS: dict[str, tuple[str, str]] = {
    "steps": (_TRAINING, "Number of optimiser steps."),
    "batch": (_TRAINING, "Patches in a step, of all processes together."),
    "patch": (_TRAINING, "Edge length of the patches, in pixels; smaller images are skipped."),
    "iterations": (_DIFFUSION, "Number of diffusion steps."),
    "tau": (_DIFFUSION, "Their length, in squared pixels."),
    "noise_range": (
        _TRAINING,
        "Lowest and highest noise level, for images of grey levels from 0 to 255.",
    ),
    "correlated": (_TRAINING, "Part of the patches whose noise is correlated, from 0 to 1."),
    "photon": (_TRAINING, "Part of the patches whose noise is that of photons, from 0 to 1."),
    "lines": (_TRAINING, "Part of the patches that show the edges of an image, from 0 to 1."),
    "blurred": (_TRAINING, "Part of the patches that are blurred, from 0 to 1."),
    "turned": (_TRAINING, "Look at the image in all orientations in training, too: slower."),
    "optimiser": (_TRAINING, "**muon** learns the kernels of large networks in fewer steps."),
    "learning_rate": (_TRAINING, "Highest learning rate."),
    "mixed": (_COMPUTING, "Look at the image in bfloat16: faster on many processors."),
    "seed": (_TRAINING, "Of the first parameters, the patches and their noise."),
}
"""Panel and help of every field of `TrainingConfig`."""


def flag(name: str) -> str:
    """The option that sets a field."""
    return f"--{name.replace('_', '-')}"


def _takes_training(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every training setting; it gets them as one ``config``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "config"]
    types = get_type_hints(TrainingConfig)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[
                types[field.name],
                typer.Option(
                    flag(field.name),
                    help=OPTIONS[field.name][1],
                    rich_help_panel=OPTIONS[field.name][0],
                ),
            ],
        )
        for field in fields(TrainingConfig)
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {field.name: given.pop(field.name) for field in fields(TrainingConfig)}
        command(**given, config=TrainingConfig(**values))

    vars(with_options)["__signature__"] = signature.replace(parameters=[*own, *options])
    return with_options


@_takes_training
def train(
    context: typer.Context,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="Folder of clean images (JPEG, PNG, TIFF, BMP). May be given several times.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Folder for the weights, the model card and the checkpoint.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The diffusivity to train.", show_default=False),
    ] = None,
    noise_network: Annotated[
        bool,
        typer.Option(
            "--noise-network",
            help="Train the network that estimates noise, in place of a diffusivity. It takes "
            "**--steps**, **--batch**, **--optimiser**, **--learning-rate**, **--mixed** and "
            "**--seed**, and folders may hold stacks (TIFF) with little noise.",
        ),
    ] = False,
    data_name: Annotated[
        str | None,
        typer.Option(
            help="What the images are, for the card. By default the names of their folders.",
            rich_help_panel=_FILES,
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace weights that are in --out.", rich_help_panel=_FILES
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--restart",
            help="Go on from a checkpoint in --out, or begin anew.",
            rich_help_panel=_FILES,
        ),
    ] = True,
    every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps between two validations and checkpoints.",
            rich_help_panel=_TRAINING,
        ),
    ] = CHECKPOINT_EVERY,
    architecture: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="Another size of the model, such as **experts=24**. May be given several times.",
            rich_help_panel=_DIFFUSION,
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights of the same model to begin with, in place of random ones.",
            rich_help_panel=_FILES,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Device,
        typer.Option(
            help="Where to compute; **auto** takes the fastest.", rich_help_panel=_COMPUTING
        ),
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that draw the next patches meanwhile. By default up to 8 beside a GPU, "
            "and none on a CPU.",
            rich_help_panel=_COMPUTING,
            show_default=False,
        ),
    ] = None,
    onednn: Annotated[
        bool,
        typer.Option(
            help="Convolutions by oneDNN, or PyTorch's own: on a CPU faster for **foe-** models.",
            rich_help_panel=_COMPUTING,
        ),
    ] = True,
    *,
    config: TrainingConfig,
) -> None:
    """Train a diffusivity on clean images, to which noise is added.

    - `train --model foe-splines --data photographs --out trained`
    - two folders: `train --model unet --data a --data b --out trained`
    - for weak noise only: `train -m unet --data a --out trained --noise-range 2 10`
    - the noise network: `train --noise-network --data photographs --data volumes --out trained`
    - on two GPUs: `torchrun --nproc-per-node 2 --no-python -- napari-learned-diffusion train …`

    A run that was stopped goes on when the same command is given again. One image in twenty is held
    out and never trained on; the decibels are measured on these.
    """
    if (model is None) != noise_network:
        raise typer.BadParameter("Give either --model, with a diffusivity, or --noise-network.")
    name = model or "noise"
    weights = out / f"{name}.safetensors"
    check_target(weights, overwrite=overwrite)
    import torch

    torch.backends.mkldnn.enabled = onednn  # type: ignore[assignment]
    data_name = data_name or ", ".join(folder.resolve().name for folder in data)
    if model is None:
        _train_noise_network(
            tuple(data),
            out,
            _noise_config(context),
            data_name=data_name,
            device=device,
            resume=resume,
            every=every,
            workers=workers,
        )
        return
    sizes = dict(_name_and_number(text) for text in architecture or [])

    from napari_learned_diffusion.core.learning.distributed import processes, rank_and_number
    from napari_learned_diffusion.jobs.train import train as train_job

    with processes(device):
        rank, _ = rank_and_number()
        with _training_shown(config.steps, hidden=rank > 0, scores=_in_decibels) as (show, on_step):
            job = train_job(
                model,
                tuple(data),
                out,
                config,
                data_name=data_name,
                architecture=sizes,
                start=start,
                device=device,
                resume=resume,
                every=every,
                workers=workers,
                on_step=on_step,
            )
            trained = run(job, show)
        if rank == 0:
            _print_trained(model, trained.weights, trained.card, _in_decibels(trained.validation))
            for reason in trained.skipped:
                typer.echo(f"Note: skipped {one_line(str(reason))}", err=True)


def _noise_config(context: typer.Context) -> NoiseTrainingConfig:
    """The settings that were given, of those that the noise network has.

    Raises
    ------
    InvalidSettingError
        if others were given.
    """
    given = {}
    for name in OPTIONS:
        source = context.get_parameter_source(name)
        # By its name: typer has a copy of click's of its own.
        if source is not None and source.name != "DEFAULT":
            given[name] = context.params[name]
    known = {field.name for field in fields(NoiseTrainingConfig)}
    unknown = sorted(flag(name) for name in given.keys() - known)
    if unknown:
        raise InvalidSettingError(
            f"The noise network has no {', '.join(unknown)} to set; it has "
            f"{', '.join(sorted(flag(name) for name in known & OPTIONS.keys()))}."
        )
    return NoiseTrainingConfig(**given)


def _train_noise_network(
    folders: tuple[Path, ...], out: Path, config: NoiseTrainingConfig, **options: Any
) -> None:
    from napari_learned_diffusion.jobs.train_noise import train_noise_network

    with _training_shown(config.steps, hidden=False, scores=_in_percent) as (show, on_step):
        trained = run(train_noise_network(folders, out, config, **options, on_step=on_step), show)
    _print_trained("noise", trained.weights, trained.card, _in_percent(trained.validation))


def _name_and_number(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    try:
        return name, int(number)
    except ValueError as error:
        raise InvalidSettingError(
            f"--architecture takes a name and a whole number, such as experts=24, not {text!r}."
        ) from error


# --- what people see ------------------------------------------------------------------------------


@contextmanager
def _training_shown(
    steps: int, *, hidden: bool, scores: Callable[[Any], str]
) -> Iterator[tuple[Callable[[Progress], None], Callable[[TrainStep | NoiseTrainStep], None]]]:
    """Draw loss and scores on stderr while the context lasts, if that is a terminal.

    A line after every validation stays, on a terminal or in a log. What is drawn is updated by the
    first of the two functions that the context gives, from the job's progress, and by the second,
    from its steps.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[scores]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=hidden)
    with ProgressBars(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task("Reading the images", total=steps, loss="", scores="")

        def show(progress: Progress) -> None:
            bars.update(task, completed=progress.done)

        def on_step(step: TrainStep | NoiseTrainStep) -> None:
            loss = f"{step.loss:.4f}"
            bars.update(task, description="Training", loss=loss)
            if step.validation is not None:
                shown = scores(step.validation)
                bars.update(task, scores=shown)
                line = f"step {step.step} of {steps}: loss {loss}, {shown}"
                console.print(line, highlight=False, soft_wrap=True)

        yield show, on_step


def _in_decibels(validation: dict[float, float]) -> str:
    scores = " / ".join(f"{dB:.2f}" for dB in validation.values())
    levels = " / ".join(f"{level:g}" for level in validation)
    return f"{scores} dB at noise {levels}"


def _in_percent(scores: NoiseScores) -> str:
    return (
        f"levels off by {scores.median_error:.1%} in the median, {scores.within:.0%} within 25 %, "
        f"correlation off by {scores.lags:.3f}"
    )


def _print_trained(model: str, weights: Path, card: Path, scores: str) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in (("Model", model), ("Weights", weights), ("Card", card), ("Held out", scores)):
        table.add_row(row[0], Text(str(row[1])))
    Console().print(table)
