"""The orders in which epochs read their files, the same for the same seed, and what the best cache would hit."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from bench.policies.replay import optimum
from bench.policies.traces import Trace
from cachefs.types import ObjectId, block_key

Order = list[tuple[str, int]]
"""Paths and the numbers of their sums."""


def listed(paths: Sequence[str]) -> Order:
    """The order of the listing."""
    return [(path, number) for number, path in enumerate(paths)]


def shuffled(paths: Sequence[str], seed: int) -> Order:
    """Every file once, in the order of a seed."""
    return random.Random(seed).sample(listed(paths), len(paths))


def write(order: Order, path: Path) -> str:
    """Keep an order where `bench.epochs.reader` finds it; return its path."""
    path.write_text(json.dumps(order))
    return str(path)


def best_shares(orders: Sequence[Order], file_bytes: int, cache_bytes: int) -> tuple[float, ...]:
    """Return the share of each epoch's reads that Belady's policy would hit, with a cache of so many bytes."""
    numbers = sorted({number for order in orders for _, number in order})
    keys = {number: block_key(ObjectId(number.to_bytes(16, "big")), 0) for number in numbers}
    reads = [keys[number] for order in orders for _, number in order]
    ends, at = [], 0
    for order in orders:
        at += len(order)
        ends.append(at)
    trace = Trace("bench", "", reads, cache_bytes, dict.fromkeys(keys.values(), file_bytes), tuple(ends))
    return optimum(trace).hits
