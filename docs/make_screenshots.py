"""Take the pictures of the documentation: napari at 1280 × 800 with one of the widgets.

Run it where no one is looking, on a virtual screen::

    tools/with-display python docs/make_screenshots.py

It writes into ``docs/images``, or into the folder that it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from napari import Viewer
    from qtpy.QtWidgets import QWidget

    from napari_learned_diffusion.sample_data import Sample
    from napari_learned_diffusion.widgets.denoise import DenoiseWidget

SIZE = 1280, 800
LARGEST = 400_000
"""Bytes that a picture may have, so that the page loads."""

PATIENCE = 300.0
"""Seconds to wait for a job."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {
        "denoise": _take_denoise,
        "batch": _take_batch,
        "inspect": _take_inspection,
        "check": _take_check,
        "finetune": _take_fine_tuning,
    }
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--only", nargs="+", choices=parts, default=tuple(parts))
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as settings:
        # napari's own settings, not those of whoever runs this
        os.environ["NAPARI_CONFIG"] = str(Path(settings) / "settings.yaml")
        os.environ["LEARNED_DIFFUSION_MODELS"] = str(Path(settings) / "models")
        for name in options.only:
            parts[name](folder)


def _take_denoise(folder: Path) -> None:
    from napari_learned_diffusion import sample_data

    viewer, widget = _open(sample_data.low_dose_ct())
    widget.live_preview.setChecked(True)
    _finish(widget)
    viewer.dims.set_current_step(0, 9)  # the first job of a session also loads and compiles
    _finish(widget)
    _take(viewer, folder / "denoise-dark.png")
    _take(widget.form.noise_plot, folder / "noise-plot.png")
    viewer.theme = "light"
    _take(viewer, folder / "denoise-light.png")
    viewer.theme = "dark"
    widget.form.advanced_button.setChecked(True)
    _take(viewer, folder / "denoise-advanced.png")
    viewer.close()

    viewer, widget = _open(sample_data.fluorescence())
    widget.denoise_stack()
    _wait(lambda: len(viewer.layers) == 2 and widget.progress_bar.value() > 300)
    _take(viewer, folder / "denoise-running.png")
    _finish(widget)
    viewer.close()

    viewer, widget = _open(sample_data.brain_mri())
    widget.denoise_stack()
    _finish(widget)
    viewer.canvas.grid.enabled = True
    viewer.canvas.grid.shape = (1, 2)
    viewer.canvas.grid.stride = 1
    viewer.reset_view()
    _take(viewer, folder / "before-after.png")
    viewer.close()


def _take_inspection(folder: Path) -> None:
    """A slice in every iteration, and what two models have learned."""
    from napari_learned_diffusion import sample_data
    from napari_learned_diffusion.widgets.inspection import InspectionWidget

    viewer = _show(sample_data.low_dose_ct())
    widget = InspectionWidget(viewer)
    _dock(viewer, widget, "Inspect diffusivity")
    widget.settings.set_key("own")
    for number, (key, shown, tab, name) in enumerate(
        (
            ("perona-malik", "diffusivity", 1, "perona-malik"),
            ("foe-splines", "gradient", 1, "foe-splines"),
            ("unet", "diffusivity", 0, "iterations"),
        )
    ):
        widget.form.model.set_key(key)
        widget.inspect()
        _wait(lambda: not widget.is_working)
        widget.shown.set_key(shown)
        widget.tabs.setCurrentIndex(tab)
        # Another pixel each time, for a cursor that stays says nothing.
        viewer.cursor.position = (0.0, 21.0, 130.0, 172.0 + number)
        _take(viewer, folder / f"inspect-{name}.png")
    viewer.close()


def _take_check(folder: Path) -> None:
    """A result with a wipe, and what was measured on it."""
    from napari_learned_diffusion import sample_data
    from napari_learned_diffusion.widgets.check import CheckWidget

    sample = sample_data.brain_mri()
    viewer, denoise = _open(sample)
    denoise.denoise_slice()
    _finish(denoise)
    _, keywords, _ = sample.layer_data()
    keywords |= {"name": "truth", "visible": False}
    viewer.add_image(sample.reference, **keywords)
    viewer.layers.move(2, 0)
    viewer.window.remove_dock_widget(denoise)
    widget = CheckWidget(viewer)
    _dock(viewer, widget, "Check the result")
    widget.reference.setCurrentIndex(widget.reference.findText("truth"))
    widget.check()
    _wait(lambda: not widget.is_working)
    widget.wipe_button.setChecked(True)
    _take(viewer, folder / "check-wipe.png")
    viewer.close()


