"""`BlockCache.prefetch`: what becomes of each piece, and that no reader waits for the rest of a batch."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import trio

from cachefs import errors
from cachefs.block.block_cache import Priority
from cachefs.block.bulk import BATCH_OBJECTS, BATCHES, GROUP_OBJECTS
from cachefs.errors import CachefsError
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.store.port import Orders
from cachefs.types import ObjectVersion, Tier
from tests.support.block_cache_rig import BLOCK, MIB, Rig, Source, block, eventually, obj, oid, opened


def piece(version: ObjectVersion, first: int = 0, count: int = 1) -> Piece:
    return Piece(oid(version), version, first, count)


def small(name: str, size: int = 1000) -> ObjectVersion:
    return ObjectVersion(name, "etag", size)


class Asked:
    """One call of `prefetch`."""

    def __init__(self, rig: Rig, versions: Sequence[ObjectVersion | Piece], source: Source | None = None) -> None:
        self._over = trio.Event()
        self.calls = 0
        self._result: dict[str, Outcome] = {}
        pieces = [each if isinstance(each, Piece) else piece(each) for each in versions]
        rig.cache.prefetch(pieces, source or rig.source, self._done)
        assert not self.calls

    def _done(self, outcomes: Sequence[tuple[Piece, Outcome]]) -> None:
        self.calls += 1
        self._result = {piece.version.key: outcome for piece, outcome in outcomes}
        self._over.set()

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    async def result(self) -> dict[str, Outcome]:
        with trio.fail_after(10):
            await self._over.wait()
        assert self.calls == 1
        return self._result


class Scripted(Source):
    """`read_many` brings one object after the other, and does what `script` says before one of them comes."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, threading.Event] = {}
        """Objects that come when their event is set."""
        self.unwell: dict[str, int] = {}
        """Objects that have to be asked for so many times more."""
        self.begun: list[str] = []
        self.left_out: list[str] = []

    def hold(self, *keys: str) -> None:
        self.held = {key: threading.Event() for key in keys}

    def let_go(self) -> None:
        for event in self.held.values():
            event.set()

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        for number, version in enumerate(versions):
            self._bring(number, version, orders)

    def _bring(self, number: int, version: ObjectVersion, orders: Orders) -> None:
        while True:
            if not orders.begin(number):
                self.left_out.append(version.key)
                return
            self.begun.append(version.key)
            if version.key in self.held:
                assert self.held[version.key].wait(10)
            if not self.unwell.get(version.key):
                break
            self.unwell[version.key] -= 1
            if not orders.postponed(number):
                return
        if version.key in self.errors:
            orders.failed(number, self.errors[version.key])
        else:
            orders.arrived(number, self.content(version), Tier.ORIGIN)


