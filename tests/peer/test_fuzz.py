"""Whatever comes over the wire: the server goes on, the client gives right bytes or none, in little memory."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer import wire
from peer.limits import ServerLimits
from peer.wire import FrameStatus, ListingRequest, PeerUnavailable, short_frame
from tests.peer.fake_holdings import BLOCK, VOLUME, FakeHoldings, body_of
from tests.peer.rig import KINDS, LAST, OK_HEAD, Asker, FakePeer, Node, Trust, chunk, read_request

MORE_BYTES = 64 << 20
"""By so much the memory of this process (server, client and Hypothesis) may grow."""
LIMITS = ServerLimits(head_s=0.3, body_s=0.3, idle_s=0.5, stuck_s=0.5, connections=20)
SIZE = 2 * BLOCK


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


class Target:
    """A server of each kind, and who asks it properly between the attacks."""

    def __init__(self, directory: Path) -> None:
        trust = Trust(directory)
        self.nodes = {kind: Node(trust.credentials(kind), limits=LIMITS) for kind in KINDS}
        self.askers = {kind: Asker(trust.credentials(kind)) for kind in KINDS}
        self.cases = 0
        for there in self.nodes.values():
            there.holdings.put("x", SIZE)
            there.holdings.put("disk", SIZE, "disk")
            there.holdings.put("cold", SIZE, "store")

    def still_serves(self, kind: str) -> None:
        there = self.nodes[kind]
        request = there.holdings.request(there.holdings.put("x", SIZE))
        assert self.askers[kind].read(there.member, there.holdings, request) == [1, 2]
        self.cases += 1

    def close(self) -> None:
        for asker in self.askers.values():
            asker.close()
        for there in self.nodes.values():
            there.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("fuzz"))
    before = resident_bytes()
    try:
        yield made
        assert made.cases, "nothing was tried"
        for there in made.nodes.values():
            there.wait_for(bytes_in_flight=0, requests=0)
        assert resident_bytes() - before < MORE_BYTES
    finally:
        made.close()


def attack(there: Node, raw: bytes, pieces: int, end: str) -> bytes:
    """Send bytes in pieces and end the connection in some way; return what came back."""
    received = b""
    with socket.create_connection(("127.0.0.1", there.port)) as connection, contextlib.suppress(OSError):
        connection.settimeout(0.05)
        step = max(1, len(raw) // pieces)
        for at in range(0, len(raw), step):
            connection.sendall(raw[at : at + step])
        if end == "half":
            connection.shutdown(socket.SHUT_WR)
        if end != "at once":
            while piece := connection.recv(65536):
                received += piece
    return received


def good_requests(there: Node, only_cached: bool = False) -> list[bytes]:
    """Return requests of every kind that an open server answers."""
    found = []
    for key, where in (("x", "memory"), ("disk", "disk"), ("cold", "store")):
        version = there.holdings.put(key, SIZE, where)
        body = wire.encode_batch(there.holdings.request(version, only_cached=only_cached).batch())
        found.append(_post(wire.BLOCKS_PATH, body))
        found.append(f"GET /v1/blocks/{there.holdings.key(version, 0).hex()} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    listing = ListingRequest(volume=VOLUME, prefix="d/", delimiter="/", token=None, limit=10, max_age_s=1.0)
    found.append(_post(wire.LISTING_PATH, wire.encode_listing_request(listing)))
    found.append(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
    return found


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


ends = st.sampled_from(["half", "at once", "wait"])
mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=12)
    ),
    min_size=1,
    max_size=6,
)


def mutated(raw: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Return something like `raw`."""
    for kind, place, extra in changes:
        at = int(place * len(raw))
        match kind:
            case "flip":
                raw = raw[:at] + extra + raw[at + len(extra) :]
            case "cut":
                raw = raw[:at] + raw[at + extra[0] :]
            case "insert":
                raw = raw[:at] + extra + raw[at:]
            case _:
                raw = raw[:at] + raw[max(0, at - extra[0]) : at] * 3 + raw[at:]
    return raw


@given(st.sampled_from(KINDS), st.binary(max_size=3000), st.integers(1, 5), ends)
def test_any_bytes(target: Target, kind: str, raw: bytes, pieces: int, end: str) -> None:
    received = attack(target.nodes[kind], raw, pieces, end)
    assert b" 200 " not in received[:20]
    target.still_serves(kind)


@given(st.integers(0, 7), mutations, st.integers(1, 4), ends, st.booleans())
@settings(max_examples=150)
def test_almost_good_requests(
    target: Target, which: int, changes: list[tuple[str, float, bytes]], pieces: int, end: str, only_cached: bool
) -> None:
    there = target.nodes["open"]
    attack(there, mutated(good_requests(there, only_cached)[which], changes), pieces, end)
    target.still_serves("open")


