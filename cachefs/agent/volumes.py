"""Volumes: a bucket (or a prefix of it) as the agent serves it to one or more mounts.

Mounts with the same endpoint, identity (`s3.identity`), bucket, prefix, manifest and freshness rules share one volume:
one metadata environment, one listing, one set of inode numbers. The credentials are those of the newest mount, which
has passed its check: mounting again with new keys renews those of a running volume, and after a restart of the agent it
does not matter whose worker comes back first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio
import xxhash

from cachefs import errors
from cachefs.agent.current_store import CurrentStore
from cachefs.agent.limits import owner_number
from cachefs.block.holdings import NOBODY
from cachefs.block.ports import BlockSource
from cachefs.config import CacheConfig, MetadataConfig, PeerConfig, S3Config, from_plain
from cachefs.store.open import open_store, parse_source
from cachefs.store.retry import RetryingStore
from cachefs.types import Consistency, FileKind, Ino, ObjectId, ObjectVersion, block_count, object_id
from metadata import custody, disuse
from metadata.freshness import Freshness
from metadata.listing import Lister, PageSource
from metadata.moving import Places
from metadata.resolver import Resolver
from metadata.room import AHEAD, MakeRoom, MetadataFull
from metadata.store import MetadataWriter
from metadata.volume import VolumeIdentity

__all__ = ["AttachedMount", "CurrentStore", "FileVersion", "MakeSources", "Sources", "Volume", "Volumes"]

log = logging.getLogger(__name__)

T = TypeVar("T")
RunBlocking = Callable[..., Awaitable[Any]]
RunInThreads = Callable[..., Awaitable[Any]]
"""As RunBlocking, with the CapacityLimiter of the volume first: one whose store hangs takes no thread from another."""
MAX_VERSIONS = 8192
MANIFESTS = "manifests"
"""The directory of the manifests that were brought here, beside that of all volumes."""
METADATA_THREADS = 48
"""Listings, HEADs and commits of one volume at a time; the store's own limiter decides how many of them really ask."""


@dataclass(frozen=True, slots=True)
class FileVersion:
    """What a fill needs to know of an inode."""

    version: ObjectVersion
    oid: ObjectId
    blocks: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a volume's blocks and listings come from: its store, or other nodes first."""

    blocks: BlockSource
    listings: PageSource | None = None
    """Other nodes, who may have a listing already."""
    listing_age_s: float = 0.0
    """How old a page of those listings may be."""


MakeSources = Callable[[CurrentStore, str, MetadataConfig], Sources]
"""Of a store, the prefix of the volume in it, and its rules."""


@dataclass(eq=False)
class AttachedMount:
    """One worker that is connected now."""

    mount_id: str
    mountpoint: str
    pid: int
    version: str
    protocol: int
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
        sources: Callable[[], Sources],
    ) -> None:
        self.owner = owner_number(store.endpoint, store.bucket, prefix)
        """How the tiers know it."""
        self.volume_id = volume_id
        self.source = source
        self.prefix = prefix
        self.store = store
        self.writer = writer
        self.freshness = freshness
        self._sources = sources
        self.lister = Lister(writer, store, prefix, freshness, run_blocking, nursery)
        self.renew_sources()
        self.resolver = Resolver(writer, store, prefix, freshness, run_blocking, self.lister)
        self.mounts: dict[int, AttachedMount] = {}
        self.mounted_at_s = 0.0
        """When the mount was made whose store settings are in use."""
        self._versions: dict[int, FileVersion] = {}

    def renew_sources(self) -> None:
        """Ask anew where blocks and listings come from: peers are there that were not. What is on its way stays so."""
        sources = self._sources()
        self.blocks_from = sources.blocks
        self.lister.borrow_from(sources.listings, sources.listing_age_s)

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

    async def ask_again(self, ino: Ino) -> None:
        """Find out what the name of a file is now whose version the store no longer has. Never raises."""
        try:
            await self.resolver.recheck(ino)
        except errors.CachefsError as error:
            log.info("what inode %d of %s is now cannot be found out: %s", ino, self.source, error)


