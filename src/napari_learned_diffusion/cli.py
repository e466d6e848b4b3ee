"""The command ``napari-learned-diffusion``: the same jobs from a shell, on files.

Importing this module, and so ``--help``, imports neither torch nor Qt: the commands import what
they need when they run.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import numpy as np
import typer
from numpy.typing import DTypeLike, NDArray
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from napari_learned_diffusion.cli_batch import batch
from napari_learned_diffusion.cli_finetune import fine_tune, models, takes_learning
from napari_learned_diffusion.cli_train import train
from napari_learned_diffusion.config import (
    DEFAULT_MODEL,
    DOUBTFUL,
    DiffusionConfig,
    MapsConfig,
    NoiseChoice,
    NoiseScope,
    TilingConfig,
)
from napari_learned_diffusion.core.atomic import why_not_written
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
)
from napari_learned_diffusion.core.noise import NOISE_MODELS, NoiseModel
from napari_learned_diffusion.core.text import one_line
from napari_learned_diffusion.core.zoo import CLASSICAL_MODEL, card, check_settings, list_cards
from napari_learned_diffusion.files import (
    COMPRESSIONS,
    FORMATS,
    Volume,
    read,
    supported_suffixes,
)
from napari_learned_diffusion.files import write as write_file
from napari_learned_diffusion.files._dicom_write import check_series
from napari_learned_diffusion.files.formats import check_target, format_of, format_to_write
from napari_learned_diffusion.jobs.progress import Job, Progress, run
from napari_learned_diffusion.jobs.result_type import for_format, result_type
from napari_learned_diffusion.recipe import noise_options

if TYPE_CHECKING:
    from napari_learned_diffusion.core.noise_estimation import NoiseEstimate
    from napari_learned_diffusion.jobs.denoise import Denoised, Prepared

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
            typer.echo(f"Error: {one_line(str(error))}", err=True)
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

    # A name that the terminal's encoding lacks is shown escaped, rather than end the program.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # torch's threads sleep while they wait for each other. Otherwise they keep the processors busy,
    # and where another program needs one, everything takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
    "Only for perona-malik, in part for k-automation",
    "Computing",
    "Files and axes",
)

_CONFIG_OPTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "noise_kind": (
        _NOISE,
        "Which noise model to estimate; **auto** lets the image decide.",
        ("--noise",),
    ),
    "noise_scope": (
        _NOISE,
        "Whether to estimate one noise model for the **stack** or one for each **slice**; **auto** "
        "does so for each slice where they differ clearly.",
        ("--noise-scope",),
    ),
    "model": (_METHOD, "The diffusivity; the command `models` lists them.", ("--model", "-m")),
    "iterations": (
        _METHOD,
        "Number of diffusion steps: fewer smooth less. Learned models take no more than they were "
        "made for; perona-malik takes any number.",
        ("--iterations", "-n"),
    ),
    "contrast": (
        _CLASSIC,
        "Contrast parameter K, in standard deviations of the noise: steeper edges are kept. As the "
        "other settings here it makes perona-malik the model, unless --model says another.",
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
    "precision": (
        _COMPUTING,
        "Number format; **mixed**: learned models look in bfloat16.",
        ("--precision",),
    ),
    "dtype": (
        _FILES,
        "Type of the result: the **same** as the input's, or **float32**. **auto** is float32 "
        "where whole numbers would lose what averaging gains, as with few counts a pixel.",
        ("--dtype",),
    ),
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
            "Standard deviation of Gaussian noise, in the image's units; with --noise **rician** "
            "or **correlated**, of such noise.",
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
            "The offset of that variance, in squared units; may be negative. 0 unless given.",
            ("--offset",),
            number,
            None,
        ),
        "correlation_length": _Option(
            _NOISE,
            "How far noise with that standard deviation is correlated, in pixels: the width of the "
            "Gaussian filter that would correlate white noise so.",
            ("--correlation-length",),
            number,
            None,
        ),
        "pedestal": _Option(
            _NOISE,
            "The intensity of no signal, of Rician noise; 0 unless given.",
            ("--pedestal",),
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
            "Which image of a file that holds several, counted from 0. By default "
            "all that fit together, as a stack; else the largest.",
            ("--series",),
            int | None,
            None,
        ),
    }
    return options


_OPTIONS = _options()


def _takes_settings(
    command: Callable[..., None], *, without: Collection[str] = ()
) -> Callable[..., None]:
    """Give a command an option for every setting; it receives them as one ``settings``.

    Parameters
    ----------
    command
        The command.
    without
        Settings that it has no use for; they keep their defaults.
    """
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
        if name not in without
    ]

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {name: given.pop(name, option.default) for name, option in _OPTIONS.items()}
        settings = _settings(**values)
        _print_notes(_notes_on_model(settings.config))
        command(**given, settings=settings)

    vars(with_options)["__signature__"] = signature.replace(parameters=[*own, *options])
    return with_options


def _settings(
    *,
    tile: int | None,
    plane: str | None,
    series: int | None,
    **values: Any,
) -> _Settings:
    given_noise = {name: values.pop(name) for name in _NOISE_PARAMETERS}
    noise = _noise_model(values["noise_kind"], given_noise)
    config = DiffusionConfig(noise=noise, **values)
    if config.scheme == "fed" and config.tau is not None:
        raise InvalidSettingError(
            "--tau is the explicit scheme's. With --scheme fed give --stopping-time."
        )
    if config.scheme != "fed" and config.stopping_time is not None:
        raise InvalidSettingError(
            "--stopping-time is the FED scheme's. Give --scheme fed too, or --iterations and --tau."
        )
    _check_options_of_model(config)
    return _Settings(config, TilingConfig(tile=tile), plane, series)


def _check_options_of_model(config: DiffusionConfig) -> None:
    """Refuse options that the model would ignore or can't follow, before anything is read."""
    if config.model == DEFAULT_MODEL:
        check_settings(config)
        return
    special = frozenset[str]().union(*(c.settings for c in list_cards()))
    ignored = (special & config.changed().keys()) - card(config.model).settings
    if ignored:
        flags = ", ".join(_OPTIONS[name].flags[0] for name in _OPTIONS if name in ignored)
        raise InvalidSettingError(
            f"The model {config.model} has no {flags}. Leave it out, or choose another model."
        )
    check_settings(config)


