"""The two small Protocols that plug tiers, peers and the store together (the agent's composition root plugs them)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

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


class EvictionPolicy(Protocol):
    """Decides which block leaves a tier next. Pure bookkeeping: no I/O, O(1) per call, bounded memory per block.

    INVARIANT: it knows exactly the keys that were added and not removed.
    """

    def add(self, key: BlockKey, size: int) -> None:
        """A block entered the tier (or was rewritten)."""
        ...

    def touch(self, key: BlockKey) -> None:
        """A block was read. Unknown keys are ignored."""
        ...

    def remove(self, key: BlockKey) -> None:
        """A block left the tier. Unknown keys are ignored."""
        ...

    def victim(self) -> BlockKey | None:
        """Return the block to evict next (it stays known until `remove`), or None when there is none."""
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
