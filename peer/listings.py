"""Listings that several nodes want are made by one of them: each directory has an owner, who keeps its pages a moment.

    Lister -> PeerListings.list_page -> the owner of the directory: ListingPages -> the store
                                     -> nobody answers:                             the store

A page is as old as `max_age_s` at the most when it is given away, and whoever takes it counts it as that old
(`metadata.listing.Lister`): what the rules of freshness promise holds as without peers. Only listings of directories
are shared; whether a single name exists is asked of the store.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec
import xxhash

from cachefs import metrics
from cachefs.errors import CachefsError
from cachefs.store.port import ListPage, ObjectStore
from peer.source import Neighbours
from peer.wire import ListingRequest, PeerUnavailable, decode_page, encode_page

log = logging.getLogger(__name__)

MAX_AGE_S = 15.0
"""The oldest page that is given away."""
TTL_SHARE = 4
"""... and not older than this part of the time for which a listing is trusted."""
KEPT_BYTES = 16 << 20
WAIT_S = 30.0


def shared_age_s(ttl_s: float) -> float:
    """Return how old a page may be where listings are trusted for `ttl_s`."""
    return min(MAX_AGE_S, ttl_s / TTL_SHARE)


PAGE_BYTES = 2048
"""What a page takes beside its entries."""


class _Page:
    """One page, there or on its way."""

    __slots__ = ("arrived", "asked_at", "encoded", "error", "size")

    def __init__(self) -> None:
        self.asked_at = time.monotonic()
        self.arrived = threading.Event()
        self.encoded = b""
        self.size = PAGE_BYTES
        self.error: CachefsError | None = None


class ListingPages:
    """Pages that were listed a moment ago, of all volumes of this node; who asks for the same page waits for the first.

    Any thread; BLOCKS.
    """

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[str, ListingRequest], _Page] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def page(self, store: ObjectStore, request: ListingRequest) -> tuple[ListPage, float]:
        """Return a page, and how old it is in seconds. Raises what `ObjectStore.list_page` raises."""
        key = (store.endpoint, msgspec.structs.replace(request, max_age_s=0.0))
        with self._lock:
            page = self._pages.get(key)
            mine = page is None or time.monotonic() - page.asked_at > request.max_age_s
            if page is None or mine:
                page = self._keep(key, _Page())
        if mine:
            self._list(store, request, key, page)
        elif not page.arrived.wait(WAIT_S):
            return _list(store, request), 0.0
        if page.error is not None:
            raise copy.copy(page.error) from page.error  # each who waits adds a traceback of its own
        return decode_page(page.encoded), time.monotonic() - page.asked_at

    def _list(self, store: ObjectStore, request: ListingRequest, key: tuple[str, ListingRequest], page: _Page) -> None:
        try:
            page.encoded = encode_page(_list(store, request))
        except CachefsError as error:
            page.error = error
            self._forget(key, page)
        except BaseException as error:
            page.error = CachefsError(f"listing failed: {error!r}")
            self._forget(key, page)
            raise
        finally:
            page.arrived.set()
        with self._lock:
            if self._pages.get(key) is page:
                page.size += len(page.encoded)
                self._bytes += len(page.encoded)
            self._drop_oldest()

    def _keep(self, key: tuple[str, ListingRequest], page: _Page) -> _Page:
        old = self._pages.pop(key, None)
        if old is not None:
            self._bytes -= old.size
        self._pages[key] = page
        self._bytes += page.size
        self._drop_oldest()
        return page

    def _drop_oldest(self) -> None:
        """Forget pages that are too old to be given away, and those for which there is no room. Under the lock."""
        oldest = time.monotonic() - MAX_AGE_S
        while self._pages:
            page = next(iter(self._pages.values()))
            if page.asked_at >= oldest and self._bytes <= KEPT_BYTES:
                break
            self._bytes -= self._pages.popitem(last=False)[1].size

    def _forget(self, key: tuple[str, ListingRequest], page: _Page) -> None:
        with self._lock:
            if self._pages.get(key) is page:
                del self._pages[key]
                self._bytes -= page.size


def _list(store: ObjectStore, request: ListingRequest) -> ListPage:
    return store.list_page(request.prefix, delimiter=request.delimiter, token=request.token, limit=request.limit)


class PeerListings:
    """Listings of directories that come from their owner (a `metadata.listing.PageSource`). Any thread; BLOCKS."""

    def __init__(
        self,
        volume: str,
        store: ObjectStore,
        neighbours: Neighbours,
        pages: ListingPages,
        max_age_s: Callable[[], float],
    ) -> None:
        """`volume`: its name among peers; `max_age_s` returns how old a page may be that is asked for now."""
        self._volume = volume
        self._store = store
        self._neighbours = neighbours
        self._pages = pages
        self._max_age_s = max_age_s

    def list_page(self, prefix: str, *, token: str | None = None, limit: int = 1000) -> ListPage:
        """Return one page of a directory. Raises what `ObjectStore.list_page` raises."""
        request = ListingRequest(
            volume=self._volume,
            prefix=prefix,
            delimiter="/",
            token=token,
            limit=limit,
            max_age_s=self._max_age_s(),
        )
        unit = xxhash.xxh3_128_digest(f"{self._volume}\0{prefix}".encode("utf-8", "surrogateescape"))
        counters = self._neighbours.counters
        for member in self._neighbours.candidates(self._volume, unit).before:
            try:
                page, _ = self._neighbours.client.list_page(member, request)
            except PeerUnavailable as error:
                counters.add(metrics.PEER_LISTING_FAILURES.name)
                log.debug("%s is asked in vain for the listing of %r: %s", member.name, prefix, error)
            else:
                counters.add(metrics.PEER_LISTING_PAGES.name)
                return page
        return self._pages.page(self._store, request)[0]
