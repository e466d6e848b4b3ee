"""The public functions: one call from an array to an array."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from napari_learned_diffusion.config import (
    DEFAULT_MODEL,
    Device,
    DiffusionConfig,
    FineTuneConfig,
    FineTuneMode,
    MapsConfig,
    NoiseChoice,
    NoiseModel,
    ResultType,
    TilingConfig,
    noise_from_arguments,
)
from napari_learned_diffusion.core.errors import InvalidSettingError, LearnedDiffusionWarning
from napari_learned_diffusion.jobs.arrays import as_image
from napari_learned_diffusion.jobs.denoise import Denoised, denoise_lazy, denoise_stack
from napari_learned_diffusion.jobs.finetune import FineTuned
from napari_learned_diffusion.jobs.finetune import fine_tune as fine_tune_job
from napari_learned_diffusion.jobs.planes import PlaneAxes, check_image
from napari_learned_diffusion.jobs.prepare import Prepared, prepare
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.regions import Region, regions_of_mask
from napari_learned_diffusion.jobs.result_type import result_type


def denoise(
    image: Any,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | NoiseChoice | None = None,
    noise_sigma: float | None = None,
    iterations: int | None = None,
    device: Device = "auto",
    *,
    axes: PlaneAxes = (-2, -1),
    spacing: tuple[float, float] = (1.0, 1.0),
    tile: int | None = None,
    dtype: DTypeLike | ResultType | None = None,
    **advanced: Any,
) -> Any:
    r"""Denoise an image, or every plane of a stack, by nonlinear diffusion.

    .. math:: \partial_t u = \operatorname{div}\bigl(g \nabla u\bigr)

    with conductances :math:`g \ge 0` from the model, limited so that every step only averages: the
    mean is preserved, and no value leaves the range of its plane. Where the result has whole
    numbers, it is rounded.

    Parameters
    ----------
    image
        Array of at least two dimensions, integers or floats, in any unit: numpy, zarr, xarray,
        torch on the CPU, nested lists. Pixels that hold no intensity take no part and come back as
        they were: NaN, infinite and masked ones, fill values, a constant background; see
        `core.missing`. A dask array gives a lazy dask array, a masked array a masked array.
    model
        Key of the diffusivity, see `list_models`; ``"auto"``: the best that there is, or the one
        that other settings ask for.
    noise
        Noise model in the unit of the image. ``None``: estimated from the image; so is a model
        that is named by a word, such as ``"poisson-gaussian"``.
    noise_sigma
        Short for ``noise=Gaussian(noise_sigma)``: standard deviation, in the unit of the image.
        With ``noise="rician"`` or ``"correlated"`` that of such noise.
    iterations
        Number of diffusion steps. ``None``: suggested by the model.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    axes
        Row axis and column axis of the planes; all others are gone through plane by plane.
    spacing
        Distance of rows and of columns, in any unit. It tells the directions in maps of
        orientation; the diffusion counts in pixels, which denoises better, unless ``use_spacing``.
    tile
        Edge length of the tiles that large planes are cut into, in pixels. ``None``: as the memory
        allows. It doesn't change the result.
    dtype
        Type of the result. ``None``: the image's, with a warning where whole numbers would lose
        what averaging gains, as with few counts a pixel. ``"same"``: the image's, without a
        warning. ``numpy.float32``: that. ``"auto"``: float32 where whole numbers would lose it.
    **advanced
        Any other field of `DiffusionConfig`: ``contrast``, ``function``, ``scheme``, ``tau``,
        ``stopping_time``, ``presmooth_sigma``, ``noise_kind``, ``precision``.

    Returns
    -------
    Array of numpy, or of dask for a dask array, of the same shape.

    Warns
    -----
    LearnedDiffusionWarning
        if rounding to whole numbers loses what averaging gains.

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
    image = as_image(image)
    config = config.with_(dtype=_result_type(dtype, image.dtype))
    prepared = prepare(image, config, plane_axes=axes)
    if dtype is None:
        _warn_of_rounding(image, prepared)
    if hasattr(image, "dask"):
        return denoise_lazy(
            image, plane_axes=axes, spacing=spacing, tiling=tiling, prepared=prepared
        )
    return _run(image, prepared, axes, spacing, tiling, MapsConfig()).image


def diffusivity(
    image: Any,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | NoiseChoice | None = None,
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
    image = as_image(image)
    prepared = prepare(image, config, plane_axes=axes)
    shown = _run(image, prepared, axes, spacing, tiling, maps).diffusivity
    if shown is None:
        raise _no_step("diffusivity")
    return shown


def orientation(
    image: Any,
    model: str = DEFAULT_MODEL,
    noise: NoiseModel | NoiseChoice | None = None,
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
    image = as_image(image)
    prepared = prepare(image, config, plane_axes=axes)
    done = _run(image, prepared, axes, spacing, tiling, maps)
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
    noise: NoiseModel | NoiseChoice | None = None,
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
    image = as_image(image)
    plane_axes = check_image(image, axes)
    if not (isinstance(regions, list) and all(isinstance(r, Region) for r in regions)):
        regions = regions_of_mask(as_image(regions), tuple(image.shape), plane_axes)
    tuned = run(
        fine_tune_job(
            image,
            regions,
            FineTuneConfig(mode, **settings),
            _config(model, noise, noise_sigma, iterations, device, {}),
            reference=None if reference is None else as_image(reference),
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
    noise: NoiseModel | NoiseChoice | None,
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
    if isinstance(noise, str) and noise_sigma is None:
        if "noise_kind" in advanced and advanced["noise_kind"] != noise:
            raise InvalidSettingError("Give the kind of noise as noise or as noise_kind, not both.")
        advanced = {**advanced, "noise_kind": noise}
    model_of_noise = noise_from_arguments(noise, noise_sigma)
    return DiffusionConfig(model, iterations, model_of_noise, device=device, **advanced)


def _result_type(dtype: Any, of_image: Any) -> ResultType:
    """What the caller means by ``dtype``, as a setting."""
    if dtype is None:
        return "same"
    if isinstance(dtype, str) and dtype in ("auto", "same"):
        return "auto" if dtype == "auto" else "same"
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted == np.float32:
        return "float32"
    if wanted is not None and wanted == np.dtype(of_image):
        return "same"
    raise InvalidSettingError(
        f"The result can have the type of the image, {np.dtype(of_image)}, or float32, "
        f"not {dtype!r}. Convert it afterwards."
    )


def _warn_of_rounding(image: Any, prepared: Prepared) -> None:
    """Tell the caller of the caller where the image's whole numbers are too coarse."""
    target = result_type(image.dtype, prepared)
    if target.loses:
        warnings.warn(
            f"{target.message} Give dtype=numpy.float32, or dtype='same' to keep it so.",
            LearnedDiffusionWarning,
            stacklevel=3,
        )


def _run(
    image: Any,
    prepared: Prepared,
    axes: PlaneAxes,
    spacing: tuple[float, float],
    tiling: TilingConfig,
    maps: MapsConfig,
) -> Denoised:
    job = denoise_stack(
        image,
        plane_axes=axes,
        spacing=spacing,
        tiling=tiling,
        prepared=prepared,
        maps=maps,
    )
    return run(job)
