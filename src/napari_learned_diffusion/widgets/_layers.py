"""The one module that reads napari layers: pixels, axes and place of a layer, as a frozen snapshot.

Everything here compares layers by ``unique_id``: napari hands plugins a proxy of its viewer, and a
proxy is a new object at every access.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels, Layer
from numpy.typing import NDArray

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.core.text import one_line
from napari_learned_diffusion.files._napari import volume_of_layer
from napari_learned_diffusion.widgets._content import Content, checksum, content_of
from napari_learned_diffusion.widgets._lazy_stack import LazyStack
from napari_learned_diffusion.widgets._text import short_name

if TYPE_CHECKING:
    from napari.components import Dims, LayerList

    from napari_learned_diffusion.files import Volume

MARK = "napari-learned-diffusion"
"""Key in a layer's metadata under which a result says where it comes from."""

INTENSITY_UNIT = "intensity_unit"
"""Key in a layer's metadata that names the unit of its intensities, such as ``"HU"``."""

LONGEST_UNIT = 16
"""Letters of such a unit that are shown."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the array of a layer lies in the world; the keywords that a new layer takes.

    Parameters
    ----------
    scale, translate, rotate, shear, affine, units, axis_labels
        As napari's layers take them, of a layer with as many axes as the array.
    """

    scale: NDArray[np.float64]
    translate: NDArray[np.float64]
    rotate: NDArray[np.float64]
    shear: NDArray[np.float64]
    affine: NDArray[np.float64]
    units: tuple[Any, ...]
    axis_labels: tuple[str, ...]

    @classmethod
    def of(cls, layer: Layer) -> Placement:
        """The place of a layer, copied."""
        return cls(
            scale=np.array(layer.scale),
            translate=np.array(layer.translate),
            rotate=np.array(layer.rotate),
            shear=np.array(layer.shear),
            affine=np.array(layer.affine.affine_matrix),
            units=tuple(layer.units),
            axis_labels=tuple(layer.axis_labels),
        )

    def with_axis(self, label: str, first: float, step: float) -> Placement:
        """The place of an array with one more axis before the others, which has no unit."""
        ndim = len(self.scale)
        rotate, affine = np.eye(ndim + 1), np.eye(ndim + 2)
        rotate[1:, 1:], affine[1:, 1:] = self.rotate, self.affine
        return Placement(
            scale=np.concatenate([[step], self.scale]),
            translate=np.concatenate([[first], self.translate]),
            rotate=rotate,
            # The upper triangle, row by row: the new axis has the first row.
            shear=np.concatenate([np.zeros(ndim), self.shear]),
            affine=affine,
            units=("pixel", *self.units),
            axis_labels=(label, *self.axis_labels),
        )

    def keywords(self) -> dict[str, Any]:
        """The keywords of `napari.layers.Image`."""
        return {
            "scale": self.scale,
            "translate": self.translate,
            "rotate": self.rotate,
            "shear": self.shear,
            "affine": self.affine,
            "units": self.units,
            "axis_labels": self.axis_labels,
        }

    def apply(self, layer: Layer) -> None:
        """Move an existing layer to this place."""
        now = Placement.of(layer).keywords()
        for name, value in self.keywords().items():
            # napari draws the layer anew at each assignment, so only what has changed is assigned.
            if not np.array_equal(now[name], value):
                setattr(layer, name, value)


