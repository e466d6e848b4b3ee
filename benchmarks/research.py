"""What each part of `conductance-unet-s` gives: short trainings of its variants, side by side.

Every variant is trained with the same steps, patches and seeds on BSDS500 train and test, and
measured on the images of these that are held out. BSDS500 val, which the other benchmarks report
on, is not looked at. Rows are added to those that ``--json FILE`` has already.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks._common import (
    CROP_SIZE,
    add_data_argument,
    print_provenance,
    print_table,
    progress,
    provenance,
    set_threads,
)
from benchmarks.cost import run_of
from napari_learned_diffusion.config import TrainingConfig
from napari_learned_diffusion.core.diffusivity.conductance_unet import (
    ConductanceUNet,
    LargeConductanceUNet,
)
from napari_learned_diffusion.core.learning.patches import TrainingImages, read_images
from napari_learned_diffusion.core.learning.training import fit, validate
from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate

NETWORKS = "napari_learned_diffusion.core.diffusivity.conductance_unet"
TRAINER = "napari_learned_diffusion.core.learning.training"

TRAINING = TrainingConfig(
    batch=8,
    patch=64,
    noise_range=(4.0, 80.0),
    correlated=0.15,
    learning_rate=4e-3,
)
ARCHITECTURE = {"steps": 4, "reach": 4}
"""Of the variants that don't say otherwise."""

MUON = {"optimiser": "muon", "learning_rate": 3e-3}


@dataclass(frozen=True)
class Variant:
    """What a model and its training do otherwise than the others'.

    Parameters
    ----------
    says
        For the table.
    architecture, training
        Arguments of the model and fields of the training's configuration.
    model_class
        Of the model.
    change
        Done to the new model.
    instead
        Functions by the names of what they take the place of.
    decay
        Of an average of the parameters over the steps, which is measured in place of the last ones.
    """

    says: str
    architecture: dict[str, int] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model_class: type[ConductanceUNet] = ConductanceUNet
    change: Callable[[ConductanceUNet], None] = lambda model: None
    instead: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    decay: float | None = None


def diffuse_much(model: ConductanceUNet) -> None:
    for network in model.networks:
        nn.init.zeros_(network.head.bias)


def plain_contrasts(seen: Tensor, kernels: Tensor) -> Tensor:
    """As the model's own, without the logarithm of strong contrasts."""
    kernels = kernels - kernels.mean((2, 3), keepdim=True)
    return conv2d(pad(seen, (2, 2, 2, 2), mode="replicate"), kernels, stride=2)


def charbonnier(u: Tensor, clean: Tensor, noise_sigma: Tensor) -> Tensor:
    """Mean absolute error in grey levels, rounded off below a tenth of the noise."""
    error = ((u - clean).square() + 0.01).sqrt().mean(dim=(1, 2, 3))
    return (error * noise_sigma**0.5).mean() / 5


