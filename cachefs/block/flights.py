"""Blocks on their way into the shm tier, and who waits for them.

A `Flight` is the one fill of one block; `Waiting` is somebody who wants several. Whoever has the outcome ends the
flight and by that calls, in the same thread, those who wait for it: an answer does not go through the event loop.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cachefs.block.lane import Job, Lane, Priority
from cachefs.types import PART_BYTES, BlockKey, Tier

log = logging.getLogger(__name__)

MIB = 1 << 20
SHORTEST_RANGE = MIB
RANGES = 4
"""Neighbouring blocks are fetched in ranges that lie in one part of the object; less than a part in so many parallel
ones, none shorter than the shortest (or one block each).
"""

Answer = Callable[["list[Filled] | Exception"], None]


@dataclass(frozen=True, slots=True)
class Filled:
    """One block that is available now."""

    index: int
    source: Tier
    payload: bytes | None
    """The bytes, only when the shm tier does not hold them or `inline` was asked for."""


class Yields(Protocol):
    """Whoever brings a flight among many others, and gives it away when a reader should not wait for its turn."""

    def want(self, flight: Flight) -> bool:
        """A reader waits for it. Returns whether the caller has to bring it from now on. Never blocks for long."""
        ...


class Flight:
    """The one fill of one block that is under way.

    `source`, `payload` and `error` are written before it is over, by whoever calls `end`, and read after that. A flight
    can be over while its job goes on with others.
    """

    __slots__ = (
        "_watchers", "batch", "error", "index", "inline", "job", "kept", "key", "lane", "length", "over", "owner",
        "payload", "source", "straight", "wanted",
    )  # fmt: skip

    _lock = threading.Lock()
    """One for all: held for moments only."""

    def __init__(
        self, key: BlockKey, index: int, length: int, *, inline: bool, wanted: bool, straight: bool = False
    ) -> None:
        """`inline`: somebody waits for the bytes, wherever the block is; `wanted`: a reader waits for the block;
        `straight`: it goes to the disk tier, not to shm, unless a reader wants it before it comes.
        """
        self.key = key
        self.index = index
        self.length = length
        self.inline = inline
        self.wanted = wanted
        self.straight = straight
        self.owner = 0
        """Which volume it will count to (`cachefs.block.holdings`)."""
        self.over = False
        self.kept = True
        """Whether a tier has it, when it is over without an error."""
        self.source = Tier.ORIGIN
        self.payload: bytes | None = None
        self.error: Exception | None = None
        self.job: Job | None = None
        self.lane: Lane | None = None
        self.batch: Yields | None = None
        """While it is one of many that are brought in bulk."""
        self._watchers: list[Callable[[], None]] = []

    @property
    def urgent(self) -> bool:
        """Whether a reader waits for it, or will in a moment (readahead within the file that is being read)."""
        job = self.job
        return self.wanted or (job is not None and job.priority is not Priority.PREFETCH)

    @property
    def lost(self) -> bool:
        """Whether the block came and its bytes are not here: no help to who wants them, if no tier has it."""
        return self.over and self.error is None and self.payload is None

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` once when it is over: in the thread that ends it, or at once. Any thread."""
        with self._lock:
            if not self.over:
                self._watchers.append(watcher)
                return
        watcher()

    def end(self) -> None:
        """It is over: tell those who wait. Any thread, and more than once."""
        with self._lock:
            self.over = True
            watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            try:
                watcher()
            except Exception:
                log.exception("somebody who waited for a block could not be told")  # the others can


class Waiting:
    """Somebody who waits for several flights. Called once for each of them (any thread), and once by `start`."""

    def __init__(self, ready: list[Filled], flights: Sequence[Flight], answer: Answer, *, strict: bool) -> None:
        self._ready = ready
        self._flights = flights
        self._answer = answer
        self._strict = strict
        self._left = len(flights) + 1
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._answer(self._outcome())

    def _outcome(self) -> list[Filled] | Exception:
        landed = []
        for flight in self._flights:
            if flight.error is None:
                landed.append(Filled(flight.index, flight.source, flight.payload))
            elif self._strict:
                # A copy: many raise the error of one flight, and each adds its own traceback.
                error = copy.copy(flight.error)
                error.__cause__ = flight.error
                return error
        return sorted([*self._ready, *landed], key=lambda block: block.index)


def ranges_of(
    flights: Sequence[Flight], block_size: int, under_way: int = 0, *, spread: bool = True
) -> list[list[Flight]]:
    """Split flights into groups of neighbours, each to be read as one range, beside so many that are under way.

    Few long ranges that begin where a part of the object may begin cost the least on both ends (SeaweedFS: 0.9 s of
    CPU per GiB in whole parts of 8 MiB, 1.1 to 1.4 s shifted by 1 MiB, 1.3 to 1.7 s in ranges of 2 MiB), and their
    blocks are used while the rest comes in; but a store gives a connection only so much, so what comes first and is
    less than a part is spread over several, if that helps (`BlockSource.spread`).
    """
    part = max(1, PART_BYTES // block_size)
    longest = part
    if spread and len(flights) < part:
        wanted = len(flights) * block_size // max(1, RANGES - under_way)
        longest = max(1, max(wanted, SHORTEST_RANGE) // block_size)
    groups: list[list[Flight]] = []
    for flight in flights:
        fits = groups and len(groups[-1]) < longest and flight.index % part > 0
        if fits and groups[-1][-1].index + 1 == flight.index:
            groups[-1].append(flight)
        else:
            groups.append([flight])
    return groups
