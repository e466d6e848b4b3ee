"""Training: patches, reproducibility, checkpoints, and what can be wrong with the data."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import save_file
from skimage.io import imsave

from napari_learned_diffusion.config import TrainingConfig
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity
from napari_learned_diffusion.core.diffusivity.conductance_unet import ConductanceUNet
from napari_learned_diffusion.core.diffusivity.fields_of_experts import RothBlack, Splines
from napari_learned_diffusion.core.errors import (
    FileFormatError,
    FileWriteError,
    InvalidImageError,
    InvalidSettingError,
)
from napari_learned_diffusion.core.learning.patches import TrainingImages, draw_patches, read_images
from napari_learned_diffusion.core.learning.training import TrainStep, fit, validate
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import solve
from napari_learned_diffusion.core.weights import FORMAT, read_model, write_model, write_tensors

SHORT = TrainingConfig(steps=6, batch=2, patch=16, iterations=2, learning_rate=2e-2)


def mosaic(seed: int, size: int = 64) -> np.ndarray:
    """Grey squares: something with edges to learn."""
    rng = np.random.default_rng(seed)
    squares = rng.uniform(30, 220, (size // 8, size // 8))
    return np.kron(squares, np.ones((8, 8))).astype(np.float32)


IMAGES = TrainingImages(tuple(mosaic(i) for i in range(3)), (mosaic(9),), ())


def small(seed: int = 0) -> Splines:
    torch.manual_seed(seed)
    return Splines(experts=4, size=3, iterations=2)


def small_network(seed: int = 0) -> ConductanceUNet:
    torch.manual_seed(seed)
    return ConductanceUNet(width=4, steps=4, reach=4)


def train(
    model: LearnedDiffusivity,
    config: TrainingConfig = SHORT,
    checkpoint: Path | None = None,
    stop: int = 99,
) -> list[TrainStep]:
    done = []
    steps = fit(model, IMAGES, config, checkpoint=checkpoint, every=2)
    for step in steps:
        done.append(step)
        if step.step == stop:
            steps.close()
            break
    return done


# --- patches and steps --------------------------------------------------------------------------


def test_patches_are_in_units_of_their_noise():
    config = TrainingConfig(batch=32, patch=32, noise_range=(5, 75))
    clean, noisy, noise_sigma, _ = draw_patches(IMAGES.training, config, 0)
    assert clean.shape == noisy.shape == (32, 1, 32, 32)
    assert ((noise_sigma >= 5) & (noise_sigma <= 75)).all()
    assert noise_sigma.max() > 3 * noise_sigma.min()
    assert (noisy - clean).std().item() == pytest.approx(1, abs=0.02)
    grey = clean * noise_sigma.view(-1, 1, 1, 1)
    assert grey.min() >= 30 - 1e-3
    assert grey.max() <= 220 + 1e-3


def test_photon_noise_is_as_strong_and_as_skewed_as_its_model_says():
    config = TrainingConfig(batch=1000, patch=32, noise_range=(10, 10), photon=1.0)
    clean, noisy, noise_sigma, gain = draw_patches(IMAGES.training, config, 0)
    assert 10 <= noise_sigma.min() < 12
    assert 36 < noise_sigma.max() <= 40
    assert (noisy - clean).mean().item() == pytest.approx(0, abs=0.01)
    gains = gain.view(-1, 1, 1, 1)
    variances = gains * clean
    errors = (noisy - clean) / variances.sqrt()
    assert errors.std().item() == pytest.approx(1, abs=0.02)
    # Third moments are 1 for photons, and 3/2 where each electron is multiplied.
    skew = ((noisy - clean) ** 3 / (gains * variances)).mean((1, 2, 3))
    counts = noisy / gains
    is_whole = (counts - counts.round()).abs().amax((1, 2, 3)) < 1e-3
    assert 430 < is_whole.sum() < 570
    assert skew[is_whole].mean().item() == pytest.approx(1, abs=0.15)
    assert skew[~is_whole].mean().item() == pytest.approx(1.5, abs=0.15)


def test_photon_noise_is_stabilised_for_the_model_and_the_intensities_are_averaged():
    config = TrainingConfig(
        steps=1,
        batch=8,
        patch=32,
        iterations=2,
        noise_range=(40, 40),
        photon=0.5,
        learning_rate=1e-9,
    )
    patches = draw_patches(IMAGES.training, config, 0)
    assert 0 < (patches.gain > 0).sum() < 8
    model = small()
    step = next(fit(model, IMAGES, config, every=9))
    errors = []
    for clean, noisy, gain in zip(patches.clean, patches.noisy, patches.gain, strict=True):
        noise = PoissonGaussian(gain.item()) if gain else Gaussian(1)
        run = solve(noisy[None], model, noise=noise, scheme=Explicit(config.tau), iterations=2)
        errors.append((run.u - clean).square().mean().item())
    weights = patches.noise_sigma / 25
    assert step.loss == pytest.approx((torch.tensor(errors) * weights).mean().item(), rel=1e-4)


def test_lines_are_bright_on_a_dark_ground():
    squares = np.kron(np.random.default_rng(0).uniform(30, 220, (8, 8)), np.ones((16, 16)))
    config = TrainingConfig(batch=8, patch=64, noise_range=(1, 1), lines=1.0)
    clean, *_ = draw_patches([squares.astype(np.float32)], config, 0)
    assert clean.min() >= 0
    assert clean.max() == pytest.approx(255)
    assert clean.median() < 0.1 * 255


def test_blurred_patches_have_nothing_finer_than_a_pixel_or_some():
    fine = np.random.default_rng(0).uniform(30, 220, (64, 64)).astype(np.float32)
    config = TrainingConfig(batch=16, patch=32, noise_range=(1, 1), blurred=0.5)
    clean, *_ = draw_patches([fine], config, 0)
    contrast = clean.std(dim=(1, 2, 3))
    is_blurred = contrast < 0.8 * fine.std()
    assert 3 < is_blurred.sum() < 13
    assert contrast[~is_blurred].min() > 0.9 * fine.std()
    assert clean.mean().item() == pytest.approx(fine.mean(), rel=0.02)


def test_patches_depend_on_the_seed_and_the_step_alone():
    first = draw_patches(IMAGES.training, SHORT, 3)
    np.random.seed(1)  # noqa: NPY002 - nobody else's random numbers matter
    again = draw_patches(IMAGES.training, SHORT, 3)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.equal(first[1], draw_patches(IMAGES.training, SHORT, 4)[1])


# PyTorch forks, which Python 3.12 warns of where there are threads.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_patches_drawn_by_other_processes_are_the_same():
    alone, helped = small(), small()
    list(fit(alone, IMAGES, SHORT))
    list(fit(helped, IMAGES, SHORT, workers=2))
    for name, parameter in alone.state_dict().items():
        torch.testing.assert_close(helped.state_dict()[name], parameter, rtol=0, atol=0)


def test_patches_are_turned_and_flipped():
    ramp = np.add.outer(np.arange(16) * 1.0, np.arange(16) * 16.0).astype(np.float32)
    config = TrainingConfig(batch=64, patch=16, noise_range=(1, 1))
    clean, *_ = draw_patches([ramp], config, 0)
    assert len({tuple(patch.flatten().tolist()) for patch in clean}) == 8


def test_training_improves_the_model():
    model, config = small(), TrainingConfig(40, 4, 24, 4, learning_rate=2e-2)
    with torch.no_grad():
        model.log_steps -= 3
    before = validate(model, IMAGES.validation, config)
    steps = list(fit(model, IMAGES, config, every=20))
    after = steps[-1].validation
    assert after is not None
    assert all(after[level] > before[level] + 0.5 for level in before)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [s.learning_rate for s in train(small(), TrainingConfig(20, 1, 8, 1))]
    assert max(rates) == pytest.approx(2e-3, rel=0.2)
    assert rates[0] < 0.2 * max(rates)
    assert rates[-1] < 0.01 * max(rates)
    assert rates.index(max(rates)) == pytest.approx(4, abs=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"patch": 0}, "patch"),
        ({"noise_range": (0, 5)}, "noise range"),
        ({"noise_range": (9, 5)}, "noise range"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"optimiser": "sgd"}, "adamw, muon"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(InvalidSettingError, match=message):
        TrainingConfig(**wrong)


# --- checkpoints --------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_as_an_unbroken_one(tmp_path):
    unbroken = small()
    expected = train(unbroken)
    checkpoint = tmp_path / "run.safetensors"
    train(small(), checkpoint=checkpoint, stop=5)  # stopped a step after the last checkpoint
    resumed = small(seed=1)  # what it begins with is overwritten
    found = train(resumed, checkpoint=checkpoint)
    assert [s.step for s in found] == [5, 6]
    assert found == expected[4:]
    for name, parameter in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], parameter, rtol=0, atol=0)


def test_muon_remembers_over_an_interruption_too(tmp_path):
    config = replace(SHORT, optimiser="muon", iterations=4, learning_rate=2e-3)
    unbroken = small_network()
    train(unbroken, config)
    checkpoint = tmp_path / "run.safetensors"
    train(small_network(), config, checkpoint, stop=5)
    resumed = small_network(seed=1)
    train(resumed, config, checkpoint)
    for name, parameter in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], parameter, rtol=0, atol=0)


def test_a_checkpoint_of_the_other_optimiser_is_refused(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    config = replace(SHORT, iterations=4)
    train(small_network(), config, checkpoint, stop=2)
    with pytest.raises(InvalidSettingError, match="optimiser adamw"):
        train(small_network(), replace(config, optimiser="muon"), checkpoint)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    train(small(), checkpoint=checkpoint)
    assert train(small(), checkpoint=checkpoint) == []
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_other_settings_are_refused(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    train(small(), checkpoint=checkpoint, stop=2)
    other = TrainingConfig(steps=7, batch=2, patch=16, iterations=2, learning_rate=2e-2)
    with pytest.raises(InvalidSettingError, match="steps 6"):
        train(small(), other, checkpoint)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    train(small(), checkpoint=checkpoint, stop=2)
    with pytest.raises(FileFormatError, match=r"foe-splines.*foe-roth-black"):
        next(fit(RothBlack(), IMAGES, SHORT, checkpoint=checkpoint))


def test_a_checkpoint_cut_short_is_refused(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    train(small(), checkpoint=checkpoint, stop=2)
    whole = checkpoint.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match="no intact safetensors"):
            train(small(), checkpoint=checkpoint)


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "new.safetensors"
    header = json.dumps({"format": FORMAT + 1, "model": "foe-splines"})
    save_file({"x": torch.zeros(1)}, path, {"header": header})
    with pytest.raises(FileFormatError, match="Update napari-learned-diffusion"):
        train(small(), checkpoint=path)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(tmp_path, save):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    path = tmp_path / "trap.safetensors"
    if save == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"x": Trap()}, path)
    with pytest.raises(FileFormatError, match="pickle"):
        train(small(), checkpoint=path)
    assert not (tmp_path / "it ran").exists()


def test_safetensors_of_others_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FileFormatError, match="not written by this package"):
        read_model(path, Splines)


def test_weights_make_the_same_model_again(tmp_path):
    model, path = small(), tmp_path / "weights.safetensors"
    write_model(path, model)
    again = read_model(path, Splines)
    assert again.architecture == {"experts": 4, "size": 3, "iterations": 2}
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], parameter)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    header = {"model": "foe-splines", "architecture": {"experts": 5, "size": 3, "iterations": 2}}
    write_tensors(path, small().state_dict(), header)
    with pytest.raises(FileFormatError, match="doesn't fit"):
        read_model(path, Splines)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(FileWriteError, match="couldn't be written"):
        write_model(tmp_path / "no folder" / "weights.safetensors", small())
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileWriteError):
        write_model(tmp_path / "folder", small())
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# --- images -------------------------------------------------------------------------------------


def test_images_are_grey_on_the_scale_of_bytes(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    imsave(tmp_path / "a.png", rgb)
    imsave(tmp_path / "b.png", np.dstack([rgb, rgb[..., :1]]))
    tifffile.imwrite(tmp_path / "c.tif", rgb[..., 0].astype(np.uint16) * 257)
    (tmp_path / "notes.txt").write_text("not an image")
    found = read_images([tmp_path], patch=16)
    luma = np.rint(rgb @ np.array([0.299, 0.587, 0.114]))
    first, second, third = (*found.validation, *found.training)
    np.testing.assert_allclose(first, luma)
    np.testing.assert_allclose(second, luma)
    np.testing.assert_allclose(third, rgb[..., 0], rtol=1e-6)
    assert found.skipped == ()


def test_the_held_out_images_are_not_trained_on(tmp_path):
    for i in range(22):
        imsave(tmp_path / f"{i:02}.png", np.full((16, 16), i, np.uint8), check_contrast=False)
    found = read_images([tmp_path], patch=16)
    assert [image[0, 0] for image in found.validation] == [0, 20]
    assert {image[0, 0] for image in found.training} == set(range(22)) - {0, 20}


def test_unusable_files_are_skipped_and_named(tmp_path):
    imsave(tmp_path / "good.png", mosaic(0).astype(np.uint8))
    imsave(tmp_path / "small.png", mosaic(0, 16).astype(np.uint8))
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "empty.jpg").touch()
    tifffile.imwrite(tmp_path / "floats.tif", mosaic(0))
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((5, 64, 64), np.uint8))
    found = read_images([tmp_path], patch=32)
    assert len(found.training) == 1
    reasons = dict(line.split(": ", 1) for line in found.skipped)
    assert set(reasons) == {"small.png", "broken.png", "empty.jpg", "floats.tif", "stack.tif"}
    assert "patch of 32" in reasons["small.png"]
    assert "can't be read" in reasons["broken.png"]
    assert "float32" in reasons["floats.tif"]


@pytest.mark.parametrize("content", ["nothing", "text", "small"])
def test_a_folder_without_images_is_refused(tmp_path, content):
    if content == "text":
        (tmp_path / "readme.txt").write_text("here were images once")
    if content == "small":
        imsave(tmp_path / "small.png", mosaic(0, 16).astype(np.uint8))
    with pytest.raises(InvalidImageError, match="no image to train on") as raised:
        read_images([tmp_path], patch=32)
    assert ("small.png" in str(raised.value)) == (content == "small")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidImageError, match="no folder"):
        read_images([tmp_path / "nowhere"], patch=32)