class UnitFeatures(nn.Module):
    """Features divided by their root mean square at each place, so that answers are bounded."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()


def bound_answers(model: ConductanceUNet) -> None:
    for network in model.networks:
        network.head = nn.Sequential(UnitFeatures(), network.head)


def share_parameters(model: ConductanceUNet) -> None:
    """One network for all looks, but for what it sees the image with."""
    first = model.networks[0]
    for later in model.networks[1:]:
        for name, part in first.named_children():
            if name != "carried":
                setattr(later, name, part)


def pool(model: ConductanceUNet) -> None:
    """Averages on the way down, bilinear interpolation on the way up: neither is learned."""
    for network in model.networks:
        for name in ("to_middle", "to_coarse"):
            old = getattr(network, name)
            mixed = nn.Conv2d(old.in_channels, old.out_channels, 1)
            setattr(network, name, nn.Sequential(nn.AvgPool2d(2), mixed))
        for name in ("from_middle", "from_coarse"):
            old = getattr(network, name)
            mixed = nn.Conv2d(old.in_channels, old.out_channels, 1)
            between = nn.Upsample(scale_factor=2, mode="bilinear")
            setattr(network, name, nn.Sequential(mixed, between))


VARIANTS = {
    "base": Variant("one look, 4 steps of reach 4, 2, 1, 1, width 32"),
    "turned": Variant(
        "trained in the same way, then looks turned in four ways",
        {"width": 32},
        model_class=LargeConductanceUNet,
    ),
    "looks-2": Variant("two looks", {"looks": 2}),
    "looks-2-bounded": Variant(
        "two looks, features of unit size before the answer", {"looks": 2}, change=bound_answers
    ),
    "bounded": Variant("one look, features of unit size before the answer", change=bound_answers),
    "wide": Variant("width 48", {"width": 48}),
    "depth-1": Variant("one residual block less on the way up", {"depth": 1}),
    "reach-1": Variant("reach 1 only", {"reach": 1}),
    "reach-2": Variant("reaches 2, 1, 1, 1", {"reach": 2}),
    "steps-6": Variant("6 steps of reach 4, 2, 1, 1, 1, 1", {"steps": 6}),
    "much-diffusion": Variant("begins with much diffusion (bias 0, not -2)", change=diffuse_much),
    "no-logarithm": Variant(
        "strong contrasts as they are", instead={f"{NETWORKS}._contrasts": plain_contrasts}
    ),
    "charbonnier": Variant(
        "Charbonnier loss, not squared error", instead={f"{TRAINER}._loss": charbonnier}
    ),
    "rate-2": Variant("learning rate 2e-3, not 4e-3", training={"learning_rate": 2e-3}),
    "rate-8": Variant("learning rate 8e-3, not 4e-3", training={"learning_rate": 8e-3}),
    "muon": Variant("Muon, learning rate 3e-3", training=MUON),
    "muon-blocks-2": Variant("Muon, two residual blocks for each one", {"blocks": 2}, MUON),
    "muon-looks-2": Variant("Muon, two looks", {"looks": 2}, MUON),
    "muon-looks-2-shared": Variant(
        "Muon, two looks by the same network", {"looks": 2}, MUON, change=share_parameters
    ),
    "muon-pooled": Variant("Muon, sampling by averages, not learned", {}, MUON, change=pool),
    "muon-averaged": Variant("Muon, parameters averaged over some 50 steps", {}, MUON, decay=0.98),
    "muon-reach-8": Variant("Muon, 5 steps of reach 8, 4, 2, 1, 1", {"steps": 5, "reach": 8}, MUON),
    "patch-96": Variant("4 patches of 96, not 8 of 64", training={"patch": 96, "batch": 4}),
    "white": Variant("white noise only, none correlated", training={"correlated": 0.0}),
    "photon": Variant("photon noise in 12 % of the patches", training={"photon": 0.12}),
    "lines": Variant("edges for images in 10 % of the patches", training={"lines": 0.1}),
    "narrow-noise": Variant("noise 10 to 55, not 4 to 80", training={"noise_range": (10.0, 55.0)}),
}


def living_looks(model: ConductanceUNet, image: NDArray[np.float32]) -> int:
    """How many of the networks let anything diffuse: training can switch one off altogether."""
    noise_sigma, steps = 25.0, len(model.reaches)
    noisy = image + np.random.default_rng(0).normal(0, noise_sigma, image.shape)
    u = torch.from_numpy(noisy).float()[None, None]
    states = iterate(
        u,
        model,
        noise=Gaussian(noise_sigma),
        scheme=Explicit(TRAINING.tau),
        iterations=model.most_iterations,
    )
    means = [float(state.diffusivity().mean()) for state in states]
    return sum(max(means[at : at + steps]) > 0.01 for at in range(0, len(means), steps))


def row(name: str, images: TrainingImages, steps: int) -> dict[str, Any]:
    """Train a variant and measure it."""
    variant = VARIANTS[name]
    torch.manual_seed(TRAINING.seed)
    made = variant.model_class(**(ARCHITECTURE | variant.architecture))
    model = made.to(memory_format=torch.channels_last)
    variant.change(model)
    config = replace(TRAINING, steps=steps, iterations=model.most_iterations, **variant.training)
    averaged = None
    if variant.decay is not None:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(variant.decay))
    start = time.perf_counter()
    with ExitStack() as stack:
        for what, function in variant.instead.items():
            stack.enter_context(patch(what, function))
        for step in progress(fit(model, images, config, every=steps), steps, name):
            scores = step.validation
            if averaged is not None:
                averaged.update_parameters(model)
    seconds = time.perf_counter() - start
    if averaged is not None:
        model = averaged.module
        scores = validate(model, images.validation, config)
    plane = np.zeros((CROP_SIZE, CROP_SIZE))
    return {
        "variant": name,
        "says": variant.says,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmac": run_of(model, plane, model.most_iterations) / 1e9,
        "living_looks": living_looks(model.eval(), images.validation[0]),
        "looks": len(model.networks),
        "psnr": scores,
        "seconds": seconds,
        "config": asdict(config),
    }


HEADER = ("variant", "GMAC at 256²", "looks alive", "noise 15", "noise 25", "noise 50")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    scores = (f"{dB:.2f}" for dB in row["psnr"].values())
    alive = f"{row['living_looks']} of {row['looks']}"
    return [row["says"], f"{row['gmac']:.2f}", alive, *scores]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    set_threads(1)
    facts = provenance("research", arguments, seed=TRAINING.seed)
    print_provenance(facts)
    folders = [options.data / "bsds500" / part for part in ("train", "test")]
    images = read_images(folders, TRAINING.patch)
    rows = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text("utf-8"))["rows"]
    for name in options.variants:
        rows.append(row(name, images, options.steps))
        if options.json:
            content = {"provenance": facts, "rows": rows}
            options.json.write_text(json.dumps(content, indent=2), "utf-8")
        print(" | ".join(cells(rows[-1])), flush=True)
    print_table(HEADER, map(cells, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
