"""Requests in the wake of a failure, by a clock that the test moves."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from cachefs import errors
from cachefs.vfs import failures
from cachefs.vfs.failures import Failures, Key

NAME: Key = (1, b"name")
IO_TIMEOUT_S = 30.0


class Store:
    """Answers at once, or not at all within the time of a reader."""

    def __init__(self) -> None:
        self.away = True
        self.asked = 0
        self.error: errors.CachefsError = errors.StorageUnavailable("connection refused")

    async def ask(self) -> str:
        self.asked += 1
        if not self.away:
            return "answer"
        await trio.sleep(IO_TIMEOUT_S)
        raise self.error


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def known() -> Failures:
    return Failures(trio.current_time)


async def waited_s(known: Failures, store: Store, *keys: Key, length: int = 0) -> float:
    """Fail once, and return how long that took."""
    began = trio.current_time()
    with pytest.raises(type(store.error), match=str(store.error)):
        await known.asking(store.ask, *(keys or (NAME,)), length=length)
    return trio.current_time() - began


async def test_sixteen_that_are_let_in_one_after_the_other_wait_once(
    known: Failures, store: Store, autojump_clock: MockClock
) -> None:
    times = [await waited_s(known, store) for _ in range(16)]
    assert times[0] == IO_TIMEOUT_S
    assert sum(times[1:]) < 1.5


async def test_whoever_comes_later_asks_for_as_long_as_it_takes(
    known: Failures, store: Store, autojump_clock: MockClock
) -> None:
    assert await waited_s(known, store) == IO_TIMEOUT_S
    await trio.sleep(failures.HELD_BACK_S + 0.01)
    assert await waited_s(known, store) == IO_TIMEOUT_S


async def test_a_store_that_is_back_answers_at_once(known: Failures, store: Store, autojump_clock: MockClock) -> None:
    await waited_s(known, store)
    await waited_s(known, store)
    store.away = False
    assert await known.asking(store.ask, NAME) == "answer"


async def test_a_program_that_tries_for_ever_asks_the_store_again_and_again(
    known: Failures, store: Store, autojump_clock: MockClock
) -> None:
    times = [await waited_s(known, store) for _ in range(400)]
    assert times.count(IO_TIMEOUT_S) > 2


async def test_an_agent_that_is_missing_gets_the_time_it_takes_to_start_one(
    known: Failures, store: Store, autojump_clock: MockClock
) -> None:
    store.error = errors.AgentUnavailable("no answer")
    assert await waited_s(known, store) == IO_TIMEOUT_S
    store.error = errors.StorageUnavailable("no answer")
    times = [await waited_s(known, store) for _ in range(16)]
    assert times[0] == failures.AGENT_PATIENCE_S
    assert sum(times) < failures.AGENT_PATIENCE_S * 2.2


async def test_the_repetition_of_a_long_read_fails_at_once_and_only_that(
    known: Failures, store: Store, autojump_clock: MockClock
) -> None:
    assert await waited_s(known, store, (7, 0), (7, 1), length=1 << 20) == IO_TIMEOUT_S
    assert await waited_s(known, store, (7, 0), length=4096) == 0
    assert store.asked == 1
    store.away = False
    assert await known.asking(store.ask, (7, 0), length=4096) == "answer"


async def test_all_blocks_of_a_read_have_failed(known: Failures, store: Store, autojump_clock: MockClock) -> None:
    await waited_s(known, store, (7, 3), (7, 4), length=8192)
    assert known.among(7, 4, 4)
    assert known.among(7, 2, 3)
    assert not known.among(7, 5, 9)
    assert await waited_s(known, store, (7, 4), length=8192) == failures.FIRST_PATIENCE_S


async def test_other_names_and_other_errors_are_not_concerned(
    known: Failures, store: Store, autojump_clock: MockClock
) -> None:
    await waited_s(known, store)
    assert await waited_s(known, store, (1, b"other")) == IO_TIMEOUT_S
    store.error = errors.AccessDenied("no")
    await waited_s(known, store, (2, None))
    assert await waited_s(known, store, (2, None)) == IO_TIMEOUT_S


async def test_there_is_a_most_of_them(known: Failures, autojump_clock: MockClock) -> None:
    for number in range(failures.MAX_FAILURES + 10):
        known.remember(errors.AgentUnavailable("gone"), (number, None))
    assert len(known._failures) == failures.MAX_FAILURES
    assert (failures.MAX_FAILURES + 9, None) in known._failures
