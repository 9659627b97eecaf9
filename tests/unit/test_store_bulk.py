"""Many objects at once from one store: what each of them ends with, and who goes first."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from cachefs.errors import CachefsError, StaleObject, StorageUnavailable
from cachefs.store.faults import Fault, FaultPlan, FaultStore, Kind, Operation
from cachefs.store.limiter import LOOK_S, AimdLimiter, background
from cachefs.store.memory import MemoryStore
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.types import ObjectVersion, Tier

QUICK = RetryPolicy(deadline_s=2.0, first_wait_s=0.001, longest_wait_s=0.01)


class Recorder:
    """`Orders` that write down what they hear."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.bodies: dict[int, bytes] = {}
        self.errors: dict[int, CachefsError] = {}
        self.postponements: list[int] = []
        self.refused: set[int] = set()
        self.keep_postponed = True
        self.lock = threading.Lock()

    def begin(self, number: int) -> bool:
        with self.lock:
            if number in self.refused:
                return False
            self.begun.append(number)
            return True

    def postponed(self, number: int) -> bool:
        with self.lock:
            self.postponements.append(number)
        return self.keep_postponed

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        assert source is Tier.ORIGIN
        with self.lock:
            assert number not in self.bodies | self.errors
            self.bodies[number] = bytes(body)

    def failed(self, number: int, error: CachefsError) -> None:
        with self.lock:
            assert number not in self.bodies | self.errors
            self.errors[number] = error


def rig(
    count: int, *faults: Fault, policy: RetryPolicy = QUICK, most: int = 16
) -> tuple[RetryingStore, FaultPlan, list[ObjectVersion], list[bytes]]:
    memory, plan = MemoryStore(), FaultPlan(*faults)
    bodies = [random.Random(number).randbytes(1 + number * 7) for number in range(count)]
    versions = [memory.put(f"key-{number}", body).version for number, body in enumerate(bodies)]
    return RetryingStore(FaultStore(memory, plan), policy, max_requests=most), plan, versions, bodies


def settled(store: RetryingStore) -> None:
    assert store.limiter.in_flight == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "bulk-get"]


@pytest.mark.parametrize("count", [0, 1, 3, 60])
def test_all_of_them_arrive_once(count: int) -> None:
    store, plan, versions, bodies = rig(count)
    orders = Recorder()
    store.get_many(versions, orders)
    assert orders.bodies == dict(enumerate(bodies))
    assert plan.calls[Operation.GET] == count
    counted = store.counters.snapshot()
    assert (counted["origin_get_requests"], counted["origin_bytes"]) == (count, sum(map(len, bodies)))
    settled(store)


def test_what_one_meets_is_no_trouble_for_the_others() -> None:
    store, _, versions, bodies = rig(
        40, Fault(Kind.CHANGED, key="key-3"), Fault(Kind.DENIED, key="key-30"), Fault(Kind.RESET, key="key-9", times=2)
    )
    orders = Recorder()
    store.get_many(versions, orders)
    assert {number: type(error).__name__ for number, error in orders.errors.items()} == {
        3: "StaleObject",
        30: "AccessDenied",
    }
    assert orders.bodies == {number: body for number, body in enumerate(bodies) if number not in (3, 30)}
    assert orders.postponements == [9, 9]
    settled(store)


def test_what_is_not_wanted_any_more_is_not_asked_for() -> None:
    store, plan, versions, _ = rig(20)
    orders = Recorder()
    orders.refused = set(range(0, 20, 2))
    store.get_many(versions, orders)
    assert sorted(orders.bodies) == list(range(1, 20, 2))
    assert plan.calls[Operation.GET] == 10
    settled(store)


def test_what_is_taken_back_while_it_waits_is_not_asked_for_again() -> None:
    store, plan, versions, _ = rig(5, Fault(Kind.RESET, key="key-2"))
    orders = Recorder()
    orders.keep_postponed = False
    store.get_many(versions, orders)
    assert sorted(orders.bodies) == [0, 1, 3, 4]
    assert orders.errors == {}
    assert plan.calls[Operation.GET] == 5
    settled(store)


@pytest.mark.expect_warnings("the store asks to slow down")
def test_throttling_cuts_the_limit_and_all_come_in_the_end() -> None:
    store, _, versions, bodies = rig(60, Fault(Kind.THROTTLED, skip=10, times=12, retry_after_s=0.02))
    orders = Recorder()
    store.get_many(versions, orders)
    assert orders.bodies == dict(enumerate(bodies))
    assert store.counters.snapshot()["origin_throttled"] == 12
    assert store.limiter.limit < 16
    settled(store)


