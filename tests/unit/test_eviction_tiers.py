"""Policies in real tiers: pins that fill one, plans, restarts, and what is spilled to a full disk tier."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cachefs import errors, metrics
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.policies.choice import policy_maker
from cachefs.block.spill import Spiller
from cachefs.config import Eviction
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectId, Tier, block_key
from tests.support.blocks import BLOCK, MIB, payload, put

OIDS = [ObjectId(random.Random(number).randbytes(16)) for number in range(2000)]


def name(number: int) -> BlockKey:
    return block_key(OIDS[number], 0)


def open_tier(
    place: Path, kind: Tier = Tier.DISK, limit: int = 8 * MIB, eviction: Eviction = Eviction.EPOCH
) -> TierWriter:
    return TierWriter(
        str(place), kind, limit_bytes=limit, block_size=BLOCK, counters=Counters(), policy=policy_maker(eviction)
    )


def fill(tier: TierWriter, numbers: range, size: int = 16_000) -> None:
    for number in numbers:
        put(tier, [(name(number), payload(number, size))])


@pytest.mark.parametrize("eviction", list(Eviction))
@pytest.mark.expect_warnings("all that is left in it is pinned")
def test_a_tier_full_of_pins_stores_nothing_more(tmp_path: Path, eviction: Eviction) -> None:
    tier = open_tier(tmp_path / "t", eviction=eviction)
    try:
        tier.guide(is_pinned=lambda oid: True)
        with pytest.raises(errors.TierUnavailable):
            fill(tier, range(1000))
        stored = tier.stats()["blocks"]
        assert stored > 200
        assert all(name(number) in tier for number in range(stored))
        with pytest.raises(errors.TierUnavailable):
            put(tier, [(name(1500), payload(1, 16_000))])
        assert tier.state == "on"
        tier.guide(is_pinned=None)
        tier._pause_until = 0.0
        fill(tier, range(1000, 1100))
        assert name(1099) in tier
    finally:
        tier.close()


def test_pins_and_plans_hold_while_others_come_and_go(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t")
    try:
        fill(tier, range(100))
        pinned = set(OIDS[:50])
        planned = {oid: at for at, oid in enumerate(OIDS[50:100])}
        tier.guide(next_use=planned.get, is_pinned=pinned.__contains__)
        fill(tier, range(100, 1500))
        assert all(name(number) in tier for number in range(100))
        assert set(tier.oldest_first()) >= {name(number) for number in range(100)}
    finally:
        tier.close()


def test_others_get_their_room_back_from_pins(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t")
    try:
        tier.guide(is_pinned=lambda oid: True)
        fill(tier, range(200))
        before = tier.stats()["used_bytes"]
        with pytest.raises(errors.TierUnavailable, match="pinned"):
            tier._evict(MIB)  # as for a block of our own
        tier._evict(MIB, give_back=True)
        assert before - 2 * MIB < tier.stats()["used_bytes"] <= before - MIB
    finally:
        tier.close()


def test_what_a_tier_had_is_its_stable_part(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t")
    fill(tier, range(1000))
    kept = tier.oldest_first()
    tier.close()
    tier = open_tier(tmp_path / "t")
    try:
        fill(tier, range(1000, 2000))
        assert sum(block in tier for block in kept) >= 0.9 * len(kept)
    finally:
        tier.close()


async def test_a_full_disk_tier_is_not_written_for_nothing(tmp_path: Path) -> None:
    """Epochs over twice of what there is: once the disk tier is full, hardly anything is written to it."""
    counters = Counters()
    shm = open_tier(tmp_path / "shm", Tier.SHM, limit=2 * MIB)
    disk = open_tier(tmp_path / "disk", Tier.DISK, limit=8 * MIB)
    try:
        spiller = Spiller(shm, disk, counters, lambda: 0.0)
        draw = random.Random(1)
        written = []
        hits = 0
        for _ in range(4):
            before = counters.get(metrics.SPILLS.name)
            hits = 0
            for number in draw.sample(range(1200), 1200):
                block = name(number)
                if block in shm or block in disk:
                    hits += 1
                    shm.touch([block])
                    disk.touch([block])
                    continue
                put(shm, [(block, payload(number, 16_000))], spiller.demote)
                spiller.add([block])
            await spiller.flush()
            written.append(counters.get(metrics.SPILLS.name) - before)
        assert written[0] > 350
        assert max(written[1:]) < written[0] // 3, written
        assert counters.get(metrics.SPILLS_DECLINED.name) > 1000
        assert hits > 400
    finally:
        shm.close()
        disk.close()


class Pair:
    """A shm tier and a disk tier twice as large, run as the block cache runs them, without bytes from anywhere."""

    def __init__(self, place: Path) -> None:
        self.counters = Counters()
        self.shm = open_tier(place / "shm", Tier.SHM, limit=4 * MIB)
        self.disk = open_tier(place / "disk", Tier.DISK, limit=8 * MIB)
        self.spiller = Spiller(self.shm, self.disk, self.counters, lambda: 0.0)

    def bring(self, numbers: Sequence[int]) -> None:
        """These come before anybody reads them."""
        for number in numbers:
            block = name(number)
            if block not in self.shm and block not in self.disk:
                put(self.shm, [(block, payload(number, 16_000))], self.spiller.demote, ahead=True)
                self.spiller.add([block], unread=[block])

    def read(self, number: int) -> bool:
        """One is read; returns whether a tier had it."""
        block = name(number)
        here = block in self.shm or block in self.disk
        if not here:
            put(self.shm, [(block, payload(number, 16_000))], self.spiller.demote)
            self.spiller.add([block])
            return False
        self.shm.touch([block])
        self.disk.touch([block])
        self.spiller.note_reads([block])
        return True

    def epoch(self, numbers: Sequence[int], seed: int) -> int:
        """Read all of them in an order of their own; returns how many were hits."""
        return sum(self.read(number) for number in random.Random(seed).sample(numbers, len(numbers)))

    def close(self) -> None:
        self.shm.close()
        self.disk.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


AHEAD = 25
"""As many as a shm tier of this size keeps until they are read."""


async def test_a_scan_that_was_fetched_ahead_costs_nothing(pair: Pair) -> None:
    """What prefetch brings is no read, also for the disk tier: or each file would be read twice as it seems."""
    train, before = range(1000), 0
    for seed in range(3):
        before = pair.epoch(train, seed)
        await pair.spiller.flush()
    for start in range(1000, 2000):
        pair.bring(range(start, min(start + AHEAD, 2000)))
        assert pair.read(start)
        if start % 50 == 0:
            await pair.spiller.flush()
    after = pair.epoch(train, 7)
    assert before > 400
    assert after > 0.95 * before


async def test_a_full_pair_of_tiers_holds_few_blocks_twice(pair: Pair) -> None:
    train = range(1000)
    for number in train:
        pair.read(number)
        if number % 10 == 0:
            await pair.spiller.flush()  # while there is room, the disk tier has what the shm tier has
    for seed in range(2):
        pair.epoch(train, seed)
        await pair.spiller.flush()
    in_shm = [number for number in train if name(number) in pair.shm]
    twice = [number for number in in_shm if name(number) in pair.disk]
    assert pair.disk.is_full
    assert len(in_shm) > 160
    assert len(twice) < 0.2 * len(in_shm)


async def test_a_tier_with_room_takes_all_that_a_plan_names(pair: Pair) -> None:
    pair.disk.guide(next_use=lambda oid: 1_000_000)
    keys = [name(number) for number in range(50)]
    assert pair.disk.admitted(keys) == keys
    fill(pair.disk, range(100, 700))
    assert pair.disk.is_full
    assert pair.disk.admitted(keys) == [], "nothing here is read later than these"


@pytest.mark.expect_warnings("its data file was removed or cut")
async def test_what_a_lost_disk_tier_had_is_written_again(pair: Pair) -> None:
    for number in range(60):
        pair.read(number)
    await pair.spiller.flush()
    assert all(name(number) in pair.disk for number in range(60))
    (Path(pair.disk.directory) / "data.mdb").unlink()
    pair.disk.maintain()
    pair.disk._retry_at = 0.0
    pair.disk.maintain()
    assert len(pair.spiller) == 0
    await pair.spiller.follow()
    assert len(pair.spiller) == 60
    await pair.spiller.flush()
    assert all(name(number) in pair.disk for number in range(60))


async def test_what_a_tier_may_use_is_known_without_asking_the_file_system(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers and status ask for it, and a disk that hangs or is gone is no trouble for them."""
    for number in range(60):
        pair.read(number)
    await pair.spiller.flush()
    usable = pair.disk.stats()["usable_bytes"]

    def gone(_: object) -> tuple[int, int]:
        raise errors.TierUnavailable("its file system does not answer")

    monkeypatch.setattr("cachefs.block.disk_room.DiskRoom._measure", gone)
    pair.disk._growth.growing = False
    assert not pair.disk.is_full
    assert pair.disk.stats()["usable_bytes"] == usable > 0
    assert pair.disk.admitted([name(1500)]) == [name(1500)]
    assert pair.read(5)
