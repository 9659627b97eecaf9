"""Who holds most of a dataset: asked from etcd, where nodes say how much of each volume they have (`peer.holding`).

A dataset that nobody mounts by itself may be part of what is mounted: s3://b/train/a is then looked for as s3://b/train
and s3://b, the nearest first. What such nodes hold may be other parts of it, so whoever asks is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import trio

from cachefs.config import Addressing, S3Config
from cachefs.errors import StorageUnavailable, UsageError
from cachefs.store.address import Address
from cachefs.store.source import Source, parse_source
from peer import holding
from peer.etcd import EtcdFault, open_session
from peer.etcd_settings import EtcdSettings
from peer.roster import Keys

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Found:
    """Nodes that hold something."""

    source: str
    """What they mount: the dataset, or what it is a part of."""
    nodes: tuple[tuple[str, int], ...]
    """Names (--node-name) and bytes, the most first; each once."""


def dataset_of(config: S3Config) -> str:
    """Return the name of the dataset that is the source, 16 hexadecimal digits. Raises UsageError."""
    source = _bucket_source(config)
    return holding.dataset_name(_endpoint(config, source), source.bucket, source.prefix)


def find_holders(config: S3Config, settings: EtcdSettings) -> Found | None:
    """Return the nodes that hold something of the source; None: there are none. BLOCKS for seconds at most.

    Raises UsageError for a source that is no bucket, StorageUnavailable when etcd cannot be asked.
    """
    source = _bucket_source(config)
    endpoint = _endpoint(config, source)
    known = _read(settings)
    for prefix in _prefixes(source.prefix):
        sums: dict[str, int] = {}
        for holder in known.get(holding.dataset_name(endpoint, source.bucket, prefix), []):
            if holder.held_bytes:
                name = holder.member.name  # two agents of a node are one node
                sums[name] = sums.get(name, 0) + holder.held_bytes
        if sums:
            nodes = sorted(sums.items(), key=lambda pair: (-pair[1], pair[0]))
            return Found(f"s3://{source.bucket}/{prefix}".rstrip("/"), tuple(nodes))
    return None


def _bucket_source(config: S3Config) -> Source:
    source = parse_source(config.source)
    if source.scheme != "s3":
        raise UsageError(f"{config.source} is a directory of one node: a dataset is in a bucket, s3://BUCKET[/PREFIX]")
    return source


def _endpoint(config: S3Config, source: Source) -> str:
    return Address.parse(source.bucket, config.region, config.endpoint_url, Addressing.AUTO).identity


def _prefixes(prefix: str) -> Iterator[str]:
    """Yield a prefix and those above it."""
    yield prefix
    while prefix:
        prefix = prefix.removesuffix("/").rpartition("/")[0]
        prefix = f"{prefix}/" if prefix else ""
        yield prefix


def _read(settings: EtcdSettings) -> dict[str, list[holding.Holder]]:
    keys = Keys(settings.cluster)

    async def listed(endpoint: str) -> dict[str, list[holding.Holder]]:
        async with open_session(settings, endpoint, TIMEOUT_S) as session:
            records, _ = await session.list_prefix(keys.prefix)
            return holding.holders(keys, records)

    reasons = []
    for endpoint in settings.endpoints:
        try:
            return trio.run(listed, endpoint)
        except EtcdFault as error:
            reasons.append(str(error))
    raise StorageUnavailable(f"etcd cannot be asked who holds what: {'; '.join(reasons)}")
