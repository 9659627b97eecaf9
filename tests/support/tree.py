"""A bucket, the tree of names that it means, and a writer that is told about it: what the metadata tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachefs.errors import NotFound
from cachefs.store.memory import MemoryStore
from cachefs.store.port import ListPage, ObjectInfo
from cachefs.types import ROOT_INO, FileKind, Ino
from metadata.changes import COUNTERS
from metadata.facts import Finding, head_facts, page_entries
from metadata.merge import Disordered
from metadata.names import encode_key, name_of, usable
from metadata.records import (
    Counters,
    due_of_key,
    ino_key,
    ino_of_key,
    unpack_dentry,
    unpack_inode,
)
from metadata.store import MetadataWriter
from metadata.volume import VolumeIdentity

IDENTITY = VolumeIdentity("memory://", "bucket", "v")
PREFIX = "v/"
START_NS = 1_800_000_000 * 10**9


class Clock:
    """Every look at it is a millisecond later."""

    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        self.now_ns += 10**6
        return self.now_ns


class ReorderedStore(MemoryStore):
    """Lists in another order than S3: `order` "name" ignores the slash of directories, "reverse" is no order at all."""

    order = "name"

    def list_page(self, prefix: str, *, delimiter: str = "/", token: str | None = None, limit: int = 1000) -> ListPage:
        everything = super().list_page(prefix, delimiter=delimiter, limit=1 << 30)
        names: list[ObjectInfo | str] = [*everything.objects, *everything.prefixes]
        names.sort(key=self._place, reverse=self.order == "reverse")
        start = int(token or 0)
        part = names[start : start + limit]
        return ListPage(
            tuple(name for name in part if isinstance(name, ObjectInfo)),
            tuple(name for name in part if isinstance(name, str)),
            str(start + limit) if start + limit < len(names) else None,
        )

    @staticmethod
    def _place(name: ObjectInfo | str) -> tuple[bytes, bool]:
        if isinstance(name, str):
            return encode_key(name).removesuffix(b"/"), True
        return encode_key(name.key), False


def store_of(order: str) -> MemoryStore:
    """Return a store that lists in "s3", "name" or "reverse" order."""
    if order == "s3":
        return MemoryStore()
    store = ReorderedStore()
    store.order = order
    return store


def expected_tree(keys: dict[str, tuple[str, int]]) -> dict[bytes, tuple[str, int] | None]:
    """Return every path that users see below the volume's prefix: etag and size of a file, None for a directory."""
    tree: dict[bytes, tuple[str, int] | None] = {}
    files: dict[bytes, tuple[str, int]] = {}
    for key, version in keys.items():
        parts = encode_key(key.removeprefix(PREFIX)).split(b"/")
        path = b""
        for part in parts[:-1]:
            if not usable(part):
                break
            path += part + b"/"
            tree[path] = None
        else:
            if usable(parts[-1]):
                files[path + parts[-1]] = version
    for path, version in files.items():
        if path + b"/" not in tree:
            tree[path] = version
    return tree


def list_whole(writer: MetadataWriter, store: MemoryStore, ino: Ino, clock: Clock, limit: int = 1000) -> None:
    """Make a complete listing of one directory. Raises what the writer raises."""
    key = writer.reader.key_of(ino)
    while True:
        try:
            run = writer.begin_listing(ino, clock())
            token = None
            while True:
                asked_ns = clock()
                page = page_entries(store.list_page(key, token=token, limit=limit), key)
                writer.commit_page(run, page, asked_ns, clock())
                token = page.next_token
                if token is None:
                    return
        except Disordered:
            continue


def list_everything(writer: MetadataWriter, store: MemoryStore, clock: Clock, limit: int = 1000) -> None:
    """List all directories, from the root down."""
    todo = [ROOT_INO]
    while todo:
        ino = todo.pop()
        try:
            list_whole(writer, store, ino, clock, limit)
        except NotFound:
            continue
        todo += [entry.ino for entry in scan_all(writer, ino) if entry.kind is FileKind.DIRECTORY]


