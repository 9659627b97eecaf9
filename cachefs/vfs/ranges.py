"""READs whose blocks are not worth it: just their bytes are fetched from the store, and kept by the kernel alone.

    channel thread --question--> agent --GET of the range--> answer with the bytes --> writev to the kernel

Blocks that a tier has, or that are on their way, answer for the range (the agent looks). Failures are remembered as
those of blocks are: they are of the same store.
"""

from __future__ import annotations

from collections.abc import Callable

from cachefs import errors
from cachefs.vfs.failures import Failures
from cachefs.vfs.ports import AgentPort
from cachefs.vfs.reading import FileView, ReadPath

Use = Callable[[list[memoryview]], None]


class RangeReads:
    """Those of one mount."""

    def __init__(self, reads: ReadPath, agent: AgentPort, failures: Failures) -> None:
        self._reads = reads
        self._agent = agent
        self._failures = failures

    def _blocks(self, view: FileView, start: int, end: int) -> list[tuple[int, int]]:
        shift = self._reads.shift
        return [(view.ino, index) for index in range(start >> shift, ((end - 1) >> shift) + 1)]

    def request(
        self,
        view: FileView,
        start: int,
        end: int,
        use: Use,
        otherwise: Callable[[errors.CachefsError | None], None],
        *,
        fresh: bool = False,
    ) -> bool:
        """As `FileSystem.request_blocks`, of just the bytes `start` to `end`. `fresh`: from the store alone. Any
        thread.
        """
        shift = self._reads.shift
        if self._failures.among(view.ino, start >> shift, (end - 1) >> shift):
            return False

        def take(outcome: bytes | errors.CachefsError) -> None:
            if isinstance(outcome, errors.Unsupported):
                otherwise(None)
            elif isinstance(outcome, errors.CachefsError):
                self._failures.remember(outcome, *self._blocks(view, start, end), length=end - start)
                otherwise(outcome)
            elif len(outcome) != end - start:
                otherwise(None)
            else:
                use([memoryview(outcome)])

        return self._agent.request_range(view.ino, start, end - start, take, fresh=fresh)

    async def get(self, view: FileView, start: int, end: int, use: Use, *, fresh: bool = False) -> None:
        """As `FileSystem.with_blocks`, of just the bytes `start` to `end` (at most `MOST_RANGE`).

        Raises StaleObject, AccessDenied, StorageUnavailable, Unsupported (an agent of an older version).
        """

        async def ask() -> None:
            payload = await self._agent.fetch_range(view.ino, start, end - start, fresh=fresh)
            if len(payload) != end - start:
                raise errors.StorageUnavailable(f"{len(payload)} bytes came, {end - start} were asked for")
            use([memoryview(payload)])

        await self._failures.asking(ask, *self._blocks(view, start, end), length=end - start)

    def ahead(self, view: FileView, start: int, end: int) -> None:
        """Pass a wish for a range on to the agent. Any thread."""
        self._agent.range_ahead(view.ino, start, end - start)
