"""Names and sentences of strangers, made fit to be shown on a line."""

from __future__ import annotations

import pytest

from napari_learned_diffusion.core.text import one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cells", "cells"),
        ("a\nb\r\n\tc", "a b c"),
        ("\x1b[31mred\x07", "[31mred"),
        ("gpj\u202efit.exe", "gpjfit.exe"),
        ("\u2066a\u2069\ufeff\u200b", "a"),
        ("زيت 细胞 🧬", "زيت 细胞 🧬"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("bytes \udcff\udcfe", "bytes ��"),
        ("", ""),
    ],
)
def test_what_can_not_be_seen_is_left_out(text: str, shown: str) -> None:
    assert one_line(text) == shown
    one_line(text).encode()  # it can be printed


def test_of_a_long_text_both_ends_are_seen() -> None:
    text = "beginning" + "x" * 10**6 + "end"
    short = one_line(text, 40)
    assert len(short) == 40
    assert short.startswith("beginning")
    assert short.endswith("end")
    assert one_line("x" * 40, 40) == "x" * 40
