"""The stderr of a child process: passed on to our own, its last lines kept to say what happened when it dies.

When our stderr is a file, the child writes there itself, and goes on logging even when we are killed. Otherwise
(terminal, pipe) it writes into a pipe, and what comes there is passed on.
"""

from __future__ import annotations

import os

from cachefs.mount import journal
from cachefs.mount.loop import Loop

_TAIL_BYTES = 2048
_TAIL_LINES = 3
_TAIL_CHARACTERS = 500


class StderrRelay:
    """The stderr of one child. Raises OSError."""

    def __init__(self, loop: Loop, log: journal.Journal) -> None:
        self._loop = loop
        self._log = log
        self._tail = b""
        self._log_start = journal.stderr_size()
        self._pipe = self._lent = -1
        if not journal.stderr_is_file():
            self._pipe, self._lent = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._pipe, False)

    @property
    def lent(self) -> int:
        """What the child gets as stdout and stderr."""
        return self._lent if self._lent >= 0 else journal.STDERR

    def begin(self) -> None:
        """The child has it."""
        self._close_lent()
        if self._pipe >= 0:
            self._loop.watch(self._pipe, self._relay)

    def last_words(self) -> str:
        """Return the last lines as one line, empty when there are none."""
        raw = journal.read_back(self._log_start, _TAIL_BYTES) if journal.stderr_is_file() else self._tail
        lines = [line.strip() for line in raw.decode("utf-8", "replace").splitlines()]
        own = [line for line in lines if line.strip("^~ ") and f"{self._log.role}[" not in line]
        return " | ".join(own[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]

    def drain(self) -> None:
        """Pass on what a dead child has left."""
        while self._pipe >= 0 and self._relay():
            pass

    def close(self) -> None:
        """Give everything up."""
        self._close_lent()
        if self._pipe >= 0:
            self._loop.unwatch(self._pipe)
            os.close(self._pipe)
            self._pipe = -1

    def _close_lent(self) -> None:
        if self._lent >= 0:
            os.close(self._lent)
            self._lent = -1

    def _relay(self) -> bool:
        """Pass on what has come; returns False when there is nothing more for now."""
        try:
            piece = os.read(self._pipe, 64 << 10)
        except BlockingIOError:
            return False
        except OSError:
            piece = b""
        if not piece:
            self._loop.unwatch(self._pipe)
            return False
        self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        self._log.write(piece)
        return True
