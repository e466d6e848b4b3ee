"""Import what imports torch, without stopping the window.

Importing torch loads several hundred megabytes of libraries, and Python holds its lock while it
loads a library: no other thread runs for most of a second. A foreign function that is called
through ctypes runs without the lock, and the system's own loader is one. What it has loaded is
there already when torch is imported. What remains is seconds of Python code, with so many new
objects that the garbage collector goes through all of napari's several times; so it waits, and
meanwhile the threads take turns more often than usual.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LIBRARIES = {
    "linux": {"libtorch_global_deps.so": ctypes.RTLD_GLOBAL, "libtorch.so": ctypes.RTLD_LOCAL},
    "darwin": {"libtorch.dylib": ctypes.RTLD_LOCAL},
}
"""Those that know nothing of Python, in the order and the mode in which torch loads them."""

_TURN = 0.0005
"""Seconds after which a thread that waits for Python's lock is given it; usually it is ten times
that, and a window that redraws asks for the lock again and again."""

_importing = threading.Lock()


def import_module(name: str) -> Any:
    """A module that imports torch. To be called in a worker."""
    with _importing:
        if "torch" not in sys.modules:
            _load_libraries()
        if name in sys.modules:
            return sys.modules[name]
        with _window_first():
            return importlib.import_module(name)


def _load_libraries() -> None:
    """Load torch's libraries while other threads go on. It does no harm where that fails."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return
    for name, mode in _LIBRARIES.get(sys.platform, {}).items():
        path = Path(spec.origin).parent / "lib" / name
        if path.exists():
            load = ctypes.CDLL(None).dlopen
            load.restype = ctypes.c_void_p
            load(os.fsencode(path), ctypes.c_int(os.RTLD_NOW | mode))


@contextmanager
def _window_first() -> Iterator[None]:
    """No garbage collection, and short turns."""
    turn, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(min(turn, _TURN))
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        if collects:
            gc.enable()
