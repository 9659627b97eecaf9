"""What comes from etcd, without the library that brought it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """How far etcd was when it answered. Both only grow, unless its records went back to an earlier state."""

    revision: int
    raft_term: int


@dataclass(frozen=True, slots=True)
class Record:
    """A key and what it has; `value` is None in the event of a deletion."""

    key: str
    value: bytes | None
    revision: int
    """Of its last change."""
