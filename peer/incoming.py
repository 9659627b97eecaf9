"""The asker's end of one connection: bytes of an HTTP/1.1 answer, straight into the memory that they are for.

What always holds: nothing is waited for without a deadline, and whatever the other side sends costs one buffer of
`BUFFER_BYTES`. Only what our server sends is understood: a head, and a body with a length or in chunks; everything else
is `Broken`.
"""

from __future__ import annotations

import math
import re
import socket
import ssl
import time
from collections.abc import Mapping

from peer.leash import Leash, with_notice

BUFFER_BYTES = 16 << 10
DIRECT_BYTES = 4096
"""Smaller pieces go through the buffer."""
_CHUNK_LINE = 64
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*")
_LENGTH = re.compile(r"[0-9]{1,12}")


class Broken(Exception):
    """The connection is of no use any more; the text says why."""


class Closed(Broken):
    """The other side closed or reset the connection."""


class TooSlow(Broken):
    """A deadline has passed."""


class Incoming:
    """Bytes that come in, with a deadline for all of a call and one for silence."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0
        self._deadline = 0.0
        self._silence_s = 0.0
        self._leash = Leash()
        self._quiet_s = math.inf

    @property
    def empty(self) -> bool:
        """Whether nothing lies in the buffer."""
        return self._start == self._end

    def limit(self, deadline: float, silence_s: float, leash: Leash, quiet_s: float) -> None:
        """Set when all has to be there (of time.monotonic), how long nothing may come, and after how long without
        anything the leash is told, once.
        """
        self._deadline, self._silence_s = deadline, silence_s
        self._leash, self._quiet_s = leash, quiet_s

    def _receive(self, place: memoryview) -> int:
        rest_s = min(self._silence_s, self._deadline - time.monotonic())
        if rest_s <= 0:
            raise TooSlow("it took too long")
        try:
            received = with_notice(
                self._socket, lambda: self._socket.recv_into(place), self._quiet_s, rest_s, self._late
            )
        except TimeoutError as error:
            raise TooSlow("no answer" if rest_s < self._silence_s else f"silent for {rest_s:.1f} s") from error
        except ssl.SSLError as error:
            raise Closed(f"TLS: {(error.reason or 'failed').lower().replace('_', ' ')}") from error
        except OSError as error:
            raise Closed(error.strerror or type(error).__name__) from error
        if not received:
            raise Closed("it closed the connection")
        return received

    def _late(self) -> None:
        self._quiet_s = math.inf
        self._leash.quiet()

    def _fill(self) -> None:
        if self._start:
            rest = self._end - self._start
            self._buffer[:rest] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, rest
        if self._end == len(self._buffer):
            raise Broken("more than a head may have")
        self._end += self._receive(self._buffer[self._end :])

    def until(self, mark: bytes, most: int) -> bytes:
        """Return what comes before `mark`, which is at most `most` bytes long, and skip both."""
        searched = self._start
        while True:
            held = bytes(self._buffer[self._start : self._end])
            at = held.find(mark, max(0, searched - self._start - len(mark)))
            if 0 <= at <= most:
                self._start += at + len(mark)
                return held[:at]
            if at > most or len(held) > most + len(mark):
                raise Broken("a line that is too long")
            self._fill()
            searched = self._start

    def into(self, place: memoryview) -> None:
        """Fill `place`."""
        while place:
            held = self._end - self._start
            if held:
                taken = min(held, len(place))
                place[:taken] = self._buffer[self._start : self._start + taken]
                self._start += taken
                place = place[taken:]
            elif len(place) >= DIRECT_BYTES:
                place = place[self._receive(place) :]
            else:
                self._fill()


class Answer:
    """One answer: its head is there, its body is read in order."""

    def __init__(self, incoming: Incoming, status: int, headers: Mapping[str, str]) -> None:
        """Raises Broken when the head does not say how long the body is."""
        self.status = status
        self.headers = headers
        self._incoming = incoming
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._last = False
        self._behind_chunk = False
        self._left = 0
        """Bytes of the body, or of the open chunk."""
        length = headers.get("content-length", "")
        if not self._chunked:
            if "transfer-encoding" in headers or not _LENGTH.fullmatch(length):
                raise Broken("an answer without a length")
            self._left = int(length)

    @property
    def length(self) -> int:
        """How long the body is; only known when it does not come in chunks, else -1."""
        return -1 if self._chunked else self._left

    @property
    def keeps_open(self) -> bool:
        """Whether the connection is good for another request."""
        return self.headers.get("connection", "").lower() != "close"

    def into(self, place: memoryview) -> None:
        """Fill `place` with the next bytes of the body."""
        while place:
            if not self._left:
                self._open_chunk()
            taken = min(self._left, len(place))
            self._incoming.into(place[:taken])
            self._left -= taken
            place = place[taken:]

    def _open_chunk(self) -> None:
        if not self._chunked or self._last:
            raise Broken("the answer ended early")
        if self._behind_chunk and self._incoming.until(b"\r\n", 0):
            raise Broken("no end of a chunk")
        match = _CHUNK.fullmatch(self._incoming.until(b"\r\n", _CHUNK_LINE))
        if match is None:
            raise Broken("no chunk")
        self._left = int(match[1], 16)
        self._behind_chunk = True
        if not self._left:
            self._last = True
            if self._incoming.until(b"\r\n", 0):
                raise Broken("trailers")
            raise Broken("the answer ended early")

    def end(self) -> None:
        """See to it that the body is over. Raises Broken when more comes."""
        if self._left:
            raise Broken("more than was asked for")
        if self._chunked and not self._last:
            try:
                self._open_chunk()
            except Broken:
                if not self._last:
                    raise
            else:
                raise Broken("more than was asked for")


def read_head(incoming: Incoming, *, bodiless: bool) -> Answer:
    """Receive the head of an answer. `bodiless`: to HEAD. Raises Broken."""
    while True:
        lines = incoming.until(b"\r\n\r\n", BUFFER_BYTES - 4).split(b"\r\n")
        match = _STATUS.fullmatch(lines[0])
        if match is None:
            raise Broken("that is not HTTP/1.1")
        status = int(match[1])
        if status >= 200:
            break
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not name or name != name.strip():
            raise Broken("a header that is none")
        headers[name.lower()] = value.strip()
    if bodiless:
        headers["content-length"] = "0"
        headers.pop("transfer-encoding", None)
    return Answer(incoming, status, headers)