_NOISE_PARAMETERS = {
    "correlation_length": "correlated",
    "pedestal": "rician",
    "gain": "poisson-gaussian",
    "offset": "poisson-gaussian",
    "noise_sigma": "gaussian",
}
"""Options that state a noise model, and the one that the first of them states if none is named."""


def _noise_model(kind: NoiseChoice, values: dict[str, float | None]) -> NoiseModel | None:
    """The noise model that the options state, or None where it is to be estimated."""
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return None
    key = kind if kind != "auto" else next(_NOISE_PARAMETERS[name] for name in given)
    model = NOISE_MODELS[key]
    parameters = fields(model)  # type: ignore[arg-type]
    needed = [p.name for p in parameters if p.default is MISSING]
    if not set(given) <= {p.name for p in parameters}:
        flags = " and ".join(_OPTIONS[p.name].flags[0] for p in parameters)
        raise InvalidSettingError(
            f"For {key} noise give {flags} alone, or none of them to have it estimated."
        )
    for name in needed:
        if name not in given:
            flags = " and ".join(_OPTIONS[n].flags[0] for n in given)
            raise InvalidSettingError(f"{flags} goes with {_OPTIONS[name].flags[0]}: give both.")
    return model(**given)


# --- commands -------------------------------------------------------------------------------------

