"""The supervisor's control socket: one JSON object on one line in, one out.

    {"command": "status"}                                        {"ok": true, "status": {...}}
    {"command": "unmount", "lazy": false, "force": false}        {"ok": true, "detached": false}
    {"command": "upgrade", "python": "/path/python", "env": {}, "version": "1.2.3"}

A failure is ``{"ok": false, "kind": "...", "text": "..."}``, its text for a person. The socket has mode 0600 in a
directory of mode 0700: whoever may connect may do all of this. Requests are bounded in number, size and time, so a
client cannot hold up anything; an answer may come much later than its request (`Caller.answer`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from cachefs.mount.loop import Loop

_MAX_CALLERS = 32
_MAX_REQUEST_BYTES = 1 << 20
_REQUEST_S = 10.0
_MAX_ADDRESS_BYTES = 107


class ControlError(Exception):
    """Nobody answered at the socket: the supervisor is gone or does not answer in time."""


class Caller:
    """One connection. Exactly one answer is sent; later ones are dropped."""

    def __init__(self, connection: socket.socket, on_close: Callable[[Caller], None]) -> None:
        self.connection = connection
        self.received = bytearray()
        self._on_close = on_close

    def answer(self, reply: dict[str, Any]) -> None:
        """Send the answer and close. A caller who went away is not an error."""
        if self.connection.fileno() < 0:
            return
        try:
            self.connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            pass
        self.close()

    def fail(self, kind: str, text: str) -> None:
        """Answer with an error."""
        self.answer({"ok": False, "kind": kind, "text": text})

    def close(self) -> None:
        """Close the connection, answered or not."""
        self._on_close(self)
        self.connection.close()


class ControlServer:
    """Listens at `path` and hands each request with its caller to `serve`."""

    def __init__(self, path: str, loop: Loop, serve: Callable[[dict[str, Any], Caller], None]) -> None:
        self.path = path
        self._loop = loop
        self._serve = serve
        self._callers: set[Caller] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        # bound under another name and renamed: the old socket of a dead supervisor is replaced in one step, and nobody
        # can connect before the mode is right
        temporary = f"{path}.{os.getpid()}"
        before = os.umask(0o177)
        try:
            with socket_address(temporary) as address:
                self._listener.bind(address)
        finally:
            os.umask(before)
        os.rename(temporary, path)
        self._listener.listen(_MAX_CALLERS)
        self._inode = os.stat(path).st_ino
        loop.watch(self._listener.fileno(), self._accept)

    def rename(self, name: str) -> None:
        """Go on as `name`.sock in the same directory. Raises OSError."""
        path = f"{os.path.dirname(self.path)}/{name}.sock"
        if self._is_ours():
            os.rename(self.path, path)
        self.path = path

    def close(self) -> None:
        """Stop listening and remove the socket, unless somebody else has taken its name."""
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        for caller in list(self._callers):
            caller.fail("gone", "the supervisor ended")
        if self._is_ours():
            os.unlink(self.path)

    def _is_ours(self) -> bool:
        try:
            return os.stat(self.path).st_ino == self._inode
        except OSError:
            return False

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._callers) >= _MAX_CALLERS:
            connection.close()
            return
        connection.setblocking(False)
        caller = Caller(connection, self._forget)
        self._callers.add(caller)
        self._loop.watch(connection.fileno(), lambda: self._receive(caller))
        self._loop.after(caller, _REQUEST_S, caller.close)

    def _forget(self, caller: Caller) -> None:
        self._callers.discard(caller)
        self._loop.cancel(caller)
        self._loop.unwatch(caller.connection.fileno())

    def _receive(self, caller: Caller) -> None:
        try:
            piece = caller.connection.recv(64 << 10)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        caller.received += piece
        line, found, _ = caller.received.partition(b"\n")
        if not found:
            if not piece or len(caller.received) > _MAX_REQUEST_BYTES:
                caller.close()
            return
        # one request per connection: what else comes is not read, and its end is noticed when the answer is sent
        self._loop.unwatch(caller.connection.fileno())
        self._loop.cancel(caller)
        try:
            request = json.loads(line)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            caller.fail("usage", "a request is one JSON object on one line")
            return
        self._serve(request, caller)


@contextlib.contextmanager
def socket_address(path: str) -> Iterator[str]:
    """Give a name for the socket at `path` that fits into a socket address, which holds 107 bytes."""
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield path
        return
    directory, name = os.path.split(path)
    descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def ask(path: str, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Send one request to the supervisor that listens at `path` and return its answer. Raises ControlError."""
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            with socket_address(path) as address:
                connection.connect(address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            while not received.endswith(b"\n"):
                piece = connection.recv(64 << 10)
                if not piece:
                    raise ControlError("the supervisor closed the connection without an answer")
                received += piece
        reply = json.loads(received)
    except (OSError, ValueError) as error:
        raise ControlError(f"the supervisor does not answer at {path}: {error}") from error
    if not isinstance(reply, dict):
        raise ControlError(f"the supervisor's answer at {path} makes no sense")
    return reply
