"""A node that is late: another source is asked beside it, whoever is first wins, and S3 is not asked for nothing.

Real sockets: nodes are real servers or do as they are told, the store is one in memory that counts and can be slow.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cachefs.errors import StorageUnavailable
from cachefs.metrics import Counters
from cachefs.store.memory import MemoryStore
from cachefs.types import ObjectVersion, Tier
from peer import hedge
from peer.breaker import Breaker
from peer.hedge import OF_ONE, ROOM_BYTES, THREADS, WAIT_S, HedgeRoom, Hedges, Race
from peer.leash import Leash
from peer.members import Member, View
from peer.source import Neighbours, PeerSource
from peer.wire import FrameStatus, PeerSlow, short_frame
from tests.peer.fake_holdings import BUCKET, ENDPOINT, VOLUME, body_of
from tests.peer.rig import (
    KINDS,
    LAST,
    OK_HEAD,
    Asker,
    Askers,
    FakePeer,
    FakePeers,
    Nodes,
    Trust,
    asker,
    chunk,
    fake_peer,
    leaves_nothing,
    node,
    read_request,
    trust,
    within,
)

__all__ = ["asker", "fake_peer", "leaves_nothing", "node", "trust"]

BLOCK = 64 << 10
SIZE = 4 * BLOCK
ME = "0" * 16
LATE_S = 0.4
"""So long nothing has to be heard of a node that is asked for the first time."""


class Store(MemoryStore):
    """Counts reads, and takes its time."""

    def __init__(self) -> None:
        super().__init__(BUCKET)
        self.reads: list[tuple[int, int]] = []
        self.slow_s = 0.0
        self.error: Exception | None = None

    @property
    def endpoint(self) -> str:
        return ENDPOINT

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        self.reads.append((start // BLOCK, len(buffers)))
        time.sleep(self.slow_s)
        if self.error is not None:
            raise self.error
        yield from super().read_into(version, start, buffers)


class Rig:
    """One node's source of blocks among others."""

    def __init__(self, here: Asker, members: Sequence[Member]) -> None:
        self.here = here
        self.store = Store()
        self.counters = here.counters
        self.versions = {
            key: self.store.put(key, body_of(key, SIZE)).version for key in (f"key-{n}" for n in range(60))
        }
        view = View({each.node_id: each for each in members}, {VOLUME: tuple(members)})
        self.neighbours = Neighbours(
            here.client, lambda: view, lambda: ME, zone="", block_size=BLOCK, counters=self.counters
        )
        self.source = PeerSource(VOLUME, self.store, self.neighbours, lambda: 7)

    def owned_by(self, member: Member) -> list[str]:
        """Return keys whose blocks this node is asked for first."""
        return [
            key
            for key, version in self.versions.items()
            if self.source.candidates(self.source.object_id(version), 0).before[0].node_id == member.node_id
        ]

    def read(self, key: str, count: int = 4) -> list[tuple[int, Tier]]:
        """Read the first blocks, check every byte, and return what was yielded."""
        buffers = [memoryview(bytearray(BLOCK)) for _ in range(count)]
        told = []
        body = body_of(key, SIZE)
        for done, tier in self.source.read_blocks(self.versions[key], 0, buffers):
            told.append((done, tier))
            assert b"".join(buffers[:done]) == body[: done * BLOCK]
        return told

    def counted(self) -> tuple[int, int]:
        """Second questions: sent, won."""
        return int(self.counters.get("peer_hedges")), int(self.counters.get("peer_hedges_won"))

    def wait_until_over(self) -> None:
        """Second questions have ended, and everything that they took is free."""
        deadline = time.monotonic() + 5
        while self.neighbours.hedge_room.threads or self.source.hedges._under_way:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert self.neighbours.hedge_room.bytes == 0

    def latency(self, member: Member) -> Breaker:
        return self.here.client._breakers.of(member.node_id, member.instance)


