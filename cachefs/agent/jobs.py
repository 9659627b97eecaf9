"""Jobs: what commands have the agent do with many files. Each walks first, and works then on exactly what it found.

    paths (a stream) -> Walk -> Spool -> warm     bring what is in no tier (`cachefs.agent.warmup`), then look again
                                      -> check    look what is in no tier
                                      -> evict    take it out of the tiers
                                      -> pin      keep it in the tiers (`cachefs.agent.pins`)

A job that is to bring more than the tiers can hold waits for consent. Whatever goes wrong with a file is a problem of
the job: some are kept with their paths, all are counted. A job lives in the agent alone; when that dies, it is asked
for again, and what is there is left out.

INVARIANT: memory does not grow with the number of files (pins: 16 bytes for each).
"""

from __future__ import annotations

import enum
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from cachefs import errors
from cachefs.agent.spool import Spool
from cachefs.agent.volumes import FileVersion, Volume
from cachefs.agent.walking import Walk
from cachefs.block import codec
from cachefs.block.ledger import value_cost
from cachefs.block.ports import BlockSource
from cachefs.types import ROOT_INO, Ino, Tier

log = logging.getLogger(__name__)

MOST_EXAMPLES = 1000
TURN = 256
"""Files between which readers have their turn."""
RATE_MARKS, RATE_MARK_S = 10, 1.0
"""A rate is that of the last ten seconds."""
_numbers = itertools.count(1)


class Verb(enum.StrEnum):
    """What a job does."""

    WARM = "warm"
    CHECK = "check"
    EVICT = "evict"
    PIN = "pin"


class State(enum.StrEnum):
    """How far a job is. The last four are for good."""

    WALKING = "walking"
    ASKING = "asking"
    FETCHING = "fetching"
    CHECKING = "checking"
    EVICTING = "evicting"
    PINNING = "pinning"
    DONE = "done"
    INCOMPLETE = "incomplete"
    STOPPED = "stopped"
    FAILED = "failed"


OVER = frozenset({State.DONE, State.INCOMPLETE, State.STOPPED, State.FAILED})


@dataclass(slots=True)
class Figures:
    """What a job counts. Bytes are those of files, but for `needs_bytes` (what they take in a tier)."""

    files: int = 0
    bytes: int = 0
    blocks: int = 0
    needs_bytes: int = 0
    done_files: int = 0
    there_bytes: int = 0
    fetched_bytes: int = 0
    peer_bytes: int = 0
    lost_bytes: int = 0
    missing_files: int = 0
    missing_blocks: int = 0
    evicted_blocks: int = 0

    @property
    def done_bytes(self) -> int:
        """What nothing has to be done for any more."""
        return self.there_bytes + self.fetched_bytes + self.lost_bytes


