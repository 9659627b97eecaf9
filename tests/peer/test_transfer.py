"""Blocks and listings between real servers and clients on loopback, with every kind of proof."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Sequence

import msgspec
import pytest
import trio
import trio.testing

from cachefs import errors
from cachefs.types import ObjectVersion
from peer import frames, streams, wire
from peer.limits import ServerLimits
from peer.room import ByteRoom
from peer.server import PeerServer
from peer.wire import BatchRequest, ListingRequest, NotHeld, PeerUnavailable
from tests.peer.fake_holdings import BLOCK, VOLUME, body_of, listing
from tests.peer.rig import KINDS, Askers, Node, Nodes, Trust, asker, leaves_nothing, node, read_request, trust

__all__ = ["asker", "leaves_nothing", "node", "trust"]

LISTING = ListingRequest(volume=VOLUME, prefix="d/", delimiter="/", token=None, limit=1000, max_age_s=5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_with_every_proof(node: Nodes, asker: Askers, trust: Trust, kind: str) -> None:
    there, here = node(trust.credentials(kind)), asker(trust.credentials(kind))
    for where in ("memory", "disk", "store"):
        version = there.holdings.put(where, 5 * BLOCK + 77, where)
        assert here.read(there.member, there.holdings, there.holdings.request(version)) == [1, 2, 3, 4, 5, 6]
        assert here.read(there.member, there.holdings, there.holdings.request(version, 2, 2)) == [1, 2]
        assert here.read(there.member, there.holdings, there.holdings.request(version, 5, 1)) == [1]
    there.holdings.page = listing(50)
    assert here.client.list_page(there.member, LISTING) == (there.holdings.page, 1.5)
    status = here.client.status(there.member)
    assert status["version"] == "9.9.9"
    assert status["server"]["connections"] == 1, "one connection carried it all"
    assert here.client.health(there.member)["state"] == "closed"
    assert 0 < here.client.health(there.member)["latency_s"] < 1
    served = there.counters.snapshot()
    assert served["peer_served_blocks"] == 3 * 9
    assert served["peer_served_bytes"] == 3 * (7 * BLOCK + 77 + 77)
    assert served["peer_served_listing_pages"] == 1
    assert "peer_refused_requests" not in served


def test_a_batch_of_many_small_objects(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    versions = [
        there.holdings.put(f"small-{number}", 1000 + number, ("memory", "disk", "store")[number % 3])
        for number in range(200)
    ]
    request = BatchRequest(
        volume=VOLUME, block_size=BLOCK, only_cached=False, runs=tuple(map(there.holdings.run, versions))
    )
    buffers = [memoryview(bytearray(version.size)) for version in versions]
    assert list(here.client.read_blocks(there.member, request, buffers)) == list(range(1, 201))
    for version, buffer in zip(versions, buffers, strict=True):
        assert buffer == body_of(version.key, version.size)
    there.wait_for(bytes_in_flight=0)


def test_one_object_in_all_places_at_once(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    version = there.holdings.put("mixed", 12 * BLOCK, "store")
    body = body_of("mixed", 12 * BLOCK)
    for index in range(12):
        piece = body[index * BLOCK :][:BLOCK]
        if index % 3 == 0:
            there.holdings.remember(there.holdings.key(version, index), piece)
        elif index % 3 == 1:
            there.holdings.disk[there.holdings.key(version, index)] = piece
    assert here.read(there.member, there.holdings, there.holdings.request(version)) == list(range(1, 13))
    there.wait_for(bytes_in_flight=0)


def test_what_is_in_no_tier_is_fetched_in_one_piece(node: Nodes, asker: Askers) -> None:
    there, here = node(block_size=1 << 20), asker()
    version = there.holdings.put("cold", 8 << 20, "store")
    here.read(there.member, there.holdings, there.holdings.request(version))
    assert there.holdings.fetched_runs == [("cold", 0, 8)]


def test_blocks_that_are_handed_over(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    there.holdings.inline = True
    version = there.holdings.put("cold", 20 * BLOCK + 5, "store")
    assert len(here.read(there.member, there.holdings, there.holdings.request(version))) == 21
    assert not there.holdings.memory
    there.wait_for(bytes_in_flight=0)


def test_who_only_may_have_it_fetches_nothing_and_keeps_the_connection(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    version = there.holdings.put("cold", 100 * BLOCK, "store")
    half = there.holdings.put("half", 10 * BLOCK, "memory")
    for index in range(5, 10):
        del there.holdings.memory[there.holdings.key(half, index)]
    there.holdings.memory.pop(there.holdings.key(half, 7), None)
    for _ in range(3):
        with pytest.raises(NotHeld):
            here.read(there.member, there.holdings, there.holdings.request(version, only_cached=True))
        request = there.holdings.request(half, only_cached=True)
        stream = here.client.read_blocks(there.member, request, there.holdings.buffers(request))
        assert [next(stream) for _ in range(5)] == [1, 2, 3, 4, 5]
        with pytest.raises(NotHeld):
            next(stream)
    assert there.holdings.fetched_runs == []
    assert there.server.state()["connections"] == 1
    assert here.client.health(there.member)["state"] == "closed"


def test_a_volume_that_is_not_here(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    with pytest.raises(NotHeld, match="does not hold that volume"):
        here.read(there.member, there.holdings, there.holdings.request(ObjectVersion("unknown", "etag", BLOCK)))
    asked = ListingRequest(volume="f" * 16, prefix="", delimiter="/", token=None, limit=1, max_age_s=0.0)
    with pytest.raises(PeerUnavailable, match="does not hold that volume"):
        here.client.list_page(there.member, asked)


@pytest.mark.parametrize("trouble", [errors.StaleObject("gone\n\x1b[1m"), errors.StorageUnavailable("x" * 2000)])
def test_what_cannot_be_fetched_fails_alone(node: Nodes, asker: Askers, trouble: Exception) -> None:
    there, here = node(), asker()
    good = there.holdings.put("good", 2 * BLOCK)
    bad = there.holdings.put("bad", 2 * BLOCK, "store")
    there.holdings.before_fetch = lambda _: trouble
    for _ in range(5):
        with pytest.raises(PeerUnavailable) as failed:
            here.read(there.member, there.holdings, there.holdings.request(bad))
        assert str(failed.value).isprintable()
        assert len(str(failed.value)) < 300
        assert len(here.read(there.member, there.holdings, there.holdings.request(good))) == 2
    assert here.client.health(there.member)["state"] == "closed", "the peer is well, its store is not"
    there.holdings.page = trouble
    with pytest.raises(PeerUnavailable):
        here.client.list_page(there.member, LISTING)
    there.wait_for(bytes_in_flight=0, connections=1)


def test_an_owner_that_fetches_for_long_is_waited_for(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker(silence_s=0.6)
    version = there.holdings.put("cold", 3 * BLOCK, "store")
    there.holdings.gate.clear()
    threading.Timer(1.6, there.holdings.gate.set).start()
    began = time.monotonic()
    assert here.read(there.member, there.holdings, there.holdings.request(version)) == [1, 2, 3]
    assert time.monotonic() - began > 1.5


def test_the_first_blocks_come_while_the_last_are_fetched(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    version = there.holdings.put("cold", 4 * BLOCK, "store")
    there.holdings.gate.clear()
    request = there.holdings.request(version)
    stream = here.client.read_blocks(there.member, request, there.holdings.buffers(request))
    threading.Timer(
        0.1, lambda: there.holdings.remember(there.holdings.key(version, 0), body_of("cold", BLOCK))
    ).start()
    assert next(stream) == 1
    assert not there.holdings.gate.is_set()
    there.holdings.gate.set()
    assert list(stream) == [2, 3, 4]


@pytest.mark.parametrize("kind", ["open", "tls"])
def test_the_map_is_let_go_while_nobody_reads(node: Nodes, trust: Trust, kind: str) -> None:
    there = node(trust.credentials(kind), block_size=16 << 20)
    version = there.holdings.put("large", 16 << 20)
    contexts = there.credentials.tls_contexts()
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
        if contexts is not None:
            connection = stack.enter_context(contexts.client.wrap_socket(connection))
        body = wire.encode_batch(there.holdings.request(version).batch())
        connection.sendall(b"POST /v1/blocks HTTP/1.1\r\nHost: x\r\nCachefs-Protocol: 1\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.3)
        before = there.holdings.asked["lend"]
        time.sleep(0.2)
        assert there.holdings.lent_now == 0
        assert there.holdings.asked["lend"] == before, "it waits, and does not try again and again"
    there.wait_for(connections=0)


@pytest.fixture
def small_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket takes a MiB at a time, however fast the other side reads."""
    offer = streams.PlainStream.offer

    def offer_little(self: streams.PlainStream, pieces: Sequence[wire.Buffer]) -> int:
        return offer(self, [memoryview(next(piece for piece in pieces if len(piece)))[: 1 << 20]])

    monkeypatch.setattr(streams.PlainStream, "offer", offer_little)


