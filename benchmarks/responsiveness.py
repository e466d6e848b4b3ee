"""How long napari's window stands still while the plugin works: the gaps of a 10 ms timer.

Run ``tools/with-display python -m benchmarks.responsiveness``; README.md says what is measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._common import print_provenance, print_table, provenance, set_threads, write_json

if TYPE_CHECKING:
    from napari import Viewer
    from napari.layers import Image

TICK = 0.010
"""Seconds between two ticks of the timer."""

LIMIT = 0.100
"""Seconds that no gap should exceed."""

NOISE_SIGMA = 25.0
PATIENCE = 600.0
"""Seconds to wait for a job."""


@dataclass
class Bench:
    """A viewer with a noisy stack, and the clock that scenarios are measured with.

    Parameters
    ----------
    viewer
        napari, on screen.
    layer
        The stack.
    data
        Its pixels.
    """

    viewer: Viewer
    layer: Image
    data: Any
    clock: Clock
    explain: bool

    def wait(self, is_ready: Callable[[], bool], every: Callable[[], None] | None = None) -> None:
        """Process events until something is true; call ``every`` in each round."""
        from qtpy.QtWidgets import QApplication

        end = time.monotonic() + PATIENCE
        while not is_ready():
            if time.monotonic() > end:
                raise SystemExit("A job takes too long.")
            QApplication.processEvents()
            if every is not None:
                every()
            time.sleep(0.001)

    def rest(self, seconds: float) -> None:
        """Process events for a while."""
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= end)

    def scroll(self, slices: Sequence[int], per_second: float = 15) -> None:
        """Move the slider as a user does who holds an arrow key."""
        for at in slices:
            self.viewer.dims.set_point(0, at)
            self.rest(1 / per_second)


class Clock:
    """A timer of 10 ms in the window's thread, which notes when it ticks."""

    def __init__(self) -> None:
        from qtpy.QtCore import Qt, QTimer

        self.ticks: list[float] = []
        self.busy: list[float] = []
        self._timer = QTimer()
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.setInterval(round(1000 * TICK))
        self._timer.timeout.connect(self._tick)

    def _tick(self) -> None:
        self.ticks.append(time.perf_counter())
        self.busy.append(time.thread_time())

    @contextmanager
    def running(self, explain: bool) -> Iterator[None]:
        """Tick within the block; where asked to, print what the window did in each long gap."""
        self.ticks, self.busy = [], []
        self._tick()
        self._timer.start()
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(threading.get_ident(), done))
        if explain:
            watch.start()
        try:
            yield
        finally:
            self._timer.stop()
            self._tick()
            done.set()
            if explain:
                watch.join()

    def _watch(self, thread: int, done: threading.Event) -> None:
        told = 0.0
        while not done.wait(TICK):
            last = self.ticks[-1]
            if time.perf_counter() - last > LIMIT and last != told:
                told = last
                print(f"\n--- {time.perf_counter() - last:.2f} s", file=sys.stderr)
                for number, frame in sys._current_frames().items():
                    if number != threading.get_ident():
                        print("window:" if number == thread else "other:", file=sys.stderr)
                        traceback.print_list(traceback.extract_stack(frame)[-8:], file=sys.stderr)


@dataclass
class Figures:
    """What a scenario measured.

    Parameters
    ----------
    seconds
        How long it took.
    median, longest
        Gap between two ticks, in milliseconds.
    busiest
        What the window's thread computed at most between two ticks, in milliseconds: its part of a
        gap. The rest is waiting for a processor or for Python's lock.
    blocked
        Number of gaps above the limit.
    """

    seconds: float
    median: float
    longest: float
    busiest: float
    blocked: int
    gaps: list[float] = field(default_factory=list, repr=False)


# --- scenarios --------------------------------------------------------------------------------


def _denoise_widget(bench: Bench) -> Any:
    from napari_learned_diffusion.widgets.denoise import DenoiseWidget

    widget = DenoiseWidget(bench.viewer)
    bench.viewer.window.add_dock_widget(widget, name="Denoise by diffusion", area="right")
    bench.rest(0.5)
    return widget


def scroll_without(bench: Bench) -> None:
    """Scrolling with napari alone, for comparison."""
    with bench.clock.running(bench.explain):
        bench.scroll(range(40))


def add_layer(bench: Bench) -> None:
    """Adding an image layer with napari alone, for comparison."""
    with bench.clock.running(bench.explain):
        bench.viewer.add_image(bench.data)
        bench.rest(0.5)


def add_axis(bench: Bench) -> None:
    """Adding an image layer with one more axis with napari alone, for comparison."""
    with bench.clock.running(bench.explain):
        bench.viewer.add_image(bench.data[np.newaxis])
        bench.rest(0.5)


