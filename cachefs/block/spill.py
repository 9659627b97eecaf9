"""Moving blocks from the shm tier to the disk tier behind the reader's back.

A block from the store is committed to the shm tier and its reader goes on; the disk is paid later. The queue holds
keys, the bytes are read again from the shm tier. Blocks are written at full speed when nobody has read for `QUIET_S` or
when the queue holds most of the shm tier, one batch every `TRICKLE_S` while somebody reads (writing 1 GiB takes a CPU
for seconds: at full speed it would halve what readers of the shm tier get), and at the latest when the shm tier wants
to evict them (`demote`, in the evicting thread). A full disk tier that follows a plan gets them in that last way only.

INVARIANT: a block that is only in the shm tier is in the queue, or in the batch that is being written, or its bytes
are dropped on purpose because the disk tier does not take them, or would not keep them (docs/EVICTION.md). After a
crash `adopt` builds the queue again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

import trio

from cachefs import errors, metrics
from cachefs.block.holdings import NOBODY
from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import BlockKey

log = logging.getLogger(__name__)

QUIET_S = 0.25
TRICKLE_S = 2.0
PRESSING = 0.75
"""Of the shm tier: what is left is filled in seconds, and a batch is written in less."""
BATCH_BLOCKS = 64
BATCH_BYTES = 8 << 20


class Spiller:
    """The queue and the task that empties it."""

    def __init__(self, shm: TierWriter, disk: TierWriter, counters: Counters, quiet_since: Callable[[], float]) -> None:
        """`quiet_since` returns since when (trio time) nobody has read; infinity while a fill is under way."""
        self._shm = shm
        self._disk = disk
        self._counters = counters
        self._quiet_since = quiet_since
        self._pending: dict[BlockKey, bool] = {}
        """Whether nobody has read them yet."""
        self._seen = disk.generation
        self._wanted = trio.Event()
        self._limiter = trio.CapacityLimiter(1)
        self._batch = max(1, min(BATCH_BLOCKS, BATCH_BYTES // shm.block_size))

    def __len__(self) -> int:
        return len(self._pending)

    async def adopt(self) -> None:
        """Queue what an earlier process left in the shm tier only."""
        for key in await trio.to_thread.run_sync(self._shm_only, limiter=self._limiter):
            self._pending[key] = False
        self._wanted.set()

    async def follow(self) -> None:
        """If the disk tier has begun anew, what the shm tier has is nowhere else any more: queue it."""
        if self._disk.generation != self._seen:
            self._seen = self._disk.generation
            await self.adopt()

    def _shm_only(self) -> list[BlockKey]:
        return [key for key in self._shm.oldest_first() if key not in self._disk]

    def add(self, keys: Iterable[BlockKey], owner: int = NOBODY, *, unread: Collection[BlockKey] = ()) -> None:
        """These blocks (of a volume, if that is known) are in the shm tier only; some have come before anybody reads
        them (called in the trio thread).
        """
        read = []
        for key in keys:
            self._pending[key] = key in unread
            if key not in unread:
                read.append(key)
        self._disk.touch(read, owner)  # they were read, and were not there
        self._wanted.set()

    def note_reads(self, keys: Iterable[BlockKey]) -> None:
        """Blocks were read. Once the disk tier is full, a stable part of the shm tier (docs/EVICTION.md) need not have
        what the disk tier keeps as well: each such block leaves after its next read, for one that is nowhere else.
        """
        keys = list(keys)
        for key in keys:
            if self._pending.get(key, False):
                self._pending[key] = False
        if self._disk.is_full:
            self._shm.part_with(key for key in keys if key in self._disk)

    def demote(self, keys: Sequence[BlockKey]) -> None:
        """The shm tier is about to evict these: write those that are nowhere else (called in the evicting thread)."""
        lost = [key for key in keys if key not in self._disk]
        if lost:
            self._write(lost)

    def _write(self, keys: Sequence[BlockKey]) -> None:
        """Write blocks to the disk tier, one group after the other; what it does not take is lost, and counted."""
        for start in range(0, len(keys), self._batch):
            batch = keys[start : start + self._batch]
            unread = {key: self._pending.pop(key, False) for key in batch}
            missing = [key for key in batch if key not in self._disk]
            by_kind: dict[tuple[int, bool], list[tuple[BlockKey, int]]] = {}
            for key, (owner, read_at_s) in zip(missing, self._shm.owned(missing), strict=True):
                by_kind.setdefault((owner, unread[key]), []).append((key, read_at_s))
            for (owner, ahead), owned in by_kind.items():
                self._write_owned(owner, [key for key, _ in owned], max(at_s for _, at_s in owned), ahead=ahead)

    def _write_owned(self, owner: int, keys: Sequence[BlockKey], read_at_s: int, *, ahead: bool) -> None:
        """Write blocks of one volume, which were read last about then; `ahead`: nobody has read them yet."""
        kept = self._disk.admitted(keys, owner)
        self._counters.add(metrics.SPILLS_DECLINED.name, len(keys) - len(kept))
        found = [(key, self._shm.read(key)) for key in kept]
        values = [(key, value) for key, value in found if value is not None]
        try:
            self._disk.put_values(values, owner=owner, read_at_s=read_at_s, ahead=ahead)
        except errors.TierUnavailable:
            self._counters.add(metrics.SPILLS_LOST.name, len(values))  # the tier has warned already
        else:
            self._counters.add(metrics.SPILLS.name, len(values))
            self._counters.add(metrics.SPILL_BYTES.name, sum(len(value) for _, value in values))

    def _presses(self) -> bool:
        """Whether the queue holds `PRESSING` of the shm tier, if its blocks are as large as others there."""
        tier = self._shm.stats()
        return len(self._pending) * int(tier["used_bytes"]) >= int(tier["blocks"]) * self._shm.limit_bytes * PRESSING

    async def _write_batch(self) -> None:
        batch = [key for key, _ in zip(list(self._pending), range(self._batch), strict=False)]
        await trio.to_thread.run_sync(self._write, batch, limiter=self._limiter)

    async def run(self) -> None:
        """Empty the queue for ever, when the time is right."""
        trickled = 0.0
        while True:
            if not self._pending:
                self._wanted = trio.Event()
                await self._wanted.wait()
            if self._disk.is_planned and self._disk.is_full:
                await trio.sleep(TRICKLE_S)  # a second copy would take the room of another block: `demote` sees to it
                continue
            busy = self._quiet_since() + QUIET_S > trio.current_time()
            if busy and not self._presses():
                await trio.sleep(QUIET_S)
                if trio.current_time() < trickled + TRICKLE_S:
                    continue
            trickled = trio.current_time()
            await self._write_batch()

    async def flush(self) -> None:
        """Write everything that is queued now."""
        while self._pending:
            await self._write_batch()
        async with self.paused:
            pass  # a batch of `run` that is under way is no longer in the queue

    @property
    def paused(self) -> trio.CapacityLimiter:
        """A context in which no batch is under way: what is taken out of both tiers does not come back by one."""
        return self._limiter
