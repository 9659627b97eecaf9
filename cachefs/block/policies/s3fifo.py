"""The policy for skewed loads: S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023)."""

from __future__ import annotations

from cachefs.block.policies.segments import Segments
from cachefs.block.policies.ways import Way


class S3FifoPolicy(Segments):
    """S3-FIFO. Implements `cachefs.block.ports.EvictionPolicy`."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(Way.RECENT)
