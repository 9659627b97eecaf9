"""The shm tier between strangers: what they planted is not touched, and without a reader slot it is a miss (R3)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.block.tier_files import LOCK_BYTES, LOCK_FILE
from tests.fuse.agent_rig import OBJECTS, mount_objects, reads_right
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Node
from tests.support.programs import REPOSITORY


def planted_link(path: Path, victim: Path) -> None:
    """A link to somewhere else."""
    path.symlink_to(victim)


def planted_directory(path: Path, victim: Path) -> None:
    """A directory of another user."""
    (path / "volumes").mkdir(parents=True)
    (path / "precious").mkdir()
    os.chown(path, 54321, 54321)


def open_directory(path: Path, victim: Path) -> None:
    """One that everybody may write to."""
    (path / "precious").mkdir(parents=True)
    path.chmod(0o777)


@pytest.mark.parametrize("plant", [planted_link, planted_directory, open_directory])
@pytest.mark.parametrize("writable", [True, False], ids=["", "cache directory cannot be used"])
def test_what_was_planted_in_the_tmpfs_is_not_touched(
    make_node: Callable[..., Node],
    bucket: Bucket,
    proxy: FaultProxy,
    needs_root: None,
    tmp_path: Path,
    plant: Callable[[Path, Path], None],
    writable: bool,
) -> None:
    victim, shm_dir = tmp_path / "victim", tmp_path / "shm"
    (victim / "precious").mkdir(parents=True)
    shm_dir.mkdir()
    bucket.fill(OBJECTS)
    node = make_node(shm_dir=shm_dir)
    plant(node.shm_directory, victim)
    before = sorted(node.shm_directory.iterdir())
    if not writable:
        node.cache_dir.mkdir()
        (node.cache_dir / "volumes").touch()  # no directory
        (node.base / "mnt").mkdir()
        done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert str(node.shm_directory) in done.stderr
    else:
        mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
        assert (mount.path / "later").read_bytes() == OBJECTS["later"]
        assert node.status()["agents"][0]["tiers"]["shm"]["state"] == "off"
        assert f"the shm tier is off: {node.shm_directory} " in node.full_log()
        mount.umount()
        node.stop_agent()
    assert sorted(node.shm_directory.iterdir()) == before
    assert [path.name for path in victim.iterdir()] == ["precious"]
    if node.shm_directory.is_symlink():
        node.shm_directory.unlink()
    else:
        shutil.rmtree(node.shm_directory)


HOLDER = """
import sys
from cachefs.block.tier_reader import TierReader
reader = TierReader(sys.argv[1])
kept = [reader.snapshot() for _ in range(int(sys.argv[2]))]
print("full", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_no_reader_slot_is_a_miss_and_no_error(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    command = [sys.executable, "-c", HOLDER, str(node.shm_directory), str(LOCK_BYTES // 64)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=node.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "full\n"
        mount.wait_for_worker(other_than=mount.kill_worker())  # one that has kept no slot for itself
        for name in OBJECTS:
            assert reads_right(mount, name)
        holder.communicate("")
    wait_until(lambda: "the shm tier can be read again" in node.full_log(), 10, "the worker looks again")
    for name in OBJECTS:
        assert reads_right(mount, name)
    wait_until(lambda: mount.status()["counters"]["shm_hits"] >= len(OBJECTS), 5, "and finds blocks in it")


@pytest.mark.parametrize("engine", ["channel", "pyfuse3"])
def test_a_cleared_reader_slot_is_a_miss_and_no_error(
    node: Node, bucket: Bucket, proxy: FaultProxy, engine: str
) -> None:
    """What an agent does that cannot see the worker's process (another name space of processes)."""
    mount = mount_objects(node, bucket, proxy, f"--engine={engine}")
    with (node.shm_directory / LOCK_FILE).open("r+b") as file:
        slots = file.read()
        number = mount.worker_pid.to_bytes(4, sys.byteorder)
        while (position := slots.find(number)) >= 0:
            file.seek(position)
            file.write(bytes(4))
            slots = slots[:position] + bytes(4) + slots[position + 4 :]
    for _ in range(2):
        for name in OBJECTS:
            assert reads_right(mount, name)
    wait_until(lambda: mount.status()["counters"].get("shm_faults", 0) > 0, 5, "the faults are counted")
    assert len([line for line in node.full_log().splitlines() if "is not usable now: no read" in line]) == 1
