"""Files in the models folder that are damaged, no files, or claim what isn't so."""

from __future__ import annotations

import importlib.resources
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from napari_learned_diffusion import denoise, list_models
from napari_learned_diffusion.cli import app
from napari_learned_diffusion.core import model_files, zoo
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    InvalidSettingError,
    LearnedDiffusionError,
)
from napari_learned_diffusion.core.user_models import (
    broken_user_models,
    damaged_user_models,
    delete_user_model,
    import_user_model,
    list_user_models,
    save_user_model,
    user_model,
)
from napari_learned_diffusion.core.weights import read_tensors
from napari_learned_diffusion.core.zoo import damaged_models, learned_model

FACTS: dict[str, Any] = {
    "summary": "Splines, fine-tuned on cells (paired).",
    "noise_range": [5.0, 75.0],
    "suggestion": {"iterations": 8, "tau": 0.2},
    "gain_dB": 1.25,
    "date": "2024-05-01",
    "version": "0.1.0",
}


@pytest.fixture
def good(user_models_folder: Path) -> Path:
    return save_user_model("good", learned_model("foe-splines"), FACTS).path


def _rewrite(path: Path, source: Path, **changes: Any) -> None:
    """A copy of a model's file with other values in its header, or in the list of its tensors."""
    whole = source.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    tensors = json.loads(whole[8 : 8 + length])
    header = json.loads(tensors["__metadata__"]["header"])
    for name, value in changes.items():
        if name in FACTS:
            header["card"][name] = value
        elif name in ("card", "format", "model", "architecture"):
            header[name] = value
        else:
            tensors[name] = value
    tensors["__metadata__"]["header"] = json.dumps(header)
    text = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


def _all_is_well(good: Path, bad: Path, capsys: Any = None) -> None:
    """The others work everywhere, and the bad one is one line that says what to do."""
    assert [m.name for m in list_user_models()] == ["good"]
    (line,) = broken_user_models()
    assert bad.name in line
    assert "delete or replace it" in line
    keys = [card.key for card in list_models()]
    assert keys == [*REGISTRY, "my/good"]
    assert list(damaged_models().values()) == [line]
    found = CliRunner().invoke(app, ["models"])
    assert found.exit_code == 0, found.output
    assert "my/good" in found.output
    assert f"my/{bad.name.removesuffix('.safetensors')}" in found.output
    assert "Damaged" in found.output
    with pytest.raises(FileFormatError) as refused:
        user_model("bad")
    assert "\n" not in str(refused.value)
    with pytest.raises(FileFormatError):
        import_user_model(bad, "imported")


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_range": [10**400, 10**401]},
        {"noise_range": [float("nan"), 5.0]},
        {"noise_range": [float("-inf"), float("inf")]},
        {"noise_range": [75.0, 5.0]},
        {"noise_range": [True, 5]},
        {"noise_range": "5 to 75"},
        {"gain_dB": float("nan")},
        {"gain_dB": 10**400},
        {"gain_dB": "1.25"},
        {"suggestion": {"iterations": 10**9, "tau": 0.2}},
        {"suggestion": {"iterations": True, "tau": 0.2}},
        {"suggestion": {"iterations": 8.0, "tau": 0.2}},
        {"suggestion": {"iterations": 8, "tau": float("nan")}},
        {"suggestion": {"iterations": 8, "tau": 0}},
        {"suggestion": []},
        {"summary": ["a"]},
        {"summary": "a" * 10**5},
        {"date": None},
        {"card": None},
        {"card": [1, 2]},
        {"format": float("inf")},
        {"format": float("nan")},
        {"format": "1"},
        {"format": [1]},
        {"model": {"a": 1}},
        {"model": "perona-malik"},
        {"model": "unet"},
        {"architecture": {"experts": 10**400}},
        {"architecture": {"wings": 2}},
        {"kernels": {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 1]}},
        {"kernels": {"dtype": "F32", "shape": [-4, -1, 5, 5], "data_offsets": [0, 1]}},
        {"kernels": {"dtype": "F32", "shape": "all", "data_offsets": [0, 1]}},
        {"kernels": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 1]}},
        {"kernels": {"dtype": "F64", "shape": [24, 1, 5, 5], "data_offsets": [0, 1]}},
        {"kernels": 3},
        {"another": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_header_that_lies_is_one_line_and_breaks_nothing_else(
    good: Path, changes: dict[str, Any]
) -> None:
    bad = good.with_name("bad.safetensors")
    _rewrite(bad, good, **changes)
    _all_is_well(good, bad)
    with pytest.raises(LearnedDiffusionError):
        denoise(np.random.default_rng(0).normal(0, 1, (16, 16)), noise_sigma=1.0, model="my/bad")
    delete_user_model("bad")
    assert broken_user_models() == []


def test_another_architecture_is_refused_when_it_is_imported_or_used(good: Path) -> None:
    bad = good.with_name("bad.safetensors")
    _rewrite(bad, good, architecture={"experts": 24, "size": 5, "iterations": 7})
    # That such a model has other parameters is seen only when one is made.
    with pytest.raises(FileFormatError, match="doesn't hold"):
        import_user_model(bad, "imported")
    with pytest.raises(FileFormatError, match="doesn't hold"):
        denoise(np.zeros((16, 16)), noise_sigma=1.0, model="my/bad")


def test_more_iterations_than_such_a_model_has_are_one_line(good: Path) -> None:
    path = save_user_model("long", learned_model("conductance-unet-s"), FACTS).path
    assert [card.key for card in list_models()] == [*REGISTRY, "my/good"]
    ((key, line),) = damaged_models().items()
    assert key == "my/long"
    assert f"{path} suggests 8 iterations" in line
    with pytest.raises(FileFormatError, match="suggests 8 iterations"):
        denoise(np.zeros((16, 16)), noise_sigma=1.0, model="my/long")


@pytest.mark.parametrize("kept", [0, 3, 8, 100, 5000, -1])
def test_a_file_that_is_cut_short_is_one_line(good: Path, kept: int) -> None:
    bad = good.with_name("bad.safetensors")
    bad.write_bytes(good.read_bytes()[:kept])
    _all_is_well(good, bad)


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 4000, b"text " * 1000, b"{}" * 10, struct.pack("<Q", 2) + b"{}", b"PK\x03\x04" * 9],
    ids=["bytes", "text", "json", "empty header", "zip"],
)
def test_what_is_another_file_is_one_line(good: Path, content: bytes) -> None:
    bad = good.with_name("bad.safetensors")
    bad.write_bytes(content)
    _all_is_well(good, bad)


