"""Deleting the oldest blocks of a tier, in batches of one transaction each.

INVARIANT: ledger and environment hold the same keys after each batch, also when one fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from cachefs import errors
from cachefs.block.holdings import Lane
from cachefs.block.ledger import Ledger, value_cost
from cachefs.block.lmdb_env import BlockEnvironment
from cachefs.types import BlockKey

Demotion = Callable[[Sequence[BlockKey]], None]
"""Called in the writing thread with the keys that are about to be evicted, while their bytes can still be read."""
EVICT_BLOCKS = 64


def evict(
    env: BlockEnvironment,
    ledger: Ledger,
    want: int,
    *,
    demote: Demotion | None,
    punch: Callable[[list[tuple[int, int]]], object] | None,
    count: Callable[[int], object],
    lane: Lane | None = None,
) -> None:
    """Delete the oldest blocks until `want` bytes are free, those of one volume with `lane`. Under the tier's lock.

    `punch` gets where they lay in the file, while nobody can have used that place again; `count` how many are gone.
    Raises TierUnavailable (also when only pinned blocks are left), CorruptBlock.
    """
    held = ledger if lane is None else lane
    target = max(held.used_bytes - want, 0)
    while held.used_bytes > target and len(held):
        take = (
            functools.partial(ledger.take_victim, even_pinned=punch is not None) if lane is None else lane.take_victim
        )
        victims = _take_victims(env, take, held.used_bytes - target)
        if not victims:
            raise errors.TierUnavailable("all that is left in it is pinned")
        try:
            if demote is not None:
                demote(list(victims))
            extents = [] if punch is None else env.extents(victims)
            gone = env.delete(list(victims))
        except BaseException:
            for key, length in victims.items():
                ledger.keep(key, length)
            raise
        for key, length in gone:
            ledger.gone(key, length)
        count(len(gone))
        if punch is not None:
            punch(extents)


def _take_victims(env: BlockEnvironment, take: Callable[[], BlockKey | None], want: int) -> dict[BlockKey, int]:
    victims: dict[BlockKey, int] = {}
    while want > 0 and len(victims) < EVICT_BLOCKS:
        key = take()
        if key is None:
            break
        length = env.length(key)
        if length is None:
            raise errors.CorruptBlock("a block that should be in its index is not")
        victims[key] = length
        want -= value_cost(length)
    return victims
