"""The configuration: plain values and back, and what every setting must have."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.cli.options import SETTINGS, Setting
from cachefs.config import (
    Addressing,
    Config,
    Engine,
    MetadataConfig,
    S3Config,
    as_plain,
    from_plain,
    split_address,
    split_endpoint,
)
from tests.support.settings import configs


@given(configs())
def test_plain_values_rebuild_the_configuration(config: Config) -> None:
    assert from_plain(Config, json.loads(json.dumps(as_plain(config)))) == config


def test_plain_values_are_json_without_infinity() -> None:
    plain = as_plain(MetadataConfig(metadata_ttl_s=math.inf))
    assert plain["metadata_ttl_s"] == "forever"
    json.dumps(plain, allow_nan=False)


def test_from_plain_fills_missing_fields_with_defaults() -> None:
    assert from_plain(S3Config, {"addressing": "path"}) == S3Config(addressing=Addressing.PATH)


def test_from_plain_refuses_values_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="warp"):
        from_plain(Config, {"fuse": {"engine": "warp"}})
    assert Engine("channel") is Engine.CHANNEL


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.field)
def test_every_setting_is_described(setting: Setting) -> None:
    assert setting.help[-1] in ".)", "help is a sentence"
    assert (
        setting.metavar or setting.is_flag or dataclasses.is_dataclass(setting.kind) or setting.kind not in (str, int)
    )
    assert {"_bytes": "bytes", "_s": "duration"}.get(_suffix(setting.field), setting.unit) == setting.unit


def _suffix(name: str) -> str:
    return next((suffix for suffix in ("_bytes", "_s") if name.endswith(suffix)), "")


def test_keys_and_variables_are_unique() -> None:
    for names in ([s.key for s in SETTINGS], [s.variable for s in SETTINGS], [s.field for s in SETTINGS]):
        assert len(set(names)) == len(names)


def test_sections_are_immutable() -> None:
    config: Any = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.s3.region = "elsewhere"


@given(st.data())
def test_every_section_rebuilds_on_its_own(draw: st.DataObject) -> None:
    config = draw.draw(configs())
    for field in dataclasses.fields(Config):
        section = getattr(config, field.name)
        assert from_plain(type(section), as_plain(section)) == section


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 0)),
        ("node-1.example:7000", ("node-1.example", 7000)),
        ("[fd00::1]:7000", ("fd00::1", 7000)),
        ("[fd00::1]", ("fd00::1", 0)),
        ("fe80::1%eth0", ("fe80::1%eth0", 0)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["", ":1", "a:b", "a:65536", "a:-1", "1:2:3", "[::1]x", "[]:1", "a b", "a/b:1", "a:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        split_address(text)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://etcd", (False, "etcd", 2379)),
        ("https://etcd.example:99/", (True, "etcd.example", 99)),
        ("http://[::1]:5", (False, "::1", 5)),
        ("http://[fd00:213::2]", (False, "fd00:213::2", 2379)),
        ("http://10.0.0.1:2379", (False, "10.0.0.1", 2379)),
    ],
)
def test_addresses_of_etcd(url: str, parts: tuple[bool, str, int]) -> None:
    assert split_endpoint(url) == parts


@pytest.mark.parametrize(
    "url",
    [
        "", "etcd:2379", "http://", "http://:2379", "ftp://etcd", "http://etcd:0x10", "http://etcd:99999", "http://[::1",
        "http://etcd/path", "http://etcd?x=1", "http://etcd#x", "http://fs:hunter2@etcd", "http://a b", "http://a,http://b",
    ],
)  # fmt: skip
def test_what_is_no_address_of_etcd(url: str) -> None:
    with pytest.raises(ValueError, match="must look like") as refusal:
        split_endpoint(url)
    assert "hunter2" not in str(refusal.value)
