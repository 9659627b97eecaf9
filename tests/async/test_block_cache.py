"""The block cache with real tiers: single flight, cancellation, order, budgets, faults of the source, a model."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from hypothesis import given, settings
from hypothesis import strategies as st

from cachefs import errors
from cachefs.block import block_cache, budget
from cachefs.block.block_cache import Filled, Priority
from cachefs.types import Tier, block_key
from tests.support.block_cache_rig import BLOCK, MIB, Source, block, eventually, obj, oid, opened


async def test_a_block_comes_once_and_is_there(place: Path) -> None:
    async with opened(place) as rig:
        version = obj("a", 2.5)
        assert await rig.fill(version, 0, 3) == [Filled(i, Tier.ORIGIN, None) for i in range(3)]
        await rig.settled()
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
        # the thread that committed the block has answered: the event loop hears of it a moment later
        await eventually(lambda: rig.cache.stats()["fills"]["under_way"] == 0)


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
        rig.source.read_blocks = lambda version, start, buffers: iter(())  # type: ignore[method-assign]
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
        await rig.settled()
        rig.source.calls.clear()
        await rig.fill(obj("ahead", 100), 0, 100, priority=Priority.READAHEAD)
        assert sorted(length for _, _, length in rig.source.calls) == [25 * BLOCK] * 4, "four connections share it"
        await rig.settled()
        rig.source.calls.clear()
        await rig.fill(obj("far ahead", 640), 0, 640, priority=Priority.READAHEAD)
        assert sorted(length for _, _, length in rig.source.calls) == [8 * MIB] * 5
        await rig.settled()
        rig.source.calls.clear()
        await rig.fill(obj("one", 100), 5, 5)
        assert sorted(rig.source.calls) == [("one", 5 * BLOCK, 2 * BLOCK), ("one", 8 * BLOCK, 2 * BLOCK)]


async def test_a_stretch_behind_others_that_are_under_way_is_one_range(place: Path) -> None:
    async with opened(place, shm=64 * MIB) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            ahead = partial(rig.fill, obj("long", 640), count=64, priority=Priority.READAHEAD)
            nursery.start_soon(partial(ahead, first=0))
            await eventually(lambda: rig.source.running == 4)
            nursery.start_soon(partial(ahead, first=64))
            await eventually(lambda: rig.source.running == 5)
            rig.source.gate.set()
        assert sorted(length for _, _, length in rig.source.calls) == [16 * BLOCK] * 4 + [64 * BLOCK]


async def test_demand_overtakes_readahead(place: Path) -> None:
    async with opened(place, shm=64 * MIB, requests=8) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            ahead = [obj(f"ahead{i}", 64) for i in range(6)]
            for version in ahead:
                nursery.start_soon(partial(rig.fill, version, 0, 64, priority=Priority.READAHEAD))
            await eventually(lambda: rig.source.running == 6)
            await trio.sleep(0.02)
            assert rig.source.running == 6, "readahead leaves a quarter of the slots to readers"
            nursery.start_soon(rig.fill, obj("wanted"))
            waiting = next(version for version in ahead if version.key not in {name for name, _, _ in rig.source.calls})
            nursery.start_soon(rig.fill, waiting, 3)
            await eventually(lambda: rig.source.running == 8)
            assert {name for name, _, _ in rig.source.calls[6:]} == {"wanted", waiting.key}
            rig.source.gate.set()


async def test_the_bytes_under_way_are_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST_BUDGET", 16 * MIB)  # 12 MiB of it to fetch with
    async with opened(place, shm=64 * MIB, memory=0, requests=64) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(partial(rig.fill, obj(f"o{number}", 16), 0, 16, priority=Priority.READAHEAD))
            await eventually(lambda: rig.source.running == 4)
            await trio.sleep(0.02)
            assert rig.source.running == 4, "readahead takes no more than half of what it may have"
            for number in range(20):
                nursery.start_soon(rig.fill, obj(f"d{number}", 16), 0, 16)
            await eventually(lambda: rig.source.running == 7)
            await trio.sleep(0.02)
            assert rig.cache.stats()["fills"]["held_bytes"] <= 9 * MIB
            rig.source.gate.set()
        assert rig.source.most <= 8
        await rig.settled()
        assert rig.cache.stats()["fills"]["held_bytes"] == 0


async def test_small_blocks_on_their_way_count_as_what_they_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as a source allows, when they are small: `--max-requests` is the bound."""
    monkeypatch.setattr(budget, "LEAST_BUDGET", 32 * MIB)
    async with opened(place, shm=64 * MIB, memory=0, requests=100) as rig:
        rig.source.gate.clear()
        async with trio.open_nursery() as nursery:
            for number in range(120):
                nursery.start_soon(rig.fill, obj(f"small{number}"))
            await eventually(lambda: rig.source.running == 100)
            rig.source.gate.set()
        assert rig.source.most == 100


