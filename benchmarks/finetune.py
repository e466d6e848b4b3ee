"""Fine-tuning on regions of real stacks, measured where nothing was learned from.

Run ``python -m benchmarks.finetune --data FOLDER``; README.md has the conventions.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._common import (
    add_data_argument,
    print_provenance,
    print_table,
    provenance,
    write_json,
)
from benchmarks.real_noise import PAIRS, read_pair, slice_psnr

NOISE_LEVEL = 0.06
"""Of the correlated noise that is added, as a part of the intensities' range."""

CORRELATION_LENGTHS = {"everywhere": (1.0, 1.0), "rows": (0.0, 2.0)}
"""Of that noise, down and across, in pixels: an interpolated image, or a detector that is slow
beside the scan."""


@dataclass(frozen=True)
class Case:
    """What is learned from what.

    Parameters
    ----------
    title
        Name in the table.
    pair
        Key in `real_noise.PAIRS`, or in `CORRELATION_LENGTHS`: such noise is added to
        `CLEAN_STACK`.
    mode
        Of the fine-tuning.
    split
        Where is learned, and where is measured: ``"first"`` half of the slices and the other,
        ``"every other"`` slice and those between, or the ``"upper"`` half of each slice and the
        lower.
    """

    title: str
    pair: str
    mode: str
    split: str


CLEAN_STACK = "mri_t2_fernando"

CASES: dict[str, Case] = {
    **{
        f"w2s-{c}-paired": Case(f"W2S channel {c}", f"w2s-{c}", "paired", "first") for c in range(3)
    },
    "fmd-paired": Case("FMD BPAE", "fmd", "paired", "upper"),
    "dwi-paired": Case("diffusion MRI b1000", "dwi", "paired", "every other"),
    **{f"w2s-{c}-noisy": Case(f"W2S channel {c}", f"w2s-{c}", "noisy", "first") for c in range(3)},
    "correlated-clean": Case(
        "T2 MRI, correlated noise added", "everywhere", "clean", "every other"
    ),
    "rows-clean": Case("T2 MRI, noise correlated along rows added", "rows", "clean", "every other"),
}

GUARD = 16
"""Rows between where is learned and where is measured, in the same slice."""


@dataclass(frozen=True, eq=False)
class Data:
    noisy: NDArray[Any]
    reference: NDArray[np.float64]
    learn: NDArray[np.bool_]
    measured: list[tuple[int, slice]]


