"""Results that are denoised as the user scrolls: what is computed when, and what stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest
from napari.components import ViewerModel

from napari_learned_diffusion.core.errors import InvalidImageError
from napari_learned_diffusion.files import read as read_file
from napari_learned_diffusion.files import write_image
from napari_learned_diffusion.widgets._layers import MARK, check, read
from napari_learned_diffusion.widgets._lazy_stack import AHEAD, BEHIND, LazyStack
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

TIMEOUT = 20_000
LENGTH = 60

Make = Callable[[Any], DenoiseWidget]
Finish = Callable[[DenoiseWidget], None]


@pytest.fixture
def long() -> Any:
    """Sixty slices of 8 × 9 pixels."""
    return np.arange(LENGTH * 8 * 9, dtype=np.float32).reshape(LENGTH, 8, 9)


def _names(viewer: Any) -> list[str]:
    return [layer.name for layer in viewer.layers]


def _order(jobs: Any, data: Any) -> list[int]:
    """Which slices were denoised, in order."""
    first = data[:, 0, 0]
    done = [call["plane"][0, 0] for call in jobs.called("denoise_plane")]
    return [int(np.flatnonzero(first == corner)[0]) for corner in done]


# --- the array ------------------------------------------------------------------------------------


def _stack(model: ViewerModel, data: Any, **options: Any) -> LazyStack:
    layer = model.add_image(data, contrast_limits=(0, 10))
    return LazyStack(read(layer, model.dims), **options)


KEYS = [
    np.s_[3],
    np.s_[3, :, :],
    np.s_[:, 2, :],
    np.s_[..., 4],
    np.s_[1:5, :, 2:7],
    np.s_[::-1, ::2, -1],
    np.s_[3, 2, 1],
    np.s_[:],
]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_it_is_indexed_like_an_array(
    model: ViewerModel, long: Any, key: Any, order: tuple[int, ...]
) -> None:
    model.add_image(long)
    model.dims.order = order
    stack = LazyStack(read(model.layers[0], model.dims))
    expected = long.copy()
    for at in (2, 3, 7):
        where = [slice(None)] * 3
        where[order[0]] = at
        expected[tuple(where)] += 1
        stack.put((at,), expected[tuple(where)])
    np.testing.assert_array_equal(stack[key], expected[key])


def test_what_is_not_loaded_is_not_loaded_for_the_display(model: ViewerModel, long: Any) -> None:
    def fail(_: Any) -> Any:
        raise AssertionError("loaded")

    lazy = da.from_array(long, chunks=(1, -1, -1)).map_blocks(fail, dtype=long.dtype, meta=long)
    model.add_image(lazy, contrast_limits=(0, 1), visible=False)
    stack = LazyStack(read(model.layers[0], model.dims))
    assert np.isnan(stack[4]).all()
    stack.put((4,), long[4])
    np.testing.assert_array_equal(stack[4], long[4])


def test_the_slice_in_view_comes_first_then_those_ahead_then_those_behind(
    model: ViewerModel, long: Any
) -> None:
    stack = _stack(model, long)
    assert stack.next() is None  # nobody looks

    def drain() -> list[int]:
        found = []
        while (index := stack.next()) is not None:
            stack.put(index, long[index])
            found.append(index[0])
        return found

    stack.look_at((10,))
    ahead, behind = list(range(10, 11 + AHEAD)), list(range(9, 9 - BEHIND, -1))
    assert drain() == ahead + behind
    stack.look_at((50,))
    stack.look_at((49,))
    assert drain() == [49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35, *range(50, 56)]
    stack.look_at(None)
    assert stack.next() is None


def test_with_four_axes_it_looks_ahead_along_the_axis_that_moves(model: ViewerModel) -> None:
    stack = _stack(model, np.zeros((5, 6, 8, 9)))
    stack.look_at((1, 2))
    stack.put((1, 2), np.zeros((8, 9)))
    assert stack.next() == (1, 3)
    stack.look_at((2, 2))
    stack.put((2, 2), np.zeros((8, 9)))
    assert stack.next() == (3, 2)


def test_memory_is_bounded_and_what_is_far_is_forgotten(model: ViewerModel, long: Any) -> None:
    stack = _stack(model, long, budget=5 * long[0].nbytes)
    for view in (0, 30):
        stack.look_at((view,))
        while (index := stack.next()) is not None:
            stack.put(index, long[index] + 1)
        assert stack.n_ready == 5
        np.testing.assert_array_equal(stack[view : view + 5], long[view : view + 5] + 1)
    np.testing.assert_array_equal(stack[0], long[0])
    with pytest.raises(InvalidImageError, match=r"5 of 60 slices.*Denoise stack"):
        np.asarray(stack)


def test_one_slice_is_always_kept(model: ViewerModel, long: Any) -> None:
    stack = _stack(model, long, budget=1)
    for view in (3, 8):
        stack.look_at((view,))
        assert stack.next() == (view,)
        stack.put((view,), long[view] + 1)
        assert stack.next() is None
        np.testing.assert_array_equal(stack[view], long[view] + 1)


def test_the_whole_is_given_when_it_is_there_and_not_before(model: ViewerModel, long: Any) -> None:
    stack = _stack(model, long[:3])
    for whole in (np.asarray, copy.deepcopy, np.max):
        with pytest.raises(InvalidImageError, match="0 of 3 slices"):
            whole(stack)  # type: ignore[operator]
    for at in range(3):
        stack.put((at,), long[at] + 1)
    np.testing.assert_array_equal(np.asarray(stack), long[:3] + 1)
    np.testing.assert_array_equal(copy.deepcopy(stack), long[:3] + 1)


# --- the widget -----------------------------------------------------------------------------------


@pytest.fixture
def scroll(model: ViewerModel, make_widget: Make, long: Any, finish: Finish) -> DenoiseWidget:
    """A widget whose layer “cells” is denoised as the user scrolls; it has computed the first."""
    model.add_image(long, name="cells", scale=(3, 1, 0.5), contrast_limits=(5, 4000))
    widget = make_widget(model)
    model.dims.set_point(0, 3 * 20)
    widget.stack_way.set_key("scroll")
    widget.stack_button.click()
    finish(widget)
    return widget


def test_what_is_in_view_is_denoised_then_what_comes_next(
    model: ViewerModel, scroll: DenoiseWidget, jobs: Any, long: Any
) -> None:
    result = model.layers["cells denoised"]
    np.testing.assert_array_equal(result.scale, (3, 1, 0.5))
    assert tuple(result.contrast_limits) == (5, 4000)
    np.testing.assert_array_equal(result._data_view, long[20] + 1)
    expected = [*range(20, 21 + AHEAD), *range(19, 19 - BEHIND, -1)]
    assert _order(jobs, long) == expected
    assert f"{len(expected)} of {LENGTH} slices ready" in scroll.lazy_info.text()
    call = jobs.called("denoise_plane")[0]
    assert call["spacing"] == (1, 0.5)
    mark = result.metadata[MARK]
    assert mark["unfinished"]
    assert mark["model"] == "auto"
    assert mark["noise"] == {"key": "gaussian", "noise_sigma": 5.0}
    assert "MainThread" not in jobs.threads


def test_scrolling_goes_on_from_what_is_there(
    model: ViewerModel, scroll: DenoiseWidget, jobs: Any, long: Any, finish: Finish
) -> None:
    done = len(jobs.called("denoise_plane"))
    model.dims.set_point(0, 3 * 22)
    finish(scroll)
    assert _order(jobs, long)[done:] == [45, 46]
    model.dims.set_point(0, 3 * 50)
    finish(scroll)
    assert _order(jobs, long)[done + 2] == 50
    np.testing.assert_array_equal(model.layers["cells denoised"]._data_view, long[50] + 1)
    assert len(jobs.called("prepare")) == 1


def test_a_slice_that_is_not_ready_shows_at_once_and_the_worker_turns_to_it(
    qtbot: Any, model: ViewerModel, scroll: DenoiseWidget, jobs: Any, long: Any, finish: Finish
) -> None:
    jobs.gate.clear()
    jobs.running.clear()
    model.dims.set_point(0, 3 * 22)  # which is there: the worker is at a slice ahead
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    model.dims.set_point(0, 0)
    result = model.layers["cells denoised"]
    np.testing.assert_array_equal(result._data_view, long[0])  # as it came
    qtbot.waitUntil(lambda: jobs.closed == 1, timeout=TIMEOUT)  # the one ahead can wait
    jobs.gate.set()
    qtbot.waitUntil(lambda: bool((result._data_view == long[0] + 1).all()), timeout=TIMEOUT)
    finish(scroll)


def test_another_setting_begins_anew(
    qtbot: Any, model: ViewerModel, scroll: DenoiseWidget, jobs: Any, long: Any, finish: Finish
) -> None:
    result = model.layers["cells denoised"]
    jobs.gate.clear()
    jobs.running.clear()
    scroll.form.iterations.set_value(2)
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    assert "0 of 60 slices ready" in scroll.lazy_info.text()
    np.testing.assert_array_equal(result._data_view, long[20] + 1)  # the old one, so long
    np.testing.assert_array_equal(result.data[21], long[21])
    jobs.gate.set()
    finish(scroll)
    assert jobs.called("denoise_plane")[-1]["config"].iterations == 2
    assert result is model.layers["cells denoised"]
    done = len(jobs.called("denoise_plane"))
    scroll.form.residual.setChecked(True)  # has no influence on the result
    finish(scroll)
    assert len(jobs.called("denoise_plane")) == done


def test_other_axes_in_view_begin_anew(
    model: ViewerModel, scroll: DenoiseWidget, long: Any, finish: Finish
) -> None:
    model.dims.set_point(1, 3)
    model.dims.order = (1, 0, 2)
    finish(scroll)
    result = model.layers["cells denoised"]
    np.testing.assert_array_equal(result._data_view, long[:, 3] + 1)
    assert "8 of 8 slices ready" in scroll.lazy_info.text()


def test_in_the_3d_view_nothing_is_computed(
    model: ViewerModel, scroll: DenoiseWidget, jobs: Any, finish: Finish
) -> None:
    done = len(jobs.called("denoise_plane"))
    model.dims.ndisplay = 3
    finish(scroll)
    assert len(jobs.called("denoise_plane")) == done
    assert "No slice is in view" in scroll.lazy_info.text()
    model.dims.ndisplay = 2
    finish(scroll)
    assert "No slice" not in scroll.lazy_info.text()


def test_new_data_begin_anew(
    model: ViewerModel, scroll: DenoiseWidget, long: Any, finish: Finish
) -> None:
    layer = model.layers["cells"]
    layer.data = (long[:30, :, :5] + 100).astype(np.uint16)  # another shape and type
    finish(scroll)
    result = model.layers["cells denoised"]
    assert result.data.shape == (30, 8, 5)
    assert result.data.dtype == np.uint16
    np.testing.assert_array_equal(result.data[20], long[20, :, :5] + 101)
    layer.data = np.zeros((4, 8, 9), bool)
    finish(scroll)
    assert "mask" in scroll.status.text()
    assert _names(model) == ["cells"]
    assert not scroll._lazy


def test_the_whole_stack_now_makes_it_an_ordinary_result(
    model: ViewerModel, scroll: DenoiseWidget, long: Any, finish: Finish
) -> None:
    scroll.stack_way.set_key("now")
    scroll.stack_button.click()
    finish(scroll)
    result = model.layers["cells denoised"]
    assert isinstance(result.data, np.ndarray)
    np.testing.assert_array_equal(result.data, long + 1)
    assert "unfinished" not in result.metadata[MARK]
    assert "report" in result.metadata[MARK]
    assert not scroll._lazy
    assert not scroll.lazy_info.text()


def test_a_cancelled_run_gives_the_lazy_result_back(
    qtbot: Any, model: ViewerModel, scroll: DenoiseWidget, jobs: Any, long: Any, finish: Finish
) -> None:
    stack = model.layers["cells denoised"].data
    jobs.gate.clear()
    jobs.running.clear()
    scroll.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    model.dims.set_point(0, 0)
    scroll.cancel_button.click()
    jobs.gate.set()
    finish(scroll)
    result = model.layers["cells denoised"]
    assert result.data is stack
    np.testing.assert_array_equal(result._data_view, long[0] + 1)
    scroll.denoise_stack()
    scroll.form.iterations.set_value(2)
    scroll.cancel()
    finish(scroll)
    assert jobs.called("denoise_plane")[-1]["config"].iterations == 2


def test_cancel_ends_it(model: ViewerModel, scroll: DenoiseWidget, finish: Finish) -> None:
    assert scroll.cancel_button.isEnabled()
    scroll.cancel_button.click()
    finish(scroll)
    assert _names(model) == ["cells"]
    assert model.layers.selection.active.name == "cells"
    assert not scroll.cancel_button.isEnabled()
    assert not scroll.lazy_info.text()


def test_cancel_gives_an_earlier_result_back(
    model: ViewerModel, make_widget: Make, long: Any, finish: Finish
) -> None:
    model.add_image(long, name="cells")
    widget = make_widget(model)
    widget.denoise_stack()
    finish(widget)
    result = model.layers["cells denoised"]
    data, metadata = result.data, result.metadata
    widget.denoise_as_you_scroll()
    finish(widget)
    assert result.data is not data
    widget.cancel()
    assert result.data is data
    assert result.metadata == metadata


def test_a_complete_one_stays(
    model: ViewerModel, make_widget: Make, stack: Any, finish: Finish
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_as_you_scroll()
    finish(widget)
    assert "5 of 5 slices ready" in widget.lazy_info.text()
    widget.leave()
    result = model.layers["cells denoised"]
    assert isinstance(result.data, np.ndarray)
    np.testing.assert_array_equal(result.data, stack + 1)
    assert "unfinished" not in result.metadata[MARK]


@pytest.mark.parametrize("name", ["cells", "cells denoised"])
def test_removing_a_layer_ends_it(
    qtbot: Any, model: ViewerModel, scroll: DenoiseWidget, jobs: Any, finish: Finish, name: str
) -> None:
    jobs.gate.clear()
    jobs.running.clear()
    model.dims.set_point(0, 0)
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    model.layers.remove(name)
    qtbot.waitUntil(lambda: jobs.closed == 1, timeout=TIMEOUT)
    finish(scroll)
    assert "cells denoised" not in _names(model)
    assert not scroll._lazy


def test_an_error_is_told_and_the_layer_goes(
    model: ViewerModel, scroll: DenoiseWidget, jobs: Any, finish: Finish
) -> None:
    jobs.error = RuntimeError("out of memory")
    model.dims.set_point(0, 0)
    finish(scroll)
    assert "out of memory" in scroll.status.text()
    assert _names(model) == ["cells"]
    jobs.error = None
    scroll.stack_button.click()
    finish(scroll)
    assert _names(model) == ["cells", "cells denoised"]


def test_each_slice_gets_its_own_noise_where_the_form_says_so(
    model: ViewerModel, make_widget: Make, jobs: Any, stack: Any, finish: Finish
) -> None:
    stack = stack.copy()
    stack[4] = np.nan
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.noise_scope.set_key("slice")
    widget.denoise_as_you_scroll()
    finish(widget)
    assert [call["image"].ndim for call in jobs.called("prepare")] == [3, 2, 2, 2, 2]
    data = np.asarray(model.layers["cells denoised"].data)
    np.testing.assert_array_equal(data[:4], stack[:4] + 1)
    assert np.isnan(data[4]).all()  # which has no noise to estimate


def test_two_layers_are_denoised_side_by_side(
    model: ViewerModel, scroll: DenoiseWidget, long: Any, finish: Finish
) -> None:
    model.add_image(long[:, :4] * 2, name="others", scale=(3, 1, 0.5))
    scroll.form.layer.setCurrentText("others")
    scroll.stack_button.click()
    finish(scroll)
    model.dims.set_point(0, 3 * 59)
    finish(scroll)
    for name, data in (("cells", long), ("others", long[:, :4] * 2)):
        result = model.layers[f"{name} denoised"]
        np.testing.assert_array_equal(result._data_view, data[59] + 1)
        assert f"“{name}” as you scroll" in scroll.lazy_info.text()


def test_it_cannot_be_taken_for_a_whole_stack(
    model: ViewerModel, scroll: DenoiseWidget, tmp_path: Any
) -> None:
    result = model.layers["cells denoised"]
    with pytest.raises(InvalidImageError, match="denoised as you scroll"):
        check(result)
    _, attributes, _ = result.as_layer_data_tuple()
    path = str(tmp_path / "cells.tif")
    with pytest.raises(InvalidImageError, match="slices are denoised so far"):
        write_image(path, result.data, attributes)
    for at in range(LENGTH):
        result.data.put((at,), np.full((8, 9), at, np.float32))
    write_image(path, result.data, attributes)
    assert read_file(path).data[:, 0, 0].tolist() == list(range(LENGTH))


def test_it_is_denoised_as_the_stack_is(
    model: ViewerModel, make_widget: Make, finish: Finish
) -> None:
    from napari_learned_diffusion.jobs import denoise as real_jobs

    data = np.random.default_rng(0).normal(100, 10, (3, 32, 40)).astype(np.float32)
    model.add_image(data, name="cells")
    widget = make_widget(model)
    widget._load_jobs = lambda: real_jobs
    widget.form.model.set_key("perona-malik")
    widget.denoise_as_you_scroll()
    finish(widget)
    lazily = np.asarray(model.layers["cells denoised"].data)
    widget.denoise_stack()
    finish(widget)
    np.testing.assert_array_equal(model.layers["cells denoised"].data, lazily)
