"""Loads through the detectors, the scheduler and the tiers, in a time of their own: what prefetch brings, and what not.

    readers --begun, in batches--> VolumePrefetch --pieces--> slots of the store --> TwoTiers
       ^                                                                               |
       +---- a block that is not there: waits for it, asked for before all pieces <----+

The detectors, their scheduler and the policies are those of the agent; readers, store and tiers are accounts. A request
takes `latency_s` and the time of its bytes; `slots` of those that nobody waits for are under way at once, in the order
in which they were asked for; requests of readers have slots of their own. A reader has one request at a time.

INVARIANT: each block that was brought ahead is counted once, as used, as wasted (it left unread) or as left (nobody had
read it when the readers were done).
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.policies.loads import Load, Read
from bench.policies.replay import TwoTiers
from bench.policies.traces import BLOCK_BYTES
from bench.policies.tree import FixedTree
from cachefs.agent.prefetching import FREE_SHARE, LOOK_S, ORDERED_SHARE
from cachefs.block.ports import EvictionPolicy
from cachefs.metrics import Counters
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.prefetch.scheduler import Scheduler, Space, VolumePrefetch
from cachefs.prefetch.window import PROOF, ReadWindow
from cachefs.types import BlockKey, Ino, ObjectId, ObjectVersion, block_count, block_key

TOLD_EVERY_S = 0.05
"""A worker tells of files that were begun at once after a pause, and then so often."""
Done = Callable[[Sequence[tuple[Piece, Outcome]]], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast everything is."""

    latency_s: float = 0.02
    bytes_per_s: float = 200e6
    """Of one request."""
    slots: int = 64
    here_s: float = 0.0001
    """A read of what is in a tier."""

    def request_s(self, length: int) -> float:
        """Return how long a request for so many bytes takes."""
        return self.latency_s + length / self.bytes_per_s


@dataclass(slots=True)
class Figures:
    """What a load came to."""

    seconds: float = 0.0
    """Until the last reader was done."""
    reads: int = 0
    misses: int = 0
    """Reads that found nothing, and asked for it themselves."""
    late: int = 0
    """Reads of what was on its way already."""
    demand_bytes: int = 0
    issued_bytes: int = 0
    """Brought ahead of a reader."""
    used_bytes: int = 0
    wasted_bytes: int = 0
    left_bytes: int = 0
    """Brought and never read, although it was there to the end."""
    listings: int = 0
    cpu_us_per_file: float = 0.0
    """Of detectors and scheduler, for each file that was begun."""

    @property
    def waste(self) -> float:
        """The share of what was brought ahead that nobody read."""
        return (self.wasted_bytes + self.left_bytes) / max(1, self.issued_bytes)

    @property
    def excess(self) -> float:
        """The share of all bytes from the store that nobody read."""
        return (self.wasted_bytes + self.left_bytes) / max(1, self.issued_bytes + self.demand_bytes)

    @property
    def hits(self) -> float:
        """The share of reads that did not wait."""
        return 1 - (self.misses + self.late) / max(1, self.reads)


@dataclass(slots=True)
class _Process:
    """A reader and where it is."""

    reads: Iterator[Read]
    compute_s: float


@dataclass(slots=True)
class _Order:
    """One call of `prefetch`: pieces that are answered together."""

    left: int
    done: Done
    results: list[tuple[Piece, Outcome]]


