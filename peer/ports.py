"""What the parts of peers need from each other and from the agent, as small Protocols (the agent plugs them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cachefs.store.port import ListPage
from cachefs.types import BlockKey, ObjectId, ObjectVersion
from peer.jobs import JobAnswer, JobRequest
from peer.leash import Leash
from peer.members import Member
from peer.wire import BatchRequest, BlockRequest, ListingRequest

Fetched = Callable[["Mapping[int, bytes | None] | Exception"], None]
"""Gets, by index, the blocks that were brought: their bytes, or None when they are to be found in the tiers."""


class Holdings(Protocol):
    """The blocks and listings of this node. Every method may be called from any thread."""

    @property
    def block_size(self) -> int:
        """In bytes. Peers with another one get nothing from us."""
        ...

    def lend(self, key: BlockKey, length: int) -> AbstractContextManager[memoryview | None]:
        """The bytes of a block straight from the memory map of the shm tier, or None if it is not there.

        They are valid inside the context only, and while it is open the tier cannot use freed pages again: send what
        the socket takes at once, copy the rest, and leave. Never raises, never blocks for long.
        """
        ...

    def level(self, volume: str, oid: ObjectId, index: int) -> int:
        """Return the place of this node in the order of a block (`peer.placement.Candidates.level`): what is fetched
        here for it waits for nodes of lower levels only. Never blocks.
        """
        ...

    def stored(self, key: BlockKey) -> bool:
        """Whether the disk tier seems to have a block, so that `load` is worth a thread. Never blocks."""
        ...

    def load(self, key: BlockKey, length: int) -> bytes | None:
        """Return a block from the disk tier, verified, or None. BLOCKS."""
        ...

    def fetch(
        self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched, *, behind: bool = False
    ) -> None:
        """Have blocks `first` to `first + count` brought here as if a reader of this node had asked (`behind`: behind
        its readers, since nobody waits for them), and call `fetched` once, from any thread. Returns at once.

        An Exception is one of `cachefs.errors`: NotFound when this node does not hold the volume, or the key does not
        belong to it.
        """
        ...

    def list_page(
        self, volume: str, prefix: str, delimiter: str, token: str | None, limit: int, max_age_s: float
    ) -> tuple[ListPage, float]:
        """Return one page of a listing that is at most `max_age_s` old, and how old it is in seconds. BLOCKS.

        Raises: NotFound as in `fetch`, and what `ObjectStore.list_page` raises.
        """
        ...

    def job(self, request: JobRequest) -> JobAnswer:
        """Begin a job, or say how it is; see `peer.jobs`. BLOCKS for moments. Raises CachefsError: there is none."""
        ...

    def summary(self) -> dict[str, Any]:
        """Return what this node tells others of itself: tiers with used and limit, hit ratio, counters. BLOCKS."""
        ...


class Asks(Protocol):
    """Asks another node (`peer.client.PeerClient`). BLOCKS; any thread."""

    def read_blocks(
        self, peer: Member, request: BlockRequest, buffers: Sequence[memoryview], leash: Leash | None = None
    ) -> Iterator[int]:
        """Fill the buffers, one for each block of the request, and yield how many are full and verified.

        `leash` hears when the call gets nowhere, and can end it.

        Raises: NotHeld when a block is not there and was only asked for if it is; PeerUnavailable for anything else.
        """
        ...

    def read_batch(self, peer: Member, request: BatchRequest) -> Iterator[memoryview | None]:
        """Yield the blocks of a request, in its order: verified bytes, valid until the next one, or None for a block
        that is not to be had there. Raises PeerUnavailable.
        """
        ...

    def list_page(self, peer: Member, request: ListingRequest) -> tuple[ListPage, float]:
        """Return a page, and how old it is in seconds. Raises PeerUnavailable."""
        ...
