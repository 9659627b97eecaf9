"""Reads through one tier, or through two as the agent has them, and what would have been best.

The tiers here are accounts only: what a policy decides is carried out as `cachefs.block` does it (`TierWriter` evicts
before it writes, `Spiller` brings to the disk tier what leaves the shm tier), and no byte moves.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from bench.policies.traces import Trace
from cachefs.block.policies.planned import PlannedPolicy
from cachefs.block.ports import EvictionPolicy
from cachefs.types import BlockKey, ObjectId

NEVER = 1 << 60
SPILLED_EVERY = 4
"""So many reads for each block that is spilled while somebody reads."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trace came to."""

    hits: tuple[float, ...]
    """Share of the reads of each phase that were hits."""
    us_per_read: float
    """CPU time, that of the replay itself included (about 0.2)."""
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

    def put(self, key: BlockKey, demote: Callable[[BlockKey], object] = lambda key: None) -> bool:
        """Make room and add; return whether there was room."""
        size = self._sizes[key]
        while self.used + size > self.capacity:
            victim = self.policy.victim()
            if victim is None:
                return False
            demote(victim)
            self.policy.remove(victim)
            self.used -= self._sizes[victim]
        self.policy.add(key, size)
        self.used += size
        return True


def replay(trace: Trace, policy: EvictionPolicy, tell: Callable[[int], object] | None = None) -> Outcome:
    """Read everything through one tier. `tell` hears which read is next."""
    tier = Tier(policy, trace.capacity, trace.sizes)
    counts, start, begun = [], 0, time.process_time()
    for end in trace.phases:
        hits = 0
        for at in range(start, end):
            key = trace.keys[at]
            if tell is not None:
                tell(at)
            if key in policy:
                hits += 1
                policy.touch(key)
            else:
                tier.put(key)
        counts.append(hits / max(1, end - start))
        start = end
    spent = time.process_time() - begun
    return Outcome(tuple(counts), spent / len(trace.keys) * 1e6)


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
    shm, disk = Tier(make(), in_shm, trace.sizes), Tier(make(), trace.capacity - in_shm, trace.sizes)
    pending: dict[BlockKey, None] = {}
    written = 0

    def spill(key: BlockKey) -> None:
        nonlocal written
        pending.pop(key, None)
        if key not in disk.policy and disk.policy.admits(key):
            written += disk.put(key)

    counts, start, begun = [], 0, time.process_time()
    for end in trace.phases:
        hits = 0
        for at in range(start, end):
            key = trace.keys[at]
            hits += key in shm.policy or key in disk.policy
            disk.policy.touch(key)
            if key in shm.policy:
                shm.policy.touch(key)
            else:
                if key not in disk.policy:
                    pending[key] = None
                shm.put(key, spill)
            if pending and at % SPILLED_EVERY == 0:
                spill(next(iter(pending)))
        counts.append(hits / max(1, end - start))
        start = end
    spent = time.process_time() - begun
    reads = len(trace.keys)
    return Outcome(tuple(counts), spent / reads * 1e6, written / reads)
