"""Questions to the tree of names that need more than one record, on a read transaction that is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachefs.errors import StaleObject
from cachefs.types import FileKind, Ino
from metadata.changes import Tables
from metadata.names import SLASH, sort_key
from metadata.records import Dentry, ino_key, unpack_dentry, unpack_directory, unpack_inode


def place_of(txn: Any, tables: Tables, parent: Ino, ino: Ino) -> bytes:
    """Return the sort key that an entry of `parent` has or had. Raises StaleObject."""
    raw = txn.get(ino_key(ino), db=tables.inodes)
    inode = None if raw is None else unpack_inode(ino, raw)
    if inode is None or inode.parent != parent:
        raise StaleObject(f"directory position {ino} is no longer known")
    return sort_key(inode.name, inode.kind)


def scan(txn: Any, tables: Tables, parent: Ino, after: bytes, limit: int) -> list[Dentry]:
    """Return up to `limit` visible entries above the sort key `after`; nothing of a directory that was never listed.

    While the listing is incomplete only entries count whose sort key with a slash behind it is below the frontier: only
    then is it known that no directory shadows them.
    """
    known = txn.get(ino_key(parent), db=tables.directories)
    if known is None:
        return []
    directory = unpack_directory(known)
    frontier = None if directory.complete else directory.frontier
    head = ino_key(parent)
    cursor = txn.cursor(tables.dentries)
    found: list[Dentry] = []
    if not cursor.set_range(head + after):
        return found
    for key, raw in cursor:
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
    return found


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
