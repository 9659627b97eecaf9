"""What `cachefs status` says of the tiers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cachefs.block.lmdb_tier import TierWriter
from cachefs.metrics import Counters
from cachefs.types import Tier


def describe_tiers(tiers: Iterable[tuple[Tier, TierWriter | None]], counters: Counters) -> dict[str, dict[str, Any]]:
    """Return state, used_bytes, limit_bytes, blocks and counts of each tier by its name, also of one that is off."""
    described: dict[str, dict[str, Any]] = {}
    for name, tier in tiers:
        off = {"state": "off", "used_bytes": 0, "limit_bytes": 0, "usable_bytes": 0, "blocks": 0}
        state = off if tier is None else tier.stats()
        for count in ("hits", "misses", "evictions", "corrupt", "faults"):
            state[count] = counters.get(f"{name}_{count}")
        described[str(name)] = state
    return described
