"""`cachefs schedule`: affinity in manifests, and who holds how much, with a real etcd and real members."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import kubernetes_validate
import pytest
import trio
import yaml

from cachefs.block.census import count_holdings
from cachefs.config import S3Config
from cachefs.errors import StorageUnavailable, UsageError
from csi.labels import LABEL_PREFIX
from csi.workloads.affinity import BY_NAME, HOSTNAME, PREFERS, Preference, forget, prefer, weighed
from csi.workloads.documents import read_stream, write_stream
from csi.workloads.holders import dataset_of, find_holders
from csi.workloads.templates import find_templates
from peer import holding
from peer.etcd_settings import EtcdSettings
from peer.holding import Holding
from tests.csi.test_inject import CONFIG_MAP, JOB, added, spec_in
from tests.peer.nodes import VOLUME, Node, a_member, node_id, running, until, until_all
from tests.support.etcd_server import EtcdServer

GIB = 1 << 30
S3 = S3Config(source="s3://bucket/train", endpoint_url="http://127.0.0.1:9")
TWO = Preference(HOSTNAME, (("node-a", 100), ("node-b", 40), ("node-c", 40)))


def with_preference(text: str, wanted: Preference | None) -> str:
    documents = read_stream(text)
    for template in find_templates(documents):
        if wanted is None:
            forget(template)
        else:
            prefer(template, wanted)
    return write_stream(documents)


def terms_in(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = spec_in(yaml.safe_load(text))["affinity"]["nodeAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    return found


# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [TWO, Preference(BY_NAME, (("a", 9), ("b", 9))), Preference(f"{LABEL_PREFIX}{VOLUME}", ((">64", 50), (">0", 50)))],
    ids=["hostname", "name", "label"],
)
def test_a_pod_prefers_nodes_and_is_valid(wanted: Preference) -> None:
    made = with_preference(JOB, wanted)
    added(JOB, made)
    kubernetes_validate.validate(yaml.safe_load(made), "1.31", strict=True)
    assert with_preference(made, wanted) == made
    assert with_preference(made, None) == JOB


def test_terms_of_nodes_with_the_same_weight_are_one() -> None:
    assert terms_in(with_preference(JOB, TWO)) == [
        {
            "weight": 100,
            "preference": {"matchExpressions": [{"key": HOSTNAME, "operator": "In", "values": ["node-a"]}]},
        },
        {
            "weight": 40,
            "preference": {"matchExpressions": [{"key": HOSTNAME, "operator": "In", "values": ["node-b", "node-c"]}]},
        },
    ]


def test_other_nodes_later_replace_ours_and_nobody_elses() -> None:
    theirs = {"weight": 7, "preference": {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}}
    text = JOB.replace(
        "      restartPolicy: Never\n",
        "      restartPolicy: Never\n      affinity:\n        nodeAffinity:\n"
        "          preferredDuringSchedulingIgnoredDuringExecution:\n            - weight: 7  # ours\n"
        "              preference: {matchExpressions: [{key: gpu, operator: Exists}]}\n",
    )
    first = with_preference(text, TWO)
    assert terms_in(first)[0] == theirs
    second = with_preference(first, Preference(HOSTNAME, (("node-z", 100),)))
    assert [each["weight"] for each in terms_in(second)] == [7, 100]
    assert "node-a" not in second
    assert with_preference(second, None) == text


def test_what_is_in_the_way_is_named() -> None:
    text = JOB.replace("      restartPolicy: Never\n", "      affinity: [a]\n")
    with pytest.raises(UsageError, match=r"document 1 \(Job train\), spec.template.spec.affinity"):
        with_preference(text, TWO)


def test_weights_follow_the_bytes() -> None:
    held = [("a", 400 * GIB), ("b", 100 * GIB), ("c", 1), ("d", 0)]
    assert weighed(held, 80) == (("a", 80), ("b", 20), ("c", 1))
    assert weighed([], 80) == ()


@pytest.mark.parametrize("text", ["", "x", "k: ", "k: a", "k: a=b", "k: =1"])
def test_notes_of_others_are_none_of_ours(text: str) -> None:
    found = Preference.of_note(text)
    assert found is None or found.nodes == ()
    noted = JOB.replace("  template:\n", f"  template:\n    metadata: {{annotations: {{{PREFERS}: '{text}'}}}}\n")
    assert "node-a" in with_preference(noted, TWO)


# -- who holds what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [b"", b"x", b"[]", b'{"held_bytes": -1}', b'{"held_bytes": "1"}', b"\xff", b'{"held_bytes": 1e99}', None]
)
def test_values_that_say_nothing_are_nothing(value: bytes | None) -> None:
    assert holding.decode(value) == Holding()


def test_values_are_read_as_they_were_written_and_by_others() -> None:
    assert holding.decode(holding.encode(Holding(7, VOLUME))) == Holding(7, VOLUME)
    assert holding.encode(None) == b"", "as all versions before"
    assert holding.decode(b'{"held_bytes": 7, "of_a_later_version": []}') == Holding(7)


def test_small_changes_are_not_worth_an_event() -> None:
    def worth(before: int, now: int) -> bool:
        return holding.worth_telling({VOLUME: Holding(before)}, {VOLUME: Holding(now)})

    assert not worth(100 * GIB, 104 * GIB)
    assert worth(100 * GIB, 106 * GIB)
    assert worth(100 * GIB, 90 * GIB)
    assert not worth(1 << 20, 2 << 20)
    assert worth(0, 1)
    assert worth(1, 0)
    assert not worth(0, 0)
    assert not holding.worth_telling({}, {VOLUME: Holding(0)})
    assert holding.worth_telling({VOLUME: Holding(5)}, {})
    assert (holding.pause_s(3), holding.pause_s(3000)) == (60, 3000)


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def settings(etcd: EtcdServer, request: pytest.FixtureRequest) -> EtcdSettings:
    return etcd.settings(cluster=f"c{abs(hash(request.node.name))}")


async def asked(settings: EtcdSettings, config: S3Config = S3) -> Any:
    return await trio.to_thread.run_sync(find_holders, config, settings)


async def test_members_say_what_they_hold_and_old_ones_do_not(settings: EtcdSettings) -> None:
    dataset = dataset_of(S3)
    nodes = [Node(settings, a_member(number)) for number in range(4)]
    for node in nodes[:3]:
        node.membership.set_volumes(frozenset({VOLUME}))
    async with running(*nodes):
        await until_all(nodes, lambda node: node.holders == {node_id(0), node_id(1), node_id(2)})
        assert await asked(settings) is None
        nodes[0].membership.set_held({VOLUME: Holding(GIB, dataset)})
        await trio.to_thread.run_sync(nodes[1].membership.set_held, {VOLUME: Holding(3 * GIB, dataset)})
        found = None
        with trio.fail_after(5):
            while found is None or len(found.nodes) < 2:
                found = await asked(settings)
        assert found.source == "s3://bucket/train"
        assert found.nodes == (("node-1", 3 * GIB), ("node-0", GIB))
        assert nodes[3].holders == {node_id(0), node_id(1), node_id(2)}, "who reads no values sees what it saw"
        below = await asked(settings, S3Config(source="s3://bucket/train/a/b/", endpoint_url=S3.endpoint_url))
        assert (below.source, below.nodes) == ("s3://bucket/train", found.nodes)
        for other in ("s3://bucket/trainer", "s3://bucket", "s3://other/train"):
            assert await asked(settings, S3Config(source=other, endpoint_url=S3.endpoint_url)) is None
        assert await asked(settings, S3Config(source=S3.source, endpoint_url="http://127.0.0.1:8")) is None
        nodes[1].leave()
        await until(lambda: nodes[0].holders == {node_id(0), node_id(2)})
        assert (await asked(settings)).nodes == (("node-0", GIB),)


async def test_nonsense_in_etcd_is_passed_over(settings: EtcdSettings, etcd: EtcdServer) -> None:
    root = f"/cachefs/{settings.cluster}"
    volume = dataset_of(S3)
    records = {
        f"{root}/nodes/{node_id(1)}": b"{",
        f"{root}/volumes/{volume}/nodes/{node_id(1)}": b'{"held_bytes": 5}',
        f"{root}/volumes/{volume}/nodes/{node_id(2)}": b'{"held_bytes": 6}',
        f"{root}/volumes/x": b"",
    }
    with closing(etcd.client()) as client:
        for key, value in records.items():
            client.put(key, value)
    assert await asked(settings) is None


def test_etcd_that_cannot_be_asked_is_named() -> None:
    with pytest.raises(StorageUnavailable, match="etcd cannot be asked who holds what"):
        find_holders(S3, EtcdSettings(endpoints=("http://127.0.0.1:1",)))
    with pytest.raises(UsageError, match="directory of one node"):
        dataset_of(S3Config(source="file:///x"))


def test_the_identity_of_a_mount_does_not_matter() -> None:
    assert holding.dataset_name("http://h#me", "b", "p/") == holding.dataset_name("http://h", "b", "p/")
    assert holding.dataset_name("http://h", "b", "p/") != holding.dataset_name("http://h", "b", "")


# -- counting ----------------------------------------------------------------------------------------------------------


class Tier:
    """Blocks of owners, in order."""

    def __init__(self, owners: dict[int, int], size: int = 1000) -> None:
        self.blocks = [
            (index.to_bytes(8, "big") + bytes(12), owner)
            for index, owner in enumerate(owner for owner, count in owners.items() for _ in range(count))
        ]
        self.keys = {key for key, _ in self.blocks}
        self.size = size

    def owned_after(self, after: bytes, count: int) -> list[tuple[Any, int, int]]:
        found = [(key, owner, self.size) for key, owner in self.blocks if key > after]
        return found[:count]

    def stats(self) -> dict[str, object]:
        return {"blocks": len(self.blocks), "used_bytes": len(self.blocks) * self.size}

    def __contains__(self, key: object) -> bool:
        return key in self.keys


def test_blocks_in_both_tiers_count_once() -> None:
    assert count_holdings(None, None) == {}
    assert count_holdings(Tier({1: 3, 0: 5}), None) == {1: 3000}
    assert count_holdings(Tier({1: 30}), Tier({1: 10})) == {1: 30_000}
    assert count_holdings(None, Tier({1: 1500, 2: 1023})) == {1: 1_500_000, 2: 1_023_000}


def test_of_a_large_tier_a_sample_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.block.census.EXACT_BLOCKS", 100)
    monkeypatch.setattr("cachefs.block.census.PAUSE_S", 0.0)
    tier = Tier({})
    chance = random.Random(7)
    tier.blocks = sorted((chance.randbytes(20), 1 if chance.random() < 0.75 else 2) for _ in range(3000))
    counted = count_holdings(None, tier)
    assert 0.6 < counted[1] / 3_000_000 < 0.9
    assert sum(counted.values()) == pytest.approx(3_000_000, rel=0.01)


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: str, stdin: str = JOB) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs.cli.main", "schedule", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=30)


def test_nobody_holds_anything_yet(etcd: EtcdServer) -> None:
    stream = f"{CONFIG_MAP}---\n{JOB}"
    done = run("-f", "-", "--dataset", "s3://bucket/set", f"--etcd={etcd.endpoint}", "--cluster=empty", stdin=stream)
    assert (done.returncode, done.stdout) == (0, stream)
    assert "no node of cluster 'empty' holds anything of s3://bucket/set" in done.stderr


def test_the_command_writes_nodes(etcd: EtcdServer) -> None:
    settings = etcd.settings(cluster="command")
    dataset = dataset_of(S3)
    with closing(etcd.client()) as client:
        for number in range(4):
            name = f"/cachefs/command/nodes/{node_id(number)}"
            member = {"node_id": node_id(number), "name": f"n{number}", "address": "127.0.0.1:1"}
            client.put(name, json.dumps(member))
            held = json.dumps({"held_bytes": number * GIB, "dataset": dataset})
            client.put(f"/cachefs/command/volumes/{VOLUME}/nodes/{node_id(number)}", held)
    where = [f"--etcd={settings.endpoints[0]}", "--cluster=command", f"--endpoint-url={S3.endpoint_url}"]
    done = run("-f", "-", "--dataset", S3.source, *where, "--weight=50", "--top=2")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 nodes are preferred: n3 (3 GiB), n2 (2 GiB)" in done.stderr
    assert [each["weight"] for each in terms_in(done.stdout)] == [50, 33]
    again = run("-f", "-", "--dataset", S3.source, *where, "--weight=50", "--top=2", stdin=done.stdout)
    assert again.stdout == done.stdout
    assert run("-f", "-", "--remove", stdin=done.stdout).stdout == JOB


def test_wrong_words() -> None:
    assert "--dataset" in run("-f", "-").stderr
    assert "Give --etcd" in run("-f", "-", "--dataset", "s3://bucket").stderr
    labelled = run("-f", "-", "--dataset", S3.source, f"--endpoint-url={S3.endpoint_url}", "--by-label")
    assert labelled.returncode == 0, labelled.stderr
    assert f"{LABEL_PREFIX}{dataset_of(S3)}" in labelled.stdout
    assert sum(each["weight"] for each in terms_in(labelled.stdout)) <= 100
