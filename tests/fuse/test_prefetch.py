"""Files that are read in a pattern are there before they are opened (docs/PREFETCH.md), on a real mount."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content

KIB = 1 << 10
FLAT = {f"train/{number:05d}.jpg": content(f"flat {number}", 20 * KIB + number) for number in range(400)}
TREE = {f"tree/n{number // 25:03d}/{number:04d}.jpg": content(f"tree {number}", 9 * KIB) for number in range(400)}


def mount_it(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str) -> Mount:
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", *options)


def read_all(mount: Mount, bodies: dict[str, bytes], paths: Iterable[str]) -> None:
    for path in paths:
        assert (mount.path / path).read_bytes() == bodies[path]


def counters(mount: Mount) -> dict[str, float]:
    """Of the agent and of this mount's worker, which reports once a second."""
    time.sleep(1.3)
    agent = mount.node.status()["agents"][0]["counters"]
    found: dict[str, float] = {**agent, **mount.status()["counters"]}
    return found


@pytest.fixture
def mount(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> Mount:
    bucket.fill(FLAT | TREE)
    return mount_it(make_node(idle_timeout="30s"), bucket, proxy)


def test_a_directory_in_order_makes_far_fewer_misses_than_files(mount: Mount) -> None:
    names = sorted(os.listdir(mount.path / "train"))
    read_all(mount, FLAT, [f"train/{name}" for name in names])
    counted = counters(mount)
    assert counted["read_misses"] < len(FLAT) / 4
    assert counted["prefetch_used"] > len(FLAT) / 2
    assert counted.get("prefetch_wasted", 0) == 0


def test_a_tree_in_order_has_its_directories_listed_ahead(mount: Mount, proxy: FaultProxy) -> None:
    for above, directories, files in os.walk(mount.path / "tree"):
        directories.sort()
        read_all(mount, TREE, [str(Path(above, name).relative_to(mount.path)) for name in sorted(files)])
    counted = counters(mount)
    assert counted["read_misses"] < len(TREE) / 4
    assert counted["prefetch_used"] > len(TREE) / 2


def test_a_shuffled_tree(mount: Mount) -> None:
    read_all(mount, TREE, random.Random(1).sample(list(TREE), len(TREE)))
    counted = counters(mount)
    assert counted["prefetch_used"] > len(TREE) / 4


def test_prefetch_off(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(FLAT)
    mount = mount_it(make_node(), bucket, proxy, "--prefetch=off")
    read_all(mount, FLAT, sorted(FLAT)[:100])
    assert proxy.count("get") == 100


def test_r8_a_store_that_throttles_and_files_that_vanish_fail_for_nobody(
    mount: Mount, bucket: Bucket, proxy: FaultProxy
) -> None:
    names = sorted(FLAT)
    os.listdir(mount.path / "train")
    gone, changed = names[200], names[201]
    bucket.delete(gone)
    bucket.put(changed, b"another version")
    rule = proxy.add(Fault(kind="get", skip=40, times=60, status=503))
    read_all(mount, FLAT, names[:200])
    assert rule.hits > 0
    for name in (gone, changed):  # the listing had the old ones: the first open may still find them (R2)
        with contextlib.suppress(OSError):
            assert (mount.path / name).read_bytes() == b"another version"
    assert (mount.path / changed).read_bytes() == b"another version"
    assert not (mount.path / gone).exists()
    read_all(mount, FLAT, names[202:])


def test_r8_a_killed_worker_tells_on(mount: Mount) -> None:
    names = sorted(FLAT)
    os.listdir(mount.path / "train")
    read_all(mount, FLAT, names[:150])
    former = mount.kill_worker()
    read_all(mount, FLAT, names[150:])
    mount.wait_for_worker(former)
    assert counters(mount)["prefetch_used"] > len(FLAT) / 2


def test_a_killed_agent_begins_anew(mount: Mount) -> None:
    os.listdir(mount.path / "train")
    names = sorted(FLAT)
    read_all(mount, FLAT, names[:100])
    former = mount.node.kill_agent()
    read_all(mount, FLAT, names[100:250])
    mount.node.wait_for_agent(former)
    read_all(mount, FLAT, names[250:])
    wait_until(lambda: counters(mount).get("prefetch_used", 0) > 50, 10, "the next agent learns as well")