_Source = Annotated[
    Path,
    typer.Argument(
        metavar="IN", show_default=False, help="The file, or folder of a DICOM series, to read."
    ),
]
_Target = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        show_default=False,
        help="The file to write; its suffix chooses the format. Where IN is a DICOM series, a name "
        "without a suffix becomes the folder of one.",
    ),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists.", rich_help_panel=_FILES)
]
_MapStep = Annotated[
    int | None,
    typer.Option(
        "--map-step",
        help="The diffusion step that the maps (diffusivity, orientation, anisotropy) are of, from "
        "1. By default the last.",
        rich_help_panel=_FILES,
        show_default=False,
    ),
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
    """Denoise CT, MRI and microscopy stacks by nonlinear diffusion.

    Each slice is denoised by itself, by nothing but averages of what is there: the mean stays, and
    no value leaves the input's range. The result has the input's axes, voxel size, units and type;
    only images of few counts, whose noise is finer than their grey levels, become float32.
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
    orientation: Annotated[
        Path | None,
        typer.Option(
            help="Also write the orientation of strongest diffusion, in degrees from 0 to 180: 0 "
            "along the rows, then counter-clockwise.",
            rich_help_panel=_FILES,
            metavar="FILE",
        ),
    ] = None,
    anisotropy: Annotated[
        Path | None,
        typer.Option(
            help="Also write how far diffusion keeps to that orientation: 0 is equally strong in "
            "all directions, 1 in one only.",
            rich_help_panel=_FILES,
            metavar="FILE",
        ),
    ] = None,
    map_step: _MapStep = None,
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
    - along what it smoothed: `denoise in.tif out.tif --orientation degrees.tif`
    - less: `denoise in.tif out.tif --iterations 2`
    - more, with a strength of your own: `denoise in.tif out.tif -m perona-malik --iterations 60`
    - few counts a pixel, as fractions: `denoise counts.tif out.tif --dtype float32`
    - slices through depth: `denoise in.tif out.tif --plane ZX`

    Stacks larger than memory are read and written slice by slice.
    """
    asked = {"diffusivity": diffusivity, "orientation": orientation, "anisotropy": anisotropy}
    map_files = {name: path for name, path in asked.items() if path is not None}
    maps = _maps_config(map_files, map_step)
    outputs = {"OUT": target} | {f"--{name}": path for name, path in map_files.items()}
    if residual is not None:
        outputs["--residual"] = residual
    _check_outputs(source, outputs, overwrite, compression)
    volume = _read(source, settings)
    _check_series(volume, outputs)
    axes = volume.axes_of_planes(settings.plane)
    with _progress_shown() as show:
        done = run(_denoise_job(volume, settings, target, maps), show)
        result = _as_stored(volume, done.image)
        found = {name: getattr(done, name) for name in map_files}
        show(Progress(0, 0, "Writing"))
        write = partial(write_file, overwrite=overwrite, compression=compression)
        write(target, replace(volume, data=result))
        if residual is not None:
            write(residual, _derived(volume, _difference(volume.data, result), "residual"))
        for name, path in map_files.items():
            if found[name] is not None:
                write(path, _derived(volume, _as_stored(volume, found[name]), name))
    _print_summary(done)
    notes = [*volume.metadata.get("notes", ()), *_notes_on_axes(volume, axes)]
    notes += [*_notes_on_noise(volume, done.prepared), *done.report.messages]
    notes += [
        f"No step was done, so there is no {name} to write to {path}."
        for name, path in map_files.items()
        if found[name] is None
    ]
    _print_notes(notes)


@app.command("diffusivity")
@partial(_takes_settings, without=("dtype",))
def write_diffusivity(
    source: _Source,
    target: _Target,
    map_step: _MapStep = None,
    overwrite: _Overwrite = False,
    compression: _Compression = None,
    *,
    settings: _Settings,
) -> None:
    """Write the diffusivity of one step: what the method takes for an edge.

    From 0 (an edge: nothing is averaged across it) to 1 (a region: averaged freely), or more in
    steps over long edges; as 32-bit floating point numbers, NaN where the input isn't a number.

    - `diffusivity noisy.tif edges.tif`
    - with more edges: `diffusivity noisy.tif edges.tif --contrast 0.2`
    - as it was in the first step: `diffusivity noisy.tif edges.tif --map-step 1`
    """
    _check_outputs(source, {"OUT": target}, overwrite, compression)
    volume = _read(source, settings)
    _check_series(volume, {"OUT": target})
    axes = volume.axes_of_planes(settings.plane)
    maps = MapsConfig(diffusivity=True, step=map_step)
    with _progress_shown() as show:
        done = run(_denoise_job(volume, settings, target, maps), show)
        if done.diffusivity is None:
            raise InvalidSettingError(
                "No step is done, so there is no diffusivity: the noise level or the number of "
                "iterations is 0."
            )
        show(Progress(0, 0, "Writing"))
        write_file(
            target,
            _derived(volume, _as_stored(volume, done.diffusivity), "diffusivity"),
            overwrite=overwrite,
            compression=compression,
        )
    notes = [*volume.metadata.get("notes", ()), *_notes_on_axes(volume, axes)]
    notes += _notes_on_noise(volume, done.prepared)
    _print_notes([*notes, *done.report.messages])


@app.command("estimate-noise")
def estimate(
    source: _Source,
    kind: Annotated[
        NoiseChoice,
        typer.Option("--noise", help="Which noise model; **auto** lets the image decide."),
    ] = DiffusionConfig.noise_kind,
    scope: Annotated[
        NoiseScope, typer.Option("--noise-scope", help=_OPTIONS["noise_scope"].help)
    ] = DiffusionConfig.noise_scope,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="The model that is to denoise: one of your own may have learned from one kind of "
            "noise.",
        ),
    ] = DiffusionConfig.model,
    plane: Annotated[
        str | None, typer.Option("--plane", help=_OPTIONS["plane"].help, show_default=False)
    ] = None,
    series: Annotated[
        int | None, typer.Option("--series", help=_OPTIONS["series"].help, show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the measured noise curve.")
    ] = False,
) -> None:
    """Estimate the noise of a file, and how far to trust the estimate.

    It shows what `denoise` uses with the same options, to be checked or set by hand: one noise
    model, or one for each slice. At most 16 slices, spread over the stack, are read.

    - `estimate-noise noisy.tif`
    - for scripts: `estimate-noise noisy.tif --json`
    """
    from napari_learned_diffusion.core.noise_estimation import sample_planes
    from napari_learned_diffusion.jobs.planes import check_image, plane_indices, read_plane
    from napari_learned_diffusion.jobs.prepare import SAMPLES, prepare

    config = DiffusionConfig(model, noise_kind=kind, noise_scope=scope)
    volume = _read(source, _Settings(config, TilingConfig(), plane, series))
    axes = check_image(volume.data, volume.axes_of_planes(plane))
    prepared = prepare(volume.data, config.also_missing(volume.missing), plane_axes=axes)
    by_slice: list[_SliceEstimate] = []
    if prepared.slice_by_slice:
        indices = plane_indices(tuple(volume.data.shape), axes)
        for i in sample_planes(len(indices), SAMPLES):
            own = prepared.of(read_plane(volume.data, indices[i], axes)).estimate
            if own is not None:
                by_slice.append(_SliceEstimate(indices[i], own))
    whole = prepared.estimate
    assert whole is not None  # as no noise model was given
    if as_json:
        typer.echo(json.dumps(_estimate_as_dict(whole, by_slice), indent=2))
        return
    table = _summary_table()
    if by_slice:
        _row(table, "Noise model", "one for each slice, as they differ or as asked for")
        for index, own in by_slice:
            text = f"{own.model.describe()}, confidence {own.confidence:.2f}"
            _row(table, f"Slice {', '.join(map(str, index))}", text)
        if len(by_slice) < prepared.n_slices:
            _row(table, "", f"{len(by_slice)} of {prepared.n_slices} slices are shown.")
        Console().print(table)
        _print_notes(volume.metadata.get("notes", ()))
        return
    _row(table, "Noise model", whole.model.describe())
    _row(table, "Confidence", f"{whole.confidence:.2f} (0: a guess, 1: certain)")
    _row(table, "As options", _as_options(whole.model))
    Console().print(table)
    typer.echo(one_line(whole.message))
    _print_notes(volume.metadata.get("notes", ()))


