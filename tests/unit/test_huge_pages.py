"""Huge pages for the shm tier: the file keeps its bytes, the promise holds, and without them everything works too."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.block import huge_pages
from cachefs.block.huge_pages import HUGE_PAGE, HugePages, address_of
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import Tier
from tests.support.blocks import contents, key, payload, put
from tests.support.machine import tmpfs

MIB = 1 << 20


@pytest.fixture
def descriptor() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/dev/shm", prefix="cachefs-test-") as file:
        os.ftruncate(file.fileno(), 64 * MIB)
        yield file.fileno()


def allocated(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def huge_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemHugePages:"))


def test_every_byte_has_its_block_and_most_of_them_are_huge(descriptor: int) -> None:
    before = huge_bytes()
    pages = HugePages(descriptor)
    pages.allocate(3 * mmap.PAGESIZE, 40 * MIB + 5)
    assert 40 * MIB - 3 * mmap.PAGESIZE < allocated(descriptor) <= 42 * MIB
    if not pages.usable:
        pytest.skip("this kernel has no MADV_COLLAPSE")
    # Other processes may free theirs meanwhile, and a full machine has none; on an idle one all 19 are huge.
    assert huge_bytes() > before
    assert os.pread(descriptor, 40 * MIB, 0) == bytes(40 * MIB)


def test_what_is_there_stays_as_it_is(descriptor: int) -> None:
    pieces = {
        offset: random.Random(offset).randbytes(9000)
        for offset in (0, 2 * MIB - 4500, 5 * MIB, 11 * MIB, 16 * MIB - 9000)
    }
    for offset, piece in pieces.items():
        os.pwrite(descriptor, piece, offset)
    HugePages(descriptor).allocate(0, 16 * MIB)
    assert allocated(descriptor) >= 16 * MIB
    held = os.pread(descriptor, 16 * MIB, 0)
    for offset, piece in pieces.items():
        assert held[offset : offset + len(piece)] == piece
    assert sum(map(bool, held)) <= sum(map(len, pieces.values())), "and nothing else appeared"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_a_full_file_system_is_an_error_and_no_end(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "narrow", "8m") as directory, (directory / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), 64 * MIB)
        with pytest.raises(OSError, match="No space") as caught:
            HugePages(file.fileno()).allocate(0, 32 * MIB)
        assert caught.value.errno == errno.ENOSPC
        HugePages(file.fileno()).allocate(0, 4 * MIB)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EAGAIN, errno.ENOMEM])
def test_a_kernel_that_gives_none(descriptor: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(huge_pages._libc, "madvise", refuse)
    pages = HugePages(descriptor)
    pages.allocate(0, 8 * MIB)
    assert allocated(descriptor) >= 8 * MIB
    assert pages.usable == (code != errno.EINVAL)


def test_huge_pages_that_are_dear_are_left_alone_for_a_while(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def collapse(place: int, length: int, advice: int) -> int:
        calls.append(length)
        return 0

    monkeypatch.setattr(huge_pages._libc, "madvise", collapse)
    clock = iter(range(100))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))  # each looks a second long
    monkeypatch.setattr(huge_pages, "FIRST_PAUSE_S", 0.2)
    pages = HugePages(descriptor)
    for end in (4, 8, 12):
        pages.allocate(0, end * MIB)
    assert calls == [4 * MIB], "the first was dear"
    assert allocated(descriptor) >= 12 * MIB
    time.sleep(0.25)
    pages.allocate(12 * MIB, 16 * MIB)
    pages.allocate(16 * MIB, 20 * MIB)
    assert calls == [4 * MIB, 4 * MIB], "asked for again, and dear again"


def test_a_disk_has_none(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), 8 * MIB)
        HugePages(file.fileno()).allocate(0, 8 * MIB)
        assert allocated(file.fileno()) >= 8 * MIB or os.statvfs(tmp_path).f_bsize > 4096


def test_the_tier_s_map_begins_at_a_huge_page() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as place:
        tier = TierWriter(place, Tier.SHM, limit_bytes=100 * MIB, block_size=MIB, counters=Counters())
        try:
            put(tier, [(key(number), payload(number, MIB)) for number in range(120)])
            data_file = os.open(f"{place}/data.mdb", os.O_RDONLY)
            try:
                address = address_of(data_file)
            finally:
                os.close(data_file)
            assert address is not None
            assert address % HUGE_PAGE == 0
            assert allocated_in(place) <= 100 * MIB
            assert contents(tier, 119) == payload(119, MIB)
        finally:
            tier.close()


def allocated_in(directory: str) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(directory))
