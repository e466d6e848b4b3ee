"""Packages for the BioImage Model Zoo: complete, tested by the Zoo's own test, or not there."""

from __future__ import annotations

import gc
import json
import zipfile
from importlib import metadata
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from napari_learned_diffusion import (
    DenoisingModule,
    Gaussian,
    NoiseModel,
    PoissonGaussian,
    Rician,
    denoise,
    export_to_zoo,
)
from napari_learned_diffusion.cli import app
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
    MissingDependencyError,
    UnknownModelError,
)
from napari_learned_diffusion.core.user_models import save_user_model
from napari_learned_diffusion.jobs import zoo_export
from napari_learned_diffusion.jobs.zoo_export import require_zoo

FACTS = {
    "summary": "Splines, fine-tuned on cells (paired).",
    "noise_range": [5.0, 75.0],
    "suggestion": {"iterations": 2, "tau": 0.2},
    "gain_dB": 1.25,
    "date": "2024-05-01",
    "version": "0.1.0",
    "noise": Gaussian(0.1).to_dict(),
}
# bioimageio leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def own(user_models_folder) -> str:
    torch.manual_seed(3)
    model = Splines(experts=4, size=3, iterations=2)
    with torch.no_grad():
        model.log_steps -= 0.5
    return save_user_model("Zellkörper 2.1", model, FACTS).key


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as package:
        return {name: package.read(name) for name in package.namelist()}


def description(path: Path) -> dict:
    import ruyaml

    return ruyaml.YAML(typ="safe").load(contents(path)["rdf.yaml"].decode())


def arguments(path: Path) -> dict:
    return description(path)["weights"]["pytorch_state_dict"]["architecture"]["kwargs"]


def test_what_a_package_holds(own, tmp_path):
    path = export_to_zoo(own, tmp_path, authors=["A. Name", "B. Name"], license="CC-BY-4.0")
    assert path == tmp_path / "Zellkörper 2.1.zip"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [path.name]
    said, files = description(path), contents(path)
    assert said["name"] == "Denoising by learned diffusion (Zellk_rper 2_1)"
    assert [author["name"] for author in said["authors"]] == ["A. Name", "B. Name"]
    assert said["license"] == "CC-BY-4.0"
    assert said["format_version"].startswith("0.5.")
    assert "Valdivia Ortega" in said["cite"][0]["text"]
    text = files["README.md"].decode()
    for words in ("pip install napari-learned-diffusion", "deviation 0.1", "2 iterations of 0.2"):
        assert words in text
    assert "`foe-splines`" in text
    assert "napari-learned-diffusion>=" in files["environment.yaml"].decode()
    assert files["cover.png"].startswith(b"\x89PNG")

    weights = said["weights"]["pytorch_state_dict"]
    architecture = weights["architecture"]
    assert architecture["import_from"] == "napari_learned_diffusion"
    assert architecture["callable"] == DenoisingModule.__name__
    module = DenoisingModule(**json.loads(json.dumps(architecture["kwargs"])))
    module.load_state_dict(torch.load(BytesIO(files["weights.pt"]), weights_only=True))
    noisy, denoised = (np.load(BytesIO(files[f"test_{n}put.npy"])) for n in ("in", "out"))
    np.testing.assert_array_equal(module(torch.from_numpy(noisy)).numpy(), denoised)
    expected = denoise(noisy[0, 0], own, noise_sigma=0.1, device="cpu")
    np.testing.assert_array_equal(denoised[0, 0], expected)


def test_the_zoos_program_predicts_with_it(own, tmp_path):
    from bioimageio.core import predict

    path = export_to_zoo(own, tmp_path / "cells", noise_sigma=12.0, iterations=1, tau=0.1)
    assert path == tmp_path / "cells.zip"
    rng = np.random.default_rng(0)
    planes = rng.normal(100, 12, (2, 1, 37, 50)).astype(np.float32)
    sample = predict(model=path, inputs={"noisy": planes})
    found = sample.members["denoised"].data.to_numpy()
    del sample
    gc.collect()
    # It takes a GPU where there is one.
    for plane, result in zip(planes[:, 0], found[:, 0], strict=True):
        expected = denoise(plane, own, noise_sigma=12, iterations=1, tau=0.1, device="cpu")
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-3 * np.ptp(plane))


