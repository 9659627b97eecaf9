"""What the store did, counted at one place (`cachefs.store.retry`) for `cachefs status` and the metrics."""

from __future__ import annotations

import threading
from collections import Counter

from cachefs.errors import CachefsError
from cachefs.store.condition import Condition


class StoreCounters:
    """Counts of requests, bytes, retries and errors since the start. Thread-safe.

    `origin_requests` counts what was sent, retries included; a check is counted as a list. `origin_errors` counts
    failed requests whether or not a retry made up for them, and `origin_errors_<kind>` the same by class of error. A
    name that does not exist, or a version that is gone, is an answer and not an error.
    """

    _ANSWERS = frozenset({"NotFound", "StaleObject"})

    def __init__(self) -> None:
        self.condition = Condition()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(
            dict.fromkeys(
                (
                    "origin_requests",
                    "origin_bytes",
                    "origin_list_requests",
                    "origin_head_requests",
                    "origin_get_requests",
                    "origin_retries",
                    "origin_errors",
                    "origin_throttled",
                ),
                0,
            )
        )

    def sent(self, operation: str) -> None:
        """A request of kind "get", "head" or "list" is going out."""
        with self._lock:
            self._counts["origin_requests"] += 1
            self._counts[f"origin_{operation}_requests"] += 1

    def answered(self) -> None:
        """A request was answered well."""
        self.condition.answered()

    def received(self, length: int) -> None:
        """So many bytes of an object came in."""
        with self._lock:
            self._counts["origin_bytes"] += length

    def failed(self, error: CachefsError, *, throttled: bool) -> None:
        """A request ended with this error."""
        kind = type(error).__name__
        if kind in self._ANSWERS:
            self.condition.answered()
            return
        if not throttled:  # a store that asks for patience is well
            self.condition.failed(error)
        with self._lock:
            self._counts["origin_errors"] += 1
            self._counts[f"origin_errors_{kind}"] += 1
            if throttled:
                self._counts["origin_throttled"] += 1

    def retried(self) -> None:
        """A failed request is going to be sent again."""
        with self._lock:
            self._counts["origin_retries"] += 1

    def snapshot(self) -> dict[str, float]:
        """Return all counts by name."""
        with self._lock:
            return {name: float(count) for name, count in self._counts.items()}
