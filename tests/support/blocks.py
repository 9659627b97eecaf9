"""Tiers and blocks for the tests of the block cache; also imported by the processes that they start and kill."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from cachefs.block import codec
from cachefs.block.codec import Bytes
from cachefs.block.lmdb_tier import Demotion, TierWriter
from cachefs.metrics import Counters
from cachefs.types import BlockKey, ObjectId, Tier, block_key

KIB, MIB = 1 << 10, 1 << 20
OID = ObjectId(b"object version 0")
BLOCK = 64 * KIB


def key(index: int) -> BlockKey:
    return block_key(OID, index)


def payload(index: int, size: int = BLOCK) -> bytes:
    return random.Random(index * 7919 + size).randbytes(size)


def open_tier(directory: Path | str, tier: Tier = Tier.DISK, limit: int = 4 * MIB, block: int = BLOCK) -> TierWriter:
    return TierWriter(str(directory), tier, limit_bytes=limit, block_size=block, counters=Counters())


def contents(tier: TierWriter, index: int) -> bytes | None:
    value = tier.read(key(index))
    return None if value is None else bytes(memoryview(value)[codec.HEADER_SIZE :])


def put(
    tier: TierWriter, blocks: Iterable[tuple[BlockKey, Bytes]], demote: Demotion | None = None, *, ahead: bool = False
) -> None:
    """Commit payloads, as a fill does; `ahead`: as prefetch does."""
    tier.put_values([(name, codec.encode(body, name)) for name, body in blocks], demote, ahead=ahead)
