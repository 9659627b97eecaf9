"""A budget of bytes on an event loop: who wants to hold some waits for his turn, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class ByteRoom:
    """`limit` bytes; a wish for more than that is granted when nothing else is held. Used on one event loop.

    INVARIANT: nobody waits while what he wants is free and nobody came before him.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[tuple[int, trio.Event]] = deque()
        self.used = 0

    async def take(self, length: int) -> None:
        """Wait for room and take it. Cancelled: nothing is taken."""
        if self.take_now(length):
            return
        turn = (length, trio.Event())
        self._waiting.append(turn)
        try:
            await turn[1].wait()
        except BaseException:
            if turn[1].is_set():
                self.give_back(length)
            else:
                self._waiting.remove(turn)
                self._grant()
            raise

    def take_now(self, length: int) -> bool:
        """Take room if nobody has to wait for it; returns whether."""
        granted = not self._waiting and self._fits(length)
        if granted:
            self.used += length
        return granted

    def take_over(self, length: int) -> None:
        """Take room that may not be there: for one who must go on, so that others get theirs."""
        self.used += length

    def give_back(self, length: int) -> None:
        """Let others have it."""
        self.used -= length
        self._grant()

    @asynccontextmanager
    async def taken(self, length: int) -> AsyncIterator[None]:
        """Have room inside."""
        await self.take(length)
        try:
            yield
        finally:
            self.give_back(length)

    def _fits(self, length: int) -> bool:
        return self.used + length <= self._limit or not self.used

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            length, turn = self._waiting.popleft()
            self.used += length
            turn.set()
