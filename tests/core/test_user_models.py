"""Models of the user's own: saved, listed, renamed, deleted, exported, and imported with care."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from napari_learned_diffusion import DiffusionConfig, denoise, list_models
from napari_learned_diffusion.core import user_models
from napari_learned_diffusion.core.diffusivity import diffusivity_class
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
    UnknownModelError,
)
from napari_learned_diffusion.core.noise import Correlated
from napari_learned_diffusion.core.user_models import (
    broken_user_models,
    delete_user_model,
    export_user_model,
    import_user_model,
    list_user_models,
    load_user_model,
    rename_user_model,
    save_user_model,
    user_model,
)
from napari_learned_diffusion.core.weights import FORMAT, write_tensors
from napari_learned_diffusion.core.zoo import card, load_model, noise_kind_of
from napari_learned_diffusion.jobs.batch_engines import weights_of
from napari_learned_diffusion.jobs.prepare import prepare

FACTS = {
    "summary": "Splines, fine-tuned on cells (paired).",
    "noise_range": [5.0, 75.0],
    "suggestion": {"iterations": 2, "tau": 0.2},
    "gain_dB": 1.25,
    "date": "2024-05-01",
    "version": "0.1.0",
}


@pytest.fixture
def own() -> Splines:
    torch.manual_seed(3)
    return Splines(experts=4, size=3, iterations=2)


@pytest.fixture
def saved(own, user_models_folder):
    return save_user_model("cells", own, FACTS)


def test_a_saved_model_is_there_by_its_key(own, saved, user_models_folder):
    assert saved.key == "my/cells"
    assert saved.path == user_models_folder / "cells.safetensors"
    assert [p.name for p in user_models_folder.iterdir()] == ["cells.safetensors"]
    assert saved.parameters == sum(p.numel() for p in own.parameters())
    found = load_user_model("my/cells")
    assert found.architecture == own.architecture
    for a, b in zip(found.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_it_works_wherever_a_model_is_chosen(own, saved):
    assert diffusivity_class("my/cells") is Splines
    described = card("my/cells")
    assert (described.title, described.summary) == ("cells", FACTS["summary"])
    assert described.details["base"] == "foe-splines"
    assert list_models()[-1] == described
    config = prepare(np.random.default_rng(0).normal(size=(40, 40)), DiffusionConfig("my/cells"))
    assert (config.config.iterations, config.config.tau) == (2, 0.2)
    assert isinstance(load_model(config.config), Splines)
    noisy = np.random.default_rng(0).normal(100, 10, (40, 40))
    result = denoise(noisy, "my/cells", noise_sigma=10, device="cpu")
    assert not np.array_equal(result, denoise(noisy, "foe-splines", noise_sigma=10, device="cpu"))
    assert result.mean() == pytest.approx(noisy.mean())
    weights, digest = weights_of("my/cells")
    assert weights is not None
    assert digest != weights_of("foe-splines")[1]


def test_names(own, saved):
    for name in ("Färbung 3", "a.b", "x-(2)+y", "_1"):
        assert save_user_model(name, own, FACTS).name == name
    assert [m.name for m in list_user_models()] == ["_1", "a.b", "cells", "Färbung 3", "x-(2)+y"]
    for name in ("", "../x", "a/b", "a\\b", ".hidden", "a ", "dot.", "con", "NUL.x", "x" * 65):
        with pytest.raises(InvalidSettingError, match="can't be called"):
            save_user_model(name, own, FACTS)
    with pytest.raises(InvalidSettingError, match="already"):
        save_user_model("cells", own, FACTS)
    assert save_user_model("cells", own, FACTS | {"gain_dB": 2.0}, overwrite=True).facts[
        "gain_dB"
    ] == pytest.approx(2)


def test_rename_and_delete(own, saved, user_models_folder):
    save_user_model("other", own, FACTS)
    with pytest.raises(InvalidSettingError, match="already"):
        rename_user_model("cells", "other")
    assert rename_user_model("cells", "Cells of May").key == "my/Cells of May"
    with pytest.raises(UnknownModelError, match=r"my/Cells of May, my/other"):
        card("my/cells")
    delete_user_model("other")
    delete_user_model("my/Cells of May")
    assert list(user_models_folder.iterdir()) == []
    with pytest.raises(UnknownModelError, match="none yet"):
        delete_user_model("other")


def test_export_and_import_give_the_same_file(saved, tmp_path):
    exported = export_user_model("cells", tmp_path)
    assert exported == tmp_path / "cells.safetensors"
    with pytest.raises(FileWriteError, match="exists"):
        export_user_model("cells", exported)
    assert export_user_model("cells", tmp_path / "x").name == "x.safetensors"
    with pytest.raises(InvalidSettingError, match="already"):
        import_user_model(exported)
    again = import_user_model(exported, "again")
    assert again.path.read_bytes() == saved.path.read_bytes()
    assert again.facts == FACTS


def header(**changes) -> dict[str, object]:
    return {"model": "foe-splines", "architecture": {"experts": 4, "size": 3, "iterations": 2}} | {
        "card": FACTS,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such"}, "hasn't got"),
        ({"model": "perona-malik"}, "can't be made"),
        ({"model": ["foe-splines"]}, "no model|hasn't got"),
        ({"architecture": {"experts": 4, "size": 3}}, "doesn't hold"),
        ({"architecture": {"experts": 5, "size": 3, "iterations": 2}}, "doesn't hold"),
        ({"architecture": {"experts": 10**9}}, "as this package writes"),
        ({"architecture": {"experts": True}}, "as this package writes"),
        ({"architecture": {"magic": 3}}, "can't be made"),
        ({"architecture": "x"}, "as this package writes"),
        ({"card": {}}, "as this package writes"),
        ({"card": FACTS | {"summary": 3}}, "as this package writes"),
        ({"card": FACTS | {"suggestion": {"iterations": 0, "tau": 0.2}}}, "as this package writes"),
        ({"card": FACTS | {"noise_range": [1]}}, "as this package writes"),
        ({"card": None}, "as this package writes"),
    ],
)
def test_a_file_with_a_wrong_header_is_refused(own, tmp_path, user_models_folder, changes, message):
    path = tmp_path / "x.safetensors"
    write_tensors(path, own.state_dict(), header(**changes))
    with pytest.raises(FileFormatError, match=message):
        import_user_model(path)
    assert list_user_models() == []


def test_a_file_with_wrong_tensors_is_refused(own, tmp_path, user_models_folder):
    path = tmp_path / "x.safetensors"
    tensors = own.state_dict()

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        write_tensors(path, changed, header())
        with pytest.raises(FileFormatError, match=message):
            import_user_model(path)

    refused(tensors | {"kernels": tensors["kernels"][:2].clone()}, "doesn't hold")
    refused(tensors | {"more": torch.zeros(3)}, "doesn't hold")
    refused({k: v for k, v in tensors.items() if k != "log_steps"}, "doesn't hold")
    refused(tensors | {"log_steps": torch.tensor([1.0, float("nan")])}, "finite")
    refused(tensors | {"log_steps": tensors["log_steps"].double()}, "as this package writes")
    assert not user_models_folder.exists() or list(user_models_folder.iterdir()) == []


def test_what_is_no_model_is_never_run(tmp_path, own, user_models_folder):
    class Trap:
        def __reduce__(self) -> object:
            return Path.touch, (tmp_path / "sprung",)

    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps(Trap()))
    torch.save({"model": own.state_dict()}, tmp_path / "torch.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "json.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    deep = b"[" * 100_000
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b" " * (2 << 20))
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    for path in sorted(tmp_path.glob("*.safetensors")):
        with pytest.raises(FileFormatError):
            import_user_model(path)
    with pytest.raises(FileFormatError, match="can't be read"):
        import_user_model(tmp_path / "absent.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_cut_short_or_of_a_newer_format_are_refused(saved, tmp_path):
    whole = saved.path.read_bytes()
    path = tmp_path / "x.safetensors"
    for length in (4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            import_user_model(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(FileFormatError, match="Update"):
        import_user_model(path)


def test_a_damaged_file_spoils_no_list_and_can_be_deleted(saved, user_models_folder):
    bad = user_models_folder / "bad.safetensors"
    bad.write_bytes(b"x")
    assert [m.name for m in list_user_models()] == ["cells"]
    assert [bad.name in text for text in broken_user_models()] == [True]
    assert "my/cells" in [c.key for c in list_models()]
    delete_user_model("bad")
    assert broken_user_models() == []


def test_a_damaged_model_asks_for_no_noise_of_its_own(saved, own):
    config = DiffusionConfig(model="my/cells")
    correlated = FACTS | {"noise": Correlated(3.0).to_dict()}
    saved = save_user_model("cells", own, correlated, overwrite=True)
    assert noise_kind_of(config) == "correlated"
    saved.path.write_bytes(b"x")
    assert noise_kind_of(config) == "auto"
    with pytest.raises(FileFormatError):
        prepare(np.zeros((32, 32)), config)


def test_a_disk_that_fills_leaves_what_was_there(own, saved, user_models_folder, monkeypatch):
    before = saved.path.read_bytes()

    def full(source: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(FileWriteError, match="disk is full"):
        import_user_model(saved.path, "copy")

    def full_too(tensors: object, path: Path, metadata: object) -> None:
        full(None, path)

    monkeypatch.setattr("napari_learned_diffusion.core.weights.save_file", full_too)
    with pytest.raises(FileWriteError, match="disk is full"):
        save_user_model("cells", own, FACTS, overwrite=True)
    assert [p.name for p in user_models_folder.iterdir()] == ["cells.safetensors"]
    assert saved.path.read_bytes() == before


def test_a_folder_that_can_not_be_made(own, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(user_models.FOLDER_VARIABLE, str(tmp_path / "file" / "models"))
    assert list_user_models() == []
    with pytest.raises(FileWriteError, match="can't be made"):
        save_user_model("x", own, FACTS)


def test_cards_are_plain_json(saved):
    assert json.loads(json.dumps(user_model("my/cells").facts)) == FACTS


def test_both_readers_agree_on_the_format():
    assert user_models.FORMAT == FORMAT
