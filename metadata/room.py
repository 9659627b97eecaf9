"""Room for metadata on a disk that others fill: pages promised ahead, and what happens when no more are promised.

Without metadata nothing can be listed, while blocks can always be fetched again. So the writer has the next `AHEAD`
bytes of its file promised by the file system, and asks for more long before they are used up. When the file system
refuses, `make_room` lets the disk tier give some back. When that does not help either, `MetadataFull` says so, before
the promised pages are gone: the environment has to go on elsewhere (the agent moves it).

INVARIANT: a transaction that is begun after `prepare` finds `LEAST` bytes behind the end of the file, unless the file
system cannot promise.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import lmdb

from cachefs import allocation
from cachefs.errors import StorageUnavailable
from metadata import custody

_log = logging.getLogger(__name__)

AHEAD = 8 << 20
LEAST = 2 << 20
"""What one transaction may take: a page of a listing takes less than a third of it."""
_UNKNOWN = 1 << 62
MakeRoom = Callable[[int], int]
"""Gives so many bytes of the file system back, as far as it can; returns how many that were. BLOCKS."""


class MetadataFull(StorageUnavailable):
    """The file system has no room for metadata: the environment has to go on elsewhere."""


def is_full(error: Exception) -> bool:
    """Return whether an error says that there is no room."""
    return getattr(error, "code", getattr(error, "errno", None)) in allocation.FULL


def failure(what: str, error: lmdb.Error | OSError) -> StorageUnavailable:
    """Return what to raise when something cannot be written."""
    return (MetadataFull if is_full(error) else StorageUnavailable)(f"{what}: {error}")


class PagesAhead:
    """The promised pages behind the end of one environment. Only its writer uses it, under its lock."""

    def __init__(self, directory: str, make_room: MakeRoom | None) -> None:
        """Raises OSError."""
        self._directory = directory
        self._make_room = make_room
        self._fd = os.open(Path(directory, custody.DATA_FILE), os.O_RDWR | os.O_CLOEXEC)
        self._promised = 0

    def prepare(self, end: int) -> None:
        """Have pages promised behind `end`, the end of what is used. Raises MetadataFull, OSError."""
        if end + AHEAD // 2 <= self._promised or self._promise(end):
            return
        if end + LEAST <= self._promised:
            return  # enough for now, and the disk tier gives room back within seconds
        if not (self.make_room() and self._promise(end)):
            raise MetadataFull(f"metadata in {self._directory} cannot be written: {os.strerror(errno.ENOSPC)}")

    def _promise(self, end: int) -> bool:
        start, target = max(end, self._promised), end + min(AHEAD, max(LEAST, self._free() // 8))
        if target <= start:
            return True  # on a disk that has become narrow that is a fair share
        try:
            allocation.promise(self._fd, start, target - start)
        except OSError as error:
            if error.errno in allocation.FULL:
                return False
            if error.errno not in allocation.UNSUPPORTED:
                raise
            self._promised = _UNKNOWN  # it cannot promise: a full disk shows when something is written
            return True
        self._promised = target
        return True

    def _free(self) -> int:
        room = os.fstatvfs(self._fd)
        return room.f_bavail * room.f_frsize

    def failure(self, what: str, error: lmdb.Error | OSError) -> StorageUnavailable:
        """Return what to raise when something was not written. Lets others give room back, for whoever tries again."""
        short_write = getattr(error, "code", 0) == errno.EIO and self._free() < LEAST  # which is EIO to LMDB
        if not is_full(error) and not short_write:
            return StorageUnavailable(f"{what}: {error}")
        self.make_room()
        return MetadataFull(f"{what}: {os.strerror(errno.ENOSPC)}")

    def make_room(self) -> bool:
        """Let others give room back; returns whether they gave any."""
        return self._make_room is not None and self._make_room(2 * AHEAD) > 0

    @property
    def held(self) -> bool:
        """Whether pages were promised by this writer."""
        return 0 < self._promised < _UNKNOWN

    def release(self) -> None:
        """Give back what was promised and is not used. Changes the file's time. Raises OSError."""
        os.ftruncate(self._fd, os.fstat(self._fd).st_size)
        self._promised = 0

    def close(self) -> None:
        """Close the file; what was promised stays."""
        os.close(self._fd)
