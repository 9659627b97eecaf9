"""Where the blocks of a volume come from on a node that has peers: their owner, who may have them, the store.

    own tiers missed -> nodes ranked before me -> (I am the owner: the next one, only if it has them) -> the store

Every unit (8 MiB of one object version, `peer.placement`) has an order of the nodes that hold its volume, the same on
all of them as long as they see the same cluster. A node waits only for nodes that come before itself in that order: so
nobody ever waits for himself, and the first in the order, the owner, is the one who asks the store. It asks the next in
the order before, "only if you have it": that one was the owner before this node came.

What a peer does not give well is no error: the next source is asked, the store at last.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cachefs import metrics
from cachefs.metrics import Counters
from cachefs.store.port import ObjectStore
from cachefs.types import ObjectId, ObjectVersion, Tier, object_id
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
        self._view = view
        self._node_id = node_id
        self._zone = zone
        self._rings: dict[str, tuple[tuple[Member, ...], Ring]] = {}

    def candidates(self, volume: str, unit: bytes) -> Candidates:
        """Return whom to ask for a unit of a volume."""
        return self._ring(volume).candidates(unit, self._node_id(), self._zone)

    def _ring(self, volume: str) -> Ring:
        holders = self._view().holders.get(volume, ())
        known = self._rings.get(volume)
        if known is None or known[0] is not holders:
            usable = [member for member in holders if member.protocol == PEER_PROTOCOL]
            known = self._rings[volume] = (holders, Ring(usable))
        return known[1]


@dataclass(frozen=True, slots=True)
class _Question:
    member: Member
    only_cached: bool


class PeerSource:
    """A `BlockSource` for one volume of a node with peers. Any thread.

    It has a route, with slots of its own, for each place that this node can have in the order of a unit
    (`Candidates.level`). Who waits in one of them waits for a lower one of another node, in the lowest for the store.
    """

    def __init__(
        self, volume: str, store: ObjectStore, neighbours: Neighbours, max_requests: Callable[[], int]
    ) -> None:
        """`volume`: its name among peers."""
        self.volume = volume
        self.store = store
        self.neighbours = neighbours
        self._max_requests = max_requests
        self.doubts = Doubts()
        self._routes = tuple(_Route(self) for _ in range(LEVELS))

    @property
    def max_requests(self) -> int:
        """See `BlockSource.max_requests`."""
        return self._max_requests()

    def route(self, version: ObjectVersion, start: int) -> _Route:
        """See `BlockSource.route`."""
        return self._routes[self.candidates(self.object_id(version), start).level]

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        """See `BlockSource.read_blocks`."""
        return self.route(version, start).read_blocks(version, start, buffers)

    def object_id(self, version: ObjectVersion) -> ObjectId:
        """Return the identity of a version's blocks."""
        return object_id(self.store.endpoint, self.store.bucket, version)

    def candidates(self, oid: ObjectId, start: int) -> Candidates:
        """Return whom to ask for a range that begins there."""
        block_size = self.neighbours.block_size
        return self.neighbours.candidates(self.volume, unit_of(oid, start // block_size, block_size))


class _Route:
    """Reads ranges of a `PeerSource`; there are several, so that the ranges stand in several lines."""

    def __init__(self, source: PeerSource) -> None:
        self._source = source

    @property
    def max_requests(self) -> int:
        """See `BlockSource.max_requests`."""
        return self._source.max_requests

    def route(self, version: ObjectVersion, start: int) -> _Route:
        """See `BlockSource.route`."""
        return self

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        """See `BlockSource.read_blocks`."""
        source = self._source
        oid = source.object_id(version)
        first = start // source.neighbours.block_size
        candidates = source.candidates(oid, start)
        done = full = 0
        for question in self._questions(candidates):
            try:
                for count in self._ask(question, version, oid, first + done, buffers[done:]):
                    full = done + count
                    yield full, Tier.PEER
            except PeerSlow:
                break  # the next node would ask it as well, and we wait for both
            finally:
                done = full
            if done == len(buffers):
                return
        at = start + sum(map(len, buffers[:done]))
        for count in source.store.read_into(version, at, buffers[done:]):
            if candidates.is_owner:
                name, length = metrics.PEER_OWNED_FILL_BYTES.name, len(buffers[done + count - 1])
                source.neighbours.counters.add(name, length)
            yield done + count, Tier.ORIGIN

    def _questions(self, candidates: Candidates) -> Iterator[_Question]:
        for member in candidates.before:
            yield _Question(member, only_cached=False)
        if candidates.is_owner and candidates.after is not None and self._source.doubts.worth_a_try(candidates.after):
            yield _Question(candidates.after, only_cached=True)

    def _ask(
        self,
        question: _Question,
        version: ObjectVersion,
        oid: ObjectId,
        first: int,
        buffers: Sequence[memoryview],
    ) -> Iterator[int]:
        """Yield how many buffers are full, as far as this node gives them. Raises PeerSlow, nothing else."""
        counters = self._source.neighbours.counters
        wanted = BlockRequest(
            volume=self._source.volume,
            version=version,
            oid=oid,
            first=first,
            count=len(buffers),
            block_size=self._source.neighbours.block_size,
            only_cached=question.only_cached,
        )
        counters.add(metrics.PEER_REQUESTS.name)
        try:
            yield from self._source.neighbours.client.read_blocks(question.member, wanted, buffers)
            if question.only_cached:
                self._source.doubts.had_it(question.member)
        except NotHeld:
            counters.add(metrics.PEER_ABSENT.name)
            if question.only_cached:
                self._source.doubts.had_nothing(question.member)
        except PeerUnavailable as error:
            counters.add(metrics.PEER_FAILURES.name)
            log.debug("%s is asked in vain for %s: %s", question.member.name, version.key, error)
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
