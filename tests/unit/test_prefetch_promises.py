"""What holds for every trace: nothing twice in an epoch, nothing that was just read, bounded, and honest counts."""

from __future__ import annotations

import random

from hypothesis import example, given
from hypothesis import strategies as st

from cachefs.metrics import Counters
from cachefs.prefetch.allowance import LEAST_TRUST, LEAST_WINDOW, MOST_WINDOW, Allowance
from cachefs.prefetch.outstanding import LONGEST_S, Outstanding
from cachefs.prefetch.planner import FOLDERS, Planner
from cachefs.prefetch.ports import Entry, Outcome, Piece
from cachefs.prefetch.scheduler import Room, Scheduler, Space
from cachefs.types import Ino, ObjectId, ObjectVersion
from tests.support.traces import KIB, MIB, Names, Store, Trace

FLAT = [f"d/{number:03d}" for number in range(150)]
TREE = [f"t/{a}/{b:02d}" for a in range(8) for b in range(12)]
MIXED = FLAT + TREE + [f"n/x{number}" for number in range(30)]
NAMES = Names(MIXED)

segments = st.one_of(
    st.tuples(st.just("run"), st.integers(0, len(MIXED)), st.integers(1, 60), st.sampled_from([1, 2, 5, -1])),
    st.tuples(st.just("shuffle"), st.integers(0, 1 << 16), st.integers(1, 80), st.just(0)),
    st.tuples(st.just("again"), st.integers(0, 40), st.integers(1, 20), st.just(0)),
)


def trace_of(plan: list[tuple[str, int, int, int]]) -> list[str]:
    order: list[str] = []
    for kind, first, count, step in plan:
        match kind:
            case "run":
                order += [MIXED[(first + n * step) % len(MIXED)] for n in range(count)]
            case "shuffle":
                order += random.Random(first).sample(MIXED, count)
            case _:
                order += order[-first - count : -first or None]
    return order


@given(st.lists(segments, max_size=12))
@example([("shuffle", 0, 1, 0), ("run", 221, 13, -1), ("run", 211, 3, 2)])  # the last files of an epoch once more
@example([("shuffle", 0, 25, 0), ("shuffle", 0, 8, 0), ("run", 0, 6, 1), ("shuffle", 1, 1, 0), ("shuffle", 0, 16, 0)])
def test_no_file_is_wished_for_twice_in_an_epoch_nor_just_after_it_was_read(
    plan: list[tuple[str, int, int, int]],
) -> None:
    planner = Planner(NAMES)
    wished: dict[Ino, int] = {}
    last: list[Ino] = []
    for path in trace_of(plan):
        ino = NAMES.inos[path]
        directory = NAMES.parent(ino)
        assert directory is not None
        planner.note(ino)
        last = [*last[-3:], ino]
        for wish in [*planner.ordered(), *planner.rest()]:
            assert wish.ino not in last
            above = NAMES.parent(wish.ino)
            assert above is not None
            epoch = planner._folders[above[0]].epochs
            assert wished.get(wish.ino, -1) < epoch, "once in an epoch"
            wished[wish.ino] = epoch


@given(st.lists(segments, max_size=8), st.integers(1, 40), st.sampled_from(list(Outcome)), st.integers(5, 2000))
def test_limits_and_sums_hold(
    plan: list[tuple[str, int, int, int]], batch: int, outcome: Outcome, capacity: int
) -> None:
    room = Room(3 * MIB, 5 * MIB)
    trace = Trace(NAMES, Store(capacity), room)
    trace.store.outcome = outcome
    order = trace_of(plan)
    for start in range(0, len(order), batch):
        trace.read(order[start : start + batch], batch=batch)
        outstanding, allowance = trace.prefetch.outstanding, trace.prefetch.allowance
        assert outstanding.under_way == 0
        assert outstanding.held_bytes == outstanding.landed_bytes <= 8 * MIB + 200 * KIB
        assert LEAST_WINDOW <= allowance.window <= MOST_WINDOW
        assert LEAST_TRUST <= allowance.trust <= 1
    trace.prefetch.outstanding.give_up()
    assert trace.prefetch.outstanding.held_bytes == 0
    fetched = trace.count("used") + trace.count("wasted")
    assert fetched == (trace.count("issued") if outcome in (Outcome.FETCHED, Outcome.JOINED) else 0)


