"""A batch loses nothing: it skips what is done, resumes what isn't, and reports what fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pydicom
import pytest
import tifffile
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig, TilingConfig
from napari_learned_diffusion.core.errors import (
    DeviceError,
    FileFormatError,
    FileWriteError,
    InvalidSettingError,
    MissingDependencyError,
)
from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.files import Volume, _lazy, read, write
from napari_learned_diffusion.jobs import batch as batch_module
from napari_learned_diffusion.jobs import batch_reading, batch_sources
from napari_learned_diffusion.jobs.batch import (
    BatchConfig,
    BatchProgress,
    BatchSummary,
    FileStatus,
    denoise_batch,
)
from napari_learned_diffusion.jobs.batch_engines import (
    Certificates,
    ClusterEngine,
    ConnectionLostError,
    LocalEngine,
)
from napari_learned_diffusion.jobs.batch_manifest import Manifest
from napari_learned_diffusion.jobs.batch_reading import PlaneReader
from napari_learned_diffusion.jobs.batch_sources import VolumeSource, content_hash, find_sources
from napari_learned_diffusion.jobs.batch_state import Log, Scratch
from napari_learned_diffusion.jobs.denoise import denoise_stack
from napari_learned_diffusion.jobs.planes import read_plane
from napari_learned_diffusion.jobs.progress import run

QUICK = DiffusionConfig(model="perona-malik", noise=Gaussian(8.0), iterations=2)


def noisy(
    shape: tuple[int, ...] = (4, 24, 32), seed: int = 0, dtype: str = "int16"
) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(100, 8, shape).round().astype(dtype)


def volume(data: NDArray[Any] | None = None, **changes: Any) -> Volume:
    data = noisy() if data is None else data
    axes = "TZYX"[-data.ndim :]
    given = {"axes": axes, "scale": (1.0,) * data.ndim, "units": ("millimeter",) * data.ndim}
    return Volume(data, **{**given, "name": "a", **changes})


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of three small stacks."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        write(folder / f"{name}.mrc", volume(noisy(seed=seed)))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def denoise(
    inputs: Path | list[Path],
    out: Path,
    config: DiffusionConfig = QUICK,
    *,
    engine: Any = None,
    events: list[BatchProgress] | None = None,
    **options: Any,
) -> BatchSummary:
    given = inputs if isinstance(inputs, list) else [inputs]
    job = denoise_batch(
        find_sources(given, out), BatchConfig(out, **options), config, engine=engine
    )
    return run(job, None if events is None else events.append)


def states(summary: BatchSummary) -> dict[str, str]:
    return {file.source.name: file.state for file in summary.files}


def only(summary: BatchSummary) -> FileStatus:
    (file,) = summary.files
    return file


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in out.rglob("*") if ".part" in p.name)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what comes out -------------------------------------------------------------------------------


def test_the_results_are_those_of_one_file_at_a_time(scans: Path, out: Path) -> None:
    summary = denoise(scans, out)
    assert states(summary) == {"a.mrc": "done", "b.mrc": "done", "c.mrc": "done"}
    for path in scans.iterdir():
        expected = run(denoise_stack(read(path).data, QUICK)).image
        np.testing.assert_array_equal(read(out / path.name).data, expected)
        assert read(out / path.name).scale == read(path).scale
    assert summary.megapixels == pytest.approx(3 * 4 * 24 * 32 / 1e6)
    assert leftovers(out) == []


def test_events_tell_the_course(scans: Path, out: Path) -> None:
    events: list[BatchProgress] = []
    denoise(scans, out, events=events)
    news = [event for event in events if event.index is not None]
    first = [event.file for event in news if event.file and event.file.number == 0]
    assert [file.state for file in first] == ["running"] * 5 + ["writing", "done"]
    assert [file.planes_done for file in first] == [0, 1, 2, 3, 4, 4, 4]
    assert first[-1].noise_sigma == 8.0
    assert 0 < first[-1].removed_sigma < 8.0
    shown = [event for event in news if event.plane is not None]
    assert len(shown) == 12
    assert all(event.plane is not None and event.plane.shape == (24, 32) for event in shown)
    done = [event.done for event in events]
    assert done == sorted(done)
    assert (done[-1], events[-1].total) == (3000, 3000)


@pytest.mark.parametrize("scope", ["stack", "slice"])
def test_noise_is_estimated_as_for_one_file(tmp_path: Path, out: Path, scope: Any) -> None:
    data = np.stack([noisy((64, 64), dtype="float32") * k for k in (1, 3)])
    path = write(tmp_path / "a.tif", volume(data))
    config = DiffusionConfig(model="perona-malik", iterations=3, noise_scope=scope)
    denoise(path, out, config)
    expected = run(denoise_stack(data, config)).image
    np.testing.assert_array_equal(read(out / "a.tif").data, expected)


@pytest.mark.parametrize("lazy_above", [0, 2**40])
@pytest.mark.parametrize("plane", ["YX", "ZX", "XZ", "YZ"])
def test_any_axes_span_the_slices(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, plane: str, lazy_above: int
) -> None:
    monkeypatch.setattr(_lazy, "LAZY_ABOVE", lazy_above)
    path = write(tmp_path / "a.tif", volume(noisy((3, 5, 24, 32))))
    denoise(path, out, plane=plane)
    axes = tuple("TZYX".index(letter) for letter in plane)
    expected = run(denoise_stack(read(path).data, QUICK, plane_axes=axes)).image
    np.testing.assert_array_equal(read(out / "a.tif").data, expected)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("tiff", "a.tif"),
        ("mrc", "a.mrc"),
        ("nifti", "a.nii.gz"),
        ("zarr", "a.ome.zarr"),
        ("dicom", "a"),
    ],
)
def test_every_format_comes_out(tmp_path: Path, out: Path, format: str, name: str) -> None:
    path = write(tmp_path / "a.tif", volume())
    summary = denoise(path, out, format=format)
    assert only(summary).output == out / name
    np.testing.assert_array_equal(read(out / name).data, run(denoise_stack(noisy(), QUICK)).image)


def test_large_tiffs_become_zarr(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "_LARGE_TIFF", 100)
    assert only(denoise(write(tmp_path / "a.tif", volume()), out)).output == out / "a.ome.zarr"


def test_a_large_tiff_of_several_images_stays_a_tiff_of_as_many(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "_LARGE_TIFF", 100)
    for number, image in enumerate(noisy()[:2]):
        tifffile.imwrite(tmp_path / "a.tif", image, append=number > 0)
    assert only(denoise(tmp_path / "a.tif", out)).output == out / "a.tif"
    with tifffile.TiffFile(out / "a.tif") as tif:
        assert len(tif.series) == 2


def test_what_is_left_out_of_a_tiff_is_told(tmp_path: Path, out: Path) -> None:
    for number, image in enumerate(noisy()[:2]):
        tifffile.imwrite(tmp_path / "a.tif", image[number:], append=number > 0)
    file = only(denoise(tmp_path / "a.tif", out))
    assert "the others were left out" in file.message


def test_pixels_that_are_no_numbers_are_told(tmp_path: Path, out: Path) -> None:
    data = noisy(dtype="float32")
    data[0, 3, 3] = np.nan
    file = only(denoise(write(tmp_path / "a.tif", volume(data)), out))
    assert "1 slices: 1 NaN or infinite pixels took no part" in file.message
    np.testing.assert_array_equal(np.isnan(read(out / "a.tif").data), np.isnan(data))


def test_values_that_a_file_declares_missing_take_no_part(tmp_path: Path, out: Path) -> None:
    data = noisy()
    data[:, 3:6, 3] = 7
    source = write(tmp_path / "a.ome.zarr", volume(data, missing=(7.0,)))
    file = only(denoise(source, out))
    assert "missing by declaration pixels took no part" in file.message
    result = np.asarray(read(out / "a.ome.zarr").data)
    np.testing.assert_array_equal(result[:, 3:6, 3], 7)
    assert result[:, 2:7, 2:5].min(initial=99, where=result[:, 2:7, 2:5] != 7) > 60


@pytest.mark.parametrize("chunks", [(1, 24, 32), (3, 24, 32), (2, 10, 10), (7, 5, 32)])
@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (0, 2), (1, 0)])
@pytest.mark.parametrize("budget", [1, 5000, 2**30])
def test_planes_are_read_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
    chunks: tuple[int, ...],
    axes: tuple[int, int],
    budget: int,
) -> None:
    da = pytest.importorskip("dask.array")
    monkeypatch.setattr(batch_reading, "_BLOCK_BYTES", budget)
    data = noisy((7, 24, 32))
    reader = PlaneReader(da.from_array(data, chunks=chunks), axes)
    count = data.size // (data.shape[axes[0]] * data.shape[axes[1]])
    for number in (*range(count), 0, count - 1):
        expected = read_plane(data, reader.index(number), axes)
        np.testing.assert_array_equal(reader[number], expected)


# --- what goes in ---------------------------------------------------------------------------------


def test_files_folders_and_patterns(tmp_path: Path, scans: Path, out: Path) -> None:
    inner = scans / "deep" / "er"
    inner.mkdir(parents=True)
    write(inner / "d.tif", volume())
    write(inner / "z.ome.zarr", volume())
    write(inner / "ct", volume(), format="dicom")
    (scans / "notes.txt").write_text("no image")
    (scans / ".hidden.mrc").write_text("no image")
    names = [s.name for s in find_sources([scans], out)]
    deep = ["deep/er/ct", "deep/er/d.tif", "deep/er/z.ome.zarr"]
    assert names == ["a.mrc", "b.mrc", "c.mrc", *deep]
    assert [s.name for s in find_sources([scans / "a.mrc", scans / "[ab].mrc"], out)] == [
        "a.mrc",
        "b.mrc",
    ]
    assert [s.name for s in find_sources([inner / "ct"], out)] == ["ct"]
    assert len(find_sources([f"{tmp_path}/**/*.tif"], out)) == 1
    denoise(scans, out)
    assert (out / "deep" / "er" / "ct").is_dir()
    assert (out / "deep" / "er" / "d.tif").is_file()


def test_the_output_folder_is_passed_over(scans: Path) -> None:
    denoise(scans, scans / "out")
    assert len(find_sources([scans], scans / "out")) == 3
    assert denoise(scans, scans / "out").count("skipped") == 3


def test_inputs_that_are_not_there(tmp_path: Path, out: Path) -> None:
    with pytest.raises(FileFormatError, match="There is no file"):
        find_sources([tmp_path / "nowhere.tif"], out)
    with pytest.raises(FileFormatError, match="holds no image"):
        find_sources([tmp_path], out)


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    first = content_hash(folder)
    (folder / "a").rename(folder / "b")
    second = content_hash(folder)
    (folder / "b").write_bytes(b"2")
    assert len({first, second, content_hash(folder)}) == 3


def test_a_hash_can_be_ended_and_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_sources, "_HASHED_BYTES", 100)
    path = tmp_path / "a"
    path.write_bytes(bytes(450))
    parts: list[float] = []
    whole = content_hash(path, parts.append)
    assert parts == pytest.approx([100 / 450, 200 / 450, 300 / 450, 400 / 450, 1])
    assert content_hash(path) == whole

    def refuse(_: float) -> None:
        raise KeyboardInterrupt

    for source in (path, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            content_hash(source, refuse)


@pytest.mark.parametrize("work", ["checking its content", "writing the result"])
def test_long_reading_and_writing_is_told_and_ends_where_the_batch_is_closed(
    scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """In either, the thread is held where it tells how far it is."""
    ticker = batch_module._Run._ticker
    ended = []

    def held(self: Any, what: str) -> Callable[[float], None]:
        tick = ticker(self, what)

        def wait(part: float) -> None:
            tick(part)
            if work in what:
                self.stop.wait(60)
                ended.append(what)
                tick(part)

        return wait

    with monkeypatch.context() as patch:
        patch.setattr(batch_module._Run, "_ticker", held)
        job = denoise_batch(find_sources([scans], out), BatchConfig(out), QUICK)
        assert any(f"a.mrc: {work}, " in event.message for event in job)
        job.close()
    assert len(ended) == 1
    assert not (out / "a.mrc").exists()
    assert denoise(scans, out).count("done") == 3
    assert leftovers(out) == []


# --- arrays instead of files ----------------------------------------------------------------------


def array_source(image: Volume, name: str = "cells.tif") -> VolumeSource:
    return VolumeSource(Path(name), name, image)


def denoise_array(source: VolumeSource, out: Path, **options: Any) -> BatchSummary:
    return run(denoise_batch([source], BatchConfig(out, **options), QUICK))


def test_an_array_is_denoised_as_the_file_of_the_same_content_is(scans: Path, out: Path) -> None:
    source = array_source(volume(noisy(seed=0)))
    assert only(denoise_array(source, out)).state == "done"
    denoise(scans / "a.mrc", out)
    np.testing.assert_array_equal(read(out / "cells.tif").data, read(out / "a.mrc").data)
    assert read(out / "cells.tif").units == ("millimeter",) * 3
    assert only(denoise_array(source, out)).state == "skipped"
    other = array_source(volume(noisy(seed=1)))
    assert "allow overwriting" in only(denoise_array(other, out)).message
    assert only(denoise_array(other, out, overwrite=True)).state == "done"


def test_an_array_is_known_by_its_pixels_and_what_they_mean() -> None:
    lazy = da.from_array(noisy(), chunks=(2, 24, 32))
    images = (volume(), volume(lazy), volume(scale=(2.0,) * 3), volume(noisy(seed=1)))
    same, lazily, *others = (array_source(image).content_hash() for image in images)
    assert same == lazily
    assert len({same, *others}) == 3


def test_a_lazy_array_is_not_written_over_its_own_file(tmp_path: Path) -> None:
    path = write(tmp_path / "cells.tif", volume())
    before = path.read_bytes()
    source = array_source(read(path, lazy=True))
    assert "over its input" in only(denoise_array(source, tmp_path, overwrite=True)).message
    assert path.read_bytes() == before


def test_settings_that_contradict(out: Path, scans: Path) -> None:
    with pytest.raises(InvalidSettingError, match="no format 'png'"):
        BatchConfig(out, format="png")
    with pytest.raises(InvalidSettingError, match="for TIFF"):
        BatchConfig(out, format="mrc", compression="zstd")


# --- again ----------------------------------------------------------------------------------------


def test_what_is_done_is_skipped(scans: Path, out: Path) -> None:
    denoise(scans, out)
    before = contents(out)
    summary = denoise(scans, out)
    assert summary.count("skipped") == 3
    assert contents(out).items() >= {k: v for k, v in before.items() if k[-1] == "c"}.items()
    (scans / "a.mrc").touch()  # another time, but the same content
    assert denoise(scans, out).count("skipped") == 3


def test_what_has_changed_is_done_again_with_leave(scans: Path, out: Path) -> None:
    denoise(scans, out)
    write(scans / "a.mrc", volume(noisy(seed=9)), overwrite=True)
    before = (out / "a.mrc").read_bytes()
    summary = denoise(scans, out)
    assert states(summary) == {"a.mrc": "failed", "b.mrc": "skipped", "c.mrc": "skipped"}
    assert "allow overwriting" in summary.files[0].message
    assert (out / "a.mrc").read_bytes() == before
    assert denoise(scans, out, overwrite=True).count("done") == 3
    assert (out / "a.mrc").read_bytes() != before
    other = QUICK.with_(iterations=3)
    assert denoise(scans, out, other, overwrite=True).count("done") == 3
    elsewhere = other.with_(device="cpu")
    assert denoise(scans, out, elsewhere).count("skipped") == 3


def test_a_refusal_does_not_forget_what_is_done(scans: Path, out: Path) -> None:
    denoise(scans, out)
    assert denoise(scans, out, QUICK.with_(iterations=3)).count("failed") == 3
    assert denoise(scans, out).count("skipped") == 3


def test_only_what_failed_is_tried_again(scans: Path, out: Path) -> None:
    whole = (scans / "b.mrc").read_bytes()
    (scans / "b.mrc").write_bytes(whole[:1500])
    assert states(denoise(scans, out))["b.mrc"] == "failed"
    (scans / "b.mrc").write_bytes(whole)
    write(scans / "d.mrc", volume(noisy(seed=5)))
    summary = denoise(scans, out, only_failed=True)
    assert states(summary) == dict.fromkeys(["a.mrc", "c.mrc", "d.mrc"], "skipped") | {
        "b.mrc": "done"
    }


def test_a_batch_that_was_closed_goes_on(scans: Path, out: Path) -> None:
    job = denoise_batch(find_sources([scans], out), BatchConfig(out), QUICK)
    for event in job:
        if isinstance(event, BatchProgress) and event.file and event.file.planes_done == 2:
            break
    job.close()
    assert "a.mrc.part" in leftovers(out)
    assert not (out / "a.mrc").exists()
    assert log_of(out)[-1]["event"] == "stopped"
    denoise(scans, out)
    begun = [line for line in log_of(out) if line["event"] == "begun" and line["file"] == "a.mrc"]
    assert [line["resumed"] >= 2 for line in begun] == [False, True]
    expected = run(denoise_stack(read(scans / "a.mrc").data, QUICK)).image
    np.testing.assert_array_equal(read(out / "a.mrc").data, expected)
    assert leftovers(out) == []


class Gatherer(LocalEngine):
    """Hands planes over only when all that were begun are done, the latest first."""

    slots = 6

    def wait(self, futures: Any, seconds: float) -> list[Any]:
        done = [future for future in futures if future.done()]
        return done[::-1] if len(done) == len(futures) else super().wait([], 0.01)


def test_a_slice_is_told_of_before_anything_later_is_kept(scans: Path, out: Path) -> None:
    """Also where the slices of a whole file come at once from a busy engine."""
    files = find_sources([scans], out)
    course = []
    for event in denoise_batch(files, BatchConfig(out), QUICK, engine=Gatherer(TilingConfig())):
        assert isinstance(event, BatchProgress)
        if event.file and event.plane is not None:
            file = event.file
            course.append((file.number, file.planes_done))
            marks = np.fromfile(out / f"{file.source.name}.part" / "done", np.uint64)
            assert np.count_nonzero(marks) == file.planes_done
            assert not (out / file.source.name).exists()
    assert course == [(number, done) for number in range(3) for done in range(1, 5)]


def test_planes_of_other_settings_are_not_taken(scans: Path, out: Path) -> None:
    job = denoise_batch(find_sources([scans], out), BatchConfig(out), QUICK)
    while "a.mrc.part" not in leftovers(out):
        next(job)
    job.close()
    other = QUICK.with_(iterations=4)
    denoise(scans, out, other)
    expected = run(denoise_stack(read(scans / "a.mrc").data, other)).image
    np.testing.assert_array_equal(read(out / "a.mrc").data, expected)


def test_two_batches_do_not_share_a_folder(scans: Path, out: Path) -> None:
    out.mkdir()
    with (
        Log(out),
        pytest.raises(FileWriteError, match="Another batch"),
    ):
        denoise(scans, out)
    assert denoise(scans, out).count("done") == 3


def test_a_foreign_manifest_is_kept_under_another_name(scans: Path, out: Path) -> None:
    out.mkdir()
    (out / "batch.json").write_text("mine")
    summary = denoise(scans, out)
    assert summary.count("done") == 3
    assert "batch.json.damaged" in summary.notes[0]
    assert (out / "batch.json.damaged").read_text() == "mine"


# --- faults ---------------------------------------------------------------------------------------


def break_truncated(folder: Path) -> None:
    (folder / "b.mrc").write_bytes((folder / "b.mrc").read_bytes()[:1500])


def break_magic(folder: Path) -> None:
    (folder / "b.mrc").write_bytes(b"no image" * 1000)


def break_empty(folder: Path) -> None:
    (folder / "b.mrc").write_bytes(b"")


@pytest.mark.parametrize("harm", [break_truncated, break_magic, break_empty])
def test_a_bad_file_does_not_stop_the_others(
    scans: Path, out: Path, harm: Callable[[Path], None]
) -> None:
    harm(scans)
    before = contents(scans)
    summary = denoise(scans, out)
    assert states(summary) == {"a.mrc": "done", "b.mrc": "failed", "c.mrc": "done"}
    assert "b.mrc" in summary.files[1].message
    assert [line["file"] for line in log_of(out) if line["event"] == "failed"] == ["b.mrc"]
    assert contents(scans) == before
    assert leftovers(out) == []


def test_a_slice_that_turns_out_bad(tmp_path: Path, out: Path) -> None:
    folder = write(tmp_path / "ct", volume(), format="dicom")
    last = sorted(folder.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-200])
    write(tmp_path / "ok.mrc", volume())
    summary = denoise([folder, tmp_path / "ok.mrc"], out)
    assert states(summary) == {"ct": "failed", "ok.mrc": "done"}
    assert last.name in summary.files[0].message
    assert leftovers(out) == []


def test_slices_of_mixed_shapes(tmp_path: Path, out: Path) -> None:
    folder = write(tmp_path / "ct", volume(), format="dicom")
    other = write(tmp_path / "other", volume(noisy((1, 8, 8))), format="dicom")
    series = pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID
    dataset = pydicom.dcmread(next(other.iterdir()))
    dataset.SeriesInstanceUID = series
    dataset.save_as(folder / "odd.dcm")
    assert "into a folder of its own" in only(denoise(folder, out)).message


def test_colour_is_refused(tmp_path: Path, out: Path) -> None:
    data = np.zeros((8, 9, 3), np.uint8)
    path = write(
        tmp_path / "a.tif", volume(data, axes="YXS", units=("pixel",) * 3, scale=(1.0,) * 3)
    )
    assert "colour" in only(denoise(path, out)).message


def test_inputs_are_never_written_over(scans: Path) -> None:
    before = contents(scans)
    summary = denoise(scans / "a.mrc", scans, overwrite=True)
    assert "over its input" in only(summary).message
    assert {k: v for k, v in contents(scans).items() if k in before} == before


def test_what_was_there_is_not_overwritten(scans: Path, out: Path) -> None:
    out.mkdir()
    (out / "a.mrc").write_bytes(b"mine")
    assert states(denoise(scans, out))["a.mrc"] == "failed"
    assert (out / "a.mrc").read_bytes() == b"mine"
    assert states(denoise(scans, out, overwrite=True))["a.mrc"] == "done"


def test_two_inputs_with_one_output(tmp_path: Path, out: Path) -> None:
    write(tmp_path / "a.mrc", volume())
    write(tmp_path / "a.nii", volume(noisy(seed=3)))
    summary = denoise([tmp_path / "a.mrc", tmp_path / "a.nii"], out, format="zarr")
    assert states(summary) == {"a.mrc": "failed", "a.nii": "failed"}
    assert all("would both be written" in file.message for file in summary.files)
    assert sorted(path.name for path in out.iterdir()) == ["batch.json", "batch.jsonl"]


def refuse(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("place", ["plane", "result"])
def test_a_full_disk(scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    before = contents(scans)
    with monkeypatch.context() as patch:
        if place == "plane":
            patch.setattr(Scratch, "write", refuse(errno.ENOSPC))
        else:
            patch.setattr(batch_module, "write", refuse(errno.ENOSPC))
        summary = denoise(scans, out)
    assert summary.count("failed") == 3
    assert all("disk is full" in file.message for file in summary.files)
    assert not list(out.glob("*.mrc"))
    assert contents(scans) == before
    assert denoise(scans, out).count("done") == 3
    if place == "result":  # no slice was computed twice
        resumed = [line["resumed"] for line in log_of(out) if line["event"] == "begun"]
        assert resumed == [0, 0, 0, 4, 4, 4]
    assert leftovers(out) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_computed(
    scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(scans)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "too little free space" in denoise(scans, out).files[0].message
    assert leftovers(out) == []


def test_a_manifest_that_cannot_be_written(
    scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manifest, "_append", refuse(errno.ENOSPC))
    summary = denoise(scans, out)
    assert summary.count("failed") == 3


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_output_folder_that_cannot_be_written(
    scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", refuse(code))
    with pytest.raises(FileWriteError, match="Check that the folder exists"):
        denoise(scans, out)


def test_an_output_folder_that_is_a_file(scans: Path, out: Path) -> None:
    out.write_text("a file")
    with pytest.raises(FileWriteError, match="can't be written"):
        denoise(scans, out)


def test_an_error_of_the_solver_is_reported(
    scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> Iterator[int]:
        raise RuntimeError("the model's shapes don't fit")
        yield 0

    monkeypatch.setattr("napari_learned_diffusion.jobs.plane_solver.PlaneSolver.solve", break_down)
    summary = denoise(scans, out)
    assert summary.count("failed") == 3
    assert "shapes don't fit" in summary.files[0].message


KILLED = """
import os, sys
from pathlib import Path
from napari_learned_diffusion.jobs import batch
from napari_learned_diffusion.jobs.batch import BatchConfig, denoise_batch
from napari_learned_diffusion.jobs.batch_sources import find_sources
from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.noise import Gaussian
folder, out, moment = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), 9)

