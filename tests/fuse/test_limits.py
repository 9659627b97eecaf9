"""Quotas and time to live of volumes on real mounts (Q1 to Q4 of docs/SEMANTICS.md)."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from bench.s3_server import S3Server
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages

MIB = 1 << 20
FILES = {f"f/{number:02}": content(str(number), MIB) for number in range(40)}
QUOTAS = ("--shm-quota=20MiB", "--disk-quota=24MiB")


@pytest.fixture
def filled(bucket: Bucket) -> Bucket:
    """A bucket with 40 MiB."""
    bucket.fill(FILES)
    return bucket


def mount_it(node: Node, bucket: Bucket, url: str, *options: str, name: str = "mnt") -> Mount:
    return node.mount(bucket.url, f"--endpoint-url={url}", "--metadata-ttl=forever", *options, name=name)


def read_all(mount: Mount, files: dict[str, bytes] = FILES) -> None:
    for key, body in files.items():
        evict_pages(mount.path / key)
        assert (mount.path / key).read_bytes() == body


def limits(mount: Mount) -> dict[str, dict[str, Any]]:
    """What the agent says of the volume of a mount, by tier."""
    agent = mount.node.status()["agents"][0]
    found: dict[str, dict[str, Any]] = agent["volumes"][mount.status()["volume_id"]]["limits"]
    return found


def tiers(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = mount.node.status()["agents"][0]["tiers"]
    return found


def origin_gets(mount: Mount) -> int:
    """How many objects the agent has asked for."""
    return int(mount.node.status()["agents"][0]["counters"]["origin_get_requests"])


def within(mount: Mount) -> bool:
    found = limits(mount)
    return all(tier["used_bytes"] <= tier["quota_bytes"] for tier in found.values())


def test_q1_a_volume_keeps_to_its_quotas(make_node: Callable[..., Node], s3_server: S3Server, filled: Bucket) -> None:
    node = make_node(idle_timeout="30s")
    with Bucket.create(s3_server) as other:
        others = {f"o/{number}": content(f"o{number}", MIB) for number in range(12)}
        other.fill(others)
        mount_of_other = mount_it(node, other, s3_server.endpoint_url, name="other")
        read_all(mount_of_other, others)
        mount = mount_it(node, filled, s3_server.endpoint_url, *QUOTAS)
        for number in range(3):
            read_all(mount)
            assert within(mount), (number, limits(mount))
        assert limits(mount)["shm"]["used_bytes"] > 15 * MIB
        wait_until(lambda: limits(mount)["disk"]["used_bytes"] > 18 * MIB, 20, "blocks come to the disk tier")
        assert within(mount)
        assert limits(mount_of_other)["shm"]["used_bytes"] is None
        got = origin_gets(mount)
        read_all(mount_of_other, others)
        assert origin_gets(mount) == got, "nothing of the other volume has left"
        mount_of_other.umount()


@pytest.mark.slow
def test_q1_holdings_outlive_the_agent(make_node: Callable[..., Node], s3_server: S3Server, filled: Bucket) -> None:
    node = make_node(idle_timeout="30s")
    mount = mount_it(node, filled, s3_server.endpoint_url, *QUOTAS)
    read_all(mount)
    wait_until(lambda: limits(mount)["disk"]["used_bytes"] > 18 * MIB, 20, "blocks come to the disk tier")
    held = limits(mount)
    node.wait_for_agent(node.kill_agent())
    wait_until(lambda: _comes_back(mount), 10, "the worker is attached again")
    again = limits(mount)
    assert again["disk"]["used_bytes"] >= held["disk"]["used_bytes"]
    assert again["shm"]["used_bytes"] > 15 * MIB
    assert within(mount)
    read_all(mount)
    assert within(mount)
    mount.umount()
    node.stop_agent()
    mount = mount_it(node, filled, s3_server.endpoint_url, *QUOTAS)
    assert limits(mount)["disk"]["used_bytes"] > 18 * MIB
    assert within(mount)


def _comes_back(mount: Mount) -> bool:
    with contextlib.suppress(KeyError, IndexError):
        return bool(limits(mount))
    return False


@pytest.mark.slow
def test_q2_the_newest_mount_decides(make_node: Callable[..., Node], s3_server: S3Server, filled: Bucket) -> None:
    node = make_node(idle_timeout="30s")
    mount = mount_it(node, filled, s3_server.endpoint_url)
    read_all(mount)
    wait_until(lambda: tiers(mount)["disk"]["blocks"] >= 40, 20, "blocks come to the disk tier")
    second = mount_it(node, filled, s3_server.endpoint_url, *QUOTAS, name="second")
    wait_until(lambda: within(mount) and limits(mount)["disk"]["used_bytes"] > 15 * MIB, 10, "it comes down to it")
    assert tiers(mount)["disk"]["used_bytes"] <= 24 * MIB
    node.wait_for_agent(node.kill_agent())
    wait_until(lambda: _comes_back(mount) and _comes_back(second), 10, "both workers are attached again")
    assert limits(mount)["disk"]["quota_bytes"] == 24 * MIB
    third = mount_it(node, filled, s3_server.endpoint_url, name="third")
    assert limits(third)["disk"]["quota_bytes"] == 0
    read_all(third)
    wait_until(lambda: tiers(mount)["disk"]["blocks"] >= 40, 20, "there is no limit any more")


@pytest.mark.slow
def test_q3_what_nobody_reads_leaves(make_node: Callable[..., Node], filled: Bucket, proxy: FaultProxy) -> None:
    """Also when the volume is not mounted any more, and another agent has come."""
    node = make_node(idle_timeout="60s")
    mount = mount_it(node, filled, proxy.endpoint_url, "--disk-ttl=4s", "--prefetch=off")
    read_all(mount)
    until = time.monotonic() + 8
    while time.monotonic() < until:
        evict_pages(mount.path / "f/07")
        assert (mount.path / "f/07").read_bytes() == FILES["f/07"]
        time.sleep(0.2)
    wait_until(lambda: tiers(mount)["disk"]["blocks"] + tiers(mount)["shm"]["blocks"] <= 2, 12, "the others leave")
    proxy.forget()
    evict_pages(mount.path / "f/07")
    assert (mount.path / "f/07").read_bytes() == FILES["f/07"]
    assert proxy.count("get") == 0, "what was read has stayed"
    read_all(mount)
    mount.umount()
    node.stop_agent()
    other = node.mount(f"file://{node.base}", name="other")
    assert tiers(other)["disk"]["blocks"] >= 40
    wait_until(lambda: tiers(other)["disk"]["blocks"] == 0, 15, "nothing of it is left")


def test_q4_a_warm_up_says_that_the_quota_is_too_small(node: Node, s3_server: S3Server, filled: Bucket) -> None:
    mount = mount_it(node, filled, s3_server.endpoint_url, *QUOTAS)
    run = f"--runtime-dir={node.runtime_dir}"
    done = node.run("warmup", run, str(mount.path))
    assert done.returncode != 0
    assert "24" in done.stderr + done.stdout
    done = node.run("warmup", run, *(str(mount.path / key) for key in list(FILES)[:15]))
    assert done.returncode == 0, done.stderr
    done = node.run("pin", run, str(mount.path))
    assert done.returncode != 0
    assert "quota" in done.stderr
    assert within(mount)


@pytest.mark.parametrize("option", ["--disk-quota=1MiB", "--shm-quota=5", "--disk-ttl=forever", "--disk-ttl=-1s"])
def test_limits_that_cannot_work_are_refused(node: Node, s3_server: S3Server, filled: Bucket, option: str) -> None:
    done = node.try_mount(filled.url, f"--endpoint-url={s3_server.endpoint_url}", option)
    assert done.returncode == 2
    assert option.partition("=")[0] in done.stderr


@pytest.mark.slow
def test_q1_kill_9_of_the_agent_while_the_quota_is_full(
    make_node: Callable[..., Node], s3_server: S3Server, filled: Bucket
) -> None:
    node = make_node(idle_timeout="30s")
    mount = mount_it(node, filled, s3_server.endpoint_url, *QUOTAS)
    stop = threading.Event()
    wrong: list[object] = []

    def read(seed: int) -> None:
        keys = list(FILES)
        random.Random(seed).shuffle(keys)
        try:
            while not stop.is_set():
                read_all(mount, {key: FILES[key] for key in keys})
        except BaseException as error:
            wrong.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(3):
            time.sleep(0.7)
            node.wait_for_agent(node.kill_agent())
    finally:
        time.sleep(0.5)
        stop.set()
        for reader in readers:
            reader.join(60)
    assert wrong == []
    wait_until(lambda: _comes_back(mount), 10, "the worker is attached again")
    wait_until(lambda: within(mount), 10, "what readers on their way brought has been counted")
    assert limits(mount)["shm"]["used_bytes"] > 10 * MIB
