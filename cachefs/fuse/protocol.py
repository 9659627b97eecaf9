"""The messages of /dev/fuse that cachefs reads and writes itself.

Source: include/uapi/linux/fuse.h, protocol 7.31 to 7.45. Everything not here passes through libfuse unread.

INVARIANT: standard library only. The supervisor reads and answers messages with this, and imports nothing else of
`cachefs.fuse`.
"""

from __future__ import annotations

import enum
import errno
import struct


class Opcode(enum.IntEnum):
    """Request codes (enum fuse_opcode) that the channel answers or must know."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    READDIRPLUS = 44


UNMOUNTED = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EBADF})
"""Errors of the device when its mount is gone."""
UNANSWERED = frozenset({Opcode.FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY, Opcode.BATCH_FORGET})
"""The kernel expects no answer to these."""
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7
NOTIFY_INC_EPOCH = 8
"""Since 7.44 (Linux 6.16): all names that the kernel has looked up so far have to be looked up again."""

IN_HEADER = struct.Struct("<IIQQ")
"""len, opcode, unique, nodeid: the first 24 of the header's 40 bytes."""
IN_HEADER_SIZE = 40
IN_PID = struct.Struct("<I")
IN_PID_OFFSET = 32
READ_IN = struct.Struct("<QQI")
"""fh, offset, size."""
READ_FLAGS = struct.Struct("<8xQI12xI")
"""offset, size, and the flags of the open file: without OPEN they are known from each READ. Before the flags are
read_flags and lock_owner."""
INTERRUPT_IN = struct.Struct("<Q")
GETXATTR_IN = struct.Struct("<II")
"""size, padding; the name follows, ended by a zero byte."""
OUT_HEADER = struct.Struct("<IiQ")
"""len, error (0 or a negative errno; the code of a notification, which has unique 0), unique."""
OUT_HEADER_SIZE = 16
OPEN_OUT = struct.Struct("<QIi")
"""fh, open_flags, backing_id."""
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime, their nanoseconds (3), mode, nlink, uid, gid, rdev, blksize, flags."""
ENTRY_OUT = struct.Struct("<QQQQII")
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec; an ATTR follows."""
ATTR_OUT = struct.Struct("<QII")
"""attr_valid, attr_valid_nsec, padding; an ATTR follows."""
DIRENT = struct.Struct("<QQII")
"""ino, off, namelen, type; the name follows, padded to 8 bytes."""
INVAL_ENTRY_OUT = struct.Struct("<QII")
"""parent, namelen, flags; the name follows, ended by a zero byte."""
INIT_OUT = struct.Struct("<IIIIHHIIHHII")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth."""

EXPIRE_ONLY = 1 << 0
"""Flag of NOTIFY_INVAL_ENTRY since Linux 6.2: the name's time is over, what is open or below it stays. Kernels before
that take no notice of it and drop the name, which is the same for files."""
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3

ROOT_ID = 1


def error_reply(unique: int, code: int) -> bytes:
    """Return the answer that fails request `unique` with errno `code` (positive)."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -code, unique)


def name_expired(parent: int, name: bytes) -> bytes:
    """Return the notification that ends the time of a name in the directory `parent`.

    The kernel carries it out under the directory's lock, which a LOOKUP or READDIR in the same directory holds until it
    is answered: whoever writes this may have to wait for that, and kill -9 does not end the waiting.
    """
    body = INVAL_ENTRY_OUT.pack(parent, len(name), EXPIRE_ONLY) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def all_names_expired() -> bytes:
    """Return the notification that makes the kernel look up every name again. It takes no lock."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, NOTIFY_INC_EPOCH, 0)
