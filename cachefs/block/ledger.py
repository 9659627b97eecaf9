"""What a tier holds, as numbers: which blocks, how many bytes of the file they take, and which of them goes next.

LMDB does not tell how many pages are free, so the budget is kept by counting what each block takes: whole pages for
a long value (they cannot be shared), the bytes themselves for a short one, and its entries in the two trees.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from cachefs.block.ports import EvictionPolicy
from cachefs.types import BlockKey

if TYPE_CHECKING:
    from cachefs.block.holdings import Lane

PAGE_SIZE = min(mmap.PAGESIZE, 1 << 15)
"""LMDB's page: that of the machine, up to its own maximum."""
PAGE_HEADER = 16
ENTRY_BYTES = 272
"""The three tree entries of a block, with the free space that trees keep in their pages."""
LONGEST_INLINE = (((PAGE_SIZE - PAGE_HEADER) // 2) & ~1) - 2 - 28
"""Values up to here lie in the tree's own pages: LMDB's limit for a node, less its header (8) and the key (20)."""
MAX_TOUCHED = 1 << 16
LATE_DOUBLES = 64
"""So many of the newest stay for now: whoever asked for them may not have read them yet."""


def value_pages(length: int) -> int:
    """Return how many pages of its own a value of `length` bytes takes (0: it lies in a tree page)."""
    return 0 if length <= LONGEST_INLINE else (PAGE_HEADER + length + PAGE_SIZE - 1) // PAGE_SIZE


def value_cost(length: int) -> int:
    """Return how many bytes of the file a value of `length` bytes takes."""
    return (value_pages(length) * PAGE_SIZE or length) + ENTRY_BYTES


class Ledger:
    """Blocks and bytes of one tier.

    All but `touch`, `part_with` and `in` are called under the tier's lock; those from any thread: what they say waits
    in a bounded queue until somebody who holds the lock sees to it.
    """

    __slots__ = ("_doubles", "_policy", "_touched", "lanes", "used_bytes")

    def __init__(self, policy: EvictionPolicy, lanes: dict[int, Lane] | None = None) -> None:
        """`lanes`: of volumes with a quota, by their numbers."""
        self._policy = policy
        self.lanes: dict[int, Lane] = {} if lanes is None else lanes
        self._touched: deque[BlockKey] = deque(maxlen=MAX_TOUCHED)
        self._doubles: deque[BlockKey] = deque(maxlen=MAX_TOUCHED)
        """Blocks that leave before all others, since another tier has them, too."""
        self.used_bytes = 0

    def add(self, key: BlockKey, length: int, *, ahead: bool = False, owner: int = 0) -> None:
        """A value of `length` bytes was committed, `ahead` of whoever will read it."""
        (self._policy.bring if ahead else self._policy.add)(key, length)
        self.used_bytes += value_cost(length)
        if owner in self.lanes:
            self.lanes[owner].add(key, length, ahead=ahead)

    def adopt(self, key: BlockKey, length: int, owner: int = 0) -> None:
        """A value of `length` bytes was there when the tier was opened."""
        self._policy.adopt(key, length)
        self.used_bytes += value_cost(length)
        if owner in self.lanes:
            self.lanes[owner].adopt(key, length)

    def guide(self, change: Callable[[EvictionPolicy], EvictionPolicy]) -> None:
        """Let another policy, made of the one that there is, go on in its place."""
        self._policy = change(self._policy)
        for lane in self.lanes.values():
            lane.policy = change(lane.policy)

    def admits(self, key: BlockKey, owner: int = 0, size: int = 0, *, room: bool = False) -> bool:
        """Whether a block (of `size` bytes at the most) would be kept for longer than a moment if it were added now.
        `room`: nothing has to leave for it.

        A volume that has used up its quota makes room among its own blocks, and asks nobody else.
        """
        lane = self.lanes.get(owner)
        if lane is not None and lane.used_bytes + size > lane.quota_bytes:
            return lane.policy.admits(key)
        return room or self._policy.admits(key)

    def take_victim(self, *, even_pinned: bool = False) -> BlockKey | None:
        """Take the block to evict next out of the order; follow with `gone` or `keep`. None: nothing may go."""
        while len(self._doubles) > min(LATE_DOUBLES, len(self._policy) // 8):
            double = self._doubles.popleft()
            if double in self._policy:
                self._policy.remove(double)
                return double
        key = self._policy.take()
        if key is None and even_pinned:
            key = self._policy.pinned_victim()
            if key is not None:
                self._policy.remove(key)
        return key

    def keep(self, key: BlockKey, length: int) -> None:
        """A victim stays after all (as the newest: the next try takes others)."""
        self._policy.add(key, length)
        for lane in self.lanes.values():
            lane.keep(key, length)

    def gone(self, key: BlockKey, length: int) -> None:
        """A value of `length` bytes was deleted."""
        self._policy.remove(key)
        self.used_bytes -= value_cost(length)
        for lane in self.lanes.values():
            lane.gone(key, length)

    def touch(self, keys: Iterable[BlockKey], owner: int = 0) -> None:
        """Blocks were read, by `owner` if that is known."""
        if self.lanes:
            keys = list(keys)
            for number, lane in list(self.lanes.items()):
                lane.touched.extend(keys if number == owner else [key for key in keys if key in lane])
        self._touched.extend(keys)

    def part_with(self, keys: Iterable[BlockKey]) -> None:
        """Blocks are in another tier, too: where any part is as good as another, let these leave for others."""
        if self._policy.is_stable:
            self._doubles.extend(key for key in keys if key in self._policy)

    def settle(self) -> None:
        """Tell the policy of the touches."""
        while self._touched:
            self._policy.touch(self._touched.popleft())
        for lane in self.lanes.values():
            lane.settle()

    def oldest_first(self) -> list[BlockKey]:
        """Return all keys in the order of their eviction."""
        return self._policy.oldest_first()

    def __contains__(self, key: object) -> bool:
        """Return whether the tier holds a block; it may say no for the instant in which the policy moves the key."""
        return key in self._policy

    def __len__(self) -> int:
        return len(self._policy)
