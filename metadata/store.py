"""The metadata of one volume on disk: one LMDB environment, one writer (the agent), many readers (workers).

* `MetadataReader` is cheap (a few microseconds, memory reads only) and thread-safe: every call has a read transaction
  of its own, so it is called on the trio thread and on the channel thread. Readers never lock and never wait for the
  writer.
* `MetadataWriter` blocks and is called in threads. A lock makes its calls one after the other; one page of a listing
  is one transaction. It never waits for the disk, except once after each sync (metadata.custody says why).
* LMDB forbids opening an environment twice in one process: where the writer lives, use `writer.reader`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lmdb

from cachefs.errors import NotFound, StorageUnavailable
from cachefs.types import NAME_MAX, ROOT_INO, Ino
from metadata import custody, environment, merge, queries, room, volume
from metadata.changes import COUNTERS, Changes, Tables
from metadata.facts import Finding, PageEntries
from metadata.merge import ListingRun
from metadata.names import SLASH, decode_key
from metadata.queries import Listing
from metadata.records import (
    Counters,
    Dentry,
    Directory,
    Inode,
    ino_key,
    unpack_dentry,
    unpack_directory,
    unpack_inode,
)
from metadata.volume import VolumeIdentity

_log = logging.getLogger(__name__)

PREFIXES_KEPT = 4096
"""Directory keys that a reader remembers."""


class _View:
    """An open environment and what a reader keeps of it. Replaced as a whole when the environment is."""

    __slots__ = ("env", "file", "lineage", "prefixes", "tables")

    def __init__(self, env: lmdb.Environment, tables: Tables, path: str, file: tuple[int, int]) -> None:
        self.env = env
        self.tables = tables
        self.file = file
        with env.begin() as txn:
            prefix = volume.prefix_of(txn, tables)
            self.lineage = volume.lineage_of(txn, tables)
        if prefix is None:
            raise StorageUnavailable(f"{path} is not a metadata environment of cachefs")
        self.prefixes: dict[Ino, bytes] = {ROOT_INO: prefix}
        """Keys of directories. Threads may race for an entry, but all write the same."""


class MetadataReader:
    """Reads the metadata of a volume. Raises StorageUnavailable when the environment cannot be read."""

    def __init__(self, path: str, *, shared: tuple[lmdb.Environment, Tables] | None = None) -> None:
        self.path = path
        self._owns = shared is None
        self._view = self._open_view() if shared is None else _View(*shared, path, custody.file_identity(path))

    def _open_view(self) -> _View:
        try:
            file = custody.file_identity(self.path)  # before it is opened: `refresh` sees what replaces it in between
            opened = environment.open_readonly(self.path)
            return _View(opened.env, opened.tables, self.path, file)
        except (lmdb.Error, OSError) as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        """Close the environment. No other call may be under way."""
        if self._owns:
            self._view.env.close()

    def refresh(self) -> bool:
        """Open the environment anew if it was replaced (call it after the agent was restarted); return whether it was.

        The old one is closed by its last user, so other threads need not stop.
        """
        try:
            if not self._owns or custody.file_identity(self.path) == self._view.file:
                return False
        except OSError as error:
            raise self._unreadable(error) from error
        self._view = self._open_view()
        return True

    @property
    def lineage(self) -> str:
        """What this environment and its copies have in common: inode numbers of another lineage mean nothing here."""
        return self._view.lineage

    @contextmanager
    def _read(self, view: _View) -> Iterator[Any]:
        try:
            with view.env.begin() as txn:
                yield txn
        except lmdb.Error as error:
            raise self._unreadable(error) from error

    def _get(self, view: _View, table: Any, key: bytes) -> bytes | None:
        """Return one record. Hot path: half the price of `_read`."""
        try:
            with view.env.begin(table) as txn:
                return txn.get(key)
        except lmdb.Error as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> StorageUnavailable:
        return StorageUnavailable(f"metadata in {self.path} cannot be read: {error}")

    def inode(self, ino: Ino) -> Inode | None:
        """Return an inode, also one whose name is gone."""
        view = self._view
        raw = self._get(view, view.tables.inodes, ino_key(ino))
        return None if raw is None else unpack_inode(ino, raw)

    def dentry(self, parent: Ino, name: bytes) -> Dentry | None:
        """Return what users see under this name: a directory before a file."""
        if not 0 < len(name) <= NAME_MAX:
            return None
        view = self._view
        place = ino_key(parent) + name
        try:
            with view.env.begin(view.tables.dentries) as txn:
                below = txn.get(place + SLASH)
                beside = txn.get(place)
        except lmdb.Error as error:
            raise self._unreadable(error) from error
        for key, raw in ((name + SLASH, below), (name, beside)):
            dentry = unpack_dentry(key, raw) if raw is not None else None
            if dentry is not None and dentry.visible:
                return dentry
        return None

    def directory(self, ino: Ino) -> Directory | None:
        """Return what is known of a directory's listing, None when it was never listed."""
        view = self._view
        raw = self._get(view, view.tables.directories, ino_key(ino))
        return None if raw is None else unpack_directory(raw)

    def listing(self, ino: Ino, after: Ino | None, limit: int) -> Listing:
        """Return what is known of a directory's listing, with up to `limit` visible entries behind the entry with inode
        number `after`, in the order of sort keys. All of it is of one moment.

        While the listing is incomplete only entries are returned whose sort key with a slash behind it is below the
        frontier: a directory that shadows a file of its name is known by then. `after` may have lost its name; a number
        that never was in this directory, or was forgotten, raises StaleObject.
        """
        view = self._view
        with self._read(view) as txn:
            first = b"" if after is None else queries.place_of(txn, view.tables, ino, after)
            return queries.listing(txn, view.tables, ino, first, limit)

    def scan(self, ino: Ino, after: Ino | None, limit: int) -> list[Dentry]:
        """Return the entries of `listing` alone."""
        return self.listing(ino, after, limit).entries

    def entries_behind(self, ino: Ino, place: bytes, limit: int) -> list[Dentry]:
        """Return the entries of `listing` behind a sort key (b"": the first ones)."""
        view = self._view
        with self._read(view) as txn:
            return queries.listing(txn, view.tables, ino, place, limit).entries

    def names_in(self, ino: Ino, limit: int) -> list[bytes]:
        """Return up to `limit` names that were ever found in a directory, listed or not. Reads as many: BLOCKS."""
        view = self._view
        with self._read(view) as txn:
            return queries.names_in(txn, view.tables, ino, limit)

    def anything_past(self, ino: Ino, seen: bytes) -> bool:
        """Return whether an incomplete listing has an entry for readers whose sort key is above `seen`."""
        view = self._view
        with self._read(view) as txn:
            return bool(queries.listing(txn, view.tables, ino, seen, 1).entries)

    def key_of(self, ino: Ino) -> str:
        """Return the object's key with the volume's prefix; a directory's ends with a slash (the root's may be empty).

        Raises StaleObject when the inode is not known any more.
        """
        view = self._view
        with self._read(view) as txn:
            key, is_directory = queries.key_of(txn, view.tables, ino, view.prefixes)
        if is_directory:
            if len(view.prefixes) >= PREFIXES_KEPT:
                view.prefixes = {ROOT_INO: view.prefixes[ROOT_INO]}
            view.prefixes[ino] = key
        return decode_key(key)

    def counts(self) -> tuple[int, int]:
        """Return bytes and objects known of this volume."""
        view = self._view
        counters = Counters.unpack(self._get(view, view.tables.state, COUNTERS) or b"")
        return counters.used_bytes, counters.objects

    def hidden(self) -> int:
        """Return how many keys the listings could not show. Reads the records of all directories: BLOCKS."""
        view = self._view
        with self._read(view) as txn:
            return sum(unpack_directory(raw).hidden for _, raw in txn.cursor(view.tables.directories))


