"""What is read in one directory, and what of it will be wanted next.

Positions of the listing (`roster`) go through `streams`, which sees whoever reads in an order. What no stream explains,
and is never read twice, is a shuffled epoch: then the rest of the directory is wanted, in the order of the listing, as
far as the evidence goes (`credit`: so many files for each one that was read, more the longer nothing is read twice).

An EPOCH is one pass over the directory. It ends when every file was read, or when most of the last reads are of files
that were read once before.

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

READ, PROPOSED, AGAIN = 1, 2, 4
EVIDENCE = 12
"""Files that are read without order and repetition before the rest counts as wanted."""
CREDIT = 32
"""So many more files may be brought for each one that was read, or a quarter of those that were read since one was read
again, if that is less: a few files that are read again and again look like an epoch at first."""
IN_A_ROW = 4
"""So many files that are read again in a row may be somebody who goes through all of them once more."""
RECENT = 16
JUST_READ = 4
ORDERLY = 4
"""So many reads in order, or more, tell that there is one."""
STEPS_AT_ONCE = 4
"""How many steps of a listing are loaded for one event."""
SCAN = 512
"""Files that are looked at for one that is not proposed yet."""
TAILS = 2
"""So many of the last files must have been begun at their end, and one more than those that were not."""


class Folder:
    """One directory."""

    __slots__ = (
        "_again", "_cursor", "_former", "_fresh", "_marks", "_recent", "_repeats", "_run", "_scattered", "_tails",
        "credit", "directory", "epochs", "follows", "inherited", "read", "roster", "streams",
    )  # fmt: skip

    def __init__(self, directory: Ino) -> None:
        self.directory = directory
        self.roster = Roster(directory)
        self.streams = Streams()
        self.inherited = 0
        """What a reader who comes here from the directory before may have ahead."""
        self.follows = False
        """Whether such a reader was expected here before anybody read."""
        self.read = 0
        """Files that were read in this epoch."""
        self.credit = 0
        """How many files of the rest may still be proposed without order."""
        self.epochs = 0
        """How many epochs were begun after the first."""
        self._fresh = 0
        """How many files were read since one was read again."""
        self._again: deque[bool] = deque(maxlen=RECENT)
        self._run = 0
        """How many of the last reads, one after the other, were the second ones of their files."""
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
        self._note_repeat(position, bool(mark & READ), bool(mark & AGAIN))
        proposed = bool(self._marks[position] & PROPOSED)
        if not self._marks[position] & READ:
            self._marks[position] |= READ
            self.read += 1
            self._fresh += 1
            if self._fresh >= EVIDENCE:
                self.credit += min(CREDIT, self._fresh // 4)
        inherited, self.inherited = self.inherited, 0
        self._run = self._run + 1 if mark & (READ | AGAIN) == READ else 0
        in_order = False
        if not mark & READ or self._run >= IN_A_ROW:  # who goes to and fro between two files goes nowhere
            in_order = self.streams.note(position, proposed=proposed, inherited=inherited)
        self._scattered.append(not in_order)
        return True

    def _last(self) -> list[int]:
        return list(self._recent)[-JUST_READ:]

    def _note_repeat(self, position: int, again: bool, many_times: bool) -> None:
        self._recent.append(position)
        self._again.append(again)
        self._repeats.append(again and not many_times)  # in an epoch nothing is read for the third time
        if again:
            self._marks[position] |= AGAIN
        whole = self.finished
        if again and (whole or sum(self._repeats) * 4 >= RECENT * 3):
            different = set(self._recent)
            if whole or len(different) * 2 >= RECENT:
                if whole:
                    self.begin_epoch(former=set(self._last()) - {position})
                else:
                    self.begin_epoch(keep=different - {position})
        elif again:
            self.credit = self._fresh = 0  # no epoch, as it seems

    def begin_epoch(self, keep: Collection[int] = (), former: Collection[int] = ()) -> None:
        """Everything may be wanted once more, but what was read just now: `keep` in this epoch, `former` before."""
        self._marks = bytearray(len(self._marks))
        for position in former:
            self._marks[position] = PROPOSED
        for position in keep:
            self._marks[position] = READ
        self.read = self._fresh = len(keep)
        self._cursor = 0
        self.epochs += 1
        self._repeats.clear()
        self._again.clear()
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
    def orderly(self) -> bool:
        """Whether files are read in an order that streams see."""
        return len(self._scattered) >= ORDERLY and sum(self._scattered) * 2 < len(self._scattered)

    @property
    def repetitive(self) -> bool:
        """Whether some files are read again and again while others were not read yet: no epoch, and no order."""
        return sum(self._again) * 4 >= RECENT

    @property
    def aimless(self) -> bool:
        """Whether files are read again and again, in no order: that some lie near each other is chance."""
        return self.repetitive and sum(self._scattered) * 2 > len(self._scattered)

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
