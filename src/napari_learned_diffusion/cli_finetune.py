"""The commands ``fine-tune`` and ``models``: models of one's own, from a shell."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from napari_learned_diffusion.cli_train import flag
from napari_learned_diffusion.config import FineTuneConfig
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_learned_diffusion.core.user_models import UserModel
    from napari_learned_diffusion.files import Volume
    from napari_learned_diffusion.jobs.finetune import FineTuned
    from napari_learned_diffusion.jobs.regions import Region

_LEARNING = "Learning"

OPTIONS: dict[str, str] = {
    "mode": "What there is to learn from. **paired**: a clean --reference. **clean**: the regions "
    "are good, noise is added. **noisy**: noisy regions alone. **repeats**: a second noisy "
    "--reference. **neighbours**: the slices before and after.",
    "added_noise": "Noise that is added in the modes clean and noisy: by the noise **model**, or "
    "as **measured** in flat parts; **auto** measures where it is correlated.",
    "steps": "Optimiser steps at most.",
    "learning_rate": "Highest learning rate.",
    "patch": "Edge length of the patches, in pixels.",
    "batch": "Patches in a step.",
    "parameters": "Change **all** parameters, or those of the **last** layers only.",
    "held_out": "Part of the regions that is never trained on and tells which step is the best.",
    "every": "Steps between two looks at the held-out part.",
    "patience": "Looks without a better step after which the training ends.",
    "seed": "Of patches and noise.",
}
"""Help of every field of `FineTuneConfig`."""


def takes_learning(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of `FineTuneConfig`; it gets them as ``config``."""
    own = signature(command, eval_str=True)
    types = get_type_hints(FineTuneConfig)
    options = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[
                types[field.name],
                typer.Option(flag(field.name), help=OPTIONS[field.name], rich_help_panel=_LEARNING),
            ],
        )
        for field in fields(FineTuneConfig)
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {field.name: given.pop(field.name) for field in fields(FineTuneConfig)}
        command(**given, config=FineTuneConfig(**values))

    kept = [p for name, p in own.parameters.items() if name != "config"]
    vars(with_options)["__signature__"] = own.replace(parameters=[*kept, *options])
    return with_options


def fine_tune(
    source: Annotated[
        Path,
        typer.Argument(metavar="STACK", show_default=False, help="The stack to learn from."),
    ],
    regions: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Where to learn: an image of the stack's shape, selected where it isn't 0, or a "
            "CSV file as napari saves a Shapes layer.",
        ),
    ],
    save: Annotated[
        str,
        typer.Option(metavar="NAME", show_default=False, help="Name of the new model."),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="The clean image (paired) or the second noisy one (repeats), of the same shape.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model of that name.")
    ] = False,
    *,
    config: FineTuneConfig,
    settings: Any,
) -> None:
    """Fine-tune a model on regions of a stack and save it under a name.

    Where no step beats the starting model on the held-out part of the regions, nothing is saved.

    - with a clean image: `fine-tune in.tif --reference clean.tif --regions mask.tif --save cells`
    - noisy images alone: `fine-tune noisy.tif --mode noisy --regions shapes.csv --save cells`
    - then: `denoise noisy.tif denoised.tif --model my/cells`
    """
    from napari_learned_diffusion.cli import (
        _as_options,
        _progress_shown,
        _read,
        _summary_table,
    )
    from napari_learned_diffusion.core.noise import noise_model_from_dict
    from napari_learned_diffusion.core.user_models import check_name
    from napari_learned_diffusion.jobs.finetune import fine_tune as fine_tune_job
    from napari_learned_diffusion.jobs.progress import run

    check_name(save, overwrite=overwrite)
    volume = _read(source, settings)
    axes = volume.axes_of_planes(settings.plane)
    selected, notes = _regions(regions, volume, axes, settings)
    other = None if reference is None else _read(reference, settings).data
    with _progress_shown() as show:
        tuned: FineTuned = run(
            fine_tune_job(
                volume.data,
                selected,
                config,
                settings.config.also_missing(volume.missing),
                reference=other,
                plane_axes=axes,
                spacing=volume.spacing(axes),
                name=source.name,
            ),
            show,
        )
    for note in (*notes, *tuned.messages):
        typer.echo(f"Note: {one_line(note)}", err=True)
    if not tuned.improved:
        typer.echo(tuned.summary())
        return
    saved = tuned.save(save, overwrite=overwrite)
    table = _summary_table()
    table.add_row("Model", Text(saved.key))
    table.add_row("Gain", Text(f"{tuned.gain:.2f} dB over {tuned.start} on the held-out part"))
    table.add_row("Best step", f"{tuned.best_step} of {tuned.steps}")
    table.add_row("Noise", _as_options(noise_model_from_dict(tuned.facts["noise"])))
    table.add_row("Time", f"{tuned.seconds:.0f} s")
    table.add_row("File", Text(str(saved.path)))
    Console().print(table)


def _regions(
    path: Path, volume: Volume, axes: tuple[int, int], settings: Any
) -> tuple[list[Region], list[str]]:
    from napari_learned_diffusion.cli import _read
    from napari_learned_diffusion.jobs.regions import read_shapes, regions_of_mask

    shape = tuple(volume.data.shape)
    if path.suffix.lower() == ".csv":
        found, notes = read_shapes(path, shape, axes)
        if not found:
            raise InvalidSettingError(" ".join([f"{path} selects no pixel of the image.", *notes]))
        return found, notes
    mask = _read(path, replace(settings, series=None)).data
    if tuple(mask.shape) != shape and sorted(mask.shape) == sorted(shape):
        raise InvalidImageError(f"The axes of {path} are in another order than the image's.")
    return regions_of_mask(mask, shape, axes), []


