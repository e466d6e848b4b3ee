"""What callers give that is none of what is expected: each is right, or one clear sentence."""

import json
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import torch

from napari_learned_diffusion import (
    Correlated,
    DiffusionConfig,
    FineTuneConfig,
    Gaussian,
    LearnedDiffusionError,
    PoissonGaussian,
    Rician,
    denoise,
    diffusivity,
    fine_tune,
)
from napari_learned_diffusion.config import TilingConfig, TrainingConfig
from napari_learned_diffusion.recipe import as_python

IMAGE = np.random.default_rng(0).normal(100, 5, (40, 48)).astype("f4")
QUICK = {"model": "perona-malik", "noise_sigma": 5.0, "iterations": 2, "device": "cpu"}


def unknown_chunks() -> da.Array:
    lazy = da.from_array(IMAGE)
    return lazy[lazy[:, 0] > 100]


@pytest.mark.parametrize(
    ("image", "word"),
    [
        (None, "None"),
        ("noisy.tif", "text"),
        (b"noisy.tif", "text"),
        (Path("noisy.tif"), "array"),
        (5, "0 dimensions"),
        (np.array(5.0), "0 dimensions"),
        (IMAGE[0], "1 dimension"),
        ([[1, 2], [3]], "equally long"),
        ([["a", "b"], ["c", "d"]], "no intensities"),
        ([[None, 1.0], [2.0, 3.0]], "numbers"),
        (np.array([[None, 1.0]], object), "object"),
        ({"a": 1}, "numbers"),
        ((n for n in range(3)), "numbers"),
        (IMAGE + 1j, "complex"),
        (IMAGE > 100, "boolean"),
        (np.zeros((8, 8), "M8[s]"), "datetime64"),
        (np.zeros((8, 8), [("a", "f4")]), "no intensities"),
        (np.zeros((0, 8)), "no pixels"),
        (torch.zeros(8, 8, device="meta"), "meta"),
        (torch.eye(8).to_sparse(), "sparse"),
        (torch.zeros(8, 8, dtype=torch.bool), "boolean"),
        (unknown_chunks(), "compute_chunk_sizes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_image_is_refused_in_words(image, word):
    for function in (denoise, diffusivity):
        with pytest.raises(LearnedDiffusionError, match=word):
            function(image, **QUICK)
    with pytest.raises(LearnedDiffusionError, match=word):
        fine_tune(image, IMAGE > 0, reference=IMAGE, steps=1, noise_sigma=5)


@pytest.mark.parametrize(
    "convert",
    [
        np.ndarray.tolist,
        memoryview,
        torch.from_numpy,
        lambda image: torch.from_numpy(image).requires_grad_(),
        lambda image: np.asfortranarray(image)[::1],
        lambda image: image.astype(">f4"),
    ],
    ids=["list", "memoryview", "torch", "gradient", "columns first", "big-endian"],
)
def test_arrays_of_other_kinds_give_the_same(convert):
    expected = denoise(IMAGE, **QUICK)
    np.testing.assert_allclose(denoise(convert(IMAGE), **QUICK), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["f2", "g"])
def test_rare_floating_point_numbers(dtype):
    denoised = denoise(IMAGE.astype(dtype), **QUICK)
    assert denoised.dtype == dtype
    assert denoised.astype(np.float64).std() < IMAGE.std()


def test_bfloat16_which_numpy_lacks():
    tensor = torch.from_numpy(IMAGE).to(torch.bfloat16)
    np.testing.assert_allclose(denoise(tensor, **QUICK), denoise(tensor.float(), **QUICK))


@pytest.mark.parametrize("kind", ["gaussian", "poisson-gaussian", "rician", "correlated"])
def test_a_noise_model_by_its_name_is_estimated(kind):
    quick = {"model": "perona-malik", "iterations": 2, "device": "cpu"}
    by_name = denoise(IMAGE, noise=kind, **quick)
    np.testing.assert_array_equal(by_name, denoise(IMAGE, noise_kind=kind, **quick))


@pytest.mark.parametrize(
    ("key", "model"), [("gaussian", Gaussian), ("rician", Rician), ("correlated", Correlated)]
)
def test_a_noise_model_by_its_name_with_a_level(key, model):
    by_name = denoise(IMAGE, **QUICK | {"noise": key})
    by_model = denoise(IMAGE, **QUICK | {"noise_sigma": None, "noise": model(5.0)})
    np.testing.assert_array_equal(by_name, by_model)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"noise": "magic", "noise_sigma": None}, "magic"),
        ({"noise": 5, "noise_sigma": None}, "Gaussian"),
        ({"noise": Gaussian, "noise_sigma": None}, "Gaussian"),
        ({"noise": IMAGE, "noise_sigma": None}, "ndarray"),
        ({"noise": "poisson-gaussian"}, "gain"),
        ({"noise": Gaussian(5.0)}, "not both"),
        ({"noise": "gaussian", "noise_kind": "rician", "noise_sigma": None}, "not both"),
        ({"noise_sigma": "8"}, "number"),
        ({"noise_sigma": [8]}, "number"),
        ({"noise_sigma": True}, "number"),
        ({"noise_sigma": np.nan}, "finite"),
        ({"model": None}, "key"),
        ({"model": 3}, "key"),
        ({"model": "../perona-malik"}, "no model"),
        ({"iterations": "3"}, "whole number"),
        ({"iterations": 2.5}, "whole number"),
        ({"iterations": True}, "whole number"),
        ({"device": None}, "device"),
        ({"device": 0}, "device"),
        ({"tile": "64"}, "whole number"),
        ({"tau": "0.2"}, "number"),
        ({"contrast": [1]}, "number"),
        ({"presmooth_sigma": "1"}, "number"),
        ({"scheme": None}, "scheme"),
        ({"precision": 64}, "precision"),
        ({"noise_kind": None}, "noise kind"),
        ({"axes": (0,)}, "two whole numbers"),
        ({"axes": "yx"}, "two whole numbers"),
        ({"axes": None}, "two whole numbers"),
        ({"axes": (0, 7)}, "axes"),
        ({"spacing": None}, "two finite numbers"),
        ({"spacing": (0, 1)}, "two finite numbers"),
        ({"spacing": (1, np.inf)}, "two finite numbers"),
        ({"spacing": "12"}, "two finite numbers"),
        ({"spacing": (1, 2, 3)}, "two finite numbers"),
        ({"unheard": 1}, "unheard"),
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind_are_refused_in_words(settings, word):
    for image in (IMAGE, da.from_array(IMAGE)):
        with pytest.raises(LearnedDiffusionError, match=word):
            denoise(image, **QUICK | settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian("8"),
        lambda: Gaussian(None),
        lambda: PoissonGaussian([1]),
        lambda: PoissonGaussian(1, "0"),
        lambda: Rician(True),
        lambda: Correlated(1, "far"),
        lambda: DiffusionConfig(noise="gaussian"),
        lambda: TilingConfig(64.0),
        lambda: FineTuneConfig(steps="3"),
        lambda: FineTuneConfig(held_out="half"),
        lambda: TrainingConfig(batch=2.5),
        lambda: TrainingConfig(learning_rate="fast"),
    ],
)
def test_parameters_of_a_wrong_kind_are_refused_in_words(make):
    with pytest.raises(LearnedDiffusionError, match="must be"):
        make()


def test_numbers_of_numpy_become_python_s_own():
    config = DiffusionConfig(
        iterations=np.int64(3), tau=np.float32(0.25), noise=Gaussian(np.float64(5))
    )
    assert json.dumps([config.iterations, config.tau, config.noise.to_dict()])
    text = as_python(config)
    assert "np." not in text
    assert "iterations=3," in text


def test_a_device_of_torch_is_one_by_its_name():
    assert DiffusionConfig(device=torch.device("cpu")) == DiffusionConfig(device="cpu")


def test_more_iterations_than_a_model_takes_are_refused_before_the_image_is_read():
    class Spy:
        shape, dtype, ndim = (3, 40, 48), np.dtype("u2"), 3

        def __getitem__(self, key):
            raise AssertionError("The image was read.")

    for model in ("auto", "conductance-unet-s"):
        with pytest.raises(LearnedDiffusionError, match="at most 5 iterations, not 60"):
            denoise(Spy(), model, iterations=60)


def test_a_time_step_that_would_take_too_many_is_named():
    with pytest.raises(LearnedDiffusionError, match="larger tau"):
        denoise(IMAGE, tau=0.1, noise_sigma=5)