def _take_batch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as data, contextlib.chdir(data):
        _take_batch_window(folder / "batch.png")


def _take_fine_tuning(folder: Path) -> None:
    """The fine-tuning widget while it learns, and when it has learned."""
    import napari
    import numpy as np

    from napari_learned_diffusion import sample_data
    from napari_learned_diffusion.widgets.finetune import FineTuneWidget

    viewer = napari.Viewer(show_welcome_screen=False)
    data, keywords, _ = sample_data.fluorescence().layer_data()
    viewer.add_image(data, **keywords)
    widget = FineTuneWidget(viewer)
    viewer.window.add_dock_widget(widget, name="Fine-tune a model", area="right")
    viewer.window.resize(*SIZE)
    _process_events(1.0)
    viewer.reset_view()
    middle = len(data) // 2
    viewer.dims.set_current_step(0, middle)
    widget.mode.set_key("noisy")
    widget.steps.set_value(60)
    widget.new_regions()
    top, left, bottom, right = 20, 20, 200, 160
    corners = [(top, left), (top, right), (bottom, right), (bottom, left)]
    viewer.layers[-1].add_rectangles([np.array([(middle, y, x) for y, x in corners])])
    widget.start()
    _wait(lambda: widget.progress_bar.value() > 600 or not widget.is_working)
    _take(viewer, folder / "finetune-running.png")
    _wait(lambda: not widget.is_working)
    _take(viewer, folder / "finetune-learned.png")
    viewer.close()


def _take_batch_window(path: Path) -> None:
    """The batch widget after a batch of which one file has failed; paths are short, as relative."""
    import napari

    from napari_learned_diffusion.widgets.batch import BatchWidget

    _write_scans(Path("scans"))
    viewer = napari.Viewer(show_welcome_screen=False)
    widget = BatchWidget(viewer)
    viewer.window.add_dock_widget(widget, name="Denoise a batch", area="right")
    viewer.window.resize(*SIZE)
    widget.out.setText("denoised")
    widget.preview.setChecked(True)
    widget.add_paths([Path("scans")])
    _wait(lambda: not widget.is_working)
    widget.start()
    _wait(lambda: not widget.is_working)
    _take(viewer, path)
    viewer.close()


def _write_scans(folder: Path) -> None:
    """Parts of a simulated CT as files, of which the last is cut short."""
    from napari_learned_diffusion import sample_data
    from napari_learned_diffusion.files import Volume, write

    folder.mkdir()
    stack, keywords, _ = sample_data.low_dose_ct().layer_data()
    scale, units = tuple(keywords["scale"]), tuple(str(unit) for unit in keywords["units"])
    for first in range(0, 12, 2):
        name = f"patient_{first // 2 + 1:02d}"
        part = Volume(stack[first : first + 4], "ZYX", scale, units, name)
        path = write(folder / f"{name}.tif", part)
    os.truncate(path, path.stat().st_size // 2)


def _open(sample: Sample) -> tuple[Viewer, DenoiseWidget]:
    from napari_learned_diffusion.widgets.denoise import DenoiseWidget

    viewer = _show(sample)
    widget = DenoiseWidget(viewer)
    _dock(viewer, widget, "Denoise by diffusion")
    return viewer, widget


def _show(sample: Sample) -> Viewer:
    import napari

    viewer = napari.Viewer(show_welcome_screen=False)
    data, keywords, _ = sample.layer_data()
    viewer.add_image(data, **keywords)
    return viewer


def _dock(viewer: Viewer, widget: QWidget, name: str) -> None:
    viewer.window.add_dock_widget(widget, name=name, area="right")
    viewer.window.resize(*SIZE)
    _process_events(1.0)
    viewer.reset_view()


def _take(target: Viewer | QWidget, path: Path) -> None:
    """Save what a window or a widget looks like."""
    _process_events(0.8)
    window = getattr(target, "window", None)
    widget = target if callable(window) else target.window._qt_window
    widget.grab().save(str(path))
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path.name} has {path.stat().st_size:,} bytes, more than {LARGEST:,}.")


def _finish(widget: DenoiseWidget) -> None:
    _wait(lambda: not widget.is_working)
    if widget.status.is_error:
        raise SystemExit(widget.status.text())


def _wait(is_ready: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_ready():
        if time.monotonic() > end:
            raise SystemExit("A job takes too long.")
        _process_events(0.02)


def _process_events(seconds: float) -> None:
    from qtpy.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.005)


if __name__ == "__main__":
    main()
