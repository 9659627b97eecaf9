"""What is read in one directory, and what of it will be wanted next.

Positions of the listing (`roster`) go through `streams`, which sees whoever reads in an order. What no stream explains,
and is never read twice, is a shuffled epoch: then the rest of the directory is wanted, in the order of the listing, as
far as the evidence goes (`credit`: so many files for each one that was read).

An EPOCH is one pass over the directory. It ends when every file was read, or when half of the last reads are of files
that were read before.

INVARIANTS
* Within an epoch a file is proposed at most once, and not after it was read.
* One byte for each file, beside the roster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from cachefs.prefetch.ports import Tree
from cachefs.prefetch.roster import Roster
from cachefs.prefetch.streams import Stream, Streams
from cachefs.types import Ino

READ, PROPOSED = 1, 2
EVIDENCE = 8
"""Files that are read without order and repetition before the rest counts as wanted."""
CREDIT = 16
"""So many more files may be brought for each one that was read."""
RECENT = 16
JUST_READ = 4
STEPS_AT_ONCE = 4
"""How many steps of a listing are loaded for one event."""
SCAN = 512
"""Files that are looked at for one that is not proposed yet."""
TAILS = 2
"""So many of the last files must have been begun at their end, and one more than those that were not."""


class Folder:
    """One directory."""

    __slots__ = (
        "_cursor", "_former", "_marks", "_recent", "_repeats", "_scattered", "_tails", "credit", "directory", "epochs",
        "inherited", "read", "roster", "streams",
    )  # fmt: skip

    def __init__(self, directory: Ino) -> None:
        self.directory = directory
        self.roster = Roster(directory)
        self.streams = Streams()
        self.inherited = 0
        """What a reader who comes here from the directory before may have ahead."""
        self.read = 0
        """Files that were read in this epoch."""
        self.credit = 0
        """How many files of the rest may still be proposed without order."""
        self.epochs = 0
        """How many epochs were begun after the first."""
        self._marks = bytearray()
        self._former: tuple[Roster, bytearray] | None = None
        """The listing before this one, while this one is loaded."""
        self._cursor = 0
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._repeats: deque[bool] = deque(maxlen=RECENT)
        self._scattered: deque[bool] = deque(maxlen=RECENT // 2)
        self._tails: deque[bool] = deque(maxlen=TAILS + 1)

    # -- what is read --------------------------------------------------------------------------------------------------

    def note(self, tree: Tree, ino: Ino, *, at_tail: bool = False) -> bool:
        """A reader began a file. Returns whether that was news: not one of the last files once more."""
        position = self.position(tree, ino)
        if position is None:
            return False
        if position in self._last():  # two processes read it, or one reads it twice
            self._recent.remove(position)
            self._recent.append(position)
            return False
        self._tails.append(at_tail)
        mark = self._marks[position]
        self._note_repeat(position, bool(mark & READ))
        proposed = bool(self._marks[position] & PROPOSED)
        if not self._marks[position] & READ:
            self._marks[position] |= READ
            self.read += 1
            self.credit += CREDIT
        inherited, self.inherited = self.inherited, 0
        in_order = self.streams.note(position, proposed=proposed, inherited=inherited)
        self._scattered.append(not in_order)
        return True

    def _last(self) -> list[int]:
        return list(self._recent)[-JUST_READ:]

    def _note_repeat(self, position: int, again: bool) -> None:
        self._recent.append(position)
        self._repeats.append(again)
        whole = self.finished
        if again and (whole or (len(self._repeats) == RECENT and sum(self._repeats) * 2 >= RECENT)):
            different = set(self._recent)
            if whole or len(different) * 2 >= RECENT:
                self.begin_epoch(keep=(set(self._last()) if whole else different) - {position})
        elif again:
            self.credit = 0  # no epoch, as it seems

    def begin_epoch(self, keep: Collection[int] = ()) -> None:
        """Everything may be wanted once more, but what was read just now."""
        self._marks = bytearray(len(self._marks))
        for position in keep:
            self._marks[position] = READ
        self.read = len(keep)
        self._cursor = 0
        self.epochs += 1
        self._repeats.clear()
        self.streams.clear()

    def position(self, tree: Tree, ino: Ino) -> int | None:
        """Return where a file is, None if that is not known (yet). Loads more of the listing."""
        position = self.roster.files.position(ino)
        if position is None and self.roster.complete and self.roster.is_outdated(tree):
            self._begin_anew()
        for _ in range(STEPS_AT_ONCE):
            if position is not None or not self.load(tree):
                break
            position = self.roster.files.position(ino)
        return position

    def load(self, tree: Tree) -> bool:
        """Load more of the listing; returns whether there was more."""
        if not self.roster.load(tree):
            return False
        for position in range(len(self._marks), len(self.roster.files)):
            mark = self._mark_before(self.roster.files[position])
            self.read += mark & READ
            self._marks.append(mark)
        if self.roster.complete:
            self._former = None
        return True

    def _begin_anew(self) -> None:
        """The directory was listed again, and has other files: positions are others, what was read is the same."""
        self._former = (self.roster, self._marks)
        self.roster = Roster(self.directory)
        self._marks, self._cursor, self.read = bytearray(), 0, 0
        self._recent.clear()
        self.streams.clear()

    def _mark_before(self, ino: Ino) -> int:
        """Return what the listing before said of a file."""
        if self._former is None:
            return 0
        roster, marks = self._former
        position = roster.files.position(ino)
        return 0 if position is None else marks[position]

    @property
    def finished(self) -> bool:
        """Whether every file was read in this epoch."""
        return self.roster.complete and self.read >= len(self.roster.files) > 0

    # -- what is wanted ------------------------------------------------------------------------------------------------

    @property
    def scattered(self) -> bool:
        """Whether files are read without an order that a stream would see, and without repetition."""
        return self.read >= EVIDENCE and self.credit > 0 and sum(self._scattered) * 2 > len(self._scattered)

    @property
    def from_tail(self) -> bool:
        """Whether files here are read at their end first, as Parquet and zip are."""
        return sum(self._tails) >= TAILS

    def next_of(self, tree: Tree, stream: Stream) -> Ino | None:
        """Return the next file that a stream will want, None when there is none for now."""
        for _ in range(SCAN):
            position = stream.peek()
            if position is None:
                return None
            if position >= len(self._marks) and not self.load(tree):
                return None
            stream.advance()
            if position < len(self._marks) and not self._marks[position]:
                return self._propose(position)
        return None

    def beyond(self, stream: Stream) -> int:
        """Return how many files a stream wants behind the end of the directory."""
        if stream.backward or not self.roster.complete:
            return 0
        return max(0, (stream.end - len(self._marks) + 1) // stream.step)

    def next_of_rest(self, tree: Tree) -> Ino | None:
        """Return the next file in the order of the listing that was neither read nor proposed."""
        for _ in range(SCAN):
            if self._cursor >= len(self._marks) and not self.load(tree):
                return None
            if self._cursor >= len(self._marks):
                continue  # directories only, in this step
            position = self._cursor
            self._cursor += 1
            if not self._marks[position]:
                return self._propose(position)
        return None

    def _propose(self, position: int) -> Ino:
        self._marks[position] |= PROPOSED
        return self.roster.files[position]

    def claim(self, ino: Ino) -> bool:
        """Propose a file that somebody else has chosen; returns False when it was read or proposed already."""
        position = self.roster.files.position(ino)
        if position is None:
            return True
        if self._marks[position]:
            return False
        self._propose(position)
        return True
