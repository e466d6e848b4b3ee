"""A denoiser that obeys the test: it waits, fails and finishes when it is told to."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from napari.components import ViewerModel

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.noise import Correlated, Gaussian, PoissonGaussian, Rician
from napari_learned_diffusion.core.noise_estimation import NoiseCurve, NoiseEstimate
from napari_learned_diffusion.jobs.denoise import Denoised, Prepared, Report
from napari_learned_diffusion.jobs.progress import Job, Progress
from napari_learned_diffusion.widgets.batch import BatchWidget
from napari_learned_diffusion.widgets.denoise import DenoiseWidget

STEPS = 3
TIMEOUT = 20_000


class FakeJobs:
    """Stands for the module `napari_learned_diffusion.jobs.denoise`; denoising adds 1.

    Attributes
    ----------
    gate
        While it is cleared, a job steps without getting on; it can be closed there.
    error
        Raised in the next step.
    calls
        Name and arguments of each call.
    closed
        How many jobs were closed before their end.
    running
        Set while a job is in its steps.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()
        self.error: Exception | None = None
        self.messages: tuple[str, ...] = ()
        self.noise: Any = Gaussian(5.0)
        self.slices_differ = False
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.threads: set[str] = set()
        self.closed = 0

    def load(self) -> FakeJobs:
        """What the widget takes for the module."""
        return self

    def called(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each call of a function."""
        return [arguments for called, arguments in self.calls if called == name]

    def prepare(
        self, image: Any, config: DiffusionConfig, *, plane_axes: tuple[int, int]
    ) -> Prepared:
        self.calls.append(("prepare", {"image": image, "config": config, "axes": plane_axes}))
        if self.error is not None:
            raise self.error
        requested, estimate = config, None
        if config.noise is None:
            asked = (PoissonGaussian(2.0, 3.0), Rician(4.0), Correlated(6.0, 0.8))
            model = {m.key: m for m in asked}.get(config.noise_kind, self.noise)
            ramp = np.linspace(0.0, 100.0, 8)
            curve = NoiseCurve(ramp, np.sqrt(model.variance(ramp)), np.ones(8))
            estimate = NoiseEstimate(model, curve, 0.9, "much data")
            config = config.with_(noise=model)
        given = config.iterations
        config = config.with_(
            iterations=STEPS if given is None else given, contrast=1.5, tau=0.2, device="cpu"
        )
        n_slices = math.prod(n for a, n in enumerate(image.shape) if a not in plane_axes)
        return Prepared(config, estimate, requested, self.slices_differ, n_slices=n_slices)

    def denoise_plane(self, plane: Any, config: DiffusionConfig, **options: Any) -> Job[Denoised]:
        self.calls.append(("denoise_plane", {"plane": plane, "config": config, **options}))
        try:
            yield from self._steps("Diffusing", 0, STEPS)
        except GeneratorExit:
            self.closed += 1
            raise
        return self._result(plane + 1, **options)

    def denoise_stack(
        self, stack: Any, config: DiffusionConfig, *, out: Any, **options: Any
    ) -> Job[Denoised]:
        self.calls.append(("denoise_stack", {"stack": stack, "config": config, **options}))
        axes = options["plane_axes"]
        others = [a for a in range(stack.ndim) if a not in axes]
        indices = list(np.ndindex(*(stack.shape[a] for a in others)))
        try:
            for number, index in enumerate(indices):
                yield from self._steps("Slice", number * STEPS, len(indices) * STEPS)
                where: list[Any] = [slice(None)] * stack.ndim
                for axis, at in zip(others, index, strict=True):
                    where[axis] = at
                out[tuple(where)] = np.asarray(stack[tuple(where)]) + 1
                done, total = (number + 1) * STEPS, len(indices) * STEPS
                yield Progress(done, total, "Slice", index, out[tuple(where)])
        except GeneratorExit:
            self.closed += 1
            raise
        return self._result(out, **options)

    def _steps(self, message: str, done: int, total: int) -> Iterator[Progress]:
        self.threads.add(threading.current_thread().name)
        self.running.set()
        for step in range(STEPS):
            if self.error is not None:
                raise self.error
            yield Progress(done + step + 1, total, message)
            while not self.gate.wait(0.002):
                yield Progress(done + step + 1, total, message)

    def _result(self, image: Any, **options: Any) -> Denoised:
        maps = {name: np.full(image.shape, 0.5, np.float32) for name in options["maps"].names}
        if "orientation" in maps:
            maps["orientation"] = np.full(image.shape, 30.0, np.float32)
            maps["anisotropy"][..., 0] = 0.01
        shown = maps.pop("diffusivity", None)
        report = Report(
            seconds=0.1,
            device="CPU",
            noise_sigma=5.0,
            removed_sigma=4.9,
            mean_drift=0.0,
            range_before=(0.0, 1.0),
            range_after=(0.0, 1.0),
            range_kept=True,
            masked_pixels=0,
            messages=self.messages,
        )
        return Denoised(image, shown, options["prepared"], report, **maps)


@pytest.fixture(autouse=True)
def _new_session() -> None:
    """Forms remember what they held, but not from test to test."""
    DenoiseWidget.remembered = BatchWidget.remembered = None
    BatchWidget.remembered_out = ""


@pytest.fixture
def jobs() -> FakeJobs:
    """The obedient denoiser."""
    return FakeJobs()


@pytest.fixture
def model() -> ViewerModel:
    """A viewer without a window, where none is needed: it is made in no time."""
    return ViewerModel()


@pytest.fixture
def make_widget(qtbot: Any, jobs: FakeJobs) -> Callable[[Any], DenoiseWidget]:
    """Makes a widget for a viewer without a window."""

    def make(viewer: Any) -> DenoiseWidget:
        widget = DenoiseWidget(viewer, jobs.load)
        qtbot.addWidget(widget)
        return widget

    return make


@pytest.fixture
def finish(qtbot: Any) -> Callable[[DenoiseWidget], None]:
    """Waits until a widget has nothing to do."""

    def wait(widget: DenoiseWidget) -> None:
        qtbot.waitUntil(lambda: is_idle(widget), timeout=TIMEOUT)

    return wait


def is_idle(widget: DenoiseWidget) -> bool:
    """Whether no run, no preview and no estimate is on or about to start."""
    return not widget.is_working


@pytest.fixture
def stack() -> Any:
    """Five slices of 12 × 16 pixels, each pixel of another value."""
    return np.arange(5 * 12 * 16, dtype=np.float32).reshape(5, 12, 16)
