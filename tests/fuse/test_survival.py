"""Processes are killed while people read: M1 to M4 and M6 of docs/SEMANTICS.md."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.reading import reading
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import kill, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name, evict_pages

MIB = 1 << 20
OBJECTS = {f"small/{number:02}": content(f"small {number}", 90_000 + number * 1111) for number in range(24)} | {
    "large/one": content("large one", 12 * MIB + 333),
    "large/two": content("large two", 16 * MIB),
}
"""About 31 MiB."""


@pytest.fixture
def small_node(make_node: Callable[..., Node]) -> Node:
    """A node whose tiers are smaller than the objects: some reads always go to the store."""
    return make_node(shm_size="16MiB", cache_size="24MiB")


def mount_objects(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str) -> Mount:
    """Mount a bucket that holds `OBJECTS`."""
    bucket.fill(OBJECTS)
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever", *options)


# -- M1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["channel", pytest.param("pyfuse3", marks=pytest.mark.slow)])
def test_m1_killed_workers_are_not_noticed(node: Node, bucket: Bucket, proxy: FaultProxy, engine: str) -> None:
    mount = mount_objects(node, bucket, proxy, f"--engine={engine}")
    with reading(mount.path, OBJECTS):
        time.sleep(0.5)
        for _ in range(4):  # the fifth within a minute would be one too many
            mount.wait_for_worker(other_than=mount.kill_worker())
            time.sleep(0.4)
    assert mount.status()["restarts"] == 4
    assert mount.status()["health"] == "ok"


def _wait_for_attachment(mount: Mount, agent_pid: int) -> None:
    wait_until(lambda: mount.state()["agent_pid"] == agent_pid, 10, "the worker has the next agent")


def test_m1_killed_agents_are_not_noticed(small_node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(small_node, bucket, proxy)
    with reading(mount.path, OBJECTS):
        time.sleep(0.5)
        for _ in range(6):
            following = small_node.wait_for_agent(other_than=small_node.kill_agent())
            _wait_for_attachment(mount, following)
            time.sleep(0.5)  # agents that die sooner are followed with growing pauses
    assert mount.status()["restarts"] == 0, "the worker survives its agent"


def test_m1_worker_and_agent_killed_together(small_node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(small_node, bucket, proxy)
    with reading(mount.path, OBJECTS):
        time.sleep(0.5)
        for _ in range(3):
            killed = small_node.kill_agent()
            mount.wait_for_worker(other_than=mount.kill_worker())
            small_node.wait_for_agent(other_than=killed)
            time.sleep(0.5)


def test_m1_a_cold_read_in_flight_survives_both_deaths(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    path = mount.path / "large/one"
    os.stat(path)
    rule = proxy.add(Fault(kind="get", delay_s=1.0))
    with subprocess.Popen(["md5sum", str(path)], stdout=subprocess.PIPE) as reader:
        wait_until(lambda: rule.hits, 5, "the read waits for the store")
        node.kill_agent()
        mount.kill_worker()
        proxy.remove(rule)
        output, _ = reader.communicate(timeout=30)
    assert reader.returncode == 0
    assert output.split()[0].decode() == hashlib.md5(OBJECTS["large/one"]).hexdigest()


def test_m1_a_listing_goes_on_after_a_restart(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    names = [f"{number:05}" for number in range(3000)]
    bucket.fill({f"d/{name}": b"" for name in names})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    seen = []
    with os.scandir(mount.path / "d") as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position in (10, 1500):
                mount.wait_for_worker(other_than=mount.kill_worker())
            if position == 800:
                node.kill_agent()
    assert seen == names


def test_m1_attributes_and_inodes_are_the_same_afterwards(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    before = {name: os.stat(mount.path / name) for name in OBJECTS}
    descriptor = os.open(mount.path / "large/two", os.O_RDONLY)
    try:
        mount.wait_for_worker(other_than=mount.kill_worker())
        evict_pages(mount.path / "large/two")
        assert os.pread(descriptor, MIB, 9 * MIB) == OBJECTS["large/two"][9 * MIB : 10 * MIB]
        assert {name: os.stat(mount.path / name) for name in OBJECTS} == before
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_killed_workers_leave_nothing_growing_in_shm(small_node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(small_node, bucket, proxy)
    with reading(mount.path, OBJECTS):
        for _ in range(3):
            time.sleep(0.7)
            mount.wait_for_worker(other_than=mount.kill_worker())
        time.sleep(1.5)
    used = sum(file.stat().st_blocks * 512 for file in small_node.shm_directory.rglob("*") if file.is_file())
    assert used <= 17 * MIB, "the shm tier keeps its budget although readers died inside of transactions"


# -- upgrade ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["channel", pytest.param("pyfuse3", marks=pytest.mark.slow)])
def test_an_upgrade_under_load_is_not_noticed(node: Node, bucket: Bucket, proxy: FaultProxy, engine: str) -> None:
    mount = mount_objects(node, bucket, proxy, f"--engine={engine}")
    with reading(mount.path, OBJECTS):
        for _ in range(3):
            before = mount.worker_pid
            done = node.run("upgrade", f"--runtime-dir={node.runtime_dir}", str(mount.path))
            assert done.returncode == 0, done.stderr
            assert mount.worker_pid != before
            time.sleep(0.3)
    assert mount.status()["restarts"] == 0


# -- M2 ---------------------------------------------------------------------------------------------------------------


def wait_for_reaction(mount: Mount, killed: int) -> None:
    """Wait until the supervisor has given up or started another worker."""

    def reacted() -> bool:
        state = mount.state()
        return state["state"] == "failed" or state["worker_pid"] not in (None, killed)

    wait_until(reacted, 10, "the supervisor reacts")


def crash_until_failed(mount: Mount) -> None:
    """Kill workers until the supervisor gives up."""
    for _ in range(5):
        wait_until(lambda: mount.state()["worker_pid"] is not None, 10, "a worker runs")
        pid = mount.kill_worker()
        wait_for_reaction(mount, pid)
    wait_until(lambda: mount.state()["state"] == "failed", 5, "the supervisor gives up")


def test_m2_five_crashes_and_the_way_out(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    path = mount.path / "small/00"
    assert path.read_bytes() == OBJECTS["small/00"]
    crash_until_failed(mount)
    started = time.monotonic()
    assert errno_name(lambda: os.listdir(mount.path / "large")) == "EIO"
    assert errno_name((mount.path / "large/one").read_bytes) == "EIO"
    assert time.monotonic() - started < 1
    status = mount.status()
    assert status["health"] == "failed"
    said = " ".join(status["problems"])
    assert "SIGKILL" in said
    assert f"cachefs upgrade {mount.path}" in said
    assert f"cachefs umount {mount.path}" in said
    assert node.run("status", f"--runtime-dir={node.runtime_dir}", str(mount.path)).returncode == 1
    assert "giving up" in node.full_log()
    done = node.run("upgrade", f"--runtime-dir={node.runtime_dir}", str(mount.path))
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == OBJECTS["small/00"]
    assert (mount.path / "large/one").read_bytes() == OBJECTS["large/one"]
    assert mount.status()["health"] == "ok"


def test_m2_a_failed_mount_can_be_unmounted(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    crash_until_failed(mount)
    mount.umount()
    wait_until(lambda: not node.processes("supervisor"), 5, "the supervisor ends")


# -- M3 ---------------------------------------------------------------------------------------------------------------


def read_all(mount: Mount) -> None:
    """Read every object and compare."""
    for name, body in OBJECTS.items():
        assert (mount.path / name).read_bytes() == body


def test_m3_after_an_unmount_nothing_is_asked_for_again(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    read_all(mount)
    mount.umount()
    node.stop_agent()  # the shm tier goes with it: what follows comes from the disk
    assert not node.shm_directory.exists()
    proxy.forget()
    again = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")
    read_all(again)
    assert proxy.count("get") == 0, proxy.requests
    assert os.getxattr(again.path / "large/one", "user.cachefs.cached").endswith(b"disk=13 blocks=13")


def test_m3_after_kill_9_of_everything(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    read_all(mount)
    node.kill_everything()
    proxy.forget()
    again = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")
    read_all(again)
    assert proxy.count("get") == 0, proxy.requests
    again.umount()
    node.stop_agent()  # and what only the tmpfs had is on the disk by now
    last = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")
    read_all(last)
    assert proxy.count("get") == 0, proxy.requests


def test_m3_kill_9_while_blocks_are_being_written(small_node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """Killed in the middle of fills, evictions and spills, again and again: never wrong bytes, never a broken cache."""
    bucket.fill(OBJECTS)
    for turn in range(4):
        mount = small_node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever")
        reader = subprocess.Popen(["tar", "-cf", "/dev/null", str(mount.path)], stderr=subprocess.DEVNULL)
        time.sleep(0.15 + 0.2 * turn)
        small_node.kill_everything()
        reader.wait(10)
    read_all(small_node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever"))


# -- M4 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_m4_a_signal_unmounts(node: Node, bucket: Bucket, proxy: FaultProxy, number: signal.Signals) -> None:
    mount = mount_objects(node, bucket, proxy)
    assert (mount.path / "small/01").read_bytes() == OBJECTS["small/01"]
    kill(mount.supervisor_pid, number)
    wait_until(lambda: not mount.is_mounted, 5, "the mount goes")
    wait_until(lambda: not node.processes("supervisor") and not node.processes("worker"), 5, "its processes end")
    assert mount.state() == {}
    wait_until(lambda: not node.processes("agent"), 10, "the agent ends when it is idle")
    assert not node.shm_directory.exists()


def test_m4_open_files_are_served_for_a_while(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    descriptor = os.open(mount.path / "large/two", os.O_RDONLY)
    try:
        kill(mount.supervisor_pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_mounted, 5, "the mount is detached")
        for block in range(16):
            piece = os.pread(descriptor, MIB, block * MIB)
            assert piece == OBJECTS["large/two"][block * MIB : (block + 1) * MIB]
        again = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")  # the place is free for the next
        assert (again.path / "small/02").read_bytes() == OBJECTS["small/02"]
        again.umount()
    finally:
        os.close(descriptor)
    wait_until(lambda: not node.processes("supervisor") and not node.processes("worker"), 5, "its processes end")


@pytest.mark.slow
def test_m4_open_files_are_not_served_for_ever(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    descriptor = os.open(mount.path / "large/two", os.O_RDONLY)
    try:
        kill(mount.supervisor_pid, signal.SIGTERM)
        wait_until(lambda: not node.processes("worker"), 16, "the connection is ended after 10 s")
        assert errno_name(lambda: os.pread(descriptor, MIB, 0)) in ("ENOTCONN", "ECONNABORTED", "EIO")
    finally:
        close_aborted(descriptor)


def close_aborted(descriptor: int) -> None:
    """Close a file of a connection that was aborted: close(2) says so, and closes."""
    assert errno_name(lambda: os.close(descriptor)) in ("", "ENOTCONN", "ECONNABORTED")


def test_m4_a_second_signal_does_not_wait(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    descriptor = os.open(mount.path / "large/two", os.O_RDONLY)
    try:
        supervisor = mount.supervisor_pid
        kill(supervisor, signal.SIGTERM)
        wait_until(lambda: not mount.is_mounted, 5, "the mount is detached")
        kill(supervisor, signal.SIGTERM)
        wait_until(lambda: not node.processes("supervisor") and not node.processes("worker"), 5, "its processes end")
    finally:
        close_aborted(descriptor)


# -- M6 and the rest --------------------------------------------------------------------------------------------------


def test_m6_a_killed_supervisor_leaves_its_worker_serving(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    kill(mount.supervisor_pid)
    wait_until(lambda: not node.processes("supervisor"), 5, "it is dead")
    assert (mount.path / "large/one").read_bytes() == OBJECTS["large/one"]
    status = mount.status()
    assert status["health"] == "dead"
    assert f"cachefs umount {mount.path}" in " ".join(status["problems"])
    mount.umount()
    wait_until(lambda: not node.processes("worker"), 10, "the worker ends with the mount")


def test_a_dead_mount_of_an_earlier_life_is_replaced(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    for pid in (mount.supervisor_pid, mount.worker_pid):
        kill(pid)
    wait_until(lambda: errno_name(lambda: os.stat(mount.path)) == "ENOTCONN", 5, "the mount point is dead")
    assert mount.status()["health"] == "dead"
    again = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    assert (again.path / "small/03").read_bytes() == OBJECTS["small/03"]
    assert again.status()["health"] == "ok"


def test_a_dead_mount_can_be_unmounted(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    for pid in (mount.supervisor_pid, mount.worker_pid):
        kill(pid)
    mount.umount()
    assert os.listdir(mount.path) == []


def test_umount_by_the_machine_ends_everything(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    subprocess.run(["umount", str(mount.path)], check=True)
    wait_until(lambda: not node.processes("supervisor") and not node.processes("worker"), 5, "its processes end")
    assert mount.state() == {}


@pytest.mark.slow
def test_an_idle_mount_costs_nothing(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    read_all(mount)
    wait_until(lambda: is_at_rest(node), 15, "what was read is on disk")
    time.sleep(1.5)
    before = cpu_seconds(node)
    requests = proxy.count()
    time.sleep(3)
    assert cpu_seconds(node) - before <= 0.03, "under 1 % of a CPU"
    assert proxy.count() == requests


def is_at_rest(node: Node) -> bool:
    """Whether nothing that was read is still to be written to the disk tier."""
    agent = node.status()["agents"][0]
    return bool(agent["tiers"]["disk"]["spill_pending"] == 0 and agent["fills"]["under_way"] == 0)


def cpu_seconds(node: Node) -> float:
    """Return the CPU time that all processes of a node have taken."""
    return (
        sum(
            int((thread / "schedstat").read_text().split()[0])  # in nanoseconds, where ticks are 10 ms
            for pid in node.processes()
            for thread in Path(f"/proc/{pid}/task").iterdir()
        )
        / 1e9
    )
