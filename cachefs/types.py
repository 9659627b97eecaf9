"""The words every layer shares: identities of files, object versions and blocks.

Invariants that the whole project rests on:

* An inode number names ONE version of one object (or one directory) for ever. When the object behind a name changes,
the
  name gets a new inode number, as if the file had been replaced by rename(2). So neither the kernel's page cache nor an
  open file can ever mix two versions, and a file handle needs no state: the inode says everything.
* A block is a fixed-size piece of one object version. Its key contains the version, so a block is never invalidated:
  blocks of an old version only become unreachable.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NewType

import xxhash

Ino = NewType("Ino", int)
"""An inode number. 1 is the root of the mount, real ones start at 2 and are never used twice in one volume."""

ObjectId = NewType("ObjectId", bytes)
"""16 bytes: the identity of one object version, see :func:`object_id`."""

BlockKey = NewType("BlockKey", bytes)
"""20 bytes: an ObjectId and the index of the block, big endian, so that the blocks of one object are neighbours."""

ROOT_INO = Ino(1)
FIRST_INO = 2
NAME_MAX = 255
PART_BYTES = 8 << 20
"""Large objects are read in parts of this size, at its multiples: stores keep them in parts of such a size, and read a
part that lies in two requests twice.
"""

_INDEX = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One version of one object: what a GET with If-Match can only answer with exactly these bytes."""

    key: str
    etag: str
    """The entity tag without its quotes (they are stripped once, where the store's answer enters)."""
    size: int


class FileKind(enum.IntEnum):
    """What an inode is. The values are stored on disk: never renumber."""

    DIRECTORY = 1
    FILE = 2


class Consistency(enum.StrEnum):
    """How new a name has to be (docs/SEMANTICS.md)."""

    IMMUTABLE = "immutable"
    TTL = "ttl"
    STRICT = "strict"


class Tier(enum.StrEnum):
    """Where the bytes of a read came from, nearest first."""

    SHM = "shm"
    DISK = "disk"
    PEER = "peer"
    ORIGIN = "origin"


def object_id(endpoint: str, bucket: str, version: ObjectVersion) -> ObjectId:
    """Return the 128-bit xxh3 of endpoint, bucket, key, etag and size, each with its length before it."""
    digest = xxhash.xxh3_128()
    for part in (endpoint, bucket, version.key, version.etag, str(version.size)):
        raw = part.encode("utf-8", "surrogateescape")
        digest.update(_INDEX.pack(len(raw)))
        digest.update(raw)
    return ObjectId(digest.digest())


def block_key(oid: ObjectId, index: int) -> BlockKey:
    """Return the key of block `index` (0-based) of the object version `oid`."""
    return BlockKey(oid + _INDEX.pack(index))


def block_count(size: int, block_size: int) -> int:
    """Return how many blocks an object of `size` bytes has (0 for an empty one)."""
    return -(-size // block_size)
