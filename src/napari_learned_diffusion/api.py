"""The public functions: one call from an array to an array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.config import (
    DEFAULT_MODEL,
    Device,
    DiffusionConfig,
    FineTuneConfig,
    FineTuneMode,
    MapsConfig,
    NoiseModel,
    TilingConfig,
    noise_from_arguments,
)
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.jobs.denoise import Denoised, denoise_lazy, denoise_stack
from napari_learned_diffusion.jobs.finetune import FineTuned
from napari_learned_diffusion.jobs.finetune import fine_tune as fine_tune_job
from napari_learned_diffusion.jobs.planes import PlaneAxes, check_image
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.regions import Region, regions_of_mask


def denoise(
    image: Any,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | None = None,
    noise_sigma: float | None = None,
    iterations: int | None = None,
    device: Device = "auto",
    *,
    axes: PlaneAxes = (-2, -1),
    spacing: tuple[float, float] = (1.0, 1.0),
    tile: int | None = None,
    **advanced: Any,
) -> Any:
    r"""Denoise an image, or every plane of a stack, by nonlinear diffusion.

    .. math:: \partial_t u = \operatorname{div}\bigl(g \nabla u\bigr)

    with conductances :math:`g \ge 0` from the model, limited so that every step only averages: the
    mean is preserved, and no value leaves the range of its plane.

    Parameters
    ----------
    image
        Array of at least two dimensions, integers or floats, in any unit. NaN and infinite pixels
        take no part and come back as they were. A dask array gives a lazy dask array.
    model
        Key of the diffusivity, see `list_models`; ``"auto"``: the best that there is, or the one
        that other settings ask for.
    noise
        Noise model in the unit of the image. ``None``: estimated from the image.
    noise_sigma
        Short for ``noise=Gaussian(noise_sigma)``: standard deviation, in the unit of the image.
    iterations
        Number of diffusion steps. ``None``: suggested by the model.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    axes
        Row axis and column axis of the planes; all others are gone through plane by plane.
    spacing
        Distance of rows and of columns, in any unit: only their ratio matters.
    tile
        Edge length of the tiles that large planes are cut into, in pixels. ``None``: as the memory
        allows. It doesn't change the result.
    **advanced
        Any other field of `DiffusionConfig`: ``contrast``, ``function``, ``scheme``, ``tau``,
        ``stopping_time``, ``presmooth_sigma``, ``noise_kind``, ``precision``.

    Returns
    -------
    Array of the same shape and dtype.

    Raises
    ------
    LearnedDiffusionError
        if the image can't be denoised or a setting is out of its range; the message says what
        to do.

    References
    ----------
    .. [1] P. Perona, J. Malik, "Scale-space and edge detection using anisotropic diffusion",
       IEEE Trans. Pattern Anal. Mach. Intell. 12 (1990), 629-639.
    .. [2] J. Valdivia Ortega, M. Haas, A. Effland, "Learning diffusion functions for image
       restoration", HAL hal-04573661 (2024).

    Examples
    --------
    >>> import numpy as np
    >>> from napari_learned_diffusion import denoise
    >>> noisy = np.random.default_rng(0).normal(100, 10, (4, 64, 64))
    >>> denoised = denoise(noisy, noise_sigma=10)
    >>> bool(denoised.std() < noisy.std() / 3)
    True
    """
    config = _config(model, noise, noise_sigma, iterations, device, advanced)
    tiling = TilingConfig(tile=tile)
    if hasattr(image, "dask"):
        return denoise_lazy(image, config, plane_axes=axes, spacing=spacing, tiling=tiling)
    return _run(_as_array(image), config, axes, spacing, tiling, MapsConfig()).image


def diffusivity(
    image: Any,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | None = None,
    noise_sigma: float | None = None,
    iterations: int | None = None,
    device: Device = "auto",
    *,
    axes: PlaneAxes = (-2, -1),
    spacing: tuple[float, float] = (1.0, 1.0),
    tile: int | None = None,
    step: int | None = None,
    **advanced: Any,
) -> NDArray[np.float32]:
    """The diffusivity of one step: where the image was smoothed, and where it was kept.

    Parameters
    ----------
    step
        The diffusion step that is shown, counted from 1. ``None``: the last.

    The others are as of `denoise`.

    Returns
    -------
    Array of the shape of the image, float32: the mean conductance of the edges of each pixel,
    without unit; of ``perona-malik`` from 0 (kept) to 1 (smoothed). NaN at pixels that took no
    part.

    Raises
    ------
    LearnedDiffusionError
        as `denoise`; also where no step is done, so that there is no diffusivity, or fewer than
        ``step``.
    """
    config = _config(model, noise, noise_sigma, iterations, device, advanced)
    tiling, maps = TilingConfig(tile=tile), MapsConfig(diffusivity=True, step=step)
    shown = _run(_as_array(image), config, axes, spacing, tiling, maps).diffusivity
    if shown is None:
        raise _no_step("diffusivity")
    return shown


def orientation(
    image: Any,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | None = None,
    noise_sigma: float | None = None,
    iterations: int | None = None,
    device: Device = "auto",
    *,
    axes: PlaneAxes = (-2, -1),
    spacing: tuple[float, float] = (1.0, 1.0),
    tile: int | None = None,
    step: int | None = None,
    **advanced: Any,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    r"""The orientation of strongest diffusion in one step, and how pronounced it is.

    They belong to the tensor :math:`D` of the diffusion around each pixel,

    .. math:: D = \sum_e w_e \, g_e \, e e^T,

    from the conductances :math:`g_e` of its edges in the directions :math:`e`, weighted so that
    equal conductances favour no direction. Models whose edges join four neighbours, which are all
    but the Conductance U-Nets, tell only horizontal from vertical.

    Parameters
    ----------
    step
        The diffusion step that is shown, counted from 1. ``None``: the last.

    The others are as of `denoise`.

    Returns
    -------
    orientation
        Array of the shape of the image, float32, in degrees from 0 to below 180: the angle from the
        column axis (horizontal), counter-clockwise as seen with the rows running down. With a
        ``spacing`` it is that in physical space. NaN at pixels that took no part, and where
        diffusion was equal in all directions.
    anisotropy
        Of the same shape, float32: :math:`(\lambda_1 - \lambda_2) / (\lambda_1 + \lambda_2)` of
        the eigenvalues of :math:`D`, from 0 (equal in all directions) to 1 (in one only). NaN at
        pixels that took no part.

    Raises
    ------
    LearnedDiffusionError
        as `diffusivity`.
    """
    config = _config(model, noise, noise_sigma, iterations, device, advanced)
    tiling, maps = TilingConfig(tile=tile), MapsConfig(orientation=True, step=step)
    done = _run(_as_array(image), config, axes, spacing, tiling, maps)
    if done.orientation is None or done.anisotropy is None:
        raise _no_step("orientation")
    return done.orientation, done.anisotropy


def fine_tune(
    image: Any,
    regions: Any,
    mode: FineTuneMode = FineTuneConfig.mode,
    *,
    reference: Any = None,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | None = None,
    noise_sigma: float | None = None,
    device: Device = "auto",
    save: str | None = None,
    overwrite: bool = False,
    axes: PlaneAxes = (-2, -1),
    spacing: tuple[float, float] = (1.0, 1.0),
    iterations: int | None = None,
    **settings: Any,
) -> FineTuned:
    """Fine-tune a model on selected regions of a stack, and save it under a name.

    A part of the regions is never trained on; it tells which step is the best. Where no step beats
    the starting model, that one is kept, and nothing is saved.

    Parameters
    ----------
    image
        As of `denoise`.
    regions
        Array of the image's shape, selected where it isn't 0 (a mask, or labels), or a list of
        `jobs.regions.Region`.
    mode
        ``"paired"``: with a clean ``reference``. ``"clean"``: the regions themselves are good, and
        noise of the stack's own level is added. ``"noisy"``: noisy regions alone. ``"repeats"``:
        with a second noisy image as ``reference``. ``"neighbours"``: with the slices before and
        after.
    reference
        Array of the image's shape. A clean one may have another scale and offset.
    model
        Key of the model to start from, which stays as it is.
    save
        Name; the model then goes by ``my/NAME``.
    overwrite
        Whether to replace a model of that name.
    **settings
        Any other field of `FineTuneConfig`: ``steps``, ``learning_rate``, ``patch``, ``batch``,
        ``parameters``, ``added_noise``, ``held_out``, ``every``, ``patience``, ``seed``.

    The others are as of `denoise`.

    Returns
    -------
    FineTuned
        with the gain in decibels on the held-out part, the course of the losses and the model.

    Raises
    ------
    LearnedDiffusionError
        if there is nothing to learn from or to save to; the message says what to do.

    Examples
    --------
    >>> import numpy as np
    >>> from napari_learned_diffusion import fine_tune
    >>> rng = np.random.default_rng(0)
    >>> clean = np.kron(rng.uniform(0, 100, (8, 8)), np.ones((8, 8)))
    >>> noisy = clean + rng.normal(0, 10, clean.shape)
    >>> tuned = fine_tune(noisy, clean > 0, reference=clean, noise_sigma=10, steps=2, patch=16)
    >>> tuned.steps
    2
    """
    unknown = set(settings) - set(FineTuneConfig.__dataclass_fields__)
    if unknown:
        raise InvalidSettingError(
            f"There is no setting {', '.join(sorted(unknown))}. "
            f"There are: {', '.join(FineTuneConfig.__dataclass_fields__)}."
        )
    image = _as_array(image)
    plane_axes = check_image(image, axes)
    if not (isinstance(regions, list) and all(isinstance(r, Region) for r in regions)):
        regions = regions_of_mask(_as_array(regions), tuple(image.shape), plane_axes)
    tuned = run(
        fine_tune_job(
            image,
            regions,
            FineTuneConfig(mode, **settings),
            _config(model, noise, noise_sigma, iterations, device, {}),
            reference=None if reference is None else _as_array(reference),
            plane_axes=plane_axes,
            spacing=spacing,
        )
    )
    if save is not None and tuned.improved:
        tuned.save(save, overwrite=overwrite)
    return tuned


def _no_step(name: str) -> InvalidSettingError:
    return InvalidSettingError(
        "No diffusion step is done with a noise level of 0 or 0 iterations, "
        f"so there is no {name}. Give a noise level and iterations above 0."
    )


def _config(
    model: str,
    noise: NoiseModel | None,
    noise_sigma: float | None,
    iterations: int | None,
    device: Device,
    advanced: dict[str, Any],
) -> DiffusionConfig:
    unknown = set(advanced) - set(DiffusionConfig.__dataclass_fields__)
    if unknown:
        raise InvalidSettingError(
            f"There is no setting {', '.join(sorted(unknown))}. "
            f"There are: {', '.join(DiffusionConfig.__dataclass_fields__)}."
        )
    noise = noise_from_arguments(noise, noise_sigma)
    return DiffusionConfig(model, iterations, noise, device=device, **advanced)


def _as_array(image: Any) -> Any:
    lazy = hasattr(image, "shape") and hasattr(image, "dtype") and hasattr(image, "__getitem__")
    return image if lazy else np.asarray(image)


def _run(
    image: Any,
    config: DiffusionConfig,
    axes: PlaneAxes,
    spacing: tuple[float, float],
    tiling: TilingConfig,
    maps: MapsConfig,
) -> Denoised:
    job = denoise_stack(
        image,
        config,
        plane_axes=axes,
        spacing=spacing,
        tiling=tiling,
        maps=maps,
        measure=False,
    )
    return run(job)
