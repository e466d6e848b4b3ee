"""torch is imported in a worker, with Python's own settings as they were afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import gc, sys
from napari_learned_diffusion.widgets import _imports
turn = sys.getswitchinterval()
jobs = _imports.import_module("napari_learned_diffusion.jobs.denoise")
assert "torch" in sys.modules
assert jobs is sys.modules[jobs.__name__] is _imports.import_module(jobs.__name__)
assert sys.getswitchinterval() == turn
assert gc.isenabled()
assert gc.get_freeze_count() == 0
module = sys.modules["torch"].nn.Module
assert any(known is module for known in gc.get_objects(2)), "the next collection looks at it"
try:
    _imports.import_module("napari_learned_diffusion.jobs.no_such_job")
except ModuleNotFoundError:
    pass
assert gc.isenabled()
import torch
assert torch.ones(2).sum() == 2
"""


WAITING = """
import os
from napari_learned_diffusion.widgets import _imports
_imports.import_module("torch")
print(os.environ["OMP_WAIT_POLICY"])
"""


def test_importing_leaves_everything_as_it_was() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", CODE], check=True, env={**os.environ})


@pytest.mark.parametrize(("wanted", "found"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(
    wanted: str | None, found: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if wanted is not None:
        environment["OMP_WAIT_POLICY"] = wanted
    run = subprocess.run(
        [sys.executable, "-c", WAITING],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == found
