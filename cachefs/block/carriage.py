"""Room for answers that carry the bytes of their blocks, because no shm tier holds them for the reader.

Such bytes stay in memory from when they come in until the socket has taken the answer, however slowly its reader takes
it. So a fill that will carry bytes gets room for them BEFORE it begins, and gives it back when they were sent. Who
waits is served in turn: one that does not read its answers, or whose store hangs, keeps no other waiting.

Used from the trio thread only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from cachefs.block.shares import Shares

GREED = 3.0


@dataclass(eq=False, slots=True)
class _Wish:
    size: int
    granted: trio.Event = field(default_factory=trio.Event)


class Carriage:
    """INVARIANT: whoever waits does not fit now."""

    def __init__(self, budget_bytes: int) -> None:
        self._shares = Shares(budget_bytes)
        self._waiting: dict[object, deque[_Wish]] = {}

    @property
    def held_bytes(self) -> int:
        """What answers hold that were not sent yet, or are being filled."""
        return self._shares.held_bytes

    @asynccontextmanager
    async def room(self, who: object, size: int) -> AsyncIterator[None]:
        """Hold room for so many bytes."""
        await self._take(who, size)
        try:
            yield
        finally:
            self._shares.give_back(who, size)
            self._grant()

    async def _take(self, who: object, size: int) -> None:
        if who not in self._waiting and self._shares.fits(who, size, greed=GREED):
            self._shares.take(who, size)
            return
        wish = _Wish(size)
        self._waiting.setdefault(who, deque()).append(wish)
        try:
            await wish.granted.wait()
        except trio.Cancelled:
            if wish.granted.is_set():
                self._shares.give_back(who, size)
            else:
                self._forget(who, wish)
            self._grant()
            raise

    def _forget(self, who: object, wish: _Wish) -> None:
        wishes = self._waiting[who]
        wishes.remove(wish)
        if not wishes:
            del self._waiting[who]

    def _grant(self) -> None:
        """Give what is free to those who wait, one piece for each in turn."""
        granted = True
        while granted:
            granted = False
            for who, wishes in list(self._waiting.items()):
                wish = wishes[0]
                if not self._shares.fits(who, wish.size, greed=GREED):
                    continue
                granted = True
                self._shares.take(who, wish.size)
                wish.granted.set()
                del self._waiting[who]
                wishes.popleft()
                if wishes:
                    self._waiting[who] = wishes  # behind the others
