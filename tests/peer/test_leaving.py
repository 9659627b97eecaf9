"""What stays in etcd when nodes leave a cluster: nothing, once the last one has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import trio

from cachefs import metrics
from peer.etcd_settings import EtcdSettings
from tests.peer.nodes import Node, a_member, node_id, running, until, until_all
from tests.support.etcd_server import EtcdServer


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


def keys_of(server: EtcdServer, settings: EtcdSettings) -> list[str]:
    """Return the keys of a cluster, without its name."""
    prefix = f"/cachefs/{settings.cluster}/"
    with closing(server.client()) as client:
        found = list(client.get_prefix(prefix, keys_only=True))
    return sorted(about.key.decode().removeprefix(prefix) for _, about in found)


async def test_only_the_last_one_takes_the_mark_of_the_cluster_along(etcd: EtcdServer) -> None:
    settings = etcd.settings(cluster="leaving")
    staying, leaving = (Node(settings, a_member(number)) for number in range(2))
    async with running(staying):
        async with running(leaving):
            await until_all([staying, leaving], lambda node: len(node.ids) == 2)
        await until(lambda: staying.ids == {node_id(0)})
        assert keys_of(etcd, settings) == ["epoch", f"nodes/{node_id(0)}"]
    assert keys_of(etcd, settings) == []


async def test_other_clusters_are_not_asked(etcd: EtcdServer) -> None:
    """A cluster whose name begins in the same way keeps its mark, and keeps no other one's."""
    one, other = (Node(etcd.settings(cluster=name), a_member(0)) for name in ("name", "name-b"))
    async with running(other):
        async with running(one):
            await until_all([one, other], lambda node: node.connected)
        assert keys_of(etcd, etcd.settings(cluster="name")) == []
        assert keys_of(etcd, etcd.settings(cluster="name-b")) == ["epoch", f"nodes/{node_id(0)}"]


@pytest.mark.expect_warnings("out of reach")
async def test_whoever_finds_another_mark_loses_nobody(etcd: EtcdServer) -> None:
    """As a node does that was cut off while the last of the others left."""
    settings = etcd.settings(cluster="anew")
    nodes = [Node(settings, a_member(number)) for number in range(2)]
    everybody = {node_id(0), node_id(1)}
    async with running(*nodes):
        await until_all(nodes, lambda node: node.ids == everybody)
        with closing(etcd.client()) as client:
            client.delete(f"/cachefs/{settings.cluster}/epoch")
        await trio.to_thread.run_sync(etcd.restart)
        await until_all(nodes, lambda node: node.connected and node.count(metrics.ETCD_CONNECTIONS.name) == 2, 10)
        assert "epoch" in keys_of(etcd, settings)
        await until_all(nodes, lambda node: node.ids == everybody)
    assert keys_of(etcd, settings) == []
