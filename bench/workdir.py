"""The directory that holds everything of one run, and takes everything away with it.

A run that was killed with -9 leaves its directory behind, perhaps with mounts below it and processes that serve them.
The next run finds it and cleans up. A lock file inside tells it from one that is still running; its processes are those
whose HOME is inside (every system is started with such a HOME), so that nothing else can be hit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import machine
from bench.memory import is_running
from cachefs.runtime import shm_directory

_PREFIX = "run-"
_LOCK = "lock"
_SHM = "/dev/shm"
_END_S = 5.0


@contextlib.contextmanager
def work_directory(parent: Path) -> Iterator[Path]:
    """Yield a new directory below `parent`; remove it, and everything mounted below it, at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{_PREFIX}*"):
        _remove_if_abandoned(left)
    work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)).resolve()
    try:
        with (work / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield work
    finally:
        remove_tree(work)


def _remove_if_abandoned(directory: Path) -> None:
    with contextlib.suppress(OSError), (directory / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its run lives
        remove_tree(directory)


def remove_tree(directory: Path) -> None:
    """Detach every mount below a directory, end its processes, remove it and the shm tiers of its cache directories.

    Never descends into something that is still mounted.
    """
    for mountpoint in machine.mounts_below(directory):
        machine.detach(mountpoint)
    _end_processes(directory)
    if machine.mounts_below(directory):
        return
    for child in directory.iterdir() if directory.is_dir() else ():
        shutil.rmtree(shm_directory(_SHM, str(child), os.getuid()), ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)


def _end_processes(directory: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        living = processes_of(directory)
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + _END_S
        while any(is_running(pid) for pid in living) and time.monotonic() < deadline:
            time.sleep(0.05)


def processes_of(directory: Path) -> list[int]:
    """Return the processes whose HOME is `directory` or below it."""
    mark = b"HOME=" + os.fsencode(directory.absolute())
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if any(variable == mark or variable.startswith(mark + b"/") for variable in variables):
                found.append(int(entry))
    return found
