"""What nodes are worth to each other: bytes leave S3 once, whoever dies, joins or is cut off, and no reader notices.

Real mounts in network namespaces, a real etcd, a real S3 server; every byte that is read is compared.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.cluster.dataset import Shape
from bench.cluster.readers import Outcome
from bench.cluster.scene import Scene
from bench.s3_server import S3Server
from tests.cluster.namespaces import Network
from tests.cluster.rig import Cluster, ClusterNode
from tests.support.fault_proxy import Fault
from tests.support.mounts import Bucket, Mount
from tests.support.programs import content

MIB = 1 << 20
SHAPE = Shape(large_files=3, large_bytes=20 * MIB + 12_345, small_files=40, small_bytes=100_000)
READ_S = 60.0
WORST_STALL_MS = 2000.0
ALONE_S = 1.0
"""How long a node that lives and does not get what it fetches is waited for until S3 is asked as well."""


class Checked(Scene):
    """A scene in which nobody may see an error or a wrong byte."""

    def read(self, *nodes: ClusterNode, **more: Any) -> dict[str, Outcome]:
        """Let these nodes read everything at the same time."""
        outcomes = super().read(*nodes, **more)
        assert_clean(outcomes, self.shape)
        return outcomes


def assert_clean(outcomes: dict[str, Outcome], shape: Shape = SHAPE) -> None:
    """Everything was read, and right."""
    for name, outcome in outcomes.items():
        assert outcome.is_clean, f"{name}: {outcome.errors} {outcome.wrong}"
        assert outcome.bytes_read == shape.total_bytes


@pytest.fixture
def rig(s3_server: S3Server, bucket: Bucket, tmp_path: Path) -> Iterator[Checked]:
    """Three nodes."""
    with Checked.create(s3_server, bucket, tmp_path, 3, SHAPE, shm_size="256MiB") as made:
        yield made


# -- once -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_what_all_nodes_want_at_once_leaves_s3_once(s3_server: S3Server, bucket: Bucket, nodes: int) -> None:
    bodies = {f"part-{number}": content(str(number), 8 * MIB) for number in range(4)} | {"small": content("s", 50_000)}
    bucket.fill(bodies)
    with Cluster(s3_server, nodes) as cluster:
        mounts = cluster.mount_all(bucket.url)
        cluster.wait_until_joined()
        start = threading.Barrier(len(mounts))

        def read(mount: Mount, key: str) -> bytes:
            start.wait(20)
            return (mount.path / key).read_bytes()

        with ThreadPoolExecutor(len(mounts)) as threads:
            for key, body in bodies.items():
                for found in threads.map(lambda mount, key=key: read(mount, key), mounts):
                    assert found == body
                assert sum(r.sent_bytes for r in cluster.origin.requests if r.key == key) == len(body), key
        assert len(cluster.origin.gets("small")) == 1
        from_peers = sum(node.counter("peer_fill_bytes") for node in cluster.nodes)
        assert from_peers >= (nodes - 1) * sum(map(len, bodies.values()))


def test_all_nodes_read_everything_and_s3_gives_it_once(rig: Checked) -> None:
    rig.read()
    assert rig.origin_bytes <= 1.05 * SHAPE.total_bytes
    served = [node.counter("peer_served_bytes") for node in rig.cluster.nodes]
    assert all(served), "each of them owns a part"
    assert_secret_is_nowhere(rig)


def assert_secret_is_nowhere(rig: Checked) -> None:
    """Neither logs nor status nor processes show what the nodes share."""
    secret = (rig.cluster.record.directory / "secret").read_text()
    for node in rig.cluster.nodes:
        assert secret not in node.full_log()
        assert secret not in json.dumps(node.status())
        for pid in node.processes():
            for name in ("cmdline", "environ"):
                assert secret.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()


@pytest.mark.slow
def test_one_node_lists_and_the_others_take_it_from_there(s3_server: S3Server, bucket: Bucket) -> None:
    names = {f"many/{number:04}" for number in range(2500)}
    bucket.fill(dict.fromkeys(names, b"x"))
    with Cluster(s3_server, 3) as cluster:
        mounts = cluster.mount_all(bucket.url)
        cluster.wait_until_joined()
        cluster.origin.forget()
        for mount in mounts:
            assert {f"many/{path.name}" for path in (mount.path / "many").iterdir()} == names
        listings = [r.query for r in cluster.origin.requests if r.key == "many/" and "delimiter" in r.query]
        pages = [query.get("continuation-token", "") for query in listings]  # (a name is looked up without delimiter)
        assert len(pages) == len(set(pages)) == 3, "2,500 names are three pages"


@pytest.mark.slow
def test_what_a_peer_gives_is_read_again_without_anybody(rig: Checked) -> None:
    one, two, three = rig.cluster.nodes
    rig.read(one)
    rig.read(two)
    for node in (one, three):
        rig.cluster.network.unplug(node.place)
    rig.cluster.origin.down = True
    rig.read(two, evict=True)


# -- death ------------------------------------------------------------------------------------------------------------

LARGER = Shape(large_files=6, large_bytes=24 * MIB, small_files=60)


def kill_node(cluster: Cluster, node: ClusterNode) -> None:
    node.kill_everything()


def take_link_down(cluster: Cluster, node: ClusterNode) -> None:
    cluster.network.link_down(node.place)


def cut_off(cluster: Cluster, node: ClusterNode) -> None:
    """Peers are gone in one direction: what the node sends does not arrive, and etcd and S3 are still there."""
    for other in cluster.nodes:
        if other is not node:
            cluster.network.cut(node.place, other.place.address)


@pytest.mark.slow
@pytest.mark.parametrize("strike", [kill_node, take_link_down, cut_off])
def test_a_node_that_dies_is_no_error_and_no_long_wait(
    s3_server: S3Server, bucket: Bucket, tmp_path: Path, strike: Callable[[Cluster, ClusterNode], None]
) -> None:
    with Checked.create(s3_server, bucket, tmp_path, 4, LARGER, shm_size="256MiB") as rig:
        rig.cluster.network.limit(rig.cluster.origin_place, 100_000_000)
        *living, dying = rig.cluster.nodes
        with rig.readers(*living) as readers:
            readers.start()
            readers.wait_for_bytes(LARGER.total_bytes // 4, READ_S)
            struck_s = readers.seconds
            strike(rig.cluster, dying)
            assert all(reader.is_running for reader in readers.by_name.values()), "it is in the middle"
            outcomes = readers.outcomes(READ_S)
        rig.cluster.network.limit(rig.cluster.origin_place, None)
        assert_clean(outcomes, LARGER)
        for name, outcome in outcomes.items():
            assert outcome.longest_after(struck_s) <= WORST_STALL_MS, f"{name}: {struck_s} {outcome.stalls}"
        assert rig.origin_bytes <= 1.3 * LARGER.total_bytes


@pytest.mark.slow
def test_a_node_that_was_killed_comes_back_and_owns_its_share(rig: Checked) -> None:
    one, two, three = rig.cluster.nodes
    rig.read(one, two)
    three.kill_everything()
    rig.cluster.wait_until_gone(three.name, [one, two])
    rig.mount(three)
    rig.cluster.wait_until_joined()
    before = rig.origin_bytes
    rig.read(three)
    assert rig.origin_bytes - before <= 0.05 * SHAPE.total_bytes


@pytest.mark.slow
def test_a_node_that_leaves_in_order_is_forgotten_at_once(rig: Checked) -> None:
    one, two, three = rig.cluster.nodes
    rig.mounts[three.name].umount()
    three.stop_agent()
    rig.cluster.wait_until_gone(three.name, [one, two], timeout_s=3)
    rig.read(one, two)
    assert rig.origin_bytes <= 1.05 * SHAPE.total_bytes


# -- join -------------------------------------------------------------------------------------------------------------


def test_a_node_that_joins_gets_its_bytes_from_peers(rig: Checked) -> None:
    rig.read()
    before = rig.origin_bytes
    new = rig.cluster.add_node()
    rig.mount(new)
    rig.cluster.wait_until_joined()
    rig.read(new)
    from_origin = rig.origin_bytes - before
    assert from_origin <= 0.05 * SHAPE.total_bytes
    assert new.counter("peer_fill_bytes") >= 0.95 * SHAPE.total_bytes


# -- etcd -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["kill", pytest.param("pause", marks=pytest.mark.slow)])
def test_without_etcd_reads_and_peers_go_on(rig: Checked, stop: str) -> None:
    one, two, three = rig.cluster.nodes
    rig.read(one)
    getattr(rig.cluster.etcd, stop)()
    try:
        rig.read(two, three)
        assert rig.origin_bytes <= 1.05 * SHAPE.total_bytes
    finally:
        if stop == "pause":
            rig.cluster.etcd.resume()


@pytest.mark.slow
def test_an_etcd_that_comes_back_empty_learns_everything_again(rig: Checked) -> None:
    rig.read(rig.cluster.nodes[0])
    rig.cluster.etcd.restart(empty=True)
    new = rig.cluster.add_node()
    rig.mount(new)
    rig.cluster.wait_until_joined(timeout_s=40)
    rig.read(new, rig.cluster.nodes[1])
    assert rig.origin_bytes <= 1.05 * SHAPE.total_bytes


@pytest.mark.slow
def test_a_node_that_starts_without_etcd_reads_alone(s3_server: S3Server, bucket: Bucket) -> None:
    body = bucket.put("a", content("a", 3 * MIB))
    with Cluster(s3_server, 2) as cluster:
        cluster.etcd.kill()
        one, two = cluster.mount_all(bucket.url)
        assert (one.path / "a").read_bytes() == body
        cluster.etcd.restart()
        cluster.wait_until_joined(timeout_s=30)
        assert (two.path / "a").read_bytes() == body
        assert cluster.origin.got_bytes(bucket.name) == len(body)


# -- the network ------------------------------------------------------------------------------------------------------


def isolate(network: Network, node: ClusterNode, others: list[ClusterNode], etcd: str) -> None:
    """Cut a node off from its peers and from etcd in both directions; S3 is still there."""
    for other in others:
        network.cut(node.place, other.place.address)
        network.cut(other.place, node.place.address)
    network.cut(node.place, etcd)


def test_who_is_parted_from_its_peers_reads_from_s3(rig: Checked) -> None:
    one, two, three = rig.cluster.nodes
    isolate(rig.cluster.network, three, [one, two], rig.cluster.etcd.address)
    outcomes = rig.read()
    for name, outcome in outcomes.items():
        assert outcome.longest_ms <= WORST_STALL_MS, f"{name}: {outcome.stalls}"
    assert rig.origin_bytes <= 2.1 * SHAPE.total_bytes


@pytest.mark.slow
def test_a_partition_of_one_ends_and_its_readers_have_waited_only(rig: Checked) -> None:
    """Parted from S3 too, nothing can be read there; when it is over, everything can."""
    one, two, three = rig.cluster.nodes
    with rig.readers() as readers:
        rig.cluster.network.limit(rig.cluster.origin_place, 20_000_000)
        readers.start()
        readers.wait_for_bytes(4 * MIB, READ_S)
        rig.cluster.network.unplug(three.place)
        others = readers.outcomes(READ_S, of=[one.name, two.name])
        assert_clean(others)
        rig.cluster.network.limit(rig.cluster.origin_place, None)
        rig.cluster.network.plug(three.place)
        assert_clean(readers.outcomes(READ_S, of=[three.name]))
    for name, outcome in others.items():
        assert outcome.longest_ms <= WORST_STALL_MS, f"{name}: {outcome.stalls}"


@pytest.mark.slow
def test_a_peer_that_is_far_is_slow_and_right(rig: Checked) -> None:
    rig.cluster.network.far(rig.cluster.nodes[2].place, 0.05)  # 100 ms there and back
    rig.read(*rig.cluster.nodes[:2])
    assert rig.origin_bytes <= 1.5 * SHAPE.total_bytes


@pytest.mark.slow
def test_an_owner_that_cannot_read_s3_is_no_error_for_others(s3_server: S3Server, bucket: Bucket) -> None:
    """It is waited for a second, and then whoever asked it asks S3 as well."""
    bodies = {f"small-{number}": content(str(number), 50_000) for number in range(12)}
    bucket.fill(bodies)
    with Cluster(s3_server, 2) as cluster:
        one, _ = cluster.mount_all(bucket.url)
        cluster.wait_until_joined()
        cluster.network.cut(cluster.nodes[1].place, cluster.origin_place.address)
        took_s = []
        for name, body in bodies.items():
            begun = time.monotonic()
            assert (one.path / name).read_bytes() == body
            took_s.append(time.monotonic() - begun)
        assert max(took_s) <= ALONE_S + 0.7, took_s
        assert sum(took > 1 for took in took_s) <= 4, took_s
        assert cluster.nodes[0].counter("peer_failures") > 0, "it was asked"
        assert cluster.nodes[0].counter("peer_hedges_won") > 0


@pytest.mark.slow
def test_a_slow_store_is_not_mistaken_for_a_dead_owner(rig: Checked) -> None:
    with rig.readers() as readers:
        rig.cluster.origin.add(Fault(kind="get", delay_s=1.5))
        readers.start()
        assert_clean(readers.outcomes(READ_S))
    assert rig.origin_bytes <= 1.1 * SHAPE.total_bytes


# -- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_node_with_another_secret_gets_nothing_and_reads_from_s3(rig: Checked, tmp_path: Path) -> None:
    rig.read(rig.cluster.nodes[0])
    secret = tmp_path / "other-secret"
    secret.write_text("not the one that all others have")
    secret.chmod(0o600)
    before = rig.origin_bytes
    stranger = rig.cluster.add_node(f"--peer-secret-file={secret}")
    rig.mount(stranger)
    rig.cluster.wait_until_joined()
    rig.read(stranger)
    assert rig.origin_bytes - before == SHAPE.total_bytes
    assert stranger.counter("peer_fill_bytes") == 0


@pytest.mark.slow
def test_clusters_with_other_names_do_not_see_each_other(rig: Checked) -> None:
    rig.read(rig.cluster.nodes[0])
    before = rig.origin_bytes
    other = rig.cluster.add_node("--cluster=another")
    rig.mount(other)
    time.sleep(1)
    assert other.holders() <= {other.name}
    rig.read(other)
    assert rig.origin_bytes - before == SHAPE.total_bytes
