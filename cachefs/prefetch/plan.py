"""The order of reads to come, as a job has written it down: who is read next, and when something is read again.

One line of a plan is one read of a whole file. For each line: its inode number (8 bytes), four bytes of the identity of
its object, and the line of the same object that follows (4); the last one leads back to the first, so that the lines of
an object are a ring. A hash table (linear probing, D. E. Knuth, TAOCP vol. 3, 6.4) leads to one line of each ring: 6
bytes a line. That is 22 bytes a line, and a look-up touches two or three places.

Readers are not exact: workers of a data loader read some hundred lines apart, and files are opened that are not in the
plan. So lines within `NEAR` of the position are checked off one by one, and the position is the first that is not. Who
goes on far from the position `LEAP` times is followed there.

INVARIANT: the order of a ring is that of the plan. Only `note` changes the position; `next_use` may be called in any
thread meanwhile, and says what held a moment ago at worst.
"""

from __future__ import annotations

import struct
from array import array

from cachefs.types import Ino, ObjectId

NEAR = 4096
"""How far from each other readers of one plan may be."""
LEAP = 16
AHEAD = 1 << 16
"""Lines ahead of the position that are wanted at the most; bytes bound it before."""
SLOTS_PER_LINE = 1.5
MOST_LINES = (1 << 32) - 2
_NONE = (1 << 32) - 1
_TAG = struct.Struct("<IQ")
"""Parts of an object's identity, which is a hash: what is kept of it, and where it is looked for."""
UNKNOWN = Ino(0)


class Plan:
    """One plan. Made with `append`, then followed."""

    __slots__ = (
        "_count",
        "_done",
        "_far",
        "_far_count",
        "_inos",
        "_next",
        "_proposed",
        "_table",
        "_tags",
        "position",
        "unknown",
    )

    def __init__(self, lines: int) -> None:
        """`lines`: how many there will be at most. Raises ValueError for more than `MOST_LINES`."""
        if lines > MOST_LINES:
            raise ValueError(f"a plan of {lines} lines")
        self._inos = array("Q", [UNKNOWN]) * lines  # at once: growing, they would take more
        self._tags = array("I", [0]) * lines
        self._next = array("I", [_NONE]) * lines
        self._table = array("I", [_NONE]) * (int(lines * SLOTS_PER_LINE) + 1)
        self._count = 0
        self._done: set[int] = set()
        """Lines from the position on that were read."""
        self._far, self._far_count = 0, 0
        self._proposed = 0
        self.position = 0
        """The first line that was not read."""
        self.unknown = 0
        """Lines that name nothing that is there."""

    def append(self, ino: Ino, oid: ObjectId | None) -> None:
        """Add the next line. `oid` None: what it names is not there; the line only counts. Raises IndexError for one
        more than was said.
        """
        line = self._count
        if oid is None:
            self.unknown += 1
            self._inos[line] = UNKNOWN
            self._count += 1
            return
        tag, at = _TAG.unpack_from(oid)
        self._inos[line], self._tags[line] = ino, tag
        slot = self._slot(tag, at)
        last = self._table[slot]
        if last == _NONE:
            self._next[line] = line
        else:
            self._next[line], self._next[last] = self._next[last], line
        self._table[slot] = line
        self._count += 1

    def _slot(self, tag: int, at: int) -> int:
        """Return where an object is in the table, or would be."""
        table, tags, slots = self._table, self._tags, len(self._table)
        slot = at % slots
        while (line := table[slot]) != _NONE and tags[line] != tag:
            slot += 1
            if slot == slots:
                slot = 0
        return slot

    def __len__(self) -> int:
        return self._count

    @property
    def finished(self) -> bool:
        """Whether every line was read."""
        return self.position >= self._count

    # -- when ----------------------------------------------------------------------------------------------------------

    def next_use(self, oid: ObjectId, position: int | None = None) -> int | None:
        """Return the first line from `position` on (None: from where readers are) that reads an object and was not
        checked off, None when there is none. Any thread.
        """
        tag, at = _TAG.unpack_from(oid)
        slot = self._slot(tag, at)
        line = self._table[slot]
        if line == _NONE:
            return None
        at_line = self.position if position is None else position
        before, found = self._search(line, at_line)
        while found is not None and position is None and found in self._done:
            before, found = self._search(found, found + 1)
        self._table[slot] = before  # a ring is searched from where it was found last
        return found

    def _search(self, line: int, position: int) -> tuple[int, int | None]:
        """Return the first line of a ring at `position` or behind it, and its predecessor (else any)."""
        following_line = self._next
        while True:
            following = following_line[line]
            if line < position:
                if following >= position:
                    return line, following
                if following <= line:
                    return line, None  # that was the last
            elif following <= line and following >= position:
                return line, following  # the first of all
            line = following

    # -- who -----------------------------------------------------------------------------------------------------------

    def coming(self, position: int, count: int) -> list[Ino]:
        """Return the files of up to `count` lines from `position` on; lines that name nothing are left out."""
        return [Ino(ino) for ino in self._inos[position : min(position + count, self._count)] if ino != UNKNOWN]

    def propose(self) -> Ino | None:
        """Return the next file that is worth bringing, each line once; None when there is none for now."""
        line = max(self._proposed, self.position)
        end = min(self._count, self.position + AHEAD)
        while line < end and (self._inos[line] == UNKNOWN or line in self._done):
            line += 1
        self._proposed = line
        if line >= end:
            return None
        self._proposed = line + 1
        return Ino(self._inos[line])

    def note(self, oid: ObjectId) -> bool:
        """A reader began a file; returns whether the plan was followed. Trio thread."""
        line = self.next_use(oid)
        if line is None or line > self.position + NEAR:
            return self._note_far(line)
        self._far_count = 0
        self._check_off(line)
        return True

    def _check_off(self, line: int) -> None:
        self._done.add(line)
        position, end = self.position, self._count
        if len(self._done) > NEAR // 2:
            position = max(position, min(self._done))  # the lines between are read by nobody
        while position < end and (position in self._done or self._inos[position] == UNKNOWN):
            self._done.discard(position)
            position += 1
        self.position = position

    def _note_far(self, line: int | None) -> bool:
        """A reader is elsewhere: a job that goes on in the middle, if it stays there."""
        if line is None:
            return False
        if abs(line - self._far) > NEAR:
            self._far_count = 0
        self._far, self._far_count = line, self._far_count + 1
        if self._far_count < LEAP:
            return False
        self.position = self._proposed = max(0, line - LEAP)
        self._done.clear()
        self._far_count = 0
        self._check_off(line)
        return True
