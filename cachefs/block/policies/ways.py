"""The ways in which the queues of `cachefs.block.policies.segments` can be run, the number of a block, and the limits.

A block is one whole number, from the lowest bit: its queue and how often it was read, its size, and above `STAMP_SHIFT`
when it was read last.
"""

from __future__ import annotations

import enum

MAIN = 1
READ, READ_MOST, READS = 1 << 1, 3 << 1, 3 << 1
AHEAD = 1 << 3
SAMPLED = 1 << 4
"""It may be of a sample that somebody watches. Segments only keep it."""
SIZE_SHIFT, STAMP_SHIFT = 5, 24
SIZE_MASK = (1 << STAMP_SHIFT - SIZE_SHIFT) - 1
LOW = (1 << STAMP_SHIFT) - 1
UNIT_SHIFT = 7
"""Sizes are kept in units of 128 bytes."""

RESERVED = 4096
"""Room that was needed for what is brought ahead is given up again by one part of so many at a time,
in a small tier sooner."""
AWAITED = 4
"""For how many reads one waits for its reader at least, in times of the blocks of the tier."""
MOST_STEPS = 128
TURNS = 8
"""How many blocks of the main part get another round for each block that leaves a stable tier."""
SOON = 8
"""A newcomer to a stable tier came back soon when fewer than one part in so many of its blocks left meanwhile."""
CALM = 8
"""How many newcomers leave a stable tier for one look at its main part."""
APART = 32
"""Reads of a block with fewer reads of others between them are one read: a block is read in several requests."""
TWICE = 2 << 1
AHEAD_PART = 8
"""One part of so many of a tier may wait for its readers: for that others leave, as for any block that comes."""


class Way(enum.Enum):
    """How the queues are run."""

    STABLE = enum.auto()
    RECENT = enum.auto()
    LATEST = enum.auto()


NEWCOMERS = {Way.STABLE: 50, Way.RECENT: 10, Way.LATEST: 50}
"""One part of so many is for newcomers."""
