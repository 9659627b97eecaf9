"""Several versions of cachefs at one cache directory: upgrades across a change of protocol, and who has to give way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuse.reading import reading
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import stopped, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, read_and_compare
from tests.support.releases import Release

OBJECTS = {f"file-{number}": content(f"v{number}", 200_000) for number in range(6)}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("old"), "1.0", protocol=1, serves=1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("new"), "2.0", protocol=2, serves=1)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("far"), "3.0", protocol=3, serves=2)


@pytest.fixture(scope="module")
def minor(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("minor"), "1.1", protocol=1, serves=1)


MountOf = Callable[[Release, str], Mount]


@pytest.fixture
def mount_of(node: Node, bucket: Bucket, proxy: FaultProxy) -> MountOf:
    bucket.fill(OBJECTS)

    def mount(release: Release, name: str) -> Mount:
        (node.base / name).mkdir()
        made = Mount(node, node.base / name)
        done = release.run(
            node, "mount", *node.options, f"--endpoint-url={proxy.endpoint_url}", bucket.url, str(made.path)
        )
        assert done.returncode == 0, done.stderr
        node.mounts.append(made)
        return made

    return mount


def reads_right(mount: Mount) -> None:
    read_and_compare(mount.path, OBJECTS)


def upgrade(release: Release, mount: Mount) -> str:
    done = release.run(mount.node, "upgrade", f"--runtime-dir={mount.node.runtime_dir}", str(mount.path))
    assert done.returncode == 0, f"{done.stderr}\n{mount.node.log_text()}"
    return done.stdout


def versions(node: Node) -> tuple[str, dict[str, str]]:
    """The version of the agent, and those of the mounts."""
    status = node.status()
    (agent,) = status["agents"]
    return agent["version"], {Path(mount["mountpoint"]).name: mount["version"] for mount in status["mounts"]}


def test_an_upgrade_crosses_a_change_of_protocol_and_nobody_notices(
    node: Node, old: Release, new: Release, mount_of: MountOf
) -> None:
    first, second = mount_of(old, "first"), mount_of(old, "second")
    reads_right(first)
    agent = node.agent_pid
    with reading(first.path, OBJECTS), reading(second.path, OBJECTS):
        assert "served by version 2.0" in upgrade(new, first)
        wait_until(lambda: versions(node)[0] == "2.0", 10, "the agent is a new one")
        for mount in (first, second):
            reads_right(mount)
    assert agent not in node.processes("agent")
    wait_until(lambda: versions(node) == ("2.0", {"first": "2.0", "second": "1.0"}), 10, "both are attached")
    assert [mount["restarts"] for mount in node.status()["mounts"]] == [0, 0]
    assert first.state()["supervisor_version"] == "1.0"
    # An old worker that is faster starts an agent of its own version, and the new one puts its own in that place.
    with stopped(first.worker_pid):
        node.kill_agent()
        wait_until(lambda: [agent["version"] for agent in node.status()["agents"]] == ["1.0"], 15, "it is an old one")
        reads_right(second)
    wait_until(lambda: [agent["version"] for agent in node.status()["agents"]] == ["2.0"], 15, "it is a new one again")
    for mount in (first, second):
        reads_right(mount)
    upgrade(new, second)
    assert versions(node) == ("2.0", {"first": "2.0", "second": "2.0"})


def test_two_upgrades_at_once(node: Node, old: Release, new: Release, mount_of: MountOf) -> None:
    first, second = mount_of(old, "first"), mount_of(old, "second")
    with reading(first.path, OBJECTS), reading(second.path, OBJECTS), ThreadPoolExecutor(2) as pool:
        list(pool.map(upgrade, (new, new), (first, second)))
    assert versions(node) == ("2.0", {"first": "2.0", "second": "2.0"})


@pytest.mark.slow
def test_an_agent_that_cannot_start_costs_nobody_anything(
    node: Node, old: Release, tmp_path: Path, mount_of: MountOf
) -> None:
    """It is found out when the old agent has ended, and then another old one is started."""
    broken = Release(tmp_path, "2.0", protocol=2, serves=1)
    (tmp_path / "tree-2.0/cachefs/agent/main.py").write_text("raise SystemExit('no such library')\n")
    first, second = mount_of(old, "first"), mount_of(old, "second")
    with reading(first.path, OBJECTS), reading(second.path, OBJECTS):
        done = broken.run(node, "upgrade", f"--runtime-dir={node.runtime_dir}", str(first.path))
        assert done.returncode == 1
        assert "the agent cannot start" in done.stderr
        wait_until(lambda: len(node.status()["agents"]) == 1, 10, "there is an agent again")
        reads_right(first)
    wait_until(lambda: versions(node) == ("1.0", {"first": "1.0", "second": "1.0"}), 10, "all is as it was")


def test_an_upgrade_that_is_killed_between_two_agents(
    node: Node, old: Release, tmp_path: Path, mount_of: MountOf
) -> None:
    """The right to start an agent goes with who holds it."""
    slow = Release(tmp_path, "2.0", protocol=2, serves=1)
    start = tmp_path / "tree-2.0/cachefs/agent/main.py"
    start.write_text("import time\ntime.sleep(60)\n")
    first = mount_of(old, "first")
    agent = node.agent_pid
    with reading(first.path, OBJECTS), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(slow.run, node, "upgrade", f"--runtime-dir={node.runtime_dir}", str(first.path))
        wait_until(lambda: node.processes("agent") not in ([], [agent]), 15, "the next agent is being started")
        for pid in set(node.processes("worker")) - {first.worker_pid}:
            os.kill(pid, signal.SIGKILL)
        for pid in node.processes("agent"):
            os.kill(pid, signal.SIGKILL)
        assert asked.result().returncode == 1
        wait_until(lambda: len(node.status()["agents"]) == 1, 15, "there is an agent again")
        reads_right(first)
    assert versions(node) == ("1.0", {"first": "1.0"})


def test_an_upgrade_says_what_it_left_as_it_was(node: Node, old: Release, minor: Release, mount_of: MountOf) -> None:
    mount = mount_of(old, "first")
    said = upgrade(minor, mount)
    assert "served by version 1.1" in said
    assert f"its agent 1.0: that is replaced when nothing is mounted through it, or by `kill {node.agent_pid}`" in said
    assert "its supervisor 1.0 until it is mounted again" in said
    os.kill(node.agent_pid, signal.SIGTERM)
    reads_right(mount)
    wait_until(lambda: [agent["version"] for agent in node.status()["agents"]] == ["1.1"], 15, "what was said is true")


def test_a_new_mount_leaves_the_agent_of_others_alone(
    node: Node, bucket: Bucket, proxy: FaultProxy, old: Release, new: Release, mount_of: MountOf
) -> None:
    first, second = mount_of(old, "first"), mount_of(old, "second")
    agent = node.agent_pid
    (node.base / "third").mkdir()
    arguments = [*node.options, f"--endpoint-url={proxy.endpoint_url}", bucket.url, str(node.base / "third")]
    done = new.run(node, "mount", *arguments)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"2 mounts of version 1.0 ({first.path}, {second.path})" in done.stderr
    assert "`cachefs upgrade`" in done.stderr
    assert node.agent_pid == agent
    reads_right(first)
    second.umount()
    first.umount()
    mount_of(new, "fourth")  # its agent is still there, and nobody needs it
    assert versions(node) == ("2.0", {"fourth": "2.0"})
    reads_right(mount_of(old, "fifth"))  # an agent serves the protocol before its own
    assert versions(node)[1] == {"fourth": "2.0", "fifth": "1.0"}


def test_an_upgrade_that_would_strand_other_mounts_changes_nothing(
    node: Node, old: Release, far: Release, mount_of: MountOf
) -> None:
    first, second = mount_of(old, "first"), mount_of(old, "second")
    agent = node.agent_pid
    done = far.run(node, "upgrade", f"--runtime-dir={node.runtime_dir}", str(first.path))
    assert done.returncode == 1
    assert f"version 3.0 cannot serve 1 mount of version 1.0 ({second.path})" in done.stderr
    assert node.agent_pid == agent
    reads_right(first)
    second.umount()
    assert "served by version 3.0" in upgrade(far, first)
    assert versions(node) == ("3.0", {"first": "3.0"})
    reads_right(first)


def test_a_worker_that_is_too_old_for_the_agent_goes_on_with_what_is_cached(
    node: Node, bucket: Bucket, proxy: FaultProxy, old: Release, far: Release, mount_of: MountOf
) -> None:
    mount = mount_of(old, "first")
    reads_right(mount)
    worker = mount.worker_pid
    with stopped(worker):  # its agent dies, and somebody else's new mount is faster
        node.kill_agent()
        other = mount_of(far, "other")
    wait_until(lambda: "3.0 with protocol 3" in node.full_log(), 10, "the old worker was refused")
    reads_right(mount)
    reads_right(other)
    assert mount.worker_pid == worker
    assert versions(node)[0] == "3.0"
    upgrade(far, mount)
    reads_right(mount)
