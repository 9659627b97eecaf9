"""Mounts whose agent cannot be started: M5, M8 and R4 of docs/SEMANTICS.md."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fuse.agent_rig import OBJECTS, mount_objects, no_agent_can_start, reads_right
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Node
from tests.support.programs import errno_name


@pytest.mark.parametrize("engine", ["channel", pytest.param("pyfuse3", marks=pytest.mark.slow)])
def test_m8_a_new_worker_serves_what_is_cached_until_an_agent_comes(
    node: Node, bucket: Bucket, proxy: FaultProxy, engine: str
) -> None:
    mount = mount_objects(node, bucket, proxy, f"--engine={engine}")
    with ThreadPoolExecutor(1) as pool:
        with no_agent_can_start(node):
            node.kill_agent()
            mount.wait_for_worker(other_than=mount.kill_worker())
            assert reads_right(mount, "cached")
            assert os.stat(mount.path / "later").st_size == len(OBJECTS["later"])
            waiting = pool.submit(reads_right, mount, "later")
            time.sleep(1.5)
            assert not waiting.done(), "what has to be asked waits for an agent"
            assert node.status()["agents"] == []
            status = mount.status()
            assert (status["health"], status["restarts"], status["agent_pid"]) == ("degraded", 1, None)
        assert waiting.result(timeout=20)
    assert mount.status()["restarts"] == 1, "to have no agent is not a crash"
    assert mount.status()["agent_pid"] == node.agent_pid


@pytest.mark.slow
def test_m8_what_has_to_be_asked_does_not_wait_for_ever(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--io-timeout=1s")
    with no_agent_can_start(node):
        node.kill_agent()
        mount.wait_for_worker(other_than=mount.kill_worker())
        started = time.monotonic()
        assert errno_name((mount.path / "later").read_bytes) == "EIO"
        assert 1 < time.monotonic() - started < 20
        assert reads_right(mount, "cached")
    assert (mount.path / "later").read_bytes() == OBJECTS["later"]


def test_m8_keys_that_are_gone_are_waited_for(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    profile, moved = node.base / "config", node.base / "moved"
    keys = bucket.server.environment
    profile.write_text(
        f"[profile p]\naws_access_key_id={keys['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key={keys['AWS_SECRET_ACCESS_KEY']}\n"
    )
    for name in [name for name in node.environment if name.startswith("AWS_")]:
        del node.environment[name]
    node.environment |= {"AWS_CONFIG_FILE": str(profile), "AWS_EC2_METADATA_DISABLED": "true"}
    mount = mount_objects(node, bucket, proxy, "--profile=p")
    profile.rename(moved)
    node.kill_agent()
    mount.wait_for_worker(other_than=mount.kill_worker())
    assert reads_right(mount, "cached")
    moved.rename(profile)
    assert reads_right(mount, "later")
    assert mount.status()["restarts"] == 1


def test_m8_killed_workers_find_their_files_again_and_again(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """The second restart knows what the first one knew, although no agent has answered in between."""
    mount = mount_objects(node, bucket, proxy)
    with no_agent_can_start(node):
        node.kill_agent()
        for _ in range(2):
            mount.wait_for_worker(other_than=mount.kill_worker())
            assert reads_right(mount, "cached")
    assert (mount.path / "later").read_bytes() == OBJECTS["later"]


@pytest.mark.slow
def test_m8_without_agent_and_files_it_is_a_crash_that_the_log_explains(
    node: Node, bucket: Bucket, proxy: FaultProxy
) -> None:
    mount = mount_objects(node, bucket, proxy)
    with no_agent_can_start(node):
        node.kill_agent()
        shutil.rmtree(node.cache_dir / "volumes")
        mount.kill_worker()
        wait_until(lambda: "nothing to read from" in str(mount.state().get("last_crash")), 20, "the worker gives up")
    mount.wait_for_worker(other_than=0, timeout_s=20)
    assert sorted(os.listdir(mount.path)) == sorted(OBJECTS)


def test_m5_a_mount_without_agent_is_one_line(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    place = node.base / "mnt"
    place.mkdir()
    with no_agent_can_start(node):
        done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", place=place)
    assert done.returncode == 1
    assert done.stderr.startswith("cachefs: the agent cannot start: cannot lock ")
    assert done.stderr.count("\n") == 1
    assert node.processes() == []


def test_m8_an_upgrade_without_agent_changes_nothing(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    before = mount.worker_pid
    with no_agent_can_start(node):
        node.kill_agent()
        done = node.run("upgrade", f"--runtime-dir={node.runtime_dir}", str(mount.path))
        assert done.returncode == 1
        assert "nothing was changed" in done.stderr
        assert mount.worker_pid == before
        assert reads_right(mount, "cached")
    assert (mount.path / "later").read_bytes() == OBJECTS["later"]
