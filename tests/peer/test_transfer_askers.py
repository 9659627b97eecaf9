"""Askers that misbehave: the server lets go of them, takes back what they held, and serves all others."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time

import pytest

from cachefs.types import ObjectVersion
from peer import wire
from peer.limits import ServerLimits
from tests.peer.fake_holdings import FakeHoldings
from tests.peer.rig import (
    LAST,
    SIZE,
    Asker,
    Askers,
    Node,
    Nodes,
    Trust,
    ask,
    asker,
    fake_peer,
    leaves_nothing,
    node,
    reset,
    trust,
    within,
)

__all__ = ["asker", "fake_peer", "leaves_nothing", "node", "trust"]


def post(holdings: FakeHoldings, **more: object) -> bytes:
    """Return a good request for three blocks."""
    body = wire.encode_batch(holdings.request(holdings.put("x", SIZE, **more)).batch())  # type: ignore[arg-type]
    head = f"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("kind", ["open", "tls"])
def test_one_who_does_not_read_is_left(node: Nodes, asker: Askers, trust: Trust, kind: str) -> None:
    there = node(trust.credentials(kind), limits=ServerLimits(stuck_s=0.3), block_size=12 << 20)
    version = there.holdings.put("large", 12 << 20, "disk")
    contexts = there.credentials.tls_contexts()
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
        if contexts is not None:
            connection = stack.enter_context(contexts.client.wrap_socket(connection))
        body = wire.encode_batch(there.holdings.request(version).batch())
        head = b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: %d\r\n\r\n"
        connection.sendall(head % len(body) + body)
        time.sleep(0.1)
        assert there.server.state()["bytes_in_flight"] == 12 << 20
        there.wait_for(connections=0, bytes_in_flight=0)


@pytest.mark.parametrize("where", ["disk", "store"])
def test_many_who_do_not_read_and_go_away(node: Nodes, asker: Askers, where: str) -> None:
    """What they held is bounded, others are served meanwhile, and all of it comes back."""
    limits = ServerLimits(copied_bytes=4 << 20, fetched_bytes=4 << 20, requests=20)
    there, here = node(limits=limits, block_size=1 << 20), asker()
    there.holdings.inline = True
    body = wire.encode_batch(there.holdings.request(there.holdings.put("large", 32 << 20, where)).batch())
    head = b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: %d\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head % len(body) + body)
        time.sleep(0.3)
        assert there.server.state()["bytes_in_flight"] <= 12 << 20
        assert ask_for(here, there, 3) == [1, 2, 3]
    there.wait_for(connections=1, requests=0, bytes_in_flight=0)


def ask_for(here: Asker, there: Node, count: int) -> list[int]:
    """Read so many blocks that are in memory."""
    version = there.holdings.put("other", count * there.holdings.block_size)
    return here.read(there.member, there.holdings, there.holdings.request(version))


def test_one_who_goes_away_while_it_waits(node: Nodes) -> None:
    there = node()
    there.holdings.gate.clear()
    there.holdings.inline = True
    with socket.create_connection(("127.0.0.1", there.port)) as connection:
        connection.sendall(post(there.holdings, where="store"))
        time.sleep(0.3)
        reset(connection)
    there.wait_for(connections=0)
    assert there.server.state()["bytes_in_flight"] == SIZE, "the fetch goes on"
    there.holdings.gate.set()
    there.wait_for(bytes_in_flight=0)


def test_one_who_closes_its_half(node: Nodes) -> None:
    there = node()
    with socket.create_connection(("127.0.0.1", there.port)) as connection:
        connection.sendall(post(there.holdings))
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        assert received.endswith(LAST)
        assert len(received) > SIZE
    there.wait_for(connections=0)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /v1/sta",
        b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: 99\r\n\r\nabc",
    ],
)
@pytest.mark.parametrize("kind", ["open", "tls"])
def test_one_who_never_ends_its_request(node: Nodes, trust: Trust, kind: str, begun: bytes) -> None:
    limits = ServerLimits(head_s=0.2, body_s=0.2, idle_s=0.3)
    there = node(trust.credentials(kind), limits=limits)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
        contexts = there.credentials.tls_contexts()
        if contexts is not None:
            connection = stack.enter_context(contexts.client.wrap_socket(connection))
        connection.sendall(begun)
        connection.settimeout(2)
        with within(1.5):
            received = b""
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                while piece := connection.recv(65536):
                    received += piece
        assert received[:12] in (b"", b"HTTP/1.1 408")
    there.wait_for(connections=0)


def test_one_who_never_shakes_hands(node: Nodes, trust: Trust) -> None:
    there = node(trust.credentials("tls"), limits=ServerLimits(head_s=0.2))
    with socket.create_connection(("127.0.0.1", there.port)) as connection:
        connection.settimeout(2)
        with within(1):
            assert connection.recv(1) == b""
    there.wait_for(connections=0)


def test_one_byte_a_moment_does_not_prolong_the_head(node: Nodes) -> None:
    there = node(limits=ServerLimits(head_s=0.5))
    sent = 0
    with socket.create_connection(("127.0.0.1", there.port)) as connection, contextlib.suppress(ConnectionError):
        for sent, byte in enumerate(b"GET /v1/status HTTP/1.1\r\nX: " + b"y" * 100):  # noqa: B007
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    assert sent < 50


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 200_000 + b"\r\n\r\n", 431),
        (b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n", 413),
        (b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 426),
        (b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 0\r\nContent-Length: 3\r\n\r\nabc", 426),
        (b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"POST /v1/listing HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: 0\r\n\r\n", 400),
        (b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 404),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 426),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_bad_requests_are_told_so(node: Nodes, request_: bytes, status: int) -> None:
    there = node()
    with socket.create_connection(("127.0.0.1", there.port)) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_)
        assert connection.recv(65536).startswith(f"HTTP/1.1 {status} ".encode())
    there.wait_for(connections=0)
    assert there.counters.get("peer_refused_requests") == 1


@pytest.mark.expect_warnings("a connection of another node has ended")
def test_a_mistake_of_ours_ends_one_connection(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    there.holdings.load = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
    there.holdings.put("x", SIZE, "disk")
    assert ask(here, there.member)[0] == []
    there.holdings.put("x", SIZE)
    assert ask(asker(), there.member) == ([1, 2, 3], "")
    there.wait_for(bytes_in_flight=0)


def test_questions_that_wait_for_other_nodes_leave_room_for_those_that_wait_for_the_store(
    node: Nodes, asker: Askers
) -> None:
    """Two nodes full of questions of the first kind, each for the other's share, would wait for each other."""
    there, here = node(limits=ServerLimits(requests=2, fetched_bytes=2 * SIZE)), asker()
    other_node = threading.Event()

    def wait_for_the_other(key: str) -> Exception | None:
        return None if key == "own" or other_node.wait(10) else TimeoutError()

    there.holdings.before_fetch = wait_for_the_other
    relayed = [there.holdings.put(f"relayed-{number}", SIZE, "store") for number in range(4)]
    own = there.holdings.put("own", SIZE, "store")
    there.holdings.level_of = lambda oid: 0 if oid == there.holdings.oid(own) else 2
    results: list[list[int]] = []

    def ask_for_relayed(another: Asker, version: ObjectVersion) -> None:
        results.append(another.read(there.member, there.holdings, there.holdings.request(version)))

    threads = [threading.Thread(target=ask_for_relayed, args=(asker(), version)) for version in relayed]
    try:
        for thread in threads:
            thread.start()
        there.wait_for(requests=2)  # one has all the room there is, one waits for it, the others in their line
        assert here.read(there.member, there.holdings, there.holdings.request(own)) == [1, 2, 3]
        assert results == []
    finally:
        other_node.set()
        for thread in threads:
            thread.join()
    assert results == [[1, 2, 3]] * 4
