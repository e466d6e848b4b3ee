r"""The CFL limiter: whatever a diffusivity asks for, a step only averages what is there."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_learned_diffusion.core.operators import Stencil, edge_sums, max_of_ends

LARGEST = 1e30
"""Largest conductance: sums of edges, times the longest time step, are finite in single precision.
"""


def is_sound(conductances: Tensor) -> Tensor:
    """Whether each conductance is a number from 0 to `LARGEST`; NaN and infinity aren't."""
    return (conductances >= 0) & (conductances <= LARGEST)


def count_unsound(conductances: Tensor) -> Tensor:
    """Number of conductances that the limiter takes for 0, a tensor of one number.

    On the CPU one pass over the memory is enough where there are none; elsewhere nothing waits for
    the device.
    """
    if conductances.device.type == "cpu":
        lowest, highest = torch.aminmax(conductances.detach())  # NaN if there is any
        if bool((lowest >= 0) & (highest <= LARGEST)):
            return torch.zeros((), dtype=torch.int64)
    return torch.count_nonzero(~is_sound(conductances.detach()))


def limit(conductances: Tensor, tau: float | Tensor, stencil: Stencil) -> Tensor:
    r"""Scale conductances down where an explicit step of ``tau`` would overshoot.

    With :math:`S_i = \tau \sum_j g_{ij} / h_{ij}^2`, the weight that a pixel's neighbours get in a
    step,

    .. math:: g_{ij} \leftarrow g_{ij} / \max(1, S_i, S_j).

    Afterwards every :math:`S_i \le 1`, so that the step replaces each pixel by a convex average of
    itself and its neighbours; and since an edge keeps one conductance for both of its ends, the
    averaging matrix is symmetric, hence doubly stochastic. The mean, the max-min principle, the
    decay of the L² norm and constants follow. Differentiable almost everywhere.

    What is no conductance (NaN, infinity, below 0, above `LARGEST`) becomes 0, so that the step is
    an average of numbers whatever the model gives.

    Parameters
    ----------
    conductances
        ``(b, edges, h, w)``, at least 0.
    tau
        Time step, in squared pixels, at most `core.schemes.LONGEST_STEP`.
    """
    conductances = torch.where(is_sound(conductances), conductances, 0)
    lengths = conductances.new_tensor(stencil.lengths).view(1, -1, 1, 1)
    weight_of_neighbours = tau * edge_sums(conductances / lengths**2, stencil)
    return conductances / torch.clamp(max_of_ends(weight_of_neighbours, stencil), min=1)
