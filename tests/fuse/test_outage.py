"""Many readers while the store is away: nobody queues up behind others who wait for it (R4 of docs/SEMANTICS.md)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name

MIB = 1 << 20
IO_TIMEOUT_S = 3.0
READERS = 6
BIG = content("big", 8 * MIB)

READER = """
import errno, os, sys, time
path = sys.argv[1]
sys.stdin.readline()
began = time.monotonic()
try:
    {action}
    said = "ok"
except OSError as error:
    said = errno.errorcode[error.errno]
print(said, time.monotonic() - began)
"""
ACTIONS = {
    "look-ups of an expired directory": ("d", "os.stat(path)"),
    "listings of an expired directory": ("", "os.listdir(path)"),
    "reads of a small file": ("d/f1", "open(path, 'rb').read()"),
    "reads of a block": ("big", "os.pread(os.open(path, os.O_RDONLY), 1000, 5 << 20)"),
}


def mount_objects(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str) -> Mount:
    """Mount a bucket whose names are known, and none of whose bytes are."""
    bucket.fill({**{f"d/f{number}": b"x" * 100 for number in range(4)}, "big": BIG})
    deadlines = (f"--io-timeout={IO_TIMEOUT_S}s", "--connect-timeout=1s", "--request-timeout=2s")
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", *deadlines, *options)
    assert sorted(os.listdir(mount.path)) == ["big", "d"]
    assert len(os.listdir(mount.path / "d")) == 4
    return mount


def all_at_once(action: str, path: Path, readers: int = READERS) -> list[tuple[str, float]]:
    """Let some processes do the same at the same time; returns what each was told, and after how many seconds."""
    command = [sys.executable, "-I", "-S", "-c", READER.format(action=action), str(path)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(readers)
    ]
    time.sleep(0.2)
    for child in started:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    told = [child.communicate(timeout=60)[0].split() for child in started]
    return [(said, float(took_s)) for said, took_s in told]


@pytest.mark.parametrize(
    ("what", "engine"),
    [
        ("reads of a small file", "channel"),
        *(pytest.param(what, "channel", marks=pytest.mark.slow) for what in ACTIONS if what != "reads of a small file"),
        pytest.param("reads of a small file", "pyfuse3", marks=pytest.mark.slow),
    ],
)
def test_r4_many_readers_wait_no_longer_than_one(
    node: Node, bucket: Bucket, proxy: FaultProxy, what: str, engine: str
) -> None:
    name, action = ACTIONS[what]
    ttl = "1s" if "expired" in what else "1h"
    mount = mount_objects(node, bucket, proxy, f"--metadata-ttl={ttl}", f"--engine={engine}")
    time.sleep(1.2)
    proxy.down = True
    outcomes = all_at_once(action, mount.path / name)
    assert {said for said, _ in outcomes} == {"EIO"}
    assert max(took_s for _, took_s in outcomes) < IO_TIMEOUT_S + 2
    assert min(took_s for _, took_s in outcomes) > IO_TIMEOUT_S / 2


@pytest.mark.slow
def test_r4_who_comes_when_the_store_is_back_gets_the_bytes(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--metadata-ttl=1h")
    proxy.down = True
    assert {said for said, _ in all_at_once(ACTIONS["reads of a block"][1], mount.path / "big", 2)} == {"EIO"}
    proxy.down = False
    time.sleep(0.15)
    assert (mount.path / "big").read_bytes() == BIG
    proxy.down = True
    assert errno_name((mount.path / "d/f2").read_bytes) == "EIO"
    proxy.down = False
    time.sleep(0.15)
    assert (mount.path / "d/f2").read_bytes() == b"x" * 100


@pytest.mark.slow
def test_r4_who_comes_later_waits_as_if_nothing_had_been(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--metadata-ttl=1h")
    proxy.down = True
    assert errno_name((mount.path / "big").read_bytes) == "EIO"
    time.sleep(0.5)
    (_, took_s), *_ = all_at_once(ACTIONS["reads of a block"][1], mount.path / "big", 1)
    assert took_s > IO_TIMEOUT_S / 2
