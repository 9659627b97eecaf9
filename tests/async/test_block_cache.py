"""The block cache with real tiers: single flight, cancellation, order, spill, restart, budgets, faults."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs import errors
from cachefs.block import block_cache, codec
from cachefs.block.block_cache import BlockCache, Filled, Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import ObjectId, ObjectVersion, Tier, block_key, object_id

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB


class Source:
    """Objects made from their names; counts and can be held, slowed or made to fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    @staticmethod
    def content(version: ObjectVersion) -> bytes:
        return random.Random(f"{version.key}{version.etag}").randbytes(version.size)

    def read_range(self, version: ObjectVersion, start: int, length: int) -> memoryview:
        with self._lock:
            self.calls.append((version.key, start, length))
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            assert self.gate.wait(20)
            if self.error is not None:
                raise self.error
            return memoryview(self.content(version))[start : start + length]
        finally:
            with self._lock:
                self.running -= 1


class Rig:
    """A block cache with its tiers and source."""

    def __init__(self, cache: BlockCache, shm: TierWriter | None, disk: TierWriter | None, counters: Counters) -> None:
        self.cache, self.shm, self.disk, self.counters = cache, shm, disk, counters
        self.source = Source()

    async def fill(
        self,
        version: ObjectVersion,
        first: int = 0,
        count: int = 1,
        *,
        inline: bool = False,
        priority: Priority = Priority.DEMAND,
    ) -> list[Filled]:
        return await self.cache.fill(oid(version), version, self.source, first, count, inline, priority)

    def stored(self, tier: TierWriter | None, version: ObjectVersion, index: int) -> bytes | None:
        value = None if tier is None else tier.read(block_key(oid(version), index))
        return None if value is None else value[codec.HEADER_SIZE :]


def oid(version: ObjectVersion) -> ObjectId:
    return object_id("endpoint", "bucket", version)


def block(version: ObjectVersion, index: int) -> bytes:
    return Source.content(version)[index * BLOCK : (index + 1) * BLOCK]


def obj(name: str, blocks: float = 1) -> ObjectVersion:
    return ObjectVersion(name, "etag", int(blocks * BLOCK))


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as path:
        yield Path(path)


@asynccontextmanager
async def opened(
    place: Path, *, shm: int = 8 * MIB, disk: int = 32 * MIB, memory: int = 256 * MIB, requests: int = 16
) -> AsyncIterator[Rig]:
    counters = Counters()

    def tier(kind: Tier, limit: int) -> TierWriter | None:
        return (
            TierWriter(str(place / kind), kind, limit_bytes=limit, block_size=BLOCK, counters=counters)
            if limit
            else None
        )

    tiers = tier(Tier.SHM, shm), tier(Tier.DISK, disk)
    try:
        cache = BlockCache(
            *tiers, block_size=BLOCK, memory_limit_bytes=memory, max_requests=requests, counters=counters
        )
        async with cache:
            yield Rig(cache, *tiers, counters)
    finally:
        for each in tiers:
            if each is not None:
                each.close()


async def eventually(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - threads change it
            await trio.sleep(0.005)


async def test_a_block_comes_once_and_is_there(place: Path) -> None:
    async with opened(place) as rig:
        version = obj("a", 2.5)
        assert await rig.fill(version, 0, 3) == [Filled(i, Tier.ORIGIN, None) for i in range(3)]
        assert await rig.fill(version, 0, 99) == [Filled(i, Tier.SHM, None) for i in range(3)]
        assert await rig.fill(version, 3, 5) == []
        assert sum(length for _, _, length in rig.source.calls) == version.size
        assert [rig.stored(rig.shm, version, i) for i in range(3)] == [block(version, i) for i in range(3)]
        await rig.cache.flush_spill()
        assert rig.cache.count_cached(oid(version), 3) == {Tier.SHM: 3, Tier.DISK: 3}
        assert rig.cache.has(block_key(oid(version), 0)) is Tier.SHM
        assert rig.cache.has(block_key(oid(version), 9)) is None
        stats = rig.cache.stats()
        assert (stats["shm"]["blocks"], stats["disk"]["blocks"], stats["disk"]["spill_pending"]) == (3, 3, 0)
        assert stats["shm"]["state"] == "on"


async def test_single_flight(place: Path) -> None:
    async with opened(place) as rig:
        version = obj("a")
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(rig.fill, version)
            await eventually(lambda: rig.source.running == 1)
            await trio.sleep(0.05)
            rig.source.gate.set()
        assert len(rig.source.calls) == 1
        assert rig.counters.get("fills_joined") == 49
        assert rig.cache.stats()["fills"]["under_way"] == 0


async def test_a_cancelled_reader_cancels_nobody(place: Path) -> None:
    async with opened(place) as rig:
        version, results = obj("a"), []
        rig.source.gate.clear()

        async def patient() -> None:
            results.extend(await rig.fill(version))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05):
                await rig.fill(version)
            nursery.start_soon(patient)
            await trio.sleep(0.02)
            rig.source.gate.set()
        assert results == [Filled(0, Tier.ORIGIN, None)]
        assert len(rig.source.calls) == 1
        alone = obj("b")
        rig.source.gate.clear()
        with trio.move_on_after(0.05):
            await rig.fill(alone)
        rig.source.gate.set()
        await eventually(lambda: rig.cache.has(block_key(oid(alone), 0)) is Tier.SHM)


