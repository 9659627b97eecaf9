"""Streams of positions, orders of listings and recordings: the arithmetic below the detectors."""

from __future__ import annotations

import random
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from cachefs.prefetch.replay import MOST, Recording, Replay
from cachefs.prefetch.roster import Order
from cachefs.prefetch.shards import Shards
from cachefs.prefetch.streams import MOST_AHEAD, SLACK, STREAMS, Streams
from cachefs.types import Ino


def drawn(streams: Streams, most: int = 10_000) -> list[int]:
    """Everything that is wanted now."""
    found: list[int] = []
    for stream in streams.trusted():
        while (position := stream.peek()) is not None and len(found) < most:
            stream.advance()
            found.append(position)
    return found


def fed(*positions: int) -> Streams:
    streams = Streams()
    for position in positions:
        streams.note(position)
    return streams


def test_nothing_is_wanted_before_there_is_evidence() -> None:
    assert drawn(fed(10, 11, 12)) == []
    assert drawn(fed(10, 11, 12, 13))[:3] == [11, 12, 13]


def test_directions_and_steps() -> None:
    assert [p for p in drawn(fed(0, 1, 2, 3)) if p > 3] == list(range(4, 12))
    assert drawn(fed(90, 89, 88, 87)) == list(range(86, 78, -1))
    assert drawn(fed(5, 13, 21, 29)) == list(range(37, 30 + 8 * 8, 8))


def test_a_finer_step_wants_what_was_left_out() -> None:
    streams = fed(0, 8, 16, 24)
    drawn(streams)
    for position in (25, 26, 27):
        streams.note(position)
    assert set(range(1, 24)) <= set(drawn(streams))


def test_who_turns_back_is_followed() -> None:
    streams = fed(*range(50))
    drawn(streams)
    for position in range(48, 30, -1):
        streams.note(position)
    assert min(drawn(streams)) < 30


@given(st.lists(st.integers(0, 1 << 40), max_size=300))
def test_any_positions_cost_little(positions: list[int]) -> None:
    streams = Streams()
    for position in positions:
        streams.note(position, proposed=position % 3 == 0)
        wanted = drawn(streams)
        assert len(wanted) <= STREAMS * (MOST_AHEAD + SLACK)
        assert all(p >= 0 for p in wanted)
    assert len(streams.trusted()) <= STREAMS


@given(st.lists(st.integers(2, 1 << 63), unique=True, max_size=200))
def test_an_order_finds_what_it_gives(inos: list[int]) -> None:
    order = Order()
    for ino in inos:
        order.append(Ino(ino))
    assert [order[position] for position in range(len(order))] == inos
    for position, ino in enumerate(inos):
        assert order.position(Ino(ino)) in (position, None)
    if inos == sorted(inos):
        assert all(order.position(Ino(ino)) == position for position, ino in enumerate(inos))
    assert order.position(Ino(1)) is None


def test_new_files_among_old_ones_are_found() -> None:
    """Their numbers are higher than those around them."""
    inos = [1_000_000 + n if n % 10 == 3 else 2 + n for n in range(10_000)]
    order = Order()
    for ino in inos:
        order.append(Ino(ino))
    assert all(order.position(Ino(ino)) == position for position, ino in enumerate(inos))


def test_a_recording_is_bounded() -> None:
    recording = Recording()
    for ino in range(2 * MOST):
        assert recording.add(Ino(ino + 2)) or ino >= MOST
    assert len(recording.inos) == MOST
    assert sys.getsizeof(recording.position) < 4 << 20


def test_the_former_order_is_replayed() -> None:
    order = [Ino(n) for n in random.Random(1).sample(range(2, 5000), 1000)]
    replay = Replay()
    for ino in order:
        replay.note(ino)
    assert list(replay.wanted()) == []
    for ino in order[:40]:
        replay.note(ino)
    wanted = list(replay.wanted())
    assert wanted[-1] in order[40:100]
    assert set(order[40:45]) <= set(wanted)


def test_another_order_is_not_taken_for_the_former_one() -> None:
    order = [Ino(n) for n in range(2, 5002)]
    replay = Replay()
    for seed in (1, 2):
        for ino in random.Random(seed).sample(order, len(order)):
            replay.note(ino)
    wanted = sum(1 for _ in replay.wanted())
    assert wanted <= 600


def test_names_of_shards() -> None:
    shards = Shards()
    for number in (7, 8, 9, 10):
        shards.note(b"shard-%d-of-20.tar" % number, proposed=False)
        shards.note(b"notes.txt", proposed=False)
        shards.note(b"shard-%06d.tar" % number, proposed=False)
    names = [name for name, _ in shards.wanted()]
    assert b"shard-000011.tar" not in names, "those are in the order of the listing"
    for odd in (b"", b"9" * 250, b"1", b"\xff\n3\x00"):
        shards.note(odd, proposed=False)


def test_an_event_costs_microseconds() -> None:
    streams = Streams()
    chance = random.Random(2)
    began = time.process_time()
    for _ in range(20_000):
        streams.note(chance.randrange(1_000_000))
    assert (time.process_time() - began) / 20_000 < 50e-6
