"""Listings under way: who waits, who is told what, what errors and cancellation leave behind."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.config import MetadataConfig
from cachefs.errors import AccessDenied, NotFound, StorageUnavailable
from cachefs.store.port import ListPage
from cachefs.types import ROOT_INO, Consistency, Ino
from metadata.freshness import Freshness
from metadata.listing import Lister
from metadata.resolver import Resolver
from metadata.store import MetadataWriter
from tests.support.tree import IDENTITY, ReorderedStore, scan_all


class GatedStore(ReorderedStore):
    """Counts pages, and lets a page pass only when it may."""

    order = "s3"

    def __init__(self, page_limit: int = 2) -> None:
        super().__init__()
        self.page_limit = page_limit
        self.pages: list[str | None] = []
        self.heads: list[str] = []
        self.probes: list[str] = []
        self.gate = threading.Semaphore(10**6)
        self.errors: list[Exception] = []

    def close_gate(self) -> None:
        """From now on each page needs a `gate.release()`."""
        self.gate = threading.Semaphore(0)

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        if delimiter:
            self.pages.append(token)
        else:
            self.probes.append(prefix)
        assert self.gate.acquire(timeout=10)
        if self.errors:
            raise self.errors.pop()
        if self.order == "s3":
            return super(ReorderedStore, self).list_page(
                prefix, delimiter=delimiter, token=token, limit=min(limit, self.page_limit)
            )
        return super().list_page(prefix, delimiter=delimiter, token=token, limit=min(limit, self.page_limit))

    def head(self, key: str):
        self.heads.append(key)
        assert self.gate.acquire(timeout=10)
        if self.errors:
            raise self.errors.pop()
        return super().head(key)


async def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(call, *arguments)


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[MetadataWriter]:
    opened = MetadataWriter(str(tmp_path / "volume"), IDENTITY)
    yield opened
    opened.close()


def make(
    writer: MetadataWriter, store: GatedStore, nursery: trio.Nursery, consistency: str = "ttl", ttl_s: float = 60.0
) -> Lister:
    section = MetadataConfig(consistency=Consistency(consistency), metadata_ttl_s=ttl_s)
    return Lister(writer, store, "v", Freshness(section), in_thread, nursery)


def names(writer: MetadataWriter, ino: Ino = ROOT_INO) -> list[bytes]:
    return [entry.name for entry in scan_all(writer, ino)]


async def test_a_fresh_listing_makes_no_request(writer, store, nursery):
    store.put("v/a", b"x")
    lister = make(writer, store, nursery)
    progress = await lister.list_directory(ROOT_INO, None)
    assert (progress.complete, store.pages) == (True, [None])
    assert 59 < progress.valid_s <= 60
    assert (await lister.list_directory(ROOT_INO, None)).complete
    assert (await lister.list_directory(ROOT_INO, b"a")).complete
    assert store.pages == [None]


async def test_pages_that_may_be_old_count_as_old(writer, store, nursery):
    """They come from another node, which may have asked the store some seconds ago."""
    store.put("v/a", b"x")
    section = MetadataConfig(metadata_ttl_s=60.0)
    lister = Lister(writer, GatedStore(), "v", Freshness(section), in_thread, nursery)
    lister.borrow_from(store, 15.0)
    progress = await lister.list_directory(ROOT_INO, None)
    assert progress.complete
    assert 44 < progress.valid_s <= 45
    known = writer.reader.dentry(ROOT_INO, b"a")
    assert known is not None
    age_s = (time.time_ns() - known.checked_ns) / 1e9
    assert 15 <= age_s < 17


async def test_who_lends_pages_may_come_later(writer, store, nursery):
    """A listing on its way goes on as it began, and a name that vanished before stays away."""
    for each in ("v/a", "v/b", "v/c"):
        store.put(each, b"x")
    old = GatedStore()
    for each in ("v/a", "v/b", "v/c", "v/vanished"):
        old.put(each, b"x")
    lister = make(writer, store, nursery, ttl_s=1.0)
    store.close_gate()
    async with trio.open_nursery() as readers:
        readers.start_soon(lister.list_directory, ROOT_INO, None)
        while not store.pages:  # noqa: ASYNC110 - a thread changes it
            await trio.sleep(0.01)
        lister.name_vanished()
        lister.borrow_from(old, 0.5)
        store.gate.release(100)
    known = writer.reader.dentry(ROOT_INO, b"a")
    assert known is not None
    assert (time.time_ns() - known.checked_ns) / 1e9 < 0.5, "it was asked of the store itself"
    await trio.sleep(0.1)
    assert not lister._trusts(lister._elsewhere), "it may be older than the name's end"
    await trio.sleep(1.0)
    assert (await lister.list_directory(ROOT_INO, None)).complete
    assert (store.pages, old.pages) == ([None, "v/b"], [None, "v/b"]), "each from one of them, to the last page"
    lister.borrow_from(None, 0.5)
    await trio.sleep(1.05)
    await lister.list_directory(ROOT_INO, None)
    assert (len(store.pages), len(old.pages)) == (4, 2)


async def test_a_name_that_vanished_is_not_brought_back_by_an_old_page(writer, store, nursery):
    """The other node asked the store before the name was deleted."""
    store.put("v/a", b"x")
    store.put("v/b", b"x")
    old = GatedStore()
    old.put("v/a", b"x")
    old.put("v/b", b"x")
    section = MetadataConfig(metadata_ttl_s=1.0)
    lister = Lister(writer, store, "v", Freshness(section), in_thread, nursery)
    lister.borrow_from(old, 0.25)
    resolver = Resolver(writer, store, "v", Freshness(section), in_thread, lister)
    assert (await lister.list_directory(ROOT_INO, None)).complete
    assert (old.pages, store.pages) == ([None], [])
    store.delete("v/a")
    await trio.sleep(1.05)
    assert (await resolver.resolve(ROOT_INO, b"a")).ino is None
    await lister.list_directory(ROOT_INO, None)
    assert names(writer) == [b"b"]
    assert (old.pages, store.pages) == ([None], [None])
    await trio.sleep(1.05)
    await lister.list_directory(ROOT_INO, None)
    assert old.pages == [None, None], "trusted again"


async def test_a_page_on_its_way_is_asked_for_again_when_a_name_vanishes(writer, store, nursery):
    for each in ("v/a", "v/b"):
        store.put(each, b"x")
    section = MetadataConfig(metadata_ttl_s=60.0)
    slow = GatedStore()
    slow.put("v/a", b"x")
    slow.close_gate()
    lister = Lister(writer, store, "v", Freshness(section), in_thread, nursery)
    lister.borrow_from(slow, 10.0)
    async with trio.open_nursery() as readers:
        readers.start_soon(lister.list_directory, ROOT_INO, None)
        while not slow.pages:  # noqa: ASYNC110 - a thread changes it
            await trio.sleep(0.01)
        lister.name_vanished()
        slow.gate.release()
    assert store.pages == [None]
    assert names(writer) == [b"a", b"b"]


async def test_many_waiters_share_one_listing(writer, store, nursery):
    for i in range(9):
        store.put(f"v/{i}", b"x")
    lister = make(writer, store, nursery)
    store.close_gate()

    async def wait() -> None:
        progress = await lister.list_directory(ROOT_INO, None)
        while not progress.complete:
            progress = await lister.list_directory(ROOT_INO, progress.frontier)

    async with trio.open_nursery() as waiters:
        for _ in range(5):
            waiters.start_soon(wait)
        await trio.sleep(0.02)
        store.gate.release(100)
    assert len(store.pages) == 5
    assert names(writer) == [b"%d" % i for i in range(9)]


async def test_a_first_listing_streams_and_fetches_one_page_ahead(writer, store, nursery):
    for i in range(8):
        store.put(f"v/{i}", b"x")
    lister = make(writer, store, nursery)
    store.close_gate()
    store.gate.release(1)
    with trio.move_on_after(0.1) as waited:  # after the first page nothing is sure but `0`
        progress = await lister.list_directory(ROOT_INO, None)
    assert not waited.cancelled_caught
    assert (progress.complete, progress.frontier, names(writer)) == (False, b"1", [b"0"])
    await trio.sleep(0.05)
    assert len(store.pages) == 2  # the second one is already asked for
    store.gate.release(1)
    progress = await lister.list_directory(ROOT_INO, b"0")
    assert (progress.complete, progress.frontier, names(writer)) == (False, b"3", [b"0", b"1", b"2"])
    store.gate.release(10)
    while not progress.complete:
        progress = await lister.list_directory(ROOT_INO, progress.frontier)
    assert len(names(writer)) == 8


async def test_a_reader_who_saw_everything_below_the_frontier_waits(writer, store, nursery):
    """`a` stays unseen while `a/` may come: going on from `Z` must not spin until then."""
    for key in ("Z", "a", "a-1", "a-2", "a-3", "b"):
        store.put("v/" + key, b"x")
    lister = make(writer, store, nursery)
    store.close_gate()
    store.gate.release(2)
    await lister.list_directory(ROOT_INO, None)
    await trio.sleep(0.05)
    assert names(writer) == [b"Z"]
    with trio.move_on_after(0.05) as waited:
        await lister.list_directory(ROOT_INO, b"Z")
    assert waited.cancelled_caught
    store.gate.release(10)
    await lister.list_directory(ROOT_INO, b"Z")
    assert names(writer) == [b"Z", b"a", b"a-1", b"a-2", b"a-3", b"b"]


async def test_a_cancelled_reader_does_not_cancel_the_listing(writer, store, nursery):
    store.put("v/a", b"x")
    lister = make(writer, store, nursery)
    store.close_gate()
    with trio.move_on_after(0.02):
        await lister.list_directory(ROOT_INO, None)
    store.gate.release(1)
    assert (await lister.list_directory(ROOT_INO, b"")).complete
    assert store.pages == [None]


async def test_an_error_reaches_all_waiters_and_the_next_call_begins_anew(writer, store, nursery):
    for i in range(5):
        store.put(f"v/{i}", b"x")
    lister = make(writer, store, nursery)
    store.close_gate()
    failed: list[str] = []

    async def wait(seen: bytes | None) -> None:
        try:
            progress = await lister.list_directory(ROOT_INO, seen)
            while not progress.complete:
                progress = await lister.list_directory(ROOT_INO, progress.frontier)
        except StorageUnavailable as error:
            failed.append(str(error))

    async with trio.open_nursery() as waiters:
        for seen in (None, None, b"2"):
            waiters.start_soon(wait, seen)
        store.gate.release(1)
        await trio.sleep(0.05)
        store.errors.append(StorageUnavailable("the store is away"))
        store.gate.release(1)
    assert failed == ["the store is away"] * 3
    known = writer.reader.directory(ROOT_INO)
    assert known is not None
    assert not known.complete
    store.gate.release(100)
    progress = await lister.list_directory(ROOT_INO, b"0")  # a reader in the middle of the directory goes on
    while not progress.complete:
        progress = await lister.list_directory(ROOT_INO, progress.frontier)
    assert names(writer) == [b"%d" % i for i in range(5)]


async def test_a_failed_relisting_keeps_the_old_one(writer, store, nursery):
    for i in range(5):
        store.put(f"v/{i}", b"x")
    lister = make(writer, store, nursery, ttl_s=0)
    await make(writer, store, nursery).list_directory(ROOT_INO, b"9")
    store.errors.append(AccessDenied("no"))
    with pytest.raises(AccessDenied, match="no"):
        await lister.list_directory(ROOT_INO, None)
    requested = len(store.pages)
    assert (await lister.list_directory(ROOT_INO, b"2")).complete  # who is in the middle goes on
    assert len(store.pages) == requested
    assert names(writer) == [b"%d" % i for i in range(5)]


async def test_a_relisting_is_waited_for(writer, store, nursery):
    for i in range(5):
        store.put(f"v/{i}", b"x")
    lister = make(writer, store, nursery, ttl_s=0)
    await lister.list_directory(ROOT_INO, b"9")
    store.put("v/new", b"x")
    store.delete("v/3")
    progress = await lister.list_directory(ROOT_INO, None)
    assert (progress.complete, progress.valid_s) == (True, 0)
    assert names(writer) == [b"0", b"1", b"2", b"4", b"new"]


async def test_a_vanished_directory_is_not_found(writer, store, nursery):
    store.put("v/d/f", b"x")
    lister = make(writer, store, nursery, ttl_s=0)
    await lister.list_directory(ROOT_INO, None)
    directory = writer.reader.dentry(ROOT_INO, b"d")
    assert directory is not None
    store.delete("v/d/f")
    for _ in range(2):
        with pytest.raises(NotFound):
            await lister.list_directory(directory.ino, None)
        assert names(writer) == []
    with pytest.raises(NotFound):
        await lister.list_directory(directory.ino, b"f")


async def test_an_unknown_directory_is_an_error(writer, store, nursery):
    with pytest.raises(Exception, match="no longer known"):
        await make(writer, store, nursery).list_directory(Ino(77), None)


@pytest.mark.expect_warnings("listing of directory")
async def test_a_fault_inside_reaches_the_waiter_and_not_the_agent(writer, store, nursery):
    store.errors.append(ZeroDivisionError())
    with pytest.raises(StorageUnavailable, match="inside cachefs"):
        await make(writer, store, nursery).list_directory(ROOT_INO, None)


async def test_strict_shares_only_what_begins_after_the_question(writer, store, nursery):
    store.put("v/a", b"x")
    lister = make(writer, store, nursery, "strict")
    store.close_gate()
    seen: list[list[bytes]] = []

    async def wait() -> None:
        await lister.list_directory(ROOT_INO, None)
        seen.append(names(writer))

    async with trio.open_nursery() as waiters:
        waiters.start_soon(wait)
        await trio.sleep(0.02)
        for _ in range(3):
            waiters.start_soon(wait)
        await trio.sleep(0.02)
        store.gate.release(1)
        await trio.sleep(0.05)
        assert seen == [[b"a"]]
        store.put("v/b", b"x")
        store.gate.release(100)
    assert seen == [[b"a"], *[[b"a", b"b"]] * 3]
    assert len(store.pages) == 2


async def test_immutable_lists_once(writer, store, nursery):
    store.put("v/a", b"x")
    lister = make(writer, store, nursery, "immutable", ttl_s=0)
    await lister.list_directory(ROOT_INO, None)
    store.put("v/b", b"x")
    progress = await lister.list_directory(ROOT_INO, None)
    assert progress.complete
    assert progress.valid_s >= 86400 * 365
    assert names(writer) == [b"a"]


async def test_a_store_without_order_fails_once_and_then_works_unstreamed(writer, store, nursery):
    store.order = "reverse"
    for i in range(6):
        store.put(f"v/{i}", b"x")
    lister = make(writer, store, nursery, ttl_s=0)
    with pytest.raises(StorageUnavailable, match="no order"):
        await lister.list_directory(ROOT_INO, b"9")
    for change in (lambda: None, lambda: store.delete("v/3"), lambda: store.put("v/3", b"y")):
        change()
        progress = await lister.list_directory(ROOT_INO, None)
        assert progress.complete
        assert [f"v/{name.decode()}" for name in names(writer)] == sorted(store._objects)


async def test_a_store_that_repeats_a_page_does_not_hang(writer, store, nursery):
    class Repeating(GatedStore):
        def list_page(self, *arguments, **options):
            page = super().list_page(*arguments, **options)
            return ListPage(page.objects, page.prefixes, "same")

    repeating = Repeating()
    repeating.put("v/a", b"x")
    with trio.fail_after(5), pytest.raises(StorageUnavailable, match="again and again"):
        await make(writer, repeating, nursery).list_directory(ROOT_INO, b"x")


async def test_a_listing_slower_than_the_ttl_is_still_good_for_the_next_reader(writer, store, nursery):
    store.put("v/a", b"x")
    lister = make(writer, store, nursery, ttl_s=0.5)
    store.close_gate()
    async with trio.open_nursery() as waiters:
        waiters.start_soon(lister.list_directory, ROOT_INO, None)
        await trio.sleep(0.7)
        store.gate.release(1)
    assert (await lister.list_directory(ROOT_INO, None)).valid_s > 0
    assert store.pages == [None]


async def test_a_ttl_of_forever(writer, store, nursery):
    store.put("v/a", b"x")
    lister = make(writer, store, nursery, ttl_s=math.inf)
    assert (await lister.list_directory(ROOT_INO, None)).valid_s >= 86400 * 365
