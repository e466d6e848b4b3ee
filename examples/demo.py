"""Denoise a real MRI stack and a real CT slice, and measure what it did.

    python examples/demo.py --out demo-output

The images come with nibabel and pydicom, so nothing is downloaded. Each is written as TIFF with
its voxel size, denoised by the command line, drawn before and after, and measured.

The MRI was acquired twice. Its noise differs between the two repeats, its anatomy doesn't; so the
second repeat, which is never denoised, tells the true error of the first:

    error² = mean((denoised first − second)²) − noise variance of the second

holds on average, whatever the denoiser does. Only its own noise, which the second repeat doesn't
share, can be removed in this measure; what is blurred counts against it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from napari_learned_diffusion.cli import app
from napari_learned_diffusion.files import Volume, read, write

BRAIN = 200
"""Intensity of the MRI above which a voxel is brain."""

ADDED_NOISE = 40.0
"""Standard deviation of the noise added to the real and the imaginary part of the second case."""


@dataclass(frozen=True)
class Case:
    """One image to denoise.

    Parameters
    ----------
    key, title
        Name of the files, and for people.
    noisy
        What is denoised.
    unit
        Of the intensities; empty for the arbitrary ones of MRI.
    repeat
        A second acquisition of the same, with noise of its own.
    noise_variance
        Of that second acquisition, in squared units.
    """

    key: str
    title: str
    noisy: Volume
    unit: str = ""
    repeat: NDArray[Any] | None = None
    noise_variance: float = 0.0

    def error(self, image: NDArray[Any]) -> float:
        """Root mean square error in the brain against the unknown noise-free image.

        Negative where chance makes the estimated square negative, as only tiny errors can.
        """
        if self.repeat is None:
            return float("nan")
        brain = self.repeat > BRAIN
        squared = np.mean((image[brain].astype(float) - self.repeat[brain]) ** 2)
        return (
            float(np.sign(squared - self.noise_variance))
            * abs(squared - self.noise_variance) ** 0.5
        )


def mri(slices: int | None) -> list[Case]:
    """An echo-planar MRI of a head, from nibabel: as acquired, and with more noise."""
    import nibabel

    with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
        image = nibabel.load(path)
        data = np.asarray(image.dataobj)
        x, y, z = (float(f"{size:.6g}") for size in image.header.get_zooms()[:3])
    # From x, y, z, repeat to repeat, z, y, x, with the forehead at the top.
    first, second = data.transpose(3, 2, 1, 0)[:, :slices, ::-1, :].astype(float)
    brain = second > BRAIN
    variance = float(np.mean((first - second)[brain] ** 2)) / 2
    rng = np.random.default_rng(0)
    # An MRI's magnitude: noise in both parts of a complex signal.
    real, imaginary = ADDED_NOISE * rng.normal(size=(2, *first.shape))
    noisier = np.hypot(first + real, imaginary)

    def case(key: str, title: str, stack: NDArray[Any]) -> Case:
        volume = Volume(
            np.rint(stack).astype(np.uint16), "ZYX", (z, y, x), ("millimeter",) * 3, key
        )
        return Case(key, title, volume, repeat=second, noise_variance=variance)

    return [
        case("mri", "MRI as acquired", first),
        case("mri-noisier", "MRI, noise added", noisier),
    ]


def ct() -> Case:
    """A CT slice of a chest, from pydicom."""
    import pydicom
    from pydicom.data import get_testdata_file

    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    hounsfield = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    y, x = (float(size) for size in dataset.PixelSpacing)
    volume = Volume(hounsfield.astype(np.int16), "YX", (y, x), ("millimeter",) * 2, "ct")
    return Case("ct", "CT of a spine", volume, "HU")


def denoise(case: Case, out: Path) -> None:
    """Write the noisy image and run the command line on it."""
    noisy = write(out / f"{case.key}.tif", case.noisy, overwrite=True)
    command = [
        "denoise",
        str(noisy),
        str(out / f"{case.key}-denoised.tif"),
        "--residual",
        str(out / f"{case.key}-residual.tif"),
        "--overwrite",
    ]
    print(f"\n$ napari-learned-diffusion {' '.join(command)}", flush=True)
    code = app(command, standalone_mode=False)
    if code:
        sys.exit(code)


def draw(case: Case, denoised: NDArray[Any], path: Path) -> None:
    """Before, after and what was removed, as a whole and enlarged."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    before, after = (
        stack.reshape((-1, *stack.shape[-2:])) for stack in (np.asarray(case.noisy.data), denoised)
    )
    middle = len(before) // 2
    before, after = (stack[middle].astype(float) for stack in (before, after))
    removed = before - after
    low, high = np.percentile(before, (0.5, 99.5))
    limit = max(float(np.percentile(np.abs(removed), 99.5)), 1e-9)
    gray = {"cmap": "gray", "vmin": low, "vmax": high}
    diverging = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    unit = f" {case.unit}" if case.unit else ""
    columns = (
        ("noisy", before, gray),
        ("denoised", after, gray),
        (f"removed (±{limit:.0f}{unit})", removed, diverging),
    )
    y, x = case.noisy.scale[-2:]
    height, width = before.shape
    part = np.s_[height * 3 // 8 : height * 5 // 8, width * 3 // 8 : width * 5 // 8]
    ratio = height * y / (width * x)
    figure, axes = plt.subplots(
        2, 3, figsize=(10.5, 0.9 + 7 * ratio), facecolor="#111418", layout="constrained"
    )
    for column, (title, image, style) in enumerate(columns):
        for row, pixels in enumerate((image, image[part])):
            panel = axes[row, column]
            panel.imshow(pixels, aspect=y / x, interpolation="nearest", **style)
            panel.set_axis_off()
        axes[0, column].set_title(title, color="white", fontsize=12)
        axes[0, column].add_patch(
            plt.Rectangle(
                (part[1].start - 0.5, part[0].start - 0.5),
                part[1].stop - part[1].start,
                part[0].stop - part[0].start,
                fill=False,
                edgecolor="#ffb000",
                linewidth=1,
            )
        )
    figure.suptitle(case.title, color="white", fontsize=14)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def summarise(cases: list[Case], out: Path) -> None:
    """Print the measurements, and write them beside the images."""
    table = Table(title="Before → after denoising", title_justify="left")
    for name in ("image", "error", "mean", "range"):
        table.add_column(name, justify="left" if name == "image" else "right")
    for case in cases:
        noisy = np.asarray(case.noisy.data)
        denoised = np.asarray(read(out / f"{case.key}-denoised.tif").data)
        error = "not known"
        if case.repeat is not None:
            error = f"{case.error(noisy):.1f} → {case.error(denoised):.1f}"
        mean = f"{noisy.mean():.2f} → {denoised.mean():.2f}"
        extent = " → ".join(f"{x.min()} … {x.max()}" for x in (noisy, denoised))
        table.add_row(case.title, error, mean, extent)
    notes = (
        "The error is the root mean square over the brain, told by a second acquisition that was "
        "not denoised.\nA scan with as little noise as this one has hardly anything to gain, and "
        "may lose detail where its noise is overestimated: heed the note on a doubtful estimate."
    )
    with (out / "summary.txt").open("w", encoding="utf-8") as file:
        for console in (Console(), Console(file=file, width=120)):
            console.print()
            console.print(table)
            console.print(notes)


def show(cases: list[Case], out: Path) -> None:
    """Open the results in napari, with the form beside them."""
    import napari

    viewer = napari.Viewer(title="napari-learned-diffusion: demo")
    viewer.window.add_plugin_dock_widget("napari-learned-diffusion", "Denoise by diffusion")
    case = cases[-1]
    for suffix in ("", "-denoised"):
        viewer.open(out / f"{case.key}{suffix}.tif", plugin="napari-learned-diffusion")
    napari.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    parser.add_argument("--slices", type=int, help="so many slices of the MRI only")
    parser.add_argument("--show", action="store_true", help="open what is there in napari")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    cases = [ct(), *mri(arguments.slices)]
    missing = [case for case in cases if not (out / f"{case.key}-denoised.tif").exists()]
    if missing or not arguments.show:
        for case in cases:
            denoise(case, out)
            denoised = np.asarray(read(out / f"{case.key}-denoised.tif").data)
            draw(case, denoised, out / f"{case.key}.png")
        summarise(cases, out)
        print(f"\nPictures and stacks are in {out}. Open them in napari with: make napari")
    if arguments.show:
        show(cases, out)


if __name__ == "__main__":
    main()
