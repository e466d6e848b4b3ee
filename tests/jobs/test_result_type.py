"""Which type a result has, decided in one place for arrays, lazy arrays, slices and files."""

import dask.array as da
import numpy as np
import pytest

from napari_learned_diffusion import LearnedDiffusionError, LearnedDiffusionWarning, denoise
from napari_learned_diffusion.config import DiffusionConfig, Gaussian, MapsConfig, PoissonGaussian
from napari_learned_diffusion.core.errors import FileFormatError
from napari_learned_diffusion.files import FORMATS, Volume, read, write
from napari_learned_diffusion.jobs.batch import BatchConfig, denoise_batch
from napari_learned_diffusion.jobs.batch_sources import find_sources
from napari_learned_diffusion.jobs.denoise import denoise_lazy, denoise_stack, prepare
from napari_learned_diffusion.jobs.progress import run
from napari_learned_diffusion.jobs.result_type import for_format, result_type

CLASSIC = DiffusionConfig("perona-malik", device="cpu")
PHOTONS = PoissonGaussian(1.0)


def counts(mean: float, dtype: str = "u1", shape: tuple[int, ...] = (48, 64)) -> np.ndarray:
    """Counted photons, a brighter disc in the middle."""
    rows, columns = np.indices(shape[-2:]) - np.array(shape[-2:]).reshape(2, 1, 1) / 2
    signal = mean * (1 + 3 * (np.hypot(rows, columns) < 16))
    return np.random.default_rng(0).poisson(np.broadcast_to(signal, shape)).astype(dtype)


@pytest.mark.parametrize("mean", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8"])
def test_few_counts_become_float32_and_keep_the_mean(mean, dtype):
    image = counts(mean, dtype)
    done = run(denoise_stack(image, CLASSIC.with_(noise=PHOTONS)))
    assert done.image.dtype == np.float32
    assert done.image.mean() == pytest.approx(image.mean(), rel=1e-5)
    assert done.image.min() >= image.min()
    assert done.image.max() <= image.max()
    assert any("float32" in message for message in done.report.messages)


def test_many_counts_stay_whole_numbers():
    done = run(denoise_stack(counts(40), CLASSIC.with_(noise=PHOTONS)))
    assert done.image.dtype == np.uint8
    assert not any("float32" in message for message in done.report.messages)


def test_up_to_three_grey_levels_float32_is_offered():
    image = np.rint(np.random.default_rng(0).normal(100, 2, (48, 64))).astype("u2")
    done = run(denoise_stack(image, CLASSIC.with_(noise=Gaussian(2.0))))
    assert done.image.dtype == np.uint16
    assert any("float32" in message for message in done.report.messages)


def test_what_is_asked_for_goes_before_what_is_automatic():
    config = CLASSIC.with_(noise=PHOTONS)
    same = run(denoise_stack(counts(0.5), config.with_(dtype="same")))
    wide = run(denoise_stack(counts(40), config.with_(dtype="float32")))
    assert (same.image.dtype, wide.image.dtype) == (np.uint8, np.float32)
    assert any("rounding" in message for message in same.report.messages)
    assert (wide.image % 1).any()


def test_floating_point_numbers_keep_their_type():
    for dtype in ("f2", "f4", "f8"):
        image = counts(0.5).astype(dtype)
        assert run(denoise_stack(image, CLASSIC.with_(noise=PHOTONS))).image.dtype == dtype


def test_whole_numbers_that_float32_cannot_hold_stay_whole():
    image = counts(0.5, "i8") + 2**30
    noise = PHOTONS.transformed(1.0, 2.0**30)
    done = run(denoise_stack(image, CLASSIC.with_(noise=noise)))
    assert done.image.dtype == np.int64
    assert any("rounding" in message for message in done.report.messages)


def test_an_image_that_comes_back_as_it_is_keeps_its_type():
    image = counts(0.5)
    for changed in ({"noise": Gaussian(0.0)}, {"noise": PHOTONS, "iterations": 0}):
        done = run(denoise_stack(image, CLASSIC.with_(**changed)))
        np.testing.assert_array_equal(done.image, image)
        assert done.image.dtype == np.uint8


def test_the_maps_belong_to_the_same_result():
    config = CLASSIC.with_(noise=PHOTONS)
    whole = run(denoise_stack(counts(0.5), config, maps=MapsConfig(diffusivity=True)))
    given = counts(0.5).astype("f4")
    floats = run(denoise_stack(given, config, maps=MapsConfig(diffusivity=True)))
    np.testing.assert_array_equal(whole.image, floats.image)
    np.testing.assert_array_equal(whole.diffusivity, floats.diffusivity)


def test_all_slices_of_a_stack_have_the_type_that_the_stack_decides():
    stack = np.stack([counts(0.3), counts(0.3), counts(60)])
    config = CLASSIC.with_(noise_kind="poisson-gaussian", noise_scope="slice")
    prepared = prepare(stack, config)
    decided = {result_type(stack.dtype, prepared.of(plane)).dtype for plane in stack}
    assert decided == {result_type(stack.dtype, prepared).dtype} == {np.dtype(np.float32)}
    assert run(denoise_stack(stack, config)).image.dtype == np.float32


def test_a_lazy_array_has_the_same_type_and_pixels():
    stack = counts(0.5, shape=(3, 40, 48))
    config = CLASSIC.with_(noise=PHOTONS)
    lazy = denoise_lazy(da.from_array(stack, chunks=(1, -1, -1)), config)
    assert lazy.dtype == np.float32
    np.testing.assert_array_equal(lazy.compute(), run(denoise_stack(stack, config)).image)


SETTINGS = {"model": "perona-malik", "noise": PHOTONS, "device": "cpu"}


class TestPython:
    def test_the_type_stays_and_a_warning_says_what_is_lost(self):
        with pytest.warns(LearnedDiffusionWarning, match=r"dtype=numpy\.float32"):
            assert denoise(counts(0.5), **SETTINGS).dtype == np.uint8

    def test_of_a_lazy_array_too(self):
        with pytest.warns(LearnedDiffusionWarning):
            lazy = denoise(da.from_array(counts(0.5)), **SETTINGS)
        assert lazy.dtype == lazy.compute().dtype == np.uint8

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            (np.float32, np.float32),
            ("float32", np.float32),
            ("auto", np.float32),
            ("same", np.uint8),
            (np.uint8, np.uint8),
        ],
    )
    def test_who_says_what_is_wanted_is_not_warned(self, dtype, expected):
        assert denoise(counts(0.5), dtype=dtype, **SETTINGS).dtype == expected

    @pytest.mark.parametrize("dtype", ["int8", "nonsense", np.float64, 5, [1]])
    def test_other_types_are_refused(self, dtype):
        with pytest.raises(LearnedDiffusionError, match="float32"):
            denoise(counts(0.5), dtype=dtype, **SETTINGS)


