"""Two queues, newcomers and main part, run in one of three ways: the body of the policies `s3fifo` and `epoch`.

`RECENT` is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): a tenth is for
newcomers; those that were read twice meanwhile go to the main part, a FIFO in which blocks that were read get another
round; a newcomer that left a short while ago goes to the main part at once.

`STABLE` is for epochs, in which every block is read once, in an order that is another one each time. Then it is best
to keep any part and never to exchange it (CoorDL's MinIO cache: Mohan et al., "Analyzing and Mitigating Data Stalls in
DNN Training", VLDB 2021). A fiftieth is for newcomers, the oldest of which leaves. The main part is exchanged only for
good reasons: a block of it was not read for longer than blocks stay unread here (`patience`), or a newcomer was read
again and again (in epochs, the first and the third read of a block lie at least an epoch apart).

`LATEST` is CLOCK, nearly LRU (Corbato, "A paging experiment with the Multics system", 1968): one queue, the main part.

All work on the same queues, so changing from one to another costs nothing. A block that came before anybody read it
(prefetch, readahead) waits in a queue of its own until it is read, and is a newcomer from then on: that it came is no
read. As long as such blocks are an eighth at most, others leave as if they were not there. When there are more, because
there was room for them when they came, what was read just now leaves before them, unless they wait for very long.

INVARIANT: no call walks over more than a few times `MOST_STEPS` blocks.
"""

from __future__ import annotations

import xxhash

from cachefs.block.policies.ghosts import AGE_SHIFT, MARK, PRINT_SHIFT
from cachefs.block.policies.queues import Queues
from cachefs.block.policies.ways import (
    AHEAD,
    AHEAD_PART,
    AWAITED,
    CALM,
    MAIN,
    MOST_STEPS,
    NEWCOMERS,
    READ,
    READS,
    RESERVED,
    SIZE_MASK,
    SIZE_SHIFT,
    SOON,
    STAMP_SHIFT,
    TURNS,
    TWICE,
    Way,
)
from cachefs.types import BlockKey

_STABLE, _RECENT, _LATEST = Way
_NEW_IN_RECENT = NEWCOMERS[_RECENT]
_STAYS = MAIN | TWICE | AHEAD
_find_digest = xxhash.xxh3_64_intdigest


