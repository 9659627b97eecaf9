"""The two small Protocols that plug tiers, peers and the store together (the agent's composition root plugs them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from cachefs.store.port import Orders
from cachefs.types import BlockKey, ObjectVersion, Tier


class BlockSource(Protocol):
    """Where blocks come from when no tier has them: peers, the store. Calls BLOCK; they run in threads."""

    @property
    def max_requests(self) -> int:
        """How many reads may be under way at once. May change."""
        ...

    @property
    def spread(self) -> bool:
        """Whether several short reads side by side are faster than a long one, as of stores which give a connection
        only so much. Of a route.
        """
        ...

    def route(self, version: ObjectVersion, start: int) -> BlockSource:
        """Return the source that will read a range which begins there: this one, or a part of it.

        Fetches of one route stand in one line. Where some wait for another node and others for the store, they must not
        share slots: two nodes that have filled all of theirs with questions to each other would wait for ever. Never
        blocks; any thread.
        """
        ...

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        """Fill the buffers, one after the other, with exactly the bytes of exactly this version from `start` on.

        Each buffer is a block (`start` is where the first one begins). Yields the number of buffers that are full, and
        where those came from that are full since the last time (PEER or ORIGIN).

        Raises: StaleObject, AccessDenied, StorageUnavailable (also BadBody).
        """
        ...

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """Bring whole objects that have one block each, behind what readers wait for; returns when all are over.

        Faults go to `orders` (see there); raises what that raises, and StorageUnavailable for all that are left.
        """
        ...


class EvictionPolicy(Protocol):
    """Decides which block leaves a tier next. Pure bookkeeping: no I/O, O(1) per call, bounded memory per block.

    INVARIANT: it knows exactly the keys that were added and not removed.
    """

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier (or was rewritten) because it was read."""
        ...

    def bring(self, key: BlockKey, size: int) -> None:
        """A block entered the tier before anybody reads it; that it is read will be told by `touch`."""
        ...

    def adopt(self, key: BlockKey, size: int) -> None:
        """A block was in the tier before this process began: nobody has read it now."""
        ...

    def touch(self, key: BlockKey) -> None:
        """A block was read. One that is not known is not in the tier, and was read from elsewhere."""
        ...

    def remove(self, key: BlockKey) -> None:
        """A block left the tier. Unknown keys are ignored."""
        ...

    def victim(self) -> BlockKey | None:
        """Return the block to evict next (it stays known until `remove`), or None when there is none that may go."""
        ...

    def take(self) -> BlockKey | None:
        """Remove the block to evict next and return it, or None: `victim` and `remove` in one call."""
        ...

    def pinned_victim(self) -> BlockKey | None:
        """Return a block that should not go, once `victim` has returned None and something must; None: all are gone."""
        ...

    def admits(self, key: BlockKey) -> bool:
        """Whether a block would be kept for longer than a moment if it were added now."""
        ...

    @property
    def is_stable(self) -> bool:
        """Whether it keeps a part of what is read, and leaves that alone: any part is as good as another."""
        ...

    def size_of(self, key: BlockKey) -> int:
        """Return about how many bytes a known block has, as far as the policy cares."""
        ...

    def oldest_first(self) -> list[BlockKey]:
        """Return all known keys, roughly in the order in which they would leave."""
        ...

    def __contains__(self, key: object) -> bool:
        """Return whether a block is known. Called from any thread, without a lock."""
        ...

    def __len__(self) -> int:
        """Return how many blocks are known."""
        ...
