"""Where the processes of a node meet: sockets, locks and state files below the runtime directory.

    <runtime>/agents/<agent id>.sock    the agent listens here (one agent per cache directory)
    <runtime>/agents/<agent id>.lock    held (flock) by the running agent for as long as it lives
    <runtime>/agents/<agent id>.log     its log
    <runtime>/mounts/<mount id>.json    state of a mount, rewritten atomically by its supervisor
    <runtime>/mounts/<mount id>.sock    the supervisor listens here (status, upgrade, unmount)
    <runtime>/mounts/<mount id>.log     log of supervisor and worker

Standard library only: the supervisor imports it, and its memory is counted in single MiB. All directories are 0700.

INVARIANT: nothing is read from or written to a directory here, or to the shm tier's, before `check_own` has found it to
be ours: their names can be guessed, and what lies around them (/tmp, /dev/shm) is open to all.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_PATH_BYTES = 74
"""Of a runtime directory: the address of a unix socket has 107 bytes, and agents/<16>.sock.new takes the rest."""


def default_runtime_dir(uid: int, xdg_runtime_dir: str) -> str:
    """Return /run/cachefs for root, else a directory of the user (`xdg_runtime_dir` may be empty)."""
    if uid == 0:
        return "/run/cachefs"
    return f"{xdg_runtime_dir}/cachefs" if xdg_runtime_dir else f"/tmp/cachefs-{uid}"  # noqa: S108 - made 0700 and checked


def default_cache_dir(uid: int, home: str) -> str:
    """Return /var/cache/cachefs for root, else a directory below `home`."""
    return "/var/cache/cachefs" if uid == 0 else f"{home}/.cache/cachefs"


def _identity(path: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def agent_id(cache_dir: str) -> str:
    """Return the name of the agent that owns `cache_dir`."""
    return _identity(cache_dir)


def mount_id(mountpoint: str) -> str:
    """Return the name of the mount at `mountpoint`. Never touches the mount itself, which may hang or be dead."""
    parent, base = os.path.split(os.path.abspath(mountpoint))
    return hashlib.sha256(os.fsencode(os.path.join(os.path.realpath(parent), base))).hexdigest()[:16]


def shm_directory(shm_dir: str, cache_dir: str, uid: int) -> str:
    """Return the directory of the shm tier that belongs to `cache_dir`."""
    return f"{shm_dir}/cachefs-{uid}-{agent_id(cache_dir)}"


class NotOurs(PermissionError):
    """Somebody else owns, planted, or may write into a directory that has to be ours. The message says which."""


def check_own(directory: str | Path, *, sticky: bool = False) -> None:
    """See that this is a directory (no link to one), of ours or root's, and that nobody else may write into it.

    `sticky`: others may, if they can neither rename nor remove what is ours in it; what is in it has to be checked too.
    Raises NotOurs, FileNotFoundError and other OSErrors.
    """
    status = os.lstat(directory)
    if status.st_uid not in (os.geteuid(), 0):
        raise NotOurs(f"{directory} belongs to somebody else")
    if not stat.S_ISDIR(status.st_mode):
        raise NotOurs(f"{directory} is {'a link' if stat.S_ISLNK(status.st_mode) else 'a file'}, not a directory")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and status.st_mode & stat.S_ISVTX):
        raise NotOurs(f"{directory} can be written by others (chmod go-w it, if what is in it is yours)")


def own_directory(directory: str | Path, *, sticky: bool = False) -> None:
    """Make a directory (0700) if there is none, and see that it is ours. Raises as `check_own`."""
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # a file, or a link that leads nowhere
    check_own(directory, sticky=sticky)


class RuntimeDir:
    """The runtime directory. Creating one makes the directories (0700) and refuses one that is not ours alone."""

    def __init__(self, path: str) -> None:
        self.path = path
        for part in ("", "agents", "mounts"):
            try:
                own_directory(Path(path, part), sticky=not part)
            except NotOurs as error:
                raise NotOurs(f"{error}: choose another --runtime-dir") from error

    def agent(self, cache_dir: str, suffix: str) -> str:
        """Return a file of the agent of `cache_dir`: suffix "sock", "lock" or "log"."""
        return f"{self.path}/agents/{agent_id(cache_dir)}.{suffix}"

    def mount(self, identity: str, suffix: str) -> str:
        """Return a file of a mount: suffix "json", "sock" or "log"."""
        return f"{self.path}/mounts/{identity}.{suffix}"

    def mount_states(self) -> list[dict[str, Any]]:
        """Return the state of every mount that has a state file, also of dead ones (check `supervisor_pid`)."""
        states = []
        for file in sorted(Path(self.path, "mounts").glob("*.json")):
            try:
                states.append(json.loads(file.read_bytes()))
            except (OSError, ValueError):
                continue  # being removed right now, or torn by a full disk: not a mount that can be described
        return states

    def agent_sockets(self) -> list[str]:
        """Return the sockets of all agents, also of dead ones."""
        return [str(path) for path in sorted(Path(self.path, "agents").glob("*.sock"))]


def write_state(path: str, state: dict[str, Any]) -> None:
    """Replace a state file atomically."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        Path(temporary).write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)  # on a full file system it has room that others need
        raise


def lock_holder(lock_file: str) -> int:
    """Return the process that holds (flock) this file, 0 when there is none that can be seen. Raises OSError."""
    try:
        status = os.stat(lock_file)
    except FileNotFoundError:
        return 0
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        fields = line.split()  # "12: FLOCK  ADVISORY  WRITE 4711 00:1b:5678 0 EOF"; "->" is one who waits for it
        if fields[1:2] == ["FLOCK"] and fields[5:6] == [place]:
            return max(0, int(fields[4]))  # -1, or 0: a process that is not to be seen from here
    return 0


TRACED = "t"
"""The state of a process that a debugger has stopped."""


def process_state(pid: int) -> str:
    """Return what a process does now, in one letter of proc(5): "R", "S", "D", "T", "t" ...; "" when nobody knows."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # its name may hold anything, spaces and brackets too
    except OSError:
        return ""
    return fields[0].decode("ascii", "replace") if fields else ""


def process_alive(pid: int) -> bool:
    """Return whether a process with this number exists (it may be another one: pair it with a lock where that
    matters).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
