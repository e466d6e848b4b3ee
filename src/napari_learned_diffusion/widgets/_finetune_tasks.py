"""What a worker does for the fine-tuning widget, and the frozen request that it is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Labels, Layer, Shapes
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, FineTuneConfig
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets._imports import import_module
from napari_learned_diffusion.widgets._layers import Source
from napari_learned_diffusion.widgets._tasks import pausable
from napari_learned_diffusion.widgets._text import short_name

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.finetune import FineTuned


def load_jobs() -> Any:
    """The module of the job. Importing it imports torch, so this is called in a worker."""
    import_module("torch._dynamo")  # which the optimiser would import when the window may be in use
    return import_module("napari_learned_diffusion.jobs.finetune")


@dataclass(frozen=True, eq=False)
class Selection:
    """The regions as a layer had them: shapes with their corners in pixels, or labels.

    Parameters
    ----------
    shapes
        Kind and ``(n, ndim)`` vertices of each shape.
    labels
        Array of the image's shape, selected where it isn't 0; ``None`` where there are shapes.
    """

    shapes: tuple[tuple[str, NDArray[np.float64]], ...] = ()
    labels: Any = None


@dataclass(frozen=True, eq=False)
class FineTuneRequest:
    """Everything that a fine-tuning is told; nothing in it changes when the user goes on working.

    Parameters
    ----------
    source
        The layer.
    selection
        The regions.
    reference
        Pixels of the reference layer; ``None`` where the mode needs none.
    config, diffusion
        The settings.
    preview
        Whether the slice in view is shown as the current model denoises it.
    """

    source: Source
    selection: Selection
    reference: Any
    config: FineTuneConfig
    diffusion: DiffusionConfig
    preview: bool


def select(layer: Layer, image: Layer) -> Selection:
    """The regions that a layer marks on an image layer.

    Raises
    ------
    InvalidImageError
        if it has other axes than the image.
    """
    if isinstance(layer, Labels):
        if tuple(layer.data.shape) != tuple(image.data.shape):
            raise InvalidImageError(
                f"“{short_name(layer.name)}” has the shape {tuple(layer.data.shape)}, the image "
                f"{tuple(image.data.shape)}. Press New for a layer that fits."
            )
        data = layer.data
        return Selection(labels=data.copy() if isinstance(data, np.ndarray) else data)
    if not isinstance(layer, Shapes):
        raise InvalidSettingError("Choose a layer of shapes or labels for the regions, or New.")
    if layer.ndim != image.ndim:
        raise InvalidImageError(
            f"“{short_name(layer.name)}” has {layer.ndim} axes, the image {image.ndim}. Press New "
            "for a layer that fits."
        )
    shapes = []
    for kind, vertices in zip(layer.shape_type, layer.data, strict=True):
        world = [layer.data_to_world(vertex) for vertex in vertices]  # type: ignore[no-untyped-call]
        corners = [image.world_to_data(point) for point in world]
        shapes.append((str(kind), np.array(corners, dtype=np.float64)))
    return Selection(tuple(shapes))


def fine_tune(
    request: FineTuneRequest,
    paused: threading.Event,
    stopped: threading.Event,
    load: Callable[[], Any] = load_jobs,
) -> Job[tuple[FineTuned, tuple[str, ...]]]:
    """Fine-tune a model; the result, and notes on regions that took no part.

    Parameters
    ----------
    paused
        While it is set, the training stands still.
    stopped
        Once it is set, the training ends with the best step so far.
    """
    yield Progress(0, 1, "Preparing")
    jobs = load()
    from napari_learned_diffusion.jobs.regions import regions_of_mask, regions_of_shapes

    source, selection = request.source, request.selection
    shape = tuple(source.data.shape)
    notes: list[str] = []
    if selection.labels is not None:
        regions = regions_of_mask(selection.labels, shape, source.plane_axes)
    else:
        regions, notes = regions_of_shapes(selection.shapes, shape, source.plane_axes)
        if selection.shapes and not regions:
            raise InvalidSettingError(" ".join(["No region lies in the image.", *notes]))
    job: Job[FineTuned] = jobs.fine_tune(
        source.data,
        regions,
        request.config,
        request.diffusion,
        reference=request.reference,
        plane_axes=source.plane_axes,
        spacing=source.spacing,
        name=source.name,
        stop=stopped.is_set,
        preview=source.index if request.preview else None,
    )
    tuned = yield from pausable(job, paused)
    return tuned, tuple(notes)