def at_b(before, after, function):
    def watched(*given, **named):
        before() if out / "b.mrc" in given else None
        function(*given, **named)
        after() if out / "b.mrc" in given else None
    return watched

if moment == "rename":
    batch.move_into_place = at_b(die, die, batch.move_into_place)
elif moment == "renamed":
    batch.move_into_place = at_b(lambda: None, die, batch.move_into_place)
elif moment == "recorded":
    batch.Scratch.remove = die
elif moment == "made":
    batch.Scratch.open = die
config = DiffusionConfig(model="perona-malik", noise=Gaussian(8.0), iterations=2)
for event in denoise_batch(find_sources([folder], out), BatchConfig(out), config):
    if moment == "slice" and event.file and event.file.number == 1 and event.file.planes_done == 2:
        die()
"""


@pytest.mark.parametrize("moment", ["slice", "rename", "renamed"])
def test_a_batch_that_was_killed_goes_on(scans: Path, out: Path, moment: str) -> None:
    before = contents(scans)
    done = subprocess.run([sys.executable, "-c", KILLED, scans, out, moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert contents(scans) == before
    assert (out / "b.mrc").exists() == (moment == "renamed")
    again = states(denoise(scans, out))
    # The first one's result may not have been written yet, as slices of the second were kept.
    assert again.pop("a.mrc") in (("skipped", "done") if moment == "slice" else ("skipped",))
    assert again == {"b.mrc": "done", "c.mrc": "done"}
    resumed = {line["file"]: line["resumed"] for line in log_of(out) if line["event"] == "begun"}
    assert resumed["b.mrc"] >= (2 if moment == "slice" else 4)
    assert resumed["a.mrc"] in (0, 4)  # in its first run, or where only the writing was left
    for path in scans.iterdir():
        expected = run(denoise_stack(read(path).data, QUICK)).image
        np.testing.assert_array_equal(read(out / path.name).data, expected)
    assert leftovers(out) == []


# --- cluster --------------------------------------------------------------------------------------

LEARNED = DiffusionConfig(model="unet", noise=Gaussian(8.0), iterations=2)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two processes, as ``--workers 2`` starts them, but without the page that shows them."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None
    ) as found:
        yield found


def on(cluster: Any, config: DiffusionConfig) -> ClusterEngine:
    return ClusterEngine(config, TilingConfig(), scheduler=cluster.scheduler_address)


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_gives_the_same_to_the_bit_and_survives_its_workers(
    cluster: Any, scans: Path, out: Path, tmp_path: Path
) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have
    try:
        denoise(scans, tmp_path / "one", LEARNED)
    finally:
        torch.set_num_threads(threads)
    victims = [worker.process.pid for worker in cluster.workers.values()]
    events: list[BatchProgress] = []

    def kill_one(progress: Any) -> None:
        events.append(progress)
        if victims and sum(e.plane is not None for e in events) == 3:
            os.kill(victims.pop(), signal.SIGKILL)
            victims.clear()

    job = denoise_batch(
        find_sources([scans], out), BatchConfig(out), LEARNED, engine=on(cluster, LEARNED)
    )
    summary = run(job, kill_one)
    assert summary.count("done") == 3
    assert victims == []
    for path in scans.iterdir():
        np.testing.assert_array_equal(
            read(out / path.name).data, read(tmp_path / "one" / path.name).data
        )


@pytest.mark.filterwarnings("ignore")
def test_a_client_of_a_cluster_that_was_killed_goes_on(
    cluster: Any, scans: Path, out: Path
) -> None:
    address = cluster.scheduler_address
    code = KILLED.replace("BatchConfig(out), config)", "BatchConfig(out), config, engine=engine)")
    code = code.replace(
        "for event in",
        "from napari_learned_diffusion.config import TilingConfig\n"
        "from napari_learned_diffusion.jobs.batch_engines import ClusterEngine\n"
        f"engine = ClusterEngine(config, TilingConfig(), scheduler={address!r})\nfor event in",
    )
    done = subprocess.run([sys.executable, "-c", code, scans, out, "slice"], check=False)
    assert done.returncode == -signal.SIGKILL
    summary = denoise(scans, out, engine=on(cluster, QUICK))
    assert summary.count("failed") == 0
    assert set(contents(out)) >= {"a.mrc", "b.mrc", "c.mrc"}
    assert leftovers(out) == []
    begun = [line for line in log_of(out) if line["event"] == "begun" and line["file"] == "b.mrc"]
    assert begun[-1]["resumed"] >= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("planes", [0, 3])
def test_a_scheduler_that_dies_is_told_and_the_batch_goes_on_later(
    cluster: Any, scans: Path, out: Path, planes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def die(progress: Any) -> None:
        if progress.file and progress.file.planes_done == planes:
            cluster.close()

    job = denoise_batch(
        find_sources([scans], out), BatchConfig(out), QUICK, engine=on(cluster, QUICK)
    )
    with pytest.raises(ConnectionLostError, match=r"scheduler is lost\. What is done is kept"):
        run(job, die)
    assert "Traceback" not in capfd.readouterr().err
    assert log_of(out)[-1]["event"] == "stopped"
    assert denoise(scans, out).count("done") == 3
    begun = [line for line in log_of(out) if line["event"] == "begun"]
    assert max(line["resumed"] for line in begun) >= planes
    assert leftovers(out) == []


def hear_from(host: str, port: int, context: ssl.SSLContext | None) -> bytes:
    """What a server says to somebody who connects without or with a certificate of his own."""
    with socket.create_connection((host, port), timeout=30) as plain:
        if context is None:
            plain.sendall(b"hello, who is there? " * 10)
            return plain.recv(1000)
        with context.wrap_socket(plain) as encrypted:
            encrypted.sendall(b"hello")
            return encrypted.recv(1000)


@pytest.mark.filterwarnings("ignore")
def test_workers_take_only_connections_with_their_own_certificate(tmp_path: Path) -> None:
    """Who reaches the port of a scheduler could run any code."""
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("cryptography")
    from napari_learned_diffusion.jobs import batch_cluster

    stranger = distributed.Security.temporary()
    pem = tmp_path / "stranger.pem"
    pem.write_text(stranger.tls_client_key + stranger.tls_client_cert)
    anonymous, signed = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))
    for context in (anonymous, signed):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    signed.load_cert_chain(pem)
    with batch_cluster.quiet(), batch_cluster.start(1) as started:
        assert started.scheduler_address.startswith("tls://127.0.0.1:")
        for address in (started.scheduler_address, *started.scheduler_info["workers"]):
            host, port = address.removeprefix("tls://").split(":")
            for context in (anonymous, signed):
                with pytest.raises(OSError, match=r"alert|reset|EOF"):
                    hear_from(host, int(port), context)
            with suppress(ConnectionResetError):
                assert len(hear_from(host, int(port), None)) < 10  # an alert of TLS, or nothing
        with batch_cluster.connect(started, 60) as client:
            assert client.submit(sum, (1, 2)).result() == 3


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_of_tls_by_certificates_in_files(
    scans: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("cryptography")
    security = distributed.Security.temporary()
    ca, cert, key = (tmp_path / f"{name}.pem" for name in ("ca", "cert", "key"))
    ca.write_text(security.tls_ca_file)
    cert.write_text(security.tls_client_cert)
    key.write_text(security.tls_client_key)
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        memory_limit=0,
        dashboard_address=None,
        protocol="tls",
        security=security,
    ) as found:
        address = found.scheduler_address
        with monkeypatch.context() as patch:
            patch.setattr("napari_learned_diffusion.jobs.batch_engines._CONNECT_SECONDS", 1)
            with pytest.raises(DeviceError, match="that the certificates are those"):
                ClusterEngine(QUICK, TilingConfig(), scheduler=address)
        engine = ClusterEngine(
            QUICK,
            TilingConfig(),
            scheduler=address,
            certificates=Certificates(ca, cert, key),
        )
        assert denoise(scans / "a.mrc", out, engine=engine).count("done") == 1


def test_certificates_that_fit_nothing(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(InvalidSettingError, match="There is no file"):
        Certificates(tmp_path / "ca.pem", tmp_path / "cert.pem")
    there = tmp_path / "there.pem"
    there.touch()
    with pytest.raises(InvalidSettingError, match="begins with tls://"):
        ClusterEngine(
            QUICK,
            TilingConfig(),
            scheduler="tcp://127.0.0.1:9",
            certificates=Certificates(there, there),
        )
    with pytest.raises(DeviceError, match="that the certificates are those"):
        ClusterEngine(
            QUICK,
            TilingConfig(),
            scheduler="tls://127.0.0.1:9",
            certificates=Certificates(there, there),
        )


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "ftp://a:1", "tcp://a:b"])
def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("napari_learned_diffusion.jobs.batch_engines._CONNECT_SECONDS", 0.5)
    with pytest.raises(DeviceError, match="no scheduler of dask"):
        ClusterEngine(QUICK, TilingConfig(), scheduler=address)


@pytest.mark.parametrize("library", ["distributed", "cryptography"])
def test_clusters_name_their_extra(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=r"diffusion\[cluster\]"):
        ClusterEngine(QUICK, TilingConfig(), workers=2)


def test_the_local_engine_stops_within_a_step(scans: Path, out: Path) -> None:
    long = QUICK.with_(iterations=100_000)
    job = denoise_batch(
        find_sources([scans], out), BatchConfig(out), long, engine=LocalEngine(TilingConfig())
    )
    for _ in range(8):
        next(job)
    start = time.monotonic()
    job.close()
    assert time.monotonic() - start < 5
