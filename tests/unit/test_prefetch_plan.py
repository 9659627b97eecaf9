"""The plan of a job: next uses, the position, and what it costs."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.prefetch.plan import AHEAD, LEAP, MOST_LINES, NEAR, Plan
from cachefs.types import Ino, ObjectId


def oid(number: int) -> ObjectId:
    return ObjectId(hashlib.sha256(b"%d" % number).digest()[:16])


def planned(order: Sequence[int | None], room: int | None = None) -> Plan:
    plan = Plan(room or len(order))
    for number in order:
        plan.append(Ino(number or 0), None if number is None else oid(number))
    return plan


@given(
    st.lists(st.one_of(st.none(), st.integers(1, 12)), max_size=60),
    st.lists(st.tuples(st.integers(1, 14), st.integers(0, 62)), max_size=40),
)
def test_next_uses_are_those_of_the_list(order: list[int | None], asked: list[tuple[int, int]]) -> None:
    plan = planned(order)
    assert len(plan) == len(order)
    assert plan.unknown == order.count(None)
    for number, position in asked:
        expected = next((line for line in range(position, len(order)) if order[line] == number), None)
        assert plan.next_use(oid(number), position) == expected
        assert plan.coming(position, 5) == [n for n in order[position : position + 5] if n is not None]


def test_a_file_that_is_read_is_next_used_in_the_next_epoch() -> None:
    order = list(range(1, 101))
    plan = planned(order + order)
    assert plan.next_use(oid(7)) == 6
    for number in (1, 3, 2, 7):
        assert plan.note(oid(number))
    assert plan.position == 3
    assert plan.next_use(oid(7)) == 106, "it was checked off although the position is before it"
    assert plan.next_use(oid(4)) == 3
    assert not plan.note(oid(1000))
    for number in order[3:]:
        plan.note(oid(number))
    for number in order:
        plan.note(oid(number))
    assert plan.finished
    assert plan.next_use(oid(7)) is None
    assert not plan.note(oid(7))


@given(st.integers(0, 2**32), st.integers(1, 64))
def test_workers_who_read_apart_move_the_position_on(seed: int, apart: int) -> None:
    random_ = random.Random(seed)
    order = [*range(1, 301), *random_.sample(range(1, 301), 300)]
    plan = planned(list(order))
    waiting = list(order)
    while waiting:
        plan.note(oid(waiting.pop(random_.randrange(min(apart, len(waiting))))))
    # a file that is read twice within the window may be taken for its other read
    assert plan.position > len(order) - 2 * apart - 1


def test_lines_that_nobody_reads_do_not_hold_the_position() -> None:
    plan = planned(list(range(1, 3 * NEAR)))
    for number in range(10, NEAR // 2 + 20):
        plan.note(oid(number))
    assert plan.position >= NEAR // 2


def test_a_job_that_begins_in_the_middle_is_followed() -> None:
    plan = planned(list(range(1, 4 * NEAR)))
    start = 2 * NEAR
    followed = [plan.note(oid(number)) for number in range(start, start + LEAP)]
    assert followed == [False] * (LEAP - 1) + [True]
    assert start - 2 <= plan.position <= start + LEAP
    assert plan.propose() is not None
    stray = planned(list(range(1, 4 * NEAR)))
    for number in range(1, 200):
        stray.note(oid(number if number % 2 else 3 * NEAR + number))
    assert stray.position < 200, "who reads something else now and then moves nothing"


def test_each_line_is_proposed_once_ahead_of_the_readers() -> None:
    plan = planned([1, None, 2, 3, 1])
    plan.note(oid(1))
    assert plan.position == 2, "a line that names nothing is passed over"
    assert [plan.propose() for _ in range(4)] == [2, 3, 1, None]
    long = planned(list(range(1, AHEAD + 100)))
    drawn = 0
    while long.propose() is not None:
        drawn += 1
    assert drawn == AHEAD
    long.note(oid(1))
    assert long.propose() == AHEAD + 1


def test_it_takes_at_most_24_bytes_a_line() -> None:
    lines = 50_000
    plan = planned(list(range(1, lines + 1)))
    arrays = (plan._inos, plan._tags, plan._next, plan._table)
    assert sum(each.itemsize * len(each) for each in arrays) <= 24 * lines
    assert sum(map(sys.getsizeof, arrays)) <= 26 * lines, "arrays grow ahead"
    assert all(plan.next_use(oid(number)) == number - 1 for number in range(1, lines + 1, 97))


def test_too_many_lines() -> None:
    with pytest.raises(ValueError, match="lines"):
        Plan(MOST_LINES + 1)
    assert Plan(0).next_use(oid(1)) is None
    assert Plan(0).finished
