"""Arrays of layers that consoles and other plugins change in place, in every form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile
import zarr
from napari.components import ViewerModel

from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.jobs import check as check_jobs
from napari_learned_diffusion.jobs import inspection as inspection_jobs
from napari_learned_diffusion.widgets import _content
from napari_learned_diffusion.widgets._content import Probes, content_of
from napari_learned_diffusion.widgets._layers import MARK, read
from napari_learned_diffusion.widgets.batch import BatchWidget
from napari_learned_diffusion.widgets.check import CheckWidget
from napari_learned_diffusion.widgets.denoise import DenoiseWidget
from napari_learned_diffusion.widgets.inspection import InspectionWidget

TIMEOUT = 60_000

Make = Callable[[Any], DenoiseWidget]
Finish = Callable[[Any], None]


# --- what tells content from content --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_one_pixel_of_a_small_array_makes_other_content(dtype: Any) -> None:
    data = np.zeros((3, 8, 9), dtype)
    before = content_of(data)
    assert content_of(data) == content_of(data.copy()) == before
    data[1, 4, 5] = 1
    assert content_of(data) != before


def test_views_of_any_order_have_content() -> None:
    data = np.arange(60.0).reshape(3, 4, 5)
    for view in (data.T, data[::-1, ::2], np.broadcast_to(data[0], (3, 4, 5)), data[..., 0, 0]):
        before = content_of(view)
        assert content_of(view.copy(order="K")) == before
        data[0, 2, 0] += 1
        assert (content_of(view) != before) == bool((view == data[0, 2, 0]).any())
        data[0, 2, 0] -= 1


def test_of_a_large_array_rows_all_over_it_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_content, "WHOLE_BYTES", 40_000)
    data = np.zeros((50, 40, 100), np.float32)
    before = content_of(data)
    for at in range(len(data)):
        data[at] += 1
        assert content_of(data) != before, f"slice {at}"
        data[at] -= 1
    assert content_of(data) == before


def test_of_a_file_that_is_mapped_few_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_content, "WHOLE_BYTES", 4_000)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((60, 30, 20), np.float32))
    mapped = tifffile.memmap(tmp_path / "a.tif", mode="r+")
    before = content_of(mapped)
    mapped[:] = 7
    assert content_of(mapped) != before
    assert len(_content._part(mapped)) <= 64


def test_a_lazy_array_is_known_by_one_slice_that_a_worker_reads(model: ViewerModel) -> None:
    behind = zarr.array(np.zeros((5, 8, 9), np.float32), chunks=(1, 8, 9))
    model.add_image(da.from_array(behind), contrast_limits=(0, 1))
    source, probes = read(model.layers[0], model.dims), Probes()
    assert not probes.has_changed(source)  # it hasn't been seen before
    assert not probes.has_changed(source)
    behind[:] = 1
    assert probes.has_changed(source)
    assert not probes.has_changed(source)


# --- the Denoise form -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_told", [True, False])
@pytest.mark.parametrize("what", ["denoise_slice", "denoise_stack", "denoise_as_you_scroll"])
def test_the_next_run_estimates_anew(
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    jobs: Any,
    stack: Any,
    what: str,
    is_told: bool,
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_slice()
    finish(widget)
    assert len(jobs.called("prepare")) == 1
    layer.data[:] *= 10
    if is_told:
        layer.refresh()
    jobs.noise = Gaussian(50.0)
    getattr(widget, what)()
    finish(widget)
    assert len(jobs.called("prepare")) == 2
    plane = next(c for c in jobs.called("denoise_plane")[1:] + jobs.called("denoise_stack"))
    assert plane["config"].noise == Gaussian(50.0)
    assert "50" in widget.form.noise_info.text()


def test_what_was_found_out_is_used_while_nothing_changes(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    for what in (widget.denoise_slice, widget.denoise_stack, layer.refresh, widget.denoise_slice):
        what()
        finish(widget)
    assert len(jobs.called("prepare")) == 1


@pytest.mark.parametrize("kind", ["dask", "zarr", "dask that is assigned to"])
def test_a_lazy_layer_that_changes_gets_a_new_estimate(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any, kind: str
) -> None:
    behind = zarr.array(stack, chunks=(1, 12, 16))
    shown = behind if kind == "zarr" else da.from_array(behind)
    layer = model.add_image(shown, name="cells", contrast_limits=(0, 1000))
    widget = make_widget(model)
    widget.denoise_stack()
    finish(widget)
    if kind == "dask that is assigned to":
        layer.data[:] = 3.0
    else:
        behind[:] = stack * 10
    layer.refresh()
    widget.denoise_stack()
    finish(widget)
    assert len(jobs.called("prepare")) == 2


def test_the_estimate_is_not_shown_for_other_content(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.estimate()
    finish(widget)
    assert widget.form.noise_info.text()
    layer.data[:] += 1
    layer.refresh()
    assert not widget.form.noise_info.text()


def test_an_estimate_of_what_was_changed_meanwhile_is_not_kept(
    model: ViewerModel, make_widget: Make, finish: Finish, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.noise_kind.set_key("gaussian")
    widget.estimate()
    layer.data[:] *= 2  # and nobody is told
    finish(widget)
    assert widget.form.noise_sigma.value() is None
    assert not widget.form.noise_info.text()


def test_a_run_on_what_is_changed_is_cancelled(
    qtbot: Any, model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    jobs.gate.clear()
    widget.denoise_stack()
    qtbot.waitUntil(jobs.running.is_set, timeout=TIMEOUT)
    layer.refresh()  # nothing has changed
    assert widget._run.is_busy
    layer.data[:] += 1
    layer.refresh()
    finish(widget)
    assert "“cells” got other data" in widget.status.text()
    assert [la.name for la in model.layers] == ["cells"]


def test_the_preview_follows(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.live_preview.setChecked(True)
    finish(widget)
    done = len(jobs.called("denoise_plane"))
    layer.refresh()
    finish(widget)
    assert len(jobs.called("denoise_plane")) == done
    layer.data[2, 3, 4] += 100  # the slice in view
    layer.refresh()
    finish(widget)
    assert len(jobs.called("denoise_plane")) == done + 1
    np.testing.assert_array_equal(model.layers["cells preview"].data[0], layer.data[2] + 1)


def test_a_result_as_you_scroll_begins_again(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    layer = model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_as_you_scroll()
    finish(widget)
    layer.data[:] *= 3
    layer.refresh()
    finish(widget)
    assert len(jobs.called("prepare")) == 2
    np.testing.assert_array_equal(model.layers["cells denoised"].data.finished(), stack + 1)


def test_slices_that_changed_unseen_are_denoised_anew_as_you_scroll(
    model: ViewerModel,
    make_widget: Make,
    finish: Finish,
    stack: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = model.add_image(stack, name="cells")
    monkeypatch.setattr("napari_learned_diffusion.widgets._layers.content_of", lambda _: ())
    widget = make_widget(model)
    widget.denoise_as_you_scroll()
    finish(widget)
    lazy = model.layers["cells denoised"].data
    layer.data[2] += 50  # in view
    layer.refresh()
    finish(widget)
    np.testing.assert_array_equal(lazy[2], layer.data[2] + 1)
    layer.data[4] += 50  # not in view
    model.dims.set_point(0, 4)
    finish(widget)
    np.testing.assert_array_equal(lazy[4], layer.data[4] + 1)
    layer.data[0] += 50
    widget.cancel()  # the result isn't complete, so it goes
    assert [la.name for la in model.layers] == ["cells"]


# --- the other forms ------------------------------------------------------------------------------


def test_an_inspection_estimates_anew(qtbot: Any, model: ViewerModel) -> None:
    rng = np.random.default_rng(0)
    data = (100 + rng.normal(0, 5, (3, 48, 48))).astype(np.float32)
    layer = model.add_image(data, name="cells")
    widget = InspectionWidget(model, lambda: inspection_jobs)
    qtbot.addWidget(widget)
    widget.settings.set_key("own")
    widget.form.model.set_key("perona-malik")
    widget.form.device.set_key("cpu")
    widget.count.set_value(2)

    def noise() -> float:
        widget.inspect()
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
        assert widget._answer is not None
        return float(np.sqrt(widget._answer.found.prepared.noise.variance(np.array(100.0))))

    assert noise() == pytest.approx(5, rel=0.2)
    layer.data[:] = layer.data * 10 - 900
    layer.refresh()
    assert noise() == pytest.approx(50, rel=0.2)


def _with_result(model: ViewerModel) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    source = model.add_image(100 + rng.normal(0, 5, (3, 24, 32)), name="cells")
    mark = {
        "role": "denoised",
        "source_id": str(source.unique_id),
        "content": read(source, model.dims).content,
        "noise": Gaussian(5.0).to_dict(),
    }
    result = model.add_image(
        np.full((3, 24, 32), 100.0), name="cells denoised", metadata={MARK: mark}
    )
    return source, result


@pytest.mark.parametrize("which", ["cells", "cells denoised"])
def test_numbers_of_a_check_go_when_a_layer_is_changed(
    qtbot: Any, model: ViewerModel, which: str
) -> None:
    _with_result(model)
    widget = CheckWidget(model, lambda: check_jobs)
    qtbot.addWidget(widget)

    def check() -> None:
        widget.check()
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)

    check()
    assert widget.cells["Noise (flat areas)"][0].text() != "–"
    model.dims.set_point(0, 2)  # scrolling is no change
    assert widget.cells["Noise (flat areas)"][0].text() != "–"
    model.layers[which].data[:] *= 2
    model.layers[which].refresh()
    assert widget.cells["Noise (flat areas)"][0].text() == "–"
    assert f"“{which}” has changed" in widget.status.text()
    check()
    assert widget.cells["Noise (flat areas)"][0].text() != "–"
    model.layers[which].data = model.layers[which].data + 1
    assert widget.cells["Noise (flat areas)"][0].text() == "–"


def test_a_check_says_that_the_input_is_not_what_the_result_was_made_from(
    qtbot: Any, model: ViewerModel
) -> None:
    source, _ = _with_result(model)
    widget = CheckWidget(model, lambda: check_jobs)
    qtbot.addWidget(widget)
    source.data[:] = source.data * 10 - 900
    source.refresh()
    widget.check()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert "“cells” has changed since “cells denoised” was made from it" in widget.status.text()
    assert widget._checked is not None
    assert widget._checked.request.noise is None  # that of the old content says nothing


def test_a_batch_takes_the_data_that_a_layer_has_when_it_starts(
    qtbot: Any, model: ViewerModel, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    layer = model.add_image((100 + rng.normal(0, 5, (2, 24, 32))).astype("f4"), name="cells")
    widget = BatchWidget(model)
    qtbot.addWidget(widget)
    widget.out.setText(str(tmp_path))
    widget.form.model.set_key("perona-malik")
    widget.form.iterations.set_value(1)
    model.layers.selection = {layer}
    widget.add_layers()
    for offset in (0, 1000, 2000):
        if offset == 1000:
            layer.data = layer.data + 1000
        elif offset == 2000:
            layer.data[:] += 1000
        widget.overwrite.setChecked(True)
        widget.start()
        qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
        mean = float(tifffile.imread(tmp_path / "cells.tif").mean())
        assert mean == pytest.approx(100 + offset, abs=2), widget.status.text()


def test_a_batch_takes_a_zarr_that_is_in_memory_only(
    qtbot: Any, model: ViewerModel, tmp_path: Path
) -> None:
    data = np.random.default_rng(0).normal(100, 5, (2, 24, 32)).astype("f4")
    layer = model.add_image(zarr.array(data), name="cells", contrast_limits=(0, 200))
    widget = BatchWidget(model)
    qtbot.addWidget(widget)
    widget.out.setText(str(tmp_path))
    widget.form.model.set_key("perona-malik")
    widget.form.iterations.set_value(1)
    model.layers.selection = {layer}
    widget.add_layers()
    widget.start()
    qtbot.waitUntil(lambda: not widget.is_working, timeout=TIMEOUT)
    assert widget.table.rows[0].state == "done", widget.status.text()
    assert tifffile.imread(tmp_path / "cells.tif").mean() == pytest.approx(100, abs=1)
