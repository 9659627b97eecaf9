"""What records in etcd make of a view: kept, left out, remembered for a while."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cachefs import metrics
from cachefs.metrics import Counters
from peer.members import Member, View
from peer.records import Record
from peer.roster import Keys, Roster, fault_of
from tests.peer.nodes import a_member, node_id

KEYS = Keys("test")
OWN = a_member(99)
VOLUMES = ("a" * 16, "b" * 16)


def a_record(member: Member) -> Record:
    return Record(KEYS.node(member.node_id), msgspec.json.encode(member), 1)


@dataclass
class Model:
    """The same, thought slowly: what etcd has, and what it had when we were told to keep it."""

    members: dict[int, Member] = field(default_factory=dict)
    held: set[tuple[str, int]] = field(default_factory=set)
    ghosts: set[tuple[str, int]] = field(default_factory=set)

    def view(self) -> tuple[dict[str, Member], dict[str, set[str]]]:
        members = {node_id(n): member for n, member in self.members.items()} | {OWN.node_id: OWN}
        holders: dict[str, set[str]] = {VOLUMES[0]: {OWN.node_id}}
        for volume, number in self.held:
            if number in self.members:
                holders.setdefault(volume, set()).add(node_id(number))
        return members, holders

    def remove(self, identity: tuple[str, int]) -> None:
        self.ghosts.discard(identity)
        if identity[0]:
            self.held.discard(identity)
        else:
            self.members.pop(identity[1], None)

    def identities(self) -> set[tuple[str, int]]:
        return self.held | {("", number) for number in self.members}


numbers = st.integers(0, 4)
volumes = st.sampled_from(("", *VOLUMES))
identities = st.tuples(volumes, numbers)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), identities, st.integers(1, 3)),
        st.tuples(st.just("spoil"), numbers),
        st.tuples(st.just("delete"), identities, st.booleans()),
        st.tuples(st.just("replace"), st.sets(identities), st.booleans()),
        st.tuples(st.just("forget")),
    ),
    max_size=40,
)


def key_of(identity: tuple[str, int]) -> str:
    volume, number = identity
    return KEYS.volume(volume, node_id(number)) if volume else KEYS.node(node_id(number))


def record_of(identity: tuple[str, int], weight: int) -> Record:
    volume, number = identity
    return Record(key_of(identity), b"", 1) if volume else a_record(a_member(number, weight=weight))


def apply(operation: tuple[Any, ...], roster: Roster, model: Model) -> None:
    match operation:
        case ("put", (volume, number), weight):
            roster.put(record_of((volume, number), weight))
            model.ghosts.discard((volume, number))
            if volume:
                model.held.add((volume, number))
            else:
                model.members[number] = a_member(number, weight=weight)
        case ("spoil", number):
            roster.put(Record(KEYS.node(node_id(number)), b"?", 1))
            model.remove(("", number))
        case ("delete", identity, keep):
            roster.delete(key_of(identity), keep=keep)
            if not keep:
                model.remove(identity)
            elif identity in model.identities():
                model.ghosts.add(identity)
        case ("replace", listed, keep):
            roster.replace(roster.read(record_of(identity, 1) for identity in listed), keep=keep)
            missing = model.identities() - listed
            for identity in listed:
                apply(("put", identity, 1), Roster(KEYS, Counters()), model)
            for identity in missing:
                if keep:
                    model.ghosts.add(identity)
                else:
                    model.remove(identity)
        case ("forget",):
            roster.forget_ghosts()
            for identity in list(model.ghosts):
                model.remove(identity)


@given(operations)
def test_any_order_of_records_ends_in_what_etcd_has_and_the_ghosts(todo: list[tuple[Any, ...]]) -> None:
    roster, model = Roster(KEYS, Counters()), Model()
    for operation in todo:
        apply(operation, roster, model)
        roster.check_invariants()
        view = roster.view(OWN, VOLUMES[:1], 7)
        members, holders = model.view()
        assert dict(view.members) == members
        assert {volume: {member.node_id for member in found} for volume, found in view.holders.items()} == holders
        assert all(list(found) == sorted(found, key=lambda m: m.node_id) for found in view.holders.values())
        assert roster.ghosts == len(model.ghosts)


@given(st.text(max_size=80), st.binary(max_size=200))
def test_no_key_and_no_value_harms(key: str, value: bytes) -> None:
    counters = Counters()
    roster = Roster(KEYS, counters)
    for name in (key, KEYS.prefix + key, KEYS.node(key), KEYS.volume(VOLUMES[0], key), KEYS.node(node_id(1))):
        roster.put(Record(name, value, 1))
        roster.delete(name, keep=True)
    roster.check_invariants()
    assert roster.view(OWN, (), 0).members.keys() <= {OWN.node_id, node_id(1)}


@given(
    st.builds(
        Member,
        node_id=st.text("0123456789abcdef", min_size=15, max_size=17),
        name=st.text(max_size=300),
        address=st.one_of(st.just("h:1"), st.just("[::1]:2"), st.text(max_size=30)),
        zone=st.text(max_size=10),
        weight=st.integers(-1, 1 << 41),
    )
)
def test_a_member_without_fault_is_taken_by_others(member: Member) -> None:
    counters = Counters()
    roster = Roster(KEYS, counters)
    taken = roster.put(a_record(member))
    assert taken == (not fault_of(member))
    assert counters.get(metrics.ETCD_BAD_RECORDS.name) in (0, 1)


def test_a_holder_counts_once_its_member_is_known() -> None:
    roster = Roster(KEYS, Counters())
    roster.put(Record(KEYS.volume(VOLUMES[1], node_id(1)), b"", 1))
    assert roster.view(OWN, (), 1).holders == {}
    roster.put(a_record(a_member(1)))
    assert roster.view(OWN, (), 1).holders == {VOLUMES[1]: (a_member(1),)}


def test_a_view_does_not_change_with_the_roster() -> None:
    roster = Roster(KEYS, Counters())
    roster.put(a_record(a_member(1)))
    view = roster.view(OWN, VOLUMES, 5)
    roster.delete(KEYS.node(node_id(1)), keep=False)
    assert view.members.keys() == {OWN.node_id, node_id(1)}
    assert isinstance(view, View)
    assert view.revision == 5
