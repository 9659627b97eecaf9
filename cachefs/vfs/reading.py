"""Reading: which blocks a read needs, and where in the shm tier's memory map they lie.

`FileView` is all that a read needs to know of a file; it is built once per inode and kept in a bounded table.
`ReadPath.views` is the hot path of the whole system: one dictionary look-up for the view, one LMDB get per block, no
copy. The views point into the memory map and are valid until the read transaction ends, so whoever sends them to the
kernel does so inside of it: eviction by the agent can not pull the pages away before.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from cachefs import errors
from cachefs.block.codec import HEADER_SIZE
from cachefs.block.disk_reader import DiskReader
from cachefs.block.tier_reader import TierReader
from cachefs.prefetch.window import ReadWindow
from cachefs.types import FileKind, Ino, ObjectId, ObjectVersion, block_key, object_id
from metadata.store import MetadataReader

_INDEX = struct.Struct(">I")
MAX_TOUCHED = 4096
"""Keys of used blocks that are kept until they are reported: hints for the eviction."""
MAX_BEGUN = 1024
"""Files whose beginning is remembered until somebody takes it away: more are not told of."""
MAX_VIEWS = 16384
"""Views kept: about 400 bytes each. The oldest goes first; it costs two LMDB gets to build again."""


class Snapshot(Protocol):
    """An open read transaction of the shm tier."""

    def get(self, key: bytes) -> memoryview | None:
        """Return the stored value (header and payload) as a view of the map, or None."""
        ...


class NoTier:
    """A snapshot of a tier that is off."""

    def __enter__(self) -> NoTier:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is open."""

    def get(self, key: bytes) -> memoryview | None:
        """Return None for every key."""
        return None


class BlocksAhead:
    """Which of the next blocks of a file the disk tier has and the shm tier has not, as far as somebody has looked.

    Written by one thread, read by any: every change is one assignment.
    """

    __slots__ = ("_first", "_last", "_there")

    KEPT = 256
    """Blocks behind the newest that are remembered."""

    def __init__(self) -> None:
        self._there: frozenset[int] = frozenset()
        self._first = self._last = 0

    def note(self, indexes: range, there: Iterable[int]) -> None:
        """Somebody has looked for these blocks."""
        if not self._first <= indexes.start <= self._last:
            self._there, self._first, self._last = frozenset(), indexes.start, indexes.start  # another place
        least = max(self._first, indexes.stop - self.KEPT)
        kept = {index for index in self._there if index >= least and index not in indexes}
        self._there = frozenset(kept.union(there))
        self._first, self._last = least, max(self._last, indexes.stop)

    def lacks(self, index: int) -> bool:
        """Whether somebody has looked for a block and not found it."""
        return self._first <= index < self._last and index not in self._there


class FileView:
    """One file, as reads see it. `size` in bytes, `shift` and `mask` split an offset into block index and rest."""

    __slots__ = ("ino", "oid", "on_disk", "size", "window")

    def __init__(self, ino: Ino, oid: ObjectId, size: int) -> None:
        self.ino = ino
        self.oid = oid
        self.size = size
        self.window = ReadWindow()
        self.on_disk = BlocksAhead()


class ReadPath:
    """Files and blocks of one volume, as the worker reads them. Used by the channel thread and the trio thread.

    INVARIANT: `views_by_ino` only ever maps an inode to the one version that the inode names, so an entry is never
    stale.
    """

    def __init__(
        self, names: MetadataReader, blocks: TierReader | None, endpoint: str, bucket: str, block_size: int
    ) -> None:
        self.names = names
        self.blocks = blocks
        self.disk: DiskReader | None = None
        """The disk tier, where this process can read it: for threads only."""
        self.shm_limit_bytes = 0
        """How large the shm tier may become."""
        self._endpoint = endpoint
        self._bucket = bucket
        self.block_size = block_size
        self.shift = block_size.bit_length() - 1
        self.mask = block_size - 1
        self.views_by_ino: dict[int, FileView] = {}
        self.begun: list[tuple[int, int]] = []
        """Files that were begun, as (inode number, block), since somebody last took this away."""
        self.on_begun: Callable[[], object] | None = None
        """Called with the first of them, from any thread; None: nobody wants to know."""

    def file(self, ino: int) -> FileView:
        """Return the view of a file. Raises StaleObject for an inode that this volume does not know, IsADirectory."""
        view = self.views_by_ino.get(ino)
        return self._load(ino) if view is None else view

    def note_begun(self, ino: int, offset: int) -> None:
        """A reader began a file. Any thread; what two threads do at once may lose one of them."""
        begun = self.begun
        if self.on_begun is not None and len(begun) < MAX_BEGUN:
            begun.append((ino, offset >> self.shift))
            if len(begun) == 1:
                self.on_begun()

    def version(self, ino: int) -> ObjectVersion:
        """Return the object version that a file's inode names. Raises as `file`."""
        inode = self.names.inode(Ino(ino))
        if inode is None:
            raise errors.StaleObject(f"inode {ino} is not known (any more) to this volume")
        if inode.kind is FileKind.DIRECTORY:
            raise errors.IsADirectory(f"inode {ino} is a directory")
        return ObjectVersion(self.names.key_of(Ino(ino)), inode.etag, inode.size)

    def _load(self, ino: int) -> FileView:
        version = self.version(ino)
        view = FileView(Ino(ino), object_id(self._endpoint, self._bucket, version), version.size)
        views = self.views_by_ino
        if len(views) >= MAX_VIEWS:
            for old in list(views)[: MAX_VIEWS // 8]:
                views.pop(old, None)
        views[ino] = view
        return view

    def refresh(self) -> bool:
        """Follow the agent to new environments, if it had to begin any; returns whether it had. BLOCKS.

        Views stay: new metadata never uses an old inode number again, so they say of open files what they always said,
        and what is cached of those stays readable.
        """
        fresh = self.names.refresh()
        return self.refresh_blocks() or fresh

    def refresh_blocks(self) -> bool:
        """The same for the shm tier alone; never raises."""
        try:
            return self.blocks is not None and self.blocks.refresh()
        except errors.TierUnavailable:
            return False  # gone for now: fills bring the bytes themselves

    def keys(self, view: FileView, start: int, end: int) -> Iterator[bytes]:
        """Return the keys of the blocks that hold the bytes `start` to `end` of a file."""
        for index in range(start >> self.shift, ((end - 1) >> self.shift) + 1):
            yield block_key(view.oid, index)

    def views(
        self, snapshot: Snapshot, view: FileView, start: int, end: int, given: dict[int, bytes] | None = None
    ) -> list[memoryview] | None:
        """Return the bytes `start` to `end` of a file as slices of the map (of `given` payloads), or None if a block
        is missing.

        `snapshot` is an open read transaction of the shm tier; the slices die with it.
        """
        shift, mask, oid = self.shift, self.mask, view.oid
        slices: list[memoryview] = []
        index, last = start >> shift, (end - 1) >> shift
        while index <= last:
            first = start & mask if not slices else 0
            limit = ((end - 1) & mask) + 1 if index == last else mask + 1
            payload = given.get(index) if given else None
            if payload is not None:
                if len(payload) < limit:
                    return None  # the kernel would take a short answer for the end of the file
                slices.append(memoryview(payload)[first:limit])
            else:
                stored = snapshot.get(oid + _INDEX.pack(index))
                if stored is None or len(stored) < HEADER_SIZE + limit:
                    return None
                slices.append(stored[HEADER_SIZE + first : HEADER_SIZE + limit])
            index += 1
        return slices
