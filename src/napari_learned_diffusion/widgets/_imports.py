"""Import what imports torch, without stopping the window.

Importing torch loads several hundred megabytes of libraries, and Python holds its lock while it
loads a library: no other thread runs for most of a second. A foreign function that is called
through ctypes runs without the lock, and the system's own loader is one. What it has loaded is
there already when torch is imported. What remains is seconds of Python code, with so many new
objects that the garbage collector goes through all of napari's several times; so it waits, and
meanwhile the threads take turns more often than usual. Afterwards the new objects count as old ones
at once, for the first look at all of them would stop the window for a quarter of a second.

torch's threads wait for each other many times in a step, and usually they keep a processor busy
while they wait. Where the window or another program needs one, each wait then lasts as long as the
system lets that other program run, and a step takes ten times as long. So they sleep while they
wait, unless the user's environment says how they should.
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
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when the first of them is loaded
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
    """No garbage collection, and short turns; what is there at the end counts as old."""
    turn, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(min(turn, _TURN))
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        gc.freeze()
        gc.unfreeze()  # among the oldest objects
        if collects:
            gc.enable()
