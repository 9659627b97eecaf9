"""A node's place in the cluster, against a real etcd and what can happen to it."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from operator import methodcaller
from typing import Any

import pytest
import trio

from cachefs import metrics
from cachefs.errors import ConfigError
from peer.etcd import etcdrpc
from peer.etcd_settings import EtcdSettings
from peer.members import View
from tests.peer.nodes import PACE, TTL_S, VOLUME, Node, a_member, child, node_id, running, until, until_all
from tests.peer.relay import open_relay
from tests.support.etcd_server import EtcdServer
from tests.support.programs import REPOSITORY

GONE_S = TTL_S + 1.5
"""When a lease that is not renewed is gone, with the half second between etcd's looks."""
OUT_OF_REACH = "etcd is out of reach"
ALONE = "not in a cluster yet"


@pytest.fixture(scope="module")
def shared() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    """One that a test may stop and restart."""
    with EtcdServer() as server:
        yield server


@pytest.fixture
def settings(shared: EtcdServer, request: pytest.FixtureRequest) -> EtcdSettings:
    """A cluster of the test's own."""
    return shared.settings(cluster=f"c{abs(hash(request.node.name))}")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("peer")]


def by_hand(server: EtcdServer, act: Callable[[Any], object]) -> Any:
    """Do something to etcd behind everybody's back."""
    with closing(server.client()) as client:
        return act(client)


def some(settings: EtcdSettings, count: int, **more: Any) -> list[Node]:
    return [Node(settings, a_member(number), **more) for number in range(count)]


# -- joining and leaving ----------------------------------------------------------------------------------------------


async def test_members_see_each_other_their_volumes_and_who_leaves(settings: EtcdSettings) -> None:
    first, second, third = nodes = some(settings, 3)
    first.membership.set_volumes(frozenset({VOLUME}))
    async with running(*nodes):
        await until_all(nodes, lambda node: node.ids == {node_id(0), node_id(1), node_id(2)})
        await until_all(nodes, lambda node: node.holders == {node_id(0)})
        second.membership.set_volumes(frozenset({VOLUME}))
        first.membership.set_volumes(frozenset())
        await until_all(nodes, lambda node: node.holders == {node_id(1)})
        view = third.membership.view
        assert view.members[node_id(0)] == a_member(0)
        third.membership.announce(weight=5, zone="a")
        await until(lambda: first.membership.view.members[node_id(2)].weight == 5)
        assert view.members[node_id(2)].weight == 1, "a view never changes"
        third.leave()
        took_s = await until(lambda: first.ids == second.ids == {node_id(0), node_id(1)})
        assert took_s < 1, "it said good-bye, nobody waits for its lease"
    assert [len(v.members) for v in first.views if v.members][-1] == 2


async def test_volumes_can_be_set_from_another_thread(settings: EtcdSettings) -> None:
    first, second = nodes = some(settings, 2)
    async with running(*nodes):
        await trio.to_thread.run_sync(first.membership.set_volumes, frozenset({VOLUME}))
        await until(lambda: second.holders == {node_id(0)})


async def test_two_clusters_in_one_etcd_see_nothing_of_each_other(shared: EtcdServer) -> None:
    one, two = (Node(shared.settings(cluster=name), a_member(n)) for n, name in enumerate(("same", "same-2")))
    async with running(one, two):
        await trio.sleep(0.3)
        assert (one.ids, two.ids) == ({node_id(0)}, {node_id(1)})
        assert (one.count(metrics.ETCD_EVENTS.name), two.count(metrics.ETCD_EVENTS.name)) <= (2, 2)


async def test_members_that_are_killed_are_gone_when_their_leases_are(settings: EtcdSettings) -> None:
    """One of them has a clock that is ten minutes ahead, which nobody notices."""
    (node,) = nodes = some(settings, 1)
    where = settings.endpoints[0], settings.cluster
    async with running(*nodes), child(*where, 7) as usual, child(*where, 8, skew_s=600) as ahead:
        await until(lambda: node.holders == {node_id(7), node_id(8)})
        await trio.sleep(TTL_S + 0.3)  # they renew their leases
        assert node.ids == {node_id(0), node_id(7), node_id(8)}
        usual.send_signal(signal.SIGKILL)
        ahead.send_signal(signal.SIGKILL)
        assert await until(lambda: node.ids == {node_id(0)}) < GONE_S
        assert not node.holders


