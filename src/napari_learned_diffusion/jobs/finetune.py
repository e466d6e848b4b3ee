"""Fine-tune a model on selected regions of a stack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, FineTuneConfig, TilingConfig
from napari_learned_diffusion.core.device import is_out_of_memory
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidImageError,
    InvalidSettingError,
)
from napari_learned_diffusion.core.learning.finetuning import CLEAR_GAIN, FineTuneStep, adapt, gain
from napari_learned_diffusion.core.learning.objectives import NoiseSource
from napari_learned_diffusion.core.learning.scenes import Diffusion, Scene
from napari_learned_diffusion.core.missing import missing_pixels
from napari_learned_diffusion.core.noise import Correlated
from napari_learned_diffusion.core.noise_estimation import sample_planes
from napari_learned_diffusion.core.noise_measurement import checked_pixels
from napari_learned_diffusion.core.noise_spectrum import FlatSpectrum, flat_spectrum
from napari_learned_diffusion.core.schemes import STABLE_TAU
from napari_learned_diffusion.core.user_models import UserModel, save_user_model
from napari_learned_diffusion.core.zoo import card, learned_model
from napari_learned_diffusion.jobs.plane_solver import PlaneSolver
from napari_learned_diffusion.jobs.planes import (
    LAST_AXES,
    PlaneAxes,
    SolverUnits,
    check_image,
    diffusion_spacing,
    plane_indices,
    read_plane,
)
from napari_learned_diffusion.jobs.prepare import Prepared, prepare
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.jobs.regions import Region, hold_out, merged

FEWEST_PIXELS = 256
"""Of the regions together."""

MOST_SLICES = 48
"""Slices with regions that are learned from; of more, these are spread evenly over them."""

MARGIN = 32
"""Pixels around the regions of a slice that are kept beside a patch's edge."""

NOISE_SAMPLES = 16
PREVIEW_SECONDS = 3.0
"""Between two previews, at least."""


