"""The default policy: keeps a stable part while epochs are read, and what was read lately while that is worth more.

`EpochPolicy` is `Segments` and somebody who watches (`Duel`). The duel follows a sample of the blocks, chosen by the
hash of their keys, through small copies of the tier, one run in each way (Waldspurger et al., "Cache Modeling and
Optimization using Miniature Simulations", ATC 2017): the way that had more hits lately is that of the tier.

The same sample says after how many reads blocks are read again, and so how long a block may stay unread before it is
taken for dead (`patience`): a little longer than nearly all. When blocks are read again that are not here, and those
that are here are not, the job has moved to other files: then patience is what is usual, and the former files leave.
As long as most reads are of blocks that were never read before, or too long ago to be remembered, nobody knows: the few
that are remembered are those that came back soonest. Then nothing is taken for dead.

A read costs a look at a flag, one of the sample some microseconds (the copies hear of several at a time). A copy
(`copies`) holds up to two hundred blocks, however many the tier has; the history those of the sample that were read in
the last `MEMORY` times as many reads as the tier has blocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque

import xxhash

from cachefs.block.policies.copies import Copy, LatestCopy, Read, RecentCopy, StableCopy
from cachefs.block.policies.segments import Segments
from cachefs.block.policies.ways import APART, SAMPLED, STAMP_SHIFT, Way
from cachefs.types import BlockKey

COPY_BLOCKS = 96
"""A copy holds between this many blocks and twice as many, if the tier has them. Smaller ones see moves later."""
MEMORY = 16
INTERVALS = 128
FEWEST_INTERVALS = 64
PLAYED_AT_ONCE = 8
"""The copies hear of so many reads at a time: that costs less."""
RENEWED_AFTER = 2
"""Rounds of as many reads."""
UNUSUAL = 0.98
FOREVER = 1 << 62
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


def _hits_of(copy: Copy) -> float:
    return copy.hits


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
        self._strange = 0
        """How many blocks were read for the first time, or for the first that is known, since patience was renewed."""
        self._room = 0
        """How many blocks a copy holds; 0: the tier is not full yet."""
        self._weight = 0.0
        """Of one read in the mean of hits."""
        self._rounds = 0
        self._unplayed: list[Read] = []
        """Reads that the copies have not heard of."""
        self._horizon = 0
        self.way = Way.STABLE
        self.patience = FOREVER
        self.is_due = True
        """Whether `fit` should be called, as far as that is known, and `way` and `patience` be read again."""

    def fit(self, blocks: int) -> None:
        """The tier is full with so many blocks."""
        while blocks >> self._bits >= 2 * COPY_BLOCKS:
            self._thin_out()
        self._room = max(4, blocks >> self._bits)
        self._weight = 1 / (WINDOW * self._room)
        self._horizon = MEMORY * blocks

    def come(self, key: BlockKey, now: int) -> None:
        """A block of the sample entered the tier because it is read, or was a moment ago."""
        if key in self._announced:
            self._announced.discard(key)
        else:
            self._read(key, now, None)

    def read(self, key: BlockKey, now: int, last: int | None) -> None:
        """A block of the sample was read; `last`: when before, if it is in the tier."""
        if last is None:
            self._announced.add(key)
        self._read(key, now, last)

    def _read(self, key: BlockKey, now: int, last: int | None) -> None:
        here = last is not None
        history = self._history
        last = history.pop(key, last)
        if last is None:
            self._strange += 1
        elif now - last > APART:
            self._intervals.append(now - last)
            self._here.append(here)
        else:
            history[key] = last
            return
        history[key] = now
        self._unplayed.append((key, now))
        if len(self._unplayed) >= PLAYED_AT_ONCE:
            self._judge(now)

    def _judge(self, now: int) -> None:
        """Let the copies catch up, and see which of them is the best."""
        self._rounds += 1
        if self._rounds % RENEWED_AFTER == 0:
            self._renew_patience()
        for copy in self._copies:
            copy.play(self._unplayed, self._room, self._weight)
        self._unplayed.clear()
        best = max(self._copies, key=_hits_of)
        current = next(copy.hits for copy in self._copies if copy.way is self.way)
        if best.hits > current + (PREFERRED if best.way is Way.STABLE else WORTH):
            self.way = best.way
        if self._room:
            self._forget_old(now)
        elif len(self._history) >= 2 * COPY_BLOCKS:
            self._thin_out()
        self.is_due = True

    def _renew_patience(self) -> None:
        strange, self._strange = self._strange * 2 > RENEWED_AFTER * PLAYED_AT_ONCE, 0
        count = len(self._intervals)
        if strange or count < FEWEST_INTERVALS:
            self._set_patience(FOREVER)
            return
        mean = sum(self._intervals) / count
        fair = count * min(1.0, self._horizon / MEMORY / mean)
        if fair >= FEWEST_FAIR and sum(self._here) * FAIR < fair:
            self._set_patience(int(mean))
        else:
            self._set_patience(int(sorted(self._intervals)[int(count * UNUSUAL)] * MARGIN))

    def _set_patience(self, reads: int) -> None:
        self.patience = reads
        for copy in self._copies:
            copy.patience = reads

    def _forget_old(self, now: int) -> None:
        history, oldest = self._history, now - self._horizon
        while history:
            key, last = history.popitem(last=False)
            if last >= oldest:
                history[key] = last
                history.move_to_end(key, last=False)
                return
            self._announced.discard(key)

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
        self._mask = 0

    def _watch_new(self, key: BlockKey) -> None:
        duel = self._duel
        duel.come(key, self.now)
        if duel.is_due:
            self._attend()

    def _watch(self, key: BlockKey, number: int) -> int:
        digest, duel = xxhash.xxh3_64_intdigest(key), self._duel
        if digest & duel.mask:
            return number & ~SAMPLED
        duel.read(key, self.now, number >> STAMP_SHIFT)
        if duel.is_due:
            self._attend()
        return number

    def _read_elsewhere(self, key: BlockKey) -> None:
        digest, duel = xxhash.xxh3_64_intdigest(key), self._duel
        if not digest & duel.mask:
            duel.read(key, self.now, None)
            if duel.is_due:
                self._attend()

    def _attend(self) -> None:
        """Tell the duel how large the tier is, and do as it says."""
        duel = self._duel
        if self.is_full:
            duel.fit(len(self._known))
        self.way, self.patience, self._mask, duel.is_due = duel.way, duel.patience, duel.mask, False
