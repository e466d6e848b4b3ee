"""What every test runs in: its own settings, a hypothesis profile, no leaks behind a window."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from qtpy.QtWidgets import QApplication

GUI_FIXTURES = frozenset({"qapp", "qtbot", "make_napari_viewer", "make_napari_viewer_proxy"})
VIEWER_FIXTURES = frozenset({"make_napari_viewer", "make_napari_viewer_proxy"})
THREAD_POOL_TIMEOUT_MS = 5000


def _isolate_user_folders() -> None:
    """Send settings and caches of napari, of ours and of every library to an empty folder.

    At import, because napari reads NAPARI_CONFIG once, when its settings are imported. Numba's
    cache stays: it lies beside the sources, and compiling anew in each run would cost minutes.
    """
    authority = Path.home() / ".Xauthority"
    if "XAUTHORITY" not in os.environ and authority.exists():
        os.environ["XAUTHORITY"] = str(authority)  # the key to the screen is found through HOME

    home = Path(tempfile.mkdtemp(prefix="learned-diffusion-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folders = {
        "HOME": home,
        "XDG_CACHE_HOME": home / ".cache",
        "XDG_CONFIG_HOME": home / ".config",
        "XDG_DATA_HOME": home / ".local" / "share",
        "XDG_STATE_HOME": home / ".local" / "state",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder)
    os.environ.pop("LEARNED_DIFFUSION_MODELS", None)
    os.environ["NAPARI_CONFIG"] = str(home / "napari" / "settings.yaml")


_isolate_user_folders()

# A shared or throttled machine must not fail a test for being slow, and two runs of the same commit
# in CI must not differ.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def user_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for the user's models; it isn't there yet."""
    folder = tmp_path / "user models"
    monkeypatch.setenv("LEARNED_DIFFUSION_MODELS", str(folder))
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a GUI test without a screen in words; Qt would abort the whole run instead."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if not sys.platform.startswith("linux") or not fixtures & GUI_FIXTURES:
        return
    platform = os.environ.get("QT_QPA_PLATFORM", "")
    remedy = "Run `make test`, or `tools/with-display python -m pytest ...`."
    if platform in {"offscreen", "minimal"}:
        if fixtures & VIEWER_FIXTURES:
            pytest.fail(f"Qt's {platform!r} platform has no OpenGL for napari. {remedy}", False)
    elif not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        pytest.fail(f"This test opens windows and there is no display. {remedy}", False)


@pytest.fixture(scope="module")
def _spare_what_was_there() -> None:
    """Have garbage collections pass over all that was alive before a module's first GUI test.

    That is torch, napari and what other tests have imported. Nobody gives it back, and to look
    through it after every test that opens a window took nine tenths of the time of these tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_gui_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a GUI test that passed, no window, worker or thread of it may be left.

    Autouse, so that it is set up first and looks last, when the viewer and qtbot have cleaned up.
    """
    if not GUI_FIXTURES & set(request.fixturenames):
        yield
        return
    app: QApplication = request.getfixturevalue("qapp")
    request.getfixturevalue("_spare_what_was_there")
    windows_before = set(app.topLevelWidgets())
    threads_before = set(threading.enumerate())

    yield

    report = getattr(request.node, "rep_call", None)
    if report is None or not report.passed:
        # The traceback holds on to what the test made, and deleting what it left half made crashes.
        return

    from qtpy.QtCore import QCoreApplication, QEvent, QThreadPool

    workers_are_done = QThreadPool.globalInstance().waitForDone(THREAD_POOL_TIMEOUT_MS)
    # Qt's deletions first: where Python collects the wrappers before them, Qt deletes some twice.
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    app.processEvents()
    gc.collect()

    windows = [w for w in app.topLevelWidgets() if w not in windows_before and _is_ours(w)]
    names = [f"{type(w).__name__} {w.objectName()!r} {w.windowTitle()!r}" for w in windows]
    for window in windows:  # so that the next test doesn't inherit them
        window.close()
        window.deleteLater()
    threads = [t for t in threading.enumerate() if t not in threads_before and _must_end(t)]

    assert workers_are_done, f"A worker still runs {THREAD_POOL_TIMEOUT_MS / 1000:.0f} s later."
    assert not names, f"Top-level widgets are left over: {names}"
    assert not threads, f"Threads are left over: {threads}"


def _is_ours(window: object) -> bool:
    """Whether the test can be blamed: napari and vispy leave windows of their own kinds behind."""
    return not type(window).__module__.startswith(("napari.", "vispy.", "superqt."))


def _must_end(thread: threading.Thread) -> bool:
    """Whether a thread should have ended with the test.

    Daemons (progress monitors, zarr's event loop) live as long as the process; a dummy stands for a
    thread of Qt's pool, long ended; and dask and zarr keep their thread pools for the next call.
    """
    return not (
        thread.daemon
        or isinstance(thread, threading._DummyThread)
        or thread.name.startswith(("ThreadPoolExecutor", "zarr_pool"))
    )
