"""What an environment says about itself in its `state` table: format, identity of the volume, first inode number."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from cachefs.errors import ConfigError
from cachefs.types import ROOT_INO, FileKind
from metadata.changes import COUNTERS, CREATED, UNORDERED, Tables
from metadata.names import encode_key, normal_prefix
from metadata.records import FORMAT, Counters, Inode, ino_key, pack_inode, unpack_inode

_IDENTITY, _FORMAT = b"identity", b"format"


@dataclass(frozen=True, slots=True)
class VolumeIdentity:
    """What a metadata environment describes."""

    endpoint: str
    bucket: str
    prefix: str

    def pack(self) -> bytes:
        """Return the record."""
        return json.dumps([self.endpoint, self.bucket, normal_prefix(self.prefix)]).encode()

    def expect(self, prefix: str) -> None:
        """Refuse a prefix whose keys would be mixed into metadata of another volume. Raises ConfigError."""
        if normal_prefix(prefix) != normal_prefix(self.prefix):
            raise ConfigError(f"the metadata of {self.bucket}/{self.prefix} cannot describe {self.bucket}/{prefix}")


def fault(txn: Any, tables: Tables, identity: VolumeIdentity) -> str | None:
    """Return why an environment is not one of this volume that can be used, None when it is."""
    if txn.get(_FORMAT, db=tables.state) != str(FORMAT).encode():
        return "it has another format"
    if txn.get(_IDENTITY, db=tables.state) != identity.pack():
        return "it describes another volume"
    Counters.unpack(txn.get(COUNTERS, b"", db=tables.state))
    root = txn.get(ino_key(ROOT_INO), db=tables.inodes)
    if root is None or unpack_inode(ROOT_INO, root).kind is not FileKind.DIRECTORY:
        return "it has no root"
    return None


def found(txn: Any, tables: Tables, identity: VolumeIdentity, now_ns: int) -> None:
    """Write the first records of a new environment.

    It must never hand out numbers of an earlier one, because a mount that is still there may hold them in the kernel.
    So its first number is random below 2**48: two environments of a million inodes overlap once in 10**8 times, and
    programs that read inode numbers as doubles still have them exactly.
    """
    first = (1 << 32) + secrets.randbelow((1 << 48) - (1 << 32))
    root = Inode(ROOT_INO, FileKind.DIRECTORY, ROOT_INO, b"", 0, now_ns, "")
    txn.put(_FORMAT, str(FORMAT).encode(), db=tables.state)
    txn.put(_IDENTITY, identity.pack(), db=tables.state)
    txn.put(CREATED, str(now_ns).encode(), db=tables.state)
    txn.put(COUNTERS, Counters(first).pack(), db=tables.state)
    txn.put(ino_key(ROOT_INO), pack_inode(root), db=tables.inodes)


def renumber(txn: Any, tables: Tables) -> None:
    """Let a copy of an environment go on at other numbers than its original, which may go on as well: above the next
    2**32, and at random, so that two copies go on at different ones too.
    """
    counters = Counters.unpack(txn.get(COUNTERS, b"", db=tables.state))
    counters.next_ino += (1 << 32) + secrets.randbelow(1 << 40)
    txn.put(COUNTERS, counters.pack(), db=tables.state)


def lineage_of(txn: Any, tables: Tables) -> str:
    """Return what an environment and its copies have in common, and no other has: when the first of them began."""
    return bytes(txn.get(CREATED, b"", db=tables.state)).decode("ascii", "replace")


def prefix_of(txn: Any, tables: Tables) -> bytes | None:
    """Return the volume's prefix, None when this is no environment of cachefs."""
    identity = txn.get(_IDENTITY, db=tables.state)
    return None if identity is None else encode_key(json.loads(identity)[2])


def is_unordered(txn: Any, tables: Tables) -> bool:
    """Return whether the store was seen to list in no order."""
    return txn.get(UNORDERED, db=tables.state) is not None
