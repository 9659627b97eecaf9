"""Tells the agent which files readers begin: what the prefetcher learns from, also while the tiers answer everything.

The channel's thread writes them down (`ReadPath.note_begun`). The first one after a pause is told at once, so that the
agent is not late at the beginning of an epoch; then at most one message in `PAUSE_S`. While nobody reads, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from cachefs.agent import messages
from cachefs.vfs.reading import ReadPath

PAUSE_S = 0.05


class Beginnings:
    """One worker's. `run` must run while files are read."""

    def __init__(self, reads: ReadPath, tell: Callable[[messages.Message], None], wanted: Callable[[], bool]) -> None:
        """`wanted`: whether the agent that is attached now understands this."""
        self._reads = reads
        self._tell = tell
        self._wanted = wanted
        self._token = trio.lowlevel.current_trio_token()
        self._news = trio.Event()
        reads.on_begun = self._wake

    def _wake(self) -> None:
        """Files were begun. Any thread."""
        try:
            self._token.run_sync_soon(self._set)
        except trio.RunFinishedError:
            pass  # this worker is ending

    def _set(self) -> None:
        self._news.set()

    async def run(self) -> None:
        """Tell, for ever."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            begun, self._reads.begun = self._reads.begun, []
            if begun and self._wanted():
                self._tell(messages.Begun(files=list(dict.fromkeys(begun))))
            await trio.sleep(PAUSE_S)
