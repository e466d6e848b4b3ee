"""The command ``napari-learned-diffusion``: the same jobs from a shell, on files.

Importing this module, and so ``--help``, imports neither torch nor Qt: the commands import what
they need when they run.
"""

from __future__ import annotations

import inspect
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import typer
from numpy.typing import DTypeLike, NDArray
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table
from typer.core import TyperGroup

from napari_learned_diffusion.config import (
    DEFAULT_MODEL,
    DiffusionConfig,
    NoiseChoice,
    TilingConfig,
    noise_from_arguments,
)
from napari_learned_diffusion.core.errors import (
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
)
from napari_learned_diffusion.core.noise import NoiseModel, PoissonGaussian
from napari_learned_diffusion.files import COMPRESSIONS, PIXEL, Volume, read, supported_suffixes
from napari_learned_diffusion.files import write as write_file
from napari_learned_diffusion.jobs.progress import Job, Progress, Result, run

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.denoise import Denoised

_TERMINATED = 128 + signal.SIGTERM


class _Commands(TyperGroup):
    """Tells a user's mistake in one sentence, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LearnedDiffusionError as error:
            if ctx.params["debug"]:
                raise
            # Not through rich, which would break the line at the terminal's width.
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; what the console script calls."""

    def stop(*_: object) -> None:
        sys.exit(_TERMINATED)

    # As an exception, so that files that aren't finished are removed on the way out.
    signal.signal(signal.SIGTERM, stop)
    app()


# --- settings, each an option ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What the options of a command say, beside the files."""

    config: DiffusionConfig
    tiling: TilingConfig
    plane: str | None
    series: int | None


class _Option(NamedTuple):
    panel: str
    help: str
    flags: tuple[str, ...]
    type: Any
    default: Any


_NOISE, _METHOD, _CLASSIC, _COMPUTING, _FILES = (
    "Noise (estimated from the image unless given)",
    "Method",
    "Only for perona-malik",
    "Computing",
    "Files and axes",
)

_CONFIG_OPTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "noise_kind": (
        _NOISE,
        "Which noise model to estimate; **auto** lets the image decide.",
        ("--noise",),
    ),
    "model": (_METHOD, "The diffusivity; the command `models` lists them.", ("--model", "-m")),
    "iterations": (_METHOD, "Number of diffusion steps: more smooth more.", ("--iterations", "-n")),
    "contrast": (
        _CLASSIC,
        "Contrast parameter K, in standard deviations of the noise: steeper edges are kept.",
        ("--contrast", "-K"),
    ),
    "function": (_CLASSIC, "Diffusivity: 1/(1+s/K²) or exp(-s/K²).", ("--function",)),
    "scheme": (
        _CLASSIC,
        "**explicit** never leaves the input's range; **fed** is faster for long stopping times "
        "and keeps the range only approximately.",
        ("--scheme",),
    ),
    "tau": (_METHOD, "Time step of the explicit scheme, in squared pixels.", ("--tau",)),
    "stopping_time": (
        _CLASSIC,
        "Stopping time of the FED scheme, in squared pixels.",
        ("--stopping-time",),
    ),
    "presmooth_sigma": (
        _CLASSIC,
        "Gaussian smoothing of the image that edges are judged by, in pixels; 0 is none.",
        ("--presmooth-sigma",),
    ),
    "device": (_COMPUTING, "Where to compute; **auto** takes the fastest.", ("--device",)),
    "precision": (_COMPUTING, "Number format of the solver.", ("--precision",)),
}
"""Panel, help and flags of every field of `DiffusionConfig` that one option can set."""


