"""Certificates and the secret: what can be used, what is refused, what is read again; and RFC 7616 by itself."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import threading
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from cachefs.errors import UsageError
from peer.credentials import PeerCredentials, check_listen, is_loopback
from peer.digest import DigestClient, DigestServer, SharedSecret, parse_parameters

SECRET = "correct horse battery staple"


def write_secret(path: Path, text: str = SECRET + "\n", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


class Authority:
    """An authority, and certificates of it as files."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, name: str = "peer") -> tuple[Path, Path, Path]:
        """Write a certificate and its key; return what PeerCredentials takes."""
        issued = self.ca.issue_cert(f"{name}.test")
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key, self.ca_file


def shake_hands(server: PeerCredentials, client: PeerCredentials) -> str:
    """Return the protocol of a handshake between two nodes, or raise what the server raised."""
    ours, theirs = socket.socketpair()
    troubles: list[Exception] = []

    def accept() -> None:
        try:
            contexts = server.tls_contexts()
            assert contexts is not None
            with contexts.server.wrap_socket(ours, server_side=True) as tls:
                tls.sendall(b"hello")
        except (OSError, ssl.SSLError) as error:
            troubles.append(error)
            ours.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        contexts = client.tls_contexts()
        assert contexts is not None
        with contexts.client.wrap_socket(theirs) as tls:
            assert tls.recv(5) == b"hello"
            return tls.version() or ""
    finally:
        theirs.close()
        thread.join()
        ours.close()
        if troubles:
            raise troubles[0]


# -- certificates -----------------------------------------------------------------------------------------------------


