"""The flights that are under way, and the jobs that bring them: from the disk tier, from the source, into the shm tier.

`Jobs` is the part of the block cache that changes flights; who wants which blocks is `cachefs.block.block_cache`
(readers, readahead) and `cachefs.block.bulk` (prefetch). Jobs run in two lanes of threads, `disk` and `origin`, where
each source has a line of its own.

INVARIANTS
* `flights` holds exactly the blocks of unfinished jobs. It is changed in the trio thread only, and never across an
  await.
* A flight is ended by the thread of its job when its block is there, by the trio thread when it is not; its outcome is
  written before.
* Errors of the source reach all who wait for the block, and are not kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import trio

from cachefs import errors, metrics
from cachefs.block.block_moves import BlockMover
from cachefs.block.budget import LEAST_BUDGET, REQUEST_BYTES
from cachefs.block.flights import Flight, ranges_of
from cachefs.block.holdings import NOBODY
from cachefs.block.lane import Job, Lane, Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.ports import BlockSource
from cachefs.block.spill import Spiller
from cachefs.metrics import Counters
from cachefs.store.limiter import background
from cachefs.types import BlockKey, ObjectVersion

log = logging.getLogger(__name__)

DISK_THREADS = 8


class Jobs:
    """See the module. Trio thread, but where it says otherwise."""

    def __init__(
        self, shm: TierWriter | None, disk: TierWriter | None, block_size: int, fetching_bytes: int, counters: Counters
    ) -> None:
        """`fetching_bytes`: what fetches may hold at a time."""
        self.block_size = block_size
        self.counters = counters
        self.flights: dict[BlockKey, Flight] = {}
        self.quiet_since = -math.inf
        """Since when nobody has read; in the future when somebody reads what is there."""
        self.owner_of: Callable[[BlockSource], int] = lambda source: NOBODY
        """Which volume has a source (`cachefs.block.holdings`)."""
        self.spiller: Spiller | None = None
        if shm is not None and disk is not None:
            self.spiller = Spiller(shm, disk, counters, lambda: math.inf if self.flights else self.quiet_since)
        demote = None if self.spiller is None else self.spiller.demote
        self.mover = BlockMover(shm, disk, demote, block_size, counters)
        self._fetching_bytes = fetching_bytes
        self.is_open = False

    def open(self) -> None:
        """Begin to take jobs."""
        self.origin = Lane(budget_bytes=self._fetching_bytes)
        self.disk = Lane(budget_bytes=1 << 62)
        self._disk_threads = max(1, min(DISK_THREADS, LEAST_BUDGET // (2 * self.block_size)))
        self.is_open = True

    def close(self) -> None:
        """Take no more jobs, and forget all; `land` what is left then."""
        self.is_open = False
        self.origin.close()
        self.disk.close()

    def land(self, flights: Sequence[Flight], error: Exception | None = None) -> None:
        """End flights: everybody who still waits goes on."""
        for flight in flights:
            if self.flights.get(flight.key) is flight:
                del self.flights[flight.key]
            if not flight.over:
                flight.error = error
                flight.end()
            flight.job = flight.lane = None  # a circle would keep the bytes until somebody collects garbage

    def spill_later(self, keys: Sequence[BlockKey], owner: int, flights: Sequence[Flight]) -> None:
        """These blocks of a volume are in the shm tier only."""
        if self.spiller is not None:
            unread = {flight.key for flight in flights if not flight.wanted}
            self.spiller.add(keys, owner, unread=unread)

    def submit_to_tiers(self, job: Job) -> None:
        """Run something that works with the tiers in a thread."""
        self.disk.submit(job, None, self._disk_threads)

    def promote(self, version: ObjectVersion, source: BlockSource, flights: list[Flight], priority: Priority) -> None:
        """Bring blocks from the disk tier into the shm tier; those that are not good there come from the source."""

        def work() -> None:
            for flight in flights:
                self.mover.promote(flight)

        def finished(error: Exception | None, priority: Priority) -> None:
            left = [flight for flight in flights if not flight.over]
            if error is not None:
                log.error("reading from the disk tier failed in an unknown way", exc_info=error)
            self.land([flight for flight in flights if flight.over])
            if priority is Priority.DEMAND:
                self.quiet_since = trio.current_time()
            # One bad block beside a good one leaves a gap, and a range has none: each group of neighbours by itself.
            self.fetch_all(version, source, left, priority)

        job = Job(work, finished, sum(flight.length for flight in flights), priority)
        for flight in flights:
            flight.job, flight.lane = job, self.disk
        self.submit_to_tiers(job)

    def fetch_all(self, version: ObjectVersion, source: BlockSource, flights: list[Flight], priority: Priority) -> None:
        """Bring blocks from the source, in as many ranges as are good."""
        if flights:
            line = source.route(version, flights[0].index * self.block_size)
            for group in ranges_of(flights, self.block_size, self.origin.under_way(line), spread=line.spread):
                self.fetch(version, source, group, priority)

    def fetch(self, version: ObjectVersion, source: BlockSource, flights: list[Flight], priority: Priority) -> None:
        """Bring neighbouring blocks from the source into the shm tier, else into the disk tier."""
        if not self.is_open:
            self.land(flights, errors.AgentUnavailable("the agent is stopping"))
            return
        source = source.route(version, flights[0].index * self.block_size)
        in_shm_only: list[BlockKey] = []

        def work() -> None:
            with background(lambda: not any(each.urgent for each in flights)):
                self.mover.fetch(version, source, flights, in_shm_only)

        def finished(error: Exception | None, priority: Priority) -> None:
            if error is not None:
                error = self.source_error(error, [flight for flight in flights if not flight.over], priority)
            self.land(flights, error)
            if priority is Priority.DEMAND:
                self.quiet_since = trio.current_time()
            if in_shm_only:
                self.spill_later(in_shm_only, flights[0].owner, flights)

        job = Job(work, finished, self.mover.memory(flights) + REQUEST_BYTES, priority)
        for flight in flights:
            flight.job, flight.lane = job, self.origin
        self.origin.submit(job, source, source.max_requests)

    def source_error(self, error: Exception, flights: Sequence[Flight], priority: Priority) -> Exception:
        """Count what these flights met, and return what to tell those who wait for them."""
        self.counters.add(metrics.ORIGIN_FILL_ERRORS.name, len(flights))
        if priority is Priority.READAHEAD:
            self.counters.add(metrics.READAHEAD_DROPPED.name, len(flights))
        if isinstance(error, errors.CachefsError):
            return error
        log.error("a source of blocks failed in an unknown way", exc_info=error)
        unknown = errors.StorageUnavailable(f"reading failed: {error!r}", retryable=False)
        unknown.__cause__ = error
        return unknown
