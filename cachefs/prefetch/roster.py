"""The order of a directory, in little memory: which file is at which position of the listing, and the other way round.

Inode numbers are given in the order in which names are found, which is nearly the order of the listing. So an `Order`
keeps them as an array, with a few ascending runs beside it that are searched by bisection: 20 bytes a file, where a
dict takes 100.

A `Roster` follows the listing of one directory while it comes in. It is loaded in steps, so that a directory with a
million files never holds up the event loop, and up to `MOST` entries: patterns in what lies behind are not seen.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

from cachefs.prefetch.ports import Tree
from cachefs.types import Ino

MOST = 1 << 18
"""Entries of one directory that are known: 5 MiB."""
STEP = 512
"""Entries that are loaded at once: about a millisecond."""
RUNS = 4


class Order:
    """Inode numbers by position and positions by inode number."""

    __slots__ = ("_inos", "_runs")

    def __init__(self) -> None:
        self._inos = array("Q")
        self._runs: list[tuple[array[int], array[int]]] = []
        """Ascending numbers, and their positions."""

    def append(self, ino: Ino) -> None:
        """Add the next one. One that fits into none of the runs has a number from then on, but no position."""
        position = len(self._inos)
        self._inos.append(ino)
        best: tuple[array[int], array[int]] | None = None
        for run in self._runs:
            if run[0][-1] < ino and (best is None or run[0][-1] > best[0][-1]):
                best = run
        if best is not None:
            best[0].append(ino)
            best[1].append(position)
        elif len(self._runs) < RUNS:
            self._runs.append((array("Q", [ino]), array("I", [position])))

    def position(self, ino: Ino) -> int | None:
        """Return where a number is, None if that is not known."""
        for numbers, positions in self._runs:
            at = bisect_left(numbers, ino)
            if at < len(numbers) and numbers[at] == ino:
                return positions[at]
        return None

    def __getitem__(self, position: int) -> Ino:
        return Ino(self._inos[position])

    def __len__(self) -> int:
        return len(self._inos)


class Roster:
    """Files and directories of one directory, as far as its listing is known and loaded."""

    __slots__ = ("_directory", "_place", "complete", "directories", "files", "generation")

    def __init__(self, directory: Ino) -> None:
        self._directory = directory
        self._place = b""
        self.files = Order()
        self.directories = Order()
        self.generation = 0
        """Of the listing that this is the order of."""
        self.complete = False
        """Whether nothing follows on what is loaded."""

    def load(self, tree: Tree) -> bool:
        """Load the next entries, if there are any; returns whether there were."""
        if self.complete:
            return False
        listed = tree.listed(self._directory)
        if listed is None:
            return False
        entries = tree.entries(self._directory, self._place, STEP)
        self.generation = self.generation or listed.generation
        for entry in entries:
            (self.directories if entry.is_directory else self.files).append(entry.ino)
        if entries:
            self._place = entries[-1].place
        full = len(self.files) + len(self.directories) >= MOST
        self.complete = full or (listed.complete and len(entries) < STEP)
        return bool(entries)

    def is_outdated(self, tree: Tree) -> bool:
        """Whether another listing was made since this one was loaded."""
        listed = tree.listed(self._directory)
        return listed is not None and self.generation not in (0, listed.generation)
