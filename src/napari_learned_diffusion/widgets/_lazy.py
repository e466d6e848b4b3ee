"""A result that is denoised as the user scrolls: a `LazyStack` and the worker that fills it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QObject, Signal

from napari_learned_diffusion.widgets import _tasks
from napari_learned_diffusion.widgets._dock import shut_down
from napari_learned_diffusion.widgets._lazy_stack import LazyStack
from napari_learned_diffusion.widgets._runner import Runner

if TYPE_CHECKING:
    from napari_learned_diffusion.jobs.prepare import Prepared
    from napari_learned_diffusion.jobs.progress import Progress
    from napari_learned_diffusion.widgets._form import Request
    from napari_learned_diffusion.widgets._lazy_stack import Index


class LazyResult(QObject):
    """Fills a stack with denoised slices, those in view first.

    Parameters
    ----------
    request
        What to denoise, and how.
    budget
        Bytes that denoised slices may take.
    load_jobs
        Returns the module of the jobs; called in a worker.
    parent
        Who owns it.
    """

    filled = Signal(object, object)
    """This, and a list of the indices of slices that are there now."""

    prepared = Signal(object, object)
    """This, and what the automatic settings became for the layer as a whole, a `Prepared`."""

    failed = Signal(object, object)
    """This, and an error; the worker has stopped."""

    def __init__(
        self,
        request: Request,
        budget: int,
        load_jobs: Callable[[], Any],
        parent: QObject | None = None,
    ) -> None:
        super().__init__(parent)
        self._load_jobs = load_jobs
        self._budget = budget
        self._is_held = False
        self._runner = Runner(self)
        self._runner.progressed.connect(self._on_progressed)
        self._runner.succeeded.connect(self._on_succeeded)
        self._runner.failed.connect(self._on_failed)
        self._runner.finished.connect(self.go_on)
        self.destroyed.connect(partial(shut_down, (self._runner,)))
        self.replaced: tuple[Any, dict[str, Any]] | None = None
        """Data and metadata that the layer had before, of an earlier result."""
        self.is_stale = False
        """Whether settings or data have changed, but nothing could be done about it yet."""
        self.request = request
        self.stack = LazyStack(request.source, budget)
        self.stack.look_at(request.source.index)

    @property
    def source_id(self) -> Hashable:
        """The layer that is denoised."""
        return self.request.source.layer_id

    @property
    def is_idle(self) -> bool:
        """Whether no thread is at work."""
        return self._runner.is_idle

    def begin_again(self, request: Request) -> None:
        """Denoise with other settings or other data; what was done for the old ones is gone.

        The old slice in view stays on display until the new one is there.
        """
        old, new = self.request.source, request.source
        is_same_place = (
            old.data.shape == new.data.shape
            and old.data.dtype == new.data.dtype
            and old.plane_axes == new.plane_axes
        )
        before = self.stack.shown() if is_same_place else None
        self._runner.cancel()
        self.is_stale = False
        self.request = request
        self.stack = LazyStack(new, self._budget, before)
        self.look_at(new.index)

    def look_at(self, index: Index | None) -> None:
        """The user has scrolled to another slice; ``None``: to where there is none."""
        if index is not None:
            self.stack.drop_changed(index)
        self.stack.look_at(index)
        self.go_on()

    def go_on(self) -> None:
        """Compute what is wanted, unless that is on already."""
        if not self._is_held and not self._runner.is_busy and self.stack.next() is not None:
            self._runner.submit(
                partial(_tasks.denoise_lazily, self.request, self.stack, self._load_jobs),
                "Denoising as you scroll",
            )

    def hold(self, is_held: bool) -> None:
        """Leave the processor to another job, or go on."""
        self._is_held = is_held
        if is_held:
            self._runner.cancel()
        else:
            self.go_on()

    def stop(self) -> None:
        """Stop for good."""
        self._is_held = True
        self._runner.cancel()

    def _on_progressed(self, _: Progress, indices: list[Index]) -> None:
        if indices:
            self.filled.emit(self, indices)

    def _on_succeeded(self, whole: Prepared | None) -> None:
        if whole is not None:
            self.prepared.emit(self, whole)
            known = replace(self.request.known, prepared=whole)
            self.request = replace(self.request, known=known)

    def _on_failed(self, error: Exception) -> None:
        self._is_held = True
        self.failed.emit(self, error)
