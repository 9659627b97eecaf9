"""Tells the cluster how much of its volumes this node holds, seldom and roughly (`peer.holding`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import trio

from cachefs.agent.volumes import Volume
from cachefs.block.census import count_holdings
from cachefs.block.lmdb_tier import TierWriter
from peer.holding import Holding, by_dataset, dataset_name, pause_s, worth_telling
from peer.membership import Membership

FIRST_COUNT_S = 5.0
"""When a new agent counts for the first time."""


class PeerCensus:
    """Counts while `run` runs. Used in the trio thread; `datasets` in any."""

    def __init__(
        self,
        tiers: tuple[TierWriter | None, TierWriter | None],
        volumes: Callable[[], Iterable[tuple[str, Volume]]],
    ) -> None:
        """`volumes`: those that are mounted and shared now, with their names among peers; from any thread."""
        self._tiers = tiers
        self._volumes = volumes
        self._told: dict[str, Holding] | None = None

    def datasets(self) -> dict[str, int] | None:
        """Return the bytes of each dataset, as they were told; None: they were not counted yet."""
        return None if self._told is None else by_dataset(self._told.values())

    async def run(self, membership: Membership) -> None:
        """Count and tell, for ever."""
        await trio.sleep(FIRST_COUNT_S)
        while True:
            held = await trio.to_thread.run_sync(self.count, abandon_on_cancel=True)
            if self._told is None or worth_telling(self._told, held):
                self._told = held
                membership.set_held(held)
            await trio.sleep(pause_s(len(membership.view.members)) * random.uniform(0.9, 1.1))

    def count(self) -> dict[str, Holding]:
        """Return what this node holds of each volume. BLOCKS for some tenths of a second."""
        counted = count_holdings(*self._tiers)
        held: dict[str, Holding] = {}
        for name, volume in sorted(self._volumes(), key=lambda pair: pair[0]):
            dataset = dataset_name(volume.store.endpoint, volume.store.bucket, volume.prefix)
            # views of one volume have the same blocks: they count for the first of them
            held[name] = Holding(counted.pop(volume.owner, 0), dataset)
        return held
