"""Logging of worker and agent: one line per event, in UTC, as text or JSON, without secrets.

`configure` sets up the root logger of a process once, at its composition root. Lines look like

    2026-03-01T12:00:00.123Z WARNING agent[4711] cachefs.block: disk tier is full, going on without it

INVARIANTS: a record is one line (control characters of foreign names are escaped; a traceback in text form is indented
below its line); signatures, tokens and secret keys are replaced before anything is written; logging never raises into
its caller, a full disk included.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from typing import Any, TextIO

from cachefs.config import LogConfig, LogFormat
from cachefs.errors import ConfigError

_SECRETS = re.compile(
    r"""(?ix)
    ( X-Amz-(?:Signature|Credential|Security-Token) ["']? \s* [=:] \s* ["']?
    | \b (?:aws_)? (?:secret_?access_?key|session_?token) ["']? \s* [=:] \s* ["']?
    | \b Authorization ["']? \s* [=:] \s* ["']? (?:AWS4-HMAC-SHA256 \s+ | Bearer \s+ | Basic \s+)? (?:Credential=)?
    | \b Signature= )
    [^\s"'&,;}]+
    """
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_QUIET = ("boto3", "botocore", "urllib3", "s3transfer", "asyncio")
"""Libraries whose debug output would contain signed headers."""


def redact(text: str) -> str:
    """Return `text` with the values of signatures, tokens and secret keys replaced by ***."""
    return _SECRETS.sub(r"\1***", text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _one_line(text: str) -> str:
    return _CONTROL.sub(_escape, redact(text))


def _timestamp(created: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(created))}.{int(created * 1000) % 1000:03d}Z"


class ThrottledWarning:
    """At most one line in so many seconds; it says how many were left out. Any thread."""

    __slots__ = ("_interval_s", "_left_out", "_lock", "_next")

    def __init__(self, interval_s: float = 60.0) -> None:
        self._interval_s = interval_s
        self._next = -math.inf
        self._left_out = 0
        self._lock = threading.Lock()

    def due(self, now_s: float) -> str | None:
        """Return None (say nothing now) or what to add to the message. `now_s` is of a clock that only goes forward."""
        with self._lock:
            if now_s < self._next:
                self._left_out += 1
                return None
            self._next = now_s + self._interval_s
            left_out, self._left_out = self._left_out, 0
        return f" (and {left_out} more since the last such line)" if left_out else ""


class _TextFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_timestamp(record.created)} {record.levelname} {self._role}[{os.getpid()}] {record.name}: "
        lines = [head + _one_line(record.getMessage())]
        if record.exc_info and record.exc_info[0] is not None:
            lines += ["    " + _one_line(line) for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class _JsonFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "role": self._role,
            "pid": os.getpid(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line)


def configure(config: LogConfig, role: str, stream: TextIO | None = None) -> None:
    """Make this process log as `config` says, as "worker" or "agent"; replaces what was configured before.

    With `stream` lines go there, else to `config.log_file`, else to stderr. Raises ConfigError when the file cannot be
    written.
    """
    output: logging.Handler
    if stream is None and config.log_file:
        try:
            # follows a rotation by rename; a file that cannot be opened is the mistake of whoever configured it
            from logging.handlers import WatchedFileHandler

            output = WatchedFileHandler(config.log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"--log-file {config.log_file}: {error.strerror}") from error
    else:
        output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(_JsonFormatter(role) if config.log_format is LogFormat.JSON else _TextFormatter(role))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(output)
    root.setLevel(config.log_level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    logging.raiseExceptions = False