def silent(connection: socket.socket) -> None:
    """Takes a request and says nothing."""
    while read_request(connection):
        pass


def frames_of(key: str, first: int = 0) -> list[bytes]:
    body = body_of(key, SIZE)
    pieces = [body[at : at + BLOCK] for at in range(first * BLOCK, SIZE, BLOCK)]
    return [chunk(short_frame(FrameStatus.OK, number, piece)) for number, piece in enumerate(pieces)]


def late(key: str, before_s: float, *, waits: bool, after: int = 0) -> Callable[[socket.socket], None]:
    """Gives all blocks, `before_s` seconds late from number `after` on; says WAIT meanwhile, or nothing."""

    def script(connection: socket.socket) -> None:
        read_request(connection)
        frames = frames_of(key)
        if waits or after:
            connection.sendall(OK_HEAD + b"".join(frames[:after]))
        until = time.monotonic() + before_s
        while (left := until - time.monotonic()) > 0:
            if waits:
                connection.sendall(chunk(short_frame(FrameStatus.WAIT, after)))
            if select.select([connection], [], [], min(0.1, left))[0]:
                return  # it was closed
        connection.sendall((b"" if waits or after else OK_HEAD) + b"".join(frames[after:]) + LAST)

    return script


def starving(connection: socket.socket) -> None:
    """Says WAIT for ever."""
    read_request(connection)
    connection.sendall(OK_HEAD)
    while True:
        connection.sendall(chunk(short_frame(FrameStatus.WAIT, 0)))
        time.sleep(0.1)


