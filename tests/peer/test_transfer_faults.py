"""Peers and networks that misbehave: the asker goes on within its deadlines, and counts nothing that is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from peer import wire
from peer.members import Member
from peer.wire import FrameStatus, ListingRequest, PeerUnavailable, frame_head, short_frame
from tests.peer.fake_holdings import BLOCK, FakeHoldings
from tests.peer.rig import (
    BLOCKS,
    FRAMES,
    LAST,
    OK_HEAD,
    SIZE,
    Askers,
    FakePeers,
    Nodes,
    Trust,
    ask,
    asker,
    chunk,
    fake_peer,
    leaves_nothing,
    node,
    read_request,
    reset,
    trust,
    within,
)

__all__ = ["asker", "fake_peer", "leaves_nothing", "node", "trust"]

LISTING = ListingRequest(volume="0" * 16, prefix="", delimiter="/", token=None, limit=10, max_age_s=0.0)
WAIT = chunk(short_frame(FrameStatus.WAIT, 0))

Script = Callable[[socket.socket], None]


def says(*pieces: bytes) -> Script:
    """Answer every request with these bytes, and close when they end in b"" (else keep the connection)."""

    def script(connection: socket.socket) -> None:
        while read_request(connection):
            for piece in pieces:
                connection.sendall(piece)
            if pieces and pieces[-1] == b"":
                return

    return script


def test_the_fake_peer_can_answer_well(asker: Askers, fake_peer: FakePeers) -> None:
    here, there = asker(), fake_peer(says(OK_HEAD, WAIT, *FRAMES, LAST))
    assert ask(here, there.member) == ([1, 2, 3], "")
    assert ask(here, there.member) == ([1, 2, 3], "")
    assert there.connections == 1


LIES: dict[str, tuple[bytes, ...]] = {
    "a shorter block": (OK_HEAD, FRAMES[0], chunk(short_frame(FrameStatus.OK, 1, BLOCKS[1][:-1])), LAST),
    "a longer block": (OK_HEAD, FRAMES[0], chunk(short_frame(FrameStatus.OK, 1, BLOCKS[1] + b"x")), LAST),
    "a huge block": (OK_HEAD, FRAMES[0], chunk(frame_head(FrameStatus.OK, 1, (1 << 32) - 1, 0))),
    "corrupted bytes": (
        OK_HEAD, FRAMES[0],
        chunk(frame_head(FrameStatus.OK, 1, BLOCK, wire.checksum_of(BLOCKS[1])) + bytes(BLOCK)), FRAMES[2], LAST,
    ),
    "another block": (OK_HEAD, FRAMES[0], FRAMES[2], FRAMES[1], LAST),
    "the same again": (OK_HEAD, FRAMES[0], FRAMES[0]),
    "a status that there is not": (OK_HEAD, FRAMES[0], chunk(b"\x09" + bytes(16)), LAST),
    "WAIT with a payload": (OK_HEAD, FRAMES[0], chunk(short_frame(FrameStatus.WAIT, 1, b"x")), LAST),
    "a long reason": (OK_HEAD, FRAMES[0], chunk(short_frame(FrameStatus.FAILED, 1, b"x" * 5000)), LAST),
    "a damaged reason": (OK_HEAD, FRAMES[0], chunk(frame_head(FrameStatus.FAILED, 1, 3, 1) + b"abc"), LAST),
    "an early end": (OK_HEAD, FRAMES[0], LAST),
    "a close": (OK_HEAD, FRAMES[0], FRAMES[1][:1000], b""),
    "chunks that are none": (OK_HEAD, FRAMES[0], b"hello\r\n" + bytes(100)),
    "a negative chunk": (OK_HEAD, FRAMES[0], b"-5\r\n" + bytes(100)),
    "a chunk without an end": (OK_HEAD, FRAMES[0][:-2], b"xx", FRAMES[1]),
    "a line without an end": (OK_HEAD, FRAMES[0], b"1" * 100_000),
    "trailers": (OK_HEAD, FRAMES[0], b"0\r\nX: y\r\n\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_after_the_first_block(asker: Askers, fake_peer: FakePeers, lie: str) -> None:
    """What was verified counts, nothing else does; the connection is closed, and the breaker hears of it."""
    here, there = asker(), fake_peer(says(*LIES[lie]))
    with within(2):
        told, why = ask(here, there.member)
    assert told == [1]
    assert why.isprintable()
    assert why.startswith("fake (127.0.0.1:")
    assert here.counters.get("peer_corrupt") == (1 if lie == "corrupted bytes" else 0)
    ask(here, there.member)
    assert there.connections == 2
    assert here.client.health(there.member)["state"] == "closed"
    ask(here, there.member)
    assert here.client.health(there.member)["state"] == "open", "three in a row"
    with within(0.1):
        assert "failed a moment ago" in ask(here, there.member)[1]
    assert there.connections == 3


HEADS: dict[str, bytes] = {
    "no HTTP": b"SSH-2.0-OpenSSH_9\r\n\r\n",
    "old HTTP": b"HTTP/1.0 200 OK\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 1\r\n\r\n",
    "an odd length": b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 1\r\nContent-Length: -1\r\n\r\n",
    "an odd encoding": b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "a header that is none": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "a folded header": b"HTTP/1.1 200 OK\r\nA: b\r\n c: d\r\n\r\n",
    "a large head": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    "a head without an end": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000,
    "no protocol": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "another protocol": b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a refusal": b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 9\r\n\r\nother\x1b\x00\n\r",
    "a server that is busy": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
    "a redirection": b"HTTP/1.1 302 Found\r\nLocation: http://example.org\r\nContent-Length: 0\r\n\r\n",
    "a question for a proof": b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n",
    "a short body": b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 1\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("head", HEADS)
def test_answers_that_are_none(asker: Askers, fake_peer: FakePeers, head: str) -> None:
    here, there = asker(), fake_peer(says(HEADS[head]))
    with within(2):
        told, why = ask(here, there.member)
    assert told == []
    assert why.isprintable()
    for call in (here.client.status, lambda peer: here.client.list_page(peer, LISTING)):
        with within(2), pytest.raises(PeerUnavailable):
            call(there.member)


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_status_that_is_none(asker: Askers, fake_peer: FakePeers, body: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\nCachefs-Protocol: 1\r\nContent-Length: %d\r\n\r\n" % len(body)
    here, there = asker(), fake_peer(says(head, body))
    with pytest.raises(PeerUnavailable):
        here.client.status(there.member)


@pytest.mark.parametrize(
    "frame",
    [
        short_frame(FrameStatus.OK, 0, b"rubbish"),
        frame_head(FrameStatus.OK, 0, wire.MAX_PAGE_BYTES + 1, 0),
        frame_head(FrameStatus.OK, 0, 3, 0) + b"abc",
        short_frame(FrameStatus.FAILED, 0, b"it is tired"),
    ],
)
def test_a_page_that_is_none(asker: Askers, fake_peer: FakePeers, frame: bytes) -> None:
    here, there = asker(), fake_peer(says(OK_HEAD, chunk(frame), LAST))
    with pytest.raises(PeerUnavailable):
        here.client.list_page(there.member, LISTING)


def test_answers_before_the_answer_are_skipped_and_bounded(asker: Askers, fake_peer: FakePeers) -> None:
    here = asker()
    early = b"HTTP/1.1 103 Early\r\nA: b\r\n\r\n"
    assert ask(here, fake_peer(says(early, early, OK_HEAD, *FRAMES, LAST)).member) == ([1, 2, 3], "")

    def for_ever(connection: socket.socket) -> None:
        read_request(connection)
        while True:
            connection.sendall(early * 50)

    here = asker(call_s=0.5)
    with within(2):
        assert ask(here, fake_peer(for_ever).member)[0] == []


# -- silence ----------------------------------------------------------------------------------------------------------


def test_one_who_never_answers(asker: Askers, fake_peer: FakePeers) -> None:
    here, there = asker(), fake_peer(says())
    with within(1.2):
        assert ask(here, there.member)[0] == []


def test_one_who_falls_silent(asker: Askers, fake_peer: FakePeers) -> None:
    here, there = asker(), fake_peer(says(OK_HEAD, FRAMES[0], FRAMES[1][:500]))
    with within(1.7):
        told, why = ask(here, there.member)
    assert told == [1]
    assert "silent" in why


def test_one_who_says_wait_for_ever(asker: Askers, fake_peer: FakePeers) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK_HEAD + FRAMES[0])
        while True:
            connection.sendall(chunk(short_frame(FrameStatus.WAIT, 1)))
            time.sleep(0.02)

    here, there = asker(call_s=1.0), fake_peer(script)
    with within(1.5):
        assert ask(here, there.member)[0] == [1]


def waits(before: float, frames: int = len(FRAMES)) -> Callable[[socket.socket], None]:
    """A peer that lives and fetches for so long before it has blocks."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK_HEAD)
        until = time.monotonic() + before
        while time.monotonic() < until:
            connection.sendall(chunk(short_frame(FrameStatus.WAIT, 0)))
            time.sleep(0.02)
        connection.sendall(b"".join(FRAMES[:frames]) + LAST)

    return script


