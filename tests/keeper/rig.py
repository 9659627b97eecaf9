"""A node of its own: keeper, node service, S3 bucket; everything that a test starts is ended, also when it fails."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cachefs.cli.load import load_config
from cachefs.keeper.client import KeeperClient, KeeperError, KeeperStatus, MountState
from cachefs.mount.launch import make_plan
from cachefs.runtime import agent_id
from tests.support.machine import abort_connections, detach, kill, mounts_below, processes_with, wait_until

START_S = 20.0
SHM = Path("/dev/shm")
CONTENT = random.Random(3).randbytes(3 << 20)
TAG = "CACHEFS_TEST_KEEPER"


def as_user(uid: int) -> list[str]:
    """Return the command that runs another one as this user, without any right."""
    return [
        "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all",
        "--no-new-privs",
    ]  # fmt: skip


def python_for(uid: int) -> tuple[str, str]:
    """Return an interpreter that this user can start, and its PYTHONPATH: ours may lie in a home directory of root."""
    repository = str(Path(__file__).parents[2])
    path = os.pathsep.join([repository, *(entry for entry in sys.path if entry.endswith("site-packages"))])
    again = "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import pyfuse3, lmdb'])"
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        done = subprocess.run(
            [*as_user(uid), python, "-c", again], env={"PYTHONPATH": path}, capture_output=True, check=False, cwd="/"
        )
        if done.returncode == 0:
            return python, path
    pytest.skip(f"user {uid} can start no Python that has what is needed")


nodes: weakref.WeakSet[KubeletNode] = weakref.WeakSet()
"""All that are open."""


class KubeletNode:
    """One machine with a keeper and a node service. Context manager."""

    def __init__(
        self, environment: Mapping[str, str], endpoint_url: str, *, node_uid: int = 0, **settings: Any
    ) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="cachefs-keeper-")).resolve()
        self.base.chmod(0o755)
        self.node_uid = node_uid
        self.endpoint_url = endpoint_url
        self.root = self.base / "kubelet"
        self.run = self.base / "run"
        self.cache = self.base / "cache"
        self.log = self.base / "log"
        for directory in (self.root, self.cache, self.log):
            directory.mkdir()
        os.chown(self.cache, node_uid, -1)
        self.tag = f"{TAG}={uuid.uuid4()}"
        self.credentials = {name: text for name, text in environment.items() if name.startswith("AWS_")}
        self.environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith("AWS_")},
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "AWS_EC2_METADATA_DISABLED": "true",
            TAG: self.tag.partition("=")[2],
        }
        self.settings = {
            "cache-size": "256MiB", "shm-size": "32MiB", "memory-limit": "128MiB", "grace": "1s", **settings,
        }  # fmt: skip
        self.keepers: list[subprocess.Popen[bytes]] = []
        self.services: list[subprocess.Popen[bytes]] = []
        self.socket = str(self.run / "keeper.sock")
        self.client = KeeperClient(self.socket)
        nodes.add(self)

    def __enter__(self) -> KubeletNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- processes ----------------------------------------------------------------------------------------------------

    def start_keeper(self, *dying: str) -> subprocess.Popen[bytes]:
        """Start a keeper, and wait until it listens. `dying`: at which point it is to die (`dying_keeper`)."""
        module = ["tests.keeper.dying_keeper", *dying] if dying else ["cachefs.keeper"]
        command = [
            sys.executable, "-m", *module, f"--runtime-dir={self.run}", f"--root={self.root}",
            f"--node-uid={self.node_uid}", "--log-level=debug",
        ]  # fmt: skip
        before = os.stat(self.socket).st_ino if os.path.exists(self.socket) else 0
        child = self._start(command, "keeper", {})
        self.keepers.append(child)

        def listens() -> bool:
            assert child.poll() is None, self.logs()
            return os.path.exists(self.socket) and os.stat(self.socket).st_ino != before

        wait_until(listens, START_S, "the keeper listens")
        return child

    def start_service(
        self, *, wait: bool = True, credentials: bool = True, behaviour: Path | None = None, newer: bool = False,
        **more: str,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """Start a node service, and wait until the keeper knows it. `behaviour`: of the tiny workers that it runs."""
        module = ["tests.keeper.newer_node"] if newer else ["cachefs.cli.main"]
        if behaviour is not None:
            module = ["tests.keeper.light_node", str(behaviour)]
        command = [
            sys.executable, "-m", *module, "node", f"--keeper={self.socket}",
            f"--runtime-dir={self.run}/node", f"--cache-dir={self.cache}", f"--shm-dir={SHM}",
            *(f"--{name}={value}" for name, value in {**self.settings, **more}.items()),
        ]  # fmt: skip
        more_environment = dict(self.credentials) if credentials else {}
        if self.node_uid:
            python, path = python_for(self.node_uid)
            command = [*as_user(self.node_uid), python, *command[1:]]
            more_environment["PYTHONPATH"] = path
        child = self._start(command, "node", more_environment)
        self.services.append(child)
        if wait:
            self.wait_for_service(child)
        return child

    def wait_for_service(self, child: subprocess.Popen[bytes]) -> None:
        """Wait until the keeper gives its orders to this node service."""

        def known() -> bool:
            assert child.poll() is None, self.logs()
            runner = self.status().runner
            return runner is not None and runner.pid == child.pid

        wait_until(known, START_S, "the node service is connected")

    def _start(self, command: list[str], name: str, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self.log / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
                env={**self.environment, **more},
            )  # fmt: skip

    def processes(self, word: str = "") -> list[int]:
        """Return the living processes of this node whose command line has `word`."""
        found = processes_with(self.tag)
        return sorted(pid for pid, words in found.items() if any(word in part for part in words))

    @property
    def agent_pid(self) -> int:
        """The agent's process."""
        found: list[int] = []

        def runs() -> bool:
            found[:] = self.processes("cachefs.agent.main")
            return bool(found)

        wait_until(runs, START_S, "an agent runs")
        return found[-1]

    # -- mounts -------------------------------------------------------------------------------------------------------

    def plan(self, source: str, **settings: Any) -> dict[str, Any]:
        """Return the plan of a mount as the CSI plugin makes it."""
        values = {"cache-dir": "/var/cache/cachefs", "runtime-dir": str(self.run / "node"), **settings}

        config = load_config({"source": source, "endpoint-url": self.endpoint_url, **values}, self.environment)
        return make_plan(config, "/nowhere")

    def mount(
        self, key: str, source: str, fingerprint: str = "f", timeout_s: float = 30.0,
        environment: Mapping[str, str] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Have a mount made, with credentials of its own in `environment`."""
        try:
            self.client.mount(
                key, self.plan(source, **settings), environment=environment or {}, fingerprint=fingerprint,
                labels={"volume": key}, timeout_s=timeout_s,
            )  # fmt: skip
        except KeeperError as error:
            raise AssertionError(f"{error.kind}: {error.text}\n{self.logs()}") from error

    def target(self, name: str) -> Path:
        """Return a target as kubelet names it."""
        return self.root / "pods" / name / "volumes/kubernetes.io~csi/pv/mount"

    def status(self) -> KeeperStatus:
        return self.client.status()

    def state(self, key: str) -> MountState:
        found = self.status().find(key)
        assert found is not None, f"{key} is not mounted"
        return found

    def wait_for_worker(self, key: str, other_than: int | None = None, timeout_s: float = START_S) -> int:
        """Wait until another worker serves; returns its number."""

        def serves() -> bool:
            state = self.status().find(key)
            return state is not None and state.state == "serving" and state.worker_pid not in (None, other_than)

        wait_until(serves, timeout_s, f"another worker serves {key}\n{self.logs()}")
        pid = self.state(key).worker_pid
        assert pid is not None
        return pid

    def read(self, path: Path) -> bytes:
        """Read a file in another process: one that reads what hangs would hang."""
        done = subprocess.run(["cat", str(path)], capture_output=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr.decode() + self.logs()
        return done.stdout

    @contextlib.contextmanager
    def reader(self, path: Path, content: bytes, limit_s: float = 20.0, *, once: bool = False) -> Iterator[None]:
        """Somebody who has a file open and reads on during the block: no read may fail, or wait longer. `once`: the
        file is not opened again.
        """
        copy = self.base / f"copy-{uuid.uuid4()}"
        copy.write_bytes(content)
        once_more = ["once"] if once else []
        with subprocess.Popen(
            [sys.executable, "-m", "tests.keeper.open_reader", str(path), str(copy), *once_more],
            cwd=Path(__file__).parents[2], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as child:  # fmt: skip
            try:
                assert child.stdout is not None
                assert child.stdout.readline().strip() == "reading"
                yield
                output, complaints = child.communicate(timeout=60)
                assert child.returncode == 0, complaints
            finally:
                child.kill()
        outcome = json.loads(output)
        print(f"{outcome['reads']} reads, longest wait {outcome['longest_s']:.2f} s")
        assert outcome["faults"] == []
        assert outcome["reads"] > 0
        assert outcome["longest_s"] < limit_s

    def mounted(self) -> list[str]:
        """Return where file systems of ours are mounted."""
        return [place for place, _, kind in mounts_below(self.root) if kind == "fuse.cachefs"]

    # -- the end ------------------------------------------------------------------------------------------------------

    def logs(self) -> str:
        """Return all logs."""
        paths = [*sorted(self.log.glob("*.log")), *sorted((self.run / "node/agents").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-8000:]}" for path in paths)

    def close(self) -> None:
        """End everything, whatever state it is in."""
        nodes.discard(self)
        for keeper in self.keepers:
            keeper.kill()  # first: it would make anew what is aborted
            keeper.wait(10)
        abort_connections(self.root)
        for place in reversed(self.mounted()):
            detach(place)
        while left := self.processes():  # one may have been starting another
            for pid in left:
                kill(pid)
            time.sleep(0.01)
        for child in [*self.keepers, *self.services]:
            child.wait(10)
        for uid in {0, self.node_uid}:
            shutil.rmtree(SHM / f"cachefs-{uid}-{agent_id(str(self.cache))}", ignore_errors=True)
        assert not self.mounted()
        shutil.rmtree(self.base, ignore_errors=True)
