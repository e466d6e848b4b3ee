"""Time and memory of whole models, told the noise level, against BM3D and non-local means.

Run ``python -m benchmarks.model_speed``; it needs no data. Methods take turns on one slice, after a
warm-up of each, except that BM3D runs once. Memory is the process's highest resident memory while
it denoises one slice, interpreter and libraries included, in a new process for each model; of a GPU
it is what PyTorch held there at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import (
    PEERS,
    Image,
    bm3d_denoise,
    print_provenance,
    print_table,
    provenance,
    set_threads,
    write_json,
)
from benchmarks.quality import title
from benchmarks.speed import NOISE_SIGMA, noisy_slices

MODELS = ("perona-malik", "foe-splines", "unet", "conductance-unet-s", "conductance-unet")
ONCE = ("bm3d",)


def ours(key: str, device: str, precision: str = "float32") -> Callable[[Image], Any]:
    def run(plane: Image) -> Any:
        from napari_learned_diffusion import denoise

        return denoise(
            plane, model=key, noise_sigma=NOISE_SIGMA, device=device, precision=precision
        )

    return run


def methods(device: str) -> dict[str, Callable[[Image], Any]]:
    """Every method by its key; a model's with the ending ``-mixed`` looks in bfloat16."""
    nlm = PEERS["skimage-nlm"]
    peers: dict[str, Callable[[Image], Any]] = {
        "skimage-nlm": lambda plane: nlm.call(plane.astype(float), NOISE_SIGMA, **nlm.at(25)),
        "bm3d": lambda plane: bm3d_denoise(plane.astype(float), NOISE_SIGMA),
    }
    mixed = {f"{key}-mixed": ours(key, device, "mixed") for key in MODELS if key.startswith("cond")}
    found = {key: ours(key, device) for key in MODELS} | mixed
    return found | {key: peer for key, peer in peers.items() if PEERS[key].installed}


def seconds(size: int, repeats: int, device: str) -> dict[str, list[float]]:
    """Of each method on one slice, interleaved."""
    plane, known = noisy_slices(1, size)[0], methods(device)
    for key, run in known.items():
        run(plane[:64, :64] if key in ONCE else plane)
    taken: dict[str, list[float]] = {key: [] for key in known}
    for repeat in range(repeats):
        for key, run in known.items():
            if repeat and key in ONCE:
                continue
            start = time.perf_counter()
            run(plane)
            taken[key].append(time.perf_counter() - start)
    return taken


def peak_memory(key: str, size: int, threads: int, device: str) -> int:
    """Bytes, of a process that denoises one slice."""
    command = [sys.executable, "-m", "benchmarks.model_speed", "--memory-of", key]
    command += ["--memory-size", str(size), "--threads", str(threads), "--device", device]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return int(json.loads(answer.stdout.splitlines()[-1]))


def _name(device: str) -> str:
    from napari_learned_diffusion.core.device import device_name, resolve_device

    return device_name(resolve_device(device))


def _highest_memory(device: str) -> int:
    """Bytes that this process has held so far at most."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_reserved()
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else 1024 * highest


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_speed", description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="of the slice that is timed")
    parser.add_argument("--memory-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="of our models (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    if options.memory_of:
        methods(options.device)[options.memory_of](noisy_slices(1, options.memory_size)[0])
        print(json.dumps(_highest_memory(options.device)))
        return 0
    facts = provenance(
        "model_speed", arguments, threads=options.threads, device=_name(options.device)
    )
    print("# Speed and memory of whole models\n")
    print_provenance(facts)
    taken = seconds(options.size, options.repeats, options.device)
    median = {key: float(np.median(values)) for key, values in taken.items()}
    memory = {
        key: peak_memory(key, options.memory_size, options.threads, options.device)
        for key in taken
        if key not in PEERS
    }
    rows = []
    for key, value in median.items():
        faster = f"{median['bm3d'] / value:.1f}" if "bm3d" in median else "not installed"
        peak = f"{memory[key] / 1e9:.2f}" if key in memory else ""
        rows.append([title(key), f"{value:.3f}", faster, peak])
    header = [f"s for {options.size}²", "BM3D's time / it", f"peak GB at {options.memory_size}²"]
    print_table(["method", *header], rows)
    write_json(options.json, facts | {"seconds": taken, "peak_bytes": memory})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
