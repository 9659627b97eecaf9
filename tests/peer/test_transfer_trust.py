"""Certificates and secrets on the wire: who is no peer gets nothing, and who only says to be one is not believed."""

from __future__ import annotations

import contextlib
import datetime
import logging
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from peer.credentials import PeerCredentials
from peer.digest import DigestClient, SharedSecret
from peer.members import Member
from tests.peer.fake_holdings import BLOCK
from tests.peer.rig import (
    FRAMES,
    LAST,
    OK_HEAD,
    SIZE,
    Askers,
    FakePeers,
    Nodes,
    Trust,
    ask,
    asker,
    fake_peer,
    leaves_nothing,
    node,
    read_request,
    trust,
    within,
)

__all__ = ["asker", "fake_peer", "leaves_nothing", "node", "trust"]


def test_who_has_another_authority_gets_nothing(node: Nodes, asker: Askers, trust: Trust, tmp_path: Path) -> None:
    there = node(trust.credentials("tls"))
    stranger = Trust(tmp_path / "stranger")
    assert "certificate" in ask(asker(stranger.credentials("tls")), there.member)[1]
    half = PeerCredentials(stranger.cert, stranger.key, trust.ca)  # believes us, but is not believed
    here = asker(half)
    assert ask(here, there.member)[0] == []
    assert here.client.health(there.member)["state"] == "open"
    assert there.holdings.asked == {}
    assert there.counters.get("peer_refused_requests") == 2


def test_who_shows_no_certificate_gets_nothing(node: Nodes, trust: Trust) -> None:
    there = node(trust.credentials("tls"))
    context = ssl.create_default_context(cafile=str(trust.ca))
    context.check_hostname = False
    received = b""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        plain = stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
        tls = stack.enter_context(context.wrap_socket(plain))  # in TLS 1.3 the server learns last that there is none
        tls.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        received = tls.recv(1)
    assert received == b""
    assert there.holdings.asked == {}


@pytest.mark.parametrize("expired", ["server", "client"])
def test_an_expired_certificate(
    node: Nodes, asker: Askers, trust: Trust, expired: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    cert, key = trust.issue("expired", not_before=past - datetime.timedelta(days=9), not_after=past)
    old, good = PeerCredentials(cert, key, trust.ca), trust.credentials("tls")
    there = node(old if expired == "server" else good)
    there.holdings.put("x", SIZE)
    told, why = ask(asker(good if expired == "server" else old), there.member)
    assert told == []
    if expired == "server":
        assert "certificate has expired" in why
    else:  # the server ends the connection, and says why in its own log
        assert "does it accept our certificate?" in why
        assert "certificate has expired" in caplog.text
    assert ask(asker(good), there.member)[0] == ([] if expired == "server" else [1, 2, 3])


def test_a_certificate_that_signed_itself(node: Nodes, asker: Askers, trust: Trust) -> None:
    there = node(trust.credentials("tls"))
    cert, key = trust.issue("alone", trustme.CA())
    assert ask(asker(PeerCredentials(cert, key, trust.ca)), there.member)[0] == []


@pytest.mark.parametrize(("ours", "theirs"), [("tls", "open"), ("open", "tls"), ("tls", "secret")])
def test_one_speaks_tls_and_the_other_does_not(
    node: Nodes, asker: Askers, trust: Trust, ours: str, theirs: str
) -> None:
    there, here = node(trust.credentials(theirs)), asker(trust.credentials(ours))
    there.holdings.put("x", SIZE)
    with within(0.5):
        assert "TLS" in ask(here, there.member)[1]
    claims = {name: getattr(there.member, name) for name in there.member.__struct_fields__}
    liar = Member(**{**claims, "tls": here.client._connections._credentials.tls, "node_id": "e" * 16})
    with within(2.5):
        assert ask(here, liar)[0] == []
    assert there.holdings.asked == {}


def test_another_secret(node: Nodes, asker: Askers, trust: Trust, tmp_path: Path) -> None:
    there = node(trust.credentials("secret"))
    there.holdings.put("x", SIZE)
    stranger = asker(Trust(tmp_path / "other", b"another secret of some length").credentials("secret"))
    told, why = ask(stranger, there.member)
    assert told == []
    assert "secrets differ" in why
    assert stranger.client.health(there.member)["state"] == "open"
    assert "401" in ask(asker(), there.member)[1]
    assert there.holdings.asked == {}
    assert ask(asker(trust.credentials("secret")), there.member) == ([1, 2, 3], "")


def test_a_server_that_has_no_secret_is_not_used(node: Nodes, asker: Askers, trust: Trust) -> None:
    there = node()
    there.holdings.put("x", SIZE)
    told, why = ask(asker(trust.credentials("secret")), there.member)
    assert told == []
    assert "does not have it" in why


def test_an_impostor_that_asks_for_the_secret_is_not_used(asker: Askers, fake_peer: FakePeers, trust: Trust) -> None:
    challenge = (
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n"
        b'WWW-Authenticate: Digest realm="cachefs", qop="auth-int", algorithm=SHA-256, nonce="abc"\r\n\r\n'
    )

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(challenge)
        read_request(connection)
        connection.sendall(OK_HEAD + b"".join(FRAMES) + LAST)
        there.over.wait()

    here, there = asker(trust.credentials("secret")), fake_peer(script)
    told, why = ask(here, there.member)
    assert told == []
    assert "did not prove" in why


def test_a_proof_cannot_be_used_again(node: Nodes, trust: Trust) -> None:
    there = node(trust.credentials("secret"))
    version = there.holdings.put("x", BLOCK)
    target = f"/v1/blocks/{there.holdings.key(version, 0).hex()}"
    secret = SharedSecret.derive(trust.secret.read_bytes())

    def send(connection: socket.socket, authorization: str = "") -> bytes:
        proof = f"Authorization: {authorization}\r\n" if authorization else ""
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n{proof}\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(4096)
        head, _, body = received.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65536)
        return head

    with socket.create_connection(("127.0.0.1", there.port)) as one:
        challenge = send(one).decode().split("WWW-Authenticate: ")[1].split("\r\n")[0]
        client = DigestClient(secret, challenge)
        proof = client.authorize("GET", target, b"")
        assert b" 200 " in send(one, proof)
        assert b" 401 " in send(one, proof), "on the same connection"
        with socket.create_connection(("127.0.0.1", there.port)) as other:
            assert b" 401 " in send(other, proof), "on another one"
            assert b"stale=true" in send(other, client.authorize("GET", target, b""))
        assert b" 200 " in send(one, client.authorize("GET", target, b""))


@pytest.mark.parametrize("kind", ["secret", "tls"])
def test_renewed_files_are_used_without_a_restart(node: Nodes, asker: Askers, trust: Trust, kind: str) -> None:
    there, here = node(trust.credentials(kind)), asker(trust.credentials(kind))
    there.holdings.put("x", SIZE)
    assert ask(here, there.member) == ([1, 2, 3], "")
    if kind == "secret":
        trust.secret.write_bytes(b"the next secret of the cluster")
    else:
        trust.issue("peer")
    assert ask(here, there.member) == ([1, 2, 3], "")
    fresh = asker(trust.credentials(kind))
    assert ask(fresh, there.member) == ([1, 2, 3], "")