def _inspection_widget(bench: Bench) -> Any:
    from napari_learned_diffusion.widgets.inspection import InspectionWidget

    widget = InspectionWidget(bench.viewer)
    bench.viewer.window.add_dock_widget(widget, name="Inspect diffusivity", area="right")
    widget.settings.set_key("own")
    widget.form.model.set_key("foe-splines")
    bench.rest(0.5)
    return widget


def _check_widget(bench: Bench) -> Any:
    """The Check widget, with a result to check."""
    from napari_learned_diffusion.widgets.check import CheckWidget

    denoise = _denoise_widget(bench)
    _denoise_slice(bench, denoise)
    bench.viewer.window.remove_dock_widget(denoise)
    widget = CheckWidget(bench.viewer)
    bench.viewer.window.add_dock_widget(widget, name="Check the result", area="right")
    bench.rest(0.5)
    return widget


def _fine_tune_widget(bench: Bench) -> Any:
    """The Fine-tune widget, with a region on the slice in view."""
    from napari_learned_diffusion.widgets.finetune import FineTuneWidget

    widget = FineTuneWidget(bench.viewer)
    bench.viewer.window.add_dock_widget(widget, name="Fine-tune a model", area="right")
    widget.mode.set_key("noisy")
    widget.steps.set_value(60)
    widget.new_regions()
    size, z = bench.data.shape[-1], bench.viewer.dims.current_step[0]
    corners = [(z, y, x) for y, x in ((0, 0), (0, size), (size, size), (size, 0))]
    bench.viewer.layers[-1].add_rectangles([np.array(corners)])
    bench.rest(0.5)
    return widget


def _batch_widget(bench: Bench) -> Any:
    from napari_learned_diffusion.widgets.batch import BatchWidget

    widget = BatchWidget(bench.viewer)
    bench.viewer.window.add_dock_widget(widget, name="Denoise a batch", area="right")
    bench.rest(0.5)
    return widget


def _with_widget(
    action: Callable[[Bench, Any], None], make: Callable[[Bench], Any] = _denoise_widget
) -> Callable[[Bench], None]:
    def scenario(bench: Bench) -> None:
        widget = make(bench)
        with bench.clock.running(bench.explain):
            action(bench, widget)

    return scenario


def _estimate(bench: Bench, widget: Any) -> None:
    widget.estimate()
    bench.wait(lambda: not widget.is_working)


def _denoise_slice(bench: Bench, widget: Any) -> None:
    for output in widget.form._outputs:
        output.setChecked(True)
    widget.denoise_slice()
    bench.wait(lambda: not widget.is_working)


def _denoise_stack(bench: Bench, widget: Any) -> None:
    for output in widget.form._outputs:
        output.setChecked(True)
    widget.denoise_stack()
    bench.wait(lambda: not widget.is_working)


def _live_preview(bench: Bench, widget: Any) -> None:
    widget.live_preview.setChecked(True)
    bench.wait(lambda: not widget.is_working)
    bench.scroll(range(20))
    bench.wait(lambda: not widget.is_working)


def _as_you_scroll(bench: Bench, widget: Any) -> None:
    widget.denoise_as_you_scroll()
    bench.scroll(range(len(bench.data)))
    bench.scroll(range(len(bench.data) - 1, -1, -4))
    bench.wait(lambda: not widget.is_working)


def _inspect(bench: Bench, widget: Any) -> None:
    widget.inspect()
    bench.wait(lambda: not widget.is_working)
    size = bench.data.shape[-1]
    for at in range(widget.scrubber.maximum() + 1):
        widget.scrubber.setValue(at)
        bench.viewer.cursor.position = (0, 0, size / 2, size / 2 + at)
        bench.rest(1 / 15)
    for shown in range(widget.shown.count()):
        widget.shown.setCurrentIndex(shown)
        bench.rest(0.3)


def _check(bench: Bench, widget: Any) -> None:
    widget.check()
    bench.wait(lambda: not widget.is_working)
    widget.show_residual()
    bench.rest(0.3)
    widget.wipe_button.setChecked(True)
    for at in range(0, 1001, 50):
        widget.wipe_slider.setValue(at)
        bench.rest(1 / 15)
    widget.side_button.setChecked(True)
    bench.rest(0.3)
    widget.side_button.setChecked(False)
    bench.rest(0.3)


def _fine_tune(bench: Bench, widget: Any) -> None:
    widget.start()
    bench.wait(lambda: not widget.is_working)


def _batch(bench: Bench, widget: Any) -> None:
    from tifffile import imwrite

    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            imwrite(Path(folder) / f"scan-{number}.tif", bench.data)
        widget.out.setText(str(Path(folder) / "denoised"))
        widget.preview.setChecked(True)
        widget.add_paths([Path(folder)])
        bench.wait(lambda: not widget.is_working)
        widget.start()
        bench.wait(lambda: not widget.is_working)


