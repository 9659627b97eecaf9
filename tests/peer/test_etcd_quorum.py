"""A node's place in a cluster whose etcd has three members, of which some die: the leader, the majority, all."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import trio

from cachefs import metrics
from tests.peer.nodes import TTL_S, VOLUME, Node, a_member, child, node_id, running, until_all
from tests.support.etcd_cluster import EtcdCluster, EtcdMember

OUT_OF_REACH = "etcd is out of reach"
NODES = 4
EVERYBODY = {node_id(number) for number in range(NODES)}


@pytest.fixture
def etcd() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


def some(etcd: EtcdCluster, ttl_s: int = TTL_S) -> list[Node]:
    """Nodes, and each member of etcd has one that is connected to it."""
    nodes = [Node(etcd.settings(), a_member(number), ttl_s=ttl_s) for number in range(NODES)]
    for number, node in enumerate(nodes):
        node.membership._endpoint = number % len(etcd.members)
    return nodes


def only_everybody_since(nodes: list[Node], seen: list[int]) -> bool:
    """Whether no view since then lacked a living node, not even for a moment."""
    return all(view.members.keys() >= EVERYBODY for n, at in zip(nodes, seen, strict=True) for view in n.views[at:])


async def joined(nodes: list[Node]) -> list[int]:
    """Wait until all see each other; return how many views each has had."""
    await until_all(nodes, lambda node: node.connected and node.ids >= EVERYBODY)
    return [len(node.views) for node in nodes]


async def all_hear_of(nodes: list[Node], first: Node) -> None:
    """What one of them says reaches all."""
    first.membership.set_volumes(frozenset({VOLUME}))
    await until_all(nodes, lambda node: node.holders == {first.membership.member.node_id}, 6)
    first.membership.set_volumes(frozenset())
    await until_all(nodes, lambda node: not node.holders, 6)


async def kill(member: EtcdMember) -> None:
    await trio.to_thread.run_sync(member.kill)


async def leader_of(etcd: EtcdCluster, among: list[EtcdMember] | None = None) -> EtcdMember:
    return await trio.to_thread.run_sync(etcd.leader, among)


async def test_a_leader_that_is_killed_costs_nobody_his_place(
    etcd: EtcdCluster, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = some(etcd)
    async with running(*nodes):
        seen = await joined(nodes)
        leader = await leader_of(etcd)
        await kill(leader)
        await leader_of(etcd, [member for member in etcd.members if member is not leader])
        await until_all(nodes, lambda node: node.connected, 5)
        await trio.sleep(TTL_S + 1)  # leases that had been lost would be noticed now
        assert only_everybody_since(nodes, seen)
        for node in nodes:
            assert node.connected
            assert node.membership.state()["endpoint"] != leader.endpoint
            assert node.count(metrics.ETCD_LEASES.name) == 1, "the lease has survived"
            assert node.count(metrics.ETCD_LISTS.name) == 1, "the watch went on where it ended"
        await all_hear_of(nodes, nodes[0])
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert not warnings, "two of three members are an etcd that is well"


@pytest.mark.slow
@pytest.mark.expect_warnings(OUT_OF_REACH)
async def test_without_a_majority_the_last_view_stays_and_the_majority_is_found_again(
    etcd: EtcdCluster, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = some(etcd)
    async with running(*nodes), child(etcd.members[0].endpoint, "default", 9) as other:
        await until_all(nodes, lambda node: len(node.ids) == NODES + 1)
        seen = await joined(nodes)
        first = await leader_of(etcd)
        await kill(first)
        second, third = [member for member in etcd.members if member is not first]
        second = await leader_of(etcd, [second, third])
        await until_all(nodes, lambda node: node.connected, 5)
        await kill(second)
        await until_all(nodes, lambda node: not node.connected, 8)
        other.kill()  # nobody can know
        await trio.sleep(2 * TTL_S + 1)
        assert all(len(node.ids) == NODES + 1 and not node.connected for node in nodes)
        assert all(node.membership.state()["last_error"] for node in nodes)
        assert len({record.getMessage() for record in caplog.records if OUT_OF_REACH in record.getMessage()}) <= NODES

        await trio.to_thread.run_sync(second.restart)
        await until_all(nodes, lambda node: node.connected, 8)
        await until_all(nodes, lambda node: node.ids == EVERYBODY, 3 * TTL_S + 3)
        await all_hear_of(nodes, nodes[1])
        await trio.to_thread.run_sync(first.restart)
        await kill(second)
        await until_all(nodes, lambda node: node.connected, 8)
        await all_hear_of(nodes, nodes[2])
        await trio.sleep(TTL_S + 1)
        assert only_everybody_since(nodes, seen)


@pytest.mark.slow
@pytest.mark.expect_warnings(OUT_OF_REACH)
async def test_all_members_are_killed_and_come_back(etcd: EtcdCluster) -> None:
    nodes = some(etcd)
    async with running(*nodes):
        seen = await joined(nodes)
        for member in etcd.members:
            await kill(member)
        await trio.sleep(TTL_S + 1)
        for member in etcd.members:
            member.launch()
        await until_all(nodes, lambda node: node.connected, 15)
        await all_hear_of(nodes, nodes[0])
        await trio.sleep(TTL_S + 1)
        assert only_everybody_since(nodes, seen)


@pytest.mark.slow
async def test_a_leader_that_is_stopped_is_left(etcd: EtcdCluster) -> None:
    """SIGSTOP: its connections stay open. When it goes on, it believes for a moment that it still leads, and may revoke
    leases that the next one has renewed (https://github.com/etcd-io/etcd/issues/15247): their nodes register at once.
    """
    nodes = some(etcd, ttl_s=2 * TTL_S)  # two questions without an answer (1 s each) must not cost a lease
    async with running(*nodes):
        seen = await joined(nodes)
        leader = await leader_of(etcd)
        leader.pause()
        try:
            others = [member for member in etcd.members if member is not leader]
            await leader_of(etcd, others)
            await until_all(
                nodes, lambda node: node.connected and node.membership.state()["endpoint"] != leader.endpoint, 8
            )
            await all_hear_of(nodes, nodes[0])
            assert only_everybody_since(nodes, seen)
        finally:
            leader.resume()
        await trio.sleep(1)
        seen = await joined(nodes)
        await trio.sleep(2 * TTL_S)
        assert only_everybody_since(nodes, seen)
        await all_hear_of(nodes, nodes[1])


@pytest.mark.slow
async def test_a_node_that_comes_while_a_member_is_away_finds_the_others(etcd: EtcdCluster) -> None:
    await kill(etcd.members[0])
    await leader_of(etcd, etcd.members[1:])
    nodes = some(etcd)
    async with running(*nodes):
        await joined(nodes)
        for member in etcd.members[1:]:  # an upgrade of etcd, one after the other
            await trio.to_thread.run_sync(etcd.members[0].restart)
            await kill(member)
            await until_all(nodes, lambda node: node.connected, 8)
            await trio.to_thread.run_sync(member.restart)
        await until_all(nodes, lambda node: node.connected and node.ids == EVERYBODY, 8)
