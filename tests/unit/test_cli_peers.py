"""`cachefs peers`, with an agent that answers over a real socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cachefs.cli import peers
from cachefs.runtime import RuntimeDir
from tests.unit.test_cli_status import agent

GIB = 1 << 30


def member(letter: str, **more: Any) -> dict[str, Any]:
    counters = {"origin_fill_bytes": 3 * GIB, "peer_fill_bytes": GIB, "peer_owned_fill_bytes": 2 * GIB}
    tiers = {"shm": {"limit_bytes": GIB, "used_bytes": 0}, "disk": {"limit_bytes": 7 * GIB, "used_bytes": 4 * GIB}}
    return {
        "node_id": letter * 16, "name": f"node-{letter}", "address": f"10.0.0.{ord(letter)}:7000", "zone": "z",
        "version": "0.1.0", "protocol": 1, "weight": 8192, "self": False, "state": "closed", "latency_s": 0.0012,
        "summary": {"tiers": tiers, "counters": counters, "hit_ratio": 0.75}, **more,
    }  # fmt: skip


def cluster(*members: dict[str, Any], connected: bool = True) -> dict[str, Any]:
    etcd = {"connected": connected, "last_error": "" if connected else "connection refused"}
    return {"cluster": "lab", "node_id": "a" * 16, "etcd": etcd, "volumes": {}, "members": list(members)}


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir(str(tmp_path / "run"))


def invoke(runtime: RuntimeDir, *arguments: str) -> Result:
    return CliRunner().invoke(peers.peers, [*arguments, "--runtime-dir", runtime.path], standalone_mode=False)


def test_nobody_has_peers(runtime: RuntimeDir, tmp_path: Path) -> None:
    outcome = invoke(runtime)
    assert (outcome.output, outcome.return_value) == ("no agent of this node has peers (mount with --etcd)\n", 0)
    with agent(runtime, {}):
        assert json.loads(invoke(runtime, "--json").output) == {"clusters": []}
    outcome = CliRunner().invoke(peers.peers, ["--runtime-dir", str(tmp_path / "none")], standalone_mode=False)
    assert outcome.return_value == 0
    assert not (tmp_path / "none").exists()


def test_a_cluster_that_is_well(runtime: RuntimeDir) -> None:
    with agent(runtime, {}, cluster=cluster(member("a", self=True), member("b", groups=["train", "x"]))):
        outcome = invoke(runtime)
        assert outcome.return_value == 0
        assert "CLUSTER lab: 2 nodes, connected to etcd, origin amplification 1.50" in outcome.output
        rows = [line.split() for line in outcome.output.splitlines() if line.startswith("node-")]
        assert [row[:3] for row in rows] == [["node-a", "(this", "one)"], ["node-b", "10.0.0.98:7000", "z"]]
        assert rows[1][3:5] == ["train,x", "closed"]
        assert rows[1][5:] == ["1.2", "ms", "8", "GiB", "4", "GiB", "75%", "3", "GiB", "1", "GiB", "0", "B"]
        [told] = json.loads(invoke(runtime, "--json").output)["clusters"]
        assert [each["groups"] for each in told["members"]] == [[], ["train", "x"]]
        assert told["amplification"] == 1.5
        assert [each["used_bytes"] for each in told["members"]] == [4 * GIB, 4 * GIB]


def test_who_does_not_answer_is_named_and_is_an_exit_code(runtime: RuntimeDir) -> None:
    silent = member("b", error="no answer within 0.5 s", state="open", summary={})
    with agent(runtime, {}, cluster=cluster(member("a", self=True), silent)):
        outcome = invoke(runtime)
        assert outcome.return_value == 1
        assert "  node-b: no answer within 0.5 s\n" in outcome.output


def test_no_connection_to_etcd_is_an_exit_code(runtime: RuntimeDir) -> None:
    with agent(runtime, {}, cluster=cluster(member("a", self=True), connected=False)):
        outcome = invoke(runtime)
        assert outcome.return_value == 1
        assert "no connection to etcd: connection refused" in outcome.output


def test_an_agent_that_is_no_peer_for_now_says_why(runtime: RuntimeDir) -> None:
    away = {**cluster(connected=False), "problem": "the secret\x1b is gone", "node_id": None}
    with agent(runtime, {}, cluster=away):
        outcome = invoke(runtime)
        assert outcome.return_value == 1
        [line] = outcome.output.splitlines()
        assert line.startswith("CLUSTER lab: agent 4711 is no peer for now, and tries again by itself: the secret")
        assert "\x1b" not in outcome.output
        [told] = json.loads(invoke(runtime, "--json").output)["clusters"]
        assert (told["problem"], told["members"], told["amplification"]) == ("the secret\x1b is gone", [], None)


def test_names_cannot_move_the_cursor(runtime: RuntimeDir) -> None:
    with agent(runtime, {}, cluster=cluster(member("a", name="\x1b[2J\nevil"))):
        assert "\x1b" not in invoke(runtime).output
