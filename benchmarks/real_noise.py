"""Real pairs of noisy and averaged images, denoised with default settings and told nothing.

Run ``python -m benchmarks.real_noise --data FOLDER``; README.md has the conventions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._common import (
    PEERS,
    add_data_argument,
    bm3d_denoise,
    print_provenance,
    print_table,
    provenance,
    write_json,
)
from napari_learned_diffusion.core.noise import NoiseModel

INPUT = "input"
STABILISED = "-vst"
"""Ending of the keys of peers that are given our noise model through a stabilising transform."""

PERCENTILES = 0.1, 99.9
"""What counts as the range of a reference slice: robust against single bright spots."""


@dataclass(frozen=True)
class Pair:
    """A noisy stack, and what it would look like without most of the noise.

    Parameters
    ----------
    title
        Name in the tables.
    noisy, reference
        File names in ``stacks/``, without ending.
    only_flat
        Whether only flat areas of the reference count, because edges differ for other reasons.
    expected
        PSNR of the input over the first six slices, as DESIGN.md states it.
    note
        What to beware of.
    """

    title: str
    noisy: str
    reference: str
    only_flat: bool = False
    expected: float | None = None
    note: str = ""


PAIRS: dict[str, Pair] = {
    **{
        f"w2s-{c}": Pair(
            f"W2S channel {c}",
            f"fluo_w2s_ch{c}_avg1_noisy",
            f"fluo_w2s_ch{c}_avg400_ref",
            expected=expected,
            note="widefield fluorescence; every field of view was scaled to bytes by itself",
        )
        for c, expected in enumerate((19.9, 17.1, 18.9))
    },
    "fmd": Pair(
        "FMD BPAE",
        "fluo_fmd_bpae3ch_raw_noisy",
        "fluo_fmd_bpae3ch_avg50_ref",
        expected=25.0,
        note="confocal, three channels; 0.5 to 1 pixel of drift in y limits every method",
    ),
    "dwi": Pair(
        "diffusion MRI b1000",
        "mri_dwi_b1000_single_noisy",
        "mri_dwi_b1000_mean12_ref",
        expected=30.3,
        note="the reference averages 12 directions, whose contrasts differ; whole slices count",
    ),
    "ct": Pair(
        "CT phantom, flat areas",
        "ct_phantom_head_1mm_sharp_noisy",
        "ct_phantom_head_1mm_smooth_ref",
        only_flat=True,
        note="sharp against smooth kernel of one scan: edges differ, and the noise is correlated",
    ),
}


@dataclass
class Result:
    """One method on one pair."""

    psnr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)


# --- methods ------------------------------------------------------------------------------------

Slices = Iterator[tuple[NDArray[Any], float, str]]
"""Denoised slices, the seconds that each took and the noise that was found."""


def with_model(key: str, options: argparse.Namespace, stack: NDArray[Any], count: int) -> Slices:
    """A model of ours; everything automatic. The noise is estimated from the whole stack."""
    from napari_learned_diffusion.config import DiffusionConfig
    from napari_learned_diffusion.jobs.denoise import denoise_stack, prepare
    from napari_learned_diffusion.jobs.progress import run

    start = time.perf_counter()
    config = DiffusionConfig(model=key, device=options.device, noise_scope=options.noise_scope)
    prepared = prepare(stack, config)
    result = run(denoise_stack(stack[:count], prepared=prepared)).image
    seconds = (time.perf_counter() - start) / count
    noise = prepared.noise.describe()
    if prepared.slice_by_slice:
        noise = f"another for each slice (together: {noise})"
    for plane in result:
        yield plane, seconds, noise


def with_peer(
    denoise: Callable[[NDArray[Any], float], NDArray[Any]],
    stack: NDArray[Any],
    count: int,
) -> Slices:
    """Another library's method, slice by slice, told scikit-image's estimate of the noise level."""
    from skimage.restoration import estimate_sigma

    for plane in stack[:count].astype(np.float64):
        start = time.perf_counter()
        noise_sigma = float(estimate_sigma(plane))
        result = denoise(plane, noise_sigma)
        seconds = time.perf_counter() - start
        yield np.asarray(result), seconds, f"standard deviation {noise_sigma:.4g}"


def with_stabilised_peer(
    denoise: Callable[[NDArray[Any], float], NDArray[Any]],
    stack: NDArray[Any],
    count: int,
) -> Slices:
    """Another library's method on intensities stabilised by our noise model, and back."""
    from napari_learned_diffusion.jobs.prepare import prepare

    whole = prepare(stack)
    for plane in stack[:count]:
        start = time.perf_counter()
        noise = (prepare(plane) if whole.slice_by_slice else whole).noise
        stabilised = noise.stabilise(plane.astype(np.float64))
        result = unstabilise(noise, denoise(stabilised, 1.0), plane)
        yield result, time.perf_counter() - start, f"ours: {noise.describe()}"


