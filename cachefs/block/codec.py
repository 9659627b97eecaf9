"""How a block is stored: a 32-byte header and the bytes themselves.

    offset 0   4 bytes  magic "CFSB"
           4   u8       format version (1)
           5   u8       flags (0)
           6   u16      reserved (0)
           8   u32      payload length
          12   u32      reserved (0)
          16   u64      xxh3_64 of the payload
          24   u64      xxh3_64 of the block's key
          32            payload

All numbers are little endian. The fingerprint of the key binds the bytes to their name: a damaged index that leads
to another, intact block is noticed as well as a damaged payload. The header has a fixed size so that a reader of
the shm tier can slice the payload out of the memory map without looking at it (memory does not rot; disks and
networks do).
"""

from __future__ import annotations

import struct

import xxhash

from cachefs import errors

Bytes = bytes | bytearray | memoryview
"""What can hold the bytes of a block."""

MAGIC = b"CFSB"
FORMAT_VERSION = 1

_HEADER = struct.Struct("<4sBBHIIQQ")
HEADER_SIZE = _HEADER.size


def encode_header(payload: Bytes, key: bytes) -> bytes:
    """Return the header of `payload` as the block named `key`."""
    length = memoryview(payload).nbytes
    checksum = xxhash.xxh3_64_intdigest(payload)
    return _HEADER.pack(MAGIC, FORMAT_VERSION, 0, 0, length, 0, checksum, xxhash.xxh3_64_intdigest(key))


def encode(payload: Bytes, key: bytes) -> bytes:
    """Return the stored value of `payload`: header and payload in one piece."""
    return b"".join((encode_header(payload, key), payload))


def verify(value: Bytes, key: bytes, expected_length: int | None = None) -> memoryview:
    """Return the payload of a stored value as a view of it.

    Raises: CorruptBlock when anything does not fit: magic, version, length (also `expected_length` if given),
    checksum, key.
    """
    view = memoryview(value)
    if view.nbytes < HEADER_SIZE:
        raise errors.CorruptBlock(f"block {key.hex()} has {view.nbytes} bytes, less than a header")
    magic, version, flags, reserved, length, padding, checksum, fingerprint = _HEADER.unpack_from(view)
    payload = view[HEADER_SIZE:]
    if magic != MAGIC or version != FORMAT_VERSION or flags or reserved or padding:
        raise errors.CorruptBlock(f"block {key.hex()} has a foreign header")
    if length != payload.nbytes or (expected_length is not None and length != expected_length):
        raise errors.CorruptBlock(f"block {key.hex()} has {payload.nbytes} bytes, its header says {length}")
    if fingerprint != xxhash.xxh3_64_intdigest(key):
        raise errors.CorruptBlock(f"the bytes stored as block {key.hex()} belong to another block")
    if checksum != xxhash.xxh3_64_intdigest(payload):
        raise errors.CorruptBlock(f"block {key.hex()} does not match its checksum")
    return payload
