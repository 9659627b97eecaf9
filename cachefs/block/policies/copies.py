"""Tiers in small, one for each way in which a tier can be run: what `cachefs.block.policies.epoch` compares.

They hold keys only, all blocks being of one size, and are told of each read of a sample of the blocks. Each does what
`cachefs.block.policies.segments` does in its way, without what a copy does not need (sizes, what comes ahead of its
reader, blocks that leave out of turn): so a contest costs less.

INVARIANT: none holds more blocks than `room` (0: it is not full yet). Every call is O(1), but for rounds of the queues
that reads have paid for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import xxhash

from cachefs.block.policies.ways import CALM, NEWCOMERS, SOON, TURNS, Way
from cachefs.types import BlockKey

_MOST_READS = 3
_SHIFT, _COUNT = 2, 3
_NEW_IN_STABLE, _NEW_IN_RECENT = NEWCOMERS[Way.STABLE], NEWCOMERS[Way.RECENT]


Read: TypeAlias = tuple[BlockKey, int]
"""Which block was read and when, by the clock of the tier itself: so that patience means the same."""


class Copy(Protocol):
    """A tier in small."""

    way: Way
    hits: float
    """Per read, lately."""
    patience: int

    def play(self, reads: Sequence[Read], room: int, weight: float) -> None:
        """Blocks are read from a tier of so many blocks. `weight`: of one read in `hits`."""
        ...

    def thin_out(self, mask: int) -> None:
        """Forget the blocks whose hash has a bit of these: the sample is smaller."""
        ...


class StableCopy:
    """A tier that keeps a stable part: as `Segments` does it, with the same patience and merit."""

    __slots__ = ("_calm", "_ghosts", "_known", "_left", "_main", "_newcomers", "hits", "patience", "way")

    def __init__(self) -> None:
        self.way = Way.STABLE
        self.hits = 0.0
        self.patience = 1 << 62
        self._known: dict[BlockKey, int] = {}
        """When each was read last, above `_SHIFT`, and below how often since its last round."""
        self._newcomers: deque[BlockKey] = deque()
        self._main: deque[BlockKey] = deque()
        self._ghosts: OrderedDict[BlockKey, int] = OrderedDict()
        """Newcomers that left: their number among those, and in the lowest bit whether they were read again before."""
        self._left = 0
        self._calm = 0

    def play(self, reads: Sequence[Read], room: int, weight: float) -> None:
        """See `Copy.play`."""
        known, newcomers, main, ghosts, found = self._known, self._newcomers, self._main, self._ghosts, 0
        nearly_full = room * 9 // 10
        for key, now in reads:
            number = known.get(key)
            if number is not None:
                count = number & _COUNT
                known[key] = now << _SHIFT | (count if count == _MOST_READS else count + 1)
                found += 1
                continue
            queue, count = newcomers, 0
            if room and len(known) >= nearly_full:
                while len(known) >= room:
                    self._evict(now, room)
                ghost = ghosts.pop(key, None)
                if ghost is not None and (self._left - (ghost >> 1)) * SOON < len(known):
                    if ghost & 1:
                        queue = main
                    else:
                        count = 1
            elif len(newcomers) * _NEW_IN_STABLE > len(known):
                main.append(newcomers.popleft())
            known[key] = now << _SHIFT | count
            queue.append(key)
        self.hits += (found - len(reads) * self.hits) * weight

    def _evict(self, now: int, room: int) -> None:
        known, newcomers, main = self._known, self._newcomers, self._main
        if self._calm and newcomers and known[newcomers[0]] & _COUNT < 2:
            self._calm -= 1
            self._lose_newcomer(room)
            return
        self._calm = 0
        is_dead = self._turn(now)
        if main and not is_dead and not known[main[0]] & _COUNT:
            is_dead = len(main) * 100 > room * 99
            self._calm = 0 if is_dead else CALM
        while newcomers and not is_dead:
            full = (len(main) + 1) * _NEW_IN_STABLE > room * (_NEW_IN_STABLE - 1)
            if full and known[newcomers[0]] & _COUNT < 2:
                self._lose_newcomer(room)
                return
            self._calm = 0
            key = newcomers.popleft()
            known[key] &= ~_COUNT
            main.append(key)
            is_dead = full
        del known[main.popleft()]

    def _turn(self, now: int) -> bool:
        """Give blocks of the main part that were read another round, some at a time; whether the head is dead."""
        known, main, expired = self._known, self._main, now - self.patience
        for _ in range(TURNS if main else 0):
            number = known[main[0]]
            if number >> _SHIFT < expired:
                return True
            if not number & _COUNT:
                return False
            known[main[0]] = number & ~_COUNT
            main.rotate(-1)
        return bool(main) and known[main[0]] >> _SHIFT < expired

    def _lose_newcomer(self, room: int) -> None:
        key = self._newcomers.popleft()
        self._left += 1
        self._ghosts[key] = self._left << 1 | (self._known.pop(key) & _COUNT > 0)
        if len(self._ghosts) * SOON > room:
            self._ghosts.popitem(last=False)

    def thin_out(self, mask: int) -> None:
        """See `Copy.thin_out`."""
        known = self._known = {
            key: number for key, number in self._known.items() if not xxhash.xxh3_64_intdigest(key) & mask
        }
        self._newcomers = deque(key for key in self._newcomers if key in known)
        self._main = deque(key for key in self._main if key in known)
        self._ghosts.clear()


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

    def play(self, reads: Sequence[Read], room: int, weight: float) -> None:
        """See `Copy.play`."""
        counts, newcomers, main, ghosts, found = self._reads, self._newcomers, self._main, self._ghosts, 0
        nearly_full = room * 9 // 10
        for key, _ in reads:
            count = counts.get(key)
            if count is not None:
                if count < _MOST_READS:
                    counts[key] = count + 1
                found += 1
                continue
            if room and len(counts) >= nearly_full:
                while len(counts) >= room:
                    self._evict(room)
            elif len(newcomers) * _NEW_IN_RECENT > len(counts):
                main.append(newcomers.popleft())
            counts[key] = 0
            (main if ghosts.pop(key, 0) is None else newcomers).append(key)
        self.hits += (found - len(reads) * self.hits) * weight

    def _evict(self, room: int) -> None:
        reads, main, newcomers = self._reads, self._main, self._newcomers
        while newcomers and (len(newcomers) * _NEW_IN_RECENT > room or not main):
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

    def play(self, reads: Sequence[Read], room: int, weight: float) -> None:
        """See `Copy.play`."""
        read, queue, found = self._read, self._queue, 0
        for key, _ in reads:
            if key in read:
                read[key] = True
                found += 1
                continue
            while room and len(read) >= room:
                oldest = queue.popleft()
                if read[oldest]:
                    read[oldest] = False
                    queue.append(oldest)
                else:
                    del read[oldest]
            read[key] = False
            queue.append(key)
        self.hits += (found - len(reads) * self.hits) * weight

    def thin_out(self, mask: int) -> None:
        """See `Copy.thin_out`."""
        read = self._read = {key: read for key, read in self._read.items() if not xxhash.xxh3_64_intdigest(key) & mask}
        self._queue = deque(key for key in self._queue if key in read)
