"""Many whole small objects at once, for somebody who does not wait for any one of them (`RetryingStore.get_many`).

    thread of the caller --+-- `wire_gets`, where the store has a wire: all requests from one thread
                           |   what is left of them:
                           +-- permit of the background -> begin -> GET -> arrived
    helpers (for this call)+-- permit of the background -> begin -> GET -> arrived
                           ...

The ordinary way: each thread takes the next object, sends one request and hands the body over itself: no queue and no
event loop between (docs/decisions/0009-bulk-fetch.md). Every object is tried, verified, counted and throttled as one
that a reader asks for; only its permit comes behind those of readers. A thread whose request fails waits as the retry
policy says before it goes on. When the store asks for patience, all of them wait, longer each time it asks again.

How many requests are worth it depends on how far the store is: a near one is kept busy by a few, and more only take the
interpreter's lock from each other.

INVARIANT: each object ends with exactly one of `Orders.arrived` and `failed`, or is left out because `begin` or
`postponed` said so. No thread outlives its call.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cachefs.errors import CachefsError, StorageUnavailable
from cachefs.store.limiter import BACKGROUND_PART, background
from cachefs.store.port import Orders, Wired
from cachefs.store.wire_gets import WireCall
from cachefs.types import ObjectVersion, Tier

if TYPE_CHECKING:
    from cachefs.store.retry import RetryingStore

log = logging.getLogger(__name__)

FEWEST_THREADS = 8
THREAD_S = 0.0005
"""One more thread for each of these that the quickest answer takes."""
FORGET = 1.01
"""The quickest answer counts for so much more after each answer, so that it is one of the last hundred or so."""
SLICE_S = 0.05
"""How often who waits for a throttling store looks whether the store is closed."""
PER_THREAD = 4
"""A helper is started for so many objects: starting one costs 60 us."""


class BulkGets:
    """The bulk requests of one store: knows how many threads they are worth. Any thread."""

    def __init__(self, store: RetryingStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._threads = 0
        self._requests = 0
        """On their way over wires."""
        self._quickest_s = 0.0
        self._quiet_until = 0.0
        self._rounds = 0
        """How often in a row the store wanted fewer requests."""

    def run(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `RetryingStore.get_many`."""
        numbers: Sequence[int] = range(len(versions))
        wire = self._store.inner.wire() if isinstance(self._store.inner, Wired) else None
        if wire is not None:
            call = WireCall(self._store, wire, self, versions, orders)
            numbers = call.run()
            if call.throttled is not None:
                self.throttled(call.throttled)
                if (call.throttled.retry_after_s or 0.0) > self._store.policy.deadline_s:
                    for number in numbers:
                        orders.failed(number, call.throttled)
                    return
        if numbers:
            self._run_ordinary(versions, numbers, orders)

    def _run_ordinary(self, versions: Sequence[ObjectVersion], numbers: Sequence[int], orders: Orders) -> None:
        call = _Call(self, self._store, versions, numbers, orders)
        count = 1 + self._helpers((len(numbers) - 1) // PER_THREAD)
        helpers = []
        try:
            for _ in range(count - 1):
                helper = threading.Thread(target=call.work, name="bulk-get", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # no more threads: those that run do it
                    break
                helpers.append(helper)
            call.work()
        finally:
            call.stop()
            for helper in helpers:
                helper.join()
            with self._lock:
                self._threads -= count
        if call.broken is not None:
            raise call.broken

    def _helpers(self, wished: int) -> int:
        """Take as many helpers as are worth it beside those that run; the caller's own thread is always one more."""
        with self._lock:
            helpers = max(0, min(wished, self._worth() - self._threads - 1))
            self._threads += 1 + helpers
        return helpers

    def _worth(self) -> int:
        most = max(1, int(self._store.max_requests * BACKGROUND_PART))
        return min(most, FEWEST_THREADS + int(self._quickest_s / THREAD_S))

    def enter(self, own: int) -> bool:
        """See `Crowd.enter`. Each call may have one."""
        with self._lock:
            if own and self._requests >= self._worth():
                return False
            self._requests += 1
            return True

    def leave(self) -> None:
        """See `Crowd.leave`."""
        with self._lock:
            self._requests -= 1

    def throttled(self, error: StorageUnavailable) -> None:
        """The store wants fewer requests: none in bulk for a while, for longer each time it says so again."""
        policy, now = self._store.policy, self._store.now()
        with self._lock:
            if now >= self._quiet_until:
                self._rounds += 1
                wait = random.uniform(0.5, 1.0) * policy.ceiling(self._rounds)
                self._quiet_until = now + max(wait, min(error.retry_after_s or 0.0, policy.deadline_s))

    def be_quiet(self) -> None:
        """Wait as long as the store has asked for."""
        while not self._store.closed and (left := self._quiet_until - self._store.now()) > 0:
            time.sleep(min(left, SLICE_S))

    def took(self, seconds: float) -> None:
        """A request was answered in so much time."""
        self._quickest_s = min(seconds, self._quickest_s * FORGET) if self._quickest_s else seconds
        self._rounds = 0


class _Call:
    """One call: what is left to do. Its threads run `work`."""

    def __init__(
        self,
        gets: BulkGets,
        store: RetryingStore,
        versions: Sequence[ObjectVersion],
        numbers: Sequence[int],
        orders: Orders,
    ) -> None:
        self.broken: BaseException | None = None
        """What the caller's code raised."""
        self._gets = gets
        self._store = store
        self._orders = orders
        self._versions = versions
        self._numbers = numbers
        self._turns = itertools.count()
        self._hopeless: CachefsError | None = None
        """Why it is in vain to go on: the store does not answer at all."""

    def stop(self) -> None:
        """Take up no more objects."""
        self._turns = itertools.count(len(self._numbers))

    def work(self) -> None:
        """Bring objects until none is left. Never raises."""
        try:
            with background(lambda: True):
                while (turn := next(self._turns)) < len(self._numbers):
                    self._bring(self._numbers[turn])
        except BaseException as error:  # noqa: BLE001 - of `Orders`; the thread of the call raises it
            self.stop()
            self.broken = error

    def _bring(self, number: int) -> None:
        if self._hopeless is not None:
            self._orders.failed(number, self._hopeless)
            return
        try:
            body = self._get(number)
        except CachefsError as error:
            self._orders.failed(number, error)
        else:
            if body is not None:
                self._orders.arrived(number, body, Tier.ORIGIN)

    def _get(self, number: int) -> bytes | memoryview | None:
        """Return an object, or None: it is not to be brought any more. Raises what `ObjectStore.get_range` raises."""
        store, version = self._store, self._versions[number]
        attempts = store.attempts("get", version.key)
        while True:
            self._gets.be_quiet()
            try:
                permit = store.limiter.acquire(attempts.begin())
            except StorageUnavailable as error:
                self._hopeless = error
                raise
            if not self._orders.begin(number):
                store.limiter.failed(permit)
                return None
            try:
                with store.using(permit, "get"):
                    began = time.monotonic()
                    body = store.inner.get_range(version, 0, version.size)
                    self._gets.took(time.monotonic() - began)
            except StorageUnavailable as error:
                if error.throttled:
                    self._gets.throttled(error)
                if error.retryable and not self._orders.postponed(number):
                    return None
                try:
                    attempts.wait_after(error)
                except StorageUnavailable as final:
                    if store.counters.condition.failing:
                        self._hopeless = final
                    raise
            else:
                store.counters.received(len(body))
                return body
