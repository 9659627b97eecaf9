"""Sequences in a stream of positions: who goes through a list in its order, and what comes next.

Positions may be those of files in a listing, of directories in theirs, numbers in the names of shards, or places in
the order of the last epoch: it is the same arithmetic. It recognises (see docs/PREFETCH.md for traces)

    forward    0 1 2 3 ..             backward     9 8 7 6 ..
    strided    3 11 19 27 ..          (the share of one of eight nodes: only every eighth is proposed)
    interleaved by workers            0 4 1 8 5 2 9 ..   (a band that moves on; what was left out in it is wanted too)
    contiguous shares of workers      0 500 1 501 2 502 ..   (one stream for each)

A `Stream` is a band of positions: it takes what falls a little behind its head or ahead of it. Its step is the greatest
common divisor of the last distances, so that a share of many workers who each take every n-th is still one of every
n-th. Three positions that follow on a first one make it trusted. From then on it proposes what lies between its head
and `ahead` steps further. `ahead` is doubled whenever so many more positions came, or a quarter of what was proposed;
beyond `FREELY` it is no more than what came.

INVARIANT: `peek` gives a position once, unless the step or the direction changed meanwhile (the caller keeps
what was proposed). All of it is integers, bounded, O(1) per call.
"""

from __future__ import annotations

import math
from collections import deque

TRUSTED = 3
"""So many positions have to follow on the first one."""
REACH = 64
"""How far apart the positions of a stream may be that is not trusted yet; also the largest step."""
SLACK = 512
"""How far behind its head a position may fall that belongs to a trusted stream: workers with batches."""
FIRST_AHEAD = 8
MOST_AHEAD = 512
FREELY = 256
"""More ahead than this are no more than were read: who ends here leaves as much behind in vain at most."""
PROVEN = 4
"""A position that had been proposed counts for so many that had not."""
DENSITY = 4
"""One of so many steps has to be gone: else it is chance that positions come near each other."""
COUNTED = 256
"""Steps for which that is counted."""
STREAMS = 16
"""Streams in one list at a time; the one that moved longest ago goes first."""
DISTANCES = 8


class Stream:
    """One reader, or several who go the same way."""

    __slots__ = (
        "_count",
        "_credit",
        "_distances",
        "_frontier",
        "_low",
        "_origin",
        "_turns",
        "ahead",
        "backward",
        "followed",
        "head",
        "hits",
        "step",
    )

    def __init__(self, position: int, ahead: int = 0) -> None:
        """`ahead`: it goes on where another one ended, and is trusted from its beginning."""
        self.head = position
        """The furthest position."""
        self.hits = max(TRUSTED, ahead) if ahead else 0
        self.ahead = ahead or FIRST_AHEAD
        self.backward = False
        self.step = 1
        self.followed: int | None = None
        """The `end` up to which what lies behind the list was seen to."""
        self._low = position
        self._frontier = position + 1
        """What is proposed next."""
        self._turns = position
        """The last position."""
        self._distances: deque[int] = deque(maxlen=DISTANCES)
        self._credit = 0
        self._origin = position
        """From here on positions are counted."""
        self._count = 1

    @property
    def trusted(self) -> bool:
        """Whether it proposes anything: enough positions came, and most of what it passed is not left out."""
        return self.hits >= TRUSTED and self._count * self.step * DENSITY >= abs(self.head - self._origin)

    def takes(self, position: int) -> bool:
        """Whether a position belongs to this stream."""
        if not self.trusted:
            return abs(position - self._turns) <= REACH
        distance = self.head - position if self.backward else position - self.head
        return -SLACK <= distance <= max(REACH, 4 * self.step)

    def distance(self, position: int) -> int:
        """How far a position is from where this stream was last, or has come."""
        return min(abs(position - self._turns), abs(position - self.head))

    def is_onward(self, position: int) -> bool:
        """Whether a position lies in the direction of the stream."""
        if self.trusted:
            return self._is_ahead(position)
        return not self._distances or (position - self._turns) * self._distances[-1] > 0

    def note(self, position: int, *, proposed: bool) -> None:
        """Take a position. `proposed`: it had been proposed by somebody."""
        distance = position - self._turns
        if distance == 0:
            return
        self._turns = position
        self.hits += 1
        self._distances.append(distance)
        self._turn()
        step = math.gcd(*self._distances)
        if step != self.step or self._is_ahead(position):
            self._move(position, step)
        self._low = min(self._low, position)
        self._count += 1
        if abs(self.head - self._origin) > COUNTED * self.step:
            self._origin = (self.head + self._origin) // 2
            self._count //= 2
        if self.trusted:
            self._credit += PROVEN if proposed else 1
            if self._credit >= self.ahead:
                self._credit, self.ahead = 0, max(self.ahead, min(2 * self.ahead, MOST_AHEAD, max(FREELY, self.hits)))

    def _is_ahead(self, position: int) -> bool:
        return position < self.head if self.backward else position > self.head

    def _turn(self) -> None:
        """Find out the direction: backward when the last positions all went there."""
        backward = len(self._distances) >= TRUSTED and max(self._distances) < 0
        if backward is not self.backward:
            self.backward = backward
            self.head = self._turns
            self._frontier = self.head - self.step if backward else self._low

    def _move(self, position: int, step: int) -> None:
        if self._is_ahead(position):
            self.head = position
        if step != self.step:
            # What lies between the old steps was left out, and is wanted now.
            finer, self.step = step < self.step, step
            if self.backward:
                self._frontier = self.head - step
            else:
                self._frontier = max(self._low, self.head - SLACK) if finer else self.head + step
        self._low = max(self._low, self.head - SLACK)
        if self.backward:
            self._frontier = min(self._frontier, self.head - self.step)
        elif self.step > 1:
            self._frontier = max(self._frontier, self.head + self.step)
        else:
            self._frontier = max(self._frontier, self._low)

    @property
    def end(self) -> int:
        """The furthest position that is wanted now."""
        return self.head - self.ahead * self.step if self.backward else self.head + self.ahead * self.step

    def peek(self) -> int | None:
        """Return the next position that is wanted, None when there is none for now."""
        if not self.trusted:
            return None
        if self.backward:
            return self._frontier if max(self.end, 0) <= self._frontier else None
        return self._frontier if self._frontier <= self.end else None

    def advance(self) -> None:
        """What `peek` gave was proposed, or needs not be."""
        self._frontier += -self.step if self.backward else self.step


class Streams:
    """All streams in one list, the one that moved last first."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def note(self, position: int, *, proposed: bool = False, inherited: int = 0) -> bool:
        """Take a position; returns whether a stream went there, and did not turn.

        `inherited`: what a new stream may have ahead from its beginning, because it goes on with another one.
        """
        nearest = min((s for s in self._streams if s.takes(position)), key=lambda s: s.distance(position), default=None)
        if nearest is not None:
            if nearest is not self._streams[0]:
                self._streams.remove(nearest)
                self._streams.insert(0, nearest)
            onward = nearest.is_onward(position)
            nearest.note(position, proposed=proposed)
            return onward
        self._streams.insert(0, Stream(position, inherited))
        del self._streams[STREAMS:]
        return bool(inherited)

    def trusted(self) -> list[Stream]:
        """Return those that propose something."""
        return [stream for stream in self._streams if stream.trusted]

    def clear(self) -> None:
        """Forget all of them."""
        self._streams.clear()
