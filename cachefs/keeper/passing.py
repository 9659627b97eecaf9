"""Messages with descriptors between keeper and node service, over one unix stream socket.

A frame is a length (4 bytes), a number of descriptors (1 byte) and a JSON object; the descriptors travel with its first
byte (SCM_RIGHTS). The kernel keeps their order and never joins bytes across them, so a queue of descriptors beside the
buffer of bytes is enough to match them again.

INVARIANTS: sending never waits; what the socket does not take is queued, with duplicates of the descriptors, up to a
limit, over which the connection ends. Every descriptor that arrives belongs to whoever gets the message; those that
nobody gets are closed.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from cachefs.mount.loop import Loop

Message = dict[str, Any]
_HEAD = struct.Struct(">IB")
MAX_DESCRIPTORS = 8
"""In one message."""
_MAX_FRAME_BYTES = 4 << 20
_MAX_QUEUED_BYTES = 64 << 20
_RECEIVE_BYTES = 64 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


class Channel:
    """One end of the connection, which it owns. `on_end` is called once, when the other side is gone or makes no sense;
    not after `close`.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        on_message: Callable[[Message, list[int]], object],
        on_end: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._on_message = on_message
        self._on_end = on_end
        self._received = bytearray()
        self._arrived: deque[int] = deque()
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._queued_bytes = 0
        connection.setblocking(False)
        loop.watch(connection.fileno(), self._receive)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._connection.fileno() < 0

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message. The descriptors stay the caller's. On a channel that has ended nothing happens."""
        if self.closed:
            return
        body = json.dumps(message).encode()
        frame = memoryview(_HEAD.pack(len(body), len(descriptors)) + body)
        self._queue.append((frame, [os.dup(descriptor) for descriptor in descriptors]))
        self._queued_bytes += len(frame)
        if len(self._queue) == 1:
            self._flush()
        if self._queued_bytes > _MAX_QUEUED_BYTES:
            self._loop.after((self, "end"), 0, self._end)  # nobody reads there any more

    def close(self) -> None:
        """Hang up. What was not sent yet is lost."""
        if self.closed:
            return
        self._loop.cancel((self, "end"))
        self._loop.unwatch(self._connection.fileno())
        self._connection.close()
        for _, descriptors in self._queue:
            _close_all(descriptors)
        self._queue.clear()
        _close_all(self._arrived)
        self._arrived.clear()

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self._on_end()

    # -- sending ------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        while self._queue:
            frame, descriptors = self._queue[0]
            try:
                sent = socket.send_fds(self._connection, [frame], descriptors)
            except BlockingIOError:
                self._loop.when_writable(self._connection.fileno(), self._flush)
                return
            except OSError:
                self._loop.after((self, "end"), 0, self._end)  # not from within `send`: its caller is not done
                return
            _close_all(descriptors)
            self._queued_bytes -= sent
            if sent == len(frame):
                self._queue.popleft()
            else:
                self._queue[0] = (frame[sent:], [])
        self._loop.when_writable(self._connection.fileno(), None)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            piece, ancillary, flags, _ = self._connection.recvmsg(
                _RECEIVE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            piece, ancillary, flags = b"", [], 0
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(raw[: len(raw) - len(raw) % numbers.itemsize])
                self._arrived.extend(numbers)
        if not piece or flags & socket.MSG_CTRUNC:  # truncated: we are out of descriptors
            self._end()
            return
        self._received += piece
        self._take_frames()

    def _take_frames(self) -> None:
        while len(self._received) >= _HEAD.size and not self.closed:
            size, count = _HEAD.unpack_from(self._received)
            if size > _MAX_FRAME_BYTES or count > MAX_DESCRIPTORS:
                self._end()
                return
            if len(self._received) < _HEAD.size + size:
                return
            body = bytes(self._received[_HEAD.size : _HEAD.size + size])
            del self._received[: _HEAD.size + size]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict) or len(self._arrived) < count:
                self._end()
                return
            self._on_message(message, [self._arrived.popleft() for _ in range(count)])


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