SCENARIOS: dict[str, tuple[str, Callable[[Bench], None]]] = {
    "napari-scroll": ("napari alone: scrolling", scroll_without),
    "napari-add": ("napari alone: adding an image layer", add_layer),
    "napari-axis": ("napari alone: adding an image layer with a new axis", add_axis),
    "estimate": (
        "Denoise: the first estimate, which imports torch",
        _with_widget(_estimate),
    ),
    "slice": ("Denoise: a slice with all layers", _with_widget(_denoise_slice)),
    "preview": ("Denoise: live preview while scrolling", _with_widget(_live_preview)),
    "scroll": ("Denoise: stack as you scroll", _with_widget(_as_you_scroll)),
    "stack": ("Denoise: stack now, all layers", _with_widget(_denoise_stack)),
    "inspect": (
        "Inspect: a slice, then all iterations and maps",
        _with_widget(_inspect, _inspection_widget),
    ),
    "check": ("Check: a slice, residual, wipe, side by side", _with_widget(_check, _check_widget)),
    "finetune": (
        "Fine-tune: 60 steps with the preview",
        _with_widget(_fine_tune, _fine_tune_widget),
    ),
    "batch": ("Batch: three files with the preview", _with_widget(_batch, _batch_widget)),
}


# --- measuring --------------------------------------------------------------------------------


def measure(bench: Bench, scenario: Callable[[Bench], None]) -> Figures:
    """Run a scenario and look at the gaps between ticks."""
    scenario(bench)
    ticks = np.array(bench.clock.ticks)
    gaps = 1000 * np.diff(ticks)
    return Figures(
        float(ticks[-1] - ticks[0]),
        float(np.median(gaps)),
        float(gaps.max()),
        float(1000 * np.diff(bench.clock.busy).max()),
        int((gaps > 1000 * LIMIT).sum()),
        gaps.round(1).tolist(),
    )


def generate(slices: int, size: int, seed: int) -> Any:
    """A disc on a gradient with noise, each slice shifted a little."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    rng = np.random.default_rng(seed)
    stack = np.empty((slices, size, size), np.float32)
    for at in range(slices):
        disc = (y - size / 2) ** 2 + (x - size / 2 - at) ** 2 < (size / 4) ** 2
        stack[at] = 100 + 60 * x / size + 80 * disc
        stack[at] += rng.normal(0, NOISE_SIGMA, (size, size)).astype(np.float32)
    return stack


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("scenarios", nargs="*", default=[], help=f"some of: {', '.join(SCENARIOS)}")
    parser.add_argument("--slices", type=int, default=40)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="show the window, and draw in it")
    parser.add_argument("--explain", action="store_true", help="print where long gaps happen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args(arguments)
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are: {', '.join(SCENARIOS)}")
    return options


def run(options: argparse.Namespace) -> dict[str, Figures]:
    """Measure each scenario in a viewer of its own; only the first has to import torch."""
    import napari

    data = generate(options.slices, options.size, options.seed)
    found = {}
    for name in options.scenarios or SCENARIOS:
        if options.explain:
            print(f"=== {name}", file=sys.stderr)
        viewer = napari.Viewer(show_welcome_screen=False, show=options.draw)
        viewer.window.resize(1280, 800)
        layer = viewer.add_image(data, name="noisy")
        bench = Bench(viewer, layer, data, Clock(), options.explain)
        bench.rest(2)
        bench.scroll(range(5))
        found[name] = measure(bench, SCENARIOS[name][1])
        bench.viewer.close()
    return found


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    set_threads(options.threads)
    with tempfile.TemporaryDirectory() as settings:
        # napari's own settings, not those of whoever runs this
        os.environ["NAPARI_CONFIG"] = str(Path(settings) / "settings.yaml")
        found = run(options)
    facts = provenance(
        "responsiveness",
        arguments,
        seeds=f"numpy.random.default_rng({options.seed})",
        protocol=(
            f"{options.slices} slices of {options.size} x {options.size}, float32; a timer of "
            f"{1000 * TICK:.0f} ms in the window's thread; {options.threads} threads; "
            f"{'with' if options.draw else 'without'} drawing"
        ),
    )
    print("# Responsiveness\n")
    print_provenance(facts)
    header = ["scenario", "s", "median gap, ms", "longest, ms", "busiest, ms"]
    print_table(
        [*header, f"above {1000 * LIMIT:.0f} ms"],
        [
            [
                SCENARIOS[name][0],
                f"{figures.seconds:.1f}",
                f"{figures.median:.0f}",
                f"{figures.longest:.0f}",
                f"{figures.busiest:.0f}",
                str(figures.blocked),
            ]
            for name, figures in found.items()
        ],
    )
    write_json(options.json, facts | {"results": {k: asdict(v) for k, v in found.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
