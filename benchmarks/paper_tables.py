"""The three tables of the paper, measured on our models, with the paper's figures beside them.

Run ``python -m benchmarks.paper_tables --data FOLDER``. Table 1 follows the protocol of quality.py;
the published figures and where they are from are in paper.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._common import (
    CROP_SIZE,
    DATA_RANGE,
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
    val_crops,
    version,
    write_json,
)
from benchmarks.cost import PAPER_ITERATIONS, cost_of
from benchmarks.quality import INPUT, NOISE_LEVELS, check_input, mean, models, parallel, title

PAPER: dict[str, Any] = json.loads(Path(__file__).with_name("paper.json").read_text("utf-8"))

PUBLISHED_CROPS = 100
"""The first ones of val500.csv, which the published weights were measured on."""

CLEAN = "clean"
VAL = "val"
CLASSICAL = "perona-malik"
STACK_SEED = 3
STACK_NOISE = 25
NOT_TRAINED = "not trained"
NOT_REGISTERED = "not in the package"
NOT_MEASURED = "not measured"
MISSING = "–"


@dataclass(frozen=True)
class Stack:
    """A real stack that noise is added to; all of a kind are averaged."""

    kind: str
    name: str


STACKS = (
    Stack("CT", "ct_chest_abdomen_fnndsc"),
    Stack("MRI", "mri_t1_studyforrest"),
    Stack("MRI", "mri_t2_fernando"),
    Stack("EM", "em_fibsem_medulla_sample1"),
    Stack("EM", "em_sstem_isbi2012_train"),
)
PERCENTILES = 0.5, 99.5
"""What of a stack becomes 0 and 255."""


class Measured(NamedTuple):
    """One method on one slice. NaN where there is no reference, or LPIPS is absent."""

    method: str
    images: str
    number: int
    noise_sigma: int
    q: float
    share: float
    psnr: float = math.nan
    ssim: float = math.nan
    lpips: float = math.nan
    seconds: float = math.nan


# --- measuring --------------------------------------------------------------------------------


def measure_crop(
    folder: Path, keys: Sequence[str], with_lpips: bool, task: tuple[Crop, int]
) -> list[Measured]:
    """All methods on one crop of BSDS500 val at one noise level."""
    from napari_learned_diffusion.core.metrics import lpips, psnr, ssim

    crop, noise_sigma = task
    clean = read_crop(folder, crop)
    noisy = add_noise(clean, crop.number, noise_sigma)
    found = []
    for method, image, seconds in _results(keys, clean, noisy, noise_sigma):
        distance = lpips if with_lpips else lambda *_, **__: math.nan
        found.append(
            Measured(
                method, VAL, crop.number, noise_sigma, *_content(image),
                psnr(image, clean, data_range=DATA_RANGE),
                ssim(image, clean, data_range=DATA_RANGE),
                distance(np.clip(image, 0, DATA_RANGE), clean, data_range=DATA_RANGE),
                seconds,
            )
        )  # fmt: skip
    return found


def measure_slice(keys: Sequence[str], task: tuple[str, int, Image]) -> list[Measured]:
    """All methods on one slice of a stack, with noise added."""
    kind, number, clean = task
    noisy = add_noise(clean, number, STACK_NOISE, STACK_SEED)
    return [
        Measured(method, kind, number, STACK_NOISE, *_content(image))
        for method, image, _ in _results(keys, clean, noisy, STACK_NOISE)
    ]


def _results(
    keys: Sequence[str], clean: Image, noisy: Image, noise_sigma: int
) -> Iterable[tuple[str, Image, float]]:
    """Clean and noisy image, then what each model makes of it, clipped, and in which time."""
    yield CLEAN, clean, math.nan
    yield INPUT, noisy, math.nan
    denoise = models()
    for key in keys:
        start = time.perf_counter()
        result = denoise[key](noisy, float(noise_sigma))
        yield key, np.clip(result, 0, DATA_RANGE), time.perf_counter() - start


def _content(image: Image) -> tuple[float, float]:
    from napari_learned_diffusion.core.metrics import anisotropic_share, zhu_milanfar_q

    return zhu_milanfar_q(image), anisotropic_share(image)


def stack_slices(folder: Path, per_stack: int) -> list[tuple[str, int, Image]]:
    """Evenly spaced slices of each stack: their centre, on the 0-255 scale, clipped.

    The number is the seed's: 1000 times that of the stack, plus the slice's.
    """
    from tifffile import imread

    slices = []
    for stack_number, stack in enumerate(STACKS):
        volume = imread(folder / f"{stack.name}.tif").astype(np.float64)
        low, high = np.percentile(volume, PERCENTILES)
        top, left = (max(0, (n - CROP_SIZE) // 2) for n in volume.shape[1:])
        # The middles of equal parts, so that the ends of a scan, often empty, aren't taken.
        chosen = ((np.arange(per_stack) + 0.5) / per_stack * len(volume)).astype(int)
        for z in chosen:
            part = volume[z, top : top + CROP_SIZE, left : left + CROP_SIZE]
            scaled = np.clip((part - low) / (high - low), 0, 1) * DATA_RANGE
            slices.append((stack.kind, 1000 * stack_number + int(z), scaled))
    return slices


# --- tables -----------------------------------------------------------------------------------


def select(found: Iterable[Measured], method: str, images: str, noise_sigma: int) -> list[Measured]:
    wanted = method, images, noise_sigma
    return [m for m in found if (m.method, m.images, m.noise_sigma) == wanted]


def rows_of(keys: Sequence[str]) -> list[str]:
    """The paper's models, then others of the registry that were measured."""
    return [*PAPER["models"], *(k for k in keys if k not in PAPER["models"])]


