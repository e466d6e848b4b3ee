"""Real CT, MRI and EM stacks with Gaussian noise added: do models that never saw any keep up?

Run ``python -m benchmarks.stacks --data FOLDER``. The stacks of ``FOLDER/stacks`` have noise of
their own, which is part of what the results are compared with. Each slice is noised by 5 and 10 %
of its stack's range, from percentile 0.5 to 99.5; models are told that level and nothing else. PSNR
in that range.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import (
    CROP_SIZE,
    Image,
    add_data_argument,
    add_method_arguments,
    mean_psnr,
    print_provenance,
    print_table,
    progress,
    provenance,
    write_json,
)
from benchmarks.quality import INPUT, models, parallel

SEED = 4
LEVELS = 5, 10
"""Standard deviation of the noise, in percent of the range."""

PERCENTILES = 0.5, 99.5
STACKS = {
    "ct_chest_abdomen_fnndsc": "CT, chest and abdomen",
    "ct_phantom_head_1mm_smooth_ref": "CT, head phantom",
    "mri_t1_studyforrest": "MRI, T1",
    "mri_t2_fernando": "MRI, T2",
    "em_cryoet_microtubule13pf": "cryo-ET, averaged",
    "em_fibsem_medulla_sample1": "FIB-SEM",
    "em_sstem_isbi2012_train": "ssTEM",
}


class Task(NamedTuple):
    """A slice to be noised, on a scale on which its stack's range is 1."""

    stack: str
    number: int
    clean: Image


def slices_of(folder: Path, stack: str, count: int) -> list[Task]:
    """The centres of evenly spaced slices; not the ends of a scan, which are often empty."""
    from tifffile import imread

    volume = imread(folder / "stacks" / f"{stack}.tif").astype(np.float64)
    volume = volume.reshape(-1, *volume.shape[-2:])
    low, high = np.percentile(volume, PERCENTILES)
    top, left = (max(0, (n - CROP_SIZE) // 2) for n in volume.shape[1:])
    chosen = ((np.arange(count) + 0.5) / count * len(volume)).astype(int)
    part = volume[chosen, top : top + CROP_SIZE, left : left + CROP_SIZE]
    return [
        Task(stack, int(z), (plane - low) / (high - low))
        for z, plane in zip(chosen, part, strict=True)
    ]


def measure(keys: Sequence[str], task: Task) -> list[dict[str, Any]]:
    """All methods on one slice, at every level."""
    from napari_learned_diffusion.core.metrics import psnr

    denoise, found = models(), []
    for level in LEVELS:
        rng = np.random.default_rng([SEED, list(STACKS).index(task.stack), task.number, level])
        noisy = task.clean + rng.normal(0, level / 100, task.clean.shape)
        for key in (INPUT, *keys):
            image = noisy if key == INPUT else denoise[key](noisy, level / 100)
            score = psnr(image, task.clean, data_range=1.0)
            found.append(
                {"stack": task.stack, "number": task.number, "level": level, "method": key}
                | {"psnr": score}
            )
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stacks", description=__doc__)
    add_data_argument(parser)
    add_method_arguments(parser, models())
    parser.add_argument("--slices", type=int, default=4, help="of each (default %(default)s)")
    options = parser.parse_args(arguments)
    facts = provenance("stacks", arguments, seeds=f"[{SEED}, stack, slice, level]")
    print("# Real stacks with added noise\n")
    print_provenance(facts)
    tasks = [t for stack in STACKS for t in slices_of(options.data, stack, options.slices)]
    work = parallel(partial(measure, options.methods), tasks, options.processes)
    found = [score for scores in progress(work, len(tasks), "slices") for score in scores]
    for level in LEVELS:
        print(f"## Noise of {level} % of the range: PSNR in dB\n")
        rows = []
        for key in (INPUT, *options.methods):
            means = (mean_psnr(found, method=key, stack=stack, level=level) for stack in STACKS)
            title = "noisy input" if key == INPUT else f"**{key}**"
            rows.append([title, *(f"{m:.2f}" for m in means)])
        print_table(["method", *STACKS.values()], rows)
    write_json(options.json, facts | {"scores": found})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
