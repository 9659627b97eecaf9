"""Sending frames on a stream from plain functions and from any thread, at once where the socket takes them.

A frame that waits for a sender task costs a turn of the event loop on every question and on every answer, and a read
that misses waits for both. The socket's buffer is empty nearly always, so the frame is written where it is made, in the
thread that makes it; only what the socket does not take is left to a task.
"""

from __future__ import annotations

import os
import threading
from collections import deque

import trio


class Sender:
    """Frames for one stream, in order. `run` must run for as long as the stream is used, `stop` before it is closed.

    INVARIANTS
    * `_left` is empty unless the socket was full; nothing is written past it.
    * Nothing is written after `stop`: the number of the descriptor may be another file's then.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._descriptor = stream.socket.fileno()
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._left: deque[memoryview] = deque()
        self._news = trio.Event()
        self._moved = trio.Event()
        self._queued = self._sent = 0
        """Bytes that were left to the task, and those of them that are gone."""
        self.broken = False

    def send(self, frame: bytes | bytearray) -> bool:
        """Send a frame, now or as soon as possible; returns False when the stream broke. Any thread."""
        rest = memoryview(frame)
        with self._lock:
            if self.broken:
                return False
            if not self._left:
                rest = rest[self._write(rest) :]
                if not rest:
                    return not self.broken
            self._left.append(rest)
            self._queued += len(rest)
        try:
            self._token.run_sync_soon(self._tell)
        except trio.RunFinishedError:
            return False
        return True

    @property
    def idle(self) -> bool:
        """Whether the socket has taken everything."""
        return not self._left

    async def deliver(self, frame: bytes | bytearray) -> None:
        """Send a frame and wait until the socket has taken all of it, or the stream broke."""
        if self.send(frame):
            end = self._queued
            while self._sent < end and not self.broken:
                await self._moved.wait()

    def _tell(self) -> None:
        self._news.set()

    def _write(self, rest: memoryview) -> int:
        try:
            return os.write(self._descriptor, rest)
        except BlockingIOError:
            return 0
        except OSError:
            self.broken = True  # the reading side of this stream sees the end too, and says so
            return len(rest)

    def stop(self) -> None:
        """Write nothing any more."""
        with self._lock:
            self.broken = True
            self._left.clear()
        self._tell_moved()

    async def run(self) -> None:
        """Send what the socket did not take at once. Ends when the stream breaks."""
        while not self.broken:
            await self._news.wait()
            self._news = trio.Event()
            while self._left:
                await trio.lowlevel.wait_writable(self._descriptor)
                self._write_more()
                self._tell_moved()

    def _tell_moved(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    def _write_more(self) -> None:
        with self._lock:
            if self._left:
                sent = self._write(self._left[0])
                self._sent += sent
                self._left[0] = self._left[0][sent:]
                if not self._left[0]:
                    self._left.popleft()
