"""A second question beside a first one that is late: whoever gives the block first wins.

    the reader's thread   asks a node, as always, straight into the buffers of whoever wants the blocks
        | nothing was heard for some tenths of a second (`quiet`): the next source in the order is asked as well
        | nothing but WAIT for a second or more (`waited`): the store is, the next node would only wait for the same
    a thread of its own   asks for the one block that is missing, into memory of its own
        | has it first: pulls the leash of the first question, whose thread goes on with this block
        | comes second: its own leash is pulled, and what it has is thrown away

(J. Dean and L. A. Barroso, "The Tail at Scale", CACM 56(2), 2013: hedged requests.) As long as nothing is late this
costs an object per question: the deadline is that of the socket, in the reader's own thread.

S3 is to be asked once for the whole cluster, and an owner that says WAIT is asking it. So of those who only hear WAIT
one in a volume at a time asks the store beside its owner. When the store answers him at once, the owner is STARVED:
its breaker opens, and all who wait for it go on without it. When the store takes as long for him, it is slow for all:
the next try comes after twice the time.

What always holds: one question has one other beside it at the most, a volume `OF_ONE`, a node `THREADS` with
`ROOM_BYTES` of blocks; where there is no room for another, the first question goes on alone until its deadlines.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachefs import metrics
from cachefs.errors import CachefsError, StorageUnavailable
from cachefs.metrics import Counters
from cachefs.store.limiter import in_background
from cachefs.types import Tier
from peer.breaker import Breaker
from peer.leash import Leash
from peer.wire import PeerSlow

log = logging.getLogger(__name__)

THREADS = 8
OF_ONE = 4
ROOM_BYTES = 4 << 20
WAIT_S = 1.0
"""So long WAIT is heard before the store is asked as well; longer where that is usual, and after tries in vain."""
LONGEST_WAIT_S = 16.0
FORGET_S = 60.0
"""After this a try in vain says nothing any more."""
STARVED_TIMES = 3.0
"""A node that waits so many times as long as the store takes for us is not waiting for a slow store."""
KEPT = 4096

Beside = Callable[[int, memoryview, Leash, bool], tuple[Tier, int]]
"""Fills the memory with the block of this number (of those asked for), from the next source that has it, or (True) from
the store. Returns where it came from, and how many of the sources that were left have been passed over.

Raises what the store raises.
"""


class HedgeRoom:
    """What all second questions of this node may take together. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.threads = self.bytes = 0
        """In use."""

    def take(self, length: int) -> bool:
        """Take a thread and so many bytes, if they are free."""
        with self._lock:
            free = self.threads < THREADS and self.bytes + length <= ROOM_BYTES
            if free:
                self.threads += 1
                self.bytes += length
            return free

    def give_back(self, length: int) -> None:
        """Let others have them."""
        with self._lock:
            self.threads -= 1
            self.bytes -= length


