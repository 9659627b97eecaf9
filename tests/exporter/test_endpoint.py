"""The endpoint: what scrapers get, while agent and keeper are there, away or silent, and what bad clients get."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cachefs
from bench.s3_server import S3Server
from cachefs.config import CacheConfig
from cachefs.errors import UsageError
from cachefs.exporter import endpoint as endpoint_module
from cachefs.exporter import scrape as scrape_module
from cachefs.exporter.endpoint import Endpoint, parse_listen
from cachefs.exporter.scrape import Scrape
from cachefs.exporter.table import FAMILIES
from tests.csi.fake_agent import FakeAgent
from tests.csi.fake_keeper import FakeKeeper
from tests.csi.kube_node import KubeNode
from tests.exporter.strict_format import Read, read, scraped
from tests.support.machine import wait_until
from tests.support.mounts import Bucket


class Node:
    """An endpoint with a keeper and an agent that are not real, both away."""

    def __init__(self, base: Path) -> None:
        self.cache = CacheConfig(cache_dir=f"{base}/cache", runtime_dir=f"{base}/node")
        self.agent = FakeAgent(self.cache)
        (base / "kubelet").mkdir()
        self.keeper = FakeKeeper(base / "keeper.sock", base / "kubelet")
        self.scrape = Scrape(self.cache, str(self.keeper.path))
        self.endpoint = Endpoint("127.0.0.1", 0, self.scrape.text)
        self.endpoint.start()
        self.port = self.endpoint.port

    def close(self) -> None:
        self.endpoint.close()
        self.agent.stop()
        self.keeper.stop()

    def ask(self, request: bytes) -> bytes:
        """Return everything that is answered."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as client:
            client.sendall(request)
            return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.fixture
def node() -> Iterator[Node]:
    base = Path(tempfile.mkdtemp(prefix="metrics-", dir="/tmp"))  # short: a socket's address has 107 bytes
    made = Node(base)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(base, ignore_errors=True)


def test_agent_and_keeper_come_and_go(node: Node) -> None:
    found = scraped(node.port)
    assert found["cachefs_agent_up"].value() == found["cachefs_keeper_up"].value() == 0
    assert set(found) == {
        "cachefs_agent_up", "cachefs_keeper_up", "cachefs_build_info", "cachefs_scrape_duration_seconds",
    }  # fmt: skip
    assert found["cachefs_build_info"].value(part="service", version=cachefs.__version__) == 1
    node.agent.start()
    node.keeper.start()
    found = scraped(node.port)
    assert found["cachefs_agent_up"].value() == found["cachefs_keeper_up"].value() == 1
    assert found["cachefs_node_service_connected"].value() == 1
    node.keeper.stop()
    found = scraped(node.port)
    assert (found["cachefs_agent_up"].value(), found["cachefs_keeper_up"].value()) == (1, 0)
    assert "cachefs_node_service_connected" not in found


def test_an_agent_that_is_silent_costs_its_own_values_only(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape_module, "ASK_S", 0.3)
    node.keeper.start()
    node.agent.start()
    node.agent.silent.set()
    began = time.monotonic()
    found = scraped(node.port)
    assert 0.2 < time.monotonic() - began < 2
    assert (found["cachefs_agent_up"].value(), found["cachefs_keeper_up"].value()) == (0, 1)
    assert found["cachefs_scrape_duration_seconds"].value(part="agent") >= 0.2


def test_many_scrapers_share_questions(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape_module, "ASK_S", 0.4)
    node.keeper.start()
    node.agent.start()
    node.agent.silent.set()
    with ThreadPoolExecutor(endpoint_module.MOST_CLIENTS) as threads:
        began = time.monotonic()
        found = list(threads.map(scraped, [node.port] * endpoint_module.MOST_CLIENTS))
    assert len(found) == endpoint_module.MOST_CLIENTS
    assert time.monotonic() - began < 2
    assert node.keeper.calls["status"] <= 3