async def test_errors_reach_all_who_wait_and_are_not_kept(place: Path) -> None:
    async with opened(place) as rig:
        version, caught = obj("a"), []
        rig.source.error = errors.StaleObject("a is gone")
        rig.source.gate.clear()

        async def reader() -> None:
            try:
                await rig.fill(version)
            except errors.StaleObject as error:
                caught.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
            await eventually(lambda: rig.source.running == 1)
            rig.source.gate.set()
        assert len(caught) == len({id(error) for error in caught}) == 5
        assert await rig.fill(version, priority=Priority.READAHEAD) == []
        rig.source.error = None
        assert await rig.fill(version) == [Filled(0, Tier.ORIGIN, None)]


@pytest.mark.expect_warnings("unknown way")
async def test_an_unknown_error_is_translated_and_ends_nothing(place: Path) -> None:
    async with opened(place) as rig:
        rig.source.error = ValueError("a bug")
        with pytest.raises(errors.StorageUnavailable, match="a bug"):
            await rig.fill(obj("a"))
        rig.source.error = None
        assert await rig.fill(obj("a"))


async def test_a_body_of_the_wrong_length_is_an_error(place: Path) -> None:
    async with opened(place) as rig:
        rig.source.read_range = lambda version, start, length: memoryview(b"short")  # type: ignore[method-assign]
        with pytest.raises(errors.BadBody):
            await rig.fill(obj("a"))
        assert rig.cache.has(block_key(oid(obj("a")), 0)) is None


async def test_ranges(place: Path) -> None:
    async with opened(place, shm=64 * MIB) as rig:
        await rig.fill(obj("one", 100), 7, 1)
        assert rig.source.calls == [("one", 7 * BLOCK, BLOCK)]
        rig.source.calls.clear()
        await rig.fill(obj("few", 100), 0, 40)
        assert sorted(length for _, _, length in rig.source.calls) == [40 * BLOCK - 2 * MIB, MIB, MIB]
        rig.source.calls.clear()
        await rig.fill(obj("ahead", 100), 0, 100, priority=Priority.READAHEAD)
        assert sorted(length for _, _, length in rig.source.calls) == [100 * BLOCK - 4 * MIB, 4 * MIB]
        rig.source.calls.clear()
        await rig.fill(obj("one", 100), 5, 5)
        assert sorted(rig.source.calls) == [("one", 5 * BLOCK, 2 * BLOCK), ("one", 8 * BLOCK, 2 * BLOCK)]


async def test_demand_overtakes_readahead(place: Path) -> None:
    async with opened(place, shm=64 * MIB, requests=10) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            ahead = [obj(f"ahead{i}", 64) for i in range(6)]
            for version in ahead:
                nursery.start_soon(partial(rig.fill, version, 0, 64, priority=Priority.READAHEAD))
            await eventually(lambda: rig.source.running == 2)
            await trio.sleep(0.02)
            assert rig.source.running == 2, "readahead leaves 8 of the slots to readers"
            nursery.start_soon(rig.fill, obj("wanted"))
            waiting = next(version for version in ahead if version.key not in {name for name, _, _ in rig.source.calls})
            nursery.start_soon(rig.fill, waiting, 3)
            await eventually(lambda: rig.source.running == 4)
            assert {name for name, _, _ in rig.source.calls[2:]} == {"wanted", waiting.key}
            rig.source.gate.set()