class _SliceEstimate(NamedTuple):
    """The noise of one slice; its position has a number for each axis that isn't part of it."""

    position: tuple[int, ...]
    estimate: NoiseEstimate


def _estimate_as_dict(whole: NoiseEstimate, by_slice: Sequence[_SliceEstimate]) -> dict[str, Any]:
    """What `denoise` uses, as JSON: ``noise`` is null where each slice has its own."""
    answer: dict[str, Any] = {
        "scope": "slice" if by_slice else "stack",
        "noise": None if by_slice else whole.model.to_dict(),
        "confidence": whole.confidence,
        "message": whole.message,
        "slices_differ": whole.slices_differ,
        "curve": {name: values.tolist() for name, values in asdict(whole.curve).items()},
    }
    if by_slice:
        sure = [own.confidence for _, own in by_slice]
        answer |= {
            "confidence": float(np.median(sure)),
            "message": "Each slice has a noise model of its own.",
            "slices": [
                {
                    "index": list(index),
                    "noise": own.model.to_dict(),
                    "confidence": own.confidence,
                    "message": own.message,
                }
                for index, own in by_slice
            ],
        }
    return answer


app.command()(_takes_settings(batch))
app.command()(train)
app.command()(_takes_settings(takes_learning(fine_tune), without=("dtype",)))
app.add_typer(models, name="models")