def test_one_who_fetches_for_too_long_is_left_alone(asker: Askers, fake_peer: FakePeers) -> None:
    here, there = asker(patience_s=0.3), fake_peer(waits(30))
    with within(0.8):
        told, why = ask(here, there.member)
    assert told == []
    assert "lives, and has not got the block" in why
    assert here.client.health(there.member)["state"] == "open", "others who ask it now would wait as long"


@pytest.mark.slow
def test_who_is_known_to_take_long_is_waited_for(asker: Askers, fake_peer: FakePeers) -> None:
    """A store that is slow for everybody is no reason to ask it twice."""
    here, there = asker(patience_s=0.6, patience_times=4.0), fake_peer(waits(0.5))
    for _ in range(12):
        assert ask(here, there.member)[0] == [1, 2, 3]
    there.script = waits(1.0)
    assert ask(here, there.member)[0] == [1, 2, 3]


def test_one_who_drips(asker: Askers, fake_peer: FakePeers) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        for byte in OK_HEAD:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    here, there = asker(call_s=0.8), fake_peer(script)
    with within(1.3):
        assert ask(here, there.member)[0] == []


def test_one_who_does_not_take_the_request(asker: Askers, fake_peer: FakePeers) -> None:
    over = threading.Event()
    threading.Timer(1.5, over.set).start()

    def script(_: socket.socket) -> None:
        over.wait()

    here, there = asker(), fake_peer(script)
    versions = [wire.Run(b"k" * 8000, "etag", 10, bytes(16), 0, 1) for _ in range(120)]
    request = wire.BatchRequest(volume="0" * 16, block_size=BLOCK, only_cached=False, runs=tuple(versions))
    buffers = [memoryview(bytearray(10)) for _ in versions]
    with within(1.5), pytest.raises(PeerUnavailable):
        list(here.client.read_blocks(there.member, request, buffers))


