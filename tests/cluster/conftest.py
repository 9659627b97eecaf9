"""One S3 server for all clusters (that of the whole run); a machine without network namespaces skips them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.s3_server import S3Server
from tests.cluster.namespaces import why_not
from tests.support.mounts import Bucket


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot work here, with the reason, and keep clusters of one run in one worker of xdist."""
    here = [item for item in items if item.path.parent.name == "cluster"]
    reason = why_not() if here else ""
    for item in here:
        item.add_marker(pytest.mark.fuse)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def bucket(s3_server: S3Server) -> Iterator[Bucket]:
    """A bucket that only this test uses."""
    with Bucket.create(s3_server) as made:
        yield made
