"""What the tiers are told about the future by people and jobs: files that must stay, and plans of reads to come.

Pins, running warm-ups and plans come and go each for itself; a tier knows one question for each of the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import trio

from cachefs.block.lmdb_tier import TierWriter
from cachefs.types import ObjectId

Stays = Callable[[ObjectId], bool]
NextUse = Callable[[ObjectId], int | None]


class Guidance:
    """Of the tiers of an agent. Trio thread; the tiers ask in theirs."""

    def __init__(self, shm: TierWriter | None, disk: TierWriter | None) -> None:
        self._tiers = [tier for tier in (shm, disk) if tier is not None]
        self.keeper = disk or shm
        """The tier that keeps blocks for long: what must stay has to stay there."""
        self._staying: tuple[Stays, ...] = ()
        self._plans: tuple[NextUse, ...] = ()
        self._telling = trio.Lock()

    def stays(self, oid: ObjectId) -> bool:
        """Whether an object must stay. Any thread."""
        return any(question(oid) for question in self._staying)

    def next_use(self, oid: ObjectId) -> int | None:
        """Return the nearest next read of an object in any plan. Any thread."""
        found = [position for plan in self._plans if (position := plan(oid)) is not None]
        return min(found, default=None)

    async def keep(self, question: Stays) -> None:
        """Keep what `question` says yes to, from now on; once more when its answers have changed."""
        self._staying = (*(each for each in self._staying if each != question), question)
        await self._tell()

    async def let_go(self, question: Stays) -> None:
        """Forget a question."""
        self._staying = tuple(each for each in self._staying if each != question)
        await self._tell()

    async def follow(self, plan: NextUse) -> None:
        """Evict with this plan in mind, too."""
        self._plans = (*(each for each in self._plans if each != plan), plan)
        await self._tell()

    async def leave(self, plan: NextUse) -> None:
        """Forget a plan."""
        self._plans = tuple(each for each in self._plans if each != plan)
        await self._tell()

    async def _tell(self) -> None:
        async with self._telling:
            plan = (self._plans[0] if len(self._plans) == 1 else self.next_use) if self._plans else None
            stays = (self._staying[0] if len(self._staying) == 1 else self.stays) if self._staying else None
            for tier in self._tiers:
                kept = stays if tier is self.keeper else None
                await trio.to_thread.run_sync(functools.partial(tier.guide, next_use=plan, is_pinned=kept))
