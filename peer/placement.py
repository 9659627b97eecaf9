"""Who owns a block: every node computes the same order of the nodes for every unit, and asks nobody for it.

    unit_of(object, block)  ->  unit: one part of 8 MiB of one object version; all its blocks have one owner
    Ring(members)           ->  built once for each view of a volume's holders
    ring.candidates(unit, me, zone)  ->  whom I ask before the store, and whether I am the owner

The order is weighted rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
1998): each pair of unit and node has a number h in (0, 1), and the node with the smallest -ln(h) / weight is the owner
(the logarithmic method of Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005), the next one would be
the owner without it, and so on. A pair's number depends on nothing else, so ALWAYS: when a node joins, only units that
it owns now have moved, and the second in their order is who owned them before; when a node leaves, only its units move.

A thousand numbers per look-up would cost 150 us in Python. So the first 8 of the 52 bits of h come from simple
tabulation (Zobrist 1970; Patrascu and Thorup, "The power of simple tabulation hashing", 2012): 8 exclusive ors of
integers with one byte per node give that byte for all nodes at once. It bounds what a node can reach, and the other
bits, an xxh3_64 of the unit seeded by the node, are computed only for those few that can still be among the first.
The result is exactly that of computing all. `python -m bench.placement`, on 2 busy cores: 6 to 8 us for 4 members, 6 to
18 us for 64, 8 to 16 us for 1,000, 50 to 90 us for 10,000; 250 to 400 bytes of tables per member (more among few, where
weights differ), whatever the number of units; 1 to 3 ms for the tables when a view of 1,000 members changes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from cachefs.types import PART_BYTES, ObjectId
from peer.members import Member

MOST_ASKED = 2
"""So many nodes are asked before the store at the most: each may cost a deadline when it is in trouble."""

LEVELS = 4
"""Of `Candidates.level`, as `Ring` gives them; `peer.tree` adds some."""

_DIGITS = 8
"""The tabulation reads so many hexadecimal digits of a unit's hash."""
_TABLE_BYTES = 16 * _DIGITS
"""One random byte of a node for each value of each digit."""
_SALT = b"cachefs-placement-1\0"
"""Another one for another order: all nodes of a cluster must use the same."""
_FINE_BITS = 44
_SCALE = 2.0 ** -(8 + _FINE_BITS)
_FEW_MEMBERS = 12
"""Up to here computing all is as fast as looking for the few."""
_KNOWN_NODES = 1 << 14

_Scored = tuple[float, str, "_Lane"]
"""Sorts by score, then by id."""


def unit_of(oid: ObjectId, index: int, block_size: int) -> bytes:
    """Return the unit that block `index` of an object version belongs to: the part of 8 MiB in which the block begins.

    So one owner reads the whole part from the store, in one range. Larger blocks are a unit each.
    """
    return oid + (index * block_size // PART_BYTES).to_bytes(8, "big")


@dataclass(frozen=True, slots=True)
class Candidates:
    """Where one node asks for one unit. Who only asks nodes that come before itself is never part of a circle."""

    before: tuple[Member, ...]
    """Whom to ask, in this order, at most `MOST_ASKED`: the first of the own zone, where there are several zones, then
    the first of all, then the second. All of them rank before the asking node.
    """
    is_owner: bool
    """Whether the asking node is the first of all: it fetches from the store, for everybody."""
    level: int
    """0: it asks only the store: the owner, or a node whose volume nobody holds; 1: the second; 2: the first of a zone;
    3: nobody asks this node. A node only asks lower levels.
    """
    after: Member | None
    """For the owner: the next in the order, who was the owner before this node came and may have what it owned."""


class Ring:
    """The order of the nodes that hold one volume. Immutable; any thread."""

    def __init__(self, members: Iterable[Member]) -> None:
        """`members`: in any order; weights below 1 count as 1."""
        by_id = {member.node_id: member for member in members}
        lanes = [_Lane(member) for member in by_id.values()]
        lanes.sort(key=lambda lane: (-lane.weight, lane.node_id))
        self._lanes = tuple(lanes)
        self._by_id = by_id
        self._tables = _tables(lanes)
        self._levels = _levels(lanes) if len(lanes) > _FEW_MEMBERS else ()
        self._zones = self._build_zones()

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self._lanes)

    def ranking(self, unit: bytes, count: int) -> tuple[Member, ...]:
        """Return the first `count` members in the order of this unit (fewer if there are fewer)."""
        return tuple(scored[2].member for scored in self._first(unit, count))

    def candidates(self, unit: bytes, me: str, zone: str = "") -> Candidates:
        """Return whom node `me` asks for a unit. It need not be a member; `zone` counts only if it is none."""
        first = self.ranking(unit, MOST_ASKED)
        if not first:  # this node has no tiers, or its volume is not registered yet
            return Candidates((), is_owner=False, level=0, after=None)
        if first[0].node_id == me:
            return Candidates((), is_owner=True, level=0, after=first[1] if len(first) > 1 else None)
        before = [first[0]] if len(first) > 1 and first[1].node_id == me else list(first)
        myself = self._by_id.get(me)
        level = 1 if len(before) < len(first) else 3
        near = self._zones.get(zone if myself is None else myself.zone)
        if near is not None:
            best = near.ranking(unit, 1)[0]
            if best.node_id != me:
                before = [best, *(member for member in before if member is not best)]
            elif level == 3:
                level = 2
        return Candidates(tuple(before[:MOST_ASKED]), is_owner=False, level=level, after=None)

    def _build_zones(self) -> dict[str, Ring]:
        zones: dict[str, list[Member]] = {}
        for lane in self._lanes:
            zones.setdefault(lane.member.zone, []).append(lane.member)
        if len(zones) < 2:
            return {}
        return {zone: Ring(members) for zone, members in zones.items() if zone}

    def _first(self, unit: bytes, count: int) -> list[_Scored]:
        coarse, lanes = self._coarse(unit), self._lanes
        if not self._levels:
            return sorted([lane.scored(unit, byte) for lane, byte in zip(lanes, coarse, strict=True)])[:count]
        found: list[_Scored] = []
        limit = math.inf
        for bound, begin, end, byte in self._levels:
            if bound > limit:
                break
            at = coarse.find(byte, begin, end)
            while at >= 0:
                scored = lanes[at].scored(unit, byte)
                if scored[0] <= limit:
                    found.append(scored)
                    found.sort()
                    del found[count:]
                    if len(found) == count:
                        limit = found[-1][0]
                at = coarse.find(byte, at + 1, end)
        return found

    def _coarse(self, unit: bytes) -> bytes:
        """Return the first byte of h of every lane."""
        value, at = 0, 0
        for digit in _digits(unit):
            value ^= self._tables[at + digit]
            at += 16
        return value.to_bytes(len(self._lanes), "little")