def _options() -> dict[str, _Option]:
    types = get_type_hints(DiffusionConfig)
    defaults = {field.name: field.default for field in fields(DiffusionConfig)}
    options = {
        name: _Option(panel, text, flags, types[name], defaults[name])
        for name, (panel, text, flags) in _CONFIG_OPTIONS.items()
    }
    number = float | None
    options |= {
        "noise_sigma": _Option(
            _NOISE,
            "Standard deviation of Gaussian noise, in the image's units.",
            ("--noise-sigma", "-s"),
            number,
            None,
        ),
        "gain": _Option(
            _NOISE,
            "Poisson-Gaussian noise has the variance gain × intensity + offset; "
            "this is the gain, in the image's units.",
            ("--gain",),
            number,
            None,
        ),
        "offset": _Option(
            _NOISE,
            "The offset of that variance, in squared units; may be negative.",
            ("--offset",),
            number,
            None,
        ),
        "tile": _Option(
            _COMPUTING,
            "Edge length of the tiles that large slices are cut into, in pixels. "
            "The result doesn't depend on it.",
            ("--tile",),
            int | None,
            TilingConfig.tile,
        ),
        "plane": _Option(
            _FILES,
            "Letters of the two axes that span a slice, such as **ZX**. By default Y and X; all "
            "other axes are gone through slice by slice.",
            ("--plane",),
            str | None,
            None,
        ),
        "series": _Option(
            _FILES,
            "Which image of a file that holds several, counted from 0. By default the largest.",
            ("--series",),
            int | None,
            None,
        ),
    }
    return options


_OPTIONS = _options()


def _takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every setting; it receives them as one ``settings``."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for name, p in signature.parameters.items() if name != "settings"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default,
            annotation=Annotated[
                option.type,
                typer.Option(
                    *option.flags,
                    help=option.help,
                    rich_help_panel=option.panel,
                    show_default=option.default is not None,
                ),
            ],
        )
        for name, option in sorted(_OPTIONS.items(), key=lambda item: item[1].panel != _NOISE)
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {name: given.pop(name) for name in _OPTIONS}
        command(**given, settings=_settings(**values))

    vars(with_options)["__signature__"] = signature.replace(parameters=[*own, *options])
    return with_options


def _settings(
    *,
    noise_sigma: float | None,
    gain: float | None,
    offset: float | None,
    tile: int | None,
    plane: str | None,
    series: int | None,
    **values: Any,
) -> _Settings:
    noise = _noise_model(values["noise_kind"], noise_sigma, gain, offset)
    config = DiffusionConfig(noise=noise, **values)
    if config.scheme == "fed" and config.tau is not None:
        raise InvalidSettingError(
            "--tau is the explicit scheme's. With --scheme fed give --stopping-time."
        )
    if config.scheme != "fed" and config.stopping_time is not None:
        raise InvalidSettingError(
            "--stopping-time is the FED scheme's. Give --scheme fed too, or --iterations and --tau."
        )
    if config.model != "perona-malik":
        given = [
            _OPTIONS[name].flags[0]
            for name in config.changed()
            if name in _OPTIONS and _OPTIONS[name].panel == _CLASSIC
        ]
        if given:
            raise InvalidSettingError(
                f"{', '.join(given)} only work with perona-malik, not with {config.model}."
            )
    return _Settings(config, TilingConfig(tile=tile), plane, series)


def _noise_model(
    kind: NoiseChoice, noise_sigma: float | None, gain: float | None, offset: float | None
) -> NoiseModel | None:
    """The noise model that the options state, or None where it is to be estimated."""
    if gain is None and offset is None:
        if noise_sigma is not None and kind == "poisson-gaussian":
            raise InvalidSettingError(
                "--noise-sigma is for Gaussian noise. Give --gain and --offset for "
                "poisson-gaussian noise, or none of them to have it estimated."
            )
        return noise_from_arguments(None, noise_sigma)
    if gain is None or offset is None:
        raise InvalidSettingError("--gain and --offset belong together: give both.")
    if noise_sigma is not None or kind == "gaussian":
        raise InvalidSettingError(
            "--gain and --offset are for poisson-gaussian noise. For Gaussian noise give "
            "--noise-sigma alone."
        )
    return PoissonGaussian(gain, offset)


# --- commands -------------------------------------------------------------------------------------

