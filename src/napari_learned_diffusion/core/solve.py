r"""Nonlinear diffusion of slices, :math:`\partial_t u = \operatorname{div}(g \nabla u)`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_learned_diffusion.core.diffusivity.base import Diffusivity
from napari_learned_diffusion.core.diffusivity.perona_malik import PeronaMalik
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.limiter import count_unsound, limit
from napari_learned_diffusion.core.operators import (
    Stencil,
    diffusion_tensor,
    divergence,
    gradient,
    mean_conductance,
    open_edges,
    pixel_spacing,
)
from napari_learned_diffusion.core.schemes import Scheme

Backend = Literal["auto", "torch", "fused"]
_Limiter = Callable[[Tensor, float, Stencil], Tensor]
_Step = Callable[[Tensor, Tensor, float, Stencil], Tensor]


def _none() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


class Stabiliser(Protocol):
    """What a diffusion asks of a noise model."""

    def stabilise(self, intensity: Any, /) -> Any:
        """Map intensities to units in which the noise has standard deviation 1."""

    @property
    def is_zero(self) -> bool:
        """Whether there is no noise at all, so that nothing is to be removed."""


@dataclass(frozen=True)
class State:
    """What there is after a step.

    Parameters
    ----------
    step
        Number of steps done, from 1.
    time
        Diffusion time reached, in squared pixels.
    u
        ``(b, 1, h, w)``. A buffer that the next step may write to: clone it to keep it.
    stencil
        The edges of this step.
    conductances
        Computes what they conducted in this step, limited, ``(b, edges, h, w)``; only while this is
        the latest state.
    unsound
        Number of edges for which the model gave no conductance in this step (NaN, infinity, below
        0), a tensor of one number; nothing flowed along them.
    """

    step: int
    time: float
    u: Tensor
    stencil: Stencil
    conductances: Callable[[], Tensor] = field(repr=False)
    unsound: Tensor = field(default_factory=_none, repr=False)

    def diffusivity(self) -> Tensor:
        """The mean conductance around each pixel in this step, ``(b, 1, h, w)``."""
        return mean_conductance(self.conductances(), self.stencil)

    def diffusion_tensor(self) -> Tensor:
        """The tensor of the diffusion around each pixel in this step, ``(b, 3, h, w)``.

        See `core.operators.diffusion_tensor`.
        """
        return diffusion_tensor(self.conductances(), self.stencil)


class Outcome(Enum):
    """How a run ended, and what to do about it."""

    COMPLETED = "All steps were done."
    CANCELLED = "Cancelled: the image is as far as it had got. Run again for all of the steps."


@dataclass(frozen=True)
class Snapshot:
    """A copy of the image after a step and of the diffusivity in it, both ``(b, 1, h, w)``."""

    step: int
    time: float
    u: Tensor
    diffusivity: Tensor


@dataclass(frozen=True)
class Solution:
    """The end of a run.

    Parameters
    ----------
    u
        The denoised image, ``(b, 1, h, w)``.
    diffusivity
        Mean conductance around each pixel in the last step, ``(b, 1, h, w)``; ``None`` where no
        step was done.
    steps, time
        Number of steps done, and the diffusion time that they reached, in squared pixels.
    outcome
        How the run ended.
    history
        A snapshot after every step, where it was asked for.
    """

    u: Tensor
    diffusivity: Tensor | None
    steps: int
    time: float
    outcome: Outcome
    history: tuple[Snapshot, ...] = ()


def solve(
    u: Tensor,
    diffusivity: Diffusivity,
    *,
    noise: Stabiliser,
    scheme: Scheme,
    iterations: int,
    spacing: tuple[float, float] = (1.0, 1.0),
    valid: Tensor | None = None,
    backend: Backend = "auto",
    keep_history: bool = False,
    on_step: Callable[[State], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Solution:
    r"""Diffuse a batch of slices; see `iterate` for the equation and the other parameters.

    Parameters
    ----------
    keep_history
        Whether to keep a copy of the image and the diffusivity after every step.
    on_step
        Called after every step.
    cancelled
        Asked before every step; once it returns ``True``, no further step is done.

    Examples
    --------
    >>> import torch
    >>> from napari_learned_diffusion.core.noise import Gaussian
    >>> from napari_learned_diffusion.core.schemes import Explicit
    >>> noisy = torch.randn(1, 1, 64, 64)
    >>> solution = solve(
    ...     noisy, PeronaMalik(contrast=1), noise=Gaussian(1), scheme=Explicit(0.2), iterations=10
    ... )
    >>> bool(solution.u.std() < noisy.std())
    True
    """
    states = iterate(
        u,
        diffusivity,
        noise=noise,
        scheme=scheme,
        iterations=iterations,
        spacing=spacing,
        valid=valid,
        backend=backend,
    )
    last: State | None = None
    history: list[Snapshot] = []
    outcome = Outcome.COMPLETED
    while True:
        if cancelled is not None and (last is None or last.step < iterations) and cancelled():
            outcome = Outcome.CANCELLED
            break
        state = next(states, None)
        if state is None:
            break
        last = state
        if keep_history:
            history.append(
                Snapshot(state.step, state.time, state.u.clone(), state.diffusivity().clone())
            )
        if on_step is not None:
            on_step(state)
    if last is None:
        return Solution(u.clone(), None, 0, 0.0, outcome)
    shown = last.diffusivity()
    states.close()
    return Solution(last.u, shown, last.step, last.time, outcome, tuple(history))


def iterate(
    u: Tensor,
    diffusivity: Diffusivity,
    *,
    noise: Stabiliser,
    scheme: Scheme,
    iterations: int,
    spacing: tuple[float, float] = (1.0, 1.0),
    valid: Tensor | None = None,
    backend: Backend = "auto",
    gradients: bool = False,
    mixed: bool = False,
) -> Generator[State, None, None]:
    r"""Diffuse a batch of slices step by step, with reflecting boundary.

    .. math:: u \leftarrow u + \tau \operatorname{div}(g \nabla u), \qquad
              g = \text{limit}(\text{diffusivity}(\text{stabilise}(u)))

    Parameters
    ----------
    u
        ``(b, 1, h, w)``, float32 or float64, finite, in any unit. Not written to.
    diffusivity
        The model. It sees stabilised intensities only.
    noise
        Noise model in the unit of ``u``, not zero.
    scheme
        Time steps.
    iterations
        Number of steps, at least 0.
    spacing
        Distance of rows and of columns, ``(hy, hx)``, in any unit: only their ratio matters.
    valid
        ``(b, 1, h, w)`` of 0 and 1: nothing flows into or out of a pixel of 0.
    backend
        ``"torch"``: plain tensor operations, on any device. ``"fused"``: kernels for whole steps
        of ``perona-malik`` in float32 on the CPU. ``"auto"``: these where they can, and on the CPU
        kernels for the limiter and the step of any diffusivity, which are differentiable, too.
    gradients
        Whether torch records the steps, for training.
    mixed
        Whether the diffusivity may compute in bfloat16 where that is faster. The diffusion keeps
        the precision of ``u``, and with it every guarantee.

    Raises
    ------
    InvalidImageError
        if ``u`` or ``valid`` is of another shape or type.
    InvalidSettingError
        if the noise model is zero, ``iterations`` is negative, or the fused backend can't do it.
    """
    _check(u, valid, noise, iterations)
    most = diffusivity.most_iterations
    if most is not None and iterations > most:
        raise InvalidSettingError(
            f"{diffusivity.key} was made for at most {most} iterations, not {iterations}. "
            "Take fewer, or leave the number automatic."
        )
    hy_hx = pixel_spacing(spacing)
    stencil = Stencil(diffusivity.offsets(0), hy_hx)
    fusible = not gradients and _fusible(u, diffusivity, scheme, iterations, stencil)
    if backend == "fused" and not fusible:
        raise InvalidSettingError(
            "The fused backend does one float32 slice on the CPU with perona-malik and a time step "
            "that needs no limiter. Use the backend 'auto'."
        )
    if fusible and backend != "torch" and isinstance(diffusivity, PeronaMalik):
        return _iterate_fused(u, diffusivity, noise, scheme, iterations, stencil, valid)
    return _iterate_torch(
        u, diffusivity.begun(), noise, scheme, iterations, hy_hx, valid, backend, gradients, mixed
    )


def _iterate_torch(
    u: Tensor,
    diffusivity: Diffusivity,
    noise: Stabiliser,
    scheme: Scheme,
    iterations: int,
    spacing: tuple[float, float],
    valid: Tensor | None,
    backend: Backend,
    gradients: bool,
    mixed: bool,
) -> Generator[State, None, None]:
    if valid is not None:
        valid = valid.to(u.dtype)
    limited, advanced = _kernels(u, backend)
    time = 0.0
    unsound = _none()
    for done, step in enumerate(scheme.steps(iterations)):
        # Not around the yield: the mode would leak into the caller's code.
        with torch.set_grad_enabled(gradients):
            if step.refresh:
                stencil = Stencil(diffusivity.offsets(done), spacing)
                with torch.autocast(u.device.type, torch.bfloat16, enabled=mixed):
                    g = diffusivity.conductances(noise.stabilise(u), stencil, valid, done)
                g = g.to(u.dtype)
                unsound = count_unsound(g)
                if valid is not None:
                    # Not a product: 0 times what is no number is none either.
                    g = torch.where(open_edges(valid, stencil) > 0, g, 0)
                g = limited(g, step.limiter_tau, stencil)
            u = advanced(u, g, step.tau, stencil)
        time += step.tau
        yield State(done + 1, time, u, stencil, partial(_given, g), unsound)


def _kernels(u: Tensor, backend: Backend) -> tuple[_Limiter, _Step]:
    """The limiter and the step: on the CPU in one pass each, elsewhere as tensor operations."""
    if u.device.type == "cpu" and backend != "torch":
        # numba takes a second to import: only who runs the kernels pays for it.
        from napari_learned_diffusion.core.fused_step import advanced, limited

        return limited, advanced
    return limit, _advance


def _advance(u: Tensor, g: Tensor, tau: float, stencil: Stencil) -> Tensor:
    return u + tau * divergence(g * gradient(u, stencil), stencil)


def _iterate_fused(
    u: Tensor,
    diffusivity: PeronaMalik,
    noise: Stabiliser,
    scheme: Scheme,
    iterations: int,
    stencil: Stencil,
    valid: Tensor | None,
) -> Generator[State, None, None]:
    from napari_learned_diffusion.core.fused import perona_malik_steps

    time = 0.0
    steps = list(scheme.steps(iterations))
    mask = None if valid is None else valid.to(torch.float32)

    def conductances(seen: NDArray[np.float32]) -> Tensor:
        g = diffusivity.of_smoothed(torch.from_numpy(seen)[None, None], stencil)
        return g if mask is None else g * open_edges(mask, stencil)

    pairs = perona_malik_steps(
        u[0, 0].contiguous().numpy(),
        steps,
        stabilise=noise.stabilise,
        contrast=diffusivity.contrast,
        function=diffusivity.function,
        presmooth_sigma=diffusivity.presmooth_sigma,
        spacing=stencil.spacing,
        valid=None if mask is None else mask[0, 0].contiguous().numpy(),
        threads=torch.get_num_threads(),
    )
    for done, (step, (seen, after)) in enumerate(zip(steps, pairs, strict=True)):
        time += step.tau
        after_step = torch.from_numpy(after)[None, None]
        yield State(done + 1, time, after_step, stencil, partial(conductances, seen))


def _given(conductances: Tensor) -> Tensor:
    return conductances


def _fusible(
    u: Tensor, diffusivity: Diffusivity, scheme: Scheme, iterations: int, stencil: Stencil
) -> bool:
    """Whether the kernels can do it: their conductances are at most 1, so a short step is limited
    by itself.
    """
    return (
        isinstance(diffusivity, PeronaMalik)
        and u.device.type == "cpu"
        and u.dtype == torch.float32
        and u.shape[0] == 1
        and all(s.limiter_tau * stencil.largest_sum <= 1 + 1e-6 for s in scheme.steps(iterations))
    )


def _check(u: Tensor, valid: Tensor | None, noise: Stabiliser, iterations: int) -> None:
    if u.ndim != 4 or u.shape[1] != 1 or 0 in u.shape:
        raise InvalidImageError(
            f"The solver takes slices of shape (b, 1, h, w), none of them 0, not {tuple(u.shape)}."
        )
    if u.dtype not in (torch.float32, torch.float64):
        raise InvalidImageError(f"The solver computes in float32 or float64, not in {u.dtype}.")
    if valid is not None and valid.shape != u.shape:
        raise InvalidImageError(
            f"The mask has the shape {tuple(valid.shape)}, the image {tuple(u.shape)}."
        )
    if noise.is_zero:
        raise InvalidSettingError("Without noise there is nothing to remove.")
    if iterations < 0:
        raise InvalidSettingError(f"The number of iterations must be at least 0, not {iterations}.")
