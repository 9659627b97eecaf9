"""What this node gives to others: its peer server, with a thread and an event loop of its own.

    accept -> TLS handshake -> { head -> proof of being a peer -> protocol -> answer } again and again

What moves: a task for each connection. A connection is *idle* while the other side owes us something (its handshake,
its next head) or has not yet shown that it is a peer; when there are too many, the one that is idle for longest goes.
What answers hold together is bounded (`peer.delivery.Rooms`), and everything that waits has a deadline.

What always holds: who does not prove to be a peer learns nothing, not even which paths there are. Nothing that comes in
ends the server: a connection that breaks a rule gets an answer where HTTP has one, and is closed.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import OrderedDict
from typing import Any

import trio

from cachefs import metrics
from cachefs.config import join_address
from cachefs.logs import ThrottledWarning
from cachefs.metrics import Counters
from peer.answers import Answers
from peer.credentials import PeerCredentials
from peer.delivery import Rooms
from peer.exchange import Exchange
from peer.limits import ServerLimits
from peer.ports import Holdings
from peer.streams import ConnectionLost, PlainStream, Stream, TlsStream

log = logging.getLogger(__name__)

BACKLOG = 512
PAUSE_S = 0.1
"""After the system had no descriptor for a new connection."""


class PeerServer:
    """See the module. `start`, `close` and `state` may be called from any thread; `start` once."""

    def __init__(
        self,
        holdings: Holdings,
        *,
        credentials: PeerCredentials,
        counters: Counters,
        limits: ServerLimits | None = None,
    ) -> None:
        self._holdings = holdings
        self._credentials = credentials
        self._counters = counters
        self._limits = limits or ServerLimits()
        self._thread: threading.Thread | None = None
        self._running = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._rooms: Rooms | None = None
        self._connections: OrderedDict[_Guest, None] = OrderedDict()
        """In the order of their last request."""
        self._address = ""
        self._refusals = ThrottledWarning()

    def start(self, address: str, port: int) -> int:
        """Listen, and return the port (a free one, if `port` is 0). Raises OSError. BLOCKS for a moment."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
        listener.setblocking(False)
        bound = int(listener.getsockname()[1])
        self._address = join_address(address, bound)
        self._thread = threading.Thread(target=self._live, args=(listener,), name="peer-server", daemon=True)
        self._thread.start()
        self._running.wait()
        return bound

    def close(self) -> None:
        """Stop listening and end all connections. BLOCKS until that is done."""
        if self._thread is None:
            return
        try:
            if self._token is not None:
                self._token.run_sync_soon(self._scope.cancel)
        except trio.RunFinishedError:
            pass
        self._thread.join()

    def state(self) -> dict[str, Any]:
        """Return what the server is doing."""
        rooms = self._rooms
        return {
            "address": self._address,
            "listening": self._thread is not None and self._thread.is_alive(),
            "connections": len(self._connections),
            "requests": 0 if rooms is None else rooms.questions,
            "bytes_in_flight": 0 if rooms is None else rooms.held_bytes,
        }

    # -- in the server's own thread ------------------------------------------------------------------------------------

    def _live(self, listener: socket.socket) -> None:
        try:
            trio.run(self._main, listener)
        except BaseException:
            log.exception("the peer server has ended; other nodes do without this one")
        finally:
            listener.close()
            self._running.set()

    async def _main(self, listener: socket.socket) -> None:
        limits = self._limits
        self._rooms = Rooms(limits.requests, limits.copied_bytes, limits.fetched_bytes, limits.load_threads)
        answers = Answers(self._holdings, self._credentials, self._counters, limits, self._rooms, self.state)
        self._token = trio.lowlevel.current_trio_token()
        self._running.set()
        with self._scope:
            async with trio.open_nursery() as nursery:
                while True:
                    connection = await self._accepted(listener)
                    if connection is not None:
                        guest = _Guest(connection)
                        self._connections[guest] = None
                        nursery.start_soon(self._serve, guest, answers)

    async def _accepted(self, listener: socket.socket) -> socket.socket | None:
        await trio.lowlevel.checkpoint()
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
            return None
        except OSError as error:
            log.debug("no connection could be accepted: %s", error)
            self._make_room()
            await trio.sleep(PAUSE_S)
            return None
        if len(self._connections) >= self._limits.connections and not self._make_room():
            self._counters.add(metrics.PEER_REFUSED_REQUESTS.name)
            connection.close()
            return None
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _make_room(self) -> bool:
        """End the connection that is idle for longest; False: none is."""
        for guest in self._connections:
            if guest.idle:
                del self._connections[guest]
                guest.scope.cancel()
                return True
        return False

    async def _serve(self, guest: _Guest, answers: Answers) -> None:
        stream: Stream | None = None
        try:
            with guest.scope:
                stream = await self._stream(guest.connection)
                if stream is not None:
                    await self._converse(guest, Exchange(stream), answers)
        except ConnectionLost:
            pass
        except Exception:
            log.exception("a connection of another node has ended")
        finally:
            self._connections.pop(guest, None)
            with trio.CancelScope(shield=True):
                if stream is not None:
                    await stream.close()
            guest.connection.close()

    async def _stream(self, connection: socket.socket) -> Stream | None:
        contexts = self._credentials.tls_contexts()
        if contexts is None:
            return PlainStream(connection, self._limits.stuck_s)
        stream = TlsStream(connection, contexts.server, self._limits.stuck_s)
        try:
            await stream.handshake(self._limits.head_s)
        except ConnectionLost as lost:
            self._counters.add(metrics.PEER_REFUSED_REQUESTS.name)
            more = self._refusals.due(trio.current_time())
            if more is not None:
                log.info("a TLS handshake of another node has failed: %s%s", lost, more)
            await stream.close()
            return None
        return stream

    async def _converse(self, guest: _Guest, exchange: Exchange, answers: Answers) -> None:
        visitor = answers.visitor(exchange)
        while True:
            guest.idle = True
            proceed = await visitor.next_request()
            if not proceed:
                return
            guest.idle = False
            if guest in self._connections:
                self._connections.move_to_end(guest)
            with trio.move_on_after(self._limits.request_s) as patience:
                await visitor.answer()
            if patience.cancelled_caught or not exchange.next():
                return


class _Guest:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.scope = trio.CancelScope()
        self.idle = True


__all__ = ["PeerServer", "ServerLimits"]
