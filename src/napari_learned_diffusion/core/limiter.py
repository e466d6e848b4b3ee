r"""The CFL limiter: whatever a diffusivity asks for, a step only averages what is there."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_learned_diffusion.core.operators import Stencil, edge_sums, max_of_ends


def limit(conductances: Tensor, tau: float | Tensor, stencil: Stencil) -> Tensor:
    r"""Scale conductances down where an explicit step of ``tau`` would overshoot.

    With :math:`S_i = \tau \sum_j g_{ij} / h_{ij}^2`, the weight that a pixel's neighbours get in a
    step,

    .. math:: g_{ij} \leftarrow g_{ij} / \max(1, S_i, S_j).

    Afterwards every :math:`S_i \le 1`, so that the step replaces each pixel by a convex average of
    itself and its neighbours; and since an edge keeps one conductance for both of its ends, the
    averaging matrix is symmetric, hence doubly stochastic. The mean, the max-min principle, the
    decay of the L² norm and constants follow. Differentiable almost everywhere.

    Parameters
    ----------
    conductances
        ``(b, edges, h, w)``, at least 0.
    tau
        Time step, in squared pixels.
    """
    lengths = conductances.new_tensor(stencil.lengths).view(1, -1, 1, 1)
    weight_of_neighbours = tau * edge_sums(conductances / lengths**2, stencil)
    return conductances / torch.clamp(max_of_ends(weight_of_neighbours, stencil), min=1)
