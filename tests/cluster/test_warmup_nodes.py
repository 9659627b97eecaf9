"""`cachefs warmup --nodes`: several nodes get the same files, S3 gives them once, and a node that dies is named."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from bench.s3_server import S3Server
from tests.cluster.rig import Cluster, ClusterNode
from tests.support.fault_proxy import Fault
from tests.support.machine import wait_until
from tests.support.mounts import CACHEFS, Bucket
from tests.support.programs import REPOSITORY, content

MIB = 1 << 20
SMALL = {f"{top}/{number:03}": 60_000 + number for top in ("all", "group", "list", "stop") for number in range(60)}
LARGE = {f"{top}/large-{number}": 8 * MIB for top in ("all", "tree") for number in range(2)}


def bodies(top: str) -> dict[str, bytes]:
    """Return what is in one directory."""
    sizes = SMALL | LARGE
    return {name: content(name, size) for name, size in sizes.items() if name.startswith(f"{top}/")}


@contextlib.contextmanager
def four_nodes(s3_server: S3Server, *tops: str) -> Iterator[Cluster]:
    """The first two are of one group, the last one of another."""
    with Bucket.create(s3_server) as bucket:
        for top in tops:
            bucket.fill(bodies(top))
        with Cluster(s3_server, 0, shm_size="128MiB") as made:
            for groups in ("train,blue", "train", "", "eval"):
                made.add_node(*([f"--group={groups}"] if groups else []))
            made.mount_all(bucket.url)
            made.wait_until_joined()
            yield made


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server) -> Iterator[Cluster]:
    """For tests that break nothing, each in a directory of its own."""
    with four_nodes(s3_server, "all", "tree", "group", "list", "stop") as made:
        yield made


@pytest.fixture
def fragile(s3_server: S3Server) -> Iterator[Cluster]:
    """For one test."""
    with four_nodes(s3_server, "all") as made:
        yield made


def from_s3(cluster: Cluster, top: str) -> int:
    """Return how many bytes of a directory have left S3."""
    sent = [r.sent_bytes for r in cluster.origin.requests if r.kind == "get" and (r.key or "").startswith(f"{top}/")]
    return sum(sent)


def warm(node: ClusterNode, *options: str) -> subprocess.CompletedProcess[str]:
    return node.run("warmup", f"--runtime-dir={node.runtime_dir}", *options)


def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def place(node: ClusterNode, path: str = "") -> str:
    return str(node.mounts[0].path / path)


def holds(node: ClusterNode, path: str = "", *options: str) -> bool:
    return warm(node, "--check", *options, place(node, path)).returncode == 0


def test_all_nodes_get_everything_and_s3_gives_it_once(cluster: Cluster) -> None:
    one = cluster.nodes[0]
    wanted = bodies("all")
    total = sum(map(len, wanted.values()))
    done = warm(one, "--nodes", "all", "--json", place(one, "all"))
    job = last(done)
    assert (done.returncode, job["state"]) == (0, "done"), job
    assert [node["node"] for node in job["nodes"]] == ["n1", "n2", "n3", "n4"]
    assert {node["files"] for node in job["nodes"]} == {len(wanted)}
    assert job["bytes"] == 4 * total == job["done_bytes"]
    assert from_s3(cluster, "all") == total, "1.00 times"
    assert sum(node.counter("peer_served_bytes") for node in cluster.nodes) == 3 * total
    assert last(warm(one, "--nodes", "all", "--json", place(one, "all")))["fetched_bytes"] == 0
    for node in cluster.nodes:
        assert holds(node, "all")
        for name, body in wanted.items():
            assert (node.mounts[0].path / name).read_bytes() == body
    assert from_s3(cluster, "all") == total


def test_the_owner_gives_a_part_to_two_nodes_and_one_of_them_to_the_last(cluster: Cluster) -> None:
    one = cluster.nodes[0]
    for name in bodies("tree"):
        before = {node.name: node.counter("peer_served_bytes") for node in cluster.nodes}
        assert warm(one, "--nodes", "all", place(one, name)).returncode == 0
        served = sorted(node.counter("peer_served_bytes") - before[node.name] for node in cluster.nodes)
        assert served == [0, 0, 8 * MIB, 16 * MIB], name
    assert from_s3(cluster, "tree") == sum(map(len, bodies("tree").values()))


def test_groups_and_numbers_of_nodes(cluster: Cluster) -> None:
    one, two, three, four = cluster.nodes
    done = warm(three, "--group", "train", "--json", place(three, "group"))
    assert done.returncode == 0, done.stderr
    assert [node["node"] for node in last(done)["nodes"]] == ["n1", "n2"], "the one that asks is not of the group"
    assert holds(one, "group")
    assert holds(two, "group")
    sizes = sum(map(len, bodies("group").values()))
    assert from_s3(cluster, "group") == sizes
    assert last(warm(three, "--nodes", "blue", "--json", place(three, "group")))["there_bytes"] == sizes

    shown = json.loads(four.run("peers", "--json", f"--runtime-dir={four.runtime_dir}").stdout)
    groups = {member["name"]: member["groups"] for member in shown["clusters"][0]["members"]}
    assert groups == {"n1": ["blue", "train"], "n2": ["train"], "n3": [], "n4": ["eval"]}

    first = last(warm(one, "--nodes", "2", "--json", place(one, "group")))
    again = last(warm(two, "--nodes", "2", "--json", place(two, "group")))
    assert [node["node"] for node in first["nodes"]] == [node["node"] for node in again["nodes"]]
    assert again["fetched_bytes"] == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--group", "nobody"), "no node of group nobody"),
        (("--nodes", "9"), "9 nodes were asked for, and 4"),
        (("--nodes", "3", "--group", "train"), "and 2 mount this"),
        (("--nodes", "0"), "a number from 1"),
        (("--nodes", "a b"), "no name of a group"),
    ],
)
def test_nodes_that_there_are_not(cluster: Cluster, wrong: tuple[str, ...], said: str) -> None:
    one = cluster.nodes[0]
    refused = warm(one, *wrong, place(one))
    assert refused.returncode == 2
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_list_goes_to_all_and_what_is_wrong_is_said_of_each(cluster: Cluster) -> None:
    one = cluster.nodes[0]
    wanted = bodies("list")
    names = [*wanted, *(f"nobody/{number}" for number in range(5))] * 60  # 3,900 lines: several parts
    listing = one.base / "list"
    listing.write_text("\n".join(place(one, name) for name in names))
    done = warm(one, "--nodes", "all", "--list", str(listing), "--json")
    job = last(done)
    assert (done.returncode, job["state"]) == (1, "incomplete"), job
    assert job["problems"] == 4 * 5 * 60
    assert {node["problems"] for node in job["nodes"]} == {5 * 60}
    assert {node["files"] for node in job["nodes"]} == {len(wanted) * 60}
    assert {node["missing_files"] for node in job["nodes"]} == {0}
    assert from_s3(cluster, "list") == sum(map(len, wanted.values()))


def test_stop_ends_it_everywhere(cluster: Cluster) -> None:
    one = cluster.nodes[0]
    cluster.origin.add(Fault(kind="get", delay_s=0.5))
    try:
        done = warm(one, "--nodes", "all", "--background", place(one, "stop"))
        assert done.returncode == 0, done.stderr

        def newest_is(node: ClusterNode, state: str) -> bool:
            return str(node.agent_status()["jobs"][-1]["state"]) == state

        for node in cluster.nodes:
            wait_until(functools.partial(newest_is, node, "fetching"), 15, "all of them fetch")
        job = one.agent_status()["jobs"][-1]
        assert warm(one, "--stop", job["job"]).returncode == 0
        for node in cluster.nodes:
            wait_until(functools.partial(newest_is, node, "stopped"), 5, "all of them have stopped")
    finally:
        cluster.origin.clear()


@pytest.mark.slow
def test_a_node_that_dies_is_named_and_the_others_go_on(fragile: Cluster) -> None:
    one, _, three, _ = fragile.nodes
    fragile.origin.add(Fault(kind="get", delay_s=0.4))
    command = [*CACHEFS, "warmup", f"--runtime-dir={one.runtime_dir}", "--nodes=all", "--json", place(one)]
    with one.place.entered():
        child = subprocess.Popen(command, env=one.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(fragile.origin.requests) > 20, 20, "it fetches")
        fragile.network.link_down(three.place)
        three.kill_everything()
        said, _ = child.communicate(timeout=50)
    finally:
        child.kill()
        child.wait()
    fragile.network.link_up(three.place)
    job = json.loads(said.splitlines()[-1])
    assert (child.returncode, job["state"]) == (1, "incomplete")
    wrong = {node["node"]: node["error"] for node in job["nodes"] if node["error"]}
    assert list(wrong) == ["n3"], job
    assert "does not answer" in wrong["n3"]
    assert all(holds(node) for node in fragile.nodes if node is not three)


@pytest.mark.slow
def test_an_agent_that_is_killed_is_named_and_its_mount_goes_on(fragile: Cluster) -> None:
    one, two = fragile.nodes[:2]
    wanted = bodies("all")
    fragile.origin.add(Fault(kind="get", delay_s=0.4))
    with ThreadPoolExecutor(1) as threads:
        going = threads.submit(warm, one, "--nodes", "all", "--json", place(one))
        wait_until(lambda: len(fragile.origin.requests) > 20, 20, "it fetches")
        two.kill_agent()
        for name, body in list(wanted.items())[:20]:
            assert (two.mounts[0].path / name).read_bytes() == body
        job = last(going.result(60))
    wrong = {node["node"]: node["error"] for node in job["nodes"] if node["error"]}
    assert list(wrong) == ["n2"], job
    fragile.origin.clear()
    fragile.wait_until_joined()
    again = warm(one, "--nodes", "all", "--json", place(one))
    assert again.returncode == 0, last(again)
    assert all(holds(node) for node in fragile.nodes)


@pytest.mark.slow
def test_a_node_that_does_not_mount_it_is_not_asked_and_no_peer_no_nodes(s3_server: S3Server, bucket: Bucket) -> None:
    bucket.fill(bodies("all"))
    with Cluster(s3_server, 2) as cluster:
        one, two = cluster.nodes
        one.mount(bucket.url)
        two.mount(f"{bucket.url}/all")
        job = last(warm(one, "--nodes", "all", "--json", place(one)))
        assert [node["node"] for node in job["nodes"]] == ["n1"]
    with Cluster(s3_server, 1, peers=False) as alone:
        (node,) = alone.nodes
        node.mount(bucket.url)
        refused = warm(node, "--nodes", "all", place(node))
        assert refused.returncode == 2
        assert "no peers" in refused.stderr


@pytest.mark.slow
def test_a_directory_read_by_one_is_fetched_by_its_owners(s3_server: S3Server, bucket: Bucket) -> None:
    wanted = {f"d/{number:04}": content(str(number), 30_000) for number in range(400)}
    bucket.fill(wanted)
    with Cluster(s3_server, 3, shm_size="128MiB") as cluster:
        one, two, three = cluster.nodes
        cluster.mount_all(bucket.url, "--prefetch=auto")
        cluster.wait_until_joined()
        for name, body in wanted.items():
            assert (one.mounts[0].path / name).read_bytes() == body
        asked = [request.key for request in cluster.origin.requests if request.kind == "get"]
        assert len(asked) == len(set(asked)) == len(wanted), "once each"
        owned = [node.counter("peer_owned_fill_bytes") for node in cluster.nodes]
        assert sum(owned) == sum(map(len, wanted.values()))
        assert all(share > 0.1 * sum(owned) for share in owned), "by its owner"
        issued = one.counter("prefetch_issued")
        assert issued > 0.8 * len(wanted), "few were waited for"
        assert two.counter("bulk_batches") > 0, "and the owners bring them many at a time, behind their readers"
        assert three.counter("bulk_batches") > 0
        assert one.counter("prefetch_wasted") == 0
