"""Ranges past the tiers: the right bytes, one request for who asks at the same time, and memory that is bounded."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from cachefs import errors, metrics
from cachefs.block.flights import Filled
from cachefs.block.ranges import KEPT_BYTES, KEPT_RANGES, KEPT_S, cut
from cachefs.types import ObjectVersion, Tier
from tests.support.block_cache_rig import BLOCK, KIB, Rig, Source, eventually, obj, oid, opened

LARGE = obj("large", 40)


async def read(rig: Rig, start: int, length: int, version: ObjectVersion = LARGE) -> bytes:
    return bytes(await rig.cache.read_range(oid(version), version, rig.source, rig.source, start, length))


def expected(start: int, length: int, version: ObjectVersion = LARGE) -> bytes:
    return Source.content(version)[start : start + length]


async def test_just_the_bytes_are_asked_for_and_nothing_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        asked = [(0, 1), (5 * BLOCK + 7, 4096), (BLOCK - 100, 200), (LARGE.size - 3, 3)]
        for start, length in asked:
            assert await read(rig, start, length) == expected(start, length)
        assert [call[1:] for call in rig.source.calls] == asked
        assert rig.cache.count_cached(oid(LARGE), 40) == {"shm": 0, "disk": 0}
        assert not rig.cache.ranges._ranges


async def test_what_a_tier_has_comes_from_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        await rig.fill(LARGE, 3, 2)
        assert await read(rig, 4 * BLOCK - 10, 20) == expected(4 * BLOCK - 10, 20)
        assert len(rig.source.calls) == 1
        assert await read(rig, 5 * BLOCK - 10, 20) == expected(5 * BLOCK - 10, 20)
        assert rig.source.calls[-1][1:] == (5 * BLOCK - 10, 20), "one block of two is missing"


async def test_what_is_under_way_is_waited_for(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig, trio.open_nursery() as nursery:
        rig.source.gate.clear()
        nursery.start_soon(rig.fill, LARGE, 3)
        found: list[bytes] = []

        async def reader() -> None:
            found.append(await read(rig, 3 * BLOCK + 5, 100))

        await eventually(lambda: rig.source.running == 1)
        nursery.start_soon(reader)
        await trio.sleep(0.05)
        rig.source.gate.set()
        await eventually(lambda: bool(found))
        assert found == [expected(3 * BLOCK + 5, 100)]
        assert len(rig.source.calls) == 1


@pytest.mark.parametrize("shm", [0, 8 << 20])
async def test_who_asks_at_the_same_time_shares_a_request(tmp_path: Path, shm: int) -> None:
    found: list[bytes] = []
    async with opened(tmp_path, shm=shm) as rig:
        rig.source.gate.clear()

        async def reader(start: int, length: int) -> None:
            found.append(await read(rig, start, length))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(reader, 100, 4096)
            await trio.sleep(0.05)
            nursery.start_soon(reader, 200, 1000)  # within the other one
            await trio.sleep(0.05)
            rig.source.gate.set()
        assert len(rig.source.calls) == 1
        assert sorted(found, key=len) == [expected(200, 1000), *[expected(100, 4096)] * 20]
        assert rig.counters.get(metrics.RANGES_JOINED.name) == 20
        await read(rig, 100, 4096)
        assert len(rig.source.calls) == 2, "what was read is not kept"


async def test_a_cancelled_reader_cancels_nobody(tmp_path: Path) -> None:
    found: list[bytes] = []
    async with opened(tmp_path) as rig:
        rig.source.gate.clear()

        async def reader() -> None:
            found.append(await read(rig, 100, 4096))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05):
                await read(rig, 100, 4096)
            nursery.start_soon(reader)
            await trio.sleep(0.02)
            rig.source.gate.set()
        assert found == [expected(100, 4096)]
        assert len(rig.source.calls) == 1


@pytest.mark.parametrize("error", [errors.StaleObject("gone"), errors.AccessDenied("no"), errors.BadBody("short")])
async def test_errors_reach_all_who_wait_and_are_not_kept(tmp_path: Path, error: Exception) -> None:
    raised: list[Exception] = []
    async with opened(tmp_path) as rig:
        rig.source.gate.clear()
        rig.source.error = error

        async def reader() -> None:
            try:
                await read(rig, 0, 10)
            except errors.CachefsError as caught:
                raised.append(caught)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            await trio.sleep(0.05)
            rig.source.gate.set()
        assert [type(each) for each in raised] == [type(error)] * 3
        assert len(set(map(id, raised))) == 3
        rig.source.error = None
        assert await read(rig, 0, 10) == expected(0, 10)


@pytest.mark.expect_warnings("unknown way")
async def test_what_nobody_expects_is_an_error_of_the_store(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source.error = RuntimeError("?")
        with pytest.raises(errors.StorageUnavailable):
            await read(rig, 0, 10)


async def test_what_is_ahead_of_a_reader_is_there_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        ranges = rig.cache.ranges
        for start in (1000, 200_000):
            ranges.ahead(oid(LARGE), LARGE, rig.source, start, 5000)
            ranges.ahead(oid(LARGE), LARGE, rig.source, start, 5000)
        await eventually(lambda: rig.counters.get(metrics.RANGE_READ_BYTES.name) == 10_000)
        assert len(rig.source.calls) == 2
        assert await read(rig, 1100, 4096) == expected(1100, 4096)
        assert (len(rig.source.calls), ranges.kept_bytes) == (2, 5000)
        assert rig.counters.get(metrics.RANGES_AHEAD_USED.name) == 1
        await read(rig, 1100, 4096)
        assert len(rig.source.calls) == 3
        assert await read(rig, 199_999, 10) == expected(199_999, 10)
        assert len(rig.source.calls) == 4, "not all of it was ahead"


async def test_a_reader_who_comes_early_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig, trio.open_nursery() as nursery:
        rig.source.gate.clear()
        rig.cache.ranges.ahead(oid(LARGE), LARGE, rig.source, 1000, 5000)
        found: list[bytes] = []

        async def reader() -> None:
            found.append(await read(rig, 1000, 4096))

        nursery.start_soon(reader)
        await trio.sleep(0.05)
        rig.source.gate.set()
        await eventually(lambda: bool(found))
        assert found == [expected(1000, 4096)]
        assert len(rig.source.calls) == 1
        await eventually(lambda: rig.cache.ranges.kept_bytes == 0)
        assert not rig.cache.ranges._ranges


async def test_what_is_ahead_is_bounded_and_grows_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as rig:
        ranges = rig.cache.ranges
        many = obj("many", 200)
        for number in range(200):
            ranges.ahead(oid(many), many, rig.source, number * BLOCK, 48 * KIB)
        assert KEPT_BYTES - 48 * KIB < ranges.kept_bytes <= KEPT_BYTES
        await eventually(lambda: all(kept.over.is_set() for kept in ranges._ahead))
        now = trio.current_time()
        monkeypatch.setattr(trio, "current_time", lambda: now + KEPT_S + 1)
        for number in range(KEPT_RANGES + 10):
            ranges.ahead(oid(LARGE), LARGE, rig.source, number * 8 * KIB, 10)
        assert oid(many) not in ranges._ranges
        assert len(ranges._ahead) == KEPT_RANGES


async def test_wishes_that_make_no_sense_and_failures_are_left_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        ranges = rig.cache.ranges
        for start, length in ((LARGE.size, 10), (-5, 10), (0, 0), (0, -1)):
            ranges.ahead(oid(LARGE), LARGE, rig.source, start, length)
        assert ranges.kept_bytes == 0
        rig.source.error = errors.StorageUnavailable("no")
        ranges.ahead(oid(LARGE), LARGE, rig.source, LARGE.size - 5, 10)
        assert ranges.kept_bytes == 5
        await eventually(lambda: ranges.kept_bytes == 0)


async def test_when_the_cache_closes_nobody_waits(tmp_path: Path) -> None:
    raised: list[Exception] = []
    gate = threading.Event()

    async with trio.open_nursery() as nursery:
        async with opened(tmp_path) as rig:
            rig.source.gate = gate

            async def reader() -> None:
                try:
                    await read(rig, 0, 10)
                except errors.CachefsError as caught:
                    raised.append(caught)

            nursery.start_soon(reader)
            await eventually(lambda: rig.source.running == 1)
        await eventually(lambda: bool(raised))
        gate.set()
        with pytest.raises(errors.AgentUnavailable):
            await read(rig, 0, 10)
    assert isinstance(raised[0], errors.AgentUnavailable)


def test_bytes_that_are_not_all_here_are_none() -> None:
    one, two, none = (Filled(index, Tier.SHM, body) for index, body in enumerate((b"abcd", b"ef", None)))
    found = cut([one, two], 3, 2)
    assert found is not None
    assert bytes(found) == b"de"
    assert cut([one, two], 3, 4) is None
    assert cut([none, one, two], 0, 4) is None, "never the bytes of another place"
