"""Estimate the noise of an image and use the estimate to denoise it.

    python examples/estimate_noise.py
    python examples/estimate_noise.py cryo_em

The image is simulated, so that the estimate can be compared with the truth.
"""

from __future__ import annotations

import argparse

import numpy as np

from napari_learned_diffusion import denoise, estimate_noise, sample_data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = ("low_dose_ct", "brain_mri", "cryo_em", "fluorescence")
    parser.add_argument("sample", nargs="?", choices=names, default="fluorescence")
    parser.add_argument("--slices", type=int, help="so many slices only")
    arguments = parser.parse_args()

    sample = getattr(sample_data, arguments.sample)()
    noisy, reference = sample.noisy[: arguments.slices], sample.reference[: arguments.slices]
    estimate = estimate_noise(noisy)
    print(f"{sample.name}: {sample.description}")
    print(f"  simulated   {sample.noise.describe()}")
    print(f"  estimated   {estimate.model.describe()}")
    print(f"  confidence  {estimate.confidence:.2f}")
    print(f"  {estimate.message}")

    for intensity in np.percentile(noisy, (25, 50, 99)):
        true, found = (np.sqrt(m.variance(intensity)) for m in (sample.noise, estimate.model))
        print(f"  at intensity {intensity:8.1f}: noise {true:.2f}, estimated {found:.2f}")

    for name, model in (("true", sample.noise), ("estimated", estimate.model)):
        error = np.sqrt(np.mean((denoise(noisy, noise=model) - reference) ** 2))
        print(f"  error after denoising with the {name} noise model: {error:.2f}")


if __name__ == "__main__":
    main()