_Source = Annotated[
    Path, typer.Argument(metavar="IN", show_default=False, help="The file to read (TIFF).")
]
_Target = Annotated[
    Path, typer.Argument(metavar="OUT", show_default=False, help="The file to write (TIFF).")
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists.", rich_help_panel=_FILES)
]
_Compression = Annotated[
    str | None,
    typer.Option(
        "--compression",
        help=f"Lossless compression of what is written: {', '.join(COMPRESSIONS)}.",
        rich_help_panel=_FILES,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        name = "napari-learned-diffusion"
        typer.echo(f"{name} {version(name)}")
        raise typer.Exit


@app.callback(
    epilog="Begin with: `napari-learned-diffusion denoise noisy.tif denoised.tif`",
)
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Denoise CT, MRI and microscopy stacks by nonlinear diffusion that only averages what is there.

    Each slice is denoised by itself. The result has the type, axes, voxel size and units of the
    input; its mean is that of the input, and no value leaves the input's range.
    """


@app.command()
@_takes_settings
def denoise(
    source: _Source,
    target: _Target,
    diffusivity: Annotated[
        Path | None,
        typer.Option(
            help="Also write the diffusivity: near 1 where the image was smoothed freely, near 0 "
            "at edges that were kept.",
            rich_help_panel=_FILES,
            metavar="FILE",
        ),
    ] = None,
    residual: Annotated[
        Path | None,
        typer.Option(
            help="Also write what was removed, input minus result: it should look like noise.",
            rich_help_panel=_FILES,
            metavar="FILE",
        ),
    ] = None,
    overwrite: _Overwrite = False,
    compression: _Compression = None,
    *,
    settings: _Settings,
) -> None:
    """Denoise a file.

    Without options everything is chosen from the image: the noise model, its strength, and the
    settings that suit it.

    - all automatic: `denoise noisy.tif denoised.tif`
    - noise of a known strength: `denoise ct.tif out.tif --noise-sigma 40`
    - photon noise: `denoise cells.tif out.tif --noise poisson-gaussian`
    - check what was removed: `denoise in.tif out.tif --residual removed.tif`
    - stronger: `denoise in.tif out.tif --iterations 60`
    - slices through depth: `denoise in.tif out.tif --plane ZX`

    Stacks larger than memory are read and written slice by slice.
    """
    outputs = {
        name: path
        for name, path in (("OUT", target), ("--diffusivity", diffusivity), ("--residual", residual))
        if path is not None
    }
    _check_outputs(source, outputs, overwrite, compression)
    volume = _read(source, settings)
    lazy = not isinstance(volume.data, np.ndarray)
    out = _scratch(volume, target) if lazy else None
    done = _run_denoising(volume, settings, diffusivity is not None and not lazy, out)
    result = _chunked_like(volume, done.image) if lazy else done.image
    write_file(target, replace(volume, data=result), overwrite=overwrite, compression=compression)
    notes = list(done.report.messages)
    if residual is not None:
        removed = replace(
            _without_display(volume), data=_difference(volume.data, result), name="residual"
        )
        write_file(residual, removed, overwrite=overwrite, compression=compression)
    if diffusivity is not None:
        maps = _diffusivity_slice_by_slice(volume, settings, done, diffusivity) if lazy else None
        maps = done.diffusivity if maps is None else maps
        if maps is None:
            notes.append(f"No step was done, so there is no diffusivity: {diffusivity} wasn't written.")
        else:
            _write_diffusivity(diffusivity, volume, maps, overwrite, compression)
    _print_summary(done, outputs)
    _print_notes([*_notes_on_axes(volume, settings), *notes])


@app.command("diffusivity")
@_takes_settings
def write_diffusivity(
    source: _Source,
    target: _Target,
    overwrite: _Overwrite = False,
    compression: _Compression = None,
    *,
    settings: _Settings,
) -> None:
    """Write the diffusivity of the last step: what the method takes for an edge.

    Between 0 (an edge: nothing is averaged across it) and 1 (a region: averaged freely), as
    32-bit floating point numbers; NaN where the input isn't a number.

    - `diffusivity noisy.tif edges.tif`
    - how it changes with K: `diffusivity noisy.tif edges.tif --contrast 0.5`
    """
    _check_outputs(source, {"OUT": target}, overwrite, compression)
    volume = _read(source, settings)
    if isinstance(volume.data, np.ndarray):
        done = _run_denoising(volume, settings, want_diffusivity=True)
        maps = done.diffusivity
    else:
        done = None
        maps = _diffusivity_slice_by_slice(volume, settings, None, target)
    if maps is None:
        raise InvalidImageError(
            "There is no diffusivity, because no step was done: "
            + " ".join(done.report.messages if done else ())
        )
    _write_diffusivity(target, volume, maps, overwrite, compression)
    _print_notes(_notes_on_axes(volume, settings))
