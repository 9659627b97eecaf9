"""The records of the metadata store: what they mean, and how they look on disk.

All integers are little endian except in keys (big endian, so that keys sort as numbers). Every record begins with its
format version; `FORMAT` is the version of the whole environment, and an environment of another one is set aside.

    inodes       ino                  -> version kind flags parent size mtime mode uid gid name_length | name | etag
    dentries     parent, sort key     -> version kind flags ino size mtime checked generation
    directories  ino                  -> version flags generation started listed changed entries hidden | frontier
    orphans      due time, ino        -> what is to be done, and for a sweep the sort key where it goes on
    state        name                 -> format, identity, created, counters, unordered

Name and parent of a dentry are in its key. READDIRPLUS needs nothing but the dentry, and the inode of a file that has a
mode or an owner of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from cachefs.types import FileKind, Ino
from metadata.names import name_of

FORMAT = 1

_INO = struct.Struct(">Q")
_DUE = struct.Struct(">QQ")
_INODE = struct.Struct("<BBBQQqIIIH")
_DENTRY = struct.Struct("<BBBQQqqI")
_DIRECTORY = struct.Struct("<BBIqqqQQ")
_COUNTERS = struct.Struct("<QQQ")

_HAS_MODE, _HAS_UID, _HAS_GID, _HAS_OWN_TIME = 1, 2, 4, 8
_SHADOWED, _GONE, _OWN = 1, 2, 4
_KIND_FILE = int(FileKind.FILE)


@dataclass(frozen=True, slots=True)
class Inode:
    """One version of one object, or one directory. Kept for a while after its name is gone: a file may be open."""

    ino: Ino
    kind: FileKind
    parent: Ino
    name: bytes
    size: int
    """Bytes; 0 for directories."""
    mtime_ns: int
    etag: str
    mode: int | None = None
    """Permission bits from the object's user metadata; None: the mount decides. The same for uid and gid."""
    uid: int | None = None
    gid: int | None = None
    own_time: bool = False
    """`mtime_ns` comes from the object's user metadata, and the store's time must not replace it."""

    @property
    def own(self) -> bool:
        """Whether its mode, uid or gid are not the mount's."""
        return self.mode is not None or self.uid is not None or self.gid is not None


class Dentry(NamedTuple):
    """A name in a directory, with everything that READDIRPLUS says about it.

    A tuple because listings make millions of them: 0.4 us each, a frozen dataclass 1.6 us.
    """

    ino: Ino
    kind: FileKind
    name: bytes
    size: int
    mtime_ns: int
    checked_ns: int
    """When the store was asked for this very entry last; listings that find it unchanged leave this alone."""
    generation: int
    """Number of the listing that wrote it; 0: it was asked for by name."""
    shadowed: bool = False
    """A file whose name is also a directory: never shown."""
    gone: bool = False
    """A directory that vanished at `checked_ns`: never shown, kept so that it gets its number back when it returns."""
    own: bool = False
    """See `Inode.own`: what the mount says of mode and owner is not true of this one, the inode has to be asked."""

    @property
    def visible(self) -> bool:
        """Whether the entry exists for users."""
        return not (self.shadowed or self.gone)


@dataclass(frozen=True, slots=True)
class Directory:
    """What is known of a directory's listing. A directory that was never listed has none."""

    generation: int
    """Number of the last listing that was begun (first listings) or completed (all others)."""
    started_ns: int
    """When the listing that made the present state was begun."""
    complete: bool
    """Every entry is in the store, and no others."""
    changed_ns: int
    """When entries last came, went or were replaced: the directory's mtime."""
    frontier: bytes
    """Until complete: all entries whose sort keys are below it are known."""
    entries: int
    hidden: int
    """Keys that cannot be paths, and files shadowed by a directory."""
    listed_ns: int = 0
    """When the listing was complete: its age counts from here (0 until then)."""


def ino_key(ino: int) -> bytes:
    """Return the key of an inode or a directory, and the first part of the keys of its dentries."""
    return _INO.pack(ino)


