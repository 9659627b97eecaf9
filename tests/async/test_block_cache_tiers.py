"""The block cache between its tiers: promotion, tiers that fail or are off, spill, restart."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from cachefs import errors
from cachefs.block import codec
from cachefs.block.block_cache import Filled, Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import Tier, block_key
from tests.support.block_cache_rig import BLOCK, MIB, block, eventually, obj, oid, opened
from tests.support.blocks import put


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
            await rig.settled()
    async with opened(place, shm=0) as rig:
        assert (await rig.fill(version))[0] == Filled(0, Tier.ORIGIN, block(version, 0))
        await rig.settled()
        assert (await rig.fill(version))[0] == Filled(0, Tier.DISK, block(version, 0))


async def test_nothing_is_read_ahead_that_nobody_keeps(place: Path) -> None:
    version = obj("a", 8)
    async with opened(place, shm=0, disk=0) as rig:
        assert await rig.fill(version, 0, 8, priority=Priority.READAHEAD) == []
        await trio.sleep(0.05)
        assert not rig.source.calls
        assert rig.counters.get("readahead_dropped") == 8
    async with opened(place, shm=0) as rig:
        await rig.fill(version, 0, 4, priority=Priority.READAHEAD)
        await rig.settled()
        assert rig.cache.count_cached(oid(version), 8) == {Tier.SHM: 0, Tier.DISK: 4}, "the disk tier keeps it"
        hits = rig.counters.get("disk_hits")
        assert await rig.fill(version, 0, 4, priority=Priority.READAHEAD) == []
        assert rig.counters.get("disk_hits") == hits, "it is as near as it can come"
        assert [b.payload for b in await rig.fill(version, 0, 4)] == [block(version, i) for i in range(4)]


async def test_who_comes_late_to_a_block_that_no_tier_took_gets_it_too(place: Path) -> None:
    version = obj("a", 32)
    async with opened(place, shm=0) as rig:
        ahead = partial(rig.fill, version, 0, 32, priority=Priority.READAHEAD)
        async with trio.open_nursery() as nursery:
            rig.source.gate.clear()
            nursery.start_soon(ahead)
            await eventually(lambda: rig.source.running > 0)
            nursery.start_soon(rig.fill, version, 3)
            await trio.sleep(0.01)
            rig.source.gate.set()
        assert (await rig.fill(version, 3))[0].payload == block(version, 3)


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

        def refuse(*args: object, **options: object) -> None:
            raise errors.TierUnavailable("full")

        monkeypatch.setattr(rig.shm, "put_values", refuse)
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
        await rig.settled()
        await rig.cache.flush_spill()
        assert all(rig.stored(rig.disk, version, 0) == block(version, 0) for version in versions)


async def test_the_next_start_spills_what_a_killed_one_left(place: Path) -> None:
    version = obj("a", 10)
    shm = TierWriter(str(place / "shm"), Tier.SHM, limit_bytes=8 * MIB, block_size=BLOCK, counters=Counters())
    put(shm, [(block_key(oid(version), i), block(version, i)) for i in range(10)])
    shm.close()
    async with opened(place) as rig:
        await eventually(lambda: rig.cache.count_cached(oid(version), 10)[Tier.DISK] == 10)
        assert rig.stored(rig.disk, version, 9) == block(version, 9)
