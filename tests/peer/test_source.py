"""Whom a node asks for the blocks of a volume, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from cachefs.metrics import Counters
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage
from cachefs.types import ObjectVersion, Tier
from peer.leash import Leash
from peer.members import PEER_PROTOCOL, Member, View
from peer.source import FUTILE, SELDOM, Neighbours, PeerSource
from peer.wire import BatchRequest, BlockRequest, ListingRequest, NotHeld, PeerSlow, PeerUnavailable

BLOCK = 1 << 20
VOLUME = "0123456789abcdef"
ME = "a" * 16


def member(letter: str, **more: Any) -> Member:
    return Member(node_id=letter * 16, name=letter, address="127.0.0.1:1", **more)


def willing(_number: int) -> Exception | None:
    return None


class Client:
    """Other nodes that do as they are told."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.asked: list[tuple[str, bool, int, int]] = []
        self.lacks: set[str] = set()
        """Who has nothing but what it owns."""
        self.answers: dict[str, Callable[[int], Exception | None]] = {}
        """By name: what happens before the block of this number (of those asked for) is sent."""

    def read_blocks(
        self, peer: Member, request: BlockRequest, buffers: Sequence[memoryview], leash: Leash | None = None
    ) -> Iterator[int]:
        self.asked.append((peer.name, request.only_cached, request.first, request.count))
        if request.only_cached and peer.name in self.lacks:
            raise NotHeld("no")
        at = request.first * BLOCK
        for number, buffer in enumerate(buffers):
            trouble = self.answers.get(peer.name, willing)(number)
            if trouble is not None:
                buffer[:1] = b"\xff"  # what is not yielded may hold anything
                raise trouble
            buffer[:] = self.body[at : at + len(buffer)]
            at += len(buffer)
            yield number + 1

    def read_batch(self, peer: Member, request: BatchRequest) -> Iterator[memoryview | None]:
        raise AssertionError("nobody asks for many files here")

    def list_page(self, peer: Member, request: ListingRequest) -> tuple[ListPage, float]:
        raise AssertionError("nobody asks for listings here")


