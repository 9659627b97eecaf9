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
One whose records are longer than that (and the kernel itself, which reads 4 MiB around a page fault) would have
readahead begin in each of them: the proof doubles whenever most of what was read ahead was in vain.

Jumps at equal distances, also backward, are a stride (`cachefs.prefetch.strides`).

INVARIANT: `note` asks for no byte twice while the reader goes forward, and for none past the end of the file.
"""

from __future__ import annotations

from cachefs.prefetch.strides import Strides
from cachefs.types import PART_BYTES

MIB = 1 << 20
SLACK = 4 * MIB
"""How far from the position a read still belongs to a known sequence: the kernel's own readahead is 4 MiB."""
NEAR = 128 << 10
"""The same while the sequence is not proven yet (or twice the size of the read, if that is more)."""
PROOF = MIB
"""Bytes that must follow on a jump before it counts as a sequence: more than one request of the kernel."""
MOST_PROOF = 16 * MIB
SCANT = 8
"""A sequence of which less than the so-many-th part is read is none."""
HEADER = 64 << 10
"""A first read at the beginning that is shorter is that of a header: it may be all that is read in order."""


class ReadWindow:
    """The readahead state of one inode.

    Used by several threads at once it may ask for too much, never for wrong bytes.
    """

    __slots__ = (
        "_begin", "_frontier", "_got", "_grow_at", "_initial", "_maximum", "_more", "_proof", "_run", "_start",
        "_strides", "_trigger", "apart", "position", "window",
    )  # fmt: skip

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
        self._proof = PROOF
        self._begin = 0
        """Where what is read ahead begins."""
        self._got = 0
        """Bytes that were read since then."""
        self._start = 0
        """Where the last record begins, or the sequence."""
        self._strides = Strides()
        self._more: list[tuple[int, int]] = []
        self.apart = False
        """The last read was far from all that was read before, and of no stride whose whole blocks are wanted."""

    @property
    def sparse(self) -> bool:
        """Whether what was asked for last are records that lie far from each other."""
        return self._strides.trusted and not self._strides.dense

    def more(self) -> list[tuple[int, int]]:
        """Return what is to be read ahead beside what `note` has returned, once."""
        more, self._more = self._more, []
        return more

    def note(self, offset: int, size: int, file_size: int) -> tuple[int, int] | None:
        """Take note of a read. Returns (first byte, end byte) to read ahead now, or None."""
        position = self.position
        if self.window and position - SLACK <= offset <= position + SLACK:
            end = offset + size
            self._got += size
            if end > position:
                self.position = end
                if end >= self._trigger:
                    if end - self._begin > SCANT * self._got + SLACK:
                        return self._jump(offset, size, file_size)  # records that lie near each other
                    if end >= self._grow_at:
                        self._resize(end, min(self.window * 2, self._maximum))
                    return self._ask(end, file_size)
            return None
        return self._outside(offset, size, file_size)

    def _outside(self, offset: int, size: int, file_size: int) -> tuple[int, int] | None:
        """Handle a read that belongs to no known sequence."""
        position, end = self.position, offset + size
        if position < 0:
            return self._first(offset, size, file_size)
        near = max(NEAR, 2 * size)
        if self.window or abs(offset - position) > near or offset + near < self._start or end <= self._start:
            return self._jump(offset, size, file_size)
        self.apart = False
        self._run += max(0, end - position)
        self.position = end = max(end, position)
        if self._run < max(self._proof, 2 * self._strides.record_bytes):
            return None
        return self._open(end, self._initial, file_size)

    def _first(self, offset: int, size: int, file_size: int) -> tuple[int, int] | None:
        self.position = end = offset + size
        self._start = offset
        self._strides.note(offset, end, file_size)
        self.apart = offset > 0
        if offset or file_size <= MIB:
            return None
        return self._open(end, min(self._initial, MIB if size < HEADER else self._initial), file_size)

    def _jump(self, offset: int, size: int, file_size: int) -> tuple[int, int] | None:
        """Handle a read elsewhere: the beginning of another record."""
        if self.window and self._begin > MIB:
            used, asked = self.position - self._begin, self._frontier - self._begin
            self._proof = min(2 * self._proof, MOST_PROOF) if 4 * used < 3 * asked else max(self._proof // 2, PROOF)
        near = abs(offset + size - self._start) <= max(NEAR, 2 * size)
        self._strides.ended(self.position)
        self.window = self._run = 0
        self.position, self._start = offset + size, offset
        spans = self._strides.note(offset, offset + size, file_size)
        self.apart = not near and not self._strides.dense
        self._more = spans[1:]
        return spans[0] if spans else None

    def _open(self, end: int, window: int, file_size: int) -> tuple[int, int] | None:
        """A sequence is known: begin to read ahead of it."""
        self._run = self._got = 0
        self.apart = False
        self._frontier = self._begin = end
        self._resize(end, window)
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
