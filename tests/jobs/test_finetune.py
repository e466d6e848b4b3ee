"""The fine-tuning job: what it makes of a stack and its regions, and what can be wrong there."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from napari_learned_diffusion import denoise
from napari_learned_diffusion.config import DiffusionConfig, FineTuneConfig
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
    UnknownModelError,
)
from napari_learned_diffusion.core.noise import Correlated, Gaussian, PoissonGaussian
from napari_learned_diffusion.core.user_models import list_user_models, save_user_model
from napari_learned_diffusion.core.zoo import card
from napari_learned_diffusion.jobs import finetune
from napari_learned_diffusion.jobs.finetune import FineTuned, FineTuneProgress, fine_tune
from napari_learned_diffusion.jobs.prepare import prepare
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.regions import Region, hold_out

START = "my/start"
NOISE = Gaussian(10.0)
SHORT = FineTuneConfig(steps=12, patch=24, batch=2, every=4, learning_rate=5e-2)


@pytest.fixture(autouse=True)
def start(user_models_folder) -> str:
    """A small model that diffuses far too little: easily bettered."""
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
    return save_user_model("start", model, facts).key


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([np.kron(rng.uniform(40, 200, (8, 8)), np.ones((8, 8))) for _ in range(3)])


@pytest.fixture(scope="module")
def noisy(clean) -> np.ndarray:
    return NOISE.add(clean, np.random.default_rng(1)).astype(np.float32)


def square(index: tuple[int, ...] = (0,), top: int = 4, left: int = 4, size: int = 56) -> Region:
    return Region(index, top, left, np.ones((size, size), np.bool_))


def tune(
    stack: Any,
    regions: list[Region],
    config: FineTuneConfig = SHORT,
    diffusion: DiffusionConfig | None = None,
    **options: Any,
) -> FineTuned:
    diffusion = diffusion or DiffusionConfig(START, noise=NOISE, device="cpu")
    return run(fine_tune(stack, regions, config, diffusion, **options))


def config(**changes: Any) -> FineTuneConfig:
    return FineTuneConfig(**(vars(SHORT) | changes))


def error(stack: np.ndarray, clean: np.ndarray, model: str, index: int = 1) -> float:
    result = denoise(stack[index], model, NOISE, device="cpu")
    return float(np.mean((result - clean[index]) ** 2))


# --- the modes ------------------------------------------------------------------------------------


def test_paired_with_a_reference_of_another_scale(clean, noisy):
    seen: list[FineTuneProgress] = []
    job = fine_tune(
        noisy,
        [square(), square((2,))],
        SHORT,
        DiffusionConfig(START, noise=NOISE, device="cpu"),
        reference=3 * clean - 100,
        name="cells",
    )
    tuned = run(job, seen.append)
    assert tuned.improved
    assert tuned.gain > 0.5
    assert f"{tuned.gain:.2f} dB better than my/start" in tuned.summary()
    assert [p.done for p in seen if "best" in p.message] == list(range(1, 13))
    assert [step for step, _ in tuned.curve.held_out] == [0, 4, 8, 12]
    assert len(tuned.curve.training) == tuned.steps == 12
    assert seen[-1].curve == tuned.curve
    before = error(noisy, clean, START)
    saved = tuned.save("tuned")
    after = error(noisy, clean, saved.key)
    assert after < 0.8 * before
    facts = card(saved.key).details
    assert facts["base"] == "foe-splines"
    assert facts["start"] == START
    assert facts["layer"] == "cells"
    assert facts["gain_dB"] == pytest.approx(tuned.gain, abs=1e-3)
    assert facts["regions"]["slices"] == 2
    assert facts["regions"]["pixels"] == 2 * 56**2
    assert facts["regions"]["boxes"][1] == [[2], 4, 4, 59, 59]
    assert facts["settings"]["seed"] == 0
    assert facts["noise"] == NOISE.to_dict()
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("mode", "noise"),
    [("noisy", NOISE), ("noisy", Correlated(10.0, 0.6)), ("clean", NOISE), ("repeats", NOISE)],
)
def test_without_a_clean_reference(clean, mode, noise):
    rng = np.random.default_rng(2)
    stack = noise.add(clean, rng)
    if mode == "clean":
        stack[0] = clean[0]
    tuned = tune(
        stack,
        [square()],
        config(mode=mode, steps=24),
        DiffusionConfig(START, noise=noise, device="cpu"),
        reference=noise.add(clean, rng) if mode == "repeats" else None,
    )
    assert tuned.improved
    saved = tuned.save("tuned")
    assert error(stack, clean, saved.key) < error(stack, clean, START)


def test_neighbouring_slices(clean):
    rng = np.random.default_rng(3)
    same = np.repeat(clean[:1], 4, axis=0)
    stack = NOISE.add(same, rng)
    tuned = tune(stack, [square((1,)), square((2,))], config(mode="neighbours", steps=24))
    assert tuned.improved
    saved = tuned.save("tuned")
    assert error(stack, same, saved.key) < error(stack, same, START)
    with pytest.raises(InvalidSettingError, match="neighbours"):
        tune(stack[0], [square(())], config(mode="neighbours"))


def test_clean_regions_take_the_noise_of_the_rest(clean):
    stack = PoissonGaussian(2.0, 4.0).add(clean, np.random.default_rng(4))
    stack[0] = clean[0]
    automatic = DiffusionConfig(START, noise_kind="gaussian", device="cpu")
    tuned = tune(stack, [square()], config(mode="clean"), automatic)
    expected = np.sqrt(np.mean(PoissonGaussian(2.0, 4.0).variance(clean)))
    assert tuned.facts["noise"]["noise_sigma"] == pytest.approx(expected, rel=0.2)
    half = NOISE.add(clean[:1], np.random.default_rng(4))
    half[0, :28] = clean[0, :28]
    top = Region((0,), 0, 0, np.ones((28, 64), np.bool_))
    tuned = tune(half, [top], config(mode="clean"), automatic)
    assert tuned.facts["noise"]["noise_sigma"] == pytest.approx(10, rel=0.25)


def textured(rng: np.random.Generator) -> np.ndarray:
    """Slices with flat parts in the dark only: the image alone doesn't show what its noise is."""
    texture = gaussian_filter(rng.normal(size=(4, 192, 192)), (0, 1.5, 1.5), mode="wrap")
    texture[:, :48] = 0
    return 200 * (np.arange(192) >= 48)[:, None] + 40 * texture / texture.std()


