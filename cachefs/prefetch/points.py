"""Point reads: a few pages here and there of a large file, for which whole blocks would be fetched in vain.

A READ that no tier can answer is a *point* when it is small against a block and lies apart from what was read before
(`ReadWindow.apart`), in a file of several blocks, neither in its first block nor near its end: headers, footers and
indexes are there, of which more is read (unless `PROVEN` points of the file were read: then these are points like
others). The first one counts already: a reader who goes on from it in order
is not apart any more, and gets whole blocks from his second read on.

From a block of which much was read in points (`SHARE` of its bytes, or `READS` of them) the next one fetches all: it
has paid for the block, and will go on.

INVARIANT: at most `BLOCKS` blocks and `FILES` files are remembered; the oldest go first, and begin anew.
"""

from __future__ import annotations

from collections import OrderedDict

from cachefs.types import Ino

MIB = 1 << 20
LEAST_FILE = 8 * MIB
LEAST_BLOCKS = 8
"""Smaller files are fetched in blocks: most of their blocks are wanted soon."""
TAIL = MIB
SMALL = 4
"""A read of at most a block's so-many-th part is small."""
SHARE = 4
READS = 16
"""With 2,000 random reads of 4 KiB in 1 GiB, and 70,000 in 10 GiB, next to no block sees so many."""
PROVEN = 8
FILES = 4096
"""Files whose points are counted."""
BLOCKS = 1 << 15
"""About 5 MiB of memory."""


class Points:
    """The point reads of one mount. Used by one thread."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._read: OrderedDict[tuple[Ino, int], tuple[int, int]] = OrderedDict()
        """Of blocks: how many bytes, in how many reads."""
        self._files: OrderedDict[Ino, int] = OrderedDict()
        """How many points of a file were read."""

    def may_be(self, ino: Ino, start: int, end: int, file_size: int) -> bool:
        """Whether a read has the size and the place of a point."""
        block = self._block_size
        if not is_small(end - start, block) or file_size < max(LEAST_FILE, LEAST_BLOCKS * block):
            return False
        if self._files.get(ino, 0) >= PROVEN:
            return start > 0
        return start >= block and start < file_size - max(TAIL, file_size % block)

    def take(self, ino: Ino, start: int, end: int) -> bool:
        """Take note of a point that is about to be fetched. Returns False when its blocks are worth being fetched."""
        block = self._block_size
        for index in range(start // block, (end - 1) // block + 1):
            size, reads = self._read.pop((ino, index), (0, 0))
            part = min(end, (index + 1) * block) - max(start, index * block)
            if (size + part) * SHARE > block or reads >= READS:
                return False
            self._read[ino, index] = size + part, reads + 1
        self._files[ino] = self._files.pop(ino, 0) + 1
        if len(self._files) > FILES:
            self._files.popitem(last=False)
        while len(self._read) > BLOCKS:
            self._read.popitem(last=False)
        return True


def is_small(size: int, block_size: int) -> bool:
    """Whether a read is small against a block."""
    return size * SMALL <= block_size
