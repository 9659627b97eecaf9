"""What the file system asks of the node's agent. `cachefs.agent.client` implements it over a unix socket; tests use
a plain object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cachefs import errors
from cachefs.types import Ino, Tier

MOST_RANGE = 8 << 20
"""Bytes that one `AgentPort.fetch_range` may ask for."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """The answer to a name. The record itself is in the metadata store, committed before this was sent."""

    ino: Ino | None
    """None: the name does not exist."""
    valid_s: float
    """For how long the kernel may keep this answer (0: not at all)."""


@dataclass(frozen=True, slots=True)
class ListingProgress:
    """How far the listing of a directory has come."""

    complete: bool
    frontier: bytes
    """Every entry whose sort key is below this one is committed (b"" while nothing is). Only meaningful until
    complete.
    """
    valid_s: float
    """For how long the kernel may keep the entries."""


@dataclass(frozen=True, slots=True)
class FilledBlock:
    """One block that the agent made available."""

    index: int
    source: Tier
    payload: bytes | None
    """The bytes themselves, only when no tier could take the block (or `inline` was asked for)."""


class AgentPort(Protocol):
    """The node's agent. All calls survive the death and the restart of the agent; they raise `cachefs.errors` only."""

    async def resolve(self, parent: Ino, name: bytes) -> Resolution:
        """Find out what `name` in directory `parent` is now, under the mount's consistency, and commit it to the
        metadata store.
        """
        ...

    async def list_directory(self, ino: Ino, seen: bytes | None) -> ListingProgress:
        """Make a valid listing of `ino` exist or come into being. Returns when it is complete or its frontier is past
        `seen`.

        `seen` None starts: a listing that is too old is begun anew.
        """
        ...

    async def fill(self, ino: Ino, first: int, count: int, *, inline: bool = False) -> list[FilledBlock]:
        """Make `count` blocks of the file available in the shm tier, from index `first`. Returns when all are there.

        Raises StaleObject, AccessDenied, StorageUnavailable.
        """
        ...

    def request_fill(
        self, ino: Ino, first: int, count: int, answer: Callable[[list[FilledBlock] | errors.CachefsError], None]
    ) -> bool:
        """As `fill`, without a task and from any thread; returns False when there is no agent now, and `fill` has to
        wait for one.

        `answer` is called once, in the trio thread, with the blocks or what `fill` raises.
        """
        ...

    async def fetch_range(self, ino: Ino, offset: int, length: int, *, fresh: bool = False) -> bytes:
        """Return these bytes of a file (at most `MOST_RANGE`), of which no tier keeps more than it has already.
        `fresh`: from the store, whatever the tiers have.

        Raises as `fill`.
        """
        ...

    def request_range(
        self,
        ino: Ino,
        offset: int,
        length: int,
        answer: Callable[[bytes | errors.CachefsError], None],
        *,
        fresh: bool = False,
    ) -> bool:
        """As `fetch_range`, without a task and from any thread; returns False when there is no agent now, or one that
        cannot do this. `answer` is called as that of `request_fill`.
        """
        ...

    def range_ahead(self, ino: Ino, offset: int, length: int) -> None:
        """Say that a range will be asked for soon. Returns at once and never raises. Any thread."""
        ...

    def readahead(self, ino: Ino, first: int, count: int) -> None:
        """Say that these blocks will be wanted soon. Returns at once and never raises. Any thread."""
        ...

    async def cached(self, ino: Ino) -> dict[Tier, int]:
        """Count the blocks of the file that each tier holds."""
        ...
