"""What the benchmarks share: the protocol's crops, the peers, provenance and tables."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float64]

CROPS_FILE = Path(__file__).with_name("val500.csv")
CROP_SIZE = 256
DATA_RANGE = 255.0
VAL_SEED, TRAIN_SEED = 1, 2
"""First entry of the seeds `[entry, crop, noise level]`."""


# --- threads ----------------------------------------------------------------------------------


def set_threads(n: int) -> None:
    """Let every library use ``n`` threads; those that read it at import only before they are."""
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA"):
        os.environ[f"{name}_NUM_THREADS"] = str(n)
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(n)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(n)


# --- the crops of the protocol ----------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """One square of `CROP_SIZE` pixels of a BSDS500 image."""

    number: int
    image: str
    top: int
    left: int


def val_crops(count: int) -> list[Crop]:
    """The first ``count`` crops of val500.csv; the first 100 hold one per image."""
    with CROPS_FILE.open(newline="") as lines:
        rows = [Crop(int(n), name, int(y), int(x)) for n, name, y, x in list(csv.reader(lines))[1:]]
    return rows[:count]


def luma(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``(h, w, 3)`` RGB to grey, ``(h, w)``: OpenCV's BGR2GRAY, rounded to bytes."""
    return np.rint(rgb @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)


def read_crop(folder: Path, crop: Crop) -> Image:
    """The clean crop, in float64, out of a folder of JPEG images."""
    from skimage.io import imread

    grey = luma(imread(folder / f"{crop.image}.jpg"))
    y, x = crop.top, crop.left
    return grey[y : y + CROP_SIZE, x : x + CROP_SIZE].astype(np.float64)


def add_noise(clean: Image, crop: int, noise_sigma: int, seed: int = VAL_SEED) -> Image:
    """White Gaussian noise of the protocol, the same for every method; not clipped."""
    rng = np.random.default_rng([seed, crop, noise_sigma])
    return clean + rng.normal(0, noise_sigma, clean.shape)


# --- peers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another library's denoiser.

    Parameters
    ----------
    title
        Name in the tables.
    library
        Module that must be importable.
    distributions
        Names that it may be installed under, for its version.
    call
        ``call(noisy, noise_sigma, **parameters)``, on the 0-255 scale, ``(h, w)`` to ``(h, w)``.
    tuned
        Parameters at noise 15, 25 and 50: the best of ``grid`` in PSNR on BSDS500 train.
    grid
        What was tried (`quality.py --tune`).
    """

    title: str
    library: str
    distributions: tuple[str, ...]
    call: Callable[..., Image]
    tuned: dict[int, dict[str, Any]]
    grid: dict[str, tuple[Any, ...]]

    @property
    def installed(self) -> bool:
        return find_spec(self.library.partition(".")[0]) is not None

    def at(self, noise_sigma: float) -> dict[str, Any]:
        """The parameters tuned at the nearest noise level."""
        return self.tuned[min(self.tuned, key=lambda s: abs(s - noise_sigma))]

    def __call__(self, noisy: Image, noise_sigma: float) -> Image:
        return np.asarray(self.call(noisy, noise_sigma, **self.at(noise_sigma)), dtype=np.float64)


def _tv(noisy: Image, noise_sigma: float, weight: float) -> Image:
    from skimage.restoration import denoise_tv_chambolle

    return denoise_tv_chambolle(noisy, weight=weight * noise_sigma, max_num_iter=200)


def non_local_means(noisy: Image, noise_sigma: float, h: float, patch: int, reach: int) -> Image:
    """scikit-image's fast non-local means, told the noise level; any intensity scale."""
    from skimage.restoration import denoise_nl_means

    return denoise_nl_means(
        noisy,
        h=h * noise_sigma,
        sigma=noise_sigma,
        patch_size=patch,
        patch_distance=reach,
        fast_mode=True,
        preserve_range=True,
    )


def _wavelet(noisy: Image, noise_sigma: float, wavelet: str, level: float, method: str) -> Image:
    import dask
    from skimage.restoration import cycle_spin, denoise_wavelet

    # denoise_wavelet clips floats to [-1, 1] unless they are scaled by itself: 0-255 becomes 0-0.5.
    options = {
        "sigma": level * noise_sigma / 512,
        "wavelet": wavelet,
        "method": method,
        "rescale_sigma": False,
    }
    with dask.config.set(scheduler="synchronous"):  # its own argument was renamed in 0.26
        return 512 * cycle_spin(noisy / 512, denoise_wavelet, max_shifts=3, func_kw=options)


