"""The authors of the paper that the models are from are named rightly, wherever they are named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("src", "docs", "README.md", "CHANGELOG.md", "CITATION.cff", "examples", "benchmarks")
SUFFIXES = {".py", ".md", ".json", ".yaml", ".yml", ".toml", ".cff", ".bib", ".txt", ".ipynb"}

FIRST_NAMES = {"Valdivia": ("Joel", "J."), "Haas": ("Manuel", "M."), "Effland": ("Alexander", "A.")}

_BEFORE = re.compile(r"([\w.]+)[\s~]+(Valdivia|Haas|Effland)\b")
_INITIALS = re.compile(r"[A-Z]\.")


def _texts() -> Iterator[tuple[Path, str]]:
    for place in PLACES:
        path = ROOT / place
        files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
        for file in files:
            if file.suffix in SUFFIXES and "site" not in file.parts:
                # On one line, without what strings and comments break it by.
                lines = file.read_text("utf-8").splitlines()
                yield file, " ".join(line.strip(" \t#\"'\\") for line in lines)


def _wrong(text: str) -> list[str]:
    """What stands before a surname and isn't its first name, unless it is no name at all."""
    found = []
    for before, surname in _BEFORE.findall(text):
        is_name = _INITIALS.fullmatch(before) or (before.istitle() and before not in ("The", "And"))
        if is_name and before not in FIRST_NAMES[surname]:
            found.append(f"{before} {surname}")
    found += re.findall(
        r"Ortega,? (?:\w\.,? )?(?!M\. Haas|Manuel Haas|Haas|and|& )\w+\.? Haas", text
    )
    return found


def test_what_is_wrong_is_found() -> None:
    right = "J. Valdivia Ortega, M. Haas, A. Effland; Joel Valdivia Ortega, Manuel Haas and Effland"
    assert _wrong(right) == []
    assert _wrong("of Valdivia Ortega, Haas and Effland (2024)") == []
    assert _wrong("E. Valdivia Ortega, A. Haas, A. Effland")
    assert _wrong("S. Valdivia Ortega, M. Haas, A. Effland")
    assert _wrong("J. Valdivia Ortega, A. Haas")
    assert _wrong("M. Haas, S. Effland")


def test_nowhere_do_they_have_other_first_names() -> None:
    wrong = {str(file.relative_to(ROOT)): _wrong(text) for file, text in _texts()}
    assert {file: found for file, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    "place",
    ["README.md", "docs/paper.md", "src/napari_learned_diffusion/weights/unet.json"],
)
def test_they_are_named_with_their_initials_where_the_paper_is_cited(place: str) -> None:
    if not (ROOT / place).exists():
        pytest.skip("the documentation isn't there")
    assert "J. Valdivia Ortega, M. Haas, A. Effland" in dict(_texts())[ROOT / place]
