"""Worker, agent, node service and keeper are killed in turn, or together: whoever reads goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.runtime import agent_id
from tests.keeper.rig import CONTENT, SHM, KubeletNode
from tests.support.machine import kill, wait_until
from tests.support.mounts import Bucket


@pytest.fixture
def volume(bucket: Bucket) -> str:
    """A source with one file."""
    bucket.put("a/file", CONTENT)
    return bucket.url


def published(node: KubeletNode, volume: str, *names: str) -> Path:
    """Mount, bind, and return the file in the last target."""
    node.mount("vol", volume)
    for name in names or ("one",):
        node.client.bind("vol", str(node.target(name)), read_only=True)
    return node.target((names or ("one",))[-1]) / "a/file"


def assert_ends_clean(node: KubeletNode) -> None:
    """Unpublish all, and see that nothing is left."""
    for state in (state for state in node.status().mounts if state.state != "unmounting"):
        for bind in state.targets:
            node.client.unbind(bind.path)
        assert node.client.unmount(state.key)
    wait_until(lambda: not node.status().mounts, 10, f"nothing is kept\n{node.logs()}")
    wait_until(lambda: not node.processes("cachefs.mount.worker"), 5, "no worker is left")
    assert node.mounted() == []


def test_a_reader_outlives_worker_agent_node_service_and_keeper(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    with node.reader(file, CONTENT):
        worker = node.wait_for_worker("vol")
        kill(worker)
        worker = node.wait_for_worker("vol", worker)
        assert node.state("vol").restarts == 1

        agent = node.agent_pid
        kill(agent)
        wait_until(lambda: node.agent_pid != agent, 10, "another agent")
        time.sleep(0.3)

        kill(node.keepers[-1].pid)
        node.keepers[-1].wait()
        time.sleep(0.3)
        node.start_keeper()
        replaced = node.wait_for_worker("vol", worker)  # by one with pipes to this keeper
        assert node.state("vol").restarts == 1

        kill(node.services[-1].pid)
        node.services[-1].wait()
        time.sleep(0.3)
        node.start_service()
        node.wait_for_worker("vol", replaced)
    assert_ends_clean(node)


def test_an_agent_that_a_worker_starts_has_the_keys_of_the_node(node: KubeletNode, volume: str) -> None:
    keys = node.base / "keys"
    keys.write_text("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n".format(
        node.credentials["AWS_ACCESS_KEY_ID"], node.credentials["AWS_SECRET_ACCESS_KEY"]
    ))  # fmt: skip
    own = {"AWS_SHARED_CREDENTIALS_FILE": str(keys), "AWS_CONFIG_FILE": "/dev/null"}
    node.mount("vol", volume, environment=own)
    assert own.items() <= environment_of(node.wait_for_worker("vol")).items()
    os.kill(node.services[-1].pid, signal.SIGSTOP)  # or it might be faster
    try:
        agent = node.agent_pid
        kill(agent)
        wait_until(lambda: node.agent_pid != agent, 10, "another agent")
        found = environment_of(node.agent_pid)
    finally:
        os.kill(node.services[-1].pid, signal.SIGCONT)
    assert own["AWS_SHARED_CREDENTIALS_FILE"] not in found.values()
    assert node.credentials.items() <= found.items()
    assert_ends_clean(node)


def environment_of(pid: int) -> dict[str, str]:
    """Return the variables that a process was started with."""
    parts = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(part.partition("=")[::2] for part in parts if part)


@pytest.mark.slow
def test_as_in_a_container_workers_die_with_the_node_service(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    with node.reader(file, CONTENT):
        for _ in range(6):  # more often than a worker may crash
            worker = node.wait_for_worker("vol")
            for pid in (node.services[-1].pid, node.agent_pid, worker):
                kill(pid)
            node.services[-1].wait()
            node.start_service()
            node.wait_for_worker("vol", worker)
    assert node.state("vol").state == "serving"
    assert_ends_clean(node)


def test_keeper_and_node_service_are_killed_and_the_mount_is_made_anew(node: KubeletNode, volume: str) -> None:
    file = published(node, volume, "one", "two")
    for pid in (node.keepers[-1].pid, *node.processes("cli.main"), *node.processes("cachefs.mount.worker")):
        kill(pid)
    node.keepers[-1].wait()
    node.services[-1].wait()
    wait_until(lambda: not node.processes("cachefs.mount"), 5, "all are dead")
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        os.stat(file)
    node.start_keeper()
    node.start_service()
    node.wait_for_worker("vol")
    assert node.read(file) == CONTENT
    assert len(set(node.mounted())) == 3
    assert [bind.path for bind in node.state("vol").targets] == [str(node.target("one")), str(node.target("two"))]
    assert node.client.reconcile().repaired == ()
    assert_ends_clean(node)


def test_a_connection_that_somebody_aborts_is_made_anew(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    connection, worker = node.state("vol").connection, node.wait_for_worker("vol")
    subprocess.run(["mount", "-t", "fusectl", "none", "/sys/fs/fuse/connections"], check=False, capture_output=True)
    Path(f"/sys/fs/fuse/connections/{connection}/abort").write_text("1")
    node.wait_for_worker("vol", worker)
    assert node.read(file) == CONTENT
    assert_ends_clean(node)


def test_orphans_are_detached_and_what_is_gone_is_forgotten(node: KubeletNode, volume: str) -> None:
    file = published(node, volume, "one", "two")
    records = list((node.run / "keeper/records").iterdir())
    kill(node.keepers[-1].pid)
    node.keepers[-1].wait()
    records[0].write_text("{")  # torn: nothing is known of the mount any more
    node.start_keeper()
    wait_until(lambda: not node.mounted(), 5, f"the orphan and its binds are detached {node.mounted()}")
    wait_until(lambda: not node.processes("cachefs.mount.worker"), 5, "its worker ends")
    assert not file.exists()
    published(node, volume, "one", "two")
    subprocess.run(["umount", str(node.target("one"))], check=True)
    subprocess.run(["umount", "-l", node.state("vol").mountpoint], check=True)
    repairs = node.client.reconcile()
    assert repairs.dropped == (str(node.target("one")),)
    assert repairs.repaired == ("vol",)  # put back to its place
    assert [bind.path for bind in node.state("vol").targets] == [str(node.target("two"))]
    assert node.read(file) == CONTENT
    assert_ends_clean(node)


def test_sigterm_of_the_keeper_leaves_all_mounts_to_the_next(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    with node.reader(file, CONTENT):
        worker = node.wait_for_worker("vol")
        node.keepers[-1].terminate()
        assert node.keepers[-1].wait(5) == 0
        assert len(node.mounted()) == 2
        node.start_keeper()
        node.wait_for_worker("vol", worker)
    assert_ends_clean(node)


def test_a_surge_update_moves_mounts_before_the_old_node_service_ends(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    old = node.services[-1]
    with node.reader(file, CONTENT, limit_s=5.0):
        worker = node.wait_for_worker("vol")
        node.start_service()
        old.terminate()
        assert old.wait(20) == 0
        replaced = node.wait_for_worker("vol", worker)
        assert _parent(replaced) == node.services[-1].pid
    assert node.state("vol").restarts == 0
    assert_ends_clean(node)


def test_a_node_service_of_another_version_takes_all_mounts_over(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    with node.reader(file, CONTENT, limit_s=5.0):
        worker = node.wait_for_worker("vol")
        node.start_service(newer=True)
        replaced = node.wait_for_worker("vol", worker)
        assert _parent(replaced) == node.services[-1].pid
        assert node.services[0].poll() is None  # both are there
    runner = node.status().runner
    assert runner is not None
    assert runner.version == "99.0"
    assert node.state("vol").restarts == 0


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_sigterm_of_the_only_node_service_lets_readers_wait_for_the_next(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    with node.reader(file, CONTENT):
        worker = node.wait_for_worker("vol")
        node.services[-1].terminate()
        assert node.services[-1].wait(20) == 0
        wait_until(lambda: not node.processes("cachefs.agent.main"), 5, "the agent ends too")
        assert worker not in node.processes("cachefs.mount.worker")
        time.sleep(0.5)
        node.start_service()
        node.wait_for_worker("vol", worker)
    assert node.state("vol").restarts == 0
    assert_ends_clean(node)


def test_binds_and_their_end_do_not_wait_for_anybody(node: KubeletNode, volume: str) -> None:
    """With nobody who serves the mount, publish and unpublish work all the same."""
    file = published(node, volume)
    for pid in (*node.processes("cli.main"), *node.processes("cachefs.mount.worker")):
        kill(pid)
    node.services[-1].wait()
    wait_until(lambda: node.status().runner is None, 5, "the node service is gone")
    began = time.monotonic()
    node.client.bind("vol", str(node.target("two")), read_only=True)
    wait_until(lambda: node.state("vol").state == "waiting", 5, "it waits for a node service")
    assert node.client.unbind(str(node.target("two")))
    assert node.client.reconcile().detached == ()
    assert node.client.unbind(str(file.parents[1]))
    assert node.client.unmount("vol")
    assert time.monotonic() - began < 5
    wait_until(lambda: not node.status().mounts, 5, "nothing is kept")
    assert node.mounted() == []


@pytest.mark.slow
def test_worker_that_crashes_again_and_again_is_a_failed_mount(node: KubeletNode, volume: str) -> None:
    published(node, volume)
    worker: int | None = None
    for _ in range(5):
        wait_until(lambda: node.state("vol").state in ("serving", "failed"), 20, "it goes on")
        worker = node.state("vol").worker_pid
        if worker is not None:
            os.kill(worker, signal.SIGABRT)
            wait_until(lambda: node.state("vol").worker_pid != worker, 20, "it is dead")  # noqa: B023
    wait_until(lambda: node.state("vol").state == "failed", 20, f"it failed {node.state('vol')}")
    assert "SIGABRT" in (node.state("vol").last_crash or "")
    node.mount("vol", volume)  # asking again is a try
    assert node.state("vol").state == "serving"
    assert_ends_clean(node)


def test_a_worker_that_outlives_keeper_and_node_service_is_found_again(node: KubeletNode, volume: str) -> None:
    """As on a machine without containers."""
    file = published(node, volume)
    with node.reader(file, CONTENT):
        worker = node.wait_for_worker("vol")
        for child in (node.keepers[-1], node.services[-1]):
            kill(child.pid)
            child.wait()
        time.sleep(0.3)
        node.start_keeper()
        assert node.state("vol").worker_pid == worker
        node.start_service()
        node.wait_for_worker("vol", worker)
    assert node.state("vol").restarts == 0
    assert_ends_clean(node)


def test_a_detached_mount_is_served_on_by_the_next_keeper(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    with node.reader(file, CONTENT, once=True):
        assert node.client.unmount("vol", force=True)
        assert node.mounted() == []
        kill(node.keepers[-1].pid)
        node.keepers[-1].wait()
        node.start_keeper()
        time.sleep(1)
        assert [state.state for state in node.status().mounts] == ["unmounting"]
    assert not file.exists()
    assert_ends_clean(node)


def test_nothing_is_left_in_memory(node: KubeletNode, volume: str) -> None:
    file = published(node, volume)
    node.read(file)
    tier = SHM / f"cachefs-0-{agent_id(str(node.cache))}"
    node.services[-1].terminate()
    assert node.services[-1].wait(20) == 0
    assert tier.exists()  # still warm, for the node service that comes next
    node.start_service()
    node.wait_for_worker("vol")
    assert_ends_clean(node)
    node.services[-1].terminate()
    assert node.services[-1].wait(20) == 0
    assert not tier.exists()
    node.keepers[-1].terminate()
    assert node.keepers[-1].wait(5) == 0
    wait_until(lambda: not node.processes(), 5, "no process is left")


@pytest.mark.slow
def test_everything_dies_again_and_again(make_node: Callable[..., KubeletNode], volume: str) -> None:
    node = make_node()
    node.start_keeper()
    node.start_service()
    for number in range(5):
        node.mount(f"v{number}", volume)
        node.client.bind(f"v{number}", str(node.target(f"p{number}")), read_only=True)
    with node.reader(node.target("p0") / "a/file", CONTENT), node.reader(node.target("p4") / "a/file", CONTENT):
        for turn in range(8):
            kill(node.keepers[-1].pid)
            node.keepers[-1].wait()
            if turn % 2:
                for pid in node.processes("cachefs.mount.worker"):
                    kill(pid)
            node.start_keeper()
            if turn % 2:  # else nobody would hold the devices any more
                node.wait_for_service(node.services[-1])
            else:
                time.sleep(0.1 * (turn % 3))
            kill(node.services[-1].pid)
            node.services[-1].wait()
            node.start_service()
            for number in range(5):
                node.wait_for_worker(f"v{number}")
    wait_until(lambda: len(node.processes("cachefs.mount.worker")) == 5, 20, "no worker too many")
    assert_ends_clean(node)
