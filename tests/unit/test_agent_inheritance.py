"""What an agent leaves to the next one of the same mounts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.agent import inheritance
from cachefs.config import CacheConfig, PeerConfig
from cachefs.runtime import RuntimeDir, write_state
from tests.support.machine import wait_until

PEER = PeerConfig(etcd="http://etcd:2379", cluster="lab", peer_secret_file="/etc/secret")


@pytest.fixture
def config(tmp_path: Path) -> CacheConfig:
    (tmp_path / "cache").mkdir()
    return CacheConfig(cache_dir=str(tmp_path / "cache"), runtime_dir=str(tmp_path / "run"))


@pytest.fixture
def mount(config: CacheConfig) -> Iterator[None]:
    """A living mount of the cache directory."""
    code = "import sys; sys.stdin.read()  # cachefs"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        line = Path(f"/proc/{child.pid}/cmdline")
        wait_until(lambda: b"cachefs" in line.read_bytes(), 5, "the program has its arguments")
        runtime = RuntimeDir(config.runtime_dir)
        state = {"mount_id": "m", "cache_dir": config.cache_dir, "supervisor_pid": child.pid, "worker_pid": None}
        write_state(runtime.mount("m", "json"), state)
        yield
        child.kill()


def test_without_mounts_the_own_settings_hold(config: CacheConfig) -> None:
    inheritance.write_settings(dataclasses.replace(config, block_size_bytes=1 << 22), PEER)
    assert inheritance.inherited(config, PeerConfig()) == (config, PeerConfig())


@pytest.mark.usefixtures("mount")
def test_with_mounts_those_of_the_last_agent_hold(config: CacheConfig) -> None:
    last = dataclasses.replace(config, block_size_bytes=1 << 22)
    assert inheritance.inherited(config, PeerConfig()) == (config, PeerConfig()), "nothing is written down"
    inheritance.write_settings(last, PEER)
    assert inheritance.inherited(config, PeerConfig()) == (last, PEER)


@pytest.mark.usefixtures("mount")
def test_an_agent_of_before_there_were_peers_left_no_settings_for_them(config: CacheConfig) -> None:
    last = dataclasses.replace(config, block_size_bytes=1 << 22)
    inheritance.write_settings(last, PEER)
    path = Path(RuntimeDir(config.runtime_dir).agent(config.cache_dir, "json"))
    plain = json.loads(path.read_bytes())
    del plain["peer"]
    path.write_text(json.dumps(plain))
    assert inheritance.inherited(config, PEER) == (last, PEER)


@pytest.mark.usefixtures("mount")
@pytest.mark.expect_warnings("cannot be read")
@pytest.mark.parametrize("text", ["", "[]", "{", '{"peer": 7}', '{"peer": {"etcd": 7}}', '{"cache_size_bytes": "x"}'])
def test_what_cannot_be_read_is_left_alone(config: CacheConfig, text: str) -> None:
    inheritance.write_settings(config, PEER)
    Path(RuntimeDir(config.runtime_dir).agent(config.cache_dir, "json")).write_text(text)
    assert inheritance.inherited(config, PEER) == (config, PEER)
    assert os.path.isdir(config.cache_dir)
