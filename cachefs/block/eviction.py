"""Which block leaves a tier next: least recently used.

The order lives in one plain dict (insertion order; a touch takes a key out and puts it back at the end), which
costs about 105 MB for a million blocks, keys included. A dict that loses keys at its front keeps the holes until it
is resized, so asking it for its first key again and again would walk over them every time. Victims are therefore
taken in batches: a batch pays for one walk, and a key that is touched or removed meanwhile leaves the batch.

INVARIANT: every key of the batch that is still in `_batched` is in `_order`, and no key outside the batch is older.
Not safe for several threads: the tier calls it under its lock (`__contains__` alone is safe anywhere).
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from cachefs.types import BlockKey

BATCH = 512


class LruPolicy:
    """Least recently used first. Implements `cachefs.block.ports.EvictionPolicy`."""

    __slots__ = ("_batch", "_batched", "_order")

    def __init__(self) -> None:
        self._order: dict[BlockKey, None] = {}
        self._batch: deque[BlockKey] = deque()
        self._batched: set[BlockKey] = set()

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier: it is the newest now."""
        self._order.pop(key, None)
        self._order[key] = None
        self._batched.discard(key)

    def bring(self, key: BlockKey, size: int) -> None:
        """A block entered the tier before anybody reads it."""
        self.add(key, size)

    def adopt(self, key: BlockKey, size: int) -> None:
        """A block was in the tier before this process began."""
        self.add(key, size)

    def touch(self, key: BlockKey) -> None:
        """A block was read: it is the newest now."""
        if key in self._order:
            del self._order[key]
            self._order[key] = None
            self._batched.discard(key)

    def remove(self, key: BlockKey) -> None:
        """A block left the tier."""
        self._order.pop(key, None)
        self._batched.discard(key)

    def victim(self) -> BlockKey | None:
        """Return the oldest block; it stays known until `remove`."""
        while True:
            while self._batch:
                if self._batch[0] in self._batched:
                    return self._batch[0]
                self._batch.popleft()
            if not self._order:
                return None
            self._batch.extend(islice(self._order, BATCH))
            self._batched.update(self._batch)

    def take(self) -> BlockKey | None:
        """Remove the oldest block, and return it."""
        key = self.victim()
        if key is not None:
            del self._order[key]
            self._batched.discard(key)
        return key

    def pinned_victim(self) -> BlockKey | None:
        """Return None: `victim` takes all."""
        return None

    def admits(self, key: BlockKey) -> bool:
        """Whether a block would stay: each new one is the newest."""
        return True

    @property
    def is_stable(self) -> bool:
        """It never keeps a part for long."""
        return False

    def size_of(self, key: BlockKey) -> int:
        """Return 0: sizes do not count here."""
        return 0

    def oldest_first(self) -> list[BlockKey]:
        """Return all keys in the order in which they would leave."""
        return list(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)