# --- files ----------------------------------------------------------------------------------------


def _check_outputs(
    source: Path, outputs: dict[str, Path], overwrite: bool, compression: str | None
) -> None:
    """Refuse what couldn't be written in the end, before anything is computed."""
    if compression is not None and compression not in COMPRESSIONS:
        raise InvalidSettingError(
            f"There is no compression {compression!r}. Choose one of: {', '.join(COMPRESSIONS)}."
        )
    taken: dict[Path, str] = {source.resolve(): "IN"}
    for name, path in outputs.items():
        resolved = path.resolve()
        if resolved in taken:
            raise FileWriteError(
                f"{name} and {taken[resolved]} are the same file, {path}. Choose another name."
            )
        taken[resolved] = name
        if path.exists() and source.exists() and path.samefile(source):
            raise FileWriteError(f"{name} and IN are the same file, {path}. Choose another name.")
        _check_writable(path, overwrite, source)


def _check_writable(path: Path, overwrite: bool, source: Path) -> None:
    file_format = format_to_write(path, _metadata_of(source))
    if file_format is None:
        raise FileFormatError(
            f"{path} must end in one of: {', '.join(supported_suffixes())}. "
            "What is read of a DICOM series can have a name without a suffix: it becomes a series."
        )
    check_target(path, file_format, overwrite=overwrite)
    try:
        # Only trying tells: permissions, read-only disks and quotas all have a say.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FileWriteError(why_not_written(path, error)) from error


def _metadata_of(source: Path) -> dict[str, Any]:
    """What decides on the format of a name without a suffix, before the source is read."""
    try:
        found = format_of(source) if source.exists() else None
    except OSError:
        found = None  # told when it is read
    return {"dicom": {}} if found is FORMATS["dicom"] else {}


def _check_series(volume: Volume, outputs: dict[str, Path]) -> None:
    """Refuse names and axes that no DICOM series can have, before anything is computed."""
    for path in outputs.values():
        if format_to_write(path, volume.metadata) is FORMATS["dicom"]:
            check_series(path, volume)


def _read(source: Path, settings: _Settings) -> Volume:
    volume = read(source, series=settings.series)
    if "S" in volume.axes:
        raise InvalidImageError(
            f"{source} is a colour image. Split it into its channels and denoise each by itself."
        )
    return volume


