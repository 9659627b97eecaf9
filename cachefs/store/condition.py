"""Whether a store answers, for `cachefs status`: counts alone do not say whether errors are over.

An answer is any of which the store is the author: also "no such object". A single failure is made up for by a retry and
means nothing; three in a row without an answer between them do, and so does a first one that no retry can help.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from cachefs.errors import BucketNotFound, CachefsError, CredentialsError

FAILURES_IN_A_ROW = 3
_HOPELESS = (CredentialsError, BucketNotFound)


class Condition:
    """How one store is. Safe from any thread; `answered` costs nothing while all is well."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._hopeless = False
        self._since: float | None = None
        self._last_error: str | None = None
        self._last_error_at: float | None = None

    def answered(self) -> None:
        """A request was answered."""
        if self._failures:
            with self._lock:
                self._failures, self._hopeless, self._since = 0, False, None

    def failed(self, error: CachefsError) -> None:
        """A request was not answered, or it was refused."""
        now = self._clock()
        with self._lock:
            self._failures += 1
            self._hopeless = self._hopeless or isinstance(error, _HOPELESS)
            self._since = now if self._since is None else self._since
            self._last_error, self._last_error_at = str(error), now

    @property
    def failing(self) -> bool:
        """Whether the store does not answer (some failures in a row), or will not."""
        return self._failures >= FAILURES_IN_A_ROW or self._hopeless

    def describe(self) -> dict[str, Any]:
        """Return what docs/STATUS.md says of `origin`. Times are seconds since the epoch."""
        with self._lock:
            failing = self.failing
            return {
                "failing": failing,
                "since": self._since if failing else None,
                "failures": self._failures if failing else 0,
                "last_error": self._last_error,
                "last_error_at": self._last_error_at,
            }
