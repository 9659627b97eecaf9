"""Whether it is worth it to ask a node now: a circuit breaker for each life of each node, with its latency.

    closed --3 failures in a row, or one connection that fails--> open --after a while--> half-open --one trial-->
    closed, or open for twice as long

(M. Nygard, "Release It!", the pattern of that name.) What moves: nothing by itself, the clock is given. A node that
starts again is another instance, and begins closed. Thread-safe.
"""

from __future__ import annotations

import enum
import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

FAILURES = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
JITTER = 0.25
"""Pauses are up to this part shorter, so that nodes do not try one that is ill at the same moment."""
TRIAL_S = 20.0
"""A trial that nobody has reported about for so long is forgotten, and there may be another."""
EWMA_WEIGHT = 0.2
KEPT = 20_000


class BreakerState(enum.StrEnum):
    """As `cachefs peers` shows it."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Of one instance of one node."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, chance: Callable[[], float] = random.random
    ) -> None:
        """`chance` returns a number from 0 to 1."""
        self._clock = clock
        self._chance = chance
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0
        self._closed_at = 0.0
        """When the pause ends; meaningful while there is one."""
        self._trial_until: float | None = None
        self._outrun_at = -math.inf
        self.latency_s: float | None = None
        """How long it lately took until the head of an answer came (exponentially weighted mean)."""

        self.wait_s = 0.0
        """How long it lately took until the first block of an answer came (mean as above)."""

    @property
    def state(self) -> BreakerState:
        """Closed, open, or half-open (a trial may be made, or is under way)."""
        if not self._pause_s:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._closed_at else BreakerState.HALF_OPEN

    def allow(self) -> bool:
        """Return whether to ask now. Who is told yes reports with one of the four methods below."""
        if not self._pause_s:
            return True
        with self._lock:
            now = self._clock()
            if not self._pause_s:
                return True
            if now < self._closed_at or (self._trial_until is not None and now < self._trial_until):
                return False
            self._trial_until = now + TRIAL_S
            return True

    def succeeded(self) -> None:
        """It answered well."""
        if self._failures or self._pause_s:
            with self._lock:
                self._failures, self._pause_s, self._trial_until = 0, 0.0, None

    def failed(self, *, connecting: bool = False) -> None:
        """It did not; `connecting`: there was not even a connection."""
        with self._lock:
            self._failures += 1
            now = self._clock()
            if self._pause_s:
                if self._trial_until is None and now < self._closed_at:
                    return  # one that was asked before the breaker opened
                self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            elif connecting or self._failures >= FAILURES:
                self._pause_s = FIRST_PAUSE_S
            else:
                return
            self._trial_until = None
            self._closed_at = now + self._pause_s * (1 - JITTER * self._chance())

    def abandoned(self) -> None:
        """Nobody waited for the answer."""
        with self._lock:
            self._trial_until = None

    def outrun(self, asked_at: float) -> None:
        """Nothing was heard of it, and somebody else, who was asked later, had answered by then: a failure. All who
        were asking at that moment count as one: a node that stands still for a moment is not one that is gone.
        """
        with self._lock:
            counts, self._outrun_at = asked_at >= self._outrun_at, max(self._outrun_at, self._clock())
        if counts:
            self.failed()
        else:
            self.abandoned()

    def took(self, seconds: float) -> None:
        """The head of an answer came after so long."""
        known = self.latency_s
        self.latency_s = seconds if known is None else known + EWMA_WEIGHT * (seconds - known)

    def waited(self, seconds: float) -> None:
        """The first block of an answer came after so long."""
        self.wait_s += EWMA_WEIGHT * (seconds - self.wait_s)


class Breakers:
    """One for each instance of each node, made when it is first asked for. Those of old instances are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str, Breaker]] = OrderedDict()

    def of(self, node_id: str, instance: str) -> Breaker:
        """Return the breaker of an instance of a node."""
        known = self._known.get(node_id)
        if known is not None and known[0] == instance:
            return known[1]
        with self._lock:
            known = self._known.get(node_id)
            if known is None or known[0] != instance:
                known = self._known[node_id] = (instance, Breaker(self._clock))
                self._known.move_to_end(node_id)
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            return known[1]