def status(key: str) -> str:
    """Why there is no figure for a model of the paper."""
    if key == "cncl":
        return NOT_TRAINED
    return NOT_MEASURED if key in models() else NOT_REGISTERED


def published(key: str, what: str, noise_sigma: int, digits: int) -> str:
    value = PAPER["models"].get(key, {}).get(what, {}).get(str(noise_sigma))
    return MISSING if value is None else f"{value:.{digits}f}"


def table1(found: list[Measured], keys: Sequence[str], lpips_missing: str | None) -> dict[str, Any]:
    """Print PSNR, SSIM and LPIPS; return them with the published figures."""
    rows, content = [], {}
    for key in (INPUT, *rows_of(keys)):
        if key != INPUT and key not in keys:
            rows.append([title(key), status(key), *[""] * (len(NOISE_LEVELS) - 1)])
            content[key] = status(key)
            continue
        cells, content[key] = [], {}
        for level in NOISE_LEVELS:
            here = select(found, key, VAL, level)
            figures = {what: mean(here, what) for what in ("psnr", "ssim", "lpips")}
            cell = f"{figures['psnr']:.2f} / {figures['ssim']:.3f}"
            if lpips_missing is None:
                cell += f" / {figures['lpips']:.3f}"
            if key != INPUT:
                authors = published(key, "psnr", level, 2), published(key, "ssim", level, 3)
                cell += f" ({authors[0]} / {authors[1]})"
            cells.append(cell)
            content[key][str(level)] = {k: _number(v) for k, v in figures.items()} | {
                f"published_{what}": PAPER["models"].get(key, {}).get(what, {}).get(str(level))
                for what in ("psnr", "ssim")
            }
        rows.append([title(key), *cells])
    print_table(["model", *(f"noise {level}" for level in NOISE_LEVELS)], rows)
    return content


def against_published(found: list[Measured], keys: Sequence[str]) -> str:
    """A sentence on the cells of table 1 that don't reach what the authors' weights measure."""
    common = [m for m in found if m.images == VAL and m.number < PUBLISHED_CROPS]
    if len(select(common, INPUT, VAL, NOISE_LEVELS[0])) < PUBLISHED_CROPS:
        return f"Not compared with the published weights: it takes {PUBLISHED_CROPS} crops."
    below = [
        f"{key} {what} at {level}"
        for key, level, what in itertools.product(keys, NOISE_LEVELS, ("psnr", "ssim"))
        if mean(select(common, key, VAL, level), what)
        < PAPER["models"].get(key, {}).get(what, {}).get(str(level), -math.inf)
    ]
    return f"Below the published weights on the same crops: {', '.join(below) or 'no cell'}."


