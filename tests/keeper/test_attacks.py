"""What tenants, full file systems and clumsy hands do to the keeper: it goes on, and what it promised it keeps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachefs.keeper.binds import Ground
from cachefs.keeper.client import KeeperError
from cachefs.keeper.repair import Repair
from cachefs.mount import mountinfo
from cachefs.mount.journal import Journal
from cachefs.mount.kernel import FSTYPE
from cachefs.mount.mountinfo import Answer
from tests.keeper.rig import CONTENT, KubeletNode
from tests.support.machine import kill, wait_until
from tests.support.mounts import Bucket

STRANGER = 61234
CROWD = """
import os, socket, sys, time
os.setuid(int(sys.argv[2]))
crowd = []
for _ in range(600):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    crowd.append(connection)
print("here", flush=True)
time.sleep(60)
"""


@pytest.fixture
def volume(bucket: Bucket) -> str:
    bucket.put("a/file", CONTENT)
    return bucket.url


def ask(node: KubeletNode, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(node.socket)
        connection.sendall(line)
        return connection.makefile("rb").readline()


def test_json_that_is_nested_too_deeply_is_refused(node: KubeletNode) -> None:
    assert json.loads(ask(node, b"[" * 200_000 + b"\n"))["kind"] == "usage"
    with socket.socket(socket.AF_UNIX) as connection:  # and from a node service
        connection.settimeout(5)
        connection.connect(node.socket)
        connection.sendall(b'{"command": "runner", "version": "x", "pid": 1}\n')
        stream = connection.makefile("rb")
        assert json.loads(stream.readline()) == {"ok": True}
        body = b"[" * 200_000
        connection.sendall(len(body).to_bytes(4, "big") + b"\0" + body)
        assert stream.read() == b""
    wait_until(lambda: node.status().runner is not None, 5.0, "the node service is still known")


def test_a_crowd_of_strangers_does_not_keep_others_out(make_node: Callable[..., KubeletNode]) -> None:
    node = make_node()
    node.start_keeper()
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-S", "-c", CROWD, node.socket, str(STRANGER)], stdout=subprocess.PIPE
    ) as crowd:
        try:
            assert crowd.stdout is not None
            assert crowd.stdout.readline() == b"here\n"
            for _ in range(20):
                assert node.status().mounts == ()
        finally:
            crowd.kill()


def test_without_room_for_a_record_nothing_is_mounted_or_bound(node: KubeletNode, volume: str) -> None:
    node.mount("first", volume)
    records = node.run / "keeper/records"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(records)], check=True)
    try:
        (records / "full").write_bytes(b"x" * 4096)
        with pytest.raises(KeeperError, match="cannot write down what it mounts: No space left") as caught:
            node.client.mount("second", node.plan(volume), environment={}, fingerprint="f", labels={}, timeout_s=20)
        assert caught.value.kind == "MountError"
        target = str(node.target("one"))
        with pytest.raises(KeeperError, match="No space left"):
            node.client.bind("first", target, read_only=True)
        assert [mount.key for mount in node.status().mounts] == ["first"]
        assert [mount.targets for mount in node.status().mounts] == [()]
        assert node.mounted() == [node.state("first").mountpoint]
        assert [path.name for path in records.iterdir()] == ["full"]
    finally:
        subprocess.run(["umount", str(records)], check=True)
    node.mount("second", volume)
    node.client.bind("first", target, read_only=True)
    assert node.read(Path(target) / "a/file") == CONTENT


def test_a_mount_that_somebody_takes_from_its_place_is_put_back(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    one, two = node.target("one"), node.target("two")
    node.client.bind("vol", str(one), read_only=True)
    subprocess.run(["umount", "-l", node.state("vol").mountpoint], check=True)
    node.client.bind("vol", str(two), read_only=True)
    assert node.read(two / "a/file") == CONTENT
    assert node.state("vol").mountpoint in node.mounted()


def test_a_mount_that_somebody_takes_from_everywhere_can_be_made_again(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    target = node.target("one")
    node.client.bind("vol", str(target), read_only=True)
    with (target / "a/file").open("rb") as held:
        for place in (node.state("vol").mountpoint, str(target)):
            subprocess.run(["umount", "-l", place], check=True)
        with pytest.raises(KeeperError) as caught:
            node.client.bind("vol", str(target), read_only=True)
        assert caught.value.kind == "missing"
        node.mount("vol", volume)
        node.client.bind("vol", str(target), read_only=True)
        assert node.read(target / "a/file") == CONTENT
        assert held.read() == CONTENT


class Late:
    """A prober whose answers come when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Callable[[Answer], object]] = []

    def ask(self, path: str, on_answer: Callable[[Answer], object]) -> None:
        self.asked.append(on_answer)