async def test_a_source_that_hangs_keeps_no_other_waiting(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LEAST_BUDGET", 16 * MIB)
    async with opened(place, shm=64 * MIB, memory=0, requests=64) as rig:
        rig.source.gate.clear()
        healthy = Source()
        async with trio.open_nursery() as nursery:
            for number in range(40):
                for priority in Priority:
                    hanging = obj(f"{priority.name}{number}", 16)
                    nursery.start_soon(partial(rig.fill, hanging, 0, 16, priority=priority))
            await eventually(lambda: rig.source.running > 3)
            await trio.sleep(0.02)
            for number in range(30):
                version = obj(f"healthy{number}", 16)
                with trio.fail_after(2):
                    await rig.cache.fill(oid(version), version, healthy, 0, 16)
            ahead = obj("ahead of a reader", 16)
            with trio.fail_after(2):
                await rig.cache.fill(oid(ahead), ahead, healthy, 0, 16, priority=Priority.READAHEAD)
            assert rig.cache.has(block_key(oid(ahead), 15)) is Tier.SHM
            rig.source.gate.set()


async def test_closing_ends_fills_that_hang(place: Path) -> None:
    release = threading.Event()
    results: list[str] = []
    start = time.monotonic()
    async with trio.open_nursery() as nursery:
        async with opened(place) as rig:
            await rig.fill(obj("b"))
            await rig.settled()
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


@pytest.mark.parametrize("routed", [False, True], ids=["one line", "by a route"])
async def test_too_much_readahead_is_dropped(place: Path, monkeypatch: pytest.MonkeyPatch, routed: bool) -> None:
    monkeypatch.setattr(block_cache, "MAX_WAITING_READAHEAD", 3)
    async with opened(place, shm=64 * MIB, requests=1) as rig:
        if routed:
            line = Source(max_requests=1)
            line.gate = rig.source.gate
            monkeypatch.setattr(rig.source, "route", lambda version, start: line)
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
                for each in filled if priority is Priority.DEMAND else ():
                    assert each.payload is None or each.payload == block(version, each.index)
                    assert each.payload is not None or (shm and not inline)

            async with trio.open_nursery() as nursery:
                for step in program:
                    nursery.start_soon(one, *step)
            await rig.settled()
            for tier in (rig.shm, rig.disk):
                for version in versions:
                    for index in range(-(-version.size // BLOCK)):
                        found = rig.stored(tier, version, index)
                        assert found is None or found == block(version, index)
            assert rig.cache.stats()["fills"]["under_way"] == 0


def test_nothing_is_left_in_shm() -> None:
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"cachefs-test-{os.getpid()}")]


async def test_what_comes_from_peers_is_told_from_what_comes_from_the_store(tmp_path):
    async with opened(tmp_path) as rig:
        version = obj("mixed", 6)
        plain = rig.source.read_blocks

        def mixed(version, start, buffers):
            for count, _ in plain(version, start, buffers):
                yield count, Tier.PEER if count % 2 else Tier.ORIGIN

        rig.source.read_blocks = mixed  # type: ignore[method-assign]
        filled = await rig.fill(version, 0, 3)
        assert [block.source for block in filled] == [Tier.PEER, Tier.ORIGIN, Tier.PEER]
        await rig.settled()
        assert (rig.counters.get("peer_fills"), rig.counters.get("origin_fills")) == (2, 1)
        assert rig.counters.get("peer_fill_bytes") == 2 * rig.counters.get("origin_fill_bytes")
