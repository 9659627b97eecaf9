"""The agent's block cache: finds each block in the nearest place that has it and brings it into the shm tier.

    shm tier -> disk tier (read in threads, promoted to shm) -> source (the store, later peers)

A *flight* is the one fill of a block that is under way: whoever wants the block waits for it (single flight).
Flights are grouped into *jobs* (neighbouring blocks in one range read) that run in two lanes of threads, `disk` and
`origin`; a job belongs to the cache's nursery and never to the asking task, so a cancelled reader cancels nobody.

A block from the source is committed to the shm tier by the thread that fetched it (one thread change per fill, and
one transaction per range), then queued for the disk tier (`cachefs.block.spill`). A tier that cannot take a block
is not an error: the bytes are handed over with the answer.

INVARIANTS
* `_flights` holds exactly the blocks of unfinished jobs. It is changed in the trio thread only, and never across an
  await.
* A flight's outcome is written by the thread of its job, and read after its event is set.
* Errors of the source reach all who wait for the block, and are not kept.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

import trio

from cachefs import errors, metrics
from cachefs.block.block_moves import BlockMover, Flight
from cachefs.block.lane import Job, Lane, Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.ports import BlockSource
from cachefs.block.spill import Spiller
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectId, ObjectVersion, Tier, block_count, block_key

__all__ = ["BlockCache", "Filled", "Priority"]

log = logging.getLogger(__name__)

MIB = 1 << 20
BASE_BYTES = 128 * MIB
"""What the agent takes without any block in its hands; the rest of the memory limit is for blocks on their way."""
LEAST_BUDGET = 32 * MIB
DEMAND_RANGE = MIB
"""A demand of several blocks is fetched in parallel ranges of this size (or one block each)."""
LARGE_DEMAND = 8 * MIB
LARGE_RANGE = 4 * MIB
"""Readahead, and demands over LARGE_DEMAND, are fetched in ranges of this size."""
DEMAND_SLOTS = 8
DISK_THREADS = 8
MAX_WAITING_READAHEAD = 256
REPORTED_S = 1.0
MAINTENANCE_S = 3.0


@dataclass(frozen=True, slots=True)
class Filled:
    """One block that is available now."""

    index: int
    source: Tier
    payload: bytes | None
    """The bytes, only when the shm tier does not hold them or `inline` was asked for."""


class BlockCache:
    """Use as an async context manager; the tiers are opened before and closed after it by whoever made them."""

    def __init__(
        self,
        shm: TierWriter | None,
        disk: TierWriter | None,
        *,
        block_size: int,
        memory_limit_bytes: int,
        max_requests: int,
        counters: Counters,
    ) -> None:
        self.block_size = block_size
        self._shm = shm
        self._disk = disk
        self._counters = counters
        self._budget = max(LEAST_BUDGET, memory_limit_bytes - BASE_BYTES)
        self._max_requests = max_requests
        self._flights: dict[BlockKey, Flight] = {}
        self._waiting_readers = 0
        self._quiet_since = -math.inf
        self._spiller: Spiller | None = None
        if shm is not None and disk is not None:
            self._spiller = Spiller(
                shm, disk, counters, lambda: math.inf if self._waiting_readers or self._flights else self._quiet_since
            )
        self._mover = BlockMover(
            shm, disk, None if self._spiller is None else self._spiller.demote, block_size, counters
        )
        self._stack = AsyncExitStack()
        self._threads = trio.CapacityLimiter(4)
        self._open = False
        self.flush_at_exit = True
        """Write what is in the shm tier only to the disk tier when this ends; False when a successor adopts the shm
        tier.
        """

    async def __aenter__(self) -> Self:
        nursery = await self._stack.enter_async_context(trio.open_nursery())
        self._nursery = nursery
        readahead = {"readahead_slots": self._max_requests - DEMAND_SLOTS, "readahead_bytes": self._budget * 3 // 4}
        self._origin_lane = Lane(slots=self._max_requests, budget_bytes=self._budget, **readahead)
        threads = max(1, min(DISK_THREADS, LEAST_BUDGET // (2 * self.block_size)))
        self._disk_lane = Lane(
            slots=threads, budget_bytes=1 << 62, readahead_slots=threads - 2, readahead_bytes=1 << 62
        )
        if self._spiller is not None:
            await self._spiller.adopt()
            nursery.start_soon(self._spiller.run)
        nursery.start_soon(self._maintain)
        self._open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._open = False
        self._origin_lane.close()
        self._disk_lane.close()
        self._nursery.cancel_scope.cancel()
        await self._stack.aclose()
        self._land(list(self._flights.values()), errors.AgentUnavailable("the agent is stopping"))
        if self.flush_at_exit:
            with trio.CancelScope(shield=True):
                await self.flush_spill()

    # -- asking --------------------------------------------------------------------------------------------------------

    async def fill(
        self,
        oid: ObjectId,
        version: ObjectVersion,
        source: BlockSource,
        first: int,
        count: int,
        inline: bool = False,
        priority: Priority = Priority.DEMAND,
    ) -> list[Filled]:
        """Make blocks `first` to `first + count` (as far as the object goes) available; returns when all are.

        Raises: what the source raises, for DEMAND. READAHEAD never raises for the source's sake: blocks that failed
        are left out. When it is cancelled, the blocks come all the same.
        """
        if not self._open:
            raise errors.AgentUnavailable("the block cache is closed")
        last = min(first + count, block_count(version.size, self.block_size))
        flights, ready = self._take_off(oid, version, source, range(first, last), inline, priority)
        if priority is Priority.READAHEAD:
            landed = await self._landed(flights)
            return self._in_order(ready, [flight for flight in landed if flight.error is None])
        self._waiting_readers += 1
        try:
            await self._landed(flights)
        finally:
            self._waiting_readers -= 1
            self._quiet_since = trio.current_time()
        for flight in flights:
            if flight.error is not None:
                # A copy: many tasks raise the error of one flight, and each adds its own traceback.
                raise copy.copy(flight.error) from flight.error
        filled = self._in_order(ready, flights)
        return await self._with_payloads(oid, version, source, filled) if inline else filled

    @staticmethod
    async def _landed(flights: Sequence[Flight]) -> Sequence[Flight]:
        for flight in flights:
            await flight.done.wait()
        return flights

    @staticmethod
    def _in_order(ready: Sequence[Filled], flights: Sequence[Flight]) -> list[Filled]:
        filled = [*ready, *(Filled(flight.index, flight.source, flight.payload) for flight in flights)]
        filled.sort(key=lambda block: block.index)
        return filled

    async def _with_payloads(
        self, oid: ObjectId, version: ObjectVersion, source: BlockSource, filled: list[Filled]
    ) -> list[Filled]:
        """Complete blocks that are in the shm tier with their bytes."""

        def complete(index: int) -> tuple[Tier | None, bytes]:
            return self._mover.payload(version, source, block_key(oid, index), index)

        result = []
        for block in filled:
            if block.payload is None:
                origin, payload = await trio.to_thread.run_sync(
                    complete, block.index, limiter=self._threads, abandon_on_cancel=True
                )
                block = Filled(block.index, origin or block.source, payload)
            result.append(block)
        return result

    def has(self, key: BlockKey) -> Tier | None:
        """Return the nearest tier that holds the block."""
        if self._shm is not None and key in self._shm:
            return Tier.SHM
        return Tier.DISK if self._disk is not None and key in self._disk else None

    def count_cached(self, oid: ObjectId, blocks: int) -> dict[Tier, int]:
        """Return how many of the first `blocks` blocks of an object each tier holds."""
        keys = [block_key(oid, index) for index in range(blocks)]
        tiers = ((Tier.SHM, self._shm), (Tier.DISK, self._disk))
        return {name: 0 if tier is None else sum(key in tier for key in keys) for name, tier in tiers}

    def touch(self, keys: Iterable[bytes]) -> None:
        """Workers answered these blocks from the shm tier, in the last second (they report once a second)."""
        self._quiet_since = trio.current_time() + REPORTED_S
        known = [BlockKey(key) for key in keys]
        for tier in (self._shm, self._disk):
            if tier is not None:
                tier.touch(known)

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way and nothing waits to be written to the disk tier."""
        return not self._flights and not self._waiting_readers and not self._spiller

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return "shm" and "disk" (state, used_bytes, limit_bytes, blocks and the tier's counts) and "fills"."""
        off = {"state": "off", "used_bytes": 0, "limit_bytes": 0, "blocks": 0}
        counts = self._counters.snapshot()
        tiers: dict[str, dict[str, Any]] = {}
        for name, tier in ((Tier.SHM, self._shm), (Tier.DISK, self._disk)):
            state = dict(off) if tier is None else tier.stats()
            for count in ("hits", "misses", "evictions", "corrupt", "faults"):
                state[count] = counts.get(f"{name}_{count}", 0)
            tiers[str(name)] = state
        tiers["disk"]["spill_pending"] = 0 if self._spiller is None else len(self._spiller)
        tiers["fills"] = {
            "under_way": len(self._flights),
            "held_bytes": self._origin_lane.held_bytes,
            "budget_bytes": self._budget,
            "origin": counts.get(metrics.ORIGIN_FILLS.name, 0),
            "inline": counts.get(metrics.FILLS_INLINE.name, 0),
        }
        return tiers

    # -- flights -------------------------------------------------------------------------------------------------------

    def _take_off(
        self,
        oid: ObjectId,
        version: ObjectVersion,
        source: BlockSource,
        indexes: range,
        inline: bool,
        priority: Priority,
    ) -> tuple[list[Flight], list[Filled]]:
        """Return the flights to wait for (own and joined) and the blocks that are there already."""
        flights: list[Flight] = []
        ready: list[Filled] = []
        from_disk: list[Flight] = []
        from_origin: list[Flight] = []
        for index in indexes:
            key = block_key(oid, index)
            flight = self._flights.get(key)
            if flight is not None:
                flights.append(self._join(flight, inline, priority))
                continue
            place = self.has(key)
            if place is Tier.SHM:
                ready.append(Filled(index, Tier.SHM, None))
                continue
            flight = Flight(key, index, self._mover.length(version, index), inline=inline)
            (from_disk if place is Tier.DISK else from_origin).append(flight)
        if priority is Priority.READAHEAD:
            self._counters.add(metrics.READAHEAD_BLOCKS.name, len(from_disk) + len(from_origin))
            if self._origin_lane.waiting_readahead + self._disk_lane.waiting_readahead > MAX_WAITING_READAHEAD:
                self._counters.add(metrics.READAHEAD_DROPPED.name, len(from_disk) + len(from_origin))
                return flights, ready
        for flight in (*from_disk, *from_origin):
            self._flights[flight.key] = flight
        for group in self._ranges(from_disk, priority):
            self._promote(version, source, group, priority)
        for group in self._ranges(from_origin, priority):
            self._fetch(version, source, group, priority)
        if ready:
            self.touch([block_key(oid, block.index) for block in ready])
        return flights + from_disk + from_origin, ready

    def _join(self, flight: Flight, inline: bool, priority: Priority) -> Flight:
        self._counters.add(metrics.FILLS_JOINED.name)
        flight.inline = flight.inline or inline
        if priority is Priority.DEMAND and flight.job is not None and flight.lane is not None:
            flight.lane.promote(flight.job)
        return flight

    def _ranges(self, flights: list[Flight], priority: Priority) -> list[list[Flight]]:
        """Split flights into groups of neighbours, each to be read as one range."""
        large = priority is Priority.READAHEAD or len(flights) * self.block_size > LARGE_DEMAND
        longest = max(1, (LARGE_RANGE if large else DEMAND_RANGE) // self.block_size)
        groups: list[list[Flight]] = []
        for flight in flights:
            if groups and len(groups[-1]) < longest and groups[-1][-1].index + 1 == flight.index:
                groups[-1].append(flight)
            else:
                groups.append([flight])
        return groups

    def _land(self, flights: Sequence[Flight], error: Exception | None) -> None:
        """End flights: everybody who waits goes on."""
        for flight in flights:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            flight.error = error
            flight.done.set()
            if error is None and flight.payload is not None and not flight.inline:
                self._counters.add(metrics.FILLS_INLINE.name)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _submit(self, lane: Lane, flights: list[Flight], job: Job) -> None:
        for flight in flights:
            flight.job, flight.lane = job, lane
        lane.submit(job)

    def _promote(self, version: ObjectVersion, source: BlockSource, flights: list[Flight], priority: Priority) -> None:
        """Bring blocks from the disk tier into the shm tier; those that are not good there come from the source."""
        missing: list[Flight] = []

        def work() -> None:
            missing.extend(flight for flight in flights if not self._mover.promote(flight))

        def finished(error: Exception | None) -> None:
            left = flights if error is not None else missing
            if error is not None:
                log.error("reading from the disk tier failed in an unknown way", exc_info=error)
            self._land([flight for flight in flights if flight not in left], None)
            # One bad block beside a good one leaves a gap, and a range has none: each group of neighbours by itself.
            for group in self._ranges(left, job.priority):
                self._fetch(version, source, group, job.priority)

        job = Job(work, finished, sum(flight.length for flight in flights), priority)
        self._submit(self._disk_lane, flights, job)

    def _fetch(self, version: ObjectVersion, source: BlockSource, flights: list[Flight], priority: Priority) -> None:
        """Bring blocks from the source into the shm tier, else into the disk tier."""
        in_shm: list[BlockKey] = []

        def work() -> None:
            in_shm.extend(self._mover.fetch(version, source, flights))

        def finished(error: Exception | None) -> None:
            if error is not None:
                error = self._source_error(error, flights, job.priority)
            self._land(flights, error)
            if in_shm and self._spiller is not None:
                self._spiller.add(in_shm)

        job = Job(work, finished, sum(flight.length for flight in flights), priority)
        self._submit(self._origin_lane, flights, job)

    def _source_error(self, error: Exception, flights: list[Flight], priority: Priority) -> Exception:
        self._counters.add(metrics.ORIGIN_FILL_ERRORS.name, len(flights))
        if priority is Priority.READAHEAD:
            self._counters.add(metrics.READAHEAD_DROPPED.name, len(flights))
        if isinstance(error, errors.CachefsError):
            return error
        log.error("a source of blocks failed in an unknown way", exc_info=error)
        unknown = errors.StorageUnavailable(f"reading failed: {error!r}", retryable=False)
        unknown.__cause__ = error
        return unknown

    # -- background ----------------------------------------------------------------------------------------------------

    async def flush_spill(self) -> None:
        """Write everything that is in the shm tier only to the disk tier."""
        if self._spiller is not None:
            await self._spiller.flush()

    async def _maintain(self) -> None:
        while True:
            await trio.sleep(MAINTENANCE_S)
            for tier in (self._shm, self._disk):
                if tier is not None:
                    await trio.to_thread.run_sync(tier.maintain, limiter=self._threads)
