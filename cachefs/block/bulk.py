"""Bringing many blocks that nobody waits for yet: what `BlockCache.prefetch` does.

One cold small file costs the agent 1.6 ms on the way of a reader's miss: a message, a job, a thread's turn, a
transaction and a turn of the event loop for each of them. Here they are shared: small objects go in *batches* of up to
`BATCH_BYTES`, each one job of the lane, whose source sends many requests at once (`BlockSource.read_many`) and hands
each body over in the thread that received it. Bodies that have come are committed in groups, one transaction each. All
that is longer than a small object goes the usual way, in ranges, behind readahead.

Each block is a flight like any other, so a reader who wants one joins it, and does not wait for the batch: an object
whose turn has not come is taken out of the batch and fetched at once, one that was asked for in vain and would be
asked for again as well, and one that has come is committed at once.

INVARIANT: a flight belongs to its batch until it is over or TAKEN, and nobody else ends it. Once TAKEN the batch never
touches it again.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import trio

from cachefs import errors, metrics
from cachefs.block import codec
from cachefs.block.budget import REQUEST_BYTES
from cachefs.block.codec import Bytes
from cachefs.block.flights import Flight
from cachefs.block.jobs import Jobs
from cachefs.block.lane import Job, Priority
from cachefs.block.ports import BlockSource
from cachefs.prefetch.ports import Outcome, Piece
from cachefs.types import BlockKey, ObjectId, ObjectVersion, Tier, block_count, block_key

log = logging.getLogger(__name__)

Token = trio.lowlevel.TrioToken
Done = Callable[[Sequence[tuple[Piece, Outcome]]], None]

MIB = 1 << 20
SMALL_BYTES = MIB
"""Objects of one block up to this size go in batches. A longer one is worth a request with a job of its own."""
BATCH_BYTES = 8 * MIB
BATCH_OBJECTS = 256
BATCHES = 2
"""How many batches of a route run at once: one sends requests while the other waits for its last answers."""
GROUP_BYTES = MIB
GROUP_OBJECTS = 16
"""What is committed in one transaction."""


class _State(enum.Enum):
    FREE = enum.auto()
    """Its turn has not come, or comes again: a reader may take it."""
    BEGUN = enum.auto()
    """It is being asked for."""
    LANDED = enum.auto()
    """Its bytes are here; it is in a group that is committed, or waits for that."""
    TAKEN = enum.auto()
    OVER = enum.auto()


class Batch:
    """Small objects on their way; the `Orders` of `BlockSource.read_many`. Any thread, but where it says otherwise."""

    def __init__(
        self, source: BlockSource, wanted: Sequence[tuple[ObjectVersion, Flight]], jobs: Jobs, token: Token
    ) -> None:
        self._source = source
        self._versions = [version for version, _ in wanted]
        self._flights = [flight for _, flight in wanted]
        self._numbers = {flight.key: number for number, flight in enumerate(self._flights)}
        self._jobs = jobs
        self._token = token
        self._lock = threading.Lock()
        self._states = [_State.FREE] * len(wanted)
        self._group: list[tuple[Flight, Bytes]] = []
        self._group_bytes = 0
        self.taken = 0
        """How many were given away."""
        for flight in self._flights:
            flight.batch = self

    @property
    def size(self) -> int:
        """How many bytes it may hold at a time."""
        return sum(flight.length for flight in self._flights) + REQUEST_BYTES

    def want(self, flight: Flight) -> bool:
        """See `Yields.want`. Trio thread."""
        number = self._numbers[flight.key]
        with self._lock:
            if self._states[number] is _State.FREE:
                self._take(number)
                return True
            waits = self._states[number] is _State.LANDED and bool(self._group)
        if waits:
            self._jobs.submit_to_tiers(Job(self._commit, _unexpected, 0, Priority.DEMAND))
        return False

    def _take(self, number: int) -> None:
        """Give it away. Under the lock."""
        self._states[number] = _State.TAKEN
        self._flights[number].batch = None
        self.taken += 1

    # -- the thread of the job, and others of the source ---------------------------------------------------------------

    def work(self) -> None:
        """Bring them. Raises what `BlockSource.read_many` raises; what came until then is kept."""
        try:
            self._source.read_many(self._versions, self)
        finally:
            self._commit()

    def begin(self, number: int) -> bool:
        """See `Orders.begin`."""
        with self._lock:
            free = self._states[number] is _State.FREE
            if free:
                self._states[number] = _State.BEGUN
            return free

    def postponed(self, number: int) -> bool:
        """See `Orders.postponed`."""
        with self._lock:
            flight = self._flights[number]
            if not flight.wanted:
                self._states[number] = _State.FREE
                return True
            self._take(number)
        _soon(self._token, self._hand_over, number)
        return False

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        """See `Orders.arrived`."""
        flight = self._flights[number]
        if len(body) != flight.length:
            self.failed(number, errors.BadBody(f"{self._versions[number].key!r} came with {len(body)} bytes"))
            return
        flight.source = source
        value = codec.encode(body, flight.key)
        with self._lock:
            self._states[number] = _State.LANDED
            self._group.append((flight, value))
            self._group_bytes += len(value)
            full = self._group_bytes >= GROUP_BYTES or len(self._group) >= GROUP_OBJECTS
            due = full or flight.wanted
        if due:
            self._commit()

    def failed(self, number: int, error: errors.CachefsError) -> None:
        """See `Orders.failed`."""
        with self._lock:
            if self._states[number] is _State.TAKEN:
                return
            self._states[number] = _State.OVER
        _soon(self._token, self._lost, number, error)

    def _commit(self) -> None:
        """Put what has come into a tier, and let readers have it."""
        with self._lock:
            group, self._group, self._group_bytes = self._group, [], 0
        if not group:
            return
        flights = [flight for flight, _ in group]
        in_shm_only: list[BlockKey] = []
        try:
            self._jobs.mover.keep(flights, [value for _, value in group], in_shm_only)
        finally:
            _soon(self._token, self._kept, flights, in_shm_only)

    # -- the trio thread -----------------------------------------------------------------------------------------------

    def _kept(self, flights: Sequence[Flight], in_shm_only: Sequence[BlockKey]) -> None:
        unknown = errors.StorageUnavailable("keeping the block failed in an unknown way", retryable=False)
        self._jobs.land(flights, unknown)  # those that are over are not touched by it
        self._jobs.spill_later(in_shm_only, flights[0].owner, flights)

    def _lost(self, number: int, error: errors.CachefsError) -> None:
        self._jobs.land([self._flights[number]], error)

    def _hand_over(self, number: int) -> None:
        """A reader has waited in vain for what the batch asked for: now it is asked for in the reader's name."""
        flight = self._flights[number]
        if not flight.over:
            self._jobs.fetch(self._versions[number], self._source, [flight], Priority.DEMAND)

    def finished(self, error: Exception | None) -> None:
        """The job is over: so is what is left of it."""
        with self._lock:
            left = [number for number, flight in enumerate(self._flights) if self._is_left(number, flight)]
            for number in left:
                if self._flights[number].wanted:
                    self._take(number)
        if left and error is None:
            error = errors.StorageUnavailable("the source left it out", retryable=False)
        for number in left:
            if self._states[number] is _State.TAKEN:
                self._hand_over(number)
            else:
                self._jobs.land([self._flights[number]], error)
        for flight in self._flights:
            if flight.batch is self:
                flight.batch = None  # a circle

    def _is_left(self, number: int, flight: Flight) -> bool:
        return not flight.over and self._states[number] is not _State.TAKEN