@pytest.mark.expect_warnings
def test_a_store_that_is_away_is_not_asked_for_every_object() -> None:
    store, plan, versions, _ = rig(
        200, Fault(Kind.RESET), policy=RetryPolicy(deadline_s=0.3, first_wait_s=0.05, longest_wait_s=0.1)
    )
    orders = Recorder()
    started = time.monotonic()
    store.get_many(versions, orders)
    assert time.monotonic() - started < 1.5
    assert sorted(orders.errors) == list(range(200))
    assert plan.calls[Operation.GET] < 150
    settled(store)


def test_closing_the_store_ends_it() -> None:
    policy = RetryPolicy(deadline_s=60, first_wait_s=30, longest_wait_s=30)
    store, plan, versions, _ = rig(50, Fault(Kind.RESET), policy=policy)
    orders = Recorder()
    running = threading.Thread(target=store.get_many, args=(versions, orders))
    running.start()
    while not plan.calls[Operation.GET]:
        time.sleep(0.005)
    store.close()
    running.join(5)
    assert not running.is_alive()
    assert sorted(orders.errors) == list(range(50))
    settled(store)


def test_an_error_of_the_caller_is_raised_and_ends_it() -> None:
    store, plan, versions, _ = rig(200)

    class Broken(Recorder):
        def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
            raise ValueError(number)

    with pytest.raises(ValueError, match=r"^\d+$"):
        store.get_many(versions, Broken())
    assert plan.calls[Operation.GET] < 50
    settled(store)


def test_an_error_of_the_caller_in_a_failure_is_raised_too() -> None:
    store, _, versions, _ = rig(20, Fault(Kind.MISSING))

    class Broken(Recorder):
        def failed(self, number: int, error: CachefsError) -> None:
            assert isinstance(error, StaleObject)
            raise ValueError(number)

    with pytest.raises(ValueError, match=r"^\d+$"):
        store.get_many(versions, Broken())
    settled(store)


def test_one_object_more_than_there_are_permits_for() -> None:
    store, plan, versions, bodies = rig(9, Fault(Kind.DELAY, delay_s=0.02), most=1)
    orders = Recorder()
    store.get_many(versions, orders)
    assert orders.bodies == dict(enumerate(bodies))
    assert plan.calls[Operation.GET] == 9
    settled(store)


# -- permits ----------------------------------------------------------------------------------------------------------


def behind(limiter: AimdLimiter, still: Callable[[], bool] = lambda: True) -> None:
    with background(still):
        limiter.acquire(5)


def test_a_reader_always_finds_a_permit() -> None:
    for most in (1, 2, 8):
        limiter = AimdLimiter(most)
        with background(lambda: True):
            held = [limiter.acquire(0) for _ in range(max(1, int(most * 0.75)))]
            with pytest.raises(StorageUnavailable):
                limiter.acquire(0)
        readers = [limiter.acquire(0)]
        assert limiter.in_flight == len(held) + 1
        for permit in held + readers:
            limiter.succeeded(permit)
        assert limiter.in_flight == 0


def test_who_waits_for_a_permit_goes_before_the_background() -> None:
    limiter = AimdLimiter(1)
    reader = limiter.acquire(0)
    order: list[str] = []

    def ask(name: str) -> None:
        with background(lambda: name == "behind"):
            permit = limiter.acquire(5)
        order.append(name)
        time.sleep(2 * LOOK_S)
        limiter.succeeded(permit)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("behind", "reader")]
    for thread in threads:
        thread.start()
        time.sleep(0.03)
    limiter.succeeded(reader)
    for thread in threads:
        thread.join(5)
    assert order == ["reader", "behind"]
    assert limiter.in_flight == 0


def test_a_request_that_a_reader_waits_for_by_now_goes_on_like_any_other() -> None:
    limiter = AimdLimiter(4)
    held = [limiter.acquire(0) for _ in range(3)]  # all that the background may have
    wanted = threading.Event()
    waiting = threading.Thread(target=behind, args=(limiter, lambda: not wanted.is_set()))
    waiting.start()
    time.sleep(2 * LOOK_S)
    assert limiter.in_flight == len(held)
    wanted.set()
    waiting.join(1)
    assert limiter.in_flight == len(held) + 1


def test_closing_wakes_the_background() -> None:
    limiter = AimdLimiter(1)
    limiter.acquire(0)
    seen: list[str] = []

    def ask() -> None:
        try:
            behind(limiter)
        except StorageUnavailable as error:
            seen.append(str(error))

    waiting = threading.Thread(target=ask)
    waiting.start()
    time.sleep(0.02)
    limiter.close()
    waiting.join(1)
    assert seen == ["the store is closed"]
