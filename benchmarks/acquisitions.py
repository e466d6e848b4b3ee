"""Noise as scanners make it: is it recognised, and what does denoising lose where it isn't?

Clean slices of ``FOLDER/stacks`` (with little noise of their own) go through simulated acquisitions
(`core.learning.acquisitions`), so the level of the noise is known at every pixel. For each:

- the true level (root-mean-square over the pixels), what the automatic estimate says, and what the
  noise network says (the mean over its cells of the logarithm, weighted by its certainty);
- PSNR of the input, and of the model told nothing, told the network's level, told the true one.

PSNR refers to the range of the clean slice, after an affine fit. Run
``python -m benchmarks.acquisitions --data FOLDER``; the seed of a case is [11, its number].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import (
    CROP_SIZE,
    Image,
    add_data_argument,
    print_provenance,
    print_table,
    provenance,
    set_threads,
    write_json,
)
from napari_learned_diffusion import Gaussian, denoise, estimate_noise
from napari_learned_diffusion.core.learning.acquisitions import (
    Acquisition,
    Camera,
    Interpolated,
    Lines,
    Magnitude,
    Micrograph,
    Tomography,
    White,
)
from napari_learned_diffusion.core.metrics import affine_fit, psnr
from napari_learned_diffusion.core.noise_evidence import noise_evidence

SEED = 11
HU_PER_PIXEL = 0.0193 * 0.8 / 1000
"""Attenuation of a Hounsfield unit in a pixel of 0.8 mm, at 70 keV."""


class Case(NamedTuple):
    """An acquisition of a clean slice."""

    title: str
    stack: str
    slice: int
    acquisition: Callable[[Image], Acquisition]
    offset: float = 0.0  # added to the stored values


def _ct(kernel: str, photons: float) -> Callable[[Image], Acquisition]:
    return lambda _: Tomography(photons, kernel, HU_PER_PIXEL, element=0.8)  # type: ignore[arg-type]


def _mri(percent: float, **how: Any) -> Callable[[Image], Acquisition]:
    return lambda clean: Magnitude(percent / 100 * _range(clean), **how)


def _parallel(percent: float) -> Callable[[Image], Acquisition]:
    """The level is twice as high in the middle as the mean, half of it at the rim."""

    def acquisition(clean: Image) -> Acquisition:
        y, x = np.mgrid[:CROP_SIZE, :CROP_SIZE] / CROP_SIZE * 2 - 1
        g = 0.5 + 1.5 * np.exp(-2 * (y**2 + x**2))
        return Magnitude(percent / 100 * _range(clean), g_factor=g)

    return acquisition


def _range(clean: Image) -> float:
    return float(np.ptp(np.percentile(clean, [0.5, 99.5])))


HEAD, CHEST = "ct_phantom_head_1mm_smooth_ref", "ct_chest_abdomen_fnndsc"
T1, T2 = "mri_t1_studyforrest", "mri_t2_fernando"
SSTEM, FIBSEM = "em_sstem_isbi2012_train", "em_fibsem_medulla_sample1"

CASES = (
    *(
        Case(f"CT {name}, {kernel}, {photons:.0e} photons", stack, z, _ct(kernel, photons), offset)
        for name, stack, z, offset in (("head", HEAD, 3, -1024.0), ("chest", CHEST, 12, -1000.0))
        for kernel in ("ramp", "hann")
        for photons in (3e4, 2e5)
    ),
    *(
        Case(f"MRI {name}, {percent} %", stack, z, how)
        for percent in (3, 9)
        for name, stack, z, how in (
            ("T2, plain", T2, 12, _mri(percent)),
            ("T2, zero-filled", T2, 12, _mri(percent, matrix=(0.5, 0.5))),
            ("T2, ellipse", T2, 12, _mri(percent, matrix=(0.7, 0.7), elliptical=True)),
            ("T1, Hamming", T1, 12, _mri(percent, window="hamming")),
            ("T1, partial Fourier", T1, 12, _mri(percent, partial=0.7)),
            ("T2, parallel", T2, 12, _parallel(percent)),
        )
    ),
    Case(
        "MRI T1, resampled 1.3×, 5 %", T1, 8, lambda c: Interpolated(0.05 * _range(c), (1.3, 1.3))
    ),
    Case("MRI T1, rotated, 5 %", T1, 8, lambda c: Interpolated(0.05 * _range(c), angle=20)),
    Case("FIB-SEM, rows, 8 %", FIBSEM, 32, lambda c: Lines(0.08 * _range(c), 0.3)),
    Case("ssTEM, white, 8 %", SSTEM, 10, lambda c: White(0.08 * _range(c))),
    Case("ssTEM, coloured, 30 %", SSTEM, 10, lambda c: Micrograph(0.3 * _range(c), 0.3)),
    Case("T2 as a camera, 20 photons", T2, 12, lambda c: Camera(_range(c) / 20)),
)


def clean_slice(folder: Path, case: Case) -> Image:
    """The middle of a slice; of large ones at half the resolution, which halves their own noise."""
    from skimage.transform import downscale_local_mean
    from tifffile import imread

    plane = imread(folder / "stacks" / f"{case.stack}.tif")[case.slice].astype(np.float64)
    if min(plane.shape) >= 2 * CROP_SIZE:
        plane = downscale_local_mean(plane, (2, 2))
    missing = [max(0, CROP_SIZE - n) for n in plane.shape]
    plane = np.pad(plane, [(m // 2, m - m // 2) for m in missing], mode="symmetric")
    top, left = ((n - CROP_SIZE) // 2 for n in plane.shape)
    return np.asarray(plane[top : top + CROP_SIZE, left : left + CROP_SIZE] + case.offset)


def network_level(noisy: Image) -> tuple[float, float]:
    """What the noise network says of a slice: its level, and the correlation along rows."""
    found = noise_evidence(noisy)
    weight = 1 / np.maximum(found.uncertainty, 0.05) ** 2
    level = float(np.exp(np.average(np.log(found.noise_sigma), weights=weight)))
    return level, float(np.average(found.autocorrelation[:, 0], weights=weight))


def measure(folder: Path, number: int, model: str) -> dict[str, Any]:
    """Levels and PSNR of one case."""
    case = CASES[number]
    original = clean_slice(folder, case)
    acquired = case.acquisition(original).acquire(original, np.random.default_rng([SEED, number]))
    noisy, clean = acquired.noisy, acquired.clean
    true = float(np.sqrt(np.mean(acquired.noise_sigma**2)))
    network, correlation = network_level(noisy)
    estimate = estimate_noise(noisy)
    automatic = float(np.sqrt(np.mean(estimate.model.variance(noisy))))

    def score(image: Image) -> float:
        return psnr(affine_fit(image, clean), clean, data_range=_range(clean))

    def told(level: float) -> float:
        return score(denoise(noisy, model=model, noise=Gaussian(level)))

    return {
        "case": case.title,
        "true": true,
        "automatic": automatic,
        "confidence": estimate.confidence,
        "network": network,
        "true correlation": float(acquired.autocorrelation[0]),
        "network correlation": correlation,
        "noisy dB": score(noisy),
        "automatic dB": score(denoise(noisy, model=model)),
        "network dB": told(network),
        "told dB": told(true),
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acquisitions", description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--model", default="conductance-unet-s", help="(default %(default)s)")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    options = parser.parse_args(arguments)
    set_threads(1)
    facts = provenance("acquisitions", arguments, seeds=f"[{SEED}, case]")
    print("# Simulated acquisitions of real slices\n")
    print_provenance(facts)
    rows = [measure(options.data, number, options.model) for number in range(len(CASES))]
    print("## Level of the noise, and correlation of neighbours along rows\n")
    print_table(
        ["case", "true", "automatic", "network", "true corr.", "network's corr."],
        [
            [
                row["case"],
                f"{row['true']:.3g}",
                f"{row['automatic'] / row['true'] - 1:+.0%} ({row['confidence']:.2f})",
                f"{row['network'] / row['true'] - 1:+.0%}",
                f"{row['true correlation']:.2f}",
                f"{row['network correlation']:.2f}",
            ]
            for row in rows
        ],
    )
    print(f"## PSNR of {options.model}, dB\n")
    columns = ("noisy", "automatic", "network", "told")
    print_table(
        ["case", "noisy", "told nothing", "told the network's level", "told the true level"],
        [[row["case"], *(f"{row[f'{c} dB']:.2f}" for c in columns)] for row in rows],
    )
    for column in ("automatic", "network"):
        errors = np.abs(np.array([row[column] / row["true"] - 1 for row in rows]))
        print(
            f"- {column}: level off by {np.median(errors):.0%} in the median, "
            f"within 25 % in {np.mean(errors < 0.25):.0%} of the cases"
        )
    write_json(options.json, facts | {"cases": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
