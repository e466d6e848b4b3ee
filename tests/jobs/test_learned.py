"""What a model has learned, as it is shown beside a slice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_learned_diffusion.config import DiffusionConfig, Gaussian
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.diffusivity.layers import contrast_convolution
from napari_learned_diffusion.core.zoo import load_model
from napari_learned_diffusion.jobs.inspection import Inspection, inspect_plane
from napari_learned_diffusion.jobs.learned import Curve, Experts, Scatter
from napari_learned_diffusion.jobs.lookers import SHOWN_EXPERTS, look_at_experts
from napari_learned_diffusion.jobs.progress import run

SIGMA = 10.0
CURVES = ("perona-malik", "k-automation")
EXPERTS = tuple(key for key in REGISTRY if key.startswith("foe-"))
KINDS = dict.fromkeys(CURVES, Curve) | dict.fromkeys(EXPERTS, Experts)


def plane() -> np.ndarray:
    y, x = np.mgrid[:40, :48]
    bars = 100 + 60 * ((x + y // 2) // 8 % 2)
    return bars + np.random.default_rng(0).normal(0, SIGMA, bars.shape)


def inspected(key: str, image: np.ndarray | None = None, **settings: object) -> Inspection:
    config = DiffusionConfig(model=key, noise=Gaussian(SIGMA), device="cpu", **settings)
    return run(inspect_plane(plane() if image is None else image, config))


@pytest.mark.parametrize("key", REGISTRY)
def test_every_model_has_something_to_show(key):
    learned = inspected(key, iterations=2).learned
    assert type(learned) is KINDS.get(key, Scatter)


@pytest.mark.parametrize("function", ["rational", "exponential"])
def test_the_curve_is_that_of_the_run(function):
    settings = {"contrast": 1.2, "presmooth_sigma": 0.0, "tau": 0.2, "function": function}
    found = inspected("perona-malik", iterations=3, **settings)
    curve = found.learned
    assert isinstance(curve, Curve)
    assert (curve.contrast, curve.function) == (1.2, function)
    assert curve.diffusivity[0] == curve.ellipticity[0] == 1
    expected = 1.2 if function == "rational" else 1.2 / np.sqrt(2)
    assert curve.turning_point == pytest.approx(expected, rel=0.05)
    # Every edge is on it: its conductance tells the gradient that it has.
    down = found.edges[0].around((20, 21))[1, 0]
    gradient = abs(found.denoised[0, 21, 21] - found.denoised[0, 20, 21]) / SIGMA
    assert curve.gradient_of(down) == pytest.approx(gradient, abs=0.05)


def test_gradients_are_counted_in_every_step():
    curve = inspected("perona-malik", iterations=3, contrast=0.5).learned
    edges = 39 * 48 + 40 * 47
    assert curve.counts.shape[0] == 3
    assert 0.5 * edges <= curve.counts[0].sum() <= edges
    means = (curve.counts * curve.bins[1:]).sum(axis=1) / curve.counts.sum(axis=1)
    assert means[0] > means[1] > means[2]
    assert 1 > curve.backward[0] > curve.backward[1] > curve.backward[2] > 0
    centres = (curve.bins[1:] + curve.bins[:-1]) / 2
    beyond = edges - curve.counts[0].sum()
    strong = (curve.counts[0][centres > curve.turning_point].sum() + beyond) / edges
    assert curve.backward[0] == pytest.approx(strong, abs=0.03)


@pytest.mark.parametrize("key", EXPERTS)
def test_experts_that_are_shown_differ(key):
    experts = inspected(key, iterations=1).learned
    n, rows, columns = experts.kernels.shape
    assert n <= SHOWN_EXPERTS
    assert columns == rows + 1
    assert experts.functions.shape == (n, len(experts.answers))
    np.testing.assert_allclose(experts.kernels.mean(axis=(1, 2)), 0, atol=1e-7)
    at_zero = experts.functions[:, len(experts.answers) // 2]
    np.testing.assert_allclose(at_zero, 0, atol=1e-4)
    unit = experts.kernels.reshape(n, -1)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert np.abs(unit @ unit.T - np.eye(n)).max() < 0.9


@pytest.mark.parametrize("pixel", [(0, 0), (12, 20), (39, 47)])
@pytest.mark.parametrize("has_hole", [False, True])
def test_answers_at_a_pixel_are_those_of_the_convolution(pixel, has_hole):
    model = load_model(DiffusionConfig(model="foe-splines"))
    v = plane() / SIGMA
    valid = np.ones_like(v)
    if has_hole:
        valid[13:15, 21] = 0
    tensors = [torch.from_numpy(x).float()[None, None] for x in (v, valid)]
    with torch.no_grad():
        experts = look_at_experts(model, tensors[0])
        kernels = torch.from_numpy(experts.kernels).float()[:, None]
        answers = contrast_convolution(tensors[0], kernels, tensors[1])[0, :, pixel[0], pixel[1]]
    seen = np.where(valid > 0, v, np.nan)
    np.testing.assert_allclose(experts.answers_at(seen, pixel), answers, atol=1e-4)


@pytest.mark.parametrize("key", ["unet", "conductance-unet-s"])
def test_pixels_are_counted_by_gradient_and_diffusivity(key):
    found = inspected(key)
    scatter = found.learned
    steps = found.iterations
    assert scatter.counts.shape[0] == len(scatter.diffusivity_bins) == steps
    assert (scatter.counts.sum(axis=(1, 2)) >= 0.98 * 40 * 48).all()
    assert (scatter.counts.sum(axis=(1, 2)) <= 40 * 48).all()
    if key == "unet":
        # Where the gradient is strong there is little diffusion.
        rows, columns = scatter.counts.shape[1:]
        weak, strong = scatter.counts[0, :, : columns // 4], scatter.counts[0, :, columns // 2 :]
        means = [np.average(np.arange(rows), weights=part.sum(axis=1)) for part in (weak, strong)]
        assert means[0] > means[1]


@pytest.mark.parametrize("key", ["perona-malik", "foe-decreasing", "unet"])
def test_pixels_that_are_no_numbers_are_left_out(key):
    image = plane()
    image[:20] = np.nan
    learned = inspected(key, image, iterations=2).learned
    if isinstance(learned, Experts):
        assert np.isfinite(learned.functions).all()
    else:
        whole = inspected(key, iterations=2).learned
        assert 0 < learned.counts[0].sum() < 0.6 * whole.counts[0].sum()
