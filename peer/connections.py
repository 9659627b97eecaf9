"""Connections to other nodes: made, proven, kept for the next call, and retired.

A connection proves itself when it is made. TLS does so in its handshake. With a shared secret the first request has no
proof, so the server answers it with a challenge; from then on every request carries our proof, and the head of every
answer has to carry the server's, or nothing of it is used.

What always holds: a connection is used by one thread at a time, and whoever has it gives it back or closes it.
"""

from __future__ import annotations

import math
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from cachefs.config import split_address
from peer import wire
from peer.credentials import PeerCredentials
from peer.digest import DigestClient
from peer.incoming import Answer, Broken, Closed, Incoming, TooSlow, read_head
from peer.leash import Leash, shut, with_notice
from peer.limits import ClientLimits
from peer.members import Member

LOOK_S = 5.0
"""How often connections that were idle for too long are looked for."""

Place = tuple[str, str, str]
"""A node, its instance, and its address."""


class NoConnection(Broken):
    """The other side cannot be reached, or one of us did not believe the other."""


def place_of(peer: Member) -> Place:
    """Return what connections belong to."""
    return peer.node_id, peer.instance, peer.address


class Connection:
    """One connection. Its methods raise Broken, and after that it is of no use."""

    def __init__(self, peer: Member, credentials: PeerCredentials, limits: ClientLimits, leash: Leash) -> None:
        """Connect, and prove who we are. BLOCKS. Raises NoConnection. The leash holds it afterwards."""
        self.place = place_of(peer)
        self.made_at = self.used_at = time.monotonic()
        self.used = False
        """Whether it has carried a call before this one."""
        self.spent = False
        """Whether something is on its way that nobody wants."""
        self._limits = limits
        self._digest: DigestClient | None = None
        try:
            self._socket = _connected(peer, credentials, limits, leash)
            self._incoming = Incoming(self._socket)
        except BaseException:
            leash.holds(None)
            raise
        try:
            self._prove(credentials, leash)
        except BaseException as error:
            leash.holds(None)
            self.close()
            if isinstance(error, Broken):
                raise NoConnection(str(error)) from error
            raise

    def held_by(self, leash: Leash) -> None:
        """A call begins."""
        leash.holds(self._socket)

    def _prove(self, credentials: PeerCredentials, leash: Leash) -> None:
        secret = credentials.secret()
        if secret is None:
            return
        head_s = self._limits.head_s
        answer = self.ask("HEAD", wire.STATUS_PATH, b"", time.monotonic() + head_s, head_s, leash)
        if answer.status != 401:
            raise Broken("it does not ask for the shared secret, so it does not have it")
        try:
            self._digest = DigestClient(secret, answer.headers.get("www-authenticate", ""))
        except ValueError as error:
            raise Broken(f"it asks for something else than our shared secret: {error}") from error

    def ask(self, method: str, target: str, body: bytes, deadline: float, head_s: float, leash: Leash) -> Answer:
        """Send a request and return the answer, whose head is there, and proven where there is a secret. BLOCKS.

        `leash`: that of the call.
        """
        lines = [
            f"{method} {target} HTTP/1.1",
            "Host: peer",
            f"{wire.PROTOCOL_HEADER}: {wire.PROTOCOL}",
        ]
        if self._digest is not None:
            lines.append(f"Authorization: {self._digest.authorize(method, target, body)}")
        if body:
            lines += [f"Content-Length: {len(body)}", f"Content-Type: {wire.MESSAGE_TYPE}"]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        now = time.monotonic()
        self._incoming.limit(deadline, head_s, leash, max(0.001, leash.due - now))
        self._send(head + body, min(deadline, now + head_s))
        answer = read_head(self._incoming, bodiless=method == "HEAD")
        if self._digest is not None:
            if answer.status == 401:
                raise NoConnection("it refuses our proof: the shared secrets differ")
            if not self._digest.proves_itself(answer.headers.get("authentication-info")):
                raise NoConnection("it did not prove that it knows the shared secret")
        quiet_s = math.inf if leash.due == math.inf else self._limits.quiet_body_s
        self._incoming.limit(deadline, self._limits.silence_s, leash, quiet_s)
        return answer

    def _send(self, raw: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            self._socket.sendall(raw)
        except TimeoutError as error:
            raise TooSlow("it does not take the request") from error
        except OSError as error:
            raise Closed(error.strerror or type(error).__name__) from error

    @property
    def fit(self) -> bool:
        """Whether it may carry another call; one that has something to say unasked may not."""
        now = time.monotonic()
        young = now - self.made_at < self._limits.connection_life_s
        return not self.spent and young and now - self.used_at < self._limits.kept_s and self._incoming.empty

    def interrupt(self) -> None:
        """Let whoever waits for this connection find it closed. Any thread."""
        shut(self._socket)

    def close(self) -> None:
        """Close it at once."""
        self._socket.close()


def _connected(peer: Member, credentials: PeerCredentials, limits: ClientLimits, leash: Leash) -> socket.socket:
    """Raises NoConnection. The leash holds what is returned."""
    if peer.tls != credentials.tls:
        raise NoConnection("it speaks TLS, we do not" if peer.tls else "it does not speak TLS, as we do")
    try:
        contexts = credentials.tls_contexts()
        connection = _reached(peer, limits, leash)
    except (OSError, ValueError) as error:
        raise NoConnection(f"it cannot be reached: {getattr(error, 'strerror', None) or error}") from error
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if contexts is None:
            return connection
        connection = contexts.client.wrap_socket(connection, do_handshake_on_connect=False)
        leash.holds(connection)
        with_notice(connection, connection.do_handshake, leash.due - time.monotonic(), limits.head_s, leash.quiet)
        return connection
    except BaseException as error:
        leash.holds(None)
        connection.close()
        if isinstance(error, OSError):
            raise NoConnection(f"no TLS connection: {_reason(error)}") from error
        raise


def _reached(peer: Member, limits: ClientLimits, leash: Leash) -> socket.socket:
    """Return a connection to the first address of a peer that can be reached. Raises OSError, ValueError."""
    host, port = split_address(peer.address)
    failed: OSError | None = None
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        leash.holds(connection)
        try:
            _connect(connection, place, limits, leash)
            leash.holds(connection)  # again: one that was pulled before there was a connection could not shut it
            return connection
        except BaseException as error:
            leash.holds(None)
            connection.close()
            if not isinstance(error, OSError):
                raise
            failed = error
    raise failed or OSError("it has no address")


def _connect(connection: socket.socket, place: Any, limits: ClientLimits, leash: Leash) -> None:
    """Connect, and let the leash know when that takes long. Raises OSError."""

    def go_on() -> None:
        waiting = select.poll()
        waiting.register(connection, select.POLLOUT)
        if not waiting.poll((connection.gettimeout() or 0.0) * 1000):
            raise TimeoutError("timed out")
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    notice_s = leash.due - time.monotonic()
    with_notice(connection, lambda: connection.connect(place), notice_s, limits.connect_s, leash.quiet, go_on)


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "failed").lower().replace("_", " ")
    return error.strerror or str(error) or type(error).__name__


