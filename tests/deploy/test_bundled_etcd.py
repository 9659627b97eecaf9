"""The bundled etcd: a real server with the arguments and certificates of the chart, asked as the pods ask it."""

from __future__ import annotations

import base64
import contextlib
import random
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.starting import start_on_free_ports
from cachefs.errors import CachefsError
from csi.etcd_records import EtcdRecords
from peer.credentials import PeerCredentials
from peer.etcd_settings import EtcdSettings
from tests.deploy.chart import container, render
from tests.support.etcd_server import PORTS

START_S = 30.0


@pytest.fixture(scope="module")
def objects() -> tuple[dict[str, Any], ...]:
    """One rendering: another one has other certificates."""
    return tuple(render({}))


@pytest.fixture(scope="module")
def files(objects: tuple[dict[str, Any], ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Secrets with certificates as pods see them, by name."""
    found = {}
    for each in objects:
        if each["kind"] == "Secret" and each["metadata"]["name"].endswith("-tls"):
            folder = found[each["metadata"]["name"]] = tmp_path_factory.mktemp(each["metadata"]["name"])
            for key, value in each["data"].items():
                (folder / key).write_bytes(base64.b64decode(value))
    return found


def command_here(
    objects: tuple[dict[str, Any], ...], files: dict[str, Path], data: Path, ports: list[int]
) -> list[str]:
    """The command of the pod, with addresses and directories of this machine."""
    command = []
    for argument in container(objects, "StatefulSet", "-etcd", "etcd")["command"]:
        text = argument.replace("$(POD_NAME)", "cachefs-etcd-0").replace("/var/lib/etcd", str(data))
        text = text.replace("/etc/etcd/tls", str(files["cachefs-etcd-server-tls"]))
        text = re.sub(r"cachefs-etcd-0\.cachefs-etcd\.cachefs\.svc", "localhost", text)
        for inside, here in zip((2379, 2380, 2381), ports, strict=True):
            text = text.replace(f"0.0.0.0:{inside}", f"127.0.0.1:{here}").replace(
                f"localhost:{inside}", f"localhost:{here}"
            )
        command.append(text)
    return command


@pytest.fixture(scope="module")
def server(
    objects: tuple[dict[str, Any], ...], files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of the running server."""
    running: list[subprocess.Popen[bytes]] = []
    address = ""

    def start() -> None:
        nonlocal address
        data = tmp_path_factory.mktemp("etcd")
        ports = random.sample(PORTS, 3)
        with (data / "log").open("wb") as sink:
            process = subprocess.Popen(command_here(objects, files, data, ports), stdout=sink, stderr=sink)
        running.append(process)
        wait_until_open(ports[0], process, data / "log")
        address = f"https://localhost:{ports[0]}"

    try:
        start_on_free_ports(start, NotStarted)
        yield address
    finally:
        for process in running:
            process.kill()
            process.wait()


class NotStarted(Exception):
    """The server has ended, or does not listen; the text is the end of its log."""


def wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise NotStarted(log.read_text()[-2000:])


def records(server: str, ca: Path | None, client: Path | None) -> EtcdRecords:
    settings = EtcdSettings(
        endpoints=(server,),
        cluster="cachefs",
        ca=ca,
        cert=client / "tls.crt" if client else None,
        key=client / "tls.key" if client else None,
    )
    return EtcdRecords(settings, timeout_s=5.0)


def test_the_controller_keeps_records_in_it(server: str, files: dict[str, Path]) -> None:
    client = files["cachefs-etcd-client-tls"]
    asked = records(server, client / "ca.crt", client)
    try:
        assert asked.put_new("volumes", "v1-a", {"name": "a"}) is None
        assert asked.put_new("volumes", "v1-a", {"name": "b"}) == {"name": "a"}
    finally:
        asked.close()


def test_nobody_without_a_certificate_changes_records(server: str, files: dict[str, Path]) -> None:
    asked = records(server, files["cachefs-etcd-client-tls"] / "ca.crt", None)
    try:
        with pytest.raises(CachefsError):
            asked.put_new("volumes", "v1-b", {"name": "b"})
    finally:
        asked.close()


def test_a_certificate_of_another_authority_is_refused(server: str, files: dict[str, Path]) -> None:
    [other] = [each for each in render({}) if each["metadata"]["name"] == "cachefs-etcd-client-tls"]
    folder = files["cachefs-etcd-client-tls"].parent / "other"
    folder.mkdir(exist_ok=True)
    for key, value in other["data"].items():
        (folder / key).write_bytes(base64.b64decode(value))
    asked = records(server, files["cachefs-etcd-client-tls"] / "ca.crt", folder)
    try:
        with pytest.raises(CachefsError):
            asked.put_new("volumes", "v1-c", {"name": "c"})
    finally:
        asked.close()


def test_nodes_prove_themselves_with_their_certificates(files: dict[str, Path]) -> None:
    folder = files["cachefs-peer-tls"]
    credentials = PeerCredentials(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    contexts = credentials.tls_contexts()
    assert contexts is not None
    one, other = socket.socketpair()
    heard: list[bytes] = []

    def serve() -> None:
        with contexts.server.wrap_socket(other, server_side=True) as secured:
            heard.append(secured.recv(16))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with contexts.client.wrap_socket(one) as secured:
            assert secured.version() == "TLSv1.3"
            secured.sendall(b"hello")
    finally:
        thread.join(10)
    assert heard == [b"hello"]
    # and the other side asks for one
    assert contexts.server.verify_mode is ssl.CERT_REQUIRED
