"""When to start the next worker, and when to stop trying."""

from __future__ import annotations

from collections import deque

WINDOW_S = 60.0
BACKOFF_S = (0.0, 0.1, 0.2, 0.5)
"""Delay before the restart after the first, second, ... crash within the window; one more crash is too many."""


class CrashHistory:
    """Counts the crashes of the last minute. Pure: the caller says what time it is."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=len(BACKOFF_S) + 1)

    def record(self, now_s: float) -> float | None:
        """Note a crash; return how long to wait before the restart, or None when there were too many."""
        self._times.append(now_s)
        recent = self.recent(now_s)
        return BACKOFF_S[recent - 1] if recent <= len(BACKOFF_S) else None

    def recent(self, now_s: float) -> int:
        """Return how many crashes there were in the last minute."""
        return sum(1 for time_s in self._times if now_s - time_s < WINDOW_S)

    def clear(self) -> None:
        """Forget all: a person has stepped in."""
        self._times.clear()
