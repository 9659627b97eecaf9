"""In-file readahead: what to ask for while a file is read in sequence. Pure arithmetic, one small object per inode.

The kernel's reads of a sequential reader reach us slightly out of order (its own readahead sends several requests
at once) and with gaps (pages that it has already). So a read belongs to a known sequence when it begins near the
furthest byte read so far, at most `SLACK` behind or ahead of it. That furthest byte is the reader's position; what
has been asked for ends at the frontier.

A sequential reader asks for what lies between the frontier and one window past its position whenever it has used up a
part of the object (8 MiB), or half of a window that is small: requests stay large, and a store that is far away always
has most of the window under way.
One that has used up half of its window makes it grow (x2, up to the maximum). A read elsewhere moves the
position there, asks for nothing and cuts the window to nothing; `PROOF` bytes that follow on it without a gap begin a
sequence again. So a reader of random records never causes readahead, and a seek of a sequential reader costs little.

INVARIANT: `note` asks for no byte twice while the reader goes forward, and for none past the end of the file.
"""

from __future__ import annotations

from cachefs.types import PART_BYTES

MIB = 1 << 20
SLACK = 4 * MIB
"""How far from the position a read still belongs to a known sequence: the kernel's own readahead is 4 MiB."""
NEAR = 128 << 10
"""The same while the sequence is not proven yet (or twice the size of the read, if that is more)."""
PROOF = MIB
"""Bytes that must follow on a jump before it counts as a sequence: more than one request of the kernel."""


class ReadWindow:
    """The readahead state of one inode.

    Used by several threads at once it may ask for too much, never for wrong bytes.
    """

    __slots__ = ("_frontier", "_grow_at", "_initial", "_maximum", "_run", "_trigger", "position", "window")

    def __init__(self, initial: int = 4 * MIB, maximum: int = 64 * MIB) -> None:
        self.window = 0
        """Bytes to keep ahead of the reader; 0: no sequence is known."""
        self._initial = initial
        self._maximum = maximum
        self.position = -1
        """The furthest byte that was read; -1: none yet."""
        self._frontier = 0
        self._trigger = 0
        self._grow_at = 0
        self._run = 0

    def note(self, offset: int, size: int, file_size: int) -> tuple[int, int] | None:
        """Take note of a read. Returns (first byte, end byte) to read ahead now, or None."""
        position = self.position
        if self.window and position - SLACK <= offset <= position + SLACK:
            end = offset + size
            if end > position:
                self.position = end
                if end >= self._trigger:
                    if end >= self._grow_at:
                        self._resize(end, min(self.window * 2, self._maximum))
                    return self._ask(end, file_size)
            return None
        return self._outside(offset, size, file_size)

    def _outside(self, offset: int, size: int, file_size: int) -> tuple[int, int] | None:
        """Handle a read that belongs to no known sequence."""
        position, end = self.position, offset + size
        if position < 0:
            proven = offset == 0 and file_size > MIB
        elif self.window or abs(offset - position) > max(NEAR, 2 * size):
            self.window = self._run = 0
            proven = False
        else:
            self._run += max(0, end - position)
            proven = self._run >= PROOF
            end = max(end, position)
        self.position = end
        if not proven:
            return None
        self._run = 0
        self._frontier = end
        self._resize(end, self._initial)
        return self._ask(end, file_size)

    def _resize(self, end: int, window: int) -> None:
        self.window = window
        self._grow_at = end + window // 2

    def _ask(self, end: int, file_size: int) -> tuple[int, int] | None:
        """Move the frontier to one window past `end`, if that is large to the end of the part there.

        Returns what lies between.
        """
        first = max(self._frontier, end)
        target = end + self.window
        if self.window >= 2 * PART_BYTES:
            target += -target % PART_BYTES
        target = min(target, file_size)
        self._trigger = end + min(self.window // 2, PART_BYTES) if target < file_size else file_size + 1
        if first >= target:
            return None
        self._frontier = target
        return first, target