@pytest.mark.usefixtures("small_socket")
def test_a_block_that_is_evicted_while_it_is_sent_comes_from_the_disk(node: Nodes, asker: Askers) -> None:
    there, here = node(block_size=12 << 20), asker()
    version = there.holdings.put("large", 12 << 20)
    key = there.holdings.key(version, 0)
    there.holdings.disk[key] = body_of("large", 12 << 20)
    there.holdings.evict_after_lends = 1
    assert here.read(there.member, there.holdings, there.holdings.request(version)) == [1]
    assert there.holdings.asked["load"] == 1
    assert not there.holdings.memory


@pytest.mark.usefixtures("small_socket")
def test_a_block_that_vanishes_while_it_is_sent_ends_the_connection(node: Nodes, asker: Askers) -> None:
    there, here = node(block_size=12 << 20), asker()
    version = there.holdings.put("large", 12 << 20)
    there.holdings.evict_after_lends = 1
    with pytest.raises(PeerUnavailable):
        here.read(there.member, there.holdings, there.holdings.request(version))
    other = there.holdings.put("other", 100, "disk")
    assert here.read(there.member, there.holdings, there.holdings.request(other)) == [1]


def test_a_node_with_other_blocks_is_refused(node: Nodes, asker: Askers) -> None:
    there, here = node(block_size=BLOCK), asker()
    other = node(block_size=2 * BLOCK)
    version = other.holdings.put("x", 100)
    with pytest.raises(PeerUnavailable, match="409"):
        here.read(there.member, other.holdings, other.holdings.request(version))
    assert here.client.health(there.member)["state"] == "open"


