"""What mount(8), fstab and -o say, and how the mount helper reads it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cli.load import load_config
from cachefs.cli.mount_helper import parse_arguments
from cachefs.cli.mount_options import merged_environment, parse_words, read_env_file, split_options
from cachefs.config import GIB, MIB
from cachefs.errors import ConfigError, UsageError


def test_settings_in_all_spellings() -> None:
    words = parse_words(["cache_size=50GiB,shm-size=64MiB", "allow_other,no-anonymous,noforeground_x=1"], sloppy=True)
    assert words.settings == {
        "cache_size_bytes": "50GiB",
        "shm_size_bytes": "64MiB",
        "allow_other": "true",
        "anonymous": "false",
    }
    assert words.unknown == ["noforeground_x"]
    words.settings["runtime_dir"] = "/r"
    config = load_config(words.settings, {"HOME": "/"})
    assert (config.cache.cache_size_bytes, config.cache.shm_size_bytes) == (50 * GIB, 64 * MIB)
    assert config.fuse.allow_other


def test_words_of_mount_8() -> None:
    text = (
        "defaults,noauto,user,_netdev,nofail,x-systemd.requires=a.service,X-mount.mkdir,noexec,noatime,noexec,suid,dev"
    )
    words = parse_words([text + ",env-file=/e,nonempty,config=/c.toml,remount,user_id=0,group_id=0"])
    assert words.settings == {}
    assert words.flags == ["noexec", "noatime"]
    assert (words.env_file, words.nonempty, words.config_file, words.remount) == ("/e", True, "/c.toml", True)


def test_a_configuration_file_is_named_whole() -> None:
    with pytest.raises(ConfigError, match=r"-o config=c\.toml: must be an absolute path"):
        parse_words(["config=c.toml"])


@pytest.mark.parametrize(
    ("text", "expected"), [("ro", False), ("rw", True), ("rw,ro", False), ("ro,rw", True), ("", False)]
)
def test_the_last_of_ro_and_rw_counts(text: str, expected: bool) -> None:
    assert parse_words([text]).wants_rw is expected


@pytest.mark.parametrize("text", ["cache_sise=1", "source=s3://x", "foreground", "noprofile", "helper", "no", "=x"])
def test_unknown_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown mount option"):
        parse_words([text])
    assert parse_words([text], sloppy=True).unknown


def test_value_is_required_for_what_is_no_flag() -> None:
    with pytest.raises(ConfigError, match="-o uid: needs a value"):
        parse_words(["uid"])


@given(st.lists(st.text(st.characters(exclude_characters="\\ \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0"), min_size=1)))
def test_commas_in_values_can_be_escaped(values: list[str]) -> None:
    values = [value for value in values if value.strip() == value]
    assert split_options(",".join(value.replace(",", "\\,") for value in values)) == values


# -- env-file --------------------------------------------------------------------------------------


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "x.env"
    path.write_text('# keys\n\nA=1\n  B = two words  \nexport C=\'q="x"\'\nD=\nE="\n; other comment\n')
    path.chmod(0o600)
    return path


def test_env_file_goes_over_the_environment(env_file: Path) -> None:
    assert read_env_file(str(env_file)) == {"A": "1", "B": "two words", "C": 'q="x"', "D": "", "E": '"'}
    words = parse_words([f"env_file={env_file}"])
    assert merged_environment({"A": "0", "Z": "z"}, words)["A"] == "1"
    assert merged_environment({"A": "0", "Z": "z"}, words)["Z"] == "z"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_env_file_that_others_may_touch_is_refused(env_file: Path, mode: int) -> None:
    env_file.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_env_file(str(env_file))


def test_env_file_that_cannot_be_used(env_file: Path, tmp_path: Path) -> None:
    env_file.write_text("A=1\nSECRET_WITHOUT_NAME\n")
    with pytest.raises(ConfigError, match="line 2: must look like KEY=VALUE") as caught:
        read_env_file(str(env_file))
    assert "SECRET" not in str(caught.value)
    env_file.write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_env_file(str(env_file))
    env_file.write_bytes(b"A=\0\n")
    with pytest.raises(ConfigError, match="KEY=VALUE lines"):
        read_env_file(str(env_file))
    with pytest.raises(ConfigError, match="No such file"):
        read_env_file(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="absolute"):
        read_env_file("x.env")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="is not a file"):
        read_env_file(str(tmp_path / "fifo"))


# -- the helper's arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["s3://b", "/m", "-o", "ro,x"],
        ["-o", "ro,x", "s3://b", "/m"],
        ["s3://b", "/m", "-oro,x"],
        ["s3://b", "/m", "-t", "fuse.cachefs", "-o", "ro,x"],
    ],
)
def test_arguments_in_every_order(arguments: list[str]) -> None:
    called = parse_arguments(arguments)
    assert (called.source, called.mountpoint, called.options) == ("s3://b", "/m", ("ro,x",))


def test_switches() -> None:
    assert parse_arguments(["s3://b", "/m", "-sn", "-v"]).switches == {"s", "n", "v"}


@pytest.mark.parametrize(
    "arguments",
    [[], ["s3://b"], ["a", "b", "c"], ["a", "b", "-o"], ["a", "b", "-x"], ["a", "b", "-N", "/proc/1/ns/mnt"]],
)
def test_wrong_calls(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(arguments)
