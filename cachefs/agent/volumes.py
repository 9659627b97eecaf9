"""Volumes: a bucket (or a prefix of it) as the agent serves it to one or more mounts.

Mounts with the same endpoint, bucket, prefix and freshness rules share one volume: one metadata environment, one
listing, one set of inode numbers. The credentials are those of the mount that came last and passed its check, so
mounting again with new keys renews those of a running volume.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio
import xxhash

from cachefs import errors
from cachefs.config import CacheConfig, MetadataConfig, S3Config, from_plain
from cachefs.store.open import open_store, parse_source
from cachefs.store.port import ListPage, ObjectInfo, ObjectStore
from cachefs.store.retry import RetryingStore
from cachefs.types import FileKind, Ino, ObjectId, ObjectVersion, block_count, object_id
from metadata.freshness import Freshness
from metadata.listing import Lister
from metadata.resolver import Resolver
from metadata.store import MetadataWriter
from metadata.volume import VolumeIdentity

log = logging.getLogger(__name__)

T = TypeVar("T")
RunBlocking = Callable[..., Awaitable[Any]]
MAX_VERSIONS = 8192


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What a fill needs to know of an inode."""

    version: ObjectVersion
    oid: ObjectId
    blocks: int


class CurrentStore:
    """An ObjectStore that passes every call to the store with the newest credentials."""

    def __init__(self, store: RetryingStore) -> None:
        self.now = store

    @property
    def endpoint(self) -> str:
        """See `ObjectStore.endpoint`."""
        return self.now.endpoint

    @property
    def bucket(self) -> str:
        """See `ObjectStore.bucket`."""
        return self.now.bucket

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`."""
        self.now.check(prefix)

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self.now.get_range(version, start, length)

    def read_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `BlockSource.read_range`."""
        return self.now.get_range(version, start, length)

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        return self.now.head(key)

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""
        return self.now.list_page(prefix, delimiter=delimiter, token=token, limit=limit)

    def close(self) -> None:
        """See `ObjectStore.close`."""
        self.now.close()


@dataclass(eq=False)
class AttachedMount:
    """One worker that is connected now."""

    mount_id: str
    mountpoint: str
    pid: int
    counters: dict[str, float] = field(default_factory=dict)


class Volume:
    """One volume, from its first mount until the agent ends."""

    def __init__(
        self,
        volume_id: str,
        source: str,
        prefix: str,
        store: CurrentStore,
        writer: MetadataWriter,
        freshness: Freshness,
        run_blocking: RunBlocking,
        nursery: trio.Nursery,
    ) -> None:
        self.volume_id = volume_id
        self.source = source
        self.prefix = prefix
        self.store = store
        self.writer = writer
        self.lister = Lister(writer, store, prefix, freshness, run_blocking, nursery)
        self.resolver = Resolver(writer, store, prefix, freshness, run_blocking, self.lister)
        self.mounts: dict[int, AttachedMount] = {}
        self._versions: dict[int, FileVersion] = {}

    def file(self, ino: Ino, block_size: int) -> FileVersion:
        """Return the object version behind an inode. Raises StaleObject, IsADirectory."""
        known = self._versions.get(ino)
        if known is not None:
            return known
        inode = self.writer.reader.inode(ino)
        if inode is None:
            raise errors.StaleObject(f"inode {ino} is not known to volume {self.source}")
        if inode.kind is FileKind.DIRECTORY:
            raise errors.IsADirectory(f"inode {ino} is a directory")
        version = ObjectVersion(self.writer.reader.key_of(ino), inode.etag, inode.size)
        known = FileVersion(
            version, object_id(self.store.endpoint, self.store.bucket, version), block_count(inode.size, block_size)
        )
        if len(self._versions) >= MAX_VERSIONS:
            self._versions.clear()
        self._versions[ino] = known
        return known


class Volumes:
    """All volumes of this agent, opened when first attached."""

    def __init__(
        self,
        directory: str,
        cache: CacheConfig,
        run_blocking: RunBlocking,
        housework: RunBlocking,
        nursery: trio.Nursery,
    ) -> None:
        self._directory = directory
        self._cache = cache
        self._run_blocking = run_blocking
        self._housework = housework
        self._nursery = nursery
        self._opening = trio.Lock()
        self.by_id: dict[str, Volume] = {}

    async def attach(self, plain: Mapping[str, Any], environment: Mapping[str, str], *, check: bool) -> Volume:
        """Return the volume that a mount describes, checked against the store if asked.

        Raises what `ObjectStore.check` raises, UsageError for a source that makes no sense.
        """
        s3: S3Config = from_plain(S3Config, plain["s3"])
        rules: MetadataConfig = from_plain(MetadataConfig, plain["metadata"])
        source = parse_source(s3.source)
        store: RetryingStore = await self._housework(open_store, s3, environment)
        if check:
            await self._housework(store.check, source.prefix)
        volume_id = _volume_id(store, source.prefix, rules)
        async with self._opening:
            volume = self.by_id.get(volume_id)
            if volume is None:
                volume = await self._open(volume_id, s3.source, source.prefix, store, rules)
            elif check:
                volume.store.now = store
            return volume

    async def _open(
        self, volume_id: str, source: str, prefix: str, store: RetryingStore, rules: MetadataConfig
    ) -> Volume:
        path = Path(self._directory, volume_id)
        identity = VolumeIdentity(store.endpoint, store.bucket, prefix)
        writer: MetadataWriter = await self._housework(MetadataWriter, str(path), identity)
        volume = Volume(
            volume_id, source, prefix, CurrentStore(store), writer, Freshness(rules), self._run_blocking, self._nursery
        )
        self.by_id[volume_id] = volume
        log.info("volume %s opened (%s)", source, volume_id)
        return volume

    def notices(self, plain: Mapping[str, Any]) -> list[str]:
        """Return what a mount asked for and does not get, because this agent was started with other limits."""
        asked: CacheConfig = from_plain(CacheConfig, plain["cache"])
        return [
            f"the running agent keeps {option} at {getattr(self._cache, name)} (asked: {getattr(asked, name)})"
            for name, option in (
                ("cache_size_bytes", "--cache-size"),
                ("shm_size_bytes", "--shm-size"),
                ("block_size_bytes", "--block-size"),
                ("memory_limit_bytes", "--memory-limit"),
            )
            if getattr(asked, name) != getattr(self._cache, name)
        ]

    @property
    def mount_count(self) -> int:
        """How many workers are attached now."""
        return sum(len(volume.mounts) for volume in self.by_id.values())

    def sweep(self) -> None:
        """Free the reader slots of workers that were killed. BLOCKS."""
        for volume in list(self.by_id.values()):
            volume.writer.reader_check()

    def settle(self) -> None:
        """Forget inodes that vanished long ago, and bring what changed to disk. BLOCKS."""
        for volume in list(self.by_id.values()):
            while volume.writer.purge(time.time_ns()):
                pass
            volume.writer.sync_and_mark()

    def close(self) -> None:
        """Bring every environment to disk, marked as clean, and give up all requests. BLOCKS."""
        for volume in self.by_id.values():
            volume.store.close()
            volume.writer.close()


def _volume_id(store: ObjectStore, prefix: str, rules: MetadataConfig) -> str:
    ttl = "forever" if math.isinf(rules.metadata_ttl_s) else f"{rules.metadata_ttl_s}"
    parts = (store.endpoint, store.bucket, prefix, rules.consistency.value, ttl, f"{rules.negative_ttl_s}")
    return xxhash.xxh3_64_hexdigest("\0".join(parts).encode("utf-8", "surrogateescape"))
