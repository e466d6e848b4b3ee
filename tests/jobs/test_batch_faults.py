"""Accidents around a batch: no result is wrong, nothing is lost, and nothing of the user's goes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from napari_learned_diffusion.config import DiffusionConfig
from napari_learned_diffusion.core.errors import FileFormatError, FileWriteError
from napari_learned_diffusion.core.noise import Gaussian
from napari_learned_diffusion.files import Volume, read, write
from napari_learned_diffusion.jobs import batch as batch_module
from napari_learned_diffusion.jobs import batch_sources
from napari_learned_diffusion.jobs.batch import (
    BatchConfig,
    BatchProgress,
    BatchSummary,
    FileStatus,
    denoise_batch,
)
from napari_learned_diffusion.jobs.batch_manifest import JOURNAL, MANIFEST, Manifest
from napari_learned_diffusion.jobs.batch_sources import (
    Source,
    VolumeSource,
    content_stamp,
    find_sources,
)
from napari_learned_diffusion.jobs.batch_state import Log, Scratch
from napari_learned_diffusion.jobs.denoise import denoise_stack
from napari_learned_diffusion.jobs.progress import run

QUICK = DiffusionConfig(model="perona-malik", noise=Gaussian(8.0), iterations=2)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")


def noisy(seed: int = 0, level: int = 100, shape: tuple[int, ...] = (4, 16, 20)) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(level, 8, shape).round().astype(np.int16)


def volume(seed: int = 0, level: int = 100, shape: tuple[int, ...] = (4, 16, 20)) -> Volume:
    data = noisy(seed, level, shape)
    return Volume(data, "ZYX"[-data.ndim :], (1.0,) * data.ndim, ("millimeter",) * data.ndim, "a")


def put(
    path: Path,
    seed: int = 0,
    level: int = 100,
    shape: tuple[int, ...] = (4, 16, 20),
    **options: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, volume(seed, level, shape), **options)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def job(inputs: Any, out: Path, config: DiffusionConfig = QUICK, **options: Any) -> Any:
    given = inputs if isinstance(inputs, list) else [inputs]
    return denoise_batch(find_sources(given, out), BatchConfig(out, **options), config)


def denoise(
    inputs: Any, out: Path, config: DiffusionConfig = QUICK, **options: Any
) -> BatchSummary:
    return run(job(inputs, out, config, **options))


def stop_after(inputs: Any, out: Path, planes: int, **options: Any) -> None:
    """Run a batch until so many slices of a file are done."""
    batch = job(inputs, out, **options)
    for event in batch:
        if isinstance(event, BatchProgress) and event.file and event.file.planes_done >= planes:
            break
    batch.close()


def only(summary: BatchSummary) -> FileStatus:
    (file,) = summary.files
    return file


def states(summary: BatchSummary) -> list[str]:
    return [file.state for file in summary.files]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def expected(path: Path, config: DiffusionConfig = QUICK) -> NDArray[Any]:
    return np.asarray(run(denoise_stack(read(path).data, config)).image)


def assert_result_of(result: Path, source: Path) -> None:
    np.testing.assert_array_equal(read(result).data, expected(source))


# --- inputs of one name ---------------------------------------------------------------------------


def assert_both_refused(summary: BatchSummary, *paths: Path) -> None:
    assert states(summary) == ["failed"] * len(paths)
    for file in summary.files:
        assert "would both be written to" in file.message
        assert "output folder" in file.message
        assert str(file.source.path) in file.message
    assert names(summary.log.parent) == ["batch.json", "batch.jsonl"]


def test_two_inputs_of_one_name_are_refused_before_anything_is_begun(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = put(tmp_path / "p" / "x.tif"), put(tmp_path / "q" / "x.tif", level=1000)
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("an input was read"))
    assert_both_refused(denoise([p, q], out), p, q)
    assert_both_refused(denoise([f"{tmp_path}/*/x.tif"], out), p, q)


def test_two_folders_of_slices_of_one_name_are_refused(tmp_path: Path, out: Path) -> None:
    folders = [tmp_path / name / "SE1" for name in ("Anna", "Bruno")]
    for seed, folder in enumerate(folders):
        put(folder, seed, format="dicom")
    assert_both_refused(denoise(folders, out), *folders)


def test_the_folder_above_keeps_inputs_of_one_name_apart(tmp_path: Path, out: Path) -> None:
    scans = tmp_path / "scans"
    p, q = put(scans / "p" / "x.tif"), put(scans / "q" / "x.tif", level=1000)
    assert states(denoise(scans, out)) == ["done", "done"]
    assert_result_of(out / "p" / "x.tif", p)
    assert_result_of(out / "q" / "x.tif", q)


@pytest.mark.parametrize("format", ["tiff", "zarr", "dicom"])
def test_names_that_become_one_by_the_format_are_refused(
    tmp_path: Path, out: Path, format: str
) -> None:
    one, two = put(tmp_path / "p" / "x.tif"), put(tmp_path / "q" / "x.mrc", level=1000)
    assert_both_refused(denoise([one, two], out, format=format), one, two)


def test_a_result_that_would_lie_in_anothers_folder_is_refused(tmp_path: Path, out: Path) -> None:
    ct = put(tmp_path / "a" / "ct", format="dicom")
    inner = put(tmp_path / "b" / "ct" / "x.tif")
    assert_both_refused(denoise([ct, tmp_path / "b"], out), ct, inner)


def test_a_large_tiff_does_not_take_the_place_of_an_ome_zarr(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "_LARGE_TIFF", 100)
    put(tmp_path / "p" / "x.tif")
    zarr = put(tmp_path / "q" / "x.ome.zarr", level=1000)
    summary = denoise([tmp_path / "p" / "x.tif", zarr], out)
    assert states(summary) == ["failed", "done"]
    assert "would both be written" in summary.files[0].message
    assert_result_of(out / "x.ome.zarr", zarr)


def test_names_that_differ_in_their_composition_alone_are_refused(
    tmp_path: Path, out: Path
) -> None:
    one = put(tmp_path / "p" / unicodedata.normalize("NFC", "Schädel.tif"))
    two = put(tmp_path / "q" / unicodedata.normalize("NFD", "Schädel.tif"), level=1000)
    assert_both_refused(denoise([one, two], out), one, two)


@pytest.mark.parametrize("caseless", [False, True])
def test_names_that_differ_in_case_alone(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, caseless: bool
) -> None:
    """They are told apart where the disk of the results tells them apart."""
    one, two = put(tmp_path / "p" / "x.tif"), put(tmp_path / "q" / "X.TIF", level=1000)
    if caseless:
        monkeypatch.setattr(Log, "_is_caseless", True)
        assert_both_refused(denoise([one, two], out), one, two)
        return
    out.mkdir()
    (out / "probe").touch()
    if (out / "PROBE").exists():
        pytest.skip("the disk doesn't tell them apart")
    assert states(denoise([one, two], out)) == ["done", "done"]
    assert_result_of(out / "x.tif", one)
    assert_result_of(out / "X.TIF", two)


@posix_only
def test_a_link_to_a_file_is_the_same_input(tmp_path: Path, out: Path) -> None:
    p = put(tmp_path / "p" / "x.tif")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "x.tif").symlink_to(p)
    assert only(denoise([f"{tmp_path}/*/x.tif"], out)).state == "done"
    assert_result_of(out / "x.tif", p)


def test_arrays_of_one_name_are_refused(tmp_path: Path, out: Path) -> None:
    sources = [VolumeSource(Path("a.tif"), "a.tif", volume(seed)) for seed in (0, 1)]
    summary = run(denoise_batch(sources, BatchConfig(out), QUICK))
    assert_both_refused(summary, *(source.path for source in sources))


def test_another_input_of_the_name_of_one_that_is_done(tmp_path: Path, out: Path) -> None:
    p, q = put(tmp_path / "p" / "x.tif"), put(tmp_path / "q" / "x.tif", level=1000)
    assert only(denoise(p, out)).state == "done"
    refused = only(denoise(q, out))
    assert (refused.state, "exists" in refused.message) == ("failed", True)
    assert only(denoise(p, out)).state == "skipped"
    assert only(denoise(q, out, overwrite=True)).state == "done"
    assert_result_of(out / "x.tif", q)
    # What the first had made isn't there any more, so it is by no means done.
    assert only(denoise(p, out)).state == "failed"
    assert only(denoise(q, out)).state == "skipped"


def test_another_input_of_the_name_of_one_that_was_interrupted(tmp_path: Path, out: Path) -> None:
    p, q = put(tmp_path / "p" / "x.tif"), put(tmp_path / "q" / "x.tif", level=1000)
    stop_after(p, out, 2)
    stop_after(q, out, 2)
    assert sum(name.endswith(".part") for name in names(out)) == 2
    assert only(denoise(q, out)).state == "done"
    assert_result_of(out / "x.tif", q)
    assert only(denoise(p, out, overwrite=True)).state == "done"
    assert_result_of(out / "x.tif", p)
    assert names(out) == ["batch.json", "batch.jsonl", "x.tif"]


def test_failing_of_one_is_not_the_failing_of_another_of_its_name(
    tmp_path: Path, out: Path
) -> None:
    p, q = tmp_path / "p" / "x.tif", put(tmp_path / "q" / "x.tif")
    p.parent.mkdir()
    p.write_bytes(b"no image")
    assert only(denoise(p, out)).state == "failed"
    assert only(denoise(q, out, only_failed=True)).state == "skipped"


def test_an_input_that_was_moved_is_still_done(tmp_path: Path, out: Path) -> None:
    p = put(tmp_path / "p" / "x.tif")
    denoise(p, out)
    shutil.move(tmp_path / "p", tmp_path / "archive")
    assert only(denoise(tmp_path / "archive" / "x.tif", out)).state == "skipped"


def test_a_result_never_takes_the_place_of_another_input(tmp_path: Path) -> None:
    """Also where the folder of the results is one of inputs, and overwriting is allowed."""
    folder = tmp_path / "scans"
    ct = put(folder / "deep" / "ct", format="dicom")
    other = put(tmp_path / "deep.mrc", level=1000)
    before = [path.read_bytes() for path in sorted(ct.iterdir())]
    summary = denoise([ct, other], folder, format="dicom", overwrite=True)
    assert states(summary)[1] == "failed"
    assert "another input" in summary.files[1].message
    assert [path.read_bytes() for path in sorted(ct.iterdir())] == before


def test_the_batchs_own_files_are_no_targets(tmp_path: Path, out: Path) -> None:
    folder = put(tmp_path / MANIFEST, format="dicom")
    assert "Rename the input" in only(denoise(folder, out)).message
    assert (out / MANIFEST).is_file()


# --- slices that get lost -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1000, None])
@pytest.mark.parametrize("plane", ["YX", "ZX"])
def test_slices_that_are_lost_from_the_scratch_are_denoised_anew(
    tmp_path: Path, out: Path, left: int | None, plane: str
) -> None:
    """By a power failure or a network disk: cut off, or holes that are read as zeros."""
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 3, plane=plane)
    pixels = out / "x.tif.part" / "pixels"
    size = pixels.stat().st_size
    os.truncate(pixels, left or 0)
    if left is None:
        os.truncate(pixels, size)
    assert only(denoise(path, out, plane=plane)).state == "done"
    axes = tuple("ZYX".index(letter) for letter in plane)
    whole = run(denoise_stack(read(path).data, QUICK, plane_axes=axes)).image
    np.testing.assert_array_equal(read(out / "x.tif").data, whole)
    assert names(out) == ["batch.json", "batch.jsonl", "x.tif"]


def test_a_slice_of_which_a_byte_has_changed_is_denoised_anew(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 3)
    pixels = out / "x.tif.part" / "pixels"
    content = bytearray(pixels.read_bytes())
    content[5] ^= 64
    pixels.write_bytes(content)
    denoise(path, out)
    assert_result_of(out / "x.tif", path)


@pytest.mark.parametrize("name", ["pixels", "done", "state.json"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_any_file_of_the_scratch_may_be_lost(
    tmp_path: Path, out: Path, name: str, harm: Callable[[Path], Any]
) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 3)
    harm(out / "x.tif.part" / name)
    assert only(denoise(path, out)).state == "done"
    assert_result_of(out / "x.tif", path)
    assert names(out) == ["batch.json", "batch.jsonl", "x.tif"]


@pytest.mark.parametrize("plane", ["YX", "ZX"])
def test_slices_that_are_lost_before_the_result_is_written_are_told(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    path = put(tmp_path / "x.tif")
    staging = Scratch.staging

    def lose(self: Scratch, name: str) -> Path:
        os.truncate(self.folder / "pixels", 1000)
        return staging(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "staging", lose)
        failed = only(denoise(path, out, plane=plane))
    assert (failed.state, "have got lost" in failed.message) == ("failed", True)
    assert not (out / "x.tif").exists()
    assert only(denoise(path, out, plane=plane)).state == "done"


def test_what_is_called_done_is_on_the_disk(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is synced before it gets its name, and has it before it is on record."""
    path = put(tmp_path / "x.tif")
    course: list[str] = []
    move, record, fsync = batch_module.move_into_place, Manifest.record, os.fsync

    def moved(*given: Any, **named: Any) -> None:
        move(*given, **named)
        course.append("moved")

    def recorded(self: Manifest, place: str, **values: Any) -> None:
        record(self, place, **values)
        course.append(values["state"])

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        course.append("sync")

    monkeypatch.setattr(batch_module, "move_into_place", moved)
    monkeypatch.setattr(Manifest, "record", recorded)
    monkeypatch.setattr(os, "fsync", synced)
    denoise(path, out)
    assert course[course.index("moved") - 2 :][:2] == ["sync", "sync"]  # the file, its folder
    assert course.index("moved") < course.index("done")
    assert course[course.index("done") - 1] == "sync"