def test_a_file_of_a_gigabyte_is_not_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = good.with_name("bad.safetensors")
    with bad.open("wb") as file:
        file.truncate(1 << 30)
    opened: list[Path] = []
    before = Path.open

    def spy(path: Path, *given: Any, **options: Any) -> Any:
        opened.append(path)
        return before(path, *given, **options)

    monkeypatch.setattr(Path, "open", spy)
    _all_is_well(good, bad)
    assert bad not in opened


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket", "circle", "dangling"])
@pytest.mark.skipif(os.name == "nt", reason="needs the files of Unix")
def test_what_is_no_file_is_one_line_and_is_never_waited_for(good: Path, kind: str) -> None:
    bad = good.with_name("bad.safetensors")
    if kind == "folder":
        bad.mkdir()
        (bad / "photograph.tif").touch()
    elif kind == "pipe":
        os.mkfifo(bad)
    elif kind == "device":
        bad.symlink_to("/dev/zero")
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(bad.parent)  # the path of a socket may not be long
        try:
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.bind(bad.name)
        finally:
            os.chdir(here)
    elif kind == "circle":
        bad.symlink_to(bad)
    else:
        bad.symlink_to(good.with_name("gone.safetensors"))
    assert [m.name for m in list_user_models()] == ["good"]
    (line,) = broken_user_models()
    assert "bad.safetensors" in line
    assert [card.key for card in list_models()] == [*REGISTRY, "my/good"]
    for refused in (
        lambda: import_user_model(bad, "imported"),
        lambda: user_model("bad"),
        lambda: read_tensors(bad),
        lambda: denoise(np.zeros((16, 16)), noise_sigma=1.0, model="my/bad"),
    ):
        with pytest.raises(LearnedDiffusionError):
            refused()
    if kind == "folder":
        with pytest.raises(LearnedDiffusionError):
            delete_user_model("bad")
        assert (bad / "photograph.tif").exists()
    else:
        delete_user_model("bad")
        assert not os.path.lexists(bad)
    assert good.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(good: Path) -> None:
    bad = good.with_name("bad.safetensors")
    bad.write_bytes(good.read_bytes())
    bad.chmod(0)
    assert [m.name for m in list_user_models()] == ["good"]
    assert "can't be read" in broken_user_models()[0]


@pytest.mark.parametrize("name", ["<img src=x>", "[red]x[b]", "a" * 65, ".hidden", "x\ny", "con"])
def test_a_file_whose_name_can_not_be_a_key_is_one_line(good: Path, name: str) -> None:
    path = good.with_name(f"{name}.safetensors")
    try:
        path.write_bytes(good.read_bytes())
    except OSError:
        pytest.skip("the file system takes no such name")
    assert [m.name for m in list_user_models()] == ["good"]
    if name.startswith("."):  # as other programs hide what isn't finished
        assert damaged_user_models() == {}
        return
    ((key, line),) = damaged_user_models().items()
    assert key == f"my/{name}"
    assert "has to be renamed" in line
    with pytest.raises(InvalidSettingError):
        user_model(name)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"title": 3}'])
def test_one_card_that_is_missing_or_damaged_is_one_error_for_that_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    real = importlib.resources.files("napari_learned_diffusion") / "weights"
    for file in real.iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    card = weights / "unet.json"
    card.unlink()
    if content is not None:
        card.write_text(content)
    monkeypatch.setattr(zoo, "files", lambda _: tmp_path)
    zoo._bundled_card.cache_clear()
    try:
        keys = [model.key for model in list_models()]
        assert keys == [key for key in REGISTRY if key != "unet"]
        ((key, line),) = damaged_models().items()
        assert key == "unet"
        assert "unet.json" in line
        with pytest.raises(FileFormatError, match=r"unet\.json"):
            denoise(np.zeros((16, 16)), noise_sigma=1.0, model="unet")
        denoise(np.zeros((16, 16)), noise_sigma=1.0)  # the default model needs it not
    finally:
        zoo._bundled_card.cache_clear()


def test_the_packages_own_weights_pass_the_same_checks() -> None:
    learned = [key for key in REGISTRY if key != "perona-malik"]
    for key in learned:
        found = model_files.bundled_header(key)
        assert found is not None
        assert found.parameters == zoo.card(key).parameters