def _maps_config(files: dict[str, Path], step: int | None) -> MapsConfig:
    """The maps that files are wanted of, by name."""
    if step is not None and not files:
        raise InvalidSettingError(
            "--map-step goes with --diffusivity, --orientation or --anisotropy: give one of them."
        )
    directional = not files.keys().isdisjoint(("orientation", "anisotropy"))
    return MapsConfig("diffusivity" in files, directional, step)


def _derived(volume: Volume, data: Any, name: str) -> Volume:
    """Another quantity on the same axes, so with other intensities to display."""
    display = ("contrast_limits", "omero")
    metadata = {k: v for k, v in volume.metadata.items() if k not in display}
    metadata["quantity"] = name
    name = f"{volume.name} {name}"
    return replace(volume, data=data, name=name, metadata=metadata, missing=())


def _scratch(volume: Volume, dtypes: Sequence[DTypeLike], folder: Path) -> list[NDArray[Any]]:
    """Arrays of the volume's shape: in memory, or for a large volume in files without a name.

    The files go with the arrays, however the program ends.
    """
    shape = volume.data.shape
    if isinstance(volume.data, np.ndarray):
        return [np.empty(shape, dtype) for dtype in dtypes]
    needed = volume.data.size * sum(np.dtype(dtype).itemsize for dtype in dtypes)
    # The same again for the files that are written from them. A full disk would kill the program
    # while it writes to the mapped memory, without a chance to say why.
    if shutil.disk_usage(folder).free < 2 * needed:
        raise FileWriteError(
            f"{folder} has too little free space: {2 * needed / 2**30:.1f} GiB are needed."
        )
    arrays: list[NDArray[Any]] = []
    for dtype in dtypes:
        with tempfile.TemporaryFile(dir=folder) as file:
            arrays.append(np.memmap(file, dtype, "w+", shape=shape))
    return arrays


def _as_stored(volume: Volume, data: Any) -> Any:
    """An array as the volume has its pixels: in memory, or as a dask array of the same chunks."""
    lazy: Any = volume.data
    if isinstance(lazy, np.ndarray):
        return data
    import dask.array as da

    return da.from_array(data, chunks=lazy.chunks, name=False)  # type: ignore[no-untyped-call]


