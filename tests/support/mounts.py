"""Real mounts for tests: a node (cache directory, runtime directory, agent) and what is mounted on it.

    with Bucket.create(server) as bucket, Node(server.environment) as node:
        bucket.put("a/b", b"hello")
        mount = node.mount(bucket.url, "--endpoint-url", server.endpoint_url)
        assert (mount.path / "a/b").read_bytes() == b"hello"

`cachefs` runs as a person runs it: as a command, in processes of its own. All of them inherit one variable (`_MARK`)
with the directory of their node, and that is how they are found again, whatever they did to their state files.

INVARIANT: `Node.close` leaves no process, no mount and no directory in the tmpfs, whatever happened before; what it had
to remove by force, although everything had been asked to end, is an AssertionError.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from bench.s3_server import S3Server
from cachefs.runtime import RuntimeDir, mount_id, shm_directory
from tests.support.machine import abort_connections, detach, kill, mounts_below, processes_with, wait_until
from tests.support.programs import REPOSITORY

CACHEFS = (sys.executable, "-m", "cachefs.cli.main")
COMMAND_S = 60.0
"""No command may take longer."""
END_S = 15.0
"""How long the processes of a node may take to end when they were told to."""
LOG_TAIL_LINES = 120
_MARK = "TEST_NODE_DIRECTORY"
_MODULES = {
    "cachefs.mount.supervisor": "supervisor",
    "cachefs.mount.worker": "worker",
    "cachefs.agent.main": "agent",
    "cachefs.cli.main": "command",
}

nodes: weakref.WeakSet[Node] = weakref.WeakSet()
"""All nodes that are open, for the report of a failed test and for the watchdog."""
_numbers = itertools.count()


# -- the store --------------------------------------------------------------------------------------------------------


class Bucket:
    """A bucket of the real server, changed from outside of cachefs."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.server = server
        self.name = name

    @classmethod
    @contextlib.contextmanager
    def create(cls, server: S3Server) -> Iterator[Self]:
        """A new bucket, removed at the end."""
        bucket = cls(server, server.create_bucket(f"mount-{os.getpid()}-{next(_numbers)}"))
        try:
            yield bucket
        finally:
            bucket.remove()

    @property
    def url(self) -> str:
        """What to mount."""
        return f"s3://{self.name}"

    def put(self, key: str, body: bytes, metadata: Mapping[str, str] | None = None) -> bytes:
        """Make or overwrite an object; returns its body."""
        self.server.client().put_object(Bucket=self.name, Key=key, Body=body, Metadata=dict(metadata or {}))
        return body

    def fill(self, objects: Mapping[str, bytes]) -> None:
        """Upload many objects."""
        self.server.put_many(self.name, objects.items(), threads=4)

    def delete(self, *keys: str) -> None:
        """Delete objects."""
        for key in keys:
            self.server.client().delete_object(Bucket=self.name, Key=key)

    def remove(self) -> None:
        """Delete the bucket with all its objects."""
        client = self.server.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.name):
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            plain = [key for key in keys if key.isprintable()]  # XML cannot carry control characters
            if plain:
                client.delete_objects(Bucket=self.name, Delete={"Objects": [{"Key": key} for key in plain]})
            for key in set(keys).difference(plain):
                client.delete_object(Bucket=self.name, Key=key)
        with contextlib.suppress(client.exceptions.NoSuchBucket):
            client.delete_bucket(Bucket=self.name)


# -- the node ---------------------------------------------------------------------------------------------------------


