"""The real S3 server as a fixture: started once per test run, buckets of their own for whoever asks.

Use it with ``from tests.support.servers import s3_server, s3_bucket`` in a conftest (pytest looks them up by name).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from bench.s3_server import S3Server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running SeaweedFS for the whole test run. A test that kills it must restart it."""
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """An empty bucket that only this test uses."""
    name = s3_server.create_bucket(f"test-{os.getpid()}-{next(_numbers)}")
    yield name
    s3_server.client().delete_bucket(Bucket=name)  # SeaweedFS deletes the objects with it
