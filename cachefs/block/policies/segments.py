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

What is kept of a block is one whole number (`ways`) in a dict and a place in a queue: 140 bytes with its key for a
million blocks. Keys that were removed out of turn stay in their queue until it comes to them.

INVARIANTS: `_ahead`, `_newcomers` and `_main` contain every key of `_known` in the queue that its number says;
`_ahead_size`, `_new_size` and `_main_size` are the sums of the sizes there. No call walks over more than a few times
`MOST_STEPS` blocks, but for the rare cleaning of the queues. Not safe for several threads (`in` alone is).
"""

from __future__ import annotations

from collections import deque
from itertools import chain

import xxhash

from cachefs.block.policies.ghosts import AGE_SHIFT, MARK, NO_DIGEST, PRINT, PRINT_SHIFT, Ghosts
from cachefs.block.policies.ways import (
    AHEAD,
    AHEAD_PART,
    APART,
    AWAITED,
    CALM,
    LOW,
    MAIN,
    MOST_STEPS,
    NEWCOMERS,
    READ,
    READ_MOST,
    READS,
    SAMPLED,
    SIZE_MASK,
    SIZE_SHIFT,
    SOON,
    STAMP_SHIFT,
    TURNS,
    TWICE,
    UNIT_SHIFT,
    Way,
)  # fmt: skip
from cachefs.types import BlockKey

_STABLE, _RECENT, _LATEST = Way


class Segments:
    """Implements `cachefs.block.ports.EvictionPolicy`; `way` may be changed at any time."""

    __slots__ = (
        "_ahead", "_ahead_size", "_apart", "_calm", "_capacity", "_ghosts", "_known", "_leaving", "_main", "_main_size",
        "_nearly_full", "_new_size", "_newcomers", "_reserve", "now", "patience", "way",
    )  # fmt: skip

    def __init__(self, way: Way, *, apart: int = APART) -> None:
        """`apart`: see `APART`."""
        self.way = way
        self.now = 0
        """How many reads there were: the only clock here."""
        self.patience = 1 << 62
        """For how long a block of a stable part may stay unread, in reads of any block."""
        self._apart = apart
        self._known: dict[BlockKey, int] = {}
        self._ahead: deque[BlockKey] = deque()
        self._newcomers: deque[BlockKey] = deque()
        self._main: deque[BlockKey] = deque()
        self._new_size = 0
        self._main_size = 0
        self._ahead_size = 0
        """Of what nobody has read yet; it counts to `_new_size` as well."""
        self._reserve = 0
        """What the main part leaves to them: the most that there were lately, or it would be exchanged for them."""
        self._capacity = 0
        """How much there is in a full tier; 0 as long as that is not known."""
        self._nearly_full = 1 << 62  # nine tenths of that
        self._calm = 0  # for so many more that leave, only the oldest newcomer needs to be looked at
        self._leaving: BlockKey | None = None
        self._ghosts = Ghosts()

    # -- what happens to blocks ----------------------------------------------------------------------------------------

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier because it was read: a newcomer, or of the main part if it was here lately."""
        self.now += 1
        self._insert(key, size, 0, xxhash.xxh3_64_intdigest(key))

    def bring(self, key: BlockKey, size: int) -> None:
        """A block entered the tier before anybody reads it: it is a newcomer until then, and does not leave as one."""
        self._insert(key, size, AHEAD | SAMPLED, NO_DIGEST)

    def _insert(self, key: BlockKey, size: int, flags: int, digest: int) -> None:
        """`digest`: the hash of the key, to find its ghost: a block that comes back soon was read that often."""
        units = (size >> UNIT_SHIFT) + 1
        if units > SIZE_MASK:
            units = SIZE_MASK
        known, way = self._known, self.way
        if key in known:
            self._forget(known.pop(key))
        number = self.now << STAMP_SHIFT | units << SIZE_SHIFT | flags
        if self._new_size + self._main_size >= self._nearly_full:
            ghosts = self._ghosts
            ghost = ghosts.table[digest & ghosts.mask]
            if ghost & PRINT == digest >> PRINT_SHIFT:  # (that of a block which is brought is never found)
                age = ghosts.count - (ghost >> AGE_SHIFT)
                if way is not _STABLE:
                    if age < len(known):
                        number |= MAIN
                elif age * SOON < len(known):
                    number |= MAIN if ghost & MARK else READ
        elif self._new_size * NEWCOMERS[way] > self._new_size + self._main_size:
            self._settle_newcomer()
        if way is _LATEST:
            number |= MAIN
        known[key] = number
        if number & MAIN:
            self._main.append(key)
            self._main_size += units
        elif flags & AHEAD:
            self._ahead.append(key)
            self._new_size += units
            self._ahead_size += units
        else:
            self._newcomers.append(key)
            self._new_size += units

    def adopt(self, key: BlockKey, size: int) -> None:
        """A block was in the tier before this process began: it belongs to the main part."""
        if key not in self._known:
            units = min((size >> UNIT_SHIFT) + 1, SIZE_MASK)
            self._known[key] = self.now << STAMP_SHIFT | units << SIZE_SHIFT | SAMPLED | MAIN
            self._main.append(key)
            self._main_size += units

    def touch(self, key: BlockKey) -> None:
        """A block was read."""
        self.now += 1
        number = self._known.get(key)
        if number is None:
            self._read_elsewhere(key)
            return
        if number & SAMPLED:
            number = self._watch(key, number)
        if number & AHEAD:
            if not number & MAIN:
                self._ahead_size -= number >> SIZE_SHIFT & SIZE_MASK
                self._newcomers.append(key)
            self._known[key] = self.now << STAMP_SHIFT | number & LOW & ~AHEAD
        elif self.now - (number >> STAMP_SHIFT) > self._apart:
            low = number & LOW
            self._known[key] = self.now << STAMP_SHIFT | (low if low & READS == READ_MOST else low + READ)

    def _watch(self, key: BlockKey, number: int) -> int:
        """A block that may be of the sample is read; returns its number, without the flag if it is not."""
        return number & ~SAMPLED

    def _read_elsewhere(self, key: BlockKey) -> None:
        """A block is read that is not here."""

    def remove(self, key: BlockKey) -> None:
        """A block left the tier."""
        number = self._known.pop(key, None)
        if number is None:
            return
        if key == self._leaving:
            self._leaving = None
            if number & (MAIN | AHEAD):
                self._forget(number)
                queue = self._main if number & MAIN else self._ahead
            else:
                self._new_size -= number >> SIZE_SHIFT & SIZE_MASK
                queue = self._newcomers
            if queue and queue[0] == key:
                queue.popleft()
            if not number & MAIN:
                self._ghosts.add(key, number & READS != 0)
            return
        self._forget(number)
        if len(self._ahead) + len(self._newcomers) + len(self._main) > 2 * len(self._known) + 1024:
            self._clean()

    def victim(self) -> BlockKey | None:
        """Return the block that leaves next; it stays known until `remove`."""
        if self._calm:
            self._calm -= 1
            newcomers = self._newcomers
            if newcomers and not self._known.get(newcomers[0], MAIN) & (MAIN | TWICE | AHEAD):
                self._leaving = key = newcomers[0]
                return key
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
            self._reserve = max(self._ahead_size, self._reserve - (self._reserve >> 12))
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

    @property
    def is_full(self) -> bool:
        """Whether something has to leave for each block that comes, as far as is known."""
        return self._new_size + self._main_size >= self._nearly_full

    # -- the ways ------------------------------------------------------------------------------------------------------

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
        part, least = (NEWCOMERS[_RECENT], TWICE) if self.way is _RECENT else (self._capacity + 1, READ)
        for _ in range(MOST_STEPS):
            if (self._new_size - self._ahead_size) * part <= self._capacity and self._main_size:
                break
            oldest = self._oldest_newcomer()
            if oldest is None:
                break
            if self._known[oldest] & READS < least:
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

    def _oldest_newcomer(self) -> BlockKey | None:
        """Return the newcomer that was read first."""
        newcomers, known = self._newcomers, self._known
        while newcomers:
            if not known.get(newcomers[0], MAIN) & (MAIN | AHEAD):
                return newcomers[0]
            newcomers.popleft()
        return None

    def _oldest_ahead(self) -> BlockKey | None:
        """Return the block that waits for its reader for the longest time."""
        ahead, known = self._ahead, self._known
        while ahead:
            if known.get(ahead[0], MAIN) & (MAIN | AHEAD) == AHEAD:
                return ahead[0]
            ahead.popleft()
        return None

    def _has_room(self, number: int) -> bool:
        """Whether the main part has room for a block without getting above its share.

        What newcomers earn by being read may bring it to 99 of 100: between the two nothing is exchanged, or each
        block that is a little larger than another would push one out.
        """
        return (self._main_size + (number >> SIZE_SHIFT & SIZE_MASK)) * 50 <= (self._capacity - self._reserve) * 49

    def _settle_newcomer(self) -> None:
        """Move the oldest newcomer to the main part."""
        key = self._oldest_newcomer()
        if key is not None:
            self._newcomers.popleft()
            number = self._known[key]
            self._known[key] = number & ~READS | MAIN
            self._main.append(key)
            units = number >> SIZE_SHIFT & SIZE_MASK
            self._new_size -= units
            self._main_size += units

    # -- book-keeping --------------------------------------------------------------------------------------------------

    def _forget(self, number: int) -> None:
        units = number >> SIZE_SHIFT & SIZE_MASK
        if number & MAIN:
            self._main_size -= units
        else:
            self._new_size -= units
            if number & AHEAD:
                self._ahead_size -= units

    def _clean(self) -> None:
        """Take what was removed out of turn out of the queues."""
        known = self._known
        ahead = dict.fromkeys(key for key in self._ahead if known.get(key, MAIN) & (MAIN | AHEAD) == AHEAD)
        newcomers = dict.fromkeys(key for key in self._newcomers if not known.get(key, MAIN) & (MAIN | AHEAD))
        main = dict.fromkeys(key for key in self._main if known.get(key, 0) & MAIN)
        self._ahead, self._newcomers, self._main = deque(ahead), deque(newcomers), deque(main)

    def pinned_victim(self) -> None:
        """`victim` takes all."""

    @property
    def is_stable(self) -> bool:
        """Whether it is full and keeps what it has."""
        return self.way is _STABLE and self.is_full

    def size_of(self, key: BlockKey) -> int:
        """Return about how many bytes a block has; 0 when it is not known."""
        return (self._known.get(key, 0) >> SIZE_SHIFT & SIZE_MASK) << UNIT_SHIFT

    def oldest_first(self) -> list[BlockKey]:
        """Return all keys, roughly in the order in which they would leave."""
        self._clean()
        return list(chain(self._newcomers, self._main, self._ahead))

    def __contains__(self, key: object) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)
