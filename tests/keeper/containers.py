"""The containers of a Kubernetes node, without a container runtime: what counts of them here is made by unshare(1).

    host      a mount namespace of its own, in which the kubelet's directory is a shared mount
    keeper    Bidirectional: what it mounts is mounted on the host; the host's processes
    node      the host's processes, or processes of its own; a user without rights; mounts come in only
    csi       root with the three capabilities that the chart leaves it; mounts come in only
    pods      a bind of their target, in a mount namespace of their own: nothing comes in (`private`), or what is
              mounted on the target later does (`slave`: HostToContainer)

A container dies as kubelet's dies: all of its processes are killed, wherever they are in the tree.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from cachefs.keeper.client import KeeperClient, KeeperError
from cachefs.runtime import agent_id
from tests.support.machine import ALONE, kill, processes_with, wait_until
from tests.support.programs import REPOSITORY

START_S = 30.0
TAG = "CACHEFS_TEST_CONTAINERS"
CONTAINER = "CACHEFS_TEST_CONTAINER"
CSI_CAPABILITIES = "-all,+chown,+dac_override,+fowner"

_HOST = """
set -e
mount --bind "$0" "$0"
mount --make-shared "$0"
closed=$1 held=$2
if [ -n "$closed" ]; then
    shift 2
    for path; do mkdir -p "$held$path"; mount --bind "$path" "$held$path"; done
    mount -t tmpfs -o mode=755 tmpfs "$closed"
    for path; do mkdir -p "$path"; mount --bind "$held$path" "$path"; done
