"""How a tier's data file grows: only into blocks that the file system has promised.

LMDB writes a tier in shared memory through its map. Touching a page there that the file system cannot back is
SIGBUS, the end of the process; asking for the blocks before (posix_fallocate) is only an error. So before a write
that may extend the file, its blocks are promised in big steps. When the file system promises no more, the map is
cut to what was promised: LMDB then can not go further, reuses freed pages or says "map full", and the tier evicts.
Every few seconds it tries to grow again. The disk tier, which LMDB writes with pwrite, gains long extents and the
same orderly end by it.

INVARIANT: bytes 0 to `promised` of the file have blocks, and LMDB's map ends at `limit`.
"""

from __future__ import annotations

import errno
import os
import time

from cachefs.block.gate import Gate
from cachefs.block.lmdb_env import BlockEnvironment

STEP = 16 << 20
RETRY_S = 5.0


class Growth:
    """The growth of one data file. Only the writer of the tier uses it, under its lock."""

    def __init__(self, path: str, map_size: int, gate: Gate) -> None:
        """Promise nothing yet. Raises OSError when `path` cannot be opened for writing."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map_size = map_size
        self._gate = gate
        self._promised = 0
        self._retry_at = 0.0
        self.growing = True
        """False while the file system promises no more."""

    @property
    def limit(self) -> int:
        """How long the file may become now."""
        return self._map_size if self.growing else self._promised

    def may_retry(self) -> bool:
        """Return whether it is time to ask the file system (again)."""
        return self.growing or time.monotonic() >= self._retry_at

    def prepare(self, env: BlockEnvironment, need: int) -> bool:
        """Have blocks promised for a write that may extend the file by `need` bytes.

        Returns False when the limit has just become lower: make room first. Raises TierUnavailable.
        """
        if not self.may_retry():
            return True
        if self._promise(env.end + need):
            if not self.growing:
                self._cut(env, self._map_size)
                self.growing = True
            return True
        self.growing = False
        self._retry_at = time.monotonic() + RETRY_S
        self._cut(env, self._promised)
        return False

    def _cut(self, env: BlockEnvironment, map_size: int) -> None:
        with self._gate.closed():
            env.resize(map_size)

    def _promise(self, end: int) -> bool:
        end = min(end, self._map_size)
        if end <= self._promised:
            return True
        generous = min((end + STEP) // STEP * STEP, self._map_size)
        for target in (generous, end):
            try:
                os.posix_fallocate(self._fd, self._promised, target - self._promised)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    self._promised = self._map_size  # it cannot promise: a full disk shows when LMDB writes
                    return True
                continue
            self._promised = target
            return True
        return False

    def close(self) -> None:
        """Close the file; what was promised stays."""
        os.close(self._fd)
