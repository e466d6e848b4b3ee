"""The command ``batch``: many files to a folder. Imports torch only when it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.text import one_line
from napari_learned_diffusion.files import COMPRESSIONS, FORMATS
from napari_learned_diffusion.jobs.progress import Progress, run

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.batch import FileStatus
    from napari_learned_diffusion.jobs.batch_engines import Certificates, Engine

_FILES, _CLUSTER = "Files and axes", "Cluster"


class Settings(Protocol):
    """What the options of denoising say."""

    config: DiffusionConfig
    tiling: TilingConfig
    plane: str | None
    series: int | None


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            show_default=False,
            help="Files, folders with all below them, or patterns such as 'scans/*.tif'.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FOLDER",
            show_default=False,
            help="Folder for the results, each under the name and at the place of its input.",
            rich_help_panel=_FILES,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"Format of the results: {', '.join(FORMATS)}. By default each input's own, but "
            "zarr for TIFFs of more than 4 GiB.",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Compute everything anew, and replace results that exist.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Only what has failed in an earlier run.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    compression: Annotated[
        str | None,
        typer.Option(
            "--compression",
            help=f"Lossless compression of TIFFs: {', '.join(COMPRESSIONS)}.",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Compute in so many processes on this machine.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            metavar="tls://HOST:PORT",
            help="Compute on the workers of a running scheduler of dask. A tcp:// address works, "
            "too, but anybody who reaches such a scheduler can run code there.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            "--tls-ca",
            metavar="FILE",
            help="Certificate of the authority that has signed the scheduler's and yours, in PEM.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            "--tls-cert",
            metavar="FILE",
            help="Your certificate for a scheduler of tls://. Without these options those of "
            "distributed's configuration are used.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key",
            metavar="FILE",
            help="Its key, where it isn't in the same file.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Denoise many files to a folder.

    Reads TIFF, MRC, DICOM series, NIfTI and OME-Zarr, slice by slice, so that stacks may be larger
    than memory. What is done already is skipped, what was interrupted goes on where it was, and a
    file that fails is reported while the others go on.

    - a folder: `batch scans --out denoised`
    - some files, as OME-Zarr: `batch 'scans/*.tif' --out denoised --format zarr`
    - on four processes: `batch scans --out denoised --workers 4`
    - once more what has failed: `batch scans --out denoised --retry-failed`

    The folder holds the manifest `batch.json` and the log `batch.jsonl`, one JSON object a line.
    """
    if workers is not None and scheduler is not None:
        raise InvalidSettingError("Give either --workers or --scheduler, not both.")
    certificates = _certificates(scheduler, tls_ca, tls_cert, tls_key)
    from napari_learned_diffusion.jobs.batch import BatchConfig, denoise_batch
    from napari_learned_diffusion.jobs.batch_sources import find_sources

    where = BatchConfig(
        out=out,
        format=format,
        overwrite=overwrite,
        only_failed=retry_failed,
        plane=settings.plane,
        series=settings.series,
        compression=compression,
    )
    sources = find_sources(inputs, out)
    engine = _engine(settings, workers, scheduler, certificates)
    if engine is not None and engine.link:
        typer.echo(f"Dashboard: {engine.link}", err=True)
    job = denoise_batch(sources, where, settings.config, tiling=settings.tiling, engine=engine)
    with _shown() as show:
        summary = run(job, show)
    typer.echo(summary.describe())
    typer.echo(f"Log: {summary.log}")
    for note in summary.notes:
        typer.echo(f"Note: {note}", err=True)
    if summary.count("failed"):
        raise typer.Exit(1)


def _certificates(
    scheduler: str | None, ca: Path | None, cert: Path | None, key: Path | None
) -> Certificates | None:
    """The certificates that the options name, which go together."""
    if ca is None and cert is None and key is None:
        return None
    if scheduler is None:
        raise InvalidSettingError(
            "--tls-ca, --tls-cert and --tls-key are for --scheduler tls://HOST:PORT. The processes "
            "of --workers have certificates of their own."
        )
    if ca is None or cert is None:
        raise InvalidSettingError("Give --tls-ca and --tls-cert both; they go together.")
    from napari_learned_diffusion.jobs.batch_engines import Certificates

    return Certificates(ca, cert, key)


def _engine(
    settings: Settings,
    workers: int | None,
    scheduler: str | None,
    certificates: Certificates | None,
) -> Engine | None:
    if workers is None and scheduler is None:
        return None
    from napari_learned_diffusion.jobs.batch_engines import ClusterEngine

    return ClusterEngine(
        settings.config,
        settings.tiling,
        workers=workers,
        scheduler=scheduler,
        certificates=certificates,
    )


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """A line for each file that has ended, and on a terminal a bar below them."""
    columns = (
        TextColumn("{task.description}", markup=False),  # a file may be called anything
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    hidden = not console.is_terminal
    with ProgressBars(*columns, console=console, transient=True, disable=hidden) as bars:
        task = bars.add_task("Reading", total=None)

        def show(progress: Progress) -> None:
            status: FileStatus | None = getattr(progress, "file", None)
            bars.update(task, completed=progress.done, total=progress.total)
            if status is None:
                return
            bars.update(task, description=one_line(progress.message))
            if status.is_final:
                console.print(_line(status), markup=False)

        yield show


def _line(status: FileStatus) -> str:
    """A file that has ended in one line: state, name, time, what was removed, message."""
    from napari_learned_diffusion.jobs.report import describe_removed  # imports torch

    parts = [f"{status.state:<8}{one_line(status.source.name)}"]
    if status.state == "done":
        parts.append(f"{status.seconds:.1f} s")
        if removed := describe_removed(status.noise_sigma, status.removed_sigma):
            parts.append(f"removed {removed}")
    return " · ".join(parts + [one_line(status.message)] * bool(status.message))
