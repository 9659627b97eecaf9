"""What tests of the keeper share: a node, a bucket, and a way out of a mount that hangs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.s3_server import S3Server
from tests.keeper.rig import KubeletNode, nodes
from tests.support.machine import abort_connections
from tests.support.mounts import Bucket

HANG_S = 75.0
"""After this, a test that still runs has its mounts aborted: a read that hangs would not even see a signal."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this directory mounts, but what is marked otherwise by its module's name."""
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
        for node in list(nodes):
            report.sections.append((f"logs of {node.base}", node.logs()))
    return report


@pytest.fixture(autouse=True)
def _watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("the keeper mounts as root")
    marker = request.node.get_closest_marker("timeout")
    limit_s = float(marker.args[0]) * 0.8 if marker is not None and marker.args else HANG_S
    timer = threading.Timer(limit_s, _abort_all)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()
    timer.join()


def _abort_all() -> None:
    for node in list(nodes):
        abort_connections(node.root)


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """An empty bucket."""
    with Bucket.create(s3_server) as made:
        yield made


@pytest.fixture
def make_node(s3_server: S3Server) -> Iterator[Callable[..., KubeletNode]]:
    """A function that makes nodes without any process."""
    with ExitStack() as made:

        def make(**settings: Any) -> KubeletNode:
            return made.enter_context(KubeletNode(s3_server.environment, s3_server.endpoint_url, **settings))

        yield make


@pytest.fixture
def node(make_node: Callable[..., KubeletNode]) -> KubeletNode:
    """A node with keeper and node service."""
    node = make_node()
    node.start_keeper()
    node.start_service()
    return node
