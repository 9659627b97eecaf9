"""Listens for scrapers: GET /metrics over plain HTTP/1.1, one request for each connection, in threads of its own.

What it serves is no secret, but anybody may connect: connections are bounded in number and in time, requests in size,
and nothing that a client sends is looked at but the first line.

INVARIANT: a client that says nothing, or takes nothing, holds one of `MOST_CLIENTS` places for `CLIENT_S` at most.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

from cachefs.config import join_address, split_address
from cachefs.errors import UsageError
from cachefs.exporter.exposition import CONTENT_TYPE

log = logging.getLogger(__name__)

MOST_CLIENTS = 8
CLIENT_S = 5.0
"""For a request to come, and once more for its answer to be taken."""
RESPITE_S = 0.5
_MAX_REQUEST_BYTES = 16 << 10
_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


def parse_listen(text: str) -> tuple[str, int]:
    """Return host and port of ADDR:PORT; an empty ADDR (":9815") means all addresses. Raises ValueError."""
    host, port = split_address(f"0.0.0.0{text}" if text.startswith(":") else text)  # noqa: S104 - only its syntax
    if not text.endswith(f":{port}") or (port == 0 and not text.endswith(":0")):
        raise ValueError(f"'{text}' has no port: write ADDR:PORT, or :PORT for all addresses")
    return "" if text.startswith(":") else host, port


class Endpoint:
    """Serves what `text` returns, from `start` to `close`."""

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        """Binds; `text` is called in threads, and BLOCKS for seconds at most. Raises UsageError."""
        self._text = text
        self._places = threading.BoundedSemaphore(MOST_CLIENTS)
        self._ending = threading.Event()
        try:
            self._listener = _bound(host, port)
        except OSError as error:
            where = join_address(host, port)
            raise UsageError(f"--metrics {where}: cannot listen there: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin. Returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Take no more requests; those under way end by themselves."""
        self._ending.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(2)
        except OSError:
            pass  # not listening any more
        if self._thread.is_alive():
            self._thread.join(CLIENT_S)
        self._listener.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if not self._ending.is_set():  # out of descriptors, or the client has gone
                    log.debug("metrics: %s", error)
                    self._ending.wait(RESPITE_S)
                continue
            self._admit(client)

    def _admit(self, client: socket.socket) -> None:
        if not self._places.acquire(blocking=False):
            client.setblocking(False)
            _send(client, _answer(503, b"too many scrapes at a time\n"))
            client.close()
            return
        try:
            threading.Thread(target=self._serve, args=(client,), name="metrics-answer", daemon=True).start()
        except RuntimeError as error:  # no more threads: this must not end the endpoint
            log.debug("metrics: %s", error)
            client.close()
            self._places.release()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                head = _received(client, time.monotonic() + CLIENT_S)
                if head is not None:
                    client.settimeout(CLIENT_S)
                    _send(client, self._reply(head))
        except OSError as error:
            log.debug("metrics: a client went away: %s", error)
        finally:
            self._places.release()

    def _reply(self, head: bytes) -> bytes:
        if len(head) >= _MAX_REQUEST_BYTES:
            return _answer(431, b"the request is too long\n")
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _answer(400, b"this is no request of HTTP/1\n")
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _answer(405, b"only GET is served here\n", "Allow: GET, HEAD\r\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _answer(404, b"there is only /metrics\n", with_body=method == b"GET")
        try:
            text = self._text()
        except Exception:
            log.exception("metrics cannot be collected")
            return _answer(500, b"an error in cachefs itself: its log says more\n")
        return _answer(200, text, kind=CONTENT_TYPE, with_body=method == b"GET")


def _bound(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError."""
    if not host:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=2 * MOST_CLIENTS, dualstack_ipv6=both)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address[:2], family=family, backlog=2 * MOST_CLIENTS)


def _received(client: socket.socket, deadline: float) -> bytes | None:
    """Return the head of a request, or as much as a request may have; None: it did not come in time, or not whole."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_REQUEST_BYTES:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return None
        client.settimeout(left_s)
        piece = client.recv(4096)
        if not piece:
            return None
        head += piece
    return head


def _answer(status: int, body: bytes, more: str = "", *, kind: str = "text/plain", with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (body if with_body else b"")


def _send(client: socket.socket, answer: bytes) -> None:
    """Send an answer, and the end of the stream; whoever does not take it in time gets a part."""
    try:
        client.sendall(answer)
        client.shutdown(socket.SHUT_WR)
    except OSError as error:
        log.debug("metrics: a client went away: %s", error)
