"""Quotas and time to live of volumes in real tiers: exact, across restarts, beside pins, and cheap."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachefs.block import codec
from cachefs.block.holdings import GRAIN, NOBODY, Limit
from cachefs.block.ledger import value_cost
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.policies.choice import policy_maker
from cachefs.block.spill import Spiller
from cachefs.config import Eviction
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectId, Tier, block_key
from tests.support.blocks import BLOCK, MIB, payload

SIZE = 16_000
COST = value_cost(SIZE + codec.HEADER_SIZE)
OIDS = [ObjectId(random.Random(number).randbytes(16)) for number in range(3000)]
MINE, OTHERS = 7, 8


def name(number: int) -> BlockKey:
    return block_key(OIDS[number], 0)


class Clock:
    """Seconds since the epoch, as a test says."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def open_tier(
    place: Path,
    limits: dict[int, Limit] | None = None,
    *,
    limit: int = 32 * MIB,
    eviction: Eviction = Eviction.LRU,
    kind: Tier = Tier.DISK,
    clock: Clock | None = None,
) -> TierWriter:
    tier = TierWriter(
        str(place), kind, limit_bytes=limit, block_size=BLOCK, counters=Counters(), policy=policy_maker(eviction),
        limits=limits,
    )  # fmt: skip
    if clock is not None:
        tier._holdings._clock = clock
    return tier


def store(tier: TierWriter, numbers: range | list[int], owner: int = MINE, size: int = SIZE) -> None:
    for number in numbers:
        tier.put_values([(name(number), codec.encode(payload(number, size), name(number)))], owner=owner)


def held(tier: TierWriter, numbers: range) -> list[int]:
    return [number for number in numbers if name(number) in tier]


def tend(tier: TierWriter, times: int = 1) -> None:
    for _ in range(times):
        tier._holdings._next_pass = 0.0
        tier.maintain()


@pytest.mark.parametrize("eviction", list(Eviction))
def test_a_volume_evicts_its_own_blocks(tmp_path: Path, eviction: Eviction) -> None:
    tier = open_tier(tmp_path / "t", {MINE: Limit(quota_bytes=100 * COST)}, eviction=eviction)
    try:
        store(tier, range(200), OTHERS)
        for number in range(200, 600):
            store(tier, [number])
            own = tier.held_by(MINE)
            assert own is not None
            assert own <= 100 * COST
            assert own == len(held(tier, range(200, 600))) * COST
        assert len(held(tier, range(200, 600))) == 100
        assert held(tier, range(200)) == list(range(200))
        assert tier.stats()["used_bytes"] == 300 * COST
    finally:
        tier.close()


