"""AdamW and Muon on the parameters of a network."""

from __future__ import annotations

import pytest
import torch

from napari_learned_diffusion.core.diffusivity.conductance_unet import ConductanceUNet
from napari_learned_diffusion.core.learning.optimisers import Optimiser


def network() -> ConductanceUNet:
    torch.manual_seed(0)
    return ConductanceUNet(width=4).to(memory_format=torch.channels_last)


def step(model: ConductanceUNet, name: str, rate: float = 1e-2) -> dict[str, torch.Tensor]:
    """What a step changes in each parameter that has a gradient."""
    optimiser = Optimiser(model, name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(1)
    for parameter in model.parameters():
        gradient = torch.randn_like(parameter)
        parameter.grad = gradient if parameter.requires_grad else None
    optimiser.step(rate)
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


def test_muon_moves_kernels_in_all_directions_alike():
    changes = step(network(), "muon")
    kernel = changes["networks.0.coarse.0.first.weight"]
    singular = torch.linalg.svdvals(kernel.flatten(1))
    assert singular.min() > 0.5 * singular.max()
    # As much as a step of AdamW does in the long run: a fifth of the rate.
    assert kernel.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_biases_and_the_kernels_at_either_end_are_left_to_adamw():
    by_muon, by_adamw = step(network(), "muon"), step(network(), "adamw")
    for name in ("networks.0.kernels", "networks.0.head.weight", "networks.0.fine.0.first.bias"):
        torch.testing.assert_close(by_muon[name], by_adamw[name])
    inner = "networks.0.to_middle.weight"
    assert not torch.allclose(by_muon[inner], by_adamw[inner], rtol=0.1)


def test_muon_leaves_a_kernel_that_got_no_gradient_this_time():
    model = network()
    kernel = model.networks[0].coarse[0].first.weight
    before = kernel.detach().clone()
    optimiser = Optimiser(model, "muon")
    for parameter in model.parameters():
        parameter.grad = None if parameter is kernel else torch.ones_like(parameter)
    optimiser.step(1e-2)
    torch.testing.assert_close(kernel.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_without_a_gradient_stay(name):
    model = network()
    model.networks[0].fine.requires_grad_(False)
    changes = step(model, name)
    for parameter, change in changes.items():
        assert change.any() != (".fine." in parameter), parameter
