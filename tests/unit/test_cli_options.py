"""Settings as people write them: sizes, times, modes, choices, and the options on a command."""

from __future__ import annotations

import math
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cli.options import (
    CONFIG_PARAMETER,
    SETTINGS,
    Setting,
    config_options,
    find_setting,
    parse,
    parse_duration,
    parse_octal,
    parse_size,
    parse_typed,
    render,
)
from cachefs.config import GIB, KIB, MIB, Addressing, PeerConfig
from cachefs.types import Consistency
from tests.support.settings import TEXT, values


def setting(name: str) -> Setting:
    found = find_setting(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("17B", 17),
        ("64KiB", 64 * KIB),
        ("64kib", 64 * KIB),
        ("64k", 64 * KIB),
        ("50GiB", 50 * GIB),
        ("50 GiB", 50 * GIB),
        (" 2g ", 2 * GIB),
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 3 * GIB // 2),
        ("3kB", 3000),
        ("2TiB", 2048 * GIB),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, number: int) -> None:
    assert parse_size(text) == number


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.5", "0.3B", "1e9", "5 G B", "GiB", "1GiBs", "１GiB", "9" * 30, "1..5GiB", "0x10"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("60s", 60),
        ("5m", 300),
        ("1h", 3600),
        ("7d", 604800),
        ("90", 90),
        ("1.5s", 1.5),
        ("0", 0),
        ("forever", math.inf),
        ("Forever ", math.inf),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-5s", "soon", "5 minutes", "inf", "nan", "1e3", "5M5"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "mode"), [("0444", 0o444), ("444", 0o444), ("0o755", 0o755), ("0", 0)])
def test_modes(text: str, mode: int) -> None:
    assert parse_octal(text) == mode


@pytest.mark.parametrize("text", ["", "0488", "rw-r--r--", "-1", "00000444", "0x1ff"])
def test_what_is_no_mode(text: str) -> None:
    with pytest.raises(ValueError, match="octal mode"):
        parse_octal(text)


def test_choices_and_flags() -> None:
    assert parse(setting("consistency"), "Strict") is Consistency.STRICT
    with pytest.raises(ValueError, match="immutable, ttl, strict"):
        parse(setting("consistency"), "eventual")
    assert [parse(setting("read-only"), word) for word in ("yes", "On", "1", "true")] == [True] * 4
    assert [parse(setting("read-only"), word) for word in ("no", "OFF", "0", "false")] == [False] * 4
    with pytest.raises(ValueError, match="neither true nor false"):
        parse(setting("read-only"), "maybe")


@pytest.mark.parametrize("each", SETTINGS, ids=lambda s: s.field)
@given(draw=st.data())
def test_what_is_written_reads_back(each: Setting, draw: st.DataObject) -> None:
    value = draw.draw(values(each))
    assert parse(each, render(each, value)) == value


@pytest.mark.parametrize("each", SETTINGS, ids=lambda s: s.field)
@given(text=st.text(max_size=30))
def test_any_text_is_read_or_refused_by_value_error(each: Setting, text: str) -> None:
    try:
        value = parse(each, text)
    except ValueError:
        return
    assert parse(each, render(each, value)) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("cache-size", 5, 5),
        ("cache-size", "5MiB", 5 * MIB),
        ("metadata-ttl", 60, 60.0),
        ("metadata-ttl", 0.5, 0.5),
        ("metadata-ttl", math.inf, math.inf),
        ("allow-other", True, True),
        ("allow-other", "yes", True),
        ("file-mode", "0640", 0o640),
        ("addressing", "path", Addressing.PATH),
        ("region", "eu-west-1", "eu-west-1"),
    ],
)
def test_typed_values_of_a_file(name: str, value: object, expected: object) -> None:
    read = parse_typed(setting(name), value)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache-size", True),
        ("cache-size", 1.5),
        ("allow-other", 1),
        ("file-mode", 444),
        ("region", 7),
        ("region", ["a"]),
        ("consistency", 1),
        ("metadata-ttl", math.nan),
        ("metadata-ttl", {}),
    ],
)
def test_wrong_types_of_a_file(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_typed(setting(name), value)


def test_names_are_found_in_every_spelling() -> None:
    names = ("cache-size", "cache_size", "cache_size_bytes", "cache-size-bytes")
    assert {find_setting(name) for name in names} == {setting("cache-size")}
    assert find_setting("cache size") is None


# -- on a command -----------------------------------------------------------------------------------------------------


def run(*arguments: str, sections: tuple[str, ...] = ()) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @config_options(*sections)
    def command(**options: Any) -> None:
        seen.update(options)

    outcome = CliRunner().invoke(command, arguments, standalone_mode=False)
    if outcome.exception:
        raise outcome.exception
    return seen


def test_what_is_not_typed_is_none() -> None:
    options = run()
    assert set(options) == {s.field for s in SETTINGS if s.option} | {CONFIG_PARAMETER}
    assert set(options.values()) == {None}


def test_typed_options() -> None:
    options = run(
        "--cache-size", "5GiB", "--metadata-ttl=forever", "--no-read-only", "--allow-other", "--config", "f.toml"
    )
    given = {name: value for name, value in options.items() if value is not None}
    assert given == {
        "cache_size_bytes": 5 * GIB,
        "metadata_ttl_s": math.inf,
        "read_only": False,
        "allow_other": True,
        CONFIG_PARAMETER: "f.toml",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--path-style"], Addressing.PATH),
        (["--virtual-host-style"], Addressing.VIRTUAL),
        (["--addressing", "auto"], Addressing.AUTO),
        (["--path-style", "--virtual-host-style"], Addressing.VIRTUAL),
    ],
)
def test_addressing(arguments: list[str], expected: Addressing) -> None:
    assert run(*arguments)["addressing"] == expected


@pytest.mark.parametrize("each", [s for s in SETTINGS if s.option and not s.is_flag], ids=lambda s: s.field)
@given(draw=st.data())
def test_every_option_takes_every_value(each: Setting, draw: st.DataObject) -> None:
    value = draw.draw(values(each))
    assert run(f"--{each.key}={render(each, value)}")[each.field] == value


def test_what_may_be_repeated_is_one_text_with_commas() -> None:
    assert run("--etcd", "http://a:1", "--etcd=http://b:2,http://c:3")["etcd"] == "http://a:1,http://b:2,http://c:3"
    setting = find_setting("etcd")
    assert setting is not None
    assert parse_typed(setting, ["http://a:1", "http://b:2"]) == "http://a:1,http://b:2"
    with pytest.raises(ValueError, match="a list cannot be used here"):
        parse_typed(setting, ["http://a:1", 2])
    assert PeerConfig(etcd=" http://a:1, ,http://b:2,").etcd_endpoints == ("http://a:1", "http://b:2")


def test_sections_limit_the_options() -> None:
    assert {s.section for s in SETTINGS if s.field in run(sections=("cache", "log"))} == {"cache", "log"}


def test_a_wrong_value_names_its_option() -> None:
    with pytest.raises(click.BadParameter, match="'5 apples' is not a size") as caught:
        run("--shm-size", "5 apples")
    assert "--shm-size" in caught.value.format_message()


@given(TEXT)
def test_a_wrong_option_is_no_traceback(text: str) -> None:
    with pytest.raises(click.ClickException):
        run(f"--no-such-{text}")
