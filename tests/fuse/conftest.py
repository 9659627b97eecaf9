"""What tests on real mounts share: server, buckets, nodes, logs in the report, and a way out of a hanging mount."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.s3_server import S3Server
from tests.support import mounts
from tests.support.fault_proxy import FaultProxy
from tests.support.machine import abort_connections
from tests.support.mounts import Bucket, Node

HANG_S = 75.0
"""After this, a test that still runs has its mounts aborted: a read that hangs would not even see a signal."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this directory mounts."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.fuse)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of all open nodes with a failure."""
    report = yield
    if report.failed:
        for node in list(mounts.nodes):
            report.sections.append((f"cachefs logs of {node.base}", node.log_text()))
    return report


@pytest.fixture(autouse=True)
def _watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("timeout")
    limit_s = float(marker.args[0]) * 0.8 if marker is not None and marker.args else HANG_S
    timer = threading.Timer(limit_s, _abort_all)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()
    timer.join()


def _abort_all() -> None:
    for node in list(mounts.nodes):
        abort_connections(node.base)


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """An empty bucket."""
    with Bucket.create(s3_server) as made:
        yield made


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the server that counts and breaks."""
    with FaultProxy.before(s3_server.endpoint_url) as made:
        yield made


@pytest.fixture
def node(s3_server: S3Server) -> Iterator[Node]:
    """A node without mounts."""
    with Node(s3_server.environment) as made:
        yield made


@pytest.fixture
def make_node(s3_server: S3Server) -> Iterator[Callable[..., Node]]:
    """A function that makes nodes with other settings."""
    with ExitStack() as made:

        def make(**settings: Any) -> Node:
            return made.enter_context(Node(s3_server.environment, **settings))

        yield make


@pytest.fixture
def needs_root() -> None:
    """Skip a test that makes file systems of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
