"""Tune what `perona-malik` suggests: power laws from an image's roughness to its settings.

For crops of BSDS500 train at many noise levels, the PSNR of every contrast parameter K, stopping
time and presmoothing on a grid; then the power laws

    K = k0 r^k1,   T = t0 r^t1,   presmooth_sigma = p0 + p1 log r  (within its range)

of the roughness r whose mean PSNR, interpolated in the grid, is highest. Prints the JSON that
stands under ``suggestion`` in the model's card. Nothing of BSDS500 val or test is looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import interpn
from scipy.optimize import minimize

from benchmarks._common import (
    CROP_SIZE,
    Crop,
    add_data_argument,
    print_provenance,
    progress,
    provenance,
    read_crop,
)
from napari_learned_diffusion.core.diffusivity.perona_malik import roughness
from napari_learned_diffusion.core.fused import perona_malik_steps
from napari_learned_diffusion.core.schemes import Explicit

SEED = 9
NOISE_LEVELS = (5, 10, 15, 25, 40, 50, 75, 100)
CONTRASTS = np.geomspace(0.1, 1.6, 10)
PRESMOOTHING = np.array([0.5, 0.6, 0.7])
TAU = 0.2
STEPS = 80
ROUGHNESS_RANGE = 0.01, 100.0

Laws = NDArray[np.float64]
"""``(log k0, k1, log t0, t1, p0, p1)``"""


def training_crops(folder: Path, count: int) -> list[Crop]:
    """One crop each of ``count`` images that are spread over the folder."""
    from skimage.io import imread

    files = sorted((folder / "bsds500" / "train").glob("*.jpg"))
    rng = np.random.default_rng(SEED)
    crops = []
    for number, file in enumerate(files[:: max(1, len(files) // count)][:count]):
        height, width = imread(file).shape[:2]
        top, left = (int(rng.integers(0, n - CROP_SIZE + 1)) for n in (height, width))
        crops.append(Crop(number, file.stem, top, left))
    return crops


def grid_of(
    clean: NDArray[np.float64], noise: NDArray[np.float64], sigma: int
) -> tuple[NDArray[np.float64], float]:
    """PSNR for each presmoothing, contrast and number of steps, and the roughness."""
    u = np.ascontiguousarray((clean + noise) / sigma, dtype=np.float32)
    target, white = (clean / sigma).astype(np.float32), 255 / sigma
    psnr = np.empty((len(PRESMOOTHING), len(CONTRASTS), STEPS))
    for p, presmooth_sigma in enumerate(PRESMOOTHING):
        for k, contrast in enumerate(CONTRASTS):
            states = perona_malik_steps(
                u,
                Explicit(TAU).steps(STEPS),
                stabilise=lambda v: v,
                contrast=contrast,
                function="rational",
                presmooth_sigma=presmooth_sigma,
                spacing=(1.0, 1.0),
                valid=None,
                threads=1,
            )
            for step, (_, after) in enumerate(states):
                error = np.mean((after.clip(0, white) - target) ** 2)
                psnr[p, k, step] = -10 * np.log10(error / white**2)
    return psnr, roughness(u[None].astype(np.float64))


def mean_psnr(laws: Laws, grids: list[NDArray[np.float64]], log_r: NDArray[np.float64]) -> float:
    """Mean over all images of the PSNR that the laws' settings reach, interpolated in the grid."""
    times = np.log(TAU * np.arange(1, STEPS + 1))
    axes = PRESMOOTHING, np.log(CONTRASTS), times
    settings = np.stack(
        [laws[4] + laws[5] * log_r, laws[0] + laws[1] * log_r, laws[2] + laws[3] * log_r]
    )
    bounds = [(axis[0], axis[-1]) for axis in axes]
    settings = np.stack([s.clip(*b) for s, b in zip(settings, bounds, strict=True)], axis=1)
    reached = [interpn(axes, g, s[None])[0] for g, s in zip(grids, settings, strict=True)]
    return float(np.mean(reached))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--images", type=int, default=50, help="images of BSDS500 train")
    options = parser.parse_args(arguments)
    print_provenance(provenance("tune_perona_malik", arguments, seed=SEED))

    tasks = [
        (crop, sigma)
        for crop in training_crops(options.data, options.images)
        for sigma in NOISE_LEVELS
    ]
    grids, log_r = [], []
    for crop, sigma in progress(tasks, len(tasks), "crops x levels"):
        clean = read_crop(options.data / "bsds500" / "train", crop)
        noise = np.random.default_rng([SEED, crop.number, sigma]).normal(0, sigma, clean.shape)
        grid, r = grid_of(clean, noise, sigma)
        grids.append(grid)
        log_r.append(np.log(np.clip(r, *ROUGHNESS_RANGE)))

    start = np.array([-0.5, 0.3, 0.0, -0.6, 0.45, -0.08])
    best = minimize(
        lambda laws: -mean_psnr(laws, grids, np.array(log_r)),
        start,
        method="Nelder-Mead",
        options={"maxiter": 600, "adaptive": True},
    )
    k0, k1, t0, t1, p0, p1 = best.x
    print(f"Mean PSNR over the training crops and all noise levels: {-best.fun:.3f} dB\n")
    suggestion = {
        "tau": TAU,
        "roughness_range": ROUGHNESS_RANGE,
        "contrast": [round(float(np.exp(k0)), 3), round(k1, 3)],
        "stopping_time": [round(float(np.exp(t0)), 3), round(t1, 3)],
        "presmooth_sigma": [round(p0, 3), round(p1, 3)],
        "presmooth_sigma_range": [float(PRESMOOTHING[0]), float(PRESMOOTHING[-1])],
    }
    print(json.dumps({"suggestion": suggestion}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
