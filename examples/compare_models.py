"""Compare the models on one slice.

    python examples/compare_models.py
    python examples/compare_models.py stack.tif
    python examples/compare_models.py --no-gui

Without a file it is a slice of a simulated low-dose CT, whose noise-free reference is known, so
that the error of each model can be told. All models get the same noise model.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from napari_learned_diffusion import denoise, estimate_noise, list_models
from napari_learned_diffusion.files import read
from napari_learned_diffusion.sample_data import low_dose_ct


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stack", nargs="?", type=Path, help="an image file")
    parser.add_argument("--models", nargs="*", metavar="KEY", help="only these models")
    parser.add_argument("--no-gui", action="store_true", help="only print the table")
    arguments = parser.parse_args()

    if arguments.stack is None:
        sample = low_dose_ct()
        middle = len(sample.noisy) // 2
        noisy, reference, noise = sample.noisy[middle], sample.reference[middle], sample.noise
    else:
        volume = read(arguments.stack)
        planes = np.moveaxis(np.asarray(volume.data), volume.plane_axes, (-2, -1))
        planes = planes.reshape(-1, *planes.shape[-2:])
        noisy, reference = planes[len(planes) // 2], None
        noise = estimate_noise(noisy).model
    print(f"noise: {noise.describe()}")

    keys = arguments.models or [card.key for card in list_models()]
    results = {}
    for key in keys:
        start = time.perf_counter()
        results[key] = denoise(noisy, key, noise=noise)
        line = f"{key:20s} {time.perf_counter() - start:6.2f} s"
        if reference is not None:
            line += f"  error {np.sqrt(np.mean((results[key] - reference) ** 2)):6.2f}"
        print(line)

    if arguments.no_gui:
        return
    import napari

    viewer = napari.Viewer()
    limits = tuple(float(value) for value in np.percentile(noisy, (0.5, 99.5)))
    for name, image in {"noisy": noisy, **results}.items():
        viewer.add_image(image, name=name, contrast_limits=limits)
    viewer.canvas.grid.enabled = True
    napari.run()


if __name__ == "__main__":
    main()
