"""Several mounts on one agent: they share blocks, names and the agent itself, and do not get into each other's way."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fuse.test_cache_faults import OBJECTS, mount_objects, read_all
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import stopped, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, evict_pages


def test_two_mounts_of_one_bucket_share_everything(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(OBJECTS)
    first = mount_objects(node, bucket, proxy, name="first")
    second = mount_objects(node, bucket, proxy, name="second")
    assert len(node.processes("agent")) == 1
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read_all, [first, second]))
    keys = [(request.key, request.range) for request in proxy.requests if request.kind == "get"]
    assert len(keys) == len(set(keys))
    assert sum(request.sent_bytes for request in proxy.requests if request.kind == "get") == sum(
        map(len, OBJECTS.values())
    )
    inode = os.stat(first.path / "large").st_ino
    assert os.stat(second.path / "large").st_ino == inode
    first.umount()
    read_all(second)
    assert second.status()["health"] == "ok"


def test_two_mounts_with_other_rules_stay_apart(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", b"one")
    trusting = mount_objects(node, bucket, proxy, name="trusting")
    strict = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--consistency=strict", name="strict")
    assert (trusting.path / "file").read_bytes() == (strict.path / "file").read_bytes() == b"one"
    bucket.put("file", b"two")
    assert (strict.path / "file").read_bytes() == b"two"
    assert (trusting.path / "file").read_bytes() == b"one"


@pytest.mark.slow
def test_ten_mounts_on_one_agent(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bodies = {f"p{number}/file": content(f"p{number}", 300_000) for number in range(10)}
    bucket.fill(bodies)

    def mount_one(number: int) -> Mount:
        return node.mount(f"{bucket.url}/p{number}", f"--endpoint-url={proxy.endpoint_url}", name=f"m{number}")

    with ThreadPoolExecutor(3) as pool:
        mounts = list(pool.map(mount_one, range(10)))
    node.mounts = mounts
    assert len(node.processes("agent")) == 1
    for number, mount in enumerate(mounts):
        assert (mount.path / "file").read_bytes() == bodies[f"p{number}/file"]
    node.kill_agent()
    for number, mount in enumerate(mounts):
        evict_pages(mount.path / "file")
        assert (mount.path / "file").read_bytes() == bodies[f"p{number}/file"]
    wait_until(lambda: [m["health"] for m in node.status()["mounts"]] == ["ok"] * 10, 15, "all found the new agent")
    assert len(node.processes("agent")) == 1
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Mount.umount, mounts))
    wait_until(lambda: not node.processes(), 10, "all processes end")


def test_other_sizes_than_the_running_agent_has_are_said(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(OBJECTS)
    mount_objects(node, bucket, proxy, name="first")
    (node.base / "second").mkdir()
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    done = node.try_mount(bucket.url, endpoint, "--shm-size=32MiB", place=node.base / "second")
    node.mounts.append(Mount(node, node.base / "second"))
    assert done.returncode == 0
    assert "--shm-size" in done.stderr
    assert "--cache-size" not in done.stderr  # asked for, and what it has
    (node.base / "third").mkdir()
    unasked = [option for option in node.options if "-size" not in option]
    done = node.run("mount", *unasked, endpoint, bucket.url, str(node.base / "third"))
    node.mounts.append(Mount(node, node.base / "third"))
    assert (done.returncode, done.stderr) == (0, "")  # nobody asked for the default


def test_an_agent_that_comes_back_with_blocks_of_another_size(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(OBJECTS)
    small = mount_objects(node, bucket, proxy, name="small")
    large = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--block-size=4MiB", name="large")
    read_all(small)
    # Hold the worker that would start the next agent with its own block size, so that the other one does.
    with stopped(small.worker_pid):
        node.kill_agent()
        evict_pages(large.path / "large")
        read_all(large)
        assert node.status()["agents"][0]["tiers"]["shm"]["state"] == "on"
    for _ in range(2):
        for mount in (small, large):
            for key in OBJECTS:
                evict_pages(mount.path / key)
            read_all(mount)
