"""What the agent's memory limit means: how much is for blocks on their way, and where.

limit = BASE_BYTES                      the interpreter, libraries, buffers that are kept, the spill, what malloc keeps
      + fetching                        requests under way (`Lane`)
      + carrying                        answers that carry bytes (`Carriage`): much without a shm tier, else a little
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

MIB = 1 << 20
BASE_BYTES = 96 * MIB
LEAST_BUDGET = 32 * MIB
LEAST_BLOCKS = 8
"""Room for so many blocks: two that are fetched and two that are carried, each of them twice for a moment."""
REQUEST_BYTES = 64 << 10
"""What a request takes beside its bytes: thread, connection, buffers of TLS."""
CARRIED_TIMES = 2
"""A block that is carried by an answer is there twice: as it came, and in the frame that waits for the socket."""


def least_limit(block_size: int) -> int:
    """Return the smallest memory limit that can be kept with blocks of this size."""
    return BASE_BYTES + max(LEAST_BUDGET, LEAST_BLOCKS * block_size)


@dataclass(frozen=True, slots=True)
class Budget:
    """How the bytes of blocks on their way are divided."""

    fetching: int
    carrying: int

    @classmethod
    def create(cls, limit_bytes: int, block_size: int, *, has_shm: bool) -> Self:
        """Divide what a memory limit leaves; one below the least is taken for the least."""
        whole = max(limit_bytes, least_limit(block_size)) - BASE_BYTES
        carrying = whole // (4 if has_shm else 2)
        return cls(whole - carrying, carrying)

    @property
    def whole(self) -> int:
        """Both."""
        return self.fetching + self.carrying
