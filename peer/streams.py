"""The two kinds of connection that the peer server has, behind one face: what can be sent at once is taken at once.

Payloads lie in a memory map and may be looked at for moments only (`Holdings.lend`). So nobody here waits with a view
in his hands: `offer` takes what the other side has room for and returns, `ready` waits for more room. Without TLS bytes
go from the map into the socket without a copy; with TLS a piece is copied, because it has to be encrypted anyway.

What always holds: every wait has a deadline, and a stream that missed one is of no use any more.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Protocol

import trio

from peer.wire import Buffer

TLS_PIECE_BYTES = 256 << 10


class ConnectionLost(Exception):
    """The other side is gone, does not read, or broke the rules of TLS. Nothing more can be said on this connection."""


class Stream(Protocol):
    """One connection. `offer`, `ready` and `drain` are used by one task at a time, `receive` by another or the same."""

    async def receive(self, max_bytes: int) -> bytes:
        """Return some bytes; b"" at the end. Raises ConnectionLost."""
        ...

    def offer(self, pieces: Sequence[Buffer]) -> int:
        """Take as many bytes as there is room for now, maybe none, and return how many. Keeps no view.

        Raises ConnectionLost.
        """
        ...

    async def ready(self) -> None:
        """Wait until more can be offered. Raises ConnectionLost."""
        ...

    async def drain(self) -> None:
        """See to it that all that was taken is on its way. Raises ConnectionLost."""
        ...

    async def send(self, raw: Buffer) -> None:
        """Send it all. Raises ConnectionLost."""
        ...

    async def close(self) -> None:
        """Close at once."""
        ...


class PlainStream:
    """TCP."""

    def __init__(self, connection: socket.socket, stuck_s: float) -> None:
        """`stuck_s`: how long the other side may take nothing."""
        self._socket = connection
        self._stuck_s = stuck_s

    async def receive(self, max_bytes: int) -> bytes:
        """See `Stream.receive`."""
        while True:
            try:
                return self._socket.recv(max_bytes)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
            except OSError as error:
                raise ConnectionLost from error

    def offer(self, pieces: Sequence[Buffer]) -> int:
        """See `Stream.offer`."""
        try:
            return self._socket.sendmsg(pieces)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ConnectionLost from error

    async def ready(self) -> None:
        """See `Stream.ready`."""
        with trio.move_on_after(self._stuck_s):
            await trio.lowlevel.wait_writable(self._socket)
            return
        raise ConnectionLost

    async def drain(self) -> None:
        """See `Stream.drain`: the kernel has it."""

    async def send(self, raw: Buffer) -> None:
        """See `Stream.send`."""
        rest = memoryview(raw)
        while rest:
            rest = rest[self.offer([rest]) :]
            if rest:
                await self.ready()

    async def close(self) -> None:
        """See `Stream.close`."""
        self._socket.close()


class TlsStream:
    """TLS over TCP."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, stuck_s: float) -> None:
        """`stuck_s`: how long a piece may take to leave."""
        transport = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        self._tls = trio.SSLStream(transport, context, server_side=True, https_compatible=True)
        self._stuck_s = stuck_s
        self._taken = bytearray()

    async def handshake(self, within_s: float) -> None:
        """Raises ConnectionLost when the other side does not prove itself in time."""
        with trio.move_on_after(within_s), _translated():
            await self._tls.do_handshake()
            return
        raise ConnectionLost("it took too long")

    async def receive(self, max_bytes: int) -> bytes:
        """See `Stream.receive`."""
        with _translated():
            return bytes(await self._tls.receive_some(max_bytes))

    def offer(self, pieces: Sequence[Buffer]) -> int:
        """See `Stream.offer`."""
        before = len(self._taken)
        for piece in pieces:
            self._taken += piece[: max(0, TLS_PIECE_BYTES - len(self._taken))]
        return len(self._taken) - before

    async def ready(self) -> None:
        """See `Stream.ready`."""
        await self.drain()

    async def drain(self) -> None:
        """See `Stream.drain`."""
        if not self._taken:
            return
        taken, self._taken = self._taken, bytearray()
        with trio.move_on_after(self._stuck_s), _translated():
            await self._tls.send_all(taken)
            return
        raise ConnectionLost

    async def send(self, raw: Buffer) -> None:
        """See `Stream.send`."""
        rest = memoryview(raw)
        while rest:
            rest = rest[self.offer([rest]) :]
            await self.drain()

    async def close(self) -> None:
        """See `Stream.close`."""
        await trio.aclose_forcefully(self._tls)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, OSError) as error:
        cause = error.__cause__ or error
        said = getattr(cause, "verify_message", None) or getattr(cause, "reason", None) or cause
        raise ConnectionLost(str(said)) from error
