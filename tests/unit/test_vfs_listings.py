"""Listings of the file system without a mount: one moment, and the attributes that a look-up gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import pytest

from cachefs.config import FuseConfig, MetadataConfig
from cachefs.store.memory import MemoryStore
from cachefs.types import ROOT_INO
from cachefs.vfs.attributes import AttributeRules
from cachefs.vfs.filesystem import FileSystem
from cachefs.vfs.ports import AgentPort
from cachefs.vfs.reading import ReadPath
from metadata.facts import page_entries
from metadata.freshness import Freshness
from metadata.merge import ListingRun
from metadata.store import MetadataWriter
from tests.support.tree import Clock, ask_name, list_whole

NAMES = [b"f%02d" % number for number in range(20)]


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    for name in NAMES:
        made.put(f"v/{name.decode()}", b"x")
    return made


def filesystem(writer: MetadataWriter, clock_ns: Callable[[], int] = time.time_ns) -> FileSystem:
    reads = ReadPath(writer.reader, None, "memory://", "bucket", 1 << 20)
    rules = AttributeRules.create(FuseConfig(), 1000, 1000)
    fresh = Freshness(MetadataConfig(metadata_ttl_s=1e12))
    return FileSystem(reads, cast("AgentPort", None), fresh, rules, clock_ns)


def test_entries_and_completeness_are_of_one_moment(writer: MetadataWriter, store: MemoryStore, clock: Clock) -> None:
    """What changes the directory while a reply is made must not make its listing look complete and short."""
    begun: list[ListingRun] = []

    def now_ns() -> int:
        if not begun:  # the directory vanishes, comes back, and is being listed from its beginning
            with writer._change(clock()) as changes:
                changes._txn.delete(b"\0" * 7 + b"\1", db=writer._tables.directories)
            run = writer.begin_listing(ROOT_INO, clock())
            begun.append(run)
            page = page_entries(store.list_page("v/", limit=5), "v/")
            writer.commit_page(run, page, clock(), clock())
        return clock()

    found = filesystem(writer, now_ns).entries_known(ROOT_INO, None, 100)
    assert begun
    assert found is None or [entry[1] for entry in found] == NAMES


def test_a_listing_says_of_a_file_what_a_look_up_says(writer: MetadataWriter, store: MemoryStore, clock: Clock) -> None:
    store.put("v/f03", b"x", user={"mode": "100750", "uid": "7", "mtime": "1000000000.25"})
    store.put("v/f04", b"other", user={"gid": "8"})
    files = filesystem(writer, clock)
    for name in (b"f03", b"f04", b"f05"):
        ask_name(writer, store, ROOT_INO, name, clock)
    for turn in range(2):
        listed = files.entries_known(ROOT_INO, None, 100)
        assert listed is not None
        attributes = {entry[1]: entry[0] for entry in listed}
        for name in NAMES:
            answer = files.lookup_known(ROOT_INO, name)
            assert answer is not None
            assert attributes[name] == answer[0], (turn, name)
        for dentry in writer.reader.scan(ROOT_INO, None, 100):
            assert files.of_dentry(dentry, 0.0)[0] == attributes[dentry.name]
        assert (attributes[b"f03"].mode & 0o777, attributes[b"f03"].uid) == (0o750, 7)
        assert attributes[b"f04"].gid == 8
        list_whole(writer, store, ROOT_INO, clock)
    store.put("v/f03", b"x")  # the same version, without attributes of its own
    ask_name(writer, store, ROOT_INO, b"f03", clock)
    again = files.entries_known(ROOT_INO, None, 100)
    assert again is not None
    assert again[3][0].uid == 1000


def test_entries_of_an_older_release_learn_of_their_attributes_in_the_next_listing(
    writer: MetadataWriter, store: MemoryStore, clock: Clock
) -> None:
    store.put("v/f03", b"x", user={"uid": "7"})
    ask_name(writer, store, ROOT_INO, b"f03", clock)
    dentry = writer.reader.dentry(ROOT_INO, b"f03")
    assert dentry is not None
    with writer._change(clock()) as changes:
        changes._put_dentry(ROOT_INO, dentry._replace(own=False))
    list_whole(writer, store, ROOT_INO, clock)
    healed = writer.reader.dentry(ROOT_INO, b"f03")
    assert healed is not None
    assert healed.own


def test_the_kernel_may_not_keep_a_listing_that_was_changed_since(
    writer: MetadataWriter, store: MemoryStore, clock: Clock
) -> None:
    files = filesystem(writer, clock)
    list_whole(writer, store, ROOT_INO, clock)
    assert files.listing_generation(ROOT_INO) is not None
    store.delete("v/f03")
    ask_name(writer, store, ROOT_INO, b"f03", clock)
    assert files.listing_generation(ROOT_INO) is None
    list_whole(writer, store, ROOT_INO, clock)
    assert files.listing_generation(ROOT_INO) is not None
