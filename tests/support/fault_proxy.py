"""An HTTP/1.1 proxy in front of a real S3 server: it counts what is asked, and breaks answers on demand.

    with FaultProxy.before(server.endpoint_url) as proxy:
        mount("--endpoint-url", proxy.endpoint_url, ...)
        proxy.add(Fault(kind="get", status=503, times=2))      # the next two GETs of objects are throttled
        proxy.add(Fault(key=lambda key: key.endswith(".jpg"), truncate_after=1000))
        proxy.down = True                                      # connections are refused until it is False again
        assert proxy.count("list") == 1

The Host header goes on unchanged, so signatures stay valid (the client signs the proxy's address, and the server checks
against the Host header it gets). One thread per connection; each has its own connection to the server. Faults are tried
in the order in which they were added, the first that applies is used. All methods may be called from any thread.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

PIECE = 64 << 10
_CODES = {
    400: "InvalidRequest",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass(frozen=True)
class Fault:
    """One rule: for which requests, how often, and what goes wrong (without any fault field: nothing)."""

    kind: str = ""
    """"get" (of an object), "head" (of an object), "list", "other", or "" for all."""
    key: str | Callable[[str], bool] | None = None
    """The key (for lists: the prefix), or a predicate on it."""
    skip: int = 0
    """Let so many matching requests pass first."""
    times: int | None = None
    """How many requests it hits then; None: all."""

    delay_s: float = 0.0
    """Wait before anything else."""
    status: int = 0
    """Answer this with S3's XML instead of asking the server."""
    code: str = ""
    """The <Code> in that XML; empty: the usual one for the status."""
    region: str = ""
    """Say in `status` that the bucket is in this region."""
    retry_after_s: int | None = None
    """Add a Retry-After header to `status`."""
    truncate_after: int | None = None
    """Send so many bytes of the body, then close (or reset, or stall)."""
    reset: bool = False
    """Reset the connection: instead of an answer, or after `truncate_after` bytes."""
    stall: bool = False
    """Send nothing more, but keep the connection, until the rule is removed."""
    length_delta: int = 0
    """Lie in Content-Length by so many bytes."""
    etag: str | None = None
    """Claim another ETag (give the quotes too)."""
    drip_s: float = 0.0
    """Wait so long before each thousand bytes of the body."""


@dataclass
class Rule:
    """A fault in use; `hits` counts the requests it changed."""

    fault: Fault
    hits: int = 0
    seen: int = 0
    removed: threading.Event = field(default_factory=threading.Event)


@dataclass
class Exchange:
    """One request that came through, in the order of arrival. `status` is 0 while (or when) nothing was answered."""

    method: str
    kind: str
    bucket: str
    key: str
    query: dict[str, str]
    range: str
    at: float
    authorization: str = ""
    status: int = 0
    sent_bytes: int = 0
    faulty: bool = False


