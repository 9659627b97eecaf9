"""Sizes, ratios, ages and tables for people."""

from __future__ import annotations

import pytest

from cachefs.cli import output


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (1288490189, "1.2 GiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert output.size(number) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0%"), (0.5, "50%"), (0.987, "98.7%"), (0.99999, ">99.9%"), (1.0, "100%")]
)
def test_ratios(value: float | None, text: str) -> None:
    assert output.ratio(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (42.9, "42s"), (60, "1m"), (3 * 3600 + 720, "3h 12m"), (446400, "5d 4h")]
)
def test_ages(seconds: float, text: str) -> None:
    assert output.elapsed(seconds) == text


def test_tables() -> None:
    assert output.table([["NAME", "N"], ["a", "100"], ["long", "1"]], right=(1,)) == [
        "NAME    N",
        "a     100",
        "long    1",
    ]
    assert output.table([]) == []


def test_names_cannot_move_the_cursor() -> None:
    assert output.plain("a\x1b[2J\nb\udcff") == "a\\x1b[2J\\nb\\udcff"
    assert output.plain("größe/日本") == "größe/日本"
    output.plain("\udcff").encode("utf-8")
