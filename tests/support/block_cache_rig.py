"""A block cache with real tiers and a source that can be held, slowed or made to fail."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.lowlevel

from cachefs.block import codec
from cachefs.block.block_cache import BlockCache, Filled, Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.errors import CachefsError
from cachefs.metrics import Counters
from cachefs.store.port import Orders, pieces_of
from cachefs.types import ObjectId, ObjectVersion, Tier, block_key, object_id

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB


class Source:
    """Objects made from their names; counts and can be held, slowed or made to fail."""

    def __init__(self, max_requests: int = 16) -> None:
        self.max_requests = max_requests
        self.spread = True
        self.calls: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.errors: dict[str, CachefsError] = {}
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    @staticmethod
    def content(version: ObjectVersion) -> bytes:
        return random.Random(f"{version.key}{version.etag}").randbytes(version.size)

    def route(self, version: ObjectVersion, start: int) -> Source:
        return self

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        length = sum(map(len, buffers))
        with self._lock:
            self.calls.append((version.key, start, length))
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            assert self.gate.wait(20)
            if self.error is not None:
                raise self.error
            for count in pieces_of(self.content(version)[start : start + length], buffers):
                yield count, Tier.ORIGIN
        finally:
            with self._lock:
                self.running -= 1

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """One after the other, each a call like any other; `error` is for all, `errors` for some keys."""
        for number, version in enumerate(versions):
            if not orders.begin(number):
                continue
            body = memoryview(bytearray(version.size))
            try:
                if version.key in self.errors:
                    raise self.errors[version.key]
                for _ in self.read_blocks(version, 0, [body]):
                    pass
            except CachefsError as error:
                orders.failed(number, error)
            else:
                orders.arrived(number, body, Tier.ORIGIN)


class Rig:
    """A block cache with its tiers and source."""

    def __init__(self, cache: BlockCache, shm: TierWriter | None, disk: TierWriter | None, counters: Counters) -> None:
        self.cache, self.shm, self.disk, self.counters = cache, shm, disk, counters
        self.source = Source()

    async def fill(
        self,
        version: ObjectVersion,
        first: int = 0,
        count: int = 1,
        *,
        inline: bool = False,
        priority: Priority = Priority.DEMAND,
    ) -> list[Filled]:
        return await self.cache.fill(oid(version), version, self.source, first, count, inline, priority)

    async def settled(self) -> None:
        """Wait until the jobs are over too: a reader goes on as soon as its block is there."""
        await eventually(lambda: self.cache.stats()["fills"]["under_way"] == 0)

    def stored(self, tier: TierWriter | None, version: ObjectVersion, index: int) -> bytes | None:
        value = None if tier is None else tier.read(block_key(oid(version), index))
        return None if value is None else bytes(memoryview(value)[codec.HEADER_SIZE :])


def oid(version: ObjectVersion) -> ObjectId:
    """The identity of a version's blocks."""
    return object_id("endpoint", "bucket", version)


def block(version: ObjectVersion, index: int) -> bytes:
    """The bytes of a block."""
    return Source.content(version)[index * BLOCK : (index + 1) * BLOCK]


def obj(name: str, blocks: float = 1) -> ObjectVersion:
    """An object of so many blocks."""
    return ObjectVersion(name, "etag", int(blocks * BLOCK))


@asynccontextmanager
async def opened(
    place: Path, *, shm: int = 8 * MIB, disk: int = 32 * MIB, memory: int = 256 * MIB, requests: int = 16
) -> AsyncIterator[Rig]:
    """A running block cache below `place`; a tier of 0 bytes is off."""
    counters = Counters()

    def tier(kind: Tier, limit: int) -> TierWriter | None:
        return (
            TierWriter(str(place / kind), kind, limit_bytes=limit, block_size=BLOCK, counters=counters)
            if limit
            else None
        )

    tiers = tier(Tier.SHM, shm), tier(Tier.DISK, disk)
    try:
        cache = BlockCache(*tiers, block_size=BLOCK, memory_limit_bytes=memory, counters=counters)
        async with cache:
            rig = Rig(cache, *tiers, counters)
            rig.source.max_requests = requests
            yield rig
    finally:
        for each in tiers:
            if each is not None:
                each.close()


async def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until something that threads bring about is true."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110 - threads change it
            await trio.sleep(0.005)
