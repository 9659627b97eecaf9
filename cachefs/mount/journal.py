"""The supervisor's log lines: the format of `cachefs.logs`, without the memory of the logging package.

INVARIANT: writing never blocks and never raises. A supervisor that waits for a full pipe or a stopped terminal could
not restart a worker, so text that cannot be written at once is dropped and its amount is said later.
"""

from __future__ import annotations

import json
import os
import re
import select
import stat
import time

LEVELS = ("debug", "info", "warning", "error")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_PIPE_BUF = 4096
"""A pipe that is writable takes this much without blocking."""
STDERR = 2
MAX_LOG_BYTES, LOG_CHECK_S = 8 << 20, 60.0
"""Most that a log of ours may grow to, and how often that is looked at."""


class Journal:
    """Writes lines to stderr."""

    def __init__(
        self, level: str, as_json: bool, role: str = "supervisor", logger: str = "cachefs.mount.supervisor"
    ) -> None:
        self.role = role
        self._logger = logger
        self._least = LEVELS.index(level) if level in LEVELS else 1
        self._as_json = as_json
        self._poll = select.poll()
        self._poll.register(STDERR, select.POLLOUT)
        self._dropped = 0

    def debug(self, text: str) -> None:
        """Write a line for developers."""
        self._line("debug", text)

    def info(self, text: str) -> None:
        """Write a line about something normal."""
        self._line("info", text)

    def warning(self, text: str) -> None:
        """Write a line about something that went on all the same."""
        self._line("warning", text)

    def error(self, text: str) -> None:
        """Write a line about something that somebody has to look at."""
        self._line("error", text)

    def _line(self, level: str, text: str) -> None:
        if LEVELS.index(level) < self._least:
            return
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
        if self._as_json:
            line = json.dumps(
                {
                    "time": stamp,
                    "level": level,
                    "role": self.role,
                    "pid": os.getpid(),
                    "logger": self._logger,
                    "message": text,
                }
            )
        else:
            clean = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
            line = f"{stamp} {level.upper()} {self.role}[{os.getpid()}] {self._logger}: {clean}"
        self.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def write(self, raw: bytes) -> None:
        """Write bytes as they are (what a worker wrote to its stderr)."""
        if self._dropped:
            note = f"({self._dropped} bytes of log were lost: nobody took them)\n".encode()
            if self._put(note):
                self._dropped = 0
        for start in range(0, len(raw), _PIPE_BUF):
            piece = raw[start : start + _PIPE_BUF]
            if not self._put(piece):
                self._dropped += len(piece)

    def _put(self, piece: bytes) -> bool:
        try:
            if not any(event & select.POLLOUT for _, event in self._poll.poll(0)):
                return False
            os.write(STDERR, piece)
        except OSError:
            return False
        return True


def stderr_is_file() -> bool:
    """Return whether stderr is a regular file: then workers write to it themselves, and its end can be read back."""
    try:
        return stat.S_ISREG(os.fstat(STDERR).st_mode)
    except OSError:
        return False


def stderr_size() -> int:
    """Return the present size of the file behind stderr."""
    try:
        return os.fstat(STDERR).st_size
    except OSError:
        return 0


def read_back(start: int, limit: int) -> bytes:
    """Return the last `limit` bytes, at most, of what was written to the file behind stderr after its first `start`."""
    try:
        descriptor = os.open(f"/proc/self/fd/{STDERR}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, limit, max(start, os.fstat(descriptor).st_size - limit))
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def shorten_stderr(limit_bytes: int = MAX_LOG_BYTES, keep_bytes: int = MAX_LOG_BYTES // 8) -> None:
    """Drop all but the end of the file behind stderr when it is over `limit_bytes`.

    All writers append, so none of them notices; what is written between the two steps is lost.
    """
    if not stderr_is_file() or stderr_size() <= limit_bytes:
        return
    end = read_back(0, keep_bytes)
    try:
        os.ftruncate(STDERR, 0)
        os.write(STDERR, end[end.find(b"\n") + 1 :])
    except OSError:
        return  # no more than a log that stays long