def ino_of_key(key: bytes) -> Ino:
    """Return the inode number with which a key begins."""
    return Ino(_INO.unpack_from(key)[0])


def due_key(due_ns: int, ino: int) -> bytes:
    """Return a key of the orphans: sorted by the time when something is to be done."""
    return _DUE.pack(due_ns, ino)


def due_of_key(key: bytes) -> tuple[int, Ino]:
    """Return time and inode number of an orphan."""
    due_ns, ino = _DUE.unpack(key)
    return due_ns, Ino(ino)


def pack_inode(inode: Inode) -> bytes:
    """Return the record of an inode."""
    flags = (
        (_HAS_MODE if inode.mode is not None else 0)
        | (_HAS_UID if inode.uid is not None else 0)
        | (_HAS_GID if inode.gid is not None else 0)
        | (_HAS_OWN_TIME if inode.own_time else 0)
    )
    head = _INODE.pack(
        FORMAT,
        inode.kind,
        flags,
        inode.parent,
        inode.size,
        inode.mtime_ns,
        inode.mode or 0,
        inode.uid or 0,
        inode.gid or 0,
        len(inode.name),
    )
    return head + inode.name + inode.etag.encode("utf-8", "surrogateescape")


def unpack_inode(ino: Ino, raw: bytes) -> Inode:
    """Return the inode of a record."""
    _, kind, flags, parent, size, mtime_ns, mode, uid, gid, length = _INODE.unpack_from(raw)
    end = _INODE.size + length
    return Inode(
        ino,
        FileKind.FILE if kind == _KIND_FILE else FileKind.DIRECTORY,
        parent,
        raw[_INODE.size : end],
        size,
        mtime_ns,
        raw[end:].decode("utf-8", "surrogateescape"),
        mode if flags & _HAS_MODE else None,
        uid if flags & _HAS_UID else None,
        gid if flags & _HAS_GID else None,
        bool(flags & _HAS_OWN_TIME),
    )


def pack_dentry(dentry: Dentry) -> bytes:
    """Return the record of a dentry (its name is in the key)."""
    flags = (_SHADOWED if dentry.shadowed else 0) | (_GONE if dentry.gone else 0) | (_OWN if dentry.own else 0)
    return _DENTRY.pack(
        FORMAT, dentry.kind, flags, dentry.ino, dentry.size, dentry.mtime_ns, dentry.checked_ns, dentry.generation
    )


def unpack_dentry(key: bytes, raw: bytes) -> Dentry:
    """Return the dentry with this sort key."""
    _, _, flags, ino, size, mtime_ns, checked_ns, generation = _DENTRY.unpack(raw)
    name, kind = name_of(key)
    shadowed, gone, own = bool(flags & _SHADOWED), bool(flags & _GONE), bool(flags & _OWN)
    return Dentry(ino, kind, name, size, mtime_ns, checked_ns, generation, shadowed, gone, own)


def pack_directory(directory: Directory) -> bytes:
    """Return the record of a directory's listing."""
    head = _DIRECTORY.pack(
        FORMAT,
        directory.complete,
        directory.generation,
        directory.started_ns,
        directory.listed_ns,
        directory.changed_ns,
        directory.entries,
        directory.hidden,
    )
    return head + directory.frontier


def unpack_directory(raw: bytes) -> Directory:
    """Return the directory of a record."""
    _, complete, generation, started_ns, listed_ns, changed_ns, entries, hidden = _DIRECTORY.unpack_from(raw)
    return Directory(
        generation,
        started_ns,
        bool(complete),
        changed_ns,
        raw[_DIRECTORY.size :],
        entries,
        hidden,
        listed_ns,
    )


@dataclass(slots=True)
class Counters:
    """What is counted for the whole volume; one record, rewritten by every transaction that changes it."""

    next_ino: int
    objects: int = 0
    used_bytes: int = 0

    def pack(self) -> bytes:
        """Return the record."""
        return _COUNTERS.pack(self.next_ino, self.objects, self.used_bytes)

    @classmethod
    def unpack(cls, raw: bytes) -> Counters:
        """Return the counters of a record."""
        return cls(*_COUNTERS.unpack(raw))