@pytest.mark.expect_warnings("makes no sense")
def test_a_keeper_that_says_nonsense_is_no_error(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node.keeper, "_status", lambda _: {"ok": True, "mounts": [{"key": 3}]})
    node.keeper.start()
    node.agent.start()
    for _ in range(3):
        found = scraped(node.port)
        assert (found["cachefs_agent_up"].value(), found["cachefs_keeper_up"].value()) == (1, 0)
    assert len([record for record in caplog.records if "makes no sense" in record.message]) == 1


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /metrics HTTP/1.1", 200), (b"GET /metrics?x=1 HTTP/1.0", 200), (b"HEAD /metrics HTTP/1.1", 200),
        (b"GET / HTTP/1.1", 404), (b"GET /metrics/../etc HTTP/1.1", 404), (b"POST /metrics HTTP/1.1", 405),
        (b"GET /metrics HTTP/2", 400), (b"\x16\x03\x01\x02\x00", 400), (b"GET  /metrics", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 16400, 431),
    ],
)  # fmt: skip
def test_requests(node: Node, request_line: bytes, status: int) -> None:
    answer = node.ask(request_line + b"\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
    assert len(body) == (0 if request_line.startswith(b"HEAD") else length)
    if status == 200 and body:
        read(body)


def test_clients_that_say_nothing_are_bounded_in_number_and_time(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "CLIENT_S", 0.6)
    with contextlib.ExitStack() as stack:
        places = range(endpoint_module.MOST_CLIENTS)
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", node.port), timeout=5)) for _ in places]
        assert node.ask(b"").startswith(b"HTTP/1.1 503 ")
        assert len([each for each in threading.enumerate() if each.name == "metrics-answer"]) <= len(silent)
        for _ in range(4):  # a byte now and then does not prolong it
            silent[0].sendall(b"G")
            time.sleep(0.1)
        wait_until(lambda: answers(node), 5, "the places are free again")
        assert silent[0].recv(10) == b""


def answers(node: Node) -> bool:
    return node.ask(b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_clients_that_hang_up_leave_nothing(node: Node) -> None:
    for _ in range(3 * endpoint_module.MOST_CLIENTS):
        with socket.create_connection(("127.0.0.1", node.port), timeout=5) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.send(b"GET /metrics HTTP/1.1\r\n\r\n")
    wait_until(lambda: answers(node), 5, "it answers")
    wait_until(
        lambda: not [each for each in threading.enumerate() if each.name == "metrics-answer"], 5, "the threads are gone"
    )


def test_the_end(node: Node) -> None:
    port = node.port
    node.endpoint.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert "metrics" not in [each.name for each in threading.enumerate()]


def test_a_place_that_is_taken_is_a_clear_error(node: Node) -> None:
    with pytest.raises(
        UsageError, match=rf"^--metrics 127.0.0.1:{node.port}: cannot listen there: Address already in use"
    ):
        Endpoint("127.0.0.1", node.port, bytes)


def test_all_addresses() -> None:
    one = Endpoint("", 0, bytes)
    one.start()
    try:
        assert scraped(one.port) == {}
    finally:
        one.close()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(":9815", ("", 9815)), ("10.0.0.1:80", ("10.0.0.1", 80)), ("[fe80::1]:9815", ("fe80::1", 9815)),
     ("localhost:1", ("localhost", 1)), (":0", ("", 0))],
)  # fmt: skip
def test_addresses(text: str, wanted: tuple[str, int]) -> None:
    assert parse_listen(text) == wanted


@pytest.mark.parametrize("text", ["9815", "10.0.0.1", "a:b", ":", "::1", "a:99999", "", "[::1]", "a b:1"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_listen(text)


# -- the commands ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_bare_agent(tmp_path: Path) -> None:
    base = Path(tempfile.mkdtemp(prefix="metrics-", dir="/tmp"))
    (base / "shm").mkdir()
    port = free_port()
    command = [
        sys.executable, "-m", "cachefs.cli.main", "agent", "--shm-size=16MiB", "--cache-size=64MiB",
        f"--runtime-dir={base}/run", f"--cache-dir={base}/cache", f"--shm-dir={base}/shm",
    ]  # fmt: skip
    refused = subprocess.run([*command, "--metrics=nonsense"], capture_output=True, text=True, timeout=30, check=False)
    assert refused.returncode == 2
    assert "write ADDR" in refused.stderr
    with subprocess.Popen([*command, f"--metrics=127.0.0.1:{port}"]) as agent:
        try:
            wait_until(lambda: up(port, "agent"), 20, "it serves")
            found = scraped(port)
            assert found["cachefs_tier_limit_bytes"].value(tier="disk") == 64 << 20
            assert "cachefs_keeper_up" not in found
            agent.send_signal(signal.SIGTERM)
            assert agent.wait(20) == 0
        finally:
            agent.kill()
            shutil.rmtree(base, ignore_errors=True)


def up(port: int, part: str) -> bool:
    try:
        return scraped(port)[f"cachefs_{part}_up"].value() == 1
    except OSError:
        return False


@pytest.mark.fuse
def test_a_real_node(s3_server: S3Server) -> None:
    port = free_port()
    environment = {**s3_server.environment, "CACHEFS_METRICS": f"127.0.0.1:{port}"}
    with Bucket.create(s3_server) as bucket, KubeNode(environment) as node:
        bucket.fill({"a": b"x" * 3_000_000})
        volume = node.volume("handle-1", {"bucket": bucket.name, "endpoint": s3_server.endpoint_url})
        volume.stage()
        place = volume.publish()
        assert len((place / "a").read_bytes()) == 3_000_000
        source = f"s3://{bucket.name}"
        # what a worker has counted it says every few seconds
        wait_until(lambda: of_reads(scraped(port), source) == 3_000_000, 15, "the read is counted")
        found = scraped(port)
        [(labels, _)] = [
            pair for pair in found["cachefs_mount_info"].values.items() if dict(pair[0])["handle"] == "handle-1"
        ]
        key = dict(labels)["mount"]
        assert found["cachefs_mount_state"].value(mount=key, state="serving") == 1
        assert found["cachefs_mount_targets"].value(mount=key) == 1
        assert found["cachefs_mount_fuse_reads_total"].value(mount=key) > 0
        assert found["cachefs_fill_bytes_total"].value(origin="store") == 3_000_000
        [(labels, requests)] = found["cachefs_store_requests_total"].values.items()
        assert dict(labels)["volume"].rstrip("/") == source
        assert requests > 0
        assert set(found) <= set(FAMILIES)
        node.kill("agent")
        gone = scraped(port)
        assert gone["cachefs_keeper_up"].value() == 1
        wait_until(lambda: up(port, "agent"), 20, "the next agent is there")
        node.kill("keeper")
        assert scraped(port)["cachefs_keeper_up"].value() == 0
        node.start_keeper()
        wait_until(lambda: up(port, "keeper"), 20, "the next keeper is there")
        os.stat(place / "a")
        volume.unpublish()
        volume.unstage()


def of_reads(found: dict[str, Read], source: str) -> float:
    values = found.get("cachefs_mount_fuse_read_bytes_total", Read()).values
    return sum(value for labels, value in values.items() if dict(labels)["volume"].rstrip("/") == source)