def test_clean_regions_tell_correlated_noise_from_texture():
    rng = np.random.default_rng(7)
    clean = textured(rng)
    stack = Correlated(10.0, 1.0).add(clean, rng)
    stack[0] = clean[0]
    region = [square(size=180)]
    automatic = DiffusionConfig(START, device="cpu")
    assert not isinstance(prepare(stack[1:], automatic).noise, Correlated)
    tuned = tune(stack, region, config(mode="clean"), automatic)
    assert tuned.facts["noise"]["noise_sigma"] == pytest.approx(10, rel=0.1)
    assert tuned.facts["noise_measured"]
    assert any("correlated" in message for message in tuned.messages)
    # Whoever denoises by this model is not told that again.
    saved = tuned.save("tuned")
    found = prepare(stack[1:], DiffusionConfig(saved.key, device="cpu"))
    assert isinstance(found.noise, Correlated)
    assert found.noise.noise_sigma == pytest.approx(10, rel=0.1)
    assert "has learned from such noise" in found.estimate.message
    white = prepare(stack[1:], DiffusionConfig(saved.key, noise_kind="gaussian", device="cpu"))
    assert white.noise.key == "gaussian"
    # Texture that the regions show as well is no noise.
    stack = Gaussian(10.0).add(clean, rng)
    stack[0] = clean[0]
    tuned = tune(stack, region, config(mode="clean", steps=1), automatic)
    assert tuned.facts["noise"]["key"] != "correlated"


def test_added_noise_is_measured_where_it_is_correlated(clean):
    smooth = np.full((2, 256, 256), 100.0) + 20 * np.sin(np.arange(256) / 40)
    stack = Correlated(8.0, 1.0).add(smooth, np.random.default_rng(5))
    diffusion = DiffusionConfig(START, noise=Correlated(8.0, 1.0), device="cpu")
    tuned = tune(stack, [square()], config(mode="noisy", steps=1), diffusion)
    assert tuned.facts["noise_measured"]
    by_model = config(mode="noisy", steps=1, added_noise="model")
    assert not tune(stack, [square()], by_model, diffusion).facts["noise_measured"]
    few = Correlated(8.0, 1.0).add(clean[:1], np.random.default_rng(5))
    asked = config(mode="noisy", steps=1, added_noise="measured")
    tuned = tune(few, [square()], asked, diffusion)
    assert not tuned.facts["noise_measured"]
    assert "too few flat areas" in tuned.messages[0]