class Connections:
    """All connections of a client. Any thread."""

    def __init__(self, credentials: PeerCredentials, limits: ClientLimits) -> None:
        self._credentials = credentials
        self._limits = limits
        self._lock = threading.Lock()
        self._idle: dict[Place, list[Connection]] = {}
        self._lent: set[Connection] = set()
        self._kept_in_all = 0
        self._look_at = 0.0
        self._open = True

    def take(self, peer: Member, leash: Leash, *, fresh: bool = False) -> Connection:
        """Return a connection that was kept, or a new one (`fresh`: certainly). BLOCKS. Raises NoConnection.

        `leash`: that of the call that it is for, which holds it from now on.
        """
        connection = None if fresh else self._kept(place_of(peer))
        if connection is None:
            connection = Connection(peer, self._credentials, self._limits, leash)
        else:
            connection.held_by(leash)
        with self._lock:
            self._lent.add(connection)
            is_open = self._open
        if not is_open:
            leash.holds(None)
            self.drop(connection)
            raise NoConnection("this node is going away")
        return connection

    def _kept(self, place: Place) -> Connection | None:
        while True:
            with self._lock:
                kept = self._idle.get(place)
                connection = kept.pop() if kept else None
                self._kept_in_all -= connection is not None
            if connection is None or connection.fit:
                return connection
            connection.close()

    def give_back(self, connection: Connection) -> None:
        """It may carry the next call."""
        connection.used_at, connection.used = time.monotonic(), True
        with self._lock:
            self._lent.discard(connection)
            kept = self._idle.setdefault(connection.place, [])
            keep = self._open and len(kept) < self._limits.kept_connections and connection.fit
            if keep:
                kept.append(connection)
                self._kept_in_all += 1
            too_many = self._kept_in_all > self._limits.kept_in_all
        if not keep:
            connection.close()
        if too_many:
            self._retire_oldest()
        self._look()

    def drop(self, connection: Connection) -> None:
        """It is of no use any more."""
        with self._lock:
            self._lent.discard(connection)
        connection.close()

    def forget(self, place: Place) -> None:
        """Close what is kept for a node that does not answer."""
        self._retire(lambda connection: connection.place == place)

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._retire(lambda connection: not connection.fit)

    def _retire_oldest(self) -> None:
        with self._lock:
            oldest = min((kept[0] for kept in self._idle.values() if kept), key=lambda each: each.used_at, default=None)
        if oldest is not None:
            self._retire(lambda connection: connection is oldest)

    def _retire(self, old: Callable[[Connection], bool]) -> None:
        retired: list[Connection] = []
        with self._lock:
            for place, kept in list(self._idle.items()):
                retired += [connection for connection in kept if old(connection)]
                kept[:] = [connection for connection in kept if connection not in retired]
                if not kept:
                    del self._idle[place]
            self._kept_in_all -= len(retired)
        for connection in retired:
            connection.close()

    def close(self) -> None:
        """Close all; whoever waits for one of them finds it closed."""
        with self._lock:
            self._open = False
            lent = list(self._lent)
        for connection in lent:
            connection.interrupt()
        self._retire(lambda _: True)
