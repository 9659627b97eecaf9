"""HTTP/1.1 on one connection of the peer server: requests in, answers out. h11 keeps the rules, this keeps the bounds.

What always holds: a head is at most `MAX_HEAD_BYTES` long and comes within `head_s`; a body says its length before, and
room for it is taken before it is read. Payloads go around h11 (`send_with_data_passthrough`): they are never joined.
"""

from __future__ import annotations

from http import HTTPStatus

import h11
import trio

from peer import wire
from peer.room import ByteRoom
from peer.streams import ConnectionLost, Stream

RECEIVE_BYTES = 64 << 10
Headers = list[tuple[str, str]]


class BadRequest(Exception):
    """A request that gets an answer with this status and text."""

    def __init__(self, status: HTTPStatus, text: str, headers: Headers | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers or []


class _Length:
    """Stands for a payload while h11 makes the frame around it."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Exchange:
    """One connection. One request at a time."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=wire.MAX_HEAD_BYTES)
        self._head_only = False

    # -- in ------------------------------------------------------------------------------------------------------------

    async def request(self, idle_s: float, head_s: float) -> h11.Request | None:
        """Return the head of the next request; None at the end of the connection, or of our patience.

        Raises: BadRequest, ConnectionLost.
        """
        begun = bool(self._http.trailing_data[0])
        with trio.move_on_after(head_s if begun else idle_s) as patience:
            while True:
                event = self._next_event()
                if isinstance(event, h11.Request):
                    self._head_only = event.method == b"HEAD"
                    return event
                if event is not h11.NEED_DATA:
                    return None
                await self._receive()
                if not begun:
                    begun, patience.deadline = True, trio.current_time() + head_s
        return None

    async def body(self, head: h11.Request, room: ByteRoom, within_s: float) -> bytes:
        """Return the body of the request. Raises: BadRequest, ConnectionLost."""
        length = body_length(head)
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        pieces = bytearray()
        if self._take_body(pieces):  # it came with its head, as it does most often
            return bytes(pieces)
        with trio.move_on_after(within_s):
            async with room.taken(length):
                while not self._take_body(pieces):
                    await self._receive()
                return bytes(pieces)
        raise BadRequest(HTTPStatus.REQUEST_TIMEOUT, "the body did not come in time")

    def _take_body(self, pieces: bytearray) -> bool:
        """Add to `pieces` what is there of a body; returns whether that was the end of it."""
        while True:
            event = self._next_event()
            if isinstance(event, h11.Data):
                pieces += event.data
            elif isinstance(event, h11.EndOfMessage):
                return True
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionLost
            else:
                return False

    def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise _refusal(error) from error

    async def _receive(self) -> None:
        raw = await self.stream.receive(RECEIVE_BYTES)
        try:
            self._http.receive_data(raw)
        except h11.RemoteProtocolError as error:
            raise _refusal(error) from error

    # -- out -----------------------------------------------------------------------------------------------------------

    async def answer(self, status: HTTPStatus, headers: Headers, body: bytes = b"", kind: str = "text/plain") -> None:
        """Send a whole answer. Raises ConnectionLost."""
        head = self.head(status, [*headers, ("Content-Type", kind)], len(body))
        await self.stream.send(head if self._head_only else head + body)
        self.sent(len(body))

    def head(self, status: HTTPStatus, headers: Headers, length: int | None) -> bytes:
        """Return the head of an answer with a body of this length; None: of frames, each a chunk."""
        framing = ("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))
        response = h11.Response(status_code=status, headers=[*headers, framing], reason=status.phrase)
        return self._http.send(response) or b""

    def sent(self, length: int) -> None:
        """Tell h11 that the body of an answer with a known length went out (nothing of it, if it was for HEAD)."""
        if length and not self._head_only:
            self._http.send_with_data_passthrough(h11.Data(data=_Length(length)))  # type: ignore[arg-type]
        self._http.send(h11.EndOfMessage())

    def chunk(self, length: int) -> tuple[bytes, bytes]:
        """Return what stands before and after a chunk of this length."""
        pieces = self._http.send_with_data_passthrough(h11.Data(data=_Length(length)))  # type: ignore[arg-type]
        assert pieces is not None
        before, _, after = pieces
        return before, after

    def end(self) -> bytes:
        """Return what ends an answer of chunks."""
        return self._http.send(h11.EndOfMessage()) or b""

    async def _send(self, event: h11.InformationalResponse) -> None:
        await self.stream.send(self._http.send(event) or b"")

    @property
    def answerable(self) -> bool:
        """Whether an answer may begin now."""
        return self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    def next(self) -> bool:
        """Get ready for the next request; False: this connection takes no more."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True


def body_length(head: h11.Request) -> int:
    """Return how many bytes of body a request says that it has. Raises BadRequest."""
    fields = dict(head.headers)
    if b"transfer-encoding" in fields:
        raise BadRequest(HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length")
    length = int(fields.get(b"content-length", b"0"))  # h11 lets nothing but digits through, and one value
    if length > wire.MAX_BODY_BYTES:
        raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {wire.MAX_BODY_BYTES} bytes")
    return length


def _refusal(error: h11.RemoteProtocolError) -> BadRequest:
    return BadRequest(HTTPStatus(error.error_status_hint), str(error))
