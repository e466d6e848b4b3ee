"""A model as a package for the BioImage Model Zoo.

What is exported isn't the diffusivity, which gives conductances, but a whole denoising with fixed
settings, `jobs.zoo_module.DenoisingModule`: an image in, an image out. The package holds its
parameters and names its class; the code comes from this package, which has to be installed where
the model is used.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from imagecodecs import png_encode
from numpy.typing import NDArray
from skimage import data

import napari_learned_diffusion
from napari_learned_diffusion.config import noise_from_arguments
from napari_learned_diffusion.core.atomic import check_target, copy_file
from napari_learned_diffusion.core.diffusivity.k_automation import KAutomation
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
    MissingDependencyError,
)
from napari_learned_diffusion.core.metrics import psnr
from napari_learned_diffusion.core.noise import NoiseModel, PoissonGaussian, noise_model_from_dict
from napari_learned_diffusion.core.user_models import PREFIX, is_user_key
from napari_learned_diffusion.core.zoo import ModelCard, card, learned_model
from napari_learned_diffusion.files._extras import require
from napari_learned_diffusion.jobs.zoo_module import DenoisingModule

LICENSE = "BSD-3-Clause"
"""Of this package and its weights."""

SMALLEST_SIZE = 16
"""Rows and columns of a plane, at least."""

SUFFIX = ".zip"
_PACKAGE = "napari-learned-diffusion"
_OUR_AUTHORS = (f"the {_PACKAGE} developers",)
_OWN_AUTHORS = (f"a user of {_PACKAGE}",)
_PAPER = {
    "text": "J. Valdivia Ortega, M. Haas, A. Effland, "
    "Learning diffusion functions for image restoration, 2024",
    "url": "https://hal.science/hal-04573661",
}
_CONTRAST = 10.0
"""Range of the clean test image, in standard deviations of the noise at its middle."""
_CROP = slice(64, 192), slice(176, 304)
_TOLERANCE = 1e-3
"""Part of the range by which other processors may miss the test output."""


def export_to_zoo(
    model: str,
    target: Path | str,
    *,
    noise: NoiseModel | None = None,
    noise_sigma: float | None = None,
    iterations: int | None = None,
    tau: float | None = None,
    authors: Sequence[str] = (),
    license: str = LICENSE,
    overwrite: bool = False,
) -> Path:
    """Write a package for the BioImage Model Zoo: one model with fixed settings, one zip file.

    It is of the version 0.5 of the Zoo's format and has been tested with ``bioimageio.core`` before
    the file appears. Using it takes this package beside ``bioimageio.core``.

    Parameters
    ----------
    model
        Key of a model that learns, or ``my/NAME``.
    target
        The file, or a folder, where it gets the model's name.
    noise
        Noise model in the unit of the images that the package is for. ``None``: of a user's own
        model, the one that it was fine-tuned with.
    noise_sigma
        Short for ``noise=Gaussian(noise_sigma)``.
    iterations, tau
        Number of diffusion steps, and their length in squared pixels. ``None``: those of the
        model's card; ``k-automation`` chooses for each plane.
    authors
        Names; empty: the developers of this package, or "a user" of it for a user's own model.
    license
        Its identifier in the SPDX list.
    overwrite
        Whether to replace a file that is there.

    Returns
    -------
    The file.

    Raises
    ------
    MissingDependencyError
        as `require_zoo`.
    UnknownModelError
        if there is no such model, or it has no parameters.
    InvalidSettingError
        if the noise is missing or a setting is out of its range.
    FileWriteError
        if the file is there already or can't be written.
    FileFormatError
        if the package doesn't pass the Zoo's own test; no file is left then.
    """
    require_zoo()
    diffusivity = learned_model(model)
    described = card(model)
    given = noise_from_arguments(noise, noise_sigma) or _own_noise(described)
    if given.is_zero:
        raise InvalidSettingError("Without noise there is nothing to remove. Give a noise level.")
    path = _path(Path(target), model, overwrite=overwrite)
    own = is_user_key(model)
    if not isinstance(diffusivity, KAutomation):
        suggestion = described.details["suggestion"]
        iterations = suggestion["iterations"] if iterations is None else iterations
        tau = suggestion["tau"] if tau is None else tau
    arguments: dict[str, Any] = {
        "model": diffusivity.key,
        "noise": given.to_dict(),
        "iterations": iterations,
        "tau": tau,
        "architecture": dict(diffusivity.architecture),
        "fine_tuned": own,
    }
    module = DenoisingModule(**arguments)
    module.diffusivity.load_state_dict(diffusivity.state_dict())
    example = _Example.of(module)
    description = _description(
        described,
        arguments,
        example,
        authors=authors or (_OWN_AUTHORS if own else _OUR_AUTHORS),
        license=license,
        # k-automation looks at the whole plane, or most of it.
        halo=None if isinstance(diffusivity, KAutomation) else diffusivity.halo(iterations or 0),
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _undisturbed():
        package = _packed(Path(folder), description, module, example)
        _test(package)
        copy_file(package, path, overwrite=overwrite)
    return path


def require_zoo() -> None:
    """Make sure that the Zoo's libraries are there and work.

    Raises
    ------
    MissingDependencyError
        if they aren't installed, or are with a pydantic that is too new for them.
    """
    require("bioimageio.core", "zoo", "Exports to the BioImage Model Zoo")
    spec, pydantic = metadata.version("bioimageio.spec"), metadata.version("pydantic")
    # Until then it hands pydantic an argument that newer ones refuse, and so no model can be read.
    if _numbers(spec) < (0, 5, 14) and _numbers(pydantic) >= (2, 14):
        raise MissingDependencyError(
            f"The library bioimageio.spec {spec} doesn't work with pydantic {pydantic}. "
            f"Install what goes together: pip install '{_PACKAGE}[zoo]'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _own_noise(described: ModelCard) -> NoiseModel:
    """The noise model that a user's own model was fine-tuned with."""
    found = described.details.get("noise")
    if not (isinstance(found, dict) and is_user_key(described.key)):
        raise InvalidSettingError(
            "The package is for one noise level: give the standard deviation of the noise, "
            "or a noise model, in the unit of the images."
        )
    return noise_model_from_dict(found)


