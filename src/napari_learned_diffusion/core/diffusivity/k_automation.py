"""Perona and Malik's diffusivity, with its contrast parameter chosen by a network."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from napari_learned_diffusion.config import DiffusionConfig, Function
from napari_learned_diffusion.core.diffusivity.base import LearnedDiffusivity, Suggestion
from napari_learned_diffusion.core.diffusivity.layers import contrast_convolution
from napari_learned_diffusion.core.diffusivity.perona_malik import FUNCTIONS, PeronaMalik
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.operators import Stencil, gradient
from napari_learned_diffusion.core.presmoothing import kernel_radius, presmooth, presmooth_each

LEAST = 0.1
"""Lowest contrast parameter (in standard deviations of the noise per pixel) and stopping time (in
squared pixels) that the network can choose."""

LARGEST_SIZE = 384
"""The network looks at the central part of a plane, at most so many pixels wide."""

PRESMOOTHING = 0.35, 0.85
"""Least and most presmoothing that the network can choose, in pixels."""

TAU = 0.1

SMOOTH = 0.55
"""Planes are smooth whose classical contrast parameter is below this, in standard deviations of the
noise per pixel. On others, where the noise is weak or everything is texture, the network does worse
than the law (on held-out training images)."""


class KAutomation(LearnedDiffusivity):
    r"""A network looks at the noisy plane once and sets the diffusion up (KA of [1]_).

    .. math:: g_{ij} = a\big((\nabla G_\rho v)_{ij}^2\big), \quad a(s) = \frac{1}{1 + s/K^2}, \qquad
              K = K_0 (1 + x^2), \quad T = T_0 (1 + y^2), \quad
              \rho = \rho_0 + (\rho_1 - \rho_0)\,\sigma(z), \quad (x, y, z) = \mathrm{net}(v)

    These are numbers for the whole plane, so they are settings like any other: automatic ones that
    are shown and can be overruled, the same in every tile. In the paper K is found anew in every
    step, the stopping time is fixed and beyond the stable one, there is no presmoothing, and
    :math:`K_0 = 1`; in stabilised units most planes need a smaller K.

    In textures the least squared error comes with a high K and a short time, which leave noise
    behind. So the suggestion is the network's where the plane is smooth and the network's K is no
    higher than by the law of `PeronaMalik.suggest`, else that law's. The network of a fine-tuned
    model always has its way.

    The network is the paper's: two convolutions of 32 and 64 channels, four blocks of two separable
    convolutions (16, 32, 64, 128) with a shortcut and pooling, one separable convolution of 1024,
    global average pooling and a dense layer; without batch normalisation.

    References
    ----------
    .. [1] J. Valdivia Ortega, M. Haas, A. Effland, "Learning diffusion functions for image
       restoration", HAL hal-04573661 (2024).
    """

    key = "k-automation"
    title = "Perona–Malik, K chosen by a network"
    summary = "The classical diffusion; a neural network looks at the image and sets it up."
    reference = (
        "J. Valdivia Ortega, M. Haas, A. Effland, Learning diffusion functions for image "
        "restoration, HAL hal-04573661 (2024)"
    )
    last_layers = ("dense",)

    settings = ("contrast", "function", "presmooth_sigma")

    def __init__(self) -> None:
        super().__init__()
        self.network = _Network()
        self.contrast: float | Tensor = 1.0
        self.rate: float | Tensor = 1.0
        self.function: Function = "rational"
        self.presmooth_sigma: float | Tensor = PRESMOOTHING[0]

    def choose(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K, stopping time and presmoothing of each plane: ``(b, 1, h, w)`` to ``(b, 1, 1, 1)``."""
        x, y, z = self.network(v).view(-1, 3, 1, 1, 1).unbind(dim=1)
        low, high = PRESMOOTHING
        presmooth_sigma = low + (high - low) * torch.sigmoid(z)
        return LEAST * (1 + x.square()), LEAST * (1 + y.square()), presmooth_sigma

    def adapted(self, v: Tensor, stopping_time: float) -> Self:
        chosen = copy(self)
        chosen.contrast, wanted, chosen.presmooth_sigma = self.choose(v)
        # A longer or shorter time in as many steps is a higher or lower conductance.
        chosen.rate = wanted / stopping_time
        return chosen

    def conductances(self, v: Tensor, stencil: Stencil, valid: Tensor | None, step: int) -> Tensor:
        if isinstance(self.presmooth_sigma, Tensor):
            seen = presmooth_each(v, self.presmooth_sigma, kernel_radius(PRESMOOTHING[1]))
        else:
            seen = presmooth(v, self.presmooth_sigma, stencil.spacing, valid)
        contrast = gradient(seen, stencil) / self.contrast
        return self.rate * FUNCTIONS[self.function](contrast.square())

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        if config.contrast is None or config.presmooth_sigma is None:
            raise InvalidSettingError("k-automation needs a contrast parameter K and presmoothing.")
        model = super().from_config(config)
        model.contrast = config.contrast
        model.function = config.function
        model.presmooth_sigma = config.presmooth_sigma
        return model

    @classmethod
    def suggest(cls, v: NDArray[np.floating[Any]], model: str = "") -> Suggestion:
        """What the network chooses, the geometric mean over the planes, or the classical choice."""
        from napari_learned_diffusion.core.user_models import is_user_key
        from napari_learned_diffusion.core.zoo import trained_model  # which knows this class

        trained = trained_model(cls, model).eval()
        return trained.settings_for(v, always=is_user_key(model))

    def settings_for(self, v: NDArray[np.floating[Any]], *, always: bool) -> Suggestion:
        """As `suggest`, by the parameters of this model.

        Parameters
        ----------
        v
            Planes ``(n, h, w)``, stabilised.
        always
            Whether the network is heard on any plane, as a fine-tuned one is.
        """
        device = next(self.parameters()).device
        planes = [torch.from_numpy(_central(plane)).to(device) for plane in v]
        with torch.no_grad():
            chosen = [torch.cat(self.choose(plane[None, None])).log() for plane in planes]
        contrast, stopping_time, presmooth_sigma = (
            torch.stack(chosen).mean(dim=0).exp().flatten().tolist()
        )
        learned = Suggestion(stopping_time, TAU, contrast, presmooth_sigma)
        if always:
            return learned
        classical = PeronaMalik.suggest(v)
        assert classical.contrast is not None
        assert classical.presmooth_sigma is not None
        if contrast <= classical.contrast < SMOOTH:
            sigma = max(presmooth_sigma, classical.presmooth_sigma)
            return replace(learned, presmooth_sigma=sigma)
        return classical

    @property
    def reach(self) -> int:
        widest = self.presmooth_sigma
        return kernel_radius(PRESMOOTHING[1] if isinstance(widest, Tensor) else widest)

    @property
    def working_maps(self) -> int:
        return 16


