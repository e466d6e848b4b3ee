"""The solver against analytic solutions, against itself, and against its guarantees."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from napari_learned_diffusion.core.diffusivity.base import PixelDiffusivity, Suggestion
from napari_learned_diffusion.core.diffusivity.perona_malik import PeronaMalik
from napari_learned_diffusion.core.errors import InvalidImageError, InvalidSettingError
from napari_learned_diffusion.core.noise import Gaussian, PoissonGaussian
from napari_learned_diffusion.core.schemes import Explicit, FastExplicitDiffusion
from napari_learned_diffusion.core.solve import Outcome, iterate, solve

UNIT_NOISE = Gaussian(1.0)
LINEAR = 1e6
"""A contrast parameter so large that every edge conducts fully: the linear heat equation."""


def noisy(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = 5 * torch.randn((1, 1, *shape), dtype=torch.float64, generator=generator)
    image[..., shape[-1] // 2 :] += 20
    return image.to(dtype)


class Wild(PixelDiffusivity):
    """A diffusivity with no regard for stability, as an untrained network might be."""

    key = "wild"
    working_maps = 8
    reach = 0

    @classmethod
    def from_config(cls, config):
        return cls()

    @classmethod
    def suggest(cls, v):
        return Suggestion(1.0, 0.2)

    def forward(self, v, valid, step):
        return torch.exp(3 * torch.sin(7 * v + step))


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (2.0, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("mode", [(1, 0), (0, 2), (3, 1)])
def test_a_cosine_mode_decays_at_the_analytic_rate(mode, spacing):
    h, w = 24, 30
    y, x = torch.arange(h).double() + 0.5, torch.arange(w).double() + 0.5
    ky, kx = math.pi * mode[0] / h, math.pi * mode[1] / w
    u = (torch.cos(ky * y)[:, None] * torch.cos(kx * x)[None])[None, None]
    rate = (2 - 2 * math.cos(ky)) / spacing[0] ** 2 + (2 - 2 * math.cos(kx)) / spacing[1] ** 2
    steps, tau = 200, 0.01
    solution = solve(
        u,
        PeronaMalik(LINEAR),
        noise=UNIT_NOISE,
        scheme=Explicit(tau),
        iterations=steps,
        spacing=spacing,
    )
    torch.testing.assert_close(solution.u, u * (1 - tau * rate) ** steps, rtol=1e-6, atol=1e-9)
    # and of the continuous equation, to the order of the time step
    torch.testing.assert_close(solution.u, u * math.exp(-rate * steps * tau), rtol=0.02, atol=1e-4)


def test_the_explicit_scheme_is_of_first_order_in_time():
    u, model = noisy(16, 17), PeronaMalik(2.0, presmooth_sigma=0.5)

    def at_time_2(steps: int) -> torch.Tensor:
        return solve(u, model, noise=UNIT_NOISE, scheme=Explicit(2 / steps), iterations=steps).u

    exact = at_time_2(4096)
    errors = [(at_time_2(n) - exact).norm().item() for n in (16, 32, 64)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1.0, 1.0], abs=0.15)


def test_fed_reaches_what_many_small_steps_reach():
    u, model = noisy(20, 20), PeronaMalik(LINEAR)
    time = 6.0
    small = solve(u, model, noise=UNIT_NOISE, scheme=Explicit(0.01), iterations=600).u
    fed = FastExplicitDiffusion(time, cycles=5)
    few = fed.least_iterations()
    assert few < time / 0.25
    quick = solve(u, model, noise=UNIT_NOISE, scheme=fed, iterations=few).u
    assert (quick - small).norm() < 0.03 * (u - small).norm()
    torch.testing.assert_close(quick.mean(), u.mean())


images = arrays(
    np.float64,
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    elements=st.floats(-1e3, 1e3, allow_subnormal=False),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [Wild(), PeronaMalik(3.0), PeronaMalik(0.2, "exponential", 0.6)])
@settings(max_examples=30)
@given(image=images, tau=st.floats(0.01, 20), sigma=st.floats(0.1, 50))
def test_guarantees_hold_for_any_image_and_any_time_step(model, dtype, image, tau, sigma):
    u = torch.from_numpy(image).to(dtype)[None, None]
    size = float(u.abs().max()) + 1e-30
    tolerance = size * (1e-4 if dtype == torch.float32 else 1e-11)
    previous = u
    for state in iterate(u, model, noise=Gaussian(sigma), scheme=Explicit(tau), iterations=5):
        assert state.u.min() >= u.min() - tolerance
        assert state.u.max() <= u.max() + tolerance
        assert abs(state.u.double().mean() - u.double().mean()) <= tolerance
        assert state.u.double().norm() <= previous.double().norm() + tolerance * u.numel() ** 0.5
        assert (state.diffusivity() >= 0).all()
        previous = state.u.clone()


@pytest.mark.parametrize("model", [Wild(), PeronaMalik(1.0, presmooth_sigma=1.0)])
def test_constants_stay_constant(model):
    u = torch.full((1, 1, 6, 7), 42.5)
    solution = solve(u, model, noise=UNIT_NOISE, scheme=Explicit(5.0), iterations=8)
    torch.testing.assert_close(solution.u, u)


@given(scale=st.floats(0.01, 100), shift=st.floats(-1e3, 1e3))
@pytest.mark.parametrize("noise", [Gaussian(4.0), PoissonGaussian(0.5, 12.0)])
def test_adding_and_scaling_intensities_commute_with_the_solver(noise, scale, shift):
    u, model = noisy(12, 13) + 30, PeronaMalik(0.8, presmooth_sigma=0.5)

    def denoised(image, noise_model):
        return solve(
            image, model, noise=noise_model, scheme=Explicit(0.2), iterations=10, backend="torch"
        ).u

    torch.testing.assert_close(
        denoised(scale * u + shift, noise.transformed(scale, shift)),
        scale * denoised(u, noise) + shift,
        rtol=1e-9,
        atol=1e-7,
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("presmooth_sigma", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("function", ["rational", "exponential"])
@pytest.mark.parametrize("scheme", [Explicit(0.2), FastExplicitDiffusion(10.0)])
@pytest.mark.parametrize("noise", [Gaussian(5.0), PoissonGaussian(0.7, 3.0)])
@pytest.mark.parametrize("shape", [(37, 53), (1, 9), (5, 1)])
def test_fused_kernels_do_what_the_plain_torch_version_does(
    shape, noise, scheme, function, presmooth_sigma, masked
):
    u = noisy(*shape, dtype=torch.float32)
    valid = (noisy(*shape, seed=3) > 0).float() if masked else None
    model = PeronaMalik(0.7, function, presmooth_sigma)
    plain, fused = (
        solve(
            u,
            model,
            noise=noise,
            scheme=scheme,
            iterations=25,
            spacing=(1.0, 1.7),
            valid=valid,
            backend=backend,
            keep_history=True,
        )
        for backend in ("torch", "fused")
    )
    torch.testing.assert_close(fused.u, plain.u, rtol=0, atol=2e-3)
    assert (fused.steps, fused.time) == (plain.steps, plain.time)
    for a, b in zip(fused.history, plain.history, strict=True):
        torch.testing.assert_close(a.u, b.u, rtol=0, atol=2e-3)
        torch.testing.assert_close(a.diffusivity, b.diffusivity, rtol=0, atol=2e-3)


def test_bands_of_rows_in_threads_give_what_one_thread_gives():
    from napari_learned_diffusion.core.fused import perona_malik_steps

    u = noisy(700, 600, dtype=torch.float32)[0, 0].numpy()

    def after_steps(threads: int) -> np.ndarray:
        steps = Explicit(0.2).steps(6)
        steps_done = perona_malik_steps(
            u,
            steps,
            stabilise=lambda v: v / 5,
            contrast=0.5,
            function="rational",
            presmooth_sigma=0.6,
            spacing=(1.0, 1.0),
            valid=None,
            threads=threads,
        )
        return [after.copy() for _, after in steps_done][-1]

    np.testing.assert_array_equal(after_steps(3), after_steps(1))


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_the_input_is_never_written_to(backend):
    u = noisy(9, 9, dtype=torch.float32)
    before = u.clone()
    solve(
        u, PeronaMalik(1.0), noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=3, backend=backend
    )
    torch.testing.assert_close(u, before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_masked_pixels_neither_give_nor_take(backend):
    u = noisy(16, 16, dtype=torch.float32)
    valid = torch.ones_like(u)
    valid[..., 5:8, :] = 0
    u[..., 5:8, :] = 1e3
    solution = solve(
        u,
        PeronaMalik(LINEAR, presmooth_sigma=0.6),
        noise=UNIT_NOISE,
        scheme=Explicit(0.2),
        iterations=40,
        valid=valid,
        backend=backend,
    )
    torch.testing.assert_close(solution.u[..., 5:8, :], u[..., 5:8, :])
    for part in (slice(0, 5), slice(8, 16)):
        torch.testing.assert_close(solution.u[..., part, :].mean(), u[..., part, :].mean())
        assert solution.u[..., part, :].max() <= u[..., part, :].max() + 1e-4


def test_batches_are_denoised_one_by_one():
    batch = torch.cat([noisy(8, 9, seed=s) for s in range(3)])
    common = {"noise": UNIT_NOISE, "scheme": Explicit(0.2), "iterations": 5}
    together = solve(batch, PeronaMalik(1.0), **common).u
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], solve(batch[i : i + 1], PeronaMalik(1.0), **common).u
        )


def test_history_keeps_every_step_as_it_was():
    u = noisy(10, 10, dtype=torch.float32)
    solution = solve(
        u,
        PeronaMalik(1.0),
        noise=UNIT_NOISE,
        scheme=Explicit(0.2),
        iterations=4,
        keep_history=True,
    )
    assert [s.step for s in solution.history] == [1, 2, 3, 4]
    assert [s.time for s in solution.history] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    spread = [float(s.u.std()) for s in solution.history]
    assert spread == sorted(spread, reverse=True)
    assert len(set(spread)) == 4
    torch.testing.assert_close(solution.history[-1].u, solution.u)
    torch.testing.assert_close(solution.history[-1].diffusivity, solution.diffusivity)


def test_cancelling_stops_before_the_next_step_and_says_so():
    seen = []
    solution = solve(
        noisy(10, 10),
        PeronaMalik(1.0),
        noise=UNIT_NOISE,
        scheme=Explicit(0.2),
        iterations=50,
        on_step=lambda state: seen.append(state.step),
        cancelled=lambda: len(seen) == 3,
    )
    assert seen == [1, 2, 3]
    assert solution.steps == 3
    assert solution.outcome is Outcome.CANCELLED
    assert "Run again" in solution.outcome.value


def test_no_iterations_give_the_input_back():
    u = noisy(5, 5)
    solution = solve(u, PeronaMalik(1.0), noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=0)
    assert solution.diffusivity is None
    assert solution.outcome is Outcome.COMPLETED
    torch.testing.assert_close(solution.u, u, rtol=0, atol=0)


def test_steps_can_be_differentiated_and_leave_no_mode_behind():
    u = noisy(6, 6).requires_grad_()
    model = PeronaMalik(2.0, presmooth_sigma=0.5)
    *_, last = iterate(
        u, model, noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=3, gradients=True
    )
    last.u.square().sum().backward()
    assert torch.isfinite(u.grad).all()
    assert u.grad.abs().max() > 0
    states = iterate(
        u.detach(), model, noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=3, backend="torch"
    )
    next(states)
    assert torch.is_grad_enabled()
    states.close()


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.zeros(4, 4), "shape"),
        (torch.zeros(1, 2, 4, 4), "shape"),
        (torch.zeros(1, 1, 0, 4), "shape"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.int32), "float32 or float64"),
    ],
)
def test_what_is_no_batch_of_slices_is_refused(u, message):
    with pytest.raises(InvalidImageError, match=message):
        solve(u, PeronaMalik(1.0), noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=1)


def test_settings_that_make_no_sense_are_refused():
    u = noisy(4, 4)
    with pytest.raises(InvalidSettingError, match="Without noise"):
        solve(u, PeronaMalik(1.0), noise=Gaussian(0), scheme=Explicit(0.2), iterations=1)
    with pytest.raises(InvalidSettingError, match="at least 0"):
        solve(u, PeronaMalik(1.0), noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=-1)
    with pytest.raises(InvalidSettingError, match="fused backend"):
        solve(u, Wild(), noise=UNIT_NOISE, scheme=Explicit(0.2), iterations=1, backend="fused")
    with pytest.raises(InvalidImageError, match="mask"):
        solve(
            u,
            PeronaMalik(1.0),
            noise=UNIT_NOISE,
            scheme=Explicit(0.2),
            iterations=1,
            valid=torch.ones(1, 1, 3, 3),
        )