def _path(target: Path, model: str, *, overwrite: bool) -> Path:
    path = target / model.removeprefix(PREFIX) if target.is_dir() else target
    if path.suffix != SUFFIX:
        path = path.with_name(path.name + SUFFIX)
    check_target(path, overwrite=overwrite)
    if not path.parent.is_dir():
        raise FileWriteError(f"There is no folder {path.parent}. Make it first.")
    return path


# --- what is in it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Example:
    """A plane with noise as the module expects it, ``(h, w)``, and what the module makes of it."""

    clean: NDArray[np.float64]
    noisy: NDArray[np.float32]
    denoised: NDArray[np.float32]

    @classmethod
    def of(cls, module: DenoisingModule) -> _Example:
        """scikit-image's cameraman, in the public domain, in a range that suits the noise."""
        noise = module.noise
        lowest = float(getattr(noise, "pedestal", 0.0))
        if isinstance(noise, PoissonGaussian):
            lowest = max(lowest, -noise.offset / noise.gain)
        extent = 1.0
        for _ in range(60):  # photon noise grows with the extent that is looked for
            middle = np.asarray(lowest + extent / 2, dtype=np.float64)
            extent = _CONTRAST * float(noise.variance(middle)) ** 0.5
        photograph = data.camera()  # type: ignore[no-untyped-call]
        clean = lowest + extent / 255 * np.asarray(photograph[_CROP], np.float64)
        noisy = noise.add(clean, np.random.default_rng(0)).astype(np.float32)
        denoised = module(torch.from_numpy(noisy)[None, None])[0, 0].numpy()
        return cls(clean, noisy, denoised)

    def psnr(self) -> tuple[float, float]:
        """Before and after, in decibels."""
        extent = float(np.ptp(self.clean))
        return (
            psnr(self.noisy, self.clean, data_range=extent),
            psnr(self.denoised, self.clean, data_range=extent),
        )

    def cover(self) -> NDArray[np.uint8]:
        """Noisy on the left, denoised on the right."""
        low, high = self.clean.min(), self.clean.max()
        pair = np.hstack([self.noisy, self.denoised])
        return np.asarray(255 * ((pair - low) / (high - low)).clip(0, 1) + 0.5, np.uint8)


