"""How many bytes of each volume the tiers hold, from the notes beside the blocks (`cachefs.block.holdings`).

For those who choose a node by what it has (`cachefs schedule`, labels of nodes): about right, a minute old, and cheap.
Nothing is kept up to date for it on the way of a block. A tier with up to `EXACT_BLOCKS` is counted; of a larger one
runs of blocks are looked at in random places, which is a fair sample since keys are hashes, and what they say is
extrapolated. A block that is in both tiers counts once.

Never raises for a tier's sake: what cannot be read now is not counted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from cachefs.block.holdings import NOBODY
from cachefs.types import BlockKey

EXACT_BLOCKS = 1 << 16
PAGE_BLOCKS = 1024
RUNS, RUN_BLOCKS = 512, 64
KEY_BYTES = 20
PAUSE_S = 0.001
"""After each page: other threads of the agent have readers who wait."""


class Counted(Protocol):
    """A tier, as far as it is needed here."""

    def owned_after(self, after: bytes, count: int) -> list[tuple[BlockKey, int, int]]:
        """Return up to `count` blocks behind a key: key, owner, bytes."""
        ...

    def stats(self) -> dict[str, object]:
        """Return `blocks` and `used_bytes`."""
        ...

    def __contains__(self, key: object) -> bool: ...


def count_holdings(shm: Counted | None, disk: Counted | None) -> dict[int, int]:
    """Return the bytes that each owner has in both tiers together. BLOCKS for some tenths of a second at most."""
    held: Counter[int] = Counter()
    if disk is not None:
        held.update(_count(disk, lambda key: False))
    if shm is not None:
        held.update(_count(shm, (lambda key: False) if disk is None else disk.__contains__))
    return {owner: size for owner, size in held.items() if owner != NOBODY and size > 0}


def _count(tier: Counted, is_elsewhere: Callable[[BlockKey], bool]) -> dict[int, int]:
    blocks, used = tier.stats()["blocks"], tier.stats()["used_bytes"]
    assert isinstance(blocks, int)
    assert isinstance(used, int)
    if blocks <= EXACT_BLOCKS:
        return _count_all(tier, is_elsewhere)
    seen: Counter[int] = Counter()
    seen_bytes = 0
    for _ in range(RUNS):
        run = tier.owned_after(random.randbytes(KEY_BYTES), RUN_BLOCKS)
        seen_bytes += sum(size for _, _, size in run)
        _add(seen, run, is_elsewhere)
        time.sleep(PAUSE_S)
    return {owner: size * used // seen_bytes for owner, size in seen.items()} if seen_bytes else {}


def _count_all(tier: Counted, is_elsewhere: Callable[[BlockKey], bool]) -> dict[int, int]:
    counted: Counter[int] = Counter()
    place = b""
    while True:
        page = tier.owned_after(place, PAGE_BLOCKS)
        _add(counted, page, is_elsewhere)
        if len(page) < PAGE_BLOCKS:
            return counted
        place = bytes(page[-1][0])
        time.sleep(PAUSE_S)


def _add(counted: Counter[int], run: list[tuple[BlockKey, int, int]], is_elsewhere: Callable[[BlockKey], bool]) -> None:
    for key, owner, size in run:
        if not is_elsewhere(key):
            counted[owner] += size
