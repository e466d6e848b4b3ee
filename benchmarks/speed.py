"""Time and working memory of the solver against the same equation in other libraries.

Run ``python -m benchmarks.speed``; it needs no data. README.md says what is compared.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._common import (
    PEERS,
    print_provenance,
    print_table,
    provenance,
    set_threads,
    write_json,
)

TAU = 0.1
NOISE_SIGMA = 25.0
CONTRAST = 1.0
MEMORY_LIMIT = 8
"""Working memory that ours may take, as a multiple of the slice in float32."""

MEMORY_ERROR = 2**20
"""Bytes by which resident memory may be off: pages, stacks of threads, pools of small objects."""

Stack = NDArray[np.float32]


@dataclass(frozen=True)
class Method:
    """One way to diffuse a slice.

    Parameters
    ----------
    title
        Name in the tables.
    library
        Module that must be importable.
    load
        From a float32 slice to the library's own image. Not timed.
    diffuse
        From that image and a number of iterations to the result.
    ours
        Whether the limit on working memory applies.
    """

    title: str
    library: str
    load: Callable[[Stack], Any]
    diffuse: Callable[[Any, int], Any]
    ours: bool = False


def _tensor(plane: Stack) -> Any:
    import torch

    return torch.from_numpy(plane)[None, None]


def _solver(backend: str) -> Callable[[Any, int], Any]:
    def diffuse(u: Any, iterations: int) -> Any:
        from napari_learned_diffusion.core.diffusivity.perona_malik import PeronaMalik
        from napari_learned_diffusion.core.noise import Gaussian
        from napari_learned_diffusion.core.schemes import Explicit
        from napari_learned_diffusion.core.solve import iterate

        state = None
        for state in iterate(  # noqa: B007
            u,
            PeronaMalik(CONTRAST),
            noise=Gaussian(NOISE_SIGMA),
            scheme=Explicit(TAU),
            iterations=iterations,
            backend=backend,  # type: ignore[arg-type]
        ):
            pass
        return None if state is None else state.u

    return diffuse


def _automatic(plane: Stack, _: int) -> Any:
    from napari_learned_diffusion import denoise

    return denoise(plane, model="perona-malik", device="cpu")


def _itk_image(plane: Stack) -> Any:
    import SimpleITK

    return SimpleITK.GetImageFromArray(plane)


def _itk(image: Any, iterations: int) -> Any:
    import SimpleITK

    return SimpleITK.GradientAnisotropicDiffusion(
        image, timeStep=TAU, conductanceParameter=1.0, numberOfIterations=iterations
    )


def _three_bytes(plane: Stack) -> Any:
    return np.repeat(np.clip(np.rint(plane), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _opencv(image: Any, iterations: int) -> Any:
    import cv2

    k = CONTRAST * NOISE_SIGMA / 255  # a part of the range of bytes
    return cv2.ximgproc.anisotropicDiffusion(image, TAU, k, iterations)


def _medpy(plane: Stack, iterations: int) -> Any:
    from medpy.filter.smoothing import anisotropic_diffusion

    return anisotropic_diffusion(
        plane, niter=iterations, kappa=CONTRAST * NOISE_SIGMA, gamma=TAU, option=2
    )


def _as_is(plane: Stack) -> Stack:
    return plane


METHODS: dict[str, Method] = {
    "fused": Method("**perona-malik, fused**", "torch", _tensor, _solver("fused"), True),
    "torch": Method("**perona-malik, torch**", "torch", _tensor, _solver("torch"), True),
    "automatic": Method("**denoise(), everything automatic**", "torch", _as_is, _automatic, True),
    "itk": Method(PEERS["itk-gradient"].title, "SimpleITK", _itk_image, _itk),
    "opencv": Method(PEERS["opencv-diffusion"].title + " †", "cv2", _three_bytes, _opencv),
    "medpy": Method(PEERS["medpy"].title, "medpy", _as_is, _medpy),
}


def is_installed(method: Method) -> bool:
    from importlib.util import find_spec

    return find_spec(method.library) is not None


def noisy_slices(count: int, size: int) -> Stack:
    """Smooth structure of 0-255 with edges, and noise: ``(count, size, size)``."""
    rng = np.random.default_rng([3, count, size])
    y, x = np.mgrid[:size, :size] / size
    clean = 127 + 60 * np.sin(9 * x) * np.cos(7 * y) + 50 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1)
    noise = rng.normal(0, NOISE_SIGMA, (count, size, size))
    return (clean + noise).astype(np.float32)


# --- time ---------------------------------------------------------------------------------------


def seconds(
    keys: Sequence[str], stack: Stack, iterations: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds for all slices, of each repeat; the methods take turns, after a warm-up of each."""
    images = {key: [METHODS[key].load(plane) for plane in stack] for key in keys}
    for key in keys:
        METHODS[key].diffuse(images[key][0], iterations)
    taken: dict[str, list[float]] = {key: [] for key in keys}
    for _ in range(repeats):
        for key in keys:
            start = time.perf_counter()
            for image in images[key]:
                METHODS[key].diffuse(image, iterations)
            taken[key].append(time.perf_counter() - start)
    return taken


