"""The one retry policy, around any store: deadline, jittered backoff, the server's Retry-After, fewer requests at once.

    request -> permit of the AIMD limiter -> inner store -> answer
                 ^                             | retryable error
                 +---- wait (jitter) <---------+ while the deadline allows it

* Only GET, HEAD and LIST exist in the port, all idempotent; only errors that say `retryable` are tried again.
* The deadline (`io_timeout_s`) holds for the reader: waiting for a permit counts, and no attempt is started that would
  most likely outlive it, judging by how long the last one took. So the wait ends near the deadline, not at twice it.
* The permit is given back during the wait, so a request that backs off does not keep others out.
* `close()` ends all waits at once.
* An outage is one line in so many seconds, with the number of requests that met it, and not a line for each of them.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cachefs.errors import CachefsError, StorageUnavailable
from cachefs.logs import ThrottledWarning
from cachefs.store.bulk import BulkGets
from cachefs.store.counters import StoreCounters
from cachefs.store.limiter import AimdLimiter, Permit
from cachefs.store.port import ListPage, ObjectInfo, ObjectStore, Orders
from cachefs.types import ObjectVersion

log = logging.getLogger(__name__)

T = TypeVar("T")

REPORT_S = 10.0
"""How often retries of one store are said, at each log level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to try again. The wait before retry n (1-based) is random between half of and the whole of `ceiling(n)`."""

    deadline_s: float = 30.0
    """How long all attempts and waits of one call may take together."""
    first_wait_s: float = 0.1
    longest_wait_s: float = 5.0

    def ceiling(self, retry: int) -> float:
        """Return the longest wait before this retry."""
        return min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(retry - 1, 30))

    def wait_s(self, retry: int, retry_after_s: float | None, left_s: float) -> float | None:
        """Return how long to wait before this retry, None to give up.

        Never shorter than the server asked for, never longer than `left_s`: the last attempt is made near the deadline.
        """
        asked = retry_after_s or 0.0
        if left_s < max(asked, self.first_wait_s / 2):
            return None
        top = self.ceiling(retry)
        return min(left_s, max(asked, random.uniform(top / 2, top)))


class RetryingStore:
    """An ObjectStore that retries, limits and counts. `counters` and `limiter` are there for status and metrics."""

    def __init__(
        self,
        inner: ObjectStore,
        policy: RetryPolicy | None = None,
        *,
        max_requests: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.inner = inner
        self.policy = policy if policy is not None else RetryPolicy()
        self.max_requests = max_requests
        self.view = ""
        """What it shows, if that is not what the bucket holds now (`cachefs.store.manifest_store`)."""
        self.counters = StoreCounters()
        self.limiter = AimdLimiter(max_requests, clock=clock)
        self._clock = clock
        self._reports = {level: ThrottledWarning(REPORT_S) for level in (logging.INFO, logging.WARNING)}
        self._closed = threading.Event()
        self._bulk = BulkGets(self)

    @property
    def endpoint(self) -> str:
        """That of the inner store."""
        return self.inner.endpoint

    @property
    def bucket(self) -> str:
        """That of the inner store."""
        return self.inner.bucket

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`. Not retried: a person waits for it, and wants to know what is wrong now."""
        self._once("list", lambda: self.inner.check(prefix), self.policy.deadline_s)

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        body = self._call("get", version.key, lambda: self.inner.get_range(version, start, length))
        self.counters.received(len(body))
        return body

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """See `ObjectStore.read_into`. A body that breaks off is asked for again from the first missing piece on.

        The deadline is for each piece: a range that makes progress may take longer.
        """
        done = 0
        attempts = self.attempts("get", version.key)
        while done < len(buffers):
            try:
                with self._permit("get", attempts.begin()):
                    for _ in self.inner.read_into(version, start, buffers[done:]):
                        self.counters.received(len(buffers[done]))
                        start += len(buffers[done])
                        done += 1
                        yield done
                        attempts.progress()
            except StorageUnavailable as error:
                attempts.wait_after(error)

    def get_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `BulkStore.get_many`."""
        self._bulk.run(versions, orders)

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        return self._call("head", key, lambda: self.inner.head(key))

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""

        def page() -> ListPage:
            return self.inner.list_page(prefix, delimiter=delimiter, token=token, limit=limit)

        return self._call("list", prefix, page)

    def close(self) -> None:
        """End all waits, then close the inner store."""
        self._closed.set()
        self.limiter.close()
        self.inner.close()

    def _call(self, operation: str, key: str, request: Callable[[], T]) -> T:
        attempts = self.attempts(operation, key)
        while True:
            try:
                return self._once(operation, request, attempts.begin())
            except StorageUnavailable as error:
                attempts.wait_after(error)

    def _once(self, operation: str, request: Callable[[], T], timeout_s: float) -> T:
        with self._permit(operation, timeout_s):
            return request()

    @contextlib.contextmanager
    def _permit(self, operation: str, timeout_s: float) -> Iterator[None]:
        """Wait for a permit, and have a request in flight with it."""
        with self.using(self.limiter.acquire(timeout_s), operation):
            yield

    @contextlib.contextmanager
    def using(self, permit: Permit, operation: str) -> Iterator[None]:
        """Have a request in flight; it is counted, and the limiter learns how it ended."""
        give_back: Callable[..., object] = self.limiter.failed
        try:
            self.counters.sent(operation)
            yield
            give_back = self.limiter.succeeded
            self.counters.answered()
        except CachefsError as error:
            throttled = isinstance(error, StorageUnavailable) and error.throttled
            if throttled:
                give_back = self.limiter.throttled
            self.counters.failed(error, throttled=throttled)
            raise
        finally:
            give_back(permit)

    def attempts(self, operation: str, key: str) -> Attempts:
        """Begin the attempts of one call."""
        return Attempts(self, operation, key)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def now(self) -> float:
        """Return the time by the clock of this store."""
        return self._clock()

    def pause(self, seconds: float, cause: StorageUnavailable) -> None:
        """Wait before a request is sent again. Raises StorageUnavailable when the store is closed meanwhile."""
        if self._closed.wait(seconds):
            raise StorageUnavailable("the store is closed", retryable=False) from cause
        self.counters.retried()

    def note(self, operation: str, key: str, attempt: int, wait: float, error: StorageUnavailable) -> None:
        """Log a retry: a single one is normal with any store, the third of one request is worth a person's eye.

        While a store is away, every request comes to its third attempt: one of them speaks for all.
        """
        level, more = {1: logging.DEBUG, 2: logging.INFO}.get(attempt, logging.WARNING), ""
        if level in self._reports:
            due = self._reports[level].due(self._clock())
            level, more = (logging.DEBUG, "") if due is None else (level, due)
        text = f"attempt {attempt}, next in {wait:.2f} s: {error}{more}"
        log.log(level, "%s %r of %s failed, %s", operation.upper(), key, self.bucket, text)


class Attempts:
    """The attempts of one call: how long the next one may take, and how long to wait before it."""

    def __init__(self, store: RetryingStore, operation: str, key: str) -> None:
        self._store = store
        self._operation = operation
        self._key = key
        self._count = 0
        self._started = self._sent = store.now()

    def begin(self) -> float:
        """Begin one more attempt; returns how many seconds are left for getting a permit."""
        self._count += 1
        self._sent = self._store.now()
        return max(0.0, self._store.policy.deadline_s - (self._sent - self._started))

    def progress(self) -> None:
        """A part of the answer has come: what is missing has all of the time again."""
        self._started = self._sent = self._store.now()
        self._count = 1

    def wait_after(self, error: StorageUnavailable) -> None:
        """Wait before the next attempt, or raise when there must be none."""
        if not error.retryable:
            raise error
        store, now = self._store, self._store.now()
        left = store.policy.deadline_s - (now - self._started) - (now - self._sent)
        wait = store.policy.wait_s(self._count, error.retry_after_s, left)
        if wait is None:
            raise _given_up(error, self._count, now - self._started) from error
        store.note(self._operation, self._key, self._count, wait, error)
        store.pause(wait, error)


def _given_up(error: StorageUnavailable, attempts: int, elapsed_s: float) -> StorageUnavailable:
    """Return the same kind of error with what was tried."""
    times = "once" if attempts == 1 else f"{attempts} times"
    return type(error)(
        f"{error} (tried {times} in {elapsed_s:.1f} s)",
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        throttled=error.throttled,
    )
