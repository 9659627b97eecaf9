"""What an agent leaves behind: nothing when all mounts end, its settings and warm tiers when they go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs.config import CacheConfig, LogConfig, as_plain
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import kill, stopped, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import REPOSITORY, content, evict_pages, read_and_compare

MIB = 1 << 20
OBJECTS = {f"d/{number}": content(f"d{number}", 700_000) for number in range(12)}


def read_all(mount: Mount) -> None:
    read_and_compare(mount.path, OBJECTS)


def test_nothing_stays_in_memory_when_all_are_told_to_end_at_once(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    """What systemd and container runtimes do at the end; what was cached is on disk then."""
    bucket.fill(OBJECTS)
    node = make_node(idle_timeout="60s")
    mounts = [node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", name=name) for name in ("one", "two")]
    for mount in mounts:
        read_all(mount)
    for pid in node.processes():
        kill(pid, signal.SIGTERM)
    wait_until(lambda: not node.processes(), 15, "everything ends")
    assert not any(mount.is_mounted for mount in mounts)
    assert not node.shm_directory.exists()
    assert not list((node.runtime_dir / "agents").glob("*.json"))
    node.mounts = []
    proxy.forget()
    read_all(node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}"))
    assert proxy.count("get") == 0
    node.mounts[0].umount()
    node.stop_agent()


def test_an_open_file_does_not_keep_the_tier_in_memory(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    """The mount serves it for some seconds more, from what another agent fetches if it has to."""
    bucket.fill(OBJECTS)
    node = make_node(idle_timeout="2s")
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    read_all(mount)
    with (mount.path / "d/0").open("rb") as opened:
        for pid in [*node.processes("supervisor"), *node.processes("agent")]:
            kill(pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_mounted, 10, "it is detached")
        evict_pages(Path(f"/proc/self/fd/{opened.fileno()}"))
        assert opened.read() == OBJECTS["d/0"]
    wait_until(lambda: not node.processes(), 20, "everything ends")
    assert not node.shm_directory.exists()
    node.mounts = []


def test_an_agent_whose_starter_died_meanwhile_ends_in_order(node: Node) -> None:
    """A worker starts an agent, and its mount is taken away at that moment."""
    cache = CacheConfig(
        cache_dir=str(node.cache_dir), runtime_dir=str(node.runtime_dir), shm_size_bytes=64 * MIB,
        agent_idle_timeout_s=0.5,
    )  # fmt: skip
    ready, report = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "cachefs.agent.main", "--ready-fd", str(report)],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[report], env=node.environment, cwd=REPOSITORY,
    ) as agent:  # fmt: skip
        os.close(report)
        os.close(ready)
        _, log = agent.communicate(json.dumps({"cache": as_plain(cache), "log": as_plain(LogConfig())}).encode(), 15)
    assert agent.returncode == 0, log.decode()
    assert not node.shm_directory.exists()


@pytest.mark.slow
def test_an_agent_that_is_told_to_end_while_it_starts_takes_the_tier_with_it(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.fill(OBJECTS)
    node = make_node()
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    for delay_s in (0.0, 0.05, 0.1, 0.2, 0.3):
        mount = node.mount(bucket.url, endpoint)
        read_all(mount)
        agent = node.kill_agent()
        node.wait_for_agent(other_than=agent)
        time.sleep(delay_s)
        for pid in node.processes():
            kill(pid, signal.SIGTERM)
        wait_until(lambda: not node.processes(), 15, "everything ends")
        assert not mount.is_mounted
        assert not node.shm_directory.exists(), delay_s
        node.mounts = []


def test_an_agent_that_ends_alone_leaves_the_tier_to_the_next(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.fill(OBJECTS)
    node = make_node(cache_size="0")
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    read_all(mount)
    proxy.forget()
    agent = node.agent_pid
    kill(agent, signal.SIGTERM)
    node.wait_for_agent(other_than=agent)
    read_all(mount)
    assert proxy.count("get") == 0


def test_the_settings_of_an_agent_outlive_it(make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy) -> None:
    """Another mount of the cache directory has others, and its worker is the one that starts the next agent."""
    bucket.fill(OBJECTS)
    node = make_node(idle_timeout="30s")
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    first = node.mount(bucket.url, endpoint, name="first")
    read_all(first)
    wait_until(lambda: node.status()["agents"][0]["tiers"]["disk"]["spill_pending"] == 0, 20, "all is on disk")
    other = node.mount(
        bucket.url, endpoint, "--block-size=4MiB", "--cache-size=64MiB", "--shm-size=0", "--memory-limit=512MiB",
        name="other",
    )  # fmt: skip
    before = node.status()["agents"][0]
    agent, worker = node.agent_pid, first.worker_pid
    with stopped(worker):
        kill(agent)
        node._was_killed = True
        node.wait_for_agent(other_than=agent)
        proxy.forget()
        read_all(other)
    read_all(first)
    assert proxy.count("get") == 0
    wait_until(lambda: [m["agent_pid"] for m in node.status()["mounts"]] == [node.agent_pid] * 2, 10, "both found it")
    after = node.status()["agents"][0]
    for key in ("block_size_bytes", "memory_limit_bytes"):
        assert after[key] == before[key]
    for tier in ("shm", "disk"):
        assert after["tiers"][tier]["limit_bytes"] == before["tiers"][tier]["limit_bytes"]
    assert [mount["restarts"] for mount in node.status()["mounts"]] == [0, 0]


def test_the_settings_of_a_dead_agent_do_not_outlive_its_mounts(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.fill(OBJECTS)
    node = make_node()
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    read_all(node.mount(bucket.url, endpoint))
    node.kill_everything()
    assert list((node.runtime_dir / "agents").glob("*.json"))
    mount = node.mount(bucket.url, endpoint, "--cache-size=64MiB")
    assert node.status()["agents"][0]["tiers"]["disk"]["limit_bytes"] == 64 * MIB
    read_all(mount)


@pytest.mark.slow
def test_settings_that_cannot_be_read_are_no_reason_not_to_start(
    make_node: Callable[..., Node], bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.fill(OBJECTS)
    node = make_node()
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}")
    for text in ("", "[]", "no json", '{"cache_size_bytes": "much"}', '{"cache_size_bytes": null}', "\xff"):
        for path in (node.runtime_dir / "agents").glob("*.json"):
            path.write_text(text, encoding="latin-1")
        agent = node.kill_agent()
        node.wait_for_agent(other_than=agent)
        read_all(mount)
    assert not [line for line in node.full_log().splitlines() if line.startswith("Traceback")]


@pytest.mark.slow
def test_metadata_that_nobody_uses_is_removed(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.fill(OBJECTS)
    endpoint = f"--endpoint-url={proxy.endpoint_url}"
    for ttl in ("60s", "61s"):
        node.mount(bucket.url, endpoint, f"--metadata-ttl={ttl}").umount()
    node.stop_agent()
    old, young = sorted((node.cache_dir / "volumes").iterdir())
    shutil.copytree(old, old.with_name(f"{old.name}.aside-1"))
    (node.cache_dir / "volumes" / "not-a-volume").mkdir()
    month_ago = young.stat().st_mtime - 31 * 86400
    for path in [*old.parent.glob("*/*"), *old.parent.iterdir()]:
        if young not in (path, path.parent):
            os.utime(path, (month_ago, month_ago))
    mount = node.mount(bucket.url, endpoint, "--metadata-ttl=62s")
    wait_until(lambda: not list(old.parent.glob(f"{old.name}*")), 10, "what was not used for a month is removed")
    assert young.exists()
    assert (node.cache_dir / "volumes" / "not-a-volume").exists()
    wait_until(lambda: node.full_log().count("nobody has used for 31 days") == 2, 5, "one line each")
    mount.umount()
