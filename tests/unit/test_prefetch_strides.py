"""Strides, backward readers and point reads within one file: what is asked for ahead, and what is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.prefetch.points import BLOCKS, PROVEN, READS, Points
from cachefs.prefetch.strides import MOST_SPARSE_BYTES
from cachefs.prefetch.window import MIB, ReadWindow
from cachefs.types import Ino

KIB, GIB = 1 << 10, 1 << 30
BLOCK = MIB


class Replay:
    """A reader of one file as the worker treats it: blocks or ranges, on demand and ahead. All comes at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.window = ReadWindow()
        self.points = Points(BLOCK)
        self.blocks: set[int] = set()
        self.ranges: list[tuple[int, int]] = []
        self.fetched = self.asked = self.misses = self.ahead_bytes = 0

    def read(self, start: int, length: int) -> bool:
        """Returns whether it was there already."""
        end = min(start + length, self.size)
        self.asked += end - start
        ask = self.window.note(start, end - start, self.size)
        hit = self._has(start, end)
        if not hit:
            self._miss(start, end)
        for first, last in [] if ask is None else [ask, *self.window.more()]:
            assert 0 <= first < last <= self.size
            if self.window.sparse and (last - first) * 4 <= BLOCK:
                self.ranges.append((first, last))
                self.fetched += last - first
                self.ahead_bytes += last - first
            else:
                self._fetch_blocks(first, last, ahead=True)
        return hit

    def _has(self, start: int, end: int) -> bool:
        if all(index in self.blocks for index in range(start // BLOCK, (end - 1) // BLOCK + 1)):
            return True
        return any(first <= start and end <= last for first, last in self.ranges[-64:])

    def _miss(self, start: int, end: int) -> None:
        self.misses += 1
        if (
            self.window.apart
            and self.points.may_be(Ino(7), start, end, self.size)
            and self.points.take(Ino(7), start, end)
        ):
            self.fetched += end - start
        else:
            self._fetch_blocks(start, end)

    def _fetch_blocks(self, start: int, end: int, *, ahead: bool = False) -> None:
        for index in range(start // BLOCK, (end - 1) // BLOCK + 1):
            if index not in self.blocks:
                self.blocks.add(index)
                length = min(BLOCK, self.size - index * BLOCK)
                self.fetched += length
                self.ahead_bytes += length * ahead


@pytest.mark.parametrize(("size", "reads"), [(10 * GIB, 2000), (10 * GIB, 20_000), (GIB, 2000)])
@pytest.mark.parametrize("length", [4 * KIB, 16 * KIB])
def test_random_points_fetch_little_more_than_is_read(size: int, reads: int, length: int) -> None:
    generator = random.Random(3)
    reader = Replay(size)
    for _ in range(reads):
        reader.read(generator.randrange(size // 4096 - 4) * 4096, length)
    assert reader.fetched <= 1.2 * reader.asked
    assert reader.ahead_bytes <= 0.02 * reader.fetched


def test_a_header_before_the_points_costs_two_blocks() -> None:
    generator = random.Random(3)
    reader = Replay(10 * GIB)
    reader.read(0, 16 * KIB)
    for _ in range(5000):
        reader.read(generator.randrange(2 * BLOCK // 4096, 10 * GIB // 4096) * 4096, 4 * KIB)
    assert reader.fetched <= 1.2 * reader.asked


def test_what_the_kernel_reads_around_page_faults_ends_as_no_sequence() -> None:
    generator = random.Random(4)
    reader = Replay(GIB)
    for _ in range(100):
        around = generator.randrange(GIB // 4096 - 1024) * 4096
        for number in range(4):
            reader.read(around + number * MIB, MIB)
    assert reader.fetched <= 1.35 * reader.asked
    assert reader.ahead_bytes < 16 * MIB


def test_who_reads_a_dense_file_at_random_gets_whole_blocks() -> None:
    size = 16 * MIB
    places = random.Random(5).sample(range(size // 4096), size // 4096)
    reader = Replay(size)
    for place in places:
        reader.read(place * 4096, 4096)
    assert reader.misses < 17 * (READS + 2)
    assert reader.fetched < 1.4 * size


@pytest.mark.parametrize("length", [16 * KIB, 64 * KIB, 128 * KIB, MIB])
def test_backward(length: int) -> None:
    reader = Replay(256 * MIB)
    hits = [reader.read(at, length) for at in range(256 * MIB - length, -1, -length)]
    assert reader.misses <= 6
    assert all(hits[-100:]), "once it is known, everything is there before it is read"
    assert reader.fetched <= 257 * MIB


@pytest.mark.parametrize("step", [10 * MIB, 10_000_000, -10 * MIB, 3 * MIB, 1_500_000])
@pytest.mark.parametrize("length", [4 * KIB, 64 * KIB, 192 * KIB])
def test_a_sparse_stride_fetches_the_records_ahead(step: int, length: int) -> None:
    size = GIB
    places = range(MIB, size - length, step) if step > 0 else range(size - 2 * MIB, 0, step)
    reader = Replay(size)
    for at in places:
        start = at // 4096 * 4096
        reader.read(start, -(-(at + length) // 4096) * 4096 - start)
    assert reader.misses <= 12
    rounding = 20 * KIB * len(places) if step % 4096 else 0
    assert reader.fetched <= reader.asked * 1.2 + 40 * (length + 16 * KIB) + rounding


@pytest.mark.parametrize("step", [160 * KIB, 200 * KIB, -200 * KIB, 200_001])
def test_a_dense_stride_fetches_the_blocks_ahead(step: int) -> None:
    places = range(BLOCK, 100 * MIB, step) if step > 0 else range(100 * MIB, BLOCK, step)
    reader = Replay(128 * MIB)
    for at in places:
        reader.read(at // 4096 * 4096, 4096)
    assert reader.misses <= 8


def test_long_records_far_apart() -> None:
    """Records that are longer than the proof of a sequence: readahead in vain behind the first of them only."""
    reader = Replay(4 * GIB)
    for at in range(64 * MIB, 4 * GIB, 64 * MIB):
        for number in range(3):
            reader.read(at + number * MIB, MIB)
    assert reader.fetched <= 1.3 * reader.asked


def test_a_stride_that_ends_in_a_sequence() -> None:
    reader = Replay(GIB)
    for at in range(BLOCK, 200 * MIB, 10 * MIB):
        reader.read(at, 64 * KIB)
    hits = [reader.read(at, 128 * KIB) for at in range(300 * MIB, 500 * MIB, 128 * KIB)]
    assert hits[40:] == [True] * len(hits[40:])


def test_a_sequence_after_points_is_as_fast_as_ever() -> None:
    generator, reader = random.Random(7), Replay(GIB)
    for _ in range(200):
        reader.read(generator.randrange(GIB // 4096) * 4096, 4096)
    before = reader.misses
    for at in range(300 * MIB, 400 * MIB, 128 * KIB):
        reader.read(at, 128 * KIB)
    assert reader.misses - before <= 4


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param([(-8 * KIB, 8 * KIB), (-300 * KIB, 292 * KIB)], id="parquet"),
        pytest.param([(-64 * KIB, 64 * KIB), (-200 * KIB, 136 * KIB)], id="zip"),
        pytest.param([(0, 16 * KIB), (16 * KIB, 100 * KIB)], id="safetensors"),
        pytest.param([(0, 4 * KIB), (4 * KIB, 8 * KIB), (96 * KIB, 4 * KIB)], id="hdf5"),
    ],
)
def test_footers_and_headers_come_in_one_request(trace: list[tuple[int, int]]) -> None:
    """After the specifications: eight bytes and then the footer; the end of central directory; eight bytes and then
    the header of JSON; the superblock.
    """
    reader = Replay(GIB + 300 * KIB)
    hits = [reader.read(at % (GIB + 300 * KIB), length) for at, length in trace]
    assert not hits[0]
    assert all(hits[1:])


@given(
    st.integers(9 * MIB, 64 * MIB),
    st.lists(st.tuples(st.integers(0, 64 * MIB), st.integers(-3 * MIB, 3 * MIB), st.integers(1, 12)), max_size=20),
    st.integers(1, MIB),
)
def test_whatever_is_read(size: int, runs: list[tuple[int, int, int]], length: int) -> None:
    """No span is empty or past the end (`Replay` looks), and what is ahead of a reader is bounded."""
    reader = Replay(size)
    for start, step, count in runs:
        for number in range(count):
            at = (start + number * step) % size
            before = reader.fetched
            reader.read(at, length)
            assert reader.fetched - before <= max(2 * 64 * MIB, MOST_SPARSE_BYTES + 4 * MIB)


def test_blocks_that_are_remembered_are_bounded() -> None:
    points = Points(BLOCK)
    for number in range(BLOCKS + 1000):
        assert points.take(Ino(1), number * BLOCK, number * BLOCK + 4096)
    assert len(points._read) == BLOCKS
    taken = [points.take(Ino(2), at * 4096, at * 4096 + 4096) for at in range(READS + 1)]
    assert taken == [True] * READS + [False]


FILE = Ino(7)


def test_which_reads_are_points() -> None:
    points = Points(BLOCK)
    assert points.may_be(FILE, 5 * MIB, 5 * MIB + 4096, GIB)
    assert not points.may_be(FILE, 5 * MIB, 6 * MIB, GIB), "large"
    assert not points.may_be(FILE, 4096, 8192, GIB), "a header"
    assert not points.may_be(FILE, GIB - 4096, GIB, GIB), "a footer"
    assert not points.may_be(FILE, 5 * MIB, 5 * MIB + 4096, 7 * MIB), "a small file"
    for number in range(PROVEN):
        assert points.take(FILE, (50 + number) * MIB, (50 + number) * MIB + 4096)
    assert points.may_be(FILE, 4096, 8192, GIB), "who reads at random comes by there, too"
    assert points.may_be(FILE, GIB - 4096, GIB, GIB)
    assert not points.may_be(FILE, 0, 4096, GIB), "who begins may go on"
    assert not points.may_be(Ino(8), 4096, 8192, GIB), "another file"
