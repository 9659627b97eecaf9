"""Which policy a tier has, by the name in the configuration, and what it is told from outside (plans and pins).

A tier that begins anew needs a policy anew: so what it was told lives here, and not in the policy.
"""

from __future__ import annotations

from collections.abc import Callable

from cachefs.block.eviction import LruPolicy
from cachefs.block.policies.epoch import EpochPolicy
from cachefs.block.policies.planned import IsPinned, NextUse, PlannedPolicy
from cachefs.block.policies.s3fifo import S3FifoPolicy
from cachefs.block.ports import EvictionPolicy
from cachefs.config import Eviction

POLICIES: dict[Eviction, Callable[[], EvictionPolicy]] = {
    Eviction.EPOCH: EpochPolicy,
    Eviction.S3FIFO: S3FifoPolicy,
    Eviction.LRU: LruPolicy,
}


def policy_maker(eviction: Eviction) -> Callable[[], EvictionPolicy]:
    """Return what makes the policies of a tier."""
    return POLICIES[eviction]


class Guidance:
    """What a tier's policy is told; `TierWriter.guide` changes it, under the lock of the tier."""

    def __init__(self, make: Callable[[], EvictionPolicy]) -> None:
        self._make = make
        self.next_use: NextUse | None = None
        self.is_pinned: IsPinned | None = None

    def policy(self) -> EvictionPolicy:
        """Return a new policy that has been told everything."""
        policy = self._make()
        if self.next_use is None and self.is_pinned is None:
            return policy
        return PlannedPolicy(policy, next_use=self.next_use, is_pinned=self.is_pinned)

    def apply(self, policy: EvictionPolicy) -> EvictionPolicy:
        """Return the policy that goes on in the place of `policy`, which may be the same one."""
        if not isinstance(policy, PlannedPolicy):
            if self.next_use is None and self.is_pinned is None:
                return policy
            return PlannedPolicy(policy, next_use=self.next_use, is_pinned=self.is_pinned)
        policy.set_future(self.next_use)
        policy.set_pinned(self.is_pinned)
        return policy