@dataclass(frozen=True, eq=False)
class Source:
    """A layer at the moment of asking: all that a job needs, and nothing that is alive.

    Parameters
    ----------
    layer_id
        ``unique_id`` of the layer.
    name
        Its name.
    data
        Its pixels, a numpy or a dask array of any number of axes from 2; never copied.
    plane_axes
        The two axes in view, ascending.
    index
        Position of the slice in view on every other axis; ``None`` if ``slice_problem`` says why.
    slice_problem
        Why there is no slice in view, in words for the user; empty if there is one.
    spacing
        Size of a pixel along ``plane_axes``, in world units.
    placement
        Where the whole layer lies.
    intensity_unit
        Unit of the intensities, ``""`` where unknown.
    display
        Keywords that make a new layer look like this one.
    contrast_limits_range
        Range of the contrast slider, in layer units.
    metadata
        The layer's own metadata.
    path
        The file it was opened from, ``""`` if none.
    content
        That of ``data`` at this moment: what is known of other content doesn't hold.
    """

    layer_id: Hashable
    name: str
    data: Any
    plane_axes: tuple[int, int]
    index: tuple[int, ...] | None
    slice_problem: str
    spacing: tuple[float, float]
    placement: Placement
    intensity_unit: str
    display: dict[str, Any]
    contrast_limits_range: tuple[float, float]
    metadata: dict[str, Any] = field(repr=False)
    path: str = ""
    content: Content = ()

    @property
    def other_axes(self) -> tuple[int, ...]:
        """The axes along which there are slices."""
        return tuple(a for a in range(self.data.ndim) if a not in self.plane_axes)

    @property
    def n_slices(self) -> int:
        """Number of slices."""
        return int(np.prod([self.data.shape[a] for a in self.other_axes], dtype=np.int64))

    @property
    def plane_shape(self) -> tuple[int, int]:
        """Rows and columns of a slice."""
        first, second = self.plane_axes
        return int(self.data.shape[first]), int(self.data.shape[second])

    @property
    def plane_letters(self) -> str:
        """The axes of a slice by their letters; empty if these are YX or not known."""
        labels = [self.placement.axis_labels[axis].upper() for axis in self.plane_axes]
        letters = "".join(labels)
        is_named = all(len(label) == 1 and label.isalpha() for label in labels)
        return letters if is_named and letters != "YX" else ""

    def select(self, index: tuple[int, ...]) -> tuple[int | slice, ...]:
        """What to index the array with to get the slice at ``index``."""
        where = dict(zip(self.other_axes, index, strict=True))
        return tuple(where.get(axis, slice(None)) for axis in range(self.data.ndim))

    def read_slice(self) -> NDArray[Any]:
        """Load the slice in view, and of a lazy layer nothing else; shape ``plane_shape``."""
        if self.index is None:
            raise InvalidImageError(self.slice_problem)
        return self.read_at(self.index)

    def read_at(self, index: tuple[int, ...]) -> NDArray[Any]:
        """Load one slice; that of a masked array with its mask."""
        plane = self.data[self.select(index)]
        return plane if isinstance(plane, np.ma.MaskedArray) else np.asarray(plane)

    def has_changed(self) -> bool:
        """Whether the array has other content now."""
        return content_of(self.data) != self.content

    def content_at(self, index: tuple[int, ...] | None) -> int | None:
        """A checksum of one slice; ``None`` where there is none, or it isn't in memory."""
        if index is None or not isinstance(self.data, np.ndarray):
            return None
        return checksum(self.read_at(index))

    def blank(self) -> float:
        """What stands where a slice isn't done: nothing, or black where there is no nothing."""
        dtype = np.dtype(self.data.dtype)
        if dtype.kind == "f":
            return float("nan")
        info = np.iinfo(dtype)
        return float(np.clip(self.display["contrast_limits"][0], info.min, info.max))

    def as_slice_of_layer(self, plane: NDArray[Any]) -> NDArray[Any]:
        """A plane with an axis of length 1 for each axis that isn't part of it.

        napari then shows it on this slice alone, and along the right axes whichever are in view.
        """
        return np.expand_dims(plane, self.other_axes)

    def as_iterations_of_layer(self, maps: NDArray[Any]) -> NDArray[Any]:
        """Maps of the slice, ``(n, h, w)``: an axis of iterations, then those of the layer."""
        return np.expand_dims(maps, tuple(axis + 1 for axis in self.other_axes))

    def iterations_placement(self, first: int, stride: int) -> Placement:
        """The place of what `as_iterations_of_layer` returns.

        Parameters
        ----------
        first, stride
            Iteration of the first map, and from one map to the next.
        """
        return self.slice_placement().with_axis("iteration", first, stride)

    def slice_placement(self) -> Placement:
        """The place of what `as_slice_of_layer` returns."""
        if self.index is None:
            raise InvalidImageError(self.slice_problem)
        place = self.placement
        offset = np.zeros(self.data.ndim)
        offset[list(self.other_axes)] = self.index
        return Placement(
            scale=place.scale,
            translate=place.translate + _linear_matrix(place) @ offset,
            rotate=place.rotate,
            shear=place.shear,
            affine=place.affine,
            units=place.units,
            axis_labels=place.axis_labels,
        )

    def describe(self) -> str:
        """One line: which axes are the slice, its size and type, and which slice it is.

        Slices are counted from 0, as napari counts them beside its slider.
        """
        names = [_axis_name(label, a) for a, label in enumerate(self.placement.axis_labels)]
        rows, columns = self.plane_shape
        plane = " × ".join(names[a] for a in self.plane_axes)
        text = f"Slice {plane}, {rows} × {columns} px, {self.data.dtype}"
        if self.other_axes and self.index is not None:
            at = ", ".join(
                f"{names[a]}\xa0{i}\xa0/\xa0{self.data.shape[a] - 1}"  # on one line
                for a, i in zip(self.other_axes, self.index, strict=True)
            )
            text += f" · {at}"
        return text


