"""Who is mounted where, whether it answers, and who holds it: all from /proc, never by touching a mount that may hang.

Standard library only (the supervisor imports it). The one function that does ask a mount, `probe`, does so in a child
process that it abandons when there is no answer in time.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cachefs.mount.kernel import FSTYPE

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_SPECIAL = re.compile(rb"[ \t\n\\]")
"""What the kernel escapes in names of mountinfo."""
_MAX_LINKS = 40
_MAX_USES = 3
_PROBE = "import os, sys\ntry:\n    os.statvfs(sys.argv[1])\nexcept OSError as e:\n    sys.exit(e.errno or 255)\n"
_GRACE_S = 0.5


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo."""

    mount_id: int
    parent_id: int
    device: str
    """ "0:52"; also the name of its backing device below /sys/class/bdi."""
    root: str
    mountpoint: str
    options: str
    fstype: str
    source: str

    @property
    def connection(self) -> int:
        """The number of its FUSE connection below /sys/fs/fuse/connections."""
        return int(self.device.partition(":")[2])

    @property
    def read_only(self) -> bool:
        """Whether it takes no writes, whatever the file system does."""
        return "ro" in self.options.split(",")

    @property
    def is_cachefs(self) -> bool:
        """Whether cachefs made it."""
        return self.fstype == FSTYPE


def parse_mountinfo(raw: bytes) -> list[Mount]:
    """Read the format of proc(5); lines that do not follow it are skipped."""
    mounts = []
    for line in raw.split(b"\n"):  # not splitlines: a name may contain a carriage return, which is not escaped
        left, found, right = line.partition(b" - ")
        fields, more = left.split(b" "), right.split(b" ")
        if not found or len(fields) < 6 or len(more) < 2:
            continue
        try:
            numbers = int(fields[0]), int(fields[1])
        except ValueError:
            continue
        device, root, mountpoint, options = (_unescape(field) for field in fields[2:6])
        mounts.append(Mount(*numbers, device, root, mountpoint, options, _unescape(more[0]), _unescape(more[1])))
    return mounts


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def mounts() -> list[Mount]:
    """Return all mounts that this process sees, oldest first."""
    return parse_mountinfo(_read())


def _read() -> bytes:
    with open("/proc/self/mountinfo", "rb") as file:
        return file.read()


def find_mount(mountpoint: str) -> Mount | None:
    """Return the topmost mount at exactly this canonical path, or None."""
    return find_mounts([mountpoint]).get(mountpoint)


def find_mounts(mountpoints: Iterable[str]) -> dict[str, Mount]:
    """Return the topmost mount at each of these canonical paths where there is one.

    A node of many volumes has a thousand mounts, and reading all their lines takes milliseconds: only those that matter
    are read.
    """
    raw = _read()
    found = {}
    for path in mountpoints:
        mount = _topmost(raw, path, _escaped(path))
        if mount is not None:
            found[path] = mount
    return found


def _topmost(raw: bytes, path: str, name: bytes) -> Mount | None:
    wanted, end = b" " + name + b" ", len(raw)
    while (place := raw.rfind(wanted, 0, end)) >= 0:  # the last one is on top
        start = raw.rfind(b"\n", 0, place) + 1
        stop = raw.find(b"\n", place)
        mount = next(iter(parse_mountinfo(raw[start : stop if stop >= 0 else len(raw)])), None)
        if mount is not None and mount.mountpoint == path:  # and not its root, or its source
            return mount
        end = start
    return None


def _escaped(path: str) -> bytes:
    return _SPECIAL.sub(lambda match: b"\\%03o" % ord(match[0]), os.fsencode(path))


def canonical(path: str) -> str:
    """Return the absolute path without symbolic links, as the kernel names it, without touching a mount at its end.

    Only the parents are resolved the usual way; the last part is asked with readlink(2), which needs no answer of a
    mount that is there. It does not need to exist.
    """
    for _ in range(_MAX_LINKS):
        parent, base = os.path.split(os.path.abspath(path))
        path = os.path.join(os.path.realpath(parent), base)
        if find_mount(path) is not None:
            return path
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            return path
    raise OSError(errno.ELOOP, "too many symbolic links", path)


# -- does it answer? --------------------------------------------------------------------------------------------------


class Answer(enum.Enum):
    """What a mount said to statvfs(2)."""

    ALIVE = "alive"
    DEAD = "dead"
    """ENOTCONN or ECONNABORTED: the process behind it is gone for good."""
    FAILING = "failing"
    """Any other error."""
    SILENT = "silent"
    """No answer in time."""


def probe(mountpoint: str, timeout_s: float) -> Answer:
    """Ask the mount for its figures, which no cache of the kernel answers for it. Waits `timeout_s` and no longer."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, mountpoint],
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        code = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        _abandon(child)
        return Answer.SILENT
    if code == 0:
        return Answer.ALIVE
    return Answer.DEAD if code in (errno.ENOTCONN, errno.ECONNABORTED) else Answer.FAILING


def _abandon(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that may sit in an uninterruptible wait: then it ends with the mount's connection, not before."""
    child.kill()
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        child.returncode = -9  # nobody waits for it any more, and Popen shall not complain about that


# -- who holds it? ----------------------------------------------------------------------------------------------------


class Holder(NamedTuple):
    """A process (or a mount below, with pid 0) that keeps a mount busy."""

    pid: int
    command: str
    uses: tuple[str, ...]
    """What it holds, a few examples: "working directory /mnt/a", "file /mnt/a/b"."""

    def __str__(self) -> str:
        who = f"{self.command} (pid {self.pid})" if self.pid else self.command
        return f"{who}: {', '.join(self.uses)}"


def holders(mountpoint: str) -> list[Holder]:
    """Return who has files, directories or maps open below `mountpoint`, as far as this user may see it."""
    found = [
        Holder(0, "mount", (f"{mount.source} is mounted on {mount.mountpoint}",))
        for mount in mounts()
        if mount.mountpoint.startswith(f"{mountpoint}/")
    ]
    with os.scandir("/proc") as entries:
        pids = sorted(int(entry.name) for entry in entries if entry.name.isdigit())
    for pid in pids:
        uses = [] if pid == os.getpid() else _first_uses(pid, mountpoint)
        if uses:
            found.append(Holder(pid, _command(pid), tuple(uses)))
    return found


def _first_uses(pid: int, mountpoint: str) -> list[str]:
    uses: list[str] = []
    try:
        for use in _uses(pid, mountpoint):
            if use not in uses:
                uses.append(use)
            if len(uses) == _MAX_USES:
                break
    except OSError:
        pass  # it ended meanwhile, or belongs to somebody else
    return uses


def _uses(pid: int, mountpoint: str) -> Iterator[str]:
    """Yield what a process holds. readlink on /proc names a file without asking its file system."""

    def below(link: str) -> str | None:
        try:
            target = os.readlink(link)
        except OSError:
            return None
        return target if target == mountpoint or target.startswith(f"{mountpoint}/") else None

    for name, meaning in (("cwd", "working directory"), ("root", "root directory")):
        target = below(f"/proc/{pid}/{name}")
        if target:
            yield f"{meaning} {target}"
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        target = below(f"/proc/{pid}/fd/{descriptor}")
        if target:
            yield f"file {target}"
    wanted = os.fsencode(mountpoint).replace(b"\n", b"\\012") + b"/"
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            path = line.rstrip(b"\n").split(None, 5)[5:]
            if path and path[0].startswith(wanted):
                yield f"map of {os.fsdecode(path[0])}"


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().decode("utf-8", "replace").strip() or "?"
    except OSError:
        return "?"