class Recorded:
    """A mount that is known from a record."""

    supervision = None

    def __init__(self) -> None:
        self.record = SimpleNamespace(key="vol", identity="0:999", targets={}, leaving=False)
        self.revived = 0

    def salvage(self) -> bool:
        return False

    def revive(self) -> bool:
        self.revived += 1
        return True


@pytest.mark.parametrize("ends", [False, True])
def test_a_mount_that_ends_while_it_is_asked_is_not_made_anew(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, prober, done = Recorded(), Late(), list[object]()
    there = mountinfo.Mount(1, 1, "0:999", "/", "/kubelet/places/vol", "ro", FSTYPE, "s3://b")
    monkeypatch.setattr(mountinfo, "mounts", lambda: [there])
    inventory: Any = SimpleNamespace(mounts=[kept], informed=True)
    journal = Journal("error", as_json=False)
    Repair(inventory, Ground("/kubelet", "/kubelet/places"), prober, journal).begin(done.append)  # type: ignore[arg-type]
    if ends:
        inventory.mounts.clear()
    prober.asked.pop()(Answer.DEAD)
    assert (kept.revived, len(done)) == (0 if ends else 1, 1)


def test_what_a_keeper_leaves_that_is_killed_while_it_writes_is_removed(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    left = node.run / "keeper/records/vol.12345678.json.1.tmp"
    left.write_bytes(b"{")
    kill(node.keepers[-1].pid)
    node.keepers[-1].wait(10)
    node.start_keeper()
    assert not left.exists()
    assert os.path.ismount(node.state("vol").mountpoint)


def test_directories_of_the_last_boot_are_removed(make_node: Callable[..., KubeletNode]) -> None:
    node = make_node()
    places = node.root / "plugins/cachefs.csi.k8s.io/mounts"
    (places / "v-old").mkdir(parents=True)
    (places / "v-used/by-somebody").mkdir(parents=True)
    node.start_keeper()
    wait_until(lambda: os.listdir(places) == ["v-used"], 5, "the empty directory is gone")


def asked_again(node: KubeletNode, ask: Callable[[], object]) -> None:
    """Do as the plugin and kubelet do: a call that fails is repeated; the keeper is started when it is dead."""
    for _ in range(60):
        try:
            ask()
            return
        except KeeperError:
            if node.keepers[-1].poll() is not None:
                node.start_keeper()
            time.sleep(0.2)
    raise AssertionError(node.logs())


SLOW = [
    pytest.param(point, count, marks=pytest.mark.slow)
    for point, count in (
        ("mount", 1), ("mount+", 1), ("save", 1), ("save+", 1), ("save", 2), ("save", 3), ("save", 5), ("save+", 5),
        ("bind", 1), ("bind", 2), ("bind+", 2), ("unbind", 1), ("unbind+", 1), ("unmount", 1), ("unmount+", 1),
    )
]  # fmt: skip


@pytest.mark.parametrize(("point", "count"), [("save", 4), ("bind+", 1), *SLOW])
def test_a_keeper_that_dies_at_any_point_leaves_nothing_half(
    make_node: Callable[..., KubeletNode], volume: str, point: str, count: int
) -> None:
    node = make_node()
    node.start_keeper(point, str(count))
    node.start_service(wait=False)
    target = str(node.target("one"))

    def mount() -> None:
        node.client.mount("vol", node.plan(volume), environment={}, fingerprint="f", labels={}, timeout_s=5)

    def bind() -> None:
        try:
            node.client.bind("vol", target, read_only=True)
        except KeeperError as error:
            if error.kind == "missing":
                mount()
            raise

    asked_again(node, mount)
    asked_again(node, bind)
    asked_again(node, bind)
    assert node.read(Path(target) / "a/file") == CONTENT
    asked_again(node, lambda: node.client.unbind(target))
    asked_again(node, lambda: node.client.unmount("vol"))
    assert len(node.keepers) == 2, "it never died"
    wait_until(lambda: node.status().mounts == (), 10, "the mount has ended")
    assert node.mounted() == []
    assert os.listdir(node.run / "keeper/records") == []