class Simulation:
    """One load. Implements `cachefs.prefetch.ports.Fetches`."""

    def __init__(
        self,
        load: Load,
        make: Callable[[], EvictionPolicy],
        *,
        timing: Timing,
        shm_share: float = 1.0,
        prefetch: bool = True,
        listed: bool = True,
    ) -> None:
        """`shm_share`: of the capacity; the rest is the disk tier. `listed`: whether the tree was listed before."""
        self.figures = Figures()
        self.keys: list[BlockKey] = []
        """What was read, in the order of time."""
        self.sizes: dict[BlockKey, int] = {}
        self._timing = timing
        self._load = load
        self._tree = FixedTree(load.files)
        in_shm = int(load.capacity * shm_share)
        self._tiers = TwoTiers(make, in_shm, load.capacity - in_shm, self.sizes, self._left_tiers)
        self._unread: dict[BlockKey, int] = {}
        """Bytes of each block that was brought ahead and not read yet."""
        self._coming: dict[BlockKey, list[Callable[[], None]]] = {}
        """Who waits for each block that is on its way."""
        self._queue: deque[tuple[Piece, _Order | None]] = deque()
        self._busy = 0
        self._windows: dict[Ino, ReadWindow] = {}
        self._told: list[tuple[int, int]] = []
        self._told_at = -TOLD_EVERY_S
        self._pump_is_due = False
        self._space = Space(0, 0)
        self._looked_at = -LOOK_S
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._now = 0.0
        self._cpu_s = 0.0
        self._begun = 0
        self._volume: VolumePrefetch | None = None
        if prefetch:
            self._volume = VolumePrefetch(self._tree, self, BLOCK_BYTES, Counters())
            self._volume.on_over = self._wake
            self._scheduler = Scheduler(self._look)
            self._scheduler.volumes.append(self._volume)
        if listed:
            for directory in {above[0] for above in map(self._tree.parent, self._tree.inos.values()) if above}:
                self._tree.make_listing(directory)

    def run(self) -> Figures:
        """Let everybody read to the end."""
        for reader in self._load.readers:
            process = _Process(itertools.chain.from_iterable(reader.epochs), reader.compute_s)
            self._at(reader.starts_s, lambda process=process: self._step(process))  # type: ignore[misc]
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act()
        self.figures.left_bytes = sum(self._unread.values())
        self.figures.cpu_us_per_file = self._cpu_s / max(1, self._begun) * 1e6
        return self.figures

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), act))

    # -- readers -------------------------------------------------------------------------------------------------------

    def _step(self, process: _Process) -> None:
        """A reader goes on to its next block."""
        read = next(process.reads, None)
        if read is None:
            self.figures.seconds = max(self.figures.seconds, self._now)
            return
        ino = self._tree.inos[read.path]
        version = self._tree.version(ino)
        assert version is not None
        key = self._block(*version, read.block)
        self.keys.append(key)
        self.figures.reads += 1
        self._note(ino, version, read)
        self.figures.used_bytes += self._unread.pop(key, 0)
        if self._tiers.read(key):
            self._at(self._now + self._timing.here_s + process.compute_s, lambda: self._step(process))
            return

        def resume() -> None:
            self._at(self._now + process.compute_s, lambda: self._step(process))

        if key in self._coming:
            self.figures.late += 1
            self._coming[key].append(resume)
            return
        self.figures.misses += 1
        self.figures.demand_bytes += self.sizes[key]
        self._coming[key] = [resume]
        self._at(self._now + self._timing.request_s(self.sizes[key]), lambda: self._arrive([key], ahead=False))

    def _block(self, oid: ObjectId, version: ObjectVersion, index: int) -> BlockKey:
        """Return the key of a block whose size is known from then on."""
        key = block_key(oid, index)
        self.sizes[key] = min(BLOCK_BYTES, version.size - index * BLOCK_BYTES)
        return key

    def _note(self, ino: Ino, version: tuple[ObjectId, ObjectVersion], read: Read) -> None:
        """Tell of a file that is begun, and look whether it is read in sequence, as a worker does."""
        offset, size = read.block * BLOCK_BYTES, version[1].size
        if read.block == 0 or (size > PROOF and ino not in self._windows):
            self._begun += 1
            if self._volume is not None:
                self._told.append((ino, read.block))
                if len(self._told) == 1:
                    self._at(max(self._now, self._told_at + TOLD_EVERY_S), self._tell)
        if size <= PROOF or self._volume is None:
            return
        window = self._windows.setdefault(ino, ReadWindow())
        ask = window.note(offset, min(read.length, size - offset), size)
        for first, end in [*([] if ask is None else [ask]), *window.more()]:
            for index in range(first // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
                self._queue.append((Piece(*version, index, 1), None))
        self._serve()

    def _tell(self) -> None:
        self._told_at = self._now
        told, self._told = list(dict.fromkeys(self._told)), []
        assert self._volume is not None
        begun = time.perf_counter()
        self._volume.note(told)
        self._cpu_s += time.perf_counter() - begun
        self._pump()

    # -- the prefetcher ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._pump_is_due:
            self._pump_is_due = True
            self._at(self._now, self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        assert self._volume is not None
        begun = time.perf_counter()
        more = self._scheduler.pump(self._now)
        self._cpu_s += time.perf_counter() - begun
        while (directory := self._volume.planner.take_listing()) is not None:
            self.figures.listings += 1
            self._at(self._now + self._timing.latency_s, lambda directory=directory: self._listed(directory))  # type: ignore[misc]
        if more:
            self._wake()

    def _listed(self, directory: Ino) -> None:
        self._tree.make_listing(directory)
        self._wake()

    def _look(self) -> Space:
        """Return how much of the nearest tier may be filled ahead, as the agent does."""
        if self._now - self._looked_at > LOOK_S:
            shm = self._tiers.shm
            free = max(0, shm.capacity - shm.used)
            self._space = Space(int(ORDERED_SHARE * shm.capacity), int(FREE_SHARE * free))
            self._looked_at = self._now
        return self._space

    def holds(self, oid: ObjectId, block: int) -> bool:
        """See `Fetches.holds`."""
        return block_key(oid, block) in self._tiers

    def prefetch(self, pieces: Sequence[Piece], done: Done) -> None:
        """See `Fetches.prefetch`."""
        order = _Order(len(pieces), done, [])
        self._queue.extend((piece, order) for piece in pieces)
        self._serve()

    # -- the store -----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Begin what waits, as far as there are slots."""
        while self._queue and self._busy < self._timing.slots:
            piece, order = self._queue.popleft()
            end = min(piece.first + piece.count, block_count(piece.version.size, BLOCK_BYTES))
            keys = [self._block(piece.oid, piece.version, index) for index in range(piece.first, end)]
            wanted = [key for key in keys if key not in self._tiers and key not in self._coming]
            if not wanted:
                joined = any(key in self._coming for key in keys)
                self._at(self._now, lambda piece=piece, order=order, joined=joined: self._over(  # type: ignore[misc]
                    piece, order, Outcome.JOINED if joined else Outcome.THERE))  # fmt: skip
                continue
            self._busy += 1
            self._coming.update((key, []) for key in wanted)
            length = sum(self.sizes[key] for key in wanted)
            self.figures.issued_bytes += length

            def came(piece: Piece = piece, order: _Order | None = order, wanted: list[BlockKey] = wanted) -> None:
                self._busy -= 1
                self._arrive(wanted, ahead=True)
                self._over(piece, order, Outcome.FETCHED)
                self._serve()

            self._at(self._now + self._timing.request_s(length), came)

    def _over(self, piece: Piece, order: _Order | None, outcome: Outcome) -> None:
        if order is None:
            return
        order.results.append((piece, outcome))
        if len(order.results) == order.left:
            begun = time.perf_counter()
            order.done(order.results)
            self._cpu_s += time.perf_counter() - begun

    def _arrive(self, keys: list[BlockKey], *, ahead: bool) -> None:
        """Blocks came from the store."""
        for key in keys:
            waiting = self._coming.pop(key)
            if ahead and not waiting:
                self._unread[key] = self.sizes[key]
            elif ahead:
                self.figures.used_bytes += self.sizes[key]
            self._tiers.put(key, ahead=ahead and not waiting)
            for resume in waiting:
                resume()

    def _left_tiers(self, key: BlockKey) -> None:
        self.figures.wasted_bytes += self._unread.pop(key, 0)
