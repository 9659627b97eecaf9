"""Nodes that have addresses of IPv6 only: etcd, S3, and what they tell each other of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from tests.cluster.rig import Cluster
from tests.support.mounts import Bucket
from tests.support.programs import content

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel has no IPv6")


@pytest.mark.slow
def test_peers_find_and_serve_each_other(s3_server: S3Server, bucket: Bucket) -> None:
    bodies = {f"part-{number}": content(str(number), 9 * MIB) for number in range(4)}
    bucket.fill(bodies)
    with Cluster(s3_server, 3, ipv6=True) as cluster:
        mounts = cluster.mount_all(bucket.url)
        cluster.wait_until_joined()
        for mount in mounts:
            for name, body in bodies.items():
                assert (mount.path / name).read_bytes() == body
        total = sum(map(len, bodies.values()))
        assert cluster.origin.got_bytes(bucket.name) == total
        assert sum(node.counter("peer_fill_bytes") for node in cluster.nodes) == 2 * total
        assert sum(node.counter("peer_failures") for node in cluster.nodes) == 0
        first = cluster.nodes[0]
        [told] = json.loads(first.run("peers", "--json", f"--runtime-dir={first.runtime_dir}").stdout)["clusters"]
        for member, node in zip(told["members"], cluster.nodes, strict=True):
            assert member["address"].startswith(f"[{node.place.address}]:")
            assert member["error"] is None


@pytest.mark.slow
@pytest.mark.parametrize("advertised", ["", "--advertise=[{}]:7411", "--peer-listen=::"])
def test_ways_to_say_where_a_node_is(s3_server: S3Server, bucket: Bucket, advertised: str) -> None:
    """Nothing (then it is the address from which etcd is reached), address and port, another one to listen at."""
    body = bucket.put("a", content("a", 20 * MIB))
    with Cluster(s3_server, 2, ipv6=True) as cluster:
        one, two = cluster.nodes
        option = advertised.format(two.place.address)
        if "listen" not in option:
            two.peer_options = [part for part in two.peer_options if not part.startswith("--advertise")]
        two.more_options += [option] if option else []
        mounts = cluster.mount_all(bucket.url)
        cluster.wait_until_joined()
        for mount in mounts:
            assert (mount.path / "a").read_bytes() == body
        told = two.agent_status()["cluster"]
        [address] = [member["address"] for member in told["members"] if member["self"]]
        assert address.startswith(f"[{two.place.address}]:")
        assert ":7411" in address or "advertise" not in option
        assert cluster.origin.got_bytes(bucket.name) == len(body)
        assert one.counter("peer_failures") == two.counter("peer_failures") == 0


@pytest.mark.slow
def test_a_link_that_goes_down_and_comes_back(s3_server: S3Server, bucket: Bucket) -> None:
    bodies = {name: bucket.put(name, content(name, 20 * MIB)) for name in ("a", "b")}
    with Cluster(s3_server, 2, ipv6=True) as cluster:
        one, two = cluster.mount_all(bucket.url)
        cluster.wait_until_joined()
        assert (one.path / "a").read_bytes() == bodies["a"]
        cluster.network.link_down(cluster.nodes[1].place)
        assert (one.path / "b").read_bytes() == bodies["b"]
        cluster.network.link_up(cluster.nodes[1].place)
        cluster.wait_until_joined(timeout_s=40)
        before = cluster.origin.got_bytes(bucket.name)
        for name, body in bodies.items():
            assert (two.path / name).read_bytes() == body
        fetched = cluster.origin.got_bytes(bucket.name) - before
        assert fetched <= 0.3 * sum(map(len, bodies.values())), "the other has all; a breaker may be open for a moment"