def _description(
    described: ModelCard,
    arguments: Mapping[str, Any],
    example: _Example,
    *,
    authors: Sequence[str],
    license: str,
    halo: int | None,
) -> dict[str, Any]:
    """What ``bioimageio.yaml`` says, and under ``documentation`` the text itself."""
    noise = noise_model_from_dict(arguments["noise"])
    if arguments["iterations"] is None or arguments["tau"] is None:
        settings = "what it chooses for each plane"
    else:
        settings = f"{arguments['iterations']} iterations of {arguments['tau']:g} squared pixels"
    extent = float(np.ptp(example.denoised))
    return {
        "type": "model",
        "name": _plain(f"Denoising by learned diffusion ({described.key.removeprefix(PREFIX)})"),
        "version": napari_learned_diffusion.__version__,
        "description": f"Denoises 2D images by nonlinear diffusion. Every pixel becomes an average "
        f"of pixels: the mean is kept and no value leaves the input's range. "
        f"{described.summary} For noise: {noise.describe()}.",
        "authors": [{"name": name} for name in authors],
        "cite": [_PAPER],
        "license": license,
        "tags": ["denoising", "restoration", "diffusion", "2d", "pytorch", _PACKAGE],
        "documentation": _documentation(described, noise, settings, halo, example),
        "inputs": [_tensor("noisy", "test_input.npy", "The noisy planes.")],
        "outputs": [_tensor("denoised", "test_output.npy", "The denoised planes.", like="noisy")],
        "weights": {
            "pytorch_state_dict": {
                "source": "weights.pt",
                "architecture": {
                    "import_from": napari_learned_diffusion.__name__,
                    "callable": DenoisingModule.__name__,
                    "kwargs": dict(arguments),
                },
                "pytorch_version": torch.__version__.partition("+")[0],
                "dependencies": {"source": "environment.yaml"},
            }
        },
        "covers": [{"source": "cover.png"}],
        "config": {
            "bioimageio": {
                "reproducibility_tolerance": [{"absolute_tolerance": _TOLERANCE * extent}]
            }
        },
    }


def _tensor(name: str, file: str, text: str, like: str | None = None) -> dict[str, Any]:
    size: dict[str, Any] = {"min": SMALLEST_SIZE, "step": 1}
    return {
        "id": name,
        "description": text,
        "axes": [
            {"type": "batch"},
            {"type": "channel", "channel_names": ["intensity"]},
            *(
                {
                    "type": "space",
                    "id": axis,
                    "size": size if like is None else {"tensor_id": like, "axis_id": axis},
                }
                for axis in ("y", "x")
            ),
        ],
        "data": {"type": "float32"},
        "test_tensor": {"source": file},
    }


