"""Many small objects at once through peers: real servers and clients, each object with its own list of whom to ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from cachefs.errors import CachefsError, NotFound, StaleObject
from cachefs.metrics import Counters
from cachefs.store.memory import MemoryStore
from cachefs.types import ObjectVersion, Tier
from peer.client import PeerClient
from peer.credentials import PeerCredentials
from peer.limits import ClientLimits
from peer.many import ASKED_BLOCKS
from peer.members import Member, View
from peer.source import Neighbours, PeerSource
from tests.peer.fake_holdings import BLOCK, BUCKET, ENDPOINT, VOLUME, body_of
from tests.peer.rig import Node, Nodes, Trust, leaves_nothing, node, trust

__all__ = ["leaves_nothing", "node", "trust"]

ME = "0" * 16


class Bucket(MemoryStore):
    """The store of all these nodes."""

    def __init__(self) -> None:
        super().__init__(BUCKET)
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return ENDPOINT

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        self.asked.append(version.key)
        body = body_of(version.key, version.size)
        if version.key.startswith("gone"):
            raise StaleObject("gone")
        return body[start : start + length]


class Recorder:
    """`Orders` that check and write down what they hear."""

    def __init__(self, versions: list[ObjectVersion]) -> None:
        self.versions = versions
        self.sources: dict[int, Tier] = {}
        self.errors: dict[int, CachefsError] = {}
        self.begun: list[int] = []
        self.postponed_now: list[int] = []
        self.refused: set[int] = set()
        self.taken: set[int] = set()
        self.broken = False
        self.lock = threading.Lock()

    def begin(self, number: int) -> bool:
        with self.lock:
            self.begun.append(number)
            return number not in self.refused

    def postponed(self, number: int) -> bool:
        with self.lock:
            self.postponed_now.append(number)
            return number not in self.taken

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        if self.broken:
            raise ValueError(number)
        version = self.versions[number]
        assert bytes(body) == body_of(version.key, version.size)
        with self.lock:
            assert number not in self.sources.keys() | self.errors.keys()
            self.sources[number] = source

    def failed(self, number: int, error: CachefsError) -> None:
        with self.lock:
            assert number not in self.sources.keys() | self.errors.keys()
            self.errors[number] = error

    def came_from(self, tier: Tier) -> int:
        return sum(source is tier for source in self.sources.values())


class Rig:
    """This node and others that are really there."""

    def __init__(
        self, nodes: dict[str, Node], *, member: bool, credentials: PeerCredentials | None = None, **limits: float
    ) -> None:
        self.nodes = nodes
        self.store = Bucket()
        self.counters = Counters()
        self.client = PeerClient(
            credentials or PeerCredentials(),
            counters=self.counters,
            limits=ClientLimits(**limits),  # type: ignore[arg-type]
        )
        members = [msgspec.structs.replace(each.member, node_id=name * 16, name=name) for name, each in nodes.items()]
        if member:
            members.append(Member(node_id=ME, name="me", address="127.0.0.1:1", instance="1", tls=False))
        view = View({each.node_id: each for each in members}, {VOLUME: tuple(members)})
        neighbours = Neighbours(
            self.client, lambda: view, lambda: ME, zone="", block_size=BLOCK, counters=self.counters
        )
        self.source = PeerSource(VOLUME, self.store, neighbours, lambda: 8)

    def put(self, count: int, where: str = "memory", name: str = "small") -> list[ObjectVersion]:
        """Objects that each node has there."""
        for each in self.nodes.values():
            for number in range(count):
                each.holdings.put(f"{name}-{number}", 1000 + number, where)
        return [ObjectVersion(f"{name}-{number}", "etag", 1000 + number) for number in range(count)]

    def questions(self) -> int:
        return int(self.counters.get("peer_requests"))


Rigs = Callable[..., Rig]


@pytest.fixture
def rig(node: Nodes) -> Iterator[Rigs]:
    """Make rigs whose clients are closed at the end."""
    made: list[Rig] = []

    def make(names: str, *, member: bool = False, credentials: PeerCredentials | None = None, **limits: float) -> Rig:
        nodes = {name: node(credentials) for name in names}
        made.append(Rig(nodes, member=member, credentials=credentials, **limits))
        return made[-1]

    yield make
    for each in made:
        each.client.close()


@pytest.mark.parametrize("where", ["memory", "disk", "store"])
def test_one_question_for_many_files(rig: Rigs, where: str) -> None:
    here = rig("abc")
    versions = here.put(150, where)
    orders = Recorder(versions)
    here.source.read_many(versions, orders)
    assert orders.came_from(Tier.PEER) == 150
    assert here.questions() <= 3 + 150 // ASKED_BLOCKS
    assert here.store.asked == []


@pytest.mark.parametrize("kind", ["secret", "tls", "both"])
def test_many_files_with_proof_and_over_tls(rig: Rigs, trust: Trust, kind: str) -> None:
    here = rig("bc", credentials=trust.credentials(kind))
    versions = here.put(200)
    found = Recorder(versions)
    here.source.read_many(versions, found)
    assert found.came_from(Tier.PEER) == 200
    assert here.counters.get("peer_failures") == 0


def test_the_owner_asks_the_store_and_others_for_what_they_own(rig: Rigs) -> None:
    here = rig("ab", member=True)
    versions = here.put(90, "store")
    orders = Recorder(versions)
    here.source.read_many(versions, orders)
    assert sorted(orders.sources) == list(range(90))
    own = orders.came_from(Tier.ORIGIN)
    assert 10 < own < 60
    assert here.counters.get("peer_absent") > 0, "those who may have what this node owns are asked for it before"
    owned = sum(versions[number].size for number, tier in orders.sources.items() if tier is Tier.ORIGIN)
    assert here.counters.get("peer_owned_fill_bytes") == owned
    fetched = {key for each in here.nodes.values() for key, *_ in each.holdings.fetched_runs}
    assert not fetched & set(here.store.asked)


def test_what_one_node_lacks_comes_from_the_next_or_the_store(rig: Rigs) -> None:
    here = rig("abc")
    versions = here.put(60)
    for each in here.nodes.values():
        for number in range(0, 60, 3):
            del each.holdings.memory[each.holdings.key(versions[number], 0)]
            each.holdings.before_fetch = lambda key: NotFound("not here")
    gone = ObjectVersion("gone-1", "etag", 10)
    versions.append(gone)
    orders = Recorder(versions)
    here.source.read_many(versions, orders)
    assert orders.came_from(Tier.PEER) == 40
    assert orders.came_from(Tier.ORIGIN) == 20
    assert {number: type(error) for number, error in orders.errors.items()} == {60: StaleObject}


def test_a_node_that_is_gone_is_asked_once(rig: Rigs) -> None:
    here = rig("a")
    versions = here.put(100, "store")
    here.nodes["a"].server.close()
    orders = Recorder(versions)
    here.source.read_many(versions, orders)
    assert orders.came_from(Tier.ORIGIN) == 100
    assert here.questions() == 1


def test_a_node_that_is_too_slow_is_given_up_and_readers_go_on(rig: Rigs) -> None:
    here = rig("a", patience_s=0.3)
    versions = here.put(10, "store")
    here.nodes["a"].holdings.gate.clear()
    orders = Recorder(versions)
    orders.taken = {2, 3}
    try:
        here.source.read_many(versions, orders)
    finally:
        here.nodes["a"].holdings.gate.set()
    assert sorted(orders.errors) == [0, 1, 4, 5, 6, 7, 8, 9]
    assert orders.sources == {}
    assert here.store.asked == []


def test_what_is_not_wanted_any_more_is_not_asked_for(rig: Rigs) -> None:
    here = rig("ab", member=True)
    versions = here.put(40)
    orders = Recorder(versions)
    orders.refused = set(range(0, 40, 2))
    here.source.read_many(versions, orders)
    assert sorted(orders.sources) == list(range(1, 40, 2))


def test_errors_of_the_caller_are_raised(rig: Rigs) -> None:
    here = rig("ab")
    versions = here.put(40)
    orders = Recorder(versions)
    orders.broken = True
    with pytest.raises(ValueError, match=r"^\d+$"):
        here.source.read_many(versions, orders)
    for each in here.nodes.values():
        each.wait_for(bytes_in_flight=0)


def test_nothing_to_bring(rig: Rigs) -> None:
    rig("a").source.read_many([], Recorder([]))
