"""What to do when memory maps kill the agent.

LMDB trusts its files: a damaged one can end the process with SIGSEGV or SIGBUS, and an agent that starts again on the
same files dies again. kill -9 looks the same from outside and is harmless, so the two are told apart by the traceback
that faulthandler writes for the first kind only: the file `crash` below the cache directory is empty after everything
but a memory fault.

The second memory fault within ten minutes sets the environments aside; those in memory are removed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

WINDOW_S = 600.0
KEPT = ".aside-crash"


class CrashGuard:
    """Watches over the environments below one cache directory."""

    def __init__(self, cache_dir: Path) -> None:
        self._file = cache_dir / "crash"
        self._history = cache_dir / "crash-history"
        self._stream: IO[bytes] | None = None

    def begin(self, environments: list[Path], in_memory: list[Path], copies: Sequence[Path] = ()) -> None:
        """Look at how the last life ended; take the environments away after a second memory fault (set aside a tmpfs
        would go on taking the memory of a whole tier). `copies` are maps of what the store has as well: they are
        removed, too.

        A read-only cache directory is not an error: then nothing is watched.
        """
        try:
            faults = self._recent_faults()
            if faults >= 2:
                log.error("the agent died of %d memory faults within %d s: the cache is set aside", faults, WINDOW_S)
                for path in environments:
                    _set_aside(path)
                for path in (*in_memory, *copies):
                    shutil.rmtree(path, ignore_errors=True)
                self._history.unlink(missing_ok=True)
            self._stream = open(self._file, "wb")  # noqa: SIM115 - faulthandler needs it open for our whole life
            faulthandler.enable(self._stream)
        except OSError as error:
            log.warning("no crash guard: %s", error)

    def _recent_faults(self) -> int:
        now = time.time()
        times: list[float] = []
        if self._history.exists():
            times = [float(line) for line in self._history.read_text("ascii", "replace").split() if _is_number(line)]
        if self._file.exists() and self._file.stat().st_size:
            times.append(self._file.stat().st_mtime)
            log.error("the last agent died of a memory fault: %s", self._file.read_text("utf-8", "replace")[:2000])
        times = [t for t in times if 0 <= now - t < WINDOW_S]
        self._history.write_text("\n".join(map(str, times)), encoding="ascii")
        return len(times)

    def end(self) -> None:
        """The agent ends as it should."""
        if self._stream is not None:
            faulthandler.disable()
            self._stream.close()


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _set_aside(path: Path) -> None:
    if not path.exists():
        return
    aside = path.with_name(path.name + KEPT)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
