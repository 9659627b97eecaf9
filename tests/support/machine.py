"""What tests ask of the machine: mounts, processes, file systems of their own, a condition that comes true."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_CONNECTIONS = Path("/sys/fs/fuse/connections")
ALONE = """
awk -v own="$OWN_MOUNTS" '/ - fuse[.]/ && (own == "" || index($5, own) != 1) { print $5 }' /proc/self/mountinfo |
    xargs -r umount --lazy || true
"""
"""Lines for a shell in a mount namespace of its own: without them it would keep the mounts of all other tests alive, of
which it got copies. Mounts below $OWN_MOUNTS stay."""


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Return as soon as `condition()` is true; fail the test when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def mounts_below(directory: Path) -> list[tuple[str, str, str]]:
    """Return (mount point, device number, type) of every mount at or below a directory, innermost last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if place == str(directory) or place.startswith(f"{directory}/"):
            found.append((place, fields[2], fields[fields.index("-") + 1]))
    return found


def detach(place: str) -> None:
    """Take a mount away without waiting for anybody."""
    subprocess.run(["umount", "-l", "--", place], check=False, capture_output=True)


def abort_connections(directory: Path) -> None:
    """Fail every request of the FUSE mounts below a directory: whoever hangs on them gets an error."""
    if not (_CONNECTIONS / ".").exists() or not any(_CONNECTIONS.iterdir()):
        subprocess.run(["mount", "-t", "fusectl", "none", str(_CONNECTIONS)], check=False, capture_output=True)
    for _, device, kind in mounts_below(directory):
        if kind.startswith("fuse"):
            with contextlib.suppress(OSError):
                (_CONNECTIONS / device.split(":")[1] / "abort").write_text("1")


def processes_with(variable: str) -> dict[int, list[str]]:
    """Return number and command line of every process that has NAME=VALUE in its environment."""
    found: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if variable.encode() not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            found[int(entry.name)] = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue  # it has ended meanwhile
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that has ended already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Let processes stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def tmpfs(place: Path, size: str, options: str = "") -> Iterator[Path]:
    """A tmpfs of its own at `place` (needs root)."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "cachefs-test", str(place)], check=True)
    try:
        yield place
    finally:
        detach(str(place))


def fill_up(place: Path) -> Path:
    """Fill a file system from outside (again, if some of it was given back) and return the file that does it."""
    hog = place / "hog"
    with hog.open("ab") as file:
        done = subprocess.run(["dd", "if=/dev/zero", "bs=4k"], stdout=file, stderr=subprocess.PIPE, check=False)
    assert b"No space left" in done.stderr
    return hog


def free(place: Path) -> int:
    """Return how many bytes a file system has left."""
    room = os.statvfs(place)
    return room.f_bavail * room.f_frsize