def classical() -> str:
    """What Perona-Malik measures without the error in the paper's code, as a sentence."""
    facts = PAPER["classical_with_correct_stencil"]
    cells = (f"{facts['psnr'][str(s)]:.2f} / {facts['ssim'][str(s)]:.3f}" for s in NOISE_LEVELS)
    source = facts["source"]
    return f"{source[0].upper()}{source[1:]}: {', '.join(cells)}."


def table2(found: list[Measured], keys: Sequence[str]) -> dict[str, Any]:
    """Print Q and the anisotropic share at noise 25."""
    kinds = [VAL, *dict.fromkeys(s.kind for s in STACKS)]
    kinds = [k for k in kinds if select(found, INPUT, k, STACK_NOISE)]
    rows, content = [], {}
    for key in (CLEAN, INPUT, *rows_of(keys)):
        if key not in (CLEAN, INPUT, *keys):
            rows.append([title(key), status(key), *[""] * (len(kinds) - 1)])
            content[key] = status(key)
            continue
        cells, content[key] = [], {}
        for kind in kinds:
            here = select(found, key, kind, STACK_NOISE)
            q, share = mean(here, "q"), mean(here, "share")
            cells.append(f"{q:.1f} / {share:.0f} %")
            content[key][kind] = {"q": _number(q), "share": _number(share), "slices": len(here)}
        rows.append(["without added noise" if key == CLEAN else title(key), *cells])
    header = [f"{k} ({len(select(found, INPUT, k, STACK_NOISE))} slices)" for k in kinds]
    print_table(["model", *header], rows)
    return content


def q_of_input(found: list[Measured]) -> dict[str, Any]:
    """Print what the paper and we find in the noisy input."""
    rows, content = [], {}
    for level in NOISE_LEVELS:
        here = select(found, INPUT, VAL, level)
        q, share, theirs = mean(here, "q"), mean(here, "share"), PAPER["q_of_input"][str(level)]
        rows.append([f"noise {level}", f"{q:.1f}", f"{share:.1f} %", f"{theirs}"])
        content[str(level)] = {"q": _number(q), "share": _number(share), "paper": theirs}
    print_table(["noisy input, val", "Q", "anisotropic share", "the paper's Q"], rows)
    return content


def q_below_classical(found: list[Measured], keys: Sequence[str]) -> list[str]:
    """Where a model's Q on real stacks is below that of tuned Perona-Malik."""
    if CLASSICAL not in keys:
        return []
    kinds = dict.fromkeys(s.kind for s in STACKS)
    q = {
        (key, kind): mean(select(found, key, kind, STACK_NOISE), "q")
        for key, kind in itertools.product(keys, kinds)
    }
    return [f"{key} on {kind}" for (key, kind), v in q.items() if v < q[CLASSICAL, kind]]


def table3(keys: Sequence[str]) -> dict[str, Any]:
    """Print parameters and multiply-accumulates at 256 x 256."""
    y, x = np.mgrid[:CROP_SIZE, :CROP_SIZE]
    clean = 127 + 60 * np.sin(x / 20) * np.cos(y / 15) + 40 * (x > y)
    noisy = add_noise(clean, 0, STACK_NOISE, STACK_SEED)
    rows, content = [], {}
    for key in rows_of(keys):
        theirs = PAPER["models"].get(key, {})
        authors = [theirs.get("parameters", MISSING), theirs.get("gmac", MISSING)]
        if key not in keys:
            rows.append([title(key), status(key), *[""] * 4, *authors])
            content[key] = {"ours": status(key)}
        else:
            cost = cost_of(key, noisy, STACK_NOISE)
            counts = (
                cost.once, cost.per_iteration, cost.total(PAPER_ITERATIONS),
                cost.total(cost.iterations),
            )  # fmt: skip
            cells = [f"{n / 1e9:.3f}" for n in counts]
            cells[-1] += f" ({cost.iterations})"
            rows.append([title(key), f"{cost.parameters:,}".replace(",", " "), *cells, *authors])
            content[key] = {"ours": vars(cost)}
        content[key] |= {"paper": {k: theirs.get(k) for k in ("parameters", "gmac")}}
    print_table(
        [
            "model", "parameters", "GMAC once", "per iteration", f"{PAPER_ITERATIONS} iterations",
            "by default (iterations)", "paper: parameters", f"GMAC, {PAPER_ITERATIONS} iterations",
        ],
        rows,
    )  # fmt: skip
    return content


