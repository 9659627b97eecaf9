"""GETs of whole objects on sockets of our own: many at once from one thread, for what is brought in bulk.

obstore takes 0.25 ms of CPU for an object of 110 KB, and a thread for each request; this takes 0.1 ms in one thread
(docs/decisions/0009-bulk-fetch.md). It knows the usual answer only: 200, the right length, the right entity tag. All
else is `Unusual`: whoever asked closes the connection and asks the ordinary way, which knows errors, regions, retries
and refreshed keys. So nothing here decides what an error means.

HTTP/1.1 (RFC 9112) with one request at a time on a connection; TLS with the certificates of the mount. Not used behind
a proxy.

INVARIANT: a body is given out only when status, length and entity tag are those of the version that was asked for.
"""

from __future__ import annotations

import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cachefs.store.address import Address, quote
from cachefs.store.listing import parse_etag, quote_etag
from cachefs.store.refusals import Refusal
from cachefs.store.signed import USER_AGENT
from cachefs.store.sigv4 import Signer
from cachefs.types import ObjectVersion

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
SILENCE_S = 3.0
"""A server that says nothing for so long has to be asked the ordinary way."""
IDLE_S = 4.0
"""A connection that was not used for so long is not used again: servers close theirs after five seconds and more."""
NAMES_S = 30.0
"""How long the addresses of a name are used."""
MOST_HEAD = 32 << 10
_CHUNK = 64 << 10
Keys = Callable[[], "ReadOnlyCredentials | None"]


class Unusual(Exception):
    """Something that the ordinary way has to see."""

    def __init__(self, text: str, refusal: Refusal | None = None) -> None:
        """`refusal`: it is a complete answer, which says this (without what its body says)."""
        super().__init__(text)
        self.refusal = refusal


class Stale(Unusual):
    """The server had closed a connection that was used before: the request was not answered, ask again on another."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds: until a connection is there, and until an answer is complete."""

    connect_s: float
    request_s: float


class Connection:
    """One connection, and the request that is on it. One thread at a time; never blocks."""

    __slots__ = (
        "_begun_at", "_body", "_connecting", "_etag", "_filled", "_head", "_moved_at", "_shaking", "_sock", "_tls",
        "_unsent", "_used", "_wire", "body_view", "events", "idle_since", "keeps",
    )  # fmt: skip

    def __init__(self, wire: Wire, family: int, address: tuple[object, ...], tls: ssl.SSLContext | None) -> None:
        """Begin to connect. Raises OSError."""
        self._wire = wire
        self._tls = tls
        self._sock: socket.socket = socket.socket(family, socket.SOCK_STREAM)
        self.events = WRITE
        """What has to be waited for."""
        self.keeps = True
        """Whether the server keeps it open after this answer."""
        self.idle_since = 0.0
        self._used = False
        self._connecting = True
        self._shaking = tls is not None
        self._head = bytearray()
        self._body = bytearray()
        self.body_view: memoryview | None = None
        """The body, while it comes and when it is complete."""
        self._filled = 0
        self._unsent = b""
        self._etag = ""
        self._begun_at = self._moved_at = time.monotonic()
        try:
            self._sock.setblocking(False)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.connect_ex(address)
        except OSError:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._sock.fileno()

    def ask(self, request: bytes, version: ObjectVersion) -> None:
        """Have a request sent; call `go` when the socket is ready, and once at once."""
        self._unsent = request
        self._etag = version.etag
        self._head = bytearray()
        self._body = bytearray(version.size)
        self.body_view = None
        self._filled = 0
        self._begun_at = self._moved_at = time.monotonic()
        if not (self._connecting or self._shaking):
            self.events = WRITE

    def go(self) -> bool:
        """Move on as far as the socket allows; returns whether the answer is complete. Raises Unusual, OSError."""
        try:
            if (self._connecting or self._shaking) and not self._connected():
                return False
            if self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
                if self._unsent:
                    return False
                self.events = READ
                return False  # nothing can be there yet
            return self._receive()
        except (BlockingIOError, ssl.SSLWantReadError):
            self.events = WRITE if self._unsent and not self._shaking else READ
        except ssl.SSLWantWriteError:
            self.events = WRITE
        return False

    def is_late(self, now: float, timeouts: Timeouts) -> bool:
        """Whether it has taken too long."""
        silence = timeouts.connect_s if self._connecting or self._shaking else SILENCE_S
        return now - self._moved_at > silence or now - self._begun_at > timeouts.request_s

    def close(self) -> None:
        """Close it, whatever is on it."""
        self._sock.close()

    def take_body(self) -> memoryview:
        """Return the complete body, and be ready for the next request."""
        body = self.body_view
        assert body is not None, "the answer is not complete"
        self.body_view = None
        self._used = True
        return body

    def _connected(self) -> bool:
        if self._connecting:
            error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, "the connection was refused")
            self._sock.getpeername()  # OSError: woken before it is there
            self._connecting = False
            self._moved_at = time.monotonic()
            if self._tls is not None:
                self._sock = self._tls.wrap_socket(
                    self._sock, server_hostname=self._wire.hostname, do_handshake_on_connect=False
                )
        if self._shaking:
            assert isinstance(self._sock, ssl.SSLSocket)
            self._sock.do_handshake()
            self._shaking = False
        return True

    def _receive(self) -> bool:
        while self.body_view is None:
            chunk = self._sock.recv(_CHUNK)
            if not chunk:
                raise (Stale if self._used and not self._head else Unusual)("the connection was closed")
            self._moved_at = time.monotonic()
            self._head += chunk
            end = self._head.find(b"\r\n\r\n")
            if end >= 0:
                self._begin_body(end)
            elif len(self._head) > MOST_HEAD:
                raise Unusual("no end of the headers")
        while self._filled < len(self._body):
            count = self._sock.recv_into(self.body_view[self._filled :])
            if not count:
                raise Unusual("the body ended early")
            self._moved_at = time.monotonic()
            self._filled += count
        return True

    def _begin_body(self, end: int) -> None:
        """The headers are there: are they those of the usual answer?"""
        status, _, lines = bytes(self._head[:end]).partition(b"\r\n")
        headers: dict[bytes, bytes] = {}
        for line in lines.split(b"\r\n"):
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        words = status.split(None, 2)[:2]
        if words != [b"HTTP/1.1", b"200"]:
            raise _refused(words, headers)
        if b"transfer-encoding" in headers or headers.get(b"content-length") != b"%d" % len(self._body):
            raise Unusual("another length than that of the object")
        if headers.get(b"content-encoding", b"identity") not in (b"identity", b""):
            # It is how the object was stored; the ordinary way hands it over as it is, and knows what that means.
            raise Unusual("a content encoding")
        if parse_etag(headers.get(b"etag", b"").decode("latin-1")) != self._etag:
            raise Unusual("another version")
        self.keeps = headers.get(b"connection", b"").lower() != b"close"
        rest = len(self._head) - end - 4
        if rest > len(self._body):
            raise Unusual("more than the object")
        view = memoryview(self._body)
        view[:rest] = memoryview(self._head)[end + 4 :]
        self._filled = rest
        self.body_view = view


