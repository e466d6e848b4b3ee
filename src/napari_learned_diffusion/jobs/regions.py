"""Regions of a stack: which pixels of which slices were selected, and how they are told."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import FileFormatError, InvalidImageError
from napari_learned_diffusion.jobs.planes import PlaneAxes, plane_indices, read_plane

SHAPES = ("rectangle", "ellipse", "polygon")
"""Shapes that enclose pixels, by napari's names."""

_CORNERS = 96
"""Of the polygon that stands for an ellipse."""


@dataclass(frozen=True, eq=False)
class Region:
    """Selected pixels of one slice.

    Parameters
    ----------
    index
        Of the slice, one number for each axis that isn't part of it.
    top, left
        Row and column of the upper left corner of the mask.
    mask
        ``(h, w)``, True where a pixel is selected.
    """

    index: tuple[int, ...]
    top: int
    left: int
    mask: NDArray[np.bool_]


def region_of_plane(index: tuple[int, ...], selected: NDArray[Any]) -> Region | None:
    """The region of a slice's mask ``(h, w)``; ``None`` where nothing is selected."""
    inside = np.asarray(selected) != 0
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    if len(rows) == 0:
        return None
    top, left = int(rows[0]), int(columns[0])
    return Region(index, top, left, inside[top : rows[-1] + 1, left : columns[-1] + 1].copy())


def regions_of_mask(mask: Any, shape: tuple[int, ...], plane_axes: PlaneAxes) -> list[Region]:
    """The regions of a mask or of labels, slice by slice.

    Parameters
    ----------
    mask
        Numpy, dask or zarr array of the stack's shape, selected where it isn't 0.
    shape
        Of the stack.
    plane_axes
        Row axis and column axis of the slices, counted from the front.

    Raises
    ------
    InvalidImageError
        if the shapes differ.
    """
    if tuple(mask.shape) != tuple(shape):
        raise InvalidImageError(
            f"The regions have the shape {tuple(mask.shape)}, the image {tuple(shape)}. "
            "Make them for this image."
        )
    found = (
        region_of_plane(index, read_plane(mask, index, plane_axes))
        for index in plane_indices(tuple(shape), plane_axes)
    )
    return [region for region in found if region is not None]


def region_of_shape(
    kind: str, vertices: NDArray[Any], shape: tuple[int, ...], plane_axes: PlaneAxes
) -> Region | None:
    """The pixels whose centres lie in a shape; ``None`` where it lies outside of the stack.

    Parameters
    ----------
    kind
        One of `SHAPES`.
    vertices
        ``(n, ndim)``, in pixels of the stack; of an ellipse the corners of the rectangle around it.
        All lie in one slice.
    shape, plane_axes
        As of `regions_of_mask`.
    """
    from skimage.draw import polygon

    corners = np.asarray(vertices, dtype=np.float64)
    others = [axis for axis in range(len(shape)) if axis not in plane_axes]
    index = tuple(round(float(corners[0, axis])) for axis in others)
    if any(not 0 <= i < shape[axis] for i, axis in zip(index, others, strict=True)):
        return None
    outline = corners[:, list(plane_axes)]
    if kind == "ellipse":
        centre = outline.mean(axis=0)
        along, across = (outline[1] - outline[0]) / 2, (outline[3] - outline[0]) / 2
        angle = np.linspace(0, 2 * math.pi, _CORNERS, endpoint=False)[:, None]
        outline = centre + np.cos(angle) * along + np.sin(angle) * across
    plane = np.zeros([shape[axis] for axis in plane_axes], np.bool_)
    inside = polygon(outline[:, 0], outline[:, 1], plane.shape)  # type: ignore[no-untyped-call]
    plane[inside] = True
    return region_of_plane(index, plane)


def read_shapes(
    path: Path, shape: tuple[int, ...], plane_axes: PlaneAxes
) -> tuple[list[Region], list[str]]:
    """The regions in a CSV file as napari saves a Shapes layer, and notes on what was left out.

    Its columns are ``index``, ``shape-type``, ``vertex-index`` and ``axis-0``, ``axis-1`` …, the
    coordinates of the vertices in pixels.

    Raises
    ------
    FileFormatError
        if it can't be read or has other columns.
    """
    axes = [f"axis-{n}" for n in range(len(shape))]
    shapes: dict[str, tuple[str, list[list[float]]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                _, vertices = shapes.setdefault(row["index"], (row["shape-type"], []))
                vertices.append([float(row[axis]) for axis in axes])
    except OSError as error:
        raise FileFormatError(f"{path} can't be read: {error.strerror or error}.") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise FileFormatError(
            f"{path} isn't a table of shapes for an image of {len(shape)} axes: it needs the "
            f"columns index, shape-type, vertex-index, {', '.join(axes)}, as napari saves a Shapes "
            "layer."
        ) from error
    return regions_of_shapes(
        ((kind, np.array(vertices)) for kind, vertices in shapes.values()), shape, plane_axes
    )


def regions_of_shapes(
    shapes: Iterable[tuple[str, NDArray[Any]]], shape: tuple[int, ...], plane_axes: PlaneAxes
) -> tuple[list[Region], list[str]]:
    """The regions of many shapes, and notes on what was left out; as `region_of_shape`."""
    regions: list[Region] = []
    open_shapes = outside = 0
    for kind, vertices in shapes:
        if kind not in SHAPES or len(vertices) < 3:
            open_shapes += 1
            continue
        region = region_of_shape(kind, vertices, shape, plane_axes)
        if region is None:
            outside += 1
        else:
            regions.append(region)
    notes = []
    if open_shapes:
        notes.append(f"{_count(open_shapes, 'line')} enclosed no pixels and took no part.")
    if outside:
        notes.append(f"{_count(outside, 'shape')} outside of the image took no part.")
    return regions, notes


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def merged(
    regions: Sequence[Region], plane_shape: tuple[int, int]
) -> dict[tuple[int, ...], NDArray[np.bool_]]:
    """The selected pixels ``(h, w)`` of each slice that has any; overlaps count once."""
    masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}
    for region in regions:
        mask = masks.setdefault(region.index, np.zeros(plane_shape, np.bool_))
        h, w = region.mask.shape
        mask[region.top : region.top + h, region.left : region.left + w] |= region.mask
    return masks


def hold_out(mask: NDArray[np.bool_], share: float, *, at_the_end: bool) -> NDArray[np.bool_]:
    """A strip across the longer side of a region, with about that share of its pixels.

    One strip, and not scattered pixels, so that few patches run into it.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    axis = 0 if rows[-1] - rows[0] >= columns[-1] - columns[0] else 1
    lines = mask.sum(axis=1 - axis)
    counted = np.cumsum(lines[::-1] if at_the_end else lines)
    held = counted <= max(share * counted[-1], counted[counted > 0][0])
    if at_the_end:
        held = held[::-1]
    return np.asarray(mask & (held[:, None] if axis == 0 else held[None, :]))
