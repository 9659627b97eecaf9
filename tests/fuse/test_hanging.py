"""Processes that hang instead of dying (SIGSTOP stands for a deadlock and for a sick disk): M11 of docs/SEMANTICS.md,
and df, which must wait for nobody.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fuse import agent_rig
from tests.fuse.agent_rig import OBJECTS
from tests.fuse.supervisor_rig import output, python
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import stopped, wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import errno_name, evict_pages

LIMIT_S = 3.0
READ = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read())"


def mount_objects(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str, name: str = "mnt") -> Mount:
    """As everywhere, but who hangs is found out soon."""
    return agent_rig.mount_objects(node, bucket, proxy, f"--hang-timeout={LIMIT_S}s", *options, name=name)


# -- workers ----------------------------------------------------------------------------------------------------------


def test_m11_a_worker_that_hangs_is_replaced(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    worker = mount.worker_pid
    with stopped(worker):
        began = time.monotonic()
        assert output(python(READ, mount.path / "later"), 30) == OBJECTS["later"]
        assert LIMIT_S * 0.5 < time.monotonic() - began < 20
    mount.wait_for_worker(other_than=worker)
    status = mount.status()
    assert (status["restarts"], status["health"]) == (1, "ok")
    assert status["last_crash"]["what"] == f"killed, no sign of life for {LIMIT_S:g} s (it is stopped)"
    assert f"worker {worker} hangs" in node.full_log()
    with stopped(mount.worker_pid):  # and so is the next one
        assert output(python(READ, mount.path / "last"), 30) == OBJECTS["last"]


@pytest.mark.slow
def test_m11_without_channel_a_worker_that_hangs_is_replaced_too(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy, "--engine=pyfuse3")
    with stopped(mount.worker_pid):
        assert output(python(READ, mount.path / "later"), 30) == OBJECTS["later"]
    assert mount.status()["restarts"] == 1


SABOTAGE = """
import os, sys, threading, time

def hanging(method, trigger):
    def hangs_once(self, *arguments):
        try:
            os.unlink(trigger)
        except OSError:
            return method(self, *arguments)
        time.sleep(3600)
    return hangs_once

def sabotage():
    while not hasattr(sys.modules.get("cachefs.vfs.filesystem"), "FileSystem"):
        time.sleep(0.01)
    files = sys.modules["cachefs.vfs.filesystem"].FileSystem
    for name in ("listing_generation", "lookup_known"):
        setattr(files, name, hanging(getattr(files, name), os.path.dirname(__file__) + "/" + name))

if "cachefs.mount.worker" in sys.orig_argv:
    threading.Thread(target=sabotage, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("method", "action"),
    [("listing_generation", "os.listdir(sys.argv[1])"), ("lookup_known", "os.path.exists(sys.argv[1] + '/other')")],
    ids=["the channel", "the event loop"],
)
def test_m11_one_thread_that_hangs_is_enough(
    node: Node, bucket: Bucket, proxy: FaultProxy, method: str, action: str
) -> None:
    (node.base / "sitecustomize.py").write_text(SABOTAGE)
    node.environment["PYTHONPATH"] = f"{node.base}:{node.environment['PYTHONPATH']}"
    mount = mount_objects(node, bucket, proxy)
    trigger = node.base / method
    trigger.touch()
    output(python(f"import os, sys; {action}", mount.path), 30)
    assert not trigger.exists(), "nothing hung, so nothing was tested"
    mount.wait_for_worker(other_than=0)
    status = mount.status()
    assert (status["restarts"], status["last_crash"]["what"]) == (1, f"killed, no sign of life for {LIMIT_S:g} s")
    assert output(python(READ, mount.path / "later")) == OBJECTS["later"]


