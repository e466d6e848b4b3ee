"""PSNR and SSIM of every model and of the peers, on crops of BSDS500 with added noise.

Run ``python -m benchmarks.quality --data FOLDER``; README.md has the protocol.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import (
    DATA_RANGE,
    PEERS,
    TRAIN_SEED,
    VAL_SEED,
    Crop,
    Image,
    add_data_argument,
    add_noise,
    print_provenance,
    print_table,
    progress,
    provenance,
    read_crop,
    set_threads,
    val_crops,
    write_json,
)

NOISE_LEVELS = (15, 25, 50)
INPUT = "input"
TUNING_IMAGES = 10


class Score(NamedTuple):
    """One method on one crop."""

    method: str
    crop: int
    noise_sigma: int
    psnr: float
    ssim: float
    seconds: float


def models() -> dict[str, Callable[[Image, float], Image]]:
    """Every model of the registry, told the noise level and nothing else."""
    from napari_learned_diffusion.core.diffusivity import REGISTRY

    def denoise(key: str, noisy: Image, noise_sigma: float) -> Image:
        from napari_learned_diffusion import denoise

        return denoise(
            noisy.astype(np.float32), model=key, noise_sigma=noise_sigma, device="cpu"
        ).astype(np.float64)

    return {key: partial(denoise, key) for key in REGISTRY}


def available() -> dict[str, Callable[[Image, float], Image]]:
    """Models and those peers that are installed, by key."""
    return models() | {key: peer for key, peer in PEERS.items() if peer.installed}


def score(
    folder: Path, keys: Sequence[str], bm3d_crops: int, task: tuple[Crop, int]
) -> list[Score]:
    """All methods on one crop at one noise level."""
    from napari_learned_diffusion.core.metrics import psnr, ssim

    crop, noise_sigma = task
    clean = read_crop(folder, crop)
    noisy = add_noise(clean, crop.number, noise_sigma)
    methods = available()
    scores = []
    for key in (INPUT, *keys):
        if key == "bm3d" and crop.number >= bm3d_crops:
            continue
        start = time.perf_counter()
        result = noisy if key == INPUT else methods[key](noisy, float(noise_sigma))
        seconds = time.perf_counter() - start
        if key != INPUT:
            result = np.clip(result, 0, DATA_RANGE)
        quality = (m(result, clean, data_range=DATA_RANGE) for m in (psnr, ssim))
        scores.append(Score(key, crop.number, noise_sigma, *quality, seconds))
    return scores


def parallel(function: Callable[[Any], Any], tasks: Sequence[Any], processes: int) -> Iterator[Any]:
    """``map`` over a few processes of one thread each."""
    set_threads(1)
    if processes == 1:
        yield from map(function, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes, set_threads, (1,)) as pool:
        yield from pool.imap_unordered(function, tasks)


# --- tables -----------------------------------------------------------------------------------


def mean(scores: Iterable[Score], what: str) -> float:
    values = [getattr(s, what) for s in scores]
    return float(np.mean(values)) if values else math.nan


def check_input(scores: list[Score]) -> tuple[str, bool]:
    """Whether the noisy input measures what noise of its standard deviation must."""
    found, expected, good = [], [], True
    for s in NOISE_LEVELS:
        of_level = [x for x in scores if x.method == INPUT and x.noise_sigma == s]
        found.append(mean(of_level, "psnr"))
        expected.append(20 * math.log10(DATA_RANGE / s))
        # The sample variance of 256² draws scatters by 0.024 dB: four standard errors of the mean.
        good &= abs(found[-1] - expected[-1]) < 0.1 / math.sqrt(len(of_level))
    text = " / ".join(f"{f:.2f}" for f in found)
    wanted = " / ".join(f"{e:.2f}" for e in expected)
    verdict = "as it must be" if good else "WRONG: these are not the protocol's images"
    return f"Noisy input, not clipped: {text} dB, expected {wanted}: {verdict}.", good


def title(key: str) -> str:
    if key == INPUT:
        return "noisy input, not clipped"
    return PEERS[key].title if key in PEERS else f"**{key}**"


def quality_table(scores: list[Score], keys: Sequence[str]) -> None:
    rows = []
    for key in (INPUT, *keys):
        mine = [s for s in scores if s.method == key]
        if not mine:
            rows.append([title(key), "not installed", "", "", "", ""])
            continue
        levels = [[s for s in mine if s.noise_sigma == level] for level in NOISE_LEVELS]
        cells = [f"{mean(x, 'psnr'):.2f} / {mean(x, 'ssim'):.3f}" for x in levels]
        # The median, since the first call of each process pays for imports and compilation.
        seconds = "" if key == INPUT else f"{np.median([s.seconds for s in mine]):.3f}"
        rows.append([title(key), *cells, seconds, str(len(levels[0]))])
    print_table(["method", *(f"noise {s}" for s in NOISE_LEVELS), "s a crop", "crops"], rows)


def paired_table(scores: list[Score], keys: Sequence[str], against: str) -> None:
    """Everything on the crops that the slow method was run on."""
    crops = {s.crop for s in scores if s.method == against}
    if not crops:
        return
    print(f"Paired with {title(against)} on its {len(crops)} crops: PSNR, and the difference.\n")
    rows = []
    for key in (INPUT, *keys):
        cells = []
        for level in NOISE_LEVELS:
            here = [s for s in scores if s.noise_sigma == level and s.crop in crops]
            own = mean((s for s in here if s.method == key), "psnr")
            other = mean((s for s in here if s.method == against), "psnr")
            cells.append(f"{own:.2f} ({own - other:+.2f})")
        if any(s.method == key for s in scores):
            rows.append([title(key), *cells])
    print_table(["method", *(f"noise {s}" for s in NOISE_LEVELS)], rows)


def as_json(scores: list[Score], keys: Sequence[str]) -> dict[str, Any]:
    """Means, and PSNR and SSIM of each crop in the order of val500.csv."""
    result: dict[str, Any] = {}
    for key in (INPUT, *keys):
        mine = sorted((s for s in scores if s.method == key), key=lambda s: s.crop)
        if not mine:
            result[key] = "not installed"
            continue
        result[key] = {}
        for level in NOISE_LEVELS:
            here = [s for s in mine if s.noise_sigma == level]
            result[key][str(level)] = {
                "psnr": round(mean(here, "psnr"), 4),
                "ssim": round(mean(here, "ssim"), 5),
                "seconds": round(float(np.median([s.seconds for s in here])), 5),
                "psnr_of_each": [round(s.psnr, 3) for s in here],
                "ssim_of_each": [round(s.ssim, 4) for s in here],
            }
    return result


# --- tuning of the peers ----------------------------------------------------------------------


def training_crops(folder: Path) -> list[Crop]:
    """Centres of ten images of BSDS500 train; none of them is measured on."""
    names = sorted(p.stem for p in folder.glob("*.jpg"))[:: max(1, 200 // TUNING_IMAGES)]
    return [Crop(i, name, 32, 32) for i, name in enumerate(names)]


_training_image = cache(read_crop)


def tuning_error(folder: Path, task: tuple[str, int, dict[str, Any]]) -> tuple[Any, ...]:
    """Mean PSNR of one peer with one set of parameters."""
    from napari_learned_diffusion.core.metrics import psnr

    key, level, parameters = task
    found = []
    for crop in training_crops(folder):
        clean = _training_image(folder, crop)
        noisy = add_noise(clean, crop.number, level, TRAIN_SEED)
        result = np.clip(PEERS[key].call(noisy, float(level), **parameters), 0, DATA_RANGE)
        found.append(psnr(result, clean, data_range=DATA_RANGE))
    return key, level, parameters, float(np.mean(found))


def tune(folder: Path, keys: Sequence[str], processes: int) -> dict[str, Any]:
    """The best parameters of each peer at each noise level, from its grid."""
    tasks = []
    for key in keys:
        if key in PEERS and PEERS[key].installed and PEERS[key].grid:
            grid = PEERS[key].grid
            settings = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
            tasks += [(key, level, p) for level in NOISE_LEVELS for p in settings]
    found = parallel(partial(tuning_error, folder), tasks, processes)
    best: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, level, parameters, psnr in progress(found, len(tasks), "tuning"):
        if psnr > best[key].get(level, ({}, -math.inf))[1]:
            best[key][level] = (parameters, round(psnr, 3))
    rows = [
        [title(key), str(level), ", ".join(f"{k} {v}" for k, v in p.items()), f"{psnr:.2f}"]
        for key, levels in best.items()
        for level, (p, psnr) in sorted(levels.items())
    ]
    print_table(["peer", "noise", "parameters", "PSNR on train"], rows)
    return {key: {str(level): v for level, v in sorted(x.items())} for key, x in best.items()}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add_data_argument(parser)
    everything = (*models(), *PEERS)
    parser.add_argument("--crops", type=int, default=500, help="how many (default %(default)s)")
    parser.add_argument(
        "--methods", nargs="+", choices=everything, default=everything, metavar="KEY",
        help="which ones, of: " + ", ".join(everything),
    )  # fmt: skip
    parser.add_argument(
        "--bm3d-crops", type=int, default=10, help="BM3D takes 4 s for each of them"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--tune", action="store_true", help="tune the peers on BSDS500 train")
    options = parser.parse_args(arguments)
    if not 1 <= options.crops <= 500:
        parser.error("--crops must be from 1 to 500")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    facts = provenance(
        "quality",
        arguments,
        seeds=(
            "noise of crop i at level s: numpy.random.default_rng("
            f"[{TRAIN_SEED if options.tune else VAL_SEED}, i, s]), not clipped"
        ),
        protocol="outputs clipped to [0, 255], data range 255, noise level told",
    )
    print("# Quality on BSDS500\n")
    print_provenance(facts)
    if options.tune:
        found = tune(options.data / "bsds500" / "train", options.methods, options.processes)
        write_json(options.json, facts | {"tuned": found})
        return 0

    usable = available()
    keys = [k for k in options.methods if k in usable]
    tasks = list(itertools.product(val_crops(options.crops), NOISE_LEVELS))
    work = partial(score, options.data / "bsds500" / "val", keys, options.bm3d_crops)
    answers = parallel(work, tasks, options.processes)
    scores = [s for some in progress(answers, len(tasks), "crops x levels") for s in some]

    sentence, good = check_input(scores)
    print(sentence + "\n")
    print("PSNR in dB / SSIM, means over the crops; seconds of one thread, medians.\n")
    quality_table(scores, options.methods)
    if "bm3d" in keys and options.bm3d_crops < options.crops:
        paired_table(scores, options.methods, "bm3d")
    write_json(
        options.json,
        facts | {"input_check": sentence, "results": as_json(scores, options.methods)},
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
