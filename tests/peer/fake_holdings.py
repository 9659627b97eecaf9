"""A node's blocks without its agent: a memory map, a "disk" and a "store" that tests fill, slow down and break."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cachefs import errors
from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import BlockKey, ObjectId, ObjectVersion, block_key, object_id
from peer.jobs import JobAnswer, JobRequest
from peer.ports import Fetched
from peer.wire import BlockRequest, Run, bytes_of

BLOCK = 64 << 10
VOLUME = "0123456789abcdef"
ENDPOINT, BUCKET = "http://store", "bucket"


def body_of(key: str, size: int) -> bytes:
    """Return the bytes of an object: another text at every offset, another one for every key."""
    raw = key.encode("utf-8", "surrogateescape")
    return b"".join(b"%s:%09d\n" % (raw, number) for number in range(size // (len(raw) + 11) + 1))[:size]


class FakeHoldings:
    """See the module. What is asked of it is counted in `asked`."""

    def __init__(self, block_size: int = BLOCK) -> None:
        self._block_size = block_size
        self.memory: dict[BlockKey, mmap.mmap] = {}
        self.disk: dict[BlockKey, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: dict[str, int] = {}
        self.before_fetch: Callable[[str], Exception | None] = lambda _: None
        self.before_list: Callable[[], None] = lambda: None
        self.before_listing_of: Callable[[str], object] = lambda volume: None
        self.gate = threading.Event()
        """Fetches wait until it is set."""
        self.gate.set()
        self.level_of: Callable[[ObjectId], int] = lambda _: 0
        self.inline = False
        """Whether a fetch hands the bytes over instead of keeping them."""
        self.fetched_runs: list[tuple[str, int, int]] = []
        self.lent_now = self.lent_most = 0
        self.evict_after_lends: int | None = None
        self.page: ListPage | Exception = ListPage((), (), None)
        self._threads: list[threading.Thread] = []

    # -- filling -------------------------------------------------------------------------------------------------------

    def put(self, key: str, size: int, where: str = "memory") -> ObjectVersion:
        """Add an object; its blocks are in "memory", on "disk" or in the "store" only."""
        body = body_of(key, size)
        version = ObjectVersion(key, "etag", size)
        if where == "store":
            self.objects[key] = body
        for index in range(-(-size // self._block_size)):
            piece = body[index * self._block_size :][: self._block_size]
            if where == "memory":
                self.remember(self.key(version, index), piece)
            elif where == "disk":
                self.disk[self.key(version, index)] = piece
        return version

    def remember(self, key: BlockKey, piece: bytes) -> None:
        """Put a block into the memory map."""
        mapped = mmap.mmap(-1, len(piece))
        mapped[:] = piece
        self.memory[key] = mapped

    def oid(self, version: ObjectVersion) -> ObjectId:
        """Return what an object version is called."""
        return object_id(ENDPOINT, BUCKET, version)

    def key(self, version: ObjectVersion, index: int) -> BlockKey:
        """Return what a block is called."""
        return block_key(self.oid(version), index)

    def request(self, version: ObjectVersion, first: int = 0, count: int = 0, *, only_cached: bool = False) -> Any:
        """Return a request for blocks; count 0: all."""
        return BlockRequest(
            volume=VOLUME,
            version=version,
            oid=self.oid(version),
            first=first,
            count=count or -(-version.size // self._block_size) - first,
            block_size=self._block_size,
            only_cached=only_cached,
        )

    def run(self, version: ObjectVersion) -> Run:
        """Return all blocks of a version as a part of a batch."""
        count = -(-version.size // self._block_size)
        return Run(bytes_of(version.key), version.etag, version.size, self.oid(version), 0, count)

    def buffers(self, request: BlockRequest) -> list[memoryview]:
        """Return memory for the blocks of a request."""
        size = request.version.size
        return [
            memoryview(bytearray(min(self._block_size, size - index * self._block_size)))
            for index in range(request.first, request.first + request.count)
        ]

    def close(self) -> None:
        """Wait for fetches."""
        self.gate.set()
        for thread in self._threads:
            thread.join()

    # -- Holdings ------------------------------------------------------------------------------------------------------

    def _count(self, what: str) -> None:
        self.asked[what] = self.asked.get(what, 0) + 1

    @property
    def block_size(self) -> int:
        """See `Holdings.block_size`."""
        return self._block_size

    @contextmanager
    def lend(self, key: BlockKey, length: int) -> Iterator[memoryview | None]:
        """See `Holdings.lend`."""
        self._count("lend")
        if self.evict_after_lends is not None and self.asked["lend"] > self.evict_after_lends:
            self.memory.clear()
        mapped = self.memory.get(key)
        if mapped is None or len(mapped) != length:
            yield None
            return
        self.lent_now += 1
        self.lent_most = max(self.lent_most, self.lent_now)
        view = memoryview(mapped)
        try:
            yield view
        finally:
            view.release()  # raises nothing, unless somebody kept a part of it
            self.lent_now -= 1

    def level(self, volume: str, oid: ObjectId, index: int) -> int:
        """See `Holdings.level`."""
        return self.level_of(oid)

    def stored(self, key: BlockKey) -> bool:
        """See `Holdings.stored`."""
        return key in self.disk

    def load(self, key: BlockKey, length: int) -> bytes | None:
        """See `Holdings.load`."""
        self._count("load")
        found = self.disk.get(key)
        return found if found is not None and len(found) == length else None

    def fetch(
        self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched, *, behind: bool = False
    ) -> None:
        """See `Holdings.fetch`."""
        self._count("fetch")
        if behind:
            self._count("fetch behind")
        self.fetched_runs.append((version.key, first, count))
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._fetch, args=(volume, version, first, count, fetched))
        self._threads.append(thread)
        thread.start()

    def _fetch(self, volume: str, version: ObjectVersion, first: int, count: int, fetched: Fetched) -> None:
        self.gate.wait()
        trouble = self.before_fetch(version.key)
        body = self.objects.get(version.key)
        if trouble is None and (volume != VOLUME or body is None):
            trouble = errors.NotFound("this node does not hold that volume")
        if trouble is not None or body is None:
            fetched(trouble or errors.StaleObject("gone"))
            return
        found: dict[int, bytes | None] = {}
        for index in range(first, first + count):
            piece = body[index * self._block_size :][: self._block_size]
            found[index] = piece if self.inline else None
            if not self.inline:
                self.remember(self.key(version, index), piece)
        fetched(found)

    def list_page(
        self, volume: str, prefix: str, delimiter: str, token: str | None, limit: int, max_age_s: float
    ) -> tuple[ListPage, float]:
        """See `Holdings.list_page`."""
        self._count("list")
        self.before_list()
        self.before_listing_of(volume)
        if volume != VOLUME:
            raise errors.NotFound("this node does not hold that volume")
        if isinstance(self.page, Exception):
            raise self.page
        return self.page, 1.5

    def job(self, request: JobRequest) -> JobAnswer:
        """See `Holdings.job`."""
        self._count("job")
        if request.volume != VOLUME:
            raise errors.NotFound("this node does not hold that volume")
        return JobAnswer(job={"state": "walking", "paths": len(request.paths)}, over=request.stop, parts=request.part)

    def summary(self) -> dict[str, Any]:
        """See `Holdings.summary`."""
        return {"version": "9.9.9", "tiers": {}}


def listing(count: int) -> ListPage:
    """Return a page with so many objects; one of them has a name that is not UTF-8."""
    names = [f"d/{number:06d}" for number in range(count - 1)] + ["d/\udcff"]
    objects = tuple(ObjectInfo(name, 5, "etag", time.time_ns()) for name in names)
    return ListPage(objects, ("d/sub/", "d/\udcfe/"), "token")
