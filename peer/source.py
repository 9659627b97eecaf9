"""Where the blocks of a volume come from on a node that has peers: their owner, who may have them, the store.

    own tiers missed -> nodes ranked before me -> (I am the owner: the next one, only if it has them) -> the store

Every unit (8 MiB of one object version, `peer.placement`) has an order of the nodes that hold its volume, the same on
all of them as long as they see the same cluster. A node waits only for nodes that come before itself in that order: so
nobody ever waits for himself, and the first in the order, the owner, is the one who asks the store. It asks the next in
the order before, "only if you have it": that one was the owner before this node came.

What a peer does not give well is no error: the next source is asked, the store at last. One that is late is not waited
for alone: the next source is asked beside it (`peer.hedge`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cachefs import metrics
from cachefs.metrics import Counters
from cachefs.store.limiter import in_background
from cachefs.store.port import BulkStore, Orders
from cachefs.types import ObjectId, ObjectVersion, Tier, object_id
from peer.hedge import HedgeRoom, Hedges, Race
from peer.leash import Leash
from peer.many import ManyReads
from peer.members import PEER_PROTOCOL, Member, View
from peer.placement import LEVELS, Candidates, Ring, unit_of
from peer.ports import Asks
from peer.wire import BlockRequest, NotHeld, PeerSlow, PeerUnavailable

log = logging.getLogger(__name__)

FUTILE = 8
"""After so many answers "not there" in a row, only one in `SELDOM` questions of that kind is still asked."""
SELDOM = 16


class Neighbours:
    """The other nodes, as the volumes of this one ask them. Any thread."""

    def __init__(
        self,
        client: Asks,
        view: Callable[[], View],
        node_id: Callable[[], str],
        *,
        zone: str,
        block_size: int,
        counters: Counters,
    ) -> None:
        """`view` and `node_id` return what holds now: both may change."""
        self.client = client
        self.block_size = block_size
        self.counters = counters
        self.hedge_room = HedgeRoom()
        self._view = view
        self._node_id = node_id
        self._zone = zone
        self._rings: dict[str, tuple[tuple[Member, ...], Ring]] = {}
        self._latest: tuple[Ring | None, bytes, Candidates | None] = (None, b"", None)
        """A fill asks three times for its unit: which line, which route, whom."""

    @property
    def node_id(self) -> str:
        """Of this node."""
        return self._node_id()

    def near(self, volume: str, node_ids: frozenset[str]) -> list[Member]:
        """Return which of these nodes hold a volume and can be asked, in the zone of this one where there are several;
        this one too.
        """
        holders = [member for member in self._view().holders.get(volume, ()) if member.protocol == PEER_PROTOCOL]
        several = len({member.zone for member in holders}) > 1
        return [
            member for member in holders if member.node_id in node_ids and (not several or member.zone == self._zone)
        ]

    def candidates(self, volume: str, unit: bytes) -> Candidates:
        """Return whom to ask for a unit of a volume."""
        ring = self._ring(volume)
        known, of, candidates = self._latest
        if candidates is None or known is not ring or of != unit:
            candidates = ring.candidates(unit, self._node_id(), self._zone)
            self._latest = ring, unit, candidates
        return candidates

    def _ring(self, volume: str) -> Ring:
        holders = self._view().holders.get(volume, ())
        known = self._rings.get(volume)
        if known is None or known[0] is not holders:
            usable = [member for member in holders if member.protocol == PEER_PROTOCOL]
            known = self._rings[volume] = (holders, Ring(usable))
        return known[1]


@dataclass(frozen=True, slots=True)
class Question:
    """Whom to ask, and how."""

    member: Member
    only_cached: bool
    step: int = 0
    """See `peer.wire.BatchRequest.step`."""


class PeerSource:
    """A `BlockSource` for one volume of a node with peers. Any thread.

    It has a route, with slots of its own, for each place that this node can have in the order of a unit
    (`Candidates.level`). Who waits in one of them waits for a lower one of another node, in the lowest for the store.
    """

    def __init__(self, volume: str, store: BulkStore, neighbours: Neighbours, max_requests: Callable[[], int]) -> None:
        """`volume`: its name among peers."""
        self.volume = volume
        self.store = store
        self.neighbours = neighbours
        self._max_requests = max_requests
        self.doubts = Doubts()
        self.hedges = Hedges(neighbours.hedge_room, neighbours.counters)
        self._routes = tuple(Route(self, level) for level in range(LEVELS))

    @property
    def max_requests(self) -> int:
        """See `BlockSource.max_requests`."""
        return self._max_requests()

    @property
    def spread(self) -> bool:
        """See `BlockSource.spread`."""
        return True

    def route(self, version: ObjectVersion, start: int) -> Route:
        """See `BlockSource.route`."""
        return self._routes[self.candidates(self.object_id(version), start).level]

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        """See `BlockSource.read_blocks`."""
        return self.route(version, start).read_blocks(version, start, buffers)

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `BlockSource.read_many`."""
        ManyReads(self, versions, orders).run()

    def questions(self, candidates: Candidates) -> Iterator[Question]:
        """Yield whom to ask, in this order, before the store."""
        for number, member in enumerate(candidates.before):
            yield Question(member, only_cached=False, step=0 if number else max(0, candidates.level - LEVELS + 1))
        if candidates.is_owner and candidates.after is not None and self.doubts.worth_a_try(candidates.after):
            yield Question(candidates.after, only_cached=True)

    def object_id(self, version: ObjectVersion) -> ObjectId:
        """Return the identity of a version's blocks."""
        return object_id(self.store.endpoint, self.store.bucket, version)

    def candidates(self, oid: ObjectId, start: int) -> Candidates:
        """Return whom to ask for a range that begins there."""
        block_size = self.neighbours.block_size
        return self.neighbours.candidates(self.volume, unit_of(oid, start // block_size, block_size))


class Route:
    """Reads ranges of a `PeerSource`; there are several, so that the ranges stand in several lines."""

    def __init__(self, source: PeerSource, level: int) -> None:
        self._source = source
        self.spread = level == 0
        """See `BlockSource.spread`: the owner asks the store. Another node fills our line with one connection, and each
        question costs both sides a millisecond.
        """

    @property
    def max_requests(self) -> int:
        """See `BlockSource.max_requests`."""
        return self._source.max_requests

    def route(self, version: ObjectVersion, start: int) -> Route:
        """See `BlockSource.route`."""
        return self

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        """See `BlockSource.read_blocks`."""
        return _Reading(self._source, version, start, buffers).blocks()

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `BlockSource.read_many`."""
        self._source.read_many(versions, orders)


class _Reading:
    """One range on its way: what is wanted, whom to ask, and how far it has come.

    Used by the thread that reads; `_beside` is the part of a second question (`peer.hedge`), in a thread of its own.
    """

    def __init__(self, source: PeerSource, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> None:
        self._source = source
        self._counters = source.neighbours.counters
        self._version = version
        self._start = start
        self._buffers = buffers
        self._oid = source.object_id(version)
        self._first = start // source.neighbours.block_size
        candidates = source.candidates(self._oid, start)
        self._owned = candidates.is_owner
        self._questions = list(source.questions(candidates))
        self._done = 0
        """So many buffers are full."""

    def blocks(self) -> Iterator[tuple[int, Tier]]:
        """See `BlockSource.read_blocks`."""
        while self._questions and self._done < len(self._buffers):
            yield from self._from_peer(self._questions.pop(0))
        if self._done < len(self._buffers):
            before, rest = self._done, self._buffers[self._done :]
            for count in self._source.store.read_into(self._version, self._place(before), rest):
                yield self._came_from_store(before + count)

    def _place(self, number: int) -> int:
        """Return where the block of this buffer begins in the object."""
        return self._start + sum(map(len, self._buffers[:number]))

    def _came_from_store(self, done: int) -> tuple[int, Tier]:
        self._done = done
        if self._owned:
            self._counters.add(metrics.PEER_OWNED_FILL_BYTES.name, len(self._buffers[done - 1]))
        return done, Tier.ORIGIN

    def _from_peer(self, question: Question) -> Iterator[tuple[int, Tier]]:
        """Take what this node gives, and what another source gives first when this one is late."""
        before, rest = self._done, self._buffers[self._done :]
        beside = functools.partial(self._beside, before, tuple(self._questions))
        race = Race(self._source.hedges, question.member.node_id, rest, beside)
        try:
            try:
                for count in self._ask(question, before, rest, race):
                    self._done = before + count
                    race.full(count)
                    yield self._done, Tier.PEER
            except PeerSlow:
                if not question.step:
                    self._questions.clear()  # the next node would ask it as well, and we wait for both
            outcome = race.outcome() if self._done < len(self._buffers) else None
            if outcome is not None:
                self._buffers[self._done][:] = outcome.block
                del self._questions[: outcome.passed]
                if outcome.tier is Tier.ORIGIN:
                    yield self._came_from_store(self._done + 1)
                else:
                    self._done += 1
                    yield self._done, outcome.tier
        finally:
            race.close()

    def _beside(
        self, before: int, questions: Sequence[Question], index: int, block: memoryview, leash: Leash, straight: bool
    ) -> tuple[Tier, int]:
        """See `peer.hedge.Beside`; `before`: so many buffers were full when the first question was asked."""
        number = before + index
        for passed, question in enumerate(() if straight else questions):
            try:
                if list(self._ask(question, number, [block], leash)):
                    return Tier.PEER, passed
            except PeerSlow:
                if not question.step:
                    break
            if leash.pulled:
                raise PeerUnavailable("nobody waits for it any more")
        for _ in self._source.store.read_into(self._version, self._place(number), [block]):
            pass
        return Tier.ORIGIN, len(questions)

    def _ask(self, question: Question, number: int, buffers: Sequence[memoryview], leash: Leash) -> Iterator[int]:
        """Yield how many of these buffers are full, as far as this node gives them. `number`: of the first of them.

        Raises PeerSlow, nothing else.
        """
        source = self._source
        wanted = BlockRequest(
            volume=source.volume,
            version=self._version,
            oid=self._oid,
            first=self._first + number,
            count=len(buffers),
            block_size=source.neighbours.block_size,
            only_cached=question.only_cached,
            behind=in_background(),
            step=question.step,
        )
        self._counters.add(metrics.PEER_REQUESTS.name)
        try:
            yield from source.neighbours.client.read_blocks(question.member, wanted, buffers, leash)
            if question.only_cached:
                source.doubts.had_it(question.member)
        except NotHeld:
            self._counters.add(metrics.PEER_ABSENT.name)
            if question.only_cached:
                source.doubts.had_nothing(question.member)
        except PeerUnavailable as error:
            if leash.unwanted:
                return
            self._counters.add(metrics.PEER_FAILURES.name)
            log.debug("%s is asked in vain for %s: %s", question.member.name, self._version.key, error)
            if isinstance(error, PeerSlow):
                raise


class Doubts:
    """Whether it is worth it to ask a node for what it only may have. Any thread."""

    def __init__(self) -> None:
        self._in_vain: dict[str, int] = {}
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def worth_a_try(self, member: Member) -> bool:
        """Whether to ask now: always, or (after many questions in vain) now and then."""
        return self._in_vain.get(member.node_id, 0) < FUTILE or next(self._turn) % SELDOM == 0

    def had_it(self, member: Member) -> None:
        """It gave what it was asked for."""
        self._in_vain.pop(member.node_id, None)

    def had_nothing(self, member: Member) -> None:
        """It did not have it."""
        with self._lock:
            self._in_vain[member.node_id] = self._in_vain.get(member.node_id, 0) + 1
