"""Large files that are read in sequence come from the disk tier without the agent (R7 of docs/SEMANTICS.md)."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuse.agent_rig import no_agent_can_start
from tests.fuse.reading import reading
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages, run_program

MIB = 1 << 20
BODY = content("large", 24 * MIB + 77)


@pytest.fixture
def mount(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> Mount:
    """A mount of a file that is in the disk tier whole, and nowhere else."""
    return mount_on_disk(make_node(idle_timeout="30s"), bucket, proxy)


def mount_on_disk(node: Node, bucket: Bucket, proxy: FaultProxy) -> Mount:
    """Mount files that are in the disk tier whole, and nowhere else."""
    bucket.put("large", BODY)
    bucket.put("small", BODY[:50_000])
    first = mount_it(node, bucket, proxy)
    assert (first.path / "large").read_bytes() == BODY
    assert (first.path / "small").read_bytes() == BODY[:50_000]
    first.umount()
    node.stop_agent()
    mount = mount_it(node, bucket, proxy)
    proxy.forget()
    return mount


def mount_it(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str) -> Mount:
    """Mount a bucket with names that are trusted for ever."""
    return node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever", *options)


def data_file(mount: Mount) -> Path:
    """The file of the disk tier."""
    return mount.node.cache_dir / "disk" / "data.mdb"


def read_again(mount: Mount) -> None:
    """Read the large file from cachefs and compare."""
    evict_pages(mount.path / "large")
    assert (mount.path / "large").read_bytes() == BODY


def tiers(mount: Mount) -> dict[str, dict[str, int]]:
    """What the agent says of its tiers."""
    found: dict[str, dict[str, int]] = mount.node.status()["agents"][0]["tiers"]
    return found


def test_r7_what_is_read_again_comes_into_the_shm_tier(mount: Mount, proxy: FaultProxy) -> None:
    read_again(mount)
    wait_until(lambda: tiers(mount)["disk"]["hits"] >= 24, 5, "the hits are counted")
    assert tiers(mount)["shm"]["blocks"] <= 6, "a few before it was known to be a sequence: more on a busy machine"
    read_again(mount)
    wait_until(lambda: tiers(mount)["shm"]["blocks"] >= 24, 5, "what was read twice is there")
    hits = tiers(mount)["disk"]["hits"]
    read_again(mount)
    time.sleep(1.2)
    assert tiers(mount)["disk"]["hits"] <= hits + 2
    assert proxy.count("get") == 0
    assert mount.status()["health"] == "ok"


def test_r7_what_is_larger_than_the_shm_tier_evicts_nothing_there(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    mount = mount_on_disk(make_node(idle_timeout="30s", shm_size="16MiB"), bucket, proxy)
    assert (mount.path / "small").read_bytes() == BODY[:50_000]
    for _ in range(4):
        read_again(mount)
    wait_until(lambda: tiers(mount)["disk"]["hits"] >= 24 + 3 * 12, 5, "the hits are counted")
    assert tiers(mount)["shm"]["evictions"] == 0
    assert tiers(mount)["shm"]["blocks"] > 0
    assert proxy.count("get") == 0


def test_r7_random_reads_and_small_files_come_into_the_shm_tier(mount: Mount, proxy: FaultProxy) -> None:
    descriptor = os.open(mount.path / "large", os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for index in (17, 3, 11, 20, 7):
            assert os.pread(descriptor, 4096, index * MIB + 5) == BODY[index * MIB + 5 : index * MIB + 4101]
    finally:
        os.close(descriptor)
    assert (mount.path / "small").read_bytes() == BODY[:50_000]
    assert tiers(mount)["shm"]["blocks"] >= 6
    assert proxy.count("get") == 0


@pytest.mark.parametrize("size", ["4097", "100k", "1000001"])
@pytest.mark.parametrize("direct", [False, True], ids=["", "O_DIRECT"])
def test_odd_requests_give_the_bytes_of_the_file(mount: Mount, proxy: FaultProxy, size: str, direct: bool) -> None:
    copy = mount.node.base / "copy"
    flags = ["iflag=direct"] if direct else []
    run_program(["dd", f"if={mount.path}/large", f"of={copy}", f"bs={size}", *flags])
    assert copy.read_bytes() == BODY
    assert (proxy.count("get") > 0) == direct  # past the tiers: B2 of docs/SEMANTICS.md


def test_several_readers_at_different_places(mount: Mount, proxy: FaultProxy) -> None:
    commands = [
        ["dd", f"if={mount.path}/large", f"of={mount.node.base}/copy{start}", "bs=1M", f"skip={start}"]
        for start in (0, 5, 9, 16)
    ]
    children = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    assert [child.wait(60) for child in children] == [0, 0, 0, 0]
    for start in (0, 5, 9, 16):
        assert (mount.node.base / f"copy{start}").read_bytes() == BODY[start * MIB :], start
    assert proxy.count("get") == 0


def test_a_file_half_of_which_was_evicted(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> None:
    """Blocks that are on the disk and blocks that are not take turns."""
    node = make_node(idle_timeout="30s")
    bucket.put("large", BODY)
    first = mount_it(node, bucket, proxy)
    with (first.path / "large").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for index in (22, 4, 16, 10, 1, 13, 7, 19):  # too far apart for a sequence
            assert os.pread(file.fileno(), 10, index * MIB) == BODY[index * MIB : index * MIB + 10]
    first.umount()
    node.stop_agent()
    mount = mount_it(node, bucket, proxy)
    proxy.forget()
    read_again(mount)
    assert 0 < proxy.count("get") <= 17


def test_r7_no_agent_is_needed(mount: Mount, proxy: FaultProxy) -> None:
    os.stat(mount.path / "large")
    with no_agent_can_start(mount.node):
        mount.node.kill_agent()
        read_again(mount)
        # one that is being started, and finds that it cannot, may be a process at this moment
        assert not [agent for agent in mount.node.status()["agents"] if agent["agent_pid"] is not None]
    assert proxy.count("get") == 0


def test_r7_killed_processes_are_not_noticed(mount: Mount) -> None:
    with reading(mount.path, {"large": BODY}) as reader:
        for _ in range(3):
            time.sleep(0.4)
            mount.wait_for_worker(other_than=mount.kill_worker())
            mount.node.wait_for_agent(other_than=mount.node.kill_agent())
    assert reader.outcome["files"] > 0


def test_after_crashes_the_disk_is_left_to_the_agent(mount: Mount, proxy: FaultProxy) -> None:
    for _ in range(3):
        mount.wait_for_worker(other_than=mount.kill_worker())
    read_again(mount)
    assert "this one leaves the disk tier to the agent" in mount.node.full_log()
    assert tiers(mount)["shm"]["blocks"] >= 24
    assert proxy.count("get") == 0


# -- a disk tier that is not what it was ------------------------------------------------------------------------------


def sprinkle(path: Path) -> None:
    """Change bytes in every block."""
    dice = random.Random(5)
    with path.open("r+b") as file:
        for at in range(MIB // 2, path.stat().st_size - 8, MIB // 2):
            file.seek(at + dice.randrange(4096))
            file.write(dice.randbytes(8))


def cut(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "changed": sprinkle,
    "cut": cut,
    "gone": Path.unlink,
    "directory gone": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_r3_damage_while_it_is_mounted_is_a_miss(mount: Mount, damage: str) -> None:
    read_again(mount)
    DAMAGES[damage](data_file(mount))
    for _ in range(3):
        read_again(mount)
        time.sleep(0.5)
    if damage == "changed":
        assert tiers(mount)["disk"]["corrupt"] > 0


@pytest.mark.slow
def test_a_tier_that_begins_anew_is_followed(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> None:
    """The worker reads from the new file, and does not keep the room of the old one."""
    node = make_node(shm_size="16MiB")
    bucket.put("large", BODY)
    mount = mount_it(node, bucket, proxy)
    read_again(mount)
    wait_until(lambda: tiers(mount)["disk"]["blocks"] >= 20, 20, "it is on the disk")
    data_file(mount).unlink()
    wait_until(data_file(mount).exists, 20, "the tier begins anew")

    def on_disk_again() -> bool:
        read_again(mount)
        return tiers(mount)["disk"]["blocks"] >= 20

    wait_until(on_disk_again, 20, "it is on the disk again")
    hits = tiers(mount)["disk"]["hits"]
    read_again(mount)
    wait_until(lambda: tiers(mount)["disk"]["hits"] > hits, 5, "the worker reads from there")
    held = [os.readlink(path) for path in Path(f"/proc/{mount.state()['worker_pid']}/fd").iterdir()]
    assert not [name for name in held if name.endswith("disk/data.mdb (deleted)")], held


def test_a_cache_without_memory_answers_from_the_disk(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    node = make_node(idle_timeout="30s", shm_size="0")
    bucket.put("large", BODY)
    mount = mount_it(node, bucket, proxy)
    read_again(mount)
    proxy.forget()
    read_again(mount)
    assert proxy.count("get") == 0
    wait_until(lambda: tiers(mount)["disk"]["hits"] >= 20, 5, "the hits are counted")
