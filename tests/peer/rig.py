"""Nodes of one process for tests of the transfer: a real server and client on loopback, and peers that misbehave."""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from cachefs.metrics import Counters
from peer.client import PeerClient
from peer.credentials import PeerCredentials
from peer.limits import ClientLimits, ServerLimits
from peer.members import Member
from peer.server import PeerServer
from peer.wire import BlockRequest, FrameStatus, PeerUnavailable, short_frame
from tests import conftest
from tests.peer.fake_holdings import BLOCK, FakeHoldings, body_of

KINDS = ("open", "secret", "tls", "both")


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fail a test that leaves a thread or a descriptor behind."""
    descriptors, threads = conftest._descriptors(), conftest._threads()
    yield
    deadline = time.monotonic() + conftest.LEAK_GRACE_S
    while (left := conftest._leaked(descriptors, threads)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    if left:
        pytest.fail("left behind: " + ", ".join(left))


class Trust:
    """Files that make nodes peers."""

    def __init__(self, directory: Path, secret: bytes = b"a secret of some length") -> None:
        directory.mkdir(exist_ok=True)
        self.authority = trustme.CA()
        self.directory = directory
        self.secret = directory / "secret"
        self.secret.write_bytes(secret)
        self.secret.chmod(0o600)
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.cert, self.key = self.issue("peer")

    def issue(self, name: str, authority: trustme.CA | None = None, **more: object) -> tuple[Path, Path]:
        """Write a certificate and its key."""
        issued = (authority or self.authority).issue_cert(f"{name}.test", **more)  # type: ignore[arg-type]
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key

    def credentials(self, kind: str) -> PeerCredentials:
        """Return those of a node: "open", "secret", "tls" or "both"."""
        tls = (self.cert, self.key, self.ca) if kind in ("tls", "both") else ("", "", "")
        secret = self.secret if kind in ("secret", "both") else ""
        return PeerCredentials(tls[0], tls[1], tls[2], secret)


class Node:
    """A node that serves `holdings`."""

    def __init__(
        self,
        credentials: PeerCredentials | None = None,
        *,
        limits: ServerLimits | None = None,
        block_size: int = 64 << 10,
        port: int = 0,
        address: str = "127.0.0.1",
        instance: str = "1",
    ) -> None:
        self.holdings = FakeHoldings(block_size)
        self.counters = Counters()
        self.credentials = credentials or PeerCredentials()
        self.server = PeerServer(self.holdings, credentials=self.credentials, counters=self.counters, limits=limits)
        self.port = self.server.start(address, port)
        host = f"[{address}]" if ":" in address else address
        self.member = Member(
            node_id="a" * 16,
            name="served",
            address=f"{host}:{self.port}",
            instance=instance,
            tls=self.credentials.tls,
        )

    def close(self) -> None:
        """Stop it."""
        self.holdings.close()
        self.server.close()

    def wait_for(self, **state: int) -> None:
        """Wait until the server's state has these values."""
        deadline = time.monotonic() + 5
        while any(self.server.state()[name] != value for name, value in state.items()):
            assert time.monotonic() < deadline, (state, self.server.state())
            time.sleep(0.005)


class Asker:
    """A client, and what it got."""

    def __init__(self, credentials: PeerCredentials | None = None, **limits: float) -> None:
        self.counters = Counters()
        self.client = PeerClient(
            credentials or PeerCredentials(),
            counters=self.counters,
            limits=ClientLimits(**limits),  # type: ignore[arg-type]
        )

    def read(self, peer: Member, holdings: FakeHoldings, request: BlockRequest) -> list[int]:
        """Read, check every byte that was counted, and return what was yielded."""
        buffers = holdings.buffers(request)
        told: list[int] = []
        body = body_of(request.version.key, request.version.size)
        at = request.first * holdings.block_size
        for count in self.client.read_blocks(peer, request, buffers):
            told.append(count)
            got = b"".join(buffers[:count])
            assert got == body[at : at + len(got)]
        return told

    def close(self) -> None:
        """End it."""
        self.client.close()


Nodes = Callable[..., Node]
Askers = Callable[..., Asker]


@pytest.fixture
def node(leaves_nothing: None) -> Iterator[Nodes]:
    """Make nodes that are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def make(credentials: PeerCredentials | None = None, **more: object) -> Node:
            made = Node(credentials, **more)  # type: ignore[arg-type]
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def asker(leaves_nothing: None) -> Iterator[Askers]:
    """Make clients that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(credentials: PeerCredentials | None = None, **limits: float) -> Asker:
            made = Asker(credentials, **limits)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    """Files of one cluster."""
    return Trust(tmp_path / "trust")


class FakePeer:
    """Something that listens and does as `script` says with each connection (closed afterwards)."""

    def __init__(self, script: Callable[[socket.socket], None]) -> None:
        self.script = script
        self.over = threading.Event()
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        port = self._listener.getsockname()[1]
        self.member = Member(node_id="b" * 16, name="fake", address=f"127.0.0.1:{port}", instance="1")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._run, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        self._open.add(connection)
        with connection, contextlib.suppress(OSError):
            self.script(connection)
        self._open.discard(connection)

    def close(self) -> None:
        """Stop it."""
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


FakePeers = Callable[[Callable[[socket.socket], None]], FakePeer]


@pytest.fixture
def fake_peer(leaves_nothing: None) -> Iterator[FakePeers]:
    """Make fake peers that are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def make(script: Callable[[socket.socket], None]) -> FakePeer:
            made = FakePeer(script)
            stack.callback(made.close)
            return made

        yield make


def read_request(connection: socket.socket) -> bytes:
    """Return a whole request, head and body; b"" at the end of the connection."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = connection.recv(65536)
        if not piece:
            return b""
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    while len(body) < length:
        piece = connection.recv(65536)
        if not piece:
            return b""
        body += piece
    return head + b"\r\n\r\n" + body


def reset(connection: socket.socket) -> None:
    """Close with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def chunk(raw: bytes) -> bytes:
    """Return a chunk of an HTTP body."""
    return f"{len(raw):x}\r\n".encode() + raw + b"\r\n"


OK_HEAD = b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
SIZE = 3 * BLOCK
BODY = body_of("x", SIZE)
BLOCKS = [BODY[:BLOCK], BODY[BLOCK : 2 * BLOCK], BODY[2 * BLOCK :]]
FRAMES = [chunk(short_frame(FrameStatus.OK, number, piece)) for number, piece in enumerate(BLOCKS)]


def ask(here: Asker, peer: Member) -> tuple[list[int], str]:
    """Ask for the three blocks; return what was yielded, and why it ended ("" if well). Every byte is checked."""
    holdings = FakeHoldings()
    told: list[int] = []
    request = holdings.request(holdings.put("x", SIZE))
    buffers = holdings.buffers(request)
    try:
        for count in here.client.read_blocks(peer, request, buffers):
            told.append(count)
            assert [bytes(buffer) for buffer in buffers[:count]] == BLOCKS[:count]
    except PeerUnavailable as error:
        return told, str(error)
    return told, ""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail when it takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
