"""How agents begin, end and are found, and whose keys they use: M9 and M10 of docs/SEMANTICS.md."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuse.agent_rig import OBJECTS, agent_file, mount_objects, reads_right
from tests.fuse.memory_s3 import MemoryS3
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import fill_up, kill, stopped, tmpfs, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content

# -- whose keys ---------------------------------------------------------------------------------------------------


def test_the_newest_mount_gives_the_keys_whoever_comes_back_first(make_node: Callable[..., Node]) -> None:
    with MemoryS3() as server, FaultProxy.before(server.endpoint_url) as proxy:
        names = [f"{number}" for number in range(6)]
        for name in names:
            server.store.put(name, content(name, 1000))
        node = make_node()
        options = (f"--endpoint-url={proxy.endpoint_url}", "--path-style", "--metadata-ttl=forever")

        def mount(name: str) -> Mount:
            node.environment |= server.environment | {"AWS_ACCESS_KEY_ID": f"key-of-{name}"}
            mounted = node.mount(f"s3://{server.bucket}", *options, name=name)
            assert sorted(os.listdir(mounted.path)) == names
            return mounted

        def key_of_a_read(mounted: Mount) -> str:
            proxy.forget()
            name = names.pop()
            assert (mounted.path / name).read_bytes() == content(name, 1000)
            (get,) = [request for request in proxy.requests if request.kind == "get"]
            return get.authorization.partition("Credential=")[2].partition("/")[0]

        older, newer = mount("older"), mount("newer")
        assert key_of_a_read(older) == key_of_a_read(newer) == "key-of-newer"
        for late, first, meanwhile in ((newer, older, "key-of-older"), (older, newer, "key-of-newer")):
            with stopped(late.worker_pid):
                node.kill_agent()
                assert key_of_a_read(first) == meanwhile
            wait_until(lambda: len(node.status()["agents"][0]["mount_ids"]) == 2, 10, "both are attached")
            assert key_of_a_read(older) == "key-of-newer"


# -- one agent for one cache directory ----------------------------------------------------------------------------


@pytest.mark.slow
def test_m9_two_runtime_directories_over_one_cache_directory(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    other, place = node.base / "other", node.base / "second"
    place.mkdir()
    arguments = (bucket.url, f"--endpoint-url={proxy.endpoint_url}", f"--runtime-dir={other}")
    done = node.try_mount(*arguments, place=place)
    assert done.returncode == 1
    assert done.stderr == (
        f"cachefs: the agent cannot start: {node.cache_dir} is used by agent {node.agent_pid} with the runtime "
        f"directory {node.runtime_dir}: choose --runtime-dir {node.runtime_dir}, or another --cache-dir\n"
    )
    done = node.run("agent", f"--cache-dir={node.cache_dir}", f"--runtime-dir={other}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"is used by agent {node.agent_pid}" in done.stderr
    assert reads_right(mount, "later")
    mount.umount()
    node.stop_agent()
    assert not (node.cache_dir / "agent").exists()
    assert node.try_mount(*arguments, place=place).returncode == 0
    assert (place / "cached").read_bytes() == OBJECTS["cached"]
    assert node.run("umount", f"--runtime-dir={other}", str(place)).returncode == 0


def test_m9_two_runtime_directories_over_a_read_only_cache_directory(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy, needs_root: None, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "ro", "64m") as file_system, make_node(cache_dir=file_system / "cache") as node:
        node.cache_dir.mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(file_system)], check=True)
        mount = mount_objects(node, bucket, proxy)
        place = node.base / "second"
        place.mkdir()
        done = node.try_mount(
            bucket.url, f"--endpoint-url={proxy.endpoint_url}", f"--runtime-dir={node.base}/other", place=place
        )
        assert done.returncode == 1
        assert f"another agent uses {node.cache_dir}" in done.stderr
        assert reads_right(mount, "later")
        mount.umount()


def test_m9_the_lock_ends_with_its_agent(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount_objects(node, bucket, proxy)
    node.kill_everything()
    (node.cache_dir / "agent").write_text('{"pid": "no number"')  # torn, or of another version
    place = node.base / "second"
    place.mkdir()
    done = node.try_mount(
        bucket.url, f"--endpoint-url={proxy.endpoint_url}", f"--runtime-dir={node.base}/other", place=place
    )
    assert done.returncode == 0, done.stderr
    assert node.run("umount", f"--runtime-dir={node.base}/other", str(place)).returncode == 0


def test_m9_a_full_cache_directory_is_locked_too(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy, needs_root: None, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "full", "1m") as file_system, make_node(cache_dir=file_system / "cache") as node:
        node.cache_dir.mkdir()
        fill_up(file_system)
        mount = mount_objects(node, bucket, proxy)
        (node.base / "second").mkdir()
        options = (f"--endpoint-url={proxy.endpoint_url}", f"--runtime-dir={node.base}/other")
        done = node.try_mount(bucket.url, *options, place=node.base / "second")
        assert done.returncode == 1
        assert f"another agent uses {node.cache_dir}" in done.stderr
        mount.umount()


# -- found again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["socket", "socket and lock", "all of it"])
def test_m9_an_agent_whose_socket_was_removed_is_found(
    node: Node, bucket: Bucket, proxy: FaultProxy, what: str
) -> None:
    mount = mount_objects(node, bucket, proxy)
    agent = node.agent_pid
    if what == "all of it":
        shutil.rmtree(node.runtime_dir / "agents")
    else:
        agent_file(node, "sock").unlink()
        if what == "socket and lock":
            agent_file(node, "lock").unlink()
    second = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--metadata-ttl=forever", name="second")
    assert node.agent_pid == agent
    assert reads_right(second, "later")
    assert reads_right(mount, "last")
    assert agent_file(node, "lock").exists()
    second.umount()


# -- an end that nothing holds up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "head", "get"])
def test_m10_an_agent_ends_while_the_store_hangs(node: Node, bucket: Bucket, proxy: FaultProxy, kind: str) -> None:
    bucket.fill({"d/file": OBJECTS["later"], "e/file": b"x"})
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--request-timeout=60s", "--io-timeout=60s")
    assert (mount.path / "d/file").stat().st_size == len(OBJECTS["later"])
    rule = proxy.add(Fault(kind=kind, stall=True))
    asks: dict[str, Callable[[], object]] = {
        "list": lambda: os.listdir(mount.path / "d"),
        "head": lambda: os.stat(mount.path / "e/file").st_size,
        "get": (mount.path / "d/file").read_bytes,
    }
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asks[kind])
        wait_until(lambda: rule.hits, 5, "the store is asked")
        agent = node.agent_pid
        started = time.monotonic()
        kill(agent, signal.SIGTERM)
        wait_until(lambda: agent not in node.processes("agent"), 10, "the agent ends")
        took_s = time.monotonic() - started
        proxy.remove(rule)
        assert waiting.result(timeout=20) in (["file"], 1, OBJECTS["later"]), "the next agent asks again"
    assert took_s < 3


def test_m10_an_agent_ends_while_a_mount_is_being_checked(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    rule = proxy.add(Fault(kind="list", stall=True))
    (node.base / "second").mkdir()
    with ThreadPoolExecutor(1) as pool:
        options = (f"--endpoint-url={proxy.endpoint_url}", "--request-timeout=60s", "--io-timeout=60s")
        pool.submit(node.try_mount, bucket.url, *options, place=node.base / "second")
        wait_until(lambda: rule.hits, 10, "the bucket is being checked")
        agent = node.agent_pid
        started = time.monotonic()
        kill(agent, signal.SIGTERM)
        wait_until(lambda: agent not in node.processes("agent"), 10, "the agent ends")
        assert time.monotonic() - started < 3
        proxy.remove(rule)
    assert reads_right(mount, "later")
