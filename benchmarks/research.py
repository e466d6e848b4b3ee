"""What each part of `conductance-unet` gives: short trainings of its variants, side by side.

Every variant is trained with the same steps, patches and seeds on BSDS500 train and test, and
measured on the images of these that are held out. BSDS500 val, which the other benchmarks report
on, is not looked at. Rows are added to those that ``--json FILE`` has already.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._common import (
    CROP_SIZE,
    add_data_argument,
    print_provenance,
    print_table,
    progress,
    provenance,
    set_threads,
)
from benchmarks.cost import run_of
from napari_learned_diffusion.config import TrainingConfig
from napari_learned_diffusion.core.diffusivity.conductance_unet import ConductanceUNet
from napari_learned_diffusion.core.training import TrainingImages, fit, read_images

TRAINING = TrainingConfig(batch=8, patch=64, noise_range=(5.0, 75.0), mixed=True)


@dataclass(frozen=True)
class Variant:
    """A model and what its training does otherwise than the others'."""

    says: str
    architecture: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "base": Variant("two looks, 4 steps of reach 4, 2, 1, 1 after each"),
    "looks-1": Variant("one look", {"looks": 1}),
    "looks-3": Variant("three looks", {"looks": 3}),
    "looks-3-narrow": Variant("three looks at the cost of two", {"looks": 3, "width": 26}),
    "reach-1": Variant("reach 1 only", {"reach": 1}),
    "reach-2": Variant("reaches 2, 1, 1, 1", {"reach": 2}),
    "steps-2": Variant("2 steps after each look", {"steps": 2, "reach": 2}),
    "steps-6": Variant("6 steps after each look", {"steps": 6}),
    "rate-1": Variant("learning rate 1e-3", training={"learning_rate": 1e-3}),
    "rate-4": Variant("learning rate 4e-3", training={"learning_rate": 4e-3}),
    "patch-96": Variant("patches of 96, 4 a step", training={"patch": 96, "batch": 4}),
    "correlated": Variant("a fifth of the noise correlated", training={"correlated": 0.2}),
    "wide": Variant("width 48", {"width": 48}),
}


def row(name: str, images: TrainingImages, steps: int) -> dict[str, Any]:
    """Train a variant and measure it."""
    variant = VARIANTS[name]
    torch.manual_seed(TRAINING.seed)
    model = ConductanceUNet(**variant.architecture).to(memory_format=torch.channels_last)
    config = replace(TRAINING, steps=steps, iterations=model.most_iterations, **variant.training)
    start = time.perf_counter()
    for step in progress(fit(model, images, config, every=steps), steps, name):
        scores = step.validation
    seconds = time.perf_counter() - start
    plane = np.zeros((CROP_SIZE, CROP_SIZE))
    return {
        "variant": name,
        "says": variant.says,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmac": run_of(model, plane, model.most_iterations) / 1e9,
        "psnr": scores,
        "seconds": seconds,
        "config": asdict(config),
    }


HEADER = ("variant", "training steps", "GMAC at 256²", "noise 15", "noise 25", "noise 50")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    scores = (f"{dB:.2f}" for dB in row["psnr"].values())
    return [row["says"], str(row["steps"]), f"{row['gmac']:.2f}", *scores]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--json", type=Path)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    set_threads(1)
    facts = provenance("research", arguments, seed=TRAINING.seed)
    print_provenance(facts)
    folders = [options.data / "bsds500" / part for part in ("train", "test")]
    images = read_images(folders, TRAINING.patch)
    rows = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text("utf-8"))["rows"]
    for name in options.variants:
        rows.append(row(name, images, options.steps))
        if options.json:
            content = {"provenance": facts, "rows": rows}
            options.json.write_text(json.dumps(content, indent=2), "utf-8")
        print(" | ".join(cells(rows[-1])), flush=True)
    print_table(HEADER, map(cells, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
