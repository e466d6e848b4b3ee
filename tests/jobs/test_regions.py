"""Regions: from masks, shapes and files to pixels, and the part of them that is held out."""

from __future__ import annotations

import numpy as np
import pytest

from napari_learned_diffusion.core.errors import FileFormatError, InvalidImageError
from napari_learned_diffusion.jobs.regions import (
    Region,
    hold_out,
    merged,
    read_shapes,
    region_of_shape,
    regions_of_mask,
    regions_of_shapes,
)

SHAPE = (4, 40, 50)
AXES = (1, 2)


def box(top: float, left: float, bottom: float, right: float, z: float = 1) -> np.ndarray:
    return np.array([[z, top, left], [z, top, right], [z, bottom, right], [z, bottom, left]])


def pixels(region: Region | None) -> np.ndarray:
    assert region is not None
    return merged([region], (40, 50))[region.index]


def test_a_rectangle_holds_the_pixels_whose_centres_lie_in_it():
    region = region_of_shape("rectangle", box(9.6, 4.5, 19.5, 14.5), SHAPE, AXES)
    expected = np.zeros((40, 50), np.bool_)
    expected[10:20, 5:15] = True
    np.testing.assert_array_equal(pixels(region), expected)
    assert (region.index, region.top, region.left, region.mask.shape) == ((1,), 10, 5, (10, 10))


def test_an_ellipse_fills_its_rectangle_by_a_quarter_of_pi():
    region = region_of_shape("ellipse", box(5, 5, 25, 45), SHAPE, AXES)
    assert pixels(region).sum() == pytest.approx(np.pi * 10 * 20, rel=0.03)
    assert pixels(region)[15, 25]
    assert not pixels(region)[6, 6]


def test_polygons_follow_the_plane_axes():
    triangle = np.array([[0.0, 2, 0], [3, 2, 0], [0, 2, 30]])
    region = region_of_shape("polygon", triangle, SHAPE, (0, 2))
    assert region.index == (2,)
    assert region.mask[0].sum() > region.mask[-1].sum()


def test_shapes_are_cut_at_the_image_and_left_out_beyond_it():
    regions, notes = regions_of_shapes(
        [
            ("rectangle", box(-10, -10, 4.5, 4.5)),
            ("rectangle", box(100, 100, 120, 120)),
            ("rectangle", box(1, 1, 9, 9, z=7)),
            ("line", box(1, 1, 9, 9)[:2]),
            ("path", box(1, 1, 9, 9)),
        ],
        SHAPE,
        AXES,
    )
    assert [r.mask.shape for r in regions] == [(5, 5)]
    assert notes == [
        "2 lines enclosed no pixels and took no part.",
        "2 shapes outside of the image took no part.",
    ]


def test_a_mask_has_a_region_for_each_slice():
    labels = np.zeros(SHAPE, np.int32)
    labels[1, 3:5, 7:9] = 4
    labels[3, 10, 10] = 1
    regions = regions_of_mask(labels, SHAPE, AXES)
    assert [(r.index, r.top, r.left, r.mask.shape) for r in regions] == [
        ((1,), 3, 7, (2, 2)),
        ((3,), 10, 10, (1, 1)),
    ]
    with pytest.raises(InvalidImageError, match="shape"):
        regions_of_mask(labels[1], SHAPE, AXES)


def test_files_of_shapes_as_napari_saves_them(tmp_path):
    lines = ["index,shape-type,vertex-index,axis-0,axis-1,axis-2"]
    for number, (kind, corners) in enumerate(
        [("rectangle", box(2, 2, 9, 9)), ("line", box(1, 1, 2, 2)[:2])]
    ):
        lines += [f"{number},{kind},{i},{z},{y},{x}" for i, (z, y, x) in enumerate(corners)]
    path = tmp_path / "regions.csv"
    path.write_text("\n".join(lines) + "\n")
    regions, notes = read_shapes(path, SHAPE, AXES)
    assert pixels(regions[0]).sum() == 64
    assert len(notes) == 1
    for text in ("a,b\n1,2\n", lines[0] + "\n0,rectangle,0,x,y,z\n", "index,shape-type\n0,line\n"):
        path.write_text(text)
        with pytest.raises(FileFormatError, match="axis-0, axis-1, axis-2"):
            read_shapes(path, SHAPE, AXES)
    with pytest.raises(FileFormatError, match="can't be read"):
        read_shapes(tmp_path / "absent.csv", SHAPE, AXES)


def test_overlapping_regions_count_once():
    regions = [
        Region((0,), 0, 0, np.ones((5, 5), np.bool_)),
        Region((0,), 3, 3, np.ones((5, 5), np.bool_)),
    ]
    assert merged(regions, (40, 50))[(0,)].sum() == 50 - 4


@pytest.mark.parametrize("at_the_end", [True, False])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_what_is_held_out_is_a_strip_across_the_longer_side(shape, at_the_end):
    mask = np.zeros((50, 50), np.bool_)
    mask[3 : 3 + shape[0], 5 : 5 + shape[1]] = True
    held = hold_out(mask, 0.2, at_the_end=at_the_end)
    assert held.sum() == pytest.approx(0.2 * mask.sum(), abs=20)
    assert not (held & ~mask).any()
    lines = held.any(axis=1 if shape[0] > shape[1] else 0)
    assert np.diff(np.flatnonzero(lines)).max() == 1


def test_something_is_held_out_however_small_the_region():
    mask = np.zeros((9, 9), np.bool_)
    mask[2:4, 2:4] = True
    assert hold_out(mask, 0.01, at_the_end=False).sum() == 2
