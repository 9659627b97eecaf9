"""Warm-ups in bad times, on a real mount: a store that throttles, agents that are killed, tiers that are chosen."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import CACHEFS, Bucket, Mount, Node
from tests.support.programs import content, evict_pages

MIB = 1 << 20
SMALL = {f"train/{n:03}": content(f"small-{n}", 20_000 + n) for n in range(300)}


def warm(mount: Mount, *options: str, path: str = "") -> subprocess.CompletedProcess[str]:
    node = mount.node
    return node.run("warmup", f"--runtime-dir={node.runtime_dir}", *options, str(mount.path / path))


def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def mount(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    bucket.fill(SMALL)
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")


# -- throttling -------------------------------------------------------------------------------------------------------


def test_a_store_that_throttles_in_the_middle_is_left_alone_and_asked_again(mount: Mount, proxy: FaultProxy) -> None:
    slow = Fault(kind="get", delay_s=0.05)
    proxy.add(slow)
    in_vain = 0

    def throttle() -> None:
        nonlocal in_vain
        wait_until(lambda: proxy.count("get") > 60, 15, "it is in the middle")
        proxy.clear()
        proxy.add(Fault(kind="get", status=503, code="SlowDown"))
        before = proxy.count("get")
        time.sleep(4)
        in_vain = proxy.count("get") - before
        proxy.clear()

    trouble = threading.Thread(target=throttle)
    trouble.start()
    began = time.monotonic()
    done = warm(mount, "--json")
    took_s = time.monotonic() - began
    trouble.join()
    job = last(done)
    assert (done.returncode, job["state"]) == (0, "done"), job
    assert job["fetched_bytes"] == sum(map(len, SMALL.values()))
    assert took_s > 4
    assert in_vain < 200, "the store is not asked for all of it again and again"
    assert warm(mount, "--check").returncode == 0


# -- kill -9 ----------------------------------------------------------------------------------------------------------


@contextmanager
def reading(mount: Mount, bodies: dict[str, bytes]) -> Iterator[list[str]]:
    """Read all files again and again, in other orders, and compare; gives what went wrong."""
    over, wrong = threading.Event(), []

    def read(seed: int) -> None:
        order = list(bodies)
        dice = random.Random(seed)
        while not over.is_set():
            dice.shuffle(order)
            for name in order:
                try:
                    if (mount.path / name).read_bytes() != bodies[name]:
                        wrong.append(f"{name}: other bytes")
                except OSError as error:
                    wrong.append(f"{name}: {error}")
                evict_pages(mount.path / name)
                if over.is_set():
                    return

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_readers_go_on_when_the_agent_dies_in_the_middle_of_bulk_fetches(mount: Mount, proxy: FaultProxy) -> None:
    proxy.add(Fault(kind="get", delay_s=0.1))
    node = mount.node
    with reading(mount, SMALL) as wrong:
        for _ in range(2):
            asked = proxy.count("get")
            command = subprocess.Popen(
                [*CACHEFS, "warmup", f"--runtime-dir={node.runtime_dir}", str(mount.path)],
                env=node.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            wait_until(functools.partial(_asked_more_than, proxy, asked + 30), 20, "it fetches")
            killed = node.kill_agent()
            command.communicate(timeout=20)
            assert command.returncode == 1
            node.wait_for_agent(killed)
            wait_until(lambda: node.status()["mounts"][0]["health"] == "ok", 20, "the mount has its agent")
        proxy.clear()
        assert warm(mount).returncode == 0
        assert warm(mount, "--check").returncode == 0
    assert not wrong, wrong[:5]


def _asked_more_than(proxy: FaultProxy, count: int) -> bool:
    return proxy.count("get") > count


# -- tiers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_tiers(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A shm tier with hot files in it, and many more files."""
    node = make_node(shm_size="32MiB", cache_size="256MiB")
    bucket.fill({f"hot/{n}": content(f"hot-{n}", 2 * MIB) for n in range(6)})
    bucket.fill({f"cold/{n:02}": content(f"cold-{n}", 2 * MIB) for n in range(20)})
    bucket.fill({f"tiny/{n:03}": content(f"tiny-{n}", 50_000) for n in range(200)})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--prefetch=off")
    for n in range(6):
        (mount.path / f"hot/{n}").read_bytes()
    return mount


def test_straight_to_disk_and_up_again(two_tiers: Mount, proxy: FaultProxy) -> None:
    mount = two_tiers
    assert warm(mount, "--check", "--tier=shm", path="hot").returncode == 0
    for path, count in (("cold", 20), ("tiny", 200)):
        done = warm(mount, "--tier=disk", "--json", path=path)
        job = last(done)
        assert (done.returncode, job["state"], job["tier"]) == (0, "done", "disk")
        found = last(warm(mount, "--check", "--tier=shm", "--json", path=path))
        assert found["missing_files"] == count, "nothing of it is in shm"
        assert "not in the shm tier" in found["examples"][0]["why"]
        assert warm(mount, "--check", path=path).returncode == 0
    assert warm(mount, "--check", "--tier=shm", path="hot").returncode == 0, "and nothing left it"

    asked = proxy.count("get")
    for path in ("tiny", "cold/00"):
        done = warm(mount, "--tier=shm", "--json", path=path)
        assert (done.returncode, last(done)["state"]) == (0, "done"), last(done)
        assert warm(mount, "--check", "--tier=shm", path=path).returncode == 0
    assert proxy.count("get") == asked, "it came from the disk"
    assert (mount.path / "tiny/007").read_bytes() == content("tiny-7", 50_000)
    assert (mount.path / "cold/00").read_bytes() == content("cold-0", 2 * MIB)


def test_a_tier_that_is_too_small(two_tiers: Mount) -> None:
    refused = warm(two_tiers, "--tier=shm", path="cold")
    assert refused.returncode == 1
    assert "the caches hold 32" in refused.stderr
    assert warm(two_tiers, "--tier=tape").returncode == 2


def test_without_a_disk_tier(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> None:
    node = make_node(shm_size="32MiB", cache_size="0")
    bucket.fill({"a": content("a", MIB)})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    refused = warm(mount, "--tier=disk")
    assert refused.returncode == 1
    assert "the disk tier is off" in refused.stderr
    assert warm(mount, "--tier=shm").returncode == 0
