"""The public calls."""

from __future__ import annotations

import doctest

import dask.array as da
import numpy as np
import pytest

import napari_learned_diffusion as package
from napari_learned_diffusion import (
    FineTuned,
    LearnedDiffusionError,
    PoissonGaussian,
    denoise,
    diffusivity,
    fine_tune,
    list_models,
    orientation,
)
from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.recipe import as_python


def noisy(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    image = rng.normal(100, 10, shape)
    image[..., shape[-1] // 2 :] += 80
    return image


def test_every_public_name_is_there():
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_examples_in_docstrings_run():
    import napari_learned_diffusion.api
    import napari_learned_diffusion.core.solve

    for module in (napari_learned_diffusion.api, napari_learned_diffusion.core.solve):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_the_noise_level_and_the_gaussian_model_are_the_same():
    image = noisy(48, 48)
    np.testing.assert_array_equal(
        denoise(image, noise_sigma=10), denoise(image, noise=package.Gaussian(10.0))
    )


def test_lists_are_images_too():
    image = noisy(16, 16)
    np.testing.assert_array_equal(
        denoise(image.tolist(), noise_sigma=10), denoise(image, noise_sigma=10)
    )


def test_dask_in_dask_out():
    stack = noisy(3, 32, 32)
    result = denoise(da.from_array(stack, chunks=(1, 32, 32)), noise_sigma=10)
    assert isinstance(result, da.Array)
    np.testing.assert_array_equal(result.compute(), denoise(stack, noise_sigma=10))


def test_the_diffusivity_is_low_at_edges_and_high_in_between():
    shown = diffusivity(noisy(48, 48), "perona-malik", noise_sigma=10)
    assert shown.shape == (48, 48)
    assert shown.dtype == np.float32
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert shown[:, 23:25].mean() < 0.6 * shown[:, 5:15].mean()


def test_the_orientation_runs_along_edges():
    image = noisy(48, 48)
    classic = {"model": "perona-malik", "noise_sigma": 10, "iterations": 5}
    degrees, anisotropy = orientation(image, **classic)
    for shown in (degrees, anisotropy):
        assert shown.shape == (48, 48)
        assert shown.dtype == np.float32
    assert np.median(degrees[:, 23:25]) == 90
    assert anisotropy[:, 23:25].mean() > 2 * anisotropy[:, 5:15].mean()
    turned, _ = orientation(image.T, **classic)
    assert np.median(turned[23:25]) == 0


def test_maps_are_of_the_step_that_is_asked_for():
    image = noisy(32, 32)
    classic = {"model": "perona-malik", "noise_sigma": 10}
    for show in (diffusivity, orientation):
        np.testing.assert_array_equal(
            show(image, iterations=5, step=2, **classic), show(image, iterations=2, **classic)
        )
        with pytest.raises(InvalidSettingError, match="only 5 iterations"):
            show(image, iterations=5, step=6, **classic)


def test_no_step_means_no_diffusivity():
    with pytest.raises(InvalidSettingError, match="no orientation"):
        orientation(noisy(16, 16), noise_sigma=0)
    with pytest.raises(InvalidSettingError, match="no diffusivity"):
        diffusivity(noisy(16, 16), noise_sigma=0)


def test_an_unknown_setting_is_named():
    with pytest.raises(InvalidSettingError, match="kappa"):
        denoise(noisy(16, 16), kappa=3)


def test_models_are_listed_with_their_cards():
    assert "perona-malik" in [m.key for m in list_models()]


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(),
        DiffusionConfig(noise=package.Gaussian(10.0), iterations=4),
        DiffusionConfig(noise=PoissonGaussian(1.5, -20.0), contrast=0.4, function="exponential"),
        DiffusionConfig(noise=package.Rician(10.0)),
        DiffusionConfig(noise=package.Correlated(10.0, 0.7)),
        DiffusionConfig(noise_kind="gaussian", scheme="fed", stopping_time=3.0),
    ],
)
def test_settings_copied_as_python_do_the_same(config):
    image = noisy(40, 40)
    spacing = (2.0, 1.0)
    scope = {"image": image}
    exec(as_python(config, spacing=spacing, tiling=TilingConfig(tile=64)), scope)
    settings = {k: v for k, v in config.changed().items() if k != "model"}
    np.testing.assert_array_equal(scope["denoised"], denoise(image, spacing=spacing, **settings))


def test_fine_tune_from_a_mask(user_models_folder):
    rng = np.random.default_rng(0)
    clean = np.kron(rng.uniform(0, 100, (4, 4)), np.ones((8, 8)))
    noisy = clean + rng.normal(0, 10, clean.shape)
    settings = {"noise_sigma": 10, "steps": 2, "patch": 16, "batch": 1, "device": "cpu"}
    tuned = fine_tune(
        noisy, clean > 0, reference=clean, model="foe-splines", save="cells", **settings
    )
    assert isinstance(tuned, FineTuned)
    assert tuned.steps == 2
    saved = [m.key for m in list_models() if m.key.startswith("my/")]
    assert saved == (["my/cells"] if tuned.improved else [])
    with pytest.raises(InvalidSettingError, match="no setting wrong"):
        fine_tune(noisy, clean > 0, wrong=3)
    with pytest.raises(LearnedDiffusionError, match="shape"):
        fine_tune(noisy, clean[0] > 0, reference=clean)
