"""All that people and jobs tell an agent, plugged together: commands, pins, and plans of reads to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from cachefs.agent.crew import Colleagues
from cachefs.agent.errands import Errands
from cachefs.agent.guidance import Guidance
from cachefs.agent.pins import Pins
from cachefs.agent.places import AgentPaths
from cachefs.agent.plans import Follow, Plans
from cachefs.agent.volumes import Volumes
from cachefs.agent.warmup import WarmUp
from cachefs.block.block_cache import BlockCache
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.runtime import RuntimeDir


class Instructions:
    """Of one agent."""

    def __init__(
        self,
        cache: BlockCache,
        tiers: tuple[TierWriter | None, TierWriter | None],
        volumes: Volumes,
        counters: Counters,
        paths: AgentPaths,
        runtime: RuntimeDir,
        follow: Follow,
        volumes_changed: Callable[[], None],
        nursery: trio.Nursery,
        colleagues: Colleagues | None = None,
    ) -> None:
        """`tiers`: shm and disk; `follow`: see `Plans`; `volumes_changed`: somebody else wants to know of that, too;
        `colleagues`: other nodes.
        """
        self._volumes_changed = volumes_changed
        spool_dir = str(paths.volumes.in_use)
        guidance = Guidance(*tiers)
        self._nursery = nursery
        self._pins = Pins(paths.cache_dir, guidance)
        warm_up = WarmUp(cache, counters, guidance, self._pins)
        self.errands = Errands(cache, tiers, volumes, warm_up, self._pins, spool_dir, nursery, colleagues)
        self._plans = Plans(volumes, runtime, cache.block_size, guidance, follow, spool_dir, nursery)

    async def start(self) -> None:
        """Take up what the last agent kept, before anything is evicted. Never raises."""
        await self._pins.load()
        self._nursery.start_soon(self._pins.watch)
        self._nursery.start_soon(self._plans.watch)

    def mounts_changed(self) -> None:
        """Mounts came or went."""
        self._volumes_changed()
        self._plans.mounts_changed()

    def status(self) -> dict[str, Any]:
        """Return what `cachefs status` shows of it. Any thread."""
        return {"jobs": self.errands.describe(), "plans": self._plans.describe()}
