"""What the threads of a fill do: take a block from the disk tier or the source, and put it where it belongs.

Everything here blocks and runs in the threads of the block cache's lanes. A tier that cannot take a block is not an
error: the bytes then stay with the flight, and are handed over with the answer. Whoever expects that asks for a flight
that is `inline`, and has room for its bytes; of others only few are kept (`_Strays`), since nobody counts them, and
their readers ask again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence

from cachefs import errors, metrics
from cachefs.block import codec
from cachefs.block.codec import Bytes
from cachefs.block.flights import Flight
from cachefs.block.lmdb_tier import Demotion, TierWriter
from cachefs.block.ports import BlockSource
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectVersion, Tier

MIB = 1 << 20
KEPT_BYTES = 8 * MIB
"""How much memory for blocks stays with us between fills."""
STRAY_BYTES = 4 * MIB
STRAY_S = 1.0


class _Buffers:
    """Memory for blocks on their way, used again: fresh memory costs more than the copy into it. Any thread.

    The first fills take whole buffers, which are kept. More of them at a time take what they need and no more: 200
    small files on their way are 20 MiB, not 200.
    """

    def __init__(self, block_size: int) -> None:
        self.blocks = max(1, MIB // block_size)
        """How many stored values one buffer holds: what is committed in one transaction."""
        self._whole_bytes = (codec.HEADER_SIZE + block_size) * self.blocks
        self._idle: deque[bytearray] = deque()
        self._unmade = KEPT_BYTES // self._whole_bytes

    def needed(self, blocks: int, longest: int) -> int:
        """Return how many bytes a loan takes."""
        return min(blocks, self.blocks) * (codec.HEADER_SIZE + longest)

    @contextlib.contextmanager
    def lent(self, blocks: int, longest: int) -> Iterator[list[memoryview]]:
        """Lend places for so many stored values of this length at the most, or as many as one buffer has."""
        size = codec.HEADER_SIZE + longest
        try:
            buffer = self._idle.pop()
        except IndexError:
            kept = self._unmade > 0
            self._unmade -= kept
            buffer = bytearray(self._whole_bytes if kept else self.needed(blocks, longest))
        else:
            kept = True
        with memoryview(buffer) as whole:
            yield [whole[at * size : (at + 1) * size] for at in range(min(blocks, self.blocks))]
        if kept:
            self._idle.append(buffer)


class _Strays:
    """The bytes of blocks that no tier took although one was expected to: a little per second. Any thread."""

    def __init__(self) -> None:
        self._left = 0
        self._until = 0.0

    def take(self, size: int) -> bool:
        """Whether one more may be kept."""
        now = time.monotonic()
        if now >= self._until:
            self._until, self._left = now + STRAY_S, STRAY_BYTES
        taken = self._left > 0
        self._left -= size
        return taken


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
        self._buffers = _Buffers(block_size)
        self._strays = _Strays()
        self.in_shm = shm is not None
        """Whether the shm tier took the last block."""
        self.on_disk = disk is not None
        """Whether the disk tier took the last block that was brought to it here."""

    def memory(self, flights: Sequence[Flight]) -> int:
        """Return how many bytes a fetch of these blocks holds at a time."""
        return self._buffers.needed(len(flights), max(flight.length for flight in flights))

    def length(self, version: ObjectVersion, index: int) -> int:
        """Return how many bytes block `index` has."""
        return min(self._block_size, version.size - index * self._block_size)

    def payload(
        self, version: ObjectVersion, source: BlockSource, key: BlockKey, index: int
    ) -> tuple[Tier | None, bytes]:
        """Return the bytes of a block that was just filled, and where they came from if it was evicted since."""
        length = self.length(version, index)
        for tier in (self._shm, self._disk):
            value = None if tier is None else tier.read(key, length)
            if value is not None:
                return None, bytes(memoryview(value)[codec.HEADER_SIZE :])
        body = bytearray(length)
        [(_, origin)] = source.read_blocks(version, index * self._block_size, [memoryview(body)])
        return origin, bytes(body)

    def promote(self, flight: Flight) -> None:
        """Bring a block from the disk tier into the shm tier and end its flight; one that is not good there goes on."""
        assert self._disk is not None
        with self._buffers.lent(1, flight.length) as (place,):
            value = self._disk.read(flight.key, flight.length, place)
            if value is None:
                self._counters.add(metrics.DISK_MISSES.name)
                return
            self._counters.add(metrics.DISK_HITS.name)
            self._counters.add(metrics.DISK_HIT_BYTES.name, flight.length)
            self._disk.touch([flight.key], flight.owner)
            stored = self._into_shm([(flight.key, value)], flight.owner, ahead=not flight.wanted)
            if stored and flight.wanted and self._shm is not None and self._disk.is_full:
                self._shm.part_with([flight.key])
            flight.source = Tier.DISK
            self._end(flight, value, stored=stored)

    def fetch(
        self,
        version: ObjectVersion,
        source: BlockSource,
        flights: Sequence[Flight],
        in_shm_only: list[BlockKey],
    ) -> None:
        """Bring neighbouring blocks from the source into the shm tier, else into the disk tier, while they come in.

        Ends the flights of those that are there, and extends `in_shm_only`. Raises what the source raises; the flights
        that are over by then are good.
        """
        with self._buffers.lent(len(flights), max(flight.length for flight in flights)) as places:
            values = [
                places[number % len(places)][: codec.HEADER_SIZE + flight.length]
                for number, flight in enumerate(flights)
            ]
            payloads = [value[codec.HEADER_SIZE :] for value in values]
            group = known = complete = 0
            for complete, tier in source.read_blocks(version, flights[0].index * self._block_size, payloads):
                for flight in flights[known:complete]:
                    flight.source = tier
                known = complete
                if complete - group == len(places) or complete == len(flights):
                    self._keep(flights[group:complete], values[group:complete], in_shm_only)
                    group = complete
            if complete != len(flights):
                raise errors.BadBody(f"{version.key}: {complete} of {len(flights)} blocks came")

    def _keep(self, flights: Sequence[Flight], values: Sequence[memoryview], in_shm_only: list[BlockKey]) -> None:
        """Commit blocks that are complete, and let whoever asks have them from now on."""
        for flight, value in zip(flights, values, strict=True):
            value[: codec.HEADER_SIZE] = codec.encode_header(value[codec.HEADER_SIZE :], flight.key)
        self.keep(flights, values, in_shm_only)

    def keep(self, flights: Sequence[Flight], values: Sequence[Bytes], in_shm_only: list[BlockKey]) -> None:
        """Commit stored values that came from `Flight.source`, and end their flights."""
        for tier, blocks_, bytes_ in (
            (Tier.PEER, metrics.PEER_FILLS, metrics.PEER_FILL_BYTES),
            (Tier.ORIGIN, metrics.ORIGIN_FILLS, metrics.ORIGIN_FILL_BYTES),
        ):
            lengths = [flight.length for flight in flights if flight.source is tier]
            if lengths:
                self._counters.add(blocks_.name, len(lengths))
                self._counters.add(bytes_.name, sum(lengths))
        pairs = list(zip(flights, values, strict=True))
        straight = [pair for pair in pairs if pair[0].straight and not pair[0].wanted]
        blocks = [(flight.key, value) for flight, value in straight]
        if straight and self._into_disk(blocks, straight[0][0].owner, ahead=True):
            for flight, value in straight:
                self._end(flight, value, stored=False)
            pairs = [pair for pair in pairs if not pair[0].over]
        if pairs:
            self._keep_near(pairs, in_shm_only)

    def _keep_near(self, pairs: Sequence[tuple[Flight, Bytes]], in_shm_only: list[BlockKey]) -> None:
        """Commit to the shm tier or, when that takes none, to the disk tier."""
        blocks = [(flight.key, value) for flight, value in pairs]
        owner = pairs[0][0].owner  # all of them come from one source
        stored = self._into_shm(blocks, owner, ahead=not any(flight.wanted for flight, _ in pairs))
        if stored:
            in_shm_only += [flight.key for flight, _ in pairs]
        else:
            kept = self._into_disk(blocks, owner)
            for flight, _ in pairs:
                flight.kept = kept
        for flight, value in pairs:
            self._end(flight, value, stored=stored)

    def _end(self, flight: Flight, value: Bytes, *, stored: bool) -> None:
        """Let whoever asked for a block have it, with its bytes where they are needed."""
        if flight.inline or (not stored and flight.wanted and self._strays.take(flight.length)):
            flight.payload = bytes(memoryview(value)[codec.HEADER_SIZE :])
            if not stored:
                self._counters.add(metrics.FILLS_INLINE.name)
        flight.end()

    def _into_shm(self, values: Sequence[tuple[BlockKey, Bytes]], owner: int, *, ahead: bool = False) -> bool:
        if self._shm is None:
            return False
        try:
            self._shm.put_values(values, self._demote, ahead=ahead, owner=owner)
        except errors.TierUnavailable:
            self.in_shm = False
            return False  # the tier has warned and counted
        self.in_shm = True
        return True

    def _into_disk(self, values: Sequence[tuple[BlockKey, Bytes]], owner: int, *, ahead: bool = False) -> bool:
        if self._disk is None:
            return False
        try:
            self._disk.put_values(values, ahead=ahead, owner=owner)
        except errors.TierUnavailable:
            self.on_disk = False  # the tier has warned and counted
        else:
            self.on_disk = True
        return self.on_disk