class Hedges:
    """The second questions of one volume, and what they taught about its nodes and its store. Any thread."""

    def __init__(self, room: HedgeRoom, counters: Counters, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` as time.monotonic."""
        self.counters = counters
        self.clock = clock
        self._room = room
        self._lock = threading.Lock()
        self._under_way = 0
        self._trying = False
        """Whether the store is being asked beside a node that says WAIT."""
        self._wait_s = WAIT_S
        self._forget_at = -math.inf
        self._starved: dict[str, float] = {}
        """By node: when it was found out."""

    @property
    def wait_s(self) -> float:
        """How long WAIT is heard before the store is asked as well."""
        return self._wait_s if self.clock() < self._forget_at else WAIT_S

    def starved(self, node_id: str, since: float) -> bool:
        """Whether it was found out since then that a node does not get what it fetches."""
        return self._starved.get(node_id, -math.inf) >= since

    def begin(self, length: int, *, straight: bool) -> bool:
        """Take what a second question for so many bytes needs; returns whether it may be asked."""
        with self._lock:
            if self._under_way >= OF_ONE or (straight and self._trying) or not self._room.take(length):
                return False
            self._under_way += 1
            self._trying = self._trying or straight
        self.counters.add(metrics.PEER_HEDGES.name)
        return True

    def answered(self, *, straight: bool) -> None:
        """It has its answer, or none."""
        with self._lock:
            self._under_way -= 1
            if straight:
                self._trying = False

    def end(self, length: int) -> None:
        """Its memory is not needed any more."""
        self._room.give_back(length)

    def in_vain(self) -> None:
        """The store was asked, and the node that said WAIT was not at fault."""
        with self._lock:
            self._wait_s = min(2 * self.wait_s, LONGEST_WAIT_S)
            self._forget_at = self.clock() + FORGET_S

    def found_starved(self, node_id: str) -> None:
        """The store answers us at once, and not that node."""
        with self._lock:
            self._forget_at = -math.inf
            if len(self._starved) >= KEPT:
                self._starved.clear()
            self._starved[node_id] = self.clock()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the second question brought."""

    block: memoryview
    tier: Tier
    passed: int
    """See `Beside`."""


class _Hedge:
    """A second question."""

    def __init__(self, index: int, length: int, began: float, *, straight: bool) -> None:
        self.index = index
        self.length = length
        self.began = began
        self.straight = straight
        """Past all nodes to the store."""
        self.leash = Leash()
        self.cancelled = False
        self.answered = threading.Event()
        self.outcome: Outcome | None = None
        self.error: CachefsError | None = None
        self.released = False


class Race(Leash):
    """The leash of a question to a node, and the second question beside it, if there is one.

    `quiet` and `waited` are called by the thread that asks, as are `full`, `outcome` and `close`.
    """

    def __init__(self, hedges: Hedges, node_id: str, blocks: Sequence[memoryview], beside: Beside) -> None:
        """`blocks`: the memory of those that are asked for."""
        super().__init__()
        self._hedges = hedges
        self._node_id = node_id
        self._blocks = blocks
        self._beside = beside
        self._began = hedges.clock()
        self._at = 0
        self._hedge: _Hedge | None = None
        self._waiting_since = self._began
        self._starved = False
        self._closed = False

    # -- what the first question says ----------------------------------------------------------------------------------

    def quiet(self) -> None:
        """See `Leash.quiet`."""
        self._begin(straight=False)

    def waited(self, seconds: float, usual_s: float) -> None:
        """See `Leash.waited`."""
        if self._hedges.starved(self._node_id, self._began):
            raise PeerSlow("it does not get what it fetches, and the store answers here")
        if seconds >= max(self._hedges.wait_s, usual_s):
            self._waiting_since = self._hedges.clock() - seconds
            self._begin(straight=True)

    @property
    def unwanted(self) -> bool:
        """See `Leash.unwanted`: its leash is pulled because it was late."""
        return False

    def tell(self, breaker: Breaker) -> None:
        """See `Leash.tell`."""
        if self._hedge is None or not self._hedge.straight:
            breaker.outrun(self._began)
        elif self._starved:
            breaker.failed(connecting=True)  # others who ask it now would wait as long
        else:
            breaker.abandoned()

    def full(self, count: int) -> None:
        """The first question has brought so many blocks."""
        self._at = count
        hedge = self._hedge
        if hedge is not None and hedge.index < count and not hedge.cancelled:
            self._lose(hedge)

    # -- the second question -------------------------------------------------------------------------------------------

    def _begin(self, *, straight: bool) -> None:
        if self._hedge is not None or in_background():
            return  # nobody waits for it, and the store would be asked for what is on its way
        length = len(self._blocks[self._at])
        if not self._hedges.begin(length, straight=straight):
            return
        hedge = _Hedge(self._at, length, self._hedges.clock(), straight=straight)
        try:
            threading.Thread(target=self._run, args=(hedge,), name="hedge", daemon=True).start()
        except RuntimeError as error:
            log.debug("no thread for a second question: %s", error)
            self._hedges.answered(straight=straight)
            self._hedges.end(length)
        else:
            self._hedge = hedge

    def _run(self, hedge: _Hedge) -> None:
        """The thread of a second question."""
        try:
            block = memoryview(bytearray(hedge.length))
            tier, passed = self._beside(hedge.index, block, hedge.leash, hedge.straight)
            hedge.outcome = Outcome(block, tier, passed)
        except CachefsError as error:
            hedge.error = error
        except Exception as error:
            log.exception("a second question failed")
            hedge.error = StorageUnavailable(f"reading failed: {error!r}", retryable=False)
        self._hedges.answered(straight=hedge.straight)
        self._decide(hedge)
        hedge.answered.set()
        self._release(hedge)

    def _decide(self, hedge: _Hedge) -> None:
        with self._lock:
            won = hedge.outcome is not None and not hedge.cancelled
            if won and hedge.straight:
                now = self._hedges.clock()
                self._starved = now - self._waiting_since >= STARVED_TIMES * (now - hedge.began)
                if self._starved:
                    self._hedges.found_starved(self._node_id)
                else:
                    self._hedges.in_vain()
            if won:
                self._pull()

    def _lose(self, hedge: _Hedge) -> None:
        """The block came from the first question."""
        with self._lock:
            if self.pulled:
                return  # at the same moment: it may be the last that comes from there
            hedge.cancelled = True
        hedge.leash.pull()
        if hedge.straight:
            self._hedges.in_vain()

    def outcome(self) -> Outcome | None:
        """Return what the second question brought, if it is for the next block that is missing. BLOCKS until it is
        answered. Raises what the store raised.
        """
        hedge = self._hedge
        if hedge is None or hedge.index != self._at:
            return None
        hedge.answered.wait()
        if hedge.error is not None:
            raise hedge.error
        if hedge.outcome is not None:
            self._hedges.counters.add(metrics.PEER_HEDGES_WON.name)
        return hedge.outcome

    def close(self) -> None:
        """The first question is over, and what the second one brought was used."""
        self._closed = True
        hedge = self._hedge
        if hedge is not None:
            with self._lock:
                hedge.cancelled = True
            hedge.leash.pull()
            self._release(hedge)

    def _release(self, hedge: _Hedge) -> None:
        """Give the memory back when nobody needs it any more: who comes last does it."""
        with self._lock:
            if hedge.released or not hedge.answered.is_set() or not (self._closed or hedge.cancelled):
                return
            hedge.released = True
            hedge.outcome = None
        self._hedges.end(hedge.length)
