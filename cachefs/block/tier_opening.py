"""Opening a tier's directory: take over what can be trusted, take away what cannot, begin anew.

LMDB trusts what it maps, so everything is looked at before: the meta pages, the stamp of the last user, and, when
the last two users died in it or somebody else wrote to it, the structure of its trees. One warning says what was
done. An environment that is larger than the limit now is becomes the *former* one of a new environment (shm: it is
removed).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import NamedTuple

from cachefs import errors
from cachefs.block import tier_files
from cachefs.block.codec import Bytes
from cachefs.block.ledger import PAGE_SIZE, Ledger, value_cost
from cachefs.block.lmdb_env import BlockEnvironment, stored_block_size
from cachefs.types import BlockKey, Tier

log = logging.getLogger(__name__)

ANY_SIZE = 1 << 40
LEAST_BLOCKS = 16
"""A tier with room for fewer is of no use (`cachefs.cli.load` refuses it)."""
TAKE_OVER_S = 20.0


class Opened(NamedTuple):
    """An environment that can be used. `former`, if any, is to be copied from, closed and removed."""

    env: BlockEnvironment
    ledger: Ledger
    former: BlockEnvironment | None


def open_tier(
    directory: str,
    tier: Tier,
    *,
    map_size: int,
    block_size: int,
    new_ledger: Callable[[], Ledger],
    unusable: str,
) -> Opened:
    """Open the environment in `directory`, or begin one. `unusable` says why the one that is there must not be trusted.

    Raises: TierUnavailable when the directory cannot be written.
    """
    for last in (False, True):
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            _remove_leftovers(directory, tier)
            oversized = _inspect(directory, map_size, unusable)
            if oversized and tier is Tier.SHM:
                raise errors.CorruptBlock("it is larger than the limit now is")
            former = _make_former(directory, block_size) if oversized else None
            env, ledger = _attach(directory, tier, map_size, block_size, new_ledger)
            return Opened(env, ledger, former)
        except errors.CorruptBlock as flaw:
            if last:
                raise errors.TierUnavailable(f"{directory} cannot be used: {flaw}") from flaw
            _discard(directory, tier, str(flaw))
            unusable = ""
        except OSError as error:
            raise errors.TierUnavailable(f"{directory} cannot be written: {error}") from error
    raise AssertionError("the second try returns or raises")


def settled_block_size(directory: str, wanted: int, limit_bytes: int) -> int:
    """Return the size of the blocks that `open_tier` would take over from `directory`, `wanted` when there are none.

    Blocks of another size than `wanted` are good blocks: a cache that was filled for hours is not thrown away for an
    option. They are not kept when the limit is too small for them.
    """
    try:
        meta = tier_files.read_meta(directory)
        if meta is None or _flaw(directory, meta):
            return wanted
        found = stored_block_size(directory)
    except (errors.CorruptBlock, errors.TierUnavailable, OSError):
        return wanted  # whoever opens it says why
    return found if found and found & (found - 1) == 0 and LEAST_BLOCKS * found <= limit_bytes else wanted


def _flaw(directory: str, meta: tier_files.Meta) -> str:
    """Return why LMDB must not map the file, "" when it may. Raises CorruptBlock."""
    if not tier_files.distrust(directory, meta, tier_files.Stamp.load(directory)):
        return ""
    return tier_files.structure_flaw(directory)


def _inspect(directory: str, map_size: int, unusable: str) -> bool:
    """Return whether the environment is larger than `map_size`. Raises CorruptBlock when it must not be mapped."""
    meta = tier_files.read_meta(directory)
    if meta is None:
        if unusable or os.path.lexists(os.path.join(directory, tier_files.LOCK_FILE)):
            # A lock file without its data file must go too: readers that are still there hold the old pair.
            raise errors.CorruptBlock(unusable or "its data file is gone or empty")
        return False
    flaw = unusable or _flaw(directory, meta)
    if flaw:
        raise errors.CorruptBlock(flaw)
    return max((meta.last_page + 1) * PAGE_SIZE, tier_files.allocated_bytes(directory)) > map_size + PAGE_SIZE


def _remove_leftovers(directory: str, tier: Tier) -> None:
    shutil.rmtree(f"{directory}{tier_files.FORMER_SUFFIX}", ignore_errors=True)
    if tier is Tier.DISK:
        tier_files.remove_leftovers(directory)


def _make_former(directory: str, block_size: int) -> BlockEnvironment:
    former = f"{directory}{tier_files.FORMER_SUFFIX}"
    os.rename(directory, former)
    os.makedirs(directory, mode=0o700)
    return BlockEnvironment(former, map_size=ANY_SIZE, writemap=False, block_size=block_size)


def _attach(
    directory: str, tier: Tier, map_size: int, block_size: int, new_ledger: Callable[[], Ledger]
) -> tuple[BlockEnvironment, Ledger]:
    tier_files.in_use().store(directory)
    env = BlockEnvironment(directory, map_size=map_size, writemap=tier is Tier.SHM, block_size=block_size)
    ledger = new_ledger()
    try:
        if ledger.lanes:
            for key, length, owner in env.scan_with_owners():
                ledger.adopt(key, length, owner)
        else:
            for key, length in env.scan():
                ledger.adopt(key, length)
    except BaseException:
        env.close()
        raise
    return env, ledger


def _discard(directory: str, tier: Tier, flaw: str) -> None:
    try:
        if tier is Tier.DISK:
            done = tier_files.take_away(directory)
        else:  # beside it is a place for all, and what would be kept there is memory
            tier_files.remove(directory)
            done = "removed it"
    except OSError as error:
        raise errors.TierUnavailable(f"{directory} can neither be used ({flaw}) nor moved: {error}") from error
    log.warning("the %s tier in %s cannot be used (%s): %s and began anew", tier, directory, flaw, done)


def take_over(
    former: BlockEnvironment,
    put_value: Callable[[BlockKey, Bytes, int], None],
    room: Callable[[], int],
) -> None:
    """Copy what fits from an environment that is larger than the limit now is, for a bounded time; remove it.

    `put_value` gets each block with its value and owner.
    """
    deadline = time.monotonic() + TAKE_OVER_S
    try:
        for key, length in former.scan():
            if value_cost(length) > room() or time.monotonic() > deadline:
                break
            value = former.read(key)
            if value is not None:
                put_value(key, value, former.owner(key))
    except (errors.CorruptBlock, errors.TierUnavailable) as error:
        log.info("the rest of %s is given up: %s", former.directory, error)
    former.close()
    shutil.rmtree(former.directory, ignore_errors=True)