def test_a_result_that_has_lost_its_content_is_made_again(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    denoise(path, out)
    os.truncate(out / "x.tif", 0)
    assert only(denoise(path, out)).state == "done"
    assert_result_of(out / "x.tif", path)


@pytest.mark.parametrize("key", ["tiff", "zarr", "dicom"])
def test_a_result_that_is_not_as_it_was_left_is_not_skipped(
    tmp_path: Path, out: Path, key: str
) -> None:
    path = put(tmp_path / "x.tif")
    result = only(denoise(path, out, format=key)).output
    assert result is not None
    part = result if result.is_file() else next(p for p in sorted(result.rglob("*")) if p.is_file())
    os.truncate(part, part.stat().st_size - 1)
    again = only(denoise(path, out, format=key))
    assert (again.state, "allow overwriting" in again.message) == ("failed", True)
    assert only(denoise(path, out, format=key, overwrite=True)).state == "done"
    assert only(denoise(path, out, format=key)).state == "skipped"


def test_a_result_that_is_gone_is_made_again(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    denoise(path, out)
    (out / "x.tif").unlink()
    assert only(denoise(path, out)).state == "done"


# --- inputs that change ---------------------------------------------------------------------------


def set_times(path: Path, ns: int = 1_600_000_000 * 10**9) -> None:
    os.utime(path, ns=(ns, ns))


def test_a_changed_input_of_the_same_size_and_time_is_not_skipped(
    tmp_path: Path, out: Path
) -> None:
    path = put(tmp_path / "x.tif", 0)
    set_times(path)
    denoise(path, out)
    size = path.stat().st_size
    put(path, 1, overwrite=True)
    set_times(path)
    assert path.stat().st_size == size
    assert only(denoise(path, out)).state == "failed"  # another result is in the way
    assert only(denoise(path, out, overwrite=True)).state == "done"
    assert_result_of(out / "x.tif", path)


def test_a_slice_of_a_series_that_is_replaced_by_an_older_one_is_noticed(
    tmp_path: Path, out: Path
) -> None:
    series = put(tmp_path / "ct", 0, format="dicom")
    other = put(tmp_path / "other", 1, format="dicom")
    denoise(series, out)
    name = sorted(series.iterdir())[2].name
    (series / name).write_bytes((other / name).read_bytes())
    set_times(series / name)
    assert only(denoise(series, out)).state == "failed"


def test_overwriting_computes_even_what_is_done(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    denoise(path, out)
    set_times(out / "x.tif")
    assert only(denoise(path, out, overwrite=True)).state == "done"
    assert (out / "x.tif").stat().st_mtime_ns != 1_600_000_000 * 10**9


def test_content_is_read_for_its_hash_only_where_a_file_may_have_changed(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "x.tif")
    hashed: list[Path] = []
    content_hash = batch_sources.content_hash

    def watched(path: Path, *given: Any) -> str:
        hashed.append(path)
        return content_hash(path, *given)

    monkeypatch.setattr(batch_sources, "content_hash", watched)
    monkeypatch.setattr(batch_sources, "_SETTLED_SECONDS", -1000)  # as of a file that is old
    denoise(path, out)
    assert only(denoise(path, out)).state == "skipped"
    assert len(hashed) == 1
    path.touch()
    assert only(denoise(path, out)).state == "skipped"
    assert only(denoise(path, out)).state == "skipped"
    assert len(hashed) == 2
    denoise(path, out, overwrite=True)
    assert len(hashed) == 3


def test_the_stamp_of_a_file_that_was_just_written_is_not_relied_on(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    assert not content_stamp(path).is_settled


def test_an_input_that_changes_while_it_is_denoised_is_not_called_done(
    tmp_path: Path, out: Path
) -> None:
    path, last = put(tmp_path / "x.tif", 0), None
    for event in job(path, out):
        last = event.file or last
        if event.file and event.file.planes_done == 1:
            put(path, 1, overwrite=True)
    assert last is not None
    assert (last.state, "has changed" in last.message) == ("failed", True)
    assert not (out / "x.tif").exists()
    assert only(denoise(path, out)).state == "done"
    assert_result_of(out / "x.tif", path)


# --- what isn't the batch's own -------------------------------------------------------------------


def mine(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name", [".writable", "x.tif.part/n.txt", "x.tif.part/result/n.txt", ".x.tif.part", "x.part"]
)
def test_files_of_the_user_in_the_output_folder_stay(tmp_path: Path, out: Path, name: str) -> None:
    path, kept = put(tmp_path / "x.tif"), mine(out / name)
    for options in ({}, {}, {"overwrite": True}):
        assert only(denoise(path, out, **options)).state in ("done", "skipped")
        assert kept.read_text() == "mine"
    assert_result_of(out / "x.tif", path)
    assert names(out) == sorted(["batch.json", "batch.jsonl", "x.tif", name.split("/")[0]])


def test_a_file_of_the_user_in_the_scratch_stays(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 2)
    kept = mine(out / "x.tif.part" / "notes.txt")
    assert only(denoise(path, out)).state == "done"
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("key", ["zarr", "dicom"])
def test_a_folder_that_is_no_image_is_never_replaced(
    tmp_path: Path, out: Path, key: str, overwrite: bool
) -> None:
    path = put(tmp_path / "x.tif")
    kept = mine(out / {"zarr": "x.ome.zarr", "dicom": "x"}[key] / "n.txt")
    assert only(denoise(path, out, format=key, overwrite=overwrite)).state == "failed"
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("key", ["zarr", "dicom"])
def test_other_files_in_the_folder_of_a_result_are_never_removed(
    tmp_path: Path, out: Path, key: str
) -> None:
    path = put(tmp_path / "x.tif")
    result = only(denoise(path, out, format=key)).output
    assert result is not None
    kept = mine(result / "notes.txt")
    failed = only(denoise(path, out, format=key, overwrite=True))
    assert (failed.state, "notes.txt" in failed.message) == ("failed", True)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("planes", [2, 4])
def test_a_file_that_is_put_at_the_target_after_an_interruption_stays(
    tmp_path: Path, out: Path, planes: int
) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, planes)
    (out / "x.tif").unlink(missing_ok=True)
    kept = mine(out / "x.tif")
    failed = only(denoise(path, out))
    assert (failed.state, "exists" in failed.message) == ("failed", True)
    assert kept.read_text() == "mine"
    kept.unlink()
    assert only(denoise(path, out)).state == "done"


def test_a_file_that_is_put_at_the_target_meanwhile_stays(tmp_path: Path, out: Path) -> None:
    path, last = put(tmp_path / "x.tif"), None
    for event in job(path, out):
        last = event.file or last
        if event.file and event.file.planes_done == 2 and not (out / "x.tif").exists():
            mine(out / "x.tif")
    assert last is not None
    assert last.state == "failed"
    assert (out / "x.tif").read_text() == "mine"


@posix_only
def test_links_in_the_output_folder(tmp_path: Path, out: Path) -> None:
    path, far = put(tmp_path / "x.tif"), mine(tmp_path / "far" / "y.tif", "old")
    out.mkdir()
    (out / "x.tif").symlink_to(far)
    assert "exists" in only(denoise(path, out)).message
    assert only(denoise(path, out, overwrite=True)).state == "done"
    assert (out / "x.tif").is_symlink()
    assert_result_of(far, path)
    far.unlink()
    for options in ({}, {"overwrite": True}):
        assert "which isn't there" in only(denoise(path, out, **options)).message
    assert (out / "x.tif").is_symlink()


@posix_only
def test_an_output_folder_that_is_a_link_to_nowhere(tmp_path: Path, out: Path) -> None:
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileWriteError, match="is a link to"):
        denoise(put(tmp_path / "x.tif"), out)


# --- pipes, devices, links ------------------------------------------------------------------------


KIND = "is a (named pipe|socket|device), not an image file"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # paths of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


@posix_only
@pytest.mark.parametrize("make", [make_pipe, make_device, make_socket])
@pytest.mark.parametrize("name", ["b.tif", "b.dcm", "b"])
def test_what_is_no_file_is_passed_over_in_folders_and_refused_by_itself(
    tmp_path: Path, out: Path, make: Callable[[Path], None], name: str
) -> None:
    scans = tmp_path / "scans"
    put(scans / "a.tif")
    make(scans / name)
    assert [s.name for s in find_sources([scans], out)] == ["a.tif"]
    assert [s.name for s in find_sources([f"{scans}/*"], out)] == ["a.tif"]
    with pytest.raises(FileFormatError, match=KIND):
        find_sources([scans / name], out)
    source = Source(scans / name, name)
    summary = run(denoise_batch([source], BatchConfig(out), QUICK))
    assert re.search(KIND, only(summary).message)
    with pytest.raises(FileFormatError, match=KIND):
        read(scans / name)


@posix_only
@pytest.mark.parametrize("log", ["batch.jsonl", "batch.json", "batch.journal"])
def test_a_pipe_in_place_of_the_batchs_own_files(tmp_path: Path, out: Path, log: str) -> None:
    path = put(tmp_path / "x.tif")
    out.mkdir()
    make_pipe(out / log)
    if log == "batch.jsonl":
        with pytest.raises(FileWriteError, match="device, pipe or socket"):
            denoise(path, out)
    else:
        assert only(denoise(path, out)).state == "done"
        assert (out / f"{log}.damaged").is_fifo()


@posix_only
def test_links_that_lead_in_a_circle(tmp_path: Path, out: Path) -> None:
    scans = tmp_path / "scans"
    put(scans / "a.tif")
    put(scans / "s" / "b.tif", 1)
    for name in ("l1", "l2"):
        (scans / "s" / name).symlink_to("..")
    (scans / "self.tif").symlink_to("self.tif")
    found = find_sources([scans], out)
    assert [s.name for s in found] == ["a.tif", "s/b.tif", "self.tif"]
    patterns = find_sources([f"{scans}/**/*.tif"], out)
    assert sorted(s.name for s in patterns) == ["a.tif", "b.tif", "self.tif"]
    summary = run(denoise_batch(found, BatchConfig(out), QUICK))
    assert states(summary) == ["done", "done", "failed"]
    assert "leads back to itself" in summary.files[2].message


@posix_only
def test_a_link_that_leads_nowhere_as_input(tmp_path: Path, out: Path) -> None:
    scans = tmp_path / "scans"
    put(scans / "a.tif")
    (scans / "b.tif").symlink_to("gone.tif")
    with pytest.raises(FileFormatError, match=r"is a link to gone\.tif, which isn't there"):
        find_sources([scans / "b.tif"], out)
    summary = denoise(scans, out)
    assert states(summary) == ["done", "failed"]
    assert "is a link to gone.tif, which isn't there" in summary.files[1].message
    with pytest.raises(FileFormatError, match="which isn't there"):
        read(scans / "b.tif")


def test_an_input_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "x.tif")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(batch_sources, "content_hash", refuse)
    assert "can't be read" in only(denoise(path, out)).message


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["断" * 79 + "xxxx.tif", "x" * 251 + ".tif", "a [1] {b} %s.tif"])
def test_long_and_odd_names(tmp_path: Path, out: Path, name: str) -> None:
    path = put(tmp_path / "in" / name)
    stop_after(path, out, 2)
    assert not (out / name).exists()
    assert only(denoise(path, out)).state == "done"
    assert names(out) == sorted(["batch.json", "batch.jsonl", name])
    assert only(denoise(path, out)).state == "skipped"


