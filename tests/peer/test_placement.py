"""Who owns what: the same on every node, in proportion to the weights, and moving as little as can be."""

from __future__ import annotations

import collections
import hashlib
import math
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.types import PART_BYTES, ObjectId
from peer.members import Member
from peer.placement import LEVELS, MOST_ASKED, Candidates, Ring, ranking, unit_of
from tests.support.programs import REPOSITORY

MIB = 1 << 20
GOLDEN = "389bcfbbf3a843abc93845560c5c852fd200c8d83284e9f20c79ac313b8f94d0"
"""The first three of 2,000 units among 40 nodes."""


def node(number: int, weight: int = 1000, zone: str = "") -> Member:
    node_id = hashlib.blake2b(str(number).encode(), digest_size=8).hexdigest()
    return Member(node_id=node_id, name=f"n{number}", address="127.0.0.1:1", weight=weight, zone=zone)


def units(count: int, start: int = 0) -> list[bytes]:
    """Units as they are: many objects, some of them with several parts."""
    rng = random.Random(start)
    oids = [ObjectId(rng.randbytes(16)) for _ in range(-(-count // 4))]
    return [unit_of(oid, part * 8, MIB) for oid in oids for part in range(4)][:count]


def owners(ring: Ring, of: Sequence[bytes]) -> list[str]:
    return [ring.ranking(unit, 1)[0].node_id for unit in of]


members = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 1 << 24), st.sampled_from(["", "", "a", "b", "c"])),
    max_size=80,
    unique_by=lambda drawn: drawn[0],
).map(lambda drawn: [node(*fields) for fields in drawn])


# -- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [64 << 10, MIB, PART_BYTES, 3 * MIB, 5 * MIB])
def test_a_unit_is_the_part_in_which_a_block_begins(block_size: int) -> None:
    oid = ObjectId(b"o" * 16)
    found = [unit_of(oid, index, block_size) for index in range(300)]
    assert [found.index(unit) == index for index, unit in enumerate(found)] == [
        index == 0 or (index * block_size) // PART_BYTES != ((index - 1) * block_size) // PART_BYTES
        for index in range(300)
    ]
    assert len(set(found)) == 299 * block_size // PART_BYTES + 1


def test_a_block_larger_than_a_part_is_a_unit() -> None:
    oid = ObjectId(b"o" * 16)
    assert len({unit_of(oid, index, 2 * PART_BYTES) for index in range(10)}) == 10


def test_units_of_different_objects_differ() -> None:
    assert unit_of(ObjectId(b"a" * 16), 0, MIB) != unit_of(ObjectId(b"b" * 16), 0, MIB)


def test_the_last_block_of_the_largest_object_has_a_unit() -> None:
    assert len(unit_of(ObjectId(b"a" * 16), (1 << 32) - 1, 1 << 30)) == 24


# -- the order --------------------------------------------------------------------------------------------------------


@given(members, st.lists(st.binary(max_size=40), min_size=1, max_size=10), st.integers(1, 5))
def test_the_quick_way_finds_what_the_plain_way_finds(nodes: list[Member], some: list[bytes], count: int) -> None:
    ring = Ring(nodes)
    for unit in some:
        assert ring.ranking(unit, count) == ranking(unit, nodes, count)


@pytest.mark.parametrize("weigh", ["equal", "doubled", "wild"])
def test_the_quick_way_finds_what_the_plain_way_finds_among_a_thousand(weigh: str) -> None:
    rng = random.Random(weigh)
    choices = {"equal": range(7, 8), "doubled": range(100, 201, 100), "wild": range(1, 1 << 22)}[weigh]
    nodes = [node(number, rng.choice(choices)) for number in range(1000)]
    ring = Ring(nodes)
    for unit in units(60):
        assert ring.ranking(unit, 3) == ranking(unit, nodes, 3)


@given(members, st.randoms(use_true_random=False))
def test_the_order_of_the_members_does_not_matter(nodes: list[Member], rng: random.Random) -> None:
    shuffled = rng.sample(nodes, len(nodes))
    for unit in units(5):
        assert Ring(nodes).ranking(unit, 4) == Ring(shuffled).ranking(unit, 4) == ranking(unit, shuffled, 4)


def test_the_order_is_the_same_for_ever() -> None:
    """Nodes of different versions and machines must agree: a change here needs another `PEER_PROTOCOL`."""
    ring = Ring([node(number, 100 + 50 * (number % 3)) for number in range(40)])
    names = "/".join(m.name for unit in units(2000) for m in ring.ranking(unit, 3))
    assert hashlib.sha256(names.encode()).hexdigest() == GOLDEN


