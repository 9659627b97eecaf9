"""The store of a volume as everybody else holds it: credentials may be renewed below it at any time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cachefs.store.port import ListPage, ObjectInfo, Orders
from cachefs.store.retry import RetryingStore
from cachefs.types import ObjectVersion, Tier


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

    @property
    def view(self) -> str:
        """See `RetryingStore.view`."""
        return self.now.view

    @property
    def max_requests(self) -> int:
        """See `BlockSource.max_requests`."""
        return self.now.max_requests

    @property
    def spread(self) -> bool:
        """See `BlockSource.spread`."""
        return True

    def check(self, prefix: str) -> None:
        """See `ObjectStore.check`."""
        self.now.check(prefix)

    def get_range(self, version: ObjectVersion, start: int, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self.now.get_range(version, start, length)

    def read_into(self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]) -> Iterator[int]:
        """See `ObjectStore.read_into`."""
        return self.now.read_into(version, start, buffers)

    def get_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `BulkStore.get_many`."""
        self.now.get_many(versions, orders)

    def route(self, version: ObjectVersion, start: int) -> CurrentStore:
        """See `BlockSource.route`."""
        return self

    def read_blocks(
        self, version: ObjectVersion, start: int, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[int, Tier]]:
        """See `BlockSource.read_blocks`."""
        for count in self.now.read_into(version, start, buffers):
            yield count, Tier.ORIGIN

    def read_many(self, versions: Sequence[ObjectVersion], orders: Orders) -> None:
        """See `BlockSource.read_many`."""
        self.now.get_many(versions, orders)

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore.head`."""
        return self.now.head(key)

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        """See `ObjectStore.list_page`."""
        return self.now.list_page(prefix, delimiter=delimiter, token=token, limit=limit)

    def close(self) -> None:
        """See `ObjectStore.close`."""
        self.now.close()
