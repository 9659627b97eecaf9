"""Listings and names enter the store in any mixture, and users see the bucket: a model test. Cases by name are in
test_metadata_tree.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachefs.errors import NotFound
from cachefs.types import ROOT_INO, FileKind, Ino
from metadata.store import MetadataWriter
from tests.support.tree import (
    IDENTITY,
    PREFIX,
    Clock,
    ask_name,
    check_invariants,
    expected_tree,
    ino_at,
    list_everything,
    list_whole,
    scan_all,
    store_of,
    visible_tree,
)

KEYS = ["a", "a-b", "a.txt", "a/", "a/x", "a/y/z", "a/y-z", "a0", "b/c", "b/c/d", "b//e", "b/./f", "c/", "é", "z"]

operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(KEYS), st.sampled_from([b"", b"one", b"two", b"three"])),
        st.tuples(st.just("delete"), st.sampled_from(KEYS), st.just(b"")),
        st.tuples(st.just("list"), st.integers(0, 20), st.integers(1, 4)),
        st.tuples(st.just("name"), st.integers(0, 20), st.sampled_from([b"a", b"a-b", b"x", b"y", b"c", b"d", b"z"])),
        st.tuples(st.just("later"), st.integers(0, 8), st.just(b"")),
        st.tuples(st.just("reopen"), st.just(0), st.just(b"")),
    ),
    max_size=25,
)


class Mount:
    """A writer that may be reopened, and all versions that inode numbers ever stood for."""

    def __init__(self, path: Path, order: str) -> None:
        self.path = path
        self.store = store_of(order)
        self.clock = Clock()
        self.writer = MetadataWriter(str(path), IDENTITY)
        self.keys: dict[str, tuple[str, int]] = {}
        self.meaning: dict[Ino, tuple[bytes, str, int]] = {}

    def put(self, name: str, body: bytes) -> None:
        put = self.store.put(PREFIX + name, body)
        self.keys[PREFIX + name] = (put.etag, put.size)

    def delete(self, name: str) -> None:
        self.store.delete(PREFIX + name)
        self.keys.pop(PREFIX + name, None)

    def directories(self) -> list[Ino]:
        """All directories, also those of other times."""
        known, found = [ROOT_INO], []
        while known:
            ino = known.pop()
            found.append(ino)
            known += [entry.ino for entry in scan_all(self.writer, ino) if entry.kind is FileKind.DIRECTORY]
        return found

    def list(self, index: int, limit: int) -> None:
        below = self.directories()
        try:
            list_whole(self.writer, self.store, below[index % len(below)], self.clock, limit)
        except NotFound:
            pass

    def name(self, index: int, name: bytes) -> None:
        below = self.directories()
        parent = below[index % len(below)]
        found = ask_name(self.writer, self.store, parent, name, self.clock)
        dentry = self.writer.reader.dentry(parent, name)
        assert found == (None if dentry is None else dentry.ino)

    def later(self, days: int) -> None:
        self.clock.now_ns += days * 86400 * 10**9
        while self.writer.purge(self.clock(), budget=2):
            pass

    def reopen(self) -> None:
        before = visible_tree(self.writer)
        self.writer.close()
        self.writer = MetadataWriter(str(self.path), IDENTITY)
        assert self.writer.set_aside is None
        assert visible_tree(self.writer) == before

    def check(self) -> None:
        """An inode number means one version for ever."""
        check_invariants(self.writer)
        with self.writer._env.begin() as txn:
            keys = [key for key, _ in txn.cursor(self.writer._tables.inodes)]
        for key in keys:
            inode = self.writer.reader.inode(Ino(int.from_bytes(key, "big")))
            assert inode is not None
            version = (inode.name, inode.etag, inode.size)
            assert self.meaning.setdefault(inode.ino, version) == version


@pytest.mark.parametrize("order", ["s3", "name", "reverse"])
@given(operations=operations, limit=st.integers(1, 5))
@example(operations=[("put", "a", b"one"), ("put", "a/x", b"one"), ("list", 0, 1), ("delete", "a/x", b"")], limit=1)
def test_users_see_the_bucket(order: str, operations: list[tuple[str, object, object]], limit: int):
    with tempfile.TemporaryDirectory() as directory:
        mount = Mount(Path(directory, "volume"), order)
        try:
            for name, one, two in operations:
                arguments = {"put": (one, two), "delete": (one,), "later": (one,), "reopen": ()}.get(name, (one, two))
                getattr(mount, name)(*arguments)
                mount.check()
            list_everything(mount.writer, mount.store, mount.clock, limit)
            mount.check()
            assert visible_tree(mount.writer) == expected_tree(mount.keys)
            before = {path: ino_at(mount.writer, path) for path in visible_tree(mount.writer)}
            list_everything(mount.writer, mount.store, mount.clock, limit)
            assert {path: ino_at(mount.writer, path) for path in before} == before, "the same versions, other inodes"
            mount.later(8)
            mount.later(8)
            mount.check()
            assert visible_tree(mount.writer) == expected_tree(mount.keys)
        finally:
            mount.writer.close()