def test_nobody_listens(asker: Askers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    here, gone = asker(), Member(node_id="c" * 16, name="gone", address=address, instance="1")
    with within(0.5):
        assert "cannot be reached" in ask(here, gone)[1]
        assert "failed a moment ago" in ask(here, gone)[1]
        again = Member(node_id="c" * 16, name="gone", address=address, instance="2")
        assert "cannot be reached" in ask(here, again)[1], "another life is asked at once"


@pytest.mark.parametrize("address", ["", "nonsense:99999", "127.0.0.1", "a b:1", "[::1", "127.0.0.1:0"])
def test_an_address_that_is_none(asker: Askers, address: str) -> None:
    told, why = ask(asker(), Member(node_id="c" * 16, name="odd", address=address, instance="1"))
    assert told == []
    assert why


def test_connections_that_are_not_accepted(asker: Askers) -> None:
    """A node whose system is stopped: its queue of connections is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        time.sleep(0.1)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        here = asker()
        with within(1.2):
            assert ask(here, Member(node_id="c" * 16, name="stuck", address=address, instance="1"))[0] == []
        assert here.client.health(Member(node_id="c" * 16, name="", address=address, instance="1"))["state"] == "open"


def test_a_reset_in_the_middle_of_a_body(asker: Askers, fake_peer: FakePeers) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(OK_HEAD + FRAMES[0] + FRAMES[1][: BLOCK // 2])
        time.sleep(0.1)
        reset(connection)

    told, why = ask(asker(), fake_peer(script).member)
    assert told == [1]
    assert why


def test_one_who_closes_at_once(asker: Askers, fake_peer: FakePeers) -> None:
    here, there = asker(), fake_peer(lambda _: None)
    with within(0.5):
        assert ask(here, there.member)[0] == []
    assert there.connections == 1, "a new connection that is closed is no reason to make another"


# -- nodes that end and come back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["open", "both"])
def test_a_node_that_was_started_again_is_asked_over_a_new_connection(
    node: Nodes, asker: Askers, trust: Trust, kind: str
) -> None:
    here = asker(trust.credentials(kind))
    first = node(trust.credentials(kind))
    first.holdings.put("x", SIZE)
    assert ask(here, first.member) == ([1, 2, 3], "")
    first.close()
    second = node(trust.credentials(kind), port=first.port)
    second.holdings.put("x", SIZE)
    assert ask(here, first.member) == ([1, 2, 3], ""), "nobody saw that it was away"
    assert here.client.health(first.member)["state"] == "closed"


_SERVE = """
import sys
from peer.server import PeerServer
from peer.credentials import PeerCredentials
from cachefs.metrics import Counters
from tests.peer.fake_holdings import FakeHoldings, BLOCK
holdings = FakeHoldings()
holdings.put("x", 3 * BLOCK)
holdings.put("cold", 3 * BLOCK, "store")
holdings.gate.clear()
print(PeerServer(holdings, credentials=PeerCredentials(), counters=Counters()).start("127.0.0.1", 0), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped(asker: Askers, end: signal.Signals) -> None:
    command = [sys.executable, "-c", _SERVE]
    here = asker()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as there:
        try:
            assert there.stdout is not None
            address = f"127.0.0.1:{int(there.stdout.readline())}"
            member = Member(node_id="d" * 16, name="ended", address=address, instance="1")
            assert ask(here, member) == ([1, 2, 3], "")
            holdings = FakeHoldings()
            request = holdings.request(holdings.put("cold", SIZE, "store"))
            threading.Timer(0.7, there.send_signal, (end,)).start()
            with within(2.5), pytest.raises(PeerUnavailable):
                list(here.client.read_blocks(member, request, holdings.buffers(request)))
            with within(1.2):
                assert ask(here, member)[0] == []
        finally:
            os.kill(there.pid, signal.SIGKILL)
