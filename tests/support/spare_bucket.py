"""A bucket that the tests of a module share, one after the other: the server takes a second to make one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from bench.s3_server import S3Server
from cachefs.config import S3Config
from cachefs.store.admin import BucketAdmin


@contextmanager
def spare_bucket(server: S3Server, label: str) -> Iterator[str]:
    """Make a bucket whose name begins with `label`; it has to be empty at the end."""
    name = server.create_bucket(f"{label}-{os.getpid()}")
    yield name
    server.client().delete_bucket(Bucket=name)


@contextmanager
def emptied(server: S3Server, bucket: str) -> Iterator[str]:
    """Give the bucket, and remove what is in it afterwards."""
    yield bucket
    config = S3Config(source=f"s3://{bucket}", endpoint_url=server.endpoint_url)
    with BucketAdmin(config, server.environment) as cleaner:
        cleaner.delete(found.key for found in list(cleaner.objects("")))
