"""Crops of BSDS500 val as a camera sees them that counts few photons.

Run ``python -m benchmarks.photons --data FOLDER``; README.md has the protocol.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import (
    DATA_RANGE,
    PEERS,
    Crop,
    Image,
    add_data_argument,
    add_method_arguments,
    mean_psnr,
    print_provenance,
    print_table,
    progress,
    provenance,
    read_crop,
    val_crops,
    write_json,
)
from benchmarks.quality import INPUT, parallel, title
from napari_learned_diffusion.core.noise import PoissonGaussian

SEED = 5
PEAKS = 2, 6, 20
"""Photons in a pixel that is white in the photograph."""

DETECTORS = {"camera": 1.0, "emccd": 2.0}
"""How many times the variance of a count is that of the photons."""


class Task(NamedTuple):
    """A crop, and who counts how many photons of it."""

    crop: Crop
    detector: str
    peak: int


def counted(expected: Image, detector: str, rng: np.random.Generator) -> Image:
    """What a detector counts.

    An EMCCD camera multiplies each electron by a number of its own, of exponential distribution.
    """
    photons = rng.poisson(expected)
    return rng.standard_gamma(photons) if detector == "emccd" else photons.astype(np.float64)


def ours(key: str, noisy: Image, detector: str) -> Image:
    """A model of ours, told the noise model and nothing else."""
    from napari_learned_diffusion import denoise

    noise = PoissonGaussian(DETECTORS[detector])
    image = denoise(noisy.astype(np.float32), model=key, noise=noise, device="cpu")
    return np.asarray(image, dtype=np.float64)


def stabilised(key: str, noisy: Image, detector: str) -> Image:
    """Another library's method between the Anscombe transform and its exact unbiased inverse.

    Of the method's settings it takes those that were tuned for noise 25.
    """
    noise, peer = PoissonGaussian(DETECTORS[detector]), PEERS[key]
    v = np.asarray(peer.call(noise.stabilise(noisy), 1.0, **peer.at(25)), dtype=np.float64)
    return np.interp(v, *inverse(detector))


@cache
def inverse(detector: str) -> tuple[Image, Image]:
    """Means of stabilised counts, tabulated from draws, and the expected counts that have them."""
    noise, rng = PoissonGaussian(DETECTORS[detector]), np.random.default_rng(0)
    expected = np.linspace(0, 1.5 * PEAKS[-1], 300)
    draws = counted(np.repeat(expected[:, None], 5000, axis=1), detector, rng)
    return np.maximum.accumulate(noise.stabilise(draws).mean(axis=1)), expected


def methods() -> dict[str, Callable[[Image, str], Image]]:
    """Every model, and the two peers where they are installed, by key."""
    from napari_learned_diffusion.core.diffusivity import REGISTRY

    peers = [key for key in ("skimage-nlm", "bm3d") if PEERS[key].installed]
    return {key: partial(ours, key) for key in REGISTRY} | {
        key: partial(stabilised, key) for key in peers
    }


def measure(
    folder: Path, blur: float, keys: Sequence[str], bm3d_crops: int, task: Task
) -> list[dict[str, Any]]:
    """All methods on one crop."""
    from scipy.ndimage import gaussian_filter

    from napari_learned_diffusion.core.metrics import psnr

    clean = gaussian_filter(read_crop(folder, task.crop), blur) * (task.peak / DATA_RANGE)
    number = list(DETECTORS).index(task.detector)
    rng = np.random.default_rng([SEED, task.crop.number, task.peak, number])
    noisy = counted(clean, task.detector, rng)
    usable, found = methods(), []
    for key in (INPUT, *keys):
        if key == "bm3d" and task.crop.number >= bm3d_crops:
            continue
        image = noisy if key == INPUT else usable[key](noisy, task.detector).clip(0, task.peak)
        found.append(
            {"crop": task.crop.number, "detector": task.detector, "peak": task.peak}
            | {"method": key, "psnr": psnr(image, clean, data_range=float(task.peak))}
        )
    return found


def table(found: list[dict[str, Any]], keys: Sequence[str], crops: int) -> None:
    conditions = [(detector, peak) for detector in DETECTORS for peak in PEAKS]
    found = [f for f in found if f["crop"] < crops]
    rows = []
    for key in (INPUT, *keys):
        means = (mean_psnr(found, method=key, detector=d, peak=p) for d, p in conditions)
        rows.append([title(key), *(f"{m:.2f}" for m in means)])
    columns = [f"{detector}, {peak}" for detector, peak in conditions]
    print_table([f"method, first {crops} crops", *columns], rows)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photons", description=__doc__)
    add_data_argument(parser)
    add_method_arguments(parser, methods())
    parser.add_argument("--crops", type=int, default=50, help="(default %(default)s)")
    parser.add_argument(
        "--bm3d-crops", type=int, default=5, help="BM3D takes seconds a crop (default %(default)s)"
    )
    parser.add_argument(
        "--blur",
        type=float,
        default=0.0,
        metavar="PIXELS",
        help="standard deviation of what blurs the crops first, as optics do (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    facts = provenance("photons", arguments, seeds=f"[{SEED}, crop, peak, detector]")
    print("# Few photons: PSNR in dB, by detector and photons at white\n")
    print_provenance(facts)
    tasks = [
        Task(crop, detector, peak)
        for crop in val_crops(options.crops)
        for detector in DETECTORS
        for peak in PEAKS
    ]
    folder = options.data / "bsds500" / "val"
    run = partial(measure, folder, options.blur, options.methods, options.bm3d_crops)
    work = parallel(run, tasks, options.processes)
    found = [score for scores in progress(work, len(tasks), "crops") for score in scores]
    is_short = "bm3d" in options.methods and options.bm3d_crops < options.crops
    table(found, [k for k in options.methods if not (is_short and k == "bm3d")], options.crops)
    if is_short and options.bm3d_crops:
        table(found, options.methods, options.bm3d_crops)
    write_json(options.json, facts | {"scores": found})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
