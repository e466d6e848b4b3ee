"""How often a residual is said to hold structure, where the noise is told right and where it isn't.

Run ``python -m benchmarks.residual_structure --data FOLDER``. On BSDS500 train, which the limit
`jobs.check.STRUCTURE` was chosen on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from benchmarks._common import (
    add_data_argument,
    print_provenance,
    print_table,
    progress,
    provenance,
    set_threads,
)

LIMITS = 0.10, 0.12, 0.14
LEVELS = 15, 25, 50
FACTORS = 1.0, 1.5, 2.5
"""The noise level that is told, as a multiple of the true one: more smooths too much."""

EVERY, SIZE, SEED = 5, 256, 3
"""Every fifth image, its central part, and the noise of image i at level s: [SEED, i, s]."""


def main(arguments: Sequence[str]) -> int:
    from napari_learned_diffusion import denoise
    from napari_learned_diffusion.core.learning.patches import read_images
    from napari_learned_diffusion.core.metrics import autocorrelation, largest_autocorrelation
    from napari_learned_diffusion.jobs.check import REACH

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.residual_structure", description=__doc__
    )
    add_data_argument(parser)
    options = parser.parse_args(arguments)
    set_threads(1)
    facts = provenance("residual_structure", arguments, seeds=f"[{SEED}, image, level]")
    print("# Structure in the residual\n")
    print_provenance(facts)
    images = read_images((options.data / "bsds500" / "train",), SIZE).training[::EVERY]
    rows = []
    cases = [(level, factor) for level in LEVELS for factor in FACTORS]
    for level, factor in progress(iter(cases), len(cases), "cases"):
        found = []
        for number, image in enumerate(images):
            top, left = ((n - SIZE) // 2 for n in image.shape)
            clean = image[top : top + SIZE, left : left + SIZE]
            rng = np.random.default_rng([SEED, number, level])
            noisy = clean + rng.normal(0, level, clean.shape).astype(np.float32)
            denoised = denoise(
                noisy, model="conductance-unet-s", noise_sigma=level * factor, device="cpu"
            )
            found.append(largest_autocorrelation(autocorrelation(noisy - denoised, reach=REACH)))
        shares = [f"{100 * np.mean(np.array(found) > limit):.0f} %" for limit in LIMITS]
        rows.append([f"{level}", f"{factor:g}", f"{np.median(found):.3f}", *shares])
    header = ["noise", "told, times that", "median", *(f"above {limit:.2f}" for limit in LIMITS)]
    print_table(header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
