"""Drivers for tests: the real one, at a real socket, over a bucket of the real S3 server."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.s3_server import S3Server
from cachefs.config import S3Config
from csi.buckets import Buckets
from csi.controller import Controller
from csi.identity import Identity
from csi.records import FileRecords
from tests.csi.fake_kube import FakeApi
from tests.csi.rig import Client, served


@pytest.fixture(autouse=True)
def _all_lines(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged at any level is there to be looked at, for secrets above all."""
    caplog.set_level(logging.DEBUG, logger="csi")


@pytest.fixture
def records(tmp_path: Path) -> FileRecords:
    """Where the controller of the test keeps its records."""
    return FileRecords(tmp_path / "state")


@pytest.fixture
def buckets(s3_server: S3Server) -> Buckets:
    """The test's S3 server, and credentials in the environment of the controller."""
    return Buckets(S3Config(endpoint_url=s3_server.endpoint_url), s3_server.environment)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    """A Kubernetes API."""
    made = FakeApi(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def driver(tmp_path: Path, records: FileRecords, buckets: Buckets) -> Iterator[Client]:
    """A controller at a socket."""
    yield from _controller(tmp_path, records, Controller(records, buckets))


@pytest.fixture
def hasty(tmp_path: Path, records: FileRecords, buckets: Buckets) -> Iterator[Client]:
    """A controller that waits a moment only for copies and deletions."""
    yield from _controller(tmp_path, records, Controller(records, buckets, wait_s=0.2))


def _controller(tmp_path: Path, records: FileRecords, controller: Controller) -> Iterator[Client]:
    try:
        with served(tmp_path / "csi.sock", [Identity(controller=True, checks=(records.check,)), controller]) as client:
            yield client
    finally:
        controller.close()


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
