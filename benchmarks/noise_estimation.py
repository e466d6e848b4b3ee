"""How well the noise model is estimated: generated noise, natural images, real stacks.

The *noise level* is sigma at the 10th, 50th and 90th intensity percentile of the clean image; its
error is the largest of the three relative errors. Photon noise is drawn as photons, ``gain ·
Poisson(u / gain)``, plus Gaussian read-out noise of variance ``offset``; nothing is clipped.

Rician noise is drawn over an ellipse of each texture in the air; its signal-to-noise ratio is the
one of the ellipse's median. The error of correlated and Rician noise is that of ``noise_sigma``, by
the kind that was asked for and by the automatic choice, whichever model that is.

Run ``python -m benchmarks.noise_estimation``; README.md has the conventions. ``--images FOLDER``
(for instance BSDS500's test images, never its val, which the protocol keeps for measuring) adds
clean pictures to those that scikit-image carries. ``--data FOLDER`` adds a folder of TIFF stacks;
where it holds pairs of a noisy and an averaged stack, the noise measured from the pair stands
beside the estimate.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import data as pictures
from skimage import io
from skimage.color import rgb2gray

from benchmarks._common import print_provenance, print_table, provenance, write_json
from napari_learned_diffusion.core.noise import (
    NOISE_MODELS,
    Correlated,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
)
from napari_learned_diffusion.core.noise_estimation import Kind, estimate_noise, sample_planes

Image = NDArray[np.float64]
GAINS = (0.5, 2.0, 10.0, 50.0)
OFFSETS = (0.0, 50.0, 500.0)
SIGMAS = (5.0, 10.0, 15.0, 25.0, 50.0, 75.0)
SIGNAL_TO_NOISE = (3.0, 5.0, 10.0, 20.0, 30.0)
CORRELATION_LENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5)
CORRELATED_SIGMAS = (10.0, 25.0)
SIZE = 512
WITHIN = 0.15
CARRIED = ("camera", "brick", "grass", "gravel", "moon", "coins")

# Suffixes of a noisy stack and of its reference, in file names without extension.
PAIRS = (
    ("_avg1_noisy", "_avg400_ref"),
    ("_raw_noisy", "_avg50_ref"),
    ("_single_noisy", "_mean12_ref"),
    ("_sharp_noisy", "_smooth_ref"),
)


def smooth(rng: np.random.Generator) -> Image:
    """Soft blobs from 5 to 250."""
    field = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), SIZE / 16, mode="wrap")
    return 5 + 245 * (field - field.min()) / np.ptp(field)


def piecewise(rng: np.random.Generator) -> Image:
    """Constant cells from 5 to 250 with edges slightly softened, as optics do."""
    cells = cKDTree(rng.uniform(0, SIZE, (SIZE**2 // 1500, 2)))
    nearest = cells.query(np.stack(np.mgrid[:SIZE, :SIZE], axis=-1).reshape(-1, 2))[1]
    levels = rng.uniform(5, 250, cells.n)
    return ndimage.gaussian_filter(levels[nearest].reshape(SIZE, SIZE), 0.6)


def textured(rng: np.random.Generator) -> Image:
    """A photograph: grass, a coat, sky."""
    return pictures.camera().astype(np.float64)


TEXTURES: dict[str, Callable[[np.random.Generator], Image]] = {
    "smooth": smooth,
    "textured": textured,
    "piecewise": piecewise,
}


def level_errors(found: NoiseModel, true: NoiseModel, clean: Image) -> Image:
    """Relative errors of sigma at the 10th, 50th and 90th percentile of the clean image."""
    at = np.quantile(clean, [0.1, 0.5, 0.9])
    return np.asarray(np.sqrt(found.variance(at) / true.variance(at)) - 1)


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"## {title}\n")
    print_table(list(rows[0]), [[_text(value) for value in row.values()] for row in rows])


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def photon_table(seed: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for t, (name, texture) in enumerate(TEXTURES.items()):
        for gain in GAINS:
            for offset in OFFSETS:
                errors, gain_errors, chosen, seconds = [], [], 0, []
                for repeat in range(repeats):
                    rng = np.random.default_rng([seed, t, int(10 * gain), int(offset), repeat])
                    clean = texture(rng)
                    noisy = gain * rng.poisson(clean / gain) + rng.normal(
                        0, np.sqrt(offset), clean.shape
                    )
                    true = PoissonGaussian(gain, offset)
                    start = time.perf_counter()
                    model = estimate_noise(noisy).model
                    seconds.append(time.perf_counter() - start)
                    errors.append(level_errors(model, true, clean))
                    chosen += isinstance(model, PoissonGaussian)
                    fitted = estimate_noise(noisy, "poisson-gaussian").model
                    if isinstance(fitted, PoissonGaussian):
                        gain_errors.append(fitted.gain / gain - 1)
                mean = np.mean(errors, axis=0)
                rows.append(
                    {
                        "texture": name,
                        "gain": gain,
                        "offset": offset,
                        "p10": percent(mean[0]),
                        "p50": percent(mean[1]),
                        "p90": percent(mean[2]),
                        "largest": percent(float(np.abs(errors).max())),
                        f"within {WITHIN:.0%}": bool(np.abs(errors).max() <= WITHIN),
                        "gain error": percent(float(np.mean(gain_errors))) if gain_errors else "–",
                        "auto": f"{chosen}/{repeats} Poisson-Gaussian",
                        "seconds": float(np.median(seconds)),
                    }
                )
    return rows


def natural_images(folder: Path | None, every: int) -> list[Image]:
    images = [getattr(pictures, name)().astype(np.float64) for name in CARRIED]
    if folder is not None:
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".png", ".tif"))
        for file in files[::every]:
            picture = io.imread(file)
            grey = rgb2gray(picture[..., :3]) * 255 if picture.ndim == 3 else picture
            # Off the grid of JPEG's blocks, which has exact zeros at high frequencies.
            images.append(np.asarray(grey, dtype=np.float64)[3:-2, 5:-4])
    return images


def natural_table(images: Sequence[Image], seed: int) -> list[dict[str, Any]]:
    rows = []
    for kind in ("auto", "gaussian"):
        for sigma in SIGMAS:
            largest, middle, chosen = [], [], 0
            for number, clean in enumerate(images):
                rng = np.random.default_rng([seed, number, int(sigma)])
                model = estimate_noise(clean + rng.normal(0, sigma, clean.shape), kind).model
                errors = level_errors(model, Gaussian(sigma), clean)
                largest.append(float(np.abs(errors).max()))
                middle.append(float(errors[1]))
                chosen += isinstance(model, Gaussian)
            rows.append(
                {
                    "kind": kind,
                    "noise_sigma": sigma,
                    "median error at p50": percent(float(np.median(middle))),
                    "mean error at p50": percent(float(np.mean(middle))),
                    "mean of the largest": percent(float(np.mean(largest))),
                    "worst image": percent(max(largest)),
                    f"images within {WITHIN:.0%}": f"{np.mean(np.array(largest) <= WITHIN):.0%}",
                    "Gaussian chosen": f"{chosen}/{len(images)}",
                }
            )
    return rows


def head(image: Image) -> Image:
    """An ellipse of an image, from 60 to 250, in the air, where there is no signal."""
    y, x = (np.arange(n) / n - 0.5 for n in image.shape)
    inside = np.hypot(x / 0.42, y[:, None] / 0.36) < 1
    return np.where(inside, 60 + 0.75 * image, 0.0)


class Case(NamedTuple):
    """An image and its noise, which is made where it is needed."""

    true: NoiseModel
    clean: Image
    seed: tuple[int, ...]

    def errors(self, kind: Kind) -> tuple[float, str]:
        """Relative error of sigma at the median of the signal, and the model that was found."""
        noisy = self.true.add(self.clean, np.random.default_rng(self.seed))
        found = estimate_noise(noisy, kind).model
        at = np.median(self.clean[self.clean > 0], keepdims=True)
        return float(np.sqrt(found.variance(at) / self.true.variance(at))[0] - 1), found.key


def kind_row(kind: Kind, cases: Sequence[Case]) -> dict[str, Any]:
    """Errors of the kind that was asked for, and of the one that was chosen."""
    asked = np.array([case.errors(kind)[0] for case in cases])
    automatic = [case.errors("auto") for case in cases]
    errors = np.array([error for error, _ in automatic])
    right = np.array([key == kind for _, key in automatic])

    def within(values: Image) -> str:
        return f"{np.mean(np.abs(values) <= WITHIN):.0%}" if len(values) else "–"

    return {
        "asked for: median": percent(float(np.median(asked))),
        "largest": percent(float(np.abs(asked).max())),
        f"within {WITHIN:.0%}": within(asked),
        "auto: chosen": f"{right.sum()}/{len(cases)}",
        "auto: median": percent(float(np.median(errors))),
        f"auto: within {WITHIN:.0%}": within(errors),
        "where chosen": within(errors[right]),
    }


def textures(seed: int, repeats: int) -> dict[str, list[Image]]:
    return {
        name: [texture(np.random.default_rng([seed, t, repeat])) for repeat in range(repeats)]
        for t, (name, texture) in enumerate(TEXTURES.items())
    }


def rician_table(seed: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, images in textures(seed, repeats).items():
        for ratio in SIGNAL_TO_NOISE:
            cases = []
            for number, image in enumerate(images):
                clean = head(image)
                level = float(np.median(clean[clean > 0])) / ratio
                cases.append(Case(Rician(level), clean, (seed, int(ratio), number)))
            rows.append({"texture": name, "SNR": ratio, **kind_row("rician", cases)})
    return rows


def correlated_table(natural: Sequence[Image], seed: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    sources = {**textures(seed, repeats), f"{len(natural)} natural images": natural}
    for name, images in sources.items():
        for noise_sigma in CORRELATED_SIGMAS:
            for length in CORRELATION_LENGTHS:
                cases = [
                    Case(Correlated(noise_sigma, length), image, (seed, int(100 * length), number))
                    for number, image in enumerate(images)
                ]
                setting = {"image": name, "noise_sigma": noise_sigma, "length": length}
                rows.append({**setting, **kind_row("correlated", cases)})
    return rows


def choice_table(natural: Sequence[Image], seed: int) -> list[dict[str, Any]]:
    """What is chosen for each noise, on one of each texture and all natural images."""
    rows = []
    images = [*(repeats[0] for repeats in textures(seed, 1).values()), *natural]
    for true in (
        *(Gaussian(noise_sigma) for noise_sigma in SIGMAS),
        *(PoissonGaussian(gain, 50.0) for gain in GAINS),
        *(Rician(noise_sigma) for noise_sigma in (5.0, 15.0, 50.0)),
        *(Correlated(sigma, length) for sigma in CORRELATED_SIGMAS for length in (0.5, 1.0)),
    ):
        chosen = dict.fromkeys(NOISE_MODELS, 0)
        for number, image in enumerate(images):
            case = Case(true, head(image) if isinstance(true, Rician) else image, (seed, number))
            chosen[case.errors("auto")[1]] += 1
        rows.append({"true noise": true.describe(), **chosen})
    return rows


def stack_table(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.glob("*.tif")):
        planes = read_stack(file)
        sampled = planes[sample_planes(len(planes))]
        start = time.perf_counter()
        found = estimate_noise(sampled)
        seconds = time.perf_counter() - start
        at = np.quantile(sampled, [0.1, 0.5, 0.9])
        gaussian = estimate_noise(sampled, "gaussian").model
        rows.append(
            {
                "stack": file.stem,
                "model": found.model.key,
                "sigma at p10, p50, p90": ", ".join(
                    f"{s:.3g}" for s in np.sqrt(found.model.variance(at))
                ),
                "gaussian": float(np.sqrt(gaussian.variance(np.zeros(1))[0])),
                "confidence": round(found.confidence, 2),
                "message": found.message,
                "seconds": round(seconds, 2),
            }
        )
    return rows


def read_stack(file: Path) -> NDArray[Any]:
    planes = np.asarray(tifffile.imread(file))
    return planes[None] if planes.ndim == 2 else planes


def pair_table(folder: Path) -> list[dict[str, Any]]:
    """Estimates of single slices beside the noise that the pair shows, along the intensities."""
    rows = []
    for file in sorted(folder.glob("*.tif")):
        for noisy_end, reference_end in PAIRS:
            reference = file.with_name(file.stem.replace(noisy_end, reference_end) + ".tif")
            if not file.stem.endswith(noisy_end) or not reference.exists():
                continue
            noisy_planes, references = read_stack(file), read_stack(reference)
            for index in sample_planes(len(noisy_planes), 3):
                noisy = noisy_planes[index].astype(np.float64)
                intensity, measured = pair_noise(noisy, references[index].astype(np.float64))
                model = estimate_noise(noisy_planes[index]).model
                estimated = np.sqrt(model.variance(intensity))
                rows.append(
                    {
                        "pair": file.stem,
                        "slice": int(index),
                        "intensity": _numbers(intensity),
                        "sigma of the pair": _numbers(measured),
                        "estimated": _numbers(estimated),
                        "median ratio": float(np.median(estimated / measured)),
                    }
                )
    return rows


def pair_noise(noisy: Image, reference: Image, n_bins: int = 6) -> tuple[Image, Image]:
    """Standard deviation of what is left after an affine fit of the reference, by intensity.

    It counts everything in which the two differ: drift and other contrast as well as noise.
    """
    slope, offset = np.polyfit(reference.ravel(), noisy.ravel(), 1)
    clean = (slope * reference + offset).ravel()
    rest = noisy.ravel() - clean
    edges = np.unique(np.quantile(clean, [0, 0.2, 0.4, 0.6, 0.8, 0.95, 1][: n_bins + 1]))
    number = np.clip(np.searchsorted(edges, clean, side="right") - 1, 0, len(edges) - 2)
    groups = [number == k for k in range(len(edges) - 1) if np.count_nonzero(number == k) > 50]
    return (
        np.array([clean[g].mean() for g in groups]),
        np.array([rest[g].std() for g in groups]),
    )


def _numbers(values: Image) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="clean pictures")
    parser.add_argument("--every", type=int, default=4, help="take every n-th picture (4)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="TIFF stacks")
    parser.add_argument("--repeats", type=int, default=3, help="noise drawn per setting (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(arguments)

    facts = provenance("noise_estimation", arguments, seed=options.seed)
    print_provenance(facts)
    tables: dict[str, Any] = {}

    def add(title: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            tables[title] = rows
            show(title, rows)

    add(
        f"Photon noise, {SIZE}×{SIZE}, errors of sigma", photon_table(options.seed, options.repeats)
    )
    images = natural_images(options.images, options.every)
    add(f"Gaussian noise on {len(images)} natural images", natural_table(images, options.seed))
    add(f"Rician noise, {SIZE}×{SIZE}", rician_table(options.seed, options.repeats))
    add("Correlated noise", correlated_table(images, options.seed, options.repeats))
    add("What is chosen", choice_table(images, options.seed))
    if options.data is not None:
        add("Stacks, up to 16 slices together", stack_table(options.data))
        add("Pairs, slice by slice", pair_table(options.data))
    write_json(options.json, {**facts, "tables": tables})


if __name__ == "__main__":
    main()
