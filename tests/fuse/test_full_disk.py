"""The disk of the cache directory is full: by what cachefs keeps there, and by others. Nothing that users ask fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.machine import fill_up, free, tmpfs, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, read_and_compare

MIB = 1 << 20
BIG = {f"big{number}": content(f"big{number}", 24 * MIB) for number in range(5)}


@pytest.fixture
def disk(needs_root: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MiB."""
    with tmpfs(tmp_path / "disk", "96m") as place:
        yield place


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A directory to mount: 16 directories of 300 names that are long enough to take some room."""
    place = tmp_path / "origin"
    for number in range(16):
        (place / f"d{number}").mkdir(parents=True)
        for name in names(number):
            (place / f"d{number}" / name).write_bytes(b"x")
    for name, body in BIG.items():
        (place / name).write_bytes(body)
    return place


def names(number: int) -> list[str]:
    return [f"{number:03}-{entry:04}-" + "n" * 220 for entry in range(300)]


def list_all(mount: Mount) -> None:
    for number in range(16):
        assert sorted(os.listdir(mount.path / f"d{number}")) == names(number), number


def read_big(mount: Mount) -> None:
    read_and_compare(mount.path, BIG)


def disk_tier(node: Node) -> dict[str, object]:
    """Return what `cachefs status` says of the disk tier."""
    found: dict[str, object] = node.status()["agents"][0]["tiers"]["disk"]
    return found


def test_what_cachefs_keeps_never_fills_the_disk(make_node: Callable[..., Node], disk: Path, origin: Path) -> None:
    node = make_node(cache_dir=disk / "cache", cache_size="512MiB")
    mount = node.mount(f"file://{origin}")
    read_big(mount)
    wait_until(lambda: disk_tier(node)["spill_pending"] == 0, 30, "everything is on disk")
    assert disk_tier(node)["state"] == "full"
    assert free(disk) > 16 * MIB
    list_all(mount)
    assert "EIO" not in node.full_log()
    node.kill_agent()
    list_all(mount)
    read_big(mount)


def test_others_fill_the_disk(make_node: Callable[..., Node], disk: Path, origin: Path) -> None:
    node = make_node(cache_dir=disk / "cache", cache_size="512MiB")
    (origin / "later").mkdir()
    (origin / "later" / "one").write_bytes(b"1")
    mount = node.mount(f"file://{origin}")
    read_big(mount)
    wait_until(lambda: int(str(disk_tier(node)["used_bytes"])) > 30 * MIB, 30, "there is something to give back")
    hog = fill_up(disk)
    list_all(mount)
    read_big(mount)
    wait_until(lambda: free(disk) > 16 * MIB, 15, "the disk tier gives room back")
    fill_up(disk)
    assert (mount.path / "later" / "one").read_bytes() == b"1"
    assert "EIO" not in node.full_log()
    hog.unlink()
    read_big(mount)
    wait_until(lambda: int(str(disk_tier(node)["used_bytes"])) > 30 * MIB, 60, "the disk tier uses what is free again")


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_metadata_moves_to_the_tmpfs_while_it_is_in_use(
    make_node: Callable[..., Node], disk: Path, origin: Path
) -> None:
    """There is no disk tier that could give room back."""
    node = make_node(cache_dir=disk / "cache", cache_size="0")
    mount = node.mount(f"file://{origin}", "--metadata-ttl=forever")
    assert len(os.listdir(mount.path / "d0")) == 300
    before = {name: os.stat(mount.path / "d0" / name).st_ino for name in names(0)[:20]}
    agent = node.agent_pid
    hog = fill_up(disk)
    for round_ in range(6):  # more than what was promised ahead
        for number in range(16):
            place = origin / f"r{round_}-{number}"
            place.mkdir()
            for name in names(number):
                (place / name).touch()
    with (mount.path / "big0").open("rb") as opened:
        for round_ in range(6):
            for number in range(16):
                assert sorted(os.listdir(mount.path / f"r{round_}-{number}")) == names(number)
            assert os.pread(opened.fileno(), 1000, round_ * MIB) == BIG["big0"][round_ * MIB :][:1000]
    assert node.agent_pid != agent, "the metadata was more than had been promised"
    assert list((node.shm_directory / "volumes").glob("*/data.mdb"))
    assert {name: os.stat(mount.path / "d0" / name).st_ino for name in before} == before
    assert "EIO" not in node.full_log()
    hog.unlink()
    node.kill_agent()
    list_all(mount)
    assert not list((node.shm_directory / "volumes").glob("*/data.mdb")), "and back home"


def test_a_new_mount_while_the_disk_is_full(make_node: Callable[..., Node], disk: Path, origin: Path) -> None:
    node = make_node(cache_dir=disk / "cache", cache_size="0")
    first = node.mount(f"file://{origin}")
    list_all(first)
    hog = fill_up(disk)
    second = node.mount(f"file://{origin}/d3", name="second")
    assert sorted(os.listdir(second.path)) == names(3)
    list_all(first)
    hog.unlink()
    node.kill_agent()
    assert sorted(os.listdir(second.path)) == names(3)
    volumes = node.cache_dir / "volumes"
    wait_until(lambda: len(list(volumes.glob("*/data.mdb"))) == 2, 10, "both are at home now")
    assert not list(volumes.glob("*.*"))


def test_after_a_power_loss_the_old_blocks_are_deleted(
    make_node: Callable[..., Node], disk: Path, origin: Path
) -> None:
    """More than half of the disk was taken by blocks that cannot be trusted."""
    node = make_node(cache_dir=disk / "cache", cache_size="80MiB")
    read_big(node.mount(f"file://{origin}"))
    wait_until(lambda: disk_tier(node)["spill_pending"] == 0, 30, "everything is on disk")
    node.kill_everything()
    shutil.rmtree(node.shm_directory)
    stamp = node.cache_dir / "disk" / "clean.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_bytes()) | {"boot_id": "another boot"}))
    mount = node.mount(f"file://{origin}")
    wait_until(lambda: not [path for path in node.cache_dir.iterdir() if path.name.startswith("disk.")], 10, "deleted")
    read_big(mount)
    wait_until(lambda: int(str(disk_tier(node)["used_bytes"])) > 40 * MIB, 30, "the new tier has the room")
    assert len([line for line in node.full_log().splitlines() if "deleted it and began anew" in line]) == 1


@pytest.mark.slow
def test_another_block_size_keeps_the_cache(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    objects = {f"{number}": content(f"{number}", 3 * MIB + 5) for number in range(4)}
    bucket.fill(objects)
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    read_and_compare(node.mount(bucket.url, endpoint).path, objects)
    node.mounts[0].umount()
    node.stop_agent()
    proxy.forget()
    done = node.try_mount(bucket.url, endpoint, "--block-size=2MiB", place=node.base / "mnt")
    assert done.returncode == 0
    assert "1MiB" in done.stderr
    assert "--block-size" in done.stderr
    mount = Mount(node, node.base / "mnt")
    node.mounts = [mount]
    read_and_compare(mount.path, objects)
    assert proxy.count("get") == 0
    assert node.status()["agents"][0]["block_size_bytes"] == MIB
    mount.umount()
    node.stop_agent()
    shutil.rmtree(node.cache_dir)
    read_and_compare(node.mount(bucket.url, endpoint, "--block-size=2MiB").path, objects)
    assert node.status()["agents"][0]["block_size_bytes"] == 2 * MIB, "there were no blocks"
