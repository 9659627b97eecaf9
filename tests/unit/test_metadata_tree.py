"""What listings and names do to the tree, case by case (any mixture of them: test_metadata_model.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachefs.errors import NotADirectory, NotFound, StaleObject
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import ROOT_INO, Ino
from metadata.changes import RETAIN_NS
from metadata.facts import Finding, head_facts, page_entries
from metadata.store import MetadataWriter
from tests.support.tree import (
    START_NS,
    Clock,
    ask_name,
    check_invariants,
    ino_at,
    list_everything,
    list_whole,
    scan_all,
    store_of,
    writer_at,
)


@pytest.fixture
def writer(tmp_path: Path):
    with writer_at(tmp_path / "volume") as opened:
        yield opened


@pytest.fixture
def store():
    return MemoryStore()


def names(writer: MetadataWriter, ino: Ino = ROOT_INO) -> list[bytes]:
    return [entry.name for entry in scan_all(writer, ino)]


def test_a_changed_object_gets_a_new_inode_and_the_old_one_stays(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/f", b"one")
    list_whole(writer, store, ROOT_INO, clock)
    old = ino_at(writer, b"f")
    store.put("v/f", b"other")
    list_whole(writer, store, ROOT_INO, clock)
    new = ino_at(writer, b"f")
    assert new != old
    before, after = writer.reader.inode(old), writer.reader.inode(new)
    assert before is not None
    assert after is not None
    assert (before.size, after.size) == (3, 5)
    assert writer.reader.key_of(old) == writer.reader.key_of(new) == "v/f"
    assert writer.reader.scan(ROOT_INO, old, 9) == []  # still a position
    while writer.purge(clock.now_ns + RETAIN_NS - 1):
        pass
    assert writer.reader.inode(old) == before
    while writer.purge(clock.now_ns + RETAIN_NS + 10**10):
        pass
    assert writer.reader.inode(old) is None
    assert writer.reader.inode(new) == after
    with pytest.raises(StaleObject):
        writer.reader.scan(ROOT_INO, old, 9)
    with pytest.raises(StaleObject):
        writer.reader.key_of(old)


def test_a_directory_that_returns_has_its_number_back(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    known = Ino(0)
    for _ in range(2):
        store.put("v/d/f", b"one")
        list_everything(writer, store, clock)
        assert known in (0, ino_at(writer, b"d"))
        known = ino_at(writer, b"d")
        store.delete("v/d/f")
        list_everything(writer, store, clock)
        assert names(writer) == []
        writer.purge(clock())
    store.put("v/d/f", b"one")
    list_everything(writer, store, clock)
    assert ino_at(writer, b"d") == known
    check_invariants(writer)


def test_a_vanished_tree_is_swept_and_forgotten(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    for i in range(30):
        store.put(f"v/d/{i % 3}/{i}", b"x")
    list_everything(writer, store, clock)
    assert writer.reader.counts() == (30, 30)
    for i in range(30):
        store.delete(f"v/d/{i % 3}/{i}")
    list_everything(writer, store, clock)
    while writer.purge(clock(), budget=4):
        pass
    assert writer.reader.counts() == (0, 0)
    check_invariants(writer)
    for _ in range(3):
        clock.now_ns += RETAIN_NS
        while writer.purge(clock(), budget=4):
            pass
    with writer._env.begin() as txn:
        left = {name: txn.stat(getattr(writer._tables, name))["entries"] for name in ("inodes", "dentries", "orphans")}
    assert left == {"inodes": 1, "dentries": 0, "orphans": 0}


def test_a_name_found_below_a_vanished_directory_brings_it_back(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/d/e/f", b"x")
    list_everything(writer, store, clock)
    directory = ino_at(writer, b"d/e")
    store.delete("v/d/e/f")
    list_whole(writer, store, ROOT_INO, clock)
    assert names(writer) == []
    while writer.purge(clock()):
        pass
    store.put("v/d/e/f", b"y")
    assert ask_name(writer, store, directory, b"f", clock) is not None
    assert ino_at(writer, b"d/e") == directory
    check_invariants(writer)


def test_listing_a_directory_without_keys_removes_it(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/d/f", b"x")
    list_whole(writer, store, ROOT_INO, clock)
    store.delete("v/d/f")
    with pytest.raises(NotFound):
        list_whole(writer, store, ino_at(writer, b"d"), clock)
    assert names(writer) == []
    check_invariants(writer)


def test_an_empty_root_and_a_marker_are_directories(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    list_whole(writer, store, ROOT_INO, clock)
    root = writer.reader.directory(ROOT_INO)
    assert root is not None
    assert (root.complete, root.entries) == (True, 0)
    store.put("v/d/", b"")
    list_everything(writer, store, clock)
    assert names(writer) == [b"d"]
    assert names(writer, ino_at(writer, b"d")) == []


def test_files_cannot_be_listed(writer: MetadataWriter, store: MemoryStore):
    store.put("v/f", b"x")
    list_whole(writer, store, ROOT_INO, Clock())
    with pytest.raises(NotADirectory):
        writer.begin_listing(ino_at(writer, b"f"), 1)
    with pytest.raises(NotFound):
        writer.begin_listing(Ino(3), 1)


def test_entries_and_hidden_keys_are_counted(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    for key in ("a", "a/b", "c", "d//e", "..", "./x", "/y", "f/", "g" * 300):
        store.put("v/" + key, b"x")
    for limit in (1000, 1, 2):
        list_whole(writer, store, ROOT_INO, clock, limit)
        root = writer.reader.directory(ROOT_INO)
        assert root is not None
        assert names(writer) == [b"a", b"c", b"d", b"f"]
        assert (root.entries, root.hidden) == (4, 5)


def test_the_time_of_a_directory_moves_only_when_its_entries_change(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/d/f", b"x")

    def times() -> tuple[int, int, int]:
        list_everything(writer, store, clock)
        ino = ino_at(writer, b"d")
        inode, dentry, listing = (
            writer.reader.inode(ino),
            writer.reader.dentry(ROOT_INO, b"d"),
            writer.reader.directory(ino),
        )
        assert inode is not None
        assert dentry is not None
        assert listing is not None
        return inode.mtime_ns, dentry.mtime_ns, listing.changed_ns

    first = times()
    assert len(set(first)) == 1
    assert times() == first
    store.put("v/d/f", b"x")  # the same bytes
    assert times() == first
    for change in (lambda: store.put("v/d/f", b"y"), lambda: store.put("v/d/g", b"y"), lambda: store.delete("v/d/f")):
        change()
        second = times()
        assert len(set(second)) == 1
        assert second > first
        first = second
    store.put("v/d/h", b"z")
    ask_name(writer, store, ino_at(writer, b"d"), b"h", clock)
    assert times() > first


def test_a_listing_streams_only_what_cannot_change_any_more(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    for key in ("a", "a-b", "a/x", "a0", "b"):
        store.put("v/" + key, b"x")
    run = writer.begin_listing(ROOT_INO, clock())
    token, seen = None, []
    while True:
        page = page_entries(store.list_page("v/", token=token, limit=1), "v/")
        writer.commit_page(run, page, clock(), clock())
        seen.append(names(writer))
        token = page.next_token
        if token is None:
            break
    # After `a` and `a-b` a directory `a` may still come, and it does.
    assert seen == [[], [], [], [b"a-b", b"a"], [b"a-b", b"a", b"a0", b"b"]]


def test_an_answer_that_was_overtaken_changes_nothing(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/f", b"old")
    run = writer.begin_listing(ROOT_INO, clock())
    asked_ns = clock()
    page = page_entries(store.list_page("v/"), "v/")
    store.put("v/f", b"newer")
    store.put("v/g", b"new")
    for name in (b"f", b"g"):
        ask_name(writer, store, ROOT_INO, name, clock)
    inos = [ino_at(writer, name) for name in (b"f", b"g")]
    writer.commit_page(run, page, asked_ns, clock())  # it does not know of all that
    assert [ino_at(writer, name) for name in (b"f", b"g")] == inos
    check_invariants(writer)


def test_a_name_asked_for_before_a_listing_does_not_undo_it(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    asked_ns = clock()
    store.put("v/f", b"x")
    list_whole(writer, store, ROOT_INO, clock)
    ino = ino_at(writer, b"f")
    assert writer.commit_name(ROOT_INO, b"f", Finding(no_file=True, directory=False), asked_ns, clock()) == ino


def test_a_clock_that_was_set_back_does_not_freeze_names(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/f", b"old")
    ask_name(writer, store, ROOT_INO, b"f", clock)
    store.put("v/f", b"newer")
    store.put("v/d/x", b"")
    clock.now_ns -= 3600 * 10**9
    list_everything(writer, store, clock)
    inode = writer.reader.inode(ino_at(writer, b"f"))
    assert inode is not None
    assert inode.size == 5
    store.delete("v/f")
    ask_name(writer, store, ROOT_INO, b"f", clock)
    assert names(writer) == [b"d"]


def test_many_entries_vanish_in_bounded_transactions(writer: MetadataWriter, store: MemoryStore, monkeypatch):
    clock = Clock()
    for i in range(60):
        store.put(f"v/{i:03}", b"x")
    list_whole(writer, store, ROOT_INO, clock)
    for i in range(1, 60):
        store.delete(f"v/{i:03}")
    monkeypatch.setattr("metadata.merge.REMOVALS_PER_TRANSACTION", 7)
    list_whole(writer, store, ROOT_INO, clock, 10)
    assert names(writer) == [b"000"]
    assert writer.reader.counts() == (1, 1)
    check_invariants(writer)


def test_a_relisting_that_finds_nothing_new_leaves_entries_alone(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    for i in range(50):
        store.put(f"v/{i:03}", b"x")
    list_whole(writer, store, ROOT_INO, clock, 7)
    before = scan_all(writer, ROOT_INO)
    list_whole(writer, store, ROOT_INO, clock, 7)
    assert scan_all(writer, ROOT_INO) == before


def test_attributes_from_user_metadata_survive_listings(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/f", b"x", user={"mode": "100640", "uid": "7", "gid": "8", "mtime": "1500000000.25"})
    list_whole(writer, store, ROOT_INO, clock)
    ino = ino_at(writer, b"f")
    assert ask_name(writer, store, ROOT_INO, b"f", clock) == ino
    list_whole(writer, store, ROOT_INO, clock)
    inode = writer.reader.inode(ino)
    assert inode is not None
    assert (inode.mode, inode.uid, inode.gid) == (0o640, 7, 8)
    assert inode.mtime_ns == 1_500_000_000_250_000_000
    check_invariants(writer)


def test_a_returning_directory_shadows_the_file_that_took_its_name(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/d/f", b"x")
    list_everything(writer, store, clock)
    directory = ino_at(writer, b"d")
    store.delete("v/d/f")
    store.put("v/d", b"a file now")
    list_everything(writer, store, clock)
    assert ino_at(writer, b"d") != directory
    store.put("v/d/f", b"x")
    ask_name(writer, store, directory, b"f", clock)  # somebody still stands in the directory
    assert ino_at(writer, b"d") == directory
    check_invariants(writer)


def test_listing_a_vanished_directory_by_its_inode_brings_it_back(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/d/f", b"x")
    list_everything(writer, store, clock)
    directory = ino_at(writer, b"d")
    store.delete("v/d/f")
    list_everything(writer, store, clock)
    store.put("v/d/f", b"x")
    list_whole(writer, store, directory, clock)
    assert ino_at(writer, b"d") == directory
    assert names(writer, directory) == [b"f"]
    check_invariants(writer)


def test_a_directory_that_vanished_twice_is_kept_after_the_second_time(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    for _ in range(2):
        store.put("v/d/f", b"x")
        list_everything(writer, store, clock)
        directory = ino_at(writer, b"d")
        store.delete("v/d/f")
        list_everything(writer, store, clock)
        clock.now_ns += RETAIN_NS * 3 // 4
        while writer.purge(clock()):
            pass
        assert writer.reader.inode(directory) is not None
        check_invariants(writer)


def test_what_is_listed_anew_is_not_swept(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/d/f", b"x")
    list_everything(writer, store, clock)
    store.delete("v/d/f")
    list_everything(writer, store, clock)
    store.put("v/d/f", b"x")
    list_everything(writer, store, clock)
    while writer.purge(clock()):  # the sweep was still in the queue
        pass
    assert names(writer, ino_at(writer, b"d")) == [b"f"]
    check_invariants(writer)


def test_the_first_listing_of_a_directory_does_not_change_its_time(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    store.put("v/f", b"x")
    root = writer.reader.inode(ROOT_INO)
    list_whole(writer, store, ROOT_INO, clock)
    assert writer.reader.inode(ROOT_INO) == root


def test_a_file_found_before_a_listing_that_has_none_is_not_brought_back(writer: MetadataWriter, store: MemoryStore):
    clock = Clock()
    facts = head_facts(store.put("v/f", b"x"))
    asked_ns = clock()
    store.delete("v/f")
    list_whole(writer, store, ROOT_INO, clock)
    assert writer.commit_name(ROOT_INO, b"f", Finding(facts, directory=False), asked_ns, clock()) is None
    assert names(writer) == []


def test_whole_seconds_of_a_head_do_not_change_the_time_of_a_listing(writer: MetadataWriter):
    listed = ObjectInfo("v/f", 1, "etag", START_NS + 123 * 10**6)
    page = page_entries(ListPage((listed,), (), None), "v/")
    writer.commit_page(writer.begin_listing(ROOT_INO, START_NS), page, START_NS + 1, START_NS + 2)
    for mtime_ns, expected in ((START_NS, listed.mtime_ns), (START_NS + 10**9, START_NS + 10**9)):
        facts = head_facts(ObjectInfo("v/f", 1, "etag", mtime_ns))
        ino = writer.commit_name(ROOT_INO, b"f", Finding(facts), START_NS + 3, START_NS + 4)
        assert ino is not None
        inode = writer.reader.inode(ino)
        assert inode is not None
        assert inode.mtime_ns == expected
        check_invariants(writer)


def test_without_order_a_clock_that_was_set_back_keeps_no_vanished_names(writer: MetadataWriter):
    store = store_of("reverse")
    clock = Clock()
    for i in range(5):
        store.put(f"v/{i}", b"x")
    for _ in range(2):
        list_whole(writer, store, ROOT_INO, clock, 2)
    clock.now_ns -= 3600 * 10**9
    store.delete("v/3")
    list_whole(writer, store, ROOT_INO, clock, 2)
    assert names(writer) == [b"0", b"1", b"2", b"4"]
