"""Blocks of a file system for a file, by hand: promised ahead of its end, given back out of its middle.

Python's posix_fallocate can do neither: it changes the length of the file, and where the file system does not know how,
it writes zeros. Linux's fallocate(2) can do both, on ext4, XFS, btrfs and tmpfs. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV})
"""The file system does not know how."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""There is no room: of the file system, of our quota, of the limit for files of this process."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def promise(descriptor: int, start: int, length: int) -> None:
    """Have blocks for a part of a file, also behind its end; its length stays. Raises OSError."""
    _fallocate(descriptor, _KEEP_SIZE, start, length)


def punch(descriptor: int, start: int, length: int) -> None:
    """Give the blocks of a part of a file back; it reads as zeros. Raises OSError."""
    _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, length)


def _fallocate(descriptor: int, mode: int, start: int, length: int) -> None:
    while _libc.fallocate(descriptor, mode, start, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
