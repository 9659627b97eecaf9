"""Tiers in small, one for each way in which a tier can be run: what `cachefs.block.policies.epoch` compares.

They hold keys only, all blocks being of one size, and are told of each read of a sample of the blocks. `StableCopy` is
the body of the policies itself, as it has to mean the same by patience and merit; the two others are written anew
because they need neither: so a contest costs half.

INVARIANT: none holds more blocks than `room` (0: it is not full yet). Every call is O(1), but for rounds of the queues
that reads have paid for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Protocol

import xxhash

from cachefs.block.policies.segments import Segments
from cachefs.block.policies.ways import LOW, NEWCOMERS, READ, READ_MOST, READS, STAMP_SHIFT, Way
from cachefs.types import BlockKey

_MOST_READS = 3


class Copy(Protocol):
    """A tier in small."""

    way: Way
    hits: float
    """Per read, lately: whoever compares writes it."""
    patience: int

    def play(self, key: BlockKey, digest: int, now: int, room: int) -> bool:
        """A block is read from a tier of so many blocks; returns whether it was here.

        `digest`: the hash of its key. `now`: by the clock of the tier itself, so that both mean the same by patience.
        """
        ...

    def thin_out(self, mask: int) -> None:
        """Forget the blocks whose hash has a bit of these: the sample is smaller."""
        ...


class StableCopy(Segments):
    """A tier that keeps a stable part."""

    __slots__ = ("hits",)

    def __init__(self) -> None:
        super().__init__(Way.STABLE, apart=0)
        self.hits = 0.0

    def play(self, key: BlockKey, digest: int, now: int, room: int) -> bool:
        """See `Copy.play`."""
        self.now = now
        known = self._known
        number = known.get(key)
        if number is not None:
            low = number & LOW
            known[key] = now << STAMP_SHIFT | (low if low & READS == READ_MOST else low + READ)
            return True
        while room and len(known) >= room:
            victim = self.victim()
            assert victim is not None
            self.remove(victim)
        self._insert(key, 1, 0, digest)
        return False

    def thin_out(self, mask: int) -> None:
        """See `Copy.thin_out`."""
        for key in self.oldest_first():
            if xxhash.xxh3_64_intdigest(key) & mask:
                self.remove(key)
        self._capacity, self._nearly_full = 0, 1 << 62  # it is a smaller tier from now on


class RecentCopy:
    """S3-FIFO: newcomers that were read twice get to the main part, others leave and are remembered for a while."""

    __slots__ = ("_ghosts", "_main", "_newcomers", "_reads", "hits", "patience", "way")

    def __init__(self) -> None:
        self.way = Way.RECENT
        self.hits = 0.0
        self.patience = 0
        self._reads: dict[BlockKey, int] = {}
        self._newcomers: deque[BlockKey] = deque()
        self._main: deque[BlockKey] = deque()
        self._ghosts: OrderedDict[BlockKey, None] = OrderedDict()
        """As many of those that left last as there are blocks here."""

    def play(self, key: BlockKey, digest: int, now: int, room: int) -> bool:
        """See `Copy.play`."""
        reads = self._reads
        count = reads.get(key)
        if count is not None:
            if count < _MOST_READS:
                reads[key] = count + 1
            return True
        if room and len(reads) >= room * 9 // 10:
            while len(reads) >= room:
                self._evict(room)
        elif len(self._newcomers) * NEWCOMERS[Way.RECENT] > len(reads):
            self._main.append(self._newcomers.popleft())
        reads[key] = 0
        (self._main if self._ghosts.pop(key, 0) is None else self._newcomers).append(key)
        return False

    def _evict(self, room: int) -> None:
        reads, main, newcomers = self._reads, self._main, self._newcomers
        while newcomers and (len(newcomers) * NEWCOMERS[Way.RECENT] > room or not main):
            key = newcomers.popleft()
            if reads[key] < 2:
                del reads[key]
                self._ghosts[key] = None
                if len(self._ghosts) > room:
                    self._ghosts.popitem(last=False)
                return
            reads[key] = 0
            main.append(key)
        while reads[main[0]]:
            reads[main[0]] -= 1
            main.rotate(-1)
        del reads[main.popleft()]

    def thin_out(self, mask: int) -> None:
        """See `Copy.thin_out`."""
        reads = self._reads = {
            key: count for key, count in self._reads.items() if not xxhash.xxh3_64_intdigest(key) & mask
        }
        self._newcomers = deque(key for key in self._newcomers if key in reads)
        self._main = deque(key for key in self._main if key in reads)
        self._ghosts.clear()


class LatestCopy:
    """CLOCK, nearly LRU."""

    __slots__ = ("_queue", "_read", "hits", "patience", "way")

    def __init__(self) -> None:
        self.way = Way.LATEST
        self.hits = 0.0
        self.patience = 0
        self._read: dict[BlockKey, bool] = {}
        """Whether each was read since its last round."""
        self._queue: deque[BlockKey] = deque()

    def play(self, key: BlockKey, digest: int, now: int, room: int) -> bool:
        """See `Copy.play`."""
        read, queue = self._read, self._queue
        if key in read:
            read[key] = True
            return True
        while room and len(read) >= room:
            oldest = queue[0]
            if read[oldest]:
                read[oldest] = False
                queue.rotate(-1)
            else:
                del read[queue.popleft()]
        read[key] = False
        queue.append(key)
        return False

    def thin_out(self, mask: int) -> None:
        """See `Copy.thin_out`."""
        read = self._read = {key: read for key, read in self._read.items() if not xxhash.xxh3_64_intdigest(key) & mask}
        self._queue = deque(key for key in self._queue if key in read)
