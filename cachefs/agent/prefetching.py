"""Plugs the prefetcher into the agent: names from the metadata, bytes through the block cache, listings by the lister.

    Begun (workers) --> Prefetching.note --> VolumePrefetch of the volume --pump--> BlockCache.prefetch
                                                     |  ^                                 |
                              listings in tasks <----+  +--------- done ------------------+

All of it runs in the trio thread. `run` pumps when something happened, and once for all that happened at once; while
nobody reads, nothing runs. What goes wrong here is never a reader's: it is logged, and nothing is brought ahead.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from cachefs import errors
from cachefs.agent.volumes import Volume
from cachefs.block.block_cache import BlockCache
from cachefs.metrics import Counters
from cachefs.prefetch.plan import Plan
from cachefs.prefetch.ports import Entry, Listed, Outcome, Piece, Tree
from cachefs.prefetch.scheduler import Scheduler, Space, VolumePrefetch
from cachefs.types import ROOT_INO, BlockKey, FileKind, Ino, ObjectId, ObjectVersion, block_key
from metadata.names import sort_key

log = logging.getLogger(__name__)

ORDERED_SHARE = 0.1
"""Of the nearest tier: what readers in an order may have ahead of them. Policies keep an eighth for that: if it were
more, what is read next would leave."""
FREE_SHARE = 0.75
"""Of what is free in it: what a shuffled epoch may have."""
LOOK_S = 0.25
"""How long figures of the tiers are used."""
LISTINGS = 8
"""Listings ahead at a time, of all volumes."""
PARENTS_KEPT = 4096
UNLIMITED = 1 << 62
FORGET_S = 60.0
"""After so long without a mount, what was learned of a volume is forgotten."""


class KnownNames:
    """Implements `cachefs.prefetch.ports.Tree` with the metadata of a volume."""

    def __init__(self, volume: Volume, block_size: int) -> None:
        self._volume = volume
        self._reader = volume.writer.reader
        self._block_size = block_size
        self._parents: dict[Ino, tuple[Ino, bytes]] = {}
        """Of directories: an inode number never means another one."""

    def parent(self, ino: Ino) -> tuple[Ino, bytes] | None:
        """See `Tree.parent`."""
        known = self._parents.get(ino)
        if known is not None or ino == ROOT_INO:
            return known
        try:
            inode = self._reader.inode(ino)
        except errors.CachefsError:
            return None
        if inode is None:
            return None
        if inode.kind is FileKind.DIRECTORY:
            if len(self._parents) >= PARENTS_KEPT:
                self._parents.clear()
            self._parents[ino] = (inode.parent, inode.name)
        return inode.parent, inode.name

    def listed(self, directory: Ino) -> Listed | None:
        """See `Tree.listed`."""
        try:
            known = self._reader.directory(directory)
        except errors.CachefsError:
            return None
        if known is None:
            return None
        freshness = self._volume.freshness
        fresh = freshness.strict or freshness.listing(known, time.time_ns()) is not None
        return Listed(known.generation, known.complete, fresh)

    def entries(self, directory: Ino, after: bytes, count: int) -> list[Entry]:
        """See `Tree.entries`."""
        try:
            found = self._reader.entries_behind(directory, after, count)
        except errors.CachefsError:
            return []
        return [Entry(dentry.ino, sort_key(dentry.name, dentry.kind)) for dentry in found]

    def file(self, directory: Ino, name: bytes) -> Ino | None:
        """See `Tree.file`."""
        try:
            dentry = self._reader.dentry(directory, name)
        except errors.CachefsError:
            return None
        return dentry.ino if dentry is not None and dentry.kind is FileKind.FILE else None

    def version(self, ino: Ino) -> tuple[ObjectId, ObjectVersion] | None:
        """See `Tree.version`."""
        try:
            file = self._volume.file(ino, self._block_size)
        except errors.CachefsError:
            return None
        return file.oid, file.version


class Blocks:
    """Implements `cachefs.prefetch.ports.Fetches` with the block cache and the source of a volume."""

    def __init__(self, cache: BlockCache, volume: Volume) -> None:
        self._cache = cache
        self._volume = volume

    def prefetch(self, pieces: Sequence[Piece], done: Callable[[Sequence[tuple[Piece, Outcome]]], None]) -> None:
        """See `Fetches.prefetch`."""
        self._cache.prefetch(pieces, self._volume.blocks_from, done)

    def holds(self, oid: ObjectId, block: int) -> bool:
        """See `Fetches.holds`."""
        return self._cache.has(block_key(oid, block)) is not None


class Prefetching:
    """The prefetcher of one agent."""

    def __init__(self, cache: BlockCache, counters: Counters, nursery: trio.Nursery) -> None:
        self._cache = cache
        self._counters = counters
        self._nursery = nursery
        self._scheduler = Scheduler(self._space)
        self._volumes: dict[Volume, VolumePrefetch] = {}
        self._news = trio.Event()
        self._left_at: dict[Volume, float] = {}
        """Volumes that nothing is mounted of, and since when."""
        self._listings = 0
        """Listings and look-ups of names that are under way."""
        self._given_up = False
        self._known_space = Space(0, 0)
        self._looked_at = -LOOK_S

    def note(self, volume: Volume, begun: Sequence[tuple[int, int]]) -> None:
        """Readers of a volume began these files: (inode number, block). Never raises."""
        if self._given_up:
            return
        try:
            prefetch = self._of(volume)
            prefetch.note(begun)
            if prefetch.planner.plan is not None:
                self._cache.reorder(_blocks_of(prefetch.tree, begun))
        except Exception as error:  # noqa: BLE001 - readers do without it
            self._give_up(error)
        self._wake()

    def follow(self, volume: Volume, plan: Plan | None) -> None:
        """Bring ahead what a plan says, from now on (None: what can be guessed)."""
        if not self._given_up:
            self._of(volume).planner.plan = plan
            self._wake()

    def _of(self, volume: Volume) -> VolumePrefetch:
        prefetch = self._volumes.get(volume)
        if prefetch is None:
            names = KnownNames(volume, self._cache.block_size)
            prefetch = VolumePrefetch(names, Blocks(self._cache, volume), self._cache.block_size, self._counters)
            prefetch.on_over = self._wake
            prefetch.on_gone = functools.partial(self._gone, volume)
            prefetch.own_space = functools.partial(self._quota_space, volume)
            self._volumes[volume] = prefetch
            self._scheduler.volumes.append(prefetch)
        return prefetch

    def _wake(self) -> None:
        self._news.set()

    async def run(self) -> None:
        """Bring ahead what is wanted, for ever."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            try:
                self._forget_unmounted()
                if self._scheduler.pump(time.monotonic()):
                    self._wake()
                self._begin_listings()
            except Exception as error:  # noqa: BLE001 - as above
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Something is wrong with the prefetcher: readers do without it, until the next agent."""
        log.error("prefetching failed: nothing is fetched ahead until the agent starts again", exc_info=error)
        self._given_up = True
        for volume in list(self._volumes):
            self._forget(volume)

    def _forget_unmounted(self) -> None:
        """A worker that was killed is back in a moment, and goes on."""
        now = time.monotonic()
        for volume in list(self._volumes):
            if volume.mounts:
                self._left_at.pop(volume, None)
            elif now - self._left_at.setdefault(volume, now) > FORGET_S:
                self._forget(volume)

    def _forget(self, volume: Volume) -> None:
        prefetch = self._volumes.pop(volume)
        self._left_at.pop(volume, None)
        prefetch.outstanding.give_up()
        self._scheduler.volumes.remove(prefetch)

    def _space(self) -> Space:
        """Return how much of the nearest tier may be filled ahead."""
        now = time.monotonic()
        if now - self._looked_at > LOOK_S:
            tiers = self._cache.stats()
            nearest = tiers["shm"] if tiers["shm"]["state"] != "off" else tiers["disk"]
            limit, used = nearest["usable_bytes"], nearest["used_bytes"]
            if nearest["state"] == "full":
                limit = used  # it takes no more than it has
            far = tiers["disk"] if nearest is tiers["shm"] else None
            self._known_space = Space(
                int(ORDERED_SHARE * limit), int(FREE_SHARE * max(0, limit - used)), _free_behind(far, used)
            )
            self._looked_at = now
        return self._known_space

    def _quota_space(self, volume: Volume) -> Space | None:
        """Return how much of its quotas a volume may fill ahead; None where it has none."""
        limits = self._cache.limits_of(volume.owner)
        quotas = [
            (limit["quota_bytes"], limit["used_bytes"] or 0) if limit["quota_bytes"] else (UNLIMITED, 0)
            for limit in limits.values()
        ]
        if all(quota == UNLIMITED for quota, _ in quotas):
            return None
        free = [int(FREE_SHARE * max(0, quota - used)) for quota, used in quotas]
        return Space(int(ORDERED_SHARE * quotas[0][0]), free[0], free[-1])

    # -- names ---------------------------------------------------------------------------------------------------------

    def _begin_listings(self) -> None:
        for volume, prefetch in self._volumes.items():
            while self._listings < LISTINGS and (directory := prefetch.planner.take_listing()) is not None:
                self._listings += 1
                self._nursery.start_soon(self._list, volume, directory)

    def _gone(self, volume: Volume, ino: Ino) -> None:
        """A file is not what its name says: find out what it is before a reader comes to it."""
        if self._listings < LISTINGS:
            self._listings += 1
            self._nursery.start_soon(self._ask_again, volume, ino)

    async def _ask_again(self, volume: Volume, ino: Ino) -> None:
        try:
            await volume.ask_again(ino)
        finally:
            self._listings -= 1
            self._wake()

    async def _list(self, volume: Volume, directory: Ino) -> None:
        """Have a directory listed before a reader comes to it."""
        try:
            await volume.lister.list_directory(directory, None)
        except errors.CachefsError as error:
            log.debug("listing directory %d of %s ahead: %s", directory, volume.source, error)
        finally:
            self._listings -= 1
            self._wake()


def _blocks_of(tree: Tree, begun: Sequence[tuple[int, int]]) -> list[BlockKey]:
    versions = ((tree.version(Ino(ino)), block) for ino, block in begun)
    return [block_key(version[0], block) for version, block in versions if version is not None]


def _free_behind(far: Mapping[str, Any] | None, near_bytes: int) -> int:
    """Return how much of the tier behind the nearest one is free, when all of that one will go there as well."""
    if far is None or far["state"] != "on":
        return 0
    return max(0, int(FREE_SHARE * (far["usable_bytes"] - far["used_bytes"])) - near_bytes)