def test_peers_of_one_authority_believe_each_other(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = PeerCredentials(*authority.issue("one")), PeerCredentials(*authority.issue("other"))
    assert one.tls
    assert not one.has_secret
    assert shake_hands(one, other) == "TLSv1.3"


def test_old_tls_is_refused(tmp_path: Path) -> None:
    credentials = PeerCredentials(*Authority(tmp_path).issue())
    contexts = credentials.tls_contexts()
    assert contexts is not None
    for context in (contexts.server, contexts.client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED


def test_another_authority_is_refused_by_both_sides(tmp_path: Path) -> None:
    one = PeerCredentials(*Authority(tmp_path / "1").issue())
    other = PeerCredentials(*Authority(tmp_path / "2").issue())
    with pytest.raises(ssl.SSLError):
        shake_hands(one, other)


@pytest.mark.parametrize("given", [(1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_half_of_the_files_is_refused(tmp_path: Path, given: tuple[int, int, int]) -> None:
    files = Authority(tmp_path).issue()
    with pytest.raises(UsageError, match="missing: --peer-"):
        PeerCredentials(*[str(path) if wanted else "" for path, wanted in zip(files, given, strict=True)])


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
@pytest.mark.parametrize("trouble", ["gone", "rubbish", "empty"])
def test_files_that_cannot_be_used(tmp_path: Path, which: str, trouble: str) -> None:
    files = dict(zip(("cert", "key", "ca"), Authority(tmp_path).issue(), strict=True))
    files[which].unlink()
    if trouble != "gone":
        files[which].write_text("rubbish\n" if trouble == "rubbish" else "")
    with pytest.raises(UsageError, match=r"--peer-(cert|ca)") as refused:
        PeerCredentials(**files)
    assert "\n" not in str(refused.value)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with pytest.raises(UsageError, match="key values mismatch"):
        PeerCredentials(authority.issue("one")[0], authority.issue("other")[1], authority.ca_file)


def test_a_locked_key_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key, ca = Authority(tmp_path).issue()
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(UsageError, match="locked with a password"):
        PeerCredentials(cert, key, ca)


def test_new_files_are_used(tmp_path: Path) -> None:
    old, new = Authority(tmp_path), Authority(tmp_path / "new")
    files = old.issue()
    ours, theirs = PeerCredentials(*files), PeerCredentials(*new.issue())
    before = ours.tls_contexts()
    assert ours.tls_contexts() is before
    with pytest.raises(ssl.SSLError):
        shake_hands(ours, theirs)
    for fresh, path in zip(new.issue("renewed"), files, strict=True):
        path.write_bytes(fresh.read_bytes())
    assert shake_hands(ours, theirs)


@pytest.mark.expect_warnings("the old one stays")
def test_broken_new_files_leave_the_old_ones_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(tmp_path)
    cert, key, ca = authority.issue()
    ours, theirs = PeerCredentials(cert, key, ca), PeerCredentials(*authority.issue("other"))
    key.write_text("half of a ke")
    for _ in range(3):
        assert shake_hands(ours, theirs)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    cert.unlink()
    assert shake_hands(theirs, ours)
    authority.issue()
    before = ours.tls_contexts()
    assert shake_hands(ours, theirs)
    assert ours.tls_contexts() is before, "read once"


# -- the secret -------------------------------------------------------------------------------------------------------


def test_the_secret_is_never_shown(tmp_path: Path) -> None:
    credentials = PeerCredentials(secret_file=write_secret(tmp_path / "secret"))
    secret = credentials.secret()
    assert secret is not None
    for shown in (repr(credentials), repr(secret), str(secret), repr(vars(credentials))):
        assert SECRET not in shown
        assert secret.digest not in shown
    assert credentials.has_secret
    assert not credentials.tls
    assert credentials.tls_contexts() is None


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_end_of_the_line_is_no_part_of_it(tmp_path: Path, ending: str) -> None:
    credentials = PeerCredentials(secret_file=write_secret(tmp_path / "secret", SECRET + ending))
    assert credentials.secret() == SharedSecret.derive(SECRET.encode())


@pytest.mark.parametrize("text", ["", "\n", "fifteen bytes..", "fifteen bytes..\n", "x" * 4097])
def test_secrets_that_are_too_short_or_too_long(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="16 to 4096 bytes") as refused:
        PeerCredentials(secret_file=write_secret(tmp_path / "secret", text))
    assert "fifteen" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o777])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UsageError, match="chmod o="):
        PeerCredentials(secret_file=write_secret(tmp_path / "secret", mode=mode))
    PeerCredentials(secret_file=write_secret(tmp_path / "secret", mode=0o640))


def test_no_secret_file(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            PeerCredentials(secret_file=path)


@pytest.mark.expect_warnings("the old one stays")
def test_a_new_secret_is_used_a_broken_one_is_not(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "secret")
    credentials = PeerCredentials(secret_file=path)
    write_secret(tmp_path / "next", "x" * 20).rename(path)
    renewed = SharedSecret.derive(b"x" * 20)
    assert credentials.secret() == renewed
    write_secret(path, "short")
    assert credentials.secret() == renewed
    path.unlink()
    assert credentials.secret() == renewed


# -- where to listen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", "localhost"])
def test_loopback_needs_no_proof(address: str) -> None:
    assert is_loopback(address)
    check_listen(address, PeerCredentials(), False)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "", "::", "10.1.2.3", "fe80::1%eth0", "::ffff:10.0.0.1", "no such name"]
)
def test_everything_else_does(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--peer-insecure"):
        check_listen(address, PeerCredentials(), False)
    check_listen(address, PeerCredentials(secret_file=write_secret(tmp_path / "secret")), False)


@pytest.mark.expect_warnings("without any proof")
def test_insecure_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    check_listen("10.1.2.3", PeerCredentials(), True)
    assert "without any proof" in caplog.text


# -- RFC 7616 ---------------------------------------------------------------------------------------------------------


def test_the_example_of_the_rfc() -> None:
    """RFC 7616, 3.9.1, with SHA-256 and qop=auth; user and realm are those of the example."""
    from peer import digest

    secret = SharedSecret(digest._hashed("Mufasa", "http-auth@example.org", "Circle of Life"))
    question = digest._Question(
        nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v",
        nc="00000001",
        cnonce="f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ",
        qop="auth",
        target="/dir/index.html",
    )
    expected = "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"
    assert secret.proof(question, "GET", b"") == expected


ONE, OTHER = SharedSecret.derive(b"one secret of many"), SharedSecret.derive(b"another secret ...")


def both() -> tuple[DigestServer, DigestClient]:
    server = DigestServer()
    return server, DigestClient(ONE, server.challenge(None))


def test_both_sides_prove_themselves_again_and_again() -> None:
    server, client = both()
    for number in range(3):
        body = b"body" * number
        proof = server.check(ONE, "POST", "/x", client.authorize("POST", "/x", body), body)
        assert proof is not None
        assert client.proves_itself(proof)
        assert not client.proves_itself(proof), "good once"


def test_what_is_proven_is_the_whole_question() -> None:
    for secret, method, target, body in [
        (OTHER, "POST", "/x", b"body"),
        (ONE, "GET", "/x", b"body"),
        (ONE, "POST", "/y", b"body"),
        (ONE, "POST", "/x", b"bodY"),
        (ONE, "POST", "/x", b""),
    ]:
        server, client = both()
        authorization = client.authorize("POST", "/x", b"body")
        assert server.check(secret, method, target, authorization, body) is None
        assert server.check(ONE, "POST", "/x", authorization, b"body") is not None


def test_a_proof_is_good_once_and_on_one_connection() -> None:
    server, client = both()
    first, second = client.authorize("GET", "/", b""), client.authorize("GET", "/", b"")
    assert DigestServer().check(ONE, "GET", "/", first, b"") is None
    assert server.check(ONE, "GET", "/", second, b"") is not None
    assert server.check(ONE, "GET", "/", second, b"") is None
    assert server.check(ONE, "GET", "/", first, b"") is None, "nc has to grow"


def test_the_proof_without_the_body_is_not_enough_for_a_body() -> None:
    server, client = both()
    authorization = client.authorize("POST", "/x", b"")
    assert "qop=auth," in authorization
    assert server.check(ONE, "POST", "/x", authorization, b"body") is None


def test_another_nonce_is_called_stale() -> None:
    server, client = both()
    assert "stale" not in server.challenge(None)
    assert "stale" not in server.challenge("Basic abc")
    assert "stale" not in server.challenge(client.authorize("GET", "/", b""))
    assert "stale=true" in DigestServer().challenge(client.authorize("GET", "/", b""))


def test_a_server_without_the_secret_is_not_believed() -> None:
    server, client = both()
    client.authorize("GET", "/", b"")
    impostor = DigestServer()
    impostor._nonce = server._nonce
    proof = impostor.check(
        OTHER, "GET", "/", DigestClient(OTHER, server.challenge(None)).authorize("GET", "/", b""), b""
    )
    assert proof is not None
    for answer in (None, "", "rspauth", proof, re.sub('cnonce="[^"]*"', 'cnonce=""', proof)):
        client.authorize("GET", "/", b"")
        assert not client.proves_itself(answer)


@pytest.mark.parametrize(
    "challenge",
    [
        "",
        "Basic realm=cachefs",
        'Digest realm="cachefs", qop="auth, auth-int", algorithm=MD5, nonce="a"',
        'Digest realm="cachefs", qop="auth", algorithm=SHA-256, nonce="a"',
        'Digest realm="other", qop="auth-int", algorithm=SHA-256, nonce="a"',
        'Digest realm="cachefs", qop="auth-int", algorithm=SHA-256, nonce=""',
        'Digest realm="cachefs", qop="auth-int", algorithm=SHA-256, nonce="a\nb"',
        'Digest realm="cachefs", realm="cachefs", qop="auth-int", algorithm=SHA-256, nonce="a"',
        'Digest realm="cachefs", qop="auth-int", algorithm=SHA-256, nonce="a" junk',
        "Digest " + ", ".join(f"a{number}=1" for number in range(100)),
    ],
)
def test_challenges_that_are_not_ours(challenge: str) -> None:
    with pytest.raises(ValueError, match=r"challenge|Digest|parameter"):
        DigestClient(ONE, challenge)


@given(st.text(max_size=300))
def test_rubbish_proves_nothing(text: str) -> None:
    server, client = both()
    client.authorize("GET", "/", b"")
    assert server.check(ONE, "GET", "/", text, b"") is None
    assert server.check(ONE, "GET", "/", "Digest " + text, b"") is None
    assert not client.proves_itself(text)


@given(st.integers(0, 400), st.characters())
def test_one_wrong_letter_proves_nothing(position: int, letter: str) -> None:
    server, client = both()
    good = client.authorize("GET", "/", b"")
    position %= len(good)
    bad = good[:position] + letter + good[position + 1 :]
    try:
        same = parse_parameters(bad.partition(" ")[2]) == parse_parameters(good.partition(" ")[2])
    except ValueError:
        same = False
    harmless = same or bad.lower() == good.lower()
    assert harmless or server.check(ONE, "GET", "/", bad, b"") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file that is not his")
def test_a_file_of_somebody_else_can_be_a_secret(tmp_path: Path) -> None:
    """What counts is who can read it: orchestrators mount secrets as root and give them to a group."""
    path = write_secret(tmp_path / "secret", mode=0o440)
    os.chown(path, 65534, 0)
    assert PeerCredentials(secret_file=path).has_secret