def _itk(name: str) -> Callable[..., Image]:
    def diffuse(noisy: Image, _: float, conductance: float, iterations: int) -> Image:
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(
            int(os.environ.get("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", os.cpu_count() or 1))
        )
        image = SimpleITK.GetImageFromArray(noisy.astype(np.float32))
        result = getattr(SimpleITK, name)(
            image,
            timeStep=0.125,
            conductanceParameter=conductance,
            numberOfIterations=iterations,
        )
        return SimpleITK.GetArrayFromImage(result)

    return diffuse


def _bytes(noisy: Image) -> NDArray[np.uint8]:
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _opencv_diffusion(
    noisy: Image, noise_sigma: float, alpha: float, contrast: float, iterations: int
) -> Image:
    import cv2

    three = cv2.cvtColor(_bytes(noisy), cv2.COLOR_GRAY2BGR)  # it takes nothing else
    k = contrast * noise_sigma / 255  # a part of the range of bytes
    return cv2.ximgproc.anisotropicDiffusion(three, alpha, k, iterations)[..., 0]


def _opencv_nlm(noisy: Image, noise_sigma: float, h: float, patch: int, window: int) -> Image:
    import cv2

    return cv2.fastNlMeansDenoising(_bytes(noisy), None, h * noise_sigma, patch, window)


def _medpy(noisy: Image, noise_sigma: float, kappa: float, iterations: int) -> Image:
    from medpy.filter.smoothing import anisotropic_diffusion

    return anisotropic_diffusion(
        noisy, niter=iterations, kappa=kappa * noise_sigma, gamma=0.1, option=2
    )


def bm3d_denoise(noisy: Image, noise_sigma: float) -> Image:
    """BM3D of its authors, told the noise level; any intensity scale."""
    from bm3d import bm3d

    return np.asarray(bm3d(noisy, sigma_psd=noise_sigma))


