"""Listings that nodes share: who is asked, how old a page may be, what happens when nobody answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from cachefs.errors import AccessDenied
from cachefs.metrics import Counters
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage
from peer import listings
from peer.leash import Leash
from peer.listings import ListingPages, PeerListings, shared_age_s
from peer.members import Member, View
from peer.source import Neighbours
from peer.wire import BatchRequest, BlockRequest, ListingRequest, PeerUnavailable

VOLUME = "0123456789abcdef"


class Store(MemoryStore):
    """Counts pages; can be held or refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[tuple[str, str | None]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        self.pages.append((prefix, token))
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return super().list_page(prefix, delimiter=delimiter, token=token, limit=limit)


@pytest.fixture
def store() -> Store:
    filled = Store()
    for name in ("p/a", "p/b", "p/c/d", "p/\udcff"):
        filled.put(name, name.encode("utf-8", "surrogateescape"))
    return filled


def request(**more: Any) -> ListingRequest:
    asked = {"volume": VOLUME, "prefix": "p/", "delimiter": "/", "token": None, "limit": 1000, "max_age_s": 10.0}
    return ListingRequest(**{**asked, **more})


def test_a_page_is_kept_for_as_long_as_it_may_be_used(store: Store) -> None:
    pages = ListingPages()
    first, age_s = pages.page(store, request())
    assert first == MemoryStore.list_page(store, "p/")
    assert age_s < 1
    store.put("p/new", b"")
    assert pages.page(store, request())[0] == first
    assert len(store.pages) == 1
    assert len(pages.page(store, request(max_age_s=0.0))[0].objects) == 4
    assert len(pages.page(store, request())[0].objects) == 4, "the newer one is kept"
    assert len(store.pages) == 2


def test_each_page_is_one_of_its_own(store: Store) -> None:
    pages = ListingPages()
    for more in ({}, {"token": "p/a"}, {"limit": 1}, {"prefix": "p/c/"}, {"delimiter": ""}):
        pages.page(store, request(**more))
    assert len(store.pages) == 5
    other = Store()
    other._bucket = "other"
    pages.page(other, request(volume="f" * 16))
    assert len(other.pages) == 1


def test_many_who_want_a_page_wait_for_the_first(store: Store) -> None:
    pages, found = ListingPages(), []
    store.gate.clear()
    threads = [threading.Thread(target=lambda: found.append(pages.page(store, request())[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    store.gate.set()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8
    assert len(store.pages) == 1


def test_a_failure_reaches_all_who_wait_and_is_not_kept(store: Store) -> None:
    pages, failed = ListingPages(), []
    store.gate.clear()
    store.error = AccessDenied("403")

    def ask() -> None:
        try:
            pages.page(store, request())
        except AccessDenied as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    store.gate.set()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 3
    assert len({id(error) for error in failed}) == 3, "each has a traceback of its own"
    store.error = None
    assert pages.page(store, request())[0].objects


def test_what_is_kept_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "KEPT_BYTES", 50_000)
    pages = ListingPages()
    for number in range(200):
        pages.page(store, request(prefix="p/", limit=1000 - number))
    assert pages._bytes <= 50_000
    assert pages._bytes == sum(page.size for page in pages._pages.values())
    assert 0 < len(pages._pages) < 30
    monkeypatch.setattr(listings, "MAX_AGE_S", 0.0)
    pages.page(store, request())
    assert len(pages._pages) <= 1, "nobody would take the others any more"


class Client:
    def __init__(self, page: ListPage | None) -> None:
        self.page = page
        self.asked: list[tuple[str, ListingRequest]] = []

    def list_page(self, peer: Member, asked: ListingRequest) -> tuple[ListPage, float]:
        self.asked.append((peer.name, asked))
        if self.page is None:
            raise PeerUnavailable("gone")
        return self.page, 3.0

    def read_blocks(
        self, peer: Member, request: BlockRequest, buffers: Sequence[memoryview], leash: Leash | None = None
    ) -> Iterator[int]:
        raise AssertionError("nobody asks for blocks here")

    def read_batch(self, peer: Member, request: BatchRequest) -> Iterator[memoryview | None]:
        raise AssertionError("nobody asks for many files here")


def rig(
    store: Store, others: str, answer: ListPage | None, max_age_s: Callable[[], float] = lambda: 12.0
) -> tuple[PeerListings, Client, Counters]:
    members = tuple(Member(node_id=letter * 16, name=letter, address="127.0.0.1:1") for letter in others)
    client, counters = Client(answer), Counters()
    view = View({member.node_id: member for member in members}, {VOLUME: members})
    neighbours = Neighbours(
        client,
        lambda: view,
        lambda: "0" * 16,
        zone="",
        block_size=1 << 20,
        counters=counters,
    )
    return PeerListings(VOLUME, store, neighbours, ListingPages(), max_age_s), client, counters


def test_the_owner_of_a_directory_is_asked(store: Store) -> None:
    answer = ListPage((), ("p/theirs/",), "next")
    shared, client, counters = rig(store, "bcd", answer)
    assert shared.list_page("p/") == answer
    assert shared.list_page("p/", token="next") == answer
    assert len({name for name, _ in client.asked}) == 1, "all pages of a directory have one owner"
    assert client.asked[0][1] == request(max_age_s=12.0)
    assert client.asked[1][1] == request(max_age_s=12.0, token="next")
    for number in range(50):
        shared.list_page(f"p/{number}/")
    assert {name for name, _ in client.asked} == {"b", "c", "d"}
    assert store.pages == []
    assert counters.get("peer_listing_pages") == 52


def test_when_nobody_answers_the_store_is_asked(store: Store) -> None:
    shared, client, counters = rig(store, "bcd", None)
    assert shared.list_page("p/") == MemoryStore.list_page(store, "p/")
    assert len(client.asked) == counters.get("peer_listing_failures") == 2
    alone, client, _ = rig(store, "", None)
    assert alone.list_page("p/").prefixes == ("p/c/",)
    assert client.asked == []


def test_how_old_a_page_may_be_is_looked_up_for_each(store: Store) -> None:
    ages = iter([0.5, 3.0])
    shared, client, _ = rig(store, "bcd", ListPage((), (), None), lambda: next(ages))
    shared.list_page("p/")
    shared.list_page("p/")
    assert [asked.max_age_s for _, asked in client.asked] == [0.5, 3.0]


@pytest.mark.parametrize(("ttl_s", "age_s"), [(60.0, 15.0), (4.0, 1.0), (float("inf"), 15.0), (0.4, 0.1)])
def test_a_page_is_never_older_than_a_part_of_its_time(ttl_s: float, age_s: float) -> None:
    assert shared_age_s(ttl_s) == age_s
