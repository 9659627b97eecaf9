"""The sidecar of a pod; the mounts of kubelet and of a container that reads are played by name spaces here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.mount import mountinfo
from tests.support.machine import ALONE, wait_until
from tests.support.mounts import CACHEFS, Bucket, Node
from tests.support.programs import REPOSITORY, content

pytestmark = pytest.mark.usefixtures("needs_root")
OBJECTS = {"first": content("first", 70_000), "second": content("second", 70_001)}


class Pod:
    """A volume on a shared mount, as kubelet has it, and a container that sees a directory of it (subPath)."""

    def __init__(self, node: Node, bucket: Bucket) -> None:
        self.node = node
        self.bucket = bucket
        self.shared = node.base / "pod"
        self.place = self.shared / "volume" / "mount"
        self.seen = self.shared / "subpath"
        self.reader: subprocess.Popen[bytes] | None = None
        self.started = 0

    def make(self) -> None:
        self.shared.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "pod", self.shared], check=True)
        subprocess.run(["mount", "--make-shared", self.shared], check=True)
        self.place.parent.mkdir()
        self.seen.mkdir()

    def start_sidecar(self, *options: str, source: str = "") -> subprocess.Popen[bytes]:
        self.started += 1
        own = [each for each in self.node.options if not each.startswith("--runtime-dir")]
        where = f"--endpoint-url={self.bucket.server.endpoint_url}"
        run_dir = f"--run-dir={self.node.base}/run"
        sidecar = [*CACHEFS, "sidecar", run_dir, source or self.bucket.url, str(self.place), *own, where, *options]
        with (self.node.base / f"sidecar-{self.started}.log").open("wb") as log:
            return subprocess.Popen(
                ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", f'{ALONE}exec "$@"', "sh", *sidecar],
                env={**self.node.environment, "OWN_MOUNTS": str(self.node.base)}, cwd=REPOSITORY,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def log(self) -> str:
        return (self.node.base / f"sidecar-{self.started}.log").read_text(errors="replace")

    def is_ready(self) -> bool:
        return self.node.run("sidecar", "--check", str(self.place)).returncode == 0

    def start_reader(self) -> None:
        """What kubelet does for a container with a subPath and HostToContainer."""
        subprocess.run(["mount", "--bind", self.place, self.seen], check=True)
        script = f"{ALONE}mount --make-rslave {self.shared} && echo && exec sleep 1000"
        command = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script]
        environment = {**os.environ, "OWN_MOUNTS": str(self.node.base)}
        self.reader = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert self.reader.stdout is not None
        self.reader.stdout.readline()

    def read(self, name: str) -> bytes | None:
        """Read a file in the container that runs since the beginning."""
        assert self.reader is not None
        command = ["nsenter", f"--target={self.reader.pid}", "--mount", "cat", str(self.seen / name)]
        done = subprocess.run(command, capture_output=True, check=False)
        return done.stdout if done.returncode == 0 else None

    def kill_container(self) -> None:
        """Kill all processes of the sidecar at once; what they have mounted stays, and nobody serves it."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in self.node.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        wait_until(lambda: not self.node.processes(), 5, "everybody is dead")

    def remove(self) -> None:
        self.node.kill_everything()
        if self.reader is not None:
            self.reader.kill()
            self.reader.communicate()
        for _ in range(100):
            below = [mount.mountpoint for mount in mountinfo.mounts() if mount.mountpoint.startswith(str(self.shared))]
            if not below:
                return
            with contextlib.suppress(subprocess.CalledProcessError):
                subprocess.run(["umount", "--lazy", max(below, key=len)], check=True, capture_output=True)


@pytest.fixture
def pod(node: Node, bucket: Bucket) -> Iterator[Pod]:
    bucket.fill(OBJECTS)
    made = Pod(node, bucket)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def ended(sidecar: subprocess.Popen[bytes], timeout_s: float) -> tuple[int, float]:
    began = time.monotonic()
    return sidecar.wait(timeout_s), time.monotonic() - began


def test_a_sidecar_that_is_killed_comes_back_for_containers_that_run_on(pod: Pod) -> None:
    first = pod.start_sidecar()
    assert not pod.is_ready()
    wait_until(pod.is_ready, 20, "the mount answers")
    pod.start_reader()
    assert pod.read("first") == OBJECTS["first"]

    pod.kill_container()  # as the kernel does when the container has used up its memory
    first.wait(5)
    assert pod.read("second") is None
    assert not pod.is_ready()

    second = pod.start_sidecar()
    wait_until(pod.is_ready, 20, "the mount answers again")
    assert pod.read("second") == OBJECTS["second"]
    assert pod.read("first") == OBJECTS["first"]

    # kubelet's bind of the subPath is still there, and must not make a Job wait
    second.send_signal(signal.SIGTERM)
    code, took_s = ended(second, 15)
    assert code == 0, pod.log()
    assert took_s < 6
    left = [mount for mount in mountinfo.mounts() if mount.mountpoint.startswith(str(pod.place.parent))]
    assert left == [], "kubelet could not remove the volume"
    assert not [pid for pid in pod.node.processes() if "agent" not in _command(pid)]


def test_a_sidecar_ends_with_its_mount_so_that_kubelet_starts_another(pod: Pod) -> None:
    sidecar = pod.start_sidecar()
    wait_until(pod.is_ready, 20, "the mount answers")
    [supervisor] = pod.node.processes("supervisor")
    os.kill(supervisor, signal.SIGKILL)
    assert ended(sidecar, 10)[0] != 0
    assert mountinfo.find_mount(str(pod.place)), "the next one mounts over it, or containers that run on lost it"


def test_a_sidecar_ends_at_once_while_it_starts(pod: Pod) -> None:
    sidecar = pod.start_sidecar()
    wait_until(lambda: list(pod.node.base.glob("run/s-*/mount")), 20, "it begins")
    sidecar.send_signal(signal.SIGTERM)
    code, took_s = ended(sidecar, 25)
    assert (code, took_s < 10) == (0, True), pod.log()
    assert not mountinfo.find_mount(str(pod.place))


def test_a_bucket_that_is_not_there_is_said_and_ends_the_sidecar(pod: Pod) -> None:
    sidecar = pod.start_sidecar(source="s3://no-such-bucket-at-all")
    assert ended(sidecar, 20)[0] == 1
    assert "no-such-bucket-at-all" in pod.log()
    assert not mountinfo.find_mount(str(pod.place))


@pytest.mark.parametrize("words", [[], ["s3://b"], ["--check"], ["--check", "/a", "/b"], ["--x", "/a"]])
def test_wrong_words_are_refused(node: Node, words: list[str]) -> None:
    done = node.run("sidecar", *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return os.fsdecode(b"agent: gone meanwhile")
