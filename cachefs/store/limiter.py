"""How many requests may be in flight at once: additive increase, multiplicative decrease.

Every success raises the limit by 1/limit (one more request per round of answers), a throttled answer halves it. All
requests of one round are throttled together, so only those that were sent after the last cut may cut again: else one
overload would bring the limit from 32 to 1. INVARIANT: 1 <= limit <= most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cachefs.errors import StorageUnavailable


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to have one request in flight. Give it back with exactly one of `succeeded`, `throttled`, `failed`."""

    cuts: int
    """How many cuts there had been when it was given."""


class AimdLimiter:
    """See the module. Blocking and thread-safe."""

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = max(1, most)
        self._limit = float(self._most)
        self._in_flight = 0
        self._cuts = 0
        self._clock = clock
        self._changed = threading.Condition()
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
            while not self._closed and self._in_flight >= int(self._limit):
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise StorageUnavailable(
                        f"no request could be sent for {timeout_s:.1f} s: {self._in_flight} are still in flight",
                        retryable=False,
                    )
                self._changed.wait(min(remaining, threading.TIMEOUT_MAX))
            if self._closed:
                raise StorageUnavailable("the store is closed", retryable=False)
            self._in_flight += 1
            return Permit(self._cuts)

    def succeeded(self, _permit: Permit) -> None:
        """The request was answered well."""
        with self._changed:
            self._in_flight -= 1
            self._limit = min(float(self._most), self._limit + 1.0 / self._limit)
            self._changed.notify(2)  # the place that became free, and perhaps one more by the raised limit

    def failed(self, _permit: Permit) -> None:
        """The request failed for a reason that says nothing about load."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify()

    def throttled(self, permit: Permit) -> bool:
        """The store asked to slow down. Returns whether this cut the limit."""
        with self._changed:
            self._in_flight -= 1
            cut = permit.cuts == self._cuts
            if cut:
                self._cuts += 1
                self._limit = max(1.0, self._limit / 2)
            self._changed.notify()
            return cut

    def close(self) -> None:
        """Refuse further permits and wake all who wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