@pytest.mark.slow
def test_m11_nothing_is_killed_after_everything_stood_still(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """As a laptop that slept, or a container that was paused."""
    mount = mount_objects(node, bucket, proxy)
    proxy.down = True
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(errno_name, (mount.path / "later").read_bytes)  # the worker waits for the agent as well
        time.sleep(1)
        before = node.processes()
        with stopped(*before):
            time.sleep(LIMIT_S * 2)
        proxy.down = False
        assert waiting.result(timeout=30) == ""
        time.sleep(LIMIT_S)
    assert node.processes() == before
    assert mount.status()["restarts"] == 0


@pytest.mark.slow
def test_m11_a_store_that_hangs_is_not_a_worker_or_an_agent_that_hangs(
    node: Node, bucket: Bucket, proxy: FaultProxy
) -> None:
    mount = mount_objects(node, bucket, proxy, "--io-timeout=8s")
    proxy.down = True
    before = node.processes()
    assert errno_name((mount.path / "later").read_bytes) == "EIO"
    assert node.processes() == before
    assert mount.status()["restarts"] == 0


# -- agents -----------------------------------------------------------------------------------------------------------


def test_m11_an_agent_that_hangs_is_replaced(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    """Two mounts wait for it: they come to the same verdict, and one agent is killed, and one is started."""
    mount = mount_objects(node, bucket, proxy)
    second = mount_objects(node, bucket, proxy, name="second")
    agent = node.agent_pid
    with stopped(agent):
        began = time.monotonic()
        readers = [python(READ, mount.path / "later"), python(READ, second.path / "last")]
        assert [output(reader, 40) for reader in readers] == [OBJECTS["later"], OBJECTS["last"]]
        assert time.monotonic() - began < 25
    assert node.agent_pid != agent
    assert node.full_log().count("shows no sign of life: killed") == 1
    wait_until(lambda: sum(m.status()["counters"].get("hung_agents", 0) for m in (mount, second)) == 1, 5, "counted")
    assert [m.status()["restarts"] for m in (mount, second)] == [0, 0]
    assert mount.status()["agent_pid"] == node.agent_pid
    node._was_killed = True


@pytest.mark.slow
def test_m11_an_agent_that_hangs_while_a_worker_attaches_is_replaced(
    node: Node, bucket: Bucket, proxy: FaultProxy
) -> None:
    mount = mount_objects(node, bucket, proxy, "--io-timeout=1s")
    agent = node.agent_pid
    with stopped(agent):
        mount.wait_for_worker(other_than=mount.kill_worker())
        evict_pages(mount.path / "cached")
        assert output(python(READ, mount.path / "cached")) == OBJECTS["cached"], "what is cached is served meanwhile"
        node.wait_for_agent(other_than=agent, timeout_s=40)
        wait_until(lambda: mount.status()["agent_pid"] == node.agent_pid, 10, "it is attached")
    assert output(python(READ, mount.path / "later")) == OBJECTS["later"]
    node._was_killed = True


@pytest.mark.slow
def test_a_new_mount_says_how_to_get_rid_of_an_agent_that_hangs(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    agent, place = node.agent_pid, node.base / "second"
    place.mkdir()
    with stopped(agent):
        done = node.try_mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", "--ready-timeout=2s", place=place)
        assert done.returncode == 1
        said = f"the agent of {node.cache_dir} hangs: end it with `kill -9 {agent}` and mount again"
        assert done.stderr == f"cachefs: {said}\n"
    assert (mount.path / "later").read_bytes() == OBJECTS["later"]


@pytest.mark.slow
def test_an_idle_agent_that_stands_still_is_left_alone(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    agent = node.agent_pid
    with stopped(agent):
        time.sleep(LIMIT_S * 2.5)
    assert node.agent_pid == agent
    assert (mount.path / "later").read_bytes() == OBJECTS["later"]


def test_df_does_not_wait_for_the_agent(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_objects(node, bucket, proxy)
    with stopped(node.agent_pid):
        began = time.monotonic()
        found = os.statvfs(mount.path)
        assert time.monotonic() - began < 1
    assert found.f_files - found.f_ffree >= len(OBJECTS)