def _axis_name(label: str, axis: int) -> str:
    # napari names nameless axes "-3", "-2", "-1"; to a reader that is a minus sign.
    return f"axis {axis}" if label.lstrip("-").isdigit() else label


def _linear_matrix(place: Placement) -> NDArray[np.float64]:
    from napari.utils.transforms import Affine

    transform = Affine(scale=place.scale, rotate=place.rotate, shear=place.shear)
    return np.asarray(transform.linear_matrix, dtype=np.float64)


def check(layer: Layer) -> Image:
    """Give the layer back as the image it is, or refuse what can't be denoised.

    Raises
    ------
    InvalidImageError
        with a sentence that says why and what to do instead.
    """
    name = short_name(layer.name)
    if isinstance(layer, Labels):
        raise InvalidImageError(
            f"“{name}” holds labels: numbers of objects, which must not be averaged. "
            "Choose an image layer."
        )
    if not isinstance(layer, Image):
        raise InvalidImageError(f"“{name}” isn't an image layer. Choose an image layer.")
    if isinstance(layer.data, LazyStack):
        raise InvalidImageError(
            f"“{name}” is being denoised as you scroll, and is no whole stack yet. Choose the "
            "layer that it was made from."
        )
    if layer.multiscale:
        raise InvalidImageError(
            f"“{name}” is a multiscale layer. Add one of its levels as a layer of its own, for "
            "example viewer.add_image(layer.data[0])."
        )
    if layer.rgb:
        raise InvalidImageError(
            f"“{name}” is an RGB image. Split it into channels first: right-click the layer, then "
            "Split RGB."
        )
    if layer.data.ndim < 2:
        raise InvalidImageError(f"“{name}” has only one axis; an image needs two.")
    if 0 in layer.data.shape:
        shape = " × ".join(map(str, layer.data.shape))
        raise InvalidImageError(f"“{name}” is empty: its shape is {shape}.")
    kind = np.dtype(layer.data.dtype).kind
    if kind == "b":
        raise InvalidImageError(
            f"“{name}” is a mask of true and false: it has no noise that could be averaged away. "
            "Choose an image with intensities."
        )
    if kind == "c":
        raise InvalidImageError(
            f"“{name}” has complex values. Add its magnitude as a layer of its own, for example "
            "viewer.add_image(abs(layer.data))."
        )
    if kind not in "iuf":
        raise InvalidImageError(f"“{name}” holds {layer.data.dtype}, not numbers.")
    return layer


