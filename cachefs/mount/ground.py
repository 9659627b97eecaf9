"""What a worker stands on: the environments of an agent, opened from what the agent says of them. Everything BLOCKS.

The worker keeps its metadata environment and its block size for life; the tiers may come, go and begin anew.
"""

from __future__ import annotations

import logging

from cachefs import errors
from cachefs.agent import messages
from cachefs.block.disk_reader import DiskReader
from cachefs.block.tier_reader import TierReader
from cachefs.metrics import Counters
from cachefs.vfs.reading import ReadPath

log = logging.getLogger(__name__)


def of(attached: messages.Attached) -> tuple[int, str]:
    """Return what a worker cannot change once it reads: size of a block, directory of the metadata."""
    return attached.block_size, attached.metadata_path


def open_tier(attached: messages.Attached, counters: Counters) -> TierReader | None:
    """Open the shm tier; None (and one warning) when it is off or cannot be read."""
    if attached.shm_path is None:
        return None
    try:
        return TierReader(attached.shm_path, attached.block_size, counters)
    except errors.TierUnavailable as error:
        log.warning("the shm tier cannot be read: %s", error)
        return None


def open_disk(attached: messages.Attached, counters: Counters) -> DiskReader | None:
    """Open the disk tier; None when it is off or cannot be read: the agent reads it then."""
    if attached.disk_path is None:
        return None
    try:
        return DiskReader(attached.disk_path, attached.block_size, counters)
    except errors.TierUnavailable as error:
        log.debug("the disk tier cannot be read by this worker: %s", error)
        return None


def open_missing_tiers(reads: ReadPath, attached: messages.Attached, counters: Counters) -> None:
    """Open the tiers that could not be opened before: without a word while that stays so."""
    if reads.disk is None:
        reads.disk = open_disk(attached, counters)
    if reads.blocks is not None or attached.shm_path is None:
        return
    try:
        reads.blocks = TierReader(attached.shm_path, attached.block_size, counters)
    except errors.TierUnavailable as error:
        log.debug("the shm tier cannot be read yet: %s", error)
    else:
        log.info("the shm tier can be read again")


def follow(reads: ReadPath, attached: messages.Attached, counters: Counters) -> bool:
    """Open what is new since the last agent; returns whether there was anything."""
    fresh = reads.refresh()
    if reads.disk is None:
        reads.disk = open_disk(attached, counters)
    if attached.shm_path is None or (reads.blocks is not None and reads.blocks.directory == attached.shm_path):
        return fresh
    tier = open_tier(attached, counters)  # it was off, or elsewhere
    if tier is not None:
        reads.blocks = tier
    return fresh or tier is not None