def _difference(noisy: Any, denoised: Any) -> Any:
    """Input minus result in floating point, lazily for dask arrays; NaN where infinite."""
    dtype = np.result_type(noisy.dtype, np.float32)

    def subtract(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            difference: NDArray[Any] = np.subtract(a, b, dtype=dtype)
        return difference

    if isinstance(noisy, np.ndarray):
        return subtract(noisy, denoised)
    return noisy.map_blocks(subtract, denoised, dtype=dtype)


# --- jobs -----------------------------------------------------------------------------------------


def _denoise_job(
    volume: Volume, settings: _Settings, target: Path, maps: MapsConfig
) -> Job[Denoised]:
    from napari_learned_diffusion.jobs.denoise import denoise_stack, prepare

    axes = volume.axes_of_planes(settings.plane)
    config = settings.config.also_missing(volume.missing)
    config = for_format(config, volume.data.dtype, format_to_write(target, volume.metadata))
    yield Progress(0, 0, "Estimating the noise")
    prepared = prepare(volume.data, config, plane_axes=axes)
    dtype = result_type(volume.data.dtype, prepared).dtype
    out, *maps_out = _scratch(volume, [dtype, *(np.float32 for _ in maps.names)], target.parent)
    done = yield from denoise_stack(
        volume.data,
        plane_axes=axes,
        spacing=volume.spacing(axes),
        tiling=settings.tiling,
        prepared=prepared,
        maps=maps,
        out=out,
        maps_out=dict(zip(maps.names, maps_out, strict=True)),
    )
    return done


# --- what people see ------------------------------------------------------------------------------


@contextmanager
def _progress_shown() -> Iterator[Callable[[Progress], None]]:
    """Draw a job's progress on stderr while the context lasts, if that is a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with ProgressBars(*columns, console=console, transient=True, disable=hidden) as bars:
        task = bars.add_task("Reading", total=None)

        def show(progress: Progress) -> None:
            bars.update(
                task,
                description=one_line(progress.message),
                completed=progress.done,
                total=progress.total or None,
            )

        yield show


def _summary_table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _row(table: Table, title: str, value: str) -> None:
    """A row of plain text: brackets in names are no markup."""
    table.add_row(Text(title), Text(one_line(value)))


def _print_summary(done: Denoised) -> None:
    report, prepared = done.report, done.prepared
    estimate = prepared.estimate
    origin = "given" if estimate is None else f"estimated, confidence {estimate.confidence:.2f}"
    noise = f"{prepared.noise.describe()} ({origin})"
    iterations = str(prepared.config.iterations)
    if prepared.slice_by_slice:
        low, high = report.noise_sigmas
        noise = f"estimated for each slice: standard deviation {low:.4g} to {high:.4g}"
        if prepared.requested.iterations is None:
            fewest, most = report.iterations
            iterations = f"{fewest} to {most}" if fewest < most else str(most)
            iterations = f"chosen for each slice: {iterations}"
    table = _summary_table()
    _row(table, "Model", prepared.config.model)
    _row(table, "Noise", noise)
    _row(table, "Iterations", iterations)
    _row(table, "Time", f"{report.seconds:.2f} s on {report.device}")
    if removed := report.removed():
        _row(table, "Removed", removed)
    _row(table, "Mean", f"moved by {report.mean_drift:.2g}")
    ranges = [f"{low:.6g} to {high:.6g}" for low, high in (report.range_before, report.range_after)]
    kept = "kept" if report.range_kept else "left"
    _row(table, "Range", f"{kept}: {ranges[0]} before, {ranges[1]} after")
    Console().print(table)


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        typer.echo(f"Note: {one_line(note)}", err=True)


def _notes_on_model(config: DiffusionConfig) -> Iterator[str]:
    """Which model the settings choose, where none is named."""
    chosen = config.changed().keys() & card(CLASSICAL_MODEL).settings
    if config.model == DEFAULT_MODEL and chosen:
        flags = " and ".join(_OPTIONS[name].flags[0] for name in _OPTIONS if name in chosen)
        verb = "is a setting" if len(chosen) == 1 else "are settings"
        yield (
            f"{flags} {verb} of {CLASSICAL_MODEL}, so that is the model and not the automatic one."
        )


def _notes_on_axes(volume: Volume, axes: tuple[int, int]) -> Iterator[str]:
    rows, columns = axes
    if volume.units[rows] != volume.units[columns]:
        yield (
            f"Rows are {volume.scale[rows]:g} {volume.units[rows]} apart and columns "
            f"{volume.scale[columns]:g} {volume.units[columns]}, which can't be compared: they "
            "were taken as equally far apart."
        )


def _notes_on_noise(volume: Volume, prepared: Prepared) -> Iterator[str]:
    """What to beware of in the one noise model that was estimated; of slices the report tells."""
    estimate = prepared.estimate
    if estimate is None or prepared.slice_by_slice:
        return
    channels = dict(zip(volume.axes, volume.data.shape, strict=True)).get("C", 1)
    if channels > 1:
        yield (
            f"One noise model was estimated for all {channels} channels. Where their noise "
            "differs, denoise each by itself."
        )
    if estimate.confidence < DOUBTFUL:
        yield (
            f"The noise estimate is doubtful: {estimate.message} Where you know the noise better, "
            f"give {_OPTIONS['noise_sigma'].flags[0]}."
        )


def _as_options(model: NoiseModel) -> str:
    """A noise model as options of `denoise`."""
    words = []
    for name, value in noise_options(model).items():
        words.append(f"--{name.replace('_', '-')}")
        words.append(value if isinstance(value, str) else f"{value:.6g}")
    return " ".join(words)