def read(layer: Layer, dims: Dims) -> Source:
    """Take a snapshot of a layer as the viewer shows it.

    Raises
    ------
    InvalidImageError
        if the layer can't be denoised.
    """
    image = check(layer)
    data = _as_array(image.data)
    order = _layer_order(dims, data.ndim)
    first, second = sorted(order[-2:])
    index, problem = _slice_in_view(layer, data, dims, order)
    place = Placement.of(layer)
    to_world = place.affine[:-1, :-1] @ _linear_matrix(place)
    lengths = np.linalg.norm(to_world, axis=0)
    unit = layer.metadata.get(INTENSITY_UNIT, "")
    low, high = image.contrast_limits_range
    return Source(
        layer_id=layer.unique_id,
        name=str(layer.name),
        data=data,
        plane_axes=(first, second),
        index=index,
        slice_problem=problem,
        spacing=(float(lengths[first]), float(lengths[second])),
        placement=place,
        intensity_unit=one_line(unit, LONGEST_UNIT) if isinstance(unit, str) else "",
        display={
            "contrast_limits": tuple(image.contrast_limits),
            "colormap": image.colormap.name,
            "gamma": image.gamma,
            "interpolation2d": image.interpolation2d,
        },
        contrast_limits_range=(float(low), float(high)),
        metadata=dict(layer.metadata),
        path=str(layer.source.path or ""),
        content=content_of(data),
    )


def as_volume(layer: Layer) -> Volume:
    """A layer as an image file would give it: its pixels, not copied, and what its axes mean.

    Raises
    ------
    InvalidImageError
        if the layer can't be denoised.
    """
    image = check(layer)
    _, attributes, _ = image.as_layer_data_tuple()  # type: ignore[no-untyped-call]
    return volume_of_layer(str(layer.name), image.data, attributes)


def has_other_content(layer: Layer, source: Source) -> bool:
    """Whether a layer has got other data than it had, or the same array with other content."""
    data = layer.data
    if data is source.data or isinstance(data, np.ndarray):
        return content_of(data) != source.content
    # Of other arrays, such as zarr's, the snapshot holds a lazy array that was made of it.
    return isinstance(data, LazyStack)


def _as_array(data: Any) -> Any:
    # Behind a layer there may be whatever can be sliced, such as a zarr array; the jobs take numpy
    # and dask, and dask keeps such an array lazy.
    if isinstance(data, np.ndarray):
        return data
    import dask.array as da

    if isinstance(data, da.Array):
        return data
    return da.from_array(data)  # type: ignore[no-untyped-call]


def _layer_order(dims: Dims, ndim: int) -> list[int]:
    """Axes of a layer in the viewer's order, the displayed ones last."""
    offset = dims.ndim - ndim
    return [int(axis) - offset for axis in dims.order if axis >= offset]


def _slice_in_view(
    layer: Layer, data: Any, dims: Dims, order: list[int]
) -> tuple[tuple[int, ...] | None, str]:
    others = sorted(order[:-2])
    if not others:
        return (), ""
    if dims.ndisplay != 2:
        return None, "In the 3D view no slice is in view: switch to the 2D view (Ctrl+Y)."
    position = np.rint(layer.world_to_data(dims.point)).astype(int)
    index = tuple(int(position[axis]) for axis in others)
    if any(not 0 <= i < data.shape[a] for a, i in zip(others, index, strict=True)):
        return (
            None,
            f"“{short_name(layer.name)}” has no slice here: move the slider into the layer.",
        )
    return index, ""


def mark_of(layer: Layer) -> dict[str, Any]:
    """What a result of this plugin says about itself; empty for every other layer."""
    mark = layer.metadata.get(MARK)
    return mark if isinstance(mark, dict) else {}


def find_result(layers: Iterable[Layer], source: Source, role: str) -> Image | None:
    """The layer in which an earlier run has put the same result of the same layer.

    Of several, because the user has duplicated one, it is the lowest: napari puts copies on top.
    """
    for layer in layers:
        mark = mark_of(layer)
        is_result = mark.get("role") == role and mark.get("source_id") == str(source.layer_id)
        if is_result and isinstance(layer, Image):
            return layer
    return None


def remove_layer(layers: LayerList, layer: Layer) -> None:
    """Remove a layer, without the look for garbage that napari takes at all objects meanwhile.

    With torch loaded that would be a third of a second, in which the window stands still.
    """
    gc.freeze()
    try:
        layers.remove(layer)
    finally:
        gc.unfreeze()


def find_layer(layers: Iterable[Layer], layer_id: Hashable) -> Layer | None:
    """The layer of that ``unique_id``, if it is still there."""
    return next((layer for layer in layers if layer.unique_id == layer_id), None)