def test_memory_is_bounded_in_a_tree_of_many_directories() -> None:
    files = [f"{number // 100:03d}/{number:05d}/f" for number in range(6000)]
    trace = Trace(Names(files))
    trace.read(files, batch=50)
    planner = trace.prefetch.planner
    for kept in (planner._folders, planner._branches, planner._shards, planner._asked, planner._unlisted):
        assert len(kept) <= FOLDERS


def test_a_large_directory_holds_nobody_up() -> None:
    """The listing of a directory is loaded in steps, whatever its size."""
    names = Names([f"d/{number:06d}" for number in range(60_000)])
    loaded: list[int] = []
    entries = names.entries

    def counted(directory: Ino, after: bytes, count: int) -> list[Entry]:
        found = entries(directory, after, count)
        loaded.append(len(found))
        return found

    names.entries = counted  # type: ignore[method-assign,unused-ignore]
    planner = Planner(names)
    planner.note(names.inos["d/059000"])
    assert sum(loaded) <= 3 * 4 * 512


def test_what_makes_no_sense_is_ignored() -> None:
    trace = Trace(Names(MIXED))
    trace.turn([(0, 0), (1, 0), (1 << 60, 3), (NAMES.inos["d"], 0), (NAMES.inos["d/000"], 1 << 40)])
    trace.turn([(1 << 60, 0)] * 10_000)
    assert trace.asked() == []


# -- accounts ---------------------------------------------------------------------------------------------------------


def piece(number: int) -> Piece:
    return Piece(ObjectId(number.to_bytes(16, "big")), ObjectVersion(f"{number}", "e", 10), 0, 1)


def test_what_becomes_of_pieces_is_counted() -> None:
    counters = Counters()
    allowance = Allowance()
    outstanding = Outstanding(counters, allowance)
    for number in range(6):
        assert outstanding.issue(Ino(number), piece(number), 10, 0.0)
        assert not outstanding.issue(Ino(number), piece(number), 10, 0.0), "once"
    assert outstanding.begun(Ino(0))  # late
    outcomes = [Outcome.FETCHED, Outcome.FETCHED, Outcome.FETCHED, Outcome.JOINED, Outcome.THERE, Outcome.GONE]
    for number, outcome in enumerate(outcomes):
        outstanding.over(piece(number), outcome)
        outstanding.over(piece(number), outcome)
    assert outstanding.begun(Ino(1))
    assert not outstanding.begun(Ino(1))
    outstanding.look(1.0, lambda oid, block: False)  # number 2 was evicted
    assert outstanding.held_bytes == outstanding.under_way == 0
    counted = {name.removeprefix("prefetch_"): counters.get(name) for name in counters.snapshot()}
    assert counted == {
        "issued": 5, "issued_bytes": 50, "used": 3, "used_bytes": 30, "late": 2, "late_bytes": 20,
        "wasted": 1, "wasted_bytes": 10,
    }  # fmt: skip


def test_who_does_not_come_for_long_does_not_come() -> None:
    outstanding = Outstanding(Counters(), Allowance())
    outstanding.issue(Ino(2), piece(2), 10, 0.0)
    outstanding.over(piece(2), Outcome.FETCHED)
    outstanding.look(LONGEST_S - 1, lambda oid, block: True)
    assert outstanding.held_bytes == 10
    outstanding.look(LONGEST_S + 1, lambda oid, block: True)
    assert outstanding.held_bytes == 0


def test_one_overload_cuts_the_window_once() -> None:
    allowance = Allowance()
    first = allowance.window
    for left in range(99, -1, -1):
        allowance.failed(left)
    assert allowance.window == first / 2
    allowance.failed(0)
    assert allowance.window == first / 4


def test_volumes_share_the_room() -> None:
    traces = [Trace(Names(FLAT)) for _ in range(2)]
    space = Space(4 * MIB, 0)
    scheduler = Scheduler(lambda: space)
    scheduler.volumes = [trace.prefetch for trace in traces]
    for path in FLAT[:60]:
        for trace in traces:
            trace.prefetch.note([(trace.names.inos[path], 0)])
        scheduler.pump(0.0)
        for trace in traces:
            trace.store.deliver()
    held = [trace.prefetch.outstanding.held_bytes for trace in traces]
    assert all(MIB < each <= 2 * MIB + 220 * KIB for each in held), held
