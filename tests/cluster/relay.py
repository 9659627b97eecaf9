"""A TCP relay into a place of the network, for benches: it takes no part in the bytes and counts them.

    with Relay("http://127.0.0.1:41234", place, 8333) as relay:
        relay.sent_bytes       # from the server to the nodes, heads of answers included

Two threads for each connection. Answers go from socket to socket through a pipe (splice(2)) and never come into this
process, where the proxy of the fault tests takes 2.5 s of CPU per GiB.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
from typing import Self

from tests.cluster.namespaces import Place

_PIPE_BYTES = 1 << 20
_REQUEST_BYTES = 64 << 10
_BACKLOG = 256


class Relay:
    """See the module. Context manager; listens as soon as it is made."""

    def __init__(self, endpoint_url: str, place: Place, port: int) -> None:
        host, _, server_port = endpoint_url.removeprefix("http://").partition(":")
        self._target = (host, int(server_port))
        self.place = place
        self.port = port
        self._lock = threading.Lock()
        self._sent = 0
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        with place.entered():  # only the socket is there: threads reach the server from where we are
            family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
            self._listener = socket.create_server((place.address, port), family=family, backlog=_BACKLOG)
        self._accepting = threading.Thread(target=self._accept, name="relay", daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and end all connections."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes up accept
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for connection in self._open:
                _cut(connection)
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    @property
    def sent_bytes(self) -> int:
        """Bytes that went from the server to clients so far."""
        with self._lock:
            return self._sent

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(client)

    def _start(self, client: socket.socket) -> None:
        def run() -> None:
            try:
                self._serve(client)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="relay-connection", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target, timeout=30) as server:
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._is_closed:
                    return
                self._open |= {client, server}
            asking = threading.Thread(target=self._carry_questions, args=(client, server), daemon=True)
            asking.start()
            try:
                self._carry_answers(server, client)
            finally:
                for end in (client, server):
                    _cut(end)
                asking.join()
                with self._lock:
                    self._open -= {client, server}

    @staticmethod
    def _carry_questions(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(_REQUEST_BYTES):
                server.sendall(piece)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _carry_answers(self, server: socket.socket, client: socket.socket) -> None:
        out, into = os.pipe()
        try:
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            while count := os.splice(server.fileno(), into, _PIPE_BYTES, flags=os.SPLICE_F_MOVE):
                while count:
                    moved = os.splice(out, client.fileno(), count, flags=os.SPLICE_F_MOVE)
                    count -= moved
                    with self._lock:
                        self._sent += moved
        finally:
            os.close(out)
            os.close(into)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
