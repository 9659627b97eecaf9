"""A Kubernetes node as it is: keeper, node service with its agent and workers, and the driver, each a process.

    with KubeNode(server.environment) as node:
        volume = node.volume("v1", {"bucket": bucket.name, "endpoint": server.endpoint_url})
        volume.stage()
        assert (volume.publish("pod-1") / "a").read_bytes() == b"..."

All processes inherit a variable with the directory of their node, and that is how they are found again.

INVARIANT: `close` leaves no process, no mount and nothing in the tmpfs; what it had to take away although every volume
had been given back is an AssertionError.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from cachefs.keeper.client import KeeperClient, KeeperError, KeeperStatus
from cachefs.runtime import shm_directory
from csi.v1 import csi_pb2
from tests.csi.node_rig import KubeletVolume
from tests.csi.rig import Client
from tests.keeper.rig import as_user, python_for
from tests.support.machine import abort_connections, detach, kill, mounts_below, processes_with, wait_until
from tests.support.programs import REPOSITORY

_MARK = "TEST_KUBE_NODE"
_ROLES = {
    "cachefs.keeper": "keeper",
    "cachefs.mount.worker": "worker",
    "cachefs.agent.main": "agent",
    "node": "node",
    "csi": "csi",
}
START_S, END_S = 30.0, 20.0
LOG_TAIL_LINES = 100


class KubeNode:
    """One node. Context manager."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        node_options: tuple[str, ...] = (),
        mode: str = "node",
        node_uid: int | None = None,
        state: str = "",
    ) -> None:
        """`environment`: of the node service, and so of `authSource: node`. `node_uid`: who that runs as. `state`:
        where the controller has its records; a directory of the node without it.
        """
        self.base = Path(tempfile.mkdtemp(prefix="kube-", dir="/tmp"))  # short: a socket's address has 107 bytes
        self.kubelet = self.base / "kubelet"
        self.kubelet.mkdir()
        self.runtime = self.base / "run"
        self.cache = self.base / "cache"
        self.endpoint = self.base / "csi.sock"
        self._node_uid = os.geteuid() if node_uid is None else node_uid
        self.base.chmod(0o755)
        self.cache.mkdir(mode=0o700)
        os.chown(self.cache, self._node_uid, -1)
        self._node_environment = dict(environment)
        self._mode = mode
        self._state = state or f"file://{self.base}/state"
        self._options = [
            f"--cache-dir={self.cache}", f"--runtime-dir={self.runtime}/node", "--shm-size=32MiB",
            "--cache-size=256MiB",
            "--log-level=debug", *node_options,
        ]  # fmt: skip
        self._children: list[subprocess.Popen[bytes]] = []
        self._client: Client | None = None
        self._was_killed = False

    def __enter__(self) -> Self:
        try:
            self.start_keeper()
            self.start_node_service()
            self.start_plugin()
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except AssertionError:
            if kind is None:  # else the first failure is the one to show
                raise
            print(self.log_text())

    # -- processes ----------------------------------------------------------------------------------------------------

    def _start(self, role: str, arguments: list[str], environment: Mapping[str, str], uid: int | None = None) -> None:
        python, path = (sys.executable, str(REPOSITORY)) if uid is None else python_for(uid)
        base = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.base), "LANG": "C.UTF-8"}
        with (self.base / f"{role}.log").open("ab") as log:
            child = subprocess.Popen(
                [*(as_user(uid) if uid is not None else ()), python, "-m", "cachefs.cli.main", *arguments],
                env={**base, "PYTHONPATH": path, **environment, _MARK: str(self.base)},
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._children.append(child)

    def start_keeper(self) -> None:
        """Start the keeper, and return when it answers."""
        arguments = [
            f"--runtime-dir={self.runtime}",
            f"--root={self.kubelet}",
            f"--node-uid={self._node_uid}",
            "--log-level=debug",
        ]
        self._start("keeper", ["keeper", *arguments], {})
        wait_until(lambda: self.keeper_status() is not None, START_S, "the keeper answers")

    def start_node_service(self) -> None:
        """Start the node service, and return when the keeper has it and its agent listens."""
        arguments = ["node", f"--keeper={self.runtime}/keeper.sock", *self._options]
        uid = self._node_uid if self._node_uid != os.geteuid() else None
        self._start("node", arguments, self._node_environment, uid)
        wait_until(self._has_node_service, START_S, "the node service is there")

    def _has_node_service(self) -> bool:
        status = self.keeper_status()
        sockets = list((self.runtime / "node" / "agents").glob("*.sock"))
        return status is not None and status.runner is not None and status.runner.connected and bool(sockets)

    def start_plugin(self) -> None:
        """Start the driver, and return when it answers."""
        arguments = [
            "csi", f"--endpoint=unix://{self.endpoint}", "--node-id=node-a", f"--mode={self._mode}",
            f"--keeper={self.runtime}/keeper.sock", f"--credentials-dir={self.base}/credentials",
            f"--node-uid={self._node_uid}",
            f"--kubelet-dir={self.kubelet}", f"--state={self._state}", *self._options,
        ]  # fmt: skip
        self._start("csi", arguments, self._node_environment if self._mode == "all" else {})
        wait_until(self._plugin_answers, START_S, "the driver answers")

    def _plugin_answers(self) -> bool:
        if self._client is not None:
            self._client.channel.close()
        self._client = Client(self.endpoint)  # a new one: a channel that failed waits before it tries again
        try:
            self._client.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=2)
        except Exception:
            return False
        return True

    @property
    def client(self) -> Client:
        """Stubs for all services of the driver."""
        assert self._client is not None
        return self._client

    def volume(self, volume_id: str, parameters: Mapping[str, str], **more: Any) -> KubeletVolume:
        """Return a volume as the kubelet sees it. After a restart of the plugin it has to be asked for again."""
        return KubeletVolume(self.client.node, str(self.kubelet), volume_id, parameters, **more)

    def keeper_status(self) -> KeeperStatus | None:
        """Return what the keeper says, None while it does not."""
        try:
            return KeeperClient(f"{self.runtime}/keeper.sock", 5.0).status()
        except KeeperError:
            return None

    def processes(self, role: str = "") -> list[int]:
        """Return the processes of this node: keeper, node, agent, worker, csi, or all."""
        found = processes_with(f"{_MARK}={self.base}")
        return sorted(pid for pid, words in found.items() if role in ("", _role(words)))

    def kill(self, role: str) -> None:
        """kill -9 all processes of this kind."""
        self._was_killed = True
        pids = self.processes(role)
        assert pids, f"there is no {role}"
        for pid in pids:
            kill(pid)
        for child in self._children:
            child.poll()

    def wait_for(self, role: str, other_than: list[int]) -> None:
        """Wait until others run that are of this kind."""
        wait_until(lambda: set(self.processes(role)) - set(other_than), END_S, f"another {role} runs")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `cachefs` command as somebody who looks into the node service's container."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.base), "LANG": "C.UTF-8"}
        return subprocess.run(
            [sys.executable, "-m", "cachefs.cli.main", *arguments],
            env={**environment, "PYTHONPATH": str(REPOSITORY), "CACHEFS_RUNTIME_DIR": f"{self.runtime}/node"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    # -- what there is ------------------------------------------------------------------------------------------------

    def mounts(self) -> list[str]:
        """Return all mount points of cachefs on this node."""
        return [place for place, _, kind in mounts_below(self.base) if kind == "fuse.cachefs"]

    def log_text(self) -> str:
        """Return the ends of all logs."""
        pieces = []
        for path in sorted(self.base.rglob("*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            pieces += [f"--- {path} ({len(lines)} lines)", *lines[-LOG_TAIL_LINES:]]
        return "\n".join(pieces)

    def full_log(self) -> str:
        """Return all logs, whole."""
        paths = sorted(self.base.rglob("*.log"))
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)

    def close(self) -> None:
        """End everything. Raises AssertionError when a mount or credentials were left."""
        left = [f"mount {place}" for place in self.mounts()]
        left += [f"credentials {path}" for path in (self.base / "credentials").rglob("*") if path.is_file()]
        left += self._end_all()
        assert not left, "left behind: " + "; ".join(left)

    def _end_all(self) -> list[str]:
        left: list[str] = []
        if self._client is not None:
            self._client.channel.close()
        for role in ("csi", "node", "keeper"):
            for pid in self.processes(role):
                kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + END_S
            while self.processes(role) and time.monotonic() < deadline:
                for child in self._children:
                    child.poll()
                time.sleep(0.02)
        pids = self.processes()
        if pids:
            left.append(f"processes {pids}")
            abort_connections(self.base)
            for pid in pids:
                kill(pid)
        for child in self._children:
            child.wait()
        for place, _, _ in reversed(mounts_below(self.base)):
            detach(place)
        shm = Path(shm_directory("/dev/shm", str(self.cache), self._node_uid))
        if shm.exists():
            if not self._was_killed:  # what was killed is adopted by the next agent, and here no other comes
                left.append(str(shm))
            shutil.rmtree(shm, ignore_errors=True)
        if left:
            left.append(self.log_text())
        shutil.rmtree(self.base, ignore_errors=True)
        return left


def _role(words: list[str]) -> str:
    for word in words[1:4]:
        if word in _ROLES:
            return _ROLES[word]
    return " ".join(words)