def test_the_axes_of_the_slices_can_be_others(clean, noisy):
    turned, reference = np.moveaxis(noisy, 0, 2), np.moveaxis(clean, 0, 2)
    tuned = tune(turned, [square()], reference=reference, plane_axes=(0, 1))
    straight = tune(noisy, [square()], reference=clean)
    assert tuned.curve == straight.curve


def test_small_regions_are_enough(clean, noisy):
    small = [square((i,), 20, 30, 14) for i in range(3)]
    tuned = tune(noisy, small, reference=clean)
    assert tuned.improved


# --- promises -------------------------------------------------------------------------------------


def test_the_same_regions_and_seed_give_the_same_model(clean, noisy):
    first, second = (tune(noisy, [square()], reference=clean) for _ in range(2))
    other = tune(noisy, [square()], config(seed=1), reference=clean)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert first.curve == second.curve != other.curve


def test_pixels_that_are_held_out_change_nothing_in_the_training(clean, noisy):
    mask = np.zeros((64, 64), np.bool_)
    mask[4:60, 4:60] = True
    held = next(
        h
        for end in (False, True)
        if (h := hold_out(mask, SHORT.held_out, at_the_end=end))[4:60].any()
        and end == bool(np.random.default_rng(SHORT.seed).integers(2))
    )
    changed = clean.copy()
    changed[0][held] = changed[0][held][::-1]
    one = config(steps=4)
    # The scale of the reference is fitted to all of the regions, so it is kept out of this.
    first = tune(noisy, [square()], one, reference=clean)
    second = tune(noisy, [square()], one, reference=changed)
    ratios = np.array(first.curve.training) / np.array(second.curve.training)
    assert first.curve.held_out[0] != second.curve.held_out[0] or ratios.std() > 0
    np.testing.assert_allclose(ratios, ratios[0], rtol=0.1)


def test_where_nothing_is_better_the_starting_model_is_kept(noisy, clean):
    hopeless = config(learning_rate=1e-12)
    tuned = tune(noisy, [square()], hopeless, reference=clean)
    assert not tuned.improved
    assert tuned.gain == 0
    assert "Nothing beat the starting model" in tuned.summary()
    with pytest.raises(InvalidSettingError, match="go on using my/start"):
        tuned.save("tuned")
    assert [m.name for m in list_user_models()] == ["start"]


def test_stopping_keeps_the_best_step(noisy, clean):
    asked = iter([False] * 9 + [True])
    tuned = tune(noisy, [square()], reference=clean, stop=lambda: next(asked))
    assert tuned.steps == 9
    assert tuned.best_step in (4, 8)


def test_cancelling_at_any_moment_leaves_everything_as_it_was(noisy, clean, user_models_folder):
    before = {p.name: p.read_bytes() for p in user_models_folder.iterdir()}
    for moments in (1, 2, 4, 7):
        job = fine_tune(
            noisy, [square()], SHORT, DiffusionConfig(START, noise=NOISE), reference=clean
        )
        for _ in range(moments):
            next(job)
        job.close()
    assert {p.name: p.read_bytes() for p in user_models_folder.iterdir()} == before


def test_the_preview_shows_the_current_model(noisy, clean, monkeypatch):
    monkeypatch.setattr(finetune, "PREVIEW_SECONDS", 0.0)
    seen: list[FineTuneProgress] = []
    diffusion = DiffusionConfig(START, noise=NOISE, device="cpu")
    run(fine_tune(noisy, [square()], SHORT, diffusion, reference=clean, preview=(1,)), seen.append)
    shown = [p.plane for p in seen if p.plane is not None]
    assert len(shown) == 4
    np.testing.assert_allclose(shown[0], denoise(noisy[1], START, NOISE, device="cpu"), rtol=1e-4)
    assert not np.allclose(shown[0], shown[-1], rtol=1e-4)
    assert all(p.index == (1,) for p in seen if p.plane is not None)


