"""cachefs as a person uses it: the commands `mount`, `umount` and `status`, and nothing of its inside.

The demo and all scenarios go through here. `CachefsMount.close` leaves nothing behind, whatever state the mount is in:
the processes are ended by the numbers that `status` gave, never by name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.memory import Roles, is_running
from bench.systems.port import run
from cachefs.runtime import shm_directory

_PID_KEYS = {"supervisor_pid": "supervisor", "worker_pid": "worker", "agent_pid": "agent"}
_AGENT_END_S = 20.0
_SHM = "/dev/shm"
_CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """What one mount is made with."""

    source: str
    endpoint_url: str
    mountpoint: Path
    cache_dir: Path
    runtime_dir: Path
    environment: Mapping[str, str]
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters by name (`cachefs.metrics`); what one process counted is not in the other's."""

    worker: dict[str, float]
    agent: dict[str, float]


class CachefsMount:
    """One mount with a cache directory of its own. Context manager; `mount` and `umount` may alternate."""

    def __init__(self, options: MountOptions) -> None:
        self.options = options
        self._seen: Roles = {}
        self._mounted = False

    # -- life ---------------------------------------------------------------------------------------------------------

    def mount(self) -> Path:
        """Run `cachefs mount`; it returns when the mount answers. Raises RuntimeError with its one line."""
        options = self.options
        for directory in (options.mountpoint, options.cache_dir, options.runtime_dir):
            directory.mkdir(parents=True, exist_ok=True)
        arguments = ["mount", options.source, str(options.mountpoint), "--endpoint-url", options.endpoint_url]
        arguments += ["--path-style", "--cache-dir", str(options.cache_dir), *options.more]
        self._run(arguments)
        self._seen, self._mounted = self._roles_now(), True
        return options.mountpoint

    def umount(self) -> None:
        """Unmount and end the agent, so that the shm tier is gone too. Safe in any state."""
        roles, self._mounted = self._seen, False
        if machine.is_mounted(self.options.mountpoint):
            roles = self._roles_or(roles)
            try:
                self._run(["umount", str(self.options.mountpoint)])
            except RuntimeError:
                machine.detach(self.options.mountpoint)
        for role in ("agent", "worker", "supervisor"):
            for pid in roles.get(role, []):
                _end(pid)
        self._seen = {}
        machine.detach(self.options.mountpoint)
        shutil.rmtree(self.shm_directory, ignore_errors=True)

    def close(self) -> None:
        """Unmount and remove the cache and runtime directories."""
        self.umount()
        for directory in (self.options.cache_dir, self.options.runtime_dir):
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def shm_directory(self) -> Path:
        """Where the shm tier of this cache directory lives."""
        return Path(shm_directory(_SHM, str(self.options.cache_dir), os.getuid()))

    # -- what it says of itself ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The document of `cachefs status --json`."""
        document: dict[str, Any] = json.loads(self._run(["status", "--json"]))
        return document

    def counters(self) -> Counts:
        """What the present worker and the agent counted since they started."""
        document = self.status()
        mounts, agents = document["mounts"], document["agents"]
        return Counts(
            worker=dict(mounts[0]["counters"]) if mounts else {}, agent=dict(agents[0]["counters"]) if agents else {}
        )

    def roles(self) -> Roles:
        """The three processes. Asks the command only when one of the known ones has ended: it costs CPU time."""
        known = [pid for pids in self._seen.values() for pid in pids]
        if self._mounted and not all(is_running(pid) for pid in known):
            self._seen = self._roles_or(self._seen)
        return self._seen

    def pid(self, role: str) -> int:
        """Ask which process has a role now."""
        return self._roles_now()[role][0]

    def _roles_or(self, fallback: Roles) -> Roles:
        try:
            return self._roles_now()
        except (RuntimeError, ValueError):
            return fallback

    def _roles_now(self) -> Roles:
        document = self.status()
        return {
            role: sorted({pid for pid in _values(document, key) if isinstance(pid, int) and pid > 0})
            for key, role in _PID_KEYS.items()
        }

    def _run(self, arguments: list[str]) -> str:
        environment = dict(self.options.environment) | {
            "CACHEFS_RUNTIME_DIR": str(self.options.runtime_dir),
            "PYTHONPATH": str(_CHECKOUT),  # this checkout is what is measured, installed or not
        }
        command = [sys.executable, "-m", "cachefs.cli.main", *arguments]
        return run(command, environment=environment, timeout_s=90, title=f"cachefs {arguments[0]}")


def _values(document: Any, key: str) -> Iterator[Any]:
    """Every value of `key` anywhere in a JSON document."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name == key:
                yield value
            else:
                yield from _values(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from _values(value, key)


def _end(pid: int) -> None:
    """Ask a process to end, and kill it when it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _AGENT_END_S
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
