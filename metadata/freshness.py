"""How long what is known may be trusted, under the mount's consistency. Pure functions of the wall clock.

    immutable  listings and found names are valid for ever; a complete listing proves absence for ever
    ttl        a name for `metadata_ttl` after the store was asked for it, or after the listing that has it was
               complete; a complete listing that is still trusted proves absence
    strict     nothing is valid without asking: names are asked for each time, listings are made at every opendir

The age of a listing counts from its completion: one that takes longer than the ttl (a million objects) would otherwise
be too old before it can be used once. So a listing can miss a change for the ttl plus the time that it took itself.

A name that was asked for and not found is trusted for `negative_ttl`, and the kernel keeps no negative answer longer
than that, wherever it comes from: after it the worker looks into the listing again, which costs no request.

A time of checking in the future (the clock was set back) counts as expired, never as fresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cachefs.config import MetadataConfig
from cachefs.types import Consistency, Ino
from metadata.records import Dentry, Directory

FOREVER_S = 86400.0 * 365
"""The longest validity that is ever given to the kernel."""


@dataclass(frozen=True, slots=True)
class Known:
    """The name exists."""

    dentry: Dentry
    valid_s: float


@dataclass(frozen=True, slots=True)
class Absent:
    """The name does not exist."""

    valid_s: float


class NameSource(Protocol):
    """What freshness needs of a metadata reader."""

    def dentry(self, parent: Ino, name: bytes) -> Dentry | None:
        """Return the visible entry of this name."""
        ...

    def directory(self, ino: Ino) -> Directory | None:
        """Return what is known of the directory's listing."""
        ...


def remaining_s(checked_ns: int, ttl_s: float, now_ns: int) -> float | None:
    """Return for how many more seconds something checked then is trusted, None when it is not."""
    age_s = (now_ns - checked_ns) / 1e9
    if age_s < 0 or age_s >= ttl_s:
        return None
    return min(ttl_s - age_s, FOREVER_S)


class Freshness:
    """The rules above for one mount."""

    def __init__(self, section: MetadataConfig) -> None:
        self.consistency = section.consistency
        self._ttl_s = section.metadata_ttl_s
        self._negative_ttl_s = section.negative_ttl_s

    @property
    def strict(self) -> bool:
        """Whether nothing may be answered without asking the store."""
        return self.consistency is Consistency.STRICT

    def found_s(self, checked_ns: int, now_ns: int) -> float | None:
        """Return how long a name found at `checked_ns` is still valid, None when it is not."""
        if self.consistency is Consistency.IMMUTABLE:
            return FOREVER_S
        if self.strict:
            return None
        return remaining_s(checked_ns, self._ttl_s, now_ns)

    def absent_s(self, asked_ns: int, now_ns: int) -> float | None:
        """Return how long a name not found at `asked_ns` is still known not to exist, None when it is not."""
        if self.strict:
            return None
        return remaining_s(asked_ns, self._negative_ttl_s, now_ns)

    def listing(self, directory: Directory, now_ns: int) -> float | None:
        """Return how long the complete listing of a directory is still valid, None when a new one is needed."""
        if not directory.complete:
            return None
        return self.found_s(directory.listed_ns, now_ns)

    def name(self, reader: NameSource, parent: Ino, name: bytes, now_ns: int) -> Known | Absent | None:
        """Return what is known of a name without asking anybody, None when the agent has to be asked."""
        if self.strict:
            return None
        directory = reader.directory(parent)
        listed_s = self.listing(directory, now_ns) if directory is not None else None
        dentry = reader.dentry(parent, name)
        if dentry is not None:
            found_s = self.found_s(dentry.checked_ns, now_ns)
            valid = [seconds for seconds in (found_s, listed_s) if seconds is not None]
            return Known(dentry, max(valid)) if valid else None
        if listed_s is None:
            return None
        if self.consistency is Consistency.IMMUTABLE:
            return Absent(FOREVER_S)
        return Absent(min(listed_s, self._negative_ttl_s))
