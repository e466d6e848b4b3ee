"""Fine-tuning a model: what patches may hold, which step is kept, and that it is repeatable."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from napari_learned_diffusion.config import FineTuneConfig
from napari_learned_diffusion.core.diffusivity import REGISTRY, diffusivity_class
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.fields_of_experts import Splines
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.learning.finetuning import (
    FineTuneStep,
    adapt,
    gain,
    tuned_parameters,
)
from napari_learned_diffusion.core.learning.held_out import HeldOut, HeldOutError, windows_of
from napari_learned_diffusion.core.learning.objectives import NoiseSource
from napari_learned_diffusion.core.learning.scenes import Diffusion, Patches, Scene
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian
from napari_learned_diffusion.core.zoo import bundled_model

SHORT = FineTuneConfig(steps=12, patch=24, batch=2, every=4, learning_rate=2e-2)
RUN = Diffusion(iterations=3, tau=0.25)
LEARNED = [k for k in REGISTRY if issubclass(diffusivity_class(k), LearnedDiffusivity)]


def small() -> Splines:
    torch.manual_seed(0)
    return Splines(experts=4, size=3, iterations=3)


def scene(seed: int = 0, size: int = 64, noise=None, **changes) -> Scene:
    """Grey squares with noise; the lower quarter is held out."""
    rng = np.random.default_rng(seed)
    noise = noise or Gaussian(0.1)
    clean = np.kron(rng.uniform(0.2, 1, (size // 8, size // 8)), np.ones((8, 8)))
    held_out = np.zeros(clean.shape, np.bool_)
    held_out[3 * size // 4 :] = True
    parts = {
        "image": noise.add(clean, rng).astype(np.float32),
        "target": clean.astype(np.float32),
        "estimate": clean.astype(np.float32),
        "learn": ~held_out,
        "held_out": held_out,
        "blocked": held_out,
        "source": NoiseSource(noise),
    }
    return Scene(**(parts | changes))


def steps_of(model, scenes, config=SHORT, **options) -> list[FineTuneStep]:
    return list(adapt(model, scenes, config, RUN, **options))


def test_no_patch_holds_a_pixel_that_is_held_out():
    scenes = [scene(0), scene(1)]
    patches = Patches(scenes, 24)
    rng = np.random.default_rng(0)
    drawn = [p for _ in range(60) for p in patches.draw(4, rng)]
    assert {p.number for p in drawn} == {0, 1}
    assert not any(p.of(p.scene.blocked).any() for p in drawn)
    assert all(p.of(p.scene.image).shape == (24, 24) for p in drawn)
    assert len({p.flips[0].step for p in drawn} | {p.flips[1].step for p in drawn}) == 2


def test_patches_hold_much_of_a_region_that_is_smaller_than_they():
    learn = np.zeros((64, 64), np.bool_)
    learn[20:30, 12:24] = True
    patches = Patches([scene(learn=learn)], 32)
    rng = np.random.default_rng(0)
    shares = [p.of(learn).sum() for _ in range(20) for p in patches.draw(4, rng)]
    assert min(shares) >= 60


def test_patches_shrink_where_large_ones_do_not_fit():
    held_out = np.zeros((40, 40), np.bool_)
    held_out[18:22] = True
    tight = scene(size=40, held_out=held_out, blocked=held_out, learn=~held_out)
    assert Patches([tight], 64).size == (16, 16)
    blocked = np.zeros((40, 40), np.bool_)
    blocked[::8, ::8] = True
    with pytest.raises(InvalidSettingError, match="Draw larger"):
        Patches([scene(size=40, blocked=blocked)], 64)


def test_the_windows_cover_what_is_held_out():
    held_out = np.zeros((300, 200), np.bool_)
    held_out[20:290, 30:180] = True
    image = np.zeros((300, 200), np.float32)
    windows = windows_of([held_out], 0, 12)
    assert sum(int(w.weight.sum()) for w in windows) == held_out.sum()
    assert all(w.weight.shape == image[w.where].shape for w in windows)
    many = windows_of([held_out] * 9, 0, 12)
    assert len(many) == 12
    assert {w.number for w in many} == set(range(9))


@pytest.mark.parametrize("mode", ["paired", "clean", "noisy", "repeats"])
def test_the_best_step_is_kept(mode):
    noise = PoissonGaussian(0.01, 0.002)
    scenes = [scene(0, noise=noise), scene(1, noise=Gaussian(0.15))]
    if mode == "repeats":
        rng = np.random.default_rng(9)
        scenes = [
            Scene(**(vars(s) | {"target": s.source.add(s.target, rng).astype(np.float32)}))
            for s in scenes
        ]
    if mode == "clean":
        scenes = [Scene(**(vars(s) | {"image": s.target, "target": None})) for s in scenes]
    model = small()
    with torch.no_grad():
        model.log_steps -= 3  # far too little diffusion: easily bettered
    start = deepcopy(model)
    config = FineTuneConfig(mode=mode, steps=20, patch=24, batch=2, every=5, learning_rate=5e-2)
    done = steps_of(model, scenes, config)
    assert [s.step for s in done] == list(range(21))
    looks = {s.step: s.held_out for s in done if s.held_out is not None}
    assert list(looks) == [0, 5, 10, 15, 20]
    assert done[-1].best_held_out == min(looks.values())
    assert looks[done[-1].best_step] == done[-1].best_held_out
    assert done[-1].best_held_out < looks[0]
    held = HeldOut(scenes, config, RUN)
    assert held.begin(start).value == looks[0]
    assert held.look(model).value == pytest.approx(done[-1].best_held_out, rel=1e-5)


def test_the_same_seed_gives_the_same_model():
    first, second, other = small(), small(), small()
    steps_of(first, [scene()])
    np.random.seed(5)  # noqa: NPY002 - nobody else's random numbers matter
    torch.manual_seed(5)
    steps_of(second, [scene()])
    steps_of(other, [scene()], FineTuneConfig(**(vars(SHORT) | {"seed": 1})))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first.spline_values, other.spline_values)


def test_it_ends_early_where_nothing_gets_better():
    worse = FineTuneConfig(steps=50, patch=24, batch=1, every=1, patience=3, learning_rate=3.0)
    done = steps_of(small(), [scene()], worse)
    assert len(done) < 51
    assert done[-1].step - done[-1].best_step == 3


def test_stopping_keeps_the_best_so_far():
    asked = iter([False] * 6 + [True])
    model = small()
    done = steps_of(model, [scene()], stop=lambda: next(asked))
    assert done[-1].step == 6
    assert done[-1].best_step in (0, 4)


def test_a_training_that_diverges_says_so():
    broken = scene(target=np.full((64, 64), np.inf, np.float32))
    with pytest.raises(InvalidSettingError, match="lower learning rate"):
        steps_of(small(), [broken])


@pytest.mark.parametrize("key", LEARNED)
def test_every_model_can_be_tuned_in_its_last_layers(key):
    model = bundled_model(diffusivity_class(key))
    before = {name: p.clone() for name, p in model.named_parameters()}
    last = FineTuneConfig(steps=1, patch=32, batch=1, parameters="last", learning_rate=1e-3)
    count = len(tuned_parameters(model, last))
    assert 0 < count < len(before)
    steps = adapt(model, [scene()], last, Diffusion(model.most_iterations or 2, 0.25))
    next(steps)
    next(steps)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert all(any(part in name for part in model.last_layers) for name in changed)


def test_invalid_pixels_take_no_part():
    valid = np.ones((64, 64), np.bool_)
    valid[5:9, 5:9] = False
    parts = vars(scene(learn=valid & (np.arange(64) < 48)[:, None], valid=valid))
    moved = parts["image"].copy()
    moved[~valid] += 3
    first, second = small(), small()
    steps_of(first, [Scene(**parts)])
    aim = parts["target"].copy()
    aim[~valid] = 7
    steps_of(second, [Scene(**(parts | {"target": aim}))])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gains_in_decibels():
    assert gain(1.0, 0.1) == pytest.approx(10)
    assert gain(1.0, -0.2) == pytest.approx(10)
    assert gain(-0.1, -0.2) == 0
    assert gain(1.0, 2.0) == pytest.approx(-3.01, abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "magic"},
        {"steps": 0},
        {"patch": 8},
        {"held_out": 0.0},
        {"held_out": 0.6},
        {"learning_rate": -1.0},
        {"seed": -1},
        {"parameters": "some"},
        {"added_noise": "pink"},
        {"patience": 0},
    ],
)
def test_settings_out_of_their_range_are_refused(wrong):
    with pytest.raises(InvalidSettingError):
        FineTuneConfig(**wrong)


def test_what_is_better_is_so_where_the_noise_is_a_little_weaker_or_stronger():
    start = HeldOutError(1.0, 0.5)
    assert HeldOutError(0.98, 0.5).is_below(start)
    assert not HeldOutError(1.02, 0.5).is_below(start)
    for of_noise in (0.2, 0.8):  # smoother, or sharper
        assert not HeldOutError(0.98, of_noise).is_below(start)
        assert HeldOutError(0.96, of_noise).is_below(start)