async def test_the_bytes_under_way_are_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "LEAST_BUDGET", 4 * MIB)
    async with opened(place, shm=64 * MIB, memory=0, requests=64) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(partial(rig.fill, obj(f"o{number}", 16), 0, 16, priority=Priority.READAHEAD))
            await eventually(lambda: rig.source.running == 3)
            await trio.sleep(0.02)
            assert rig.source.running == 3, "readahead takes no more than three quarters"
            for number in range(20):
                nursery.start_soon(rig.fill, obj(f"d{number}", 16), 0, 16)
            await eventually(lambda: rig.source.running == 4)
            await trio.sleep(0.02)
            assert rig.cache.stats()["fills"]["held_bytes"] <= 4 * MIB
            rig.source.gate.set()
        assert rig.source.most <= 4
        assert rig.cache.stats()["fills"]["held_bytes"] == 0


async def test_from_disk_into_shm(place: Path) -> None:
    version = obj("a", 20)
    async with opened(place) as rig:
        await rig.fill(version, 0, 20)
    tempfile.TemporaryDirectory(dir=place).cleanup()
    async with opened(place / "other", disk=0) as rig:
        assert (await rig.fill(version))[0].source is Tier.ORIGIN
    for file in (place / "shm").iterdir():
        file.unlink()
    async with opened(place) as rig:
        assert await rig.fill(version, 0, 20) == [Filled(i, Tier.DISK, None) for i in range(20)]
        assert rig.source.calls == []
        assert [rig.stored(rig.shm, version, i) for i in range(20)] == [block(version, i) for i in range(20)]
        assert rig.counters.get("disk_hits") == 20


@pytest.mark.expect_warnings("bad block")
async def test_a_bad_block_on_disk_comes_from_the_source(place: Path) -> None:
    version = obj("a", 4)
    async with opened(place, shm=0) as rig:
        assert rig.disk is not None
        key = block_key(oid(version), 2)
        rig.disk.put_values([(key, codec.encode(block(version, 2), key)[:-1] + b"?")])
        filled = await rig.fill(version, 0, 4)
        assert [b.payload for b in filled] == [block(version, i) for i in range(4)]
        assert rig.counters.get("disk_corrupt") == 1
        assert rig.stored(rig.disk, version, 2) == block(version, 2)


async def test_without_tiers_the_bytes_come_with_the_answer(place: Path) -> None:
    version = obj("a", 2)
    async with opened(place, shm=0, disk=0) as rig:
        for _ in range(2):
            assert await rig.fill(version, 0, 2) == [Filled(i, Tier.ORIGIN, block(version, i)) for i in range(2)]
    async with opened(place, shm=0) as rig:
        assert (await rig.fill(version))[0] == Filled(0, Tier.ORIGIN, block(version, 0))
        assert (await rig.fill(version))[0] == Filled(0, Tier.DISK, block(version, 0))


async def test_inline_gives_the_bytes_also_of_blocks_that_are_there(place: Path) -> None:
    version = obj("a", 3)
    async with opened(place) as rig:
        await rig.fill(version, 0, 1)
        filled = await rig.fill(version, 0, 3, inline=True)
        assert [(b.index, b.payload) for b in filled] == [(i, block(version, i)) for i in range(3)]


