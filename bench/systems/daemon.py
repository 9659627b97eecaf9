"""A file system's process in the foreground: started in a session of its own, waited for until mounted, always ended.

* The session is what finds and ends its children, by number and never by name.
* `setpriv --pdeathsig TERM` makes the kernel end it when we die without cleaning up; every system unmounts on TERM.
* The mount is never touched from this process, only by a child with a time limit: a hanging one must not hang us.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bench import machine
from bench.memory import Roles, session_members
from bench.systems.port import Site

_MOUNT_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 20.0


class Daemon:
    """One mounted system. INVARIANT: after `stop` neither its mount nor any process of its session exists."""

    def __init__(self, role: str, mountpoint: Path, log: Path) -> None:
        self.mountpoint = mountpoint
        self._role = role
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, arguments: list[str], environment: dict[str, str]) -> None:
        """Start it and return when the mount answers. Raises RuntimeError with the end of its log."""
        assert self._child is None, "already started"
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        deadline = time.monotonic() + _MOUNT_TIMEOUT_S
        while not self._answers():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = " | ".join(self._log.read_text(errors="replace").splitlines()[-4:])
                raise RuntimeError(f"{self._role} did not mount: {tail}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        if not machine.is_mounted(self.mountpoint):
            return False
        try:
            return (
                subprocess.run(["stat", str(self.mountpoint)], capture_output=True, timeout=10, check=False).returncode
                == 0
            )
        except subprocess.TimeoutExpired:
            return False

    def stop(self) -> None:
        """Unmount, wait for the processes, kill what is left."""
        machine.detach(self.mountpoint)
        child, self._child = self._child, None
        if child is None:
            return
        for ending in (None, signal.SIGTERM, signal.SIGKILL):
            if ending is not None:
                for pid in session_members(child.pid):
                    _signal(pid, ending)
            if _ended(child):
                break
        machine.detach(self.mountpoint)

    def roles(self) -> Roles:
        """All processes of the session."""
        return {self._role: session_members(self._child.pid)} if self._child is not None else {}


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Wait for the child and for all of its session."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.poll() is not None and not session_members(child.pid):
            return True
        time.sleep(0.05)
    return False


class DaemonSystem:
    """What all peers that are one daemon with one cache directory have in common."""

    name: str

    def __init__(self, site: Site) -> None:
        self._site = site
        self._cache = site.work / f"{self.name}-cache"
        self._daemon = Daemon(self.name, site.place("mnt", self.name), site.place("logs") / f"{self.name}.log")

    def prepare(self) -> str | None:
        """They read the bucket as it is."""
        return self._site.bucket

    def umount(self) -> None:
        """Unmount; a cache in memory ends with the process."""
        self._daemon.stop()

    def reset(self) -> None:
        """Remove the cache on disk."""
        shutil.rmtree(self._cache, ignore_errors=True)

    def roles(self) -> Roles:
        """Its processes."""
        return self._daemon.roles()

    def origin_requests(self) -> int | None:
        """Not asked: only cachefs counts its own."""
        return None
