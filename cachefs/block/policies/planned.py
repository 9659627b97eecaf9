"""What a policy is told from outside: a plan of reads to come, and blocks that must stay. Around any policy.

With a plan the block whose next read is furthest leaves first (Belady, "A study of replacement algorithms for a
virtual-storage computer", IBM Systems Journal 1966), and before those all that the plan does not name. Blocks that it
names are kept here, in buckets of `1 << WIDTH_SHIFT` neighbouring positions; all others are the wrapped policy's. Which
is which shows when a block enters, or would be the next to leave: nobody walks over ten million blocks because a plan
has come. For the same reason a pinned block is found when it would have to leave, and put aside.

INVARIANT: a block is in exactly one of `_named`, `_pinned` and the wrapped policy. Not safe for several threads (`in`
alone is, but for the moment in which a block moves).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import chain
from typing import TypeAlias

from cachefs.block.ports import EvictionPolicy
from cachefs.types import BlockKey, ObjectId

NextUse: TypeAlias = Callable[[ObjectId], int | None]
"""Returns the position of an object's next read in the plan, never one that is over; None: it is not in there (any
more). Called under the lock of a tier: it must be fast, and raises nothing."""
IsPinned: TypeAlias = Callable[[ObjectId], bool]
"""Returns whether an object must stay. Called under the lock of a tier: it must be fast, and raises nothing."""

WIDTH_SHIFT = 5
SIZE_BITS = 32
SIZE_MASK = (1 << SIZE_BITS) - 1
MOST_MOVES = 256
"""How many blocks are asked for at a time when one has to leave: while most of a large tier has not been seen since a
plan came, the furthest of those that were is good enough."""
OID_BYTES = 16


def _object_of(key: BlockKey) -> ObjectId:
    return ObjectId(key[:OID_BYTES])


class PlannedPolicy:
    """Implements `cachefs.block.ports.EvictionPolicy` around another one."""

    __slots__ = ("_buckets", "_furthest", "_is_pinned", "_named", "_next_use", "_pinned", "_policy")

    def __init__(
        self, policy: EvictionPolicy, *, next_use: NextUse | None = None, is_pinned: IsPinned | None = None
    ) -> None:
        self._policy = policy
        self._next_use = next_use
        self._is_pinned = is_pinned
        self._named: dict[BlockKey, int] = {}
        """Bucket and size of each block that the plan names."""
        self._buckets: dict[int, list[BlockKey]] = {}
        """May hold blocks that are in another bucket by now, or gone."""
        self._furthest: list[int] = []
        """A heap of the buckets, negated."""
        self._pinned: dict[BlockKey, int] = {}
        """The size of each block that would have left and must not."""

    # -- what is told --------------------------------------------------------------------------------------------------

    def set_future(self, next_use: NextUse | None) -> None:
        """Follow another plan, or none. Takes time for as many blocks as the former one named."""
        named, self._named = self._named, {}
        self._buckets, self._furthest = {}, []
        self._next_use = next_use
        for key, number in named.items():
            if not self._shelve(key, number & SIZE_MASK):
                self._policy.adopt(key, number & SIZE_MASK)

    def set_pinned(self, is_pinned: IsPinned | None) -> None:
        """Keep other blocks. Call it whenever the answers change. Takes time for as many as were put aside."""
        self._is_pinned = is_pinned
        aside, self._pinned = self._pinned, {}
        for key, size in aside.items():
            if not self._shelve(key, size):
                self._policy.adopt(key, size)

    # -- what happens to blocks ----------------------------------------------------------------------------------------

    def add(self, key: BlockKey, size: int, add: Callable[[BlockKey, int], None] | None = None) -> None:
        """A block entered the tier. `add`: what the wrapped policy is told."""
        self._named.pop(key, None)
        self._pinned.pop(key, None)
        if self._shelve(key, size):
            self._policy.remove(key)
        else:
            (self._policy.add if add is None else add)(key, size)

    def bring(self, key: BlockKey, size: int) -> None:
        """A block entered the tier before anybody reads it."""
        self.add(key, size, self._policy.bring)

    def adopt(self, key: BlockKey, size: int) -> None:
        """A block was in the tier before this process began."""
        self._policy.adopt(key, size)

    def touch(self, key: BlockKey) -> None:
        """A block was read: where the plan names it next decides from now on."""
        number = self._named.get(key)
        if number is None:
            if key not in self._pinned:
                self._policy.touch(key)
        elif not self._shelve(key, number & SIZE_MASK):
            del self._named[key]
            self._policy.add(key, number & SIZE_MASK)

    def remove(self, key: BlockKey) -> None:
        """A block left the tier."""
        if self._named.pop(key, None) is None and self._pinned.pop(key, None) is None:
            self._policy.remove(key)

    def victim(self) -> BlockKey | None:
        """Return the block that leaves next; it stays known until `remove`. None: all that is left is pinned."""
        while True:
            for _ in range(MOST_MOVES):
                key = self._policy.victim()
                if key is None:
                    return self._furthest_named()
                size = self._policy.size_of(key)
                if self._put_aside(key, size) or self._shelve(key, size):
                    self._policy.remove(key)
                else:
                    return key
            key = self._furthest_named()
            if key is not None:
                return key

    def take(self) -> BlockKey | None:
        """Remove the block that leaves next, and return it. None: as `victim`."""
        key = self.victim()
        if key is not None:
            self.remove(key)
        return key

    def pinned_victim(self) -> BlockKey | None:
        """Return a pinned block, for when even those must leave; None when none was put aside."""
        return next(iter(self._pinned), None)

    def admits(self, key: BlockKey) -> bool:
        """Whether a block would be kept for longer than a moment if it were added now."""
        oid = _object_of(key)
        if self._is_pinned is not None and self._is_pinned(oid):
            return True
        position = None if self._next_use is None else self._next_use(oid)
        if position is None:
            return self._policy.admits(key) if len(self._policy) else not self._named and not self._pinned
        return len(self._policy) > 0 or self._furthest_bucket() > position >> WIDTH_SHIFT

    # -- book-keeping --------------------------------------------------------------------------------------------------

    def _shelve(self, key: BlockKey, size: int) -> bool:
        """Keep a block here if the plan names it."""
        if self._next_use is None:
            return False
        position = self._next_use(_object_of(key))
        if position is None:
            return False
        bucket = position >> WIDTH_SHIFT
        number = bucket << SIZE_BITS | min(size, SIZE_MASK)
        if self._named.get(key) != number:
            self._named[key] = number
            keys = self._buckets.get(bucket)
            if keys is None:
                keys = self._buckets[bucket] = []
                heapq.heappush(self._furthest, -bucket)
            keys.append(key)
            if len(self._buckets) > 2 * len(self._named) + 1024:
                self._clean()
        return True

    def _put_aside(self, key: BlockKey, size: int) -> bool:
        if self._is_pinned is None or not self._is_pinned(_object_of(key)):
            return False
        self._pinned[key] = size
        return True

    def _furthest_named(self) -> BlockKey | None:
        while self._furthest:
            bucket = -self._furthest[0]
            keys = self._buckets[bucket]
            while keys:
                key = keys[-1]
                number = self._named.get(key)
                if number is None or number >> SIZE_BITS != bucket:
                    keys.pop()
                elif self._put_aside(key, number & SIZE_MASK):
                    del self._named[keys.pop()]
                elif not self._shelve(key, number & SIZE_MASK) or self._named[key] >> SIZE_BITS == bucket:
                    return key  # it is the furthest, or the plan does not name it any more
                else:
                    keys.pop()
                    if -self._furthest[0] != bucket:
                        break  # it is wanted later than was known
            if not keys and -self._furthest[0] == bucket:
                heapq.heappop(self._furthest)
                del self._buckets[bucket]
        return None

    def _furthest_bucket(self) -> int:
        return -self._furthest[0] if self._furthest else -1

    def _clean(self) -> None:
        """Forget where blocks were that the plan has placed elsewhere since: buckets that it has passed."""
        self._buckets = {}
        for key, number in self._named.items():
            self._buckets.setdefault(number >> SIZE_BITS, []).append(key)
        self._furthest = [-bucket for bucket in self._buckets]
        heapq.heapify(self._furthest)

    @property
    def is_stable(self) -> bool:
        """A plan knows better."""
        return self._next_use is None and self._policy.is_stable

    def size_of(self, key: BlockKey) -> int:
        """Return about how many bytes a block has; 0 when it is not known."""
        if key in self._named:
            return self._named[key] & SIZE_MASK
        return self._pinned[key] if key in self._pinned else self._policy.size_of(key)

    def oldest_first(self) -> list[BlockKey]:
        """Return all keys, roughly in the order in which they would leave."""
        named = sorted(self._named, key=lambda key: -self._named[key])
        return list(chain(self._policy.oldest_first(), named, self._pinned))

    def __contains__(self, key: object) -> bool:
        return key in self._policy or key in self._named or key in self._pinned

    def __len__(self) -> int:
        return len(self._policy) + len(self._named) + len(self._pinned)
