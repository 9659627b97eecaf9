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
read, and it does not leave before others as long as such blocks are no more than a tenth.

What is kept of a block is one whole number (last read, size, reads, queue) in a dict and a place in a queue: 140 bytes
with its key for a million blocks. Keys that were removed out of turn stay in their queue until it comes to them.

INVARIANTS: `_ahead`, `_newcomers` and `_main` contain every key of `_known` in the queue that its number says;
`_ahead_size`, `_new_size` and `_main_size` are the sums of the sizes there. No call walks over more than a few times
`MOST_STEPS` blocks, but for the rare cleaning of the queues. Not safe for several threads (`in` alone is).
"""

from __future__ import annotations

import enum
from collections import deque
from itertools import chain

import xxhash

from cachefs.block.policies.ghosts import PRINT, PRINT_SHIFT, Ghosts
from cachefs.types import BlockKey

MAIN = 1
READ, READ_MOST, READS = 1 << 1, 3 << 1, 3 << 1
AHEAD = 1 << 3
SIZE_SHIFT, STAMP_SHIFT = 4, 24
SIZE_MASK = (1 << STAMP_SHIFT - SIZE_SHIFT) - 1
LOW = (1 << STAMP_SHIFT) - 1
UNIT_SHIFT = 6
"""Sizes are kept in units of 64 bytes."""
MOST_STEPS = 128
TURNS = 8
"""How many blocks of the main part get another round for each block that leaves a stable tier."""
APART = 32
"""Reads of a block with fewer reads of others between them are one read: a block is read in several requests."""
TWICE = 2 << 1
AHEAD_PART = 10
"""One part of so many of a tier may be blocks that came before their reader."""


class Way(enum.Enum):
    """How the queues are run."""

    STABLE = enum.auto()
    RECENT = enum.auto()
    LATEST = enum.auto()


NEWCOMERS = {Way.STABLE: 50, Way.RECENT: 10, Way.LATEST: 50}
"""One part of so many is for newcomers."""


class Segments:
    """Implements `cachefs.block.ports.EvictionPolicy`; `way` may be changed at any time."""

    __slots__ = (
        "_ahead", "_ahead_size", "_apart", "_capacity", "_ghosts", "_known", "_leaving", "_main", "_main_size",
        "_new_size", "_newcomers", "_reserve", "now", "patience", "way",
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
        self._leaving: BlockKey | None = None
        self._ghosts = Ghosts()

    # -- what happens to blocks ----------------------------------------------------------------------------------------

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier because it was read: a newcomer, or of the main part if it was here lately."""
        self.now += 1
        self._insert(key, size, 0, xxhash.xxh3_64_intdigest(key))

    def bring(self, key: BlockKey, size: int) -> None:
        """A block entered the tier before anybody reads it: it is a newcomer until then, and does not leave as one."""
        self._insert(key, size, AHEAD, 0)

    def _insert(self, key: BlockKey, size: int, flags: int, digest: int) -> None:
        """`digest`: the hash of the key, to find its ghost; 0: none is looked for."""
        units = (size >> UNIT_SHIFT) + 1
        if units > SIZE_MASK:
            units = SIZE_MASK
        if key in self._known:
            self._forget(self._known.pop(key))
        number = self.now << STAMP_SHIFT | units << SIZE_SHIFT | flags
        held = self._new_size + self._main_size
        if self._capacity and held * 10 >= self._capacity * 9:
            ghosts = self._ghosts
            if digest and ghosts.table[digest & ghosts.mask] & PRINT == digest >> PRINT_SHIFT:
                number |= self._returns(digest)
        elif self._new_size * NEWCOMERS[self.way] > held:
            self._settle_newcomer()
        if self.way is Way.LATEST:
            number |= MAIN
        self._known[key] = number
        if number & MAIN:
            self._main.append(key)
            self._main_size += units
        else:
            (self._ahead if flags else self._newcomers).append(key)
            self._new_size += units
            if flags:
                self._ahead_size += units

    def adopt(self, key: BlockKey, size: int) -> None:
        """A block was in the tier before this process began: it belongs to the main part."""
        if key not in self._known:
            units = min((size >> UNIT_SHIFT) + 1, SIZE_MASK)
            self._known[key] = self.now << STAMP_SHIFT | units << SIZE_SHIFT | MAIN
            self._main.append(key)
            self._main_size += units

    def touch(self, key: BlockKey) -> None:
        """A block was read."""
        self.now += 1
        number = self._known.get(key)
        if number is None:
            return
        if number & AHEAD:
            if not number & MAIN:
                self._ahead_size -= number >> SIZE_SHIFT & SIZE_MASK
                self._newcomers.append(key)
            self._known[key] = self.now << STAMP_SHIFT | number & LOW & ~AHEAD
        elif self.now - (number >> STAMP_SHIFT) > self._apart:
            low = number & LOW
            self._known[key] = self.now << STAMP_SHIFT | (low if low & READS == READ_MOST else low + READ)

    def remove(self, key: BlockKey) -> None:
        """A block left the tier."""
        number = self._known.pop(key, None)
        if number is None:
            return
        self._forget(number)
        if key == self._leaving:
            self._leaving = None
            queue = self._main if number & MAIN else self._ahead if number & AHEAD else self._newcomers
            if queue and queue[0] == key:
                queue.popleft()
            if not number & MAIN:
                self._ghosts.add(key, number & READS != 0, len(self._known))
        elif len(self._ahead) + len(self._newcomers) + len(self._main) > 2 * len(self._known) + 1024:
            self._clean()

    def victim(self) -> BlockKey | None:
        """Return the block that leaves next; it stays known until `remove`."""
        held = self._new_size + self._main_size
        if held != self._capacity:
            self._capacity = max(held, self._capacity + (held - self._capacity) // 1024)
        if self._reserve or self._ahead_size:
            self._reserve = max(self._ahead_size, self._reserve - (self._reserve >> 12))
        if self._ahead_size * AHEAD_PART > self._capacity:
            self._leaving = self._oldest_ahead()
        elif self.way is not Way.STABLE:
            self._leaving = self._recent_victim()
        elif self._newcomers and self._is_usual():
            self._leaving = self._newcomers[0]
        else:
            self._leaving = self._stable_victim()
        if self._leaving is None:
            self._leaving = self._oldest_ahead()
        return self._leaving

    def _is_usual(self) -> bool:
        """Whether the oldest newcomer leaves a stable tier: nearly always, and so this is asked first, and is short."""
        known, main = self._known, self._main
        oldest = known.get(self._newcomers[0], MAIN)
        head = known.get(main[0], 0) if main else 0
        return (
            not oldest & (MAIN | TWICE | AHEAD)
            and head & (MAIN | READS) == MAIN
            and self.now - (head >> STAMP_SHIFT) <= self.patience
            and (self._main_size + (oldest >> SIZE_SHIFT & SIZE_MASK)) * 50 > (self._capacity - self._reserve) * 49
            and self._main_size * 100 <= (self._capacity - self._reserve) * 99
        )

    def admits(self, key: BlockKey) -> bool:
        """Whether a block would be kept for longer than a moment if it were added now."""
        if not self.is_full or self.way is not Way.STABLE:
            return True
        head = self._turn(TURNS)
        if head is None or self.now - (self._known[head] >> STAMP_SHIFT) > self.patience:
            return True
        oldest = self._oldest_newcomer()
        if self._has_room(self._known[head if oldest is None else oldest]):
            return True
        found = self._ghosts.find(xxhash.xxh3_64_intdigest(key))
        short = found is not None and self._is_short(found[0])
        if found is not None and short and found[1]:
            return True
        self._ghosts.add(key, short, len(self._known))
        return False

    @property
    def is_full(self) -> bool:
        """Whether something has to leave for each block that comes, as far as is known."""
        return self._capacity != 0 and (self._new_size + self._main_size) * 10 >= self._capacity * 9

    # -- the two ways --------------------------------------------------------------------------------------------------

    def _stable_victim(self) -> BlockKey | None:
        head = self._turn(TURNS)
        if head is not None:
            number = self._known[head]
            over = not number & READS and self._main_size * 100 > (self._capacity - self._reserve) * 99
            if over or self.now - (number >> STAMP_SHIFT) > self.patience:
                return head
        for _ in range(MOST_STEPS):
            oldest = self._oldest_newcomer()
            if oldest is None:
                break
            if not self._has_room(self._known[oldest]):
                if self._known[oldest] & READS < TWICE:
                    return oldest
                self._settle_newcomer()
                return head or oldest
            self._settle_newcomer()
        return self._oldest_newcomer() or head or self._turn(0)

    def _recent_victim(self) -> BlockKey | None:
        part, least = (NEWCOMERS[Way.RECENT], TWICE) if self.way is Way.RECENT else (self._capacity + 1, READ)
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
        main, known = self._main, self._known
        stable, recent = self.way is Way.STABLE, self.way is Way.RECENT
        while main:
            key = main[0]
            number = known.get(key)
            if number is None or not number & MAIN:
                main.popleft()
            elif turns > 0 and number & READS and not (stable and self.now - (number >> STAMP_SHIFT) > self.patience):
                main.rotate(-1)
                known[key] = number - READ if recent else number & ~READS
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
            self._forget(number)
            self._known[key] = number & ~READS | MAIN
            self._main.append(key)
            self._main_size += number >> SIZE_SHIFT & SIZE_MASK

    def _returns(self, digest: int) -> int:
        """Return what is known of a block that comes back to a full tier: to which queue, and read how often."""
        found = self._ghosts.find(digest)
        if found is None:
            return 0
        age, marked = found
        if self.way is not Way.STABLE:
            return MAIN if age < len(self._known) else 0
        if not self._is_short(age):
            return 0
        return MAIN if marked else READ

    def _is_short(self, age: int) -> bool:
        """Whether a newcomer that left so long ago came back soon, for a stable tier."""
        return age * 8 < len(self._known)

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

    def pinned_victim(self) -> BlockKey | None:
        """Return None: `victim` takes all."""
        return None

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


class S3FifoPolicy(Segments):
    """S3-FIFO. Implements `cachefs.block.ports.EvictionPolicy`."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Way.RECENT)
