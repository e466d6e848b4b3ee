"""Train a learned diffusivity; an interrupted run is continued by the same command.

Run ``python -m benchmarks.train --model foe-splines --images FOLDER [FOLDER ...] --out FOLDER``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks._common import set_threads


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from napari_learned_diffusion.core.training import TrainingConfig

    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--model", required=True, metavar="KEY")
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="FOLDER", help="clean images"
    )
    parser.add_argument("--data-name", default="BSDS500 train and test", help="for the card")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-onednn",
        action="store_true",
        help="PyTorch's own convolutions: on a CPU faster for kernels of one input channel (foe-*)",
    )
    parser.add_argument("--every", type=int, default=250, help="steps between two checkpoints")
    parser.add_argument(
        "--architecture", nargs="*", default=[], metavar="NAME=NUMBER", help="e.g. experts=24"
    )
    for field in fields(TrainingConfig):
        several = {"nargs": 2, "type": float} if field.name == "noise_range" else {}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            **({"type": type(field.default)} | several),
            default=field.default,
            help="(default %(default)s)",
        )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    set_threads(options.threads)
    import torch

    from napari_learned_diffusion.core.training import TrainingConfig
    from napari_learned_diffusion.jobs.progress import Progress, run
    from napari_learned_diffusion.jobs.train import train

    torch.backends.mkldnn.enabled = not options.no_onednn  # type: ignore[attr-defined]
    settings = {f.name: getattr(options, f.name) for f in fields(TrainingConfig)}
    settings["noise_range"] = tuple(settings["noise_range"])
    job = train(
        options.model,
        tuple(options.images),
        options.out,
        TrainingConfig(**settings),
        data_name=options.data_name,
        architecture={k: int(v) for k, v in (pair.split("=") for pair in options.architecture)},
        device=options.device,
        every=options.every,
    )

    def tell(progress: Progress) -> None:
        if progress.done % 10 == 0 or "dB" in progress.message:
            print(f"{progress.done}/{progress.total} {progress.message}", flush=True)

    trained = run(job, tell)
    for reason in trained.skipped:
        print(f"skipped {reason}")
    print(f"{trained.weights}: {trained.validation}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
