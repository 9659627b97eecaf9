"""Reads through one tier, or through two as the agent has them, and what would have been best.

The tiers here are accounts only: what a policy decides is carried out as `cachefs.block` does it (`TierWriter` evicts
before it writes, `Spiller` brings to the disk tier what leaves the shm tier), and no byte moves.
"""

from __future__ import annotations

import bisect
import heapq
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bench.policies.traces import Trace
from cachefs.block.policies.planned import PlannedPolicy
from cachefs.block.ports import EvictionPolicy
from cachefs.types import BlockKey, ObjectId

NEVER = 1 << 60
SPILLED_EVERY = 4
"""So many reads for each block that is spilled while somebody reads."""


class Nothing:
    """A policy that knows no block: what is left is what the replay itself costs."""

    def add(self, key: BlockKey, size: int) -> None:
        """See `EvictionPolicy.add`."""

    bring = adopt = add

    def touch(self, key: BlockKey) -> None:
        """See `EvictionPolicy.touch`."""

    remove = touch

    def victim(self) -> BlockKey | None:
        """See `EvictionPolicy.victim`."""
        return None

    take = pinned_victim = victim

    def admits(self, key: BlockKey) -> bool:
        """See `EvictionPolicy.admits`."""
        return True

    @property
    def is_stable(self) -> bool:
        """See `EvictionPolicy.is_stable`."""
        return False

    def size_of(self, key: BlockKey) -> int:
        """See `EvictionPolicy.size_of`."""
        return 0

    def oldest_first(self) -> list[BlockKey]:
        """See `EvictionPolicy.oldest_first`."""
        return []

    def __contains__(self, key: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trace came to."""

    hits: tuple[float, ...]
    """Share of the reads of each phase that were hits."""
    us_per_read: float
    """CPU time, that of the replay itself included (see `costs`)."""
    written_per_read: float = 0.0
    """Blocks that were written to the disk tier."""

    def ratio(self, trace: Trace) -> float:
        """Return the share of all reads that were hits."""
        starts = (0, *trace.phases[:-1])
        lengths = [end - start for start, end in zip(starts, trace.phases, strict=True)]
        return sum(hit * length for hit, length in zip(self.hits, lengths, strict=True)) / len(trace.keys)


class Tier:
    """The account of one tier."""

    def __init__(self, policy: EvictionPolicy, capacity: int, sizes: dict[BlockKey, int]) -> None:
        self.policy = policy
        self.capacity = capacity
        self.used = 0
        self._sizes = sizes

    def put(self, key: BlockKey, demote: Callable[[BlockKey], object] | None = None, *, ahead: bool = False) -> bool:
        """Make room and add, perhaps ahead of its reader; return whether there was room."""
        sizes, policy = self._sizes, self.policy
        size = sizes[key]
        used = self.used + size
        while used > self.capacity:
            victim = policy.take()
            if victim is None:
                self.used = used - size
                return False
            if demote is not None:
                demote(victim)
            used -= sizes[victim]
        self.used = used
        if ahead:
            policy.bring(key, size)
        else:
            policy.add(key, size)
        return True


class TwoTiers:
    """A shm tier, and a disk tier that gets what leaves it (none when it has no bytes)."""

    def __init__(
        self,
        make: Callable[[], EvictionPolicy],
        shm_bytes: int,
        disk_bytes: int,
        sizes: dict[BlockKey, int],
        gone: Callable[[BlockKey], object] = lambda key: None,
    ) -> None:
        """`gone` hears of blocks that are in neither any more."""
        self.shm, self.disk = Tier(make(), shm_bytes, sizes), Tier(make(), disk_bytes, sizes)
        self.written = 0
        """Blocks that were written to the disk tier."""
        self._gone = gone
        self._pending: dict[BlockKey, None] = {}
        self._reads = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.shm.policy or key in self.disk.policy

    def read(self, key: BlockKey) -> bool:
        """Somebody reads a block; returns whether it is here. Else it should be `put`, when it came."""
        self._reads += 1
        if self._pending and self._reads % SPILLED_EVERY == 0:
            self._spill(next(iter(self._pending)))
        if self.disk.capacity:
            self.disk.policy.touch(key)
        if key in self.shm.policy:
            self.shm.policy.touch(key)
            return True
        if key not in self.disk.policy:
            return False
        self.shm.put(key, self._leave)
        return True

    def put(self, key: BlockKey, *, ahead: bool = False) -> None:
        """A block came from the store."""
        if self.disk.capacity:
            self._pending[key] = None
        self.shm.put(key, self._leave, ahead=ahead)

    def _leave(self, key: BlockKey) -> None:
        self._spill(key)
        if key not in self.disk.policy:
            self._gone(key)

    def _spill(self, key: BlockKey) -> None:
        self._pending.pop(key, None)
        if self.disk.capacity and key not in self.disk.policy and self.disk.policy.admits(key):
            self.written += self.disk.put(key, self._leave_disk)

    def _leave_disk(self, key: BlockKey) -> None:
        if key not in self.shm.policy:
            self._gone(key)


def replay(trace: Trace, policy: EvictionPolicy, tell: Callable[[int], object] | None = None) -> Outcome:
    """Read everything through one tier. `tell` hears which read is next."""
    tier, keys = Tier(policy, trace.capacity, trace.sizes), trace.keys
    touch, put = policy.touch, tier.put
    counts, start, begun = [], 0, time.process_time()
    for end in trace.phases:
        hits = 0
        for at in range(start, end):
            key = keys[at]
            if tell is not None:
                tell(at)
            if key in policy:
                hits += 1
                touch(key)
            else:
                put(key)
        counts.append(hits / max(1, end - start))
        start = end
    spent = time.process_time() - begun
    return Outcome(tuple(counts), spent / len(trace.keys) * 1e6)


def costs(trace: Trace, makers: Mapping[str, Callable[[], EvictionPolicy]], rounds: int) -> dict[str, float]:
    """Return the CPU time per read of each policy, and of the replay alone ("nothing"), in us: the least of so many
    rounds, in which they take turns, since a machine that is busy with other work makes all of them slower.
    """
    least: dict[str, float] = {}
    boundless = replace(trace, capacity=1 << 62)
    for _ in range(rounds):
        turn = {"nothing": replay(boundless, Nothing())} | {
            name: replay(trace, make()) for name, make in makers.items()
        }
        for name, outcome in turn.items():
            least[name] = min(least.get(name, math.inf), outcome.us_per_read)
    return least


def replay_planned(trace: Trace, policy: EvictionPolicy) -> Outcome:
    """Read everything through one tier that knows what is read when."""
    uses: dict[ObjectId, list[int]] = defaultdict(list)
    for at, key in enumerate(trace.keys):
        uses[ObjectId(key[:16])].append(at)
    now = 0

    def tell(at: int) -> None:
        nonlocal now
        now = at

    def next_use(oid: ObjectId) -> int | None:
        positions = uses[oid]
        index = bisect.bisect_right(positions, now)
        return positions[index] if index < len(positions) else None

    return replay(trace, PlannedPolicy(policy, next_use=next_use), tell)


def optimum(trace: Trace) -> Outcome:
    """Return Belady's: the furthest next read leaves first. Exact when all sizes are the same."""
    following, last = [NEVER] * len(trace.keys), dict[BlockKey, int]()
    for at in range(len(trace.keys) - 1, -1, -1):
        following[at] = last.get(trace.keys[at], NEVER)
        last[trace.keys[at]] = at
    held: dict[BlockKey, int] = {}
    furthest: list[tuple[int, BlockKey]] = []
    used, start, counts = 0, 0, []
    for end in trace.phases:
        hits = 0
        for at in range(start, end):
            key = trace.keys[at]
            if key in held:
                hits += 1
            else:
                used += trace.sizes[key]
                while used > trace.capacity and furthest:
                    negated, victim = heapq.heappop(furthest)
                    if held.get(victim) == -negated:
                        del held[victim]
                        used -= trace.sizes[victim]
            held[key] = following[at]
            heapq.heappush(furthest, (-following[at], key))
        counts.append(hits / max(1, end - start))
        start = end
    return Outcome(tuple(counts), 0.0)


def replay_tiers(trace: Trace, make: Callable[[], EvictionPolicy], share_in_shm: float = 0.1) -> Outcome:
    """Read everything through a shm tier and a disk tier, which share the capacity of the trace."""
    in_shm = int(trace.capacity * share_in_shm)
    tiers = TwoTiers(make, in_shm, trace.capacity - in_shm, trace.sizes)
    counts, start, begun = [], 0, time.process_time()
    for end in trace.phases:
        hits = 0
        for at in range(start, end):
            key = trace.keys[at]
            if tiers.read(key):
                hits += 1
            else:
                tiers.put(key)
        counts.append(hits / max(1, end - start))
        start = end
    spent = time.process_time() - begun
    reads = len(trace.keys)
    return Outcome(tuple(counts), spent / reads * 1e6, tiers.written / reads)