class TestFiles:
    def test_a_format_of_whole_numbers_keeps_them_and_says_what_is_lost(self):
        config = for_format(CLASSIC.with_(noise=PHOTONS), "u1", FORMATS["dicom"])
        done = run(denoise_stack(counts(0.5), config))
        assert done.image.dtype == np.uint8
        assert any("rounding" in message for message in done.report.messages)

    def test_a_format_of_whole_numbers_refuses_float32(self):
        with pytest.raises(FileFormatError, match="whole numbers only"):
            for_format(DiffusionConfig(dtype="float32"), "u1", FORMATS["dicom"])

    @pytest.mark.parametrize("suffix", [".tif", ".mrc", ".nii.gz", ".ome.zarr"])
    @pytest.mark.parametrize("depth", [1, 3])
    def test_a_batch_keeps_the_mean_of_few_counts(self, tmp_path, suffix, depth):
        stack = counts(0.5, shape=(depth, 40, 48))
        unit = ("pixel",) * 3
        write(tmp_path / f"in{suffix}", Volume(stack, "ZYX", (1.0,) * 3, unit, "in"))
        config = CLASSIC.with_(noise=PHOTONS)
        sources = find_sources([str(tmp_path / f"in{suffix}")], tmp_path / "out")
        summary = run(denoise_batch(sources, BatchConfig(out=tmp_path / "out"), config))
        assert summary.count("done") == 1
        assert "float32" in summary.files[0].message
        result = read(tmp_path / "out" / f"in{suffix}", lazy=False).data
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, run(denoise_stack(stack, config)).image)
