"""What a worker says of itself: the pipe into which it writes one JSON object per line.

    {"event": "prepared"}, {"event": "serving", ...}, ... and {"event": "beat"} again and again

INVARIANT: reading never waits, a line that makes no sense is logged and skipped, and memory is bounded whatever comes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from cachefs.mount.journal import Journal
from cachefs.mount.loop import Loop

_MAX_LINE_BYTES = 1 << 20


class ReportPipe:
    """The reading end of one worker's pipe, which it owns."""

    def __init__(
        self,
        loop: Loop,
        log: Journal,
        descriptor: int,
        on_event: Callable[[dict[str, Any]], None],
        on_beat: Callable[[], None],
    ) -> None:
        self.name = "worker"
        """What the log calls the worker."""
        self._loop = loop
        self._log = log
        self._descriptor = descriptor
        self._on_event = on_event
        self._on_beat = on_beat
        self._received = bytearray()
        loop.watch(descriptor, self.read)

    def read(self) -> bool:
        """Take what has come; returns False when there is nothing more for now."""
        if self._descriptor < 0:
            return False
        try:
            piece = os.read(self._descriptor, 64 << 10)
        except BlockingIOError:
            return False
        except OSError:
            piece = b""
        if not piece:
            self._loop.unwatch(self._descriptor)
            return False
        self._received += piece
        *lines, rest = self._received.split(b"\n")
        self._received = rest if len(rest) <= _MAX_LINE_BYTES else bytearray()
        for line in lines:
            self._take(bytes(line))
        return True

    def drain(self) -> None:
        """Take everything that has come. A worker that is dead writes no more; of a living one, only so much."""
        for _ in range(256):
            if not self.read():
                return

    def close(self) -> None:
        """Stop reading and give the pipe up."""
        if self._descriptor >= 0:
            self._loop.unwatch(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict) and event.get("event") == "beat":
            self._on_beat()
        elif isinstance(event, dict) and isinstance(event.get("event"), str):
            self._on_event(event)
        else:
            self._log.warning(f"{self.name} reported what nobody understands: {line[:200]!r}")
