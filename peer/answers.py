"""What is answered to whom: the proof of being a peer first, then the protocol, then the paths of `peer.wire`."""

from __future__ import annotations

import functools
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

import h11
import trio

from cachefs import errors, metrics
from cachefs.metrics import Counters
from cachefs.types import BlockKey
from peer import wire
from peer.credentials import PeerCredentials
from peer.delivery import Delivery, Rooms
from peer.digest import DigestServer
from peer.exchange import BadRequest, Exchange, Headers, body_length
from peer.frames import Frames, send_lent
from peer.jobs import JOBS_PATH, JobAnswer, decode_request, encode_answer
from peer.limits import ServerLimits
from peer.ports import Holdings
from peer.room import ByteRoom
from peer.wire import BadMessage, FrameStatus

log = logging.getLogger(__name__)

KEY_DIGITS = 40
LISTED_VOLUMES = 256
_PROTOCOL_FIELD = wire.PROTOCOL_HEADER.lower().encode()


class Answers:
    """What all connections of a server share."""

    def __init__(
        self,
        holdings: Holdings,
        credentials: PeerCredentials,
        counters: Counters,
        limits: ServerLimits,
        rooms: Rooms,
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self.holdings = holdings
        self.credentials = credentials
        self.counters = counters
        self.limits = limits
        self.rooms = rooms
        self.state = state
        self.bodies = ByteRoom(limits.body_bytes)
        self.telling = trio.CapacityLimiter(limits.listing_threads)
        self._listing: OrderedDict[str, trio.CapacityLimiter] = OrderedDict()

    def listing(self, volume: str) -> trio.CapacityLimiter:
        """Return the threads for the listings of a volume: one whose store hangs keeps no other waiting."""
        limiter = self._listing.pop(volume, None) or trio.CapacityLimiter(self.limits.listing_threads)
        self._listing[volume] = limiter
        if len(self._listing) > LISTED_VOLUMES:
            self._listing.popitem(last=False)
        return limiter

    def visitor(self, exchange: Exchange) -> Visitor:
        """Return who serves one connection."""
        return Visitor(self, exchange)


class Visitor:
    """One connection: `next_request` and `answer` in turn. They raise ConnectionLost."""

    def __init__(self, shared: Answers, exchange: Exchange) -> None:
        self._shared = shared
        self._exchange = exchange
        self._digest = DigestServer()
        self._head: h11.Request | None = None
        self._body = b""
        self._proof: Headers = []

    async def next_request(self) -> bool:
        """Receive the next request of a peer; False: the connection is over. Others get their refusal here."""
        limits = self._shared.limits
        try:
            while True:
                self._head = await self._exchange.request(limits.idle_s, limits.head_s)
                if self._head is None:
                    return False
                if await self._is_peer(self._head):
                    return True
                if not self._exchange.next():
                    return False
        except BadRequest as refusal:
            await self._refuse(refusal)
            return False

    async def _is_peer(self, head: h11.Request) -> bool:
        """Receive the body and check the proof; answer 401 if there is none."""
        secret = self._shared.credentials.secret()
        fields = dict(head.headers)
        authorization = fields[b"authorization"].decode("latin-1") if b"authorization" in fields else None
        if secret is not None and authorization is None:
            if not body_length(head):
                await self._exchange.body(head, self._shared.bodies, self._shared.limits.body_s)
            await self._challenge(None, silent=head.method == b"HEAD")
            return False
        self._body = await self._exchange.body(head, self._shared.bodies, self._shared.limits.body_s)
        self._proof = []
        if secret is None:
            return True
        method, target = head.method.decode(), head.target.decode("latin-1")
        proof = self._digest.check(secret, method, target, authorization, self._body)
        if proof is None:
            await self._challenge(authorization, silent=False)
            return False
        self._proof = [("Authentication-Info", proof)]
        return True

    async def _challenge(self, authorization: str | None, *, silent: bool) -> None:
        if not silent:  # that is how our own client begins
            self._shared.counters.add(metrics.PEER_REFUSED_REQUESTS.name)
        challenge = [("WWW-Authenticate", self._digest.challenge(authorization))]
        await self._exchange.answer(HTTPStatus.UNAUTHORIZED, challenge)

    async def _refuse(self, refusal: BadRequest) -> None:
        self._shared.counters.add(metrics.PEER_REFUSED_REQUESTS.name)
        if self._exchange.answerable:
            headers = [*self._headers(), *refusal.headers, ("Connection", "close")]
            await self._exchange.answer(
                refusal.status, headers, f"{refusal.text}\n".encode("utf-8", "backslashreplace")
            )

    def _headers(self) -> Headers:
        return [(wire.PROTOCOL_HEADER, wire.PROTOCOL), *self._proof]

    # -- answers -------------------------------------------------------------------------------------------------------

    async def answer(self) -> None:
        """Answer the request that came in."""
        assert self._head is not None
        try:
            self._check_protocol(self._head)
            await self._route(self._head)
            self._shared.counters.add(metrics.PEER_SERVED_REQUESTS.name)
        except BadRequest as refusal:
            await self._refuse(refusal)
        except BadMessage as error:
            await self._refuse(BadRequest(HTTPStatus.BAD_REQUEST, str(error)))

    def _check_protocol(self, head: h11.Request) -> None:
        spoken = dict(head.headers).get(_PROTOCOL_FIELD)
        if spoken is None and head.method in (b"GET", b"HEAD"):
            return  # a person with curl
        if spoken != wire.PROTOCOL.encode():
            shown = "none" if spoken is None else spoken[:20].decode("latin-1")
            text = f"this node speaks protocol {wire.PROTOCOL} of peers, you: {shown}"
            upgrade = [("Upgrade", f"cachefs-peer/{wire.PROTOCOL}")]
            raise BadRequest(HTTPStatus.UPGRADE_REQUIRED, text, upgrade)

    async def _route(self, head: h11.Request) -> None:
        path, _, query = head.target.decode("latin-1").partition("?")
        allowed: tuple[str, ...] = ("GET", "HEAD")
        answer: Callable[[], Awaitable[None]]
        if path == wire.BLOCKS_PATH:
            allowed, answer = ("POST",), self._blocks
        elif path == wire.LISTING_PATH:
            allowed, answer = ("POST",), self._listing
        elif path == JOBS_PATH:
            allowed, answer = ("POST",), self._job
        elif path == wire.STATUS_PATH:
            answer = self._status
        elif path.startswith(f"{wire.BLOCKS_PATH}/"):
            key = _key_of(path.removeprefix(f"{wire.BLOCKS_PATH}/"))
            answer = functools.partial(self._one_block, key, self._length_of(query))
        else:
            raise BadRequest(HTTPStatus.NOT_FOUND, "there is nothing here")
        if head.method.decode() not in allowed:
            raise BadRequest(HTTPStatus.METHOD_NOT_ALLOWED, "not here", [("Allow", ", ".join(allowed))])
        await answer()

    def _frames(self) -> Frames:
        headers = [*self._headers(), ("Content-Type", wire.FRAMES_TYPE)]
        return Frames(self._exchange, self._shared.holdings, self._exchange.head(HTTPStatus.OK, headers, None))

    async def _blocks(self) -> None:
        shared = self._shared
        request = wire.decode_batch(self._body)
        self._body = b""
        if request.block_size != shared.holdings.block_size:
            text = f"blocks have {shared.holdings.block_size} bytes here, not {request.block_size}"
            raise BadRequest(HTTPStatus.CONFLICT, text)
        blocks = wire.wanted_blocks(request)
        delivery = Delivery(request, blocks, shared.holdings, shared.rooms, self._frames())
        try:
            await delivery.run()
        finally:
            shared.counters.add(metrics.PEER_SERVED_BLOCKS.name, delivery.sent_blocks)
            shared.counters.add(metrics.PEER_SERVED_BYTES.name, delivery.sent_bytes)

    async def _listing(self) -> None:
        request = wire.decode_listing_request(self._body)
        frames = self._frames()
        listed = trio.Event()
        answer: list[tuple[FrameStatus, bytes]] = []

        async def list_it() -> None:
            with trio.move_on_after(self._shared.limits.listing_s):
                answer.append(await self._page(request))
            listed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(list_it)
            try:
                while not listed.is_set():
                    await frames.pause(listed, 0)
                answer.append((FrameStatus.FAILED, wire.reason_bytes("it took too long")))
                await frames.payload(answer[0][0], 0, answer[0][1], last=True)
                failure = None
            except Exception as error:  # noqa: BLE001 - raised below, where the nursery does not wrap it
                failure = error
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if answer[0][0] is FrameStatus.OK:
            self._shared.counters.add(metrics.PEER_SERVED_LISTING_PAGES.name)

    async def _page(self, request: wire.ListingRequest) -> tuple[FrameStatus, bytes]:
        def list_page() -> bytes:
            page, age_s = self._shared.holdings.list_page(
                request.volume, request.prefix, request.delimiter, request.token, request.limit, request.max_age_s
            )
            return wire.encode_aged_page(page, age_s)

        try:
            listing = self._shared.listing(request.volume)
            return FrameStatus.OK, await trio.to_thread.run_sync(list_page, limiter=listing, abandon_on_cancel=True)
        except errors.NotFound as error:
            return FrameStatus.ABSENT, wire.reason_bytes(str(error))
        except errors.CachefsError as error:
            return FrameStatus.FAILED, wire.reason_bytes(str(error))

    async def _job(self) -> None:
        request = decode_request(self._body)
        self._body = b""
        try:
            told: JobAnswer | str = await trio.to_thread.run_sync(
                self._shared.holdings.job, request, limiter=self._shared.telling, abandon_on_cancel=True
            )
        except errors.CachefsError as error:
            told = str(error) or type(error).__name__
        await self._exchange.answer(HTTPStatus.OK, self._headers(), encode_answer(told), "application/json")

    async def _status(self) -> None:
        summary = await trio.to_thread.run_sync(
            self._shared.holdings.summary, limiter=self._shared.telling, abandon_on_cancel=True
        )
        body = json.dumps({**summary, "server": self._shared.state()}).encode()
        await self._exchange.answer(HTTPStatus.OK, self._headers(), body, "application/json")

    # -- one block, for people -----------------------------------------------------------------------------------------

    def _length_of(self, query: str) -> int:
        largest = self._shared.holdings.block_size
        given = parse_qs(query, max_num_fields=4).get("length", [str(largest)])[0] if query else str(largest)
        if not (given.isascii() and given.isdigit() and len(given) < 12 and 0 < int(given) <= largest):
            raise BadRequest(HTTPStatus.BAD_REQUEST, f"length has to be a number from 1 to {largest}")
        return int(given)

    async def _one_block(self, key: BlockKey, length: int) -> None:
        shared, exchange = self._shared, self._exchange
        assert self._head is not None
        head_only = self._head.method == b"HEAD"
        headers = [*self._headers(), ("Content-Type", "application/octet-stream")]

        def around(_: memoryview) -> tuple[bytes, bytes]:
            return exchange.head(HTTPStatus.OK, headers, length), b""

        if not head_only and await send_lent(exchange.stream, shared.holdings, key, length, around):
            await exchange.stream.drain()
            exchange.sent(length)
        else:
            async with shared.rooms.copied.taken(length):
                found = await trio.to_thread.run_sync(
                    shared.holdings.load, key, length, limiter=shared.rooms.loading, abandon_on_cancel=True
                )
                if found is None and not (head_only and self._is_in_memory(key, length)):
                    raise BadRequest(HTTPStatus.NOT_FOUND, "this node does not have that block")
                await exchange.stream.send(exchange.head(HTTPStatus.OK, headers, length))
                if found is not None and not head_only:
                    await exchange.stream.send(found)
            exchange.sent(length)
        if not head_only:
            shared.counters.add(metrics.PEER_SERVED_BLOCKS.name)
            shared.counters.add(metrics.PEER_SERVED_BYTES.name, length)

    def _is_in_memory(self, key: BlockKey, length: int) -> bool:
        with self._shared.holdings.lend(key, length) as payload:
            return payload is not None


def _key_of(digits: str) -> BlockKey:
    if len(digits) != KEY_DIGITS:
        raise BadRequest(HTTPStatus.NOT_FOUND, f"the name of a block has {KEY_DIGITS} hexadecimal digits")
    try:
        return BlockKey(bytes.fromhex(digits))
    except ValueError as error:
        raise BadRequest(HTTPStatus.NOT_FOUND, "not hexadecimal digits") from error
