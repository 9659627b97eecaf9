"""One thread brings many objects over the connections of a `Wire`, for `cachefs.store.bulk`.

    permit of the background -> begin -> request on a free connection ... selector ... answer -> arrived
                                                                             |
                                             Unusual, closed, silent --------+--> left to the ordinary way

What meets anything but the usual answer is left over, and the ordinary way asks for it again: it knows what errors
mean, waits as the retry policy says, and tells the limiter. When the server wants fewer requests, or several
connections in a row are of no use, nothing more is begun here.

INVARIANT: each object ends with `Orders.arrived`, or is left out because `begin` or `postponed` said so, or is in what
`run` returns. No permit and no connection outlives the call.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachefs.errors import CachefsError, StorageUnavailable
from cachefs.store.limiter import Permit, background
from cachefs.store.port import Orders
from cachefs.store.refusals import Refusal, error_of
from cachefs.store.wire import Connection, Stale, Unusual, Wire
from cachefs.types import ObjectVersion, Tier

if TYPE_CHECKING:
    from cachefs.store.retry import RetryingStore

log = logging.getLogger(__name__)

LOOK_S = 0.1
"""How often it is looked whether a connection is silent or a permit has become free."""
HOPELESS = 4
"""So many connections in a row that were of no use: the ordinary way finds out why."""


class Crowd(Protocol):
    """Knows how many requests in bulk the store is worth; all calls share it. Any thread."""

    def enter(self, own: int) -> bool:
        """One more request, beside `own` of this call; False: there are enough."""
        ...

    def leave(self) -> None:
        """One request less."""
        ...

    def took(self, seconds: float) -> None:
        """A request was answered in so much time."""
        ...


@dataclass(slots=True)
class _Sent:
    number: int
    permit: Permit
    connection: Connection
    fd: int
    at: float
    events: int = 0
    """What the selector waits for; 0: it does not know it yet."""


class WireCall:
    """One call. Everything in the thread of `run`."""

    def __init__(
        self, store: RetryingStore, wire: Wire, crowd: Crowd, versions: Sequence[ObjectVersion], orders: Orders
    ) -> None:
        self._store = store
        self._wire = wire
        self._crowd = crowd
        self._versions = versions
        self._orders = orders
        self._waiting = deque(range(len(versions)))
        self._left: list[int] = []
        """What the ordinary way has to bring."""
        self._sent: dict[int, _Sent] = {}
        """Requests on their way, by descriptor."""
        self._failures = 0
        """Connections in a row that were of no use."""
        self.throttled: StorageUnavailable | None = None
        """What the server said that wants fewer requests."""
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[int]:
        """Bring objects, and return the numbers of those that were left. Raises what `orders` raises."""
        try:
            with background(lambda: True):
                while self._begin_some() or self._sent:
                    self._wait()
        finally:
            for sent in list(self._sent.values()):
                self._end(sent)
                sent.connection.close()
                self._store.limiter.failed(sent.permit)
            self._selector.close()
        return [*self._left, *self._waiting]

    def _begin_some(self) -> bool:
        """Send as many requests as are allowed; returns whether more are to be sent."""
        while self._waiting and self._failures < HOPELESS:
            if not self._crowd.enter(len(self._sent)):
                return True
            permit = self._permit()
            if permit is None:
                self._crowd.leave()
                return bool(self._sent)
            number = self._waiting.popleft()
            if not self._orders.begin(number):
                self._store.limiter.failed(permit)
                self._crowd.leave()
                continue
            self._begin(number, permit, self._wire.connection)
        return False

    def _permit(self) -> Permit | None:
        """Return a permit if there is one; while nothing is on its way, wait for it."""
        if self._sent:
            return self._store.limiter.acquire_now()
        try:
            return self._store.limiter.acquire(self._store.policy.deadline_s)
        except StorageUnavailable:
            return None  # the ordinary way says so

    def _begin(self, number: int, permit: Permit, connect: Callable[[], Connection]) -> None:
        """Send a request; it holds a permit and a place in the crowd until `_end`."""
        try:
            request = self._wire.request(self._versions[number])
            connection = connect()
        except (CachefsError, Unusual, OSError) as error:
            self._store.limiter.failed(permit)
            self._crowd.leave()
            self._lost(number, error)
            return
        connection.ask(request, self._versions[number])
        sent = self._sent[connection.fileno()] = _Sent(
            number, permit, connection, connection.fileno(), time.monotonic()
        )
        self._store.counters.sent("get")
        self._move(sent)

    def _wait(self) -> None:
        if not self._sent:
            time.sleep(LOOK_S / 10)  # others have all places
            return
        for key, _ in self._selector.select(LOOK_S):
            sent = self._sent.get(key.fd)
            if sent is not None:
                self._move(sent)
        now = time.monotonic()
        for sent in [sent for sent in self._sent.values() if sent.connection.is_late(now, self._wire.timeouts)]:
            self._break(sent, Unusual("no answer in time"))
        if self._store.closed:
            for sent in list(self._sent.values()):
                self._break(sent, Unusual("the store is closed"))
            self._failures = HOPELESS

    def _move(self, sent: _Sent) -> None:
        try:
            complete = sent.connection.go()
        except Stale:
            self._end(sent)
            sent.connection.close()
            self._begin_again(sent)
            return
        except (Unusual, OSError) as error:
            self._break(sent, error)
            return
        if complete:
            self._arrived(sent)
        elif sent.events != sent.connection.events:
            self._watch(sent)

    def _watch(self, sent: _Sent) -> None:
        if sent.events:
            self._selector.modify(sent.connection, sent.connection.events)
        else:
            self._selector.register(sent.connection, sent.connection.events)
        sent.events = sent.connection.events

    def _end(self, sent: _Sent) -> None:
        """It is not on its way any more."""
        if sent.events:
            self._selector.unregister(sent.connection)
        del self._sent[sent.fd]
        self._crowd.leave()

    def _begin_again(self, sent: _Sent) -> None:
        """The server had closed the connection meanwhile, as it may: the same on a new one."""
        if not self._crowd.enter(0):
            self._store.limiter.failed(sent.permit)
            self._lost(sent.number, Stale("no place is free"))
            return
        self._begin(sent.number, sent.permit, self._wire.new_connection)

    def _arrived(self, sent: _Sent) -> None:
        self._end(sent)
        body = sent.connection.take_body()
        self._crowd.took(time.monotonic() - sent.at)
        self._wire.give_back(sent.connection)
        self._failures = 0
        self._store.limiter.succeeded(sent.permit)
        self._store.counters.answered()
        self._store.counters.received(len(body))
        self._orders.arrived(sent.number, body, Tier.ORIGIN)

    def _break(self, sent: _Sent, error: Exception) -> None:
        """An answer that is not the usual one, or none."""
        self._end(sent)
        sent.connection.close()
        refusal = error.refusal if isinstance(error, Unusual) else None
        if refusal is None:
            self._store.limiter.failed(sent.permit)
            broken = StorageUnavailable(f"endpoint {self._store.endpoint} does not answer as it should ({error})")
            self._store.counters.failed(broken, throttled=False)
        elif refusal.throttled:
            self._store.limiter.throttled(sent.permit)
            self._throttle(refusal)
        else:
            self._store.limiter.failed(sent.permit)  # asked again it says more, and is counted then
        if self._lost(sent.number, error):
            self._store.counters.retried()

    def _throttle(self, refusal: Refusal) -> None:
        store = self._store
        error = error_of(refusal, bucket=store.bucket, endpoint=store.endpoint, key=None)
        store.counters.failed(error, throttled=True)
        if isinstance(error, StorageUnavailable):  # it is, for a refusal of this kind
            self.throttled = error
        self._wire.on_throttled()
        self._failures = HOPELESS

    def _lost(self, number: int, error: Exception) -> bool:
        """Leave an object to the ordinary way, unless a reader has it brought now; returns whether it was left."""
        log.debug("%r of %s in bulk: %s", self._versions[number].key, self._store.bucket, error)
        self._failures += 1
        left = self._orders.postponed(number)
        if left:
            self._left.append(number)
        return left
