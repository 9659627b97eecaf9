"""What a tier holds, as numbers: which blocks, how many bytes of the file they take, and which of them goes next.

LMDB does not tell how many pages are free, so the budget is kept by counting what each block takes: whole pages for
a long value (they cannot be shared), the bytes themselves for a short one, and its entries in the two trees.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable

from cachefs.block.ports import EvictionPolicy
from cachefs.types import BlockKey

PAGE_SIZE = min(mmap.PAGESIZE, 1 << 15)
"""LMDB's page: that of the machine, up to its own maximum."""
PAGE_HEADER = 16
ENTRY_BYTES = 160
"""Both tree entries of a block, with the free space that trees keep in their pages."""
LONGEST_INLINE = (((PAGE_SIZE - PAGE_HEADER) // 2) & ~1) - 2 - 28
"""Values up to here lie in the tree's own pages: LMDB's limit for a node, less its header (8) and the key (20)."""
MAX_TOUCHED = 1 << 16


def value_pages(length: int) -> int:
    """Return how many pages of its own a value of `length` bytes takes (0: it lies in a tree page)."""
    return 0 if length <= LONGEST_INLINE else (PAGE_HEADER + length + PAGE_SIZE - 1) // PAGE_SIZE


def value_cost(length: int) -> int:
    """Return how many bytes of the file a value of `length` bytes takes."""
    return (value_pages(length) * PAGE_SIZE or length) + ENTRY_BYTES


class Ledger:
    """Blocks and bytes of one tier.

    All but `touch` and `in` are called under the tier's lock; those two from any thread: touches wait
    in a bounded queue until somebody who holds the lock settles them.
    """

    __slots__ = ("_policy", "_touched", "used_bytes")

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._touched: deque[BlockKey] = deque(maxlen=MAX_TOUCHED)
        self.used_bytes = 0

    def add(self, key: BlockKey, length: int, *, ahead: bool = False) -> None:
        """A value of `length` bytes was committed, `ahead` of whoever will read it."""
        (self._policy.bring if ahead else self._policy.add)(key, length)
        self.used_bytes += value_cost(length)

    def adopt(self, key: BlockKey, length: int) -> None:
        """A value of `length` bytes was there when the tier was opened."""
        self._policy.adopt(key, length)
        self.used_bytes += value_cost(length)

    def guide(self, change: Callable[[EvictionPolicy], EvictionPolicy]) -> None:
        """Let another policy, made of the one that there is, go on in its place."""
        self._policy = change(self._policy)

    def admits(self, key: BlockKey) -> bool:
        """Whether a block would be kept for longer than a moment if it were added now."""
        return self._policy.admits(key)

    def take_victim(self, *, even_pinned: bool = False) -> BlockKey | None:
        """Take the block to evict next out of the order; follow with `gone` or `keep`. None: nothing may go."""
        key = self._policy.victim()
        if key is None and even_pinned:
            key = self._policy.pinned_victim()
        if key is not None:
            self._policy.remove(key)
        return key

    def keep(self, key: BlockKey, length: int) -> None:
        """A victim stays after all (as the newest: the next try takes others)."""
        self._policy.add(key, length)

    def gone(self, key: BlockKey, length: int) -> None:
        """A value of `length` bytes was deleted."""
        self._policy.remove(key)
        self.used_bytes -= value_cost(length)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Blocks were read."""
        self._touched.extend(keys)

    def settle(self) -> None:
        """Tell the policy of the touches."""
        while self._touched:
            self._policy.touch(self._touched.popleft())

    def oldest_first(self) -> list[BlockKey]:
        """Return all keys in the order of their eviction."""
        return self._policy.oldest_first()

    def __contains__(self, key: object) -> bool:
        """Return whether the tier holds a block; it may say no for the instant in which the policy moves the key."""
        return key in self._policy

    def __len__(self) -> int:
        return len(self._policy)