def test_the_order_is_that_of_the_policy_among_its_own_blocks(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t", {MINE: Limit(quota_bytes=10 * COST)})
    try:
        store(tier, range(10))
        tier.touch([name(0), name(1)], MINE)
        tier.touch([name(2)])  # by somebody who is not known
        store(tier, range(10, 15))
        assert held(tier, range(15)) == [0, 1, 2, 8, 9, 10, 11, 12, 13, 14]
    finally:
        tier.close()


def test_the_tier_evicts_across_volumes_when_it_is_full(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t", {MINE: Limit(quota_bytes=300 * COST)}, limit=8 * MIB)
    try:
        store(tier, range(200))
        store(tier, range(200, 1200), OTHERS)
        assert tier.held_by(MINE) == 0  # they were the oldest
        store(tier, range(1200, 1500))
        assert tier.held_by(MINE) == len(held(tier, range(1200, 1500))) * COST
    finally:
        tier.close()


def test_holdings_are_known_again_after_a_restart(tmp_path: Path) -> None:
    limits = {MINE: Limit(quota_bytes=50 * COST)}
    tier = open_tier(tmp_path / "t", limits)
    store(tier, range(40))
    store(tier, range(100, 140), OTHERS)
    tier.close()
    tier = open_tier(tmp_path / "t", limits)
    try:
        assert tier.held_by(MINE) == 40 * COST
        store(tier, range(40, 80))
        assert tier.held_by(MINE) == 50 * COST
        assert held(tier, range(100, 140)) == list(range(100, 140))
    finally:
        tier.close()


def test_a_quota_that_comes_later_counts_what_is_there(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t")
    try:
        store(tier, range(100))
        store(tier, range(100, 200), OTHERS)
        assert tier.held_by(MINE) is None
        tier.limit({MINE: Limit(quota_bytes=30 * COST)})
        store(tier, [200])
        while tier.learn_holdings():
            pass
        tend(tier)
        assert tier.held_by(MINE) == 30 * COST
        assert len(held(tier, range(100))) + len(held(tier, range(200, 201))) == 30
        assert len(held(tier, range(100, 200))) == 100
        tier.limit({})
        store(tier, range(300, 500))
        assert len(held(tier, range(300, 500))) == 200
    finally:
        tier.close()


def test_looking_for_holdings_goes_on_beside_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.block.holdings.LEARNED_AT_ONCE", 10)
    tier = open_tier(tmp_path / "t")
    try:
        store(tier, range(100))
        tier.limit({MINE: Limit(quota_bytes=1000 * COST)})
        more, number = True, 100
        while more:
            more = tier.learn_holdings()
            store(tier, [number])
            tier.discard([name(number - 60)])
            number += 1
        assert tier.held_by(MINE) == tier.stats()["blocks"] * COST
    finally:
        tier.close()


def test_pins_stay_within_a_quota_and_give_way_when_it_is_lowered(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t", {MINE: Limit(quota_bytes=50 * COST)}, eviction=Eviction.EPOCH)
    try:
        pinned = set(OIDS[:20])
        store(tier, range(50))
        tier.guide(is_pinned=pinned.__contains__)
        store(tier, range(50, 200))
        assert held(tier, range(20)) == list(range(20))
        assert tier.held_by(MINE) == 50 * COST
        tier.limit({MINE: Limit(quota_bytes=16 * COST)})
        tend(tier, 3)
        assert tier.held_by(MINE) == 16 * COST
        assert len(held(tier, range(20))) == 16
    finally:
        tier.close()


def test_blocks_of_an_earlier_version_become_those_of_their_reader(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t", {MINE: Limit(quota_bytes=50 * COST)})
    try:
        store(tier, range(10), NOBODY)
        assert tier.held_by(MINE) == 0
        tier.touch([name(number) for number in range(5)], MINE)
        tend(tier)
        assert tier.held_by(MINE) == 5 * COST
        assert [owner for owner, _ in tier.owned([name(0), name(9)])] == [MINE, NOBODY]
    finally:
        tier.close()


def test_what_nobody_reads_leaves_after_its_time(tmp_path: Path) -> None:
    clock = Clock()
    tier = open_tier(tmp_path / "t", {MINE: Limit(ttl_s=800.0)}, clock=clock)
    try:
        store(tier, range(20))
        store(tier, range(20, 40), OTHERS)
        tier.guide(is_pinned={OIDS[3]}.__contains__)
        for _ in range(8):
            clock.now += 790 / GRAIN
            tier.touch([name(0), name(1)])
            tend(tier)
        assert held(tier, range(40)) == list(range(40)), "not before"
        clock.now += 800 / GRAIN + 20
        tend(tier)
        assert held(tier, range(40)) == [0, 1, 3, *range(20, 40)]
        assert tier._counters.get("expired_blocks") == 17
    finally:
        tier.close()


def test_the_time_goes_on_across_restarts(tmp_path: Path) -> None:
    clock, limits = Clock(), {MINE: Limit(ttl_s=800.0)}
    tier = open_tier(tmp_path / "t", limits, clock=clock)
    store(tier, range(10))
    tier.close()
    clock.now += 700
    tier = open_tier(tmp_path / "t", limits, clock=clock)
    tier.touch([name(4)])
    tend(tier)
    tier.close()
    clock.now += 400
    tier = open_tier(tmp_path / "t", limits, clock=clock)
    try:
        tend(tier)
        assert held(tier, range(10)) == [4]
    finally:
        tier.close()


def test_a_clock_that_was_wrong_costs_at_most_one_time_to_live(tmp_path: Path) -> None:
    clock = Clock()
    tier = open_tier(tmp_path / "t", {MINE: Limit(ttl_s=800.0)}, clock=clock)
    try:
        clock.now += 10**8
        store(tier, range(5))
        clock.now -= 10**8
        tend(tier)
        clock.now += 950
        tend(tier)
        assert held(tier, range(5)) == []
    finally:
        tier.close()


def test_a_pass_is_bounded_and_reaches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.block.holdings.LEAST_SWEPT", 16)
    monkeypatch.setattr("cachefs.block.holdings.MOST_SWEPT", 16)
    clock = Clock()
    tier = open_tier(tmp_path / "t", {MINE: Limit(ttl_s=8000.0)}, clock=clock)
    try:
        store(tier, range(100))
        clock.now += 10_000
        left = [len(held(tier, range(100)))]
        while left[-1] and len(left) < 20:
            tier.maintain()
            left.append(len(held(tier, range(100))))
        assert left[-1] == 0
        assert max(before - after for before, after in itertools.pairwise(left)) <= 16
    finally:
        tier.close()


def test_a_full_tier_notes_what_is_read_and_lets_the_rest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    tier = open_tier(tmp_path / "t", {MINE: Limit(ttl_s=800.0)}, limit=8 * MIB, clock=clock)
    try:
        store(tier, range(1000))
        there = held(tier, range(1000))
        assert tier._counters.get("disk_evictions") > 0
        read = there[::2]
        clock.now += 700
        tier.touch([name(number) for number in read])
        tend(tier)
        clock.now += 300
        tend(tier, 3)
        assert held(tier, range(1000)) == read
        monkeypatch.setattr(tier, "_may_grow", lambda *_: False)  # no room for notes
        tier.touch([name(number) for number in read[:5]])
        clock.now += 1000
        tend(tier, 3)
        assert held(tier, range(1000)) == read[:5]
    finally:
        tier.close()


def test_nothing_is_looked_at_where_nobody_has_a_limit(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "t")
    try:
        store(tier, range(10))
        tier.sync_and_mark()
        before = tier._env.txnid if tier._env is not None else -1
        tier.touch([name(1)], MINE)
        tend(tier, 5)
        assert tier._env is not None
        assert tier._env.txnid == before
        assert not tier._holdings._reads
        assert tier._clean
    finally:
        tier.close()


def test_a_spilled_block_keeps_its_owner_and_its_time(tmp_path: Path) -> None:
    clock = Clock()
    limits = {MINE: Limit(ttl_s=800.0, quota_bytes=40 * COST)}
    shm = open_tier(tmp_path / "shm", limits, kind=Tier.SHM, clock=clock)
    disk = open_tier(tmp_path / "disk", {MINE: Limit(ttl_s=800.0, quota_bytes=20 * COST)}, clock=clock)
    try:
        store(shm, range(40))
        stored_at = int(clock.now)
        clock.now += 300
        Spiller(shm, disk, Counters(), lambda: 0.0).demote([name(number) for number in range(40)])
        assert disk.held_by(MINE) == 20 * COST
        there = held(disk, range(40))
        assert set(disk.owned([name(number) for number in there])) == {(MINE, stored_at)}
    finally:
        shm.close()
        disk.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "touch", "discard", "limit", "reopen", "tend"]), st.integers(0, 299)),
        max_size=40,
    )
)
def test_what_is_counted_is_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    place = tmp_path_factory.mktemp("tier")
    limits = {MINE: Limit(quota_bytes=60 * COST)}
    tier = open_tier(place, limits, limit=8 * MIB)
    try:
        for step, number in steps:
            match step:
                case "put":
                    store(tier, range(number, number + 20), MINE if number % 3 else OTHERS)
                case "touch":
                    tier.touch([name(number)], MINE)
                case "discard":
                    tier.discard([name(number)])
                case "limit":
                    limits = {MINE: Limit(quota_bytes=(20 + number) * COST), OTHERS: Limit(ttl_s=1e6)}
                    tier.limit(limits)
                    while tier.learn_holdings():
                        pass
                case "reopen":
                    tier.close()
                    tier = open_tier(place, limits, limit=8 * MIB)
                case "tend":
                    tend(tier)
            keys = [name(each) for each in held(tier, range(320))]
            own = [key for key, (owner, _) in zip(keys, tier.owned(keys), strict=True) if owner == MINE]
            assert tier.held_by(MINE) == len(own) * COST
            assert tier.stats()["used_bytes"] == len(keys) * COST
    finally:
        tier.close()


@pytest.mark.slow
def test_it_costs_microseconds(tmp_path: Path) -> None:
    """A volume at its quota evicts at the price of any full tier."""
    taken = {}
    for quota in (0, 500 * COST):
        tier = open_tier(tmp_path / f"t{quota}", {MINE: Limit(quota_bytes=quota)} if quota else {}, limit=9 * MIB)
        store(tier, range(1000))
        began = time.process_time()
        store(tier, range(1000, 3000))
        taken[quota] = (time.process_time() - began) / 2000
        tier.close()
    plain, limited = taken.values()
    assert limited < 2 * plain + 50e-6, taken
