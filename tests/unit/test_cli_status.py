"""`cachefs status`: what it makes of state files and agents' answers, and that nothing can make it hang."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cachefs.agent import messages
from cachefs.cli import status
from cachefs.runtime import RuntimeDir, mount_id, write_state

AGENT_STATUS: dict[str, Any] = {
    "agent_pid": 4711,
    "version": "0.1.0",
    "cache_dir": "/var/cache/cachefs",
    "log_file": "/run/agent.log",
    "uptime_s": 61.0,
    "rss_anon_bytes": 90 << 20,
    "memory_limit_bytes": 256 << 20,
    "tiers": {
        "shm": {"state": "on", "used_bytes": 1 << 30, "limit_bytes": 2 << 30, "blocks": 1024},
        "disk": {"state": "on", "used_bytes": 3 << 30, "limit_bytes": 20 << 30, "blocks": 3072},
        "fills": {"under_way": 2, "held_bytes": 1 << 20, "budget_bytes": 1 << 27, "origin": 10, "inline": 0},
    },
    "counters": {"disk_hits": 30, "origin_fills": 10, "origin_requests": 12, "origin_bytes": 10 << 20},
    "mounts": {},
    "volumes": {"v1": {"source": "s3://bucket/p", "objects": 1000, "bytes": 5 << 30, "hidden_keys": 2}},
}


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir(str(tmp_path / "run"))


@pytest.fixture
def process() -> Iterator[int]:
    """A living process that looks like one of ours."""
    script = "import time\nprint('here', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, "cachefs"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # before that the kernel may not have its command line yet
        yield child.pid
        child.kill()


def add_mount(runtime: RuntimeDir, mountpoint: str, pid: int, **more: Any) -> str:
    identity = mount_id(mountpoint)
    state = {
        "mount_id": identity, "mountpoint": mountpoint, "source": "s3://bucket/p", "version": "0.1.0",
        "supervisor_pid": pid, "worker_pid": pid, "agent_pid": 4711, "state": "serving", "restarts": 0,
        "last_crash": None, "started_at": time.time() - 125, "engine": "channel", "consistency": "ttl",
        "log_file": "/x.log", "guard_held": False, "cache_dir": "/var/cache/cachefs",
    }  # fmt: skip
    write_state(runtime.mount(identity, "json"), {**state, **more})
    return identity


@contextlib.contextmanager
def agent(runtime: RuntimeDir, mounts: dict[str, Any], *, silent: bool = False, **more: Any) -> Iterator[str]:
    """An agent that speaks the protocol over a real socket."""
    path = runtime.agent("/var/cache/cachefs", "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    length = struct.unpack(">I", connection.recv(4, socket.MSG_WAITALL))[0]
                    request = msgspec.msgpack.decode(connection.recv(length), type=messages.Request)
                    assert isinstance(request, messages.Status)
                    if silent:
                        connection.recv(1)  # until the other side has had enough
                        continue
                    answer = messages.StatusReply(id=request.id, status={**AGENT_STATUS, "mounts": mounts, **more})
                    body = msgspec.msgpack.encode(answer)
                    connection.sendall(struct.pack(">I", len(body)) + body)

        thread = threading.Thread(target=serve, name="agent")
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def attached(identity: str, **counters: float) -> dict[str, Any]:
    return {identity: {"mountpoint": "/mnt/a", "volume_id": "v1", "counters": counters}}


def invoke(runtime: RuntimeDir, *arguments: str) -> Result:
    return CliRunner().invoke(status.status, [*arguments, "--runtime-dir", runtime.path], standalone_mode=False)


def test_nothing_is_mounted_and_nothing_is_created(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(status.status, ["--runtime-dir", str(tmp_path / "none")], standalone_mode=False)
    assert outcome.output == "nothing is mounted\n"
    assert outcome.return_value == 0
    assert not (tmp_path / "none").exists()


def test_a_mount_that_is_well(runtime: RuntimeDir, process: int) -> None:
    identity = add_mount(runtime, "/mnt/a", process)
    with agent(runtime, attached(identity, fuse_reads=200, read_misses=50, fuse_read_bytes=1 << 30)):
        document = status.collect(runtime.path)
        [mount], [known] = document["mounts"], document["agents"]
        assert tuple(mount) == status.MOUNT_KEYS
        assert tuple(known) == status.AGENT_KEYS
        assert (mount["health"], mount["problems"]) == ("ok", [])
        assert mount["hit_ratio"] == {"shm": 0.75, "disk": 0.75}
        assert mount["volume_id"] == "v1"
        assert known["mount_ids"] == [identity]
        assert set(known["tiers"]) == {"shm", "disk"}
        assert known["fills"]["under_way"] == 2

        outcome = invoke(runtime, "/mnt/a")
        assert outcome.return_value == 0
        assert "/mnt/a       s3://bucket/p  ok           75%        75%    200  1 GiB         0  2m" in outcome.output
        assert "shm   on, 1 GiB of 2 GiB, 1,024 blocks" in outcome.output
        assert "store 12 requests, 10 MiB, 0 retries, 0 errors" in outcome.output
        assert "1,000 objects, 5 GiB, 2 hidden keys" in outcome.output
        assert json.loads(invoke(runtime, "--json").output)["mounts"][0]["mount_id"] == identity


def test_counters_stand_in_one_place_each(runtime: RuntimeDir, process: int) -> None:
    """So that a program may add up all of them."""
    with agent(runtime, attached(add_mount(runtime, "/mnt/a", process), fuse_reads=7)):
        text = json.dumps(status.collect(runtime.path))
    assert text.count('"fuse_reads"') == 1
    assert text.count('"origin_requests"') == 1


def test_before_the_first_read_there_is_no_ratio(runtime: RuntimeDir, process: int) -> None:
    identity = add_mount(runtime, "/mnt/a", process)
    with agent(runtime, attached(identity), counters={}):
        assert status.collect(runtime.path)["mounts"][0]["hit_ratio"] == {"shm": None, "disk": None}


def test_parts_of_other_versions_are_said_and_are_no_problem(runtime: RuntimeDir, process: int) -> None:
    identity = add_mount(runtime, "/mnt/a", process, version="0.3.0", supervisor_version="0.2.0")
    with agent(runtime, attached(identity)):
        outcome = invoke(runtime, "/mnt/a")
        mount = status.collect(runtime.path)["mounts"][0]
    assert (mount["version"], mount["supervisor_version"], mount["agent_version"]) == ("0.3.0", "0.2.0", "0.1.0")
    assert mount["problems"] == []
    assert "its worker is version 0.3.0, its agent 0.1.0" in outcome.output
    assert "its worker is version 0.3.0, its supervisor 0.2.0" in outcome.output


@pytest.mark.parametrize(
    ("changes", "health", "says"),
    [
        ({"state": "restarting"}, "degraded", "the mount is restarting"),
        ({"state": "starting", "worker_pid": None}, "degraded", "the mount is starting"),
        ({"worker_pid": None}, "degraded", "about to be restarted"),
        ({"state": "failed", "last_crash": {"at": 1.0, "what": "signal 11"}}, "failed", "11): `cachefs upgrade"),
        ({"state": "failed"}, "failed", "`cachefs umount /mnt/a` takes it away"),
        ({"supervisor_pid": 1 << 30}, "dead", "its worker still serves but would not be restarted"),
        ({"supervisor_pid": 1 << 30, "worker_pid": None}, "dead", "nothing serves it"),
        ({"supervisor_pid": None}, "dead", "`cachefs umount /mnt/a`, then mount again"),
        ({"supervisor_pid": 1}, "dead", "the supervisor is gone"),  # a number that another program has now
    ],
)  # fmt: skip
def test_health(runtime: RuntimeDir, process: int, changes: dict[str, Any], health: str, says: str) -> None:
    identity = add_mount(runtime, "/mnt/a", process, **changes)
    with agent(runtime, attached(identity)):
        outcome = invoke(runtime, "/mnt/a")
        mount = status.collect(runtime.path)["mounts"][0]
    assert mount["health"] == health
    assert says in mount["problems"][0]
    assert outcome.return_value == 1
    assert mount["problems"][0] in outcome.output
    assert "log: /x.log" in outcome.output


def test_a_tier_that_is_off_is_a_problem_unless_nobody_wants_it(runtime: RuntimeDir, process: int) -> None:
    identity = add_mount(runtime, "/mnt/a", process)
    tiers = {
        "shm": {"state": "off", "used_bytes": 0, "limit_bytes": 0, "blocks": 0},
        "disk": {"state": "full", "used_bytes": 1, "limit_bytes": 20 << 30, "blocks": 1},
    }
    with agent(runtime, attached(identity), tiers=tiers) as path:
        mount = status.collect(runtime.path)["mounts"][0]
    os.unlink(path)
    assert mount["health"] == "degraded"
    assert len(mount["problems"]) == 1
    assert "the disk tier is full" in mount["problems"][0]
    assert "the agent's log says why: /run/agent.log" in mount["problems"][0]
    tiers["disk"] |= {"state": "off", "reason": "no such disk"}
    with agent(runtime, attached(identity), tiers=tiers):
        mount = status.collect(runtime.path)["mounts"][0]
    assert mount["problems"] == ["the disk tier is off, so other sources serve; no such disk"]


def test_an_agent_that_is_no_peer_for_now_is_a_problem_of_its_mounts(runtime: RuntimeDir, process: int) -> None:
    identity = add_mount(runtime, "/mnt/a", process)
    away = {"problem": "the secret\x1b is gone", "cluster": "lab", "etcd": {"connected": False}, "members": []}
    with agent(runtime, attached(identity), cluster=away) as path:
        document = status.collect(runtime.path)
    os.unlink(path)
    assert document["mounts"][0]["health"] == "degraded"
    [problem] = document["mounts"][0]["problems"]
    assert problem == "it has no peers for now, and its agent tries again by itself: the secret\x1b is gone"
    shown = "\n".join(status.render(document))
    assert "  peers none for now: the secret" in shown
    assert "\x1b" not in shown
    with agent(runtime, attached(identity), cluster={**away, "problem": None}):
        assert status.collect(runtime.path)["mounts"][0]["health"] == "ok", "etcd alone is no problem of a mount"


def test_a_store_that_does_not_answer_is_a_problem_of_its_mounts(runtime: RuntimeDir, process: int) -> None:
    identity = add_mount(runtime, "/mnt/a", process)
    origin = {
        "failing": True, "since": time.time() - 200, "failures": 12, "last_error": "refused", "last_error_at": 1.0,
    }  # fmt: skip
    volumes = {"v1": {"source": "s3://bucket/p", "objects": 1, "bytes": 1, "hidden_keys": 0, "origin": origin}}
    with agent(runtime, attached(identity), volumes=volumes) as path:
        mount = status.collect(runtime.path)["mounts"][0]
    os.unlink(path)
    assert mount["health"] == "degraded"
    assert mount["problems"] == [
        "the store has not answered for 3m, 12 requests failed in a row, so only what is cached can be read; "
        "the last: refused"
    ]
    with agent(runtime, attached(identity), volumes={"v1": {**volumes["v1"], "origin": {"failing": False}}}):
        assert status.collect(runtime.path)["mounts"][0]["health"] == "ok"


def test_an_agent_that_does_not_answer(runtime: RuntimeDir, process: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "AGENT_TIMEOUT_S", 0.1)
    add_mount(runtime, "/mnt/a", process)
    with agent(runtime, {}, silent=True) as path:
        document = status.collect(runtime.path)
        assert document["mounts"][0]["health"] == "degraded"
        assert "agent does not answer" in document["mounts"][0]["problems"][0]
        assert document["agents"][0]["socket"] == path
        assert document["agents"][0]["agent_pid"] is None
        assert f"AGENT at {path} does not answer" in "\n".join(status.render(document))


def test_an_agent_whose_backlog_is_full(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process accepts nothing, and then connecting itself waits."""
    monkeypatch.setattr(status, "AGENT_TIMEOUT_S", 0.1)
    path = runtime.agent("/c", "sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(path)
        assert status.ask_agent(path) == {}


def test_sockets_of_dead_agents_are_not_agents(runtime: RuntimeDir, process: int) -> None:
    add_mount(runtime, "/mnt/a", process)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(runtime.agent("/c", "sock"))
    document = status.collect(runtime.path)
    assert document["agents"] == []
    assert document["mounts"][0]["health"] == "degraded"
    assert document["mounts"][0]["agent_pid"] == 4711


def test_one_mount_of_several(runtime: RuntimeDir, process: int, tmp_path: Path) -> None:
    place = tmp_path / "b"
    place.mkdir()
    link = tmp_path / "link"
    link.symlink_to(place)
    add_mount(runtime, "/mnt/a", process)
    identity = add_mount(runtime, str(place), process)
    with agent(runtime, attached(identity)):
        document = json.loads(invoke(runtime, "--json", str(link)).output)
        assert [mount["mount_id"] for mount in document["mounts"]] == [identity]
        assert len(document["agents"]) == 1
        assert len(json.loads(invoke(runtime, "--json").output)["mounts"]) == 2
        assert json.loads(invoke(runtime, "--json", "/mnt/a").output)["mounts"][0]["agent_pid"] == 4711


def test_a_mount_point_that_is_not_known(runtime: RuntimeDir) -> None:
    outcome = invoke(runtime, "--json", "/mnt/unknown")
    assert outcome.return_value == 1
    assert json.loads(outcome.stdout)["mounts"] == []
    assert "/mnt/unknown is not a mount of cachefs" in outcome.stderr


def test_torn_and_foreign_state_files(runtime: RuntimeDir, process: int) -> None:
    add_mount(runtime, "/mnt/a", process)
    for name, text in (("torn", '{"mount_id": "x'), ("list", "[1, 2]"), ("number", "7"), ("empty", "")):
        Path(runtime.path, "mounts", f"{name}.json").write_text(text)
    Path(runtime.path, "mounts", "sparse.json").write_text('{"mount_id": "sparse"}')
    document = status.collect(runtime.path)
    assert [mount["health"] for mount in document["mounts"]] == ["degraded", "dead"]
    status.render(document)


def test_names_with_control_characters(runtime: RuntimeDir, process: int) -> None:
    add_mount(runtime, "/mnt/\x1b[2J", process, state="failed", last_crash={"at": 1.0, "what": "a\nb"})
    text = "\n".join(status.render(status.collect(runtime.path)))
    assert "\x1b" not in text
    assert "/mnt/\\x1b[2J" in text
    assert "a\\nb" in text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_directory_of_somebody_else() -> None:
    script = (
        "import os, sys; import cachefs.cli.status; from cachefs.cli.main import run; os.setuid(65534); "
        "sys.exit(run(['status', '--runtime-dir', sys.argv[1]]))"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as private:
        done = subprocess.run(
            [sys.executable, "-c", script, private], capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr == f"cachefs: {private} belongs to another user: ask as that user, or as root\n"