def digest(key: str) -> str:
    """What tells one training of a model from another: the start of its weights' SHA-256."""
    weights = files("napari_learned_diffusion").joinpath("weights", f"{key}.safetensors")
    if not weights.is_file():
        return "no learned weights"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


# --- command ----------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_tables", description=__doc__)
    add_data_argument(parser)
    registered = tuple(models())
    of_paper = tuple(k for k in PAPER["models"] if k in registered)
    parser.add_argument("--crops", type=int, default=500, help="how many (default %(default)s)")
    parser.add_argument("--slices", type=int, default=4, help="of each stack (default %(default)s)")
    parser.add_argument(
        "--models", nargs="+", choices=registered, default=of_paper, metavar="KEY",
        help="which ones, of: " + ", ".join(registered),
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args(arguments)
    if not 1 <= options.crops <= 500:
        parser.error("--crops must be from 1 to 500")
    if options.slices < 1:
        parser.error("--slices must be at least 1")
    return options


def main(arguments: Sequence[str]) -> int:
    from napari_learned_diffusion.core.metrics import lpips_missing

    options = parse(arguments)
    keys, missing = options.models, lpips_missing()
    facts = provenance(
        "paper_tables",
        arguments,
        seeds=(
            f"noise of crop i of val at level s: numpy.random.default_rng([{VAL_SEED}, i, s]); of "
            f"slice z of stack k: [{STACK_SEED}, 1000 k + z, {STACK_NOISE}]; not clipped"
        ),
        protocol="outputs clipped to [0, 255], data range 255, noise level told",
        lpips="AlexNet, version 0.1" if missing is None else f"absent: {missing}",
    )
    facts["versions"]["lpips"] = version("lpips")
    facts["weights"] = {key: digest(key) for key in keys}
    print("# The tables of the paper\n")
    print_provenance(facts)

    tasks = list(itertools.product(val_crops(options.crops), NOISE_LEVELS))
    work = partial(measure_crop, options.data / "bsds500" / VAL, keys, missing is None)
    answers = parallel(work, tasks, options.processes)
    found = [m for some in progress(answers, len(tasks), "crops x levels") for m in some]
    slices = stack_slices(options.data / "stacks", options.slices)
    answers = parallel(partial(measure_slice, keys), slices, options.processes)
    found += [m for some in progress(answers, len(slices), "slices") for m in some]

    sentence, good = check_input([m for m in found if m.images == VAL])
    print(f"## Table 1: added noise on BSDS500 val, {options.crops} crops\n")
    print(sentence + "\n")
    measures = "PSNR in dB / SSIM" if missing else "PSNR in dB / SSIM / LPIPS"
    print(f"{measures}; in brackets {PAPER['sources']['published weights']}.\n")
    first = table1(found, keys, missing)
    comparison = against_published(found, keys)
    print(f"{classical()}\n\n{comparison}\n")

    print(f"## Table 2: Q and anisotropic share at noise {STACK_NOISE}\n")
    print(
        "Q of Zhu and Milanfar (significance 0.001, patches of 8 x 8) / percentage of patches that "
        "are anisotropic by a Sobel gradient of 5 x 5. The real stacks hold noise of their own.\n"
    )
    second = table2(found, keys)
    q_below = q_below_classical(found, keys)
    print(f"Q on the stacks below that of perona-malik: {', '.join(q_below) or 'nowhere'}.\n")
    print(f"Not comparable: {PAPER['q_of_input']['source']}.\n")
    inputs = q_of_input(found)

    print(f"## Table 3: cost at {CROP_SIZE} x {CROP_SIZE}\n")
    print(
        "Convolutions and matrix products only; elementwise operations, presmoothing and the "
        f"diffusion step are not counted. The paper's: {PAPER['sources']['cost']}.\n"
    )
    third = table3(keys)
    write_json(
        options.json,
        facts
        | {
            "sources": PAPER["sources"],
            "input_check": sentence,
            "table1": first,
            "against_published": comparison,
            "table2": second,
            "q_below_perona_malik": q_below,
            "q_of_input": inputs,
            "table3": third,
        },
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
