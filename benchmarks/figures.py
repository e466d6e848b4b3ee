"""The paper's figures from our models: what they restore, what they have learned, how they diffuse.

Run ``python -m benchmarks.figures [FOLDER]``. Everything is drawn from generated data and from
`skimage.data`; the pictures of docs/paper.md come from here.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._common import DATA_RANGE, Image, add_noise
from benchmarks.paper_tables import PAPER
from napari_learned_diffusion.core.diffusivity import REGISTRY

IMAGES = Path(__file__).parents[1] / "docs" / "images"
DPI = 104
LARGEST = 300_000
"""Bytes that a picture may have, so that the page loads."""

NOISE_SIGMA = 25
SEED = 4
EXPERTS = {
    "splines": "foe-splines",
    "decreasing": "foe-decreasing",
    "monomials": "foe-monomials",
    "roth-black": "foe-roth-black",
}


def models() -> list[str]:
    """The paper's models that are registered, in the paper's order."""
    return [key for key in PAPER["models"] if key in REGISTRY]


def camera() -> Image:
    """The photographer's head and camera, 160 x 160 pixels."""
    from skimage.data import camera

    return camera()[76:236, 164:324].astype(np.float64)


def restored(
    noisy: NDArray[Any], noise: Any, key: str
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """What a model makes of a slice, and its diffusivity in the last iteration."""
    from napari_learned_diffusion.config import DiffusionConfig, MapsConfig
    from napari_learned_diffusion.jobs.denoise import denoise_plane
    from napari_learned_diffusion.jobs.progress import run

    config = DiffusionConfig(model=key, noise=noise, device="cpu")
    plane = noisy.astype(np.float32)
    maps = MapsConfig(diffusivity=True)
    result = run(denoise_plane(plane, config, maps=maps))
    if result.diffusivity is None:
        raise RuntimeError(f"{key} did no step.")
    return result.image.astype(np.float64), result.diffusivity


# --- restored images and their diffusivities --------------------------------------------------


def draw_camera() -> Any:
    """A photograph with Gaussian noise."""
    from napari_learned_diffusion.config import Gaussian

    clean = camera()
    noisy = add_noise(clean, 0, NOISE_SIGMA, SEED)
    return _restored(clean, noisy, Gaussian(NOISE_SIGMA), (0, DATA_RANGE), DATA_RANGE)


def draw_ct() -> Any:
    """A slice of the simulated CT, in a window for soft tissue and lung vessels alike."""
    from napari_learned_diffusion.sample_data import low_dose_ct

    sample = low_dose_ct()
    middle = len(sample.noisy) // 2
    part = np.s_[middle, 64:224, 32:192]
    clean, noisy = (x[part].astype(np.float64) for x in (sample.reference, sample.noisy))
    low, high = sample.contrast_limits
    return _restored(clean, noisy, sample.noise, (low, high), high - low)


def _restored(
    clean: Image, noisy: Image, noise: Any, limits: tuple[float, float], data_range: float
) -> Any:
    """Each model's image above its diffusivity; the noisy and the clean image to begin with."""
    from matplotlib.figure import Figure

    from napari_learned_diffusion.core.metrics import psnr

    columns = [("noisy", noisy, None)]
    columns += [(key, *restored(noisy, noise, key)) for key in models()]
    across = 4
    blocks = -(-len(columns) // across)
    figure = Figure(figsize=(across * 1.5, blocks * 3.4), layout="constrained")
    axes = figure.subplots(2 * blocks, across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for n, (name, image, diffusivity) in enumerate(columns):
        above, below = axes[2 * (n // across) : 2 * (n // across) + 2, n % across]
        decibels = psnr(np.clip(image, *limits), np.clip(clean, *limits), data_range=data_range)
        above.set_title(f"{name}\n{decibels:.1f} dB", fontsize=7)
        above.imshow(image, "gray", vmin=limits[0], vmax=limits[1])
        if diffusivity is None:
            below.set_title("without noise", fontsize=7)
            below.imshow(clean, "gray", vmin=limits[0], vmax=limits[1])
        else:
            top = float(np.percentile(diffusivity, 99))
            below.set_title(f"diffusivity, 0 to {top:.2f}", fontsize=7)
            below.imshow(diffusivity, "magma", vmin=0, vmax=top)
    return figure


# --- experts ----------------------------------------------------------------------------------


def experts_model(key: str) -> Any:
    """A field of experts with the weights of the package."""
    from napari_learned_diffusion.config import DiffusionConfig
    from napari_learned_diffusion.core.zoo import load_model

    return load_model(DiffusionConfig(model=key)).eval()


def draw_experts(key: str) -> Any:
    """The experts that vary most on a noisy photograph: kernels, and their functions below."""
    from matplotlib.figure import Figure

    from napari_learned_diffusion.jobs.lookers import look_at_experts

    noisy = add_noise(camera(), 0, NOISE_SIGMA, SEED) / NOISE_SIGMA
    seen = torch.from_numpy(noisy).float()[None, None]
    experts = look_at_experts(experts_model(key), seen)

    figure = Figure(figsize=(8.0, 2.6), layout="constrained")
    axes = figure.subplots(2, len(experts.kernels), squeeze=False, height_ratios=(0.85, 1))
    low, high = experts.functions.min(), experts.functions.max()
    margin = 0.05 * (high - low)
    pairs = zip(experts.kernels, experts.functions, strict=True)
    for (kernel, function), kernel_axes, curve_axes in zip(pairs, *axes, strict=True):
        top = np.abs(kernel).max()
        kernel_axes.imshow(kernel, "RdBu_r", vmin=-top, vmax=top)
        kernel_axes.set(xticks=[], yticks=[])
        kernel_axes.set_title(f"|k| = {np.linalg.norm(kernel):.1f}", fontsize=8)
        curve_axes.axhline(0, color="0.8", linewidth=0.8)
        curve_axes.axvline(0, color="0.8", linewidth=0.8)
        curve_axes.plot(experts.answers, function, color="tab:blue")
        curve_axes.set(ylim=(low - margin, high + margin))
        curve_axes.tick_params(labelsize=7)
        if curve_axes is not axes[1, 0]:
            curve_axes.set_yticklabels([])
    axes[0, 0].set_ylabel("kernel", fontsize=8)
    axes[1, 0].set_ylabel("φ(x) − φ(0)", fontsize=8)
    figure.supxlabel("x, the kernel's answer in standard deviations of the noise", fontsize=8)
    return figure


# --- diffusivity curves -----------------------------------------------------------------------


def draw_curves() -> Any:
    """The two diffusivities, and where they diffuse backwards across edges."""
    from matplotlib.figure import Figure

    from napari_learned_diffusion.core.diffusivity.perona_malik import FUNCTIONS, ellipticity

    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    s = np.linspace(0, 5, 501)
    formulas = {"rational": "a(s) = 1 / (1 + s/K²)", "exponential": "a(s) = exp(−s/K²)"}
    for ax, (function, formula) in zip(figure.subplots(1, 2, sharey=True), formulas.items(),
                                       strict=True):  # fmt: skip
        t = torch.from_numpy(s)
        a, b = FUNCTIONS[function](t).numpy(), ellipticity(t, function).numpy()
        change = s[np.argmax(b < 0)]
        ax.axvspan(0, change, color="tab:green", alpha=0.12, linewidth=0)
        ax.axvspan(change, s[-1], color="tab:red", alpha=0.12, linewidth=0)
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.plot(s, a, color="tab:blue", label="a(s), diffusivity")
        ax.plot(s, b, color="black", linestyle="--", label="b(s) = a(s) + 2 s a′(s), ellipticity")
        ax.text(change / 2, -0.53, "b > 0", ha="center", fontsize=8, color="tab:green")
        ax.text((change + s[-1]) / 2, -0.53, "b < 0: edges are sharpened", ha="center", fontsize=8,
                color="tab:red")  # fmt: skip
        ax.set(xlim=(0, s[-1]), ylim=(-0.6, 1.05), xlabel="s / K²")
        ax.set_title(f"{function}: {formula}", fontsize=9)
    ax.legend(fontsize=8)
    return figure


# --- command ----------------------------------------------------------------------------------


def figures() -> dict[str, Callable[[], Any]]:
    """How to draw each figure, by name; only those whose model is registered."""
    return {
        "camera": draw_camera,
        "ct": draw_ct,
        **{
            name: lambda key=key: draw_experts(key)
            for name, key in EXPERTS.items()
            if key in REGISTRY
        },
        "curves": draw_curves,
    }


def write(figure: Any, path: Path) -> int:
    """Write a figure in 256 colours, which is plenty, and return its size in bytes."""
    from PIL import Image as Picture

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    picture = Picture.open(drawn).convert("RGB").quantize(256, dither=Picture.Dither.NONE)
    picture.save(path, optimize=True)
    return path.stat().st_size


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    everything = figures()
    parser.add_argument("folder", nargs="?", type=Path, default=IMAGES)
    parser.add_argument("--only", nargs="+", choices=everything, default=tuple(everything))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    too_large = False
    for name in options.only:
        path = options.folder / f"paper-{name}.png"
        size = write(everything[name](), path)
        too_large |= size > LARGEST
        print(f"{path}: {size / 1000:.0f} kB{' - TOO LARGE' if size > LARGEST else ''}", flush=True)
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