class Segments(Queues):
    """Implements `cachefs.block.ports.EvictionPolicy`; `way` may be changed at any time."""

    __slots__ = ()

    def take(self) -> BlockKey | None:
        """Remove the block that leaves next, and return it."""
        calm = self._calm
        if calm and self._newcomers:
            known, newcomers = self._known, self._newcomers
            key = newcomers[0]
            number = known.get(key, MAIN)
            if not number & _STAYS:
                self._calm = calm - 1
                del known[key]
                newcomers.popleft()
                self._new_size -= number >> SIZE_SHIFT & SIZE_MASK
                ghosts, digest = self._ghosts, _find_digest(key)
                ghosts.count = count = ghosts.count + 1
                ghosts.table[digest & ghosts.mask] = (
                    count << AGE_SHIFT | digest >> PRINT_SHIFT | (MARK if number & READS else 0)
                )
                return key
        leaving = self.victim()
        if leaving is not None:
            self.remove(leaving)
        return leaving

    def victim(self) -> BlockKey | None:
        """Return the block that leaves next; it stays known until `remove`."""
        calm, newcomers = self._calm, self._newcomers
        if calm and newcomers and not self._known.get(newcomers[0], MAIN) & _STAYS:
            self._calm = calm - 1
            self._leaving = newcomers[0]
            return self._leaving
        self._calm = 0
        self._measure()
        if self._ahead_size * AHEAD_PART > self._capacity:
            leaving = self._victim_beside_many()
        else:
            leaving = self._stable_victim() if self.way is _STABLE else self._recent_victim()
        self._leaving = self._oldest_ahead() if leaving is None else leaving
        return self._leaving

    def _victim_beside_many(self) -> BlockKey | None:
        """Return what leaves when much waits for its readers: what was read just now, unless they stay away for long.

        What was brought while there was room for it has a reader to come; what was read had its own.
        """
        ahead = self._oldest_ahead()
        if ahead is not None and self.now - (self._known[ahead] >> STAMP_SHIFT) > AWAITED * len(self._known):
            return ahead
        for _ in range(MOST_STEPS):
            oldest = self._oldest_newcomer()
            if oldest is None:
                break
            if self._known[oldest] & READS < TWICE:
                return oldest
            self._settle_newcomer()
        return ahead

    def _measure(self) -> None:
        """Something has to leave: so this is what a full tier has."""
        held, capacity = self._new_size + self._main_size, self._capacity
        if held != capacity:
            self._capacity = max(held, capacity + (held - capacity) // 1024)
            self._nearly_full = -(-self._capacity * 9 // 10)
        if self._reserve or self._ahead_size:
            turns = min(RESERVED, 2 * len(self._known) + 1)  # a small tier sees few blocks leave in an epoch
            self._reserve = max(self._ahead_size, self._reserve - -(-self._reserve // turns))
        self._ghosts.fit(len(self._known))

    def admits(self, key: BlockKey) -> bool:
        """Whether a block would be kept for longer than a moment if it were added now."""
        if not self.is_full or self.way is not _STABLE:
            return True
        head = self._turn(TURNS)
        if head is None or self.now - (self._known[head] >> STAMP_SHIFT) > self.patience:
            return True
        oldest = self._oldest_newcomer()
        if self._has_room(self._known[head if oldest is None else oldest]):
            return True
        found = self._ghosts.find(xxhash.xxh3_64_intdigest(key))
        short = found is not None and found[0] * SOON < len(self._known)
        if found is not None and short and found[1]:
            return True
        self._ghosts.add(key, short)
        return False

    def _stable_victim(self) -> BlockKey | None:
        head = self._turn(TURNS)
        calm = 0
        if head is not None:
            number = self._known[head]
            if self.now - (number >> STAMP_SHIFT) > self.patience:
                return head
            if not number & READS:
                if self._main_size * 100 > (self._capacity - self._reserve) * 99:
                    return head
                calm = CALM
        for _ in range(MOST_STEPS):
            oldest = self._oldest_newcomer()
            if oldest is None:
                break
            number = self._known[oldest]
            if not self._has_room(number):
                if number & READS < TWICE:
                    self._calm = calm
                    return oldest
                self._settle_newcomer()
                return head or oldest
            self._settle_newcomer()
        return self._oldest_newcomer() or head or self._turn(0)

    def _recent_victim(self) -> BlockKey | None:
        if self.way is _LATEST and not self._newcomers:
            return self._turn(MOST_STEPS)
        part, least = (_NEW_IN_RECENT, TWICE) if self.way is _RECENT else (self._capacity + 1, READ)
        for _ in range(MOST_STEPS):
            if (self._new_size - self._ahead_size) * part <= self._capacity and self._main_size:
                break
            oldest = self._oldest_newcomer()
            if oldest is None:
                break
            if self._known[oldest] & READS < least:
                self._calm = min(CALM, len(self._newcomers) // 8)  # (their share hardly changes meanwhile)
                return oldest
            self._settle_newcomer()
        return self._turn(MOST_STEPS) or self._oldest_newcomer()

    def _turn(self, turns: int) -> BlockKey | None:
        """Return the head of the main part after giving another round to blocks that were read, `turns` at the most.

        A block of a stable part that is out of patience gets none: it would get behind those that came in its place.
        """
        main, known, way = self._main, self._known, self.way
        expired = self.now - self.patience if way is _STABLE else -1
        while main:
            key = main[0]
            number = known.get(key, 0)
            if not number & MAIN:
                main.popleft()
            elif turns > 0 and number & READS and number >> STAMP_SHIFT >= expired:
                main.rotate(-1)
                known[key] = number - READ if way is _RECENT else number & ~READS
                turns -= 1
            else:
                return key
        return None

    def _has_room(self, number: int) -> bool:
        """Whether the main part has room for a block without getting above its share.

        What newcomers earn by being read may bring it to 99 of 100: between the two nothing is exchanged, or each
        block that is a little larger than another would push one out.
        """
        return (self._main_size + (number >> SIZE_SHIFT & SIZE_MASK)) * 50 <= (self._capacity - self._reserve) * 49

    def pinned_victim(self) -> None:
        """`victim` takes all."""

    @property
    def is_stable(self) -> bool:
        """Whether it is full and keeps what it has."""
        return self.way is _STABLE and self.is_full
