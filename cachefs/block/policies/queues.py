"""The queues of the policies `s3fifo` and `epoch`: newcomers, the main part, and what waits for its reader.

What happens to blocks is written down here; which of them leaves is decided in `cachefs.block.policies.segments`.

What is kept of a block is one whole number (`ways`) in a dict and a place in a queue: 140 bytes with its key for a
million blocks. Keys that were removed out of turn stay in their queue until it comes to them.

INVARIANTS: `_ahead`, `_newcomers` and `_main` contain every key of `_known` in the queue that its number says;
`_ahead_size`, `_new_size` and `_main_size` are the sums of the sizes there. No call here walks over more than a few
blocks, but for the rare cleaning of the queues. Not safe for several threads (`in` alone is).
"""

from __future__ import annotations

from collections import deque
from itertools import chain

import xxhash

from cachefs.block.policies.ghosts import AGE_SHIFT, MARK, PRINT, PRINT_SHIFT, Ghosts
from cachefs.block.policies.ways import (
    AHEAD,
    APART,
    LOW,
    MAIN,
    NEWCOMERS,
    READ,
    READ_MOST,
    READS,
    SAMPLED,
    SIZE_MASK,
    SIZE_SHIFT,
    SOON,
    STAMP_SHIFT,
    UNIT_SHIFT,
    Way,
)
from cachefs.types import BlockKey

_STABLE, _RECENT, _LATEST = Way
_NEW_IN_STABLE, _NEW_IN_RECENT = NEWCOMERS[_STABLE], NEWCOMERS[_RECENT]
_EITHER = MAIN | AHEAD
_find_digest = xxhash.xxh3_64_intdigest


class Queues:
    """All but the choice of what leaves. Not safe for several threads (`in` alone is)."""

    __slots__ = (
        "_ahead", "_ahead_size", "_apart", "_calm", "_capacity", "_ghosts", "_known", "_leaving", "_main", "_main_size",
        "_mask", "_nearly_full", "_new_size", "_newcomers", "_reserve", "now", "patience", "way",
    )  # fmt: skip

    def __init__(self, way: Way, *, apart: int = APART) -> None:
        """`apart`: see `APART`."""
        self.way = way
        self.now = 0
        """How many reads there were: the only clock here."""
        self.patience = 1 << 62
        """For how long a block of a stable part may stay unread, in reads of any block."""
        self._apart = apart
        self._mask = -1
        """Blocks that come are of the sample when their hash has no bit of these."""
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

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier because it was read: a newcomer, or of the main part if it was here lately."""
        self.now += 1
        digest, flags = _find_digest(key), 0
        if not digest & self._mask:
            self._watch_new(key)
            flags = SAMPLED
        units = (size >> UNIT_SHIFT) + 1
        if units > SIZE_MASK:
            units = SIZE_MASK
        known, way = self._known, self.way
        if key in known:
            self._forget(known.pop(key))
        new_size = self._new_size
        if new_size + self._main_size >= self._nearly_full:
            ghosts = self._ghosts
            ghost = ghosts.table[digest & ghosts.mask]
            if ghost & PRINT == digest >> PRINT_SHIFT:  # a block that comes back soon was read that often
                age = ghosts.count - (ghost >> AGE_SHIFT)
                if way is not _STABLE:
                    if age < len(known):
                        flags |= MAIN
                elif age * SOON < len(known):
                    flags |= MAIN if ghost & MARK else READ
        elif new_size * (_NEW_IN_RECENT if way is _RECENT else _NEW_IN_STABLE) > new_size + self._main_size:
            self._settle_newcomer()
            new_size = self._new_size
        if way is _LATEST:
            flags |= MAIN
        known[key] = self.now << STAMP_SHIFT | units << SIZE_SHIFT | flags
        if flags & MAIN:
            self._main.append(key)
            self._main_size += units
        else:
            self._newcomers.append(key)
            self._new_size = new_size + units

    def bring(self, key: BlockKey, size: int) -> None:
        """A block entered the tier before anybody reads it: it is a newcomer until then, and does not leave as one."""
        known, units = self._known, min((size >> UNIT_SHIFT) + 1, SIZE_MASK)
        if key in known:
            self._forget(known.pop(key))
        if not self.is_full and self._new_size * NEWCOMERS[self.way] > self._new_size + self._main_size:
            self._settle_newcomer()
        flags = AHEAD | SAMPLED | (MAIN if self.way is _LATEST else 0)
        known[key] = self.now << STAMP_SHIFT | units << SIZE_SHIFT | flags
        if flags & MAIN:
            self._main.append(key)
            self._main_size += units
        else:
            self._ahead.append(key)
            self._new_size += units
            self._ahead_size += units

    def adopt(self, key: BlockKey, size: int) -> None:
        """A block was in the tier before this process began: it belongs to the main part."""
        if key not in self._known:
            units = min((size >> UNIT_SHIFT) + 1, SIZE_MASK)
            self._known[key] = self.now << STAMP_SHIFT | units << SIZE_SHIFT | SAMPLED | MAIN
            self._main.append(key)
            self._main_size += units

    def touch(self, key: BlockKey) -> None:
        """A block was read."""
        self.now = now = self.now + 1
        known = self._known
        number = known.get(key)
        if number is None:
            self._read_elsewhere(key)
            return
        if number & SAMPLED:
            number = self._watch(key, number)
        if number & AHEAD:
            if not number & MAIN:
                self._ahead_size -= number >> SIZE_SHIFT & SIZE_MASK
                self._newcomers.append(key)
            known[key] = now << STAMP_SHIFT | number & LOW & ~AHEAD
        elif now - (number >> STAMP_SHIFT) > self._apart:
            low = number & LOW
            known[key] = now << STAMP_SHIFT | (low if low & READS == READ_MOST else low + READ)

    def _watch_new(self, key: BlockKey) -> None:
        """A block of the sample is read, and comes."""

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
            if number & _EITHER:
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

    @property
    def is_full(self) -> bool:
        """Whether something has to leave for each block that comes, as far as is known."""
        return self._new_size + self._main_size >= self._nearly_full

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
