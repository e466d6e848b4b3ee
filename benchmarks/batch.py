"""Throughput and memory of a batch: in memory and out of core, in one process and in several.

Run ``python -m benchmarks.batch``; it generates its own data. README.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from benchmarks._common import (
    print_provenance,
    print_table,
    provenance,
    set_threads,
    write_json,
)

if TYPE_CHECKING:
    from napari_learned_diffusion.config import DiffusionConfig
    from napari_learned_diffusion.jobs.batch_engines import Engine

NOISE_SIGMA = 25.0
WAYS = {
    "memory": "in memory, 1 process",
    "out-of-core": "out of core, 1 process",
    "workers": "out of core, {workers} workers",
}


@dataclass(frozen=True)
class Figures:
    """What one way took.

    Parameters
    ----------
    seconds
        From file to file; workers are there already.
    outside
        Part of the workers' time, from 0 to 1, that wasn't spent in the solver.
    peak_bytes
        Highest resident memory of the process that reads and writes, beyond what was resident after
        a warm-up on a small stack: interpreter, libraries and model.
    """

    seconds: float
    outside: float
    peak_bytes: int


def generate(path: Path, shape: tuple[int, int, int], seed: int) -> None:
    """Write waves and a chessboard with Gaussian noise, 16-bit, slice by slice."""
    import dask.array as da

    from napari_learned_diffusion.files import Volume, write

    y, x = np.ogrid[: shape[1], : shape[2]]
    clean = 1000 + 400 * np.sin(y / 37) * np.cos(x / 53) + 200 * ((y // 64 + x // 64) % 2)
    clean = clean.astype(np.float32)

    def plane(block_info: dict[int, dict[str, list[tuple[int, int]]]]) -> np.ndarray:
        number = block_info[None]["array-location"][0][0]
        rng = np.random.default_rng([seed, number])
        noise = rng.standard_normal(shape[1:], np.float32)
        return (clean + np.float32(NOISE_SIGMA) * noise).round().astype(np.uint16)[None]

    chunks = ((1,) * shape[0], (shape[1],), (shape[2],))
    data = da.map_blocks(plane, chunks=chunks, dtype=np.uint16, meta=np.empty((0,) * 3, np.uint16))
    write(path, Volume(data, "ZYX", (1.0,) * 3, ("micrometer",) * 3, "stack"))


def measure(way: str, source: Path, out: Path, options: argparse.Namespace) -> Figures:
    """Denoise a file in one of the ways, in this process."""
    from napari_learned_diffusion.config import DiffusionConfig
    from napari_learned_diffusion.core.noise import Gaussian

    config = DiffusionConfig(options.model, options.iterations, Gaussian(NOISE_SIGMA), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.tif"
        generate(small, (2, 64, 64), options.seed)
        _denoise("memory", small, Path(folder) / "out", config, options)
    before = psutil.Process().memory_info().rss
    seconds, busy, processes = _denoise(way, source, out, config, options)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
    return Figures(seconds, 1 - busy / processes / seconds, max(0, peak - before))


def _denoise(
    way: str, source: Path, out: Path, config: DiffusionConfig, options: argparse.Namespace
) -> tuple[float, float, int]:
    """Seconds from file to file, those in the solver of all processes, and how many these are."""
    from napari_learned_diffusion.config import TilingConfig
    from napari_learned_diffusion.files import read, write
    from napari_learned_diffusion.jobs.batch import BatchConfig, denoise_batch
    from napari_learned_diffusion.jobs.batch_engines import ClusterEngine
    from napari_learned_diffusion.jobs.batch_sources import find_sources
    from napari_learned_diffusion.jobs.denoise import denoise_stack
    from napari_learned_diffusion.jobs.progress import run

    if way == "memory":
        start = time.perf_counter()
        volume = read(source, lazy=False)
        done = run(denoise_stack(volume.data, config))
        out.mkdir()
        write(out / source.name, replace(volume, data=done.image))
        return time.perf_counter() - start, done.report.seconds, 1
    engine, processes = None, 1
    if way == "workers":
        processes = options.workers
        engine = ClusterEngine(config, TilingConfig(), workers=processes)
        _warm_up(engine, config)
    summary = run(
        denoise_batch(find_sources([source], out), BatchConfig(out), config, engine=engine)
    )
    if summary.count("failed"):
        raise RuntimeError(summary.files[0].message)
    return summary.seconds, summary.solver_seconds, processes


def _warm_up(engine: Engine, config: DiffusionConfig) -> None:
    """Let every worker import and compile what it needs."""
    from napari_learned_diffusion.jobs.batch_engines import PlaneTask

    plane = np.random.default_rng(0).normal(1000, NOISE_SIGMA, (64, 64)).astype(np.uint16)
    task = PlaneTask("warm-up", config, None, (1.0, 1.0))
    waiting = {engine.submit(plane, task, False) for _ in range(2 * engine.slots)}
    while waiting:
        waiting -= set(engine.wait(waiting, seconds=1))


def measure_apart(way: str, source: Path, arguments: Sequence[str]) -> Figures:
    """`measure` in a new process, so that no way inherits the memory of another."""
    command = [sys.executable, "-m", "benchmarks.batch", *arguments]
    command += ["--way", way, "--source", str(source)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024, help="edge length of a slice, in pixels")
    parser.add_argument("--model", default="perona-malik")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--way", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    set_threads(1)
    if options.way:
        with tempfile.TemporaryDirectory(dir=options.source.parent) as folder:
            figures = measure(options.way, options.source, Path(folder) / "out", options)
        print(json.dumps(asdict(figures)))
        return 0

    shape = (options.slices, options.size, options.size)
    pixels = float(np.prod(shape))
    facts = provenance(
        "batch",
        arguments,
        seeds=f"slice i: numpy.random.default_rng([{options.seed}, i])",
        protocol=(
            f"{shape[0]} slices of {shape[1]} x {shape[2]}, uint16, {2 * pixels / 2**20:.0f} MiB, "
            f"TIFF to TIFF; {options.model}, {options.iterations} iterations, noise given; "
            "1 thread a process"
        ),
    )
    print("# Batch\n")
    print_provenance(facts)
    found = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "stack.tif"
        generate(source, shape, options.seed)
        for way in options.ways:
            found[way] = measure_apart(way, source, arguments)
    print_table(
        ["way", "s", "megapixels/s", "peak memory, MiB", "outside the solver"],
        [
            [
                WAYS[way].format(workers=options.workers),
                f"{figures.seconds:.1f}",
                f"{pixels / 1e6 / figures.seconds:.2f}",
                f"{figures.peak_bytes / 2**20:.0f}",
                f"{100 * figures.outside:.0f} %",
            ]
            for way, figures in found.items()
        ],
    )
    results = {way: asdict(figures) for way, figures in found.items()}
    write_json(options.json, facts | {"pixels": pixels, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
