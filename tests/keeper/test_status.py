"""`cachefs status` and `cachefs doctor` on a node of Kubernetes: whose mounts these are, where, and who is missing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from cachefs.cli import keeper_checks, kept_mounts, status
from cachefs.mount import mountinfo
from tests.keeper.rig import KubeletNode
from tests.support.machine import detach, kill, wait_until
from tests.support.mounts import Bucket

NODE = 65532


@pytest.fixture
def volume(bucket: Bucket) -> str:
    bucket.put("file", b"x")
    return f"s3://{bucket.name}"


def shown(document: dict[str, Any]) -> str:
    return "\n".join(status.render(document))


def test_the_mounts_of_a_keeper_and_where_they_are(make_node: Callable[..., KubeletNode], volume: str) -> None:
    node = make_node(node_uid=NODE)
    node.start_keeper()
    node.start_service()
    node.mount("vol", volume)
    targets = [node.target(f"pod-{number}") for number in range(5)]
    for target in targets:
        node.client.bind("vol", str(target), read_only=True)
    wait_until(lambda: status.collect(str(node.run))["mounts"][0]["agent_pid"], 10, "the worker is attached")

    document = status.collect(str(node.run / "node"))  # which is another user's
    [mount] = document["mounts"]
    assert tuple(mount) == status.MOUNT_KEYS
    assert (mount["health"], mount["problems"], mount["state"]) == ("ok", [], "serving")
    assert mount["worker_pid"] == node.state("vol").worker_pid
    assert mount["agent_pid"] == node.agent_pid
    assert mount["volume_id"] is not None
    assert mount["kept"]["volume"] == "vol"
    assert [target["path"] for target in mount["kept"]["targets"]] == [str(target) for target in targets]
    assert document["keeper"]["problem"] is None

    text = shown(document)
    assert "vol          s3://" in text
    assert f"at {targets[0]} (read-only)" in text
    assert "and at 2 more places" in text
    for place in (node.run, node.run / "keeper"):  # as the pods of the keeper and of the plugin see it
        again = status.collect(str(place))
        assert [each["kept"] for each in again["mounts"]] == [mount["kept"]]
        assert [agent["agent_pid"] for agent in again["agents"]] == [node.agent_pid]
    assert status.collect(str(node.run), str(targets[3]))["mounts"][0]["kept"]["key"] == "vol"
    assert status.collect(str(node.run), "/elsewhere")["mounts"] == []


def test_the_doctor_never_says_to_unmount_what_a_keeper_has(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    target = node.target("pod")
    node.client.bind("vol", str(target), read_only=True)
    inner = node.base / "sub-path"
    inner.mkdir()
    subprocess.run(["mount", "--bind", str(target), str(inner)], check=True)
    places = {str(target), str(inner), node.state("vol").mountpoint}

    def stale() -> set[str]:
        found = [each for each in mountinfo.mounts() if each.is_cachefs]
        return {each.mountpoint for each in found} & places - keeper_checks.kept(str(node.run), found)

    try:
        assert stale() == set()
        [finding] = keeper_checks.look(str(node.run))
        assert finding.text.endswith("1 mounts")
        assert not finding.remedy
        kill(node.keepers[-1].pid)
        node.keepers[-1].wait()
        assert stale() == set()
        [finding] = keeper_checks.look(str(node.run))
        assert finding.remedy == "look at the cachefs-keeper pod of this node"
        assert list(keeper_checks.look(str(node.base))) == []
    finally:
        detach(str(inner))


def test_who_is_missing_is_said(node: KubeletNode, volume: str) -> None:
    node.mount("vol", volume)
    runner = node.status().runner
    assert runner is not None
    os.kill(runner.pid, signal.SIGKILL)
    wait_until(lambda: node.status().runner is None, 10, "the node service is gone")
    keeper = status.collect(str(node.run))["keeper"]
    assert (keeper["problem"], keeper["node_service"]) == (kept_mounts.NO_SERVICE, None)
    assert "cachefs-node pod" in shown(status.collect(str(node.run)))

    [process] = node.processes("cachefs.keeper")
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: status.collect(str(node.run / "node"))["keeper"]["version"] is None, 10, "the keeper is gone")
    document = status.collect(str(node.run / "node"))
    assert "look at the cachefs-keeper pod of this node" in shown(document)
    assert "version None" not in shown(document)
