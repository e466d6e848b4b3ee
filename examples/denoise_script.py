"""Denoise a stack by script and look at it in napari.

    python examples/denoise_script.py
    python examples/denoise_script.py stack.tif
    python examples/denoise_script.py --no-gui

Without a file it is a simulated low-dose CT whose noise-free reference is known, so that the error
can be told in Hounsfield units.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from napari_learned_diffusion import denoise, diffusivity
from napari_learned_diffusion.files import read
from napari_learned_diffusion.sample_data import low_dose_ct


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stack", nargs="?", type=Path, help="an image file")
    parser.add_argument("--no-gui", action="store_true", help="only print the figures")
    parser.add_argument("--slices", type=int, help="denoise so many slices only")
    arguments = parser.parse_args()

    if arguments.stack is None:
        sample = low_dose_ct()
        noisy, reference = sample.noisy[: arguments.slices], sample.reference[: arguments.slices]
        # The sample says how strong its noise is. Without `noise`, it is estimated from the image.
        noise, axes = sample.noise, (1, 2)
        place = {"scale": sample.scale, "units": sample.units, "axis_labels": sample.axis_labels}
    else:
        volume = read(arguments.stack)
        noisy, reference, noise = volume.data[: arguments.slices], None, None
        axes = volume.plane_axes
        place = {"scale": volume.scale, "units": volume.units, "axis_labels": tuple(volume.axes)}
    denoised = denoise(noisy, noise=noise, axes=axes)
    shown = diffusivity(noisy, noise=noise, axes=axes)

    for name, image in (("noisy", noisy), ("denoised", denoised)):
        text = f"{name:8s}  mean {image.mean():.2f}, type {image.dtype}"
        if reference is not None:
            text += f", error {np.sqrt(np.mean((image - reference) ** 2)):5.1f} HU"
        print(text)

    if arguments.no_gui:
        return
    import napari

    viewer = napari.Viewer()
    first = viewer.add_image(noisy, name="noisy", **place)
    viewer.add_image(shown, name="diffusivity", colormap="inferno", visible=False, **place)
    viewer.add_image(denoised, name="denoised", contrast_limits=first.contrast_limits, **place)
    viewer.dims.set_current_step(0, len(noisy) // 2)
    napari.run()


if __name__ == "__main__":
    main()
