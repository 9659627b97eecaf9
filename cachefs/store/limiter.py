"""How many requests may be in flight at once: additive increase, multiplicative decrease.

Every success raises the limit by 1/limit (one more request per round of answers), a throttled answer halves it. All
requests of one round are throttled together, so only those that were sent after the last cut may cut again: else one
overload would bring the limit from 32 to 1.

Requests that nobody waits for yet (`background`) take a part of the permits only, and none while somebody else waits
for one. A reader always finds one: at a limit of 1 also beside a request of the background. When a reader begins to
wait for such a request, it goes on like any other.

INVARIANT: 1 <= limit <= most. At most `limit` requests are in flight, and one more beside those of the background.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cachefs.errors import StorageUnavailable

BACKGROUND_PART = 0.75
"""How many of the permits requests may have that nobody waits for."""
LOOK_S = 0.05
"""How often such a request that waits for its permit looks whether a reader waits for it by now."""

_thread = threading.local()


@contextlib.contextmanager
def background(still: Callable[[], bool]) -> Iterator[None]:
    """Requests of this thread are ones that nobody waits for, as long as `still` returns True."""
    before = getattr(_thread, "still", None)
    _thread.still = still
    try:
        yield
    finally:
        _thread.still = before


def in_background() -> bool:
    """Whether what this thread asks for now is what nobody waits for yet."""
    still: Callable[[], bool] | None = getattr(_thread, "still", None)
    return still is not None and still()


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to have one request in flight. Give it back with exactly one of `succeeded`, `throttled`, `failed`."""

    cuts: int
    """How many cuts there had been when it was given."""
    background: bool = False


class AimdLimiter:
    """See the module. Blocking and thread-safe."""

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = max(1, most)
        self._limit = float(self._most)
        self._in_flight = 0
        self._in_background = 0
        self._cuts = 0
        self._clock = clock
        self._waiting = 0
        """How many wait for a permit, those of the background not counted."""
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._changed_behind = threading.Condition(lock)
        self._closed = False

    @property
    def limit(self) -> float:
        """The limit now; whole requests are let through below it."""
        return self._limit

    @property
    def in_flight(self) -> int:
        """Permits given and not yet returned."""
        return self._in_flight

    def acquire(self, timeout_s: float) -> Permit:
        """Wait for a permit. Raises StorageUnavailable when none came in time, or the limiter was closed."""
        deadline = self._clock() + timeout_s
        with self._changed:
            while not (self._closed or self._admits(behind := in_background())):
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise StorageUnavailable(
                        f"no request could be sent for {timeout_s:.1f} s: {self._in_flight} are still in flight",
                        retryable=False,
                    )
                self._wait(min(remaining, threading.TIMEOUT_MAX), behind=behind)
            if self._closed:
                raise StorageUnavailable("the store is closed", retryable=False)
            self._in_flight += 1
            self._in_background += behind
            return Permit(self._cuts, behind)

    def acquire_now(self) -> Permit | None:
        """Return a permit if one is free at this moment."""
        with self._changed:
            behind = in_background()
            if self._closed or not self._admits(behind):
                return None
            self._in_flight += 1
            self._in_background += behind
            return Permit(self._cuts, behind)

    def _admits(self, behind: bool) -> bool:
        if behind:
            return not self._waiting and self._in_flight < max(1, int(self._limit * BACKGROUND_PART))
        return self._in_flight < int(self._limit) or self._in_flight == self._in_background

    def _wait(self, seconds: float, *, behind: bool) -> None:
        if behind:
            self._changed_behind.wait(min(seconds, LOOK_S))
            return
        self._waiting += 1
        try:
            self._changed.wait(seconds)
        finally:
            self._waiting -= 1

    def _return(self, permit: Permit, places: int) -> None:
        """One request less is in flight, and so many places may have become free. Under the lock."""
        self._in_flight -= 1
        self._in_background -= permit.background
        if self._waiting:
            self._changed.notify(places)
        else:
            self._changed_behind.notify(places)

    def succeeded(self, permit: Permit) -> None:
        """The request was answered well."""
        with self._changed:
            self._limit = min(float(self._most), self._limit + 1.0 / self._limit)
            self._return(permit, 2)  # the place that became free, and perhaps one more by the raised limit

    def failed(self, permit: Permit) -> None:
        """The request failed for a reason that says nothing about load, or was not sent."""
        with self._changed:
            self._return(permit, 1)

    def throttled(self, permit: Permit) -> bool:
        """The store asked to slow down. Returns whether this cut the limit."""
        with self._changed:
            cut = permit.cuts == self._cuts
            if cut:
                self._cuts += 1
                self._limit = max(1.0, self._limit / 2)
            self._return(permit, 1)
            return cut

    def close(self) -> None:
        """Refuse further permits and wake all who wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed_behind.notify_all()
