"""What failed a moment ago because the store or the agent is away, so that nobody waits for it in a queue.

The kernel lets one request through for one name, one directory or one page at a time. When it has waited for all of its
time and failed, the next of those who wait for the same comes, and would wait for as long again: N readers, N times the
time. Those come within milliseconds of the failed answer. FUSE does not say since when a reader waits, so whoever comes
that soon is taken for one of them, and gets little time to find out whether the store is back: half a second, the next
one half of that, and so on. Somebody who has just come, and found the store well again, gets the answer within that
time, unless the retries of a request that is still under way are pausing just then; whoever comes later asks as if
nothing had been. (Where it was the agent that did not answer: six times as much, which is what it takes to start one.)

A read of several pages that failed is repeated by the kernel for its first page, in the name of the same reader, who
has had all of the time: that one fails at once.

INVARIANT: nothing is remembered but failures to reach the store or the agent, and each of them for so long at most that
a program which tries for ever asks the store again and again.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from cachefs import errors

T = TypeVar("T")

HELD_BACK_S = 0.1
"""How soon after a failed answer a request comes that has waited behind it: milliseconds, if there is a free CPU."""
FIRST_PATIENCE_S = 0.5
AGENT_PATIENCE_S = 3.0
LEAST_PATIENCE_S = 0.03
CHAIN = 10
"""Patiences for which a failure is remembered."""
PAGE_BYTES = 4096
MAX_FAILURES = 1024

Key = tuple[int, bytes | int | None]
"""(directory, name), (file, index of a block), (directory, None): its listing."""


@dataclass(slots=True, eq=False)
class _Failure:
    text: str
    failed_at: float
    answered_at: float
    """When the last request that met this failure was answered."""
    first_s: float
    """The patience of the first one that meets it."""
    repeats: bool
    """The kernel is going to ask for the first page once more."""
    met: int = 0
    """How many requests have met it."""

    def patience_s(self) -> float:
        """Return for how long the next one that meets it may ask."""
        self.met += 1
        return max(LEAST_PATIENCE_S, self.first_s / 2.0 ** min(self.met - 1, 30))


class Failures:
    """The failures of one mount. Used by the trio thread; `among` by any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[Key, _Failure] = {}

    def among(self, ino: int, first: int, last: int) -> bool:
        """Whether something may be known of a read of these blocks."""
        failures = self._failures
        return bool(failures) and any((ino, index) in failures for index in range(first, last + 1))

    async def asking(self, ask: Callable[[], Awaitable[T]], *keys: Key, length: int = 0) -> T:
        """Return what `ask` returns, for a request that has just come. It gets little time in the wake of a failure.

        `length`: of a read, in bytes. Raises what `ask` raises, and StorageUnavailable when that time is over.
        """
        met = next((failure for key in keys if (failure := self._fresh(key)) is not None), None)
        try:
            if met is None:
                return await ask()
            if not (met.repeats and length <= PAGE_BYTES):
                with trio.move_on_after(met.patience_s()):
                    return await ask()
            met.repeats = False
            raise errors.StorageUnavailable(met.text)
        except errors.CachefsError as error:
            if met is None:
                self.remember(error, *keys, length=length)
            else:
                met.answered_at = self._clock()
            raise

    def remember(self, error: errors.CachefsError, *keys: Key, length: int = 0) -> None:
        """Note how a request ended that could ask for as long as it takes."""
        if not isinstance(error, (errors.StorageUnavailable, errors.AgentUnavailable)):
            return
        now = self._clock()
        first_s = AGENT_PATIENCE_S if isinstance(error, errors.AgentUnavailable) else FIRST_PATIENCE_S
        for key in keys:
            known = self._fresh(key)
            if known is not None:
                known.answered_at = now
                continue
            if len(self._failures) >= MAX_FAILURES:
                del self._failures[next(iter(self._failures))]
            self._failures[key] = _Failure(str(error), now, now, first_s, repeats=length > PAGE_BYTES)

    def _fresh(self, key: Key) -> _Failure | None:
        """Return a failure that whoever comes now may have waited behind; any other is forgotten."""
        failure = self._failures.get(key)
        if failure is None:
            return None
        now = self._clock()
        if now - failure.answered_at <= HELD_BACK_S and now - failure.failed_at <= CHAIN * failure.first_s:
            return failure
        del self._failures[key]
        return None
