"""What is brought ahead in vain over a mix of jobs, and the rest of epochs that do not fit into the nearest tier."""

from __future__ import annotations

import random
from collections.abc import Iterator

from cachefs.metrics import Counters
from cachefs.prefetch.allowance import Allowance
from cachefs.prefetch.outstanding import LOOKED_AT, Outstanding
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.prefetch.scheduler import Room, Scheduler, Space
from cachefs.types import Ino, ObjectId, ObjectVersion, Tier
from tests.support.traces import KIB, MIB, Names, Store, Trace

FLAT = [f"flat/{number:04d}" for number in range(1500)]
TREE = [f"tree/{a:02d}/{b:02d}" for a in range(30) for b in range(50)]
LEFT = [f"left/{number:04d}" for number in range(2000)]
SHARDS = [f"shards/s-{number:04d}.tar" for number in range(60)]
POINTS = [f"points/{number:02d}.bin" for number in range(12)]


def mixed(generator: random.Random) -> Iterator[tuple[str, int]]:
    """Five jobs that take turns: (path, block of the first read)."""
    jobs: list[list[tuple[str, int]]] = [
        [(path, 0) for path in FLAT],
        [(path, 0) for path in generator.sample(TREE, len(TREE))],
        [(path, 0) for path in SHARDS],
        [(path, generator.randrange(1, 60)) for path in POINTS],
        [(path, 0) for path in LEFT[:250]],  # and then it is abandoned
    ]
    left = [iter(job) for job in jobs]
    weights = [len(job) for job in jobs]
    while any(weights):
        [number] = generator.choices(range(len(jobs)), weights)
        weights[number] -= 1
        yield next(left[number])


def test_over_a_mix_of_jobs_a_tenth_is_in_vain_at_most() -> None:
    sizes = dict.fromkeys(FLAT + TREE + LEFT, 110 * KIB)
    sizes |= dict.fromkeys(SHARDS, 50 * MIB) | dict.fromkeys(POINTS, 64 * MIB)
    trace = Trace(Names(sizes), Store(20_000), Room(128 * MIB, 256 * MIB))
    told: list[tuple[int, int]] = []
    for path, block in mixed(random.Random(3)):
        ino = trace.names.inos[path]
        told.append((ino, block))
        trace.store.keep(ObjectId(ino.to_bytes(16, "big")), block)
        if len(told) == 20:
            trace.turn(told)
            told = []
    trace.turn(told)
    trace.prefetch.outstanding.give_up()
    for job in (FLAT, TREE, SHARDS):
        assert sum(key in set(job) for key in trace.asked()) > 0.6 * len(job)
    assert len(set(POINTS) & set(trace.asked())) <= 3
    issued, wasted = trace.count("issued_bytes"), trace.count("wasted_bytes")
    assert issued > 300 * MIB
    assert wasted <= 0.1 * issued, f"{wasted / issued:.1%}"


def test_files_that_are_read_at_points_bring_nothing_ahead() -> None:
    names = Names(dict.fromkeys(POINTS, 64 * MIB))
    trace = Trace(names)
    generator = random.Random(1)
    for _ in range(200):
        trace.read([generator.choice(POINTS)], block=generator.randrange(1, 60))
    assert trace.asked() == []


# -- the tier behind the nearest one ----------------------------------------------------------------------------------


def test_a_shuffled_rest_goes_straight_to_disk_when_nothing_is_free_nearer() -> None:
    trace = Trace(Names(TREE), Store(), Room(MIB, 10 * MIB, 60 * MIB))
    trace.read(random.Random(2).sample(TREE, 200), batch=20)
    near = [piece for piece in trace.store.asked if piece.to is None]
    far = [piece for piece in trace.store.asked if piece.to is Tier.DISK]
    outstanding = trace.prefetch.outstanding
    assert near
    assert far
    assert outstanding.held_bytes <= 10 * MIB + 200 * KIB
    assert 50 * MIB < outstanding.far_bytes <= 60 * MIB + 200 * KIB
    assert outstanding.far_landed_bytes == outstanding.far_bytes
    assert len({piece.oid for piece in trace.store.asked}) == len(trace.store.asked), "nothing twice"


def test_what_has_an_order_never_goes_straight_to_disk() -> None:
    trace = Trace(Names(FLAT), Store(), Room(MIB, 0, 60 * MIB))
    trace.read(FLAT[:300], batch=20)
    assert trace.store.asked
    assert not [piece for piece in trace.store.asked if piece.to is Tier.DISK]


def test_room_far_away_is_divided_among_those_who_want_it() -> None:
    traces = [Trace(Names(TREE), Store(), Room(0, 0)) for _ in range(2)]
    scheduler = Scheduler(lambda: Space(0, 0, 40 * MIB))
    scheduler.volumes = [trace.prefetch for trace in traces]
    orders = [random.Random(seed).sample(TREE, 200) for seed in (1, 2)]
    for turn in range(0, 200, 10):
        for trace, order in zip(traces, orders, strict=True):
            trace.prefetch.note([(trace.names.inos[path], 0) for path in order[turn : turn + 10]])
        scheduler.pump(0.0)
        for trace in traces:
            trace.store.deliver()
    for trace in traces:
        assert trace.prefetch.outstanding.far_bytes > 10 * MIB


def test_what_was_evicted_is_counted_soon_wherever_it_stands() -> None:
    counters = Counters()
    outstanding = Outstanding(counters, Allowance())
    there: set[tuple[ObjectId, int]] = set()
    for number in range(1000):
        oid = ObjectId(number.to_bytes(16, "big"))
        piece = Piece(oid, ObjectVersion(f"{number}", "e", 10), 0, 1, Tier.DISK if number % 2 else None)
        assert outstanding.issue(Ino(number), piece, 10, 0.0)
        outstanding.over(piece, Outcome.FETCHED)
        if not 400 <= number < 500:
            there.add((oid, 0))
    for _ in range(1000 // LOOKED_AT + 2):
        outstanding.look(1.0, lambda oid, block: (oid, block) in there)
    assert counters.get("prefetch_wasted") == 100
    assert (outstanding.held_bytes, outstanding.far_bytes) == (4500, 4500)
    assert (outstanding.landed_bytes, outstanding.far_landed_bytes) == (4500, 4500)


# -- footers first ----------------------------------------------------------------------------------------------------


def test_the_end_of_a_file_may_lie_in_two_blocks() -> None:
    size = 200 * MIB + 5 * KIB  # the last block has 5 KiB: a footer of 40 KiB begins in the one before
    names = Names({f"tables/part-{number:03d}.parquet": size for number in range(60)})
    trace = Trace(names)
    for path in names.sizes:
        trace.turn([(names.inos[path], 200)])
    pieces = {(piece.first, piece.count) for piece in trace.store.asked}
    assert pieces == {(199, 2), (0, 1)}


def test_tail_and_head_of_one_file_are_one_beginning() -> None:
    """Sixteen readers of tables at a time: each begins at the end, and comes to the beginning much later."""
    names = Names({f"tables/part-{number:03d}.parquet": 100 * MIB for number in range(160)})
    trace = Trace(names)
    paths = list(names.sizes)
    for first in range(0, 160, 16):
        some = [names.inos[path] for path in paths[first : first + 16]]
        trace.turn([(ino, 99) for ino in some])
        trace.turn([(ino, 0) for ino in some])
    folder = trace.prefetch.planner._folders[names.inos["tables"]]
    assert (folder.epochs, folder.read) == (0, 160)
    assert folder.from_tail
    trace.turn([(names.inos[path], 0) for path in paths])  # the second epoch begins at beginnings: that is told, too
    assert folder.epochs >= 1
