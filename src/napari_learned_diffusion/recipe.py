"""Settings as text that does the same again: a Python call, a shell command."""

from __future__ import annotations

import shlex
from typing import Any

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.noise import Gaussian, NoiseModel, Rician

PROGRAM = "napari-learned-diffusion"


def as_python(
    config: DiffusionConfig,
    image: str = "image",
    *,
    axes: tuple[int, int] = (-2, -1),
    spacing: tuple[float, float] = (1.0, 1.0),
    tiling: TilingConfig | None = None,
) -> str:
    """The settings as lines of Python that denoise the array named ``image``."""
    arguments: dict[str, Any] = {"model": config.model, **_changed(config)}
    imports = ["denoise"]
    noise = arguments.pop("noise", None)
    if isinstance(noise, Gaussian):
        arguments["noise_sigma"] = noise.noise_sigma
    elif noise is not None:
        arguments["noise"] = noise
        imports.append(type(noise).__name__)
    if axes != (-2, -1):
        arguments["axes"] = axes
    if spacing[0] != spacing[1]:
        arguments["spacing"] = spacing
    if tiling is not None and tiling.tile is not None:
        arguments["tile"] = tiling.tile
    inside = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return (
        f"from napari_learned_diffusion import {', '.join(imports)}\n\n"
        f"denoised = denoise(\n    {image},\n{inside})\n"
    )


def as_shell(
    config: DiffusionConfig,
    source: str = "IN.tif",
    target: str = "OUT.tif",
    *,
    tiling: TilingConfig | None = None,
) -> str:
    """The settings as a shell command that denoises the file ``source`` into ``target``."""
    options: dict[str, Any] = {"model": config.model, **_changed(config)}
    noise = options.pop("noise", None)
    options.pop("noise_kind", None)
    options.pop("missing", None)  # the file that is read says it itself
    options.pop("use_spacing", None)  # in Python only
    if noise is not None:
        options |= noise_options(noise)
    elif config.noise_kind != "auto":
        options["noise"] = config.noise_kind
    if tiling is not None and tiling.tile is not None:
        options["tile"] = tiling.tile
    words = [PROGRAM, "denoise", source, target]
    for name, value in options.items():
        # "=" because a negative number after a space would read as an option of its own
        words.append(f"--{name.replace('_', '-')}={value}")
    return shlex.join(words)


def noise_options(noise: NoiseModel) -> dict[str, Any]:
    """A noise model as options of the shell command, by name with underscores."""
    parameters = {name: value for name, value in noise.to_dict().items() if name != "key"}
    if isinstance(noise, Rician):
        # All other models can be told from their parameters.
        parameters = {"noise": noise.key} | parameters
        if noise.pedestal == 0:
            del parameters["pedestal"]
    return parameters


def _changed(config: DiffusionConfig) -> dict[str, Any]:
    return {k: v for k, v in config.changed().items() if k != "model"}
