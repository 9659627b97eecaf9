"""What the prefetcher needs from the rest, and gives to it, as small Protocols (the agent plugs them)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cachefs.types import Ino, ObjectId, ObjectVersion, Tier


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring blocks of one object version, wanted soon."""

    oid: ObjectId
    version: ObjectVersion
    first: int
    count: int
    to: Tier | None = None
    """Where it is to be. None: shm while that takes blocks, else disk, and nothing is moved. DISK: straight to the disk
    tier, so that it takes no room from what is read again; what no disk takes goes to shm. SHM: what is on disk only
    comes up as well.
    """


class Outcome(enum.Enum):
    """What became of a piece."""

    THERE = enum.auto()
    """All of it was in a tier already."""
    FETCHED = enum.auto()
    """It came, from a peer or from the store, and a tier has it."""
    JOINED = enum.auto()
    """Somebody else was fetching it: it came late, or just in time."""
    DROPPED = enum.auto()
    """There was no room for it, or the cache is closing."""
    GONE = enum.auto()
    """The object is not there any more, or is another version."""
    FAILED = enum.auto()
    """The store refused it or did not answer."""


class Fetches(Protocol):
    """Brings many pieces at once, behind all readers. Used in the trio thread."""

    def prefetch(self, pieces: Sequence[Piece], done: Callable[[Sequence[tuple[Piece, Outcome]]], None]) -> None:
        """Bring what is in no tier. Calls `done` once, in the trio thread, when all of them are over. Never raises."""
        ...

    def holds(self, oid: ObjectId, block: int) -> bool:
        """Whether a tier has a block: a look into memory."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a directory, in the order of its listing."""

    ino: Ino
    place: bytes
    """Its name, with a slash behind it for a directory: names in the order of listings are sorted by it."""

    @property
    def is_directory(self) -> bool:
        """Whether it is one (no name contains a slash)."""
        return self.place.endswith(b"/")


@dataclass(frozen=True, slots=True)
class Listed:
    """What is known of the listing of a directory."""

    generation: int
    """Another number: another listing."""
    complete: bool
    fresh: bool
    """Whether it is still trusted, so that it answers look-ups."""


class Tree(Protocol):
    """The part of the namespace that is known without asking the store. Memory reads only; never raises."""

    def parent(self, ino: Ino) -> tuple[Ino, bytes] | None:
        """Return the directory of a file or directory, and its name there; None for the root or what is gone."""
        ...

    def listed(self, directory: Ino) -> Listed | None:
        """Return what is known of a listing, None when it was never begun."""
        ...

    def entries(self, directory: Ino, after: bytes, count: int) -> list[Entry]:
        """Return up to `count` entries behind a place (b"": from the beginning), in the order of listings."""
        ...

    def file(self, directory: Ino, name: bytes) -> Ino | None:
        """Return the file of a name, if it is known."""
        ...

    def version(self, ino: Ino) -> tuple[ObjectId, ObjectVersion] | None:
        """Return what a file is in the store, None when it is gone (or a directory)."""
        ...
