"""What a model costs: its parameters and the multiply-accumulates of a run.

Counted by `torch.utils.flop_counter`, which knows convolutions and matrix products; their floating
point operations are two for each multiply-accumulate. Elementwise operations are not counted:
activation functions, the lookup of splines, presmoothing, and the diffusion step itself, about 20
operations a pixel and step in every model. So classical Perona-Malik counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._common import Image
from napari_learned_diffusion.config import DiffusionConfig, Gaussian
from napari_learned_diffusion.core.diffusivity import diffusivity_class
from napari_learned_diffusion.core.diffusivity.base import Diffusivity
from napari_learned_diffusion.core.schemes import Explicit
from napari_learned_diffusion.core.solve import iterate
from napari_learned_diffusion.core.zoo import load_model
from napari_learned_diffusion.jobs.prepare import prepare

PAPER_ITERATIONS = 10
"""What the paper counts."""


@dataclass(frozen=True)
class Cost:
    """Of one model on one plane.

    Parameters
    ----------
    parameters
        Number of learned parameters.
    once
        Multiply-accumulates before the first step, where a network chooses the settings.
    run
        Multiply-accumulates of the steps together.
    iterations
        Number of these steps: what the model suggests for the plane.
    """

    parameters: int
    once: int
    run: int
    iterations: int

    @property
    def per_iteration(self) -> float:
        """Multiply-accumulates of a step; of models that look only now and then, the mean."""
        return self.run / self.iterations if self.iterations else 0.0

    def total(self, iterations: int) -> float:
        """Multiply-accumulates of a run of so many steps."""
        return self.once + iterations * self.per_iteration


def multiply_accumulates(function: Callable[..., Any], *arguments: Any) -> int:
    """Those of the convolutions and matrix products in one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    operations: int = counter.get_total_flops()
    return operations // 2


def cost_of(key: str, noisy: Image, noise_sigma: float) -> Cost:
    """What the model ``key`` costs on a plane, ``(h, w)``, told the noise level."""
    config = DiffusionConfig(model=key, noise=Gaussian(noise_sigma), device="cpu")
    prepared = prepare(noisy.astype("float32"), config).config
    model = load_model(prepared).eval()
    v = noisy.astype("float32") / noise_sigma
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        once=multiply_accumulates(diffusivity_class(key).suggest, v[None]),
        run=run_of(model, v, prepared.iterations or 0),
        iterations=prepared.iterations or 0,
    )


def run_of(model: Diffusivity, v: Image, iterations: int) -> int:
    """Multiply-accumulates of a run on a stabilised plane, ``(h, w)``."""
    u = torch.from_numpy(v.astype("float32"))[None, None]
    noise, scheme = Gaussian(1.0), Explicit(0.25)

    def run() -> None:
        for _ in iterate(
            u, model, noise=noise, scheme=scheme, iterations=iterations, backend="torch"
        ):
            pass

    return multiply_accumulates(run)
