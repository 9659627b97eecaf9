"""The tree of a warm-up on several nodes: who asks whom, that nobody waits in a circle, and what orders look like."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.metrics import Counters
from cachefs.store.memory import MemoryStore
from cachefs.types import ObjectVersion, object_id
from peer.jobs import JobAnswer, JobRequest, decode_answer, decode_request, encode_answer, encode_request
from peer.members import Member, View
from peer.placement import LEVELS, Ring
from peer.source import Neighbours, PeerSource
from peer.tree import Tree, TreeSource
from peer.wire import TREE_STEPS, BadMessage, NotHeld
from tests.peer.fake_holdings import BLOCK, VOLUME
from tests.peer.rig import Askers, Nodes, asker, leaves_nothing, node

__all__ = ["asker", "leaves_nothing", "node"]

UNITS = [b"unit-%d" % number for number in range(200)]


def members(count: int, zones: int = 1) -> list[Member]:
    return [
        Member(node_id=f"{n:016x}", name=f"n{n}", address="127.0.0.1:1", zone="abc"[n % zones] if zones > 1 else "")
        for n in range(count)
    ]


@pytest.mark.parametrize(("count", "fan_out"), [(1, 2), (2, 2), (4, 2), (9, 2), (17, 4), (101, 10), (1001, 31)])
def test_nobody_gives_a_block_to_many(count: int, fan_out: int) -> None:
    crew = members(count)
    tree = Tree(crew)
    assert tree.fan_out == fan_out
    for unit in UNITS[: 200 if count < 200 else 5]:
        asked = Counter(parent.node_id for each in crew if (parent := tree.parent(unit, each.node_id)[0]) is not None)
        assert sum(asked.values()) == count - 1, "all but one have a parent"
        first = Ring(crew).ranking(unit, 1)[0]
        assert tree.parent(unit, first.node_id) == (None, 0)
        assert asked[first.node_id] == min(fan_out, count - 1)
        assert max(asked.values(), default=0) <= max(fan_out, 3 * count / fan_out)


def test_all_give_about_as_much() -> None:
    crew = members(16)
    tree = Tree(crew)
    gave: Counter[str] = Counter()
    for number in range(2000):
        for each in crew:
            parent, _ = tree.parent(b"%d" % number, each.node_id)
            gave.update([] if parent is None else [parent.node_id])
    average = sum(gave.values()) / 16
    assert max(gave.values()) < 1.2 * average
    assert min(gave.values()) > 0.8 * average


def source_of(me: Member, holders: list[Member]) -> PeerSource:
    view = View({each.node_id: each for each in holders}, {VOLUME: tuple(holders)})
    client: Any = None
    neighbours = Neighbours(
        client, lambda: view, lambda: me.node_id, zone=me.zone, block_size=BLOCK, counters=Counters()
    )
    return PeerSource(VOLUME, MemoryStore(), neighbours, lambda: 8)


@given(st.integers(1, 24), st.integers(1, 3), st.data())
def test_whoever_waits_waits_for_an_earlier_step(count: int, zones: int, data: st.DataObject) -> None:
    holders = members(count, zones)
    ids = data.draw(st.sets(st.sampled_from([each.node_id for each in holders]), min_size=1))
    oid = object_id("http://x", "b", ObjectVersion(data.draw(st.text(max_size=5)), "e", 1))
    for me in holders:
        if me.node_id not in ids:
            continue
        tree = TreeSource(source_of(me, holders), ids)
        found = tree.candidates(oid, 0)
        questions = list(tree.questions(found))
        assert found.level < LEVELS + TREE_STEPS
        assert me.node_id not in {question.member.node_id for question in questions}
        assert len({question.member.node_id for question in questions}) == len(questions)
        if found.level < LEVELS:
            assert found == source_of(me, holders).candidates(oid, 0), "as always"
            continue
        parent, rest = questions[0], questions[1:]
        assert parent.step == found.level - LEVELS + 1
        above = TreeSource(source_of(parent.member, holders), ids).candidates(oid, 0)
        assert above.level < found.level
        assert not any(question.step for question in rest)
        assert parent.member.zone == me.zone


def test_a_node_that_is_not_of_the_crew_asks_as_always() -> None:
    holders = members(5)
    source = source_of(holders[0], holders)
    tree = TreeSource(source, [each.node_id for each in holders[1:]])
    versions = [ObjectVersion(str(number), "e", BLOCK) for number in range(20)]
    for version in versions:
        assert tree.route(version, 0) is source.route(version, 0)
    unknown = TreeSource(source, ["f" * 16])
    for version in versions:
        oid = object_id("http://x", "b", version)
        assert unknown.candidates(oid, 0) == source.candidates(oid, 0)


# -- orders -----------------------------------------------------------------------------------------------------------

ORDER = JobRequest(
    volume=VOLUME, job="ab" * 16, begin=True, verb="warm", tier="disk", force=False, crew=("0" * 16,), part=3,
    paths=(b"a/b", b"\xff"), filled=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"job": "x"}, {"verb": "evict"}, {"crew": ["x"]}, {"part": -1}, {"volume": ""}, {"paths": [b"x" * 9000]}]
)
def test_an_order_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    assert decode_request(encode_request(ORDER)) == ORDER
    plain = msgspec.msgpack.decode(encode_request(ORDER))
    with pytest.raises(BadMessage):
        decode_request(msgspec.msgpack.encode({**plain, **wrong}))


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"answer": {"over": 1}}', b'{"answer": 5}', b"\xff", b"[" * 100_000])
def test_an_answer_that_makes_no_sense(raw: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_answer(raw)


def test_names_come_back_as_they_were() -> None:
    told = JobAnswer(job={"path": "a\udcff"}, over=True, parts=2)
    assert decode_answer(encode_answer(told)) == told
    assert decode_answer(encode_answer("no")) == "no"


def test_orders_between_nodes(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    answer = here.client.job(there.member, ORDER)
    assert not isinstance(answer, str)
    assert (answer.parts, answer.over, answer.job["paths"]) == (3, False, 2)
    elsewhere = msgspec.structs.replace(ORDER, volume="f" * 16)
    assert here.client.job(there.member, elsewhere) == "this node does not hold that volume"
    assert here.client.health(there.member)["state"] == "closed"


def test_a_node_that_does_not_know_orders_is_not_ill(
    node: Nodes, asker: Askers, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = node(), asker()
    monkeypatch.setattr("peer.client.JOBS_PATH", "/v1/unheard-of")
    for _ in range(8):
        with pytest.raises(NotHeld, match="404"):
            here.client.job(there.member, ORDER)
    assert here.client.health(there.member)["state"] == "closed"


def test_what_nobody_waits_for_says_so(node: Nodes, asker: Askers) -> None:
    there, here = node(), asker()
    for name, behind in (("a", False), ("b", True)):
        request = there.holdings.request(there.holdings.put(name, BLOCK, "store"))
        asked = dataclasses.replace(request, behind=behind)
        assert list(here.client.read_blocks(there.member, asked, there.holdings.buffers(request))) == [1]
    assert there.holdings.asked["fetch"] == 2
    assert there.holdings.asked["fetch behind"] == 1