BODY = bytes(range(256)) * (8 * BLOCK // 256) + b"end"
STORE = MemoryStore()
VERSION = STORE.put("key", BODY).version
"""One for all rigs: who owns its units depends on its etag."""


class Rig:
    """One node's source of blocks among others."""

    def __init__(self, others: str, me: str = ME) -> None:
        self.body, self.store, self.version = BODY, STORE, VERSION
        self.client = Client(self.body)
        self.counters = Counters()
        self.members = [member(letter) for letter in others]
        self.show(self.members)
        neighbours = Neighbours(
            self.client,
            lambda: self.view,
            lambda: me,
            zone="",
            block_size=BLOCK,
            counters=self.counters,
        )
        self.source = PeerSource(VOLUME, self.store, neighbours, lambda: 7)

    def show(self, members: Sequence[Member]) -> None:
        self.view = View({m.node_id: m for m in members}, {VOLUME: tuple(members)})

    def read(self, first: int, count: int) -> list[tuple[int, Tier]]:
        """Read, check every byte, and return what was yielded."""
        buffers = [
            memoryview(bytearray(min(BLOCK, len(self.body) - index * BLOCK))) for index in range(first, first + count)
        ]
        told = list(self.source.read_blocks(self.version, first * BLOCK, buffers))
        assert b"".join(buffers) == self.body[first * BLOCK :][: sum(map(len, buffers))]
        return told

    def asked(self) -> list[str]:
        asked, self.client.asked = [name for name, *_ in self.client.asked], []
        return asked


def test_alone_it_asks_the_store() -> None:
    for rig in (Rig(""), Rig("a")):
        assert rig.read(0, 2) == [(1, Tier.ORIGIN), (2, Tier.ORIGIN)]
        assert rig.asked() == []
        assert rig.source.max_requests == 7


def test_who_does_not_hold_the_volume_asks_its_owner() -> None:
    rig = Rig("bcd")
    assert rig.read(0, 3) == [(1, Tier.PEER), (2, Tier.PEER), (3, Tier.PEER)]
    assert rig.client.asked == [(rig.client.asked[0][0], False, 0, 3)]
    assert rig.counters.get("peer_requests") == 1


def test_every_node_names_the_same_owner() -> None:
    owners = set()
    for me in "abcd":
        rig = Rig("abcd", me * 16)
        rig.client.answers = {name: lambda _: NotHeld("no") for name in "abcd"}
        rig.read(0, 1)
        first = rig.client.asked[0]
        owners.add(first[0] if not first[1] else me)  # who is asked without conditions, or is the owner himself
    assert len(owners) == 1


def test_what_a_peer_does_not_give_comes_from_the_next_and_at_last_from_the_store() -> None:
    rig = Rig("bcd")
    rig.read(0, 1)
    owner = rig.asked()[0]
    rig.client.answers[owner] = lambda number: PeerUnavailable("gone") if number == 2 else None
    told = rig.read(0, 4)
    assert [count for count, _ in told] == [1, 2, 3, 4]
    assert {tier for _, tier in told} == {Tier.PEER}
    asked = rig.client.asked
    assert [entry[2:] for entry in asked] == [(0, 4), (2, 2)]
    rig.client.answers = {name: lambda _: PeerUnavailable("gone") for name in "bcd"}
    assert rig.read(0, 2) == [(1, Tier.ORIGIN), (2, Tier.ORIGIN)]
    assert rig.counters.get("peer_failures") == 3


def test_one_who_is_slow_is_the_last_who_is_asked() -> None:
    """The next node would ask it as well, and two waits would come one after the other."""
    rig = Rig("bcd")
    rig.client.answers = {name: lambda number: PeerSlow("still") if number == 1 else None for name in "bcd"}
    assert rig.read(0, 3) == [(1, Tier.PEER), (2, Tier.ORIGIN), (3, Tier.ORIGIN)]
    assert len(rig.asked()) == 1
    assert rig.counters.get("peer_failures") == 1


def test_the_last_block_is_short_and_comes_whole() -> None:
    rig = Rig("bcd")
    assert rig.read(8, 1) == [(1, Tier.PEER)]
    rig.client.answers = {name: lambda _: PeerUnavailable("gone") for name in "bcd"}
    assert rig.read(8, 1) == [(1, Tier.ORIGIN)]


def owner_rig() -> Rig:
    """A rig whose node owns the first part of the object."""
    for me in "abcdefgh":
        rig = Rig("abcdefgh", me * 16)
        rig.client.answers = {name: lambda _: NotHeld("no") for name in "abcdefgh"}
        rig.read(0, 1)
        if [only_cached for _, only_cached, *_ in rig.client.asked] == [True]:
            rig.asked()
            return rig
    raise AssertionError("nobody is the owner")


def test_the_owner_asks_the_next_one_for_what_it_has_and_then_the_store() -> None:
    rig = owner_rig()
    assert rig.read(0, 2) == [(1, Tier.ORIGIN), (2, Tier.ORIGIN)]
    assert [only_cached for _, only_cached, *_ in rig.client.asked] == [True]
    assert rig.counters.get("peer_owned_fill_bytes") == 3 * BLOCK, "one of the first read, two now"
    rig.client.answers = {}
    assert rig.read(0, 2) == [(1, Tier.PEER), (2, Tier.PEER)]


def test_after_many_questions_in_vain_few_are_asked() -> None:
    rig = owner_rig()
    for _ in range(FUTILE + 4 * SELDOM):
        rig.read(0, 1)
    few = len(rig.asked())
    assert FUTILE <= few + 1 <= FUTILE + 6
    rig.client.answers = {}
    while not rig.asked():  # now and then one is asked all the same, and then all are again
        rig.read(0, 1)
    for _ in range(3):
        rig.read(0, 1)
    assert len(rig.asked()) == 3


def test_what_a_node_gives_as_an_owner_says_nothing_of_what_it_may_have() -> None:
    """Of two nodes each asks the other for both in turn."""
    rig = Rig("ab")
    rig.client.lacks = {"b"}
    for number in range(100):
        version = STORE.put(f"turn-{number}", BODY[:BLOCK]).version
        list(rig.source.read_blocks(version, 0, [memoryview(bytearray(BLOCK))]))
    probes = [only_cached for _, only_cached, *_ in rig.client.asked]
    assert probes.count(False) > 20
    assert FUTILE <= probes.count(True) <= FUTILE + 8


def test_nodes_of_another_protocol_are_not_asked() -> None:
    rig = Rig("")
    rig.show([member("b", protocol=PEER_PROTOCOL + 1)])
    assert rig.read(0, 1) == [(1, Tier.ORIGIN)]
    rig.show([member("b", protocol=PEER_PROTOCOL + 1), member("c")])
    assert rig.read(0, 1) == [(1, Tier.PEER)]
    assert rig.asked() == ["c"]


def test_a_version_that_is_gone_is_said_by_the_store() -> None:
    from cachefs.errors import StaleObject

    rig = Rig("bcd")
    rig.client.answers = {name: lambda _: PeerUnavailable("its store says 412") for name in "bcd"}
    rig.store, gone = MemoryStore(), ObjectVersion("key", "gone", len(BODY))
    rig.store.put("key", b"new")
    rig.source.store = rig.store
    with pytest.raises(StaleObject):
        list(rig.source.read_blocks(gone, 0, [memoryview(bytearray(BLOCK))]))


def test_a_reader_who_leaves_early_leaves_nothing_open() -> None:
    rig = Rig("bcd")
    stream = rig.source.read_blocks(rig.version, 0, [memoryview(bytearray(BLOCK)) for _ in range(3)])
    assert next(iter(stream)) == (1, Tier.PEER)
    stream.close()  # type: ignore[attr-defined]
    assert rig.counters.get("peer_failures") == 0
