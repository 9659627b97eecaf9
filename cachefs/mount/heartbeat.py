"""A worker's signs of life, for the supervisor that replaces a worker which hangs (`cachefs.mount.vigil`).

A beat says that the event loop runs, because a task of the loop writes it, and that the channel moves, because that is
asked first. Writing never waits: a supervisor that does not read finds enough beats in the pipe.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

import trio

from cachefs.mount.vigil import BEATS

BEAT = b'{"event": "beat"}\n'


class Heartbeat:
    """Beats into the report pipe for as long as everything else in the process moves."""

    def __init__(self, report_fd: int, limit_s: float, moves: Callable[[], bool]) -> None:
        """`limit_s`: after how much silence the supervisor takes a worker for dead."""
        self._report_fd = report_fd
        self._every_s = limit_s / BEATS
        self._moves = moves
        self._poll = select.poll()
        self._poll.register(report_fd, select.POLLOUT)

    async def run(self) -> None:
        """Beat for ever."""
        while True:
            if self._moves():
                self._beat()
            await trio.sleep(self._every_s)

    def _beat(self) -> None:
        if not any(event & select.POLLOUT for _, event in self._poll.poll(0)):
            return  # full: the supervisor is stopped; or closed: it is dead
        try:
            os.write(self._report_fd, BEAT)
        except OSError:
            pass
