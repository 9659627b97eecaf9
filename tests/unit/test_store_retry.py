"""The retry policy, the limiter and the counters."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import AccessDenied, BadBody, CachefsError, NotFound, StaleObject, StorageUnavailable
from cachefs.store.faults import Fault, FaultPlan, FaultStore, Kind, Operation
from cachefs.store.limiter import AimdLimiter
from cachefs.store.memory import MemoryStore
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.types import ObjectVersion

QUICK = RetryPolicy(deadline_s=2.0, first_wait_s=0.001, longest_wait_s=0.01)


def rig(*faults: Fault, policy: RetryPolicy = QUICK, most: int = 8) -> tuple[RetryingStore, FaultPlan, ObjectVersion]:
    memory, plan = MemoryStore(), FaultPlan(*faults)
    version = memory.put("key", b"0123456789").version
    return RetryingStore(FaultStore(memory, plan), policy, max_requests=most), plan, version


RETRIED = [Kind.THROTTLED, Kind.SERVER_ERROR, Kind.TRUNCATED, Kind.WRONG_LENGTH, Kind.WRONG_ETAG, Kind.RESET]
FINAL: list[tuple[Kind, type[CachefsError]]] = [
    (Kind.DENIED, AccessDenied),
    (Kind.MISSING, StaleObject),
    (Kind.CHANGED, StaleObject),
]


@pytest.mark.parametrize("kind", RETRIED)
def test_what_may_pass_is_tried_again(kind: Kind) -> None:
    store, plan, version = rig(Fault(kind, times=2))
    assert bytes(store.get_range(version, 2, 3)) == b"234"
    assert store.head("key").size == 10
    assert len(store.list_page("").objects) == 1
    assert plan.calls == {Operation.GET: 3, Operation.HEAD: 1, Operation.LIST: 1}
    counted = store.counters.snapshot()
    assert counted["origin_retries"] == counted["origin_errors"] == 2
    assert counted["origin_throttled"] == (2 if kind is Kind.THROTTLED else 0)
    assert (counted["origin_requests"], counted["origin_bytes"]) == (5, 3)


def pieces(count: int, size: int = 2) -> list[memoryview]:
    return [memoryview(bytearray(size)) for _ in range(count)]


@pytest.mark.parametrize("kind", RETRIED)
def test_pieces_go_on_where_they_broke_off(kind: Kind) -> None:
    store, plan, version = rig(Fault(kind, times=2))
    buffers = pieces(5)
    assert list(store.read_into(version, 0, buffers)) == [1, 2, 3, 4, 5]
    assert b"".join(map(bytes, buffers)) == b"0123456789"
    assert plan.calls[Operation.GET] == 3
    counted = store.counters.snapshot()
    assert (counted["origin_requests"], counted["origin_bytes"]) == (3, 10), "no byte is counted twice"
    assert store.limiter.in_flight == 0


def test_a_stream_that_makes_progress_has_all_of_its_time_again() -> None:
    policy = RetryPolicy(deadline_s=0.5, first_wait_s=0.4, longest_wait_s=0.4)
    store, plan, version = rig(Fault(Kind.RESET, times=3), policy=policy)
    started = time.monotonic()
    assert list(store.read_into(version, 0, pieces(10, 1)))[-1] == 10
    assert time.monotonic() - started > policy.deadline_s, "half of what is left comes before each reset"
    assert plan.calls[Operation.GET] == 4


def test_a_stream_that_is_left_gives_its_permit_back() -> None:
    store, _, version = rig(most=1)
    for _ in range(3):
        stream = store.read_into(version, 0, pieces(5))
        assert next(iter(stream)) == 1
        assert store.limiter.in_flight == 1
        del stream
        assert store.limiter.in_flight == 0


@pytest.mark.parametrize(("kind", "error"), FINAL)
def test_what_will_not_pass_is_not_tried_again(kind: Kind, error: type[CachefsError]) -> None:
    store, plan, version = rig(Fault(kind))
    with pytest.raises(error):
        store.get_range(version, 0, 1)
    assert plan.calls[Operation.GET] == 1
    assert store.counters.snapshot()["origin_retries"] == 0
    assert store.limiter.in_flight == 0


def test_a_missing_name_is_an_answer_and_not_an_error() -> None:
    store, _, _ = rig()
    with pytest.raises(NotFound):
        store.head("absent")
    counted = store.counters.snapshot()
    assert (counted["origin_head_requests"], counted["origin_errors"]) == (1, 0)


@pytest.mark.expect_warnings
def test_the_deadline_ends_it_with_what_was_tried() -> None:
    store, plan, version = rig(
        Fault(Kind.TRUNCATED), policy=RetryPolicy(deadline_s=0.3, first_wait_s=0.01, longest_wait_s=0.05)
    )
    started = time.monotonic()
    with pytest.raises(BadBody, match=r"'key': the body ended early \(tried \d+ times in 0\.\d s\)"):
        store.get_range(version, 0, 1)
    assert time.monotonic() - started < 0.4
    assert plan.calls[Operation.GET] > 3


def test_no_attempt_that_would_most_likely_outlive_the_deadline() -> None:
    store, plan, version = rig(
        Fault(Kind.DELAY, delay_s=0.2), Fault(Kind.RESET), policy=RetryPolicy(deadline_s=0.3, first_wait_s=0.001)
    )
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="tried once"):
        store.get_range(version, 0, 1)
    assert time.monotonic() - started < 0.3
    assert plan.calls[Operation.GET] == 1


def test_retry_after_is_honoured() -> None:
    store, _, version = rig(Fault(Kind.THROTTLED, times=1, retry_after_s=0.2))
    started = time.monotonic()
    store.get_range(version, 0, 1)
    assert 0.2 <= time.monotonic() - started < 0.5


def test_retry_after_beyond_the_deadline_gives_up_at_once() -> None:
    store, _, version = rig(Fault(Kind.THROTTLED, retry_after_s=60.0))
    started = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        store.get_range(version, 0, 1)
    assert caught.value.throttled
    assert caught.value.retry_after_s == 60.0
    assert time.monotonic() - started < 0.2


def test_check_is_not_retried() -> None:
    store, plan, _ = rig(Fault(Kind.RESET))
    with pytest.raises(StorageUnavailable):
        store.check("")
    assert plan.calls == {Operation.CHECK: 1}


@pytest.mark.expect_warnings("attempt 3")
def test_log_levels_rise(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "cachefs.store.retry")
    store, _, version = rig(Fault(Kind.RESET, times=3))
    store.get_range(version, 0, 1)
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO", "WARNING"]


@pytest.mark.expect_warnings("attempt")
def test_an_outage_is_a_line_in_ten_seconds_and_not_a_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cachefs.store.retry")
    now_s = 1000.0
    memory, plan = MemoryStore(), FaultPlan()
    version = memory.put("key", b"0123456789").version
    policy = RetryPolicy(deadline_s=60, first_wait_s=0.0001, longest_wait_s=0.001)
    store = RetryingStore(FaultStore(memory, plan), policy, clock=lambda: now_s)

    def requests(count: int) -> list[str]:
        caplog.clear()
        for _ in range(count):
            plan.clear()
            plan.add(Fault(Kind.RESET, times=4))
            store.get_range(version, 0, 1)
        return [f"{record.levelname} {record.getMessage()}" for record in caplog.records]

    first = requests(10)
    assert [line.split()[0] for line in first] == ["INFO", "WARNING"]
    assert "GET 'key' of memory failed, attempt 3" in first[1]
    now_s += 9.9
    assert requests(5) == []
    now_s += 0.2
    later = [line for line in requests(5) if line.startswith("WARNING")]
    assert len(later) == 1
    # two warnings of every request before it, except for the one that was written
    assert later[0].endswith("(and 29 more since the last such line)")
    assert store.counters.snapshot()["origin_retries"] == 80, "each is counted all the same"


def test_close_ends_waits() -> None:
    store, _, version = rig(Fault(Kind.RESET), policy=RetryPolicy(deadline_s=60, first_wait_s=20, longest_wait_s=20))
    timer = threading.Timer(0.1, store.close)
    timer.start()
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="closed"):
        store.get_range(version, 0, 1)
    assert time.monotonic() - started < 2
    timer.join()


def test_403_after_n_calls() -> None:
    store, _, version = rig(Fault(Kind.DENIED, Operation.GET, skip=3))
    for _ in range(3):
        store.get_range(version, 0, 1)
    with pytest.raises(AccessDenied):
        store.get_range(version, 0, 1)
    store.head("key")


def test_faults_for_some_keys() -> None:
    plan = FaultPlan(Fault(Kind.DENIED, key="one"), Fault(Kind.RESET, key=lambda key: key.startswith("t"), times=1))
    store = FaultStore(MemoryStore(), plan)
    with pytest.raises(AccessDenied):
        store.head("one")
    with pytest.raises(StorageUnavailable):
        store.head("two")
    for key in ("two", "three"):
        with pytest.raises(NotFound):
            store.head(key)
    plan.clear()
    with pytest.raises(NotFound):
        store.head("one")
    assert plan.hits == {Kind.DENIED: 1, Kind.RESET: 1}


@given(st.integers(1, 100), st.one_of(st.none(), st.floats(0, 100)), st.floats(-10, 100))
def test_waits_stay_within_bounds(retry: int, asked: float | None, left: float) -> None:
    policy = RetryPolicy()
    wait = policy.wait_s(retry, asked, left)
    if wait is None:
        assert left < max(asked or 0, policy.first_wait_s)
    else:
        assert max(asked or 0, min(left, policy.ceiling(retry) / 2)) <= wait <= left
        assert wait <= max(policy.longest_wait_s, asked or 0)


# -- the limiter ------------------------------------------------------------------------------------------------------


def test_throttling_halves_once_per_round_and_success_raises_again() -> None:
    limiter = AimdLimiter(32)
    round_of = [limiter.acquire(1) for _ in range(32)]
    assert sum(limiter.throttled(permit) for permit in round_of) == 1
    assert limiter.limit == 16
    for permit in [limiter.acquire(1) for _ in range(16)]:
        limiter.succeeded(permit)
    assert 16.9 < limiter.limit < 17
    for _ in range(2000):
        limiter.succeeded(limiter.acquire(1))
    assert limiter.limit == 32
    assert limiter.in_flight == 0


@given(st.integers(1, 40), st.lists(st.sampled_from(["ask", "good", "bad", "slow"]), max_size=200))
def test_limits_always_hold(most: int, steps: list[str]) -> None:
    limiter = AimdLimiter(most)
    held = []
    for step in steps:
        if step == "ask":
            if limiter.in_flight < int(limiter.limit):
                held.append(limiter.acquire(0))
            else:
                with pytest.raises(StorageUnavailable):
                    limiter.acquire(0)
        elif held:
            finish: Callable[..., object] = {
                "good": limiter.succeeded,
                "bad": limiter.failed,
                "slow": limiter.throttled,
            }[step]
            finish(held.pop())
        assert 1 <= limiter.limit <= most
        assert limiter.in_flight == len(held) <= most


def test_never_more_requests_in_flight_than_allowed() -> None:
    class Counting(MemoryStore):
        now = most_seen = 0
        lock = threading.Lock()

        def head(self, key: str):
            with self.lock:
                self.now += 1
                self.most_seen = max(self.most_seen, self.now)
            time.sleep(0.002)
            with self.lock:
                self.now -= 1
            return super().head(key)

    inner = Counting()
    inner.put("key", b"x")
    store = RetryingStore(inner, max_requests=3)
    threads = [threading.Thread(target=lambda: [store.head("key") for _ in range(10)]) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inner.most_seen == 3
    assert store.counters.snapshot()["origin_requests"] == 120


def test_waiting_for_a_permit_counts_towards_the_deadline() -> None:
    store, _, version = rig(
        Fault(Kind.DELAY, delay_s=0.6, times=1), policy=RetryPolicy(deadline_s=0.2, first_wait_s=0.001), most=1
    )
    blocker = threading.Thread(target=lambda: store.head("key"))
    blocker.start()
    while store.limiter.in_flight == 0:
        time.sleep(0.001)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match="still in flight"):
        store.get_range(version, 0, 1)
    assert 0.15 < time.monotonic() - started < 0.4
    blocker.join()
    assert bytes(store.get_range(version, 0, 1)) == b"0"


def test_permits_come_back_whatever_happens() -> None:
    class Broken(MemoryStore):
        def head(self, key: str):
            raise ZeroDivisionError(key)

    store = RetryingStore(Broken(), QUICK, max_requests=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            store.head("key")
    assert store.limiter.in_flight == 0