class MetadataWriter:
    """The one writer of a volume's metadata. Calls block, and raise StorageUnavailable when nothing can be written."""

    def __init__(
        self,
        path: str,
        identity: VolumeIdentity,
        *,
        boot_id: str | None = None,
        make_room: room.MakeRoom | None = None,
    ) -> None:
        """Open or begin it. `make_room` can have others leave room on the file system. Raises StorageUnavailable."""
        self.path = path
        self.identity = identity
        self._boot_id = boot_id or custody.current_boot_id()
        self._lock = threading.Lock()
        try:
            opened = environment.open_or_create(path, identity, self._boot_id)
            self._env, self._tables = opened.env, opened.tables
            self.set_aside = opened.set_aside
            """Why the environment that was found could not be used; None: it could, or there was none."""
            self._env.reader_check()
            with self._env.begin() as txn:
                self._unordered = volume.is_unordered(txn, self._tables)
            self._page_bytes = int(self._env.stat()["psize"])
            self._ahead = room.PagesAhead(path, make_room)
        except (lmdb.Error, OSError) as error:
            raise room.failure(f"no metadata can be kept in {path}", error) from error
        self._dirty = not custody.closed_cleanly(path)
        self.reader = MetadataReader(path, shared=(self._env, self._tables))
        """Reads what this writer has committed."""

    @contextmanager
    def _change(self, now_ns: int) -> Iterator[Changes]:
        """One write transaction; nothing of it remains when the body or the commit fails."""
        with self._lock:
            try:
                self._mark_dirty()
                self._ahead.prepare((self._env.info()["last_pgno"] + 1) * self._page_bytes)
                with self._env.begin(write=True) as txn:
                    changes = Changes(txn, self._tables, now_ns)
                    yield changes
                    changes.finish()
            except (lmdb.Error, OSError) as error:
                raise self._ahead.failure(f"metadata in {self.path} cannot be written", error) from error

    def _mark_dirty(self) -> None:
        """Say that the environment is about to be written to. Raises OSError."""
        if self._dirty:
            return
        try:
            custody.write_stamp(self.path, custody.Stamp(self._boot_id, None))
        except OSError as error:
            if not (room.is_full(error) and self._ahead.make_room()):
                raise
            custody.write_stamp(self.path, custody.Stamp(self._boot_id, None))
        self._dirty = True

    def commit_name(self, parent: Ino, name: bytes, finding: Finding, asked_ns: int, now_ns: int) -> Ino | None:
        """Write down what one name is, asked for at `asked_ns`; return the inode that the name has now, if any.

        A complete listing that was begun after the asking knows better, and nothing is changed.
        """
        with self._change(now_ns) as changes:
            known = changes.directory(parent)
            if known is None or not known.complete or not asked_ns < known.started_ns <= now_ns:
                changes.put_finding(parent, name, finding, asked_ns)
                if changes.changed:
                    merge.changed(changes, parent)
            dentry = changes.visible(parent, name)
        return None if dentry is None else dentry.ino

    def begin_listing(self, ino: Ino, now_ns: int, age_ns: int = 0) -> ListingRun:
        """Begin a listing, of pages that may be so old. Raises NotFound, NotADirectory."""
        with self._change(now_ns) as changes:
            return merge.begin(changes, ino, self._unordered, age_ns)

    def commit_page(self, run: ListingRun, page: PageEntries, asked_ns: int, now_ns: int) -> None:
        """Enter a page that was requested at `asked_ns`; the last one (no next token) completes the directory.

        Raises NotFound when the store has nothing below the directory: its name is then removed. Raises Disordered.
        """
        try:
            self._merge_page(run, page, asked_ns, now_ns)
        except merge.Disordered:
            self._unordered = True
            with self._change(now_ns) as changes:
                changes.mark_unordered()
            raise
        except NotFound:
            with self._change(now_ns) as changes:
                merge.drop(changes, run.ino)
            raise

    def _merge_page(self, run: ListingRun, page: PageEntries, asked_ns: int, now_ns: int) -> None:
        last = page.next_token is None
        resume: bytes | None = b"" if run.unordered else run.frontier
        entered = False
        while resume is not None:
            with self._change(now_ns) as changes:
                if not entered:
                    merge.put_page(changes, run, page, asked_ns)
                gone, resume = merge.vanished(changes, run, page, asked_ns, resume, last)
                for dentry in gone:
                    changes.remove(run.ino, dentry)
                merge.note(changes, run)
                if resume is None:
                    (merge.complete if last else merge.advance)(changes, run, page)
            entered = True

    def purge(self, now_ns: int, budget: int = 500) -> bool:
        """Forget some of what vanished long ago, in one transaction; return whether more is due. Call it regularly."""
        with self._change(now_ns) as changes:
            return changes.purge(budget) >= budget

    def reader_check(self) -> int:
        """Free the reader slots of dead processes, which pin old pages; return how many there were."""
        return self._env.reader_check()

    def sync_and_mark(self) -> None:
        """Put everything on disk and say so in the stamp: from here on also a crash of the machine loses nothing."""
        with self._lock:
            if not self._dirty:
                return
            try:
                self._env.sync(True)
                state = custody.fingerprint(self.path, self._env.info()["last_txnid"])
                custody.write_stamp(self.path, custody.Stamp(self._boot_id, state))
                self._dirty = False
            except (lmdb.Error, OSError) as error:
                raise StorageUnavailable(f"metadata in {self.path} cannot be synced: {error}") from error

    def close(self) -> None:
        """Sync and close. Readers in this process must not be used any more."""
        try:
            if self._ahead.held:
                self._mark_dirty()  # giving back changes the file's time, which the stamp names
                self._ahead.release()
            self.sync_and_mark()
        except (StorageUnavailable, OSError) as error:
            _log.warning("metadata in %s is not closed well: %s; it is checked when opened again", self.path, error)
        self._env.close()
        self._ahead.close()
