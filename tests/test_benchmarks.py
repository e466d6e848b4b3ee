"""The benchmarks: their protocol on generated images, and each script on a tiny scale."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from skimage.io import imsave

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the source distribution holds no benchmarks", allow_module_level=True)
if str(ROOT) not in sys.path:  # `pytest` doesn't add the current folder, `python -m pytest` does
    sys.path.insert(0, str(ROOT))

from benchmarks import _common, photons, quality, real_noise, spacing, speed  # noqa: E402


@pytest.fixture(autouse=True)
def _keep_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts set the threads of the whole process, which other tests run in."""
    for script in (quality, speed):
        monkeypatch.setattr(script, "set_threads", lambda n: None)


def picture(height: int, width: int) -> NDArray[np.float64]:
    """Smooth structure with edges, 40-215."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 4) ** 2
    return 100 + 55 * np.sin(x / 40) * np.cos(y / 30) + 55 * disc


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as the benchmarks expect it, with the images of two crops and two pairs."""
    for part in ("val", "train"):
        folder = tmp_path / "bsds500" / part
        folder.mkdir(parents=True)
        for crop in _common.val_crops(2):
            grey = picture(321, 481).astype(np.uint8)
            imsave(folder / f"{crop.image}.jpg", np.stack([grey] * 3, axis=-1))

    stacks = tmp_path / "stacks"
    stacks.mkdir()
    rng = np.random.default_rng(0)
    clean = np.stack([picture(96, 96), picture(96, 96).T])
    for key, scale in (("w2s-0", 0.5), ("ct", 1.0)):
        pair = real_noise.PAIRS[key]
        noisy = scale * clean + rng.normal(0, 10, clean.shape)
        tifffile.imwrite(stacks / f"{pair.noisy}.tif", noisy.astype(np.float32))
        tifffile.imwrite(stacks / f"{pair.reference}.tif", clean.astype(np.float32))
    return tmp_path


