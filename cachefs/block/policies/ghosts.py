"""Which blocks left a tier lately: a table of fingerprints, so that it stays small at ten million blocks.

Direct-mapped, 8 bytes for each slot, four slots for each block that the tier holds and never more than `MOST_SLOTS`: a
ghost that lies where another one has to go is forgotten, and one of 65,536 look-ups of a block that was never here
finds somebody else's. Both cost a guess that is not as good as it could be, and nothing else.
"""

from __future__ import annotations

from array import array

import xxhash

from cachefs.types import BlockKey

LEAST_SLOTS = 1 << 10
MOST_SLOTS = 1 << 23
"""64 MiB."""
SLOTS_PER_BLOCK = 4
_PRINT_BITS = 16
PRINT = (1 << _PRINT_BITS) - 1
PRINT_SHIFT = 64 - _PRINT_BITS
_MARK = 1 << _PRINT_BITS
_AGE_SHIFT = _PRINT_BITS + 1


class Ghosts:
    """Remembers blocks by the order in which they left. Not safe for several threads."""

    __slots__ = ("_count", "mask", "table")

    def __init__(self) -> None:
        self.table = array("Q", bytes(8 * LEAST_SLOTS))
        self.mask = LEAST_SLOTS - 1
        self._count = 0

    def add(self, key: BlockKey, marked: bool, blocks: int) -> None:
        """A block left a tier that holds so many others."""
        if blocks * SLOTS_PER_BLOCK > self.mask < MOST_SLOTS - 1:
            self._grow(blocks)
        self._count += 1
        digest = xxhash.xxh3_64_intdigest(key)
        mark = _MARK if marked else 0
        self.table[digest & self.mask] = self._count << _AGE_SHIFT | mark | digest >> PRINT_SHIFT

    def find(self, digest: int) -> tuple[int, bool] | None:
        """Return how many others have left since a block did, and whether it was marked; None: nothing is known."""
        value = self.table[digest & self.mask]
        if value & PRINT != digest >> PRINT_SHIFT or not value:
            return None
        return self._count - (value >> _AGE_SHIFT), bool(value & _MARK)

    def _grow(self, blocks: int) -> None:
        """Begin anew with more slots: where the old ghosts would lie is not known any more."""
        slots = min(MOST_SLOTS, 1 << (blocks * SLOTS_PER_BLOCK).bit_length())
        self.table = array("Q", bytes(8 * slots))
        self.mask = slots - 1