def ranking(unit: bytes, members: Sequence[Member], count: int) -> tuple[Member, ...]:
    """Return the first `count` members in the order of a unit, in the plain way: what `Ring` has to agree with."""
    digits = _digits(unit)
    lanes = [_Lane(member) for member in members]
    ordered = sorted(lane.scored(unit, lane.coarse(digits)) for lane in lanes)
    return tuple(scored[2].member for scored in ordered[:count])


class _Lane:
    """What is kept of one member: its weight and its hash functions."""

    __slots__ = ("_seed", "member", "node_id", "table", "weight")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.node_id = member.node_id
        self.weight = max(member.weight, 1)
        self._seed, self.table = _functions(member.node_id)

    def __lt__(self, other: _Lane) -> bool:
        return False  # never decides: ids differ

    def coarse(self, digits: Sequence[int]) -> int:
        """Return the first byte of h."""
        value = 0
        for place, digit in enumerate(digits):
            value ^= self.table[16 * place + digit]
        return value

    def scored(self, unit: bytes, coarse: int) -> _Scored:
        fine = xxhash.xxh3_64_intdigest(unit, self._seed) >> (64 - _FINE_BITS)
        h = ((coarse << _FINE_BITS | fine) + 0.5) * _SCALE  # exact: 52 bits and a half
        return -math.log(h) / self.weight, self.node_id, self


@functools.lru_cache(maxsize=_KNOWN_NODES)
def _functions(node_id: str) -> tuple[int, bytes]:
    """Return the seed and the random bytes of a node: 1.5 us each time a view changes, if they were not kept."""
    raw = node_id.encode("utf-8", "surrogateescape")
    return xxhash.xxh3_64_intdigest(_SALT + raw), hashlib.shake_128(_SALT + raw).digest(_TABLE_BYTES)


def _digits(unit: bytes) -> list[int]:
    value = xxhash.xxh3_64_intdigest(unit)
    return [value >> shift & 15 for shift in range(0, 4 * _DIGITS, 4)]


def _tables(lanes: Sequence[_Lane]) -> tuple[int, ...]:
    """Return an integer for each value of each digit, with one byte for each lane."""
    joined = b"".join(lane.table for lane in lanes)
    return tuple(int.from_bytes(joined[place::_TABLE_BYTES], "little") for place in range(_TABLE_BYTES))


def _levels(lanes: Sequence[_Lane]) -> tuple[tuple[float, int, int, int], ...]:
    """Return (lower bound of the score, first lane, end, byte), by bounds: lanes of similar weight with this byte.

    Lanes are sorted by weight, heaviest first. Those whose weights have the same number of bits share a bound, that of
    the heaviest: 256 levels for each doubling of the weight.
    """
    levels: list[tuple[float, int, int, int]] = []
    begin = 0
    while begin < len(lanes):
        heaviest = lanes[begin].weight
        end = begin + 1
        while end < len(lanes) and lanes[end].weight.bit_length() == heaviest.bit_length():
            end += 1
        levels += [(-math.log((byte + 1) / 256) / heaviest, begin, end, byte) for byte in range(256)]
        begin = end
    return tuple(sorted(levels))
