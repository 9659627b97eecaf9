"""A TCP relay in the test's own loop: the network between a node and a server, and what can go wrong with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

PIECE = 64 << 10
LOOPBACK = "127.0.0.1"


class Relay:
    """Carries bytes both ways between its own port and a server's."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._thawed = trio.Event()
        self._thawed.set()
        self._scopes: set[trio.CancelScope] = set()
        self.port = 0
        self.refuse = False
        """New connections are closed at once."""
        self.accepted = 0

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def cut(self) -> bool:
        """End all connections. Returns False, so that it can be done again and again until something is true."""
        for scope in list(self._scopes):
            scope.cancel()
        return False

    def freeze(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._thawed = trio.Event()

    def thaw(self) -> None:
        """What was held back arrives."""
        self._thawed.set()

    async def serve(self, near: trio.SocketStream) -> None:
        self.accepted += 1
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if not self.refuse:
                    far = await trio.open_tcp_stream(LOOPBACK, self._target)
                    async with near, far, trio.open_nursery() as nursery:
                        nursery.start_soon(self._carry, near, far, scope)
                        nursery.start_soon(self._carry, far, near, scope)
            except OSError:
                pass
            finally:
                self._scopes.discard(scope)
        await trio.aclose_forcefully(near)

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while piece := await source.receive_some(PIECE):
                await self._thawed.wait()
                await sink.send_all(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def open_relay(target: int) -> AsyncIterator[Relay]:
    """A relay to a port of this machine."""
    relay = Relay(target)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, relay.serve, 0, host=LOOPBACK))
        relay.port = listeners[0].socket.getsockname()[1]
        yield relay
        nursery.cancel_scope.cancel()
