"""From a configuration to a store that is ready for use: the only place that knows which schemes exist."""

from __future__ import annotations

from collections.abc import Mapping

from cachefs.config import S3Config
from cachefs.store.port import ObjectStore
from cachefs.store.retry import RetryingStore, RetryPolicy
from cachefs.store.source import Source, parse_source

__all__ = ["Source", "open_store", "parse_source"]


def open_store(config: S3Config, environment: Mapping[str, str]) -> RetryingStore:
    """Return the store that `config.source` names, with retries and limits; makes no request.

    `environment` holds the AWS_* (and proxy) variables of the mount. Raises UsageError for settings that cannot work.
    """
    source = parse_source(config.source)
    inner: ObjectStore
    if source.scheme == "file":
        from cachefs.store.local import LocalStore

        inner = LocalStore(source.bucket)
    else:
        from cachefs.store.s3 import S3Store

        inner = S3Store(config, environment)
    return RetryingStore(inner, RetryPolicy(deadline_s=config.io_timeout_s), max_requests=config.max_requests)