fi
echo ready
exec sleep 3600
"""
_POD = """
import os, sys, time
from hashlib import sha256
directory, expected = sys.argv[1], sys.argv[2:]
names = sorted(os.listdir(directory))
held = {name: os.open(f"{directory}/{name}", os.O_RDONLY) for name in names}
rounds = 0
print("open", flush=True)
while True:
    for name, digest in zip(names, expected, strict=True):
        descriptor = held[name] if rounds % 2 else os.open(f"{directory}/{name}", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        found = sha256()
        offset = 0
        while piece := os.pread(descriptor, 1 << 17, offset):
            found.update(piece)
            offset += len(piece)
        if descriptor != held[name]:
            os.close(descriptor)
        assert found.hexdigest() == digest, f"wrong bytes of {name}"
    rounds += 1
    print(rounds, flush=True)
    time.sleep(0.02)
"""


_VOLUME = """
mount --bind "$1" "$2" && mount --make-$3 "$2" && exec "$4" -c "$5" "$2"
"""
"""As a container runtime gives a volume to a container: a copy of the bind, with a propagation of its own."""
_OPENER = """
import os, sys, time
def fail(error):
    raise error
while True:
    try:
        names = [f"{place}/{name}" for place, _, names in os.walk(sys.argv[1], onerror=fail) for name in names]
        whole = names and all(open(name, "rb").read() for name in names)
        print("ok" if whole else "empty", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
    time.sleep(0.1)
"""


class Container:
    """A command in namespaces of its own."""

    def __init__(self, started: subprocess.Popen[bytes], mark: str, *, own_processes: bool) -> None:
        self._started = started
        self._mark = mark
        self._own_processes = own_processes

    @property
    def first_pid(self) -> int:
        """Who gets SIGTERM."""
        pid = self._started.pid
        if self._own_processes:  # unshare --fork waits for it
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return int(children[0]) if children else pid
        return pid

    @property
    def running(self) -> bool:
        """Whether it is."""
        return self._started.poll() is None

    def kill(self) -> None:
        """End it as a container runtime does when the time is over."""
        wait_until(self._killed, 10, "the container ends")
        self._started.wait(10)

    def _killed(self) -> bool:
        left = processes_with(self._mark)
        for pid in left:
            kill(pid)
        self._started.poll()
        return not left

    def end(self, timeout_s: float = 20.0) -> int:
        """SIGTERM to the first process, then what becomes of those that it leaves; returns its exit code."""
        kill(self.first_pid, signal.SIGTERM)
        code = self._started.wait(timeout_s)
        self.kill()
        return code


class Pod:
    """Reads all files of its volume again and again, half of the time through files that it has held open from the
    beginning, and compares each byte.
    """

    def __init__(self, started: subprocess.Popen[bytes]) -> None:
        self._started = started
        self.rounds = -1
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        assert self._started.stdout is not None
        for line in self._started.stdout:
            self.rounds = 0 if line == b"open\n" else int(line)

    def goes_on(self, rounds: int = 2, timeout_s: float = 30.0) -> None:
        """Wait until everything has been read some times more. Fails when a read has failed."""
        wanted = max(self.rounds, 0) + rounds

        def has() -> bool:
            if self._started.poll() is not None:
                assert self._started.stderr is not None
                raise AssertionError(f"the pod ended: {self._started.stderr.read().decode()[-2000:]}")
            return self.rounds >= wanted

        wait_until(has, timeout_s, f"the pod reads on ({self.rounds} of {wanted} rounds)")

    def end(self) -> None:
        """Close its files."""
        self._started.kill()
        self._started.wait(10)
        self._thread.join(10)
        for pipe in (self._started.stdout, self._started.stderr):
            if pipe is not None:
                pipe.close()


class KubernetesNode:
    """A node with its three containers. Context manager: leaves no process, mount or directory."""

    def __init__(self, environment: Mapping[str, str], endpoint_url: str, *, node_uid: int) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="cachefs-node-")).resolve()
        self.base.chmod(0o755)
        self.node_uid = node_uid
        self.kubelet, self.run, self.cache = (self.base / name for name in ("kubelet", "run", "cache"))
        for directory in (self.kubelet, self.cache, self.base / "csi"):
            directory.mkdir()
        os.chown(self.cache, node_uid, -1)
        self.keeper_socket = str(self.run / "keeper.sock")
        self.csi_socket = self.base / "csi" / "csi.sock"
        self._tag = str(uuid.uuid4())
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "CACHEFS_"))}
        self._environment = {
            **kept,
            "PYTHONPATH": str(REPOSITORY),
            "AWS_EC2_METADATA_DISABLED": "true",
            "CACHEFS_ENDPOINT_URL": endpoint_url,
            "CACHEFS_RUNTIME_DIR": str(self.run / "node"),
            "CACHEFS_CACHE_DIR": str(self.cache),
            "CACHEFS_CACHE_SIZE": "256MiB",
            "CACHEFS_SHM_SIZE": "32MiB",
            "CACHEFS_MEMORY_LIMIT": "128MiB",
            TAG: self._tag,
        }
        self._credentials = {name: text for name, text in environment.items() if name.startswith("AWS_")}
        self._host: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._host = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation=private",
                "sh",
                "-c",
                ALONE + _HOST,
                str(self.kubelet),
                *self._opened(),
            ],
            stdout=subprocess.PIPE,
            env=self._environment,
        )
        assert self._host.stdout is not None
        if self._host.stdout.readline() != b"ready\n":
            self.__exit__()
            raise AssertionError("the host's mount namespace cannot be made")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            wait_until(self._killed, 10, "the containers end")
        finally:
            shutil.rmtree(f"/dev/shm/cachefs-{self.node_uid}-{agent_id(str(self.cache))}", ignore_errors=True)
            shutil.rmtree(self.base, ignore_errors=True)

    def _opened(self) -> list[str]:
        """Return the directory that keeps users without rights from what they need to run cachefs (root's home, as a
        rule), a place for a while, and what they need below it: on this host it is open to them.
        """
        needed = {Path(path).resolve() for path in (sys.base_prefix, sys.prefix, REPOSITORY)}
        closed = {
            next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 1), None): path
            for path in needed
        }
        closed.pop(None, None)
        assert len(closed) <= 1, f"several directories are in the way: {closed}"
        if not closed:
            return ["", ""]
        (directory,) = closed
        below = sorted(str(path) for path in needed if directory in path.parents)
        return [str(directory), str(self.base / "held"), *below]

    def _killed(self) -> bool:
        left = processes_with(f"{TAG}={self._tag}")
        for pid in left:
            kill(pid)
        if self._host is not None:
            if self._host.stdout is not None:
                self._host.stdout.close()
            self._host.wait(10)
        return not left

    # -- containers ---------------------------------------------------------------------------------------------------

    def _enter(self, command: Sequence[str]) -> list[str]:
        assert self._host is not None
        return ["nsenter", "--mount", f"--target={self._host.pid}", "--wd=/", *command]

    def _start(
        self, name: str, command: Sequence[str], *, propagation: str, own_processes: bool = False, **more: str
    ) -> Container:
        apart = ["unshare", "--mount", f"--propagation={propagation}"]
        if own_processes:
            apart += ["--pid", "--fork", "--mount-proc"]
        mark = str(uuid.uuid4())
        with (self.base / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                self._enter([*apart, *command]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, CONTAINER: mark, **more},
                start_new_session=True,
            )
        return Container(started, f"{CONTAINER}={mark}", own_processes=own_processes)

    def start_keeper(self) -> Container:
        """Start the keeper, and return when it listens."""
        container = self._start(
            "keeper",
            [*_cachefs("keeper"), f"--runtime-dir={self.run}", f"--root={self.kubelet}", f"--node-uid={self.node_uid}"],
            propagation="unchanged",
        )
        self._wait_for(container, lambda: bool(self._asked() is not None), "the keeper answers")
        return container

    def start_node(self, *, own_processes: bool = False) -> Container:
        """Start the node service, and return when the keeper knows it."""
        before = self._said("keeper", "is here")
        user = f"{self.node_uid}"
        rights = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        rights += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        container = self._start(
            "node",
            [*rights, *_cachefs("node"), f"--keeper={self.keeper_socket}"],
            propagation="slave",
            own_processes=own_processes,
            **self._credentials,
        )
        self._wait_for(container, lambda: self._said("keeper", "is here") > before, "the keeper knows the node service")
        return container

    def start_csi(self) -> Container:
        """Start the CSI plugin, and return when its socket is there."""
        before = self._said("csi", "listens on")
        rights = ["setpriv", f"--bounding-set={CSI_CAPABILITIES}", f"--inh-caps={CSI_CAPABILITIES}", "--no-new-privs"]
        container = self._start(
            "csi",
            [
                *rights,
                *_cachefs("csi"),
                "--mode=node",
                "--node-id=n1",
                f"--endpoint=unix://{self.csi_socket}",
                f"--keeper={self.keeper_socket}",
                f"--credentials-dir={self.run}/credentials",
                f"--kubelet-dir={self.kubelet}",
                f"--node-uid={self.node_uid}",
            ],
            propagation="slave",
        )
        self._wait_for(container, lambda: self._said("csi", "listens on") > before, "the plugin listens")
        return container

    def start_pod(self, target: Path, digests: Sequence[str], *, propagation: str) -> Pod:
        """Start a pod whose volume is what is mounted on `target`."""
        command = ["unshare", "--mount", f"--propagation={propagation}"]
        started = subprocess.Popen(
            self._enter([*command, sys.executable, "-c", _POD, str(target), *digests]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
        )
        return Pod(started)

    def unmount_as_kubelet(self, path: Path) -> None:
        """Unmount until nothing is mounted there: kubelet tries again and again."""
        while subprocess.run(self._enter(["umount", str(path)]), capture_output=True, check=False).returncode == 0:
            pass
        path.rmdir()

    @contextlib.contextmanager
    def opener(self, target: Path, propagation: str, part: str = "") -> Iterator[Callable[[], str]]:
        """Run a container that opens all files of its volume again and again; the function tells how it went last.
        `part`: what it has as subPath, of which kubelet makes a bind first.
        """
        if part:
            target, whole = self.kubelet / "pods/a/volume-subpaths/pv/main/0", target
            target.mkdir(parents=True)
            subprocess.run(self._enter(["mount", "--bind", str(whole / part), str(target)]), check=True)
        inside = Path(tempfile.mkdtemp(prefix="volume-", dir=self.base))
        words = ["sh", "-c", _VOLUME, "volume", str(target), str(inside), propagation, sys.executable, _OPENER]
        said = self.base / f"{inside.name}.said"
        with said.open("wb") as output:
            started = subprocess.Popen(
                self._enter(["unshare", "--mount", "--propagation=slave", *words]),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environment,
            )  # fmt: skip
        try:
            yield lambda: (said.read_text().splitlines() or [""])[-1]
        finally:
            started.kill()
            started.wait(10)

    def _wait_for(self, container: Container, condition: Callable[[], bool], what: str) -> None:
        def holds() -> bool:
            assert container.running, f"it ended: {self.logs()}"
            return condition()

        try:
            wait_until(holds, START_S, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from error

    # -- looking ------------------------------------------------------------------------------------------------------

    def _asked(self) -> KeeperClient | None:
        client = KeeperClient(self.keeper_socket, 2.0)
        try:
            client.status()
        except KeeperError:
            return None
        return client

    def _said(self, name: str, words: str) -> int:
        """Return how often a container has logged this."""
        path = self.base / f"{name}.log"
        return path.read_text(errors="replace").count(words) if path.exists() else 0

    def keeper(self) -> KeeperClient:
        """Somebody who asks the keeper."""
        return KeeperClient(self.keeper_socket, 10.0)

    def mounts(self) -> list[str]:
        """Return where the host has file systems of ours."""
        table = subprocess.run(self._enter(["cat", "/proc/self/mountinfo"]), capture_output=True, text=True, check=True)
        lines = [line for line in table.stdout.splitlines() if " fuse.cachefs " in line]
        below = f"{self.kubelet}/"
        places = (line.split()[4] for line in lines)
        return sorted(place.removeprefix(below) for place in places if place.startswith(below))

    def logs(self) -> str:
        """Return the end of all logs."""
        paths = [*sorted(self.base.glob("*.log")), *sorted(self.run.glob("*/*/*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in paths)


def _cachefs(command: str) -> list[str]:
    return [sys.executable, "-m", "cachefs.cli.main", command]
