"""Time steps of the two schemes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_learned_diffusion.core.errors import InvalidSettingError
from napari_learned_diffusion.core.schemes import STABLE_TAU, Explicit, FastExplicitDiffusion


@given(tau=st.floats(0.01, 10), iterations=st.integers(0, 50))
def test_explicit_steps_are_equal_and_each_refreshes(tau, iterations):
    scheme = Explicit(tau)
    steps = list(scheme.steps(iterations))
    assert len(steps) == iterations
    assert all(s.tau == s.limiter_tau == tau and s.refresh for s in steps)
    assert scheme.stopping_time(iterations) == pytest.approx(sum(s.tau for s in steps))


@given(time=st.floats(0.1, 500), cycles=st.integers(1, 8), more=st.integers(0, 20))
def test_fed_steps_add_up_to_the_stopping_time(time, cycles, more):
    scheme = FastExplicitDiffusion(time, cycles=cycles)
    iterations = scheme.least_iterations() + more
    steps = list(scheme.steps(iterations))
    assert len(steps) == iterations
    assert sum(s.tau for s in steps) == pytest.approx(time)
    assert sum(s.refresh for s in steps) == min(cycles, iterations)
    assert all(s.limiter_tau == STABLE_TAU for s in steps)


@given(time=st.floats(5, 500), cycles=st.integers(1, 8))
def test_least_iterations_are_the_least(time, cycles):
    scheme = FastExplicitDiffusion(time, cycles=cycles)
    fewer = scheme.least_iterations() - cycles
    if fewer > 0:
        with pytest.raises(InvalidSettingError, match="Take more iterations"):
            list(scheme.steps(fewer))


def test_a_fed_cycle_is_stable_for_every_mode_although_single_steps_are_not():
    scheme = FastExplicitDiffusion(20.0, cycles=1)
    steps = list(scheme.steps(scheme.least_iterations()))
    assert max(s.tau for s in steps) > 4 * STABLE_TAU
    for i in range(101):
        eigenvalue = 8 * i / 100  # of minus the Laplacian over 4 neighbours
        assert abs(math.prod(1 - s.tau * eigenvalue for s in steps)) <= 1 + 1e-9


def test_fed_takes_each_step_of_a_cycle_once_long_ones_apart():
    steps = [s.tau for s in FastExplicitDiffusion(30.0, cycles=1).steps(25)]
    assert len(set(steps)) == 25
    longest = sorted(steps)[-3:]
    positions = sorted(steps.index(t) for t in longest)
    assert min(b - a for a, b in itertools.pairwise(positions)) > 1


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_times_must_be_positive(bad):
    with pytest.raises(InvalidSettingError, match="time step tau"):
        Explicit(bad)
    with pytest.raises(InvalidSettingError, match="stopping time"):
        FastExplicitDiffusion(bad)