async def test_what_becomes_of_each_piece(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        await rig.fill(small("there"))
        rig.source.errors = {
            "gone": errors.StaleObject("gone"),
            "denied": errors.AccessDenied("no"),
            "away": errors.StorageUnavailable("away"),
        }
        names = ["there", "a", "gone", "b", "denied", "away", "c"]
        asked = Asked(rig, [*map(small, names), obj("long", 3.5), ObjectVersion("empty", "etag", 0)])
        assert await asked.result() == {
            "there": Outcome.THERE,
            "a": Outcome.FETCHED,
            "gone": Outcome.GONE,
            "b": Outcome.FETCHED,
            "denied": Outcome.FAILED,
            "away": Outcome.FAILED,
            "c": Outcome.FETCHED,
            "long": Outcome.FETCHED,
            "empty": Outcome.THERE,
        }
        for name in "abc":
            assert rig.stored(rig.shm, small(name), 0) == block(small(name), 0)
        assert rig.stored(rig.shm, obj("long", 3.5), 0) == block(obj("long", 3.5), 0)
        await rig.settled()
        assert await Asked(rig, [small("a"), piece(obj("long", 3.5), 1, 9)]).result() == {
            "a": Outcome.THERE,
            "long": Outcome.FETCHED,
        }
        assert rig.stored(rig.shm, obj("long", 3.5), 3) == block(obj("long", 3.5), 3)
        await rig.cache.flush_spill()
        assert rig.stored(rig.disk, small("b"), 0) == block(small("b"), 0)
        assert await Asked(rig, [small("b"), piece(obj("long", 3.5), 0, 4)]).result() == {
            "b": Outcome.THERE,
            "long": Outcome.THERE,
        }
        await rig.settled()
        assert rig.counters.get("fills_joined") == 0


async def test_a_reader_comes_before_the_turn_of_its_object(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Scripted()
        source.hold("o0")
        asked = Asked(rig, [small(f"o{number}") for number in range(20)])
        await eventually(lambda: source.begun == ["o0"])
        with trio.fail_after(2):
            [filled] = await rig.fill(small("o7"), inline=True)
        assert filled.payload == block(small("o7"), 0)
        assert not asked.is_over
        source.let_go()
        assert await asked.result() == {f"o{n}": Outcome.JOINED if n == 7 else Outcome.FETCHED for n in range(20)}
        assert source.left_out == ["o7"]
        assert source.calls == [("o7", 0, 1000)]
        await rig.settled()
        assert rig.counters.get("bulk_taken_over") == 1


async def test_a_reader_joins_an_object_that_is_on_its_way(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig, trio.open_nursery() as nursery:
        rig.source = source = Scripted()
        source.hold("o0", "o1")
        asked = Asked(rig, [small(f"o{number}") for number in range(3)])
        await eventually(lambda: source.begun == ["o0"])
        nursery.start_soon(rig.fill, small("o0"))
        await trio.sleep(0.02)
        source.held["o0"].set()
        await eventually(lambda: rig.stored(rig.shm, small("o0"), 0) is not None)  # though o1 hangs
        source.let_go()
        assert await asked.result() == {"o0": Outcome.JOINED, "o1": Outcome.FETCHED, "o2": Outcome.FETCHED}
        assert source.calls == []


async def test_a_reader_wants_what_has_come_and_is_not_committed_yet(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Scripted()
        source.hold("o3")
        asked = Asked(rig, [small(f"o{number}") for number in range(4)])
        await eventually(lambda: source.begun[-1:] == ["o3"])
        assert rig.stored(rig.shm, small("o1"), 0) is None
        with trio.fail_after(2):
            await rig.fill(small("o1"))
        assert rig.stored(rig.shm, small("o1"), 0) == block(small("o1"), 0)
        source.let_go()
        assert set((await asked.result()).values()) == {Outcome.JOINED, Outcome.FETCHED}
        assert source.calls == []


@pytest.mark.parametrize("first", ["reader", "failure"])
async def test_a_reader_does_not_wait_for_what_is_asked_for_again(tmp_path: Path, first: str) -> None:
    async with opened(tmp_path) as rig, trio.open_nursery() as nursery:
        rig.source = source = Scripted()
        source.unwell = {"o0": 10**9 if first == "failure" else 1}
        source.hold(*([] if first == "failure" else ["o0"]))
        asked = Asked(rig, [small("o0"), small("o1")])
        await eventually(lambda: len(source.begun) > (2 if first == "failure" else 0))
        if first == "failure":
            with trio.fail_after(2):
                await rig.fill(small("o0"))
        else:
            nursery.start_soon(rig.fill, small("o0"))
            await trio.sleep(0.02)
            source.let_go()
        assert await asked.result() == {"o0": Outcome.JOINED, "o1": Outcome.FETCHED}
        assert source.calls == [("o0", 0, 1000)], "by the way of a reader"


@pytest.mark.parametrize("error", [errors.StaleObject("gone"), errors.AccessDenied("no")])
async def test_an_error_reaches_the_reader_who_has_joined(tmp_path: Path, error: CachefsError) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Scripted()
        source.hold("o0", "o1")
        source.errors = {"o0": error}
        asked = Asked(rig, [small("o0"), small("o1")])
        await eventually(lambda: source.begun == ["o0"])
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(type(error)), trio.fail_after(2):  # o1 hangs meanwhile
                    await rig.fill(small("o0"))

            nursery.start_soon(read)
            await trio.sleep(0.02)
            source.held["o0"].set()
        source.let_go()
        assert (await asked.result())["o1"] is Outcome.FETCHED


class Lazy(Source):
    """Says nothing of the last object, or breaks."""

    broken: Exception | None = None

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        super().read_many(versions[:-1], orders)
        orders.begin(len(versions) - 1)
        self.gate.wait(10)
        if self.broken is not None:
            raise self.broken


@pytest.mark.expect_warnings("failed in an unknown way")
@pytest.mark.parametrize("broken", [None, ValueError("a defect"), errors.StorageUnavailable("away")])
async def test_a_source_that_leaves_something_out(tmp_path: Path, broken: Exception | None) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Lazy()
        source.broken = broken
        assert await Asked(rig, [small("a"), small("b")]).result() == {"a": Outcome.FETCHED, "b": Outcome.FAILED}
        await rig.settled()
        await rig.fill(small("b"))


async def test_a_reader_of_what_a_source_leaves_out_gets_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Lazy()
        asked = Asked(rig, [small("a")])
        source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.fill, small("a"))
            await trio.sleep(0.05)
            source.gate.set()
        assert rig.stored(rig.shm, small("a"), 0) == block(small("a"), 0)
        assert await asked.result() == {"a": Outcome.JOINED}


async def test_bytes_of_another_length_are_refused(tmp_path: Path) -> None:
    class Short(Source):
        def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
            for number in range(len(versions)):
                assert orders.begin(number)
                orders.arrived(number, b"short", Tier.PEER)

    async with opened(tmp_path) as rig:
        assert await Asked(rig, [small("a")], Short()).result() == {"a": Outcome.FAILED}
        assert rig.stored(rig.shm, small("a"), 0) is None


async def test_hanging_batches_keep_no_reader_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path, requests=4) as rig:
        rig.source = source = Scripted()
        source.hold("a0", f"a{BATCH_OBJECTS}")
        asked = Asked(rig, [small(f"a{number}") for number in range(3 * BATCH_OBJECTS)])
        await eventually(lambda: len(source.begun) == BATCHES)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(rig.fill, small(f"other{number}"))
                nursery.start_soon(rig.fill, small(f"a{2 * BATCH_OBJECTS + 5}"))
        assert len(source.begun) == BATCHES
        source.let_go()
        assert Counter((await asked.result()).values()) == {Outcome.FETCHED: 3 * BATCH_OBJECTS - 1, Outcome.JOINED: 1}


async def test_groups_are_committed_while_the_rest_comes(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Scripted()
        source.hold(f"o{GROUP_OBJECTS}")
        asked = Asked(rig, [small(f"o{number}") for number in range(GROUP_OBJECTS + 1)])
        await eventually(lambda: rig.stored(rig.shm, small("o0"), 0) is not None)
        await eventually(lambda: rig.cache.stats()["fills"]["under_way"] == 1)
        source.let_go()
        assert set((await asked.result()).values()) == {Outcome.FETCHED}


async def test_two_who_want_the_same(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Scripted()
        source.hold("o0")
        first = Asked(rig, [small("o0"), small("o1")])
        second = Asked(rig, [small("o1"), small("o2")])
        await eventually(lambda: "o2" in source.begun)
        assert not second.is_over
        source.let_go()
        assert await first.result() == {"o0": Outcome.FETCHED, "o1": Outcome.FETCHED}
        assert await second.result() == {"o1": Outcome.JOINED, "o2": Outcome.FETCHED}


async def test_a_reader_of_a_longer_object_overtakes(tmp_path: Path) -> None:
    async with opened(tmp_path, shm=32 * MIB, requests=2) as rig:
        rig.source.gate.clear()
        asked = Asked(rig, [piece(obj("long", 128), 0, 64), piece(obj("long2", 128), 0, 64)])
        await eventually(lambda: rig.source.running > 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rig.fill, obj("long2", 128), 0, 64))
            nursery.start_soon(partial(rig.fill, obj("other", 1), priority=Priority.DEMAND))
            await trio.sleep(0.05)
            assert rig.source.running == 2
            rig.source.gate.set()
        assert await asked.result() == {"long": Outcome.FETCHED, "long2": Outcome.JOINED}


async def test_nothing_is_fetched_that_nobody_keeps(tmp_path: Path) -> None:
    async with opened(tmp_path, shm=0, disk=0) as rig:
        assert await Asked(rig, [small("a"), obj("long", 3)]).result() == {
            "a": Outcome.DROPPED,
            "long": Outcome.DROPPED,
        }
        assert rig.source.calls == []


async def test_without_a_shm_tier_the_disk_tier_takes_them(tmp_path: Path) -> None:
    async with opened(tmp_path, shm=0) as rig:
        assert set((await Asked(rig, [small(f"o{n}") for n in range(40)]).result()).values()) == {Outcome.FETCHED}
        assert rig.stored(rig.disk, small("o39"), 0) == block(small("o39"), 0)
        assert set((await Asked(rig, [small(f"o{n}") for n in range(40)]).result()).values()) == {Outcome.THERE}


async def test_the_cache_closes_meanwhile(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:
        rig.source = source = Scripted()
        source.hold("o0")
        asked = Asked(rig, [small("o0"), small("o1")])
        await eventually(lambda: source.begun == ["o0"])
    late = Asked(rig, [small("o2")])
    assert set((await asked.result()).values()) == {Outcome.DROPPED}
    assert await late.result() == {"o2": Outcome.DROPPED}
    source.let_go()
    await trio.sleep(0.05)


@pytest.mark.expect_warnings("could not be told")
async def test_whoever_asks_and_breaks_ends_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as rig:

        def broken(outcomes: object) -> None:
            raise ValueError("a defect")

        rig.cache.prefetch([piece(small("a"))], rig.source, broken)
        assert await Asked(rig, [small("b")]).result() == {"b": Outcome.FETCHED}


@pytest.mark.parametrize("seed", range(6))
async def test_readers_and_batches_at_random(tmp_path: Path, seed: int) -> None:
    """Whatever overtakes what: every reader gets the right bytes, every call an answer, and nothing stays behind."""
    draw = random.Random(seed)
    versions = [small(f"o{number}", draw.randrange(1, BLOCK)) for number in range(120)]
    async with opened(tmp_path, shm=2 * MIB, disk=draw.choice([0, 8 * MIB])) as rig:
        rig.source = source = Scripted()
        source.unwell = {version.key: draw.randrange(3) for version in draw.sample(versions, 40)}
        calls = []

        async def read() -> None:
            for _ in range(60):
                version = draw.choice(versions)
                [filled] = await rig.fill(version, inline=True)
                assert filled.payload == block(version, 0)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(read)
                for _ in range(15):
                    calls.append(Asked(rig, draw.sample(versions, draw.randrange(1, 60))))
                    await trio.sleep(draw.random() / 50)
            for asked in calls:
                assert not {Outcome.FAILED, Outcome.GONE} & set((await asked.result()).values())
        await rig.settled()