class FaultProxy:
    """See the module. A context manager; `endpoint_url` is what clients use."""

    def __init__(self, target_host: str, target_port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: speak https to clients (the server behind is always asked over http)."""
        self.target = (target_host, target_port)
        self._tls = tls
        self.requests: list[Exchange] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self._listen()

    @classmethod
    def before(cls, endpoint_url: str, *, tls: ssl.SSLContext | None = None) -> Self:
        """Return a proxy in front of http://HOST:PORT."""
        parts = urllib.parse.urlsplit(endpoint_url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port, tls=tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, end all connections, free whoever is stalled."""
        self.clear()
        self._deafen()

    @property
    def endpoint_url(self) -> str:
        """What clients use instead of the server's own address."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # -- faults -------------------------------------------------------------------------------------------------------

    def add(self, fault: Fault) -> Rule:
        """Put a fault into use."""
        rule = Rule(fault)
        with self._lock:
            self._rules.append(rule)
        return rule

    def remove(self, rule: Rule) -> None:
        """Take a fault out of use; requests that it stalls end with a closed connection."""
        with self._lock:
            if rule in self._rules:
                self._rules.remove(rule)
        rule.removed.set()

    def clear(self) -> None:
        """Remove all faults (`down` stays as it is)."""
        with self._lock:
            rules, self._rules = self._rules, []
        for rule in rules:
            rule.removed.set()

    @property
    def down(self) -> bool:
        """True: the port refuses connections, and those that were open have been reset."""
        return self._server is None

    @down.setter
    def down(self, wanted: bool) -> None:
        if wanted and self._server is not None:
            self._deafen()
        elif not wanted and self._server is None:
            self._listen()

    # -- counts -------------------------------------------------------------------------------------------------------

    def count(self, kind: str = "", key: str | None = None) -> int:
        """Return how many requests of this kind (and key) came in."""
        with self._lock:
            return sum((not kind or r.kind == kind) and (key is None or r.key == key) for r in self.requests)

    def counts(self) -> Counter[str]:
        """Return the number of requests by kind."""
        with self._lock:
            return Counter(request.kind for request in self.requests)

    @property
    def sent_bytes(self) -> int:
        """Bytes of bodies sent to clients."""
        with self._lock:
            return sum(request.sent_bytes for request in self.requests)

    def forget(self) -> None:
        """Empty `requests` and with it all counts."""
        with self._lock:
            self.requests.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _Connection)
        self._server.proxy = self
        if self._tls is not None:
            # The handshake happens in the thread of the connection, at its first read: a bad one stops nobody else.
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="fault-proxy", daemon=True
        )
        self._thread.start()

    def _deafen(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        assert self._thread is not None
        self._thread.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _cut(connection)

    def opened(self, connection: socket.socket) -> None:
        """A client connected."""
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """A connection of a client ended."""
        with self._lock:
            self._connections.discard(connection)

    def arrived(self, exchange: Exchange) -> Rule | None:
        """Note a request and return the rule that it falls under."""
        with self._lock:
            self.requests.append(exchange)
            for rule in self._rules:
                if not _applies(rule.fault, exchange):
                    continue
                rule.seen += 1
                turn = rule.seen - rule.fault.skip
                if turn > 0 and (rule.fault.times is None or turn <= rule.fault.times):
                    rule.hits += 1
                    exchange.faulty = True
                    return rule
        return None


def _applies(fault: Fault, exchange: Exchange) -> bool:
    if fault.kind and fault.kind != exchange.kind:
        return False
    if fault.key is None:
        return True
    return fault.key(exchange.key) if callable(fault.key) else fault.key == exchange.key


def _arm_reset(connection: socket.socket) -> None:
    """Let the coming close() send RST: the other side gets ECONNRESET, not an orderly end."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _cut(connection: socket.socket) -> None:
    """End a connection that another thread serves: that thread wakes up, fails, and closes it."""
    _arm_reset(connection)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    proxy: FaultProxy

    def shutdown_request(self, request: Any) -> None:
        """Close without the base class's shutdown(SHUT_WR): its FIN would arrive before the RST of a reset."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is nothing to print."""


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.proxy = self.server.proxy
        self.upstream: http.client.HTTPConnection | None = None
        self.proxy.opened(self.connection)

    def finish(self) -> None:
        self.proxy.closed(self.connection)
        if self.upstream is not None:
            self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing: `requests` is the log."""

    def forward(self) -> None:
        """Serve one request of any method."""
        exchange = self._exchange()
        rule = self.proxy.arrived(exchange)
        fault = rule.fault if rule is not None else Fault()
        body = self._request_body()
        gone = rule.removed if rule is not None else threading.Event()
        if fault.delay_s:
            gone.wait(fault.delay_s)
        if fault.status:
            self._refuse(exchange, fault)
        elif fault.truncate_after is None and (fault.reset or fault.stall):
            if fault.stall:
                gone.wait()
            self._break(fault)
        else:
            try:
                answer = self._ask(body)
            except (OSError, http.client.HTTPException):
                self._break(Fault(reset=True))
                return
            self._answer(exchange, answer, fault, gone)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def _exchange(self) -> Exchange:
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path, errors="surrogateescape").removeprefix("/")
        bucket, _, key = path.partition("/")
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        kind = "other"
        if key and self.command in ("GET", "HEAD"):
            kind = self.command.lower()
        elif bucket and self.command == "GET" and (not query or "prefix" in query or "list-type" in query):
            kind, key = "list", query.get("prefix", "")
        wanted, signed = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        return Exchange(self.command, kind, bucket, key, query, wanted, time.monotonic(), signed)

    def _request_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _ask(self, body: bytes) -> http.client.HTTPResponse:
        """Send the request on; once more over a new connection when the kept one had gone stale."""
        fresh = self.upstream is None
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(*self.proxy.target, timeout=120)
            self.upstream.connect()
            self.upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", "transfer-encoding", "content-length"):
                    self.upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                self.upstream.putheader("Content-Length", str(len(body)))
            self.upstream.endheaders(body or None)
            return self.upstream.getresponse()
        except (OSError, http.client.HTTPException):
            self.upstream.close()
            self.upstream = None
            if fresh:
                raise
            return self._ask(body)

    def _answer(
        self, exchange: Exchange, answer: http.client.HTTPResponse, fault: Fault, gone: threading.Event
    ) -> None:
        exchange.status = answer.status
        whole = answer.read() if answer.chunked else None
        length = len(whole) if whole is not None else int(answer.headers.get("Content-Length") or 0)
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() == "etag" and fault.etag is not None:
                value = fault.etag
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(length + fault.length_delta))
        self.end_headers()
        remaining = 0 if self.command == "HEAD" else length
        limit = remaining if fault.truncate_after is None else min(remaining, fault.truncate_after)
        while exchange.sent_bytes < limit:
            size = min(1000 if fault.drip_s else PIECE, limit - exchange.sent_bytes)
            if gone.wait(fault.drip_s):
                fault = Fault()
            piece = answer.read(size) if whole is None else whole[exchange.sent_bytes : exchange.sent_bytes + size]
            if not piece:
                self._break(Fault(reset=True))
                return
            exchange.sent_bytes += len(piece)  # before: whoever gets the last piece may count at once
            self.wfile.write(piece)
        if fault.truncate_after is not None or fault.length_delta:
            if fault.stall:
                gone.wait()
            self._break(fault)
        elif whole is None:
            answer.read()  # a HEAD's empty body too: else the connection cannot carry the next request

    def _refuse(self, exchange: Exchange, fault: Fault) -> None:
        exchange.status = fault.status
        code = fault.code or _CODES.get(fault.status, "InternalError")
        xml = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(xml)))
        if fault.region:
            self.send_header("x-amz-bucket-region", fault.region)
        if fault.retry_after_s is not None:
            self.send_header("Retry-After", str(fault.retry_after_s))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(xml.encode())

    def _break(self, fault: Fault) -> None:
        """End the connection in the fault's way; what the server still sends of its body goes with it."""
        self.close_connection = True
        if self.upstream is not None:
            self.upstream.close()
            self.upstream = None
        if fault.reset:
            _arm_reset(self.connection)
