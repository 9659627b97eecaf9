"""READDIRPLUS replies, packed without libfuse: one struct per entry.

A listing of a million names is mostly this loop. Through pyfuse3 each reply also costs two changes of threads, and
there is one reply for about twenty entries (the kernel asks with a buffer of one page).

A listing begins with "." and "..", which the kernel does not add by itself. The cookie of an entry is its inode number;
theirs are numbers that no entry has, so a listing goes on behind them after a restart as well.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Sequence

from cachefs.types import Ino
from cachefs.vfs.attributes import Attributes
from metadata.records import Inode

_DIRENTPLUS = struct.Struct("<QQQQIIQQQQQQIIIIIIIIIIQQII")
"""fuse_entry_out, fuse_attr and fuse_dirent (include/uapi/linux/fuse.h); the name follows, padded to 8 bytes."""
SMALLEST_ENTRY = _DIRENTPLUS.size + 8
_NO_ATTRIBUTES = (0,) * 22
_BLOCK_SIZE = 1 << 20
DOT_COOKIE, DOTDOT_COOKIE = 1, 2
"""The numbers of entries begin far above: the root (1) is nobody's entry, and the others are 2**32 and more."""

Dot = tuple[int, Ino, bytes]
"""Cookie, inode number, name."""


def dots_behind(cookie: int, ino: Ino, inode: Inode | None) -> list[Dot]:
    """Return which of "." and ".." of directory `ino` (`inode`: its record) come behind `cookie`."""
    parent = ino if inode is None else inode.parent
    return [(DOT_COOKIE, ino, b"."), (DOTDOT_COOKIE, parent, b"..")][cookie:]


def entry_before(cookie: int) -> Ino | None:
    """Return the entry behind which a listing goes on, None: at the first one."""
    return Ino(cookie) if cookie > DOTDOT_COOKIE else None


def pack_direntplus(
    entries: Iterable[tuple[Attributes, bytes, float, float]], size: int, dots: Sequence[Dot] = ()
) -> bytearray:
    """Return as many entries as fit into `size` bytes: (attributes, name, seconds the name holds, seconds they hold).

    `dots` come first. They are no look-ups (nodeid 0): the kernel takes number and type from them, and counts nothing.
    """
    reply = bytearray(size)
    used = 0
    for cookie, ino, name in dots:
        if used + SMALLEST_ENTRY > size:
            return reply[:used]
        _DIRENTPLUS.pack_into(reply, used, *_NO_ATTRIBUTES, ino, cookie, len(name), stat.S_IFDIR >> 12)
        reply[used + _DIRENTPLUS.size : used + _DIRENTPLUS.size + len(name)] = name
        used += SMALLEST_ENTRY
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