@given(st.lists(st.integers(0, 7), min_size=2, max_size=12), ends)
@settings(max_examples=30)
def test_many_requests_at_once(target: Target, which: list[int], end: str) -> None:
    there = target.nodes["open"]
    requests = good_requests(there)
    attack(there, b"".join(requests[number] for number in which), 3, end)
    target.still_serves("open")


@given(st.integers(0, 7), mutations)
@settings(max_examples=40)
def test_nobody_without_the_secret_gets_anything(
    target: Target, which: int, changes: list[tuple[str, float, bytes]]
) -> None:
    there = target.nodes["secret"]
    asked = dict(there.holdings.asked)
    for raw in (good_requests(there)[which], mutated(good_requests(there)[which], changes)):
        received = attack(there, raw, 1, "half")
        assert b" 200 " not in received
        assert b"cachefs:" not in received
    assert there.holdings.asked == asked
    target.still_serves("secret")


def test_slow_ones_and_idle_ones_do_not_keep_others_out(target: Target) -> None:
    """More connections than there is room for, all of them in the middle of something."""
    there = target.nodes["secret"]
    begun = [b"", b"G", b"GET /v1/status HTTP/1.1\r\nHost:", _post(wire.BLOCKS_PATH, b"x" * 5000)[:-1]]
    with contextlib.ExitStack() as stack:
        for number in range(60):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
            with contextlib.suppress(OSError):
                connection.sendall(begun[number % len(begun)])
            if number % 10 == 0:
                target.still_serves("secret")
        target.still_serves("secret")
    there.wait_for(requests=0)


def test_large_bodies_cost_no_more_than_their_room(target: Target) -> None:
    there = target.nodes["open"]
    before = resident_bytes()
    raw = _post(wire.BLOCKS_PATH, bytes(wire.MAX_BODY_BYTES))
    threads = [threading.Thread(target=attack, args=(there, raw[:-1], 20, "wait")) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target.still_serves("open")
    assert resident_bytes() - before < MORE_BYTES


# -- the client -------------------------------------------------------------------------------------------------------

BODY = body_of("x", SIZE)
GOOD = (
    OK_HEAD
    + chunk(short_frame(FrameStatus.WAIT, 0))
    + chunk(short_frame(FrameStatus.OK, 0, BODY[:BLOCK]))
    + chunk(short_frame(FrameStatus.OK, 1, BODY[BLOCK:]))
    + LAST
)
near_frames = st.sampled_from(
    [len(OK_HEAD) // 2, len(OK_HEAD) - 3, len(OK_HEAD) + 2, len(OK_HEAD) + 30, len(OK_HEAD) + 50, len(GOOD) // 2]
)


class Liar:
    """A peer that answers everything with the same bytes."""

    def __init__(self) -> None:
        self.answer = b""
        self.peer = FakePeer(self._script)
        self.lives = 0
        self.reasons: list[str] = []
        self._holdings = FakeHoldings()

    def _script(self, connection: socket.socket) -> None:
        if read_request(connection):
            connection.sendall(self.answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    def ask(self, answer: bytes) -> list[int]:
        """Return how many blocks counted; each of them was checked."""
        self.answer = answer
        self.lives += 1
        self.peer.member = type(self.peer.member)(
            node_id="b" * 16, name="liar", address=self.peer.member.address, instance=str(self.lives)
        )
        here = Asker()
        told: list[int] = []
        began = time.monotonic()
        holdings = self._holdings
        request = holdings.request(holdings.put("x", SIZE))
        buffers = holdings.buffers(request)
        try:
            for count in here.client.read_blocks(self.peer.member, request, buffers):
                told.append(count)
                assert b"".join(buffers[:count]) == BODY[: count * BLOCK]
        except PeerUnavailable as error:
            self.reasons.append(str(error))
        finally:
            here.close()
        assert time.monotonic() - began < 3
        assert all(reason.isprintable() for reason in self.reasons)
        return told


@pytest.fixture(scope="module")
def liar() -> Iterator[Liar]:
    made = Liar()
    try:
        yield made
    finally:
        made.peer.close()


def test_the_liar_can_say_the_truth(liar: Liar) -> None:
    assert liar.ask(GOOD) == [1, 2]


@given(st.binary(max_size=500), st.booleans())
def test_any_answer(liar: Liar, raw: bytes, after_head: bool) -> None:
    assert liar.ask(OK_HEAD + raw if after_head else raw) == []


@given(mutations, near_frames)
@settings(max_examples=100)
def test_almost_good_answers(liar: Liar, changes: list[tuple[str, float, bytes]], around: int) -> None:
    """What counts is right, however the answer was changed."""
    part = mutated(GOOD[max(0, around - 40) : around + 40], changes)
    liar.ask(GOOD[: max(0, around - 40)] + part + GOOD[around + 40 :])
