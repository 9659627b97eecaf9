"""Questions to the tree of names that need more than one record, on a read transaction that is given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from cachefs.errors import StaleObject
from cachefs.types import FileKind, Ino
from metadata.changes import Tables, walk
from metadata.names import SLASH, name_of, sort_key
from metadata.records import Dentry, Directory, Inode, ino_key, unpack_dentry, unpack_directory, unpack_inode


class Listing(NamedTuple):
    """A part of a directory's listing, as it is at one moment."""

    directory: Directory | None
    """None: it was never listed."""
    entries: list[Dentry]
    own: dict[Ino, Inode]
    """The inodes of those entries that have attributes of their own."""


def place_of(txn: Any, tables: Tables, parent: Ino, ino: Ino) -> bytes:
    """Return the sort key that an entry of `parent` has or had. Raises StaleObject."""
    raw = txn.get(ino_key(ino), db=tables.inodes)
    inode = None if raw is None else unpack_inode(ino, raw)
    if inode is None or inode.parent != parent:
        raise StaleObject(f"directory position {ino} is no longer known")
    return sort_key(inode.name, inode.kind)


def listing(txn: Any, tables: Tables, parent: Ino, after: bytes, limit: int) -> Listing:
    """Return up to `limit` visible entries above the sort key `after`; nothing of a directory that was never listed.

    While the listing is incomplete only entries count whose sort key with a slash behind it is below the frontier: only
    then is it known that no directory shadows them.
    """
    head = ino_key(parent)
    known = txn.get(head, db=tables.directories)
    if known is None:
        return Listing(None, [], {})
    directory = unpack_directory(known)
    frontier = None if directory.complete else directory.frontier
    cursor = txn.cursor(tables.dentries)
    found: list[Dentry] = []
    own: dict[Ino, Inode] = {}
    for key, raw in cursor if cursor.set_range(head + after) else ():
        if not key.startswith(head) or len(found) >= limit:
            break
        place = key[len(head) :]
        if place == after:
            continue
        if frontier is not None and place + SLASH >= frontier:
            break
        dentry = unpack_dentry(place, raw)
        if dentry.visible:
            found.append(dentry)
            record = txn.get(ino_key(dentry.ino), db=tables.inodes) if dentry.own else None
            if record is not None:
                own[dentry.ino] = unpack_inode(dentry.ino, record)
    return Listing(directory, found, own)


def names_in(txn: Any, tables: Tables, parent: Ino, limit: int) -> list[bytes]:
    """Return up to `limit` names of a directory, whatever became of them."""
    found = itertools.islice(walk(txn, tables, parent, b"", None), limit)
    return [name_of(place)[0] for place, _ in found]


def key_of(txn: Any, tables: Tables, ino: Ino, prefixes: Mapping[Ino, bytes]) -> tuple[bytes, bool]:
    """Return an inode's key and whether it is a directory. `prefixes` has the root's at least. Raises StaleObject."""
    names: list[bytes] = []
    is_directory = True
    above = ino
    while (prefix := prefixes.get(above)) is None:
        raw = txn.get(ino_key(above), db=tables.inodes)
        if raw is None:
            raise StaleObject(f"inode {ino} is no longer known")
        inode = unpack_inode(above, raw)
        if not names:
            is_directory = inode.kind is FileKind.DIRECTORY
        names.append(sort_key(inode.name, inode.kind))
        above = inode.parent
    return prefix + b"".join(reversed(names)), is_directory
