"""Where results go among the viewer's layers: updated where there is one already, else added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from napari.layers import Image
from qtpy.QtCore import QObject, QTimer

from napari_learned_diffusion.widgets._layers import (
    MARK,
    Placement,
    Source,
    find_result,
    mark_of,
    remove_layer,
)

if TYPE_CHECKING:
    from napari.components import LayerList
    from napari.layers import Layer

DIFFUSIVITY_COLORMAP = "inferno"
RESIDUAL_COLORMAP = "PiYG"
RESIDUAL_LIMIT = 4.0
"""Of the residual's contrast, in standard deviations of the noise."""

STACKING_ORDER = ("diffusivity", "orientation", "residual", "denoised", "preview", "iterations")
"""Results from the lowest layer to the highest: what is looked at first is on top."""


class OneByOne(QObject):
    """Shows layers one after the other, each in an event of its own.

    One takes napari a tenth of a second or two, in which the window stands still.

    Parameters
    ----------
    parent
        Who owns it.
    """

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._waiting: list[Callable[[], Any]] = []
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._do_next)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be shown."""
        return not self._waiting

    def add(self, action: Callable[[], Any]) -> None:
        """Something to do after `begin`."""
        self._waiting.append(action)

    def begin(self) -> None:
        """Do the first at once, and each other when napari has done what that asks for."""
        self._do_next()

    def clear(self) -> None:
        """Do nothing more."""
        self._waiting.clear()
        self._timer.stop()

    def _do_next(self) -> None:
        if self._waiting:
            self._waiting.pop(0)()
        if self._waiting:
            self._timer.start(0)
        else:
            self._timer.stop()


def show_result(
    layers: LayerList,
    source: Source,
    role: str,
    data: Any,
    place: Placement,
    look: dict[str, Any],
    details: dict[str, Any],
    *,
    is_selected: bool = True,
) -> Image:
    """Update the layer that an earlier run has made, or add one.

    Parameters
    ----------
    layers
        The viewer's.
    source
        What the result was made from.
    role
        What it is; its first word is in `STACKING_ORDER`.
    data, place
        Its pixels, and where they lie.
    look
        Keywords of a new layer; one that is there keeps what the user has made of it.
    details
        How it came about, for its metadata.
    is_selected
        Whether a new layer becomes the selected one.
    """
    mark = {
        "role": role,
        "source_id": str(source.layer_id),
        "source": source.name,
        "content": source.content,
        **details,
    }
    # What a file declares to be no intensity is that of its image, not of a residual or a map.
    of_image = role.split()[0] in ("denoised", "preview")
    kept = {k: v for k, v in source.metadata.items() if of_image or k != "missing"}
    metadata = {**kept, MARK: mark}
    layer = find_result(layers, source, role)
    if layer is not None and layer.ndim != data.ndim:
        remove_layer(layers, layer)
        layer = None
    if layer is None:
        layer = Image(
            data, name=f"{source.name} {role}", metadata=metadata, **place.keywords(), **look
        )
        if look is source.display:
            layer.contrast_limits_range = source.contrast_limits_range
            layer.contrast_limits = source.display["contrast_limits"]
        with nullcontext() if is_selected else selection_kept(layers):
            layers.insert(position(layers, source, role), layer)
    else:
        # Name, colours and contrast stay as the user has set them since.
        layer.metadata = metadata
        place.apply(layer)
        if layer.data is not data:
            layer.data = data
            if not layer.visible:
                # napari measures a hidden layer anew only when it is moved; until then the sliders
                # would keep the range of the old data.
                layer.scale = place.scale
        else:
            layer.refresh()
    return layer


@contextmanager
def selection_kept(layers: LayerList) -> Iterator[None]:
    """Insert layers without selecting them, as napari would, which takes a quarter of the time."""
    selected = set(layers.selection)
    with layers.selection.events.blocker_all():
        yield
        layers.selection.clear()
        layers.selection.update(selected)


def position(layers: LayerList, source: Source, role: str) -> int:
    """Index in the layer list: above the source, and among its results in a fixed order."""
    position = 0
    for at, layer in enumerate(layers):
        if layer.unique_id == source.layer_id or _is_below(layer, source, role):
            position = at + 1
    return position


def _is_below(layer: Layer, source: Source, role: str) -> bool:
    mark = mark_of(layer)
    is_of_source = mark.get("source_id") == str(source.layer_id)
    return is_of_source and _rank(mark["role"]) <= _rank(role)


def _rank(role: str) -> int:
    return STACKING_ORDER.index(role.split()[0])
