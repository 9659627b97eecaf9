"""Whether files have changed since somebody last read them: how keys that were rotated on disk are noticed.

A file is told by inode, size and time, so that one that was replaced by rename(2) and one that was written in place are
both seen. A file that is not there is a state as any other: it may come.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_State = tuple[int, int, int] | None


class WatchedFiles:
    """A few files. Used under the lock of whoever owns it."""

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}

    def note(self, paths: Iterable[str]) -> None:
        """Remember how these files are now. Call it BEFORE they are read: a change meanwhile is one."""
        self._states = {path: _state(path) for path in paths}

    def changed(self) -> bool:
        """Whether one of them is another than noted."""
        return any(_state(path) != state for path, state in self._states.items())


def _state(path: str) -> _State:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