def unstabilise(
    noise: NoiseModel, stabilised: NDArray[np.float64], plane: NDArray[Any]
) -> NDArray[np.float64]:
    """The intensities whose noisy copies have these mean stabilised values.

    The exact unbiased inverse (Mäkitalo and Foi, IEEE Trans. Image Process. 22, 2013), tabulated by
    Gauss-Hermite quadrature over the range of the ``plane``.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    u = np.linspace(float(plane.min()), float(plane.max()), 4000)
    noisy = u[:, None] + np.sqrt(noise.variance(u))[:, None] * nodes
    means = noise.stabilise(noisy) @ (weights / weights.sum())
    return np.interp(stabilised, np.maximum.accumulate(means), u)


def methods(options: argparse.Namespace | None = None) -> dict[str, Callable[..., Slices] | None]:
    """Every model and the two peers, these with two noise levels each, by key.

    ``None`` where a library isn't installed.
    """
    from napari_learned_diffusion.core.diffusivity import REGISTRY

    ours = {key: partial(with_model, key, options) for key in REGISTRY}
    nlm = partial(PEERS["skimage-nlm"].call, **PEERS["skimage-nlm"].at(25))
    peers = {
        key + ending: partial(with_noise, denoise) if PEERS[key].installed else None
        for key, denoise in (("skimage-nlm", nlm), ("bm3d", bm3d_denoise))
        for ending, with_noise in (("", with_peer), (STABILISED, with_stabilised_peer))
    }
    return ours | peers


# --- measuring ----------------------------------------------------------------------------------


def flat_area(reference: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the reference is flat and isn't air; nowhere, in slices that hold no such area.

    There its gradient, smoothed by 2 pixels, is below 0.2 % of its range per pixel, and so it is 3
    pixels all around, out of the reach of the sharp kernel's ringing. Air is what lies below a
    fifth of the range; areas of less than 200 pixels are left out.
    """
    from scipy import ndimage

    low, high = np.percentile(reference, PERCENTILES)
    steepness = ndimage.gaussian_gradient_magnitude(reference, 2)
    flat = (steepness < 0.002 * (high - low)) & (reference > low + 0.2 * (high - low))
    labels, _ = ndimage.label(ndimage.binary_erosion(flat, iterations=3))
    sizes = np.bincount(labels.ravel())
    large: NDArray[np.bool_] = sizes >= 200
    large[0] = False
    return large[labels]


def slice_psnr(
    image: NDArray[Any], reference: NDArray[np.float64], mask: NDArray[np.bool_] | None
) -> float:
    """PSNR after an affine fit, in the reference's range between `PERCENTILES`."""
    from napari_learned_diffusion.core.metrics import affine_fit, psnr

    low, high = np.percentile(reference, PERCENTILES)
    u = image.astype(np.float64)
    if mask is not None:
        # Flat areas of little contrast: a fit there would shrink the noise. The pair has one scale.
        return psnr(u[mask], reference[mask], data_range=high - low)
    return psnr(affine_fit(u, reference), reference, data_range=high - low)


