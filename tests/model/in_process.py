"""FileSystem and the agent's parts in one process: everything that is real except the socket and the kernel.

Block cache, LMDB tiers, metadata environment, resolver and lister are those of the agent; the store is in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import trio

from cachefs import errors
from cachefs.agent.volumes import CurrentStore, Sources, Volume
from cachefs.block.block_cache import BlockCache, Priority
from cachefs.block.lmdb_tier import TierWriter
from cachefs.block.tier_reader import TierReader
from cachefs.config import FuseConfig, MetadataConfig
from cachefs.metrics import Counters
from cachefs.store.memory import MemoryStore
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.types import BlockKey, Consistency, Ino, Tier
from cachefs.vfs.attributes import AttributeRules
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.ports import FilledBlock, ListingProgress, Resolution
from cachefs.vfs.reading import ReadPath
from metadata.freshness import Freshness
from metadata.store import MetadataWriter
from metadata.volume import VolumeIdentity

T = TypeVar("T")
BLOCK = 64 << 10
SHM_BYTES = 1 << 20
DISK_BYTES = 2 << 20
"""So small that blocks are evicted all the time."""


@dataclass
class InProcessAgent:
    """Answers as the agent's server does, without a socket between."""

    volume: Volume
    cache: BlockCache

    async def resolve(self, parent: Ino, name: bytes) -> Resolution:
        """See `AgentPort.resolve`."""
        found = await self.volume.resolver.resolve(parent, name)
        return Resolution(found.ino, found.valid_s)

    async def list_directory(self, ino: Ino, seen: bytes | None) -> ListingProgress:
        """See `AgentPort.list_directory`."""
        progress = await self.volume.lister.list_directory(ino, seen)
        return ListingProgress(progress.complete, progress.frontier, progress.valid_s)

    async def fill(self, ino: Ino, first: int, count: int, *, inline: bool = False) -> list[FilledBlock]:
        """See `AgentPort.fill`."""
        file = self.volume.file(ino, BLOCK)
        blocks = await self.cache.fill(
            file.oid, file.version, self.volume.store, first, min(count, file.blocks - first), inline=inline
        )
        return [FilledBlock(block.index, block.source, block.payload) for block in blocks]

    def request_fill(
        self, ino: Ino, first: int, count: int, answer: Callable[[list[FilledBlock] | errors.CachefsError], None]
    ) -> bool:
        """See `AgentPort.request_fill`."""
        return False

    async def fetch_range(self, ino: Ino, offset: int, length: int, *, fresh: bool = False) -> bytes:
        """See `AgentPort.fetch_range`."""
        file = self.volume.file(ino, BLOCK)
        store = self.volume.store
        return bytes(await self.cache.read_range(file.oid, file.version, store, store, offset, length, fresh))

    def request_range(
        self,
        ino: Ino,
        offset: int,
        length: int,
        answer: Callable[[bytes | errors.CachefsError], None],
        *,
        fresh: bool = False,
    ) -> bool:
        """See `AgentPort.request_range`."""
        return False

    def range_ahead(self, ino: Ino, offset: int, length: int) -> None:
        """See `AgentPort.range_ahead`."""
        file = self.volume.file(ino, BLOCK)
        self.cache.ranges.ahead(file.oid, file.version, self.volume.store, offset, length)

    def readahead(self, ino: Ino, first: int, count: int) -> None:
        """See `AgentPort.readahead`."""
        file = self.volume.file(ino, BLOCK)
        count = max(0, min(count, file.blocks - first))
        start = self.cache.start
        start(
            file.oid, file.version, self.volume.store, first, count, lambda outcome: None, priority=Priority.READAHEAD
        )

    async def cached(self, ino: Ino) -> dict[Tier, int]:
        """See `AgentPort.cached`."""
        file = self.volume.file(ino, BLOCK)
        return self.cache.count_cached(file.oid, file.blocks)


class TierView:
    """The shm tier as a worker reads it; LMDB cannot be opened a second time in one process."""

    def __init__(self, tier: TierWriter) -> None:
        self._tier = tier

    @contextmanager
    def snapshot(self) -> Any:
        """See `TierReader.snapshot`."""
        yield self

    def get(self, key: bytes) -> memoryview | None:
        """See `Snapshot.get`."""
        value = self._tier.read(BlockKey(key))
        return None if value is None else memoryview(value)

    def refresh(self) -> bool:
        """See `TierReader.refresh`."""
        return False


@asynccontextmanager
async def open_filesystem(directory: Path, store: MemoryStore, consistency: Consistency) -> AsyncIterator[FileSystem]:
    """All of cachefs on `directory`; opened again on the same one, it goes on where it was."""
    counters = Counters()
    threads = trio.CapacityLimiter(8)

    async def run_blocking(function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=threads)

    rules = MetadataConfig(consistency=consistency)
    shm = TierWriter(str(directory / "shm"), Tier.SHM, limit_bytes=SHM_BYTES, block_size=BLOCK, counters=counters)
    disk = TierWriter(str(directory / "disk"), Tier.DISK, limit_bytes=DISK_BYTES, block_size=BLOCK, counters=counters)
    current = CurrentStore(RetryingStore(store, RetryPolicy(deadline_s=5), max_requests=8))
    writer = MetadataWriter(str(directory / "names"), VolumeIdentity(store.endpoint, store.bucket, ""))
    try:
        async with (
            BlockCache(shm, disk, block_size=BLOCK, memory_limit_bytes=256 << 20, counters=counters) as cache,
            trio.open_nursery() as nursery,
        ):
            volume = Volume(
                "v",
                "memory://",
                "",
                current,
                writer,
                Freshness(rules),
                run_blocking,
                nursery,
                lambda: Sources(current),
            )
            blocks = cast("TierReader", TierView(shm))
            reads = ReadPath(writer.reader, blocks, store.endpoint, store.bucket, BLOCK)
            attributes = AttributeRules.create(FuseConfig(), 0, 0)
            yield FileSystem(reads, InProcessAgent(volume, cache), Freshness(rules), attributes)
            nursery.cancel_scope.cancel()
    finally:
        writer.sync_and_mark()
        writer.close()
        shm.close()
        disk.close()
