"""What takes the steps of a training: AdamW for all parameters, or Muon for the kernels.

Muon [1]_ replaces the mean gradient of a convolution, as a matrix with a row for each channel that
comes out, by the nearest matrix with singular values of about 1: all directions are learned alike,
not just those with strong gradients.

References
----------
.. [1] K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024),
   kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from napari_learned_diffusion.config import (
    OptimiserName,
)
from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.trainable import Trainable


class Optimiser:
    """Takes steps down the gradient of a model.

    Parameters
    ----------
    model
        Its parameters that need a gradient are changed.
    name
        ``"adamw"``, or ``"muon"``: that for the model's inner kernels, AdamW for all else.
    """

    def __init__(self, model: Trainable, name: OptimiserName = "adamw") -> None:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        inner = {n for n, p in named.items() if name == "muon" and _is_inner(model, n, p)}
        self._kernels = {n: p for n, p in named.items() if n in inner}
        self._others = {n: p for n, p in named.items() if n not in inner}
        self._adamw = torch.optim.AdamW(self._others.values(), weight_decay=0.0, betas=_BETAS[name])
        self._muon = _Muon(list(self._kernels.values())) if self._kernels else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are changed."""
        return [*self._others.values(), *self._kernels.values()]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, rate: float) -> None:
        """Take a step with that learning rate."""
        for optimiser in (self._adamw, self._muon):
            if optimiser is not None:
                optimiser.param_groups[0]["lr"] = rate
                optimiser.step()

    def remembered(self) -> dict[str, Tensor]:
        """What it knows of the steps before, by the parameters' names."""
        tensors = {
            f"{moment}.{name}": self._adamw.state[parameter][moment]
            for name, parameter in self._others.items()
            for moment in _MOMENTS
        }
        if self._muon is not None:
            tensors |= {
                f"{_MOMENTUM}.{name}": self._muon.state[matrix][_MOMENTUM]
                for name, matrix in zip(self._kernels, self._muon.matrices, strict=True)
            }
        return tensors

    def remember(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on as the one did that remembered this after so many steps."""
        for name, parameter in self._others.items():
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(steps)),
                **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS},
            }
        if self._muon is not None:
            for name, matrix in zip(self._kernels, self._muon.matrices, strict=True):
                momentum = tensors[f"{_MOMENTUM}.{name}"].to(matrix.device)
                self._muon.state[matrix] = {_MOMENTUM: momentum}


_BETAS = {"adamw": (0.9, 0.999), "muon": (0.9, 0.99)}
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter."""
_MOMENTUM = "momentum_buffer"
"""What Muon remembers."""


class _Muon(torch.optim.Muon):
    """PyTorch's, which takes matrices only, for kernels ``(out, in, rows, columns)``."""

    def __init__(self, kernels: Sequence[nn.Parameter]) -> None:
        self.kernels = kernels
        self.matrices = [_as_matrix(kernel) for kernel in kernels]
        # Updates as large as AdamW's, so that one learning rate does for both.
        super().__init__(self.matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.copy_(_as_matrix(kernel))
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad)
        super().step()  # type: ignore[no-untyped-call]
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            kernel.copy_(matrix.view_as(kernel))


def _is_inner(model: Trainable, name: str, parameter: nn.Parameter) -> bool:
    outer = any(part in name for part in model.outer_layers)
    return parameter.ndim == 4 and not outer


def _as_matrix(kernel: Tensor) -> Tensor:
    return kernel.detach().flatten(1).clone()


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Of a step, from 0: it rises over the first fifth of the steps, then falls along a cosine."""
    part = (step + 0.5) / steps
    if part < 0.2:
        return highest * part / 0.2
    return highest * 0.5 * (1 + math.cos(math.pi * (part - 0.2) / 0.8))


def descend(optimiser: Optimiser, loss: Tensor, mean_loss: float, rate: float, step: int) -> None:
    """Take a step down the gradient, clipped to a norm of 1.

    Parameters
    ----------
    loss
        What this process's patches give; its gradient is averaged over the processes.
    mean_loss
        Its mean over the processes, by which all of them stop if it is no number.
    rate
        Learning rate of this step.
    step
        Number of steps done.

    Raises
    ------
    InvalidSettingError
        if the training diverges.
    """
    if not math.isfinite(mean_loss):
        raise _diverged("The loss is", step)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(optimiser.parameters, 1.0)
    # Where the model gives no number nothing diffuses, so that the loss alone wouldn't show it.
    if not math.isfinite(float(norm)):
        raise _diverged("The gradient is", step)
    optimiser.step(rate)


def _diverged(what: str, step: int) -> InvalidSettingError:
    return InvalidSettingError(
        f"{what} no number any more in step {step + 1}: the training diverged. "
        "Take a lower learning rate."
    )