class Volumes:
    """All volumes of this agent, opened when first attached."""

    def __init__(
        self,
        places: Places,
        cache: CacheConfig,
        run_blocking: RunInThreads,
        housework: RunBlocking,
        nursery: trio.Nursery,
        make_room: MakeRoom | None = None,
        peer: PeerConfig | None = None,
        make_sources: MakeSources | None = None,
    ) -> None:
        """`make_room` can give room back on the file system where metadata is at home; `make_sources` knows peers."""
        self._places = places
        self._make_room = make_room if places.at_home else None
        self._cache = cache
        self._peer = peer or PeerConfig()
        self._run_blocking = run_blocking
        self._housework = housework
        self._nursery = nursery
        self._make_sources = make_sources or (lambda store, prefix, rules: Sources(store))
        self._opening = trio.Lock()
        self._marked_at = time.monotonic()
        self._complaints: dict[str, str] = {}
        """What could not be settled, by volume."""
        self.handicaps: Callable[[], list[str]] = list
        """What this agent cannot do: to be said to whoever mounts."""
        self.by_id: dict[str, Volume] = {}
        self._owners: dict[object, int] = {}

    def owner_of(self, source: BlockSource) -> int:
        """Return the number of the volume whose blocks come from there (NOBODY: of none). Trio thread."""
        store = getattr(source, "store", source)  # peers stand before the store of a volume
        owner = self._owners.get(store)
        if owner is None:
            self._owners = {volume.store: volume.owner for volume in self.by_id.values()}
            owner = self._owners.get(store, NOBODY)
        return owner

    async def attach(
        self, plain: Mapping[str, Any], environment: Mapping[str, str], *, check: bool, mounted_at_s: float = 0.0
    ) -> Volume:
        """Return the volume that a mount describes, checked against the store if asked.

        Its settings win over those of mounts that were not made after `mounted_at_s`.

        Raises what `ObjectStore.check` raises, UsageError for a source that makes no sense.
        """
        s3: S3Config = from_plain(S3Config, plain["s3"])
        rules: MetadataConfig = from_plain(MetadataConfig, plain["metadata"])
        source = parse_source(s3.source)
        store: RetryingStore = await self._housework(self._open_store, s3, environment, rules, check, abandon=True)
        if check:
            try:
                await self._housework(store.check, source.prefix, abandon=True)
            except errors.CachefsError:
                store.close()  # a manifest is a map
                raise
        volume_id = _volume_id(store, source.prefix, rules)
        async with self._opening:
            volume = self.by_id.get(volume_id)
            if volume is not None and not volume.mounts and await self._housework(_is_gone, volume):
                log.warning("the metadata of %s was removed: it begins anew", s3.source)
                del self.by_id[volume_id]
                await self._housework(volume.writer.close)
                volume = None
            if volume is None:
                volume = await self._open(volume_id, s3.source, source.prefix, store, rules)
                volume.mounted_at_s = mounted_at_s
            elif mounted_at_s >= volume.mounted_at_s:  # equal: the same mount again, after an upgrade
                store.counters = volume.store.now.counters  # they belong to the volume, and only grow
                volume.store.now, volume.mounted_at_s = store, mounted_at_s
            return volume

    def _open_store(
        self, s3: S3Config, environment: Mapping[str, str], rules: MetadataConfig, check: bool
    ) -> RetryingStore:
        """Open the store that a mount describes; its manifest is brought here, if it has one. BLOCKS."""
        if not s3.manifest:
            return open_store(s3, environment)
        if rules.consistency is not Consistency.IMMUTABLE:
            raise errors.UsageError(f"a --manifest is immutable: it cannot be mounted with {rules.consistency}")
        from cachefs.store.manifest_store import open_pinned  # few need it, and readers may wait for an agent's start

        return open_pinned(s3, environment, self._places.in_use.parent / MANIFESTS, ask=check)

    async def _open(
        self, volume_id: str, source: str, prefix: str, store: RetryingStore, rules: MetadataConfig
    ) -> Volume:
        identity = VolumeIdentity(store.endpoint, store.bucket, prefix)
        path: str = await self._housework(self._places.settle, volume_id, identity)
        writer: MetadataWriter = await self._housework(self._open_writer, path, identity)
        disuse.mark_used(writer.path)
        run_blocking = functools.partial(self._run_blocking, trio.CapacityLimiter(METADATA_THREADS))
        current = CurrentStore(store)
        sources = functools.partial(self._make_sources, current, prefix, rules)
        volume = Volume(
            volume_id, source, prefix, current, writer, Freshness(rules), run_blocking, self._nursery, sources
        )
        self.by_id[volume_id] = volume
        log.info("volume %s opened (%s)", source, volume_id)
        return volume

    def _open_writer(self, path: str, identity: VolumeIdentity) -> MetadataWriter:
        """Open the metadata of a volume. On a full disk others give room back, or a new volume begins in the tmpfs.

        BLOCKS. Raises StorageUnavailable.
        """
        fresh = self._places.at_home and not custody.occupied(path)
        with contextlib.suppress(MetadataFull):
            return MetadataWriter(path, identity, make_room=self._make_room)
        if fresh:
            shutil.rmtree(path, ignore_errors=True)
        if self._make_room is not None:
            self._make_room(AHEAD)
        try:
            return MetadataWriter(path, identity, make_room=self._make_room)
        except MetadataFull:
            if not fresh:
                raise
        return MetadataWriter(self._places.begin_in_refuge(Path(path).name), identity)

    async def forget_unused(self) -> None:
        """Remove what nobody has used for a long time."""
        if not self._places.at_home:
            return
        found: dict[Path, float] = await self._housework(disuse.unused, self._places.home, time.time())
        for path, age_s in found.items():
            async with self._opening:  # who attaches at this moment finds it whole, or not at all
                gone = None if path.name in self.by_id else disuse.take_out(path)
            if gone is not None:
                await self._housework(disuse.remove, gone)
                log.info("removed metadata that nobody has used for %d days: %s", age_s // 86400, path)

    def notices(self, plain: Mapping[str, Any], given: Collection[str]) -> list[str]:
        """Return what a mount should know of this agent, and what it asked for (`given`) and does not get."""
        asked: CacheConfig = from_plain(CacheConfig, plain["cache"])
        said = self.handicaps()
        for name, words in (
            ("cache_size_bytes", "the running agent keeps --cache-size at {has} (asked: {asked})"),
            ("shm_size_bytes", "the running agent keeps --shm-size at {has} (asked: {asked})"),
            ("block_size_bytes", "blocks stay at {has}, because there are some already (--block-size asked: {asked})"),
            ("memory_limit_bytes", "the running agent keeps --memory-limit at {has} (asked: {asked})"),
        ):
            has, wanted = getattr(self._cache, name), getattr(asked, name)
            if name in given and has != wanted:
                said.append(words.format(has=_size(has), asked=_size(wanted)))
        asked_peer: PeerConfig = from_plain(PeerConfig, plain.get("peer", {}))
        for setting in dataclasses.fields(PeerConfig):
            if setting.name in given and getattr(asked_peer, setting.name) != getattr(self._peer, setting.name):
                has, option = getattr(self._peer, setting.name), setting.name.replace("_", "-")
                said.append(f"the running agent keeps --{option} at {has or 'nothing'}: end it to change that")
        return said

    def mounted(self) -> list[Volume]:
        """Return the volumes that are mounted now. Any thread."""
        return [volume for volume in list(self.by_id.values()) if volume.mounts]

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
        mark = time.monotonic() - self._marked_at > disuse.MARK_S
        for volume in list(self.by_id.values()):
            try:
                while volume.writer.purge(time.time_ns()):
                    pass
                volume.writer.sync_and_mark()
                self._complaints.pop(volume.volume_id, None)
            except errors.StorageUnavailable as error:
                if self._complaints.get(volume.volume_id) != str(error):  # once, not every minute
                    log.warning("housekeeping: %s", error)
                self._complaints[volume.volume_id] = str(error)
            if mark:
                disuse.mark_used(volume.writer.path)
        if mark:
            self._marked_at = time.monotonic()

    def close(self) -> None:
        """Bring every environment to disk, marked as clean, and give up all requests. BLOCKS."""
        for volume in self.by_id.values():
            volume.store.close()
            volume.writer.close()


def _is_gone(volume: Volume) -> bool:
    """Whether somebody has removed the files of a volume (the whole cache directory, most likely)."""
    return not custody.occupied(volume.writer.path)


def _size(count: int) -> str:
    """Return a size as people write it in options."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count and count % factor == 0:
            return f"{count // factor}{unit}"
    return str(count)


def _volume_id(store: RetryingStore, prefix: str, rules: MetadataConfig) -> str:
    ttl = "forever" if math.isinf(rules.metadata_ttl_s) else f"{rules.metadata_ttl_s}"
    parts = [store.endpoint, store.bucket, prefix, rules.consistency.value, ttl, f"{rules.negative_ttl_s}"]
    if store.view:
        parts.append(store.view)
    return xxhash.xxh3_64_hexdigest("\0".join(parts).encode("utf-8", "surrogateescape"))
