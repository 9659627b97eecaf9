"""The default policy: keeps a stable part while epochs are read, and what was read lately while that is worth more.

`EpochPolicy` is `Segments` and somebody who watches (`Duel`). The duel follows a sample of the blocks, chosen by the
hash of their keys, through small copies of the tier, one run in each way (Waldspurger et al., "Cache Modeling and
Optimization using Miniature Simulations", ATC 2017): the way that had more hits lately is that of the tier.

The same sample says after how many reads blocks are read again, and so how long a block may stay unread before it is
taken for dead (`patience`): a little longer than nearly all. When blocks are read again that are not here, and those
that are here are not, the job has moved to other files: then patience is what is usual, and the former files leave.

A read costs a look at a flag, one of the sample some microseconds. A copy (`copies`) holds up to two hundred blocks,
however many the tier has; the history those of the sample that were read in the last `MEMORY` times as many reads as
the tier has blocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque

import xxhash

from cachefs.block.policies.copies import Copy, LatestCopy, RecentCopy, StableCopy
from cachefs.block.policies.segments import Segments
from cachefs.block.policies.ways import APART, SAMPLED, STAMP_SHIFT, Way
from cachefs.types import BlockKey

COPY_BLOCKS = 96
"""A copy holds between this many blocks and twice as many, if the tier has them. Smaller ones see moves later."""
MEMORY = 16
INTERVALS = 128
FEWEST_INTERVALS = 64
RENEWED_AFTER = 16
UNUSUAL = 0.98
MARGIN = 1.5
FAIR = 8
"""A tier that has less than one part in so many of the hits that any part would have has the wrong files."""
FEWEST_FAIR = 16
"""So many hits must be missed at least: a mean of few intervals early in an epoch is half of what it should be."""
WORTH = 0.04
"""Another way than the stable one has to have so many more hits of all reads: in a few hundred reads of a sample, a
difference below that is chance."""
WINDOW = 6
"""Hits are averaged over so many times as many reads as a copy has blocks."""
PREFERRED = 0.01
"""The same for the way back."""


class Duel:
    """Copies of a tier in small, run in different ways. Not safe for several threads."""

    def __init__(self) -> None:
        self._bits = 0
        self.mask = 0
        """A block is of the sample when its hash has no bit of these."""
        self._copies: tuple[Copy, ...] = (StableCopy(), RecentCopy(), LatestCopy())
        self._history: OrderedDict[BlockKey, int] = OrderedDict()
        """When the blocks of the sample were read last."""
        self._announced: set[BlockKey] = set()
        """Those that were read when they were not in the tier: when they come, that is no other read."""
        self._intervals: deque[int] = deque(maxlen=INTERVALS)
        """Between two reads of one block."""
        self._here: deque[bool] = deque(maxlen=INTERVALS)
        """Whether the tier had the block at the second one."""
        self._unseen = 0
        self._room = 0
        """How many blocks a copy holds; 0: the tier is not full yet."""
        self._horizon = 0
        self.way = Way.STABLE
        self.patience = 1 << 62

    def fit(self, blocks: int) -> None:
        """The tier is full with so many blocks."""
        while blocks >> self._bits >= 2 * COPY_BLOCKS:
            self._thin_out()
        self._room = max(4, blocks >> self._bits)
        self._horizon = MEMORY * blocks

    def come(self, key: BlockKey, digest: int, now: int) -> None:
        """A block of the sample entered the tier because it is read, or was a moment ago. `digest`: see `mask`."""
        if key in self._announced:
            self._announced.discard(key)
        else:
            self._read(key, digest, now, None)

    def read(self, key: BlockKey, digest: int, now: int, last: int | None) -> None:
        """A block of the sample was read; `last`: when before, if it is in the tier."""
        if last is None:
            self._announced.add(key)
        self._read(key, digest, now, last)

    def _read(self, key: BlockKey, digest: int, now: int, last: int | None) -> None:
        here = last is not None
        history = self._history
        last = history.pop(key, last)
        if last is not None and now - last <= APART:
            history[key] = last
            return
        history[key] = now
        if last is not None:
            self._intervals.append(now - last)
            self._here.append(here)
            self._unseen += 1
            if self._unseen >= RENEWED_AFTER and len(self._intervals) >= FEWEST_INTERVALS:
                self._renew_patience()
        self._compare(key, digest, now)
        if self._room:
            self._forget_old(now)
        elif len(history) >= 2 * COPY_BLOCKS:
            self._thin_out()

    def _compare(self, key: BlockKey, digest: int, now: int) -> None:
        room = self._room
        weight = 1 / (WINDOW * room) if room else 0.0
        best, most, current = self.way, 0.0, 0.0
        for copy in self._copies:
            hits = copy.hits
            copy.hits = hits = hits + (copy.play(key, digest, now, room) - hits) * weight
            if hits > most:
                best, most = copy.way, hits
            if copy.way is self.way:
                current = hits
        if most > current + (PREFERRED if best is Way.STABLE else WORTH):
            self.way = best

    def _renew_patience(self) -> None:
        self._unseen = 0
        count = len(self._intervals)
        mean = sum(self._intervals) / count
        fair = count * min(1.0, self._horizon / MEMORY / mean)
        if fair >= FEWEST_FAIR and sum(self._here) * FAIR < fair:
            self.patience = int(mean)
        else:
            self.patience = int(sorted(self._intervals)[int(count * UNUSUAL)] * MARGIN)
        for copy in self._copies:
            copy.patience = self.patience

    def _forget_old(self, now: int) -> None:
        while True:
            oldest = next(iter(self._history))
            if now - self._history[oldest] <= self._horizon:
                return
            del self._history[oldest]
            self._announced.discard(oldest)

    def _thin_out(self) -> None:
        """Halve the sample."""
        self._bits += 1
        self.mask = (1 << self._bits) - 1
        for key in [key for key in self._history if xxhash.xxh3_64_intdigest(key) & self.mask]:
            del self._history[key]
            self._announced.discard(key)
        for copy in self._copies:
            copy.thin_out(self.mask)


class EpochPolicy(Segments):
    """Implements `cachefs.block.ports.EvictionPolicy`."""

    __slots__ = ("_duel",)

    def __init__(self) -> None:
        super().__init__(Way.STABLE)
        self._duel = Duel()

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier because it was read."""
        self.now += 1
        digest = xxhash.xxh3_64_intdigest(key)
        if digest & self._duel.mask:
            self._insert(key, size, 0, digest)
        else:
            self._attend()
            self._duel.come(key, digest, self.now)
            self._obey()
            self._insert(key, size, SAMPLED, digest)

    def _watch(self, key: BlockKey, number: int) -> int:
        digest = xxhash.xxh3_64_intdigest(key)
        if digest & self._duel.mask:
            return number & ~SAMPLED
        self._attend()
        self._duel.read(key, digest, self.now, number >> STAMP_SHIFT)
        self._obey()
        return number

    def _read_elsewhere(self, key: BlockKey) -> None:
        digest = xxhash.xxh3_64_intdigest(key)
        if not digest & self._duel.mask:
            self._attend()
            self._duel.read(key, digest, self.now, None)
            self._obey()

    def _attend(self) -> None:
        if self.is_full:
            self._duel.fit(len(self._known))

    def _obey(self) -> None:
        self.way, self.patience = self._duel.way, self._duel.patience
