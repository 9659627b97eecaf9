"""Within one large file, on a real mount: points, strides, backward reads (docs/PREFETCH.md), counted at the store."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 10 * GIB
PAGE = 4096


def places(count: int, size: int, seed: int) -> list[int]:
    return [random.Random(seed + number).randrange(size // PAGE) * PAGE for number in range(count)]


def stamp(place: int) -> bytes:
    return random.Random(place).randbytes(PAGE)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A directory with a file of 10 GiB that takes no room."""
    directory = tmp_path / "origin"
    directory.mkdir()
    with (directory / "points.bin").open("wb") as file:
        file.truncate(SIZE)
    return directory


@pytest.fixture
def mount(make_node: Callable[..., Node], sparse: Path) -> Mount:
    return make_node(idle_timeout="30s").mount(f"file://{sparse}")


def agent_counts(mount: Mount) -> dict[str, float]:
    found: dict[str, float] = mount.node.status()["agents"][0]["counters"]
    return found


class Fetched:
    """How many bytes the store gave since this was made."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._before = agent_counts(mount).get("origin_bytes", 0)

    @property
    def bytes(self) -> int:
        time.sleep(0.3)  # readahead that is under way
        return int(agent_counts(self._mount)["origin_bytes"] - self._before)


@pytest.fixture
def opened(mount: Mount) -> Iterator[int]:
    descriptor = os.open(mount.path / "points.bin", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def write_stamps(sparse: Path, where: list[int]) -> None:
    with (sparse / "points.bin").open("r+b") as file:
        for place in where:
            file.seek(place)
            file.write(stamp(place))


def test_r9_random_pages_fetch_no_blocks(make_node: Callable[..., Node], sparse: Path) -> None:
    where = places(2000, SIZE, 1)
    write_stamps(sparse, where)
    mount = make_node(idle_timeout="30s").mount(f"file://{sparse}")
    fetched = Fetched(mount)
    descriptor = os.open(mount.path / "points.bin", os.O_RDONLY)
    try:
        for place in where:
            assert os.pread(descriptor, PAGE, place) == stamp(place)
    finally:
        os.close(descriptor)
    assert fetched.bytes <= 1.2 * 2000 * PAGE
    counted = agent_counts(mount)
    assert counted["range_reads"] >= 1990
    assert counted.get("prefetch_issued_bytes", 0) + counted.get("readahead_blocks", 0) * MIB <= 0.02 * 2000 * PAGE


def test_random_page_faults_fetch_no_blocks(mount: Mount, opened: int) -> None:
    fetched = Fetched(mount)
    with mmap.mmap(opened, SIZE, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_RANDOM)
        for place in places(500, SIZE, 2):
            assert mapped[place : place + 8] == bytes(8)
    assert fetched.bytes <= 1.2 * 500 * PAGE + MIB, "the end of the file is fetched in blocks"


def test_page_faults_fetch_little_more_than_the_kernel_asks_for(mount: Mount, opened: int) -> None:
    """Without MADV_RANDOM the kernel reads 4 MiB around each of the first hundred page faults."""
    fetched = Fetched(mount)
    with mmap.mmap(opened, SIZE, prot=mmap.PROT_READ) as mapped:
        for place in places(40, SIZE, 3):
            assert mapped[place] == 0
    time.sleep(1.3)
    asked = mount.status()["counters"]["fuse_read_bytes"]
    assert asked > 100 * MIB
    assert fetched.bytes <= 1.4 * asked


def test_a_backward_reader_finds_everything_there(mount: Mount, opened: int) -> None:
    end, length = 200 * MIB, 64 * KIB
    fetched = Fetched(mount)
    for at in range(end - length, end - 64 * MIB, -length):
        assert os.pread(opened, length, at) == bytes(length)
    time.sleep(1.3)
    counted = mount.status()["counters"]
    assert counted["read_misses"] < counted["fuse_reads"] / 8
    assert fetched.bytes <= (64 + 40) * MIB


def test_a_stride_is_fetched_ahead_in_ranges(mount: Mount, opened: int) -> None:
    fetched = Fetched(mount)
    for at in range(5 * MIB, 5 * MIB + 200 * 10 * MIB, 10 * MIB):
        assert os.pread(opened, 64 * KIB, at) == bytes(64 * KIB)
        time.sleep(0.002)
    counted = agent_counts(mount)
    assert counted["ranges_ahead_used"] > 180
    assert fetched.bytes <= 1.25 * 200 * 64 * KIB


def test_points_and_then_a_sequence(mount: Mount, opened: int) -> None:
    for place in places(50, SIZE, 4):
        os.pread(opened, PAGE, place)
    before = agent_counts(mount).get("range_reads", 0)
    for at in range(GIB, GIB + 64 * MIB, 128 * KIB):
        assert os.pread(opened, 128 * KIB, at) == bytes(128 * KIB)
    counted = agent_counts(mount)
    assert counted["range_reads"] - before <= 2
    assert counted["readahead_blocks"] > 50


def test_a_killed_agent_loses_no_point_read(make_node: Callable[..., Node], sparse: Path) -> None:
    where = places(300, SIZE, 5)
    write_stamps(sparse, where)
    mount = make_node(idle_timeout="30s").mount(f"file://{sparse}")
    descriptor = os.open(mount.path / "points.bin", os.O_RDONLY)
    wrong: list[int] = []

    def read() -> None:
        for place in where:
            if os.pread(descriptor, PAGE, place) != stamp(place):
                wrong.append(place)
            time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        time.sleep(0.2)
        former = mount.node.kill_agent()
        mount.node.wait_for_agent(former)
        worker = mount.kill_worker()
        mount.wait_for_worker(worker)
    finally:
        reader.join(60)
        os.close(descriptor)
    assert not reader.is_alive()
    assert not wrong


@pytest.fixture
def large(bucket: Bucket) -> bytes:
    return bucket.put("large", random.Random(9).randbytes(24 * MIB))


def test_points_of_a_store_that_fails_and_changes(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy, large: bytes
) -> None:
    mount = make_node().mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    with (mount.path / "large").open("rb", buffering=0) as file:

        def pages(seed: int, count: int) -> None:
            for place in (MIB + at for at in places(count, 20 * MIB, seed)):
                assert os.pread(file.fileno(), PAGE, place) == large[place : place + PAGE]

        pages(1, 10)
        rule = proxy.add(Fault(kind="get", times=3, status=503))
        pages(100, 20)
        assert rule.hits == 3
        cut = proxy.add(Fault(kind="get", times=3, truncate_after=1000))
        pages(200, 20)
        assert cut.hits == 3
        bucket.put("large", random.Random(10).randbytes(24 * MIB))
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            pages(300, 40)
    wait_until(lambda: (mount.path / "large").read_bytes()[:8] == random.Random(10).randbytes(8), 10, "the new version")
