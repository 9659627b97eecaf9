"""Deleting the oldest blocks of a tier, in batches of one transaction each.

INVARIANT: ledger and environment hold the same keys after each batch, also when one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cachefs import errors
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
) -> None:
    """Delete the oldest blocks until `want` bytes are free. Under the tier's lock.

    `punch` gets where they lay in the file, while nobody can have used that place again; `count` how many are gone.
    Raises TierUnavailable (also when only pinned blocks are left), CorruptBlock.
    """
    target = max(ledger.used_bytes - want, 0)
    while ledger.used_bytes > target and len(ledger):
        victims = _take_victims(env, ledger, ledger.used_bytes - target, even_pinned=punch is not None)
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


def _take_victims(env: BlockEnvironment, ledger: Ledger, want: int, *, even_pinned: bool) -> dict[BlockKey, int]:
    """`even_pinned`: others need the room of the tier."""
    victims: dict[BlockKey, int] = {}
    while want > 0 and len(victims) < EVICT_BLOCKS:
        key = ledger.take_victim(even_pinned=even_pinned)
        if key is None:
            break
        length = env.length(key)
        if length is None:
            raise errors.CorruptBlock("a block that should be in its index is not")
        victims[key] = length
        want -= value_cost(length)
    return victims
