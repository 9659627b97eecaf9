"""What the disk tier leaves of its file system to others, and how it gives room back.

The limit of the tier is a person's guess; the disk is shared with logs, other programs and the metadata of cachefs
itself. So the tier stops growing while a RESERVE is free, and gives room back when others go below it.

An LMDB file never becomes shorter. But a long value lies in pages of its own, and once it is deleted nothing refers to
them until LMDB uses them again. Their blocks can be given back with the file system's help (a hole in the file), as
long as nobody writes in between: the caller deletes and punches under the writer's lock, with no reader inside. Where
the file system cannot, the tier begins anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from cachefs import allocation, errors

log = logging.getLogger(__name__)

MIB = 1 << 20
LEAST_RESERVE, MOST_RESERVE = 64 * MIB, 1024 * MIB


def reserve_bytes(total: int) -> int:
    """Return how much of a file system of `total` bytes is left to others: 5 %, at least 64 MiB and at most 1 GiB, and
    of a small one a quarter.
    """
    return min(max(LEAST_RESERVE, min(MOST_RESERVE, total // 20)), total // 4)


class DiskRoom:
    """The room below one data file."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` must be open for writing."""
        self._descriptor = descriptor

    def reserve(self) -> int:
        """Return how much of this file system is left to others. Raises TierUnavailable."""
        return self._measure()[1]

    def surplus(self) -> int:
        """Return how many bytes are free beyond the reserve; negative: others need some of ours. Raises
        TierUnavailable.
        """
        free, reserve = self._measure()
        return free - reserve

    def allows(self, more: int, *, again: bool) -> bool:
        """Return whether the file may take `more` bytes. Raises TierUnavailable.

        `again`: it had to stop growing, and goes on only when there is a good deal more, or it would stop and go for
        ever.
        """
        free, reserve = self._measure()
        return free - reserve >= more + (reserve // 8 if again else 0)

    def _measure(self) -> tuple[int, int]:
        """Return what is free, and the reserve."""
        try:
            room = os.fstatvfs(self._descriptor)
        except OSError as error:
            raise errors.TierUnavailable(f"its file system does not answer: {error}") from error
        if not room.f_blocks:
            return 1 << 62, 0  # it does not tell
        return room.f_bavail * room.f_frsize, reserve_bytes(room.f_blocks * room.f_frsize)

    def allocated(self) -> int:
        """Return how many bytes of the file system the file takes. Raises TierUnavailable."""
        try:
            return os.fstat(self._descriptor).st_blocks * 512
        except OSError as error:
            raise errors.TierUnavailable(f"its file system does not answer: {error}") from error

    def punch(self, extents: Iterable[tuple[int, int]]) -> bool:
        """Give back the blocks of (offset, length) each; returns whether the file system can do that."""
        for offset, length in extents:
            try:
                allocation.punch(self._descriptor, offset, length)
            except OSError as error:
                log.info("no room can be given back bit by bit: %s", error.strerror)
                return False
        return True