# --- the user's own models ------------------------------------------------------------------------

models = typer.Typer(
    help="List the models, and manage your own.",
    invoke_without_command=True,
    rich_markup_mode="markdown",
)

_Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="Your model.")]


@models.callback()
def _list_by_default(context: typer.Context) -> None:
    """List the models, and manage your own.

    - what there is: `models`
    - how one was made: `models show cells`
    - to take one elsewhere: `models export cells usb/`, and there
      `models import usb/cells.safetensors`
    - for the BioImage Model Zoo: `models export-zoo my/cells zoo/`
    """
    if context.invoked_subcommand is None:
        list_all()


@models.command("list")
def list_all() -> None:
    """List the models: what each is for, and how many parameters it has learned."""
    from napari_learned_diffusion.core.zoo import (
        BEST_MODEL,
        STANDARD_MODEL,
        damaged_models,
        list_cards,
    )

    defaults = {
        STANDARD_MODEL: " It is the default on processors.",
        BEST_MODEL: " It is the default on GPUs.",
    }
    table = Table(box=None, padding=(0, 2, 1, 0))
    table.add_column("Model", no_wrap=True, style="bold")
    table.add_column("Learned\nparameters", justify="right")
    table.add_column("What it is")
    for card in list_cards():
        default = defaults.get(card.key, "")
        # As `Text`, for the names and sentences of strangers may look like rich's markup.
        about = Text(f"{card.title}. {card.summary}{default}")
        table.add_row(Text(card.key), f"{card.parameters:,}", about)
    for key, problem in damaged_models().items():
        table.add_row(Text(one_line(key)), "", Text(one_line(problem), style="red"))
    Console().print(table)


@models.command()
def show(name: _Name) -> None:
    """Show how a model of your own was made, as JSON."""
    from napari_learned_diffusion.core.user_models import user_model

    found = user_model(name)
    facts = {"key": found.key, "base": found.base, **found.facts}
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@models.command()
def rename(
    name: _Name,
    new: Annotated[str, typer.Argument(metavar="NEW", show_default=False, help="Its new name.")],
) -> None:
    """Rename a model of your own."""
    from napari_learned_diffusion.core.user_models import rename_user_model

    _say(rename_user_model(name, new))


@models.command()
def delete(name: _Name) -> None:
    """Delete a model of your own."""
    from napari_learned_diffusion.core.user_models import delete_user_model

    delete_user_model(name)


@models.command("export")
def export_model(
    name: _Name,
    target: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="A file, or a folder.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Copy a model of your own to a file."""
    from napari_learned_diffusion.core.user_models import export_user_model

    typer.echo(str(export_user_model(name, target, overwrite=overwrite)))


@models.command("export-zoo")
def export_zoo(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", show_default=False, help="Any that learns, your own as my/NAME."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="A zip file, or a folder.")
    ],
    noise_sigma: Annotated[
        float | None,
        typer.Option(
            "--noise-sigma",
            "-s",
            show_default=False,
            help="Standard deviation of Gaussian noise, in the images' units; of your own model by "
            "default the noise that it was fine-tuned with.",
        ),
    ] = None,
    gain: Annotated[
        float | None,
        typer.Option(
            "--gain",
            show_default=False,
            help="Instead: Poisson-Gaussian noise of the variance gain × intensity + offset.",
        ),
    ] = None,
    offset: Annotated[
        float | None, typer.Option("--offset", show_default=False, help="Goes with --gain.")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations", "-n", show_default=False, help="Diffusion steps; else the model's."
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau", show_default=False, help="Their length in squared pixels; else the model's."
        ),
    ] = None,
    authors: Annotated[
        list[str] | None,
        typer.Option("--author", show_default=False, help="Name of an author; several times."),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license", show_default=False, help="Identifier in the SPDX list; else BSD-3-Clause."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Write a model as a package for the BioImage Model Zoo: a whole denoising for one noise.

    It is tested before the file appears. Using it takes this package beside bioimageio.core.

    - `models export-zoo conductance-unet-s zoo/ --noise-sigma 25`
    - `models export-zoo my/cells zoo/ --author "A. Name" --license CC-BY-4.0`
    """
    from napari_learned_diffusion.core.noise import PoissonGaussian
    from napari_learned_diffusion.jobs.zoo_export import LICENSE, export_to_zoo

    if gain is None and offset is not None:
        raise InvalidSettingError("--offset goes with --gain: give both.")
    path = export_to_zoo(
        model,
        target,
        noise=None if gain is None else PoissonGaussian(gain, offset or 0.0),
        noise_sigma=noise_sigma,
        iterations=iterations,
        tau=tau,
        authors=authors or (),
        license=license or LICENSE,
        overwrite=overwrite,
    )
    typer.echo(str(path))


@models.command("import")
def import_model(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="A file from `export`.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", show_default=False, help="Its name; by default the file's."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model of that name.")
    ] = False,
) -> None:
    """Check a model's file and copy it among your own.

    Nothing in the file is run: only numbers and text are read from it.
    """
    from napari_learned_diffusion.core.user_models import import_user_model

    _say(import_user_model(source, name, overwrite=overwrite))


def _say(model: UserModel) -> None:
    typer.echo(f"{model.key}: {model.summary}")