PEERS: dict[str, Peer] = {
    "skimage-tv": Peer(
        "scikit-image total variation (Chambolle)",
        "skimage",
        ("scikit-image",),
        _tv,
        {15: {"weight": 0.6}, 25: {"weight": 0.8}, 50: {"weight": 0.9}},
        {"weight": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)},
    ),
    "skimage-nlm": Peer(
        "scikit-image non-local means",
        "skimage",
        ("scikit-image",),
        non_local_means,
        {s: {"h": 0.6, "patch": 5, "reach": r} for s, r in ((15, 10), (25, 10), (50, 6))},
        {"h": (0.5, 0.6, 0.7, 0.8), "patch": (3, 5), "reach": (6, 10)},
    ),
    "skimage-wavelet": Peer(
        "scikit-image wavelet, cycle-spun",
        "skimage",
        ("scikit-image",),
        _wavelet,
        {
            s: {"wavelet": name, "level": 1.0, "method": "BayesShrink"}
            for s, name in ((15, "db2"), (25, "db1"), (50, "db1"))
        },
        {
            "wavelet": ("db1", "db2", "sym4"),
            "level": (0.8, 1.0),
            "method": ("BayesShrink", "VisuShrink"),
        },
    ),
    "itk-gradient": Peer(
        "SimpleITK GradientAnisotropicDiffusion",
        "SimpleITK",
        ("SimpleITK",),
        _itk("GradientAnisotropicDiffusion"),
        {
            s: {"conductance": c, "iterations": n}
            for s, c, n in ((15, 2.2, 4), (25, 2.2, 7), (50, 3.2, 12))
        },
        {"conductance": (1.5, 2.2, 3.2, 4.5), "iterations": (2, 4, 7, 12, 20, 30)},
    ),
    "itk-curvature": Peer(
        "SimpleITK CurvatureAnisotropicDiffusion",
        "SimpleITK",
        ("SimpleITK",),
        _itk("CurvatureAnisotropicDiffusion"),
        {
            s: {"conductance": c, "iterations": n}
            for s, c, n in ((15, 1.5, 4), (25, 2.2, 4), (50, 3.2, 12))
        },
        {"conductance": (1.5, 2.2, 3.2, 4.5), "iterations": (2, 4, 7, 12, 20, 30)},
    ),
    "opencv-diffusion": Peer(
        "OpenCV ximgproc.anisotropicDiffusion",
        "cv2",
        ("opencv-contrib-python-headless", "opencv-contrib-python"),
        _opencv_diffusion,
        {
            s: {"alpha": a, "contrast": c, "iterations": n}
            for s, a, c, n in ((15, 0.05, 3.2, 5), (25, 0.05, 2.2, 8), (50, 0.1, 2.2, 5))
        },
        {
            "alpha": (0.05, 0.1, 0.15, 0.2),
            "contrast": (1.0, 1.5, 2.2, 3.2, 4.5),
            "iterations": (3, 5, 8, 12, 20),
        },
    ),
    "opencv-nlm": Peer(
        "OpenCV fastNlMeansDenoising",
        "cv2",
        ("opencv-contrib-python-headless", "opencv-contrib-python"),
        _opencv_nlm,
        {
            s: {"h": h, "patch": p, "window": 21}
            for s, h, p in ((15, 1.1, 3), (25, 1.1, 3), (50, 0.8, 5))
        },
        {"h": (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35), "patch": (3, 5), "window": (21,)},
    ),
    "medpy": Peer(
        "medpy anisotropic_diffusion (option 2)",
        "medpy",
        ("medpy",),
        _medpy,
        {
            s: {"kappa": k, "iterations": n}
            for s, k, n in ((15, 1.0, 12), (25, 0.85, 18), (50, 0.85, 27))
        },
        {"kappa": (0.5, 0.7, 0.85, 1.0, 1.2), "iterations": (8, 12, 18, 27, 40)},
    ),
    "bm3d": Peer(
        "BM3D",
        "bm3d",
        ("bm3d",),
        bm3d_denoise,
        {25: {}},
        {},
    ),
}


# --- what a run was ---------------------------------------------------------------------------

LIBRARIES = (
    "napari-learned-diffusion",
    "numpy",
    "torch",
    "numba",
    "scikit-image",
    "SimpleITK",
    "opencv-contrib-python-headless",
    "medpy",
    "bm3d",
)


def version(*distributions: str) -> str:
    """Version of the first distribution that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def provenance(module: str, arguments: Sequence[str], **more: Any) -> dict[str, Any]:
    """Command, versions, machine and whatever else it takes to run it again."""
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *arguments]),
        **more,
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def print_provenance(facts: dict[str, Any]) -> None:
    """Print `provenance` as a Markdown list."""
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        print(f"- {name}: {f'`{value}`' if name == 'command' else value}")
    print()


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, first column to the left, the others to the right."""
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the results where the caller asked for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Pass items on, with one line on standard error that says how far it is."""
    start, shown = time.perf_counter(), 0.0
    for done, item in enumerate(items, 1):
        now = time.perf_counter()
        if now - shown > 1 or done == total:
            shown = now
            left = (now - start) / done * (total - done)
            print(f"\r{what}: {done}/{total}, {left:.0f} s left ", end="", file=sys.stderr)
        yield item
    print(file=sys.stderr)


def mean_psnr(scores: Iterable[dict[str, Any]], **of: Any) -> float:
    """Mean of those scores that are of the given method, level, …"""
    chosen = [s["psnr"] for s in scores if all(s[name] == value for name, value in of.items())]
    return float(np.mean(chosen))


def add_method_arguments(parser: argparse.ArgumentParser, keys: Iterable[str]) -> None:
    """``--methods``, ``--processes`` and ``--json``."""
    keys = tuple(keys)
    parser.add_argument("--methods", nargs="+", metavar="KEY", choices=keys, default=keys)
    parser.add_argument("--processes", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """``--data FOLDER``, or the environment's LEARNED_DIFFUSION_DATA."""
    known = os.environ.get("LEARNED_DIFFUSION_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        required=known is None,
        default=None if known is None else Path(known),
        help="folder with the data sets (default: the environment's LEARNED_DIFFUSION_DATA)",
    )
