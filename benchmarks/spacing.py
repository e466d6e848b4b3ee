"""Pixels that aren't square: what counting in pixels gains over going by the true distances.

Run ``python -m benchmarks.spacing``; the images are scikit-image's own. Each is shrunk so that its
rows lie 1 to 5 times as far apart as its columns, and noise is added. Every model, told the noise
level, denoises it twice: with the diffusion counting in pixels, which is the default, and with
``use_spacing=True``, going by the distances of rows and columns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import (
    DATA_RANGE,
    Image,
    print_provenance,
    print_table,
    provenance,
    write_json,
)

IMAGES = ("camera", "astronaut", "coins", "brick")
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
SEED = 16
"""First entry of the seeds `[entry, image, noise level]`."""


def clean_plane(name: str, ratio: float, size: int) -> Image:
    """A grey image whose rows are ``ratio`` times as far apart as its columns, 0 to 255."""
    from skimage import data, transform

    image = getattr(data, name)().astype(np.float64)
    grey = image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])
    shape = round(size / ratio), size
    shrunk: Image = transform.resize(grey, shape, anti_aliasing=True)
    return shrunk


def psnr_pair(model: str, noise_sigma: int, image: int, ratio: float, size: int) -> list[float]:
    """PSNR in dB, counting in pixels and going by the true distances."""
    from napari_learned_diffusion import denoise

    clean = clean_plane(IMAGES[image], ratio, size)
    rng = np.random.default_rng([SEED, image, noise_sigma])
    noisy = clean + rng.normal(0, noise_sigma, clean.shape)
    found = []
    for use_spacing in (False, True):
        result = denoise(
            noisy,
            model,
            noise_sigma=noise_sigma,
            spacing=(ratio, 1.0),
            use_spacing=use_spacing,
            device="cpu",
        )
        found.append(10 * np.log10(DATA_RANGE**2 / np.mean((result - clean) ** 2)))
    return found


def main(arguments: Sequence[str]) -> int:
    from napari_learned_diffusion.core.diffusivity import REGISTRY

    parser = argparse.ArgumentParser(prog="python -m benchmarks.spacing", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(REGISTRY), choices=list(REGISTRY))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--noise", nargs="+", type=int, default=[10, 25])
    parser.add_argument("--size", type=int, default=256, help="pixels of a row (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args(arguments)
    facts = provenance("spacing", arguments, seed=SEED, images=", ".join(IMAGES))
    print("# Pixels that aren't square\n")
    print_provenance(facts)
    scores: list[dict[str, Any]] = []
    for noise_sigma in options.noise:
        rows = []
        for model in options.models:
            cells = []
            for ratio in options.ratios:
                pairs = [
                    psnr_pair(model, noise_sigma, image, ratio, options.size)
                    for image in range(len(IMAGES))
                ]
                scores.append(
                    {"model": model, "noise": noise_sigma, "ratio": ratio, "pairs": pairs}
                )
                pixels, distances = np.mean(pairs, axis=0)
                cells.append(f"{pixels:.2f} / {distances:.2f}")
            rows.append([model, *cells])
        print(f"Noise {noise_sigma}, PSNR in dB: counting in pixels / by the true distances.\n")
        print_table(["model", *(f"{ratio:g} : 1" for ratio in options.ratios)], rows)
    write_json(options.json, facts | {"scores": scores})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
