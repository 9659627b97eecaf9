"""The order of the last epoch, for jobs that read in the same order every time (a fixed seed, a list of files).

What is read is written down, up to `MOST` files. When half of the last reads were written down already, an epoch is
over: what was written down is the former order, and a new one begins. Positions in the former order go through
`streams`, so several jobs that replay it at different places are as many streams.

INVARIANT: at most two orders of `MOST` files: 7 MiB each.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator

from cachefs.prefetch.streams import Streams
from cachefs.types import Ino

MOST = 1 << 16
RECENT = 16
LEAST = 32
"""Shorter orders are not worth it: the directory's own patterns see to them."""


class Recording:
    """Files in the order in which they were read first."""

    __slots__ = ("inos", "position")

    def __init__(self) -> None:
        self.inos = array("Q")
        self.position: dict[int, int] = {}

    def add(self, ino: Ino) -> bool:
        """Write a file down; returns False when it was there already."""
        if ino in self.position:
            return False
        if len(self.inos) < MOST:
            self.position[ino] = len(self.inos)
            self.inos.append(ino)
        return True


class Replay:
    """The former order of a volume, and who follows it."""

    __slots__ = ("_now", "_recent", "_repeats", "before", "streams")

    def __init__(self) -> None:
        self.before = Recording()
        self.streams = Streams()
        self._now = Recording()
        self._recent: deque[Ino] = deque(maxlen=RECENT)
        self._repeats: deque[bool] = deque(maxlen=RECENT)

    def note(self, ino: Ino, *, proposed: bool = False) -> None:
        """A reader began a file."""
        if ino in self._recent:
            return
        self._recent.append(ino)
        self._repeats.append(not self._now.add(ino))
        if sum(self._repeats) * 2 >= RECENT:
            self._turn()
        position = self.before.position.get(ino)
        if position is not None:
            self.streams.note(position, proposed=proposed)

    def _turn(self) -> None:
        """An epoch is over."""
        if len(self._now.inos) < LEAST:
            self._repeats = deque([False] * len(self._recent), maxlen=RECENT)
            return
        self.before, self._now = self._now, Recording()
        self.streams.clear()
        for ino, again in zip(self._recent, self._repeats, strict=True):
            if again:  # else it was the end of the former epoch
                self._now.add(ino)
                self.streams.note(self.before.position.get(ino, -1))
        self._repeats.clear()
        self._recent.clear()

    def wanted(self) -> Iterator[Ino]:
        """Give what comes next in the former order; a file that was given is not given again while they follow it."""
        for stream in self.streams.trusted():
            if stream.step > 1 or stream.backward:
                continue  # not the order: something that happens to go through it
            while (position := stream.peek()) is not None and position < len(self.before.inos):
                stream.advance()
                if position >= 0:
                    yield Ino(self.before.inos[position])
