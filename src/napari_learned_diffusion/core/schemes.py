r"""Time stepping: which time steps, and where the diffusivity is evaluated anew.

A scheme turns a number of iterations into a sequence of steps. The step itself,
:math:`u \leftarrow u + \tau \operatorname{div}(g \nabla u)`, is the same for all and lives in
`core.solve`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from napari_learned_diffusion.core.errors import InvalidSettingError

STABLE_TAU = 0.25
"""Largest explicit step of a diffusivity of at most 1 over 4 neighbours at distance 1."""

LONGEST_STEP = 1e6
"""Longest explicit step: the limiter makes long steps alike, and their numbers must be finite."""


class Step(NamedTuple):
    """One diffusion step, all times in squared pixels."""

    tau: float
    """Length of the step."""
    limiter_tau: float
    """The step that the conductances are limited for: longer ones are stable only as a cycle."""
    refresh: bool
    """Whether the diffusivity is evaluated anew before the step."""


class Scheme(ABC):
    """How to get from time 0 to the stopping time."""

    keeps_range: bool
    """Whether each step is a convex average, so that no value leaves the input's range."""

    @abstractmethod
    def steps(self, iterations: int) -> Iterator[Step]:
        """The ``iterations`` steps, in order."""

    @abstractmethod
    def stopping_time(self, iterations: int) -> float:
        """Sum of the time steps, in squared pixels."""


@dataclass(frozen=True)
class Explicit(Scheme):
    """Explicit Euler, with the diffusivity evaluated before every step. First order in time.

    Every guarantee holds at any ``tau``: the limiter sees to it. Steps beyond `STABLE_TAU` are
    scaled down by it and so reach a smaller stopping time than they say.
    """

    tau: float
    keeps_range = True

    def __post_init__(self) -> None:
        _require_positive("The time step tau", self.tau)
        if self.tau > LONGEST_STEP:
            raise InvalidSettingError(
                f"The time step tau must be at most {LONGEST_STEP:g} squared pixels, not "
                f"{self.tau:g}. Steps beyond {STABLE_TAU} are limited to what is stable anyway."
            )

    def steps(self, iterations: int) -> Iterator[Step]:
        for _ in range(iterations):
            yield Step(self.tau, self.tau, refresh=True)

    def stopping_time(self, iterations: int) -> float:
        return self.tau * iterations


@dataclass(frozen=True)
class FastExplicitDiffusion(Scheme):
    r"""Fast explicit diffusion (FED): cycles of varying steps, some far beyond the stable one [1]_.

    A cycle of ``n`` steps

    .. math:: \tau_k = \frac{\tau_{\max}}{2 \cos^2\!\left(\pi \frac{2k + 1}{4n + 2}\right)},
              \quad k = 0, \dots, n-1, \qquad \sum_k \tau_k = \tau_{\max}\frac{n^2 + n}{3}

    is stable in the L² norm as a whole. The diffusivity is evaluated once a cycle, and all steps
    are scaled so that they add up to the stopping time. The mean is preserved; the max–min
    principle holds only approximately, since single steps overshoot.

    Parameters
    ----------
    time
        Stopping time, in squared pixels.
    stable_tau
        Largest stable explicit step, in squared pixels.
    cycles
        How often the diffusivity is evaluated. A cycle is made longer than ``iterations / cycles``
        only where the stopping time couldn't be reached otherwise, which raises.

    References
    ----------
    .. [1] S. Grewenig, J. Weickert, A. Bruhn, "From box filtering to fast explicit diffusion",
       DAGM 2010, LNCS 6376, 533-542.
    """

    time: float
    stable_tau: float = STABLE_TAU
    cycles: int = 5
    keeps_range = False

    def __post_init__(self) -> None:
        _require_positive("The stopping time", self.time)
        _require_positive("The stable time step", self.stable_tau)
        if self.cycles < 1:
            raise InvalidSettingError(f"There must be at least one FED cycle, not {self.cycles}.")

    def steps(self, iterations: int) -> Iterator[Step]:
        if iterations == 0:
            return
        cycles = min(self.cycles, iterations)
        reachable = self._reachable(iterations, cycles)
        if self.time > reachable * (1 + 1e-9):
            raise InvalidSettingError(
                f"{iterations} FED iterations in {cycles} cycles reach a stopping time of at most "
                f"{reachable:.3g}, not {self.time:.3g}. Take more iterations or a shorter time."
            )
        scale = self.time / reachable
        for length in _cycle_lengths(iterations, cycles):
            order = _interleaved(length)
            for position, k in enumerate(order):
                cosine = math.cos(math.pi * (2 * k + 1) / (4 * length + 2))
                tau = scale * self.stable_tau / (2 * cosine**2)
                yield Step(tau, self.stable_tau, refresh=position == 0)

    def stopping_time(self, iterations: int) -> float:
        return self.time if iterations else 0.0

    def least_iterations(self) -> int:
        """The smallest number of iterations, a multiple of ``cycles``, that reaches the time."""
        # cycles · stable_tau · (n² + n)/3 >= time, solved for the length n of a cycle
        n = (math.sqrt(1 + 12 * self.time / (self.cycles * self.stable_tau)) - 1) / 2
        return self.cycles * max(1, math.ceil(n - 1e-9))

    def _reachable(self, iterations: int, cycles: int) -> float:
        return sum(self.stable_tau * (n * n + n) / 3 for n in _cycle_lengths(iterations, cycles))


def _cycle_lengths(iterations: int, cycles: int) -> list[int]:
    """Iterations shared out among the cycles, as evenly as can be."""
    each, more = divmod(iterations, cycles)
    return [each + (c < more) for c in range(cycles)]


def _interleaved(n: int) -> list[int]:
    """An order of a cycle's steps that keeps rounding errors from growing within it.

    The kappa cycle of [1]: steps are taken ``kappa`` apart modulo a prime above ``n``, so that
    each long step has short ones around it.
    """
    prime = n + 1
    while any(prime % d == 0 for d in range(2, math.isqrt(prime) + 1)):
        prime += 1
    kappa = max(1, n // 4)
    order = [(k * kappa) % prime - 1 for k in range(1, prime)]
    return [k for k in order if 0 <= k < n]


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidSettingError(f"{name} must be a finite number above 0, not {value}.")
