"""The form shows the model and the noise that denoising would use, and for what they hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from napari.components import ViewerModel

from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.jobs import denoise as real_jobs
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

Make = Callable[[Any], DenoiseWidget]
Finish = Callable[[Any], None]


def _noise(widget: DenoiseWidget) -> str:
    return widget.form.noise_info.text()


def test_slices_that_differ_are_said_to_have_noise_of_their_own(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    jobs.slices_differ = True
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.estimate()
    finish(widget)
    assert "Each slice gets a noise model of its own; this is that of the whole stack." in _noise(
        widget
    )
    jobs.noise = Gaussian(7.0)
    widget.denoise_slice()
    finish(widget)
    assert "this is that of slice 2." in _noise(widget)
    assert "7" in _noise(widget)
    widget.form.noise_scope.set_key("stack")
    widget.estimate()
    finish(widget)
    assert "Each slice" not in _noise(widget)


def test_one_noise_model_for_all_needs_no_word(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.denoise_slice()
    finish(widget)
    assert _noise(widget)
    assert "slice" not in _noise(widget)
    jobs.slices_differ = True
    model.add_image(stack[0], name="plane")
    widget.form.layer.setCurrentIndex(1)
    widget.denoise_slice()
    finish(widget)
    assert "Each slice" not in _noise(widget)


def test_noise_that_the_user_gives_is_what_counts(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    jobs.slices_differ = True
    model.add_image(stack, name="cells")
    widget = make_widget(model)
    widget.form.noise_kind.set_key("gaussian")
    widget.estimate()  # fills the box, and one level serves all slices then
    finish(widget)
    assert widget.form.noise_sigma.value() == 5.0
    assert not _noise(widget)


@pytest.mark.parametrize(("key", "shown"), [("auto", "Conductance U-Net, small"), ("unet", "")])
def test_which_model_automatic_is_is_said_once_it_is_known(
    qtbot: Any, model: ViewerModel, finish: Finish, key: str, shown: str
) -> None:
    data = np.random.default_rng(0).normal(100, 5, (2, 24, 32)).astype(np.float32)
    model.add_image(data, name="cells")
    widget = DenoiseWidget(model, lambda: real_jobs)
    qtbot.addWidget(widget)
    widget.form.model.set_key(key)
    widget.form.device.set_key("cpu")
    assert "Here it is" not in widget.form.model_info.text()
    widget.denoise_slice()
    finish(widget)
    assert (f"Here it is {shown}." in widget.form.model_info.text()) == bool(shown)
    widget.form.device.set_key("auto")
    assert "Here it is" not in widget.form.model_info.text()  # nobody has looked yet


def test_values_that_a_file_declares_missing_are_kept_in_mind(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any
) -> None:
    model.add_image(stack, name="cells", metadata={"missing": (-1000.0, 0)})
    widget = make_widget(model)
    widget.form.residual.setChecked(True)
    for run in (widget.denoise_slice, widget.denoise_stack, widget.denoise_slice):
        run()
        finish(widget)
    (asked,) = jobs.called("prepare")  # and what was found out then is used again
    assert asked["config"].missing == (-1000.0, 0.0)
    assert widget.form.iterations.lineEdit().placeholderText() == "automatic (3)"
    assert model.layers["cells denoised"].metadata["missing"] == (-1000.0, 0)
    assert "missing" not in model.layers["cells residual"].metadata


@pytest.mark.parametrize("said", [None, "yes", 3, {"a": 1}, [True, "x", None], ()])
def test_other_programs_may_mean_something_else_by_missing(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any, said: Any
) -> None:
    model.add_image(stack, name="cells", metadata={"missing": said})
    widget = make_widget(model)
    widget.denoise_slice()
    finish(widget)
    assert not widget.status.is_error
    assert jobs.called("prepare")[0]["config"].missing == ()


@pytest.mark.parametrize("run", ["denoise_slice", "denoise_as_you_scroll"])
def test_a_slice_of_a_masked_array_keeps_its_mask(
    model: ViewerModel, make_widget: Make, finish: Finish, jobs: Any, stack: Any, run: str
) -> None:
    model.add_image(np.ma.masked_less(stack, 400), name="cells")
    widget = make_widget(model)
    getattr(widget, run)()
    finish(widget)
    plane = jobs.called("denoise_plane")[0]["plane"]
    np.testing.assert_array_equal(np.ma.getmaskarray(plane), stack[2] < 400)