@dataclass(slots=True)
class Problems:
    """Paths that something is wrong with: all are counted, some are kept."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)
    _told: set[Ino] = field(default_factory=set)

    def add(self, path: bytes, why: str) -> None:
        """Something is wrong with a path."""
        self.count += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append((path.decode("utf-8", "surrogateescape"), why))

    def add_file(self, ino: Ino, path: bytes, why: str) -> None:
        """Something is wrong with a file; the first thing that is said of it is what is kept."""
        if ino in self._told:
            return
        if len(self._told) < MOST_EXAMPLES:
            self._told.add(ino)
        self.add(path, why)


class Job:
    """One job. `act` does what it is for; it may change `state` and count in `figures` and `problems`."""

    def __init__(
        self,
        verb: Verb,
        volume: Volume,
        mountpoint: str,
        block_size: int,
        spool_dir: str,
        act: Callable[[Job, Spool], Awaitable[None]],
        *,
        force: bool = False,
        background: bool = False,
        tier: Tier | None = None,
        source: BlockSource | None = None,
    ) -> None:
        """`tier`: where blocks are to be, as in `Piece.to`; `source`: where they come from, if not as always."""
        self.identity = f"{next(_numbers)}-{secrets.token_hex(2)}"
        self.verb, self.volume, self.mountpoint = verb, volume, mountpoint
        self.force, self.background = force, background
        self.tier = tier
        self._source = source
        self.state = State.WALKING
        self.error = ""
        self.figures = Figures()
        self.problems = Problems()
        self.sections: list[tuple[bytes, int]] = []
        """Of a job to pin: each path, and how many files had been found when it was done."""
        self.capacity_bytes = 0
        self.consent = trio.Event()
        self.over = trio.Event()
        self.fed = trio.Event()
        """All paths are known."""
        self._act = act
        self._block_size = block_size
        self._spool_dir = spool_dir
        self._scope = trio.CancelScope()
        self._feed, self._paths = trio.open_memory_channel[list[bytes]](1)
        self._began = time.monotonic()
        self._began_at = time.time()
        self._ended: float | None = None
        self._marks: deque[tuple[float, int]] = deque([(self._began, 0)], maxlen=RATE_MARKS)
        self._full_cost = value_cost(block_size + codec.HEADER_SIZE)

    # -- from outside --------------------------------------------------------------------------------------------------

    async def feed(self, paths: list[bytes], *, last: bool) -> None:
        """Give it more paths; returns when it can take even more. Nothing happens when it is over."""
        try:
            if paths:
                await self._feed.send(paths)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if last:
            await self._feed.aclose()
            self.fed.set()

    def offer(self, paths: list[bytes], *, last: bool) -> bool:
        """As `feed`, without waiting: False when it can take none now."""
        try:
            if paths:
                self._feed.send_nowait(paths)
        except trio.WouldBlock:
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        if last:
            self._feed.close()
            self.fed.set()
        return True

    @property
    def blocks_from(self) -> BlockSource:
        """Where its blocks come from."""
        return self._source or self.volume.blocks_from

    @property
    def examples(self) -> int:
        """How many problems can be named."""
        return len(self.problems.examples)

    def stop(self) -> None:
        """End it; it is over a moment later."""
        self._scope.cancel()

    async def run(self) -> None:
        """Do it. Raises nothing: `state` and `error` say how it ended."""
        try:
            with self._scope:
                await self._work()
        except errors.CachefsError as error:
            self.state, self.error = State.FAILED, str(error) or type(error).__name__
        except Exception as error:  # the agent must not end with all its mounts because one job is strange
            log.exception("a job failed")
            self.state, self.error = State.FAILED, f"{type(error).__name__}: {error} (the agent's log says where)"
        finally:
            if self.state not in OVER:
                self.state = State.STOPPED
            self._ended = time.monotonic()
            self._paths.close()
            self.fed.set()
            self.over.set()
            log.info("%s %s of %s: %s %s", self.verb, self.identity, self.mountpoint, self.state, self.error)

    async def _work(self) -> None:
        with Spool(self._spool_dir) as spool:
            await self._walk(spool)
            await self._act(self, spool)
        bad = self.problems.count or self.figures.missing_blocks
        self.state = State.INCOMPLETE if bad else State.DONE

    async def _walk(self, spool: Spool) -> None:
        def found(ino: Ino, size: int) -> None:
            spool.append(ino)
            self._count(size)

        async with Walk.opened(self.volume, found, self.problems.add, spool.settle) as walk:
            async for paths in self._paths:
                for path, ino in zip(paths, await walk.resolve(paths), strict=True):
                    await walk.take(path, ino)
                    if self.verb is Verb.PIN:
                        self.sections.append((path, len(spool)))
                await spool.settle()

    def _count(self, size: int) -> None:
        figures = self.figures
        whole, rest = divmod(size, self._block_size)
        figures.files += 1
        figures.bytes += size
        figures.blocks += whole + (rest > 0)
        figures.needs_bytes += whole * self._full_cost + (value_cost(rest + codec.HEADER_SIZE) if rest else 0)

    # -- for what it is to do ------------------------------------------------------------------------------------------

    async def ask(self) -> None:
        """Wait until somebody agrees that this job is too large. Raises UsageError in the background."""
        if self.force or self.consent.is_set():
            return
        if self.background:
            raise errors.UsageError(
                f"it is larger than the tiers ({self.figures.needs_bytes} bytes, they hold {self.capacity_bytes}): "
                "nothing was fetched (--force fetches all the same)"
            )
        self.state = State.ASKING
        await self.consent.wait()

    async def each(
        self, spool: Spool, use: Callable[[Ino, FileVersion], Awaitable[object]], numbers: range | None = None
    ) -> None:
        """Call `use` for each file that was found (`numbers`: only for those). One that is not known any more is a
        problem.
        """
        at, end = (0, len(spool)) if numbers is None else (numbers.start, numbers.stop)
        while at < end:
            chunk = (await spool.read(at))[: end - at]
            for number, ino in enumerate(map(Ino, chunk)):
                if number % TURN == 0:
                    await trio.lowlevel.checkpoint()
                try:
                    file = self.volume.file(ino, self._block_size)
                except (errors.StaleObject, errors.IsADirectory):
                    self.problems.add_file(ino, b"(unknown)", "it vanished")
                    continue
                await use(ino, file)
            at += len(chunk)

    def blame(self, ino: Ino, why: str) -> None:
        """Something is wrong with a file."""
        try:
            reader = self.volume.writer.reader
            path = reader.key_of(ino).removeprefix(reader.key_of(ROOT_INO))
        except errors.CachefsError:
            path = "(unknown)"
        self.problems.add_file(ino, path.encode("utf-8", "surrogateescape"), why)

    # -- what is said of it --------------------------------------------------------------------------------------------

    def describe(self, examples: int = 10) -> dict[str, Any]:
        """Return what docs/STATUS.md says of a job. `examples`: how many problems to name at most."""
        now = self._ended or time.monotonic()
        figures = self.figures
        rate = self._rate(now)
        left = figures.bytes - figures.done_bytes
        known = self.state is State.FETCHING and rate > 0
        return {
            "job": self.identity,
            "verb": str(self.verb),
            "tier": self.tier and str(self.tier),
            "mountpoint": self.mountpoint,
            "state": str(self.state),
            "error": self.error or None,
            "background": self.background,
            "started_at": self._began_at,
            "elapsed_s": round(now - self._began, 3),
            "capacity_bytes": self.capacity_bytes,
            **{name: getattr(figures, name) for name in Figures.__slots__},
            "done_bytes": figures.done_bytes,
            "bytes_per_s": round(rate),
            "left_s": round(left / rate, 1) if known else None,
            "problems": self.problems.count,
            "examples": [{"path": path, "why": why} for path, why in self.problems.examples[:examples]],
            "nodes": [],
        }

    def _rate(self, now: float) -> float:
        """Return how many bytes a second it brings now; when it is over, how many it brought on the whole."""
        fetched = self.figures.fetched_bytes
        if self._ended is not None:
            return fetched / max(now - self._began, 0.001)
        if now >= self._marks[-1][0] + RATE_MARK_S:
            self._marks.append((now, fetched))
        since, then = self._marks[0]
        return (fetched - then) / max(now - since, 0.1)