@pytest.mark.parametrize("name", ["scan[1]", "a*b", "q?", "[!a]"])
def test_what_is_there_as_it_is_written_is_no_pattern(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if sys.platform == "win32" and set(name) & set("*?"):
        pytest.skip("no file can be called so")
    folder = tmp_path / "scans" / name
    put(folder / "a[2].tif")
    put(tmp_path / "scans" / "other" / "a2.tif", 1)
    monkeypatch.chdir(tmp_path)
    expected_paths = {folder / "a[2].tif"}
    for given in (
        f"scans/{name}/*.tif",
        f"scans/{name}",
        f"scans/{name}/a[2].tif",
        f"{tmp_path}/s*/{name}/*.tif",
        f"**/{name}/*.tif",
    ):
        assert {s.path.resolve() for s in find_sources([given], out)} == expected_paths, given
    assert len(find_sources(["scans"], out)) == 2


def test_patterns(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a1.tif", "a2.tif", "b1.tif", "d/a3.tif", "d/e/a4.tif", ".h/a5.tif", "d/.a6.tif"):
        put(tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path)

    def found(pattern: str) -> str:
        return " ".join(sorted(s.name for s in find_sources([pattern], out)))

    assert found("in/a?.tif") == "a1.tif a2.tif"
    assert found("in/[ab]1.tif") == "a1.tif b1.tif"
    assert found("in/[!a]*.tif") == "b1.tif"
    assert found("in/*/*.tif") == "a3.tif"
    assert found("in/**/a*.tif") == "a1.tif a2.tif a3.tif a4.tif"
    assert found("**/e/*.tif") == "a4.tif"
    assert found("in/.h/*") == "a5.tif"
    for pattern in ("in/c*.tif", "nowhere/*.tif", "in/a1.tif/*"):
        with pytest.raises(FileFormatError, match="There is no file"):
            find_sources([pattern], out)


def test_results_in_a_pattern_are_no_inputs_of_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.tif")
    monkeypatch.chdir(tmp_path)
    assert states(denoise(["**/*.tif"], Path("out"))) == ["done"]
    assert states(denoise(["**/*.tif"], Path("out"))) == ["skipped"]


def test_a_users_folder_that_ends_in_part_is_searched(tmp_path: Path, out: Path) -> None:
    put(tmp_path / "in" / "left.part" / "a.tif")
    assert [s.name for s in find_sources([tmp_path / "in"], out)] == ["left.part/a.tif"]
    stop_after(tmp_path / "in", tmp_path / "in2", 2)
    with pytest.raises(FileFormatError, match="holds no image"):
        find_sources([tmp_path / "in2"], out)


# --- the manifest ---------------------------------------------------------------------------------

WHOLE = {"name": "y.tif", "source": "/y.tif", "state": "done"}
DAMAGES: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(300),
    "no text": b"\xff\xfe\x00",
    "cut off": b'{"version": 2, "files": {"x.tif": {"na',
    "a list": b"[]",
    "null": b"null",
    "no files": b'{"version": 2}',
    "files a list": b'{"version": 2, "files": []}',
    "a strange version": b'{"version": Infinity, "files": {}}',
    "deep": b'{"files":' + b"[" * 100_000,
    "a record that is none": json.dumps({"version": 2, "files": {"x.tif": 3}}).encode(),
    "a wrong field": json.dumps(
        {"version": 2, "files": {"x.tif": {"state": "done", "output": 5}}}
    ).encode(),
    "a path that leads out": json.dumps(
        {"version": 2, "files": {"x.tif": {"state": "done", "scratch": "../x"}}}
    ).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_set_aside_and_told(tmp_path: Path, out: Path, damage: str) -> None:
    path = put(tmp_path / "x.tif")
    out.mkdir()
    (out / MANIFEST).write_bytes(DAMAGES[damage])
    summary = denoise(path, out)
    assert states(summary) == ["done"]
    (note,) = summary.notes
    assert str(out / MANIFEST) in note
    assert "kept as batch.json.damaged" in note
    assert (out / "batch.json.damaged").read_bytes() == DAMAGES[damage]
    again = denoise(path, out)
    assert (states(again), again.notes) == (["skipped"], ())


def test_whole_records_of_a_damaged_manifest_are_taken_over(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    denoise(path, out)
    content = json.loads((out / MANIFEST).read_text())
    content["files"]["z.tif"] = "?"
    (out / MANIFEST).write_text(json.dumps(content))
    summary = denoise(path, out)
    assert states(summary) == ["skipped"]
    assert "1 of 2 records" in summary.notes[0]


def test_a_folder_in_place_of_the_manifest(tmp_path: Path, out: Path) -> None:
    path, kept = put(tmp_path / "x.tif"), mine(out / MANIFEST / "n.txt")
    summary = denoise(path, out)
    assert states(summary) == ["done"]
    assert "kept as batch.json.damaged" in summary.notes[0]
    assert (out / "batch.json.damaged" / "n.txt").read_text() == "mine"
    assert not kept.exists()


def test_several_damaged_manifests_are_all_kept(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    out.mkdir()
    for text in ("one", "two"):
        (out / MANIFEST).write_text(text)
        denoise(path, out, overwrite=True)
    assert (out / "batch.json.damaged").read_text() == "one"
    assert (out / "batch.json.damaged2").read_text() == "two"


def test_a_manifest_of_a_newer_version_is_left_alone(tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (out / MANIFEST).write_text('{"version": 99, "files": {}}')
    with pytest.raises(FileWriteError, match="newer version"):
        denoise(put(tmp_path / "x.tif"), out)
    assert names(out) == ["batch.json", "batch.jsonl"]


def test_slices_are_found_again_without_the_manifest(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 3)
    (out / MANIFEST).write_bytes(b"")
    denoise(path, out)
    log = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]
    assert [line["resumed"] >= 3 for line in log if line["event"] == "begun"] == [False, True]
    assert names(out) == ["batch.json", "batch.json.damaged", "batch.jsonl", "x.tif"]


def test_a_record_costs_the_same_however_many_there_are(tmp_path: Path) -> None:
    """Only what is new is written, until the batch ends."""
    manifest = Manifest(tmp_path)
    for number in range(200):
        manifest.record(f"/{number}.tif", name=f"{number}.tif", state="done")
    sizes = [(tmp_path / JOURNAL).stat().st_size]
    for _ in range(2):
        manifest.record("/0.tif", name="0.tif", state="done")
        sizes.append((tmp_path / JOURNAL).stat().st_size)
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] < 100
    assert names(tmp_path) == [JOURNAL]
    manifest.close()
    assert names(tmp_path) == [MANIFEST]
    assert len(json.loads((tmp_path / MANIFEST).read_text())["files"]) == 200
    again = Manifest(tmp_path)
    again.close()
    assert again.of("/7.tif", "7.tif")["state"] == "done"


def test_the_journal_of_a_batch_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    killed = Manifest(tmp_path)
    killed.record("/x.tif", **WHOLE | {"name": "x.tif", "source": "/x.tif"})
    killed.record("/y.tif", **WHOLE)
    kill(killed)
    with (tmp_path / JOURNAL).open("ab") as stream:
        stream.write(b'{"name": "z.tif", "sta')
    (tmp_path / ".batch.0123abcd.part.json").write_text("half")
    found = Manifest(tmp_path)
    assert found.of("/x.tif", "x.tif")["state"] == found.of("/y.tif", "y.tif")["state"] == "done"
    assert (found.of("/z.tif", "z.tif"), found.notes) == ({}, [])
    assert names(tmp_path) == [MANIFEST]


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    killed = Manifest(tmp_path)
    killed.record("/y.tif", **WHOLE)
    kill(killed)
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(b"\x00\x01\n" + whole)
    found = Manifest(tmp_path)
    assert "1 of 2 records" in found.notes[0]
    assert found.of("/y.tif", "y.tif")["state"] == "done"
    assert names(tmp_path) == [f"{JOURNAL}.damaged", MANIFEST]


def test_a_record_that_a_full_disk_has_cut_off_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest(tmp_path)
    manifest.record("/x.tif", name="x.tif", state="done")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            manifest.record("/y.tif", name="y.tif", state="failed")
    assert manifest.of("/y.tif", "y.tif") == {}
    with (tmp_path / JOURNAL).open("r+b") as stream:
        stream.truncate((tmp_path / JOURNAL).stat().st_size - 10)
    manifest.record("/z.tif", name="z.tif", state="done")
    kill(manifest)
    found = Manifest(tmp_path)
    assert found.of("/x.tif", "x.tif")["state"] == found.of("/z.tif", "z.tif")["state"] == "done"


def kill(manifest: Manifest) -> None:
    """Leave the journal as it is."""
    assert manifest._journal is not None
    manifest._journal.close()


def of_version_1(out: Path) -> dict[str, Any]:
    """Turn what a batch has left into what version 1 would have left."""
    content = json.loads((out / MANIFEST).read_text())
    for record in content["files"].values():
        for name in ("name", "scratch", "result"):
            record.pop(name, None)
        record["stamp"] = [1, 2, 3]
    (out / MANIFEST).write_text(json.dumps({"version": 1, "files": content["files"]}))
    for state in out.rglob("state.json"):
        old = json.loads(state.read_text())
        state.write_text(json.dumps({k: old[k] for k in ("fingerprint", "shape", "dtype")}))
        marks = np.fromfile(state.with_name("done"), np.uint64)
        (marks != 0).astype(np.uint8).tofile(state.with_name("done"))
    return dict(content["files"])


def test_what_version_1_has_left_is_skipped_and_resumed(tmp_path: Path, out: Path) -> None:
    done, begun = put(tmp_path / "in" / "a.tif"), put(tmp_path / "in" / "b.tif", 1)
    denoise(done, out)
    stop_after(begun, out, 3)
    assert of_version_1(out).keys() == {"a.tif", "b.tif"}
    summary = denoise(tmp_path / "in", out)
    assert states(summary) == ["skipped", "done"]
    assert summary.notes == ()
    log = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines()]
    assert [line["resumed"] >= 3 for line in log if line["event"] == "begun"][-1]
    assert_result_of(out / "b.tif", begun)
    assert names(out) == ["a.tif", "b.tif", "batch.json", "batch.jsonl"]
    assert states(denoise(tmp_path / "in", out)) == ["skipped", "skipped"]


def test_slices_that_version_1_has_lost_are_denoised_anew(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 3)
    of_version_1(out)
    pixels = out / "x.tif.part" / "pixels"
    size = pixels.stat().st_size
    os.truncate(pixels, 0)
    os.truncate(pixels, size)
    denoise(path, out)
    assert_result_of(out / "x.tif", path)


def test_slices_of_version_1_with_other_settings_are_removed(tmp_path: Path, out: Path) -> None:
    path = put(tmp_path / "x.tif")
    stop_after(path, out, 3)
    of_version_1(out)
    other = QUICK.with_(iterations=3)
    denoise(path, out, other)
    np.testing.assert_array_equal(read(out / "x.tif").data, expected(path, other))
    assert names(out) == ["batch.json", "batch.jsonl", "x.tif"]


# --- killed at any moment -------------------------------------------------------------------------


class Killed(BaseException):
    """In place of the signal: from then on nothing touches the disk."""


class Killer:
    """Kills the program before a certain one of the steps that touch the disk."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: int) -> None:
        self.moment, self.steps = moment, 0
        for owner, name in (
            (os, "fsync"),
            (os, "link"),
            (shutil, "rmtree"),
            (shutil, "copyfile"),
            (Scratch, "write"),
            *((Path, name) for name in ["mkdir", "touch", "unlink", "rename", "replace", "rmdir"]),
        ):
            patch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.steps += 1
            if self.steps >= self.moment:
                raise Killed
            return step(*given, **named)

        return call


@pytest.mark.parametrize(("key", "stride"), [("tiff", 1), ("zarr", 4)])
def test_nothing_is_left_of_a_batch_that_is_killed_at_any_moment(
    tmp_path: Path, out: Path, key: str, stride: int
) -> None:
    """Before steps that touch the disk; the next run ends as if nothing had happened."""
    path = put(tmp_path / "x.tif", shape=(2, 8, 10))
    name = {"tiff": "x.tif", "zarr": "x.ome.zarr"}[key]
    whole, ended, moment = expected(path), False, 0
    while not ended:
        moment += stride
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, moment)
            try:
                denoise(path, out, format=key)
                ended = killer.steps < moment
            except Killed:
                pass
        again = denoise(path, out, format=key)
        assert states(again) in (["done"], ["skipped"]), (moment, only(again).message)
        assert again.notes == ()
        np.testing.assert_array_equal(read(out / name).data, whole)
        assert names(out) == sorted(["batch.json", "batch.jsonl", name]), moment
        shutil.rmtree(out)
    assert moment > 20