def read_case(folder: Path, case: Case) -> Data:
    """The stacks, where to learn, and which rows of which slices are measured."""
    if case.pair in PAIRS:
        noisy, reference = read_pair(folder, PAIRS[case.pair])
    else:
        noisy, reference = _with_correlated_noise(folder, CORRELATION_LENGTHS[case.pair])
    count, rows = noisy.shape[:2]
    numbers = np.arange(count)
    learn = np.zeros(noisy.shape, np.bool_)
    if case.split == "upper":
        learn[:, : rows // 2] = True
        return Data(noisy, reference, learn, [(i, slice(rows // 2 + GUARD, None)) for i in numbers])
    chosen = numbers < count // 2 if case.split == "first" else numbers % 2 == 0
    if case.mode == "clean":
        chosen = numbers % 4 == 0
        noisy[chosen] = reference[chosen]
    learn[chosen] = True
    return Data(noisy, reference, learn, [(int(i), slice(None)) for i in numbers[~chosen]])


def _with_correlated_noise(
    folder: Path, lengths: tuple[float, float]
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    import tifffile
    from scipy.ndimage import gaussian_filter

    clean = tifffile.imread(folder / f"{CLEAN_STACK}.tif").astype(np.float64)
    low, high = np.percentile(clean, [0.5, 99.5])
    noise = np.random.default_rng(0).normal(size=clean.shape)
    noise = gaussian_filter(noise, (0, *lengths), mode="wrap")
    noise *= NOISE_LEVEL * (high - low) / noise.std()
    return (clean + noise).astype(np.float32), clean


def score(data: Data, model: str, noise_kind: str) -> list[float]:
    """PSNR of every measured part; the noise is estimated."""
    from napari_learned_diffusion.config import DiffusionConfig
    from napari_learned_diffusion.jobs.denoise import denoise_stack
    from napari_learned_diffusion.jobs.progress import run

    numbers = [i for i, _ in data.measured]
    config = DiffusionConfig(model=model, noise_kind=noise_kind)
    result = run(denoise_stack(data.noisy[numbers], config)).image
    return [
        slice_psnr(plane[rows], data.reference[i][rows], None)
        for plane, (i, rows) in zip(result, data.measured, strict=True)
    ]


def measure(case: Case, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune a model and measure it beside the one that it started from."""
    from napari_learned_diffusion.config import DiffusionConfig, FineTuneConfig
    from napari_learned_diffusion.jobs.finetune import fine_tune
    from napari_learned_diffusion.jobs.progress import run
    from napari_learned_diffusion.jobs.regions import regions_of_mask

    data = read_case(options.data / "stacks", case)
    changed = {} if options.steps is None else {"steps": options.steps}
    config = FineTuneConfig(mode=case.mode, **changed)
    tuned = run(
        fine_tune(
            data.noisy,
            regions_of_mask(data.learn, data.noisy.shape, (1, 2)),
            config,
            DiffusionConfig(model=model),
            reference=data.reference if config.needs_reference else None,
        )
    )
    white = "gaussian" if case.mode == "clean" else "auto"
    before = score(data, model, white)
    key = model
    if tuned.improved:
        key = tuned.save("benchmark", overwrite=True).key
    after = score(data, key, "auto") if tuned.improved or white != "auto" else before
    gains = np.subtract(after, before)
    return {
        "case": case.title,
        "mode": case.mode,
        "model": model,
        "before": float(np.mean(before)),
        "after": float(np.mean(after)),
        "gain": float(np.mean(gains)),
        "worst": float(np.min(gains)),
        "held_out_gain": tuned.gain,
        "best_step": tuned.best_step,
        "steps": tuned.steps,
        "seconds": tuned.seconds,
        # The starting model told the kind of noise that the fine-tuned one is told.
        "before_told": (
            float(np.mean(score(data, model, "correlated"))) if white != "auto" else None
        ),
    }


def row(found: dict[str, Any]) -> list[str]:
    before = f"{found['before']:.2f}"
    if found["before_told"] is not None:
        before += f" ({found['before_told']:.2f})"
    return [
        found["case"],
        found["mode"],
        found["model"],
        before,
        f"{found['after']:.2f}",
        f"**{found['gain']:+.2f}**",
        f"{found['worst']:+.2f}",
        f"{found['held_out_gain']:+.2f}",
        f"{found['best_step']} of {found['steps']}",
        f"{found['seconds']:.0f}",
    ]


HEADER = (
    "stack", "learned from", "model", "before", "after", "gain", "worst slice", "held out",
    "best step", "s",
)  # fmt: skip


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from napari_learned_diffusion.core.zoo import STANDARD_MODEL

    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--models", nargs="+", default=[STANDARD_MODEL], metavar="KEY")
    parser.add_argument("--steps", type=int, help="at most (default: the product's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    facts = provenance(
        "finetune",
        arguments,
        seeds="0 of the fine-tuning and of the noise that is added",
        protocol=(
            "PSNR in dB after an affine fit, as in real_noise, on slices or halves that nothing "
            "was learned from; noise estimated; in brackets the starting model told the noise "
            "model that was found, not a white one"
        ),
    )
    print("# Fine-tuning\n")
    print_provenance(facts)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LEARNED_DIFFUSION_MODELS"] = folder
        for key in options.cases:
            for model in options.models:
                results.append(measure(CASES[key], model, options))
                print(" | ".join(row(results[-1])), file=sys.stderr, flush=True)
    print_table(HEADER, [row(found) for found in results])
    write_json(options.json, facts | {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
