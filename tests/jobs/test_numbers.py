"""What can't be computed is refused or said: no NaN, no copy that passes for a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from napari_learned_diffusion import denoise
from napari_learned_diffusion.config import DiffusionConfig, Gaussian, PoissonGaussian
from napari_learned_diffusion.core.errors import (
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
    ModelFailedError,
)
from napari_learned_diffusion.core.user_models import save_user_model
from napari_learned_diffusion.core.zoo import learned_model
from napari_learned_diffusion.jobs.denoise import denoise_stack
from napari_learned_diffusion.jobs.inspection import inspect_plane
from napari_learned_diffusion.jobs.progress import run

IMAGE = 100 + 8 * np.random.default_rng(0).normal(size=(40, 48))
FACTS = {
    "summary": "s",
    "gain_dB": 1.0,
    "noise_range": [5, 75],
    "suggestion": {"iterations": 4, "tau": 0.25},
    "date": "2026",
    "version": "0",
}


def save(key: str, change: float) -> None:
    """A model of the user's, whose parameters are ``change`` times those of the package."""
    model = learned_model(key)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(change)
    save_user_model("x", model, FACTS, overwrite=True)


@pytest.mark.parametrize("key", ["conductance-unet-s", "foe-roth-black", "unet"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "u2"])
def test_a_model_that_gives_no_number_anywhere_is_an_error_that_names_it(
    key: str, dtype: str, user_models_folder: Path
) -> None:
    save(key, 1e30)
    for job in (denoise_stack, inspect_plane):
        with pytest.raises(ModelFailedError, match="my/x"):
            run(job(IMAGE.astype(dtype), DiffusionConfig("my/x", noise=Gaussian(8.0))))


@pytest.mark.parametrize("change", [10, 1000, 1e4, 1e30])
@pytest.mark.parametrize("key", ["conductance-unet-s", "foe-splines"])
def test_wild_weights_keep_the_guarantees_or_are_refused(
    key: str, change: float, user_models_folder: Path
) -> None:
    save(key, change)
    try:
        done = run(denoise_stack(IMAGE, DiffusionConfig("my/x", noise=Gaussian(8.0))))
    except ModelFailedError:
        return
    assert done.report.range_kept
    assert done.image.mean() == pytest.approx(IMAGE.mean(), abs=1e-4)
    if (done.image == IMAGE).all():
        assert any("Not one pixel changed" in m for m in done.report.messages)


def test_edges_without_a_number_are_told_of(monkeypatch) -> None:
    from napari_learned_diffusion.core.diffusivity.conductance_unet import ConductanceUNet

    healthy = ConductanceUNet.conductances

    def failing(self, v, stencil, valid, step):
        g = healthy(self, v, stencil, valid, step).clone()
        g[..., :10, :] = float("nan")
        return g

    monkeypatch.setattr(ConductanceUNet, "conductances", failing)
    done = run(denoise_stack(IMAGE, DiffusionConfig("conductance-unet-s", noise=Gaussian(8.0))))
    assert np.isfinite(done.image).all()
    assert done.image.mean() == pytest.approx(IMAGE.mean(), abs=1e-4)
    assert any("gave no number for up to" in m for m in done.report.messages)


@pytest.mark.parametrize("model", ["perona-malik", "conductance-unet-s", "foe-splines"])
@pytest.mark.parametrize(
    "image",
    [
        1e308 * np.tanh(IMAGE - 100),
        1e200 * (IMAGE - 100),
        1e160 * (IMAGE - 100),
        1e-200 * (IMAGE - 100),
        1e-310 * (IMAGE - 100),
        np.where(IMAGE > 100, 5e-324, 0.0),
    ],
    ids=["1e308", "1e200", "1e160", "1e-200", "1e-310", "5e-324"],
)
def test_values_whose_squares_have_no_number_are_refused(model: str, image: np.ndarray) -> None:
    for noise in ({}, {"noise_sigma": float(np.abs(image).max() / 10) or 1e-323}):
        with pytest.raises(LearnedDiffusionError):
            denoise(image, model=model, iterations=2, **noise)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e30, 1e36])
def test_every_size_that_single_precision_has_is_computed(scale: float) -> None:
    image = ((IMAGE - 100) * scale).astype(np.float32)
    result = denoise(image, model="perona-malik")
    assert np.isfinite(result).all()
    assert result.min() >= image.min()
    assert result.max() <= image.max()


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_integers_without_a_number_of_their_own_are_refused(dtype: str) -> None:
    image = IMAGE.astype(dtype) + np.dtype(dtype).type(2**53)
    with pytest.raises(InvalidImageError, match=r"2\^53"):
        denoise(image, noise_sigma=8)
    below = IMAGE.astype(dtype) + np.dtype(dtype).type(2**52)
    result = denoise(below, noise_sigma=8)
    assert result.min() >= below.min()
    assert result.max() <= below.max()


@pytest.mark.parametrize("model", ["perona-malik", "conductance-unet-s", "foe-monomials"])
@pytest.mark.parametrize("sigma", [1e-300, 1e-38, 1e-20])
def test_a_noise_level_that_no_number_resolves_is_refused(model: str, sigma: float) -> None:
    for noise in (Gaussian(sigma), PoissonGaussian(max(sigma**1.5, 1e-300))):
        with pytest.raises(InvalidSettingError):
            run(denoise_stack(IMAGE, DiffusionConfig(model, noise=noise, iterations=2)))


def test_a_noise_level_finer_than_single_precision_is_told_of() -> None:
    config = DiffusionConfig("perona-malik", noise=Gaussian(1e-7), iterations=2)
    messages = run(denoise_stack(IMAGE, config)).report.messages
    assert any("single precision" in m for m in messages)
    exact = run(denoise_stack(IMAGE, config.with_(precision="float64"))).report.messages
    assert not any("single precision" in m for m in exact)


@pytest.mark.parametrize(
    "settings", [{"tau": 1e39}, {"tau": 1e300}, {"contrast": 1e-300}, {"contrast": 1e300}]
)
def test_settings_beyond_any_use_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidSettingError, match="must be"):
        DiffusionConfig(**settings)


@pytest.mark.parametrize("model", ["perona-malik", "conductance-unet-s", "k-automation"])
def test_the_longest_step_keeps_the_guarantees(model: str) -> None:
    result = denoise(IMAGE, model=model, noise_sigma=8, tau=1e6, iterations=3)
    assert result.min() >= IMAGE.min()
    assert result.max() <= IMAGE.max()
    assert result.mean() == pytest.approx(IMAGE.mean(), abs=1e-4)
