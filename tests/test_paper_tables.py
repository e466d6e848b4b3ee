"""The scripts behind docs/paper.md, on generated images and a tiny scale."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from skimage.io import imsave
from torch import nn

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the source distribution holds no benchmarks", allow_module_level=True)
if str(ROOT) not in sys.path:  # `pytest` doesn't add the current folder, `python -m pytest` does
    sys.path.insert(0, str(ROOT))

from benchmarks import _common, cost, figures, paper_tables, quality  # noqa: E402

from napari_learned_diffusion.core.diffusivity import REGISTRY  # noqa: E402
from napari_learned_diffusion.core.zoo import card  # noqa: E402

MODELS = ("perona-malik", "foe-monomials")


def picture(height: int, width: int) -> NDArray[np.float64]:
    """Smooth structure with edges, 40-215."""
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 4) ** 2
    return 100 + 55 * np.sin(x / 40) * np.cos(y / 30) + 55 * disc


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts set the threads of the whole process, which other tests run in.

    Small images gain nothing by a second thread, and on a busy machine they wait for it.
    """
    monkeypatch.setattr(quality, "set_threads", lambda n: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as the benchmarks expect it, with the image of a crop and all stacks."""
    folder = tmp_path / "bsds500" / "val"
    folder.mkdir(parents=True)
    grey = picture(321, 481).astype(np.uint8)
    imsave(folder / f"{_common.val_crops(1)[0].image}.jpg", np.stack([grey] * 3, axis=-1))
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    for stack in paper_tables.STACKS:
        volume = np.stack([picture(64, 96)] * 3) * 10 - 500
        tifffile.imwrite(
            stacks / f"{stack.name}.tif", volume.astype(np.int16), photometric="minisblack"
        )
    return tmp_path


class TestTables:
    def test_run(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = tmp_path / "figures" / "tables.json"
        arguments = ["--data", str(data), "--crops", "1", "--slices", "1", "--processes", "1"]
        assert paper_tables.main([*arguments, "--json", str(target), "--models", *MODELS]) == 0

        printed = capsys.readouterr().out
        assert f"python -m benchmarks.paper_tables --data {data} --crops 1" in printed
        assert "as it must be" in printed
        assert "| **cncl** | not trained |" in printed
        assert "47.83 M | 76.81 |" in printed
        assert "it takes 100 crops" in printed
        # As Markdown needs it: all rows of a table have as many cells as its header.
        for table in printed.split("\n\n"):
            rows = [line for line in table.splitlines() if line.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1

        tables = json.loads(target.read_text(), parse_constant=pytest.fail)  # no NaN
        first, second, third = (tables[f"table{i}"] for i in (1, 2, 3))
        for key in MODELS:
            for level in ("15", "25", "50"):
                assert first[key][level]["psnr"] > first["input"][level]["psnr"] + 3
            for kind in ("val", "CT", "MRI", "EM"):
                assert second[key][kind]["q"] > second["input"][kind]["q"]
            assert third[key]["ours"]["parameters"] == card(key).parameters
        assert first["foe-splines"] == "not measured"
        assert first["foe-monomials"]["15"]["published_psnr"] == 29.14
        if tables["lpips"].startswith("absent"):
            assert first["perona-malik"]["15"]["lpips"] is None

    def test_the_models_of_the_paper_are_measured_unless_told_otherwise(self) -> None:
        expected = {k for k in paper_tables.PAPER["models"] if k in REGISTRY}
        assert set(paper_tables.parse(["--data", "."]).models) == expected

    def test_every_published_figure_is_there(self) -> None:
        levels = {str(level) for level in quality.NOISE_LEVELS}
        for key, model in paper_tables.PAPER["models"].items():
            if key != "cncl":
                assert set(model["psnr"]) == set(model["ssim"]) == levels
        assert levels < set(paper_tables.PAPER["q_of_input"])

    def test_what_is_below_the_published_is_named(self) -> None:
        def measured(method: str, psnr: float) -> list[paper_tables.Measured]:
            return [
                paper_tables.Measured(method, "val", i, level, 1.0, 50.0, psnr, 0.9)
                for i in range(100)
                for level in quality.NOISE_LEVELS
            ]

        found = measured("input", 20) + measured("unet", 27)
        assert paper_tables.against_published(found, ["unet"]).endswith("unet psnr at 15.")
        found = measured("input", 20) + measured("unet", 30)
        assert paper_tables.against_published(found, ["unet"]).endswith("no cell.")

    def test_q_is_held_against_perona_malik(self) -> None:
        found = [
            paper_tables.Measured(method, kind, 0, 25, q, 50.0)
            for kind in ("CT", "MRI", "EM")
            for method, q in (("perona-malik", 10.0), ("unet", 9.0 if kind == "EM" else 11.0))
        ]
        assert paper_tables.q_below_classical(found, ["perona-malik", "unet"]) == ["unet on EM"]
        assert paper_tables.q_below_classical(found, ["unet"]) == []

    def test_slices_are_bytes_of_the_centre(self, data: Path) -> None:
        slices = paper_tables.stack_slices(data / "stacks", 2)
        assert [kind for kind, _, _ in slices] == [
            s.kind for s in paper_tables.STACKS for _ in "ab"
        ]
        assert len({number for _, number, _ in slices}) == len(slices)
        assert all(s.shape == (64, 96) and s.min() == 0 and s.max() == 255 for _, _, s in slices)

    @pytest.mark.parametrize(
        "wrong", [["--crops", "0"], ["--crops", "501"], ["--slices", "0"], ["--models", "cncl"]]
    )
    def test_refuses(self, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            paper_tables.parse(["--data", ".", *wrong])
        assert "error" in capsys.readouterr().err


class TestCost:
    def test_of_convolutions_by_hand(self) -> None:
        x = torch.zeros(1, 4, 10, 12)
        full = nn.Conv2d(4, 6, 3, padding=1)
        by_channel = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        assert cost.multiply_accumulates(full, x) == 4 * 6 * 9 * 120
        assert cost.multiply_accumulates(by_channel, x) == 4 * 25 * 120
        assert cost.multiply_accumulates(nn.Linear(7, 5), torch.zeros(1, 7)) == 35

    def test_elementwise_operations_count_nothing(self) -> None:
        assert cost.multiply_accumulates(torch.sigmoid, torch.zeros(10)) == 0

    def test_of_fields_of_experts_by_hand(self) -> None:
        plane = picture(64, 64)
        found = cost.cost_of("foe-splines", plane, 25)
        experts, _, rows, columns = figures.experts_model("foe-splines").kernels.shape
        assert found.per_iteration == 2 * experts * rows * columns * 64 * 64
        assert found.once == 0
        assert found.total(10) == 10 * found.per_iteration


class TestFigures:
    def test_writes_small_pictures(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        figures.main([str(tmp_path), "--only", "curves", "monomials"])
        sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
        assert set(sizes) == {"paper-curves.png", "paper-monomials.png"}
        assert all(5_000 < size < figures.LARGEST for size in sizes.values())
