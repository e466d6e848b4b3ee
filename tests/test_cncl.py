"""Content-Noise Complementary Learning: its size, its losses, and that its training step learns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the source distribution holds no benchmarks", allow_module_level=True)
if str(ROOT) not in sys.path:  # `pytest` doesn't add the current folder, `python -m pytest` does
    sys.path.insert(0, str(ROOT))

from benchmarks import cncl  # noqa: E402
from benchmarks.cncl import Discriminator, Generator, Parts, Trainer  # noqa: E402

WIDTHS = (4, 8, 12)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks as small as these lose more time between threads than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch() -> tuple[Tensor, Tensor]:
    """Standardised checkerboards, clean and with noise."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    clean = ((y // 8 + x // 8) % 2 * 2.0 - 1).expand(2, 1, 32, 32)
    return clean, clean + 0.5 * torch.randn(clean.shape)


def test_content_and_noise_have_the_shape_of_the_image() -> None:
    found = Generator(WIDTHS)(torch.randn(2, 1, 24, 40))
    assert found.content.shape == found.noise.shape == (2, 1, 24, 40)


def test_the_fusion_weighs_the_two_estimates_of_the_content() -> None:
    generator, y = Generator(WIDTHS), batch()[1]
    with torch.no_grad():
        for weights, expected in (
            ([1.0, 0.0], generator.content(y)),
            ([0.0, 1.0], y - generator(y).noise),
        ):
            fusion = {"weight": torch.tensor(weights).view(1, 2, 1, 1), "bias": torch.zeros(1)}
            generator.fusion.load_state_dict(fusion)
            torch.testing.assert_close(generator(y).content, expected)


def test_the_discriminator_judges_by_patches() -> None:
    discriminator = Discriminator((4, 8, 8, 8))
    parts = Parts(*torch.randn(2, 2, 1, 64, 48))
    assert discriminator(parts, parts.content).shape == (2, 1, 4, 3)


def test_size_and_work_are_near_the_published() -> None:
    networks = cncl.count()
    parameters = sum(network.parameters for network in networks)
    assert parameters == 46_589_765
    assert parameters == pytest.approx(cncl.PUBLISHED.parameters, rel=0.03)
    operations = sum(network.multiply_accumulates for network in networks)
    assert operations == pytest.approx(74.254e9, rel=1e-5)
    assert operations == pytest.approx(cncl.PUBLISHED.multiply_accumulates, rel=0.04)


def test_losses() -> None:
    clean, noisy = batch()
    true = Parts(clean, noisy - clean)
    ones, zeros = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert cncl.generator_loss(true, true, ones) == 0
    assert cncl.generator_loss(true, true, zeros) == 1
    shifted = Parts(true.content + 0.5, true.noise - 0.25)
    assert cncl.generator_loss(shifted, true, ones).item() == pytest.approx(100 * 0.75 / 2)
    assert cncl.discriminator_loss(ones, zeros) == 0
    assert cncl.discriminator_loss(zeros, ones) == 1
    assert cncl.discriminator_loss(ones, ones) == 0.5


def test_a_step_reduces_both_losses() -> None:
    clean, noisy = batch()
    generator, discriminator = Generator(WIDTHS), Discriminator((4, 8))
    true = Parts(clean, noisy - clean)

    def losses(shown: Parts | None = None) -> tuple[float, float]:
        with torch.no_grad():
            found = shown or generator(noisy)
            of_found, of_true = discriminator(found, noisy), discriminator(true, noisy)
            return (
                cncl.generator_loss(found, true, of_found).item(),
                cncl.discriminator_loss(of_true, of_found).item(),
            )

    with torch.no_grad():
        shown = generator(noisy)
    before = losses()
    told = Trainer(generator, discriminator, learning_rate=1e-3).step(clean, noisy)
    assert told == pytest.approx(before)
    assert losses()[0] < 0.999 * before[0]
    assert losses(shown)[1] < 0.999 * before[1]


def test_the_discriminator_learns_what_is_true() -> None:
    clean, noisy = batch()
    discriminator, true = Discriminator((4, 8)), Parts(clean, noisy - clean)
    with torch.no_grad():
        found = Generator(WIDTHS)(noisy)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=2e-2)
    for _ in range(40):
        optimiser.zero_grad()
        of_true, of_found = discriminator(true, noisy), discriminator(found, noisy)
        torch.autograd.backward(cncl.discriminator_loss(of_true, of_found))
        optimiser.step()
    with torch.no_grad():
        assert discriminator(true, noisy).mean() > 0.8
        assert discriminator(found, noisy).mean() < 0.2


def test_the_table_has_a_row_for_each_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert cncl.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| together | 46.59 | 74.25 |"
    assert lines[-1] == "| published | 47.83 | 76.81 |"