class Node:
    """One cache directory with its agent and its mounts. Context manager."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        shm_dir: Path = Path("/dev/shm"),
        shm_size: str = "64MiB",
        cache_size: str = "512MiB",
        idle_timeout: str = "1s",
        cache_dir: Path | None = None,
    ) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="cfs-", dir="/tmp"))  # short: a socket's address has 107 bytes
        self.cache_dir = cache_dir or self.base / "cache"
        self.runtime_dir = self.base / "run"
        self.shm_dir = shm_dir
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.base),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),  # this checkout, whatever is installed
            **environment,
            _MARK: str(self.base),
        }
        self.options = [
            f"--cache-dir={self.cache_dir}",
            f"--runtime-dir={self.runtime_dir}",
            f"--shm-dir={shm_dir}",
            f"--shm-size={shm_size}",
            f"--cache-size={cache_size}",
            f"--agent-idle-timeout={idle_timeout}",
            "--log-level=debug",
            "--low-latency=off",  # a guard would keep the CPUs of the whole machine awake
        ]
        self.mounts: list[Mount] = []
        self._was_killed = False
        nodes.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except AssertionError:
            if kind is None:  # else the first failure is the one to show
                raise

    # -- commands -----------------------------------------------------------------------------------------------------

    def run(self, *arguments: str, timeout_s: float = COMMAND_S) -> subprocess.CompletedProcess[str]:
        """Run a `cachefs` command and return its outcome, whatever it is."""
        return subprocess.run(
            [*CACHEFS, *arguments],
            env=self.environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def try_mount(self, source: str, *options: str, place: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `cachefs mount` and return its outcome; `place` is not made."""
        return self.run("mount", *self.options, *options, source, str(place or self.base / "mnt"))

    def mount(self, source: str, *options: str, name: str = "mnt") -> Mount:
        """Mount and return the mount. Options given later win over those of the node."""
        place = self.base / name
        with contextlib.suppress(FileExistsError):  # exist_ok would look at it, and a dead mount cannot be looked at
            place.mkdir()
        done = self.try_mount(source, *options, place=place)
        assert done.returncode == 0, f"cachefs mount failed ({done.returncode}): {done.stderr}\n{self.log_text()}"
        mount = Mount(self, place)
        self.mounts = [m for m in self.mounts if m.path != place] + [mount]
        return mount

    def status(self) -> dict[str, Any]:
        """The document of `cachefs status --json`."""
        done = self.run("status", "--json", f"--runtime-dir={self.runtime_dir}")
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    # -- processes ----------------------------------------------------------------------------------------------------

    def processes(self, role: str = "") -> list[int]:
        """Return the processes of this node ("supervisor", "worker", "agent", or all)."""
        return sorted(pid for pid, found in self._processes().items() if role in ("", found))

    def _processes(self) -> dict[int, str]:
        found = processes_with(f"{_MARK}={self.base}")
        return {
            pid: next((_MODULES[word] for word in words if word in _MODULES), " ".join(words))
            for pid, words in found.items()
        }

    @property
    def agent_pid(self) -> int:
        """The running agent; fails when there is none (or more)."""
        pids = self.processes("agent")
        assert len(pids) == 1, f"agents: {pids}"
        return pids[0]

    def kill_agent(self) -> int:
        """Kill -9 the agent; returns which one it was."""
        self._was_killed = True
        pid = self.agent_pid
        kill(pid)
        return pid

    def wait_for_agent(self, other_than: int, timeout_s: float = 10.0) -> int:
        """Wait until another agent runs; returns its number."""
        found: list[int] = []

        def runs() -> bool:
            found[:] = self.processes("agent")
            return bool(found) and other_than not in found

        wait_until(runs, timeout_s, "another agent runs")
        return found[0]

    def kill_everything(self) -> None:
        """Kill -9 every process of this node, and take the dead mounts away."""
        self._was_killed = True
        for role in ("supervisor", "worker", "agent", ""):  # a living supervisor would start another worker
            for pid in self.processes(role):
                kill(pid)
        wait_until(lambda: not self.processes(), END_S, "killed processes are gone")
        for place, _, kind in reversed(mounts_below(self.base)):
            if kind.startswith("fuse"):
                detach(place)
        self.mounts = []

    @property
    def shm_directory(self) -> Path:
        """Where the shm tier of this node lives."""
        return Path(shm_directory(str(self.shm_dir), str(self.cache_dir), os.getuid()))

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop_agent(self) -> None:
        """End the agent in order (as its idle time would), so that the next mount finds an empty shm tier."""
        for pid in self.processes("agent"):
            kill(pid, signal.SIGTERM)
        wait_until(lambda: not self.processes("agent"), END_S, "the agent ends after SIGTERM")

    def log_text(self) -> str:
        """Return the ends of all logs of this node."""
        pieces = []
        for path in sorted(self.runtime_dir.rglob("*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            pieces += [f"--- {path} ({len(lines)} lines)", *lines[-LOG_TAIL_LINES:]]
        return "\n".join(pieces)

    def full_log(self) -> str:
        """Return all logs of this node, whole."""
        paths = sorted(self.runtime_dir.rglob("*.log"))
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)

    def close(self) -> None:
        """Unmount, end all processes, remove everything. Raises AssertionError when something had to be forced."""
        nodes.discard(self)
        complaints: list[str] = []
        try:
            for mount in list(self.mounts):
                complaints += mount.take_away()
            for pid in self.processes("agent"):
                kill(pid, signal.SIGTERM)
            complaints += self._force_ends()
        finally:
            complaints += self._remove()
            logs = self.log_text()
            shutil.rmtree(self.base, ignore_errors=True)
        assert not complaints, "left behind: " + "; ".join(complaints) + "\n" + logs

    def _force_ends(self) -> list[str]:
        deadline = time.monotonic() + END_S
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if left:
            abort_connections(self.base)
        for pid in left:
            kill(pid)
        return [f"process {pid} ({role})" for pid, role in left.items()]

    def _remove(self) -> list[str]:
        left = [f"mount {place}" for place, _, kind in mounts_below(self.base) if kind.startswith("fuse")]
        for place, _, _ in reversed(mounts_below(self.base)):
            detach(place)
        if self.shm_directory.exists():
            if not self._was_killed:  # what was killed is adopted by the next agent, and here no other comes
                left.append(f"{self.shm_directory}")
            shutil.rmtree(self.shm_directory, ignore_errors=True)
        return left


class Mount:
    """One mount. Its processes are found through the state file, which is read without starting a command."""

    def __init__(self, node: Node, path: Path) -> None:
        self.node = node
        self.path = path
        self.identity = mount_id(str(path))

    def state(self) -> dict[str, Any]:
        """Return the state file of the supervisor; {} when there is none."""
        states = RuntimeDir(str(self.node.runtime_dir)).mount_states()
        return next((state for state in states if state["mount_id"] == self.identity), {})

    def status(self) -> dict[str, Any]:
        """Return this mount's part of `cachefs status --json`."""
        found: dict[str, Any] = next(m for m in self.node.status()["mounts"] if m["mountpoint"] == str(self.path))
        return found

    @property
    def is_mounted(self) -> bool:
        """Whether something is mounted here (never touches it)."""
        return any(place == str(self.path) for place, _, _ in mounts_below(self.path))

    @property
    def supervisor_pid(self) -> int:
        """The supervisor's process."""
        return int(self.state()["supervisor_pid"])

    @property
    def worker_pid(self) -> int:
        """The worker's process."""
        return int(self.state()["worker_pid"])

    def kill_worker(self) -> int:
        """Kill -9 the worker; returns which one it was."""
        pid = self.worker_pid
        kill(pid)
        return pid

    def wait_for_worker(self, other_than: int, timeout_s: float = 10.0) -> int:
        """Wait until another worker serves; returns its number."""

        def serves() -> bool:
            state = self.state()
            return state.get("state") == "serving" and state["worker_pid"] not in (None, other_than)

        wait_until(serves, timeout_s, "another worker serves")
        return self.worker_pid

    def umount(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `cachefs umount`; fails unless it works and the mount and (without options) its processes are gone."""
        supervisor = self.state().get("supervisor_pid")
        done = self.try_umount(*options)
        assert done.returncode == 0, f"{done.stderr}\n{self.node.log_text()}"
        assert not self.is_mounted
        if not options:
            self._wait_until_let_go(supervisor)
        return done

    def try_umount(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `cachefs umount` and return its outcome."""
        return self.node.run("umount", *options, f"--runtime-dir={self.node.runtime_dir}", str(self.path))

    def take_away(self) -> list[str]:
        """Unmount in order if it is mounted; otherwise by force. Returns what had to be forced."""
        if not self.is_mounted:
            return []
        supervisor = self.state().get("supervisor_pid")
        try:
            done = self.try_umount()
        except subprocess.TimeoutExpired:
            complaint = "`cachefs umount` hangs"
        else:
            if done.returncode == 0 and not self.is_mounted:
                try:
                    self._wait_until_let_go(supervisor)
                except AssertionError:
                    return [f"supervisor {supervisor} of what was unmounted"]
                return []
            complaint = f"`cachefs umount` failed: {done.stderr.strip()}"
        abort_connections(self.path)
        detach(str(self.path))
        return [complaint]

    def _wait_until_let_go(self, supervisor: int | None) -> None:
        """Wait until nobody has the mount any more. A test beside this one that makes a mount name space has a copy of
        it there, and as long as that lives the supervisor serves it, and the agent is needed.
        """
        wait_until(lambda: supervisor not in self.node.processes(), END_S, "the mount is let go")
