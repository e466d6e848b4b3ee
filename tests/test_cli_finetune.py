"""``fine-tune`` and ``models``: a model of one's own, from a shell."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

from napari_learned_diffusion.cli import app
from napari_learned_diffusion.cli_finetune import OPTIONS
from napari_learned_diffusion.config import FineTuneConfig
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.user_models import list_user_models, save_user_model

SHORT = ["--steps", "8", "--patch", "24", "--batch", "2", "--every", "4", "--learning-rate", "0.05"]
COMMON = ["--model", "my/start", "--noise-sigma", "10", "--device", "cpu"]


@pytest.fixture
def files(tmp_path, user_models_folder) -> Path:
    """A noisy stack, its clean one, a mask, shapes, and a small model that diffuses too little."""
    torch.manual_seed(0)
    model = Splines(experts=4, size=3, iterations=3)
    with torch.no_grad():
        model.log_steps -= 2
    facts = {
        "summary": "Small.",
        "noise_range": [5.0, 75.0],
        "suggestion": {"iterations": 3, "tau": 0.25},
        "gain_dB": 0.0,
        "date": "2024-05-01",
        "version": "0.1.0",
    }
    save_user_model("start", model, facts)
    rng = np.random.default_rng(0)
    clean = np.stack([np.kron(rng.uniform(40, 200, (6, 6)), np.ones((8, 8))) for _ in range(2)])
    mask = np.zeros(clean.shape, np.uint8)
    mask[1, 2:46, 2:46] = 1
    for name, data in {
        "clean": clean.astype(np.float32),
        "noisy": (clean + rng.normal(0, 10, clean.shape)).astype(np.float32),
        "mask": mask,
    }.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", data, imagej=True, metadata={"axes": "ZYX"})
    corners = [(1, 2, 2), (1, 2, 45), (1, 45, 45), (1, 45, 2)]
    lines = [f"0,rectangle,{i},{z},{y},{x}" for i, (z, y, x) in enumerate(corners)]
    header = "index,shape-type,vertex-index,axis-0,axis-1,axis-2"
    (tmp_path / "shapes.csv").write_text("\n".join([header, *lines]) + "\n")
    return tmp_path


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def names() -> list[str]:
    return [model.name for model in list_user_models()]


@pytest.mark.parametrize("regions", ["mask.tif", "shapes.csv"])
def test_fine_tune_and_denoise_with_it(files, regions):
    stack, reference = files / "noisy.tif", files / "clean.tif"
    asked = ["--regions", files / regions, "--reference", reference, "--save", "cells"]
    output = call("fine-tune", stack, *asked, *COMMON, *SHORT)
    assert "my/cells" in output
    assert "dB over my/start" in output
    call("denoise", stack, files / "out.tif", "--model", "my/cells", "--noise-sigma", "10")
    before, after = tifffile.imread(stack), tifffile.imread(files / "out.tif")
    assert after.std() < before.std()
    assert "already" in call("fine-tune", stack, *asked, *COMMON, *SHORT, code=1)
    again = call("fine-tune", stack, *asked, *COMMON, *SHORT, "--overwrite")
    assert "my/cells" in again


def test_where_nothing_is_better_nothing_is_saved(files):
    asked = ["--regions", files / "mask.tif", "--reference", files / "clean.tif", "--save", "x"]
    hopeless = [*SHORT[:-1], "1e-12"]
    output = call("fine-tune", files / "noisy.tif", *asked, *COMMON, *hopeless)
    assert "Nothing beat the starting model" in output
    assert names() == ["start"]


def test_mistakes_are_told_before_anything_is_computed(files):
    stack, mask = files / "noisy.tif", files / "mask.tif"
    for arguments, message in [
        (["--regions", mask, "--save", "../x"], "can't be called"),
        (["--regions", mask, "--save", "start"], "already"),
        (["--regions", mask, "--save", "x"], "needs a reference"),
        (["--regions", mask, "--save", "x", "--held-out", "0.9"], "held-out part"),
        (["--regions", files / "absent.csv", "--save", "x"], "can't be read"),
    ]:
        assert message in call("fine-tune", stack, *arguments, *COMMON, code=1)
    far = (files / "shapes.csv").read_text().replace(",1,", ",9,")
    (files / "far.csv").write_text(far)
    arguments = ["--regions", files / "far.csv", "--save", "x", "--mode", "noisy"]
    assert "selects no pixel" in call("fine-tune", stack, *arguments, *COMMON, code=1)
    assert names() == ["start"]


def test_models_can_be_managed(files):
    assert "my/start" in call("models")
    assert call("models") == call("models", "list")
    shown = json.loads(call("models", "show", "start"))
    assert (shown["key"], shown["base"]) == ("my/start", "foe-splines")
    assert "my/first" in call("models", "rename", "start", "first")
    exported = Path(call("models", "export", "first", files).strip())
    assert exported == files / "first.safetensors"
    assert "exists" in call("models", "export", "first", files, code=1)
    assert "my/second" in call("models", "import", exported, "--name", "second")
    call("models", "delete", "first")
    assert names() == ["second"]
    assert "my/second" in call("models", "delete", "first", code=1)
    (files / "bad.safetensors").write_bytes(b"x")
    assert "pickles" in call("models", "import", files / "bad.safetensors", code=1)


def test_every_setting_has_an_option():
    assert set(OPTIONS) == {field.name for field in fields(FineTuneConfig)}
    text = call("fine-tune", "--help")
    assert "--learning-rate" in text