@dataclass(frozen=True)
class Curve:
    """The course of a fine-tuning: errors relative to the starting model's, by step.

    Parameters
    ----------
    training
        Of the patches of each step, from step 1.
    held_out
        Of the held-out part, as step and error; the first is the starting model, about 1.
    """

    training: tuple[float, ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FineTuneProgress(Progress):
    """A progress report with the course of the losses up to the last look at the held-out part."""

    curve: Curve = Curve()


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned model.

    Parameters
    ----------
    model
        On the CPU; where nothing beat it, the starting model.
    start
        Key of the starting model.
    improved
        Whether a step was better than the starting model.
    gain
        By how many decibels the error on the held-out part became smaller; 0 if ``improved`` isn't.
    best_step, steps
        The step that was kept, and the number of steps done.
    curve
        The course of the losses.
    seconds
        Wall-clock time.
    facts
        How the model came about, for its card.
    messages
        Sentences for the user.
    """

    model: LearnedDiffusivity
    start: str
    improved: bool
    gain: float
    best_step: int
    steps: int
    curve: Curve
    seconds: float
    facts: dict[str, Any]
    messages: tuple[str, ...]

    def summary(self) -> str:
        """One sentence for people."""
        if not self.improved:
            return (
                f"Nothing beat the starting model in {self.steps} steps, so {self.start} is kept."
            )
        return (
            f"{self.gain:.2f} dB better than {self.start} on the held-out part, by step "
            f"{self.best_step} of {self.steps}."
        )

    def save(self, name: str, *, overwrite: bool = False) -> UserModel:
        """Save the model under a name among the user's own.

        Raises
        ------
        InvalidSettingError
            if it is the starting model, or the name can't be used or is taken.
        FileWriteError
            if the folder can't be written to.
        """
        if not self.improved:
            raise InvalidSettingError(
                f"{self.summary()} There is nothing to save: go on using {self.start}."
            )
        return save_user_model(name, self.model, self.facts, overwrite=overwrite)


def fine_tune(
    stack: Any,
    regions: Sequence[Region],
    config: FineTuneConfig | None = None,
    diffusion: DiffusionConfig | None = None,
    *,
    reference: Any = None,
    plane_axes: PlaneAxes = LAST_AXES,
    spacing: tuple[float, float] = (1.0, 1.0),
    name: str = "",
    stop: Callable[[], bool] | None = None,
    preview: tuple[int, ...] | None = None,
) -> Job[FineTuned]:
    """Fine-tune a model on regions of a stack. The model that it starts from isn't touched.

    Parameters
    ----------
    stack
        Numpy, dask or zarr array; of it only slices with regions, and some for the noise, are read.
    regions
        The selected pixels.
    config
        How to learn.
    diffusion
        The starting model and, where they are known, noise and iterations; everything else is
        automatic, as when denoising.
    reference
        Array of the stack's shape: the clean image of the mode ``"paired"``, whose intensities may
        have another scale and offset, or the second noisy one of ``"repeats"``.
    plane_axes
        Row axis and column axis of the slices.
    spacing
        Distance of rows and of columns, in any unit.
    name
        What the stack is, for the model's card.
    stop
        Once it returns ``True``, the training ends with the best step so far.
    preview
        Index of a slice that is denoised by the current model every few seconds.

    Yields
    ------
    A `FineTuneProgress` after every step, with the preview where there is a new one. Closing the
    generator there cancels.

    Raises
    ------
    LearnedDiffusionError
        if there is nothing to learn from, the model has no parameters, or settings contradict each
        other; `DeviceError` where memory runs out.
    """
    config = config or FineTuneConfig()
    begun = time.perf_counter()
    rows_columns = check_image(stack, plane_axes)
    shape = tuple(stack.shape)
    _check_reference(stack, reference, config)
    plane_shape = shape[rows_columns[0]], shape[rows_columns[1]]
    masks = merged(regions, plane_shape)
    _check_regions(masks, shape, rows_columns, config)
    yield FineTuneProgress(0, config.steps, "Estimating the noise")
    messages: list[str] = []
    noise = _Noise.of(stack, masks, config, diffusion or DiffusionConfig(), rows_columns)
    messages += noise.messages
    prepared = noise.prepared
    start = prepared.config.model
    model = learned_model(start)
    scenes: list[Scene] = []
    reader = _Reader(stack, reference, rows_columns, spacing, config, noise, masks)
    for number, index in enumerate(reader.indices):
        yield FineTuneProgress(0, config.steps, f"Reading slice {number + 1} of {len(masks)}")
        scenes += reader.scenes(index)
    messages += reader.messages()
    if not scenes:
        raise InvalidImageError(" ".join(["There is nothing to learn from.", *reader.messages()]))
    iterations, tau = prepared.config.iterations or 1, prepared.config.tau or STABLE_TAU
    device = torch.device(prepared.config.device)
    model = model.to(device)
    training: list[float] = []
    held_out: list[tuple[int, float]] = []
    curve = Curve()
    previewer = _Preview(stack, preview, rows_columns, noise, spacing, Diffusion(iterations, tau))
    step = FineTuneStep(0, np.nan, None, 0, np.inf)
    steps_spacing = diffusion_spacing(noise.prepared.config, spacing)
    steps = adapt(model, scenes, config, Diffusion(iterations, tau, steps_spacing), stop=stop)
    try:
        for step in steps:
            if step.step:
                training.append(step.loss)
            shown = None
            if step.held_out is not None:
                held_out.append((step.step, step.held_out))
                curve = Curve(tuple(training), tuple(held_out))
                shown = previewer.denoised(model)
            yield FineTuneProgress(
                step.step,
                config.steps,
                _message(step, held_out[0][1]),
                # What has an index is reported in any case: each look at the held-out part is.
                None if step.held_out is None else preview or (),
                shown,
                curve,
            )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(
            "There is too little memory for this batch. Take fewer or smaller patches."
        ) from error
    finally:
        steps.close()
    gained = gain(held_out[0][1], step.best_held_out)
    improved = step.best_step > 0 and gained >= CLEAR_GAIN
    if not improved:
        gained = 0.0
        model = learned_model(start)
    facts = _facts(model, start, noise, config, reader, name) | {
        "gain_dB": round(gained, 3),
        "steps": step.best_step,
    }
    return FineTuned(
        model.cpu().requires_grad_(False).eval(),
        start,
        improved,
        gained,
        step.best_step if improved else 0,
        step.step,
        Curve(tuple(training), tuple(held_out)),
        time.perf_counter() - begun,
        facts,
        tuple(messages),
    )


def _message(step: FineTuneStep, start: float) -> str:
    if step.step == 0:
        return "Training"
    best = gain(start, step.best_held_out)
    return f"Step {step.step}: best {best:+.2f} dB, at step {step.best_step}"


def _check_reference(stack: Any, reference: Any, config: FineTuneConfig) -> None:
    if not config.needs_reference:
        return
    what = "reference" if config.mode == "paired" else "second noisy image"
    if reference is None:
        raise InvalidSettingError(
            f"The mode {config.mode!r} needs a {what} of the same shape. Give one, or choose "
            "another mode."
        )
    if tuple(reference.shape) != tuple(stack.shape):
        raise InvalidImageError(
            f"The {what} has the shape {tuple(reference.shape)}, the image {tuple(stack.shape)}. "
            "They must show the same, pixel by pixel."
        )


def _check_regions(
    masks: dict[tuple[int, ...], NDArray[np.bool_]],
    shape: tuple[int, ...],
    plane_axes: PlaneAxes,
    config: FineTuneConfig,
) -> None:
    if not masks:
        raise InvalidSettingError(
            "No region is selected. Draw at least one on the image, of some hundred pixels."
        )
    pixels = sum(int(mask.sum()) for mask in masks.values())
    if pixels < FEWEST_PIXELS:
        raise InvalidSettingError(
            f"The regions have {pixels} pixels, too few to learn from. Draw at least "
            f"{FEWEST_PIXELS}."
        )
    if config.mode == "neighbours" and _neighbour_axis(shape, plane_axes) is None:
        raise InvalidSettingError(
            "The image has a single slice, so there are no neighbours to learn from. "
            "Choose another mode."
        )


def _neighbour_axis(shape: tuple[int, ...], plane_axes: PlaneAxes) -> int | None:
    """Which number of a slice's index counts its neighbours: the last one that counts several."""
    lengths = [n for axis, n in enumerate(shape) if axis not in plane_axes]
    several = [at for at, n in enumerate(lengths) if n > 1]
    return several[-1] if several else None


# --- the noise ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Noise:
    """The noise of the stack, and of its slices where these differ.

    Parameters
    ----------
    prepared
        Of the stack.
    spectrum
        Measured in its flat parts; ``None`` where noise is drawn as the model says.
    by_slice
        Whether each slice is looked at by itself.
    messages
        Sentences for the user.
    """

    prepared: Prepared
    spectrum: NDArray[np.float64] | None
    by_slice: bool
    messages: tuple[str, ...]

    @classmethod
    def of(
        cls,
        stack: Any,
        masks: dict[tuple[int, ...], NDArray[np.bool_]],
        config: FineTuneConfig,
        diffusion: DiffusionConfig,
        plane_axes: PlaneAxes,
    ) -> _Noise:
        messages: tuple[str, ...] = ()
        if config.mode == "clean":
            # The regions have less noise than the stack, which is what they would tell.
            seen: Any = np.stack(list(_noisy_planes(stack, masks, plane_axes)))
            axes = LAST_AXES
            is_open = diffusion.noise is None and diffusion.noise_kind == "auto"
            if is_open and _is_correlated(seen, _regions_alone(stack, masks, plane_axes)):
                diffusion = diffusion.with_(noise_kind="correlated")
                messages = ("The noise is correlated, as a comparison with the regions shows.",)
        else:
            seen, axes = stack, plane_axes
        prepared = prepare(seen, diffusion, plane_axes=axes)
        if prepared.noise.is_zero:
            raise InvalidImageError(
                "No noise was found, so there is nothing to learn. Give the noise if you know it."
            )
        by_slice = prepared.slice_by_slice and config.mode != "clean"
        model = prepared.noise
        wanted = config.added_noise == "measured" or (
            config.added_noise == "auto" and isinstance(model, Correlated)
        )
        if not wanted or config.mode not in ("clean", "noisy"):
            return cls(prepared, None, by_slice, messages)
        indices = plane_indices(tuple(seen.shape), check_image(seen, axes))
        chosen = [indices[i] for i in sample_planes(len(indices), NOISE_SAMPLES)]
        found, _ = _flat_spectrum(
            np.stack([read_plane(seen, i, check_image(seen, axes)) for i in chosen])
        )
        if found is None:
            return cls(
                prepared,
                None,
                by_slice,
                (
                    *messages,
                    "There are too few flat areas to measure noise in: it is drawn by its model.",
                ),
            )
        return cls(prepared, found.spectrum, by_slice, messages)

    def of_slice(self, plane: NDArray[Any]) -> Prepared:
        """The settings of one slice."""
        return self.prepared.of(plane) if self.by_slice else self.prepared


def _noisy_planes(
    stack: Any, masks: dict[tuple[int, ...], NDArray[np.bool_]], plane_axes: PlaneAxes
) -> Iterator[NDArray[np.float64]]:
    """Slices without regions, or where there are none, all but the regions of the others."""
    every = plane_indices(tuple(stack.shape), plane_axes)
    taken = sorted(every.index(index) for index in masks)
    n_free = len(every) - len(taken)
    for i in sample_planes(n_free or len(every), NOISE_SAMPLES):
        index = every[_skipping(int(i), taken) if n_free else i]
        plane = read_plane(stack, index, plane_axes).astype(np.float64)
        if index in masks:
            plane[masks[index]] = np.nan
        yield plane


def _skipping(number: int, taken: Sequence[int]) -> int:
    """The number, counted from 0, that stands at a place among those not taken (ascending)."""
    for other in taken:
        if other > number:
            break
        number += 1
    return number


def _regions_alone(
    stack: Any, masks: dict[tuple[int, ...], NDArray[np.bool_]], plane_axes: PlaneAxes
) -> NDArray[np.float64]:
    """Slices with regions, NaN elsewhere."""
    with_regions = sorted(masks)
    planes = []
    for i in sample_planes(len(with_regions), NOISE_SAMPLES):
        index = with_regions[i]
        plane = read_plane(stack, index, plane_axes).astype(np.float64)
        planes.append(np.where(masks[index], plane, np.nan))
    return np.stack(planes)


def _is_correlated(noisy: NDArray[np.float64], clean: NDArray[np.float64]) -> bool:
    """Whether noisy slices have correlated noise, which clean regions of others haven't."""
    found, unit = _flat_spectrum(noisy)
    # Constant parts aren't measured, but of a clean image they are the flattest.
    dither = 1e-4 * unit * np.random.default_rng(0).normal(size=clean.shape)
    beside, other_unit = _flat_spectrum(clean + dither)
    if beside is not None:
        beside = replace(beside, noise_sigma=beside.noise_sigma * other_unit / unit)
    return found is not None and found.is_noise_beside(beside)


def _flat_spectrum(planes: NDArray[Any]) -> tuple[FlatSpectrum | None, float]:
    """The noise in flat parts, and the range of intensities that it is relative to."""
    pixels = checked_pixels(planes, None)
    if pixels.scale == 0:
        return None, 1.0
    return flat_spectrum(pixels, pixels.sample()), pixels.scale


# --- scenes ---------------------------------------------------------------------------------------


class _Reader:
    """Reads the slices that have regions."""

    def __init__(
        self,
        stack: Any,
        reference: Any,
        plane_axes: PlaneAxes,
        spacing: tuple[float, float],
        config: FineTuneConfig,
        noise: _Noise,
        masks: dict[tuple[int, ...], NDArray[np.bool_]],
    ) -> None:
        self.stack, self.reference = stack, reference
        self.plane_axes, self.spacing = plane_axes, spacing
        self.config, self.noise = config, noise
        every = sorted(masks)
        self.indices = [every[i] for i in sample_planes(len(every), MOST_SLICES)]
        self.masks = {index: masks[index] for index in self.indices}
        at_the_end = bool(np.random.default_rng(config.seed).integers(2))
        self.held_out = {
            index: hold_out(mask, config.held_out, at_the_end=at_the_end)
            for index, mask in self.masks.items()
        }
        self.unread = len(every) - len(self.indices)
        self.masked = 0
        self.constant: list[tuple[int, ...]] = []
        self.quiet: list[tuple[int, ...]] = []

    def messages(self) -> Iterator[str]:
        """What wasn't as usual."""
        if self.unread:
            yield f"{self.unread} slices with regions weren't needed."
        if self.masked:
            yield f"{self.masked} NaN or infinite pixels in the regions took no part."
        if self.constant:
            yield (
                f"The regions of {_named(self.constant)} are constant: there is nothing to learn. "
                "Draw them where the image shows something."
            )
        if self.quiet:
            yield f"No noise was found in {_named(self.quiet)}, which took no part."

    def scenes(self, index: tuple[int, ...]) -> Iterator[Scene]:
        """What a slice gives to learn from: nothing, one scene, or one for each neighbour."""
        plane = read_plane(self.stack, index, self.plane_axes)
        mask = self.masks[index]
        where = _box(mask, self.config.patch + MARGIN)
        if self.config.mode == "neighbours":
            for other in self._neighbours(index):
                target = read_plane(self.stack, other, self.plane_axes)
                blocked = self.held_out[index] | self.held_out.get(other, np.False_)
                yield from self._scene(index, plane, target, where, blocked)
        else:
            target = None
            if self.config.needs_reference:
                target = read_plane(self.reference, index, self.plane_axes)
            yield from self._scene(index, plane, target, where, self.held_out[index])

    def _neighbours(self, index: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        at = _neighbour_axis(tuple(self.stack.shape), self.plane_axes)
        lengths = [n for axis, n in enumerate(self.stack.shape) if axis not in self.plane_axes]
        assert at is not None
        for there in (index[at] - 1, index[at] + 1):
            if 0 <= there < lengths[at]:
                yield (*index[:at], there, *index[at + 1 :])

    def _scene(
        self,
        index: tuple[int, ...],
        plane: NDArray[Any],
        target: NDArray[Any] | None,
        where: tuple[slice, slice],
        blocked: NDArray[np.bool_],
    ) -> Iterator[Scene]:
        image = plane[where].astype(np.float64)
        declared = self.noise.prepared.config.missing
        finite = ~missing_pixels(plane, declared).mask[where]
        if target is not None:
            finite &= ~missing_pixels(target, declared).mask[where]
            target = target[where].astype(np.float64)
        inside = self.masks[index][where] & finite
        self.masked += int((self.masks[index][where] & ~finite).sum())
        values = [image[inside]] + ([] if target is None else [target[inside]])
        if any(len(v) == 0 or v.min() == v.max() for v in values):
            self.constant.append(index)
            return
        prepared = self.noise.of_slice(plane)
        if prepared.noise.is_zero:
            self.quiet.append(index)
            return
        if target is not None and self.config.mode == "paired":
            target = _matched(target, image, inside)
        valid = None if finite.all() else finite
        units = SolverUnits.of(image, valid)
        held_out = self.held_out[index][where] & finite
        model = units.noise(prepared.noise)
        seen = units.encode(image, valid, "float32")
        aim = None if target is None else units.encode(target, valid, "float32")
        if self.config.mode == "paired" and aim is not None:
            estimate = aim
        elif self.config.mode == "clean":
            estimate = seen
        else:
            estimate = units.encode(self._denoised(plane[where], prepared), valid, "float32")
        yield Scene(
            image=seen,
            target=aim,
            estimate=estimate,
            learn=inside & ~held_out,
            held_out=held_out,
            blocked=blocked[where],
            source=NoiseSource(model, self.noise.spectrum),
            valid=valid,
        )

    def _denoised(self, part: NDArray[Any], prepared: Prepared) -> NDArray[Any]:
        job = PlaneSolver(prepared, self.spacing, TilingConfig()).solve(part.astype(np.float32))
        while True:
            try:
                next(job)
            except StopIteration as stop:
                plane: NDArray[Any] = stop.value.plane
                return plane


def _named(indices: Sequence[tuple[int, ...]]) -> str:
    shown = ", ".join("×".join(map(str, i)) or "0" for i in indices[:5])
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f"slice {shown}{more}" if len(indices) == 1 else f"slices {shown}{more}"


def _box(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice]:
    """The part of a slice that patches of its regions may lie in."""
    edges = []
    for axis in (1, 0):
        inside = np.flatnonzero(mask.any(axis))
        edges.append(slice(max(0, int(inside[0]) - margin), int(inside[-1]) + 1 + margin))
    return edges[0], edges[1]


def _matched(
    reference: NDArray[np.float64], noisy: NDArray[np.float64], inside: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The reference on the noisy image's scale: least squares over the regions.

    The noise is in what is fitted, not in what it is fitted by, so it leaves no bias.
    """
    x, y = reference[inside], noisy[inside]
    slope = float(np.cov(x, y)[0, 1] / x.var(ddof=1))
    if slope <= 0:
        raise InvalidImageError(
            "In the regions the reference doesn't resemble the image: where one is bright the "
            "other is dark. Choose the reference that belongs to it."
        )
    return np.asarray(slope * (reference - x.mean()) + y.mean())


# --- preview and card -----------------------------------------------------------------------------


class _Preview:
    """Denoises one slice by the current model, but not too often."""

    def __init__(
        self,
        stack: Any,
        index: tuple[int, ...] | None,
        plane_axes: PlaneAxes,
        noise: _Noise,
        spacing: tuple[float, float],
        diffusion: Diffusion,
    ) -> None:
        self.index, self.spacing, self.diffusion = index, spacing, diffusion
        self.last = -np.inf
        if index is not None:
            self.plane = read_plane(stack, index, plane_axes)
            self.prepared = noise.of_slice(self.plane)

    def denoised(self, model: LearnedDiffusivity) -> NDArray[Any] | None:
        if self.index is None or time.monotonic() - self.last < PREVIEW_SECONDS:
            return None
        solver = PlaneSolver(self.prepared, self.spacing, TilingConfig(), given=model)
        job = solver.solve(self.plane)
        while True:
            try:
                next(job)
            except StopIteration as stop:
                self.last = time.monotonic()
                plane: NDArray[Any] = stop.value.plane
                return plane


def _facts(
    model: LearnedDiffusivity,
    start: str,
    noise: _Noise,
    config: FineTuneConfig,
    reader: _Reader,
    name: str,
) -> dict[str, Any]:
    """What the card says: plain values that JSON can keep."""
    begun = card(start)
    diffusion = noise.prepared.config
    pixels = sum(int(mask.sum()) for mask in reader.masks.values())
    held_out = sum(int(mask.sum()) for mask in reader.held_out.values())
    return {
        "title": model.title,
        "summary": f"{begun.title}, fine-tuned on {name or 'regions of a stack'} ({config.mode}).",
        "noise_range": list(begun.noise_range),
        "suggestion": {"iterations": diffusion.iterations, "tau": diffusion.tau},
        "start": start,
        "layer": name,
        "regions": {
            "slices": len(reader.masks),
            "pixels": pixels,
            "held_out": held_out,
            "boxes": [[list(i), *_bounds(m)] for i, m in list(reader.masks.items())[:MOST_SLICES]],
        },
        "noise": noise.prepared.noise.to_dict(),
        "noise_measured": noise.spectrum is not None,
        "settings": asdict(config),
        "date": date.today().isoformat(),
        "version": version("napari-learned-diffusion"),
    }


def _bounds(mask: NDArray[np.bool_]) -> list[int]:
    """First row, first column, last row and last column of a region."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [int(rows[0]), int(columns[0]), int(rows[-1]), int(columns[-1])]
