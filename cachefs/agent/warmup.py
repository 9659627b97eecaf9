"""Bringing many files into the tiers, and looking whether they are there: the work of `cachefs warmup`.

Files are brought in their order, a window of bytes at a time, through the same bulk fetch as the prefetcher's
(`BlockCache.prefetch`), so readers overtake them. When the store refuses or does not answer, the window shrinks and
what failed is tried again; a store that gives nothing for two minutes ends the job.

At the end every block is looked for once more: what was evicted meanwhile, or never came, is not passed over in
silence.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from cachefs import errors, metrics
from cachefs.agent.crowd import Crowd
from cachefs.agent.guidance import Guidance
from cachefs.agent.jobs import Job, State
from cachefs.agent.pins import Pins
from cachefs.agent.spool import Spool
from cachefs.agent.volumes import FileVersion
from cachefs.block.block_cache import BlockCache
from cachefs.metrics import Counters
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.types import PART_BYTES, BlockKey, Ino, Tier, block_key

MIB = 1 << 20
MOST_BYTES, LEAST_BYTES = 64 * MIB, 8 * MIB
"""What is asked for at a time."""
MOST_PIECES = 1024
AT_ONCE = 128
"""Pieces of one call: what fails in it is a sign of how the store is."""
TRIES = 6
LONGEST_PAUSE_S = 15.0
GIVE_UP_S = 120.0
LOOK_AGAIN_S = 0.001
LOOK_AGAIN = 2


@dataclass(frozen=True, slots=True)
class _Asked:
    """A piece on its way."""

    ino: Ino
    piece: Piece
    size: int
    tries: int = 0


class Bringing:
    """Brings all files of a job. Trio thread."""

    def __init__(self, job: Job, cache: BlockCache, counters: Counters, crowd: Crowd | None) -> None:
        """`crowd` gets the objects of the job, before they are asked for."""
        self._job = job
        self._crowd = crowd
        self._figures = job.figures
        self._cache = cache
        self._counters = counters
        self._peers_before = self._from_peers()
        self._part = max(1, PART_BYTES // cache.block_size)
        self._batch: list[_Asked] = []
        self._batch_bytes = 0
        self._again: list[tuple[float, int, _Asked]] = []
        """A heap of what is tried again, by when."""
        self._order = itertools.count()
        self._open_bytes = self._open_pieces = 0
        self._window = MOST_BYTES
        self._refusals = 0
        """Calls in a row most of which failed."""
        self._pause_until = 0.0
        self._came_at = trio.current_time()
        self._news = trio.Event()

    async def run(self, spool: Spool) -> None:
        """Bring what is in no tier; returns when all is there or has failed for good. Raises StorageUnavailable."""
        await self._job.each(spool, self._take)
        self._send()
        while self._open_pieces or self._again:
            await self._wait()
            self._retry()

    async def _take(self, ino: Ino, file: FileVersion) -> None:
        """Ask for what is missing of a file."""
        self._figures.done_files += 1
        if self._crowd is not None:
            self._crowd.add(file.oid)
        here: list[BlockKey] = []
        start = 0
        while start < file.blocks:
            stop = min(file.blocks, start - start % self._part + self._part)
            for there, group in itertools.groupby(range(start, stop), functools.partial(self._is_there, file, here)):
                indexes = list(group)
                size = _bytes(file, indexes, self._cache.block_size)
                if there:
                    self._figures.there_bytes += size
                else:
                    piece = Piece(file.oid, file.version, indexes[0], len(indexes), self._job.tier)
                    await self._ask(_Asked(ino, piece, size))
            start = stop
        if here:
            self._cache.touch(here)  # what is wanted soon must not leave while the rest comes

    def _is_there(self, file: FileVersion, here: list[BlockKey], index: int) -> bool:
        key = block_key(file.oid, index)
        if not is_there(self._cache, key, self._job.tier):
            return False
        here.append(key)
        return True

    async def _ask(self, asked: _Asked) -> None:
        self._batch.append(asked)
        self._batch_bytes += asked.size
        if len(self._batch) < AT_ONCE and self._batch_bytes < LEAST_BYTES:
            return
        self._send()
        while self._is_full():
            await self._wait()
            self._retry()

    def _is_full(self) -> bool:
        return (
            self._open_bytes >= self._window
            or self._open_pieces >= MOST_PIECES
            or len(self._again) >= MOST_PIECES
            or trio.current_time() < self._pause_until
        )

    def _send(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if not batch:
            return
        self._open_pieces += len(batch)
        self._open_bytes += sum(asked.size for asked in batch)
        pieces = [asked.piece for asked in batch]
        self._cache.prefetch(pieces, self._job.blocks_from, functools.partial(self._done, batch))

    def _retry(self) -> None:
        now = trio.current_time()
        if now < self._pause_until:
            return
        while self._again and self._again[0][0] <= now and self._open_bytes < self._window:
            self._batch.append(heapq.heappop(self._again)[2])
            if len(self._batch) >= AT_ONCE:
                self._send()
        self._send()

    async def _wait(self) -> None:
        """Wait until something has come, or is to be tried again. Raises StorageUnavailable when nothing comes."""
        self._news = trio.Event()
        until = self._pause_until if self._pause_until > trio.current_time() else trio.current_time() + LONGEST_PAUSE_S
        if self._again:
            until = min(until, max(self._again[0][0], self._pause_until))
        with trio.move_on_at(until):
            await self._news.wait()
        if self._refusals and trio.current_time() > self._came_at + GIVE_UP_S:
            raise errors.StorageUnavailable(f"nothing has come for {GIVE_UP_S:g} s: {self._why()}")

    def _done(self, batch: Sequence[_Asked], outcomes: Sequence[tuple[Piece, Outcome]]) -> None:
        """A call is over."""
        bad = 0
        for asked, (_, outcome) in zip(batch, outcomes, strict=True):
            self._open_pieces -= 1
            self._open_bytes -= asked.size
            match outcome:
                case Outcome.THERE:
                    self._figures.there_bytes += asked.size
                case Outcome.FETCHED | Outcome.JOINED:
                    self._figures.fetched_bytes += asked.size
                case Outcome.GONE:
                    self._lose(asked, "it was deleted or replaced in the store")
                case Outcome.FAILED | Outcome.DROPPED:
                    bad += 1
                    self._put_back(asked, outcome)
        self._adapt(bad, len(batch))
        self._figures.peer_bytes = min(self._from_peers() - self._peers_before, self._figures.fetched_bytes)
        self._news.set()

    def _put_back(self, asked: _Asked, outcome: Outcome) -> None:
        if asked.tries + 1 >= TRIES:
            self._lose(asked, "no tier takes it" if outcome is Outcome.DROPPED else self._why())
            return
        again = _Asked(asked.ino, asked.piece, asked.size, asked.tries + 1)
        due = trio.current_time() + min(2.0**asked.tries / 2, LONGEST_PAUSE_S)
        heapq.heappush(self._again, (due, next(self._order), again))

    def _lose(self, asked: _Asked, why: str) -> None:
        self._figures.lost_bytes += asked.size
        self._job.blame(asked.ino, why)

    def _adapt(self, bad: int, asked: int) -> None:
        """Ask for less at a time while the store refuses, and for nothing at all while it refuses nearly everything."""
        if bad < asked:
            self._came_at = trio.current_time()
        if bad * 2 < asked:
            self._refusals = 0
            self._window = min(MOST_BYTES, self._window + LEAST_BYTES)
            return
        self._window = max(LEAST_BYTES, self._window // 2)
        self._refusals += 1
        self._pause_until = trio.current_time() + min(2.0 ** (self._refusals - 1) / 2, LONGEST_PAUSE_S)

    def _from_peers(self) -> int:
        return int(self._counters.snapshot().get(metrics.PEER_FILL_BYTES.name, 0))

    def _why(self) -> str:
        said = self._job.volume.store.now.counters.condition.describe().get("last_error")
        return f"the store does not give it ({said})" if said else "the store does not give it"


class WarmUp:
    """What warm-ups need of an agent."""

    def __init__(self, cache: BlockCache, counters: Counters, guidance: Guidance, pins: Pins) -> None:
        self._cache = cache
        self._counters = counters
        self._guidance = guidance
        self._pins = pins

    async def run(self, job: Job, spool: Spool) -> None:
        """Bring the files of a job, then look whether all are there. Raises StorageUnavailable, UsageError."""
        job.capacity_bytes = self._cache.capacity_bytes(job.volume.owner, job.tier)
        if not job.capacity_bytes and job.figures.blocks:
            what = "both tiers are" if job.tier is None else f"the {job.tier} tier is"
            raise errors.StorageUnavailable(f"{what} off: there is nothing to bring it to", retryable=False)
        if job.figures.needs_bytes > job.capacity_bytes:
            await job.ask()
        job.state = State.FETCHING
        async with self._staying(job) as crowd:
            await Bringing(job, self._cache, self._counters, crowd).run(spool)
            await check(self._cache, job, spool)

    @asynccontextmanager
    async def _staying(self, job: Job) -> AsyncIterator[Crowd | None]:
        """Keep what a job brings until it is over, if there is room for that beside what is pinned."""
        most_bytes = self._pins.most_of(job.volume.owner)
        if job.figures.needs_bytes + self._pins.takes_bytes > most_bytes:
            yield None
            return
        crowd = Crowd(job.figures.files)
        question = crowd.__contains__
        await self._guidance.keep(question)
        try:
            yield crowd
        finally:
            with trio.CancelScope(shield=True):
                await self._guidance.let_go(question)


async def check(cache: BlockCache, job: Job, spool: Spool) -> None:
    """Look which blocks are in no tier."""
    job.state = State.CHECKING
    job.capacity_bytes = cache.capacity_bytes(job.volume.owner, job.tier)
    figures = job.figures
    checking = job.verb == "check"

    async def look(ino: Ino, file: FileVersion) -> None:
        keys = [block_key(file.oid, index) for index in range(file.blocks)]
        missing = [key for key in keys if not is_there(cache, key, job.tier)]
        for _ in range(LOOK_AGAIN):  # the index may say no for the instant in which it moves a block
            if not missing or figures.missing_files > MOST_PIECES:
                break
            await trio.sleep(LOOK_AGAIN_S)
            missing = [key for key in missing if not is_there(cache, key, job.tier)]
        if checking:
            lost = _bytes(file, [int.from_bytes(key[-4:], "big") for key in missing], cache.block_size)
            figures.done_files += 1
            figures.lost_bytes += lost
            figures.there_bytes += file.version.size - lost
        if missing:
            figures.missing_files += 1
            figures.missing_blocks += len(missing)
            where = "in no tier" if job.tier is not Tier.SHM else "not in the shm tier"
            job.blame(ino, f"{len(missing)} of {file.blocks} blocks are {where}")

    await job.each(spool, look)


def is_there(cache: BlockCache, key: BlockKey, tier: Tier | None) -> bool:
    """Whether a block is where a job wants it. What is in the shm tier is on its way to the disk tier."""
    place = cache.has(key)
    return place is Tier.SHM if tier is Tier.SHM else place is not None


def _bytes(file: FileVersion, indexes: Sequence[int], block_size: int) -> int:
    """Return how many bytes these blocks of a file have."""
    return sum(min(block_size, file.version.size - index * block_size) for index in indexes)