# --- memory -------------------------------------------------------------------------------------


def working_memory(key: str, size: int, iterations: int, threads: int) -> int:
    """Bytes that a method needs at its peak beyond its input, result counted; in a new process."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--memory-of", key, "--sizes", str(size),
         "--iterations", str(iterations), "--threads", str(threads)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(json.loads(answer.stdout.splitlines()[-1])["bytes"])


def measure_memory(key: str, size: int, iterations: int) -> int:
    """The same in this process, which should have done nothing else.

    Libraries allocate in C++, numba and numpy, so only the process's resident memory sees it all:
    its high-water mark during the call, less what was resident before. A warm-up on a small slice
    pays for imports, compiled kernels and thread pools first.
    """
    method = METHODS[key]
    method.diffuse(method.load(noisy_slices(1, 64)[0]), iterations)
    image = method.load(noisy_slices(1, size)[0])
    gc.collect()
    if sys.platform.startswith("linux"):
        # Memory that is free but still resident would be used again, and not be counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    result = method.diffuse(image, iterations)
    peak = _resident("VmHWM") - before
    del result
    return peak


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return 1024 * int(line.split()[1])
    import resource

    # No current value there, only the high-water mark: exact as long as the call sets a new one.
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else 1024 * highest


# --- tables -------------------------------------------------------------------------------------


def report(shape: tuple[int, int], taken: dict[str, list[float]], memory: dict[str, int],
           keys: Sequence[str], iterations: int) -> None:  # fmt: skip
    count, size = shape
    print(f"## {f'{count} slices of ' if count > 1 else ''}{size} x {size}\n")
    median = {key: float(np.median(values)) for key, values in taken.items()}
    rows = []
    for key in keys:
        if key not in median:
            rows.append([METHODS[key].title, "not installed", *[""] * 5])
            continue
        of_all, automatic = 1e3 * median[key], key == "automatic"
        ratios = [
            f"{median[ours] / median[key]:.2f}" if ours in median and not automatic else ""
            for ours in ("fused", "torch")
        ]
        multiple = ""
        if key in memory:
            multiple = f"{memory[key] / (4 * size * size):.1f}"
            if METHODS[key].ours and memory[key] > MEMORY_LIMIT * 4 * size**2 + MEMORY_ERROR:
                multiple += " (!)"
        rows.append([
            METHODS[key].title,
            f"{of_all / count:.2f}",
            "" if automatic else f"{of_all / count / iterations:.3f}",
            *ratios,
            multiple,
            f"{of_all:.0f}",
        ])  # fmt: skip
    header = ["method", "ms a slice", "ms an iteration", "fused / it", "torch / it"]
    print_table([*header, "memory, slices", "ms in all"], rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512, 2048])
    parser.add_argument(
        "--stack", type=int, nargs=2, default=[24, 512], metavar=("SLICES", "SIZE"),
        help="a stack too; 0 slices: none (default 24 512)",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, help="of every method (default: 3 to 25, by size)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--memory-of", choices=tuple(METHODS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    set_threads(options.threads)
    if options.memory_of:
        size = options.sizes[0]
        peak = measure_memory(options.memory_of, size, options.iterations)
        print(json.dumps({"bytes": peak}))
        return 0

    facts = provenance(
        "speed",
        arguments,
        seeds="slices: numpy.random.default_rng([3, slices, size])",
        protocol=(
            f"{options.iterations} iterations, float32, tau {TAU}, K {CONTRAST}, no presmoothing, "
            f"{options.threads} threads; interleaved repeats, medians"
        ),
    )
    print("# Speed and memory\n")
    print_provenance(facts)
    keys = [key for key in options.methods if is_installed(METHODS[key])]
    shapes = [(1, size) for size in options.sizes]
    if options.stack[0]:
        shapes.append((options.stack[0], options.stack[1]))
    results = []
    known: dict[int, dict[str, int]] = {}
    for count, size in shapes:
        # About as much time for every shape, whatever its size.
        repeats = options.repeats or int(np.clip(2e7 / (count * size**2), 3, 25))
        taken = seconds(keys, noisy_slices(count, size), options.iterations, repeats)
        if not options.no_memory and size not in known:
            known[size] = {
                k: working_memory(k, size, options.iterations, options.threads) for k in keys
            }
        memory = known.get(size, {})
        report((count, size), taken, memory, options.methods, options.iterations)
        results.append(
            {"slices": count, "size": size, "seconds": taken, "working_bytes_a_slice": memory}
        )
    print(
        "memory: peak beyond the input, the result counted, in float32 slices; (!) beyond "
        f"{MEMORY_LIMIT}.\n† takes three channels of bytes and nothing else: three times the data, "
        "and rounds in every step."
    )
    write_json(options.json, facts | {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
