"""The training job: the files that it writes, and that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imsave

from napari_learned_diffusion.config import TrainingConfig
from napari_learned_diffusion.core.diffusivity import learned_diffusivity_class
from napari_learned_diffusion.core.diffusivity.conductance_unet import (
    ConductanceUNet,
    LargeConductanceUNet,
)
from napari_learned_diffusion.core.errors import (
    DeviceError,
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
    UnknownModelError,
)
from napari_learned_diffusion.core.learning.training import TrainStep
from napari_learned_diffusion.core.operators import Stencil
from napari_learned_diffusion.core.weights import read_model, write_model
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.train import Trained, _begin_with, drawing_processes, train

CONFIG = TrainingConfig(steps=4, batch=2, patch=16, iterations=2, seed=5)
SMALL = {"experts": 4, "size": 3, "iterations": 2}


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for seed in range(3):
        squares = np.random.default_rng(seed).integers(30, 220, (6, 6), dtype=np.uint8)
        imsave(path / f"{seed}.png", np.kron(squares, np.ones((8, 8), np.uint8)))
    (path / "broken.png").write_bytes(b"no image")
    return path


def start(folder: Path, output: Path, model: str = "foe-splines"):
    return train(
        model,
        (folder,),
        output,
        CONFIG,
        data_name="mosaics",
        architecture=SMALL,
        device="cpu",
        every=2,
    )


def test_weights_and_card_tell_what_was_done(folder, tmp_path):
    seen = []
    done: Trained = run(start(folder, tmp_path / "new" / "out"), seen.append)
    assert [p.done for p in seen] == [0, 1, 2, 3, 4]
    assert all(p.total == 4 for p in seen)
    assert "dB" in seen[-1].message
    assert [line.split(":")[0] for line in done.skipped] == ["broken.png"]
    model = read_model(done.weights, learned_diffusivity_class("foe-splines"))
    card = json.loads(done.card.read_text("utf-8"))
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert card["noise_range"] == [5, 75]
    assert card["details"]["architecture"] == SMALL
    assert card["details"]["suggestion"] == {"iterations": 2, "tau": 0.25}
    facts = card["details"]["training"]
    assert (facts["seed"], facts["steps"], facts["data"]) == (5, 4, "mosaics")
    assert set(card["details"]["validation"]["psnr"]) == {"15", "25", "50"}
    assert str(tmp_path) not in done.card.read_text("utf-8")
    assert sorted(p.name for p in done.card.parent.iterdir()) == [
        "foe-splines.json",
        "foe-splines.safetensors",
    ]


def test_an_interrupted_run_goes_on_where_it_was(folder, tmp_path):
    whole = run(start(folder, tmp_path / "whole"))
    job = start(folder, tmp_path / "parts")
    while next(job).done < 3:
        pass
    job.close()
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [
        "foe-splines.checkpoint.safetensors"
    ]
    done = []
    resumed = run(start(folder, tmp_path / "parts"), lambda p: done.append(p.done))
    assert done == [0, 3, 4]
    assert resumed.validation == whole.validation
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()


@pytest.mark.parametrize(("cores", "drawing"), [(1, 0), (2, 1), (16, 8)])
def test_patches_are_drawn_by_other_processes_beside_a_gpu(cores, drawing, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert drawing_processes(torch.device("cuda")) == drawing
    assert drawing_processes(torch.device("cpu")) == 0


def test_a_process_that_is_killed_is_said_in_words(folder, tmp_path, monkeypatch):
    def broken(*given, **more):
        yield TrainStep(1, 0.5, 1e-3, None)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("napari_learned_diffusion.jobs.train.fit", broken)
    with pytest.raises(DeviceError, match="fewer workers, or with 0"):
        run(start(folder, tmp_path / "out"))


def test_training_leaves_the_random_numbers_of_others_alone(folder, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(start(folder, tmp_path / "out"))
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize("model", ["no-such-model", "perona-malik"])
def test_only_learned_models_can_be_trained(folder, tmp_path, model):
    with pytest.raises(UnknownModelError, match="foe-splines") as raised:
        run(start(folder, tmp_path / "out", model))
    assert "perona-malik" not in str(raised.value).split("There are")[1]


def test_a_folder_without_images_ends_the_job_before_it_starts(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidImageError, match="no image"):
        run(start(tmp_path / "empty", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_can_not_be_made_is_refused(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileWriteError, match="can't be made"):
        run(start(folder, tmp_path / "file"))


def test_a_deeper_model_begins_by_doing_what_the_shallow_one_did(tmp_path):
    torch.manual_seed(0)
    shallow, path = ConductanceUNet(width=4), tmp_path / "shallow.safetensors"
    write_model(path, shallow)
    deep = ConductanceUNet(width=4, blocks=2)
    deep.load_state_dict(_begin_with(path, deep))
    v = 3 * torch.randn(1, 1, 24, 24)
    stencil = Stencil(shallow.offsets(0))
    expected = read_model(path, ConductanceUNet).conductances(v, stencil, None, 0)
    torch.testing.assert_close(deep.conductances(v, stencil, None, 0), expected)
    assert all(p.any() for n, p in deep.named_parameters() if n.endswith("first.weight"))


def test_a_wider_model_begins_by_doing_what_the_narrow_one_did(tmp_path):
    torch.manual_seed(0)
    narrow, path = ConductanceUNet(width=4, depth=1), tmp_path / "narrow.safetensors"
    write_model(path, narrow)
    wide = LargeConductanceUNet(width=6, depth=1).train()
    wide.load_state_dict(_begin_with(path, wide))
    v = 3 * torch.randn(1, 1, 24, 24)
    stencil = Stencil(narrow.offsets(0))
    expected = read_model(path, ConductanceUNet).conductances(v, stencil, None, 0)
    torch.testing.assert_close(wide.conductances(v, stencil, None, 0), expected)
    with pytest.raises(InvalidSettingError, match="architecture"):
        _begin_with(path, LargeConductanceUNet(width=3, depth=1))
