"""What `cachefs doctor` says about etcd and the address of a node."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.cli.checks import FAIL, OK, WARN
from cachefs.cli.peer_checks import check_advertised, check_agent, check_etcd, run_peer_checks
from cachefs.config import CacheConfig, PeerConfig
from cachefs.runtime import RuntimeDir
from tests.unit.test_cli_status import agent


@pytest.fixture
def answer() -> list[bytes]:
    return [b'{"health":"true"}']


@pytest.fixture
def endpoint(answer: list[bytes]) -> Iterator[str]:
    class Etcd(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(answer[0])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Etcd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_etcd_that_is_well(endpoint: str) -> None:
    for written in (endpoint, endpoint + "/"):
        assert check_etcd(written, PeerConfig(etcd=written)).outcome == OK


@pytest.mark.parametrize("said", [b'{"health":"false"}', b"[]", b"{}"])
def test_an_etcd_that_is_not_well(endpoint: str, answer: list[bytes], said: bytes) -> None:
    answer[0] = said
    found = check_etcd(endpoint, PeerConfig(etcd=endpoint))
    assert found.outcome == FAIL
    assert "quorum" in found.remedy


def test_what_is_no_etcd(endpoint: str, answer: list[bytes]) -> None:
    answer[0] = b"<html>"
    assert "does not answer as etcd" in check_etcd(endpoint, PeerConfig(etcd=endpoint)).text
    found = check_etcd(endpoint.replace("http:", "https:"), PeerConfig(etcd=endpoint))
    assert (found.outcome, "try http://" in found.remedy) == (FAIL, True)


def test_nothing_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        found = check_etcd(f"http://127.0.0.1:{held.getsockname()[1]}", PeerConfig())
    assert (found.outcome, "nothing listens there" in found.remedy) == (FAIL, True)


def test_addresses_of_others() -> None:
    assert check_advertised("127.0.0.1:7000").outcome == OK
    assert check_advertised("192.0.2.1").outcome == WARN
    assert check_advertised("no-such-host.invalid").outcome == FAIL


def test_an_agent_that_is_no_peer_for_now(tmp_path: Path) -> None:
    cache = CacheConfig(runtime_dir=str(tmp_path / "run"), cache_dir="/var/cache/cachefs")
    assert list(check_agent(cache)) == []
    assert not (tmp_path / "run").exists(), "asking makes nothing"
    runtime = RuntimeDir(cache.runtime_dir)
    assert list(check_agent(cache)) == []
    with agent(runtime, {}, cluster=None) as path:
        assert list(check_agent(cache)) == []
    os.unlink(path)
    with agent(runtime, {}, cluster={"cluster": "lab", "problem": None}) as path:
        assert [check.outcome for check in check_agent(cache)] == [OK]
    os.unlink(path)
    with agent(runtime, {}, cluster={"cluster": "lab", "problem": "the secret is gone"}):
        [found] = check_agent(cache)
        assert (found.outcome, "the secret is gone" in found.text, "by itself" in found.remedy) == (FAIL, True, True)


def test_which_checks_there_are(endpoint: str) -> None:
    assert list(run_peer_checks(PeerConfig())) == []
    open_to_all = PeerConfig(etcd=f"{endpoint},{endpoint}", peer_insecure=True, advertise="127.0.0.1")
    assert [check.name for check in run_peer_checks(open_to_all)] == ["etcd", "etcd", "peers", "advertise"]
    assert [check.name for check in run_peer_checks(PeerConfig(etcd=endpoint, peer_secret_file="/s"))] == ["etcd"]
