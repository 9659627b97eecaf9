"""The object store port: what cachefs needs from a place where objects live, and nothing more.

All methods BLOCK and are called from threads (the agent owns the adapter). They raise only `cachefs.errors`.
Retries are not in here: `cachefs.store.retry.RetryingStore` wraps any implementation with the one policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cachefs.errors import CachefsError
from cachefs.types import ObjectVersion, Tier

if TYPE_CHECKING:
    from cachefs.store.wire import Wire


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing or a HEAD says of one object."""

    key: str
    size: int
    """Bytes."""
    etag: str
    """Without quotes."""
    mtime_ns: int
    """LastModified, nanoseconds since the epoch."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """`x-amz-meta-*` without the prefix, lower-case names; only HEAD fills it."""

    @property
    def version(self) -> ObjectVersion:
        """The identity of exactly these bytes."""
        return ObjectVersion(self.key, self.etag, self.size)


@dataclass(frozen=True, slots=True)
class ListPage:
    """One page of a listing, in the store's order (UTF-8 bytes of the keys; prefixes sort with their slash)."""

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...]
    """Common prefixes, each ending with the delimiter; empty without a delimiter."""
    next_token: str | None
    """Give it to the next call; None on the last page."""


class ObjectStore(Protocol):
    """One bucket (or one directory, for ``file://``)."""

    @property
    def endpoint(self) -> str:
        """The endpoint that enters block keys: two stores with equal endpoint and bucket hold the same objects."""
        ...

    @property
    def bucket(self) -> str:
        """The bucket's name (the directory, for ``file://``)."""
        ...

    def check(self, prefix: str) -> None:
        """Make one cheap request that proves that the bucket exists and may be listed below `prefix`.

        Raises: BucketNotFound, CredentialsError, AccessDenied, StorageUnavailable, each with a message for a person.
        """
        ...

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """Return exactly `length` > 0 bytes from byte `start` of exactly this version (If-Match).

        Raises: StaleObject (412, or 404: this version is gone), AccessDenied, BadBody (truncated, over-long or of
        another version), StorageUnavailable.
        """
        ...

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """Fill the buffers, one after the other, with the bytes of exactly this version from byte `start` on.

        One request; yields the number of buffers that are full after each of them, so that the caller can use a piece
        while the next one is on its way (and name the same memory again further on). A buffer whose number was not
        yielded holds anything. Raises as `get_range`, before the first or after any piece.
        """
        ...

    def head(self, key: str) -> ObjectInfo:
        """Return size, etag, time and user metadata of the object now behind `key`.

        Raises: NotFound, AccessDenied, StorageUnavailable.
        """
        ...

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """Return one page of at most `limit` entries below `prefix`. `delimiter` "" lists the whole key space below it.

        Raises: BucketNotFound, AccessDenied, StorageUnavailable.
        """
        ...

    def close(self) -> None:
        """Release connections. Further calls raise StorageUnavailable."""
        ...


class Orders(Protocol):
    """What becomes of objects that are brought in bulk, by their number. Called from several threads at once.

    Whoever wants the objects can take one back until it is begun, and while it is postponed.
    """

    def begin(self, number: int) -> bool:
        """It is asked for now. False: leave it out, somebody else brings it."""
        ...

    def postponed(self, number: int) -> bool:
        """It was asked for in vain, and is asked for again later. False: leave it out from now on."""
        ...

    def arrived(self, number: int, body: bytes | memoryview, source: Tier) -> None:
        """All of it is here: exactly the bytes of this version, valid until this returns. The last word on it, and so
        is `failed`.
        """
        ...

    def failed(self, number: int, error: CachefsError) -> None:
        """It cannot be had. Also for objects that were not begun."""
        ...


class BulkStore(ObjectStore, Protocol):
    """A store that brings many small objects at once, at less cost for each."""

    def get_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """Bring whole objects, none of them empty, behind all requests that readers wait for; returns when all of them
        are over. What one of them meets is no trouble for the others.

        Raises what `orders` raises; errors of the store go to `orders`.
        """
        ...


@runtime_checkable
class Wired(Protocol):
    """A store whose objects can be had over sockets of our own."""

    def wire(self) -> Wire | None:
        """Return the connections to it; None: not now. Never raises."""
        ...


def one_by_one(store: ObjectStore, versions: Sequence[ObjectVersion], orders: Orders) -> None:
    """Do what `BulkStore.get_many` does, without its speed."""
    for number, version in enumerate(versions):
        if not orders.begin(number):
            continue
        try:
            body = store.get_range(version, 0, version.size)
        except CachefsError as error:
            orders.failed(number, error)
        else:
            orders.arrived(number, body, Tier.ORIGIN)


def pieces_of(body: bytes | memoryview, buffers: Sequence[memoryview]) -> Iterator[int]:
    """Do what `ObjectStore.read_into` does with a range that is in memory already."""
    rest = memoryview(body)
    for count, buffer in enumerate(buffers, 1):
        buffer[:] = rest[: len(buffer)]
        rest = rest[len(buffer) :]
        yield count