def read_pair(folder: Path, pair: Pair) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The noisy stack in its own dtype, and the reference; ``(n, h, w)`` both."""
    import tifffile

    noisy = tifffile.imread(folder / f"{pair.noisy}.tif")
    reference = tifffile.imread(folder / f"{pair.reference}.tif").astype(np.float64)
    return noisy.reshape(-1, *noisy.shape[-2:]), reference.reshape(-1, *reference.shape[-2:])


def measure(pair: Pair, options: argparse.Namespace) -> dict[str, Result]:
    """All methods on one pair."""
    noisy, reference = read_pair(options.data / "stacks", pair)
    count = min(options.max_slices or len(noisy), len(noisy))
    masks = [flat_area(r) if pair.only_flat else None for r in reference[:count]]

    def judge(slices: Slices) -> Result:
        result = Result()
        for (image, seconds, noise), clean, mask in zip(slices, reference, masks, strict=False):
            if mask is not None and not mask.any():
                continue
            result.psnr.append(slice_psnr(image, clean, mask))
            result.seconds.append(seconds)
            result.noise.append(noise)
        return result

    results = {INPUT: judge((plane, 0.0, "") for plane in noisy[:count])}
    usable = methods(options)
    for key in options.methods:
        denoise = usable[key]
        if denoise is None:
            continue
        print(f"{pair.title}: {key}", file=sys.stderr)
        few = min(count, options.bm3d_slices) if key.startswith("bm3d") else count
        if few:
            results[key] = judge(denoise(noisy, few))
    return results


# --- tables -------------------------------------------------------------------------------------


def title(key: str) -> str:
    if key == INPUT:
        return "noisy input"
    if key.endswith(STABILISED):
        return f"{PEERS[key.removesuffix(STABILISED)].title}, with our noise model"
    return f"{PEERS[key].title}, with estimate_sigma" if key in PEERS else f"**{key}**"


def mean(values: Sequence[float]) -> str:
    """Of no slices (none with a flat area, say), a dash."""
    return f"{np.mean(values):.2f}" if values else "–"


def print_pair(pair: Pair, results: dict[str, Result], keys: Sequence[str]) -> None:
    print(f"## {pair.title}\n\n{pair.note[0].upper()}{pair.note[1:]}.\n")
    counts = {len(r.psnr) for r in results.values()}
    few = min(counts)  # more than one count: a slow method was run on fewer slices
    rows = []
    for key in (INPUT, *keys):
        r = results.get(key)
        if r is None:
            rows.append([title(key), "not installed", *[""] * (3 + len(counts) - 1)])
            continue
        psnr = [mean(r.psnr[:few])] if len(counts) > 1 else []
        psnr.append(mean(r.psnr) if len(r.psnr) == max(counts) else "")
        seconds = mean(r.seconds) if key != INPUT else ""
        found = ", ".join([*r.noise[:1], *(["…"] if len(set(r.noise)) > 1 else [])])
        rows.append([title(key), *psnr, seconds, str(len(r.psnr)), found])
    first = [f"PSNR, first {few}"] if len(counts) > 1 else []
    print_table(["method", *first, "PSNR", "s a slice", "slices", "noise found"], rows)


def check_input(results: dict[str, dict[str, Result]]) -> tuple[str, bool]:
    """Whether the noisy input measures what DESIGN.md says, over the first six slices."""
    parts, good = [], True
    for key, of_pair in results.items():
        expected = PAIRS[key].expected
        values = of_pair[INPUT].psnr[:6]
        complete = len(values) == 6 or (key == "fmd" and len(values) == 3)
        if expected is None or not complete:
            continue
        found = float(np.mean(values))
        good &= abs(found - expected) < 0.06
        parts.append(f"{PAIRS[key].title} {found:.2f} ({expected})")
    if not parts:
        return "Input check: not possible, it takes six slices of a pair that has a figure.", True
    verdict = "as they must be" if good else "WRONG: another convention or other data"
    return f"Input over the first six slices (expected): {', '.join(parts)}: {verdict}.", good


def summary(results: dict[str, dict[str, Result]], keys: Sequence[str]) -> None:
    rows = []
    for key in (INPUT, *keys):
        cells = []
        for of_pair in results.values():
            r, all_of_them = of_pair.get(key), len(of_pair[INPUT].psnr)
            if r is None:
                cells.append("–")
            else:
                star = "" if len(r.psnr) == all_of_them else f" (first {len(r.psnr)})"
                cells.append(mean(r.psnr) + star)
        rows.append([title(key), *cells])
    print("## Summary: PSNR in dB\n")
    print_table(["method", *(PAIRS[k].title for k in results)], rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_noise", description=__doc__)
    add_data_argument(parser)
    everything = tuple(methods())
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS))
    parser.add_argument(
        "--methods", nargs="+", choices=everything, default=everything, metavar="KEY",
        help="which ones, of: " + ", ".join(everything),
    )  # fmt: skip
    parser.add_argument(
        "--max-slices", type=int, default=6, help="of each pair; 0 is all (default %(default)s)"
    )
    parser.add_argument(
        "--bm3d-slices", type=int, default=2, help="BM3D takes 20 s for each (default %(default)s)"
    )
    parser.add_argument(
        "--noise-scope", choices=("auto", "stack", "slice"), default="auto",
        help="one noise model for a stack or for each slice (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="for our models (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    facts = provenance(
        "real_noise",
        arguments,
        seeds="none: nothing is random",
        protocol=(
            "affine intensity fit of each slice to its reference (not in the flat areas of CT), "
            "data range from percentile 0.1 to 99.9 of the reference slice, mean over the slices"
        ),
    )
    print("# Real noise\n")
    print_provenance(facts)
    results = {}
    for key in options.pairs:
        results[key] = measure(PAIRS[key], options)
        print_pair(PAIRS[key], results[key], options.methods)
    summary(results, options.methods)
    sentence, good = check_input(results)
    print(sentence)
    write_json(
        options.json,
        facts
        | {
            "input_check": sentence,
            "results": {
                pair: {key: vars(r) for key, r in of_pair.items()}
                for pair, of_pair in results.items()
            },
        },
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
