"""`cachefs status` and `cachefs mount` say what is wrong: the store, its keys, the tiers, and where the log is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cachefs.mount.journal import MAX_LOG_BYTES
from tests.fuse.agent_rig import agent_file
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.machine import wait_until
from tests.support.mounts import Bucket, Mount, Node
from tests.support.programs import content, errno_name

MIB = 1 << 20
BODY = content("file", 3 * MIB)


def mount_file(node: Node, bucket: Bucket, proxy: FaultProxy, *options: str) -> Mount:
    """Mount a bucket with one file whose name is known."""
    bucket.put("file", BODY)
    options = ("--io-timeout=1s", "--metadata-ttl=forever", *options)
    mount = node.mount(bucket.url, f"--endpoint-url={proxy.endpoint_url}", *options)
    assert os.listdir(mount.path) == ["file"]
    return mount


def agent_status(node: Node) -> dict[str, Any]:
    """The only agent's part of the status."""
    (agent,) = node.status()["agents"]
    found: dict[str, Any] = agent
    return found


# -- the store --------------------------------------------------------------------------------------------------------


def test_an_outage_is_said_until_it_is_over(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_file(node, bucket, proxy)
    assert mount.status()["health"] == "ok"
    before = time.time()
    proxy.down = True
    assert errno_name((mount.path / "file").read_bytes) == "EIO"
    status = mount.status()
    assert status["health"] == "degraded"
    (problem,) = status["problems"]
    assert problem.startswith("the store has not answered for ")
    assert "connection refused" in problem
    assert node.run("status", f"--runtime-dir={node.runtime_dir}", str(mount.path)).returncode == 1
    origin = agent_status(node)["volumes"][status["volume_id"]]["origin"]
    assert before <= origin["since"] <= origin["last_error_at"] <= time.time()
    proxy.down = False
    assert (mount.path / "file").read_bytes() == BODY
    assert mount.status()["problems"] == []
    assert mount.status()["health"] == "ok"


def test_keys_that_have_expired_are_said(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_file(node, bucket, proxy)
    proxy.add(Fault(kind="get", status=403, code="ExpiredToken"))
    assert errno_name((mount.path / "file").read_bytes) == "EACCES"
    status = mount.status()
    assert status["health"] == "degraded"
    assert "the session token has expired" in status["problems"][0]
    proxy.clear()
    assert (mount.path / "file").read_bytes() == BODY
    assert mount.status()["health"] == "ok"


# -- the agent's log --------------------------------------------------------------------------------------------------


def test_the_agent_says_where_its_log_is(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_file(node, bucket, proxy)
    assert agent_status(node)["log_file"] == str(agent_file(node, "log"))
    assert "agent[" in agent_file(node, "log").read_text()
    shown = node.run("status", f"--runtime-dir={node.runtime_dir}", str(mount.path)).stdout
    assert str(agent_file(node, "log")) in shown


def test_the_agent_logs_to_the_file_that_was_asked_for(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    log = node.base / "my.log"
    mount_file(node, bucket, proxy, f"--log-file={log}")
    assert agent_status(node)["log_file"] == str(log)
    text = log.read_text()
    assert f"agent[{node.agent_pid}]" in text
    assert "worker[" in text
    assert not agent_file(node, "log").exists()


def test_a_log_file_that_is_gone_keeps_no_agent_from_starting(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    logs = node.base / "logs"
    logs.mkdir()
    mount = mount_file(node, bucket, proxy, f"--log-file={logs}/my.log")
    logs.rename(node.base / "elsewhere")
    killed = node.kill_agent()
    assert (mount.path / "file").read_bytes() == BODY
    assert node.agent_pid != killed
    assert agent_status(node)["log_file"] == str(agent_file(node, "log"))


@pytest.mark.slow
def test_the_agents_own_log_does_not_grow_for_ever(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    mount = mount_file(node, bucket, proxy)
    with agent_file(node, "log").open("ab") as log:
        log.write(b"a line that somebody wrote\n" * (MAX_LOG_BYTES // 27 + 1))
    wait_until(lambda: agent_file(node, "log").stat().st_size < MAX_LOG_BYTES // 4, 15, "it is shortened")
    mount.umount()
    wait_until(lambda: not node.processes("agent"), 10, "it ends when it is idle")
    text = agent_file(node, "log").read_text()
    assert "cachefs agent ends" in text, "it is written to as before"
    assert "\0" not in text


# -- tiers and directories that cannot be used ------------------------------------------------------------------------


def test_a_cache_directory_that_cannot_be_used_is_said(node: Node, bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.put("file", BODY)
    place, where = node.base / "mnt", "/proc/no/such/place"
    place.mkdir()
    node.cache_dir = Path(where)
    options = (f"--endpoint-url={proxy.endpoint_url}", f"--cache-dir={where}")
    done = node.try_mount(bucket.url, *options, place=place)
    assert done.returncode == 0, done.stderr
    mount = Mount(node, place)
    node.mounts.append(mount)
    lines = [line for line in done.stderr.splitlines() if line.startswith("cachefs: ")]
    assert any("the disk tier is off" in line and where in line for line in lines), lines
    assert any("kept in memory" in line for line in lines), lines
    assert (mount.path / "file").read_bytes() == BODY
    status = mount.status()
    assert status["health"] == "degraded"
    assert any("the disk tier is off" in problem and where in problem for problem in status["problems"])
    assert agent_status(node)["tiers"]["disk"]["reason"]