def _soon(token: Token, call: Callable[..., None], *arguments: object) -> None:
    """Call in the trio thread. Any thread."""
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(call, *arguments)


def _unexpected(error: Exception | None, _: Priority) -> None:
    if error is not None:
        log.error("keeping blocks failed in an unknown way", exc_info=error)


@dataclass(slots=True)
class _Asked:
    piece: Piece
    flights: list[Flight]
    joined: bool
    dropped: bool = False


class _Request:
    """One call of `prefetch`: counts what is under way, and reports at the end."""

    def __init__(self, done: Done, token: Token) -> None:
        self._done = done
        self._token = token
        self._asked: list[_Asked] = []
        self._lock = threading.Lock()
        self._left = 1

    def add(self, asked: _Asked) -> None:
        self._asked.append(asked)

    def watch(self) -> None:
        """All is asked for: report when it is over."""
        for asked in self._asked:
            with self._lock:
                self._left += len(asked.flights)
            for flight in asked.flights:
                flight.watch(self)
        self()

    def __call__(self) -> None:
        """A flight is over. Any thread."""
        with self._lock:
            self._left -= 1
            if self._left:
                return
        _soon(self._token, self._report)

    def _report(self) -> None:
        try:
            self._done([(asked.piece, _outcome(asked)) for asked in self._asked])
        except Exception:
            log.exception("whoever asked for blocks in bulk could not be told")  # would end the event loop


