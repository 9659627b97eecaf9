"""How a tier's data file grows: only into blocks that the file system has promised.

LMDB writes a tier in shared memory through its map. Touching a page there that the file system cannot back is
SIGBUS, the end of the process; asking for the blocks before (posix_fallocate) is only an error. So before a write
that may extend the file, its blocks are promised in big steps. When the file system promises no more, the map is
cut to what was promised: LMDB then can not go further, reuses freed pages or says "map full", and the tier evicts.
Every few seconds it tries to grow again. In shared memory the blocks are huge pages where the kernel has some.

The disk tier, which LMDB writes with pwrite, gains long extents and the same orderly end by it. It also leaves room to
others (`cachefs.block.disk_room`), and what it gave back are holes: a page there is a page to be written, like one
behind the end, and on a full disk an error of LMDB and no SIGBUS.

INVARIANT: bytes 0 to `promised` of a file in shared memory have blocks. LMDB's map ends at `promised` unless `growing`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from cachefs import allocation
from cachefs.block.disk_room import DiskRoom
from cachefs.block.gate import Gate
from cachefs.block.huge_pages import HugePages
from cachefs.block.lmdb_env import BlockEnvironment, MapFull

log = logging.getLogger(__name__)

STEP = 16 << 20
RETRY_S = 5.0
LITTLE = 4 << 20
"""A file that takes no more than this is no help to anybody who is short of room."""


class Growth:
    """The growth of one data file. Only the writer of the tier uses it, under its lock."""

    def __init__(self, path: str, map_size: int, block_cost: int, gate: Gate, *, in_memory: bool) -> None:
        """Promise nothing yet. Raises OSError when `path` cannot be opened for writing."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._huge_pages = HugePages(self._fd) if in_memory else None
        self.room = None if in_memory else DiskRoom(self._fd)
        """What the file system has to do with it, for a tier that is not alone there."""
        self._map_size = map_size
        self._block_cost = block_cost
        self._gate = gate
        self._promised = 0
        self._retry_at = 0.0
        self.growing = True
        """False while the file system promises no more."""
        self.can_punch = not in_memory
        """Whether blocks out of the middle of the file can be given back, as far as is known."""

    @property
    def limit(self) -> int:
        """How many bytes of the file may be in use now. Raises TierUnavailable."""
        if self.growing:
            return self._map_size
        if self.room is None:
            return self._promised
        return max(0, min(self._promised, self.room.allocated() + self.room.surplus()))

    @property
    def slack(self) -> int:
        """What stays free of that for trees, and for pages that are free but too scattered. Raises TierUnavailable."""
        return self._slack_of(self.limit)

    @property
    def usable(self) -> int:
        """How many bytes blocks may take now. Raises TierUnavailable."""
        limit = self.limit
        return limit - self._slack_of(limit)

    def _slack_of(self, limit: int) -> int:
        return max(limit // 20, 4 * self._block_cost)

    @property
    def deficit(self) -> int:
        """How many bytes others are short of. Raises TierUnavailable."""
        return 0 if self.room is None else max(0, -self.room.surplus())

    def may_retry(self) -> bool:
        """Return whether it is time to ask the file system (again)."""
        return self.growing or time.monotonic() >= self._retry_at

    def prepare(self, env: BlockEnvironment, need: int) -> bool:
        """Have blocks promised for a write that may extend the file by `need` bytes.

        Returns False when the limit has just become lower: make room first. Raises TierUnavailable.
        """
        if not self.may_retry():
            return True
        if self._promise(env.end, need):
            if not self.growing:
                self._cut(env, self._map_size)
                self.growing = True
            return True
        self.stop(env)
        return False

    def stop(self, env: BlockEnvironment) -> None:
        """Grow no more for the next seconds. Raises TierUnavailable."""
        self.growing = False
        self._retry_at = time.monotonic() + RETRY_S
        self._cut(env, self._promised)

    def punch(self, extents: list[tuple[int, int]]) -> None:
        """Give back the blocks of values that were just deleted; `can_punch` tells whether the file system can."""
        with self._gate.closed():  # who began to read before they were deleted is gone then
            self.can_punch = self.room is not None and self.room.punch(extents)

    def trim(self, env: BlockEnvironment) -> None:
        """Give back what was promised and is not in use yet."""
        end = env.end
        if self.room is not None and end < self._promised and self.room.punch([(end, self._promised - end)]):
            self._promised = end

    def give_back(self, env: BlockEnvironment, want: int, evict: Callable[[int], object]) -> int | None:
        """Give `want` bytes to others, or what they are short of if that is more; returns how many that were. None: it
        cannot be done bit by bit, and matters, so the tier has to begin anew.

        `evict` deletes so many bytes of blocks and punches their places. Raises TierUnavailable, CorruptBlock.
        """
        assert self.room is not None
        goal = max(want, self.deficit)
        before = self.room.allocated()
        if before <= LITTLE:
            self.stop(env)
            return 0
        self.trim(env)
        self.stop(env)
        given = before - self.room.allocated()
        try:
            if given < goal and self.can_punch:
                evict(goal - given)
        except MapFull as error:
            log.debug("blocks cannot be deleted: %s", error)  # that takes pages, too
        given = before - self.room.allocated()
        log.info("%s gave %d bytes of %d back", env.directory, given, goal)
        matters = want > 0 or self.deficit > self.room.reserve() // 4
        return None if given < goal // 2 and given < before // 2 and matters else given

    def _cut(self, env: BlockEnvironment, map_size: int) -> None:
        with self._gate.closed():
            env.resize(map_size)

    def _promise(self, used: int, need: int) -> bool:
        end = min(used + need, self._map_size)
        if self.room is not None:
            self._promised = max(self._promised, used)  # what is written has blocks, or holes that stay holes
            if not self.room.allows(max(0, end - self._promised), again=not self.growing):
                return False
        if end <= self._promised:
            return True
        generous = min((end + STEP) // STEP * STEP, self._map_size)
        for target in (generous, end):
            if self.room is not None and not self.room.allows(target - self._promised, again=False):
                continue
            try:
                self._allocate(used, target)
            except OSError as error:
                if error.errno in allocation.UNSUPPORTED:
                    self._promised = self._map_size  # it cannot promise: a full disk shows when LMDB writes
                    return True
                continue
            self._promised = target
            return True
        return False

    def _allocate(self, used: int, end: int) -> None:
        start = self._promised
        if start < used:  # an earlier agent's blocks: they have their pages, and changing those for huge ones is dear
            os.posix_fallocate(self._fd, start, min(used, end) - start)
            start = used
        if start >= end:
            return
        if self._huge_pages is not None:
            self._huge_pages.allocate(start, end)
        else:
            os.posix_fallocate(self._fd, start, end - start)

    def close(self) -> None:
        """Close the file; what was promised stays."""
        os.close(self._fd)
