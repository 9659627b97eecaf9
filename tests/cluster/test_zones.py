"""Two zones with one cable between them: bytes cross it once, and each zone goes on without the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.cluster.dataset import Shape, upload
from bench.s3_server import S3Server
from tests.cluster.rig import Cluster, ClusterNode
from tests.cluster.test_peers import LARGER, READ_S, WORST_STALL_MS, Checked, assert_clean
from tests.support.mounts import Bucket

MIB = 1 << 20
SHAPE = Shape(large_files=8, large_bytes=8 * MIB, small_files=60)
HEADS = 1.12
"""What heads, questions and listings add to the bytes of blocks, at the most."""


class Zones(Checked):
    """Four nodes: n1 and n2 beside S3 and etcd, n3 and n4 in a zone behind one cable."""

    @property
    def here(self) -> list[ClusterNode]:
        """The zone of S3."""
        return self.cluster.nodes[:2]

    @property
    def there(self) -> list[ClusterNode]:
        """The zone behind the cable."""
        return self.cluster.nodes[2:]

    def counted(self, nodes: list[ClusterNode], name: str) -> int:
        """Return a counter of several nodes."""
        return sum(node.counter(name) for node in nodes)


@pytest.fixture
def shape(request: pytest.FixtureRequest) -> Shape:
    return getattr(request, "param", SHAPE)


@pytest.fixture
def rig(s3_server: S3Server, bucket: Bucket, tmp_path: Path, shape: Shape) -> Iterator[Zones]:
    with Cluster(s3_server, 0, shm_size="256MiB") as cluster:
        cluster.network.add_zone("b")
        made = Zones(cluster, bucket, tmp_path, shape)
        upload(s3_server, bucket.name, shape, made.manifest)
        nodes = [cluster.add_node("--zone=a"), cluster.add_node("--zone=a")]
        nodes += [cluster.add_node(zone="b"), cluster.add_node(zone="b")]
        for node in nodes:
            made.mount(node)
        cluster.wait_until_joined()
        yield made


@pytest.mark.slow
def test_a_block_crosses_into_a_zone_once(rig: Zones) -> None:
    """Whether all read at once or one after the other: who wants it asks the first of its zone."""
    came, went = rig.cluster.network.zone_bytes("b")
    rig.read(*rig.here, rig.there[0])
    rig.read(rig.there[1])
    total = rig.shape.total_bytes
    assert rig.origin_bytes <= 1.02 * total
    owned_there = rig.counted(rig.there, "peer_owned_fill_bytes")
    assert 0.1 * total < owned_there < 0.9 * total, "both zones own a part"
    now_came, now_went = rig.cluster.network.zone_bytes("b")
    assert now_went - went <= HEADS * owned_there, "what it owns left the zone once, for the other one"
    assert now_came - came <= HEADS * total, "that from S3, and what the others own, came in once"
    assert rig.counted(rig.cluster.nodes, "peer_fill_bytes") >= 2.9 * total, "everybody got it from somebody"
    assert rig.counted(rig.cluster.nodes, "peer_failures") == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [LARGER], indirect=True)
def test_a_zone_that_is_cut_off_holds_nobody_up(rig: Zones) -> None:
    """Its own readers wait for S3, which is on the other side, and see no error when it is over."""
    network = rig.cluster.network
    with rig.readers() as readers:
        network.limit(rig.cluster.origin_place, 60_000_000)
        readers.start()
        readers.wait_for_bytes(LARGER.total_bytes // 4, READ_S)
        struck_s = readers.seconds
        network.zone_link("b", up=False)
        assert all(reader.is_running for reader in readers.by_name.values()), "it is in the middle"
        here = readers.outcomes(READ_S, of=[node.name for node in rig.here])
        network.limit(rig.cluster.origin_place, None)
        network.zone_link("b", up=True)
        assert_clean(here, LARGER)
        assert_clean(readers.outcomes(READ_S, of=[node.name for node in rig.there]), LARGER)
    for name, outcome in here.items():
        assert outcome.longest_after(struck_s) <= WORST_STALL_MS, f"{name}: {struck_s} {outcome.stalls}"


@pytest.mark.slow
def test_a_warm_up_of_all_crosses_into_a_zone_once(rig: Zones) -> None:
    """Each zone has a tree of its own, and one node of it asks the owner."""
    came, went = rig.cluster.network.zone_bytes("b")
    node = rig.here[0]
    done = node.run("warmup", f"--runtime-dir={node.runtime_dir}", "--nodes=all", str(node.mounts[0].path))
    assert done.returncode == 0, done.stdout
    total = rig.shape.total_bytes
    assert rig.origin_bytes == total
    now_came, now_went = rig.cluster.network.zone_bytes("b")
    owned_there = rig.counted(rig.there, "peer_owned_fill_bytes")
    assert now_went - went <= HEADS * owned_there + MIB
    assert now_came - came <= HEADS * total + MIB
    assert rig.counted(rig.cluster.nodes, "peer_failures") == 0
