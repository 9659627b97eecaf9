"""Reads past the tiers (B1 to B3 of docs/SEMANTICS.md): mounts with --no-cache, and files opened with O_DIRECT."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages, run_program

MIB = 1 << 20
BODY = content("large", 24 * MIB + 77)
SMALL = {f"small/{number}": content(str(number), 50_000 + number) for number in range(12)}


@pytest.fixture
def filled(bucket: Bucket) -> Bucket:
    """A bucket with a large file and some small ones."""
    bucket.put("large", BODY)
    bucket.fill(SMALL)
    return bucket


def mount_it(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str, name: str = "mnt") -> Mount:
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever", *options, name=name)


def stored(mount: Mount) -> int:
    """How many blocks the tiers have."""
    tiers = mount.node.status()["agents"][0]["tiers"]
    return int(tiers["shm"]["blocks"] + tiers["disk"]["blocks"])


def fetched_bytes(proxy: FaultProxy) -> int:
    return sum(exchange.sent_bytes for exchange in proxy.requests if exchange.kind == "get")


@contextmanager
def opened_directly(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_directly(descriptor: int, offset: int, size: int) -> bytes:
    """One read with O_DIRECT, into memory of whole pages."""
    with mmap.mmap(-1, size) as memory:
        count = os.preadv(descriptor, [memory], offset)
        return memory[:count]


@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_b1_a_mount_without_cache_stores_nothing(node: Node, filled: Bucket, proxy: FaultProxy, engine: str) -> None:
    mount = mount_it(node, filled, proxy, "--no-cache", f"--engine={engine}")
    for _ in range(2):
        proxy.forget()
        for key, body in SMALL.items():
            evict_pages(mount.path / key)
            assert (mount.path / key).read_bytes() == body
        assert proxy.count("get") >= len(SMALL)
        proxy.forget()
        evict_pages(mount.path / "large")
        assert (mount.path / "large").read_bytes() == BODY
        assert len(BODY) <= fetched_bytes(proxy) < 1.4 * len(BODY)
    assert stored(mount) == 0
    wait_until(lambda: mount.status()["counters"].get("fresh_reads", 0) > len(SMALL), 5, "the worker reports")
    assert mount.status()["counters"]["shm_hits"] == 0


def test_b1_the_page_cache_of_the_kernel_stays_on(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    mount = mount_it(node, filled, proxy, "--no-cache")
    assert (mount.path / "small/3").read_bytes() == SMALL["small/3"]
    proxy.forget()
    assert (mount.path / "small/3").read_bytes() == SMALL["small/3"]
    assert proxy.count("get") == 0


def test_b1_other_mounts_of_the_volume_keep_what_they_read(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    kept = mount_it(node, filled, proxy, name="kept")
    passing = mount_it(node, filled, proxy, "-o", "nocache", "--disk-quota=20MiB", name="passing")
    agent = node.status()["agents"][0]
    assert [volume["limits"]["disk"]["quota_bytes"] for volume in agent["volumes"].values()] == [0], "it has no say"
    assert (kept.path / "small/1").read_bytes() == SMALL["small/1"]
    there = stored(kept)
    assert there >= 1
    proxy.forget()
    assert (passing.path / "small/1").read_bytes() == SMALL["small/1"]
    assert proxy.count("get") == 1
    assert (passing.path / "small/2").read_bytes() == SMALL["small/2"]
    assert proxy.count("get") == 2
    assert stored(kept) <= there + 1  # it may have come to the disk tier meanwhile


@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_b2_o_direct_passes_the_tiers_by(node: Node, filled: Bucket, proxy: FaultProxy, engine: str) -> None:
    mount = mount_it(node, filled, proxy, "--prefetch=off", "--cache-size=0", f"--engine={engine}")
    assert (mount.path / "large").read_bytes() == BODY
    before = stored(mount)
    proxy.forget()
    with opened_directly(mount.path / "large") as direct:
        for index in (20, 3, 11):
            for times in (1, 2):  # no page of the kernel's answers the second one
                assert read_directly(direct, index * MIB + 4096, 8192) == BODY[index * MIB + 4096 :][:8192]
                assert proxy.count("get") == times
            proxy.forget()
        assert read_directly(direct, 24 * MIB, 4096) == BODY[24 * MIB :]
        assert read_directly(direct, 25 * MIB, 4096) == b""
    proxy.forget()
    assert (mount.path / "large").read_bytes() == BODY, "the pages of the kernel are still there for others"
    assert proxy.count("get") == 0
    assert stored(mount) == before


@pytest.mark.parametrize("size", ["4096", "100k", "1000001", "5M"])
def test_b2_requests_of_any_size_give_the_bytes_of_the_file(
    node: Node, filled: Bucket, proxy: FaultProxy, size: str
) -> None:
    mount = mount_it(node, filled, proxy)
    copy = node.base / "copy"
    run_program(["dd", f"if={mount.path}/large", f"of={copy}", f"bs={size}", "iflag=direct"])
    assert copy.read_bytes() == BODY
    assert fetched_bytes(proxy) < 1.4 * len(BODY)
    assert stored(mount) == 0


def test_b2_a_sequence_does_not_wait_for_the_store_at_every_step(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    mount = mount_it(node, filled, proxy)
    os.stat(mount.path / "large")
    proxy.add(Fault(kind="get", delay_s=0.05))
    began = time.monotonic()
    with opened_directly(mount.path / "large") as direct:
        for offset in range(0, 16 * MIB, 64 << 10):
            assert read_directly(direct, offset, 64 << 10) == BODY[offset : offset + (64 << 10)]
    taken = time.monotonic() - began
    assert taken < 5, f"{taken:.1f} s; one wait for each step would be 12.8 s"


def test_b2_random_reads_fetch_what_they_ask_for(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    mount = mount_it(node, filled, proxy)
    places = [(number * 7919 * 4096) % (24 * MIB) // 4096 * 4096 for number in range(200)]
    with opened_directly(mount.path / "large") as direct:
        for place in places:
            assert read_directly(direct, place, 4096) == BODY[place : place + 4096]
    assert fetched_bytes(proxy) <= 1.2 * 200 * 4096 + 3 * MIB


def test_b3_an_object_that_was_replaced_is_not_read(node: Node, filled: Bucket, proxy: FaultProxy) -> None:
    mount = mount_it(node, filled, proxy)
    assert (mount.path / "small/5").read_bytes() == SMALL["small/5"]  # the tiers have it
    with opened_directly(mount.path / "small/5") as direct:
        filled.put("small/5", content("other", 60_000))
        with pytest.raises(OSError, match="Stale"):
            read_directly(direct, 0, 4096)


@pytest.mark.parametrize("options", [(), ("--no-cache",)], ids=["O_DIRECT", "no-cache"])
def test_m1_kill_9_of_worker_and_agent(node: Node, filled: Bucket, proxy: FaultProxy, options: tuple[str, ...]) -> None:
    mount = mount_it(node, filled, proxy, *options)
    flags = os.O_RDONLY | (0 if options else os.O_DIRECT)
    outcome: list[object] = []

    def read() -> None:
        try:
            descriptor = os.open(mount.path / "large", flags)
            try:
                for _ in range(2):
                    for offset in range(0, len(BODY), 256 << 10):
                        assert read_directly(descriptor, offset, 256 << 10) == BODY[offset : offset + (256 << 10)]
                    evict_pages(mount.path / "large")
            finally:
                os.close(descriptor)
            outcome.append("read")
        except BaseException as error:
            outcome.append(error)

    proxy.add(Fault(kind="get", delay_s=0.02))
    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.15)
    agent = mount.node.kill_agent()
    mount.node.wait_for_agent(agent)
    mount.wait_for_worker(mount.kill_worker())
    reader.join(60)
    assert outcome == ["read"]
    assert stored(mount) == 0


def test_r4_the_store_away_is_eio_after_its_time(
    make_node: Callable[..., Node], filled: Bucket, proxy: FaultProxy
) -> None:
    mount = mount_it(make_node(), filled, proxy, "--no-cache", "--io-timeout=1s")
    os.stat(mount.path / "large")
    proxy.down = True
    with opened_directly(mount.path / "large") as direct:
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output"):
            read_directly(direct, 0, 4096)
        assert time.monotonic() - began < 10
        proxy.down = False
        wait_until(lambda: _reads(direct), 20, "the store is back")


def _reads(descriptor: int) -> bool:
    try:
        return read_directly(descriptor, 4096, 4096) == BODY[4096:8192]
    except OSError:
        return False
