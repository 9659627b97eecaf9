"""The file system of one mount, without FUSE: names, attributes, listings, reads, extended attributes.

What is known and still valid is answered from the metadata store's memory map; everything else is asked of the agent,
which commits the answer before it replies. All state that outlives a call is in the agent's environments, so the next
worker goes on where this one stopped. Methods raise `cachefs.errors` only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from cachefs import errors
from cachefs.types import NAME_MAX, ROOT_INO, FileKind, Ino, Tier, block_count
from cachefs.vfs.attributes import FOREVER_S, AttributeRules, Attributes
from cachefs.vfs.failures import Failures
from cachefs.vfs.ports import AgentPort, FilledBlock, ListingProgress
from cachefs.vfs.ranges import RangeReads
from cachefs.vfs.reading import MAX_TOUCHED, FileView, NoTier, ReadPath
from cachefs.vfs.virtual import DIRECTORY as VIRTUAL_DIRECTORY
from cachefs.vfs.virtual import END as VIRTUAL_END
from cachefs.vfs.virtual import NAME as VIRTUAL_NAME
from cachefs.vfs.virtual import VirtualDirectory
from metadata.freshness import Absent, Freshness, Known
from metadata.records import Dentry, Directory

log = logging.getLogger(__name__)

XATTR_PREFIX = b"user.cachefs."
XATTRS = (b"user.cachefs.etag", b"user.cachefs.key", b"user.cachefs.cached")
READDIR_BATCH = 256
FILL_TRIES = 3
LISTING_TRIES = 3
"""How often "complete" is believed of a listing that we do not see: with an agent that writes to another environment
than the one that we read, asking on would be a loop without end.
"""
STRICT_DIRECTORY_S = 1.0
VIRTUAL_BYTES = 1 << 50
"""What statfs calls the size of a bucket, which has none: 1 PiB."""
VIRTUAL_FILES = 1 << 40


@dataclass(frozen=True, slots=True)
class Usage:
    """statfs(2) of the mount: bytes and objects that are known, below sizes that a bucket does not have."""

    block_size: int
    total_bytes: int
    free_bytes: int
    total_files: int
    free_files: int


class FileSystem:
    """One mount of one volume."""

    def __init__(
        self,
        reads: ReadPath,
        agent: AgentPort,
        freshness: Freshness,
        rules: AttributeRules,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.reads = reads
        self._agent = agent
        self._freshness = freshness
        self._rules = rules
        self._clock_ns = clock_ns
        self._failures = Failures()
        self.ranges = RangeReads(reads, agent, self._failures)
        self.keeps = True
        """Whether what is read may be kept in the tiers, and come from there."""
        self.virtual: VirtualDirectory | None = None
        self.copied_hits = self.copied_hit_bytes = self.copied_misses = self.copied_miss_bytes = 0
        """What went through `read`; reads of the channel are counted there."""
        self.copied_fresh = 0
        self.touched: set[bytes] = set()
        """Blocks that `read` found in the shm tier, since somebody last took this away."""

    # -- names
    # ----------------------------------------------------------------------------------------------------------

    def lookup_known(self, parent: Ino, name: bytes) -> tuple[Attributes | None, float] | None:
        """Answer a name from what is known: (attributes or None for "does not exist", seconds valid); None: ask the
        agent.
        """
        known = self._freshness.name(self.reads.names, parent, name, self._clock_ns())
        if isinstance(known, Known):
            inode = self.reads.names.inode(known.dentry.ino)
            attributes = self._rules.of_dentry(known.dentry, inode)
            return attributes, known.valid_s
        if isinstance(known, Absent):
            return None, known.valid_s
        return None

    async def lookup(self, parent: Ino, name: bytes) -> tuple[Attributes | None, float]:
        """Return what `name` in `parent` is, and for how many seconds that holds. None: it does not exist.

        Raises NameTooLong, NotADirectory, AccessDenied, StorageUnavailable.
        """
        if len(name) > NAME_MAX:
            raise errors.NameTooLong(f"a name of {len(name)} bytes")
        if self.virtual is not None and parent < VIRTUAL_END:
            virtual = await self.virtual.lookup(parent, name)
            if virtual is not None:
                return virtual
        return await self.lookup_object(parent, name)

    async def lookup_object(self, parent: Ino, name: bytes) -> tuple[Attributes | None, float]:
        """As `lookup`, of what is in the bucket alone."""
        known = self.lookup_known(parent, name)
        if known is not None:
            return known
        found = await self._failures.asking(lambda: self._agent.resolve(parent, name), (parent, name))
        if found.ino is None:
            return None, found.valid_s
        inode = self.reads.names.inode(found.ino)
        if inode is None:
            raise errors.StorageUnavailable(f"inode {found.ino} was resolved but is not in the metadata store")
        return self._rules.of_inode(inode), found.valid_s

    def attributes(self, ino: Ino) -> tuple[Attributes, float]:
        """Return the attributes of an inode and for how long they hold. Raises StaleObject for an unknown inode."""
        if self.virtual is not None and self.virtual.has(ino):
            virtual = self.virtual.attributes(ino)
            if virtual is None:
                raise errors.StaleObject(f"text {ino} of {VIRTUAL_NAME.decode()} is not kept any more")
            return virtual, FOREVER_S
        inode = self.reads.names.inode(ino)
        if inode is None:
            raise errors.StaleObject(f"inode {ino} is not known (any more) to this volume")
        attributes = self._rules.of_inode(inode)
        return attributes, self.attributes_s(attributes)

    def attributes_s(self, attributes: Attributes) -> float:
        """Return for how long attributes hold: those of a file for ever, because its inode is one version.

        A directory's change in nothing but mtime, yet the kernel asks for expired ones of every directory on a path for
        every file that is opened: they get the time of a name, in strict mode (where names get none) one second.
        """
        if not attributes.is_directory:
            return FOREVER_S
        now_ns = self._clock_ns()
        return self._freshness.found_s(now_ns, now_ns) or STRICT_DIRECTORY_S

    # -- listings
    # -------------------------------------------------------------------------------------------------------

    def listing_generation(self, ino: Ino) -> int | None:
        """Return the generation of a directory's listing that the kernel may keep: complete and valid.

        (The kernel drops its copy of a listing with the pages that hold it. Only because of "." and ".." has that of an
        empty directory any; without them it would stay empty.) A listing that was changed since (a name of it was asked
        for by itself) is not the one that the generation stands for.
        """
        directory = self.reads.names.directory(ino)
        if directory is None or not directory.complete:
            return None
        if directory.changed_ns > directory.listed_ns:
            return None
        if not self._freshness.listing(directory, self._clock_ns()):
            return None
        return directory.generation

    async def entries(
        self, ino: Ino, after: Ino | None, limit: int = READDIR_BATCH, *, begun: bool = False
    ) -> list[Dentry]:
        """Return up to `limit` entries after the entry with inode `after` (None: from the start); [] at the end.

        The first call for a directory, and every start in strict mode, has the listing made (again); while it is
        being made, entries stream as its pages are committed. `begun`: this is no start, although no entry was seen
        yet. Raises NotFound, AccessDenied, StorageUnavailable.
        """
        directory: Directory | None = self.reads.names.directory(ino)
        start = after is None and not begun
        if start and (directory is None or self._freshness.listing(directory, self._clock_ns()) is None):
            await self._list(ino, None)
        in_vain = 0
        while True:
            directory, found, _ = self.reads.names.listing(ino, after, limit)
            if ino == ROOT_INO and self.virtual is not None and found:
                after, found = found[-1].ino, [entry for entry in found if entry.name != VIRTUAL_NAME]
                if not found:
                    continue  # it was the only one
            if found or (directory is not None and directory.complete):
                return found
            if in_vain >= LISTING_TRIES:
                raise errors.StorageUnavailable(f"the listing of directory {ino} is complete, but it cannot be seen")
            progress = await self._list(ino, directory.frontier if directory is not None else None)
            in_vain += progress.complete

    async def _list(self, ino: Ino, seen: bytes | None) -> ListingProgress:
        return await self._failures.asking(lambda: self._agent.list_directory(ino, seen), (ino, None))

    def entries_known(
        self, ino: Ino, after: Ino | None, limit: int
    ) -> list[tuple[Attributes, bytes, float, float]] | None:
        """Return entries of a complete and valid listing at once: (attributes, name, seconds the name and they hold).

        None: the listing has to be made (`entries`).
        """
        if ino == VIRTUAL_DIRECTORY:
            return None
        directory, entries, own = self.reads.names.listing(ino, after, limit)
        if directory is None:
            return None
        if ino == ROOT_INO and self.virtual is not None and any(entry.name == VIRTUAL_NAME for entry in entries):
            if len(entries) == 1:
                return self.entries_known(ino, entries[0].ino, limit)  # an empty reply would be the end
            entries = [entry for entry in entries if entry.name != VIRTUAL_NAME]
        now_ns = self._clock_ns()
        listed_s = self._freshness.listing(directory, now_ns)
        if listed_s is None:
            return None
        found = []
        directory_s = self._freshness.found_s(now_ns, now_ns) or STRICT_DIRECTORY_S
        of_dentry = self._rules.of_dentry
        for dentry in entries:
            attributes_s = FOREVER_S if dentry.kind is FileKind.FILE else directory_s
            found.append((of_dentry(dentry, own.get(dentry.ino)), dentry.name, listed_s, attributes_s))
        return found

    def listed_s(self, ino: Ino) -> float:
        """Return for how long the kernel may keep the names of a directory's listing (0: not at all)."""
        directory = self.reads.names.directory(ino)
        return 0.0 if directory is None else self._freshness.listing(directory, self._clock_ns()) or 0.0

    def of_dentry(self, dentry: Dentry, listed_s: float) -> tuple[Attributes, float]:
        """Return the attributes of an entry of a listing, and for how long the kernel may keep the name."""
        found_s = self._freshness.found_s(dentry.checked_ns, self._clock_ns()) or 0.0
        inode = self.reads.names.inode(dentry.ino) if dentry.own else None
        return self._rules.of_dentry(dentry, inode), max(found_s, listed_s)

    # -- reads
    # ----------------------------------------------------------------------------------------------------------

    async def with_blocks(self, view: FileView, start: int, end: int, use: Callable[[list[memoryview]], None]) -> None:
        """Get the bytes `start` to `end` of a file and call `use` with them while they are pinned (no copy).

        Raises StaleObject, AccessDenied, StorageUnavailable.
        """
        blocks = self._blocks(view, start, end)
        await self._failures.asking(lambda: self._with_filled(view, start, end, use), *blocks, length=end - start)

    def _blocks(self, view: FileView, start: int, end: int) -> list[tuple[int, int]]:
        shift = self.reads.shift
        return [(view.ino, index) for index in range(start >> shift, ((end - 1) >> shift) + 1)]

    async def with_fresh(self, view: FileView, start: int, end: int, use: Callable[[list[memoryview]], None]) -> None:
        """As `with_blocks`, past the tiers: the bytes come from the store. Raises as `with_blocks`."""
        try:
            await self.ranges.get(view, start, end, use, fresh=True)
        except errors.Unsupported as error:
            log.debug("%s", error)  # an agent of an older version: the same bytes, from its tiers
            await self.with_blocks(view, start, end, use)

    def request_blocks(
        self,
        view: FileView,
        start: int,
        end: int,
        use: Callable[[list[memoryview]], None],
        otherwise: Callable[[errors.CachefsError | None], None],
    ) -> bool:
        """As `with_blocks`, without a task: two turns of the event loop less for a reader who waits. Any thread.

        Returns False when it is not the usual case. Else calls, in the trio thread, `use`, or `otherwise` with what
        `with_blocks` would raise or None: what was filled could not be used, `with_blocks` has to be asked.
        """
        reads = self.reads
        first, last = start >> reads.shift, (end - 1) >> reads.shift
        if reads.blocks is None or self._failures.among(view.ino, first, last):
            return False

        def take(outcome: list[FilledBlock] | errors.CachefsError) -> None:
            if isinstance(outcome, errors.CachefsError):
                self._failures.remember(outcome, *self._blocks(view, start, end), length=end - start)
                otherwise(outcome)
            elif not self._use_filled(view, start, end, outcome, use):
                otherwise(None)

        return self._agent.request_fill(view.ino, first, last - first + 1, take)

    async def _with_filled(self, view: FileView, start: int, end: int, use: Callable[[list[memoryview]], None]) -> None:
        reads = self.reads
        first, last = start >> reads.shift, (end - 1) >> reads.shift
        for attempt in range(FILL_TRIES):
            inline = reads.blocks is None or attempt == FILL_TRIES - 1
            filled = await self._agent.fill(view.ino, first, last - first + 1, inline=inline)
            if self._use_filled(view, start, end, filled, use):
                return
            # Evicted between the agent's commit and our look, or the agent has begun a new tier: ask again, and at last
            # for the bytes themselves.
            reads.refresh_blocks()
        raise errors.StorageUnavailable(f"blocks {first} to {last} of inode {view.ino} did not stay in the cache")

    def _use_filled(
        self, view: FileView, start: int, end: int, filled: list[FilledBlock], use: Callable[[list[memoryview]], None]
    ) -> bool:
        reads = self.reads
        given = {block.index: block.payload for block in filled if block.payload is not None}
        with NoTier() if reads.blocks is None else reads.blocks.snapshot() as snapshot:
            slices = reads.views(snapshot, view, start, end, given)
            if slices is None:
                return False
            use(slices)
            return True

    async def read(self, ino: Ino, offset: int, size: int, *, direct: bool = False) -> bytes:
        """Return up to `size` bytes from `offset` (fewer at the end of the file), for callers that want a copy.

        `direct`: past the tiers.
        """
        if self.virtual is not None and self.virtual.has(ino):
            return self.virtual_bytes(ino, offset, size)
        view = self.reads.file(ino)
        end = min(offset + size, view.size)
        if offset >= end:
            return b""
        pieces: list[bytes] = []
        if direct or not self.keeps:
            await self.with_fresh(view, offset, end, lambda slices: pieces.append(b"".join(slices)))
            self.copied_fresh += 1
            self.copied_miss_bytes += end - offset
            return pieces[0]
        if not offset or view.window.position < 0:
            self.reads.note_begun(ino, offset)
        wish = self.note_read(view, offset, end - offset)
        if wish is not None:
            self.readahead(view, *wish)
        if self.reads.blocks is not None:
            with self.reads.blocks.snapshot() as snapshot:
                slices = self.reads.views(snapshot, view, offset, end)
                if slices is not None:
                    self.copied_hits += 1
                    self.copied_hit_bytes += end - offset
                    if len(self.touched) < MAX_TOUCHED:
                        self.touched.update(self.reads.keys(view, offset, end))
                    return b"".join(slices)
        self.copied_misses += 1
        self.copied_miss_bytes += end - offset
        await self.with_blocks(view, offset, end, lambda slices: pieces.append(b"".join(slices)))
        return pieces[0]

    def virtual_bytes(self, ino: int, offset: int, size: int) -> bytes:
        """Return a part of a text of `.cachefs`. Raises StaleObject. Any thread."""
        content = None if self.virtual is None else self.virtual.content(ino, offset, size)
        if content is None:
            raise errors.StaleObject(f"text {ino} of {VIRTUAL_NAME.decode()} is not kept any more")
        return content

    def note_read(self, view: FileView, offset: int, size: int) -> tuple[int, int] | None:
        """Feed the readahead window; returns (first block, count) to ask the agent for, or None."""
        ask = view.window.note(offset, size, view.size)
        if ask is None:
            return None
        first = ask[0] >> self.reads.shift
        last = (min(ask[1], view.size) - 1) >> self.reads.shift
        return (first, last - first + 1) if last >= first else None

    def readahead(self, view: FileView, first: int, count: int) -> None:
        """Pass a wish for blocks on to the agent. Any thread."""
        self._agent.readahead(view.ino, first, count)

    # -- extended attributes and statfs
    # ---------------------------------------------------------------------------------

    async def extended_attribute(self, ino: Ino, name: bytes) -> bytes:
        """Return `user.cachefs.etag`, `.key` or `.cached` of an inode. Raises NoSuchAttribute."""
        if self.virtual is not None and self.virtual.has(ino):
            raise errors.NoSuchAttribute(name.decode("utf-8", "replace"))
        inode = self.reads.names.inode(ino)
        if inode is None:
            raise errors.StaleObject(f"inode {ino} is not known (any more) to this volume")
        if name == b"user.cachefs.key":
            return self.reads.names.key_of(ino).encode("utf-8", "surrogateescape")
        if inode.kind is FileKind.FILE and name == b"user.cachefs.etag":
            return inode.etag.encode()
        if inode.kind is FileKind.FILE and name == b"user.cachefs.cached":
            held = await self._agent.cached(ino)
            total = block_count(inode.size, self.reads.block_size)
            counts = " ".join(f"{tier.value}={held.get(tier, 0)}" for tier in (Tier.SHM, Tier.DISK))
            return f"{counts} blocks={total}".encode()
        raise errors.NoSuchAttribute(name.decode("utf-8", "replace"))

    def extended_attributes(self, ino: Ino) -> tuple[bytes, ...]:
        """Return the names of the extended attributes of an inode."""
        if self.virtual is not None and self.virtual.has(ino):
            return ()
        inode = self.reads.names.inode(ino)
        return XATTRS if inode is not None and inode.kind is FileKind.FILE else XATTRS[1:2]

    def usage(self) -> Usage:
        """Return the figures of statfs(2), from what the memory map says: df(1) looks at every mount of a machine."""
        used, objects = self.reads.names.counts()
        return Usage(4096, VIRTUAL_BYTES, max(VIRTUAL_BYTES - used, 0), VIRTUAL_FILES, VIRTUAL_FILES - objects)
