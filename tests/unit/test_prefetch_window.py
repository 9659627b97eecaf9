"""The readahead window: few large requests for sequences, none for random access."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.prefetch.window import MIB, ReadWindow
from cachefs.types import PART_BYTES

GIB = 1 << 30


def read_all(window: ReadWindow, end: int, step: int = MIB, start: int = 0, size: int = GIB) -> list[tuple[int, int]]:
    asks = []
    for offset in range(start, end, step):
        ask = window.note(offset, min(step, end - offset), size)
        if ask is not None:
            asks.append(ask)
    return asks


def test_a_sequential_reader_gets_everything_ahead_in_few_requests() -> None:
    asks = read_all(ReadWindow(), GIB)
    assert asks[0] == (MIB, 5 * MIB)
    assert all(before[1] == after[0] for before, after in pairwise(asks))
    assert asks[-1][1] == GIB
    assert len(asks) < 150
    assert max(end - first for first, end in asks) <= 64 * MIB


def test_most_of_the_window_is_always_under_way() -> None:
    window, frontier = ReadWindow(), 0
    for offset in range(0, GIB // 2, MIB):
        ask = window.note(offset, MIB, GIB)
        frontier = frontier if ask is None else ask[1]
        least = window.window - min(window.window // 2, PART_BYTES)
        assert frontier - offset >= least, "the store always has work"


@pytest.mark.parametrize("start", [0, 3 * MIB, 5 * MIB + 4096])
def test_requests_of_a_large_window_are_whole_parts(start: int) -> None:
    window = ReadWindow()
    read_all(window, start + 100 * MIB, 4096, start=start)
    assert window.window == 64 * MIB
    asks = read_all(window, GIB, start=start + 100 * MIB)
    assert all(first % PART_BYTES == end % PART_BYTES == 0 for first, end in asks)
    assert {end - first for first, end in asks} == {PART_BYTES}
    assert asks[-1][1] == GIB


def test_the_window_grows_with_what_was_read() -> None:
    window = ReadWindow()
    for offset in range(0, 256 * MIB, MIB):
        window.note(offset, MIB, GIB)
        assert window.window <= max(4 * MIB, 3 * (offset + MIB)), "who reads little wastes little"
    assert window.window == 64 * MIB


def test_the_next_request_comes_before_the_last_one_is_used_up() -> None:
    window, frontier = ReadWindow(), 0
    for offset in range(0, GIB, MIB):
        ask = window.note(offset, MIB, GIB)
        if ask is not None:
            frontier = ask[1]
        assert frontier > offset + MIB or frontier == GIB


def test_slightly_disordered_reads_with_gaps_are_a_sequence() -> None:
    window = ReadWindow()
    assert window.note(GIB - MIB, 4096, GIB) is None  # so the sequence begins with a jump, not with a read at 0
    asks = read_all(window, 4 * MIB, start=MIB)
    offsets = [block * MIB for block in range(4, 256) if block % 5]
    for start in range(0, len(offsets), 3):
        for offset in reversed(offsets[start : start + 3]):
            ask = window.note(offset, MIB, GIB)
            if ask is not None:
                asks.append(ask)
    assert len(asks) < 50
    assert asks[-1][1] > 256 * MIB
    assert window.window == 64 * MIB


def test_a_random_reader_of_small_pieces_asks_for_nothing() -> None:
    window, generator = ReadWindow(), random.Random(5)
    for _ in range(20_000):
        assert window.note(generator.randrange(1, GIB // 4096) * 4096, 4096, GIB) is None
    assert window.window == 0


def test_a_random_reader_of_whole_requests_asks_for_nothing() -> None:
    window, generator = ReadWindow(), random.Random(5)
    positions = [generator.randrange(1, 64) * 16 * MIB for _ in range(500)]
    asks = [window.note(at, MIB, GIB) for before, at in pairwise(positions) if before != at]
    assert asks == [None] * len(asks)


def test_a_jump_ends_the_sequence_and_a_new_one_begins_behind_it() -> None:
    window = ReadWindow()
    read_all(window, 200 * MIB)
    assert window.note(700 * MIB, 4096, GIB) is None
    assert window.window == 0
    asks = read_all(window, GIB, 128 << 10, start=700 * MIB + 4096)
    assert asks[0][0] <= 702 * MIB
    assert asks[0][1] - asks[0][0] == 4 * MIB
    assert asks[-1][1] == GIB


def test_small_files_and_first_reads() -> None:
    assert ReadWindow().note(0, 110_000, 110_000) is None
    assert ReadWindow().note(0, 4096, MIB) is None
    assert ReadWindow().note(0, 16384, GIB) == (16384, 16384 + MIB), "a header, maybe"
    assert ReadWindow().note(0, 131072, GIB) == (131072, 131072 + 4 * MIB)
    assert ReadWindow().note(0, MIB, 3 * MIB) == (MIB, 3 * MIB)
    assert ReadWindow().note(5 * MIB, 4096, GIB) is None
    assert ReadWindow(initial=MIB, maximum=2 * MIB).note(0, 4096, GIB) == (4096, 4096 + MIB)


@given(st.integers(1, 300 * MIB), st.lists(st.tuples(st.integers(0, 300 * MIB), st.integers(1, MIB)), max_size=60))
def test_never_past_the_end_never_empty(size: int, reads: list[tuple[int, int]]) -> None:
    window = ReadWindow()
    for offset, length in reads:
        offset %= size
        ask = window.note(offset, min(length, size - offset), size)
        assert ask is None or 0 <= ask[0] < ask[1] <= size
        assert 0 <= window.window <= 64 * MIB


def test_a_sequential_hit_is_cheap() -> None:
    window, best = ReadWindow(), float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for offset in range(0, 40_000 * 4096, 4096):
            window.note(offset, 4096, GIB)
        best = min(best, (time.perf_counter() - start) / 40_000)
    assert best < 2e-6  # 0.3 us on a quiet machine
