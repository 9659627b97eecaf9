"""What one write transaction does to the tree of names: entries come, are confirmed, are replaced, go.

Works on a transaction that it is given (metadata.store owns the environment). The rules:

* INVARIANT: an inode number names one object version. Same name, etag and size: same inode. Otherwise the name gets a
  new one, and the old inode becomes an ORPHAN: its record stays for `RETAIN_NS`, because files may be open and
  readdir cookies in use.
* INVARIANT: no object has two dentries. A file and a directory of one name have one each; the file's is `shadowed` for
  exactly as long as the directory is alive, so no reader has to look for the other one.
* A directory that vanishes leaves its dentry behind, `gone`: when it returns within `RETAIN_NS` it has the same
  number. What was below it is swept away later, in batches (`purge`).
* Newer knowledge is never overwritten by older: each answer of the store is dated with the moment BEFORE the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from cachefs.types import ROOT_INO, FileKind, Ino
from metadata.facts import FileFacts, Finding
from metadata.names import SLASH, sort_key
from metadata.records import (
    Counters,
    Dentry,
    Directory,
    Inode,
    due_key,
    due_of_key,
    ino_key,
    pack_dentry,
    pack_directory,
    pack_inode,
    unpack_dentry,
    unpack_directory,
    unpack_inode,
)

RETAIN_NS = 7 * 86400 * 10**9
COUNTERS, CREATED, UNORDERED = b"counters", b"created", b"unordered"

_PURGE, _SWEEP = b"p", b"s"
_SECOND_NS = 10**9
_PURGE_AGAIN_NS = 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Tables:
    """The named databases of an environment."""

    inodes: Any
    dentries: Any
    directories: Any
    orphans: Any
    state: Any


class WriteTransaction(Protocol):
    """What is needed of a write transaction (its types are the library's)."""

    def get(self, key: bytes, *, db: Any) -> bytes | None: ...
    def put(self, key: bytes, value: bytes, *, db: Any) -> bool: ...
    def delete(self, key: bytes, *, db: Any) -> bool: ...
    def cursor(self, db: Any) -> Any: ...


class Changes:
    """One write transaction. `finish` writes the counters; call it last."""

    def __init__(self, txn: WriteTransaction, tables: Tables, now_ns: int) -> None:
        self._txn = txn
        self._tables = tables
        self.now_ns = now_ns
        self._counted = txn.get(COUNTERS, db=tables.state) or b""
        self._counters = Counters.unpack(self._counted)
        self.changed = False
        """Entries came, went or were replaced."""
        self.shadowed = 0
        """Shadowed files met, less the shadows that went with their directory (what a listing counts as hidden)."""

    def finish(self) -> None:
        """Write what is counted for the volume."""
        packed = self._counters.pack()
        if packed != self._counted:
            self._txn.put(COUNTERS, packed, db=self._tables.state)

    # -- reading -------------------------------------------------------------------------------------------------------

    def inode(self, ino: Ino) -> Inode | None:
        """Return an inode."""
        raw = self._txn.get(ino_key(ino), db=self._tables.inodes)
        return None if raw is None else unpack_inode(ino, raw)

    def directory(self, ino: Ino) -> Directory | None:
        """Return a directory's listing."""
        raw = self._txn.get(ino_key(ino), db=self._tables.directories)
        return None if raw is None else unpack_directory(raw)

    def entry(self, parent: Ino, key: bytes) -> Dentry | None:
        """Return the dentry with this sort key, also one that is not visible."""
        raw = self._txn.get(ino_key(parent) + key, db=self._tables.dentries)
        return None if raw is None else unpack_dentry(key, raw)

    def visible(self, parent: Ino, name: bytes) -> Dentry | None:
        """Return what users see under this name."""
        for key in (name + SLASH, name):
            dentry = self.entry(parent, key)
            if dentry is not None and dentry.visible:
                return dentry
        return None

    def newer(self, dentry: Dentry, asked_ns: int) -> bool:
        """Return whether a dentry knows more than an answer asked for then. A date in the future proves nothing: the
        clock was set back."""
        return asked_ns < dentry.checked_ns <= self.now_ns

    def walk(self, parent: Ino, first: bytes, end: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        """Yield (sort key, record) from `first` up to `end` (None: all). The tree must not change meanwhile."""
        return walk(self._txn, self._tables, parent, first, end)

    # -- entries -------------------------------------------------------------------------------------------------------

    def put_file(
        self, parent: Ino, name: bytes, facts: FileFacts, asked_ns: int, generation: int, *, restamp: bool
    ) -> None:
        """A file has these facts. `restamp`: write down when it was asked for even when nothing changed."""
        old = self.entry(parent, name)
        if old is None:
            beside = self.entry(parent, name + SLASH)
            shadow = beside is not None and beside.visible
        elif self.newer(old, asked_ns):
            self.shadowed += old.shadowed
            return
        else:
            shadow = old.shadowed
            inode = self.inode(old.ino)
            if inode is not None and inode.size == facts.size and inode.etag == facts.etag:
                self.shadowed += shadow
                self._confirm(old, inode, facts, asked_ns, generation if restamp else None)
                return
            self._orphan(old.ino)
            self._count(-1, -old.size)
        self.shadowed += shadow
        self._put_version(parent, name, facts, asked_ns, generation, shadow)
        self._count(1, facts.size)
        self.changed = True

    def _put_version(
        self, parent: Ino, name: bytes, facts: FileFacts, asked_ns: int, generation: int, shadowed: bool
    ) -> None:
        """A name has a version that was never seen: a new inode."""
        ino, size, mtime_ns = self._new_ino(), facts.size, facts.mtime_ns
        own = facts.mode, facts.uid, facts.gid, facts.own_time
        inode = Inode(ino, FileKind.FILE, parent, name, size, mtime_ns, facts.etag, *own)
        dentry = Dentry(ino, FileKind.FILE, name, size, mtime_ns, asked_ns, generation, shadowed, own=inode.own)
        self._put_inode(inode)
        self._put_dentry(parent, dentry)

    def _confirm(self, old: Dentry, inode: Inode, facts: FileFacts, asked_ns: int, generation: int | None) -> None:
        """The same version again: refresh attributes, and dates when `generation` is given."""
        now = inode
        if facts.full:
            now = dataclasses.replace(now, mode=facts.mode, uid=facts.uid, gid=facts.gid, own_time=facts.own_time)
        keeps_time = inode.own_time and not facts.full
        # A HEAD states whole seconds where some servers list milliseconds: that is not another time.
        exact = facts.own_time or inode.own_time
        if not keeps_time and (exact or facts.mtime_ns // _SECOND_NS != inode.mtime_ns // _SECOND_NS):
            now = dataclasses.replace(now, mtime_ns=facts.mtime_ns)
        if now != inode:
            self._put_inode(now)
        if generation is not None:
            dated = old._replace(mtime_ns=now.mtime_ns, checked_ns=asked_ns, generation=generation, own=now.own)
            self._put_dentry(inode.parent, dated)
        elif now.mtime_ns != old.mtime_ns or now.own != old.own:
            self._put_dentry(inode.parent, old._replace(mtime_ns=now.mtime_ns, own=now.own))

    def put_directory(self, parent: Ino, name: bytes, asked_ns: int, generation: int, *, restamp: bool) -> None:
        """A directory exists."""
        old = self.entry(parent, name + SLASH)
        if old is not None and not old.gone:
            if restamp and not self.newer(old, asked_ns):
                self._put_dentry(parent, old._replace(checked_ns=asked_ns, generation=generation))
            return
        if old is None:
            ino = self._new_ino()
            self._put_inode(Inode(ino, FileKind.DIRECTORY, parent, name, 0, self._created_ns(), ""))
            new = Dentry(ino, FileKind.DIRECTORY, name, 0, self._created_ns(), asked_ns, generation)
        else:
            new = old._replace(gone=False, checked_ns=asked_ns, generation=generation)
        self._put_dentry(parent, new)
        self._shadow(parent, name, True)
        self.changed = True

    def remove(self, parent: Ino, dentry: Dentry) -> None:
        """A visible or shadowed entry vanished."""
        key = sort_key(dentry.name, dentry.kind)
        self._orphan(dentry.ino)
        self.changed = True
        if dentry.kind is FileKind.FILE:
            self._txn.delete(ino_key(parent) + key, db=self._tables.dentries)
            self._count(-1, -dentry.size)
            return
        self._put_dentry(parent, dentry._replace(gone=True, checked_ns=self.now_ns))
        self._txn.delete(ino_key(dentry.ino), db=self._tables.directories)
        self._txn.put(due_key(self.now_ns, dentry.ino), _SWEEP, db=self._tables.orphans)
        self._shadow(parent, dentry.name, False)

    def put_finding(self, parent: Ino, name: bytes, finding: Finding, asked_ns: int) -> None:
        """One name was asked for."""
        if finding.file is not None or finding.directory:
            self.revive(parent)
        if finding.directory:
            self.put_directory(parent, name, asked_ns, 0, restamp=True)
        elif finding.directory is False:
            self._remove_older(parent, name + SLASH, asked_ns)
        if finding.file is not None:
            self.put_file(parent, name, finding.file, asked_ns, 0, restamp=True)
        elif finding.no_file:
            self._remove_older(parent, name, asked_ns)

    def revive(self, ino: Ino) -> None:
        """Something was found below a directory: it and the directories above it exist."""
        while ino != ROOT_INO:
            inode = self.inode(ino)
            if inode is None:
                return
            own = self.entry(inode.parent, inode.name + SLASH)
            if own is None or not own.gone:
                return
            self._put_dentry(inode.parent, own._replace(gone=False))
            self._shadow(inode.parent, inode.name, True)
            ino = inode.parent

    def put_listing(self, ino: Ino, directory: Directory) -> None:
        """Write what is known of a directory's listing."""
        self._txn.put(ino_key(ino), pack_directory(directory), db=self._tables.directories)

    def mark_unordered(self) -> None:
        """Remember that the store lists in no order."""
        self._txn.put(UNORDERED, b"1", db=self._tables.state)

    def touch_directory(self, ino: Ino) -> None:
        """The entries of a directory changed: this is its mtime, in the inode and in its own dentry.

        A first listing changes nothing: the time would move under whoever reads the directory meanwhile, and tar ends
        with "file changed as we read it".
        """
        inode = self.inode(ino)
        if inode is None:
            return
        self._put_inode(dataclasses.replace(inode, mtime_ns=self.now_ns))
        own = self.entry(inode.parent, inode.name + SLASH) if ino != ROOT_INO else None
        if own is not None:
            self._put_dentry(inode.parent, own._replace(mtime_ns=self.now_ns))

    def _remove_older(self, parent: Ino, key: bytes, asked_ns: int) -> None:
        dentry = self.entry(parent, key)
        if dentry is not None and not dentry.gone and not self.newer(dentry, asked_ns):
            self.remove(parent, dentry)

    def _shadow(self, parent: Ino, name: bytes, shadowed: bool) -> None:
        file = self.entry(parent, name)
        if file is not None and file.shadowed != shadowed:
            self._put_dentry(parent, file._replace(shadowed=shadowed))
            self.shadowed += 1 if shadowed else -1

    # -- orphans -------------------------------------------------------------------------------------------------------

    def purge(self, budget: int) -> int:
        """Do at most about `budget` steps of what is due, and return how many were done (0: nothing is due)."""
        done = 0
        for key, task in self._due(budget):
            if done >= budget:
                break
            _, ino = due_of_key(key)
            self._txn.delete(key, db=self._tables.orphans)
            if task == _PURGE:
                self._purge(ino)
                done += 1
            else:
                done += 1 + self._sweep(ino, task[1:], budget - done)
        return done

    def _due(self, budget: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        for key, task in self._txn.cursor(self._tables.orphans):
            if len(found) >= budget or due_of_key(key)[0] > self.now_ns:
                break
            found.append((key, task))
        return found

    def _purge(self, ino: Ino) -> None:
        """Forget an inode, unless its name came back to it or vanished again later than this task knows."""
        inode = self.inode(ino)
        if inode is None:
            return
        key = sort_key(inode.name, inode.kind)
        dentry = self.entry(inode.parent, key)
        if dentry is not None and dentry.ino == ino:
            if not dentry.gone or dentry.checked_ns + RETAIN_NS > self.now_ns:
                return
            if next(self.walk(ino, b"", None), None) is not None:
                # Directories below it vanished later and have to go first.
                self._txn.put(due_key(self.now_ns, ino), _SWEEP, db=self._tables.orphans)
                self._txn.put(due_key(self.now_ns + _PURGE_AGAIN_NS, ino), _PURGE, db=self._tables.orphans)
                return
            self._txn.delete(ino_key(inode.parent) + key, db=self._tables.dentries)
        self._txn.delete(ino_key(ino), db=self._tables.inodes)
        self._txn.delete(ino_key(ino), db=self._tables.directories)

    def _sweep(self, ino: Ino, resume: bytes, budget: int) -> int:
        """Remove what is below a directory that is gone; what is left goes back into the queue."""
        inode = self.inode(ino)
        own = self.entry(inode.parent, inode.name + SLASH) if inode is not None else None
        if own is not None and own.ino == ino and not own.gone:
            return 0  # it came back, and its next listing finds out what is still there
        below: list[Dentry] = []
        for key, raw in self.walk(ino, resume, None):
            if len(below) >= max(budget, 1):
                self._txn.put(due_key(self.now_ns, ino), _SWEEP + key, db=self._tables.orphans)
                break
            dentry = unpack_dentry(key, raw)
            if not dentry.gone:
                below.append(dentry)
        for dentry in below:
            self.remove(ino, dentry)
        return len(below)

    def _orphan(self, ino: Ino) -> None:
        self._txn.put(due_key(self.now_ns + RETAIN_NS, ino), _PURGE, db=self._tables.orphans)

    # -- records -------------------------------------------------------------------------------------------------------

    def _new_ino(self) -> Ino:
        ino = Ino(self._counters.next_ino)
        self._counters.next_ino += 1
        return ino

    def _count(self, objects: int, used_bytes: int) -> None:
        self._counters.objects = max(0, self._counters.objects + objects)
        self._counters.used_bytes = max(0, self._counters.used_bytes + used_bytes)

    def _created_ns(self) -> int:
        """The mtime of a directory that was never seen to change: when the volume was first mounted."""
        return int(self._txn.get(CREATED, db=self._tables.state) or b"0")

    def _put_inode(self, inode: Inode) -> None:
        self._txn.put(ino_key(inode.ino), pack_inode(inode), db=self._tables.inodes)

    def _put_dentry(self, parent: Ino, dentry: Dentry) -> None:
        place = ino_key(parent) + sort_key(dentry.name, dentry.kind)
        self._txn.put(place, pack_dentry(dentry), db=self._tables.dentries)


def walk(txn: Any, tables: Tables, parent: Ino, first: bytes, end: bytes | None) -> Iterator[tuple[bytes, bytes]]:
    """Yield (sort key, record) of a directory's dentries from `first` up to `end` (None: all)."""
    head = ino_key(parent)
    cursor = txn.cursor(tables.dentries)
    if not cursor.set_range(head + first):
        return
    for key, raw in cursor:
        if not key.startswith(head):
            return
        place = key[len(head) :]
        if end is not None and place >= end:
            return
        yield place, raw