@pytest.mark.expect_warnings("not usable now")
async def test_an_shm_tier_that_cannot_take_a_block(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = obj("a", 2)
    async with opened(place) as rig:
        assert rig.shm is not None

        def refuse(*args: object) -> None:
            raise errors.TierUnavailable("full")

        monkeypatch.setattr(rig.shm, "put_many", refuse)
        assert await rig.fill(version, 0, 2) == [Filled(i, Tier.ORIGIN, block(version, i)) for i in range(2)]
        assert rig.stored(rig.disk, version, 1) == block(version, 1)


async def test_spill_waits_for_readers_to_be_quiet(place: Path) -> None:
    async with opened(place, shm=64 * MIB) as rig:
        for number in range(30):
            await rig.fill(obj(f"o{number}"))
        assert rig.counters.get("disk_writes") < 30
        await eventually(
            lambda: rig.cache.stats()["disk"]["spill_pending"] == 0 and rig.counters.get("disk_writes") == 30
        )


async def test_nothing_leaves_shm_before_it_is_on_disk(place: Path) -> None:
    async with opened(place, shm=2 * MIB, disk=64 * MIB) as rig:
        versions = [obj(f"o{number}") for number in range(150)]
        async with trio.open_nursery() as nursery:
            for start in range(0, 150, 10):
                for version in versions[start : start + 10]:
                    nursery.start_soon(rig.fill, version)
                await trio.lowlevel.checkpoint()
        assert all(rig.cache.has(block_key(oid(version), 0)) for version in versions)
        assert rig.counters.get("spills_lost") == 0
        await rig.cache.flush_spill()
        assert all(rig.stored(rig.disk, version, 0) == block(version, 0) for version in versions)


async def test_the_next_start_spills_what_a_killed_one_left(place: Path) -> None:
    version = obj("a", 10)
    shm = TierWriter(str(place / "shm"), Tier.SHM, limit_bytes=8 * MIB, block_size=BLOCK, counters=Counters())
    shm.put_many([(block_key(oid(version), i), block(version, i)) for i in range(10)])
    shm.close()
    async with opened(place) as rig:
        await eventually(lambda: rig.cache.count_cached(oid(version), 10)[Tier.DISK] == 10)
        assert rig.stored(rig.disk, version, 9) == block(version, 9)


async def test_closing_ends_fills_that_hang(place: Path) -> None:
    release = threading.Event()
    results: list[str] = []
    start = time.monotonic()
    async with trio.open_nursery() as nursery:
        async with opened(place) as rig:
            await rig.fill(obj("b"))
            rig.source.gate = release

            async def reader() -> None:
                try:
                    await rig.fill(obj("a"))
                except errors.AgentUnavailable as error:
                    results.append(str(error))

            nursery.start_soon(reader)
            await eventually(lambda: rig.source.running == 1)
        assert rig.counters.get("disk_writes") == 1, "what was there is on disk when it is closed"
    assert time.monotonic() - start < 5
    assert results == ["the agent is stopping"]
    release.set()
    with pytest.raises(errors.AgentUnavailable):
        await rig.fill(obj("c"))


async def test_too_much_readahead_is_dropped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "MAX_WAITING_READAHEAD", 3)
    async with opened(place, shm=64 * MIB, requests=9) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(partial(rig.fill, obj(f"o{number}"), priority=Priority.READAHEAD))
            await trio.sleep(0.05)
            assert rig.counters.get("readahead_dropped") >= 14
            rig.source.gate.set()
        assert (await rig.fill(obj("o19")))[0].payload is None


requests = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 12), st.booleans(), st.sampled_from(Priority)),
    max_size=25,
)


@given(requests, st.sampled_from([0, 2 * MIB]), st.sampled_from([0, 2 * MIB]))
@settings(max_examples=25)
async def test_model(program: list[tuple[int, int, int, bool, Priority]], shm: int, disk: int) -> None:
    """Any mix of fills at once: every demand gets exactly its blocks, and all bytes anywhere are right."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cachefs-test-") as path:
        async with opened(Path(path), shm=shm, disk=disk) as rig:
            versions = [obj(f"o{number}", 2.3 + 3 * number) for number in range(4)]

            async def one(number: int, first: int, count: int, inline: bool, priority: Priority) -> None:
                version = versions[number]
                filled = await rig.fill(version, first, count, inline=inline, priority=priority)
                blocks = -(-version.size // BLOCK)
                if priority is Priority.DEMAND:
                    assert sorted(b.index for b in filled) == list(range(first, min(first + count, blocks)))
                for each in filled:
                    assert each.payload is None or each.payload == block(version, each.index)
                    assert each.payload is not None or (shm and not (inline and priority is Priority.DEMAND))

            async with trio.open_nursery() as nursery:
                for step in program:
                    nursery.start_soon(one, *step)
            for tier in (rig.shm, rig.disk):
                for version in versions:
                    for index in range(-(-version.size // BLOCK)):
                        found = rig.stored(tier, version, index)
                        assert found is None or found == block(version, index)
            assert rig.cache.stats()["fills"]["under_way"] == 0


def test_nothing_is_left_in_shm() -> None:
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"cachefs-test-{os.getpid()}")]
