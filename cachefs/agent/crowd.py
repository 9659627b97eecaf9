"""Which objects belong to a job, in two bytes for each: a Bloom filter (B. H. Bloom, "Space/time trade-offs in hash
coding with allowable errors", CACM 1970).

While a warm-up runs, what it brings must not leave for what it brings next, and a policy that keeps a stable part of an
old dataset must not refuse it. With 16 bits and four hashes one object in 400 that does not belong to the job is
taken for one that does, and stays as long as the job runs: that costs nobody anything.
"""

from __future__ import annotations

import struct

from cachefs.types import ObjectId

BITS = 16
_HALVES = struct.Struct("<4I")


class Crowd:
    """A set of objects that may only grow. Any thread may ask while one adds."""

    __slots__ = ("_bits", "_mask")

    def __init__(self, expected: int) -> None:
        """`expected`: how many objects there will be."""
        size = 1 << max(10, (max(1, expected) * BITS - 1).bit_length() - 3)
        self._bits = bytearray(size)
        self._mask = size * 8 - 1

    def add(self, oid: ObjectId) -> None:
        """Add an object."""
        for number in _HALVES.unpack(oid):  # parts of a hash are hashes
            at = number & self._mask
            self._bits[at >> 3] |= 1 << (at & 7)

    def __contains__(self, oid: ObjectId) -> bool:
        bits, mask = self._bits, self._mask
        for number in _HALVES.unpack(oid):
            at = number & mask
            if not bits[at >> 3] >> (at & 7) & 1:
                return False
        return True
