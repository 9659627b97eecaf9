"""Many small objects at once, for a node that has peers: what `PeerSource.read_many` does.

    each object: the nodes that would be asked for it one after the other (`peer.source`), the store at last
    round 1      objects with the same first node go into one `BatchRequest`; those without any to the store
    round 2 ...  what was not had goes to the next node of its own list

So an owner is asked once for some dozens of files, and not once for each. Different nodes are asked at the same time,
each in a thread of this call; with them the store. Nobody waits for these objects, so nobody is asked beside a node
that is late: what it does not give in time is given up, since the next node, or the store, would most likely be asked
for what is on its way already. A reader who waits by then asks for himself (`Orders.postponed`).

INVARIANT: each object ends with exactly one word to its `Orders`, or is left out because they said so.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachefs import metrics
from cachefs.errors import CachefsError, StorageUnavailable
from cachefs.metrics import Counters
from cachefs.store.port import Orders
from cachefs.types import ObjectVersion, Tier
from peer.wire import BatchRequest, PeerSlow, PeerUnavailable, Run, bytes_of

if TYPE_CHECKING:
    from peer.source import PeerSource, Question

log = logging.getLogger(__name__)

ASKED_BLOCKS = 32
ASKED_BYTES = 4 << 20
"""What one question is for: the first byte of its answer must not wait for too much, nor a reader for its turn."""
NODES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Object:
    number: int
    """Of the caller."""
    version: ObjectVersion
    questions: tuple[Question, ...]


class ManyReads:
    """One call of `PeerSource.read_many`. `run` BLOCKS."""

    def __init__(self, source: PeerSource, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        self._source = source
        self._orders = orders
        self._counters = source.neighbours.counters
        self._lock = threading.Lock()
        self._left: list[_Object] = []
        """For the next round."""
        self._owned: set[int] = set()
        for number, version in enumerate(versions):
            candidates = source.candidates(source.object_id(version), 0)
            if candidates.is_owner:
                self._owned.add(number)
            self._left.append(_Object(number, version, tuple(source.questions(candidates))))
        self.broken: BaseException | None = None

    def run(self) -> None:
        """Bring them all. Raises what `orders` raises."""
        while self._left and self.broken is None:
            groups: dict[tuple[str, bool, int] | None, list[_Object]] = {}
            for each in self._left:
                question = each.questions[0] if each.questions else None
                key = None if question is None else (question.member.node_id, question.only_cached, question.step)
                groups.setdefault(key, []).append(each)
            self._left = []
            at_once = [
                functools.partial(self._at_store if key is None else self._at_peer, groups[key]) for key in groups
            ]
            for some in _by(at_once, NODES_AT_ONCE):
                _all_of([functools.partial(self._guarded, call) for call in some])
        if self.broken is not None:
            raise self.broken

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised in the thread of the call
            self.broken = error

    def _at_store(self, objects: Sequence[_Object]) -> None:
        part = _Part(self._orders, [each.number for each in objects], self._owned, self._counters)
        self._source.store.get_many([each.version for each in objects], part)

    def _at_peer(self, objects: Sequence[_Object]) -> None:
        """Ask one node for objects that begin with the same question."""
        question = objects[0].questions[0]
        in_vain = False
        for some in _questions_of(objects):
            if in_vain:
                self._pass_on(some)
                continue
            begun = [each for each in some if self._orders.begin(each.number)]
            if begun:
                in_vain = not self._ask(question, begun)

    def _ask(self, question: Question, objects: Sequence[_Object]) -> bool:
        """Ask for objects that were begun; returns whether the node is worth another question."""
        source = self._source
        runs = tuple(
            Run(bytes_of(each.version.key), each.version.etag, each.version.size, source.object_id(each.version), 0, 1)
            for each in objects
        )
        request = BatchRequest(
            volume=source.volume,
            block_size=source.neighbours.block_size,
            only_cached=question.only_cached,
            behind=True,
            step=question.step,
            runs=runs,
        )
        self._counters.add(metrics.PEER_REQUESTS.name)
        answered, had = 0, 0
        absent: list[_Object] = []
        try:
            for block in source.neighbours.client.read_batch(question.member, request):
                each = objects[answered]
                answered += 1
                if block is None:
                    absent.append(each)
                else:
                    had += 1
                    self._orders.arrived(each.number, block, Tier.PEER)
        except PeerUnavailable as error:
            self._counters.add(metrics.PEER_FAILURES.name)
            log.debug("%s is asked in vain for %d files: %s", question.member.name, len(objects) - answered, error)
            if isinstance(error, PeerSlow) and not question.step:
                self._give_up(objects[answered:], error)
            else:
                self._postpone(objects[answered:])
            return False
        finally:
            self._postpone(absent)
            self._counters.add(metrics.PEER_ABSENT.name, len(absent))
        if question.only_cached:
            (source.doubts.had_it if had else source.doubts.had_nothing)(question.member)
        return not question.only_cached or had > 0

    def _pass_on(self, objects: Iterable[_Object]) -> None:
        """Ask the next node, or the store, in the next round."""
        with self._lock:
            self._left += [_Object(each.number, each.version, each.questions[1:]) for each in objects]

    def _postpone(self, objects: Iterable[_Object]) -> None:
        self._pass_on([each for each in objects if self._orders.postponed(each.number)])

    def _give_up(self, objects: Iterable[_Object], cause: Exception) -> None:
        for each in objects:
            if self._orders.postponed(each.number):
                error = StorageUnavailable(f"{each.version.key!r} does not come: {cause}")
                error.__cause__ = cause
                self._orders.failed(each.number, error)


class _Part:
    """The `Orders` of some of the objects, by numbers of their own."""

    def __init__(self, orders: Orders, numbers: Sequence[int], owned: set[int], counters: Counters) -> None:
        self._orders = orders
        self._numbers = numbers
        self._owned = owned
        self._counters = counters

    def begin(self, number: int) -> bool:
        return self._orders.begin(self._numbers[number])

    def postponed(self, number: int) -> bool:
        return self._orders.postponed(self._numbers[number])

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        number = self._numbers[number]
        if number in self._owned:
            self._counters.add(metrics.PEER_OWNED_FILL_BYTES.name, len(body))
        self._orders.arrived(number, body, source)

    def failed(self, number: int, error: CachefsError) -> None:
        self._orders.failed(self._numbers[number], error)


def _questions_of(objects: Sequence[_Object]) -> Iterator[list[_Object]]:
    some: list[_Object] = []
    size = 0
    for each in objects:
        if some and (len(some) == ASKED_BLOCKS or size + each.version.size > ASKED_BYTES):
            yield some
            some, size = [], 0
        some.append(each)
        size += each.version.size
    if some:
        yield some


def _by(calls: Sequence[Callable[[], None]], count: int) -> Iterator[Sequence[Callable[[], None]]]:
    rest = iter(calls)
    while some := list(itertools.islice(rest, count)):
        yield some


def _all_of(calls: Sequence[Callable[[], None]]) -> None:
    """Make calls that do not raise at the same time, the last one in this thread."""
    threads: list[threading.Thread] = []
    try:
        for call in calls[:-1]:
            thread = threading.Thread(target=call, name="many-reads", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                call()
            else:
                threads.append(thread)
        calls[-1]()
    finally:
        for thread in threads:
            thread.join()
