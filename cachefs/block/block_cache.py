"""The agent's block cache: finds each block in the nearest place that has it and brings it into the shm tier.

    shm tier -> disk tier (read in threads, promoted to shm) -> source (the store, or peers before it)

A *flight* is the one fill of a block that is under way: whoever wants the block waits for it (single flight).
Flights are grouped into *jobs* (neighbouring blocks in one range read) that run in two lanes of threads, `disk` and
`origin`, where each source has a line of its own; a job belongs to the cache's nursery and never to the asking task, so
a cancelled reader cancels nobody.

A block from the source is committed to the shm tier by the thread that fetches it, while the rest of its range comes
in (one thread change per fill, one transaction per MiB), then queued for the disk tier (`cachefs.block.spill`). A tier
that cannot take a block is not an error: the bytes are handed over with the answer. As long as that is so (`carries`)
whoever asks takes room in `carriage` first, and holds it until the answer was sent.

The flights and their jobs are in `cachefs.block.jobs`; what nobody waits for yet is asked for by `cachefs.block.bulk`.

INVARIANT: nothing here waits between looking for a block and having a flight for it, so no block is fetched twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Self

import trio

from cachefs import errors, metrics
from cachefs.block.budget import CARRIED_TIMES, Budget
from cachefs.block.bulk import Bulk, Done
from cachefs.block.carriage import Carriage
from cachefs.block.flights import Answer, Filled, Flight, Waiting, ranges_of
from cachefs.block.holdings import NOBODY
from cachefs.block.jobs import Jobs
from cachefs.block.lane import Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.ports import BlockSource
from cachefs.block.ranges import Ranges, cut
from cachefs.block.tier_figures import describe_tiers
from cachefs.metrics import Counters
from cachefs.prefetch.ports import Piece
from cachefs.types import BlockKey, ObjectId, ObjectVersion, Tier, block_count, block_key

__all__ = ["BlockCache", "Filled", "Priority"]

log = logging.getLogger(__name__)

MAX_WAITING_READAHEAD = 256
REPORTED_S = 1.0
MAINTENANCE_S = 3.0


class BlockCache:
    """Use as an async context manager; the tiers are opened before and closed after it by whoever made them."""

    def __init__(
        self,
        shm: TierWriter | None,
        disk: TierWriter | None,
        *,
        block_size: int,
        memory_limit_bytes: int,
        counters: Counters,
    ) -> None:
        self.block_size = block_size
        self._shm = shm
        self._disk = disk
        self._counters = counters
        self._budget = Budget.create(memory_limit_bytes, block_size, has_shm=shm is not None)
        self.carriage = Carriage(self._budget.carrying)
        self._jobs = Jobs(shm, disk, block_size, self._budget.fetching, counters)
        self._bulk = Bulk(
            self._jobs,
            has=self.has,
            keeps=lambda: self._open and self._keeps,
            take_off=lambda oid, version, source, indexes, to: self._take_off(
                oid, version, source, indexes, False, Priority.PREFETCH, to
            )[0],
        )
        self._flights, self._mover, self._spiller = self._jobs.flights, self._jobs.mover, self._jobs.spiller
        self.ranges = Ranges(lambda: self._jobs.origin, counters)
        self._stack = AsyncExitStack()
        self._threads = trio.CapacityLimiter(4)
        self._payload_threads = trio.CapacityLimiter(4)
        self._open = False
        self.flush_at_exit = True
        """Write what is in the shm tier only to the disk tier when this ends; False when a successor adopts the shm
        tier.
        """

    async def __aenter__(self) -> Self:
        self._token = trio.lowlevel.current_trio_token()
        nursery = await self._stack.enter_async_context(trio.open_nursery())
        self._nursery = nursery
        self._jobs.open()
        if self._spiller is not None:
            await self._spiller.adopt()
            nursery.start_soon(self._spiller.run)
        nursery.start_soon(self._maintain)
        self._open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._open = False
        self._jobs.close()
        self._nursery.cancel_scope.cancel()
        await self._stack.aclose()
        self._jobs.land(list(self._flights.values()), errors.AgentUnavailable("the agent is stopping"))
        self.ranges.give_up(errors.AgentUnavailable("the agent is stopping"))
        if self.flush_at_exit and self._spiller is not None:
            with trio.CancelScope(shield=True):
                await self._spiller.adopt()  # also what jobs have committed that were not waited for
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
        over = trio.Event()
        outcome: list[list[Filled] | Exception] = []

        def answer(found: list[Filled] | Exception) -> None:
            outcome.append(found)
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(over.set)

        self.start(oid, version, source, first, count, answer, inline=inline, priority=priority)
        if not outcome:
            await over.wait()
        filled = outcome[0]
        if isinstance(filled, Exception):
            raise filled
        # Whoever joins a flight in the moment in which it ends comes too late to have its bytes kept.
        inline = inline or (self.carries and priority is Priority.DEMAND)
        return await self._with_payloads(oid, version, source, filled) if inline else filled

    def start(
        self,
        oid: ObjectId,
        version: ObjectVersion,
        source: BlockSource,
        first: int,
        count: int,
        answer: Answer,
        *,
        inline: bool = False,
        priority: Priority = Priority.DEMAND,
    ) -> None:
        """As `fill`, without a task: calls `answer` once, with the blocks or what `fill` raises.

        It is called before this returns or, so that a reader waits for no turn of the event loop, in the thread that
        has committed the last block: it must be short. A block may come without its bytes even with `inline`.
        """
        if not self._open:
            raise errors.AgentUnavailable("the block cache is closed")
        if priority is Priority.READAHEAD and not self._keeps:
            self._counters.add(metrics.READAHEAD_DROPPED.name, count)
            answer([])
            return
        inline = inline or (self.carries and priority is Priority.DEMAND)
        last = min(first + count, block_count(version.size, self.block_size))
        flights, ready = self._take_off(oid, version, source, range(first, last), inline, priority)
        waiting = Waiting(ready, flights, answer, strict=priority is Priority.DEMAND)
        for flight in flights:
            flight.watch(waiting)
        waiting()

    async def read_range(
        self,
        oid: ObjectId,
        version: ObjectVersion,
        source: BlockSource,
        past: BlockSource,
        start: int,
        length: int,
        fresh: bool = False,
    ) -> bytes | memoryview:
        """Return bytes of blocks there, or coming (of `source`), else, or if `fresh`, of `past`. Raises as they do."""
        if not self._open:
            raise errors.AgentUnavailable("the block cache is closed")
        first, last = start // self.block_size, (start + length - 1) // self.block_size
        keys = [block_key(oid, index) for index in range(first, last + 1)]
        if not fresh and all(key in self._flights or self.has(key) is not None for key in keys):
            filled = await self.fill(oid, version, source, first, last - first + 1, inline=True)
            if (piece := cut(filled, start - first * self.block_size, length)) is not None:
                return piece
        return await self.ranges.read(oid, version, past, start, length)

    def prefetch(self, pieces: Sequence[Piece], source: BlockSource, done: Done) -> None:
        """Bring what is in no tier and not under way, behind all readers; small objects many at a time.

        Calls `done` once, when all of them are over, from the event loop (never before this returns). Never raises.
        What is asked for is taken up at once, so whoever has much to ask for asks again when `done` is called.
        """
        self._bulk.prefetch(pieces, source, done)

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
                    complete, block.index, limiter=self._payload_threads, abandon_on_cancel=True
                )
                block = Filled(block.index, origin or block.source, payload)
            result.append(block)
        return result

    @property
    def carries(self) -> bool:
        """Whether answers carry the bytes of their blocks: there is no shm tier, or it took none lately."""
        return not self._mover.in_shm

    @property
    def _keeps(self) -> bool:
        """Whether a block that nobody waits for would be kept anywhere."""
        return self._mover.in_shm or self._mover.on_disk

    def carried_bytes(self, version: ObjectVersion, first: int, count: int) -> int:
        """Return how much room in `carriage` an answer with these blocks needs."""
        start = first * self.block_size
        return CARRIED_TIMES * max(0, min(count * self.block_size, version.size - start))

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

    def touch(self, keys: Iterable[bytes], disk_hits: int = 0, disk_hit_bytes: int = 0, owner: int = NOBODY) -> None:
        """Workers answered these blocks from the tiers in the last second (they report once a second), and have read so
        many from the disk tier themselves. `owner`: their volume, if that is known.
        """
        if disk_hits:
            self._counters.add(metrics.DISK_HITS.name, disk_hits)
            self._counters.add(metrics.DISK_HIT_BYTES.name, disk_hit_bytes)
        self._jobs.quiet_since = trio.current_time() + REPORTED_S
        known = [BlockKey(key) for key in keys]
        for tier in (self._shm, self._disk):
            if tier is not None:
                tier.touch(known, owner)
        if self._spiller is not None:
            self._spiller.note_reads(known)

    def reorder(self, keys: Sequence[BlockKey]) -> None:
        """A plan names other reads of these blocks by now: each tier puts them where they belong."""
        for tier in (self._shm, self._disk):
            if tier is not None and tier.is_planned:
                tier.touch([key for key in keys if key in tier])

    def capacity_bytes(self, owner: int = NOBODY, only: Tier | None = None) -> int:
        """Return how many bytes the tiers (or `only` this one) can hold of a volume, with its quotas: what is in the
        shm tier is in the disk tier too, in the end.
        """
        limits = [
            min(tier.limit_bytes, tier.limit_of(owner).quota_bytes or tier.limit_bytes)
            for tier in (self._shm, self._disk)
            if tier is not None and tier.state != "off" and only in (None, tier.tier)
        ]
        return max(limits, default=0)

    def know_owners(self, owner_of: Callable[[BlockSource], int]) -> None:
        """Tell the volume of a source in this way (`cachefs.block.holdings`); before, all are NOBODY's."""
        self._jobs.owner_of = owner_of

    def limits_of(self, owner: int) -> dict[str, dict[str, Any]]:
        """Return quota, time to live and what is held ("used_bytes"; None without a quota) of a volume, by tier."""
        return {
            str(name): {
                "quota_bytes": tier.limit_of(owner).quota_bytes,
                "used_bytes": tier.held_by(owner),
                "ttl_s": tier.limit_of(owner).ttl_s,
            }
            for name, tier in ((Tier.SHM, self._shm), (Tier.DISK, self._disk))
            if tier is not None
        }

    @property
    def shm_limit_bytes(self) -> int:
        """How large the shm tier may become; 0 while there is none."""
        return 0 if self._shm is None else self._shm.limit_bytes

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way and nothing waits to be written to the disk tier."""
        return not self._flights and not self._spiller

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return "shm" and "disk" (state, used_bytes, limit_bytes, blocks and the tier's counts) and "fills"."""
        tiers = describe_tiers(((Tier.SHM, self._shm), (Tier.DISK, self._disk)), self._counters)
        tiers["disk"]["spill_pending"] = 0 if self._spiller is None else len(self._spiller)
        tiers["fills"] = {
            "under_way": len(self._flights),
            "held_bytes": self._jobs.origin.held_bytes + self.carriage.held_bytes,
            "budget_bytes": self._budget.whole,
            "origin": self._counters.get(metrics.ORIGIN_FILLS.name),
            "inline": self._counters.get(metrics.FILLS_INLINE.name),
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
        to: Tier | None = None,
    ) -> tuple[list[Flight], list[Filled]]:
        """Return the flights to wait for (own and joined) and the blocks that are there already. `to`: see `Piece`."""
        line = source.route(version, indexes.start * self.block_size)  # of most of them: a window is within few parts
        owner = self._jobs.owner_of(source)
        flights: list[Flight] = []
        ready: list[Filled] = []
        from_disk: list[Flight] = []
        from_origin: list[Flight] = []
        for index in indexes:
            key = block_key(oid, index)
            flight = self._flights.get(key)
            if flight is not None and not (inline and flight.lost and self.has(key) is None):
                flights.append(self._join(flight, inline, priority))
                if priority is Priority.DEMAND and flight.batch is not None and flight.batch.want(flight):
                    self._jobs.fetch(version, source, [flight], priority)
                continue
            place = self.has(key)
            if place is Tier.SHM:
                ready.append(Filled(index, Tier.SHM, None))
                continue
            if place is Tier.DISK and not (priority is Priority.DEMAND or self._mover.in_shm):
                continue  # it is as near as it can come
            if place is Tier.DISK and priority is Priority.PREFETCH and to is not Tier.SHM:
                continue  # near enough
            wanted, length = priority is Priority.DEMAND, self._mover.length(version, index)
            flight = Flight(key, index, length, inline=inline, wanted=wanted, straight=to is Tier.DISK)
            flight.owner = owner
            (from_disk if place is Tier.DISK else from_origin).append(flight)
        if priority is Priority.READAHEAD:
            self._counters.add(metrics.READAHEAD_BLOCKS.name, len(from_disk) + len(from_origin))
            waiting = self._jobs.origin.waiting_readahead(line) + self._jobs.disk.waiting_readahead(None)
            if waiting > MAX_WAITING_READAHEAD:
                self._counters.add(metrics.READAHEAD_DROPPED.name, len(from_disk) + len(from_origin))
                return flights, ready
        for flight in (*from_disk, *from_origin):
            self._flights[flight.key] = flight
        for group in ranges_of(from_disk, self.block_size, self._jobs.origin.under_way(line)):
            self._jobs.promote(version, source, group, priority)
        self._jobs.fetch_all(version, source, from_origin, priority)
        if ready and priority is not Priority.PREFETCH:
            self.touch([block_key(oid, block.index) for block in ready], owner=owner)
        return flights + from_disk + from_origin, ready

    def _join(self, flight: Flight, inline: bool, priority: Priority) -> Flight:
        self._counters.add(metrics.FILLS_JOINED.name)
        flight.inline = flight.inline or inline
        flight.wanted = flight.wanted or priority is Priority.DEMAND
        if flight.job is not None and flight.lane is not None:
            flight.lane.promote(flight.job, priority)
        return flight

    # -- background ----------------------------------------------------------------------------------------------------

    @property
    def spill_paused(self) -> AbstractAsyncContextManager[None]:
        """A context in which nothing is on its way from the shm tier to the disk tier."""
        return contextlib.nullcontext() if self._spiller is None else self._spiller.paused

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
            if self._spiller is not None:
                await self._spiller.follow()