def test_buffers_that_do_not_fit_are_a_mistake(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    request = there.holdings.request(there.holdings.put("x", 100))
    with pytest.raises(ValueError, match="buffers"):
        next(here.client.read_blocks(there.member, request, [memoryview(bytearray(99))]))


def test_who_leaves_early_harms_nobody(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    version = there.holdings.put("x", 8 * BLOCK)
    for _ in range(5):
        request = there.holdings.request(version)
        stream = here.client.read_blocks(there.member, request, there.holdings.buffers(request))
        assert next(stream) == 1
        stream.close()  # type: ignore[attr-defined]
    assert len(here.read(there.member, there.holdings, there.holdings.request(version))) == 8
    assert here.client.health(there.member)["state"] == "closed"


def test_many_threads_at_once(node: Nodes, asker: Askers, trust: Trust) -> None:
    there, here = node(trust.credentials("secret"), limits=ServerLimits(requests=3)), asker(trust.credentials("secret"))
    versions = [there.holdings.put(f"k{n}", 3 * BLOCK + n, ("memory", "disk", "store")[n % 3]) for n in range(12)]
    told: list[list[int]] = []

    def work(which: int) -> None:
        for step in range(6):
            version = versions[(which + step) % len(versions)]
            told.append(here.read(there.member, there.holdings, there.holdings.request(version)))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 12 * 6
    assert {tuple(each) for each in told} <= {(1, 2, 3), (1, 2, 3, 4)}
    there.wait_for(bytes_in_flight=0, requests=0)


def test_questions_in_a_line_are_told_that_we_live(node: Nodes, asker: Askers) -> None:
    there, here = node(limits=ServerLimits(requests=1)), asker(silence_s=0.6)
    cold, other = there.holdings.put("cold", BLOCK, "store"), there.holdings.put("other", BLOCK, "disk")
    there.holdings.gate.clear()
    answered: list[list[int]] = []

    def ask(version: ObjectVersion) -> None:
        answered.append(here.read(there.member, there.holdings, there.holdings.request(version)))

    threads = [threading.Thread(target=ask, args=(version,)) for version in (cold, other)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    time.sleep(0.9)
    assert not answered, "the second stands in the line behind the first"
    there.holdings.gate.set()
    for thread in threads:
        thread.join()
    assert answered == [[1], [1]]


def test_bytes_in_flight_are_bounded_and_nobody_starves(node: Nodes, asker: Askers) -> None:
    there = node(limits=ServerLimits(copied_bytes=2 * BLOCK, fetched_bytes=3 * BLOCK))
    here = asker()
    there.holdings.inline = True
    versions = [there.holdings.put(f"k{n}", 6 * BLOCK, ("disk", "store")[n % 2]) for n in range(8)]
    most = 0
    results: list[list[int]] = []

    def ask(version: ObjectVersion) -> None:
        results.append(here.read(there.member, there.holdings, there.holdings.request(version)))

    threads = [threading.Thread(target=ask, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, there.server.state()["bytes_in_flight"])
        time.sleep(0.001)
    assert results == [[1, 2, 3, 4, 5, 6]] * 8
    assert most <= 12 * BLOCK, "a wish that is larger than its bound is granted alone"
    there.wait_for(bytes_in_flight=0)


def test_one_node_asks_another_only_so_much(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker(requests=2)
    version = there.holdings.put("x", 2 * BLOCK)
    streams = []
    for _ in range(2):
        request = there.holdings.request(version)
        streams.append(here.client.read_blocks(there.member, request, there.holdings.buffers(request)))
        next(streams[-1])
    began = time.monotonic()
    with pytest.raises(PeerUnavailable, match="enough to do"):
        here.read(there.member, there.holdings, there.holdings.request(version))
    assert time.monotonic() - began < 0.1
    for stream in streams:
        assert list(stream) == [2]
    assert here.read(there.member, there.holdings, there.holdings.request(version)) == [1, 2]


def test_idle_connections_are_few_in_all(node: Nodes, asker: Askers) -> None:
    here = asker(kept_in_all=3)
    nodes = [node() for _ in range(5)]
    for there in nodes:
        version = there.holdings.put("x", BLOCK)
        other = msgspec.structs.replace(there.member, node_id=f"{there.port:016}")
        assert here.read(other, there.holdings, there.holdings.request(version)) == [1]
    for there, left in zip(nodes, (0, 0, 1, 1, 1), strict=True):
        there.wait_for(connections=left)


def test_connections_that_were_idle_for_long_are_closed(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker(kept_s=0.1)
    request = there.holdings.request(there.holdings.put("x", BLOCK))
    for _ in range(2):
        assert here.read(there.member, there.holdings, request) == [1]
        time.sleep(0.15)
    here.client._connections._look_at = 0.0
    other = node()
    here.read(other.member, other.holdings, other.holdings.request(other.holdings.put("x", BLOCK)))
    there.wait_for(connections=0)


def test_too_many_connections_end_the_one_that_is_idle_for_longest(node: Nodes, asker: Askers) -> None:
    there, here = node(limits=ServerLimits(connections=3)), asker()
    version = there.holdings.put("x", BLOCK)
    here.read(there.member, there.holdings, there.holdings.request(version))
    others = [socket.create_connection(("127.0.0.1", there.port)) for _ in range(8)]
    try:
        there.wait_for(connections=3)
        assert here.read(there.member, there.holdings, there.holdings.request(version)) == [1]
        ended = 0
        for other in others:
            other.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                ended += other.recv(1) == b""
        assert ended == 6
    finally:
        for other in others:
            other.close()


def test_connections_that_work_are_not_ended_for_others(node: Nodes, asker: Askers) -> None:
    there, here = node(limits=ServerLimits(connections=1)), asker()
    version = there.holdings.put("cold", BLOCK, "store")
    there.holdings.gate.clear()
    told: list[list[int]] = []
    thread = threading.Thread(
        target=lambda: told.append(here.read(there.member, there.holdings, there.holdings.request(version)))
    )
    thread.start()
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", there.port)) as other:
        other.settimeout(1)
        assert other.recv(1) == b"", "this one is one too many"
    there.holdings.gate.set()
    thread.join()
    assert told == [[1]]


def test_closing_the_client_ends_its_calls(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    version = there.holdings.put("cold", BLOCK, "store")
    there.holdings.gate.clear()
    threading.Timer(0.3, here.client.close).start()
    began = time.monotonic()
    with pytest.raises(PeerUnavailable):
        here.read(there.member, there.holdings, there.holdings.request(version))
    assert time.monotonic() - began < 1
    with pytest.raises(PeerUnavailable, match="going away"):
        here.read(there.member, there.holdings, there.holdings.request(version))


def test_closing_the_server_ends_its_calls(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    version = there.holdings.put("cold", BLOCK, "store")
    there.holdings.gate.clear()
    threading.Timer(0.3, there.server.close).start()
    began = time.monotonic()
    with pytest.raises(PeerUnavailable):
        here.read(there.member, there.holdings, there.holdings.request(version))
    assert time.monotonic() - began < 1
    there.server.close()
    assert not there.server.state()["listening"]
    there.holdings.gate.set()


def test_a_server_that_never_started_can_be_closed(node: Nodes) -> None:
    there = node()
    other = PeerServer(there.holdings, credentials=there.credentials, counters=there.counters)
    with pytest.raises(OSError, match="in use"):
        other.start("127.0.0.1", there.port)
    other.close()
    assert other.state() == {
        "address": "", "listening": False, "connections": 0, "requests": 0, "bytes_in_flight": 0
    }  # fmt: skip


def test_ipv6(node: Nodes, asker: Askers) -> None:
    there, here = node(address="::1"), asker()
    version = there.holdings.put("x", BLOCK)
    assert here.read(there.member, there.holdings, there.holdings.request(version)) == [1]


# -- for people -------------------------------------------------------------------------------------------------------


def curl(there: Node, path: str, *options: str) -> tuple[int, bytes]:
    """Return status and body."""
    scheme = "https" if there.credentials.tls else "http"
    command = ["curl", "-sS", "-m", "10", "-w", "%{stderr}%{http_code}", *options]
    done = subprocess.run([*command, f"{scheme}://127.0.0.1:{there.port}{path}"], capture_output=True, timeout=20)
    return int(done.stderr[-3:]), done.stdout


def curl_options(trust: Trust, kind: str) -> Sequence[str]:
    tls = ["--cert", str(trust.cert), "--key", str(trust.key), "--cacert", str(trust.ca), "-k"]
    secret = ["--digest", "-u", f"cachefs:{trust.secret.read_text()}"]
    return [*(tls if kind in ("tls", "both") else []), *(secret if kind in ("secret", "both") else [])]


@pytest.mark.parametrize("kind", KINDS)
def test_curl(node: Nodes, trust: Trust, kind: str) -> None:
    there = node(trust.credentials(kind))
    options = curl_options(trust, kind)
    for where in ("memory", "disk"):
        version = there.holdings.put(where, BLOCK + 5, where)
        path = f"/v1/blocks/{there.holdings.key(version, 0).hex()}"
        assert curl(there, path, *options) == (200, body_of(where, BLOCK))
        status, head = curl(there, path, "-I", *options)
        assert status == 200
        assert f"content-length: {BLOCK}".encode() in head.lower()
        short = f"/v1/blocks/{there.holdings.key(version, 1).hex()}"
        assert curl(there, f"{short}?length=5", *options) == (200, body_of(where, BLOCK + 5)[BLOCK:])
        assert curl(there, short, *options)[0] == 404
    assert curl(there, "/v1/blocks/" + "0" * 40, *options)[0] == 404
    assert curl(there, "/v1/blocks/" + "x" * 40, *options)[0] == 404
    assert curl(there, "/v1/blocks/00", *options)[0] == 404
    assert curl(there, "/v1/blocks/" + "0" * 40 + "?length=0", *options)[0] == 400
    assert curl(there, "/v1/blocks", *options)[0] == 405
    assert curl(there, "/elsewhere", *options)[0] == 404
    assert curl(there, "/v1/status", "-X", "DELETE", "-H", "Cachefs-Protocol: 1", *options)[0] == 405
    status, body = curl(there, "/v1/status", *options)
    assert (status, json.loads(body)["version"]) == (200, "9.9.9")
    status, body = curl(there, "/v1/status", "-H", "Cachefs-Protocol: 2", *options)
    assert status == 426
    assert b"protocol 1" in body


def test_without_the_secret_everything_looks_alike(node: Nodes, trust: Trust) -> None:
    there = node(trust.credentials("secret"))
    version = there.holdings.put("x", BLOCK)
    paths = [f"/v1/blocks/{there.holdings.key(version, 0).hex()}", "/v1/blocks/" + "0" * 40, "/elsewhere", "/v1/status"]
    wrong = ["--digest", "-u", "cachefs:a secret of another kind"]
    for options in ([], wrong, ["-X", "POST"], ["-X", "POST", "-d", "x"], ["-H", "Cachefs-Protocol: 2"]):
        assert {curl(there, path, *options) for path in paths} == {(401, b"")}
    assert there.holdings.asked == {}


def test_a_question_in_pieces_and_one_after_the_other(node: Nodes) -> None:
    there = node()
    version = there.holdings.put("x", BLOCK)
    path = f"/v1/blocks/{there.holdings.key(version, 0).hex()}"
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", there.port)) as connection:
        for byte in request:
            connection.sendall(bytes([byte]))
        connection.sendall(request * 2)
        expected = 3 * BLOCK
        received = b""
        while received.count(b"HTTP/1.1 200") < 3 or len(received) < expected:
            piece = connection.recv(65536)
            assert piece
            received += piece


# -- parts ------------------------------------------------------------------------------------------------------------


async def test_room_is_given_in_turn(autojump_clock: trio.testing.MockClock) -> None:
    room = ByteRoom(10)
    order: list[str] = []

    async def want(name: str, length: int) -> None:
        await room.take(length)
        order.append(name)

    await room.take(8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(want, "large", 9)
        await trio.sleep(1)
        nursery.start_soon(want, "small", 2)
        await trio.sleep(1)
        assert order == [], "nobody overtakes"
        room.give_back(8)
        await trio.sleep(1)
        assert order == ["large"]
        room.give_back(9)
    assert order == ["large", "small"]
    room.give_back(2)
    async with room.taken(1000):
        assert room.used == 1000, "what is larger than all of it gets it alone"
    assert room.used == 0


async def test_room_that_is_not_waited_for_any_more(autojump_clock: trio.testing.MockClock) -> None:
    room = ByteRoom(10)
    await room.take(10)
    got: list[str] = []

    async def want(name: str) -> None:
        await room.take(10)
        got.append(name)

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(1):
            await want("first")
        nursery.start_soon(want, "second")
        await trio.sleep(1)
        room.give_back(10)
    assert got == ["second"]
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(want, "third")
            await trio.sleep(1)
            room.give_back(10)  # granted, and cancelled before it runs
            scope.cancel()
    room.used -= 10 if got == ["second", "third"] else 0
    assert room.used == 0


def test_the_rest_of_some_pieces() -> None:
    pieces = (b"abc", b"", b"defg", b"h")
    for done in range(9):
        assert b"".join(frames._rest(pieces, done)) == b"abcdefgh"[done:]


def test_a_request_is_read_whole() -> None:
    """The tool of the tests itself."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\na")
        theirs.sendall(b"bc")
        assert read_request(ours).endswith(b"\r\n\r\nabc")
