"""The way of blocks to many nodes that want all of them at once: along a tree, so that none is asked by all the others.

    the first of the crew -> some of it, about the square root of its number -> all others

A *crew* is the nodes that warm up the same files. For every unit (`peer.placement`) its members have an order, the same
for all of them. The first, which is the owner when that is one of the crew, asks as it always does. Those behind it, as
many as the fan-out, ask the first; each of the others asks one of those. Whoever is asked may not have the block yet:
then it is at work on it, or begins now, and the question waits for that (single flight). One that is late or gone is
passed over: the usual nodes are asked then, and the store at last.

With zones each zone has a tree of its own. Order and roles are other ones for every unit, so nobody gives more than the
others.

What always holds: who asks waits for a node of an earlier step only, and that one for the usual order at last; each
step has slots and room of its own (`Candidates.level`, `peer.delivery.Rooms`), so nobody waits in a circle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import xxhash

from cachefs.types import ObjectId, ObjectVersion
from peer.members import Member
from peer.placement import LEVELS, Candidates, Ring, unit_of
from peer.source import PeerSource, Route
from peer.wire import TREE_STEPS

LEAST_FAN_OUT = 2
_SALT = b"cachefs-tree-1\0"


class Tree:
    """Who asks whom in one crew. Immutable; any thread."""

    def __init__(self, members: Iterable[Member]) -> None:
        """`members`: of one zone, or of all when there is one only."""
        crew = {member.node_id: member for member in members}
        self._ring = Ring(crew.values())
        self._seeds = {node_id: xxhash.xxh3_64_intdigest(_SALT + node_id.encode()) for node_id in crew}
        self.fan_out = max(LEAST_FAN_OUT, math.isqrt(max(0, len(crew) - 1)))

    def parent(self, unit: bytes, me: str) -> tuple[Member | None, int]:
        """Return whom a member asks for a unit, and at which step it is; (None, 0): it asks as always."""
        seed = self._seeds.get(me)
        if seed is None:
            return None, 0
        first, *near = self._ring.ranking(unit, 1 + self.fan_out)
        if first.node_id == me:
            return None, 0
        if any(member.node_id == me for member in near):
            return first, 1
        return near[xxhash.xxh3_64_intdigest(unit, seed) % len(near)], 2


class TreeSource(PeerSource):
    """Where a member of a crew gets blocks that all of it want. Any thread."""

    def __init__(self, usual: PeerSource, crew: Iterable[str]) -> None:
        """`usual`: as it asks otherwise; `crew`: ids of nodes, this one among them."""
        super().__init__(usual.volume, usual.store, usual.neighbours, lambda: usual.max_requests)
        self.doubts, self.hedges = usual.doubts, usual.hedges
        self._usual = usual
        self._tree = Tree(usual.neighbours.near(usual.volume, frozenset(crew)))
        self._steps = tuple(Route(self, LEVELS + step) for step in range(TREE_STEPS))

    def route(self, version: ObjectVersion, start: int) -> Route:
        """See `BlockSource.route`: what is asked for as always shares the lines of all that is."""
        level = self.candidates(self.object_id(version), start).level
        return self._steps[level - LEVELS] if level >= LEVELS else self._usual.route(version, start)

    def candidates(self, oid: ObjectId, start: int) -> Candidates:
        """See `PeerSource.candidates`."""
        usual = self._usual.candidates(oid, start)
        if usual.is_owner:
            return usual
        neighbours = self.neighbours
        unit = unit_of(oid, start // neighbours.block_size, neighbours.block_size)
        parent, step = self._tree.parent(unit, neighbours.node_id)
        if parent is None:
            return usual
        before = (parent, *(member for member in usual.before if member.node_id != parent.node_id))
        return Candidates(before, is_owner=False, level=LEVELS - 1 + step, after=None)