@pytest.mark.parametrize(
    ("key", "noise"),
    [
        ("conductance-unet-s", PoissonGaussian(0.01, -0.2)),
        ("k-automation", Rician(1e-3, pedestal=5.0)),
    ],
)
def test_models_of_the_package(key, noise: NoiseModel, tmp_path):
    path = export_to_zoo(key, tmp_path, noise=noise)
    noisy, denoised = (np.load(BytesIO(contents(path)[f"test_{n}put.npy"])) for n in ("in", "out"))
    assert arguments(path)["noise"] == noise.to_dict()
    assert denoised.std() < noisy.std()
    assert "developers" in description(path)["authors"][0]["name"]


def test_random_numbers_go_on_as_if_nothing_had_been(own, tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    export_to_zoo(own, tmp_path)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


def test_a_package_that_fails_the_test_is_not_written(own, tmp_path, monkeypatch):
    def twice(module: DenoisingModule, planes: torch.Tensor) -> torch.Tensor:
        return 2 * DenoisingModule.forward(module, planes)

    other = type("DenoisingModule", (DenoisingModule,), {"forward": twice})
    monkeypatch.setattr(zoo_export, "DenoisingModule", other)
    with pytest.raises(FileFormatError, match="nothing was written"):
        export_to_zoo(own, tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_mistakes_are_told_before_anything_is_computed(own, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_export._Example, "of", None)
    (tmp_path / "there.zip").touch()
    for model, target, settings, error, message in [
        ("perona-malik", tmp_path, {"noise_sigma": 1}, UnknownModelError, "no parameters"),
        ("none", tmp_path, {"noise_sigma": 1}, UnknownModelError, "no model"),
        ("my/none", tmp_path, {"noise_sigma": 1}, UnknownModelError, "no model"),
        ("unet", tmp_path, {}, InvalidSettingError, "one noise level"),
        ("unet", tmp_path, {"noise_sigma": 0}, InvalidSettingError, "nothing to remove"),
        (own, tmp_path, {"iterations": 0}, InvalidSettingError, "at least 1"),
        (own, tmp_path / "there", {}, FileWriteError, "exists"),
        (own, tmp_path / "absent" / "x.zip", {}, FileWriteError, "no folder"),
    ]:
        with pytest.raises(error, match=message):
            export_to_zoo(model, target, **settings)


def test_a_licence_that_isnt_one_is_refused(own, tmp_path):
    with pytest.raises(InvalidSettingError, match="licence"):
        export_to_zoo(own, tmp_path, license="mine")
    assert not list(tmp_path.glob("*.*"))


def test_a_pydantic_that_is_too_new_is_told(monkeypatch):
    versions = {"bioimageio.spec": "0.5.12.0", "pydantic": "2.14.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    with pytest.raises(MissingDependencyError, match=r"\[zoo\]"):
        require_zoo()
    versions["bioimageio.spec"] = "0.5.14.3"
    require_zoo()


def test_the_command(own, tmp_path):
    def call(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["models", "export-zoo", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output.strip()

    path = call(own, tmp_path / "x.zip", "--gain", 2, "--offset", 9, "-n", 1, "--author", "A. Name")
    assert path.replace("\n", "") == str(tmp_path / "x.zip")
    kwargs = arguments(tmp_path / "x.zip")
    assert kwargs["noise"] == PoissonGaussian(2.0, 9.0).to_dict()
    assert kwargs["iterations"] == 1
    assert "exists" in call(own, tmp_path / "x.zip", code=1)
    assert "--gain" in call(own, tmp_path / "y.zip", "--offset", 9, code=1)
    assert "not both" in call(own, tmp_path / "y.zip", "--gain", 9, "-s", 9, code=1)
