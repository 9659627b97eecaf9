"""An object store in memory: the model that other implementations are compared with, and a store for tests.

It behaves as S3 does where cachefs can see it: keys in the order of their UTF-8 bytes, the entity tag is the MD5 of
the content, the time has whole seconds, an old version answers as 412 does, a page never splits a common prefix. All
methods may be called from any thread.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cachefs.errors import BadBody, BucketNotFound, NotFound, StaleObject, StorageUnavailable
from cachefs.store.port import ListPage, ObjectInfo, Orders, one_by_one, pieces_of
from cachefs.types import ObjectVersion

_SECOND_NS = 1_000_000_000
# Sorts behind every byte that UTF-8 uses, so `prefix + _AFTER` is behind all keys with that prefix.
_AFTER = b"\xff"


@dataclass(frozen=True, slots=True)
class _Stored:
    described: ObjectInfo
    body: bytes


def _sort_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


class MemoryStore:
    """See the module. `put`, `delete` and `drop_bucket` are the outside world that changes the bucket."""

    def __init__(self, bucket: str = "memory", *, clock: Callable[[], float] = time.time) -> None:
        self._bucket = bucket
        self._clock = clock
        self._lock = threading.Lock()
        self._objects: dict[str, _Stored] = {}
        self._order: list[bytes] = []
        """INVARIANT: the sort keys of `_objects`, sorted."""
        self._exists = True
        self._closed = False

    @property
    def endpoint(self) -> str:
        """Two memory stores never hold the same objects."""
        return f"memory://{id(self):x}"

    @property
    def bucket(self) -> str:
        """The name given."""
        return self._bucket

    # -- the outside world --------------------------------------------------------------------------------------------

    def put(
        self, key: str, body: bytes, *, user: Mapping[str, str] | None = None, mtime_s: float | None = None
    ) -> ObjectInfo:
        """Make or overwrite an object; `user` is its user metadata."""
        now = int(self._clock() if mtime_s is None else mtime_s)
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        named = {name.lower(): value for name, value in (user or {}).items()}
        described = ObjectInfo(key, len(body), etag, now * _SECOND_NS, named)
        with self._lock:
            if key not in self._objects:
                bisect.insort(self._order, _sort_key(key))
            self._objects[key] = _Stored(described, bytes(body))
        return described

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""
        with self._lock:
            if self._objects.pop(key, None) is not None:
                del self._order[bisect.bisect_left(self._order, _sort_key(key))]

    def drop_bucket(self) -> None:
        """Let the bucket vanish with all its objects."""
        with self._lock:
            self._objects.clear()
            self._order.clear()
            self._exists = False

    # -- the port -----------------------------------------------------------------------------------------------------

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`."""
        self.list_page(prefix, limit=1)

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        with self._lock:
            self._require_open()
            stored = self._objects.get(version.key)
        if stored is None or stored.described.version != version:
            raise StaleObject(f"{version.key!r} is no longer the object that was opened")
        if start < 0 or length <= 0 or start + length > version.size:
            raise BadBody(f"{version.key!r} has {version.size} bytes, not {start}+{length}", retryable=False)
        return stored.body[start : start + length]

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """See `ObjectStore.read_into`."""
        return pieces_of(self.get_range(version, start, sum(map(len, buffers))), buffers)

    def get_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `BulkStore.get_many`."""
        one_by_one(self, versions, orders)

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        with self._lock:
            self._require_open()
            stored = self._objects.get(key)
        if stored is None:
            raise NotFound(f"no object {key!r} in {self._bucket!r}")
        return stored.described

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`. The token is the last key or common prefix of the page before."""
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        last = ""
        with self._lock:
            self._require_open()
            if not self._exists:
                raise BucketNotFound(f"bucket {self._bucket!r} does not exist")
            position = self._position_after(prefix, delimiter, token)
            while len(objects) + len(prefixes) < limit:
                key = self._key_at(position, prefix)
                if key is None:
                    return ListPage(tuple(objects), tuple(prefixes), None)
                cut = key.find(delimiter, len(prefix)) if delimiter else -1
                if cut >= 0:
                    last = key[: cut + len(delimiter)]
                    prefixes.append(last)
                    position = bisect.bisect_left(self._order, _sort_key(last) + _AFTER)
                else:
                    last = key
                    found = self._objects[key].described
                    objects.append(ObjectInfo(found.key, found.size, found.etag, found.mtime_ns))
                    position += 1
            more = self._key_at(position, prefix) is not None
        return ListPage(tuple(objects), tuple(prefixes), last if more else None)

    def close(self) -> None:
        """See `ObjectStore.close`."""
        self._closed = True

    # -- inside, under the lock ---------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise StorageUnavailable("the store is closed", retryable=False)

    def _position_after(self, prefix: str, delimiter: str, token: str | None) -> int:
        if token is None:
            return bisect.bisect_left(self._order, _sort_key(prefix))
        if delimiter and token.endswith(delimiter) and token != prefix:
            return bisect.bisect_left(self._order, _sort_key(token) + _AFTER)
        return bisect.bisect_right(self._order, _sort_key(token))

    def _key_at(self, position: int, prefix: str) -> str | None:
        if position == len(self._order):
            return None
        key = self._order[position].decode("utf-8", "surrogateescape")
        return key if key.startswith(prefix) else None
