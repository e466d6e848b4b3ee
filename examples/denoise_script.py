"""Denoise a stack by script and look at it in napari.

    python examples/denoise_script.py
    python examples/denoise_script.py --no-gui

The stack is a simulated low-dose CT whose noise-free reference is known, so that the error can be
told in Hounsfield units.
"""

from __future__ import annotations

import argparse

import numpy as np

from napari_learned_diffusion import denoise, diffusivity
from napari_learned_diffusion.sample_data import low_dose_ct


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--no-gui", action="store_true", help="only print the figures")
    parser.add_argument("--slices", type=int, help="denoise so many slices only")
    arguments = parser.parse_args()

    sample = low_dose_ct()
    noisy, reference = sample.noisy[: arguments.slices], sample.reference[: arguments.slices]
    # The sample says how strong its noise is. Without `noise`, it is estimated from the image.
    denoised = denoise(noisy, noise=sample.noise)
    shown = diffusivity(noisy, noise=sample.noise)

    for name, image in (("noisy", noisy), ("denoised", denoised)):
        error = np.sqrt(np.mean((image - reference) ** 2))
        print(f"{name:8s}  error {error:5.1f} HU, mean {image.mean():.2f} HU, type {image.dtype}")

    if arguments.no_gui:
        return
    import napari

    viewer = napari.Viewer()
    common = {"scale": sample.scale, "units": sample.units, "axis_labels": sample.axis_labels}
    window = {"contrast_limits": sample.contrast_limits, **common}
    viewer.add_image(noisy, name="noisy", **window)
    viewer.add_image(shown, name="diffusivity", colormap="inferno", visible=False, **common)
    viewer.add_image(denoised, name="denoised", **window)
    viewer.dims.set_current_step(0, len(noisy) // 2)
    napari.run()


if __name__ == "__main__":
    main()
