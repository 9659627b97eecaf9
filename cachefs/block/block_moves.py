"""What the threads of a fill do: take a block from the disk tier or the source, and put it where it belongs.

Everything here blocks and runs in the threads of the block cache's lanes. A tier that cannot take a block is not an
error: the bytes then stay with the flight, and are handed over with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from cachefs import errors, metrics
from cachefs.block import codec
from cachefs.block.codec import Bytes
from cachefs.block.lane import Job, Lane
from cachefs.block.lmdb_tier import Demotion, TierWriter
from cachefs.block.ports import BlockSource
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectVersion, Tier


class Flight:
    """The one fill of one block that is under way.

    `source` and `payload` are written by the thread of its job, `error` by the trio thread; all are read after `done`.
    """

    __slots__ = ("done", "error", "index", "inline", "job", "key", "lane", "length", "payload", "source")

    def __init__(self, key: BlockKey, index: int, length: int, *, inline: bool) -> None:
        self.key = key
        self.index = index
        self.length = length
        self.inline = inline
        self.done = trio.Event()
        self.source = Tier.ORIGIN
        self.payload: bytes | None = None
        self.error: Exception | None = None
        self.job: Job | None = None
        self.lane: Lane | None = None


class BlockMover:
    """Moves blocks between source and tiers. Any thread."""

    def __init__(
        self,
        shm: TierWriter | None,
        disk: TierWriter | None,
        demote: Demotion | None,
        block_size: int,
        counters: Counters,
    ) -> None:
        self._shm = shm
        self._disk = disk
        self._demote = demote
        self._block_size = block_size
        self._counters = counters

    def length(self, version: ObjectVersion, index: int) -> int:
        """Return how many bytes block `index` has."""
        return min(self._block_size, version.size - index * self._block_size)

    def payload(
        self, version: ObjectVersion, source: BlockSource, key: BlockKey, index: int
    ) -> tuple[Tier | None, bytes]:
        """Return the bytes of a block that was just filled; the tier is ORIGIN if it was evicted since, else None."""
        length = self.length(version, index)
        for tier in (self._shm, self._disk):
            value = None if tier is None else tier.read(key, length)
            if value is not None:
                return None, value[codec.HEADER_SIZE :]
        return Tier.ORIGIN, bytes(source.read_range(version, index * self._block_size, length))

    def promote(self, flight: Flight) -> bool:
        """Bring a block from the disk tier into the shm tier; returns False when it is not good there."""
        assert self._disk is not None
        value = self._disk.read(flight.key, flight.length)
        if value is None:
            self._counters.add(metrics.DISK_MISSES.name)
            return False
        self._counters.add(metrics.DISK_HITS.name)
        self._counters.add(metrics.DISK_HIT_BYTES.name, flight.length)
        self._disk.touch([flight.key])
        stored = self._into_shm([(flight.key, value)], encoded=True)
        flight.source = Tier.DISK
        flight.payload = None if stored and not flight.inline else value[codec.HEADER_SIZE :]
        return True

    def fetch(self, version: ObjectVersion, source: BlockSource, flights: Sequence[Flight]) -> list[BlockKey]:
        """Bring neighbouring blocks from the source into the shm tier, else into the disk tier.

        Returns the keys that are in the shm tier only. Raises what the source raises.
        """
        start, length = flights[0].index * self._block_size, sum(flight.length for flight in flights)
        raw = memoryview(source.read_range(version, start, length))
        if raw.nbytes != length:
            raise errors.BadBody(f"{version.key}: asked for {length} bytes at {start}, got {raw.nbytes}")
        parts: list[tuple[BlockKey, Bytes]] = []
        offset = 0
        for flight in flights:
            parts.append((flight.key, raw[offset : offset + flight.length]))
            offset += flight.length
        self._counters.add(metrics.ORIGIN_FILLS.name, len(flights))
        self._counters.add(metrics.ORIGIN_FILL_BYTES.name, length)
        self._counters.add(metrics.ORIGIN_FILL_REQUESTS.name)
        stored = self._into_shm(parts, encoded=False)
        if not stored:
            self._into_disk(parts)
        for flight, (_, part) in zip(flights, parts, strict=True):
            flight.source = Tier.ORIGIN
            flight.payload = None if stored and not flight.inline else bytes(part)
        return [flight.key for flight in flights] if stored else []

    def _into_shm(self, blocks: Sequence[tuple[BlockKey, Bytes]], *, encoded: bool) -> bool:
        if self._shm is None:
            return False
        try:
            (self._shm.put_values if encoded else self._shm.put_many)(blocks, self._demote)
        except errors.TierUnavailable:
            return False  # the tier has warned and counted
        return True

    def _into_disk(self, blocks: Sequence[tuple[BlockKey, Bytes]]) -> None:
        if self._disk is not None:
            try:
                self._disk.put_many(blocks)
            except errors.TierUnavailable:
                return  # the tier has warned and counted