def ask_name(writer: MetadataWriter, store: MemoryStore, parent: Ino, name: bytes, clock: Clock) -> Ino | None:
    """Resolve one name with both questions."""
    key = writer.reader.key_of(parent) + name.decode("utf-8", "surrogateescape")
    asked_ns = clock()
    try:
        file = head_facts(store.head(key))
    except NotFound:
        file = None
    below = store.list_page(key + "/", delimiter="", limit=1)
    finding = Finding(file, no_file=file is None, directory=bool(below.objects or below.prefixes))
    return writer.commit_name(parent, name, finding, asked_ns, clock())


def scan_all(writer: MetadataWriter, ino: Ino, step: int = 3):
    """Read a directory as readdir does, a few entries at a time."""
    found = []
    after = None
    while part := writer.reader.scan(ino, after, step):
        found += part
        after = part[-1].ino
    return found


def visible_tree(writer: MetadataWriter) -> dict[bytes, tuple[str, int] | None]:
    """Return what users see, by scans from the root."""
    tree: dict[bytes, tuple[str, int] | None] = {}
    todo = [(ROOT_INO, b"")]
    while todo:
        ino, path = todo.pop()
        for entry in scan_all(writer, ino):
            if entry.kind is FileKind.DIRECTORY:
                tree[path + entry.name + b"/"] = None
                todo.append((entry.ino, path + entry.name + b"/"))
            else:
                inode = writer.reader.inode(entry.ino)
                assert inode is not None
                assert (inode.size, inode.mtime_ns) == (entry.size, entry.mtime_ns)
                tree[path + entry.name] = (inode.etag, inode.size)
    return tree


@contextmanager
def writer_at(path: Path | str, *, boot_id: str | None = None) -> Iterator[MetadataWriter]:
    """Open a writer and close it."""
    writer = MetadataWriter(str(path), IDENTITY, boot_id=boot_id)
    try:
        yield writer
    finally:
        writer.close()


def check_invariants(writer: MetadataWriter) -> None:
    """Assert what metadata.changes promises of the records on disk."""
    tables = writer._tables
    with writer._env.begin() as txn:
        inodes = {ino_of_key(key): unpack_inode(ino_of_key(key), raw) for key, raw in txn.cursor(tables.inodes)}
        orphans = {due_of_key(key)[1] for key, task in txn.cursor(tables.orphans) if task == b"p"}
        raw_counters = txn.get(COUNTERS, db=tables.state)
        assert raw_counters is not None
        counters = Counters.unpack(raw_counters)
        entries = {key: unpack_dentry(key[8:], raw) for key, raw in txn.cursor(tables.dentries)}
        directories = [ino_of_key(key) for key, _ in txn.cursor(tables.directories)]
    assert set(directories) <= set(inodes)
    named = [entry.ino for entry in entries.values()]
    assert len(named) == len(set(named)), "two names for one inode"
    for key, entry in entries.items():
        name, kind = name_of(key[8:])
        inode = inodes[entry.ino]
        assert (inode.parent, inode.name, inode.kind) == (ino_of_key(key), name, kind)
        assert (inode.size, inode.mtime_ns, inode.own) == (entry.size, entry.mtime_ns, entry.own)
        if kind is FileKind.FILE:
            beside = entries.get(key + b"/")
            assert entry.shadowed == (beside is not None and not beside.gone)
            assert not entry.gone
        if entry.gone:
            assert entry.ino in orphans
            assert entry.ino not in directories
    unnamed = set(inodes) - set(named) - {ROOT_INO}
    assert unnamed <= orphans, "an inode that is never forgotten"
    files = [entry for entry in entries.values() if entry.kind is FileKind.FILE]
    assert (counters.objects, counters.used_bytes) == (len(files), sum(entry.size for entry in files))
    assert max(inodes) < counters.next_ino
    assert ino_key(ROOT_INO) == b"\0" * 7 + b"\1"


def ino_at(writer: MetadataWriter, path: bytes) -> Ino:
    """Return the inode number of a path as users see it."""
    ino = ROOT_INO
    for name in path.rstrip(b"/").split(b"/"):
        dentry = writer.reader.dentry(ino, name)
        assert dentry is not None
        ino = dentry.ino
    return ino
