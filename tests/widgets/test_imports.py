"""torch is imported in a worker, with Python's own settings as they were afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import gc, sys
from napari_learned_diffusion.widgets import _imports
turn = sys.getswitchinterval()
jobs = _imports.import_module("napari_learned_diffusion.jobs.denoise")
assert "torch" in sys.modules
assert jobs is sys.modules[jobs.__name__] is _imports.import_module(jobs.__name__)
assert sys.getswitchinterval() == turn
assert gc.isenabled()
try:
    _imports.import_module("napari_learned_diffusion.jobs.no_such_job")
except ModuleNotFoundError:
    pass
assert gc.isenabled()
import torch
assert torch.ones(2).sum() == 2
"""


def test_importing_leaves_everything_as_it_was() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", CODE], check=True, env={**os.environ})