def test_another_process_computes_the_same() -> None:
    source = (
        "import tests.peer.test_placement as t\n"
        "ring = t.Ring([t.node(n, 1 + n) for n in range(50)])\n"
        "print(*(m.name for u in t.units(100) for m in ring.ranking(u, 3)))\n"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", source],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    ring = Ring([node(number, 1 + number) for number in range(50)])
    assert runs == {" ".join(m.name for unit in units(100) for m in ring.ranking(unit, 3)) + "\n"}


def test_members_that_are_told_twice_count_once() -> None:
    assert Ring([node(1), node(1), node(2)]).ranking(b"u", 3) == Ring([node(2), node(1)]).ranking(b"u", 2)
    assert len(Ring([node(1), node(1)])) == 1


# -- shares -----------------------------------------------------------------------------------------------------------


def test_64_nodes_own_equal_shares() -> None:
    of = units(100_000)
    count = collections.Counter(owners(Ring([node(number) for number in range(64)]), of))
    assert len(count) == 64
    assert max(count.values()) <= 1.1 * len(of) / 64
    assert min(count.values()) >= 0.9 * len(of) / 64


@pytest.mark.parametrize("size", [3, 11, 30])
def test_shares_are_as_large_as_the_weights(size: int) -> None:
    rng = random.Random(size)
    nodes = [node(number, rng.choice((1000, 1500, 4000, 32_000))) for number in range(size)]
    of = units(40_000)
    count = collections.Counter(owners(Ring(nodes), of))
    whole = sum(member.weight for member in nodes)
    for member in nodes:
        expected = len(of) * member.weight / whole
        assert abs(count[member.node_id] - expected) <= 4.5 * math.sqrt(expected)


def test_second_places_are_shared_as_well() -> None:
    """What a node owned goes to all others when it dies, not to one of them."""
    ring = Ring([node(number) for number in range(20)])
    first_two = [ring.ranking(unit, 2) for unit in units(40_000)]
    lost = [second.node_id for first, second in first_two if first == node(3)]
    count = collections.Counter(lost)
    assert len(count) == 19
    for amount in count.values():
        assert abs(amount - len(lost) / 19) <= 4.5 * math.sqrt(len(lost) / 19)


def test_parts_of_one_object_are_spread() -> None:
    ring = Ring([node(number) for number in range(8)])
    oid = ObjectId(b"\x01" * 16)
    count = collections.Counter(owners(ring, [unit_of(oid, 8 * part, MIB) for part in range(4000)]))
    assert all(abs(amount - 500) <= 4.5 * math.sqrt(500) for amount in count.values())


# -- movement ---------------------------------------------------------------------------------------------------------


@given(members.filter(bool), st.integers(501, 600), st.integers(1, 1 << 24))
def test_a_node_that_joins_takes_its_units_and_no_other_moves(nodes: list[Member], number: int, weight: int) -> None:
    joining = node(number, weight)
    before, after = Ring(nodes), Ring([*nodes, joining])
    for unit in units(40):
        order = after.ranking(unit, 3)
        assert tuple(m for m in order if m != joining)[:2] == before.ranking(unit, 2)[: len(order) - (joining in order)]
        if order[0] == joining:
            assert order[1] == before.ranking(unit, 1)[0], "the second is who owned it before"


@given(members.filter(lambda nodes: len(nodes) > 1), st.integers(0))
def test_a_node_that_leaves_gives_its_units_and_no_other_moves(nodes: list[Member], which: int) -> None:
    leaving = nodes[which % len(nodes)]
    before, after = Ring(nodes), Ring([m for m in nodes if m != leaving])
    for unit in units(40):
        first, second = before.ranking(unit, 2)
        assert after.ranking(unit, 1)[0] == (second if first == leaving else first)


@given(members.filter(lambda nodes: len(nodes) > 1), st.integers(0), st.integers(1, 1 << 24))
def test_a_weight_that_grows_only_takes_and_one_that_shrinks_only_gives(
    nodes: list[Member], which: int, weight: int
) -> None:
    old = nodes[which % len(nodes)]
    new = Member(node_id=old.node_id, name=old.name, address=old.address, zone=old.zone, weight=weight)
    before, after = Ring(nodes), Ring([new if m == old else m for m in nodes])
    for unit in units(40):
        was, now = before.ranking(unit, 1)[0].node_id, after.ranking(unit, 1)[0].node_id
        if was != now:
            assert (now if weight > old.weight else was) == old.node_id


# -- candidates -------------------------------------------------------------------------------------------------------


def test_alone_and_with_nobody() -> None:
    assert Ring([]).candidates(b"u", "me") == Candidates((), is_owner=False, level=0, after=None)
    assert Ring([node(1)]).candidates(b"u", node(1).node_id) == Candidates((), is_owner=True, level=0, after=None)
    assert Ring([node(1)]).candidates(b"u", "me") == Candidates((node(1),), is_owner=False, level=3, after=None)


@given(members.filter(bool), st.integers(0))
def test_without_zones_the_first_two_are_asked(nodes: list[Member], which: int) -> None:
    nodes = [Member(node_id=m.node_id, name=m.name, address=m.address, weight=m.weight) for m in nodes]
    me = nodes[which % len(nodes)]
    ring = Ring(nodes)
    for unit in units(10):
        order = ranking(unit, nodes, len(nodes))
        place = order.index(me)
        found = ring.candidates(unit, me.node_id)
        assert found.before == order[: min(place, MOST_ASKED)]
        assert found.is_owner == (place == 0)
        assert found.after == (order[1] if place == 0 and len(order) > 1 else None)
        stranger = ring.candidates(unit, "stranger")
        assert stranger == Candidates(order[:MOST_ASKED], is_owner=False, level=3, after=None)


@given(members.filter(bool))
def test_who_waits_never_waits_for_himself(nodes: list[Member]) -> None:
    """Along any chain of questions the places in the order fall, in zones and without."""
    ring = Ring(nodes)
    for unit in units(10):
        place = {m.node_id: at for at, m in enumerate(ranking(unit, nodes, len(nodes)))}
        for me in nodes:
            asked = ring.candidates(unit, me.node_id, me.zone)
            assert all(place[m.node_id] < place[me.node_id] for m in asked.before)
            assert len(set(asked.before)) == len(asked.before) <= MOST_ASKED
            assert asked.is_owner == (place[me.node_id] == 0)
            assert bool(asked.before) != asked.is_owner, "whoever is not the owner has somebody to ask"
            assert asked.level in range(LEVELS)
            for other in asked.before:
                assert ring.candidates(unit, other.node_id, other.zone).level < asked.level, "in whose line I wait"


def test_the_first_of_the_own_zone_is_asked_first() -> None:
    nodes = [node(number, zone="abc"[number % 3]) for number in range(12)]
    ring = Ring(nodes)
    seen = set()
    for unit in units(300):
        order = ranking(unit, nodes, 12)
        for me in nodes:
            near = next(m for m in order if m.zone == me.zone)
            found = ring.candidates(unit, me.node_id, "a zone that it is not in")
            if near is me:
                assert found.before == order[: order.index(me)][:2]
            else:
                assert found.before == tuple(dict.fromkeys((near, *order[: order.index(me)])))[:2]
            seen.add((near is me, near is order[0]))
    assert len(seen) == 4


def test_a_zone_counts_for_who_is_no_member() -> None:
    nodes = [node(number, zone="ab"[number % 2]) for number in range(6)]
    found = Ring(nodes).candidates(b"unit", "stranger", "b")
    assert found.before[0] == next(m for m in ranking(b"unit", nodes, 6) if m.zone == "b")
    assert Ring(nodes).candidates(b"unit", "stranger", "elsewhere").before == ranking(b"unit", nodes, 2)


def test_one_zone_is_no_zone_and_no_name_is_no_zone() -> None:
    same = [node(number, zone="a") for number in range(6)]
    assert Ring(same).candidates(b"unit", "stranger", "a").before == ranking(b"unit", same, 2)
    mixed = [node(number, zone="" if number % 2 else "a") for number in range(6)]
    assert Ring(mixed).candidates(b"unit", "stranger", "").before == ranking(b"unit", mixed, 2)


# -- cost -------------------------------------------------------------------------------------------------------------


def test_a_look_up_computes_few_of_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it quick, without a clock: the plain way would compute 1,000 scores for each unit."""
    from peer import placement

    ring = Ring([node(number, random.Random(number).choice((1000, 2000, 64_000))) for number in range(1000)])
    computed = 0
    scored = placement._Lane.scored

    def counted(self: placement._Lane, unit: bytes, coarse: int) -> object:
        nonlocal computed
        computed += 1
        return scored(self, unit, coarse)

    monkeypatch.setattr(placement._Lane, "scored", counted)
    for unit in units(200):
        ring.candidates(unit, "stranger")
    assert computed / 200 <= 20
