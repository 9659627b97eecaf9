"""What a tier says about its faults: every one is counted, and each kind is warned of at most once a minute."""

from __future__ import annotations

import logging
import threading
import time

from cachefs.metrics import Counters
from cachefs.types import Tier

log = logging.getLogger(__name__)


class ThrottledWarning:
    """At most one warning a minute; says how many were left out."""

    __slots__ = ("_interval_s", "_left_out", "_lock", "_next")

    def __init__(self, interval_s: float = 60.0) -> None:
        self._interval_s = interval_s
        self._next = 0.0
        self._left_out = 0
        self._lock = threading.Lock()

    def due(self, now: float) -> str | None:
        """Return None (say nothing now) or what to add to the message."""
        with self._lock:
            if now < self._next:
                self._left_out += 1
                return None
            self._next = now + self._interval_s
            left_out, self._left_out = self._left_out, 0
        return f" (and {left_out} more since the last warning)" if left_out else ""


class Faults:
    """The faults of one tier. Any thread."""

    def __init__(self, name: str, tier: Tier, counters: Counters) -> None:
        self._name = name
        self._tier = tier
        self._counters = counters
        self._bad_blocks = ThrottledWarning()
        self._faults = ThrottledWarning()

    def bad_block(self, error: Exception) -> None:
        """A block failed its check and is being dropped."""
        self._counters.add(f"{self._tier}_corrupt")
        more = self._bad_blocks.due(time.monotonic())
        if more is not None:
            log.warning("dropped a bad block of %s: %s%s", self._name, error, more)

    def fault(self, error: Exception) -> None:
        """The tier could not do something; whoever asked was told that the block is not there."""
        self._counters.add(f"{self._tier}_faults")
        more = self._faults.due(time.monotonic())
        if more is not None:
            log.warning("%s is not usable now: %s%s", self._name, error, more)
