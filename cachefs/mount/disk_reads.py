"""Files that are read in sequence and lie in the disk tier: answered by threads of the worker, without the agent.

    channel thread --READ--> the block's thread: disk tier -> its memory, checked -> the kernel
                   --wish--> one more thread: the device begins to read what is there; the agent fetches the rest

Every block has its thread (index modulo their number), which keeps the block that it has read last: the small requests
of a reader with O_DIRECT find it there. What turns out not to be on the disk goes the usual way of a miss.

Random reads and files below one block go to the agent, which brings their blocks into the shm tier: those are read
again, and a block is more than they ask for. So does a block of a sequence when it is read for the second time, as long
as the shm tier has room that nobody has used yet: a file that is read once, or is larger than that, evicts nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from cachefs.block.codec import HEADER_SIZE
from cachefs.block.disk_reader import DiskReader
from cachefs.types import BlockKey, block_count, block_key
from cachefs.vfs.reading import MAX_TOUCHED, FileView, ReadPath

log = logging.getLogger(__name__)

THREADS = 4
"""The kernel has four requests of 1 MiB under way for one sequential reader."""
MAX_SEEN = 1 << 16
"""Blocks that are remembered to have been read once: 64 GiB of blocks of 1 MiB in about 8 MiB of memory."""
ON_ITS_WAY_S = 1.0
"""After this a block has come into the shm tier, or does not come."""
ROOM = 0.9
SPARE_BLOCKS = 6
"""Up to this share of its limit, and to so many blocks below it, the shm tier takes blocks without evicting others."""
LARGEST_BLOCK = 4 << 20
"""Each thread has memory for one block: with larger ones the agent reads, whose memory has a budget."""


class Request:
    """One READ of the kernel: how it is answered, and who gets it when it is not."""

    __slots__ = ("answer", "end", "otherwise", "start", "view")

    def __init__(
        self,
        view: FileView,
        start: int,
        end: int,
        answer: Callable[[list[memoryview]], None],
        otherwise: Callable[[], None],
    ) -> None:
        self.view = view
        self.start = start
        self.end = end
        self.answer = answer
        self.otherwise = otherwise


class DiskReads:
    """The threads of one worker. `read` and `wish` return at once, and may be called from any thread."""

    def __init__(self, reads: ReadPath, ask_ahead: Callable[[FileView, int, int], None]) -> None:
        """`ask_ahead` gets the wishes that are for the agent: (file, first block, count)."""
        self._reads = reads
        self._ask_ahead = ask_ahead
        self._lanes = [_Lane(reads, self) for _ in range(THREADS)]
        self._wishes: queue.SimpleQueue[tuple[FileView, int, int] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.hits = self.hit_bytes = 0
        """Blocks (and their bytes) that came from the disk tier, since this was asked last (`take_counts`)."""
        self._lock = threading.Lock()
        """Of the counts, and of what was seen."""
        self.touched: set[bytes] = set()
        self._seen: dict[BlockKey, None] = {}
        self._promised = 0
        """What the shm tier uses, with the blocks that are on their way there by our doing."""
        self._promised_at = 0.0

    def start(self) -> None:
        """Begin to take requests."""
        threads = [threading.Thread(target=lane.run, name="disk-reads", daemon=True) for lane in self._lanes]
        self._threads = [*threads, threading.Thread(target=self._take_wishes, name="disk-wishes", daemon=True)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Answer what has come, and end the threads."""
        for lane in self._lanes:
            lane.queue.put(None)
        self._wishes.put(None)
        for thread in self._threads:
            thread.join()

    def takes(self, view: FileView, start: int) -> bool:
        """Whether a READ that the shm tier cannot answer is for us: part of a sequence, and maybe on the disk."""
        if not view.window.window or view.on_disk.lacks(start >> self._reads.shift):
            return False
        return self.tier is not None

    @property
    def tier(self) -> DiskReader | None:
        """The disk tier, if this worker reads it."""
        return self._reads.disk if self._reads.block_size <= LARGEST_BLOCK else None

    def read(self, request: Request) -> None:
        """Answer a READ."""
        index = request.start >> self._reads.shift
        self._lanes[index % THREADS].queue.put(request)

    def wish(self, view: FileView, first: int, count: int) -> None:
        """Blocks will be wanted soon."""
        self._wishes.put((view, first, count))

    def count(self, key: BlockKey, length: int) -> None:
        """A block came from the disk."""
        with self._lock:
            self.hits += 1
            self.hit_bytes += length
            if len(self.touched) < MAX_TOUCHED:
                self.touched.add(key)
            if len(self._seen) >= MAX_SEEN:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = None

    def belongs_in_shm(self, key: BlockKey) -> bool:
        """Whether a block is being read again, and there is room for it. True once, as is whoever brings it there."""
        reads = self._reads
        if reads.blocks is None or key not in self._seen:
            return False
        used, now = reads.blocks.used_bytes(), time.monotonic()
        with self._lock:
            if now > self._promised_at + ON_ITS_WAY_S:
                self._promised = used
            self._promised = max(self._promised, used)
            limit = min(ROOM * reads.shm_limit_bytes, reads.shm_limit_bytes - SPARE_BLOCKS * reads.block_size)
            if key not in self._seen or self._promised + reads.block_size > limit:
                return False
            del self._seen[key]
            self._promised += reads.block_size
            self._promised_at = now
            return True

    def take_counts(self) -> tuple[int, int, set[bytes]]:
        """Return blocks, bytes and keys that were counted since the last call."""
        with self._lock:
            counted = self.hits, self.hit_bytes, self.touched
            self.hits, self.hit_bytes, self.touched = 0, 0, set()
        return counted

    # -- wishes --------------------------------------------------------------------------------------------------------

    def _take_wishes(self) -> None:
        while (wish := self._wishes.get()) is not None:
            view, first, count = wish
            try:
                self._sort_out(view, first, count)
            except Exception:
                log.exception("readahead failed")

    def _sort_out(self, view: FileView, first: int, count: int) -> None:
        """Blocks in the shm tier are near enough, those on the disk are asked of the device, others of the agent."""
        last = min(first + count, block_count(view.size, self._reads.block_size))
        wanted = self._not_in_shm(view, range(first, last))
        disk = self.tier
        absent: Sequence[int] = wanted
        if disk is not None and wanted:
            disk.follow()
            once = [index for index in wanted if not self.belongs_in_shm(block_key(view.oid, index))]
            there = disk.expect([block_key(view.oid, index) for index in once])
            found = {index for index, is_there in zip(once, there, strict=True) if is_there}
            absent = [index for index in wanted if index not in found]
            view.on_disk.note(range(first, last), found)
        for start, length in _runs(absent):
            self._ask_ahead(view, start, length)

    def _not_in_shm(self, view: FileView, indexes: range) -> list[int]:
        blocks = self._reads.blocks
        if blocks is None:
            return list(indexes)
        with blocks.snapshot() as snapshot:
            return [index for index in indexes if snapshot.get(block_key(view.oid, index)) is None]


