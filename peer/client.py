"""What this node asks of others: blocks, pages of listings, how they are. For threads; every call BLOCKS.

A call is made over a connection that was kept or is new. A kept one may have been closed by the other side meanwhile
(it was started again): if it is found closed before there is an answer, the call is made once more over a
new one.

What always holds: a buffer is counted as full only when its bytes have the length that the object version gives them,
and the checksum of their frame. Whatever goes wrong is `PeerUnavailable` within the deadlines of `ClientLimits`, is
told to the breaker of that node, and ends the connection.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cachefs import metrics
from cachefs.metrics import Counters
from cachefs.store.port import ListPage
from peer import wire
from peer.breaker import Breaker, Breakers
from peer.connections import Connection, Connections, NoConnection, place_of
from peer.credentials import PeerCredentials
from peer.incoming import Answer, Broken, Closed
from peer.jobs import JOBS_PATH, MAX_ANSWER_BYTES, JobAnswer, JobRequest, decode_answer, encode_request
from peer.leash import Leash
from peer.limits import ClientLimits
from peer.members import Member
from peer.wire import (
    BatchRequest,
    BlockRequest,
    FrameHead,
    FrameStatus,
    NotHeld,
    PeerSlow,
    PeerUnavailable,
    WantedBlock,
)

STATUS_BYTES = 4 << 20
STATUS_S = 5.0
TEXT_BYTES = 4096
UNKNOWN_S = 0.1
"""The latency that a node is believed to have before it was asked: the first answer takes a connection, too."""
DRAIN_BYTES = 64 << 10
"""So much of an answer that is not wanted any more is received, to keep the connection."""


class _Call:
    """One call under way."""

    def __init__(
        self, peer: Member, connection: Connection, answer: Answer, breaker: Breaker, limits: ClientLimits, leash: Leash
    ) -> None:
        self.peer = peer
        self.connection = connection
        self.answer = answer
        self._breaker = breaker
        self._leash = leash
        self._usual_s = limits.patience_times * breaker.wait_s
        self._patience_s = max(limits.patience_s, self._usual_s)
        self._waits_since = time.monotonic()
        self._head = memoryview(bytearray(wire.FRAME_BYTES))

    def frame(self, number: int) -> FrameHead:
        """Return the head of the next frame that says something. Raises Broken, BadMessage, PeerSlow."""
        while True:
            self.answer.into(self._head)
            head = wire.parse_frame_head(self._head)
            if head.number != number:
                raise Broken("a frame for another block")
            waited_s = time.monotonic() - self._waits_since
            if head.status is not FrameStatus.WAIT:
                if head.status is FrameStatus.OK and not number:
                    self._breaker.waited(waited_s)
                self._waits_since += waited_s
                return head
            if head.length:
                raise Broken("a WAIT frame with a payload")
            self._leash.waited(waited_s, self._usual_s)
            if waited_s > self._patience_s:
                raise PeerSlow(f"{self.peer.name} lives, and has not got the block for {waited_s:.1f} s")

    def payload(self, head: FrameHead, place: memoryview) -> bool:
        """Fill `place` with a frame's payload; False: its checksum is wrong."""
        self.answer.into(place)
        return wire.checksum_of(place) == head.checksum

    def text(self, head: FrameHead) -> str:
        """Return the payload of a frame that gives no block."""
        if head.length > wire.MAX_REASON_BYTES:
            raise Broken("a reason that is too long")
        place = bytearray(head.length)
        if not self.payload(head, memoryview(place)):
            raise Broken("a reason that is damaged")
        return _plain(place)


class PeerClient:
    """See the module. Any thread."""

    def __init__(self, credentials: PeerCredentials, *, counters: Counters, limits: ClientLimits | None = None) -> None:
        self._limits = limits or ClientLimits()
        self._counters = counters
        self._connections = Connections(credentials, self._limits)
        self._breakers = Breakers()
        self._lock = threading.Lock()
        self._under_way: dict[str, tuple[int, int]] = {}
        """By node: requests, bytes."""

    # -- calls ---------------------------------------------------------------------------------------------------------

    def read_blocks(
        self,
        peer: Member,
        request: BlockRequest | BatchRequest,
        buffers: Sequence[memoryview],
        leash: Leash | None = None,
    ) -> Iterator[int]:
        """Fill the buffers, one after the other, with the blocks of a request, each as long as its block.

        Yields the number of buffers that are full and verified. A buffer whose number was not yielded holds anything.
        `leash` hears when the call gets nowhere, and can end it.
        Raises, before the first or after any: NotHeld, PeerUnavailable.
        """
        batch = request.batch() if isinstance(request, BlockRequest) else request
        blocks = wire.wanted_blocks(batch)
        if [block.length for block in blocks] != [len(buffer) for buffer in buffers]:
            raise ValueError("the buffers are not as long as the blocks")
        size = sum(block.length for block in blocks)
        body = wire.encode_batch(batch)
        head_s = self._limits.head_s
        with self._call(
            peer, "POST", wire.BLOCKS_PATH, body, size=size, head_s=head_s, leash=leash, behind=batch.behind
        ) as call:
            for block, buffer in zip(blocks, buffers, strict=True):
                self._block(call, block, len(blocks), buffer)
                yield block.number + 1
            call.answer.end()

    def read_batch(self, peer: Member, request: BatchRequest) -> Iterator[memoryview | None]:
        """Yield the blocks of a request, in its order: verified bytes, valid until the next one, or None for a block
        that is not to be had there. Raises PeerUnavailable.
        """
        blocks = wire.wanted_blocks(request)
        place = memoryview(bytearray(max(block.length for block in blocks)))
        size = sum(block.length for block in blocks)
        body = wire.encode_batch(request)
        head_s, behind = self._limits.head_s, request.behind
        with self._call(peer, "POST", wire.BLOCKS_PATH, body, size=size, head_s=head_s, behind=behind) as call:
            for block in blocks:
                head = call.frame(block.number)
                if head.status is FrameStatus.OK:
                    self._into(call, head, block, place[: block.length])
                    yield place[: block.length]
                else:
                    call.text(head)
                    yield None
            call.answer.end()

    def _block(self, call: _Call, block: WantedBlock, count: int, buffer: memoryview) -> None:
        head = call.frame(block.number)
        if head.status is not FrameStatus.OK:
            text = call.text(head)
            self._drain(call, range(block.number + 1, count))
            kind = NotHeld if head.status is FrameStatus.ABSENT else PeerUnavailable
            raise kind(f"{call.peer.name}: {text or 'it does not have the block'}")
        self._into(call, head, block, buffer)

    def _into(self, call: _Call, head: FrameHead, block: WantedBlock, buffer: memoryview) -> None:
        if head.length != block.length:
            raise Broken(f"a block of {head.length} bytes where {block.length} belong")
        if not call.payload(head, buffer):
            self._counters.add(metrics.PEER_CORRUPT.name)
            raise Broken("a block that is damaged")

    @staticmethod
    def _drain(call: _Call, numbers: range) -> None:
        """Receive what is left of an answer, to keep the connection; a lot of it is not worth it."""
        left = DRAIN_BYTES
        for number in numbers:
            head = call.frame(number)
            left -= wire.FRAME_BYTES + head.length
            if left < 0:
                call.connection.spent = True
                return
            call.answer.into(memoryview(bytearray(head.length)))
        call.answer.end()

    def list_page(self, peer: Member, request: wire.ListingRequest) -> tuple[ListPage, float]:
        """Return one page of a listing, and how old it is in seconds. Raises NotHeld, PeerUnavailable."""
        body = wire.encode_listing_request(request)
        with self._call(peer, "POST", wire.LISTING_PATH, body, head_s=self._limits.head_s) as call:
            head = call.frame(0)
            if head.status is not FrameStatus.OK:
                text = call.text(head)
                call.answer.end()
                kind = NotHeld if head.status is FrameStatus.ABSENT else PeerUnavailable
                raise kind(f"{peer.name}: {text or 'it does not list that'}")
            if head.length > wire.MAX_PAGE_BYTES:
                raise Broken("a page that is too long")
            raw = bytearray(head.length)
            if not call.payload(head, memoryview(raw)):
                self._counters.add(metrics.PEER_CORRUPT.name)
                raise Broken("a page that is damaged")
            call.answer.end()
            return wire.decode_aged_page(raw)

    def status(self, peer: Member) -> dict[str, Any]:
        """Return what a node tells of itself. Raises PeerUnavailable."""
        with self._call(peer, "GET", wire.STATUS_PATH, b"", head_s=STATUS_S) as call:
            if not 0 <= call.answer.length <= STATUS_BYTES:
                raise Broken("a status that is too long")
            raw = bytearray(call.answer.length)
            call.answer.into(memoryview(raw))
            try:
                found = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise Broken("a status that is no JSON") from error
            if not isinstance(found, dict):
                raise Broken("a status that is no JSON object")
            return found

    def job(self, peer: Member, request: JobRequest) -> JobAnswer | str:
        """Ask about a job, or begin it; returns how it is, or why there is none. Raises PeerUnavailable."""
        body = encode_request(request)
        with self._call(peer, "POST", JOBS_PATH, body, head_s=STATUS_S) as call:
            if not 0 <= call.answer.length <= MAX_ANSWER_BYTES:
                raise Broken("an answer about a job that is too long")
            raw = bytearray(call.answer.length)
            call.answer.into(memoryview(raw))
            return decode_answer(raw)

    def health(self, peer: Member) -> dict[str, Any]:
        """Return the state of a node's breaker and its latency in seconds (None: never asked). Asks nobody."""
        breaker = self._breakers.of(peer.node_id, peer.instance)
        return {"state": str(breaker.state), "latency_s": breaker.latency_s}

    def close(self) -> None:
        """End all calls and connections; later calls raise PeerUnavailable."""
        self._connections.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(
        self,
        peer: Member,
        method: str,
        target: str,
        body: bytes,
        *,
        head_s: float,
        size: int = 0,
        leash: Leash | None = None,
        behind: bool = False,
    ) -> Iterator[_Call]:
        """Make a call: inside, the head of a good answer is there. Raises PeerUnavailable for all that goes wrong.

        `behind`: nobody waits for it, and it may be late for that reason alone.
        """
        breaker = self._breakers.of(peer.node_id, peer.instance)
        leash = self._led(leash, breaker)
        with self._counted(peer, size):
            if not breaker.allow():
                raise PeerUnavailable(f"{peer.name} is not asked now, it failed a moment ago")
            connection: Connection | None = None
            reported = False
            try:
                deadline = time.monotonic() + self._limits.call_s
                connection, answer = self._ask(peer, breaker, method, target, body, deadline, head_s, leash)
                self._check(answer)
                yield _Call(peer, connection, answer, breaker, self._limits, leash)
                keep = answer.keeps_open
            except (Broken, wire.BadMessage) as error:
                reported, keep = True, False
                self._note_failure(peer, breaker, error, leash)
                raise PeerUnavailable(f"{peer.name} ({peer.address}): {error}") from error
            except PeerSlow:
                reported, keep = True, False
                if target == wire.BLOCKS_PATH and not behind:
                    breaker.failed(connecting=True)  # others who ask it now would wait as long
                else:
                    breaker.abandoned()  # one directory of one volume says nothing about its blocks
                raise
            except PeerUnavailable:
                keep = True  # it answered, and what it answered was received
                raise
            except BaseException:  # of whoever uses what we yield: he left early
                reported, keep = True, False
                breaker.abandoned()
                raise
            finally:
                if not reported:
                    breaker.succeeded()
                if connection is not None:
                    leash.holds(None)
                    keep = keep and not leash.pulled
                    (self._connections.give_back if keep else self._connections.drop)(connection)

    def _led(self, leash: Leash | None, breaker: Breaker) -> Leash:
        """Return the leash of a call that begins now. One that was given is told when the call is late."""
        if leash is None:
            return Leash()
        usual_s = UNKNOWN_S if breaker.latency_s is None else breaker.latency_s
        leash.due = time.monotonic() + max(self._limits.quiet_s, self._limits.quiet_times * usual_s)
        return leash

    def _note_failure(self, peer: Member, breaker: Breaker, error: Exception, leash: Leash) -> None:
        if leash.pulled:
            leash.tell(breaker)
            return
        breaker.failed(connecting=isinstance(error, NoConnection))
        self._connections.forget(place_of(peer))

    def _ask(
        self,
        peer: Member,
        breaker: Breaker,
        method: str,
        target: str,
        body: bytes,
        deadline: float,
        head_s: float,
        leash: Leash,
    ) -> tuple[Connection, Answer]:
        connection = self._connections.take(peer, leash)
        for again in (False, True):
            began = time.monotonic()
            try:
                answer = connection.ask(method, target, body, deadline, head_s, leash)
            except BaseException as error:
                leash.holds(None)
                self._connections.drop(connection)
                if not isinstance(error, (Closed, NoConnection)):
                    raise
                if again or not connection.used or leash.pulled:
                    doubt = "; does it accept our certificate?" if peer.tls and not connection.used else ""
                    raise NoConnection(f"{error}{doubt}") from error
            else:
                breaker.took(time.monotonic() - began)
                return connection, answer
            connection = self._connections.take(peer, leash, fresh=True)
        raise AssertionError("two tries end in an answer or an error")

    @staticmethod
    def _check(answer: Answer) -> None:
        """Raises Broken when an answer is not the one that was hoped for."""
        if answer.status != 200:
            text = bytearray(min(max(answer.length, 0), TEXT_BYTES))
            answer.into(memoryview(text))
            said = f"it answers {answer.status}: {_plain(text)}"
            if answer.status == 404 and answer.length <= TEXT_BYTES:
                raise NotHeld(said)  # it is well, and of a version that does not know this
            raise NoConnection(said) if answer.status in (409, 426) else Broken(said)
        spoken = answer.headers.get(wire.PROTOCOL_HEADER.lower())
        if spoken != wire.PROTOCOL:
            raise NoConnection(f"it speaks another protocol of peers than {wire.PROTOCOL}")

    @contextmanager
    def _counted(self, peer: Member, size: int) -> Iterator[None]:
        """Count a call as under way. Raises PeerUnavailable when there are too many."""
        with self._lock:
            requests, held = self._under_way.get(peer.node_id, (0, 0))
            if requests >= self._limits.requests or (held and held + size > self._limits.bytes):
                raise PeerUnavailable(f"{peer.name} has enough to do for us")
            self._under_way[peer.node_id] = (requests + 1, held + size)
        try:
            yield
        finally:
            with self._lock:
                requests, held = self._under_way[peer.node_id]
                if requests > 1:
                    self._under_way[peer.node_id] = (requests - 1, held - size)
                else:
                    del self._under_way[peer.node_id]


def _plain(text: bytes | bytearray) -> str:
    """Return foreign text so that it can do no harm in a log."""
    shown = text[: wire.MAX_REASON_BYTES].decode("utf-8", "replace").strip()
    return "".join(letter if letter.isprintable() else "?" for letter in shown)