def _documentation(
    described: ModelCard, noise: NoiseModel, settings: str, halo: int | None, example: _Example
) -> str:
    version = napari_learned_diffusion.__version__
    before, after = example.psnr()
    seen = f"\nA pixel's result depends on up to {halo} pixels around it." if halo else ""
    own = ""
    if is_user_key(described.key):
        own = f"\n\nIt was fine-tuned from the model `{described.details['base']}`."
    return f"""# Denoising by learned diffusion: {described.title}

{described.summary}{own}

It solves du/dt = div(g ∇u) from the noisy image on; a learned model looks at the image and says
how well each edge between pixels conducts, g. Every step only averages: the mean is kept, and no
value leaves the input's range.

## What it needs

The code comes from the Python package `{_PACKAGE}`, version {version} or later, which
must be installed beside `bioimageio.core`: `pip install {_PACKAGE}`. The weights file
holds the parameters alone.

## Input and output

Float32, axes batch, channel (one), y, x; any size from {SMALLEST_SIZE} pixels. Give whole planes,
not tiles, and each channel by itself.{seen}

The package is for one noise, in the unit of the images: **{noise.describe()}**.
Where the noise is of another strength, export the model again for that one.
Settings: {settings}.

## Validation

On the test image, scikit-image's cameraman with such noise added, the PSNR rises from {before:.2f}
to {after:.2f} dB. To validate it on your own data, compare with an average of many frames of the
same, and look at input minus output: it should look like noise and show no structure.

## Reference

{_PAPER["text"]}, <{_PAPER["url"]}>
"""


def _environment() -> str:
    """The conda environment that the module runs in."""
    version = napari_learned_diffusion.__version__
    return f"""name: {_PACKAGE}
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python>=3.11
  - pytorch>=2.9
  - pip
  - pip:
      - {_PACKAGE}>={version}
"""


def _plain(name: str) -> str:
    """A name in the characters that the format allows."""
    allowed = "".join(c if c.isascii() and (c.isalnum() or c in "_+- ()") else "_" for c in name)
    return allowed[:128]


# --- files ----------------------------------------------------------------------------------------


def _packed(
    folder: Path, description: dict[str, Any], module: DenoisingModule, example: _Example
) -> Path:
    """The package, in a folder that is thrown away."""
    from bioimageio import spec
    from bioimageio.spec.model import v0_5

    (folder / "README.md").write_text(description["documentation"], encoding="utf-8")
    (folder / "environment.yaml").write_text(_environment(), encoding="utf-8")
    (folder / "cover.png").write_bytes(png_encode(example.cover()))
    np.save(folder / "test_input.npy", example.noisy[None, None])
    np.save(folder / "test_output.npy", example.denoised[None, None])
    # Tensors and their names only: it is read with weights_only.
    torch.save(dict(module.state_dict()), folder / "weights.pt")
    context = spec.ValidationContext(root=folder, known_files={_PAPER["url"]: None})
    described = description | {
        "format_version": v0_5.ModelDescr.implemented_format_version,
        "documentation": {"source": "README.md"},
    }
    built = spec.build_description(described, context=context)
    if isinstance(built, spec.InvalidDescr):
        raise InvalidSettingError(
            "The BioImage Model Zoo doesn't take this description. Check the licence and the names "
            f"of the authors. {_errors(built.validation_summary)}"
        )
    return Path(spec.save_bioimageio_package(built, output_path=folder / f"package{SUFFIX}"))


def _test(package: Path) -> None:
    """Run the Zoo's own test: the format, the test output, other sizes and batches."""
    from bioimageio.core import test_model

    summary = test_model(package, devices=["cpu"])
    if summary.status != "passed":
        raise FileFormatError(
            "The package didn't pass the test of the BioImage Model Zoo, and nothing was written. "
            f"{_errors(summary)}"
        )


def _errors(summary: Any) -> str:
    """The errors of a validation, in a line."""
    return " ".join(f"{'.'.join(map(str, e.loc))}: {e.msg}".strip() for e in summary.errors)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the Zoo's libraries from logging, and from seeding everybody's random numbers."""
    from loguru import logger

    deterministic = torch.are_deterministic_algorithms_enabled()
    state = np.random.get_state()  # noqa: NPY002 - it is this one that they seed
    logger.disable("bioimageio")
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        gc.collect()  # they leave files open, which can't be deleted everywhere
        logger.enable("bioimageio")
        np.random.set_state(state)  # noqa: NPY002
        torch.use_deterministic_algorithms(deterministic)