def test_nothing_depends_on_the_time_of_day() -> None:
    for module in ("etcd", "membership", "registration", "roster", "identity"):
        source = (REPOSITORY / "peer" / f"{module}.py").read_text()
        assert not re.search(r"time\.time\b|datetime|localtime|gmtime", source), module


async def test_nothing_is_left_behind(settings: EtcdSettings, shared: EtcdServer) -> None:
    def library_threads() -> list[str]:
        return [t.name for t in threading.enumerate() if "Trio" not in t.name and t is not threading.main_thread()]

    before = library_threads()
    async with running(*some(settings, 3)):
        await trio.sleep(0.1)
        assert len(library_threads()) > len(before)
    await until(lambda: library_threads() == before)
    left = by_hand(shared, lambda client: list(client.get_prefix(f"/cachefs/{settings.cluster}/")))
    assert left == []


@pytest.mark.expect_warnings(OUT_OF_REACH)
async def test_leaving_takes_two_seconds_at_most_when_etcd_does_not_answer(etcd: EtcdServer) -> None:
    node = Node(etcd.settings(), a_member(0), ttl_s=10)
    async with running(node):
        etcd.pause()
        began = trio.current_time()
    assert trio.current_time() - began < 2.8
    etcd.resume()


# -- etcd away --------------------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings(ALONE)
@pytest.mark.slow
async def test_without_etcd_a_node_begins_alone_tries_seldom_and_joins_when_it_comes(
    etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    etcd.kill()
    node = Node(etcd.settings(), a_member(0))
    async with running(node):
        assert node.ids == {node_id(0)}
        assert not node.connected
        await trio.sleep(1)
        tries, cpu_s = node.count(metrics.ETCD_FAULTS.name), time.process_time()
        await trio.sleep(3)
        tries, cpu_s = node.count(metrics.ETCD_FAULTS.name) - tries, time.process_time() - cpu_s
        assert 1 <= tries <= 6, "about every 1.5 s"
        assert cpu_s < 0.15, "5 % of a core, with the test itself and on a busy machine; measured: 0.5 %"
        assert len(warnings_of(caplog)) == 1
        assert "refused" in node.membership.state()["last_error"].lower()
        await trio.to_thread.run_sync(etcd.restart)
        assert await until(lambda: node.connected) < 3.5
        assert node.membership.state()["last_error"] is None


@pytest.mark.expect_warnings(OUT_OF_REACH)
@pytest.mark.parametrize("politely", [pytest.param(True, marks=pytest.mark.slow), False])
async def test_with_etcd_stopped_the_last_view_stays_and_a_restart_resumes(
    etcd: EtcdServer, caplog: pytest.LogCaptureFixture, politely: bool
) -> None:
    first, second = nodes = some(etcd.settings(), 2)
    async with running(*nodes):
        await until(lambda: len(first.ids) == len(second.ids) == 2)
        await trio.sleep(1.2)
        await trio.to_thread.run_sync(etcd.stop if politely else etcd.kill)
        await trio.sleep(TTL_S + 0.3)
        assert len(first.ids) == len(second.ids) == 2
        assert not first.connected
        await trio.to_thread.run_sync(etcd.restart)
        await until(lambda: first.connected and second.connected, 4)
        second.leave()
        # Its lease is given back while we are in doubt (etcd was away for long): it stays for one lease time at most.
        await until(lambda: first.ids == {node_id(0)}, TTL_S + 2)
        assert first.count(metrics.ETCD_LISTS.name) == 1, "the watch went on where it ended"
        assert first.count(metrics.ETCD_LEASES.name) == 1, "the lease had survived"
        assert min(len(v.members) for v in first.views[1:]) == 1
        assert len(warnings_of(caplog)) == 2, "one for each of the two nodes"


@pytest.mark.expect_warnings(OUT_OF_REACH)
async def test_members_that_come_and_go_while_we_are_cut_off_are_noticed(etcd: EtcdServer) -> None:
    first, second = some(etcd.settings(), 2)
    async with open_relay(etcd.port) as relay:
        away = Node(EtcdSettings(endpoints=(relay.endpoint,)), a_member(5), ttl_s=10)
        async with running(away, first):
            await until(lambda: len(away.ids) == 2)
            relay.refuse = True
            relay.cut()
            await until(lambda: not away.connected)
            async with running(second):
                first.leave()
                await trio.sleep(0.5)
                relay.refuse = False
                await until(lambda: away.ids == {node_id(5), node_id(1)}, 4)
            assert away.count(metrics.ETCD_LISTS.name) == 1


@pytest.mark.expect_warnings(OUT_OF_REACH)
@pytest.mark.parametrize("overtaken", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_an_etcd_that_lost_everything_does_not_empty_the_view(etcd: EtcdServer, overtaken: bool) -> None:
    nodes = some(etcd.settings(), 3)
    async with running(*nodes), child(etcd.endpoint, "default", 7) as other:
        await until_all(nodes, lambda node: len(node.ids) == 4)
        seen = [len(node.views) for node in nodes]
        etcd.kill()
        other.kill()
        await trio.to_thread.run_sync(lambda: etcd.restart(empty=True))
        if overtaken:  # others may have written so much since that the revision tells nothing
            by_hand(etcd, lambda client: [client.put("/else", str(n)) for n in range(200)])
        await until_all(nodes, lambda node: node.connected and node.count(metrics.ETCD_LEASES.name) == 2, 4)
        living = {node_id(0), node_id(1), node_id(2)}
        await until_all(nodes, lambda node: node.ids == living, GONE_S)  # and the dead one is gone
        for node, before in zip(nodes, seen, strict=True):
            assert all(view.members.keys() >= living for view in node.views[before:]), "not even for a moment"


@pytest.mark.expect_warnings(OUT_OF_REACH)
@pytest.mark.slow
async def test_an_etcd_that_was_silent_longer_than_all_leases_does_not_empty_the_view(etcd: EtcdServer) -> None:
    nodes = some(etcd.settings(), 3)
    async with running(*nodes):
        await until_all(nodes, lambda node: len(node.ids) == 3)
        await trio.sleep(1.2)
        etcd.pause()
        await trio.sleep(TTL_S + 1.3)
        assert not any(node.connected for node in nodes)
        etcd.resume()
        await until_all(nodes, lambda node: node.connected, 5)
        await trio.sleep(TTL_S + 1)
        for node in nodes:
            assert node.ids == {node_id(0), node_id(1), node_id(2)}
            assert all(len(view.members) == 3 for view in node.views[3:])


@pytest.mark.expect_warnings(OUT_OF_REACH)
async def test_a_connection_on_which_nothing_arrives_is_given_up(etcd: EtcdServer) -> None:
    async with open_relay(etcd.port) as relay:
        node = Node(EtcdSettings(endpoints=(relay.endpoint, etcd.endpoint)), a_member(0))
        node.membership._endpoint = 0
        async with running(node):
            relay.freeze()
            assert await until(lambda: node.membership.state()["endpoint"] == etcd.endpoint) < TTL_S + 1
            await until(lambda: node.connected)
            relay.thaw()


async def test_a_watch_that_is_cut_goes_on_without_a_word(etcd: EtcdServer) -> None:
    (other,) = some(etcd.settings(), 1)
    async with open_relay(etcd.port) as relay:
        node = Node(EtcdSettings(endpoints=(relay.endpoint,)), a_member(5))
        async with running(node):
            await trio.sleep(1.2)
            relay.cut()
            await until(lambda: not node.connected)
            await until(lambda: node.connected)
            async with running(other):
                await until(lambda: len(node.ids) == 2)
            assert (
                node.count(metrics.ETCD_CONNECTIONS.name),
                node.count(metrics.ETCD_LISTS.name),
                node.count(metrics.ETCD_LEASES.name),
            ) == (2, 1, 1)


@pytest.mark.expect_warnings(OUT_OF_REACH)
async def test_a_connection_that_comes_and_goes_is_one_outage(
    etcd: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_relay(etcd.port) as relay:
        pace = replace(PACE, retry_longest_s=0.2)
        node = Node(EtcdSettings(endpoints=(relay.endpoint,)), a_member(0), pace=pace)
        async with running(node):
            for _ in range(5):
                await until(lambda: relay.cut() or not node.connected)  # one with no call on it is made anew silently
                await until(lambda: node.connected)
            assert node.count(metrics.ETCD_CONNECTIONS.name) >= 6
            assert len(warnings_of(caplog)) == 1


async def test_the_next_endpoint_is_asked_when_one_fails(etcd: EtcdServer) -> None:
    async with open_relay(etcd.port) as relay:
        node = Node(EtcdSettings(endpoints=("http://127.0.0.1:1", relay.endpoint, etcd.endpoint)), a_member(0))
        node.membership._endpoint = 0
        async with running(node):
            await until(lambda: node.connected)
            await trio.sleep(1.2)
            relay.refuse = True
            relay.cut()
            await until(lambda: node.connected and node.membership.state()["endpoint"] == etcd.endpoint)


async def test_events_that_were_compacted_while_we_were_away_are_listed(etcd: EtcdServer) -> None:
    (other,) = some(etcd.settings(), 1)
    async with open_relay(etcd.port) as relay:
        node = Node(EtcdSettings(endpoints=(relay.endpoint,)), a_member(5), ttl_s=10)
        async with running(node):
            await trio.sleep(1.2)
            relay.refuse = True
            relay.cut()
            async with running(other):

                def compact(client: Any) -> None:
                    revision = client.put("/else", "").header.revision
                    client.kvstub.Compact(etcdrpc.CompactionRequest(revision=revision, physical=True), 5)

                by_hand(etcd, compact)
                relay.refuse = False
                await until(lambda: len(node.ids) == 2)
                assert node.count(metrics.ETCD_LISTS.name) == 2
            await until(lambda: len(node.ids) == 1)  # and the watch goes on from there


# -- who we are for etcd ----------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("does not accept user 'fs'")
async def test_a_wrong_password_is_said_once_and_tried_seldom(
    etcd: EtcdServer, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    etcd.enable_users("fs", "right-horse")
    secret = tmp_path / "password"
    secret.write_text("wrong-battery\n")
    node = Node(etcd.settings(user="fs", password_file=secret), a_member(0))
    async with running(node):
        await trio.sleep(1.4)
        assert 2 <= node.count(metrics.ETCD_FAULTS.name) <= 6
        assert len(warnings_of(caplog)) == 1
        assert "'fs'" in warnings_of(caplog)[0]
        said = caplog.text + str(node.membership.state())
        secret.write_text("right-horse\n")
        await until(lambda: node.connected, 3)
    said += caplog.text
    assert "battery" not in said
    assert "horse" not in said


@pytest.mark.expect_warnings("user name is empty")
async def test_an_etcd_that_wants_a_user_says_so(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    etcd.enable_users("fs", "right")
    node = Node(etcd.settings(), a_member(0))
    async with running(node):
        await trio.sleep(1)
        assert len(warnings_of(caplog)) == 1


async def test_a_user_is_no_trouble_for_an_etcd_without_users(settings: EtcdSettings, tmp_path: Any) -> None:
    secret = tmp_path / "password"
    secret.write_text("any")
    node = Node(
        EtcdSettings(endpoints=settings.endpoints, cluster=settings.cluster, user="fs", password_file=secret),
        a_member(0),
    )
    async with running(node):
        await until(lambda: node.connected)


async def test_a_token_that_expires_is_renewed_without_a_word(tmp_path: Any) -> None:
    arguments = ("--auth-token", f"jwt,{_jwt_keys(tmp_path)},sign-method=RS256,ttl=1s")
    with EtcdServer(arguments=arguments) as etcd:
        etcd.enable_users("fs", "right")
        secret = tmp_path / "password"
        secret.write_text("right")
        nodes = some(etcd.settings(user="fs", password_file=secret), 2)
        async with running(*nodes):
            await trio.sleep(1.4)  # renewals go without a token, so nobody has noticed
            assert [node.count(metrics.ETCD_CONNECTIONS.name) for node in nodes] == [1, 1]
            for node in nodes:
                node.membership.set_volumes(frozenset({VOLUME}))
            await until_all(nodes, lambda node: node.holders == {node_id(0), node_id(1)}, 2)
            for node in nodes:
                assert (
                    node.count(metrics.ETCD_CONNECTIONS.name),
                    node.count(metrics.ETCD_LISTS.name),
                    node.count(metrics.ETCD_LEASES.name),
                ) == (2, 1, 1)


def _jwt_keys(directory: Any) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (directory / "private.pem").write_bytes(private)
    (directory / "public.pem").write_bytes(public)
    return f"pub-key={directory}/public.pem,priv-key={directory}/private.pem"


# -- records that others change ---------------------------------------------------------------------------------------


async def test_a_lease_that_is_revoked_by_hand_is_replaced(settings: EtcdSettings, shared: EtcdServer) -> None:
    first, second = nodes = some(settings, 2)
    first.membership.set_volumes(frozenset({VOLUME}))
    async with running(*nodes):
        await until(lambda: second.holders == {node_id(0)})
        lease = int(first.membership.state()["lease"], 16)
        by_hand(shared, lambda client: client.revoke_lease(lease))
        await until(lambda: first.count(metrics.ETCD_LEASES.name) == 2, 1)
        await until(lambda: second.holders == {node_id(0)})


async def test_records_that_are_deleted_or_spoilt_by_hand_are_written_again(
    settings: EtcdSettings, shared: EtcdServer
) -> None:
    first, second = nodes = some(settings, 2)
    first.membership.set_volumes(frozenset({VOLUME}))
    async with running(*nodes):
        await until(lambda: second.holders == {node_id(0)})
        prefix = f"/cachefs/{settings.cluster}"
        for key in (f"{prefix}/nodes/{node_id(0)}", f"{prefix}/volumes/{VOLUME}/nodes/{node_id(0)}"):
            value, _ = by_hand(shared, methodcaller("get", key=key))
            for spoil in (methodcaller("delete", key=key), methodcaller("put", key=key, value="?")):
                by_hand(shared, spoil)

                def written_again(key: str = key, value: bytes = value) -> bool:
                    return bool(by_hand(shared, lambda client: client.get(key))[0] == value)

                await until(written_again, 1)
                await until(lambda: second.holders == {node_id(0)} and len(second.ids) == 2)
        assert first.count(metrics.ETCD_LEASES.name) == 1


BAD = [
    b"",
    b"not JSON",
    b"\xff\xfe",
    b"[]",
    b"{}",
    b'{"node_id": 5, "name": "x", "address": "h:1"}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "h:1", "weight": "many"}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "h:1", "weight": 0}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "h:1", "weight": 1e300}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "h:1", "weight": 99999999999999999999}',
    b'{"node_id": "00000000000000bb", "name": "x", "address": "h:1"}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "nowhere"}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "h:70000"}',
    b'{"node_id": "00000000000000aa", "name": "a\\nb", "address": "h:1"}',
    b'{"node_id": "00000000000000aa", "name": "' + b"x" * 300 + b'", "address": "h:1"}',
    b'{"node_id": "00000000000000aa", "name": "x", "address": "h:1", "more": "' + b"x" * 1_000_000 + b'"}',
    b"[" * 100_000,
]


async def test_bad_records_of_others_are_left_out(
    settings: EtcdSettings, shared: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "peer")
    (node,) = nodes = some(settings, 1)
    prefix = f"/cachefs/{settings.cluster}"
    key = f"{prefix}/nodes/00000000000000aa"
    good = b'{"node_id": "00000000000000aa", "name": "x", "address": "h:1", "unknown field": [1]}'
    async with running(*nodes):
        for bad in BAD:
            by_hand(shared, methodcaller("put", key=key, value=bad))
        await until(lambda: node.count(metrics.ETCD_BAD_RECORDS.name) == len(BAD))
        said = [record for record in caplog.records if "left out" in record.getMessage()]
        assert len(said) == len(BAD)
        assert max(len(record.getMessage()) for record in said) < 500
        for other in ("", "nodes/", "nodes/XYZ", "volumes/x/nodes/y", "volumes/" + VOLUME, "later/kinds/of/key"):
            by_hand(shared, methodcaller("put", key=f"{prefix}/{other}", value="?"))
        by_hand(shared, lambda client: client.put(f"{prefix}/volumes/{VOLUME}/nodes/00000000000000cc", ""))
        assert node.ids == {node_id(0)}
        by_hand(shared, lambda client: client.put(key, good))
        await until(lambda: node.ids == {node_id(0), "00000000000000aa"})
        by_hand(shared, lambda client: client.put(key, BAD[1]))  # what it was before counts no more
        await until(lambda: node.ids == {node_id(0)})
        late = Node(settings, a_member(1))
        async with running(late):  # lists what the other one watched
            assert late.ids == {node_id(0), node_id(1)}
            assert not late.holders


# -- who we are for others --------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("another node has the id")
@pytest.mark.slow
async def test_of_two_nodes_with_one_id_one_draws_another(
    settings: EtcdSettings, caplog: pytest.LogCaptureFixture
) -> None:
    first = Node(settings, a_member(0))
    copy = Node(settings, a_member(0, name="copy", address="127.0.0.2:1", instance="copied"))
    witness = Node(settings, a_member(1))
    for node in (first, copy):
        node.membership.set_volumes(frozenset({VOLUME}))
    async with running(first, witness):
        await until(lambda: len(witness.ids) == 2)
        async with running(copy):
            await until(lambda: len(witness.ids) == 3)
            everybody = {node_id(0), node_id(1), "f" * 16}
            nodes = first, copy, witness
            await until_all(nodes, lambda node: node.ids == everybody and node.holders == {node_id(0), "f" * 16})
            assert (first.redraws, copy.redraws) == (1, 0), "the one whose record was replaced"
            assert first.membership.member.node_id == "f" * 16
            assert witness.membership.view.members[node_id(0)].name == "copy"
            assert witness.membership.view.members["f" * 16].name == "node-0"
            await trio.sleep(0.3)
            assert witness.ids == everybody
            assert len(warnings_of(caplog)) == 1


@pytest.mark.slow
async def test_a_copy_that_dies_soon_leaves_the_id_to_us(settings: EtcdSettings) -> None:
    first, witness = Node(settings, a_member(0)), Node(settings, a_member(1))
    async with running(first, witness):
        async with child(settings.endpoints[0], settings.cluster, 0):
            await until(lambda: witness.membership.view.members[node_id(0)].instance == "child")
        await until(lambda: witness.membership.view.members.get(node_id(0)) == a_member(0), GONE_S + 1)
        await trio.sleep(1.5)
        assert first.redraws == 0
        assert witness.ids == {node_id(0), node_id(1)}


@pytest.mark.slow
async def test_our_successor_keeps_the_id(settings: EtcdSettings) -> None:
    old, witness = Node(settings, a_member(0)), Node(settings, a_member(1))
    new = Node(settings, a_member(0, instance="next"))
    async with running(old, witness), running(new):
        await until(lambda: witness.membership.view.members[node_id(0)].instance == "next")
        await trio.sleep(2 * TTL_S + 0.8)
        assert old.redraws == new.redraws == 0
        old.leave()  # takes nothing away from its successor
        await trio.sleep(0.5)
        assert witness.membership.view.members[node_id(0)].instance == "next"


@pytest.mark.slow
async def test_a_node_that_restarts_at_once_takes_its_place_again(settings: EtcdSettings) -> None:
    witness = Node(settings, a_member(1))
    async with running(witness):
        async with child(settings.endpoints[0], settings.cluster, 0) as before:
            before.kill()
        assert len(witness.ids) == 2
        again = Node(settings, a_member(0, instance="again"))
        async with running(again):
            await until(lambda: witness.membership.view.members[node_id(0)].instance == "again", 1)
            await trio.sleep(GONE_S)  # the lease of its first life ends
            assert witness.ids == {node_id(0), node_id(1)}
            assert again.redraws == 0


@pytest.mark.slow
@pytest.mark.expect_warnings("two nodes are called 'twin'")
async def test_two_nodes_of_one_name_both_stay(settings: EtcdSettings, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (Node(settings, a_member(n, name="twin")) for n in range(2))
    async with running(one, two, Node(settings, a_member(2))):
        await until(lambda: len(warnings_of(caplog)) == 2, 4 * TTL_S)
        assert one.ids == two.ids == {node_id(0), node_id(1), node_id(2)}
        await trio.sleep(0.8)
        assert len(warnings_of(caplog)) == 2, "one for each of the two"


@pytest.mark.parametrize(
    "wrong", [{"node_id": "X"}, {"address": "no port"}, {"weight": 0}, {"name": "a\nb"}, {"zone": "z" * 300}]
)
def test_a_member_that_others_would_leave_out_is_refused_here(settings: EtcdSettings, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Node(settings, a_member(0, **wrong))


async def test_a_listener_that_fails_harms_nobody(settings: EtcdSettings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "peer")
    (node,) = some(settings, 1)

    def fail(view: View) -> None:
        raise RuntimeError(view)

    node.membership.subscribe(fail)
    async with running(node), running(Node(settings, a_member(1))):
        await until(lambda: len(node.ids) == 2)
        assert len(node.views[-1].members) == 2


def test_the_pace_is_bounded() -> None:
    assert PACE.retry_first_s == 0.1
    assert PACE.retry_longest_s == 2.0