class _Lane:
    """One thread with memory for one block."""

    def __init__(self, reads: ReadPath, owner: DiskReads) -> None:
        self.queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._reads = reads
        self._owner = owner
        self._memory = memoryview(b"")
        self._key = BlockKey(b"")
        self._block: memoryview | None = None
        """The bytes of block `_key`."""

    def run(self) -> None:
        while (request := self.queue.get()) is not None:
            try:
                slices = self._slices(request)
                if slices is not None:
                    request.answer(slices)
                    continue
            except Exception:
                log.exception("a read from the disk tier failed")
            try:
                request.otherwise()
            except Exception:
                log.exception("a read could not be passed on")

    def _slices(self, request: Request) -> list[memoryview] | None:
        """Return the bytes asked for, or None if they are not all on the disk."""
        reads, view = self._reads, request.view
        slices: list[memoryview] = []
        at = request.start
        while at < request.end:
            index = at >> reads.shift
            limit = min(request.end, (index + 1) << reads.shift)
            block = self._load(view, index)
            if block is None:
                return None
            piece = block[at & reads.mask : (at & reads.mask) + limit - at]
            at = limit
            if not at & reads.mask or at == view.size:
                self._key = BlockKey(b"")  # read to its end: whoever wants it now reads it again
            slices.append(piece if at == request.end else memoryview(bytes(piece)))  # the next one takes its place
        return slices

    def _load(self, view: FileView, index: int) -> memoryview | None:
        key = block_key(view.oid, index)
        if key == self._key and self._block is not None:
            return self._block
        disk = self._reads.disk
        if disk is None or self._owner.belongs_in_shm(key):
            return None
        if not self._memory:
            self._memory = memoryview(bytearray(HEADER_SIZE + self._reads.block_size))
        length = min(self._reads.block_size, view.size - (index << self._reads.shift))
        self._block = disk.read(key, length, self._memory)
        self._key = key
        if self._block is not None:
            self._owner.count(key, length)
        return self._block


def _runs(indexes: Sequence[int]) -> list[tuple[int, int]]:
    """Return neighbours as (first, count)."""
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and sum(runs[-1]) == index:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs
