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
MARK = 1 << _PRINT_BITS
AGE_SHIFT = _PRINT_BITS + 1


class Ghosts:
    """Remembers blocks by the order in which they left. Not safe for several threads."""

    __slots__ = ("count", "mask", "table")

    def __init__(self) -> None:
        self.table = array("Q", bytes(8 * LEAST_SLOTS))
        self.mask = LEAST_SLOTS - 1
        self.count = 0
        """How many blocks have left."""

    def fit(self, blocks: int) -> None:
        """The tier holds so many blocks."""
        if blocks * SLOTS_PER_BLOCK > self.mask < MOST_SLOTS - 1:
            self._grow(blocks)

    def add(self, key: BlockKey, marked: bool) -> None:
        """A block left the tier."""
        self.count = count = self.count + 1
        digest = xxhash.xxh3_64_intdigest(key)
        self.table[digest & self.mask] = count << AGE_SHIFT | digest >> PRINT_SHIFT | (MARK if marked else 0)

    def find(self, digest: int) -> tuple[int, bool] | None:
        """Return how many others have left since a block did, and whether it was marked; None: nothing is known."""
        value = self.table[digest & self.mask]
        if value & PRINT != digest >> PRINT_SHIFT or not value:
            return None
        return self.count - (value >> AGE_SHIFT), bool(value & MARK)

    def _grow(self, blocks: int) -> None:
        """Begin anew with more slots: where the old ghosts would lie is not known any more."""
        slots = min(MOST_SLOTS, 1 << (blocks * SLOTS_PER_BLOCK).bit_length())
        self.table = array("Q", bytes(8 * slots))
        self.mask = slots - 1
