"""What must hold on a GPU as on the CPU. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from napari_learned_diffusion import denoise, diffusivity
from napari_learned_diffusion.config import (
    DiffusionConfig,
    FineTuneConfig,
    Gaussian,
    TrainingConfig,
)
from napari_learned_diffusion.core.device import available_devices, device_name, memory_budget
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.diffusivity.conductance_unet import (
    ConductanceUNet,
    LargeConductanceUNet,
)
from napari_learned_diffusion.core.learning.patches import TrainingImages
from napari_learned_diffusion.core.learning.training import fit
from napari_learned_diffusion.core.metrics import psnr
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.jobs.finetune import fine_tune
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.regions import Region
from napari_learned_diffusion.jobs.tiling import cut
from napari_learned_diffusion.jobs.train import train

GPUS = [kind for kind in available_devices() if kind != "cpu"]

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="there is no GPU"),
    pytest.mark.parametrize("gpu", GPUS or ["cuda"]),
]


def squares(size: int = 160) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.kron(rng.uniform(30, 220, (size // 8, size // 8)), np.ones((8, 8)))


def noisy(size: int = 160, noise_sigma: float = 20) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, noise_sigma, (size, size))
    return (squares(size) + noise).astype(np.float32)


@pytest.mark.parametrize("key", sorted(REGISTRY))
@pytest.mark.parametrize(("rounded", "tolerance"), [(False, 1e-5), (True, 1e-3)])
def test_results_are_those_of_the_cpu(gpu, key, rounded, tolerance, monkeypatch):
    # By default PyTorch rounds what a convolution multiplies to 10 bits on NVIDIA's GPUs.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", rounded)
    image = noisy()
    image[30:40, 50:70] = np.nan
    for call in (denoise, diffusivity):
        here = call(image, model=key, noise_sigma=20, device="cpu")
        there = call(image, model=key, noise_sigma=20, device=gpu)
        scale = np.nanmax(here) - np.nanmin(here)
        np.testing.assert_allclose(there, here, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("key", sorted(REGISTRY))
def test_told_nothing_results_are_those_of_the_cpu(gpu, key):
    image = noisy()
    here, there = (denoise(image, model=key, device=where) for where in ("cpu", gpu))
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-4 * np.ptp(image))


@pytest.mark.parametrize("key", sorted(REGISTRY))
def test_tiled_equals_untiled(gpu, key):
    image = noisy(272)
    whole, tiled = (
        denoise(image, model=key, noise_sigma=20, device=gpu, **how) for how in ({}, {"tile": 96})
    )
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-4 * np.ptp(image))


@pytest.mark.parametrize("key", [k for k in sorted(REGISTRY) if k.startswith("conductance")])
def test_bfloat16_costs_little(gpu, key):
    image, clean = noisy(), squares()
    exact, quick = (
        psnr(
            denoise(image, model=key, noise_sigma=20, device=gpu, precision=precision),
            clean,
            data_range=255,
        )
        for precision in ("float32", "mixed")
    )
    assert quick > exact - 0.05


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("model_class", [ConductanceUNet, LargeConductanceUNet])
@pytest.mark.parametrize("seed", range(5))
def test_guarantees_hold_for_any_parameters(gpu, model_class, mixed, seed):
    torch.manual_seed(seed)
    model = model_class(width=4, steps=4, reach=4).eval().to(gpu)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    u = 10 * torch.randn(2, 1, 61, 47, device=gpu)
    before, tolerance = u, 1e-3
    states = iterate(
        u, model, noise=Gaussian(10.0), scheme=Explicit(0.25), iterations=4, mixed=mixed
    )
    for state in states:
        assert state.u.device == u.device
        assert state.u.min() >= u.min() - tolerance
        assert state.u.max() <= u.max() + tolerance
        assert abs(state.u.double().mean() - u.double().mean()) < tolerance
        assert state.u.norm() <= before.norm() + tolerance
        before = state.u.clone()


def test_a_stack_is_denoised_slice_by_slice(gpu):
    stack = np.stack([noisy(64), noisy(64)[::-1]])
    whole = denoise(stack, noise_sigma=20, device=gpu)
    for plane, result in zip(stack, whole, strict=True):
        alone = denoise(plane, noise_sigma=20, device=gpu)
        np.testing.assert_allclose(result, alone, rtol=0, atol=1e-4 * np.ptp(stack))


def test_where_memory_is_short_there_are_tiles(gpu, monkeypatch):
    image = noisy(272)
    whole = denoise(image, model="conductance-unet", noise_sigma=20, device=gpu)
    tiles: list[int] = []

    def counted(*given):
        parts = list(cut(*given))
        tiles.append(len(parts))
        return parts

    solver = "napari_learned_diffusion.jobs.plane_solver"
    monkeypatch.setattr(f"{solver}.memory_budget", lambda device: 30_000_000)
    monkeypatch.setattr(f"{solver}.cut", counted)
    tiled = denoise(image, model="conductance-unet", noise_sigma=20, device=gpu)
    assert max(tiles) > 1
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-4 * np.ptp(image))


def test_a_gpu_has_a_name_and_memory(gpu):
    device = torch.device(gpu)
    assert device_name(device)
    assert memory_budget(device) > 100_000_000


def test_training_is_that_of_the_cpu(gpu):
    images = TrainingImages((squares().astype(np.float32),), (squares().astype(np.float32),), ())
    config = TrainingConfig(
        steps=8, batch=4, patch=32, iterations=4, photon=0.5, optimiser="muon", turned=True
    )
    losses = {}
    for where in ("cpu", gpu):
        torch.manual_seed(0)
        model = LargeConductanceUNet(width=8, steps=4, reach=4).to(where)
        losses[where] = [step.loss for step in fit(model, images, config)]
    assert losses[gpu] == pytest.approx(losses["cpu"], rel=0.02)


# PyTorch forks, which Python 3.12 warns of where there are threads.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_training_goes_on_on_the_other_device(gpu, tmp_path):
    from skimage.io import imsave

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        imsave(folder / f"{number}.png", squares()[number:].astype(np.uint8))

    def start(device: str, name: str):
        return train(
            "conductance-unet-s",
            (folder,),
            tmp_path / name,
            TrainingConfig(4, 4, 32, 4, mixed=True, optimiser="muon"),
            data_name="squares",
            architecture={"width": 8, "steps": 4, "reach": 4},
            every=2,
            device=device,
        )

    whole = run(start(gpu, "whole"))
    job = start(gpu, "parts")
    while next(job).done < 2:
        pass
    job.close()
    resumed = run(start("cpu", "parts"))
    for level, decibels in whole.validation.items():
        assert resumed.validation[level] == pytest.approx(decibels, abs=0.05)
    card = json.loads(Path(resumed.card).read_text("utf-8"))
    assert card["details"]["training"]["steps"] == 4


def test_fine_tuning_on_a_gpu_gains(gpu):
    clean = np.stack([squares(), squares()[::-1]])
    noise = Gaussian(20.0)
    stack = noise.add(clean, np.random.default_rng(2)).astype(np.float32)
    region = Region((0,), 16, 16, np.ones((128, 128), np.bool_))
    tuned = run(
        fine_tune(
            stack,
            [region],
            FineTuneConfig("paired", steps=20, patch=64, batch=4, every=10),
            DiffusionConfig("conductance-unet-s", noise=noise, device=gpu),
            reference=clean,
        )
    )
    assert tuned.improved
    assert tuned.gain > 0
    assert all(parameter.device.type == "cpu" for parameter in tuned.model.parameters())
