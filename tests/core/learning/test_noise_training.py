"""The noise network: its guarantees, its training, its checkpoints, what it is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.io import imsave
from typer.testing import CliRunner

from napari_learned_diffusion import cli
from napari_learned_diffusion.config import NoiseTrainingConfig
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.learning import noise_training
from napari_learned_diffusion.core.learning.acquisitions import LAGS, Smoothed
from napari_learned_diffusion.core.learning.noise_training import fit_noise_network
from napari_learned_diffusion.core.learning.noise_windows import Object
from napari_learned_diffusion.core.noise_evidence import noise_evidence
from napari_learned_diffusion.core.noise_network import CELL, N_LAGS, NoiseNetwork, least_level
from napari_learned_diffusion.core.weights import read_model

CONFIG = NoiseTrainingConfig(steps=6, batch=4, scans=2, seed=1)
OBJECTS = tuple(
    Object(np.kron(rng.uniform(20, 230, (12, 12)), np.ones((12, 12))).astype(np.float32), 0.5)
    for rng in (np.random.default_rng(seed) for seed in range(3))
)


@pytest.fixture(autouse=True)
def few_validation_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_training, "VALIDATION_BATCHES", 3)
    monkeypatch.setattr(noise_training, "_VALIDATION_SCANS", 2)


def small() -> NoiseNetwork:
    torch.manual_seed(0)
    return NoiseNetwork(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1))


def windows(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 1, 96, 96, generator=torch.Generator().manual_seed(seed))


def test_answers_follow_a_change_of_unit() -> None:
    network, given = small(), windows()
    level, log_variance, lags = network(given)
    scaled = network(given * 7 + 300)
    torch.testing.assert_close(scaled[0], level + np.log(7), atol=2e-3, rtol=0)
    torch.testing.assert_close(scaled[1], log_variance, atol=2e-3, rtol=0)
    torch.testing.assert_close(scaled[2], lags, atol=2e-3, rtol=0)
    assert level.shape == log_variance.shape == (2, 1, 6, 6)
    assert lags.shape == (2, N_LAGS, 6, 6)


def test_whatever_missing_pixels_were_makes_no_difference() -> None:
    network, given = small(), windows()
    for missing in (np.nan, np.inf, -np.inf):
        holed = given.clone()
        holed[..., 10:40, 20:60] = missing
        for answer in network(holed):
            assert answer.isfinite().all()
        torch.testing.assert_close(
            network(holed)[0], network(holed.nan_to_num(np.nan, np.nan, np.nan))[0]
        )
    assert network(given * np.nan)[0].isfinite().all()


def test_least_level_follows_a_change_of_unit() -> None:
    torch.testing.assert_close(
        least_level(windows() * 7 + 300), least_level(windows()) + np.log(7), atol=2e-3, rtol=0
    )


def test_a_continued_training_is_the_same_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = small()
    losses = [s.loss for s in fit_noise_network(whole, OBJECTS, CONFIG, every=3)]
    stopped, file = small(), tmp_path / "checkpoint.safetensors"
    steps = fit_noise_network(stopped, OBJECTS, CONFIG, checkpoint=file, every=3)
    first = [next(steps).loss for _ in range(4)]
    steps.close()
    continued = small()
    rest = [s.loss for s in fit_noise_network(continued, OBJECTS, CONFIG, checkpoint=file, every=3)]
    assert first[:3] + rest == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(whole.parameters(), continued.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    list(fit_noise_network(small(), OBJECTS, CONFIG, checkpoint=file, every=3))
    other = replace(CONFIG, seed=2)
    with pytest.raises(InvalidSettingError, match="seed 1"):
        next(fit_noise_network(small(), OBJECTS, other, checkpoint=file))


def test_a_training_that_was_stopped_after_its_last_step_still_tells_its_scores(
    tmp_path: Path,
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    before = list(fit_noise_network(small(), OBJECTS, CONFIG, checkpoint=file, every=3))[-1]
    (again,) = fit_noise_network(small(), OBJECTS, CONFIG, checkpoint=file, every=3)
    assert again.step == 6
    assert again.validation is not None
    assert again.validation == pytest.approx(before.validation, rel=1e-4)


def test_training_learns() -> None:
    config = replace(CONFIG, steps=40, batch=8, learning_rate=5e-3)
    losses = [s.loss for s in fit_noise_network(small(), OBJECTS, config, every=40)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.2


@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (64, 64), (96, 96), (97, 200), (16, 16)])
def test_evidence_covers_planes_of_any_size(shape: tuple[int, int]) -> None:
    plane = np.random.default_rng(0).normal(50, 4, shape)
    evidence = noise_evidence(plane, network=small())
    expected = sum(
        (min(h, shape[0] - y * CELL) * min(w, shape[1] - x * CELL)) >= CELL**2 / 2
        for y in range(-(-shape[0] // CELL))
        for x in range(-(-shape[1] // CELL))
        for h, w in [(CELL, CELL)]
    )
    assert len(evidence) >= expected
    assert len(evidence.noise_sigma) == len(evidence.uncertainty) == len(evidence)
    assert evidence.autocorrelation.shape == (len(evidence), N_LAGS)
    assert (evidence.row < shape[0]).all()
    assert (evidence.column < shape[1]).all()
    assert evidence.intensity == pytest.approx(50, abs=4) if len(evidence) else True


def test_evidence_follows_a_change_of_unit_however_extreme() -> None:
    plane = np.random.default_rng(0).normal(50, 4, (96, 96))
    given = noise_evidence(plane, network=small())
    for scale, shift in ((1e-30, 0.0), (1e30, 0.0), (3.0, -1e5)):
        other = noise_evidence(plane * scale + shift, network=small())
        assert other.noise_sigma == pytest.approx(given.noise_sigma * scale, rel=1e-3)
        assert other.intensity == pytest.approx(given.intensity * scale + shift, rel=1e-6)


def test_evidence_leaves_out_what_is_masked_or_missing() -> None:
    plane = np.random.default_rng(0).normal(50, 4, (96, 96))
    mask = np.ones(plane.shape, np.bool_)
    mask[:48] = False
    holed = np.where(mask, plane, np.nan)
    masked = noise_evidence(plane, mask, network=small())
    missing = noise_evidence(holed, network=small())
    assert masked.row.min() > 48
    assert masked.noise_sigma == pytest.approx(missing.noise_sigma, rel=1e-4)
    assert len(noise_evidence(np.full((40, 40), np.nan), network=small())) == 0


def test_evidence_needs_a_plane_and_a_mask_that_fits() -> None:
    with pytest.raises(InvalidImageError, match="planes"):
        noise_evidence(np.zeros((3, 8, 8)), network=small())
    with pytest.raises(InvalidImageError, match="mask's shape"):
        noise_evidence(np.zeros((8, 8)), np.ones((3, 8), np.bool_), network=small())


@pytest.mark.parametrize("length", [0.0, 1.0])
def test_the_package_s_network_tells_level_and_correlation(length: float) -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:192, :192]
    clean = 100 + 60.0 * ((y - 96) ** 2 + (x - 96) ** 2 < 60**2)
    acquired = Smoothed(12.0, (length, length)).acquire(clean, rng)
    found = noise_evidence(acquired.noisy)
    weight = 1 / found.uncertainty**2
    level = np.exp(np.average(np.log(found.noise_sigma), weights=weight))
    assert level == pytest.approx(12, rel=0.1)
    correlation = np.average(found.autocorrelation, axis=0, weights=weight)
    for neighbour in (LAGS.index((0, 1)), LAGS.index((1, 0))):
        told = acquired.autocorrelation[neighbour]
        assert correlation[neighbour] == pytest.approx(told, abs=0.2)


def invoke(*arguments: object) -> tuple[int, str]:
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    result = runner.invoke(cli.app, ["train", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, o in enumerate(OBJECTS):
        imsave(folder / f"{number}.png", o.plane.astype(np.uint8))
    return folder


def test_the_command_trains_and_writes_weights_and_card(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    options = ("--steps", 2, "--batch", 2, "--every", 1, "--seed", 4)
    code, text = invoke("--noise-network", "--data", photographs, "--out", out, *options)
    assert code == 0, text
    assert "step 2 of 2" in text
    network = read_model(out / "noise.safetensors", NoiseNetwork)
    assert network(windows())[0].isfinite().all()
    card = json.loads((out / "noise.json").read_text("utf-8"))
    assert card["details"]["training"]["seed"] == 4
    assert card["details"]["training"]["data"] == "photographs"
    assert card["parameters"] == sum(p.numel() for p in network.parameters())
    assert not (out / "noise.checkpoint.safetensors").exists()
    code, text = invoke("--noise-network", "--data", photographs, "--out", out, *options)
    assert code == 1
    assert "--overwrite" in text


def test_the_command_refuses_what_the_noise_network_does_not_have(
    photographs: Path, tmp_path: Path
) -> None:
    code, text = invoke(
        "--noise-network", "--data", photographs, "--out", tmp_path, "--patch", 32, "--tau", 0.2
    )
    assert code == 1
    assert "--patch, --tau" in text


def test_the_command_wants_a_model_or_the_noise_network(photographs: Path, tmp_path: Path) -> None:
    both = ("--model", "unet", "--noise-network")
    for given in ((), both):
        code, text = invoke(*given, "--data", photographs, "--out", tmp_path)
        assert code == 2
        assert "either --model" in text