class TestProtocol:
    def test_the_first_hundred_crops_hold_one_per_image(self) -> None:
        crops = _common.val_crops(500)
        assert [c.number for c in crops] == list(range(500))
        assert len({c.image for c in crops[:100]}) == 100
        assert all(min(c.top, c.left) >= 0 and c.top + c.left <= 65 + 225 for c in crops)

    def test_luma_is_rounded_bt601(self) -> None:
        rgb = np.array([[[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
        np.testing.assert_array_equal(_common.luma(rgb), [[255, 76, 150, 29]])

    def test_noise_is_that_of_the_seed(self) -> None:
        clean = np.full((256, 256), 7.0)
        expected = 7 + np.random.default_rng([1, 3, 25]).normal(0, 25, (256, 256))
        np.testing.assert_array_equal(_common.add_noise(clean, 3, 25), expected)

    def test_the_input_measures_what_its_noise_says(self, data: Path) -> None:
        score = quality.score(data / "bsds500" / "val", [], 0, (_common.val_crops(1)[0], 25))
        sentence, good = quality.check_input(
            [score[0]._replace(noise_sigma=s, psnr=score[0].psnr + d)
             for s, d in ((15, 4.44), (25, 0.0), (50, -6.02))]
        )  # fmt: skip
        assert good
        assert "24.61 / 20.17 / 14.15" in sentence

    def test_another_input_is_noticed(self) -> None:
        wrong = [quality.Score("input", 0, s, 24.0, 0.5, 0.0) for s in quality.NOISE_LEVELS]
        sentence, good = quality.check_input(wrong)
        assert not good
        assert "WRONG" in sentence

    def test_tuned_parameters_are_in_their_grid(self) -> None:
        for key, peer in _common.PEERS.items():
            for parameters in peer.tuned.values():
                for name, value in parameters.items():
                    assert value in peer.grid[name], (key, name)

    def test_flat_areas_are_flat(self) -> None:
        reference = np.zeros((96, 96))
        reference[20:76, 20:76] = 100
        reference[20:76, 50:76] += 5 * np.arange(26)
        flat = real_noise.flat_area(reference)
        assert flat[48, 32]
        assert set(reference[flat]) == {100.0}

    def test_where_nothing_is_flat_no_pixel_counts(self) -> None:
        ramp = np.arange(96.0)[:, None] * np.ones(96)
        assert not real_noise.flat_area(ramp).any()


class TestQuality:
    def test_runs(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        missing = dataclasses.replace(_common.PEERS["medpy"], library="no_such_library")
        monkeypatch.setitem(_common.PEERS, "medpy", missing)
        target = tmp_path / "figures" / "quality.json"
        arguments = ["--data", str(data), "--crops", "2", "--processes", "1", "--json", str(target)]
        assert quality.main([*arguments, "--methods", "perona-malik", "skimage-tv", "medpy"]) == 0

        printed = capsys.readouterr().out
        assert "as it must be" in printed
        assert f"python -m benchmarks.quality --data {data} --crops 2" in printed
        assert f"| {missing.title} | not installed |" in printed
        results = json.loads(target.read_text())["results"]
        assert results["medpy"] == "not installed"
        for level in ("15", "25", "50"):
            assert len(results["perona-malik"][level]["psnr_of_each"]) == 2
            for key in ("perona-malik", "skimage-tv"):
                assert results[key][level]["psnr"] > results["input"][level]["psnr"] + 3

    def test_tunes(self, data: Path, capsys: pytest.CaptureFixture[str],
                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        peer = dataclasses.replace(_common.PEERS["skimage-tv"], grid={"weight": (0.001, 0.8)})
        monkeypatch.setitem(_common.PEERS, "skimage-tv", peer)
        arguments = ["--data", str(data), "--processes", "1", "--tune", "--methods", "skimage-tv"]
        assert quality.main(arguments) == 0
        assert capsys.readouterr().out.count("weight 0.8") == 3

    @pytest.mark.parametrize(
        "wrong", [["--crops", "0"], ["--crops", "501"], ["--methods", "magic"]]
    )
    def test_refuses(self, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            quality.parse(["--data", ".", *wrong])
        assert "error" in capsys.readouterr().err

    def test_needs_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LEARNED_DIFFUSION_DATA", raising=False)
        with pytest.raises(SystemExit):
            quality.parse([])
        monkeypatch.setenv("LEARNED_DIFFUSION_DATA", "somewhere")
        assert quality.parse([]).data == Path("somewhere")


class TestRealNoise:
    def test_runs(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "real.json"
        arguments = ["--data", str(data), "--pairs", "w2s-0", "ct", "--json", str(target)]
        assert real_noise.main([*arguments, "--methods", "perona-malik", "skimage-nlm"]) == 0

        printed = capsys.readouterr().out
        assert "W2S channel 0" in printed
        assert "Widefield fluorescence" in printed
        results = json.loads(target.read_text())["results"]["w2s-0"]
        for key in ("perona-malik", "skimage-nlm"):
            assert len(results[key]["psnr"]) == 2
            assert np.mean(results[key]["psnr"]) > np.mean(results["input"]["psnr"]) + 3

    def test_a_peer_that_is_missing_gets_a_row(
        self, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = dataclasses.replace(_common.PEERS["bm3d"], library="no_such_library")
        monkeypatch.setitem(_common.PEERS, "bm3d", missing)
        assert real_noise.main(["--data", str(data), "--pairs", "w2s-0", "--methods", "bm3d"]) == 0
        assert "| BM3D, with estimate_sigma | not installed |" in capsys.readouterr().out


class TestPhotons:
    @pytest.mark.parametrize("detector", photons.DETECTORS)
    def test_counts_have_the_variance_of_their_noise_model(self, detector: str) -> None:
        counts = photons.counted(np.full(200_000, 3.0), detector, np.random.default_rng(0))
        assert counts.mean() == pytest.approx(3, abs=0.03)
        assert counts.var() == pytest.approx(3 * photons.DETECTORS[detector], rel=0.02)

    def test_runs(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "photons.json"
        arguments = ["--data", str(data), "--crops", "2", "--processes", "1", "--json", str(target)]
        assert photons.main([*arguments, "--methods", "perona-malik", "skimage-nlm"]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(rows) == 5
        scores = json.loads(target.read_text())["scores"]
        assert len(scores) == 2 * 2 * 3 * 3
        for detector in photons.DETECTORS:
            for peak in photons.PEAKS:
                noisy, ours, peer = (
                    _common.mean_psnr(scores, method=key, detector=detector, peak=peak)
                    for key in ("input", "perona-malik", "skimage-nlm")
                )
                assert min(ours, peer) > noisy + 5

    def test_blurred_crops_are_easier(self, data: Path, tmp_path: Path) -> None:
        means = []
        for blur in ("0", "3"):
            target = tmp_path / f"{blur}.json"
            arguments = ["--data", str(data), "--crops", "1", "--processes", "1", "--blur", blur]
            methods = ["--methods", "perona-malik"]
            assert photons.main([*arguments, "--json", str(target), *methods]) == 0
            scores = json.loads(target.read_text())["scores"]
            means.append(_common.mean_psnr(scores, method="perona-malik"))
        assert means[1] > means[0]


class TestSpacing:
    def test_counting_in_pixels_is_never_worse(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "spacing.json"
        models = ["--models", "perona-malik", "foe-splines", "--size", "96", "--noise", "25"]
        assert spacing.main([*models, "--ratios", "1", "2", "5", "--json", str(target)]) == 0
        assert "| 2 : 1 |" in capsys.readouterr().out
        scores = json.loads(target.read_text())["scores"]
        assert len(scores) == 2 * 3
        for score in scores:
            pixels, distances = np.mean(score["pairs"], axis=0)
            assert pixels >= distances


class TestSpeed:
    def test_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "speed.json"
        arguments = ["--sizes", "64", "--stack", "2", "48", "--repeats", "2", "--iterations", "2"]
        assert speed.main([*arguments, "--no-memory", "--json", str(target), "--methods",
                           "fused", "torch", "automatic"]) == 0  # fmt: skip
        assert "2 slices of 48 x 48" in capsys.readouterr().out
        results = json.loads(target.read_text())["results"]
        assert [(r["slices"], r["size"]) for r in results] == [(1, 64), (2, 48)]
        assert all(len(t) == 2 and min(t) > 0 for r in results for t in r["seconds"].values())

    def test_both_backends_do_the_same(self) -> None:
        plane = speed.noisy_slices(1, 64)[0]
        fused, plain = (
            speed.METHODS[key].diffuse(speed.METHODS[key].load(plane), 5).numpy()
            for key in ("fused", "torch")
        )
        np.testing.assert_allclose(fused, plain, atol=1e-3)
        assert fused.std() < plane.std()

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
    def test_working_memory_counts_the_result(self) -> None:
        slice_bytes = 4 * 1024**2
        assert slice_bytes <= speed.working_memory("fused", 1024, 2, 1) <= 8 * slice_bytes
