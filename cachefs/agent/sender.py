"""Sending frames on a stream from plain functions, at once where the socket takes them.

A frame that waits for a sender task costs a turn of the event loop on every question and on every answer, and a read
that misses waits for both. The socket's buffer is empty nearly always, so the frame is written where it is made; only
what the socket does not take is left to a task.
"""

from __future__ import annotations

import os
from collections import deque

import trio


class Sender:
    """Frames for one stream, in order. `run` must run for as long as the stream is used.

    INVARIANT: `_left` is empty unless the socket was full; nothing is written past it.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._descriptor = stream.socket.fileno()
        self._left: deque[memoryview] = deque()
        self._news = trio.Event()
        self.broken = False

    def send(self, frame: bytes) -> None:
        """Send a frame, now or as soon as possible. Frames for a stream that broke are dropped."""
        if self.broken:
            return
        rest = memoryview(frame)
        if not self._left:
            rest = rest[self._write(rest) :]
            if not rest:
                return
        self._left.append(rest)
        self._news.set()

    def _write(self, rest: memoryview) -> int:
        try:
            return os.write(self._descriptor, rest)
        except BlockingIOError:
            return 0
        except OSError:
            self.broken = True  # the reading side of this stream sees the end too, and says so
            return len(rest)

    async def run(self) -> None:
        """Send what the socket did not take at once. Ends when the stream breaks."""
        while not self.broken:
            await self._news.wait()
            self._news = trio.Event()
            while self._left:
                await trio.lowlevel.wait_writable(self._descriptor)
                sent = self._write(self._left[0])
                self._left[0] = self._left[0][sent:]
                if not self._left[0]:
                    self._left.popleft()
