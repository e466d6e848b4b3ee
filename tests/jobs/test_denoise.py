"""Jobs: automatic settings, units, progress, cancel, lazy arrays, memory, the report."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import torch

from napari_learned_diffusion.config import (
    DiffusionConfig,
    Gaussian,
    MapsConfig,
    PoissonGaussian,
    TilingConfig,
)
from napari_learned_diffusion.core.diffusivity import REGISTRY
from napari_learned_diffusion.core.errors import (
    DeviceError,
    InvalidImageError,
    InvalidSettingError,
    LearnedDiffusionError,
    UnknownModelError,
)
from napari_learned_diffusion.core.zoo import (
    BEST_MODEL,
    CLASSICAL_MODEL,
    STANDARD_MODEL,
    suitable_model,
)
from napari_learned_diffusion.jobs import plane_solver
from napari_learned_diffusion.jobs.denoise import (
    denoise_lazy,
    denoise_plane,
    denoise_stack,
    prepare,
)
from napari_learned_diffusion.jobs.prepare import placed
from napari_learned_diffusion.jobs.progress import run

CPU = DiffusionConfig(model="perona-malik", device="cpu")
DIFFUSIVITY = MapsConfig(diffusivity=True)
MAPS = ("diffusivity", "orientation", "anisotropy")
EASY = CPU.with_(
    model="perona-malik", noise=Gaussian(10.0), iterations=6, contrast=0.4, presmooth_sigma=0.5
)


def phantom(*lead: int, sigma: float = 10.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.uniform(50, 200, (*lead, 4, 4)), np.ones((16, 16)))
    return blocks + rng.normal(0, sigma, blocks.shape)


def test_everything_automatic_denoises_and_says_what_it_took():
    image = phantom()
    result = run(denoise_plane(image, CPU))
    config = result.prepared.config
    assert isinstance(config.noise, Gaussian)
    assert config.noise.noise_sigma == pytest.approx(10, rel=0.2)
    assert None not in (config.iterations, config.contrast, config.tau, config.presmooth_sigma)
    assert result.prepared.estimate.model == config.noise
    assert result.image.std() < image.std()
    report = result.report
    assert report.noise_sigma == pytest.approx(config.noise.noise_sigma)
    assert 0.8 * report.noise_sigma < report.removed_sigma < 1.05 * report.noise_sigma
    assert abs(report.mean_drift) < 1e-4
    assert report.range_kept
    assert report.range_before == (image.min(), image.max())
    assert report.range_before[0] <= report.range_after[0] < report.range_after[1]
    assert report.range_after[1] <= report.range_before[1]
    assert "range kept" in report.summary("HU")
    assert "HU" in report.summary("HU")


def test_learned_models_say_which_weights_they_have():
    found = {
        key: prepare(phantom(), EASY.with_(model=key, contrast=None, presmooth_sigma=None)).weights
        for key in ("perona-malik", "foe-splines", "unet")
    }
    assert found["perona-malik"] == ""
    assert len(found["foe-splines"]) == len(found["unet"]) == 64
    assert found["foe-splines"] != found["unet"]


@pytest.mark.parametrize("field", ["iterations", "contrast", "tau", "presmooth_sigma"])
def test_what_the_user_sets_stays(field):
    value = {"iterations": 3, "contrast": 0.77, "tau": 0.11, "presmooth_sigma": 0.9}[field]
    prepared = prepare(phantom(), CPU.with_(**{field: value}))
    assert getattr(prepared.config, field) == value
    assert prepared.requested == CPU.with_(**{field: value})


def test_a_smaller_time_step_takes_more_iterations_to_the_same_time():
    image = phantom()
    coarse = prepare(image, CPU.with_(tau=0.2)).config
    fine = prepare(image, CPU.with_(tau=0.1)).config
    assert fine.iterations == pytest.approx(2 * coarse.iterations, abs=1)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "i4", "u8", "f2", "f4", "f8"])
def test_dtype_and_shape_come_back(dtype):
    stack = phantom(2).clip(0, 255).astype(dtype)
    result = run(denoise_stack(stack, CPU))
    assert result.image.dtype == np.dtype(dtype)
    assert result.image.shape == stack.shape
    assert result.image.astype(float).mean() == pytest.approx(stack.astype(float).mean(), rel=1e-3)


@pytest.mark.parametrize("axes", [(-2, -1), (0, 1), (2, 0)])
def test_planes_along_any_axes_are_what_each_gives_alone(axes):
    stack = np.moveaxis(phantom(3), (-2, -1), axes)
    config = CPU.with_(noise=Gaussian(10.0), iterations=5, contrast=0.4, presmooth_sigma=0.5)
    whole = run(denoise_stack(stack, config, plane_axes=axes)).image
    moved_in = np.moveaxis(stack, axes, (-2, -1))
    moved_out = np.moveaxis(whole, axes, (-2, -1))
    for plane, denoised in zip(moved_in, moved_out, strict=True):
        np.testing.assert_allclose(run(denoise_plane(plane, config)).image, denoised)


def test_a_spacing_that_is_to_be_used_changes_what_flows_along_the_wider_axis():
    image = phantom()
    config = CPU.with_(noise=Gaussian(10.0), contrast=1e3, iterations=10)
    square = run(denoise_plane(image, config, spacing=(0.7, 0.7))).image
    np.testing.assert_allclose(run(denoise_plane(image, config)).image, square)
    config = config.with_(use_spacing=True)
    wide = run(denoise_plane(image, config, spacing=(5.0, 1.0))).image
    assert np.diff(wide, axis=0).std() > 2 * np.diff(wide, axis=1).std()


@pytest.mark.parametrize("model", sorted(REGISTRY))
@pytest.mark.parametrize("spacing", [(2.0, 1.0), (1.0, 5.0), (1e-9, 1e3)])
def test_pixels_that_are_not_square_are_denoised_as_if_they_were_and_it_is_said(model, spacing):
    image = phantom()
    config = DiffusionConfig(model=model, noise=Gaussian(10.0), device="cpu")
    square = run(denoise_plane(image, config))
    wide = run(denoise_plane(image, config, spacing=spacing))
    np.testing.assert_array_equal(wide.image, square.image)
    assert any("the voxel size isn't used" in m for m in wide.report.messages)
    assert not any("voxel size" in m for m in square.report.messages)


def test_orientations_are_those_in_space():
    y, x = np.mgrid[:64, :64]
    stripes = 100 + 60.0 * ((x + y) // 8 % 2) + np.random.default_rng(0).normal(0, 5, (64, 64))
    config = DiffusionConfig("conductance-unet-s", noise=Gaussian(5.0), device="cpu")
    maps = MapsConfig(orientation=True)
    found = run(denoise_plane(stripes, config, maps=maps, spacing=(2.0, 1.0))).orientation
    assert np.nanmedian(found) == pytest.approx(np.rad2deg(np.arctan(2)), abs=1)


@pytest.mark.parametrize("spacing", [(0.0, 1.0), (1.0, np.nan), (np.inf, 1.0)])
def test_a_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(InvalidSettingError, match="spacing"):
        run(denoise_plane(phantom(), CPU.with_(noise=Gaussian(10.0)), spacing=spacing))


def test_progress_counts_up_to_the_end_and_shows_every_plane():
    stack = phantom(3)
    reports = []
    result = run(denoise_stack(stack, CPU), reports.append)
    done = [r.done / r.total for r in reports]
    assert done == sorted(done)
    assert done[-1] == 1
    planes = {r.index: r.plane for r in reports if r.index is not None}
    assert list(planes) == [(0,), (1,), (2,)]
    for (i,), plane in planes.items():
        np.testing.assert_array_equal(plane, result.image[i])


def test_closing_cancels_between_two_steps():
    steps = []

    class StopHereError(Exception):
        pass

    def stop(progress):
        steps.append(progress)
        if len(steps) == 4:
            raise StopHereError

    with pytest.raises(StopHereError):
        run(denoise_stack(phantom(5), CPU.with_(iterations=1000)), stop)
    assert steps[-1].done < 5


def test_the_result_goes_where_the_caller_wants_it(tmp_path):
    stack = phantom(2).astype(np.float32)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", stack.dtype, stack.shape)
    result = run(denoise_stack(stack, CPU, out=out))
    assert result.image is out
    np.testing.assert_array_equal(np.asarray(out), run(denoise_stack(stack, CPU)).image)
    with pytest.raises(InvalidImageError, match="output"):
        run(denoise_stack(stack, CPU, out=np.empty((2, 3, 3), np.float32)))


def test_lazy_stacks_stay_lazy_and_give_the_same():
    stack = phantom(6).astype(np.float32)
    loaded = []

    def load(block, block_info=None):
        loaded.append(block_info[0]["chunk-location"][0])
        return block

    lazy = da.from_array(stack, chunks=(1, 64, 64)).map_blocks(load, meta=stack[:0])
    prepared = prepare(lazy, CPU)
    loaded.clear()
    result = denoise_lazy(lazy, prepared=prepared)
    assert loaded == []
    assert result.shape == stack.shape
    third = result[3].compute()
    assert loaded == [3]
    np.testing.assert_array_equal(third, run(denoise_stack(stack, prepared=prepared)).image[3])
    transposed = denoise_lazy(lazy.transpose(1, 2, 0), prepared=prepared, plane_axes=(0, 1))
    np.testing.assert_array_equal(transposed[:, :, 3].compute(), third)


def test_at_most_sixteen_planes_are_read_to_prepare():
    loaded = []

    def load(block, block_info=None):
        loaded.append(block_info[0]["chunk-location"][0])
        return block

    stack = phantom(40)
    lazy = da.from_array(stack, chunks=(1, 64, 64)).map_blocks(load, meta=stack[:0])
    prepare(lazy, CPU)
    assert 0 < len(set(loaded)) <= 16


def test_large_planes_are_judged_by_windows_of_them():
    rng = np.random.default_rng(3)
    image = np.concatenate([np.zeros((1600, 1600)), np.full((1600, 1600), 500.0)])
    image += rng.normal(0, 12, image.shape)
    asked = []

    class Spy:
        shape, dtype = image.shape, image.dtype

        def __getitem__(self, key):
            asked.append(key)
            return image[key]

    config = prepare(Spy(), CPU).config
    assert config.noise.noise_sigma == pytest.approx(12, rel=0.05)
    assert len(asked) == 1


def test_nan_and_infinity_come_back_as_they_were():
    image = phantom()
    image[5:9, 10:30] = np.nan
    image[40, 40] = np.inf
    image[41, 41] = -np.inf
    result = run(denoise_plane(image, CPU, maps=DIFFUSIVITY))
    bad = ~np.isfinite(image)
    np.testing.assert_array_equal(result.image[bad], image[bad])
    assert np.isfinite(result.image[~bad]).all()
    assert np.isnan(result.diffusivity[bad]).all()
    assert np.isfinite(result.diffusivity[~bad]).all()
    assert result.report.masked_pixels == bad.sum()
    assert any("NaN" in m for m in result.report.messages)
    assert result.image[~bad].mean() == pytest.approx(image[~bad].mean())


def all_maps(step: int | None = None) -> MapsConfig:
    return MapsConfig(diffusivity=True, orientation=True, step=step)


def test_only_the_maps_that_were_asked_for_are_kept():
    image = phantom()
    for maps, names in [
        (None, ()),
        (DIFFUSIVITY, MAPS[:1]),
        (MapsConfig(orientation=True), MAPS[1:]),
        (all_maps(), MAPS),
    ]:
        result = run(denoise_plane(image, EASY, maps=maps))
        kept = [name for name in MAPS if getattr(result, name) is not None]
        assert tuple(kept) == names
        for name in kept:
            assert getattr(result, name).shape == image.shape
            assert getattr(result, name).dtype == np.float32


def test_maps_are_of_any_step():
    image = phantom()
    last = run(denoise_plane(image, EASY, maps=all_maps()))
    for step in (1, 3, 6):
        shown = run(denoise_plane(image, EASY, maps=all_maps(step)))
        alone = run(denoise_plane(image, EASY.with_(iterations=step), maps=all_maps()))
        np.testing.assert_array_equal(shown.image, last.image)
        for name in MAPS:
            np.testing.assert_array_equal(getattr(shown, name), getattr(alone, name))
    first = run(denoise_plane(image, EASY, maps=all_maps(1)))
    assert not np.array_equal(last.diffusivity, first.diffusivity)


def test_diffusion_runs_along_stripes():
    rng = np.random.default_rng(0)
    stripes = np.where(np.arange(64) // 8 % 2, 60.0, 180.0)[:, None] + rng.normal(0, 10, (64, 64))
    for image, angle in ((stripes, 0), (stripes.T, 90)):
        shown = run(denoise_plane(image, EASY, maps=all_maps()))
        clear = shown.anisotropy > 0.3
        assert clear.mean() > 0.1
        assert np.mean(shown.orientation[clear] == angle) > 0.8
        assert shown.anisotropy.min() >= 0
        assert shown.anisotropy.max() <= 1


def test_masked_pixels_have_no_maps():
    image = phantom()
    image[5:9, 10:30] = np.nan
    shown = run(denoise_plane(image, EASY, maps=all_maps()))
    for name in MAPS:
        assert np.isnan(getattr(shown, name)[5:9, 10:30]).all()
    assert np.isfinite(shown.anisotropy[np.isfinite(image)]).all()


@pytest.mark.parametrize("axes", [(-2, -1), (2, 0)])
@pytest.mark.parametrize("tile", [None, 32])
def test_maps_of_stacks_and_tiles_are_those_of_each_plane(axes, tile):
    planes = np.tile(phantom(2), (1, 2, 2))
    stack = np.moveaxis(planes, (-2, -1), axes)
    into = {name: np.zeros(stack.shape, np.float32) for name in MAPS}
    job = denoise_stack(
        stack,
        EASY,
        plane_axes=axes,
        tiling=TilingConfig(tile=tile),
        maps=all_maps(4),
        maps_out=into,
    )
    result = run(job)
    for name in MAPS:
        assert getattr(result, name) is into[name]
        for at, plane in enumerate(planes):
            alone = getattr(run(denoise_plane(plane, EASY, maps=all_maps(4))), name)
            # In a tile the image is to rounding the same, which can turn what has no direction.
            found = np.moveaxis(into[name], axes, (-2, -1))[at]
            assert np.mean(~np.isclose(found, alone, atol=1e-3, equal_nan=True)) < 1e-3


def test_maps_of_a_step_that_is_not_done_are_refused():
    with pytest.raises(InvalidSettingError, match="only 6 iterations"):
        run(denoise_plane(phantom(), EASY, maps=all_maps(7)))
    run(denoise_plane(phantom(), EASY, maps=MapsConfig(step=7)))  # there are none to show
    into = {name: np.zeros((64, 64)) for name in MAPS}
    with pytest.raises(InvalidImageError, match="float32"):
        run(denoise_stack(phantom(), EASY, maps=all_maps(), maps_out=into))


def test_slices_that_took_fewer_steps_have_empty_maps():
    stack = phantom(3)
    stack[1] = np.where(np.arange(64) < 32, 50.0, 51.0)  # nothing to do
    config = CPU.with_(model="perona-malik", noise_scope="slice", noise_kind="gaussian")
    iterations = [prepare(plane, config).config.iterations for plane in stack]
    late = max(iterations)
    result = run(denoise_stack(stack, config, maps=all_maps(late)))
    for at, done in enumerate(iterations):
        assert np.isnan(result.diffusivity[at]).all() == (done < late)
    stack[1] = phantom(sigma=60.0, seed=4)
    iterations = [prepare(plane, config).config.iterations for plane in stack]
    assert len(set(iterations)) > 1
    result = run(denoise_stack(stack, config, maps=all_maps(max(iterations))))
    assert any("their maps are empty" in message for message in result.report.messages)


def test_an_empty_slice_of_a_padded_stack_is_passed_through():
    stack = phantom(3)
    stack[1] = np.nan
    for scope in ("stack", "slice"):
        result = run(denoise_stack(stack, CPU.with_(noise_scope=scope)))
        assert np.isnan(result.image[1]).all()
        assert result.image[2].std() < stack[2].std()
    assert np.isnan(denoise_lazy(da.from_array(stack, chunks=(1, 64, 64)), CPU)[1].compute()).all()


def test_an_image_without_a_number_is_refused():
    nothing = np.full((8, 8), np.nan)
    for config in (CPU, CPU.with_(noise=Gaussian(1.0))):
        with pytest.raises(InvalidImageError, match="NaN"):
            run(denoise_plane(nothing, config))


@pytest.mark.parametrize("image", [np.full((32, 32), 7, np.int16), np.zeros((2, 32, 32))])
def test_without_noise_the_input_comes_back_untouched_with_a_message(image):
    result = run(denoise_stack(image, CPU, maps=DIFFUSIVITY))
    np.testing.assert_array_equal(result.image, image)
    assert result.diffusivity is None
    assert "noise level is 0" in result.report.messages[0]
    told = run(denoise_plane(phantom(), CPU.with_(noise=Gaussian(0.0))))
    np.testing.assert_array_equal(told.image, phantom())


def test_zero_iterations_give_the_input_back_with_a_message():
    result = run(denoise_plane(phantom(), CPU.with_(iterations=0)))
    np.testing.assert_array_equal(result.image, phantom())
    assert "0 iterations" in result.report.messages[0]


def test_slices_that_differ_in_their_noise_get_a_model_each():
    stack = np.concatenate([phantom(2, sigma=3.0), phantom(2, sigma=30.0, seed=1)])
    prepared = prepare(stack, CPU)
    assert prepared.estimate.slices_differ
    assert prepared.slice_by_slice
    automatic = run(denoise_stack(stack, CPU)).image
    alone = np.stack([run(denoise_plane(plane, CPU)).image for plane in stack])
    np.testing.assert_allclose(automatic, alone)
    lazily = denoise_lazy(da.from_array(stack, chunks=(1, 64, 64)), CPU).compute()
    np.testing.assert_allclose(lazily, alone)
    together = run(denoise_stack(stack, CPU.with_(noise_scope="stack"))).image
    assert np.abs(together - alone).max() > 1


def test_a_uniform_stack_gets_one_model():
    prepared = prepare(phantom(4), CPU)
    assert not prepared.slice_by_slice
    assert prepare(phantom(4), CPU.with_(noise_scope="slice")).slice_by_slice


def test_fed_says_which_guarantee_it_relaxes():
    image = phantom()
    result = run(denoise_plane(image, CPU.with_(scheme="fed")))
    assert result.prepared.config.stopping_time > 0
    assert any("FED" in m for m in result.report.messages)
    assert abs(result.report.mean_drift) < 1e-4
    with pytest.raises(InvalidSettingError, match="Take more iterations"):
        run(denoise_plane(image, CPU.with_(scheme="fed", stopping_time=50.0, iterations=2)))


def test_a_large_time_step_is_limited_and_keeps_the_range():
    image = phantom()
    report = run(denoise_plane(image, CPU.with_(tau=30.0, iterations=20, contrast=5.0))).report
    assert report.range_kept
    assert abs(report.mean_drift) < 1e-4


def test_poisson_gaussian_noise_is_used_as_given():
    noise = PoissonGaussian(2.0, 10.0)
    result = run(denoise_plane(phantom(), CPU.with_(noise=noise)))
    assert result.prepared.noise == noise
    assert result.prepared.estimate is None


def test_running_out_of_memory_halves_the_tile_and_tries_again(monkeypatch):
    image = np.tile(phantom(), (4, 4))
    config = CPU.with_(noise=Gaussian(10.0), iterations=3)
    expected = run(denoise_plane(image, config)).image
    real, sizes = plane_solver.iterate, []

    def fails_when_large(u, *args, **kwargs):
        sizes.append(u.shape[-1])
        if u.shape[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(u, *args, **kwargs)

    monkeypatch.setattr(plane_solver, "iterate", fails_when_large)
    result = run(denoise_plane(image, config))
    np.testing.assert_allclose(result.image, expected, atol=1e-3)
    assert sizes[0] == 256
    assert any("tiles of 64 pixels" in m for m in result.report.messages)


def test_memory_that_never_suffices_is_a_clear_error(monkeypatch):
    def always_fails(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(plane_solver, "iterate", always_fails)
    with pytest.raises(DeviceError, match="too little memory"):
        run(denoise_plane(phantom(), CPU))


def test_other_failures_of_torch_are_not_taken_for_memory(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(plane_solver, "iterate", fails)
    with pytest.raises(RuntimeError, match="shape"):
        run(denoise_plane(phantom(), CPU))


def test_a_small_budget_cuts_large_planes():
    image = np.tile(phantom(), (3, 3))
    config = CPU.with_(noise=Gaussian(10.0), iterations=2)
    small = TilingConfig(memory_budget=500_000)
    np.testing.assert_allclose(
        run(denoise_plane(image, config, tiling=small)).image,
        run(denoise_plane(image, config)).image,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (CPU.with_(model="nothing"), UnknownModelError),
        (CPU.with_(device="cuda:99"), DeviceError),
        (CPU.with_(device="abacus"), DeviceError),
    ],
)
def test_settings_that_can_t_be_met_are_refused(config, error):
    with pytest.raises(error) as caught:
        prepare(phantom(), config)
    assert isinstance(caught.value, LearnedDiffusionError)


def test_a_plane_job_takes_planes_only():
    with pytest.raises(InvalidImageError, match="two dimensions"):
        denoise_plane(phantom(2), CPU)


# --- the model that is chosen where none is named -------------------------------------------------


def test_the_default_model_follows_the_settings():
    image = phantom()
    assert prepare(image, DiffusionConfig(device="cpu")).config.model == STANDARD_MODEL
    classical = DiffusionConfig(device="cpu", contrast=0.5)
    assert prepare(image, classical).config.model == CLASSICAL_MODEL
    assert suitable_model(DiffusionConfig(model="unet"), "cpu") == "unet"


def test_the_default_model_follows_the_device():
    assert suitable_model(DiffusionConfig(), "cpu") == STANDARD_MODEL
    assert suitable_model(DiffusionConfig(), "cuda") == suitable_model(DiffusionConfig(), "mps")
    assert suitable_model(DiffusionConfig(), "cuda") == BEST_MODEL
    assert suitable_model(DiffusionConfig(contrast=0.5), "cuda") == CLASSICAL_MODEL


def test_the_device_follows_the_model(monkeypatch):
    monkeypatch.setattr(
        "napari_learned_diffusion.core.device.available_devices", lambda: ["cuda", "cpu"]
    )
    assert placed(DiffusionConfig()) == DiffusionConfig(BEST_MODEL, device="cuda")
    assert placed(DiffusionConfig(STANDARD_MODEL)).device == "cuda"
    # It has kernels on the CPU, for single precision.
    assert placed(DiffusionConfig(CLASSICAL_MODEL)).device == "cpu"
    assert placed(DiffusionConfig(contrast=0.5)).device == "cpu"
    assert placed(DiffusionConfig(CLASSICAL_MODEL, precision="float64")).device == "cuda"


def test_more_iterations_than_a_model_has_are_refused_before_anything_is_done():
    config = DiffusionConfig(model=STANDARD_MODEL, iterations=6, device="cpu")
    with pytest.raises(InvalidSettingError, match="at most 5 iterations"):
        prepare(phantom(), config)
