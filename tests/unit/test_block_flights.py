"""How blocks that are wanted together become ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.block.flights import SHORTEST_RANGE, Flight, ranges_of
from cachefs.types import PART_BYTES
from tests.support.blocks import KIB, MIB, key


def ranges(indexes: list[int], block_size: int = MIB, under_way: int = 0) -> list[list[int]]:
    flights = [Flight(key(index), index, block_size, inline=False, wanted=True) for index in indexes]
    return [[flight.index for flight in group] for group in ranges_of(flights, block_size, under_way)]


def test_whole_parts_are_read_as_one() -> None:
    assert ranges(list(range(8, 24))) == [list(range(8, 16)), list(range(16, 24))]
    assert ranges(list(range(5, 18))) == [[5, 6, 7], list(range(8, 16)), [16, 17]]


@pytest.mark.parametrize(("under_way", "lengths"), [(0, [1, 1, 1, 1]), (2, [2, 2]), (3, [4]), (9, [4])])
def test_less_than_a_part_is_spread_as_long_as_few_are_under_way(under_way: int, lengths: list[int]) -> None:
    assert [len(group) for group in ranges([0, 1, 2, 3], under_way=under_way)] == lengths


def test_small_blocks_come_together_and_large_ones_alone() -> None:
    assert [len(group) for group in ranges(list(range(32)), 64 * KIB)] == [16, 16]
    assert ranges([0, 1, 2], 16 * MIB) == [[0], [1], [2]]


@given(st.sets(st.integers(0, 100), min_size=1), st.sampled_from([64 * KIB, MIB, 4 * MIB, 16 * MIB]), st.integers(0, 9))
def test_every_block_once_in_order_and_no_gap_in_a_range(found: set[int], block_size: int, under_way: int) -> None:
    groups = ranges(sorted(found), block_size, under_way)
    assert [index for group in groups for index in group] == sorted(found)
    for group in groups:
        assert group == list(range(group[0], group[0] + len(group)))
        assert len(group) * block_size <= max(PART_BYTES, block_size)
        first, last = group[0] * block_size // PART_BYTES, group[-1] * block_size // PART_BYTES
        assert first == last or block_size > PART_BYTES
    assert SHORTEST_RANGE <= PART_BYTES
