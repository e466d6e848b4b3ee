"""What is read from layers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
from napari.components import ViewerModel
from napari.layers import Image, Labels, Points

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.widgets._layers import MARK, Placement, find_result, read


def _add(model: ViewerModel, data: Any, **keywords: Any) -> Image:
    return model.add_image(data, **keywords)


def test_the_slice_in_view_is_read(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack)
    model.dims.set_point(0, 3)
    source = read(layer, model.dims)
    assert source.plane_axes == (1, 2)
    assert source.index == (3,)
    np.testing.assert_array_equal(source.read_slice(), stack[3])
    assert source.n_slices == 5


def test_the_slice_is_found_through_scale_and_translation(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack, scale=(3, 0.5, 0.5), translate=(100, 0, 0))
    model.dims.set_point(0, 100 + 3 * 2)
    assert read(layer, model.dims).index == (2,)


@pytest.mark.parametrize(
    ("order", "plane_axes", "index", "slices"),
    [
        ((0, 1, 2), (1, 2), (4,), np.s_[4]),
        ((1, 0, 2), (0, 2), (3,), np.s_[:, 3]),
        ((2, 0, 1), (0, 1), (7,), np.s_[:, :, 7]),
        ((0, 2, 1), (1, 2), (4,), np.s_[4]),
    ],
)
def test_the_plane_is_the_one_on_display(
    model: ViewerModel,
    stack: Any,
    order: tuple[int, ...],
    plane_axes: tuple[int, int],
    index: tuple[int, ...],
    slices: Any,
) -> None:
    layer = _add(model, stack)
    model.dims.order = order
    for axis, at in enumerate((4, 3, 7)):
        model.dims.set_point(axis, at)
    source = read(layer, model.dims)
    assert source.plane_axes == plane_axes
    assert source.index == index
    np.testing.assert_array_equal(source.read_slice(), stack[slices])


def test_four_axes(model: ViewerModel) -> None:
    data = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    layer = _add(model, data)
    model.dims.set_point(0, 1)
    model.dims.set_point(1, 2)
    source = read(layer, model.dims)
    assert source.other_axes == (0, 1)
    np.testing.assert_array_equal(source.read_slice(), data[1, 2])
    assert source.as_slice_of_layer(source.read_slice()).shape == (1, 1, 4, 5)


def test_a_plane_beside_a_stack_has_its_own_axes(model: ViewerModel, stack: Any) -> None:
    _add(model, stack)
    plane = _add(model, stack[0])
    source = read(plane, model.dims)
    assert source.plane_axes == (0, 1)
    assert source.index == ()
    assert source.other_axes == ()


def test_spacing_counts_scale_and_affine(model: ViewerModel, stack: Any) -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    layer = _add(model, stack, scale=(4, 0.5, 0.25), affine=affine)
    assert read(layer, model.dims).spacing == pytest.approx((1.0, 0.75))


def test_beyond_the_layer_there_is_no_slice(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack)
    _add(model, np.zeros((20, 12, 16)))
    model.dims.set_point(0, 15)
    source = read(layer, model.dims)
    assert source.index is None
    assert "move the slider" in source.slice_problem
    with pytest.raises(InvalidImageError, match="move the slider"):
        source.read_slice()


def test_the_3d_view_has_no_slice(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack)
    model.dims.ndisplay = 3
    source = read(layer, model.dims)
    assert "2D view" in source.slice_problem
    assert source.plane_axes == (1, 2)


@pytest.mark.parametrize(
    ("make_layer", "words"),
    [
        (lambda: Image(np.zeros((8, 9, 3), np.uint8), rgb=True), "Split RGB"),
        (lambda: Image(np.zeros((8, 9), bool)), "mask"),
        (lambda: Image([np.zeros((16, 16)), np.zeros((8, 8))], multiscale=True), "multiscale"),
        (lambda: Labels(np.zeros((8, 9), int)), "labels"),
        (lambda: Points(np.zeros((1, 2))), "image layer"),
    ],
    ids=["rgb", "bool", "multiscale", "labels", "points"],
)
def test_what_is_no_image_is_refused_with_a_remedy(
    model: ViewerModel, make_layer: Callable[[], Any], words: str
) -> None:
    layer = make_layer()
    with pytest.raises(InvalidImageError, match=words):
        read(layer, model.dims)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros(9), "only one axis"),
        (np.zeros((0, 9)), "empty: its shape is 0 × 9"),
        (np.zeros((8, 9), complex), "abs"),
        (np.zeros((8, 9), "U1"), "not numbers"),
    ],
    ids=["one axis", "zero size", "complex", "text"],
)
def test_data_that_napari_rarely_lets_in_are_refused(
    model: ViewerModel, monkeypatch: pytest.MonkeyPatch, data: Any, words: str
) -> None:
    layer = Image(np.zeros((8, 9)), name="odd")
    monkeypatch.setattr(Image, "data", property(lambda _: data))
    with pytest.raises(InvalidImageError, match=words):
        read(layer, model.dims)


def test_a_lazy_layer_stays_lazy(model: ViewerModel) -> None:
    loaded: list[Any] = []

    def load(block: Any, block_info: Any = None) -> Any:
        loaded.append(block_info[0]["array-location"][0])
        return block

    lazy = da.zeros((5, 12, 16), chunks=(1, -1, -1)).map_blocks(load, dtype=float)
    layer = Image(lazy, contrast_limits=(0, 1))
    model.layers.append(layer)
    model.dims.set_point(0, 2)
    source = read(layer, model.dims)
    loaded.clear()
    assert isinstance(source.data, da.Array)
    source.read_slice()
    assert loaded == [(2, 3)]


def test_whatever_can_be_sliced_becomes_a_lazy_array(model: ViewerModel) -> None:
    import zarr

    array = zarr.create_array({}, shape=(3, 8, 8), dtype="uint16")
    layer = _add(model, array, contrast_limits=(0, 1))
    assert isinstance(read(layer, model.dims).data, da.Array)


SPATIAL = {
    "scale": (3, 0.5, 0.25),
    "translate": (10, 20, 30),
    "rotate": 30,
    "shear": (0.1, 0, 0),
    "affine": np.array([[1, 0, 0, 5], [0, 0, -1, 6], [0, 1, 0, 7], [0, 0, 0, 1.0]]),
    "units": ("um", "um", "um"),
    "axis_labels": ("z", "y", "x"),
}


def test_all_spatial_metadata_are_copied(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack, **SPATIAL)
    copy = Image(stack, **read(layer, model.dims).placement.keywords())
    for name, value in Placement.of(layer).keywords().items():
        np.testing.assert_array_equal(getattr(Placement.of(copy), name), value, err_msg=name)


def test_a_slice_lies_where_it_was_cut_out(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack, **SPATIAL)
    model.dims.set_point(0, layer.data_to_world((2, 6, 8))[0])
    source = read(layer, model.dims)
    assert source.index is not None
    at = source.index[0]
    plane = source.as_slice_of_layer(source.read_slice())
    piece = Image(plane, **source.slice_placement().keywords())
    for corner in [(0, 0, 0), (0, 11, 0), (0, 11, 15)]:
        expected = layer.data_to_world((at, *corner[1:]))
        np.testing.assert_allclose(piece.data_to_world(corner), expected)
    assert piece.units == layer.units
    assert piece.axis_labels == layer.axis_labels


def test_applying_a_place_moves_a_layer(stack: Any) -> None:
    there = Placement.of(Image(stack, **SPATIAL))
    layer = Image(stack)
    there.apply(layer)
    np.testing.assert_allclose(layer.translate, SPATIAL["translate"])
    assert layer.axis_labels == SPATIAL["axis_labels"]


def test_the_unit_of_the_intensities_is_read(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack, metadata={"intensity_unit": "HU"})
    assert read(layer, model.dims).intensity_unit == "HU"


def test_the_description_names_axes_and_slice(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack, axis_labels=("z", "y", "x"))
    model.dims.set_point(0, 1)
    described = read(layer, model.dims).describe()
    assert described == "Slice y × x, 12 × 16 px, float32 · z\xa01\xa0/\xa04"
    nameless = _add(model, stack)
    assert "axis 1 × axis 2" in read(nameless, model.dims).describe()


def test_of_a_result_and_its_copy_the_result_is_found(model: ViewerModel, stack: Any) -> None:
    layer = _add(model, stack)
    source = read(layer, model.dims)
    mark = {"role": "denoised", "source_id": str(layer.unique_id)}
    first = _add(model, stack, metadata={MARK: mark})
    _add(model, stack, metadata={MARK: mark})
    assert find_result(model.layers, source, "denoised") is first
    assert find_result(model.layers, source, "residual") is None
