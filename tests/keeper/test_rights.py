"""The node service has no rights, and others on the node may not ask the keeper for anything."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.mount.wakeup import DEVICE
from cachefs.runtime import RuntimeDir
from tests.keeper.rig import CONTENT, KubeletNode
from tests.support.machine import kill, wait_until
from tests.support.mounts import Bucket

NOBODY = 65534
NODE = 65532

ASK = """
import json, os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(5)
    connection.connect(sys.argv[1])
    connection.sendall(sys.argv[3].encode() + b"\\n")
    print(connection.makefile().readline())
"""


def ask_as(node: KubeletNode, uid: int, request: dict[str, object]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ASK, node.socket, str(uid), json.dumps(request)],
        capture_output=True, text=True, timeout=10, check=True,
    )  # fmt: skip
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.fixture
def unprivileged(make_node: Callable[..., KubeletNode]) -> KubeletNode:
    node = make_node(node_uid=NODE)
    node.start_keeper()
    node.start_service()
    return node


def test_a_node_service_that_is_there_first_waits_for_its_directory(make_node: Callable[..., KubeletNode]) -> None:
    node = make_node(node_uid=NODE)
    node.run.mkdir(mode=0o755)  # as kubelet makes it, for root alone to write
    service = node.start_service(wait=False)
    wait_until(lambda: "waiting for the keeper" in node.logs(), 10, "it waits")
    assert service.poll() is None
    node.start_keeper()
    node.wait_for_service(service)


def test_workers_without_rights_serve_and_survive(unprivileged: KubeletNode, bucket: Bucket) -> None:
    node = unprivileged
    bucket.put("a/file", CONTENT)
    node.mount("vol", bucket.url)
    target = node.target("one")
    node.client.bind("vol", str(target), read_only=True)
    with node.reader(target / "a/file", CONTENT):
        worker = node.wait_for_worker("vol")
        for pid in (worker, node.agent_pid):
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{NODE}\t{NODE}\t{NODE}\t{NODE}" in status
            assert "CapEff:\t0000000000000000" in status
        kill(worker)
        worker = node.wait_for_worker("vol", worker)
        kill(node.keepers[-1].pid)
        node.keepers[-1].wait()
        node.start_keeper()
        node.wait_for_worker("vol", worker)
    assert node.state("vol").restarts == 1
    if os.path.exists(DEVICE):
        node.mount("awake", bucket.url, fingerprint="g", low_latency="always")
        wait_until(lambda: struct.unpack("i", Path(DEVICE).read_bytes()) == (0,), 5, "it keeps CPUs awake")
        states = RuntimeDir(str(node.run / "keeper")).mount_states()
        assert node.state("awake").worker_pid in [state["worker_pid"] for state in states if state["guard_held"]]
        node.client.unmount("awake")
    node.client.unbind(str(target))
    node.client.unmount("vol")
    wait_until(lambda: not node.processes("cachefs.mount.worker"), 5, "the worker ends")
    assert os.stat(node.run / "node").st_uid == NODE
    assert os.stat(node.run / "keeper").st_mode & 0o777 == 0o700
    assert os.stat(node.run / "keeper").st_uid == 0


def test_who_may_ask_what(unprivileged: KubeletNode) -> None:
    node = unprivileged
    for command in ("mount", "unmount", "bind", "unbind", "label", "reconcile", "status", "runner"):
        answer = ask_as(node, NOBODY, {"command": command, "key": "a", "target": "/x"})
        assert (answer["ok"], answer["kind"]) == (False, "AccessDenied"), command
    for command in ("mount", "unmount", "bind", "unbind", "label", "reconcile"):
        answer = ask_as(node, NODE, {"command": command, "key": "a", "target": "/x"})
        assert (answer["ok"], answer["kind"]) == (False, "AccessDenied"), command
    assert ask_as(node, NODE, {"command": "status"})["ok"]
    assert ask_as(node, 0, {"command": "unmount", "key": "a"}) == {"ok": True, "found": False}


def test_nonsense_does_not_disturb_the_keeper(node: KubeletNode) -> None:
    for line in (
        b"{",
        b"[]",
        b"null",
        b'{"command": "mount"}',
        b'{"command": 7}',
        b"\xff\xfe",
        b'{"command": "bind", "key": "x"}',
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(node.socket)
            connection.sendall(line + b"\n")
            answer = json.loads(connection.makefile().readline())
            assert answer["kind"] in ("usage", "missing"), (line, answer)
    with socket.socket(socket.AF_UNIX) as connection:  # a runner that speaks nonsense is hung up on
        connection.settimeout(5)
        connection.connect(node.socket)
        connection.sendall(b'{"command": "runner", "version": "x", "pid": 1}\n')
        stream = connection.makefile("rb")
        assert json.loads(stream.readline()) == {"ok": True}
        connection.sendall(b"\xff" * 64)
        assert stream.read() == b""
    assert node.status().runner is not None


def test_there_is_one_keeper(node: KubeletNode) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cachefs.keeper", f"--runtime-dir={node.run}", f"--root={node.root}"],
        capture_output=True, text=True, timeout=20, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    assert "another keeper is running here" in done.stderr
    assert node.status().runner is not None


def test_a_keeper_without_rights_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "--",
         sys.executable, "-m", "cachefs.keeper", f"--runtime-dir={tmp_path}/run", f"--root={tmp_path}"],
        capture_output=True, text=True, timeout=20, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("cachefs: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--root=/nonexistent"], 1), (["--no-such-option"], 2), (["--node-uid=x"], 2), (["--help"], 0)],
)
def test_the_command_line(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cachefs.cli.main", "keeper", f"--runtime-dir={tmp_path}/run", *arguments],
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == code
    if code:
        assert done.stderr.startswith("cachefs: ")
        assert done.stderr.count("\n") == 1
