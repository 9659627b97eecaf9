"""The keeper's socket: who may ask what, one request per connection, answers that never make the keeper wait.

The socket can be connected to by everybody on the node who reaches its directory; what counts is who it is, which the
kernel says (SO_PEERCRED): root and the keeper's own user may do all, the node service's user may be the runner and ask
for the status, others may do nothing. A connection of the runner stays open and becomes a channel.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from cachefs.keeper.passing import Channel, Message
from cachefs.mount.control import socket_address
from cachefs.mount.loop import Loop

_CREDENTIALS = struct.Struct("3i")
_MAX_VISITORS = 512
_MAX_STRANGERS = 16
"""Of those, how many may be neither root nor the keeper's user nor the node service: others must get in beside them."""
_MAX_REQUEST_BYTES = 1 << 20
_REQUEST_S = 10.0
_ANSWER_S = 10.0
_RESPITE_S = 0.5
RUNNER_COMMANDS = frozenset({"runner", "status"})


class Visitor:
    """One connection. Exactly one answer is sent; later ones are dropped."""

    def __init__(self, door: Door, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, _ = _CREDENTIALS.unpack(credentials)
        self._door = door
        self._connection = connection
        self._received = bytearray()
        self._unsent = memoryview(b"")
        self._answered = False

    def answer(self, reply: dict[str, Any]) -> None:
        """Send the answer and close. A visitor who went away is not an error."""
        if self._answered:
            return
        self._answered = True
        if self._connection.fileno() < 0:
            return
        self._unsent = memoryview(json.dumps(reply).encode() + b"\n")
        self._door.loop.watch(self._connection.fileno(), self._nothing_more)
        self._door.loop.after(self, _ANSWER_S, self.close)
        self._send()

    def fail(self, kind: str, text: str) -> None:
        """Answer with an error: its kind, and one line for a person."""
        self.answer({"ok": False, "kind": kind, "text": text})

    def become_channel(
        self, on_message: Callable[[Message, list[int]], object], on_end: Callable[[], object]
    ) -> Channel:
        """Say yes, and go on with messages both ways."""
        self._answered = True
        self._door.forget(self)
        self._connection.send(b'{"ok": true}\n')  # the first bytes on this connection: there is room
        return Channel(self._door.loop, self._connection, on_message, on_end)

    def close(self) -> None:
        """Close the connection, answered or not."""
        self._door.forget(self)
        self._connection.close()

    def descriptor(self) -> int:
        """The connection's descriptor."""
        return self._connection.fileno()

    def receive(self) -> None:
        """Take what has come of the request."""
        try:
            piece = self._connection.recv(64 << 10)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._received += piece
        line, found, _ = self._received.partition(b"\n")
        if not found:
            if not piece or len(self._received) > _MAX_REQUEST_BYTES:
                self.close()
            return
        self._door.loop.unwatch(self._connection.fileno())
        self._door.loop.cancel(self)
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            self.fail("usage", "a request is one JSON object on one line")
            return
        self._door.admit(self, request)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._unsent:
            self._door.loop.when_writable(self._connection.fileno(), self._send)
        else:
            self.close()

    def _nothing_more(self) -> None:
        """Whoever sends more than a request, or hangs up, gets no answer."""
        self.close()


class Door:
    """Listens at `path`. `serve` gets every request of somebody who may ask it."""

    def __init__(
        self,
        path: str,
        loop: Loop,
        serve: Callable[[dict[str, Any], Visitor], None],
        *,
        node_uid: int,
    ) -> None:
        """Raises OSError."""
        self.path = path
        self.loop = loop
        self._serve = serve
        self._node_uid = node_uid
        self._visitors: set[Visitor] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        temporary = f"{path}.{os.getpid()}"
        try:
            with socket_address(temporary) as address:
                self._listener.bind(address)
            os.chmod(temporary, 0o666)  # noqa: S103 - who may ask what is decided by SO_PEERCRED
            self._listener.listen(_MAX_VISITORS)
            os.rename(temporary, path)  # the socket of a keeper that was killed is replaced in one step
        except OSError:
            self._listener.close()
            raise
        self._inode = os.stat(path).st_ino
        self._listen()

    def _listen(self) -> None:
        self.loop.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening and remove the socket, unless somebody else has taken its name."""
        self.loop.cancel(self)
        self.loop.unwatch(self._listener.fileno())
        self._listener.close()
        for visitor in list(self._visitors):
            visitor.fail("unavailable", "the keeper ends: ask again")
            visitor.close()
        try:
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)
        except OSError:
            pass  # gone already

    def forget(self, visitor: Visitor) -> None:
        """Nothing more is expected of this visitor."""
        self._visitors.discard(visitor)
        self.loop.cancel(visitor)
        self.loop.unwatch(visitor.descriptor())

    def admit(self, visitor: Visitor, request: dict[str, Any]) -> None:
        """Serve a request if whoever asks may ask it."""
        if visitor.uid in (0, os.geteuid()) or (
            visitor.uid == self._node_uid and request.get("command") in RUNNER_COMMANDS
        ):
            self._serve(request, visitor)
        else:
            visitor.fail("AccessDenied", f"user {visitor.uid} may not ask the keeper for this")

    def _is_strange(self, visitor: Visitor) -> bool:
        return visitor.uid not in (0, os.geteuid(), self._node_uid)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # out of descriptors: who waits there would make the loop run without an end
            self.loop.unwatch(self._listener.fileno())
            self.loop.after(self, _RESPITE_S, self._listen)
            return
        if len(self._visitors) >= _MAX_VISITORS:
            connection.close()
            return
        connection.setblocking(False)
        visitor = Visitor(self, connection)
        if self._is_strange(visitor) and sum(map(self._is_strange, self._visitors)) >= _MAX_STRANGERS:
            connection.close()
            return
        self._visitors.add(visitor)
        self.loop.watch(connection.fileno(), visitor.receive)
        self.loop.after(visitor, _REQUEST_S, visitor.close)