def _outcome(asked: _Asked) -> Outcome:
    if asked.dropped:
        return Outcome.DROPPED
    for flight in asked.flights:
        match flight.error:
            case None:
                if not flight.kept:
                    return Outcome.DROPPED
            case errors.StaleObject() | errors.NotFound():
                return Outcome.GONE
            case errors.AgentUnavailable():
                return Outcome.DROPPED
            case _:
                return Outcome.FAILED
    if asked.joined or any(flight.wanted for flight in asked.flights):
        return Outcome.JOINED
    return Outcome.FETCHED if asked.flights else Outcome.THERE


class Bulk:
    """Makes flights and batches of what is to be prefetched. Trio thread."""

    def __init__(
        self,
        jobs: Jobs,
        *,
        has: Callable[[BlockKey], Tier | None],
        keeps: Callable[[], bool],
        take_off: Callable[[ObjectId, ObjectVersion, BlockSource, range, Tier | None], list[Flight]],
    ) -> None:
        """`keeps` says whether any tier takes blocks now, `take_off` makes flights the usual way, and their jobs."""
        self._jobs = jobs
        self._has = has
        self._keeps = keeps
        self._take_off = take_off

    def prefetch(self, pieces: Sequence[Piece], source: BlockSource, done: Done) -> None:
        """See `BlockCache.prefetch`."""
        token = trio.lowlevel.current_trio_token()
        request = _Request(done, token)
        small: dict[BlockSource, list[tuple[ObjectVersion, Flight]]] = {}
        if not self._keeps():
            for piece in pieces:
                request.add(_Asked(piece, [], joined=False, dropped=True))
            pieces = ()
        for piece in pieces:
            if piece.version.size <= min(SMALL_BYTES, self._jobs.block_size):
                request.add(self._small(piece, source, small))
            else:
                request.add(self._large(piece, source))
        for route, wanted in small.items():
            for some in _batches(wanted):
                self._submit(route, some, token)
        request.watch()

    def _small(
        self, piece: Piece, source: BlockSource, small: dict[BlockSource, list[tuple[ObjectVersion, Flight]]]
    ) -> _Asked:
        version = piece.version
        if piece.first or not version.size or not piece.count:
            return _Asked(piece, [], joined=False)
        key = block_key(piece.oid, 0)
        flight = self._jobs.flights.get(key)
        if flight is not None and not flight.over:
            return _Asked(piece, [flight], joined=True)
        place = self._has(key)
        if place is Tier.DISK and piece.to is Tier.SHM:
            return _Asked(piece, self._take_off(piece.oid, version, source, range(1), piece.to), joined=False)
        if place is not None:
            return _Asked(piece, [], joined=False)
        straight = piece.to is Tier.DISK
        flight = self._jobs.flights[key] = Flight(key, 0, version.size, inline=False, wanted=False, straight=straight)
        flight.owner = self._jobs.owner_of(source)
        small.setdefault(source.route(version, 0), []).append((version, flight))
        return _Asked(piece, [flight], joined=False)

    def _large(self, piece: Piece, source: BlockSource) -> _Asked:
        last = min(piece.first + piece.count, block_count(piece.version.size, self._jobs.block_size))
        indexes = range(piece.first, last)
        under_way = (self._jobs.flights.get(block_key(piece.oid, index)) for index in indexes)
        joined = any(flight is not None and not flight.over for flight in under_way)
        return _Asked(piece, self._take_off(piece.oid, piece.version, source, indexes, piece.to), joined)

    def _submit(self, route: BlockSource, wanted: Sequence[tuple[ObjectVersion, Flight]], token: Token) -> None:
        batch = Batch(route, wanted, self._jobs, token)

        def finished(error: Exception | None, _: Priority) -> None:
            if error is not None and not isinstance(error, errors.CachefsError):
                log.error("a source of blocks failed in an unknown way", exc_info=error)
            batch.finished(error)
            self._jobs.counters.add(metrics.BULK_TAKEN_OVER.name, batch.taken)

        self._jobs.counters.add(metrics.BULK_BATCHES.name)
        job = Job(batch.work, finished, batch.size, Priority.PREFETCH)
        self._jobs.origin.submit(job, (Bulk, route), BATCHES * 2)  # prefetch gets half of a line's slots


def _batches(wanted: Sequence[tuple[ObjectVersion, Flight]]) -> Iterator[Sequence[tuple[ObjectVersion, Flight]]]:
    batch: list[tuple[ObjectVersion, Flight]] = []
    size = 0
    for version, flight in wanted:
        if batch and (size + flight.length > BATCH_BYTES or len(batch) == BATCH_OBJECTS):
            yield batch
            batch, size = [], 0
        batch.append((version, flight))
        size += flight.length
    if batch:
        yield batch
