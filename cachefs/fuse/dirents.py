"""READDIRPLUS replies, packed without libfuse: one struct per entry.

A listing of a million names is mostly this loop. Through pyfuse3 each reply also costs two changes of threads, and
there is one reply for about twenty entries (the kernel asks with a buffer of one page).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable

from cachefs.vfs.attributes import Attributes

_DIRENTPLUS = struct.Struct("<QQQQIIQQQQQQIIIIIIIIIIQQII")
"""fuse_entry_out, fuse_attr and fuse_dirent (include/uapi/linux/fuse.h); the name follows, padded to 8 bytes."""
SMALLEST_ENTRY = _DIRENTPLUS.size + 8
_BLOCK_SIZE = 1 << 20


def pack_direntplus(entries: Iterable[tuple[Attributes, bytes, float, float]], size: int) -> bytearray:
    """Return as many entries as fit into `size` bytes: (attributes, name, seconds the name holds, seconds they hold).

    The cookie of an entry is its inode number.
    """
    reply = bytearray(size)
    used = 0
    for attributes, name, entry_s, attr_s in entries:
        length = _DIRENTPLUS.size + len(name)
        padded = (length + 7) & ~7
        if used + padded > size:
            break
        ino, mode, bytes_, mtime_ns = attributes.ino, attributes.mode, attributes.size, attributes.mtime_ns
        seconds, nanoseconds = divmod(mtime_ns, 1_000_000_000)
        seconds &= 0xFFFFFFFFFFFFFFFF  # times before 1970 are two's complement
        _DIRENTPLUS.pack_into(
            reply, used,
            ino, 0, int(entry_s), int(attr_s), int(entry_s % 1 * 1e9), int(attr_s % 1 * 1e9),
            ino, bytes_, (bytes_ + 511) >> 9, seconds, seconds, seconds, nanoseconds, nanoseconds, nanoseconds,
            mode, attributes.nlink, attributes.uid, attributes.gid, 0, _BLOCK_SIZE, 0,
            ino, ino, len(name), stat.S_IFMT(mode) >> 12,
        )  # fmt: skip
        reply[used + _DIRENTPLUS.size : used + length] = name
        used += padded
    del reply[used:]
    return reply