def _refused(words: list[bytes], headers: dict[bytes, bytes]) -> Unusual:
    number = words[1] if len(words) == 2 and len(words[1]) == 3 and words[1].isdigit() else b""
    if words[:1] != [b"HTTP/1.1"] or not number:
        return Unusual("no answer in HTTP/1.1")
    after = headers.get(b"retry-after", b"").decode("latin-1")
    return Unusual(f"answered {number.decode()}", Refusal.parse(int(number), "", retry_after=after))


class Wire:
    """Connections to one bucket at one address. Any thread."""

    def __init__(
        self,
        address: Address,
        keys: Keys,
        timeouts: Timeouts,
        *,
        certificates: str,
        on_throttled: Callable[[], None] = lambda: None,
    ) -> None:
        """`keys` gives the newest keys (None: anonymous), `certificates` is a file or empty for those of the machine;
        `on_throttled` is called when the server wants fewer requests.
        """
        parts = urlsplit(address.bucket_host_url)
        self.address = address
        self.timeouts = timeouts
        self.on_throttled = on_throttled
        self.hostname = parts.hostname or ""
        self._port = parts.port or (443 if address.secure else 80)
        self._host = parts.netloc
        self._prefix = parts.path + ("" if address.virtual_host else f"/{quote(address.bucket)}")
        self._keys = keys
        self._tls = ssl.create_default_context(cafile=certificates or None) if address.secure else None
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._signer: tuple[ReadOnlyCredentials, Signer] | None = None
        self._names: list[tuple[int, tuple[object, ...]]] = []
        self._named_at = -NAMES_S
        self._turn = 0
        self._closed = False

    def request(self, version: ObjectVersion) -> bytes:
        """Return the text of a request. Raises CachefsError when there are no keys, Unusual for what it cannot say."""
        path = f"{self._prefix}/{quote(version.key, safe='/')}"
        tag = quote_etag(version.etag)
        if not version.etag or not version.size or not tag.isprintable() or not tag.isascii():
            raise Unusual("an object that cannot be asked for like others")
        keys = self._keys()
        signed = "" if keys is None else self._signer_of(keys).headers(path, time.time())
        return (
            f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\nUser-Agent: {USER_AGENT}\r\nAccept-Encoding: identity\r\n"
            f"If-Match: {tag}\r\n{signed}\r\n"
        ).encode()

    def connection(self) -> Connection:
        """Return a connection that is free: one that was used lately, or a new one. Raises OSError, Unusual."""
        now = time.monotonic()
        old = []
        with self._lock:
            found = None
            while self._idle and found is None:
                candidate = self._idle.pop()
                if now - candidate.idle_since <= IDLE_S:
                    found = candidate
                else:
                    old.append(candidate)
        for each in old:
            each.close()
        return found if found is not None else self.new_connection()

    def new_connection(self) -> Connection:
        """Begin to connect. Raises OSError, Unusual."""
        names = self._addresses()
        self._turn += 1
        family, address = names[self._turn % len(names)]
        return Connection(self, family, address, self._tls)

    def give_back(self, connection: Connection) -> None:
        """A connection is free; it is kept for the next request, if it can be."""
        connection.idle_since = time.monotonic()
        with self._lock:
            kept = connection.keeps and not self._closed
            if kept:
                self._idle.append(connection)
        if not kept:
            connection.close()

    def close(self) -> None:
        """Close what is free; what is in use closes when it is given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _addresses(self) -> list[tuple[int, tuple[object, ...]]]:
        now = time.monotonic()
        if now - self._named_at > NAMES_S:
            found = socket.getaddrinfo(self.hostname, self._port, type=socket.SOCK_STREAM)
            self._names = [(family, address) for family, _, _, _, address in found]
            self._named_at = now
        if not self._names:
            raise Unusual("its name has no address")
        return self._names

    def _signer_of(self, keys: ReadOnlyCredentials) -> Signer:
        known = self._signer
        if known is None or known[0] != keys:
            access, secret = keys.access_key or "", keys.secret_key or ""
            signer = Signer(access, secret, keys.token, self.address.region, self._host)
            known = self._signer = (keys, signer)
        return known[1]