# -- nothing is heard -------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice_when_nothing_is_late(node: Nodes, asker: Askers) -> None:
    there = node()
    rig = Rig(asker(), [there.member])
    there.holdings.objects = {key: body_of(key, SIZE) for key in rig.versions}
    for key in rig.versions:
        assert rig.read(key) == [(number, Tier.PEER) for number in (1, 2, 3, 4)]
    assert rig.counted() == (0, 0)
    assert rig.store.reads == []
    assert "hedge" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_late_and_comes_first_after_all_is_understood(
    node: Nodes, asker: Askers, trust: Trust, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for the head was interrupted by a deadline, and goes on where it was."""
    credentials = trust.credentials(kind)
    there = node(credentials)
    rig = Rig(asker(credentials, head_s=5.0), [there.member])
    rig.store.slow_s = 1.2
    there.holdings.objects = {key: body_of(key, SIZE) for key in rig.versions}
    monkeypatch.setattr("peer.frames.HEAD_S", 30.0)
    monkeypatch.setattr("peer.wire.WAIT_S", 30.0)
    there.holdings.gate.clear()
    opened = threading.Timer(LATE_S + 0.3, there.holdings.gate.set)
    opened.start()
    try:
        assert rig.read(rig.owned_by(there.member)[0]) == [(number, Tier.PEER) for number in (1, 2, 3, 4)]
    finally:
        opened.join()
    assert rig.counted() == (1, 0)
    assert rig.counters.get("peer_failures") == 0
    rig.wait_until_over()


@pytest.mark.parametrize("kind", KINDS)
def test_who_says_nothing_is_overtaken_by_the_next(
    node: Nodes, asker: Askers, trust: Trust, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real node that stands still: with every kind of trust, on connections that are kept and on new ones."""
    credentials = trust.credentials(kind)
    there = node(credentials)
    rig = Rig(asker(credentials), [there.member])
    there.holdings.gate.clear()
    key = rig.owned_by(there.member)[0]
    monkeypatch.setattr("peer.frames.HEAD_S", 30.0)
    with within(LATE_S + 1.5):
        assert rig.read(key) == [(number, Tier.ORIGIN) for number in (1, 2, 3, 4)]
    assert rig.counted() == (1, 1)
    assert rig.store.reads == [(0, 1), (1, 3)]
    assert rig.counters.get("peer_failures") == 1
    rig.wait_until_over()


def test_the_next_node_is_asked_before_the_store(asker: Askers, fake_peer: FakePeers) -> None:
    dead, good = fake_peer(silent), fake_peer(silent)
    members = [dead.member, _other(good, "d")]
    rig = Rig(asker(), members)
    key = rig.owned_by(dead.member)[0]

    def answers(connection: socket.socket) -> None:
        asked = 0
        while read_request(connection):
            count = 1 if not asked else 3  # the one that was late, and the rest
            frames = frames_of(key, asked)[:count]
            connection.sendall(OK_HEAD + b"".join(frames) + LAST)
            asked += 1

    good.script = answers
    with within(LATE_S + 1.5):
        assert rig.read(key) == [(number, Tier.PEER) for number in (1, 2, 3, 4)]
    assert rig.counted() == (1, 1)
    assert rig.store.reads == []
    assert good.connections == 1
    rig.wait_until_over()


def _other(peer: FakePeer, letter: str) -> Member:
    return Member(node_id=letter * 16, name="good", address=peer.member.address, instance="1")


def test_the_first_wins_when_it_comes_after_all(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(head_s=2.0), [there.member])
    key = rig.owned_by(there.member)[0]
    rig.store.slow_s = 1.0
    there.script = late(key, LATE_S + 0.1, waits=False)
    with within(2.0):
        assert rig.read(key) == [(number, Tier.PEER) for number in (1, 2, 3, 4)]
    assert rig.counted() == (1, 0)
    assert rig.store.reads == [(0, 1)]
    assert rig.latency(there.member).state == "closed"
    rig.wait_until_over()


def test_one_who_falls_silent_in_the_middle(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    key = rig.owned_by(there.member)[0]
    there.script = late(key, 30, waits=False, after=2)
    with within(2.5):
        assert [tier for _, tier in rig.read(key)] == [Tier.PEER, Tier.PEER, Tier.ORIGIN, Tier.ORIGIN]
    assert rig.counted() == (1, 1)
    assert rig.store.reads == [(2, 1), (3, 1)]
    rig.wait_until_over()


def test_a_failure_while_the_other_is_asked_waits_for_that_one(asker: Askers, fake_peer: FakePeers) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        time.sleep(LATE_S + 0.1)

    there = fake_peer(script)
    rig = Rig(asker(), [there.member])
    rig.store.slow_s = 0.4
    key = rig.owned_by(there.member)[0]
    assert rig.read(key, 1) == [(1, Tier.ORIGIN)]
    assert rig.store.reads == [(0, 1)], "and does not ask once more"
    rig.wait_until_over()


def test_what_the_store_says_is_said_once(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    rig.store.error = StorageUnavailable("down")
    with pytest.raises(StorageUnavailable, match="down"):
        rig.read(rig.owned_by(there.member)[0])
    assert len(rig.store.reads) == 1
    rig.wait_until_over()


def test_a_node_that_is_dead_is_left_alone_after_three(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    keys = rig.owned_by(there.member)
    for key in keys[:3]:
        rig.read(key)
    assert rig.latency(there.member).state == "open"
    with within(0.35):
        rig.read(keys[3])
    rig.wait_until_over()


def test_those_who_are_late_together_are_one_failure(asker: Askers, fake_peer: FakePeers) -> None:
    """A node that stands still for a moment keeps its share."""
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    keys = rig.owned_by(there.member)[:OF_ONE]
    with ThreadPoolExecutor(OF_ONE) as threads:
        list(threads.map(rig.read, keys))
    assert rig.counted()[1] == OF_ONE
    assert rig.latency(there.member).state == "closed"
    rig.wait_until_over()


def test_a_connection_that_is_not_made_is_late_as_well(asker: Askers) -> None:
    """Nobody accepts: the kernel drops what is above the backlog."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        full = Member(node_id="f" * 16, name="full", address=f"127.0.0.1:{address[1]}", instance="1")
        rig = Rig(asker(connect_s=5.0), [full])
        with within(LATE_S + 1.5):
            assert rig.read("key-0", 1) == [(1, Tier.ORIGIN)]
        assert rig.counted() == (1, 1)
        rig.wait_until_over()


def test_a_handshake_that_hangs_is_late_as_well(asker: Askers, fake_peer: FakePeers, trust: Trust) -> None:
    def script(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    there = fake_peer(script)
    member = Member(node_id="e" * 16, name="hangs", address=there.member.address, instance="1", tls=True)
    rig = Rig(asker(trust.credentials("tls"), head_s=5.0), [member])
    with within(LATE_S + 1.5):
        assert rig.read("key-0", 1) == [(1, Tier.ORIGIN)]
    assert rig.counted() == (1, 1)
    rig.wait_until_over()


def test_a_reader_who_leaves_takes_the_second_question_with_him(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    rig.store.slow_s = 0.5
    key = rig.owned_by(there.member)[0]
    there.script = late(key, 30, waits=False, after=1)
    stream = rig.source.read_blocks(rig.versions[key], 0, [memoryview(bytearray(BLOCK)) for _ in range(4)])
    assert next(iter(stream)) == (1, Tier.PEER)
    stream.close()  # type: ignore[attr-defined]
    rig.wait_until_over()


# -- WAIT and nothing else --------------------------------------------------------------------------------------------


def test_an_owner_that_is_starved_costs_a_second(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(starving)
    rig = Rig(asker(), [there.member])
    first, second, *_ = rig.owned_by(there.member)
    with within(WAIT_S + 1.5):
        assert rig.read(first) == [(number, Tier.ORIGIN) for number in (1, 2, 3, 4)]
    assert rig.counted() == (1, 1)
    assert rig.latency(there.member).state == "open"
    with within(0.35):
        rig.read(second)
    rig.wait_until_over()


def test_all_who_wait_for_a_starved_owner_leave_with_the_first(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(starving)
    rig = Rig(asker(), [there.member])
    keys = rig.owned_by(there.member)[:8]
    with within(WAIT_S + 2.0), ThreadPoolExecutor(len(keys)) as threads:
        list(threads.map(rig.read, keys))
    assert rig.counted() == (1, 1), "one asks the store beside the owner, and the others hear of it"
    rig.wait_until_over()


@pytest.mark.slow
def test_a_store_that_is_slow_for_all_is_asked_once_more_at_the_most(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    rig.store.slow_s = 1.4
    for number, key in enumerate(rig.owned_by(there.member)[:3]):
        there.script = late(key, 1.4, waits=True)
        assert {tier for _, tier in rig.read(key)} == {Tier.PEER}, number
    assert rig.counted() == (1, 0)
    assert rig.store.reads == [(0, 1)]
    assert rig.latency(there.member).state == "closed"
    rig.wait_until_over()


def test_an_owner_with_a_long_line_is_not_starved(asker: Askers, fake_peer: FakePeers) -> None:
    """The store answers us first, but it took its time: what the owner gives is waited for again."""
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    rig.store.slow_s = 0.9
    key = rig.owned_by(there.member)[0]
    there.script = late(key, 4, waits=True)
    with within(WAIT_S + 2.0):
        rig.read(key, 1)
    assert rig.counted() == (1, 1)
    assert rig.latency(there.member).state == "closed"
    assert rig.source.hedges.wait_s == 2 * WAIT_S
    rig.wait_until_over()


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_what_second_questions_may_take_is_bounded() -> None:
    room = HedgeRoom()
    assert room.take(ROOM_BYTES)
    assert not room.take(1)
    room.give_back(ROOM_BYTES)
    assert not room.take(ROOM_BYTES + 1), "a block that is larger than all of it"
    assert [room.take(1) for _ in range(THREADS + 1)] == [True] * THREADS + [False]


def test_a_volume_has_its_own_share_and_one_try_past_the_owners() -> None:
    room, counters = HedgeRoom(), Counters()
    one, other = Hedges(room, counters), Hedges(room, counters)
    assert one.begin(1, straight=True)
    assert not one.begin(1, straight=True)
    assert [one.begin(1, straight=False) for _ in range(OF_ONE)] == [True] * (OF_ONE - 1) + [False]
    assert other.begin(1, straight=True)
    one.answered(straight=True)
    assert one.begin(1, straight=True)


def test_tries_in_vain_are_made_less_often_and_forgotten() -> None:
    now = [100.0]
    hedges = Hedges(HedgeRoom(), Counters(), lambda: now[0])
    waits = []
    for _ in range(6):
        waits.append(hedges.wait_s)
        hedges.in_vain()
    assert waits == [1, 2, 4, 8, 16, 16]
    now[0] += hedge.FORGET_S
    assert hedges.wait_s == WAIT_S
    hedges.in_vain()
    hedges.found_starved("x")
    assert hedges.wait_s == WAIT_S
    assert hedges.starved("x", now[0])
    assert not hedges.starved("x", now[0] + 1)


def test_without_room_the_first_question_goes_on_alone(asker: Askers, fake_peer: FakePeers) -> None:
    there = fake_peer(silent)
    rig = Rig(asker(), [there.member])
    for _ in range(THREADS):
        assert rig.neighbours.hedge_room.take(1)
    with within(2.0):
        assert rig.read(rig.owned_by(there.member)[0], 1) == [(1, Tier.ORIGIN)]
    assert rig.counted() == (0, 0)


def test_a_race_without_a_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    room = HedgeRoom()
    race = Race(Hedges(room, Counters()), "a", [memoryview(bytearray(3))], _nobody)
    race.quiet()
    assert race.outcome() is None
    race.close()
    assert (room.threads, room.bytes) == (0, 0)


def _nobody(index: int, block: memoryview, leash: Leash, straight: bool) -> tuple[Tier, int]:
    raise AssertionError("nobody is asked")


@pytest.mark.expect_warnings("a second question failed")
def test_a_second_question_that_fails_in_an_unknown_way() -> None:
    room = HedgeRoom()
    race = Race(Hedges(room, Counters()), "a", [memoryview(bytearray(3))], _nobody)
    race.quiet()
    with pytest.raises(StorageUnavailable, match="nobody is asked"):
        race.outcome()
    race.close()
    _until(lambda: (room.threads, room.bytes) == (0, 0))


def test_who_is_told_that_a_node_is_starved_stops_waiting() -> None:
    hedges = Hedges(HedgeRoom(), Counters())
    race = Race(hedges, "a", [memoryview(bytearray(3))], _nobody)
    race.waited(0.1, 0.0)
    hedges.found_starved("a")
    with pytest.raises(PeerSlow):
        race.waited(0.2, 0.0)
    assert Race(hedges, "a", [memoryview(bytearray(3))], _nobody).waited(0.1, 0.0) is None  # type: ignore[func-returns-value]


def test_many_races_leave_nothing_behind() -> None:
    """First and second come at the same moment, a thousand times: one wins, and all that was taken is given back."""
    room, counters = HedgeRoom(), Counters()
    hedges = Hedges(room, counters)
    brought = 0

    def beside(index: int, block: memoryview, leash: Leash, straight: bool) -> tuple[Tier, int]:
        block[:] = b"two"
        return Tier.ORIGIN, 0

    for number in range(1000):
        race = Race(hedges, "a", [memoryview(bytearray(3))], beside)
        race.quiet()
        if number % 2:
            race.full(1)
        found = race.outcome()
        assert (found is None) == bool(number % 2)
        brought += found is not None and bytes(found.block) == b"two"
        race.close()
        if number % 50 == 0:
            _until(lambda: room.threads == 0)
    _until(lambda: (room.threads, room.bytes) == (0, 0))
    assert brought == counters.get("peer_hedges_won") == 500


def _until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
