"""A directory of directories: in which of them files are read, and whether that has an order.

Files of a tree of class folders that are read in random order jump from folder to folder. What jumps to and fro among
at least `EVIDENCE` folders is one shuffled epoch over the tree: all of it is wanted, folders that were read lately
first, then the others in the order of the listing, as far as the evidence goes (`credit`). Folders that are gone to in
an order (one after the other, or the share of a worker) are streams here: the files of the next ones are wanted.
Several jobs that go through a directory of their own each, in its order, are no epoch over what is above them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import pairwise

from cachefs.prefetch.ports import Tree
from cachefs.prefetch.roster import Roster
from cachefs.prefetch.streams import Stream, Streams
from cachefs.types import Ino

CREDIT = 16
"""So many more files of the tree may be brought for each one that was read."""
EVIDENCE = 4
RECENT = 16
STEPS_AT_ONCE = 4
POSTPONED = 1024


class Branch:
    """One directory that has directories."""

    __slots__ = ("_cursor", "_last", "_lately", "_recent", "credit", "directory", "epochs", "roster", "streams")

    def __init__(self, directory: Ino) -> None:
        self.directory = directory
        self.roster = Roster(directory)
        self.streams = Streams()
        """Of positions of directories."""
        self.credit = 0
        """How many files of the tree may still be proposed without order."""
        self.epochs = 0
        """How many epochs were begun in it after the first."""
        self._last = Ino(0)
        self._recent: deque[int] = deque(maxlen=RECENT)
        """Positions of the directories that readers went to."""
        self._lately: OrderedDict[Ino, None] = OrderedDict()
        """Directories to be gone through before the others, the next one first."""
        self._cursor = 0

    def note(self, tree: Tree, child: Ino, *, new_epoch: bool, proposed: bool, orderly: bool = False) -> None:
        """A reader began a file below a directory of this one. `new_epoch`: with it a new epoch began there.
        `proposed`: that file had been proposed. `orderly`: who reads there has an order of his own.
        """
        if new_epoch and self._cursor >= len(self.roster.directories):
            self.epochs += 1
            self._cursor = 0
        if orderly:
            self.streams.clear()  # who goes on from there follows on what is read there
            self._last = child
            return
        if child == self._last:
            return
        self.credit += CREDIT
        self._last = child
        position = self.position(tree, child)
        if position is not None:
            self._recent.append(position)
            self.streams.note(position, proposed=proposed)
        if self._cursor == 0 or position is None or position >= self._cursor:
            self._lately[child] = None
            self._lately.move_to_end(child, last=False)
            if len(self._lately) > POSTPONED:
                self._lately.popitem()

    @property
    def scattered(self) -> bool:
        """Whether readers jump to and fro among several directories."""
        if len(set(self._recent)) < EVIDENCE:
            return False
        back = sum(after < before for before, after in pairwise(self._recent))
        return back > 0 and (back > 1 or len(self._recent) < RECENT)

    def position(self, tree: Tree, child: Ino) -> int | None:
        """Return where a directory is in the listing, None if that is not known (yet)."""
        directories = self.roster.directories
        position = directories.position(child)
        if position is None and self.roster.complete and self.roster.is_outdated(tree):
            self.roster = Roster(self.directory)
            self._recent.clear()
            self.streams.clear()
            self._cursor = 0
        for _ in range(STEPS_AT_ONCE):
            if position is not None or not self.roster.load(tree):
                break
            position = self.roster.directories.position(child)
        return position

    def after(self, tree: Tree, child: Ino) -> Ino | None:
        """Return the directory that follows in the listing."""
        position = self.position(tree, child)
        if position is None:
            return None
        if position + 1 >= len(self.roster.directories):
            self.roster.load(tree)
        directories = self.roster.directories
        return directories[position + 1] if position + 1 < len(directories) else None

    def next_of(self, tree: Tree, stream: Stream) -> Ino | None:
        """Return the next directory that a stream will go to, without moving on; None when there is none for now."""
        position = stream.peek()
        if position is None:
            return None
        if position >= len(self.roster.directories):
            self.roster.load(tree)
        return self.roster.directories[position] if position < len(self.roster.directories) else None

    def children(self, tree: Tree) -> Iterator[Ino]:
        """Give the directories to go through: each once in an epoch, unless it is postponed."""
        for _ in range(len(self._lately)):
            yield self._lately.popitem(last=False)[0]
        while self.credit > 0:
            if self._cursor >= len(self.roster.directories) and not self.roster.load(tree):
                return
            if self._cursor < len(self.roster.directories):
                self._cursor += 1
                yield self.roster.directories[self._cursor - 1]

    def postpone(self, child: Ino) -> None:
        """A directory could not be gone through to its end: once more, later."""
        if len(self._lately) < POSTPONED:
            self._lately[child] = None
