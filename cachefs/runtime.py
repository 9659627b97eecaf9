"""Where the processes of a node meet: sockets, locks and state files below the runtime directory.

    <runtime>/agents/<agent id>.sock    the agent listens here (one agent per cache directory)
    <runtime>/agents/<agent id>.lock    held (flock) by the running agent for as long as it lives
    <runtime>/agents/<agent id>.log     its log
    <runtime>/mounts/<mount id>.json    state of a mount, rewritten atomically by its supervisor
    <runtime>/mounts/<mount id>.sock    the supervisor listens here (status, upgrade, unmount)
    <runtime>/mounts/<mount id>.log     log of supervisor and worker

Standard library only: the supervisor imports it, and its memory is counted in single MiB. All directories are 0700.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


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


class RuntimeDir:
    """The runtime directory. Creating one makes the directories (0700) and refuses one that somebody else owns."""

    def __init__(self, path: str) -> None:
        self.path = path
        for part in ("", "agents", "mounts"):
            directory = Path(path, part)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if directory.stat().st_uid not in (os.getuid(), 0):
                raise PermissionError(f"{directory} belongs to somebody else: choose another --runtime-dir")

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
    Path(temporary).write_text(json.dumps(state), encoding="utf-8")
    os.replace(temporary, path)


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