class _Network(nn.Module):
    """From a stabilised plane to three numbers, whatever its brightness and its size."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(32, 1, 3, 3))
        self.bias = nn.Parameter(torch.zeros(32, 1, 1))
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        widths = (64, 16, 32, 64, 128)
        self.blocks = nn.Sequential(*(_Block(i, o) for i, o in pairwise(widths)))
        self.last = _separable(128, 1024)
        self.dense = nn.Linear(1024, 3)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.kernels, nonlinearity="relu")
        # To begin with K = 0.7, a stopping time of 1.7 and presmoothing by 0.6, for every plane.
        nn.init.zeros_(self.dense.weight)
        with torch.no_grad():
            self.dense.bias.copy_(torch.tensor([2.5, 4.0, 0.0]))

    def forward(self, v: Tensor) -> Tensor:
        # Logarithms, since contrasts reach from that of the noise, 1, to a hundred times as much.
        x = relu(torch.asinh(contrast_convolution(v, self.kernels, None)) + self.bias)
        x = relu(self.last(self.blocks(relu(self.second(x)))))
        answer: Tensor = self.dense(torch.log1p(x.mean(dim=(2, 3))))
        return answer


class _Block(nn.Module):
    """Two separable convolutions and pooling by 2, with a shortcut."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), _separable(i, o), nn.ReLU(), _separable(o, o))
        self.shortcut = nn.Conv2d(i, o, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool2d(self.layers(x), 3, stride=2, padding=1)
        shortcut: Tensor = self.shortcut(x)
        return pooled + shortcut


def _separable(i: int, o: int) -> nn.Sequential:
    """A 3×3 convolution of each channel by itself, then one that mixes them."""
    return nn.Sequential(nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False), nn.Conv2d(i, o, 1))


def _central(plane: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The middle of a plane, its invalid pixels filled with the mean of the others."""
    top, left = (max(0, (n - LARGEST_SIZE) // 2) for n in plane.shape)
    part = plane[top : top + LARGEST_SIZE, left : left + LARGEST_SIZE]
    valid = np.isfinite(part)
    mean = part[valid].mean() if valid.any() else 0.0
    return np.where(valid, part, mean).astype(np.float32)