def test_guarantees_hold_for_a_fine_tuned_model(noisy, clean):
    saved = tune(noisy, [square()], reference=clean).save("tuned")
    rng = np.random.default_rng(6)
    for plane in (noisy[0], rng.normal(size=(40, 33)) * 1e4, rng.integers(0, 255, (20, 70))):
        plane = plane.astype(np.float64)
        result = denoise(plane, saved.key, noise_sigma=float(plane.std()), device="cpu")
        assert result.mean() == pytest.approx(plane.mean(), rel=1e-5, abs=1e-3 * plane.std())
        assert result.min() >= plane.min()
        assert result.max() <= plane.max()
        assert np.linalg.norm(result) <= np.linalg.norm(plane) * (1 + 1e-6)
    flat = np.full((30, 30), 5.0)
    np.testing.assert_allclose(denoise(flat, saved.key, noise_sigma=1.0, device="cpu"), flat)


# --- what can be wrong ----------------------------------------------------------------------------


def test_no_region(noisy, clean):
    with pytest.raises(InvalidSettingError, match="No region is selected"):
        tune(noisy, [], reference=clean)


def test_regions_that_are_too_small(noisy, clean):
    with pytest.raises(InvalidSettingError, match="too few"):
        tune(noisy, [square(size=9)], reference=clean)


def test_a_constant_region(clean):
    stack = NOISE.add(clean, np.random.default_rng(0))
    stack[0, 4:60, 4:60] = 7
    with pytest.raises(InvalidImageError, match=r"slice 0 are constant"):
        tune(stack, [square()], config(mode="noisy"))
    with pytest.raises(InvalidImageError, match="constant"):
        tune(NOISE.add(clean, np.random.default_rng(0)), [square()], reference=0 * clean)


def test_nan_in_the_regions(noisy, clean):
    stack = noisy.copy()
    stack[0, 10:20, 10:20] = np.nan
    tuned = tune(stack, [square()], reference=clean)
    assert tuned.improved
    assert "100 NaN or infinite pixels" in tuned.messages[0]
    stack[0] = np.nan
    with pytest.raises(InvalidImageError, match="NaN"):
        tune(stack, [square()], reference=clean)


def test_a_reference_that_does_not_fit(noisy, clean):
    with pytest.raises(InvalidImageError, match="shape"):
        tune(noisy, [square()], reference=clean[:2])
    with pytest.raises(InvalidSettingError, match="needs a reference"):
        tune(noisy, [square()])
    with pytest.raises(InvalidSettingError, match="second noisy image"):
        tune(noisy, [square()], config(mode="repeats"))
    with pytest.raises(InvalidImageError, match="resemble"):
        tune(noisy, [square()], reference=-clean)


def test_no_noise_and_no_parameters(noisy, clean):
    with pytest.raises(InvalidImageError, match="No noise"):
        tune(noisy, [square()], None, DiffusionConfig(START, noise=Gaussian(0)), reference=clean)
    with pytest.raises(UnknownModelError, match="no parameters"):
        tune(noisy, [square()], None, DiffusionConfig("perona-malik", noise=NOISE), reference=clean)
    with pytest.raises(LearnedDiffusionError, match="boolean"):
        tune(noisy > 3, [square()], config(mode="noisy"))


def test_too_little_memory(noisy, clean, monkeypatch):
    def exhausted(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        yield

    monkeypatch.setattr(finetune, "adapt", exhausted)
    with pytest.raises(DeviceError, match="smaller patches"):
        tune(noisy, [square()], reference=clean)


def test_noise_is_looked_for_in_slices_without_regions():
    stack = np.stack([np.full((4, 4), i, np.float32) for i in range(6)])
    masks = {(i,): np.ones((4, 4), np.bool_) for i in (0, 2, 3)}
    seen = [int(plane[0, 0]) for plane in finetune._noisy_planes(stack, masks, (1, 2))]
    assert seen == [1, 4, 5]
    everywhere = {(i,): np.eye(4, dtype=np.bool_) for i in range(6)}
    for i, plane in enumerate(finetune._noisy_planes(stack, everywhere, (1, 2))):
        assert np.isnan(plane.diagonal()).all()
        assert plane[0, 1] == i
