"""Loading: which source wins, what the file may say, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from cachefs import runtime
from cachefs.cli import room
from cachefs.cli.load import PEER_FILES, build_config, load_config, validate
from cachefs.cli.options import SETTINGS, render
from cachefs.config import GIB, KIB, MIB, Addressing, Config, Engine, LogFormat, LowLatency
from cachefs.errors import ConfigError, UsageError
from cachefs.types import Consistency
from tests.support.settings import configs

NOTHING: dict[str, str] = {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cachefs.toml"


@pytest.fixture(autouse=True)
def _a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine of the tests can spare is not what they are about."""
    monkeypatch.setattr(room, "tmpfs_bytes", lambda _: 64 * GIB)
    monkeypatch.setattr(room, "memory_bytes", lambda: (64 * GIB, "this machine"))
    monkeypatch.setattr(room, "disk_room_bytes", lambda _: 64 * GIB)


def refused(options: dict[str, object], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(options, environment or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- which source wins ------------------------------------------------------------------------------------------------


def test_defaults_are_valid_and_complete() -> None:
    config = load_config({}, {"HOME": "/home/u"})
    expected = dataclasses.replace(
        Config().cache,
        cache_dir=runtime.default_cache_dir(os.geteuid(), "/home/u"),
        runtime_dir=runtime.default_runtime_dir(os.geteuid(), ""),
    )
    assert config == Config(cache=expected)


def test_option_over_variable_over_file_over_aws_variable(file: Path) -> None:
    file.write_text('region = "from-file"\n')
    environment = {"AWS_REGION": "from-aws", "CACHEFS_REGION": "from-variable"}
    assert load_config({"region": "typed"}, environment, str(file)).s3.region == "typed"
    assert load_config({"region": None}, environment, str(file)).s3.region == "from-variable"
    del environment["CACHEFS_REGION"]
    assert load_config({}, environment, str(file)).s3.region == "from-file"
    assert load_config({}, environment).s3.region == "from-aws"
    assert load_config({}, {"AWS_DEFAULT_REGION": "second", "AWS_REGION": ""}).s3.region == "second"


def test_other_aws_variables(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("")
    environment = {
        "AWS_ENDPOINT_URL": "http://general:1",
        "AWS_ENDPOINT_URL_S3": "http://special:2",
        "AWS_PROFILE": "work",
        "AWS_CA_BUNDLE": str(bundle),
    }
    s3 = load_config({}, environment).s3
    assert (s3.endpoint_url, s3.profile, s3.ca_bundle) == ("http://special:2", "work", str(bundle))
    assert load_config({}, {"AWS_ENDPOINT_URL": "http://general:1"}).s3.endpoint_url == "http://general:1"
    # of other tools, so no contradiction that anybody typed
    assert load_config({"anonymous": True}, environment).s3.profile == ""


def test_an_empty_variable_clears_a_text_and_leaves_the_rest(file: Path) -> None:
    file.write_text('profile = "work"\ncache-size = "1GiB"\n')
    config = load_config({}, {"CACHEFS_PROFILE": "", "CACHEFS_CACHE_SIZE": ""}, str(file))
    assert (config.s3.profile, config.cache.cache_size_bytes) == ("", GIB)


def test_variables_of_others_are_left_alone() -> None:
    # a Kubernetes service called cachefs puts these into every container
    load_config({}, {"CACHEFS_PORT": "tcp://10.0.0.1:80", "CACHEFS_SERVICE_HOST": "10.0.0.1", "CACHEFS_DEBUG": "1"})


def test_options_may_be_text_as_mount_options_are() -> None:
    config = load_config({"cache-size": "5GiB", "allow_other": "true", "metadata_ttl_s": "forever"}, NOTHING)
    assert (config.cache.cache_size_bytes, config.fuse.allow_other, config.metadata.metadata_ttl_s) == (
        5 * GIB,
        True,
        math.inf,
    )
    assert "--cache-size: 'much' is not a size" in refused({"cache-size": "much"})
    assert "unknown option 'cash-size'; did you mean 'cache-size'?" in refused({"cash-size": "1"})


def test_the_config_file_may_be_named_by_variable(file: Path) -> None:
    file.write_text('engine = "pyfuse3"\n')
    assert load_config({}, {"CACHEFS_CONFIG": str(file)}).fuse.engine is Engine.PYFUSE3
    other = file.with_name("other.toml")
    other.write_text("")
    assert load_config({}, {"CACHEFS_CONFIG": str(file)}, str(other)).fuse.engine is Engine.CHANNEL


def absolute(config: Config) -> Config:
    """Give the paths the form that loading gives them."""
    cache, log = config.cache, config.log

    def place(path: str) -> str:
        return os.path.abspath(path) if path else path

    files: dict[str, Any] = {name: place(getattr(config.peer, name)) for name in PEER_FILES}
    return dataclasses.replace(
        config,
        s3=dataclasses.replace(config.s3, ca_bundle=place(config.s3.ca_bundle)),
        cache=dataclasses.replace(
            cache,
            cache_dir=place(cache.cache_dir or "c"),
            runtime_dir=place(cache.runtime_dir or "r"),
            shm_dir=place(cache.shm_dir or "s"),
        ),
        peer=dataclasses.replace(config.peer, **files),
        log=dataclasses.replace(log, log_file=place(log.log_file)),
    )


@given(configs())
def test_every_setting_passes_through_variables(config: Config) -> None:
    config = absolute(config)
    environment = {s.variable: render(s, getattr(getattr(config, s.section), s.field)) for s in SETTINGS}
    assert build_config({}, environment) == config


@given(configs())
def test_every_setting_passes_through_options(config: Config) -> None:
    config = absolute(config)
    options = {s.field: getattr(getattr(config, s.section), s.field) for s in SETTINGS}
    assert build_config(options, NOTHING) == config


@given(configs())
def test_every_setting_passes_through_a_file(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    config = absolute(config)
    text = "".join(
        f"{s.key} = {json.dumps(render(s, getattr(getattr(config, s.section), s.field)), ensure_ascii=False)}\n"
        for s in SETTINGS
    )
    path = tmp_path_factory.getbasetemp() / "every.toml"
    path.write_text(text.replace("\x7f", "\\u007f"), encoding="utf-8")
    assert build_config({}, NOTHING, str(path)) == config


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'region = "x"\n\ncash-size = "1GiB"\n',
            "cachefs.toml, line 3: unknown key 'cash-size'; did you mean 'cache-size'?",
        ),
        ("[cache]\nsize = 1\n", "cachefs.toml, line 1: unknown table 'cache'"),
        ('# a comment\ncache_size = "1 apple"\n', "cachefs.toml, line 2: cache_size: '1 apple' is not a size"),
        ("file-mode = 444\n", 'line 1: file-mode: write the mode as a string, such as file-mode = "0444"'),
        ('cache-size = "1GiB"\ncache_size_bytes = 5\n', "line 2: 'cache_size_bytes' is set twice"),
        ("region = [1]\n", "line 1: region: a list cannot be used here"),
        ("region = \n", "cachefs.toml: Invalid value"),
    ],
)
def test_what_a_file_may_not_say(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config({}, NOTHING, str(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"region = '\xff'\n")
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (2 * MIB))
    for path, says in (
        (file, "UTF-8"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (big, "larger than 1MiB"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_config({}, NOTHING, str(path))


# -- directories ------------------------------------------------------------------------------------------------------


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config({"cache_dir": "c/../d", "runtime_dir": "~/r", "log_file": "x.log"}, {"HOME": "/home/u"})
    assert config.cache.cache_dir == f"{tmp_path}/d"
    assert config.cache.runtime_dir == "/home/u/r"
    assert config.log.log_file == f"{tmp_path}/x.log"


def test_users_have_directories_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    cache = load_config({}, {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/4711"}).cache
    assert (cache.cache_dir, cache.runtime_dir) == ("/home/u/.cache/cachefs", "/run/user/4711/cachefs")
    assert load_config({}, NOTHING).cache.runtime_dir == "/tmp/cachefs-4711"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size_bytes": 3 * MIB}, "--block-size 3MiB: must be a power of two from 64KiB to 16MiB"),
        ({"block_size_bytes": 32 * KIB}, "--block-size 32KiB"),
        ({"block_size_bytes": 32 * MIB}, "--block-size 32MiB"),
        ({"block_size_bytes": 0}, "--block-size 0"),
        ({"memory_limit_bytes": 127 * MIB}, "--memory-limit 127MiB: must be at least 128MiB with blocks of 1MiB"),
        (
            {"memory_limit_bytes": 200 * MIB, "block_size_bytes": 16 * MIB},
            "--memory-limit 200MiB: must be at least 224MiB with blocks of 16MiB",
        ),
        ({"cache_size_bytes": 1}, "--cache-size 1: must be at least 16MiB"),
        (
            {"shm_size_bytes": 64 * MIB, "block_size_bytes": 16 * MIB},
            "--shm-size 64MiB: must be at least 256MiB (16 blocks)",
        ),
        ({"cache_size_bytes": -1}, "--cache-size -1"),
        ({"metadata_ttl_s": -1.0}, "--metadata-ttl -1: a time cannot be negative"),
        ({"metadata_ttl_s": math.nan}, "--metadata-ttl nan"),
        ({"io_timeout_s": math.inf}, "--io-timeout forever: must end at some time"),
        ({"connect_timeout_s": 0.0}, "--connect-timeout 0: must be more than 0"),
        ({"hang_timeout_s": 1.0}, "--hang-timeout 1s: must be at least 2s"),
        ({"hang_timeout_s": math.inf}, "--hang-timeout forever: must end at some time"),
        ({"read_only": False}, "writing is not offered yet"),
        ({"anonymous": True, "profile": "work"}, "--anonymous sends no credentials, so --profile work"),
        ({"endpoint_url": "s3.example.com"}, "must look like https://HOST[:PORT]"),
        ({"endpoint_url": "ftp://example.com"}, "--endpoint-url ftp://example.com"),
        ({"endpoint_url": "http://example.com/?x=1"}, "must look like"),
        ({"endpoint_url": "http://127.0.0.1:1", "addressing": Addressing.VIRTUAL}, "use --path-style"),
        ({"ca_bundle": "/nonexistent.pem"}, "--ca-bundle /nonexistent.pem: no such file"),
        ({"max_requests": 0}, "--max-requests 0"),
        ({"uid": -2}, "--uid -2"),
        ({"uid": (1 << 32) - 1}, "--uid 4294967295: must be between 0 and 4294967294"),
        ({"read_ahead_bytes": 8 * GIB}, "--read-ahead 8GiB: must be at most 1GiB"),
        ({"runtime_dir": "/" + "x" * 74}, "xxx: at most 74 bytes, for the sockets in it"),
        ({"gid": 1 << 32}, "--gid 4294967296"),
        ({"file_mode": 0o4755}, "--file-mode 4755"),
        ({"dir_mode": -1}, "--dir-mode -1"),
        ({"log_level": "loud"}, "--log-level loud: must be one of debug, info, warning, error"),
        ({"cache_dir": "/dev/null"}, "--cache-dir /dev/null: is not a directory"),
        ({"shm_dir": "/nonexistent"}, "--shm-dir /nonexistent: No such file"),
        ({"etcd": "etcd:2379"}, "--etcd etcd:2379: must look like http://HOST:PORT"),
        ({"etcd": "http://a:1,ftp://b:2"}, "--etcd ftp://b:2: must look like"),
        ({"zone": "b"}, "--zone needs --etcd: without it there are no peers"),
        ({"group": "b"}, "--group needs --etcd: without it there are no peers"),
        ({"etcd": "http://a:1", "group": "a,b c"}, "--group 'b c': must be a name"),
        ({"etcd": "http://a:1", "group": "12"}, "--group '12': must be a name"),
        ({"etcd": "http://a:1", "group": "all"}, "neither a number nor 'all'"),
        ({"etcd": "http://a:1", "group": ",".join(f"g{n}" for n in range(33))}, "a node can be in 32 at most"),
        ({"peer_insecure": True}, "--peer-insecure needs --etcd"),
        ({"etcd": "http://a:1", "cluster": ""}, "--cluster '': must be a name"),
        ({"etcd": "http://a:1", "cluster": "a/b"}, "--cluster 'a/b': must be a name"),
        ({"etcd": "http://a:1", "node_name": "x" * 64}, "must be a name (letters"),
        ({"etcd": "http://a:1", "peer_secret_file": "/nonexistent"}, "--peer-secret-file /nonexistent: no such file"),
        ({"etcd": "http://a:1", "peer_cert": "/etc/hosts"}, "--peer-cert needs --peer-key as well"),
        ({"etcd": "http://a:1", "etcd_user": "root"}, "--etcd-user needs --etcd-password-file as well"),
        ({"etcd": "http://a:1", "advertise": "a:b:c:1x"}, "--advertise 'a:b:c:1x' is no address"),
        ({"etcd": "http://a:1", "peer_listen": "host:port"}, "--peer-listen 'host:port' is no address"),
    ],
)
def test_what_cannot_work(options: dict[str, object], says: str) -> None:
    assert says in refused(options)


def test_keys_in_an_address_are_refused_and_not_repeated() -> None:
    text = refused({"endpoint_url": "https://AKIAKEY:verysecret@s3.example.com"})
    assert "verysecret" not in text
    assert "keys do not belong into the address" in text


def test_a_password_in_the_address_of_etcd_is_refused_and_not_repeated() -> None:
    text = refused({"etcd": "http://root:verysecret@etcd:2379"})
    assert "verysecret" not in text
    assert text.startswith("--etcd http://***@etcd:2379: ")


def test_a_shm_tier_larger_than_its_tmpfs(monkeypatch: pytest.MonkeyPatch) -> None:
    def statvfs(path: str) -> Any:
        return os.statvfs_result(
            (4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255)
        )  # 64 MiB, as containers have it; all in use

    monkeypatch.setattr(os, "statvfs", statvfs)
    text = refused({"shm_size_bytes": 2 * GIB})
    assert "--shm-size 2GiB: the tmpfs /dev/shm holds only 64MiB; use --shm-size 32MiB, or enlarge it: " in text
    assert "mount -o remount,size=2g /dev/shm" in text
    load_config({"shm_size_bytes": 64 * MIB}, NOTHING)
    load_config({"shm_size_bytes": 0, "shm_dir": "/nonexistent"}, NOTHING)


@pytest.mark.parametrize(
    "options",
    [
        {"metadata_ttl_s": math.inf, "negative_ttl_s": math.inf, "agent_idle_timeout_s": math.inf},
        {"metadata_ttl_s": 0.0, "negative_ttl_s": 0.0, "agent_idle_timeout_s": 0.0},
        {"cache_size_bytes": 0, "shm_size_bytes": 0},
        {"endpoint_url": "http://[::1]:9000/base", "addressing": Addressing.PATH},
        {
            "engine": Engine.PYFUSE3,
            "low_latency": LowLatency.OFF,
            "log_format": LogFormat.JSON,
            "consistency": Consistency.STRICT,
        },
        {"block_size_bytes": 64 * KIB, "shm_size_bytes": 16 * MIB},
    ],
)
def test_unusual_values_that_work(options: dict[str, object]) -> None:
    load_config(options, NOTHING)


@given(configs())
def test_any_configuration_is_valid_or_refused_in_one_line(config: Config) -> None:
    try:
        validate(config)
    except UsageError as error:
        text = str(error)
    else:
        return
    assert text
    assert "\n" not in text
    assert text.startswith("--")
