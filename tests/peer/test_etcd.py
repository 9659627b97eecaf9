"""The edge to etcd: settings, one session, and what its faults are called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import peer.etcd
from peer.etcd import (
    Compacted,
    EtcdRefused,
    EtcdSession,
    EtcdUnavailable,
    LeaseGone,
    TokenExpired,
    etcdrpc,
    open_session,
)
from peer.etcd_settings import EtcdSettings
from peer.records import Record
from tests.peer.nodes import until
from tests.peer.relay import open_relay
from tests.support.etcd_server import EtcdServer, ServerTls
from tests.support.programs import REPOSITORY

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def shared() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


def session_of(server: EtcdServer, **more: Any) -> Any:
    return open_session(server.settings(**more), server.endpoint, TIMEOUT_S)


class Watcher:
    """Collects what a watch hands over."""

    def __init__(self) -> None:
        self.events: list[Record] = []
        self.revision = 0
        self.fault: Exception | None = None

    def take(self, events: list[Record], revision: int) -> None:
        self.events += events
        self.revision = revision

    async def run(self, session: EtcdSession, prefix: str, after: int) -> None:
        try:
            await session.watch(prefix, after, self.take)
        except peer.etcd.EtcdFault as fault:
            self.fault = fault


# -- the library ------------------------------------------------------------------------------------------------------


def test_the_generated_modules_are_what_the_proto_files_say() -> None:
    subprocess.run([sys.executable, "scripts/etcd-stubs", "--check"], cwd=REPOSITORY, check=True, timeout=60)


# -- records and leases -----------------------------------------------------------------------------------------------


async def test_records_are_written_listed_and_gone_with_their_lease(shared: EtcdServer) -> None:
    async with session_of(shared) as session:
        lease, ttl_s = await session.grant(60)
        assert ttl_s == 60
        puts = {f"/many/{n:05}": str(n).encode() for n in range(2345)}  # several transactions, several pages
        revision = await session.write(lease, puts, [])
        listed, position = await session.list_prefix("/many/")
        assert {record.key: record.value for record in listed} == puts
        assert position.revision == revision == max(record.revision for record in listed)
        assert position.raft_term > 0
        await session.write(lease, {"/many/00000": b"new"}, ["/many/00001"])
        assert (await session.read("/many/00000"))[0] == b"new"
        assert (await session.read("/many/00001"))[0] is None
        assert await session.refresh(lease) == 60
        await session.revoke(lease)
        assert (await session.list_prefix("/many/"))[0] == []
        assert await session.refresh(lease) == 0
        with pytest.raises(LeaseGone):
            await session.revoke(lease)
        with pytest.raises(LeaseGone):
            await session.write(lease, {"/many/00000": b""}, [])


async def test_create_writes_only_what_is_not_there(shared: EtcdServer) -> None:
    async with session_of(shared) as session:
        await session.create("/once", b"first")
        await session.create("/once", b"second")
        assert (await session.read("/once"))[0] == b"first"


async def test_a_prefix_is_no_more_than_that(shared: EtcdServer) -> None:
    async with session_of(shared) as session:
        lease, _ = await session.grant(60)
        await session.write(lease, dict.fromkeys(("/p/a", "/p/", "/p0", "/p", "/o/z"), b""), [])
        assert [record.key for record in (await session.list_prefix("/p/"))[0]] == ["/p/", "/p/a"]


# -- watching ---------------------------------------------------------------------------------------------------------


async def test_a_watch_goes_on_from_a_revision(shared: EtcdServer) -> None:
    watcher = Watcher()
    async with session_of(shared) as session, trio.open_nursery() as nursery:
        lease, _ = await session.grant(60)
        before = await session.write(lease, {"/w/early": b"0"}, [])
        await session.write(lease, {"/w/missed": b"1"}, [])
        nursery.start_soon(watcher.run, session, "/w/", before)
        await trio.sleep(0.2)
        await session.write(lease, {"/elsewhere": b""}, [])
        await session.write(lease, {"/w/a": b"2", "/w/b": b"3"}, ["/w/early"])
        await trio.sleep(0.2)
        seen = {event.key: event.value for event in watcher.events}
        assert seen == {"/w/missed": b"1", "/w/a": b"2", "/w/b": b"3", "/w/early": None}
        assert watcher.revision == max(event.revision for event in watcher.events)
        nursery.cancel_scope.cancel()


async def test_a_watch_from_before_a_compaction_says_so(shared: EtcdServer) -> None:
    async with session_of(shared) as session:
        lease, _ = await session.grant(60)
        revision = max([await session.write(lease, {"/c": bytes([n])}, []) for n in range(5)])
        with closing(shared.client()) as client:
            client.kvstub.Compact(etcdrpc.CompactionRequest(revision=revision), 5)
        with pytest.raises(Compacted):
            await session.watch("/c", revision - 3, Watcher().take)


async def test_a_watch_that_is_silent_is_probed_and_then_given_up(
    shared: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer.etcd, "PROBE_S", 0.2)
    watcher = Watcher()
    async with open_relay(shared.port) as relay:
        settings = EtcdSettings(endpoints=(relay.endpoint,))
        async with open_session(settings, relay.endpoint, 0.5) as session, trio.open_nursery() as nursery:
            _, position = await session.read("/silent/")
            nursery.start_soon(watcher.run, session, "/silent/", position.revision)
            await trio.sleep(1)
            assert watcher.fault is None, "the probes are answered"
            assert watcher.events == []
            relay.freeze()
            await trio.sleep(1.3)
            assert isinstance(watcher.fault, EtcdUnavailable)
            assert "silent" in str(watcher.fault)
            relay.thaw()
            nursery.cancel_scope.cancel()


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_an_endpoint_that_refuses_and_one_that_never_answers() -> None:
    settings = EtcdSettings(endpoints=("http://127.0.0.1:1",))
    async with open_session(settings, settings.endpoints[0], 1.0) as session:
        with pytest.raises(EtcdUnavailable, match=r"(?i)refused"):
            await session.read("/x")
    listener = trio.socket.socket()
    with listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with open_session(settings, endpoint, 0.5) as session:
            began = trio.current_time()
            with pytest.raises(EtcdUnavailable, match="no answer"):
                await session.read("/x")
            assert trio.current_time() - began < 1.6


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 64])
async def test_somebody_else_on_the_port_of_etcd(answer: bytes) -> None:
    async def speak(stream: trio.SocketStream) -> None:
        try:
            await stream.send_all(answer)
            await stream.aclose()
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, speak, [listener])
        endpoint = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        async with open_session(EtcdSettings(endpoints=(endpoint,)), endpoint, 1.0) as session:
            with pytest.raises(EtcdUnavailable):
                await session.list_prefix("/x")
        nursery.cancel_scope.cancel()


async def test_a_call_that_is_cancelled_leaves_no_thread_waiting(shared: EtcdServer) -> None:
    async with open_relay(shared.port) as relay:
        async with open_session(EtcdSettings(endpoints=(relay.endpoint,)), relay.endpoint, 30.0) as session:
            await session.read("/x")
            relay.freeze()
            with trio.move_on_after(0.2):
                await session.read("/x")
            limiter = session._limiter
            assert limiter.borrowed_tokens == 1
        await until(lambda: not limiter.borrowed_tokens, 1)
        relay.thaw()


async def test_users_and_permissions(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong-battery\n")
    with EtcdServer() as etcd:
        etcd.enable_users("fs", "right-horse")
        with pytest.raises(EtcdRefused, match="'fs'") as refusal:
            async with session_of(etcd, user="fs", password_file=secret):
                pass
        assert "battery" not in repr(refusal.value) + repr(refusal.value.__cause__)
        secret.write_text("right-horse\n")
        async with session_of(etcd, user="fs", password_file=secret) as session:
            await session.read("/x")
            with closing(etcd.client()) as client:
                root = etcdrpc.AuthStub(client.channel)
                token = root.Authenticate(etcdrpc.AuthenticateRequest(name="root", password="root"), 5).token
                metadata = (("token", token),)
                revoke = etcdrpc.AuthRoleRevokePermissionRequest(role="all", key=b"\0", range_end=b"\0")
                root.RoleRevokePermission(revoke, 5, metadata=metadata)
            with pytest.raises((TokenExpired, EtcdRefused)):  # roles have changed since it was given
                await session.create("/x", b"")
        async with session_of(etcd, user="fs", password_file=secret) as session:
            with pytest.raises(EtcdRefused, match="permission denied"):
                await session.read("/x")
            with pytest.raises(EtcdUnavailable, match="PermissionDenied"):
                await session.watch("/x", 0, Watcher().take)
        secret.unlink()
        with pytest.raises(EtcdRefused, match="cannot be read"):
            async with session_of(etcd, user="fs", password_file=secret):
                pass


async def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    names = {"ca": authority, "stranger": stranger}
    for name, who in names.items():
        who.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    for name, who in (("server", authority), ("client", authority), ("other", stranger)):
        issued = who.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        for pem in issued.cert_chain_pems:
            pem.write_to_path(tmp_path / f"{name}.crt", append=True)
    tls = ServerTls(
        ca=tmp_path / "ca.pem",
        cert=tmp_path / "server.crt",
        key=tmp_path / "server.key",
        client_cert=tmp_path / "client.crt",
        client_key=tmp_path / "client.key",
    )
    with EtcdServer(tls=tls) as etcd:
        async with session_of(etcd) as session:
            await session.create("/tls", b"1")
            assert (await session.read("/tls"))[0] == b"1"
        for wrong in (
            {"ca": tmp_path / "stranger.pem"},
            {"cert": tmp_path / "other.crt", "key": tmp_path / "other.key"},
            {"cert": None, "key": None},
            {"ca": None},  # then it is the authorities of the system
        ):
            async with session_of(etcd, **wrong) as session:
                with pytest.raises(EtcdUnavailable):
                    await session.read("/tls")
        with pytest.raises(EtcdRefused, match=r"missing\.pem"):
            async with session_of(etcd, ca=tmp_path / "missing.pem"):
                pass
