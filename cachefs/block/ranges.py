"""Ranges of objects that are read past the tiers: a few pages that somebody wants, of blocks that nobody needs whole.

    FetchRange (worker) --> Ranges.read --job of the lane `origin`--> store, If-Match --> the bytes, for the answer

A random reader of records of 4 KiB would make the agent fetch 256 times as much in blocks. Readers who want the same
range at the same time share one request, like those of a block. Nothing is kept, but what was asked for `ahead` of a
reader with a stride: a little memory, for moments, until its reader comes.

INVARIANTS
* A reader gets bytes that were asked for by itself, by somebody at the same time, or ahead of it in the last `KEPT_S`.
* What is kept ahead, or on its way there, is at most `KEPT_BYTES`. Bytes of readers are bounded by whoever asks
  (`cachefs.block.carriage`).
* Used from the trio thread only.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import trio

from cachefs import errors, metrics
from cachefs.block.budget import REQUEST_BYTES
from cachefs.block.flights import Filled
from cachefs.block.lane import Job, Lane, Priority
from cachefs.block.ports import BlockSource
from cachefs.metrics import Counters
from cachefs.types import ObjectId, ObjectVersion

log = logging.getLogger(__name__)

KEPT_BYTES = 4 << 20
KEPT_RANGES = 256
KEPT_S = 10.0


class _Range:
    """One range on its way, or kept."""

    __slots__ = ("ahead", "body", "came_at", "end", "error", "job", "oid", "over", "start", "wanted")

    def __init__(self, oid: ObjectId, start: int, end: int, *, ahead: bool) -> None:
        self.oid = oid
        self.start = start
        self.end = end
        self.ahead = ahead
        self.wanted = not ahead
        self.body = bytearray(0)
        self.error: Exception | None = None
        self.over = trio.Event()
        self.came_at = 0.0
        self.job: Job | None = None

    def __len__(self) -> int:
        return self.end - self.start


class Ranges:
    """See the module."""

    def __init__(self, lane: Callable[[], Lane], counters: Counters) -> None:
        """`lane` gives the lane of fetches, which is there once the cache is open."""
        self._lane = lane
        self._counters = counters
        self._ranges: dict[ObjectId, list[_Range]] = {}
        """By object: those on their way, and those that are kept."""
        self._ahead: OrderedDict[_Range, None] = OrderedDict()
        """Those that were asked for ahead and that nobody has come for."""
        self._ahead_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """What was asked for ahead and waits for its reader, or is on its way."""
        return self._ahead_bytes

    async def read(
        self, oid: ObjectId, version: ObjectVersion, source: BlockSource, start: int, length: int
    ) -> memoryview:
        """Return `length` > 0 bytes from `start` of this version. It may be shared memory: do not write to it.

        Raises what the source raises. When it is cancelled, the bytes come all the same, for others who wait.
        """
        found = self._find(oid, start, start + length)
        if found is None:
            found = self._begin(oid, version, source, start, start + length, ahead=False)
        else:
            self._counters.add(metrics.RANGES_JOINED.name)
            found.wanted = True
            if found.job is not None:
                self._lane().promote(found.job, Priority.DEMAND)
        self._come_for(found)
        await found.over.wait()
        if found.error is not None:
            raise _told(found.error) from found.error
        return memoryview(found.body)[start - found.start : start - found.start + length]

    def ahead(self, oid: ObjectId, version: ObjectVersion, source: BlockSource, start: int, length: int) -> None:
        """A reader will want these bytes soon. Never raises; what there is no room for is left out."""
        self._forget_old()
        length = min(length, version.size - start)
        if length <= 0 or start < 0 or self._find(oid, start, start + length) is not None:
            return
        if self._ahead_bytes + length > KEPT_BYTES or len(self._ahead) >= KEPT_RANGES:
            return
        self._counters.add(metrics.RANGES_AHEAD.name)
        self._begin(oid, version, source, start, start + length, ahead=True)

    def _find(self, oid: ObjectId, start: int, end: int) -> _Range | None:
        for known in self._ranges.get(oid, ()):
            if known.start <= start and end <= known.end:
                fresh = not known.over.is_set() or trio.current_time() < known.came_at + KEPT_S
                if known.error is None and fresh:
                    return known
        return None

    def _begin(
        self, oid: ObjectId, version: ObjectVersion, source: BlockSource, start: int, end: int, *, ahead: bool
    ) -> _Range:
        wanted = _Range(oid, start, end, ahead=ahead)
        self._ranges.setdefault(oid, []).append(wanted)
        if ahead:
            self._ahead[wanted] = None
            self._ahead_bytes += len(wanted)

        def work() -> None:
            body = bytearray(end - start)
            for _ in source.read_blocks(version, start, [memoryview(body)]):
                pass
            wanted.body = body

        def finished(error: Exception | None, _: Priority) -> None:
            self._finish(wanted, error)

        self._counters.add(metrics.RANGE_READS.name)
        priority = Priority.READAHEAD if ahead else Priority.DEMAND
        wanted.job = Job(work, finished, end - start + REQUEST_BYTES, priority)
        self._lane().submit(wanted.job, source, source.max_requests)
        return wanted

    def _finish(self, wanted: _Range, error: Exception | None) -> None:
        wanted.job = None
        wanted.error = error
        wanted.came_at = trio.current_time()
        if error is not None and not isinstance(error, errors.CachefsError):
            log.error("a source of ranges failed in an unknown way", exc_info=error)
        if error is None:
            self._counters.add(metrics.RANGE_READ_BYTES.name, len(wanted))
        if error is not None or wanted not in self._ahead:
            self._forget(wanted)
        wanted.over.set()

    def _come_for(self, found: _Range) -> None:
        """A reader has come for what was asked for ahead: from now on it is his, and kept no longer than he wants."""
        if self._ahead.pop(found, self) is None:
            self._ahead_bytes -= len(found)
            self._counters.add(metrics.RANGES_AHEAD_USED.name)
            if found.over.is_set():
                self._forget(found)

    def _forget_old(self) -> None:
        """Those that came first are the first in line, nearly."""
        now = trio.current_time()
        for kept in list(self._ahead):
            if not kept.over.is_set() or now < kept.came_at + KEPT_S:
                break
            self._forget(kept)

    def _forget(self, wanted: _Range) -> None:
        if self._ahead.pop(wanted, self) is None:
            self._ahead_bytes -= len(wanted)
        of_object = self._ranges.get(wanted.oid, [])
        with contextlib.suppress(ValueError):
            of_object.remove(wanted)
        if not of_object:
            self._ranges.pop(wanted.oid, None)

    def give_up(self, error: errors.CachefsError) -> None:
        """The cache is closing: nobody waits any longer."""
        for wanted in _all(self._ranges.values()):
            if not wanted.over.is_set():
                wanted.error = error
                wanted.over.set()
        self._ranges.clear()
        self._ahead.clear()
        self._ahead_bytes = 0


def cut(blocks: Sequence[Filled], start: int, length: int) -> memoryview | None:
    """Return `length` bytes from `start` of neighbouring blocks, None if the bytes of one of them are not here."""
    payloads = [block.payload for block in blocks]
    whole = b"".join(payload for payload in payloads if payload is not None)
    if None in payloads or len(whole) < start + length:
        return None
    return memoryview(whole)[start : start + length]


def _all(lists: Iterable[list[_Range]]) -> list[_Range]:
    return [each for some in lists for each in some]


def _told(error: Exception) -> Exception:
    """Return what one of those who wait is told: a copy, because each of them adds a traceback of its own."""
    if isinstance(error, errors.CachefsError):
        return copy.copy(error)
    return errors.StorageUnavailable(f"reading failed: {error!r}", retryable=False)
