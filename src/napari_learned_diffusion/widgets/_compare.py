"""Two ways to look at a result and its input at once, and the way back from both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Layer
from numpy.typing import NDArray

from napari_learned_diffusion.widgets._layers import find_layer, remove_layer
from napari_learned_diffusion.widgets._results import selection_kept

if TYPE_CHECKING:
    from napari.viewer import Viewer

    from napari_learned_diffusion.widgets._tasks import Checked


class SideBySide:
    """Some layers alone, in a grid of one row.

    Parameters
    ----------
    viewer
        The viewer.
    """

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self._grid: dict[str, Any] | None = None
        self._visible: dict[Hashable, bool] = {}

    def begin(self, layers: Sequence[Layer]) -> None:
        """Show these layers beside each other, and no others."""
        if self._grid is not None:
            return
        grid = self._viewer.canvas.grid
        self._grid = {name: getattr(grid, name) for name in ("enabled", "shape", "stride")}
        shown = {layer.unique_id for layer in layers}
        self._visible = {layer.unique_id: layer.visible for layer in self._viewer.layers}
        for layer in self._viewer.layers:
            _set_visible(layer, layer.unique_id in shown)
        grid.update({"shape": (1, len(layers)), "stride": 1, "enabled": True})
        self._viewer.reset_view()

    def end(self) -> None:
        """Go back to what was before; layers that came since stay as they are."""
        if self._grid is None:
            return
        for layer_id, was_visible in self._visible.items():
            layer = find_layer(self._viewer.layers, layer_id)
            if layer is not None:
                _set_visible(layer, was_visible)
        self._viewer.canvas.grid.update(self._grid)
        self._grid = None
        self._viewer.reset_view()


def _set_visible(layer: Layer, is_visible: bool) -> None:
    # napari draws everything anew at each assignment, so only what has changed is assigned.
    if layer.visible != is_visible:
        layer.visible = is_visible


class Wipe:
    """A layer that is the input on the left of an edge and the result on its right.

    It is hidden while it isn't wanted: to make a layer anew is the longest that the window ever
    stands still.

    Parameters
    ----------
    viewer
        The viewer.
    """

    def __init__(self, viewer: Viewer) -> None:
        self._viewer = viewer
        self.layer_id: Hashable = None
        self._source_id: Hashable = None
        self._before: NDArray[Any] = np.empty((0, 0))
        self._after = self._before
        self._is_turned = False

    def begin(self, checked: Checked) -> None:
        """Show the slice that was checked, above all other layers."""
        source = checked.request.source
        self._before, self._after = checked.before, checked.after
        # Left and right are along the axis that the viewer draws last.
        rows, columns = self._viewer.dims.displayed[-2:]
        self._is_turned = rows > columns
        if source.layer_id != self._source_id:
            self.remove()
        pixels = source.as_slice_of_layer(self._before.astype(np.float32))
        layers = self._viewer.layers
        layer = find_layer(layers, self.layer_id)
        if layer is not None:
            source.slice_placement().apply(layer)
            layer.data = pixels
            if layers[-1] is not layer:
                layers.move(layers.index(layer), len(layers))
            _set_visible(layer, True)
            return
        layer = Image(
            pixels,
            name=f"{source.name} wipe",
            **source.slice_placement().keywords(),
            **source.display,
        )
        self.layer_id, self._source_id = layer.unique_id, source.layer_id
        with selection_kept(layers):
            layers.append(layer)

    def move_to(self, share: float) -> None:
        """Put the edge where so much of the width, from 0 to 1, is on its left."""
        layer = find_layer(self._viewer.layers, self.layer_id)
        if layer is None:
            return
        pixels = layer.data.reshape(self._before.shape)  # a view
        target, before, after = (
            image.T if self._is_turned else image for image in (pixels, self._before, self._after)
        )
        edge = round(share * target.shape[1])
        target[:, :edge], target[:, edge:] = before[:, :edge], after[:, edge:]
        layer.refresh(highlight=False, extent=False)

    def end(self) -> None:
        """Hide the layer."""
        layer = find_layer(self._viewer.layers, self.layer_id)
        if layer is not None:
            _set_visible(layer, False)

    def remove(self) -> None:
        """Take the layer away."""
        layer = find_layer(self._viewer.layers, self.layer_id)
        self.forget()
        if layer is not None:
            remove_layer(self._viewer.layers, layer)

    def forget(self) -> None:
        """The layer is gone."""
        self.layer_id = self._source_id = None
