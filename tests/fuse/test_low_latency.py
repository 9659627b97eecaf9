"""`--low-latency` on a real mount with the real device: who holds it, when, and what the kernel makes of it."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

from cachefs.mount.wakeup import DEVICE
from tests.fuse.test_survival import OBJECTS, cpu_seconds, mount_objects, read_all
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import evict_pages

pytestmark = pytest.mark.skipif(not os.access(DEVICE, os.W_OK), reason=f"no right to {DEVICE}")


def holds(mount: Mount) -> bool:
    """Whether the worker has the device open."""
    directory = Path(f"/proc/{mount.worker_pid}/fd")
    return any(os.path.realpath(directory / number) == DEVICE for number in os.listdir(directory))


def latency_us() -> int:
    """How long CPUs may take to wake up, as all holders together ask for."""
    return int(struct.unpack("i", Path(DEVICE).read_bytes())[0])


def read_for(mount: Mount, seconds: float) -> None:
    """Read from cachefs, not from the kernel's pages."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name in OBJECTS:
            evict_pages(mount.path / name)
        read_all(mount)


@pytest.mark.slow
def test_auto_holds_it_while_somebody_reads(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--low-latency=auto")
    wait_until(lambda: not holds(mount), 5, "nobody reads yet")
    deadline = time.monotonic() + 10
    while not holds(mount):
        read_for(mount, 0.2)
        assert time.monotonic() < deadline, "it was never held"
    assert latency_us() == 0
    assert mount.status()["guard_held"]
    wait_until(lambda: not holds(mount), 5, "it is let go")
    wait_until(lambda: not mount.status()["guard_held"], 5, "and said so")
    wait_until(lambda: mount.status()["counters"].get("guard_held_seconds", 0) > 0, 5, "and counted")
    time.sleep(1.5)
    before = cpu_seconds(node)
    time.sleep(3)
    assert cpu_seconds(node) - before <= 0.03 * 2, "under 1 % of a CPU (measured in ticks of 10 ms)"


def test_a_worker_that_is_killed_leaves_no_guard_behind(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--low-latency=always")
    wait_until(lambda: holds(mount) and mount.state()["guard_held"], 5, "it is held from the start")
    mount.wait_for_worker(mount.kill_worker())
    wait_until(lambda: holds(mount), 5, "the next worker holds it")
    mount.umount()
    wait_until(lambda: not node.processes("worker"), 5, "the worker is gone, and its descriptor with it")


def test_off_never_holds_it(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--low-latency=off")
    read_for(mount, 0.5)
    assert not holds(mount)
    assert not mount.status()["guard_held"]
