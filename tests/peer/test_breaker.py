"""When a node is asked, and when not: the breaker with a clock in our hands."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.breaker import FAILURES, FIRST_PAUSE_S, JITTER, LONGEST_PAUSE_S, TRIAL_S, Breaker, Breakers, BreakerState


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_three_failures_in_a_row_open_it(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 0.0)
    for _ in range(FAILURES - 1):
        breaker.failed()
    breaker.succeeded()
    for _ in range(FAILURES):
        assert breaker.allow()
        assert breaker.state is BreakerState.CLOSED
        breaker.failed()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.allow()


def test_one_connection_that_fails_opens_it(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 0.0)
    breaker.failed(connecting=True)
    assert not breaker.allow()
    clock.now += FIRST_PAUSE_S
    assert str(breaker.state) == "half-open"
    assert breaker.allow()
    assert not breaker.allow(), "one trial at a time"
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.allow()


def test_pauses_double_up_to_a_bound(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 0.0)
    breaker.failed(connecting=True)
    pauses = []
    for _ in range(8):
        began = clock.now
        while not breaker.allow():
            clock.now += 0.5
        pauses.append(clock.now - began)
        breaker.failed()
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert pauses[-1] == LONGEST_PAUSE_S


def test_pauses_are_jittered(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 1.0)
    breaker.failed(connecting=True)
    clock.now += FIRST_PAUSE_S * (1 - JITTER)
    assert breaker.allow()


def test_a_trial_that_is_given_up_makes_room_for_another(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 0.0)
    breaker.failed(connecting=True)
    clock.now += FIRST_PAUSE_S
    assert breaker.allow()
    breaker.abandoned()
    assert breaker.allow()
    clock.now += TRIAL_S
    assert breaker.allow(), "nobody reported"


def test_who_was_asked_before_does_not_lengthen_the_pause(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 0.0)
    for _ in range(20):
        breaker.failed(connecting=True)
    clock.now += FIRST_PAUSE_S
    assert breaker.allow()


def test_latency(clock: Clock) -> None:
    breaker = Breaker(clock)
    assert breaker.latency_s is None
    breaker.took(1.0)
    assert breaker.latency_s == 1.0
    for _ in range(50):
        breaker.took(0.1)
    assert breaker.latency_s == pytest.approx(0.1, rel=0.01)


def test_another_life_of_a_node_begins_anew(clock: Clock) -> None:
    breakers = Breakers(clock)
    first = breakers.of("node", "1")
    first.failed(connecting=True)
    assert breakers.of("node", "1") is first
    assert not breakers.of("node", "1").allow()
    assert breakers.of("node", "2").allow()
    assert breakers.of("node", "2").state is BreakerState.CLOSED


@given(st.lists(st.sampled_from(["allow", "good", "bad", "connect", "leave", "wait"]), max_size=60))
def test_it_never_stays_shut(steps: list[str]) -> None:
    """Whatever happened, somebody may ask after the longest pause and a trial that was forgotten."""
    clock = Clock()
    breaker = Breaker(clock, lambda: 0.5)
    for step in steps:
        match step:
            case "allow":
                breaker.allow()
            case "good":
                breaker.succeeded()
            case "bad":
                breaker.failed()
            case "connect":
                breaker.failed(connecting=True)
            case "leave":
                breaker.abandoned()
            case _:
                clock.now += 0.7
    clock.now += max(LONGEST_PAUSE_S, TRIAL_S)
    assert breaker.allow()


def test_one_trial_among_many_threads(clock: Clock) -> None:
    breaker = Breaker(clock, lambda: 0.0)
    breaker.failed(connecting=True)
    clock.now += FIRST_PAUSE_S
    told: list[bool] = []
    threads = [threading.Thread(target=lambda: told.append(breaker.allow())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told) == 1
