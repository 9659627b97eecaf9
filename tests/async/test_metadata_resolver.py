"""What one name costs, and who shares its price."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.config import MetadataConfig
from cachefs.errors import AccessDenied, NotADirectory, StorageUnavailable
from cachefs.store.port import ObjectInfo
from cachefs.types import ROOT_INO, Consistency, FileKind, Ino
from metadata.flights import SingleFlight
from metadata.freshness import Freshness
from metadata.listing import Lister
from metadata.resolver import Resolver
from metadata.store import MetadataWriter
from tests.support.tree import IDENTITY, scan_all

from .test_metadata_listing import GatedStore, in_thread


@pytest.fixture
def store() -> GatedStore:
    return GatedStore(1000)


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[MetadataWriter]:
    opened = MetadataWriter(str(tmp_path / "volume"), IDENTITY)
    yield opened
    opened.close()


def make(
    writer: MetadataWriter,
    store: GatedStore,
    nursery: trio.Nursery | None = None,
    consistency: str = "ttl",
    ttl_s: float = 60.0,
    negative_s: float = 5.0,
) -> Resolver:
    section = MetadataConfig(consistency=Consistency(consistency), metadata_ttl_s=ttl_s, negative_ttl_s=negative_s)
    fresh = Freshness(section)
    lister = Lister(writer, store, "v/", fresh, in_thread, nursery) if nursery is not None else None
    return Resolver(writer, store, "v/", fresh, in_thread, lister)


async def list_whole(lister: Lister) -> None:
    progress = await lister.list_directory(ROOT_INO, None)
    while not progress.complete:
        progress = await lister.list_directory(ROOT_INO, progress.frontier)


def requests(store: GatedStore) -> tuple[int, int, int]:
    """HEADs, LISTs of one key, pages of listings since the last call."""
    counted = (len(store.heads), len(store.probes), len(store.pages))
    store.heads, store.probes, store.pages = [], [], []
    return counted


async def test_what_each_kind_of_name_costs(writer, store):
    store.put("v/f", b"x")
    store.put("v/d/x", b"x")
    resolver = make(writer, store, ttl_s=0, negative_s=0)
    for name, first, again in (
        (b"f", (1, 1, 0), (1, 0, 0)),
        (b"d", (1, 1, 0), (0, 1, 0)),
        (b"n", (1, 1, 0), (1, 1, 0)),
    ):
        one = await resolver.resolve(ROOT_INO, name)
        assert requests(store) == first
        two = await resolver.resolve(ROOT_INO, name)
        assert requests(store) == again
        assert one.ino == two.ino
        assert one.valid_s == 0
    store.delete("v/f")
    store.delete("v/d/x")
    for name in (b"f", b"d"):
        assert (await resolver.resolve(ROOT_INO, name)).ino is None
        assert requests(store) == (1, 1, 0)
    assert writer.reader.counts() == (0, 0)


async def test_trusted_names_cost_nothing(writer, store):
    store.put("v/f", b"x", user={"mode": "100600"})
    resolver = make(writer, store)
    found = await resolver.resolve(ROOT_INO, b"f")
    assert 59 < found.valid_s <= 60
    assert found.ino is not None
    inode = writer.reader.inode(found.ino)
    assert inode is not None
    assert inode.mode == 0o600
    absent = await resolver.resolve(ROOT_INO, b"n")
    assert absent.ino is None
    assert 4 < absent.valid_s <= 5
    assert requests(store) == (2, 2, 0)
    for name in (b"f", b"n"):
        await resolver.resolve(ROOT_INO, name)
    assert requests(store) == (0, 0, 0)
    for name in (b"..", b"x" * 256, b"a/b", b"\0", b""):
        assert (await resolver.resolve(ROOT_INO, name)).ino is None
    assert requests(store) == (0, 0, 0)


async def test_a_replaced_object_is_another_inode(writer, store):
    store.put("v/f", b"x")
    resolver = make(writer, store, ttl_s=0)
    one = await resolver.resolve(ROOT_INO, b"f")
    store.put("v/f", b"y")
    two = await resolver.resolve(ROOT_INO, b"f")
    assert one.ino != two.ino
    store.delete("v/f")
    store.put("v/f/x", b"y")
    three = await resolver.resolve(ROOT_INO, b"f")
    assert three.ino not in (one.ino, two.ino)
    assert three.ino is not None
    inode = writer.reader.inode(three.ino)
    assert inode is not None
    assert inode.kind is FileKind.DIRECTORY
    assert (await resolver.resolve(three.ino, b"x")).ino is not None
    assert one.ino is not None
    with pytest.raises(NotADirectory):
        await resolver.resolve(one.ino, b"x")


async def test_the_directory_wins(writer, store):
    store.put("v/a", b"x")
    store.put("v/a/b", b"x")
    found = await make(writer, store).resolve(ROOT_INO, b"a")
    assert found.ino is not None
    assert writer.reader.key_of(found.ino) == "v/a/"


async def test_one_name_is_asked_for_once_by_many(writer, store):
    store.put("v/f", b"x")
    resolver = make(writer, store)
    store.close_gate()
    found = []

    async def ask() -> None:
        found.append(await resolver.resolve(ROOT_INO, b"f"))

    async with trio.open_nursery() as many:
        for _ in range(10):
            many.start_soon(ask)
        await trio.sleep(0.02)
        store.gate.release(2)
    assert len({answer.ino for answer in found}) == 1
    assert requests(store) == (1, 1, 0)


async def test_strict_asks_each_time_and_shares_only_later_questions(writer, store):
    store.put("v/f", b"x")
    resolver = make(writer, store, consistency="strict")
    one = await resolver.resolve(ROOT_INO, b"f")
    two = await resolver.resolve(ROOT_INO, b"f")
    assert (one.ino, one.valid_s) == (two.ino, 0)
    assert requests(store) == (2, 1, 0)
    store.close_gate()
    found = []

    async def ask() -> None:
        found.append((await resolver.resolve(ROOT_INO, b"f")).ino)

    async with trio.open_nursery() as many:
        many.start_soon(ask)
        await trio.sleep(0.02)
        many.start_soon(ask)
        many.start_soon(ask)
        await trio.sleep(0.02)
        store.gate.release(1)
        await trio.sleep(0.05)
        store.put("v/f", b"newer")
        store.gate.release(10)
    assert found[0] == one.ino
    assert found[1] == found[2] != one.ino
    assert requests(store) == (2, 0, 0)


async def test_a_cancelled_question_is_taken_over():
    flights: SingleFlight[str, int] = SingleFlight()
    begun: list[int] = []
    release = trio.Event()

    async def work() -> int:
        begun.append(1)
        await release.wait()
        return len(begun)

    results = []

    async def ask() -> None:
        results.append(await flights.run("key", work))

    async with trio.open_nursery() as many:
        scope = trio.CancelScope()

        async def first() -> None:
            with scope:
                await ask()

        many.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        many.start_soon(ask)
        many.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        release.set()
    assert results == [2, 2]


async def test_errors_of_one_question_when_the_other_answers(writer, store, monkeypatch):
    store.put("v/f", b"x")
    store.put("v/d/x", b"x")
    resolver = make(writer, store, ttl_s=0, negative_s=0)

    def denied(*_arguments, **_options):
        raise AccessDenied("403")

    with monkeypatch.context() as patch:
        patch.setattr(store, "list_page", denied)
        assert (await resolver.resolve(ROOT_INO, b"f")).ino is not None  # no right to list: files still work
        with pytest.raises(AccessDenied):
            await resolver.resolve(ROOT_INO, b"n")
    with monkeypatch.context() as patch:
        patch.setattr(store, "head", denied)
        assert (await resolver.resolve(ROOT_INO, b"d")).ino is not None
        with pytest.raises(AccessDenied):
            await resolver.resolve(ROOT_INO, b"n")


async def test_many_names_of_one_directory_become_a_listing(writer, store, nursery):
    for i in range(100):
        store.put(f"v/{i:03}", b"x")
    resolver = make(writer, store, nursery)
    for i in range(100):
        assert (await resolver.resolve(ROOT_INO, b"%03d" % i)).ino is not None
        assert (await resolver.resolve(ROOT_INO, b"no-%03d" % i)).ino is None
    assert requests(store) == (8, 8, 1)


async def test_a_huge_directory_is_not_waited_for(writer, store, nursery, monkeypatch):
    monkeypatch.setattr("metadata.resolver.PATIENCE_S", 0.1)
    for i in range(100):
        store.put(f"v/{i:03}", b"x")
    store.page_limit = 10
    resolver = make(writer, store, nursery)
    for i in range(8):
        await resolver.resolve(ROOT_INO, b"%03d" % i)
    store.close_gate()
    store.gate.release(2)
    begun = trio.current_time()

    async def let_heads_pass() -> None:
        await trio.sleep(0.2)
        store.gate.release(1000)

    nursery.start_soon(let_heads_pass)
    assert (await resolver.resolve(ROOT_INO, b"099")).ino is not None
    assert trio.current_time() - begun < 2
    heads, _, _ = requests(store)
    assert heads == 9


async def test_strict_never_answers_from_a_listing(writer, store, nursery):
    store.put("v/f", b"x")
    resolver = make(writer, store, nursery, "strict")
    for _ in range(20):
        await resolver.resolve(ROOT_INO, b"f")
    assert requests(store) == (20, 1, 0)


async def test_a_directory_that_may_not_be_listed_is_tried_once(writer, store, nursery, monkeypatch):
    for i in range(40):
        store.put(f"v/{i:03}", b"x")
    tried = []

    def denied(*arguments: object, **_options: object) -> None:
        tried.append(arguments)
        raise AccessDenied("403")

    real = store.list_page
    monkeypatch.setattr(
        store, "list_page", lambda *a, **o: real(*a, **o) if o.get("delimiter", "/") == "" else denied(*a, **o)
    )
    resolver = make(writer, store, nursery)
    for i in range(40):
        assert (await resolver.resolve(ROOT_INO, b"%03d" % i)).ino is not None
    assert len(tried) == 1


@pytest.mark.expect_warnings("without being dated")
async def test_an_unchanged_name_is_answered_when_nothing_can_be_written(writer, store, monkeypatch):
    store.put("v/f", b"x")
    store.put("v/d/x", b"x")
    resolver = make(writer, store, ttl_s=0, negative_s=0)
    file = await resolver.resolve(ROOT_INO, b"f")
    directory = await resolver.resolve(ROOT_INO, b"d")

    def full(*_arguments):
        raise StorageUnavailable("no space left on device")

    monkeypatch.setattr(writer, "commit_name", full)
    assert (await resolver.resolve(ROOT_INO, b"f")).ino == file.ino
    assert (await resolver.resolve(ROOT_INO, b"d")).ino == directory.ino
    assert (await resolver.resolve(ROOT_INO, b"absent")).ino is None
    store.put("v/f", b"changed")
    store.put("v/new", b"x")
    for name in (b"f", b"new"):
        with pytest.raises(StorageUnavailable, match="no space"):
            await resolver.resolve(ROOT_INO, name)


async def test_names_and_listings_at_the_same_time(writer, store, nursery):
    for i in range(60):
        store.put(f"v/{i:03}", b"x")
    store.page_limit = 5
    resolver = make(writer, store, nursery, ttl_s=0, negative_s=0)
    lister = Lister(writer, store, "v/", Freshness(MetadataConfig(metadata_ttl_s=0)), in_thread, nursery)
    inos: dict[bytes, set[int | None]] = {}

    async def ask(name: bytes) -> None:
        for _ in range(3):
            inos.setdefault(name, set()).add((await resolver.resolve(ROOT_INO, name)).ino)

    async with trio.open_nursery() as many:
        for i in range(60):
            many.start_soon(ask, b"%03d" % i)
        for _ in range(4):
            await list_whole(lister)
    await list_whole(lister)
    assert all(len(found) == 1 for found in inos.values())
    assert {entry.ino for entry in scan_all(writer, ROOT_INO)} == {ino for found in inos.values() for ino in found}


async def found_by(resolver: Resolver, name: bytes) -> Ino:
    """Resolve a name that exists."""
    ino = (await resolver.resolve(ROOT_INO, name)).ino
    assert ino is not None
    return ino


async def test_a_version_that_is_gone_ends_the_time_of_its_name(writer, store):
    store.put("v/over", b"old")
    store.put("v/gone", b"old")
    resolver = make(writer, store, ttl_s=1e9)
    over, gone = await found_by(resolver, b"over"), await found_by(resolver, b"gone")
    store.put("v/over", b"newer")
    store.delete("v/gone")
    requests(store)
    assert (await resolver.resolve(ROOT_INO, b"over")).ino == over
    await resolver.recheck(over)
    assert requests(store) == (1, 0, 0)
    await resolver.recheck(gone)
    assert requests(store) == (1, 1, 0)
    found = writer.reader.dentry(ROOT_INO, b"over")
    assert found is not None
    assert found.ino != over
    assert found.size == 5
    assert writer.reader.dentry(ROOT_INO, b"gone") is None
    assert (await resolver.resolve(ROOT_INO, b"over")).ino == found.ino
    assert (await resolver.resolve(ROOT_INO, b"gone")).ino is None
    for ino in (over, gone, Ino(12345)):
        await resolver.recheck(ino)
    assert requests(store) == (0, 0, 0), "their names lead elsewhere already"


async def test_a_complete_listing_learns_of_a_version_that_is_gone(writer, store):
    store.put("v/f", b"old")
    store.put("v/g", b"old")
    async with trio.open_nursery() as nursery:
        fresh = Freshness(MetadataConfig(metadata_ttl_s=1e9))
        await list_whole(Lister(writer, store, "v/", fresh, in_thread, nursery))
    resolver = make(writer, store, ttl_s=1e9)
    entry = scan_all(writer, ROOT_INO)[0]
    store.delete("v/f")
    await resolver.recheck(entry.ino)
    assert [left.name for left in scan_all(writer, ROOT_INO)] == [b"g"]
    requests(store)
    assert (await resolver.resolve(ROOT_INO, b"f")).ino is None
    assert requests(store) == (0, 0, 0)


@pytest.mark.parametrize("consistency", ["immutable", "strict"])
async def test_names_that_are_pinned_or_always_asked_for_are_not_asked_for_again(writer, store, consistency):
    store.put("v/f", b"old")
    resolver = make(writer, store, consistency=consistency)
    found = await found_by(resolver, b"f")
    store.put("v/f", b"newer")
    requests(store)
    await resolver.recheck(found)
    assert requests(store) == (0, 0, 0)


async def test_many_who_find_a_version_gone_ask_once_and_not_with_an_older_question(writer, store, monkeypatch):
    store.put("v/f", b"old")
    resolver = make(writer, store, ttl_s=0)
    found = await found_by(resolver, b"f")
    head, release, asked = store.head, threading.Event(), []

    def slow_head(key: str) -> ObjectInfo:
        answer: ObjectInfo = head(key)
        asked.append(answer.size)
        assert release.wait(10)
        return answer

    monkeypatch.setattr(store, "head", slow_head)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(resolver.resolve, ROOT_INO, b"f")
        while not asked:  # noqa: ASYNC110 - a thread says so
            await trio.sleep(0.01)
        store.put("v/f", b"newer")
        for _ in range(20):
            nursery.start_soon(resolver.recheck, found)
        await trio.testing.wait_all_tasks_blocked(0.05)
        release.set()
    assert asked == [3, 5]
    now = writer.reader.dentry(ROOT_INO, b"f")
    assert now is not None
    assert now.size == 5


async def test_a_refusal_leaves_the_name_as_it_was(writer, store):
    store.put("v/f", b"old")
    resolver = make(writer, store, ttl_s=1e9)
    found = await found_by(resolver, b"f")
    store.errors.append(AccessDenied("403"))
    with pytest.raises(AccessDenied):
        await resolver.recheck(found)
    now = writer.reader.dentry(ROOT_INO, b"f")
    assert now is not None
    assert now.ino == found
